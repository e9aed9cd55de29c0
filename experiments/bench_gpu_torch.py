"""jaxrm beside TRL and transformers on one GPU, in bfloat16: a part of bench_gpu.

A model of the width of Llama 3.2 1B with random weights, and random pairs, are written by one
process, then read by the sides that bench_trl has, which take turns while the others wait. A loop
of transformers and PEFT, which RewardTrainer does no less than, stands beside TRL, or in its place
where it is not installed; what is not is said.
"""

import importlib.util
import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np

from experiments import bench
from experiments.bench_turns import Side, take_turns
from jaxrm import programs

HERE = Path(__file__).parent
TASKS = {
    'scoring': ('score', 'padded_16', 'one_by_one'),
    'training, LoRA': ('train_lora', 'peft_lora'),
    'training, LoRA, TRL': ('train_lora', 'trl_lora'),
}
NEEDS = {
    'scoring': ('torch', 'transformers'),
    'training, LoRA': ('torch', 'transformers', 'peft'),
    'training, LoRA, TRL': ('torch', 'transformers', 'peft', 'trl', 'datasets'),
}
SHARE = 0.35  # of the GPU's memory, of jaxrm's side
ROWS, STEPS, BATCH = 200, 10, 8


def missing(task: str, python: str | None) -> list[str]:
    """What it needs and this interpreter does not have; another one is taken at its word."""
    return [] if python else [n for n in NEEDS[task] if not importlib.util.find_spec(n)]


def prepare(folder: Path, tiny: bool) -> None:
    """Writes the model, the pairs as token trees and as rows, and what sides have to know."""
    os.environ.pop(programs.FRACTIONS[1], None)
    os.environ[programs.FRACTIONS[0]] = str(SHARE)
    import jax.numpy as jnp

    from experiments import scratch
    from jaxrm import checkpoint

    tokenizer = scratch.train_tokenizer(['a b c d e f g'], 400)
    sizes = {'width': 64, 'layers': 2} if tiny else {'width': 2048, 'layers': 16}
    config = scratch.tiny(len(tokenizer), head=16 if tiny else 64, **sizes)
    dtype = jnp.float32 if tiny else jnp.bfloat16
    w = bench.drawn(bench.parameters(config, 16, dtype))
    like = checkpoint.Pretrained('llama', config, tokenizer)
    params = {part: w[part] for part in ('backbone', 'head')}
    checkpoint.export(folder / 'model', params, like, overwrite=True, dtype=np.dtype(dtype))
    profile = bench.PROFILES['hh']._replace(records=64 if tiny else 1024)
    t = bench.data(profile, vocabulary=config.V - 8)
    t = t._replace(ids=t.ids + 8)  # none of the tokens that mean something
    np.savez(folder / 'tokens.npz', **t._asdict())
    with (folder / 'pairs.jsonl').open('w') as file:
        for chosen, rejected in bench.rows(t):
            file.write(json.dumps({'chosen_ids': chosen, 'rejected_ids': rejected}) + '\n')
    device = 'cpu' if tiny else 'cuda'
    bench.write(folder / 'about.json', {
        'train_batch_size': BATCH, 'rows': 16 if tiny else ROWS, 'max_length': 2048,
        'dtype': np.dtype(dtype).name, 'device': device,
    })  # fmt: skip


def side(folder: Path, name: str, python: str | None) -> Side:
    """The process that makes one of them."""
    here = [sys.executable, '-m', 'experiments.bench_side']
    there = [python or sys.executable, str(HERE / 'bench_side_torch.py')]
    mine = name in ('score', 'train_lora')
    environ = {n: x for n, x in os.environ.items() if n not in programs.FRACTIONS}
    theirs = os.environ.get('PYTHONPATH') if mine or not python else None
    path = os.pathsep.join(x for x in (str(HERE.parent), theirs) if x)
    environ |= {'PYTHONPATH': path, 'TOKENIZERS_PARALLELISM': 'false'}
    environ |= {programs.FRACTIONS[0]: str(SHARE)} if mine else {}
    return Side(name, [*(here if mine else there), name, str(folder)], environ)


def turns(folder: Path, task: str, python: str | None, rounds: int) -> dict[str, Any]:
    """Units a second of each side, and ratios of jaxrm's over the others', turn by turn."""
    about = json.loads((folder / 'about.json').read_text())
    units = about['rows'] if task == 'scoring' else STEPS
    sides, far = [side(folder, name, python) for name in TASKS[task]], []

    def check(first: dict[str, Any]) -> None:
        scores = [np.array(turn['scores']) for turn in first.values() if 'scores' in turn]
        far.extend(float(np.linalg.norm(x - scores[0]) / np.linalg.norm(scores[0]))
                   for x in scores[1:])  # fmt: skip
        if any(not error < 0.1 for error in far):
            raise ValueError(f'{task}: scores are {far} away from those of jaxrm, expected 0.1')

    spent = take_turns(sides, units, rounds, check)
    rate = {n: [x['done'] / x['seconds'] for x in said] for n, said in spent.items()}
    mine, *others = rate
    return {
        'a_second': {name: list(bench.spread(x)) for name, x in rate.items()},
        'scores_differ': far,
        **{f'{mine} over {n}': list(bench.ratio(rate[mine], rate[n])) for n in others},
    }


def compare(folder: Path, python: str | None, rounds: int) -> None:
    """Writes torch.json there after each task."""
    found: dict[str, Any] = {}
    for task in TASKS:
        if absent := missing(task, python):
            found[task] = {'skipped': f'not installed: {", ".join(absent)}'}
        else:
            try:
                found[task] = turns(folder, task, python, rounds)
            except (ValueError, OSError) as error:
                found[task] = {'failed': str(error)}
        bench.write(folder / 'torch.json', found)
