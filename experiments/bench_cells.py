"""Programs to time against each other: a reward model of real sizes, on one batch, one way.

Weights and tokens are random. A batch is one pack, or rows padded to one length; a profile's rates
are means over all its packs, since a program takes as long for every one.
"""

import dataclasses
import functools
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments import bench
from jaxrm import costs, flops, fused, members, packing, sharding, train, tree
from jaxrm import tokens as token_trees
from jaxrm.backbones import attention
from jaxrm.backbones.layers import Config
from jaxrm.tokens import Tokens

TX = train.adamw(1e-4)
LORA = costs.Method('adapter', rank=16, remat='none')
FULL = costs.Method('everything', rank=0, remat='none')


@dataclasses.dataclass(frozen=True)
class Setup:
    """A model's sizes, its weights on the device, the backbone fused, and how it computes."""

    config: Config
    params: tree.Tree
    dtype: Any
    mesh: Any
    attend: Any
    multiple: int  # of row lengths

    def model(self, remat: str = 'none') -> Any:
        """The reward model."""
        return bench.model(self.config, self.dtype, self.attend, remat)

    def counted(self, remat: str = 'none') -> Any:
        """The same for `flops.count`: a fused kernel computes what is seen only."""
        plain = self.attend is attention.xla
        counted = self.attend if plain else flops.row_attention
        return bench.model(self.config, self.dtype, counted, remat)


def setup(c: Config, dtype: Any, seed: int = 0) -> Setup:
    """Weights in `dtype`, an adapter and a head in float32; the attention that is default here."""
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    params = fused.fuse(bench.drawn(bench.parameters(c, LORA.rank, dtype), seed))
    attend = attention.default(dtype, c, mesh)
    return Setup(c, params, jnp.dtype(dtype), mesh, attend, attention.row_multiple())


# Batches


class Batch(NamedTuple):
    """One batch, and what its like bring in the mean."""

    pack: packing.Pack
    load: costs.Load  # of its slots
    needed: costs.Load  # of all records, each token once
    share: float  # of all records, in one batch
    records: float
    tokens: float  # real, each once
    padded: bool = False

    @property
    def objective(self) -> Callable[[Any], train.Objective]:
        """Of a score function."""
        return bench.pair_objective if self.padded else train.preference


def packed(s: Setup, t: Tokens, size: int, *, apart: bool = False, packs: int = 1) -> Batch:
    """Packs of about so many tokens; `apart` repeats the prompt in every row."""
    of = token_trees.unshare(t) if apart else t
    shape, found = bench.packed(of, size, s.config.D, s.multiple)
    share = packs / len(found)
    made = packing.fill(of, found[:packs], shape, count=packs)
    n, total = len(t.prompt), len(t.ids)
    load = costs.of_shape(shape, packs)
    return Batch(made, load, costs.of_tokens(t), share, share * n, share * total)


