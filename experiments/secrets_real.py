"""Preference strength and recipes on real pairs, as they are and with some labels flipped.

Run:     JAXRM_DATA=DIR python -m experiments.real_data      # its pretrained start
         JAXRM_DATA=DIR python -m experiments.secrets_real   # what is missing, then the tables
         python -m experiments.secrets_real --only_table     # from experiments/results/secrets_real
Cost:    about 30 minutes on two CPU cores, after the first line
Expect:  the tables of recipes on real pairs in BENCHMARKS.md

A cell is a set and the share of labels that we flip. Each seed draws its pairs from the train file,
its ensemble scores them, and each recipe learns from them anew; the test file is left as it is.
Where nothing is flipped, nobody knows which labels are wrong: a tenth is treated as if it were.
"""

import dataclasses
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np

from experiments import common, labelling, stored
from experiments.labelling import Base, Lesson
from experiments.separation import digits, of_digits
from jaxrm import data, evaluate, strength, strength_report, tokens

RESULTS = labelling.RESULTS / 'secrets_real'
CELLS = ('convarg-0.2', 'convarg-0', 'hh_harmless-0')
RECIPES = ('flip', 'margin', 'flip + margin', 'soft label + margin', 'drop', 'random flip')
EDGES = np.linspace(-3, 3, 41)
Array = np.ndarray


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(labelling.Config):
    model_name_or_path: str = 'runs/real_data/pretrain/model'
    seeds: tuple[int, ...] = (0, 1, 2)
    members: int = 5
    pairs: int = 1400
    test_pairs: int = 800
    categories: tuple[str, ...] = ()
    learning_rate: float = 1e-3
    max_length: int = 320
    strength_epochs: int = 1  # of the ensembles, against learning by heart
    alpha: float = 0.5  # of soft labels
    clean_share: float = 0.1
    results: Path = RESULTS


def load(c: Config, b: Base, name: str, split: str) -> tuple[tokens.Tokens, list[str]]:
    """The pairs of a file that are short enough, and their prompts."""
    found = data.load(Path(os.environ['JAXRM_DATA'], 'preference', f'{name}.{split}.jsonl.gz'))
    encoded = tokens.encode(found.records, b.tokenizer, max_length=c.max_length).tokens
    return encoded, evaluate.prompts([found.records[i] for i in encoded.record])


def drawn(of: tokens.Tokens, n: int, seed: int) -> Array:
    """Indices of up to n of the pairs."""
    return np.random.default_rng([seed, 2]).permutation(len(of.prompt))[:n]


def learn(c: Config, b: Base, cell: str) -> dict[str, Any]:
    """A cell: what the ensembles say of their pairs, and which held-out ones each recipe gets."""
    name, share = cell.split('-')
    (whole, _), (test, prompts) = (load(c, b, name, split) for split in ('train', 'test'))
    at = drawn(test, c.test_pairs, 0)
    test, prompts = tokens.select(test, at), [prompts[i] for i in at]
    own = [tokens.select(whole, drawn(whole, c.pairs, seed)) for seed in c.seeds]
    turned = [
        labelling.turned(of, f'random-{share}', s) for of, s in zip(own, c.seeds, strict=True)
    ]
    given = [labelling.noisy(*x) for x in zip(own, turned, strict=True)]
    params_E = labelling.learned(c, b, [
        Lesson(of, 1000 * seed + m)
        for of, seed in zip(given, c.seeds, strict=True) for m in range(c.members)
    ], num_train_epochs=c.strength_epochs)  # fmt: skip
    shape, seeds, means = labelling.fitting(b, [*own, test]), [], []
    for i, (of, turned_n) in enumerate(zip(own, turned, strict=True)):
        mine = labelling.part(params_E, i, c.members)
        gap_En = labelling.labelled(labelling.gaps(b, mine, of, shape), turned_n)
        means.append(strength.strength(gap_En).mean_n)
        seeds.append(said(gap_En, turned_n, labelling.gaps(b, mine, test, shape), float(share)))
    lessons = {
        (what, seed): Lesson(lesson(c, what, *each, float(share), seed), seed)
        for what in ('baseline', *RECIPES, *['right labels'] * (float(share) > 0))
        for seed, *each in zip(c.seeds, own, given, means, strict=True)
    }
    params_E = labelling.learned(c, b, list(lessons.values()))
    right: dict[str, list[str]] = {}
    for (what, _), gap_n in zip(lessons, labelling.gaps(b, params_E, test, shape), strict=True):
        right.setdefault(what, []).append(digits(gap_n > 0))
    number = {prompt: i for i, prompt in enumerate(dict.fromkeys(prompts))}
    return {'seeds': seeds, 'right': right, 'prompt': [number[prompt] for prompt in prompts]}


