"""How fast the host packs: tokens a second on one core, from token ids to arrays for the device.

Run:     python -m experiments.bench_packing
Cost:    half a minute on one CPU core
Expect:  the row on packing in BENCHMARKS.md; JSON in --output_dir
"""

import dataclasses
import time
from pathlib import Path
from typing import Any

from experiments import bench, common
from jaxrm import packing, shapes


@dataclasses.dataclass(frozen=True)
class Config:
    output_dir: Path = Path('runs/bench')
    profiles: tuple[bench.ProfileName, ...] = tuple(bench.PROFILES)
    rounds: int = 5


def passed(t: Any, shape: packing.Shape) -> tuple[float, float]:
    """CPU seconds of planning an epoch and of filling its packs."""
    batches = packing.Batches(t, shape, 1, seed=0, epochs=1)
    start = time.process_time()
    count = len(batches)
    planned = time.process_time()
    for i in range(count):
        batches(i)
    return planned - start, time.process_time() - planned


def main(c: Config) -> None:
    """Measures and prints; CPU seconds, since one thread does all of it."""
    found: dict[str, Any] = {'machine': bench.machine()}
    rows = {}
    for name in c.profiles:
        p = bench.PROFILES[name]
        t = bench.data(p, vocabulary=128_256)
        shape = shapes.fit(t, size=p.size)
        spent = [passed(t, shape) for _ in range(c.rounds)]
        million = len(t.ids) / 1e6
        both = [million / (plan + fill) for plan, fill in spent]
        plan, fill = (
            bench.spread([million / x for x in part])[0] for part in zip(*spent, strict=True)
        )
        rows[name] = [f'{plan:.1f}', f'{fill:.1f}', bench.said(bench.spread(both), 1)]
        found[name] = {'plan': plan, 'fill': fill, 'both': both}
    columns = ('planning', 'filling', 'both')
    common.table('packing, million tokens a CPU second', rows, columns, paste=True)
    bench.write(c.output_dir / 'packing.json', found)


if __name__ == '__main__':
    common.launch(Config, main)