def padded(s: Setup, t: Tokens, batch: int) -> Batch:
    """So many records, a row a candidate, as long as the longest of a random batch in the mean."""
    lengths = [length for _, length in bench.padded(t, batch)]
    mean = -(-int(np.mean(lengths)) // s.multiple) * s.multiple
    M = int(np.diff(t.first)[0])
    row_nM = packing.row_lengths(t).reshape(-1, M)
    fit = np.flatnonzero(row_nM.max(1) <= mean)[:batch]
    rows = packing.padded(t, np.resize(fit, batch), (batch * M, mean))
    n, total = len(t.prompt), len(t.ids)
    load = bench.of_rows([(batch * M, mean)])
    share = batch / n
    return Batch(rows, load, costs.of_tokens(t), share, batch, share * total, True)


def even(s: Setup, rows: int, length: int, *, gathers: bool) -> Batch:
    """Full rows of one length in pairs that share nothing; with `gathers` as a pack of them."""
    half = np.full(rows // 2, length // 2)
    t = bench.trees(half, np.stack([length - half] * 2, 1), vocabulary=s.config.V)
    of = token_trees.unshare(t)
    load = bench.of_rows([(rows, length)])
    about = {'share': 1.0, 'records': rows / 2, 'tokens': rows * length}
    if not gathers:
        made = packing.padded(t, np.arange(rows // 2), (rows, length))
        return Batch(made, load, load, padded=True, **about)
    shape = packing.Shape(rows * length, ((rows, length),), rows // 2, 2)
    return Batch(packing.fill(of, [np.arange(rows // 2)], shape), load, load, **about)


# Programs


class Program(NamedTuple):
    """A traced program, how to call what it compiles to, and what one call does."""

    lowered: Any
    call: Callable[[Any], Callable[[], Any]]
    needed: float  # FLOPs of the real tokens
    done: float  # FLOPs of the program
    records: float
    tokens: float


def scoring(s: Setup, b: Batch, way: str = 'cut') -> Program:
    """Scores; `whole` computes the top layer at every token, `lm_head` next-token logits, too."""
    params = {part: s.params[part] for part in ('backbone', 'head')}
    if way != 'cut':  # of 'whole' the compiler drops it
        params['lm_head'] = {'kernel': jnp.full((s.config.D, s.config.V), 0.01, s.dtype)}

    def of(rm: Any) -> Callable[..., Any]:
        def longer(params: tree.Tree, pack: packing.Pack) -> Any:
            score_BM, logits_PNV = rm.score_and_logits(params, pack)
            return score_BM if way == 'whole' else (score_BM, logits_PNV.max(-1))

        return rm.score if way == 'cut' else longer

    placed = sharding.place_batch(b.pack, s.mesh)
    with jax.set_mesh(s.mesh):
        lowered = jax.jit(of(s.model())).lower(params, placed)
    needed = b.share * costs.forward(s.config, b.needed).total
    done = flops.count(of(s.counted()), bench.shapes_of(params), bench.shapes_of(b.pack))
    if way == 'whole':
        done -= 2 * s.config.D * s.config.V * b.load.tokens
    return Program(
        lowered, lambda made: lambda: made(params, placed), needed, done, b.records, b.tokens
    )


def step(
    s: Setup,
    b: Batch,
    *,
    method: costs.Method = LORA,
    members_: int | None = None,
    how: Any = 'vmap',
    backbone: tree.Tree | None = None,
) -> Program:
    """A training step, of several adapters at once, or `members_` steps of one with how=None.

    `backbone` stands in for the setup's, in another layout.
    """
    base = s.params['backbone'] if backbone is None else backbone
    learns, frozen = {part: s.params[part] for part in ('lora', 'head')}, {'backbone': base}
    if method.learns == 'everything':
        learns, frozen = {'head': s.params['head'], 'backbone': fused.split(base)}, {}
    at_once, K = members_ is not None and how is not None, members_ or 1
    pack, key = b.pack, jax.random.key(0)
    if at_once:
        state = members.start(members.stack([learns] * K), TX, s.mesh)
        pack = jax.tree.map(lambda x: np.repeat(np.asarray(x)[:, None], K, 1), pack)
        key = members.keys(range(K))
    else:
        state = train.start(learns, TX, s.mesh)

    def of(rm: Any) -> train.Step:
        one = functools.partial(train.step, objective=b.objective(rm.score), tx=TX)
        return functools.partial(members.step, one=one, how=how) if at_once else one

    placed = sharding.place_batch(pack, s.mesh)
    with jax.set_mesh(s.mesh):
        update = train.jitted(state, s.mesh, step=of(s.model(method.remat)))
        lowered = update.lower(state, frozen, placed, key)
    shapes = [bench.shapes_of(x) for x in (state, frozen, pack)]
    done = flops.count(of(s.counted(method.remat)), *shapes, key)
    at = [state]
    del state

    def call(made: Any) -> Callable[[], Any]:
        def advance() -> Any:
            for _ in range(1 if at_once else K):
                at[0], metrics = made(at[0], frozen, placed, key)
            return metrics

        return advance

    needed = K * b.share * costs.model_flops(s.config, b.needed, method)
    times = 1 if at_once else K
    return Program(lowered, call, needed, times * done, K * b.records, K * b.tokens)


# Measuring


def timed(fn: Callable[[], Any]) -> tuple[Any, float]:
    start = time.perf_counter()
    return fn(), time.perf_counter() - start


def compiled(programs: dict[str, Program]) -> dict[str, tuple[Any, float]]:
    """All of them and the seconds each took, at the same time: compilers use one core each."""
    with ThreadPoolExecutor(max(len(programs), 1)) as pool:
        jobs = {n: pool.submit(timed, p.lowered.compile) for n, p in programs.items()}
        return {name: job.result() for name, job in jobs.items()}


def measured(
    programs: dict[str, Program], rounds: int, *, ceiling: float = 0.0, until: float | None = None
) -> dict[str, dict[str, Any]]:
    """Times in turns, and what follows of them; `ceiling` is in FLOP/s, `until` ends early."""
    made = compiled(programs)
    calls = {name: p.call(made[name][0]) for name, p in programs.items()}
    spent = bench.alternate(calls, rounds, until=until)
    return {
        name: about(p, spent[name], ceiling) | of_program(*made[name])
        for name, p in programs.items()
    }


def of_program(made: Any, seconds: float) -> dict[str, Any]:
    memory = made.memory_analysis()
    return {
        'compile_seconds': seconds,
        'temp_bytes': memory.temp_size_in_bytes,
        'argument_bytes': memory.argument_size_in_bytes,
    }


def about(p: Program, seconds: Sequence[float], ceiling: float) -> dict[str, Any]:
    """Rates at the median; `fol` is of what real tokens need, `fol_done` of what is computed."""
    mid, low, high = bench.spread(seconds)
    out = {
        'median': mid,
        'quartiles': [low, high],
        'seconds': list(seconds),
        'tokens_per_s': p.tokens / mid,
        'records_per_s': p.records / mid,
        'needed_flops': p.needed,
        'done_flops': p.done,
        'flops_per_s': p.needed / mid,
    }
    if ceiling:
        out |= {'fol': p.needed / mid / ceiling, 'fol_done': p.done / mid / ceiling}
    return out


def faster(
    found: dict[str, dict[str, Any]],
    programs: dict[str, Program],
    one: str = 'packed',
    other: str = 'padded',
) -> dict[str, Any]:
    """How many times as fast `one` makes a record as `other`, beside the ratio of FLOPs."""
    per = programs[one].records / programs[other].records
    slow, fast = (np.array(found[name]['seconds']) for name in (other, one))
    work = programs[other].done / programs[one].done * per
    mid, low, high = bench.ratio(slow * per, fast)
    return {'wall': mid, 'quartiles': [low, high], 'flops': work, 'of_flops': mid / work}
