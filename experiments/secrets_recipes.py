"""What to do about wrong preference labels (Secrets of RLHF II): the recipes, beside controls.

Run:     python -m experiments.secrets_strength
         python -m experiments.secrets_recipes               # what is missing, then the tables
         python -m experiments.secrets_recipes --only_table  # from experiments/results/
Cost:    about 30 minutes on two CPU cores, after the first line
Expect:  the tables of recipes in BENCHMARKS.md

Models learn the pairs of the synthetic world whose strength is known, relabelled by each recipe; as
many are flipped or dropped as labels are wrong. A cell is one recipe on one kind and share of wrong
labels, its seeds members of one program with all other cells. Held-out pairs are compared by the
true labels, by labels as noisy as those learned, and where the two agree.
"""

import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experiments import common, labelling, stored
from experiments.labelling import Base, Lesson
from experiments.separation import crossed, digits, of_digits, points
from jaxrm import statistics, strength, strength_report, tokens

RESULTS = labelling.RESULTS / 'secrets_recipes'
Array = np.ndarray

# The recipe of strength.py and its options, or another name for what `lesson` does.
RECIPES: dict[str, tuple[str, dict[str, Any]]] = {
    'baseline': ('none', {}),
    'flip': ('flip', {}),
    'margin': ('margin', {}),
    'flip + margin': ('flip + margin', {}),
    'soft label': ('soft label', {}),
    'soft label + margin': ('soft label + margin', {}),
    'soft label 0.1 + margin': ('soft label + margin', {'alpha': 0.1}),
    'soft label by strength': ('by strength', {}),
    'flip half as many': ('flip', {'half': True}),
    'drop': ('drop', {}),
    'random flip': ('random flip', {}),
    'margin above 0': ('above 0', {}),
    'margin of another pair': ('shuffled', {}),
    'right labels': ('right', {}),
}
# Flags of other runs, which multiply those given.
TIMES: dict[str, dict[str, float]] = {
    'half the rate': {'learning_rate': 0.5},
    'twice the rate': {'learning_rate': 2},
    'four times as long': {'num_train_epochs': 4},
}
OTHERS = {f'{name}, {more}' for more in TIMES for name in ('baseline', 'margin', 'drop')}
OTHERS |= {
    f'{name}, four times as long'
    for name in ('flip', 'flip + margin', 'soft label + margin', 'right labels')
}
FEW = ('baseline', 'flip + margin', 'drop')
CELLS = {
    'random-0.2': (*RECIPES, *sorted(OTHERS)),
    'longer-0.2': ('baseline', 'flip', 'margin', 'flip + margin', 'soft label + margin', 'drop',
                   'right labels'),
    'random-0': FEW,
    'random-0.1': FEW,
    'random-0.3': FEW,
}  # fmt: skip
DRAWN = ('baseline', 'margin', 'flip', 'flip + margin', 'soft label + margin', 'drop')


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(labelling.Config):
    alpha: float = 0.5  # of soft labels
    temperature: float = 1.0  # of soft labels by strength
    clean_share: float = 0.1  # flipped or dropped where no label is wrong
    curve_pairs: int = 400  # held-out pairs for the curves
    results: Path = RESULTS


def lesson(
    c: Config, name: str, of: tokens.Tokens, turned_n: Array, mean_n: Array, share: float, seed: int
) -> Lesson:
    """What a recipe makes of a seed's pairs."""
    given = labelling.noisy(of, turned_n)
    kind, options = RECIPES[name.split(',')[0]]
    share = (share or c.clean_share) / (2 if options.get('half') else 1)
    if kind in ('none', 'right'):
        return Lesson(of if kind == 'right' else given, seed)
    if kind == 'by strength':
        everywhere = np.ones(len(mean_n), bool)
        how = strength.repair(mean_n, soft_n=everywhere, temperature=c.temperature)
    elif kind in ('above 0', 'shuffled'):
        other_n = np.random.default_rng(seed).permutation(mean_n)
        how = strength.recipe('margin', np.maximum(mean_n, 0) if kind == 'above 0' else other_n)
    else:
        alpha = options.get('alpha', c.alpha)
        how = strength.recipe(kind, mean_n, share=share, alpha=alpha, seed=seed)
    return Lesson(strength.relabelled(given, how), seed)


def learn(c: Config, b: Base, cell: str, names: Sequence[str], **how: Any) -> dict[str, dict]:
    """Cells of these recipes, which learn in one program."""
    found, share, held = (
        labelling.scores(c, b, cell),
        float(cell.split('-')[1]),
        labelling.held_out(c, b),
    )
    own = [labelling.pairs(c, b, c.pairs, seed=seed, split='train') for seed in c.seeds]
    mean_Sn = [strength.strength(labelling.labelled(*x)).mean_n
               for x in zip(found['own'], found['turned'], strict=True)]  # fmt: skip
    rows = [*zip(own, found['turned'], mean_Sn, c.seeds, strict=True)]
    lessons = [lesson(c, n, *row[:3], share, row[3]) for n in names for row in rows]
    few, shape = tokens.select(held, np.arange(c.curve_pairs)), labelling.fitting(b, [held])
    curve: list[tuple[int, dict[str, list[float]]]] = []

    def hook(done: int, params_E: Any) -> None:
        right = labelling.right(
            labelling.gaps(b, params_E, few, shape), found['test_turned'][: c.curve_pairs]
        )
        curve.append((done, {k: np.nanmean(x, 1) for k, x in right.items()}))

    params_E = labelling.learned(c, b, lessons, hook=hook, hooks=6, **how)
    gap_En = labelling.gaps(b, params_E, held, shape)
    told_Sn = labelling.labelled(found['test'], found['test_turned']).mean(1)
    out, S = {}, len(c.seeds)
    for i, name in enumerate(names):
        mine = slice(i * S, (i + 1) * S)
        out[name] = {
            'right': [digits(x_n > 0) for x_n in gap_En[mine]],
            'turned': digits(found['test_turned']),
            'steps': [done for done, _ in curve],
            'curve': {k: [labelling.rounded(x[k][mine]) for _, x in curve] for k in curve[0][1]},
            'calibration': calibrated(told_Sn, gap_En[mine]),
        }
    return out


