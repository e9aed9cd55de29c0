"""What bench_gpu measures, a cell each: the card's ceilings, rates at the sizes of Llama 3, ratios.

`Run.measured` is the one way to the device: a cell says what jobs there are, and what their times
mean. All programs of a cell take turns in one process.
"""

import dataclasses
import gc
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments import bench, bench_cells
from experiments.bench_cells import LORA, Job, Setup
from jaxrm import fused, machines, packing, plan, train
from jaxrm.backbones import attention

EXPERTS = 5
MOST = {'scores': 0.05, 'gradients': 0.1}  # bfloat16 on a CPU: 0.014 and 0.030
BIG, SMALL = 'llama-3-8b', 'llama-3.2-1b'
CARD = machines.CHIPS['h100']  # of 80 GB, for which limits are told whatever card it is


@dataclasses.dataclass
class Run:
    """What cells need to know."""

    tiny: bool
    rounds: int
    until: float  # time.monotonic at the end of the budget
    out: Path
    found: dict[str, Any]
    at: tuple[str, Setup] | None = None  # the model whose weights are on the device

    @property
    def room(self) -> int:
        """Bytes of the device that programs may use."""
        stats = jax.devices()[0].memory_stats() or {}
        return stats.get('bytes_limit', 2**27)

    def setup(self, name: str) -> Setup:
        """The model of this name; there is room for one. ValueError for slow attention on a GPU."""
        name = 'tiny' if self.tiny else name
        if self.at is None or self.at[0] != name:
            self.at = None
            gc.collect()
            dtype = jnp.float32 if self.tiny else jnp.bfloat16
            s = bench_cells.setup(bench.MODELS[name], dtype)
            if not self.tiny and s.attention != 'cudnn':
                raise ValueError(f'attention: found {s.attention}, expected cudnn')
            self.at = name, s
        return self.at[1]

    def size(self, tokens: int) -> int:
        """Tokens of a batch, fewer in small."""
        return max(tokens // 64, 64) if self.tiny else tokens

    def data(self, profile: bench.Profile, s: Setup) -> Any:
        """Its records, shorter in small."""
        if self.tiny:
            short = [tuple(x / 16 for x in part) for part in (profile.prompt, profile.answer)]
            profile = profile._replace(prompt=short[0], answer=short[1])
        return bench.data(profile._replace(records=512), vocabulary=s.config.V)

    def measured(
        self, s: Setup, jobs: Mapping[str, Job], rounds: int | None = None, *, choose: bool = True
    ) -> dict[str, Any]:
        """Their times, by name; rematerialisation as the library would `choose` it, or as is."""
        if choose:
            jobs = {n: bench_cells.fitted(s.config, job, self.room) for n, job in jobs.items()}
        found = self.once(s, jobs, rounds or self.rounds)
        if choose and (less := bench_cells.smaller(jobs, found)):
            found |= self.once(s, less, rounds or self.rounds)
        return found

    def once(self, s: Setup, jobs: Mapping[str, Job], rounds: int) -> dict[str, Any]:
        """The same as they are."""
        found = bench_cells.measured(
            s,
            jobs,
            rounds,
            ceiling=self.found['ceilings']['matmul_flops_per_s'],
            peak=peak(),
            until=self.until,
        )
        gc.collect()
        planned = {name: bench_cells.planned(s.config, job) for name, job in jobs.items()}
        return {name: x | {'planned_bytes': planned[name]} for name, x in found.items()}

    def compared(self, s: Setup, jobs: Mapping[str, Job]) -> dict[str, Any]:
        """Their times, and the first one's speed over each of the others'."""
        found = self.measured(s, jobs)
        first, *others = jobs
        ratios, failed = bench.kept(
            {f'{first} over {n}': lambda n=n: bench_cells.faster(found, first, n) for n in others}
        )
        return found | ratios | failed


def peak() -> float:
    """FLOP/s of this card's data sheet; 0 where it is not known."""
    kind = jax.devices()[0].device_kind.lower()
    return next((chip.peak for name, chip in machines.CHIPS.items() if name in kind), 0.0)


# What the card can do


def again(fn: Callable[[Any], Any], x: Any, count: int) -> Any:
    """fn(fn(... x)); nothing is held but what comes last."""
    for _ in range(count):
        x = fn(x)
    return x


def ceilings(run: Run) -> dict[str, Any]:
    """FLOP/s of a random bf16 matrix product and bytes/s of a copy, read and written; medians."""
    n, count = (256, 2) if run.tiny else (8192, 20)
    dtype = jnp.float32 if run.tiny else jnp.bfloat16
    a, b = (jax.random.normal(jax.random.key(i), (n, n), dtype) for i in range(2))
    b *= jnp.asarray(n**-0.5, dtype)  # so that many products have the size of one
    product = jax.jit(lambda a, b: a @ b)
    big = [jax.random.normal(jax.random.key(2), (2 * n, 2 * n), jnp.float32)]
    copy = jax.jit(lambda x: x + 1, donate_argnums=0)

    def copies() -> Any:
        big[0] = again(copy, big[0], count)
        return big[0]

    many = {'matmul': lambda: again(lambda x: product(x, b), a, count), 'copy': copies}
    spent = {name: bench.spread(x)[0] for name, x in bench.alternate(many, 10).items()}
    return {
        'matmul_flops_per_s': count * 2 * n**3 / spent['matmul'],
        'copy_bytes_per_s': count * 2 * big[0].nbytes / spent['copy'],
        'peak_flops_per_s': peak(),
        'room': run.room,
    }


def probe(run: Run) -> dict[str, Any]:
    """Relative errors of scores and gradients beside float32's; ValueError for large ones."""
    if (jnp.ones(4) + 1 != 2).any() or abs(float(jnp.sqrt(jnp.float32(512))) - 22.627417) > 1e-4:
        raise ValueError('correctness: one and one, or the root of 512, are wrong on this device')
    c = dataclasses.replace(bench.MODELS['tiny'], D=256, F=512, Q=4, K=2, H=64)
    t = bench.data(bench.Profile((90, 40), (40, 20), 2, 2048, 24), vocabulary=c.V)
    exact = bench_cells.setup(c, jnp.float32)
    dtype = jnp.float32 if run.tiny else jnp.bfloat16
    low = jax.tree.map(lambda x: x.astype(dtype), exact.params['backbone'])
    here = dataclasses.replace(exact, dtype=dtype, attend=attention.default(dtype, c, exact.mesh))
    if not run.tiny and here.attention != 'cudnn':
        raise ValueError(f'attention: found {here.attention}, expected cudnn')
    b = bench_cells.packed(here, t, 2048)
    learns = {part: exact.params[part] for part in ('lora', 'head')}

    def both(rm: Any, backbone: Any) -> Any:
        frozen = {'backbone': backbone}
        objective, key = train.preference(rm.score), jax.random.key(0)
        grads = train.gradients(objective, learns, frozen, b.pack, key)[1]
        return rm.score(frozen | learns, b.pack), grads

    plain = bench.model(c, jnp.float32, attention.xla)
    with jax.default_matmul_precision('highest'):
        want = jax.jit(lambda w: both(plain, w))(fused.split(exact.params['backbone']))
    found = jax.jit(lambda w: both(here.model(), w))(low)
    real = b.pack.rank_PBM.reshape(want[0].shape) >= 0
    pairs = [(np.asarray(want[0])[real], np.asarray(found[0])[real]), (want[1], found[1])]
    errors = dict(zip(('scores', 'gradients'), (distance(*pair) for pair in pairs), strict=True))
    if not all(error < MOST[name] for name, error in errors.items()):  # NaN is not
        raise ValueError(f'correctness: relative errors {errors}, expected less than {MOST}')
    return errors | {'attention': here.attention}


def distance(want: Any, found: Any) -> float:
    """Of all leaves together, |found - want| / |want|."""
    flat = [np.concatenate([np.asarray(x, np.float64).ravel() for x in jax.tree.leaves(tree)])
            for tree in (want, found)]  # fmt: skip
    return float(np.linalg.norm(flat[1] - flat[0]) / np.linalg.norm(flat[0]))


# Cells


def rows_of(run: Run, s: Setup, tokens: int, *, gathers: bool) -> bench_cells.Batch:
    """Full rows of 1,024, of 64 in small."""
    return bench_cells.even(s, tokens // 1024, 64 if run.tiny else 1024, gathers=gathers)


def lora(run: Run, model: str, tokens: int = 8192) -> dict[str, Any]:
    """Full rows of 1,024, as they are and as a pack of the same rows: what row gathers take."""
    s = run.setup(model)
    ways = {'rows': False, 'packs': True}
    jobs = {n: Job(rows_of(run, s, tokens, gathers=x), LORA) for n, x in ways.items()}
    found = run.measured(s, jobs)
    if any('failed' in x for x in found.values()):
        return found
    return found | {'share_of_row_gathers': more(found['packs'], found['rows'])}


def more(slow: dict[str, Any], fast: dict[str, Any]) -> list[float]:
    """The share of the slow one's time that the fast one does without: median, quartiles."""
    return list(bench.spread(1 - np.divide(fast['seconds'], slow['seconds'])))


def pairs(
    run: Run, model: str, profile: str, batch: int = 8, *, repeated: bool = False
) -> dict[str, Any]:
    """LoRA steps: shared prompts against padded rows, and against repeated prompts."""
    s = run.setup(model)
    t = run.data(bench.PROFILES[profile], s)
    size = run.size(8192)
    ways = {
        'packed': bench_cells.packed(s, t, size, batch=batch),
        'padded': bench_cells.padded(s, t, batch),
    }
    if repeated:
        ways['repeated'] = bench_cells.packed(s, t, size, apart=True, batch=batch)
    return run.compared(s, {name: Job(b, LORA) for name, b in ways.items()})


def together(run: Run, model: str) -> dict[str, Any]:
    """LoRA steps with q, k, v and gate, up of the frozen base as one kernel each, and apart."""
    s = run.setup(model)
    b = bench_cells.packed(s, run.data(bench.PROFILES['hh'], s), run.size(8192))
    return run.compared(s, {'fused': Job(b, LORA), 'plain': Job(b, LORA, split=True)})


def score(run: Run, model: str) -> dict[str, Any]:
    """Scoring: packs, and the naive path of batches of 64 rows as long as the longest."""
    s = run.setup(model)
    # Lengths as of RewardBench: rows of about 500 tokens.
    t = run.data(bench.Profile((200, 120), (280, 180), 2, 16384, 0), s)
    batch = 4 if run.tiny else 32
    ways = {
        'packed': bench_cells.packed(s, t, run.size(16384), batch=batch),
        'padded': bench_cells.padded(s, t, batch),
    }
    return run.compared(s, {name: Job(b) for name, b in ways.items()})


def whole(run: Run, model: str) -> dict[str, Any]:
    """Scoring with the top layer cut, computed at all tokens, and with a language model's head."""
    s = run.setup(model)
    b = bench_cells.packed(s, run.data(bench.PROFILES['hh'], s), run.size(4096))
    ways: Any = ('cut', 'whole', 'lm_head')
    return run.compared(s, {way: Job(b, top=way) for way in ways})


def best_of(run: Run, model: str) -> dict[str, Any]:
    """Sixteen answers as long as their prompt: shared against one row a candidate."""
    s = run.setup(model)
    t = run.data(bench.Profile((256, 24), (256, 24), 16, 17920, 0), s)
    size = run.size(17920)
    ways = {name: bench_cells.packed(s, t, size, apart=x, batch=1)
            for name, x in {'shared': False, 'apart': True}.items()}  # fmt: skip
    rows, once = packing.row_lengths(t).sum(), len(t.ids)
    found = run.compared(s, {name: Job(b) for name, b in ways.items()})
    return found | {'token_ratio': float(rows / once)}


def experts(run: Run, model: str, tokens: int = 2048) -> dict[str, Any]:
    """Steps of five adapters at once, one after the other in a program, and one program each."""
    s = run.setup(model)
    b = rows_of(run, s, tokens, gathers=True)
    several = dataclasses.replace(LORA, members=EXPERTS)
    ways: Any = {'vmap': 'vmap', 'scan': 'scan', 'one by one': None}
    found = run.measured(s, {name: Job(b, several, how=how) for name, how in ways.items()})
    alone = found['one by one'].get('seconds')
    times = {way: bench.ratio(found[way]['seconds'], alone)
             for way in ('vmap', 'scan') if alone and 'seconds' in found[way]}  # fmt: skip
    return found | {f'{way} over one by one': list(x) for way, x in times.items()}


# Memory


POLICIES = 'none', 'dots', 'mlp'


def limit(run: Run, model: str) -> dict[str, Any]:
    """The largest step that fits, by remat: from two compiled sizes, then run.

    Beside what fits this card stands what would fit one of 80 GB, by the same line.
    """
    s, L = run.setup(model), 64 if run.tiny else 1024
    methods: Any = {name: dataclasses.replace(LORA, remat=name) for name in POLICIES}
    few, many = 2 * L, 6 * L

    def job(name: str, tokens: int) -> Job:
        return Job(bench_cells.even(s, tokens // L, L, gathers=True), methods[name])

    ends = {f'{name} {n}': job(name, n) for name in methods for n in (few, many)}
    made, failed = bench_cells.compiled(s, ends)
    memory = {name: executable.memory_analysis() for name, (_, executable, _) in made.items()}
    del made
    gc.collect()
    out: dict[str, Any] = {}
    for name in methods:
        at = [f'{name} {n}' for n in (few, many)]
        bad = next((failed[end] for end in at if end in failed), None)
        out[name] = bad or line_of(few, many, [memory[end] for end in at], run.room)
    for share in (1.0, 0.9, 0.8):
        most = {n: int(share * x['fits']) // (2 * L) * 2 * L for n, x in out.items() if 'fits' in x}
        left = {n: job(n, min(x, 512 if run.tiny else x)) for n, x in most.items()
                if x and 'fol' not in out[n]}  # fmt: skip
        found = run.measured(s, left, min(run.rounds, 4), choose=False) if left else {}
        for name, x in found.items():
            out[name].pop('failed', None)
            out[name] |= x if 'failed' in x else x | {'ran': left[name].batch.load.tokens}
    return out


def line_of(few: int, many: int, memory: list[Any], room: int) -> dict[str, Any]:
    """Bytes of a step by its tokens, from programs of two sizes, and how many fit.

    A part of the memory is left alone, for the states of two more and what is not counted.
    """
    temps = [x.temp_size_in_bytes for x in memory]
    slope = (temps[1] - temps[0]) / (many - few)
    base = temps[0] - slope * few + memory[1].argument_size_in_bytes
    fits = {of: max(int((plan.SHARE * size - base) / slope), 0) if slope > 0 else 0
            for of, size in {'fits': room, 'fits_80gb': CARD.memory}.items()}  # fmt: skip
    about = {'bytes_per_token': slope, 'bytes_at_0': base}
    return about | fits | {'room': room, 'room_80gb': CARD.memory}


# Row gathers


def gathers(run: Run, model: str) -> dict[str, Any]:
    """Attention of all lower layers, forward and backward, from the stream and from ready rows."""
    s, out = run.setup(model), {}
    for profile, tokens in (('hh', 4096), ('ultrafeedback', 8192)):
        b = bench_cells.packed(s, run.data(bench.PROFILES[profile], s), run.size(tokens))
        out[profile] = exchanged(s, jax.tree.map(jnp.asarray, b.pack))
    return out


def exchanged(s: Setup, pack: packing.Pack) -> dict[str, float]:
    """Seconds of all layers' attention and its gradients, with and without row gathers.

    What a layer gives is what the next one takes as queries, keys and values, in one program.
    """
    c, N = s.config, pack.ids_PN.shape[1]
    draw = lambda i, n: jax.random.normal(jax.random.key(i), (1, N, n, c.H), s.dtype)  # noqa: E731
    qkv = tuple(draw(i, n) for i, n in enumerate((c.Q, c.K, c.K)))
    rows = tuple(tuple(attention.take(x, slot) for x in qkv) for slot in pack.slot)
    after = lambda o: (o, o[..., : c.K, :], o[..., -c.K :, :])  # noqa: E731

    def stream(qkv: Any, pack: packing.Pack) -> Any:
        return after(attention.attend(*qkv, pack, s.attend))

    def ready(rows: Any, pack: packing.Pack) -> Any:
        lengths = attention.lengths(pack)
        return tuple(after(s.attend(*x, n)) for x, n in zip(rows, lengths, strict=True))

    def summed(layer: Any, x: Any, pack: packing.Pack) -> Any:
        last, _ = jax.lax.scan(lambda x, _: (layer(x, pack), None), x, length=c.L - 1)
        return sum((o.astype(jnp.float32) ** 2).sum() for o in jax.tree.leaves(last))

    grad = lambda layer: jax.jit(jax.grad(lambda x, pack: summed(layer, x, pack)))  # noqa: E731
    of_stream, of_rows = grad(stream), grad(ready)
    calls = {'stream': lambda: of_stream(qkv, pack), 'ready': lambda: of_rows(rows, pack)}
    spent = bench.alternate(calls, 10)
    found = {name: bench.spread(x)[0] for name, x in spent.items()}
    share = more({'seconds': spent['stream']}, {'seconds': spent['ready']})
    return found | {'gathers': found['stream'] - found['ready'], 'share_of_attention': share}


# name: (seconds that it may take when nothing is cached, what makes it), in order of importance
CELLS: dict[str, tuple[float, Callable[[Run], dict[str, Any]]]] = {
    'ceilings': (10, ceilings),
    'probe': (25, probe),
    'lora-8b': (60, lambda run: lora(run, BIG)),
    'score-8b': (45, lambda run: score(run, BIG)),
    'pairs-8b-helpsteer': (40, lambda run: pairs(run, BIG, 'helpsteer', 4)),
    'best-of-16-8b': (35, lambda run: best_of(run, BIG)),
    'experts-8b': (50, lambda run: experts(run, BIG)),
    'limit-8b': (100, lambda run: limit(run, BIG)),
    'gathers-8b': (25, lambda run: gathers(run, BIG)),
    'fused-8b': (40, lambda run: together(run, BIG)),
    'pairs-8b-hh': (50, lambda run: pairs(run, BIG, 'hh', repeated=True)),
    'whole-8b': (40, lambda run: whole(run, BIG)),
    'lora-1b': (35, lambda run: lora(run, SMALL, 16384)),
    'score-1b': (30, lambda run: score(run, SMALL)),
}
