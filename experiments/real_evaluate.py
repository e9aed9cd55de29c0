"""`jaxrm evaluate` on real sets, for the models of experiments.real_data: the length-bias table.

Run:     JAXRM_DATA=DIR python -m experiments.real_evaluate     # evaluates what is missing
         python -m experiments.real_evaluate --only_table       # from experiments/results
Cost:    about a minute a model on two CPU cores
Expect:  the table of length bias in BENCHMARKS.md

Each model is scored on its own test set and on two files of benchmark pairs, partial RewardBench
subsets and others; what `jaxrm evaluate` found is kept as JSON.
"""

import dataclasses
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from experiments import common

SETS = ('hh_harmless', 'convarg', 'qa_feedback', 'chat_zh')
FILES = ('rewardbench/rewardbench_partial', 'rewardbench/extra_pairs')
RESULTS = Path(__file__).parent / 'results' / 'real_evaluate'


@dataclasses.dataclass(frozen=True)
class Config:
    seeds: tuple[int, ...] = (0, 1, 2)
    start: str = 'pretrained'  # or scratch
    models: Path = Path('runs/real_data')  # output_dir of experiments.real_data
    only_table: bool = False


def evaluate(model: Path, files: list[Path]) -> dict[str, Any]:
    """What the command says of each file."""
    with tempfile.TemporaryDirectory() as folder:
        data = [x for file in files for x in ('--data', file)]
        command = ['evaluate', '--model', model, *data, '--output', Path(folder) / 'out',
                   '--chat', '--truncate', 'left', '--no-pictures']  # fmt: skip
        subprocess.run([sys.executable, '-m', 'jaxrm', *map(str, command)], check=True)
        return json.loads((Path(folder) / 'out' / 'results.json').read_text())['sets']


def small(found: dict[str, Any]) -> dict[str, Any]:
    """The numbers of a table out of all that is known of a set."""
    length, calibration = found['length'], found['calibration']
    kept = {k: length[k] for k in ('longer_wins', 'longer', 'shorter', 'pearson', 'spearman')}
    return {
        **{k: found[k] for k in ('records', 'prompts', 'accuracy', 'ties', 'margin')},
        **{k: calibration[k] for k in ('ece', 'brier')},
        **kept,
    }


def cell(c: Config, name: str, seed: int, data: Path) -> None:
    """One model on all files, unless it is there."""
    path = RESULTS / f'{name}-{c.start}-{seed}.json'
    if path.exists():
        return
    own = data / 'preference' / f'{name}.test.jsonl.gz'
    files = [own, *(data / f'{file}.jsonl.gz' for file in FILES)]
    found = evaluate(c.models / path.stem / 'model', files)
    kept = {
        file: {'all': small(x['all']), **{k: small(v) for k, v in x['subsets'].items()}}
        for file, x in found.items()
    }
    common.write_json(path, kept)


def row(cells: list[dict[str, Any]]) -> list[str]:
    """Means over seeds; the spread of the accuracy."""
    accuracy = [x['accuracy']['mean'] for x in cells]
    mean = lambda key: f'{np.mean([x[key] for x in cells]):.3f}'  # noqa: E731
    by = [np.mean([x[key]['mean'] for x in cells if x[key]]) for key in ('longer', 'shorter')]
    return [
        str(cells[0]['records']), f'{np.mean(accuracy):.3f}',
        f'{min(accuracy):.3f} to {max(accuracy):.3f}', *(f'{x:.3f}' for x in by),
        mean('longer_wins'), mean('spearman'), mean('ece'),
    ]  # fmt: skip


def table(c: Config) -> None:
    """A row for each model and set, and for the subset where length says least."""
    rows = {}
    for name in SETS:
        paths = [RESULTS / f'{name}-{c.start}-{seed}.json' for seed in c.seeds]
        cells = [json.loads(p.read_text()) for p in paths if p.exists()]
        for file in cells[0] if cells else ():
            rows[f'{name} on {file}'] = row([x[file]['all'] for x in cells])
        if cells:
            hard = [x['rewardbench_partial']['llmbar-adver-neighbor'] for x in cells]
            rows[f'{name} on llmbar-adver-neighbor'] = row(hard)
    columns = ['pairs', 'accuracy', 'over seeds', 'if the longer is right', 'if the shorter',
               'longer wins', 'Spearman with length', 'ECE']  # fmt: skip
    common.table('length bias, means over seeds', rows, columns, paste=True)


def main(c: Config) -> None:
    """Evaluate, then print."""
    if not c.only_table:
        if 'JAXRM_DATA' not in os.environ:
            sys.exit('JAXRM_DATA is not set: it names the folder with preference/*.jsonl.gz')
        for seed in c.seeds:
            for name in SETS:
                cell(c, name, seed, Path(os.environ['JAXRM_DATA']))
    table(c)


if __name__ == '__main__':
    common.launch(Config, main)
