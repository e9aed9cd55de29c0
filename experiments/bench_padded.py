"""Packs that share prompts against repeated prompts and padded rows: time beside FLOPs.

Run:     python -m experiments.bench_padded
Cost:    about ten minutes on two quiet CPU cores
Expect:  the table on wall and FLOP ratios in BENCHMARKS.md; JSON in --output_dir

The same kernels and the same model, in turns in one process; ratios are per record, round by round.
*Repeated* is a pack whose rows have their prompts to themselves; *padded* are random batches of so
many pairs, as long as their longest rows in the mean. FLOPs are those of the programs.
"""

import dataclasses
from pathlib import Path
from typing import Any, Literal

import jax.numpy as jnp

from experiments import bench, bench_cells, common
from jaxrm import costs

What = Literal['scoring', 'LoRA step', 'full step']


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    output_dir: Path = Path('runs/bench')
    profiles: tuple[bench.ProfileName, ...] = ('hh', 'ultrafeedback', 'tldr')
    what: tuple[What, ...] = ('scoring', 'LoRA step', 'full step')
    hidden_size: int = 256
    num_hidden_layers: int = 4
    vocabulary: int = 1024
    tokens: int = 4096  # of a pack
    train_batch_size: int = 8  # pairs of a padded batch
    rounds: int = 10


def jobs(c: Config, s: bench_cells.Setup, profile: str, what: str) -> dict[str, bench_cells.Job]:
    """The three ways."""
    t = bench.data(bench.PROFILES[profile]._replace(records=512), vocabulary=c.vocabulary)
    ways = {
        'packed': bench_cells.packed(s, t, c.tokens),
        'repeated': bench_cells.packed(s, t, c.tokens, apart=True),
        'padded': bench_cells.padded(s, t, c.train_batch_size),
    }
    methods = {'scoring': costs.SCORING, 'full step': bench_cells.FULL}
    method = methods.get(what, bench_cells.LORA)
    return {name: bench_cells.Job(b, method) for name, b in ways.items()}


def main(c: Config) -> None:
    """Measures every cell, writes what there is, and prints the table."""
    D = c.hidden_size
    sizes = {'V': c.vocabulary, 'D': D, 'F': D * 8 // 3 // 16 * 16, 'L': c.num_hidden_layers}
    s = bench_cells.setup(bench.Config(**sizes, Q=D // 64, K=max(D // 128, 1), H=64), jnp.float32)
    found: dict[str, Any] = {'machine': bench.machine(), 'sizes': sizes}
    rows = {}
    for what in c.what:
        for profile in c.profiles:
            times = bench_cells.measured(s, jobs(c, s, profile, what), c.rounds)
            cells = []
            for other in ('repeated', 'padded'):
                ratio = bench_cells.faster(times, other=other)
                times[other] |= {'packed_over_it': ratio}
                wall = bench.said((ratio['wall'], *ratio['quartiles']))
                cells += [wall, f'{ratio["flops"]:.2f}', f'{ratio["of_flops"]:.2f}']
            rows[f'{what}, {profile}'] = cells
            found[f'{what}, {profile}'] = times
            bench.write(c.output_dir / 'padded.json', found)
    header = ('over repeated: wall', 'FLOPs', 'wall / FLOPs',
              'over padded: wall', 'FLOPs', 'wall / FLOPs')  # fmt: skip
    common.table('packed and shared, records a second', rows, header, paste=True)


if __name__ == '__main__':
    common.launch(Config, main)
