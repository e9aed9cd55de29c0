"""A reward model in minutes: trained on the synthetic world, compared, exported, loaded, used.

Run:     python -m experiments.quickstart
Cost:    under 4 minutes on two CPU cores
Expect:  held-out accuracy on sampled labels of at least 0.85 of the gold oracle's, and above the
         longer answer and a bag of words (see BENCHMARKS.md for measured values)
"""

import dataclasses
import itertools
import time
from pathlib import Path

import numpy as np

import jaxrm
from experiments import common, devices
from jaxrm import baselines, evaluate, logs, processes, report, tokens, train
from jaxrm.datasets import synthetic


@dataclasses.dataclass(frozen=True)
class Config(common.Model, common.Training):
    output_dir: Path = Path('runs/quickstart')
    learning_rate: float = 2e-3
    train_batch_size: int = 48
    pairs: int = 16_000
    test_pairs: int = 2000


def main(c: Config) -> None:
    """Everything, top to bottom."""
    began, mesh = time.time(), devices.mesh(c)
    pairs = synthetic.preferences(c.pairs, seed=c.seed)
    test = synthetic.preferences(c.test_pairs, seed=c.seed, split='test')
    start = common.start(c, common.texts(pairs[:4000]), mesh=mesh, seed=c.seed)
    encoded = tokens.encode(pairs, start.like.tokenizer, max_length=c.max_length)
    common.console.print(str(encoded.report))
    start = devices.economical(c, start, encoded.tokens, mesh)
    objective = train.preference(start.rm.score)
    learned = common.run(
        c, start.trainable, start.frozen, encoded.tokens, objective,
        mesh=mesh, width=start.like.config.D, what={'experiment': 'quickstart'},
    )  # fmt: skip
    params = {**start.frozen, **learned}
    common.console.print(f'scoring {len(test)} held-out pairs and fitting the baselines')
    test_tokens = tokens.encode(test, start.like.tokenizer).tokens
    gold = [np.array([synthetic.gold(r.messages, a).reward for a in r.responses]) for r in test]
    found = {
        'reward model': common.scores(start.rm, params, test_tokens, mesh),
        'gold oracle': gold,
        'longer wins': baselines.longer_wins(test),
        'bag of words': baselines.bag_of_words(pairs)(test),
    }
    result = compare(found, evaluate.ranks(test), gold)
    processes.alone(lambda: pictures(c.output_dir, found['reward model']))
    common.export(c, params, start.like, start.rm.lora_scale, 'quickstart')
    use(c.output_dir / 'model')
    result |= {'seconds': round(time.time() - began, 1), 'flags': common.identity(c)}
    common.write_json(c.output_dir / 'result.json', result)
    common.console.print(f'{result["seconds"]:.0f} s; files are in {c.output_dir}')


def compare(found: dict, ranks: list, gold: list) -> dict:
    """Prints the tables and the verdict; returns the numbers."""
    right = {name: evaluate.pairs(ranks, scores).accuracy for name, scores in found.items()}
    rows = {name: [evaluate.interval(x)] for name, x in right.items()}
    common.table('accuracy on sampled labels, held-out prompts', rows, ['95 % interval'])
    ratio = right['reward model'].mean() / right['gold oracle'].mean()
    above = {
        name: evaluate.paired(right['reward model'], right[name])
        for name in ('longer wins', 'bag of words')
    }
    for name, difference in above.items():
        common.console.print(f'reward model - {name}: {difference} (paired bootstrap)')
    passed = ratio >= 0.85 and all(x.low > 0 for x in above.values())
    verdict = 'pass' if passed else 'FAIL'
    common.console.print(f'{ratio:.3f} of the oracle: {verdict} (0.85 and above both baselines)')
    gaps = by_gap(found['reward model'], gold)
    rows = {name: [n, interval] for name, n, interval in gaps}
    common.table('accuracy on gold labels by gold gap', rows, ['pairs', '95 % interval'])
    return {
        'accuracy': {name: evaluate.interval(x) for name, x in right.items()},
        'ratio': float(ratio),
        'above': above,
        'passed': bool(passed),
        'by_gap': gaps,
    }


def by_gap(scores: list, gold: list) -> list:
    """(gap, pairs, accuracy) of the gold order in four equal groups by gold gap, and in all."""
    gap = np.array([abs(g[0] - g[1]) for g in gold])
    ranks = [(0, 1) if g[0] > g[1] else (1, 0) if g[0] < g[1] else (0, 0) for g in gold]
    right = evaluate.pairs(ranks, scores).accuracy
    edges = np.quantile(gap, [0, 0.25, 0.5, 0.75, 1])
    out = []
    for low, high in [*itertools.pairwise(edges), (edges[0], edges[-1])]:
        mine = (gap >= low) & (gap <= high) & ~np.isnan(right)
        out.append((f'{low:.2f} to {high:.2f}', int(mine.sum()), evaluate.interval(right[mine])))
    return out


def pictures(folder: Path, scores: list) -> None:
    """Learning curves and the score histogram."""
    report.curves(logs.read(folder / 'metrics.jsonl'), folder / 'curves.png')
    groups = {'chosen': np.array([s[0] for s in scores]), 'rejected': [s[1] for s in scores]}
    groups = {name: np.array(x) for name, x in groups.items()}
    report.histogram(groups, folder / 'scores.png')


def use(path: Path) -> None:
    """Loads the export back and scores two answers to one prompt."""
    rm = jaxrm.load(path)
    (pair,) = synthetic.preferences(1, seed=1, split='test', labels='gold')
    said = [[*pair.messages, {'role': 'assistant', 'content': a}] for a in pair.responses]
    rows = {answer: [f'{s:.3f}'] for answer, s in zip(pair.responses, rm.score(said), strict=True)}
    common.table(pair.messages[-1]['content'], rows, ['score'])


if __name__ == '__main__':
    common.launch(Config, main)
