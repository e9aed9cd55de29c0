"""Tiny reward models on real preference pairs, three seeds, beside baselines: the table and runs.

Run:     JAXRM_DATA=DIR python -m experiments.real_data        # trains what is missing, then prints
         python -m experiments.real_data --only_table          # from experiments/results/real_data
Cost:    about an hour on two CPU cores
Expect:  the table of real data in BENCHMARKS.md

Each cell is one run of experiments.preference, kept as JSON. `pretrained` starts from a decoder
that read the train files' chosen answers and general text, never a test file.
"""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np

from experiments import common
from jaxrm import evaluate

SETS = {'hh_harmless': 4, 'convarg': 2, 'qa_feedback': 4, 'chat_zh': 4}  # epochs
RESULTS = Path(__file__).parent / 'results' / 'real_data'


@dataclasses.dataclass(frozen=True)
class Config:
    seeds: tuple[int, ...] = (0, 1, 2)
    starts: tuple[str, ...] = ('scratch', 'pretrained')
    output_dir: Path = Path('runs/real_data')
    only_table: bool = False


def call(module: str, *flags: object) -> None:
    """One experiment in a process of its own."""
    subprocess.run([sys.executable, '-m', f'experiments.{module}', *map(str, flags)], check=True)


def pretrain(c: Config, data: Path) -> Path:
    """The folder of the pretrained start, made if missing."""
    files = [data / 'preference' / f'{name}.train.jsonl.gz' for name in SETS]
    files.append(data / 'domain' / 'general_oasst.jsonl.gz')
    folder = c.output_dir / 'pretrain'
    sizes = ['--vocabulary', 4096, '--hidden_size', 96, '--num_hidden_layers', 3]
    call('pretrain', '--output_dir', folder, '--dataset_name', *files, *sizes,
         '--max_length', 384, '--train_batch_size', 12, '--num_train_epochs', 2)  # fmt: skip
    return folder / 'model'


def train(c: Config, data: Path) -> None:
    """Every cell that has no result yet."""
    for seed in c.seeds:
        for name, epochs in SETS.items():
            for start in c.starts:
                result = RESULTS / f'{name}-{start}-{seed}.json'
                if result.exists():
                    continue
                sizes = ['--vocabulary', 4096, '--hidden_size', 64, '--num_hidden_layers', 2]
                if start == 'pretrained':
                    sizes = ['--model_name_or_path', pretrain(c, data)]
                train_file, test_file = (
                    data / 'preference' / f'{name}.{split}.jsonl.gz' for split in ('train', 'test')
                )
                call('preference', '--dataset_train', train_file, '--dataset_test', test_file,
                     '--output_dir', c.output_dir / result.stem, '--result', result, *sizes,
                     '--num_train_epochs', epochs, '--learning_rate', 5e-4,
                     '--seed', seed)  # fmt: skip


def table(c: Config) -> None:
    """Mean accuracy over seeds, its spread, and an interval over test prompts and seeds."""
    rows = {}
    for name in SETS:
        for start in c.starts:
            paths = [RESULTS / f'{name}-{start}-{seed}.json' for seed in c.seeds]
            cells = [json.loads(p.read_text()) for p in paths if p.exists()]
            if not cells:
                continue
            seeds = [cell['accuracy']['reward model'][0] for cell in cells]
            over_prompts = evaluate.interval(np.mean([cell['right'] for cell in cells], axis=0))
            baselines = [cells[0]['accuracy'][k][0] for k in ('longer wins', 'bag of words')]
            spread = f'{min(seeds):.3f} to {max(seeds):.3f}'
            rows[f'{name}, {start}'] = [
                len(cells), over_prompts, spread, *(f'{b:.3f}' for b in baselines)
            ]  # fmt: skip
    columns = ['seeds', 'accuracy [95 %]', 'over seeds', 'longer wins', 'bag of words']
    common.table('held-out pair accuracy', rows, columns, paste=True)


def main(c: Config) -> None:
    """Train, then print."""
    if not c.only_table:
        if 'JAXRM_DATA' not in os.environ:
            sys.exit('JAXRM_DATA is not set: it names the folder with preference/*.jsonl.gz')
        train(c, Path(os.environ['JAXRM_DATA']))
    table(c)


if __name__ == '__main__':
    common.launch(Config, main)