def calibrated(mean_Sn: Array, gap_Sn: Array) -> dict[str, Any]:
    """ECE and Brier score on true labels, of all seeds' pairs, by strength of the given labels."""
    mean, gap = mean_Sn.ravel(), gap_Sn.ravel()
    named = {'all': statistics.calibration(gap, np.ones(len(gap)))}
    named |= {f'fifth {k}': x for k, x in enumerate(strength.calibration(mean, gap, 5))}
    named['top tenth'] = strength.calibration(mean, gap, 10)[-1]
    return {k: labelling.rounded([x.ece, x.brier]) for k, x in named.items()}


# Tables


def path(c: Config, cell: str, name: str) -> Path:
    return c.results / f'{cell}-{name.replace(" + ", "+").replace(" ", "_").replace(",", "")}.json'


def read(c: Config, cell: str) -> dict[str, dict[str, Any]]:
    """The recipes' cells that there are."""
    found = {name: stored.read(path(c, cell, name), stored.flags(c)) for name in CELLS[cell]}
    return {name: x for name, x in found.items() if x}


def rights(found: dict[str, Any]) -> dict[str, Array]:
    """[S, n] by kind of label, without the pairs that have none."""
    turned_n = of_digits([found['turned']])[0] > 0
    every = labelling.right(of_digits(found['right']) - 0.5, turned_n)
    return {k: x_Sn[:, ~np.isnan(x_Sn).any(0)] for k, x_Sn in every.items()}


def table(c: Config, cell: str) -> None:
    """Accuracies, beside those of a baseline that learns alike; how labels rank the recipes."""
    found = read(c, cell)
    if not found:
        return
    every, rows, bins = {name: rights(x) for name, x in found.items()}, {}, {}
    for name, x in every.items():
        seeds = x['gold'].mean(1)
        rows[name] = [f'{x["gold"].mean():.3f} ({seeds.min():.3f} to {seeds.max():.3f})']
        of, comma, more = name.partition(', ')
        like = 'baseline' if of == 'baseline' else f'baseline{comma}{more}'
        for kind in ('gold', 'noisy', 'agreement'):
            base = every[like][kind]
            gap = points(x[kind] - base) if name != 'baseline' else str(crossed(base))
            rows[name].append(gap if kind == 'gold' else f'{x[kind].mean():.3f}; {gap}')
        bins[name] = [f'{a:.3f}, {b:.3f}' for a, b in found[name]['calibration'].values()]
    columns = ['gold accuracy (seeds)', 'over baseline, points', 'noisy', 'agreement']
    common.table(cell, rows, columns, paste=True)
    columns = list(found['baseline']['calibration'])
    common.table(f'{cell}: ECE, Brier by strength', bins, columns, paste=True)
    means = {k: [x[k].mean() for x in every.values()] for k in ('gold', 'noisy', 'agreement')}
    ranks = {k: f'{statistics.spearman(np.array(means["gold"]), np.array(means[k])):.3f}'
             for k in ('noisy', 'agreement')}  # fmt: skip
    common.console.print(f'{cell}: Spearman of the ranking with that by gold labels: {ranks}')
    picture(c, cell, found)


def picture(c: Config, cell: str, found: dict[str, Any]) -> None:
    """Curves by kind of label."""
    drawn = [name for name in DRAWN if name in found]
    panels = {
        f'{kind} labels': {n: np.mean(found[n]['curve'][kind], 1).tolist() for n in drawn}
        for kind in ('noisy', 'gold', 'agreement')
    }
    strength_report.curves(panels, found[drawn[0]]['steps'], c.results / f'curves-{cell}.png')


def multiplied(c: Config, times: dict[str, float]) -> dict[str, Any]:
    """So many times the value of these flags."""
    return {name: type(getattr(c, name))(by * getattr(c, name)) for name, by in times.items()}


def main(c: Config) -> None:
    """Learn what is missing, then print and draw."""
    base = functools.cache(lambda: labelling.base(c))
    for cell, names in CELLS.items():
        todo = [] if c.only_table else [n for n in names if not path(c, cell, n).exists()]
        groups: dict[str, list[str]] = {}
        for name in todo:
            groups.setdefault(name.partition(', ')[2], []).append(name)
        for more, group in groups.items():
            made = learn(c, base(), cell, group, **multiplied(c, TIMES.get(more, {})))
            for name, found in made.items():
                common.write_json(path(c, cell, name), {'flags': stored.flags(c), **found})
            common.console.print(f'{cell}: {", ".join(group)}')
        table(c, cell)


if __name__ == '__main__':
    common.launch(Config, main)
