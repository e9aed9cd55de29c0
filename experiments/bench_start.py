"""Seconds to the end of a run's first step, with compiled programs kept from an earlier start.

Run:     python -m experiments.bench_start
Cost:    two minutes on two CPU cores
Expect:  the table on starts in BENCHMARKS.md; JSON in --output_dir

Each start is a process of its own: a tiny LoRA run from random weights, imports aside. *Kept* is
what the command line and the experiments do (`jaxrm.programs`), *default* what JAX does by itself:
it keeps programs that took a second to compile. The first start of a round finds an empty folder.
"""

import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from experiments import bench, common
from jaxrm import fused, packing, programs, sharding, train
from jaxrm.backbones import attention

WAYS = {'kept': {}, 'default': {programs.LEAST: '1'}}


@dataclasses.dataclass(frozen=True)
class Config:
    output_dir: Path = Path('runs/bench')
    rounds: int = 5
    first_step: bool = False  # of a process of its own, which prints JSON


def first_step() -> dict[str, Any]:
    """One start, in this process."""
    programs.keep(os.environ)
    seen: list[str] = []
    jax.monitoring.register_event_listener(lambda name, **_: seen.append(name))
    wall, cpu = time.perf_counter(), time.process_time()
    c = bench.Config(V=1024, D=128, F=448, L=4, Q=4, K=2, H=32)
    rm, mesh = bench.model(c, jnp.float32, attention.xla), sharding.make_mesh()
    w = bench.drawn(bench.parameters(c, 8))
    learns = {part: w[part] for part in ('lora', 'head')}
    t = bench.data(bench.Profile((30, 6), (30, 6), 2, 512, 60), vocabulary=c.V)
    batches = packing.Batches(t, bench.packed(t, 512, c.D, 8)[0], 1, seed=0)
    tx, spent = train.adamw(1e-3), []

    def stop(done: int, state: Any, metrics: Any) -> None:
        jax.block_until_ready(metrics)
        spent.append((time.perf_counter() - wall, time.process_time() - cpu))

    train.fit(
        train.start(learns, tx, mesh), fused.place({'backbone': w['backbone']}, mesh), batches,
        jax.random.key(0), objective=train.preference(rm.score), tx=tx, mesh=mesh, steps=1,
        hooks=[(1, stop)],
    )  # fmt: skip
    asked, hit = 'compile_requests_use_cache', 'cache_hits'
    count = lambda what: seen.count(f'/jax/compilation_cache/{what}')  # noqa: E731
    return {'wall': spent[0][0], 'cpu': spent[0][1], 'programs': count(asked), 'found': count(hit)}


def started(folder: str, way: str) -> dict[str, Any]:
    """The same in a process of its own with this folder of programs."""
    command = [sys.executable, '-m', 'experiments.bench_start', '--first_step']
    env = os.environ | {programs.FOLDER: folder, programs.LEAST: '0'} | WAYS[way]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=env)
    return json.loads(done.stdout.splitlines()[-1])


def main(c: Config) -> None:
    """All rounds; cold and warm starts of both ways in turn."""
    if c.first_step:
        print(json.dumps(first_step()))
        return
    found: dict[str, list[dict[str, Any]]] = {}
    for _ in range(c.rounds):
        for way in WAYS:
            with tempfile.TemporaryDirectory() as folder:
                for start in ('cold', 'warm'):
                    found.setdefault(f'{way}, {start}', []).append(started(folder, way))
    rows = {
        name: [
            *(bench.said(bench.spread([x[what] for x in of]), 1) for what in ('wall', 'cpu')),
            f'{of[0]["found"]} of {of[0]["programs"]}',
        ]
        for name, of in found.items()
    }
    columns = ('seconds', 'seconds of CPU', 'programs found')
    common.table('to the end of the first step', rows, columns, paste=True)
    bench.write(c.output_dir / 'start.json', {'machine': bench.machine(), 'starts': found})


if __name__ == '__main__':
    common.launch(Config, main)
