"""Everything that is to be measured on one GPU, in one command: rates, limits, ratios.

Run:     python -m experiments.bench_gpu --output_dir DIR             # under nine minutes
         python -m experiments.bench_gpu --output_dir DIR --tiny      # the same anywhere, in small
Expect:  the tables on GPUs in BENCHMARKS.md; DIR/gpu.json, written after every cell

Random weights of real shapes and random tokens. The card's own ceilings come first: a bf16 matrix
product, and a copy. *FoL* is the FLOPs that the real tokens need, each once, over the time and the
measured product. Cells are in order of importance; of those that --budget seconds do not leave
room for, the output says so. Programs of a cell take turns in one process; times are medians.

Arguments are read by argparse, so that jaxrm's core and JAX, flax and optax are enough.
"""

import argparse
import dataclasses
import gc
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault('XLA_PYTHON_CLIENT_MEM_FRACTION', '.93')

import jax
import jax.numpy as jnp
import numpy as np

from experiments import bench, bench_cells
from experiments.bench_cells import Program, Setup
from jaxrm import fused, packing, train
from jaxrm.backbones import attention

EXPERTS = 5


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
    def ceiling(self) -> float:
        """Measured FLOP/s of a matrix product."""
        return self.found['ceilings']['matmul_flops_per_s']

    def setup(self, name: str) -> Setup:
        """The model of this name; there is room for one."""
        if self.tiny:
            name = 'tiny'
        if self.at is None or self.at[0] != name:
            self.at = None
            gc.collect()
            dtype = jnp.float32 if self.tiny else jnp.bfloat16
            self.at = name, bench_cells.setup(bench.MODELS[name], dtype)
        return self.at[1]

    def size(self, tokens: int) -> int:
        """Tokens of a batch, fewer in small."""
        return max(tokens // 64, 64) if self.tiny else tokens

    def data(self, profile: bench.Profile, s: Setup) -> Any:
        """Its records, shorter in small."""
        if self.tiny:
            short = [tuple(x / 16 for x in part) for part in (profile.prompt, profile.answer)]
            profile = profile._replace(prompt=short[0], answer=short[1])
        return bench.data(profile._replace(records=256), vocabulary=s.config.V)

    def measured(self, programs: dict[str, Program]) -> dict[str, Any]:
        """Their times, by name."""
        return bench_cells.measured(programs, self.rounds, ceiling=self.ceiling, until=self.until)


# What the card can do


def ceilings(run: Run) -> dict[str, Any]:
    """FLOP/s of a random bf16 matrix product and bytes/s of a copy, read and written; medians."""
    n, count = (256, 2) if run.tiny else (8192, 10)
    dtype = jnp.float32 if run.tiny else jnp.bfloat16
    a, b = (jax.random.normal(jax.random.key(i), (n, n), dtype) for i in range(2))
    big = jax.random.normal(jax.random.key(2), (4 * n, 8 * n), jnp.float32)
    product, copy = jax.jit(lambda a, b: a @ b), jax.jit(lambda x: x + 1)
    many = {
        'matmul': lambda: [product(a, b) for _ in range(count)][-1],
        'copy': lambda: [copy(big) for _ in range(count)][-1],
    }
    spent = {name: bench.spread(x)[0] for name, x in bench.alternate(many, 10).items()}
    return {
        'matmul_flops_per_s': count * 2 * n**3 / spent['matmul'],
        'copy_bytes_per_s': count * 2 * big.nbytes / spent['copy'],
    }


def probe(run: Run) -> dict[str, Any]:
    """Relative errors of scores and gradients beside float32's; ValueError for large ones."""
    c = dataclasses.replace(bench.MODELS['tiny'], D=256, F=512, Q=4, K=2, H=64)
    t = bench.data(bench.Profile((90, 40), (40, 20), 2, 2048, 24), vocabulary=c.V)
    exact = bench_cells.setup(c, jnp.float32)
    dtype = jnp.float32 if run.tiny else jnp.bfloat16
    low = jax.tree.map(lambda x: x.astype(dtype), exact.params['backbone'])
    here = dataclasses.replace(exact, dtype=dtype, attend=attention.default(dtype, c, exact.mesh))
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
    if not all(error < 0.05 for error in errors.values()):  # NaN is not
        raise ValueError(f'correctness: relative errors {errors}, expected less than 0.05')
    return errors


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
    programs = {
        'rows': bench_cells.step(s, rows_of(run, s, tokens, gathers=False)),
        'packs': bench_cells.step(s, rows_of(run, s, tokens, gathers=True)),
    }
    found = run.measured(programs)
    slow, fast = found['packs']['median'], found['rows']['median']
    return found | {'share_of_row_gathers': (slow - fast) / slow}


def pairs(run: Run, model: str, profile: str, batch: int = 8) -> dict[str, Any]:
    """LoRA steps: shared prompts against padded rows and repeated prompts."""
    s = run.setup(model)
    t = run.data(bench.PROFILES[profile], s)
    size = run.size(8192)
    programs = {
        'packed': bench_cells.step(s, bench_cells.packed(s, t, size)),
        'padded': bench_cells.step(s, bench_cells.padded(s, t, batch)),
        'repeated': bench_cells.step(s, bench_cells.packed(s, t, size, apart=True)),
    }
    return compared(run, programs)


def compared(run: Run, programs: dict[str, Program]) -> dict[str, Any]:
    """Their times, and the first one's speed over each of the others'."""
    found = run.measured(programs)
    first, *others = programs
    ratios = {n: bench_cells.faster(found, programs, first, n) for n in others}
    return found | {f'{first} over {n}': ratio for n, ratio in ratios.items()}


def together(run: Run, model: str) -> dict[str, Any]:
    """LoRA steps with q, k, v and gate, up of the frozen base as one kernel each, and apart."""
    s = run.setup(model)
    b = bench_cells.packed(s, run.data(bench.PROFILES['hh'], s), run.size(8192))
    apart = fused.split(s.params['backbone'])
    programs = {
        'fused': bench_cells.step(s, b),
        'plain': bench_cells.step(s, b, backbone=apart),
    }
    return compared(run, programs)


def score(run: Run, model: str) -> dict[str, Any]:
    """Scoring: packs, and the naive path of batches of 64 rows as long as the longest."""
    s = run.setup(model)
    # Lengths as of RewardBench: rows of about 500 tokens.
    t = run.data(bench.Profile((200, 120), (280, 180), 2, 16384, 0), s)
    programs = {
        'packed': bench_cells.scoring(s, bench_cells.packed(s, t, run.size(16384))),
        'padded': bench_cells.scoring(s, bench_cells.padded(s, t, 4 if run.tiny else 32)),
    }
    return compared(run, programs)


def whole(run: Run, model: str) -> dict[str, Any]:
    """Scoring with the top layer cut, computed at all tokens, and with a language model's head."""
    s = run.setup(model)
    b = bench_cells.packed(s, run.data(bench.PROFILES['hh'], s), run.size(4096))
    ways = ('cut', 'whole', 'lm_head')
    return compared(run, {way: bench_cells.scoring(s, b, way) for way in ways})


def best_of(run: Run, model: str) -> dict[str, Any]:
    """Sixteen answers as long as their prompt: shared against one row a candidate."""
    s = run.setup(model)
    t = run.data(bench.Profile((256, 24), (256, 24), 16, 17920, 0), s)
    programs = {
        'shared': bench_cells.scoring(s, bench_cells.packed(s, t, run.size(17920))),
        'apart': bench_cells.scoring(s, bench_cells.packed(s, t, run.size(17920), apart=True)),
    }
    rows, once = packing.row_lengths(t).sum(), len(t.ids)
    return compared(run, programs) | {'token_ratio': float(rows / once)}


def experts(run: Run, model: str, tokens: int = 2048) -> dict[str, Any]:
    """Steps of five adapters at once, one after the other in a program, and one program each."""
    s = run.setup(model)
    b = rows_of(run, s, tokens, gathers=True)
    at_once = {way: bench_cells.step(s, b, members_=EXPERTS, how=way) for way in ('vmap', 'scan')}
    programs = {**at_once, 'one by one': bench_cells.step(s, b, members_=EXPERTS, how=None)}
    found = run.measured(programs)
    alone = found['one by one']['seconds']
    times = {way: bench.ratio(found[way]['seconds'], alone) for way in at_once}
    return found | {f'{way} over one by one': list(x) for way, x in times.items()}


def limit(run: Run, model: str) -> dict[str, Any]:
    """The largest step that fits, by remat: from two compiled sizes, then run."""
    s, out = run.setup(model), {}
    memory = jax.devices()[0].memory_stats() or {}
    room = memory.get('bytes_limit', 2**27)
    for remat in ('none', 'dots'):
        method = dataclasses.replace(bench_cells.LORA, remat=remat)
        make = lambda n, m=method: bench_cells.step(  # noqa: E731
            s, rows_of(run, s, n, gathers=True), method=m
        )
        sizes = (4096, 8192)
        programs = {str(n): make(n) for n in sizes}
        made = {n: found for n, (found, _) in bench_cells.compiled(programs).items()}
        used = [made[str(n)].memory_analysis() for n in sizes]
        slope = (used[1].temp_size_in_bytes - used[0].temp_size_in_bytes) / (sizes[1] - sizes[0])
        base = used[0].temp_size_in_bytes - slope * sizes[0] + used[0].argument_size_in_bytes
        most = int((0.97 * room - base) / slope) // 1024 * 1024 if slope > 0 else sizes[1]
        del programs, made
        gc.collect()
        found = {'bytes_per_token': slope, 'bytes_at_0': base, 'room': room, 'tokens': most}
        out[remat] = found | largest(run, make, min(most, 2 * sizes[1] if run.tiny else most))
    return out


def largest(run: Run, make: Callable[[int], Program], tokens: int) -> dict[str, Any]:
    """The first of three sizes from `tokens` down that runs, and its rate."""
    for share in (1.0, 0.9, 0.8):
        size = max(int(share * tokens) // 2048 * 2048, 2048)
        try:
            found = run.measured({'step': make(size)})['step']
            return {'ran': size, 'tokens_per_s': found['tokens_per_s'], 'fol': found['fol']}
        except jax.errors.JaxRuntimeError as error:
            if 'RESOURCE_EXHAUSTED' not in str(error):
                raise
            gc.collect()
    return {'ran': 0}


def gathers(run: Run, model: str) -> dict[str, Any]:
    """Attention of a layer, forward and backward, from the stream and from rows that lie ready."""
    s, out = run.setup(model), {}
    for profile, tokens in (('hh', 4096), ('ultrafeedback', 8192)):
        b = bench_cells.packed(s, run.data(bench.PROFILES[profile], s), run.size(tokens))
        one = exchanged(s, jax.tree.map(jnp.asarray, b.pack))
        all_layers = (s.config.L - 1) * (one['stream'] - one['ready'])
        out[profile] = one | {'all_layers': all_layers}
    return out


def exchanged(s: Setup, pack: packing.Pack) -> dict[str, float]:
    """Seconds of one layer's attention and its gradients, with and without row gathers."""
    c, N = s.config, pack.ids_PN.shape[1]
    heads = (c.Q, c.K, c.K)
    draw = lambda i, n: jax.random.normal(jax.random.key(i), (1, N, n, c.H), s.dtype)  # noqa: E731
    qkv = tuple(draw(i, n) for i, n in enumerate(heads))
    rows = [[attention.take(x, slot) for x in qkv] for slot in pack.slot]
    lengths = attention.lengths(pack)
    square = lambda o: (o.astype(jnp.float32) ** 2).sum()  # noqa: E731

    def stream(q: Any, k: Any, v: Any) -> Any:
        return square(attention.attend(q, k, v, pack, s.attend))

    def ready(rows: Any) -> Any:
        return sum(square(s.attend(*x, n)) for x, n in zip(rows, lengths, strict=True))

    of_stream, of_rows = jax.jit(jax.grad(stream, (0, 1, 2))), jax.jit(jax.grad(ready))
    calls = {'stream': lambda: of_stream(*qkv), 'ready': lambda: of_rows(rows)}
    return {name: bench.spread(x)[0] for name, x in bench.alternate(calls, 20).items()}


BIG, SMALL = 'llama-3-8b', 'llama-3.2-1b'
# name: (seconds that it may take when nothing is cached, what makes it)
CELLS: dict[str, tuple[float, Callable[[Run], dict[str, Any]]]] = {
    'ceilings': (10, ceilings),
    'probe': (25, probe),
    'lora-8b': (70, lambda run: lora(run, BIG)),
    'score-8b': (50, lambda run: score(run, BIG)),
    'pairs-8b-hh': (75, lambda run: pairs(run, BIG, 'hh')),
    'best-of-16-8b': (45, lambda run: best_of(run, BIG)),
    'experts-8b': (75, lambda run: experts(run, BIG)),
    'limit-8b': (130, lambda run: limit(run, BIG)),
    'gathers-8b': (25, lambda run: gathers(run, BIG)),
    'fused-8b': (60, lambda run: together(run, BIG)),
    'pairs-8b-helpsteer': (75, lambda run: pairs(run, BIG, 'helpsteer', 4)),
    'whole-8b': (50, lambda run: whole(run, BIG)),
    'lora-1b': (40, lambda run: lora(run, SMALL, 16384)),
    'score-1b': (30, lambda run: score(run, SMALL)),
}


def line(name: str, value: Any) -> str:
    """One row of what is printed: rates and ratios, without the times they are made of."""
    if isinstance(value, dict):
        keep = ('median', 'tokens_per_s', 'records_per_s', 'fol', 'fol_done', 'wall', 'flops',
                'of_flops', 'temp_bytes', 'ran', 'bytes_per_token')  # fmt: skip
        value = ', '.join(f'{k} {v:.4g}' for k, v in value.items() if k in keep) or value
    return f'  {name}: {value:.4g}' if isinstance(value, float) else f'  {name}: {value}'


def cell(run: Run, name: str, need: float, make: Callable[[Run], dict[str, Any]]) -> Any:
    """What a cell found; why there is nothing, where there is not."""
    left = run.until - time.monotonic()
    if left < need and not run.tiny:
        return {'skipped': f'{left:.0f} s are left, it may take {need:.0f}'}
    start = time.monotonic()
    try:
        found = make(run)
    except Exception as error:  # the others are worth having without it
        found = {'failed': f'{type(error).__name__}: {str(error)[:500]}'}
    gc.collect()
    return {**found, 'cell_seconds': time.monotonic() - start}


def arguments(argv: list[str]) -> argparse.Namespace:
    """The flags."""
    parser = argparse.ArgumentParser(description=(__doc__ or '').splitlines()[0])
    parser.add_argument('--output_dir', type=Path, required=True)
    parser.add_argument('--budget', type=float, default=510, help='seconds, all told')
    parser.add_argument('--rounds', type=int, default=10)
    parser.add_argument('--cells', nargs='*', default=list(CELLS), choices=list(CELLS))
    parser.add_argument('--tiny', action='store_true', help='a tiny model, float32, anywhere')
    return parser.parse_args(argv)


def main(argv: list[str]) -> None:
    """Runs the cells, writing all there is after each."""
    c = arguments(argv)
    until = time.monotonic() + c.budget
    found: dict[str, Any] = {'machine': bench.machine(), 'arguments': vars(c) | {'output_dir': ''}}
    run = Run(c.tiny, c.rounds, until, c.output_dir, found)
    for name, (need, make) in CELLS.items():
        if name not in ('ceilings', 'probe', *c.cells):
            continue
        found[name] = cell(run, name, need, make)
        bench.write(c.output_dir / 'gpu.json', found)
        print(f'{name}  ({until - time.monotonic():.0f} s left)', flush=True)
        for key, value in found[name].items():
            print(line(key, value), flush=True)
        if name in ('ceilings', 'probe') and 'failed' in found[name]:
            sys.exit(1)


if __name__ == '__main__':
    main(sys.argv[1:])
