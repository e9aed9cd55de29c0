"""What a sweep of shares costs inside the scorer, beside one that writes and loads checkpoints.

Run:     python -m experiments.sweep_cost
Cost:    a few minutes on two CPU cores, and twice the model's bytes of disk
Expect:  the table on sweeps in BENCHMARKS.md

Both ways score the same pairs at the same shares, in turn, each in a process of its own, and must
agree. `files` is what DogeRM's users do now: merge, write, load, score, delete, for every share.
Seconds are those of the sweep, with its compilations and without the interpreter's start; memory is
the most that was resident, in all and above what the process held before it read a model.
"""

import dataclasses
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np

import jaxrm
from experiments import common, devices, dogerm
from jaxrm import checkpoint, merge_files, merge_plan
from jaxrm.datasets import synthetic

Array = np.ndarray
COMPILED, SCORE = '/jax/core/compile/backend_compile_duration', 'jit(score)'
RECIPE = """
merge_method: linear
models:
  - {{model: rm, parameters: {{weight: {rest}}}}}
  - {{model: lm, parameters: {{weight: {share}}}}}
tokenizer: {{source: union}}
reward_head: {{source: rm}}
dtype: float32
"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(devices.Devices):
    results: Path = Path('experiments/results/sweep_cost')
    shares: int = 21
    pairs: int = 64
    hidden_size: int = 512
    num_hidden_layers: int = 8
    rounds: int = 3
    only_table: bool = False
    way: Literal['blend', 'files'] | None = None  # of a process of its own, which prints JSON
    folder: Path | None = None  # and its models


def models(c: Config, folder: Path) -> None:
    """A reward model and a language model with random weights."""
    records = synthetic.preferences(400, seed=0)
    options = common.Model(
        hidden_size=c.hidden_size, num_hidden_layers=c.num_hidden_layers, vocabulary=1024
    )
    for seed, (name, kind) in enumerate({'rm': 'score', 'lm': 'lm_head'}.items()):
        start = common.start(options, common.texts(records), mesh=devices.mesh(c), seed=seed)
        head = start.trainable['head'] if kind == 'score' else {}
        params = {'backbone': start.trainable['backbone'], 'head': head}
        checkpoint.export(folder / name, params, start.like, head_kind=kind)


# The two ways: the mean reward at each share


def blend(c: Config, folder: Path) -> Callable[[], list[float]]:
    """Mixed inside the scorer."""
    of, some = dogerm.mixed(str(folder / 'rm'), str(folder / 'lm')), records(c)
    return lambda: dogerm.records_swept(of, some, dogerm.shares(c.shares)).mean_K.tolist()


def files(c: Config, folder: Path) -> Callable[[], list[float]]:
    """Merged, written, loaded and deleted."""
    some, recipe, out = records(c), folder / 'recipe.yml', folder / 'merged'

    def one(share: float) -> float:
        recipe.write_text(RECIPE.format(rest=1 - share, share=share))
        merge_files.write(merge_plan.prepare(recipe), out)
        found = jaxrm.load(out).score_records(some)
        shutil.rmtree(out)
        return float(np.concatenate(found).mean())

    return lambda: [one(share) for share in dogerm.shares(c.shares)]


WAYS = {'blend': blend, 'files': files}


def records(c: Config) -> list[Any]:
    return synthetic.preferences(c.pairs, seed=1, split='test')


def peak() -> int:
    """Bytes that were resident at most."""
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def measured(c: Config, folder: Path) -> dict[str, Any]:
    """One way, in this process."""
    compiled: list[str] = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda name, *_, **of: (
            compiled.append(str(of.get('fun_name'))) if name == COMPILED else None
        )
    )
    assert c.way
    began, before, run = time.perf_counter(), peak(), WAYS[c.way](c, folder)
    ready, compiled[:] = time.perf_counter(), []
    means = run()
    seconds = time.perf_counter() - ready
    forwards = compiled.count(SCORE)
    return {'seconds': seconds, 'load': ready - began, 'peak': peak(), 'before': before,
            'compilations': len(compiled), 'forwards': forwards, 'mean': means}  # fmt: skip


# All rounds


def measure(c: Config) -> dict[str, list[dict[str, Any]]]:
    """Both ways in turn, each in a process of its own without compiled programs of others."""
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in WAYS}
    with tempfile.TemporaryDirectory() as folder:
        models(c, Path(folder))
        size = [f'--{k}={getattr(c, k)}' for k in ('shares', 'pairs')]
        for _ in range(c.rounds):
            for way, rows in found.items():
                command = [sys.executable, '-m', 'experiments.sweep_cost', *size, '--way', way]
                done = subprocess.run(
                    [*command, '--folder', folder],
                    check=True,
                    stdout=subprocess.PIPE,
                    text=True,
                    env={**os.environ, 'JAX_ENABLE_COMPILATION_CACHE': 'false'},
                )
                rows.append(json.loads(done.stdout.splitlines()[-1]))
    means = [row['mean'] for rows in found.values() for row in rows]
    np.testing.assert_allclose(means, np.broadcast_to(means[0], np.shape(means)), atol=1e-4)
    return found


def table(c: Config, found: dict[str, list[dict[str, Any]]]) -> None:
    """A row for each way: medians and ranges of the rounds."""
    span = lambda x: f'{np.median(x):.3g} ({min(x):.3g} to {max(x):.3g})'  # noqa: E731
    rows = {
        way: [
            span([row['seconds'] for row in of]), str(of[0]['forwards']),
            span([row['peak'] / 1e6 for row in of]),
            span([(row['peak'] - row['before']) / 1e6 for row in of]),
        ]
        for way, of in found.items()
    }  # fmt: skip
    columns = ('seconds', 'compilations of the scorer', 'peak MB', 'peak MB above the start')
    common.table(f'{c.shares} shares, {c.pairs} pairs', rows, columns, paste=True)
    files, blend = ([row['seconds'] for row in found[way]] for way in ('files', 'blend'))
    ratio = span(np.divide(files, blend))
    common.console.print(f'seconds of files over those of blend: {ratio}')


def main(c: Config) -> None:
    """Measures if nothing is there, and prints the table."""
    if c.way and c.folder:
        print(json.dumps(measured(c, c.folder)))
        return
    path = c.results / 'sweep.json'
    if not path.exists() and not c.only_table:
        common.write_json(path, measure(c))
    table(c, json.loads(path.read_text()))


if __name__ == '__main__':
    common.launch(Config, main)
