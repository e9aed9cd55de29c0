"""Programs to time against each other: a reward model of real sizes, on one batch, one way.

Weights and tokens are random. A batch is one pack, or rows padded to one length; a profile's rates
are means over all its packs, since a program takes as long for every one.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments import bench
from jaxrm import (
    costs,
    flops,
    fused,
    members,
    packing,
    plan,
    remat,
    sharding,
    train,
    tree,
)
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

    @property
    def attention(self) -> str:
        """The name of the implementation."""
        return getattr(self.attend, '__name__', 'splash')

    def model(self, remat: str = 'none') -> Any:
        """The reward model."""
        return bench.model(self.config, self.dtype, self.attend, remat)

    def counted(self, remat: str = 'none') -> Any:
        """The same for `flops.count`: a fused kernel computes what is seen only."""
        plain = self.attend is attention.xla
        counted = self.attend if plain else flops.row_attention
        return bench.model(self.config, self.dtype, counted, remat)


def setup(c: Config, dtype: Any, seed: int = 0) -> Setup:
    """Weights in `dtype`, an adapter and a head in float32; the attention that is default here.

    Kernels are drawn as they lie on a device that loads them, fused: nothing is there twice.
    """
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    shapes = jax.eval_shape(fused.fuse, bench.parameters(c, LORA.rank, dtype))
    attend = attention.default(dtype, c, mesh)
    params = bench.drawn(shapes, seed)
    return Setup(c, params, jnp.dtype(dtype), mesh, attend, attention.row_multiple())


# Batches


class Batch(NamedTuple):
    """One batch, and what its like bring in the mean."""

    pack: packing.Pack
    load: costs.Load  # of its slots
    needed: costs.Load  # of all records, each token once
    naive: costs.Load  # of all records as padded rows that share nothing
    share: float  # of all records, in one batch
    records: float
    tokens: float  # real, each once
    padded: bool = False

    @property
    def objective(self) -> Callable[[Any], train.Objective]:
        """Of a score function."""
        return bench.pair_objective if self.padded else train.preference


def naive(s: Setup, t: Tokens, batch: int) -> costs.Load:
    """Of random batches of so many records, each padded to its longest row."""
    return bench.of_rows(bench.padded(t, batch, s.multiple))


def packed(s: Setup, t: Tokens, size: int, *, apart: bool = False, batch: int = 8) -> Batch:
    """A pack of about so many tokens; `apart` repeats the prompt in every row.

    `batch` is how many records the naive way would pad to one length.
    """
    of = token_trees.unshare(t) if apart else t
    shape, found = bench.packed(of, size, s.config.D, s.multiple)
    share = 1 / len(found)
    made = packing.fill(of, found[:1], shape)
    n, total = len(t.prompt), len(t.ids)
    loads = costs.of_shape(shape), costs.of_tokens(t), naive(s, t, batch)
    return Batch(made, *loads, share, share * n, share * total)


def padded(s: Setup, t: Tokens, batch: int) -> Batch:
    """So many records, a row a candidate, as long as the longest of a random batch in the mean."""
    lengths = [length for _, length in bench.padded(t, batch)]
    mean = -(-int(np.mean(lengths)) // s.multiple) * s.multiple
    M = int(np.diff(t.first)[0])
    row_nM = packing.row_lengths(t).reshape(-1, M)
    fit = np.flatnonzero(row_nM.max(1) <= mean)[:batch]
    rows = packing.padded(t, np.resize(fit, batch), (batch * M, mean))
    n, total = len(t.prompt), len(t.ids)
    loads = bench.of_rows([(batch * M, mean)]), costs.of_tokens(t), naive(s, t, batch)
    share = batch / n
    return Batch(rows, *loads, share, batch, share * total, True)


def even(s: Setup, rows: int, length: int, *, gathers: bool) -> Batch:
    """Full rows of one length in pairs that share nothing; with `gathers` as a pack of them."""
    half = np.full(rows // 2, length // 2)
    t = bench.trees(half, np.stack([length - half] * 2, 1), vocabulary=s.config.V)
    of = token_trees.unshare(t)
    load = bench.of_rows([(rows, length)])
    loads = load, costs.of_tokens(of), load
    about = {'share': 1.0, 'records': rows / 2, 'tokens': rows * length}
    if not gathers:
        made = packing.padded(t, np.arange(rows // 2), (rows, length))
        return Batch(made, *loads, padded=True, **about)
    shape = packing.Shape(rows * length, ((rows, length),), rows // 2, 2)
    return Batch(packing.fill(of, [np.arange(rows // 2)], shape), *loads, **about)


# Programs


class Job(NamedTuple):
    """What a program is to do, told before there are arrays.

    `top` is of scoring: the top layer is cut, computed at every token, or has next-token logits
    behind it. `how` is of several members: at once, or None for a step each.
    """

    batch: Batch
    method: costs.Method = costs.SCORING  # nothing learns: scores
    top: Literal['cut', 'whole', 'lm_head'] = 'cut'
    how: members.How | None = None
    split: bool = False  # the frozen base as checkpoints have it, and not fused

    @property
    def shape(self) -> packing.Shape:
        """One pack of all that goes through at a time."""
        load = self.batch.load
        return packing.Shape(load.tokens, load.rows, load.scores, 1)


def planned(c: Config, job: Job) -> int:
    """Bytes that a program takes on one GPU, by formula, with what is on the device besides."""
    mesh, at_once = sharding.make_mesh(devices=jax.devices()[:1]), job.how == 'vmap'
    held = remat.needed(c, job.method, job.shape, mesh, packs=1, width=2, at_once=at_once)
    more = job.split * costs.state(c, job.method).weights
    if job.top == 'lm_head':  # the kernel, and logits in 16 bits
        more += 2 * c.V * (c.D + job.batch.load.tokens)
    return held + more


def fitted(c: Config, job: Job, room: int) -> Job:
    """With the policy that computes least again of those for which there is room."""
    if job.method.learns == 'nothing':
        return job
    for policy in remat.LADDER:
        job = job._replace(method=dataclasses.replace(job.method, remat=policy))
        if planned(c, job) <= plan.SHARE * room:
            break
    return job


def smaller(jobs: Mapping[str, Job], found: Mapping[str, Any]) -> dict[str, Job]:
    """Of those for which the memory did not do, and that can compute more again, the next ones."""
    out = {}
    for name, job in jobs.items():
        policy, why = job.method.remat, found[name].get('failed', '')
        if 'RESOURCE_EXHAUSTED' in why and policy in remat.LADDER[:-1]:
            less = remat.LADDER[remat.LADDER.index(policy) + 1]
            out[name] = job._replace(method=dataclasses.replace(job.method, remat=less))
    return out


class Program(NamedTuple):
    """A traced program, how to call what it compiles to, and what one call does."""

    lowered: Any
    call: Callable[[Any], Callable[[], Any]]
    needed: float  # FLOPs of the real tokens
    naive: float  # FLOPs of the padded rows that bring the same records
    done: float  # FLOPs of the program
    records: float
    tokens: float


def make(s: Setup, job: Job) -> Program:
    """Scores, or a training step."""
    return scoring(s, job) if job.method.learns == 'nothing' else step(s, job)


def _scorer(job: Job) -> Callable[[Any], Callable[..., Any]]:
    """Of a reward model, (params, pack) -> scores, and logits where they are asked for."""

    def longer(rm: Any, params: tree.Tree, pack: packing.Pack) -> Any:
        z_PND = rm.states(params, pack, read='all')
        z_PRD = attention.at_read(z_PND, pack)[:, :, 1]
        score = rm.head.apply({'params': params['head']}, attention.take(z_PRD, pack.row_PBM))
        if job.top == 'whole':
            return score
        kernel = params['lm_head']['kernel']
        return score, (z_PND.astype(kernel.dtype) @ kernel).max(-1)

    return lambda rm: rm.score if job.top == 'cut' else functools.partial(longer, rm)


def scoring(s: Setup, job: Job) -> Program:
    """One pass."""
    b, of = job.batch, _scorer(job)
    params = {part: s.params[part] for part in ('backbone', 'head')}
    if job.split:
        params['backbone'] = fused.split(params['backbone'])
    if job.top == 'lm_head':
        kernel = jax.ShapeDtypeStruct((s.config.D, s.config.V), s.dtype)
        params |= bench.drawn({'lm_head': {'kernel': kernel}})
    placed = sharding.place_batch(b.pack, s.mesh)
    with jax.set_mesh(s.mesh):
        lowered = jax.jit(of(s.model())).lower(params, placed)
    needed, naive = (b.share * costs.forward(s.config, x).total for x in (b.needed, b.naive))
    done = flops.count(of(s.counted()), bench.shapes_of(params), bench.shapes_of(b.pack))
    call = lambda made: lambda: made(params, placed)  # noqa: E731
    return Program(lowered, call, needed, naive, done, b.records, b.tokens)


def step(s: Setup, job: Job) -> Program:
    """A training step, of several adapters at once, or as many steps of one after the other."""
    b, method, K = job.batch, job.method, job.method.members
    base, pack, key = s.params['backbone'], b.pack, jax.random.key(0)
    base = fused.split(base) if job.split or method.learns == 'everything' else base
    learns, frozen = {part: s.params[part] for part in ('lora', 'head')}, {'backbone': base}
    if method.learns == 'everything':
        learns, frozen = {'head': s.params['head'], 'backbone': base}, {}
    if job.how:
        state = members.start(members.stack([learns] * K), TX, s.mesh)
        pack = jax.tree.map(lambda x: np.repeat(np.asarray(x)[:, None], K, 1), pack)
        key = members.keys(range(K))
    else:
        state = train.start(learns, TX, s.mesh)

    def of(rm: Any) -> train.Step:
        one = functools.partial(train.step, objective=b.objective(rm.score), tx=TX)
        return functools.partial(members.step, one=one, how=job.how) if job.how else one

    placed = sharding.place_batch(pack, s.mesh)
    with jax.set_mesh(s.mesh):
        update = train.jitted(state, s.mesh, step=of(s.model(method.remat)))
        lowered = update.lower(state, frozen, placed, key)
    shapes = [bench.shapes_of(x) for x in (state, frozen, pack)]
    times = 1 if job.how else K
    done = times * flops.count(of(s.counted(method.remat)), *shapes, key)
    call = repeated([state], times, frozen, placed, key)
    one = dataclasses.replace(method, members=1)
    needed, naive = (K * b.share * costs.model_flops(s.config, x, one) for x in (b.needed, b.naive))
    return Program(lowered, call, needed, naive, done, K * b.records, K * b.tokens)


def repeated(at: list[Any], times: int, *rest: Any) -> Callable[[Any], Callable[[], Any]]:
    """So many steps in a call, each from the state that the one before gave, which it donates."""

    def call(made: Any) -> Callable[[], Any]:
        def advance() -> Any:
            for _ in range(times):
                at[0], metrics = made(at[0], *rest)
            return metrics

        return advance

    return call


# Measuring


def compiled(s: Setup, jobs: Mapping[str, Job]) -> tuple[dict[str, Any], dict[str, Any]]:
    """{name: (program, executable, seconds)} and failures; compilers work at the same time."""
    programs, failed = bench.kept({n: functools.partial(make, s, job) for n, job in jobs.items()})
    with ThreadPoolExecutor(max(len(programs), 1)) as pool:
        runs = {n: pool.submit(bench.timed, p.lowered.compile) for n, p in programs.items()}
        made, more = bench.kept({n: run.result for n, run in runs.items()})
    return {n: (programs[n], *of) for n, of in made.items()}, failed | more


def measured(
    s: Setup,
    jobs: Mapping[str, Job],
    rounds: int,
    *,
    ceiling: float = 0.0,
    peak: float = 0.0,
    until: float | None = None,
) -> dict[str, dict[str, Any]]:
    """Times in turns, and what follows of them, or why there is nothing.

    `ceiling` and `peak` are in FLOP/s, measured and of the data sheet; `until` ends early.
    """
    made, failed = compiled(s, jobs)
    calls = {name: p.call(executable) for name, (p, executable, _) in made.items()}
    once = {n: functools.partial(lambda call: jax.block_until_ready(call()), c)
            for n, c in calls.items()}  # fmt: skip
    ran, more = bench.kept(once)
    spent = bench.alternate({n: calls[n] for n in ran}, rounds, warmup=2, until=until)
    found = {
        name: about(made[name][0], spent[name], ceiling, peak)
        | {'asked_rounds': rounds, 'attention': s.attention, 'remat': jobs[name].method.remat}
        | of_program(*made[name][1:])
        for name in ran
    }
    return {name: (found | failed | more)[name] for name in jobs}


def of_program(made: Any, seconds: float) -> dict[str, Any]:
    memory = made.memory_analysis()
    return {
        'compile_seconds': seconds,
        'temp_bytes': memory.temp_size_in_bytes,
        'argument_bytes': memory.argument_size_in_bytes,
    }


def about(p: Program, seconds: Sequence[float], ceiling: float, peak: float = 0) -> dict[str, Any]:
    """Rates at the median.

    `fol` is of what real tokens need, `fol_done` of what is computed, `fol_effective` of what
    padded rows would have taken; `mfu` is `fol` of the data sheet's peak.
    """
    mid, low, high = bench.spread(seconds)
    out = {
        'median': mid,
        'quartiles': [low, high],
        'seconds': list(seconds),
        'rounds': len(seconds),
        'records': p.records,
        'tokens_per_s': p.tokens / mid,
        'records_per_s': p.records / mid,
        'needed_flops': p.needed,
        'naive_flops': p.naive,
        'done_flops': p.done,
        'flops_per_s': p.needed / mid,
    }
    if ceiling:
        rates = {'fol': p.needed, 'fol_done': p.done, 'fol_effective': p.naive}
        out |= {name: work / mid / ceiling for name, work in rates.items()}
    return out | ({'mfu': p.needed / mid / peak} if peak else {})


def faster(
    found: dict[str, dict[str, Any]], one: str = 'packed', other: str = 'padded'
) -> dict[str, Any]:
    """How many times as fast `one` makes a record as `other`, beside the ratio of FLOPs.

    Raises ValueError where one of them was not measured.
    """
    for name in (one, other):
        if 'failed' in found[name]:
            raise ValueError(f'{name}: {found[name]["failed"]}')
    per = found[one]['records'] / found[other]['records']
    slow, fast = (np.array(found[name]['seconds']) for name in (other, one))
    work = found[other]['done_flops'] / found[one]['done_flops'] * per
    mid, low, high = bench.ratio(slow * per, fast)
    return {'wall': mid, 'quartiles': [low, high], 'flops': work, 'of_flops': mid / work}
