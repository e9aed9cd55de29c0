"""jaxrm beside TRL's RewardTrainer and transformers: one tiny model, the same pairs, one machine.

Run:     JAXRM_DATA=DIR python -m experiments.bench_trl --torch_python PATH
Cost:    about ten minutes on two quiet CPU cores
Expect:  the tables on TRL in BENCHMARKS.md; JSON in --output_dir

PATH is an interpreter with torch, transformers, TRL and PEFT. The model is written by jaxrm and
read by both; both get the same token ids, so that no tokeniser is timed; before anything is, their
scores are compared. Each side is a process that times its own loop, in turns with the other while
that one waits: ratios are those of neighbouring turns. Both compute in float32 on all cores that
they may use (`taskset` says which). TRL pads pairs in random batches; transformers scores rows in
padded batches of 16 and one by one.
"""

import dataclasses
import functools
import json
import os
import sys
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from experiments import bench, common
from experiments.bench_turns import Side, take_turns
from experiments.scratch import tiny, train_tokenizer
from jaxrm import checkpoint, costs, data, flops, heads, packing, reward, tokens, train
from jaxrm.backbones import attention
from jaxrm.backbones.layers import Config as Decoder

SETS = ('hh_harmless', 'convarg', 'qa_feedback')
HERE = Path(__file__).parent
# Of each task, what runs on either side; the first is jaxrm's, ratios are over each of the others.
TASKS = {
    'training, all weights': ('train_full', 'trl_full'),
    'training, LoRA': ('train_lora', 'trl_lora'),
    'scoring': ('score', 'score_apart', 'padded_16', 'one_by_one'),
    'linears of a layer': ('linears', 'torch_linears'),
    'attention of a layer': ('attention', 'torch_attention'),
}
Task = Literal[tuple(TASKS)]
TORCH = {'trl_full', 'trl_lora', 'padded_16', 'one_by_one', 'torch_linears', 'torch_attention'}
METHODS = {
    'full': costs.Method('everything', rank=0, remat='none'),
    'LoRA': costs.Method('adapter', rank=16, remat='none'),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    torch_python: str = sys.executable
    output_dir: Path = Path('runs/bench_trl')
    tasks: tuple[Task, ...] = tuple(TASKS)
    alternations: int = 7
    steps: int = 20  # of a turn of training
    rows: int = 400  # of a turn of scoring
    train_batch_size: int = 8  # pairs, of a step: TRL's exactly, ours in the mean
    pairs: int = 3000
    max_length: int = 512
    vocabulary: int = 4096
    hidden_size: int = 128
    num_hidden_layers: int = 4
    head_dim: int = 32


# What both sides read


def records(c: Config) -> list[data.Preference]:
    """Pairs of all sets in one random order."""
    folder = os.environ.get('JAXRM_DATA')
    if not folder:
        raise ValueError('JAXRM_DATA is not set: it names a folder of preference data sets')
    files = [Path(folder) / 'preference' / f'{name}.train.jsonl.gz' for name in SETS]
    found = [record for path in files for record in data.load(path).records]
    order = np.random.default_rng(0).permutation(len(found))
    return [found[i] for i in order[: c.pairs]]


def prepare(c: Config) -> tokens.Tokens:
    """Writes the model, the pairs as token trees and as rows of ids, and the sizes."""
    found = records(c)
    tokenizer = train_tokenizer(common.texts(found), c.vocabulary)
    config = tiny(len(tokenizer), width=c.hidden_size, layers=c.num_hidden_layers, head=c.head_dim)
    rm = reward.RewardModel(bench.model(config, np.float32, None).backbone, heads.Scalar())
    keys = jax.random.split(jax.random.key(0))
    params = {'backbone': rm.init_backbone(keys[0]), 'head': rm.init_head(keys[1], config.D)}
    like = checkpoint.Pretrained('llama', config, tokenizer)
    checkpoint.export(c.output_dir / 'model', params, like, overwrite=True)
    encoded = tokens.encode(found, tokenizer, max_length=c.max_length)
    common.console.print(str(encoded.report))
    np.savez(c.output_dir / 'tokens.npz', **encoded.tokens._asdict())
    with (c.output_dir / 'pairs.jsonl').open('w') as file:
        for chosen, rejected in bench.rows(encoded.tokens):
            file.write(json.dumps({'chosen_ids': chosen, 'rejected_ids': rejected}) + '\n')
    about = {name: getattr(c, name) for name in ('train_batch_size', 'rows', 'max_length')}
    bench.write(c.output_dir / 'about.json', about | sizes(config))
    return encoded.tokens


def sizes(config: Decoder) -> dict[str, int]:
    """What the matrix products of a layer are like."""
    return {'D': config.D, 'F': config.F, 'Q': config.Q, 'H': config.H, 'L': config.L}


# Turns


def side(c: Config, name: str) -> Side:
    """The process that makes one of them."""
    here = [sys.executable, '-m', 'experiments.bench_side']
    there = [c.torch_python, str(HERE / 'bench_side_torch.py')]
    command = [*(there if name in TORCH else here), name, str(c.output_dir)]
    environ = os.environ | {'PYTHONPATH': str(HERE.parent), 'TOKENIZERS_PARALLELISM': 'false'}
    return Side(name, command, environ)


def units(c: Config, task: str) -> int:
    """Of a turn: steps, rows, or repetitions of a kernel."""
    return {'training': c.steps, 'scoring': c.rows}.get(task.split(',')[0], 200)


def alternate(c: Config, task: str) -> dict[str, list[dict[str, Any]]]:
    """What each side says of each turn; the first, which compiles, is left out."""
    sides = [side(c, name) for name in TASKS[task]]
    return take_turns(sides, units(c, task), c.alternations, functools.partial(check, task))


def check(task: str, first: dict[str, dict[str, Any]]) -> None:
    """Raises ValueError unless all sides gave the same scores, where they give any."""
    scores = {name: np.array(turn['scores']) for name, turn in first.items() if 'scores' in turn}
    (mine, *others) = scores.values() if scores else [np.zeros(0)]
    for name, other in zip(list(scores)[1:], others, strict=True):
        if not np.allclose(mine, other, rtol=0, atol=1e-4):
            far = np.abs(mine - other).max()
            raise ValueError(f'{task}: scores of {name} are up to {far:.2e} away, expected 1e-4')


# What came of it


def rate(turns: list[dict[str, Any]], clock: str = 'seconds') -> list[float]:
    """Units a second, turn by turn."""
    return [turn['done'] / turn[clock] for turn in turns]


def summary(found: dict[str, list[dict[str, Any]]]) -> dict[str, list[str]]:
    """Rates of all sides, and ratios of the first over each: by wall time and by CPU time."""
    mine, out = next(iter(found.values())), {}
    for name, turns in found.items():
        ratios = [
            '' if turns is mine else bench.said(bench.ratio(rate(mine, k), rate(turns, k)))
            for k in ('seconds', 'cpu')
        ]
        out[name] = [bench.said(bench.spread(rate(turns)), 1), *ratios]
    return out


def work(c: Config, t: tokens.Tokens, config: Decoder) -> dict[str, float]:
    """Token slots of a pair on both sides, and FLOPs of its step: what differs beside kernels.

    TRL's rows are computed whole, the top layer too; attention on a CPU computes full squares on
    either side, and torch's computes the logits again on the way back.
    """
    n, L, heads = len(t.prompt), config.L, config.Q * config.H
    batches = bench.padded(t, c.train_batch_size)
    slots, squares = sum(r * s for r, s in batches), sum(r * s * s for r, s in batches)
    whole = costs.Load(slots, (), slots, 0, 2 * n)
    size, multiple = bench.mean_size(t, c.train_batch_size), attention.row_multiple()
    shape, packs = bench.packed(t, size, config.D, multiple)
    pack = bench.shapes_of(packing.fill(t, packs[:1], shape))
    out = {
        'tokens of a padded pair': slots / n,
        'tokens of both rows': float(packing.row_lengths(t).sum() / n),
        'tokens of a shared pair': len(t.ids) / n,
        'tokens of a packed pair': len(packs) * shape.tokens / n,
    }
    for name, method in METHODS.items():
        theirs = costs.step(config, whole, method).total + 14 * L * heads * squares
        ours = len(packs) * step_flops(config, method, pack)
        out[f'FLOPs, {name}: padded / packed'] = theirs / ours
    return out


def step_flops(config: Decoder, method: costs.Method, pack: packing.Pack) -> int:
    """Of a step on one pack, as it is computed on a CPU."""
    rm, w = bench.model(config, jnp.float32, attention.xla), bench.parameters(config)
    learns = {'head': w['head']}
    base = {'backbone': w['backbone']}
    adapts = method.learns == 'adapter'
    learns |= {'lora': w['lora']} if adapts else base
    step = functools.partial(train.gradients, train.preference(rm.score))
    key = jax.eval_shape(lambda: jax.random.key(0))
    return flops.count(step, learns, base if adapts else {}, pack, key)


def main(c: Config) -> None:
    """Runs every task, writes each as it ends, and prints the tables."""
    c.output_dir.mkdir(parents=True, exist_ok=True)
    t = prepare(c)
    config = checkpoint.load_pretrained(c.output_dir / 'model').config
    needs = work(c, t, config)
    for name, value in needs.items():
        common.console.print(f'{name}: {value:.2f}')
    found: dict[str, Any] = {'machine': bench.machine(), 'work': needs, 'turns': {}}
    table: dict[str, list[str]] = {}
    for task in c.tasks:
        found['turns'][task] = alternate(c, task)
        bench.write(c.output_dir / 'trl.json', found)
        for name, cells in summary(found['turns'][task]).items():
            table[f'{task}: {name}'] = cells
    columns = ('a second', 'jaxrm over it, wall', 'jaxrm over it, CPU')
    common.table('jaxrm beside torch', table, columns, paste=True)


if __name__ == '__main__':
    common.launch(Config, main)