def lesson(
    c: Config, what: str, own: tokens.Tokens, given: tokens.Tokens, mean_n: Array, share: float,
    seed: int,
) -> tokens.Tokens:  # fmt: skip
    """What a recipe makes of a seed's pairs."""
    if what not in RECIPES:
        return own if what == 'right labels' else given
    size = share or c.clean_share
    how = strength.recipe(what, mean_n, share=size, alpha=c.alpha, seed=seed)
    return strength.relabelled(given, how)


def said(gap_En: Array, turned_n: Array, test_En: Array, share: float) -> dict[str, Any]:
    """What is known of one seed's ensemble."""
    mean_n, within_n = gap_En.mean(0), np.clip(gap_En.mean(0), EDGES[0], EDGES[-1])
    out = {
        'below 0': float((mean_n < 0).mean()),
        'below 0, held out': float((test_En.mean(0) < 0).mean()),
        'histogram': [np.histogram(within_n[x], EDGES)[0].tolist() for x in (~turned_n, turned_n)],
        'std by bin': labelling.rounded(
            [gap_En.std(0)[i].mean() for i in strength.bins(mean_n, 10)]
        ),
    }
    if share:
        out |= {
            'memorised': float(strength.fit(mean_n, share).memorised),
            'auroc': strength.auroc(-mean_n, turned_n),
            'members': [strength.auroc(-gap_n, turned_n) for gap_n in gap_En],
            'wrong by decile': labelling.rounded(
                [turned_n[i].mean() for i in strength.bins(mean_n, 10)]
            ),
        }
    return out


def table(c: Config, cell: str) -> None:
    """The ensembles, and the recipes beside the baseline."""
    if not (found := stored.read(c.results / f'{cell}.json', stored.flags(c))):
        return
    rows: dict[str, list[Any]] = {}
    for name in found['seeds'][0]:
        values = [seed[name] for seed in found['seeds']]
        if name != 'histogram':
            rows[name] = [' '.join(f'{x:.3f}' for x in np.atleast_1d(np.mean(values, 0)))]
            if np.ndim(values) == 1:
                rows[name] += [f'{min(values):.3f} to {max(values):.3f}']
    common.table(f'{cell}: strength', rows, ['mean over seeds', 'seeds'], paste=True)
    right, prompts, rows = found['right'], found['prompt'], {}
    base_n = of_digits(right['baseline']).mean(0)
    for name, texts in right.items():
        x_Sn = of_digits(texts)
        above = evaluate.paired(x_Sn.mean(0), base_n, prompts=prompts) if name != 'baseline' else ''
        seeds = x_Sn.mean(1)
        rows[name] = [evaluate.interval(x_Sn.mean(0), prompts=prompts),
                      f'{seeds.min():.3f} to {seeds.max():.3f}', above]  # fmt: skip
    common.table(f'{cell}: recipes', rows, ['accuracy', 'seeds', 'over baseline'], paste=True)
    counts = np.sum([seed['histogram'] for seed in found['seeds']], 0)
    groups = {'as given': counts[0]}
    groups |= {'flipped by us': counts[1]} if counts[1].any() else {}
    strength_report.histogram(groups, EDGES, c.results / f'strength-{cell}.png', title=cell)


def main(c: Config) -> None:
    """Learn what is missing, then print and draw."""
    todo = [] if c.only_table else [x for x in CELLS if not (c.results / f'{x}.json').exists()]
    if todo and 'JAXRM_DATA' not in os.environ:
        sys.exit('JAXRM_DATA is not set: it names the folder with preference/*.jsonl.gz')
    b = labelling.base(c) if todo else None
    for cell in todo:
        made = {'flags': stored.flags(c), **learn(c, b, cell)}
        common.write_json(c.results / f'{cell}.json', made)
    for cell in CELLS:
        table(c, cell)


if __name__ == '__main__':
    common.launch(Config, main)
