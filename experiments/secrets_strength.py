"""Preference strength on labels of which some are wrong (Secrets of RLHF II): does it find them?

Run:     python -m experiments.pretrain
         python -m experiments.secrets_strength               # what is missing, then the tables
         python -m experiments.secrets_strength --only_table  # from experiments/results/
Cost:    about 40 minutes on two CPU cores, after the first line
Expect:  the tables of preference strength in BENCHMARKS.md

Ensembles learn pairs of the synthetic world with a share of labels turned round, at random or
towards the longer answer, and score the pairs that they learned. A cell is one kind and share: all
members of all seeds learn in one program. `deciles` learns from a tenth of the pairs alone.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experiments import common, labelling, stored
from experiments.gating import over_seeds
from experiments.labelling import Base, Lesson
from jaxrm import strength, strength_report, tokens

RESULTS = labelling.RESULTS / 'secrets_strength'
Array = np.ndarray
BINS = [0, 1, 4, 8, 12, 14, 15]
EDGES = np.linspace(-3, 3, 41)
OF = 'random-0.2'  # the labels of deciles and folds


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(labelling.Config):
    cells: tuple[str, ...] = (
        'random-0.2', 'random-0', 'random-0.1', 'random-0.3', 'longer-0.2'
    )  # fmt: skip
    folds: int = 5  # of the cell `folds`, with two members for each
    decile_epochs: int = 4
    results: Path = RESULTS


# An ensemble


def known(x: float) -> float | None:
    """None for NaN, which no JSON has: where no label is wrong, none can be found."""
    return None if np.isnan(x) else x


def seed_cell(own_En: Array, turned_n: Array, test_En: Array, test_turned_n: Array) -> dict:
    """What one seed's ensemble is worth."""
    gap_En = labelling.labelled(own_En, turned_n)
    mean_n, std_n = strength.strength(gap_En)
    scaled_n = strength.strength(gap_En, scaled=True).mean_n
    test_n = strength.strength(labelling.labelled(test_En, test_turned_n)).mean_n
    within_n = np.clip(mean_n, EDGES[0], EDGES[-1])
    counts = [np.histogram(within_n[at], EDGES)[0].tolist() for at in (~turned_n, turned_n)]
    agrees = strength.agreement(test_n, ~test_turned_n, 16)
    return {
        'below 0': float((mean_n < 0).mean()),
        'auroc': known(strength.auroc(-mean_n, turned_n)),
        'members': [known(strength.auroc(-gap_n, turned_n)) for gap_n in gap_En],
        'scaled': known(strength.auroc(-scaled_n, turned_n)),
        'wrong by decile': labelling.rounded(
            [turned_n[i].mean() for i in strength.bins(mean_n, 10)]
        ),
        'std by bin': labelling.rounded([std_n[i].mean() for i in strength.bins(mean_n, 20)]),
        'histogram': counts,
        'agreement': [labelling.rounded(agrees.mean_b), labelling.rounded(agrees.share_b)],
        'spearman': known(agrees.spearman),
        'ensemble accuracy': float((test_En.mean(0) > 0).mean()),
        'member accuracy': float((test_En > 0).mean()),
    }


def ensemble(c: Config, b: Base, cell: str) -> dict[str, Any]:
    """A cell."""
    found, noise = labelling.scores(c, b, cell), float(cell.split('-')[1])
    rows = zip(found['own'], found['turned'], found['test'], strict=True)
    seeds = [seed_cell(*row, found['test_turned']) for row in rows]
    fits = [strength.fit(strength.strength(labelling.labelled(*row)).mean_n, noise)
            for row in zip(found['own'], found['turned'], strict=True)]  # fmt: skip
    return {'seeds': seeds, 'fit': [[*x, x.memorised] for x in fits]}


# Deciles by themselves, and folds


def deciles(c: Config, b: Base, cell: str) -> dict[str, Any]:
    """Accuracy [S] of models that learned from a tenth of the pairs, by strength and by chance."""
    found, held = labelling.scores(c, b, cell), labelling.held_out(c, b)
    names, lessons = [], []
    for i, seed in enumerate(c.seeds):
        of = labelling.pairs(c, b, c.pairs, seed=seed, split='train')
        turned_n = found['turned'][i]
        mean_n = strength.strength(labelling.labelled(found['own'][i], turned_n)).mean_n
        mixed_n = np.random.default_rng(seed).permutation(mean_n)
        for what, by_n in (('strength', mean_n), ('shuffled', mixed_n)):
            for k, at in enumerate(strength.bins(by_n, 10)):
                names.append((what, k))
                lessons.append(Lesson(tokens.select(labelling.noisy(of, turned_n), at), seed))
                if what == 'strength' and k < 2:
                    names.append(('flipped', k))
                    lessons.append(Lesson(tokens.select(labelling.noisy(of, ~turned_n), at), seed))
    params_E = labelling.learned(c, b, lessons, num_train_epochs=c.decile_epochs)
    gap_En = labelling.gaps(b, params_E, held, labelling.fitting(b, [held]))
    out: dict[str, list[list[float]]] = {'strength': [], 'shuffled': [], 'flipped': []}
    for what, rows in out.items():
        for k in sorted({k for name, k in names if name == what}):
            at = [e for e, name in enumerate(names) if name == (what, k)]
            rows.append(labelling.rounded((gap_En[at] > 0).mean(1)))
    return out


def folds(c: Config, b: Base, cell: str) -> dict[str, Any]:
    """Detection by members that did not learn a pair's label, beside as many that did."""
    found = labelling.scores(c, b, cell)
    pairs = [labelling.pairs(c, b, c.pairs, seed=s, split='train') for s in c.seeds]
    of_fold = [strength.folds([r.tolist() for r in prompts(of)], c.folds) for of in pairs]
    lessons = [
        Lesson(strength.without(labelling.noisy(of, found['turned'][i]), fold_n == k), 1000 * s + m)
        for i, (s, of, fold_n) in enumerate(zip(c.seeds, pairs, of_fold, strict=True))
        for k in range(c.folds)
        for m in (0, 1)
    ]
    params_E = labelling.learned(c, b, lessons)
    shape, out = labelling.fitting(b, pairs), {'out of fold': [], 'own': [], 'below 0': []}
    for i, (of, fold_n) in enumerate(zip(pairs, of_fold, strict=True)):
        mine = labelling.part(params_E, i, 2 * c.folds)
        gap_En = labelling.gaps(b, mine, of, shape)
        gap_En = strength.out_of_fold(gap_En.reshape(c.folds, 2, -1), fold_n)
        turned_n = found['turned'][i]
        mean_n, own_n = (
            labelling.labelled(x_En, turned_n).mean(0) for x_En in (gap_En, found['own'][i][:2])
        )
        out['out of fold'].append(strength.auroc(-mean_n, turned_n))
        out['own'].append(strength.auroc(-own_n, turned_n))
        out['below 0'].append([float((x < 0).mean()) for x in (mean_n, own_n)])
    return out


def prompts(of: tokens.Tokens) -> Sequence[Array]:
    """Token ids of each pair's prompt."""
    return [of.ids[at : at + n] for at, n in zip(of.start, of.gate + 1, strict=False)]


# Tables


def spread(values: Sequence[Any]) -> str:
    """Mean and interval over seeds, of lists over their means; nothing where one is not known."""
    x_S = np.array(values, float).reshape(len(values), -1).mean(1)
    return '' if np.isnan(x_S).any() else str(over_seeds(x_S))


def table(c: Config) -> None:
    """Everything that there is."""
    rows, by_decile, agrees, apart = {}, {}, {}, {}
    for cell in c.cells:
        if not (found := stored.read(c.results / f'{cell}.json', stored.flags(c))):
            continue
        each = {k: [x[k] for x in found['seeds']] for k in found['seeds'][0]}
        rows[cell] = [
            spread(each['auroc']), spread(each['members']), spread(each['scaled']),
            spread(each['below 0']),
            f'{np.mean([x[0] for x in found["fit"]]):.3f} of {found["fit"][0][1]:.3f}',
            spread(each['spearman']), spread(each['member accuracy']),
            spread(each['ensemble accuracy']),
        ]  # fmt: skip
        by_decile[cell] = [f'{x:.2f}' for x in np.mean(each['wrong by decile'], 0)]
        share_b = np.mean([x[1] for x in each['agreement']], 0)
        agrees[cell] = [f'{x:.2f}' for x in share_b[BINS]]
        apart[cell] = [f'{x:.2f}' for x in np.mean(each['std by bin'], 0)]
        pictures(c, cell, each)
    columns = ['AUROC', 'one member', 'scaled members', 'below 0', 'own labels, limit', 'Spearman',
               'gold accuracy', 'of the ensemble']  # fmt: skip
    common.table('wrong labels found', rows, columns, paste=True)
    common.table('wrong by decile', by_decile, list(map(str, range(10))), paste=True)
    common.table('held-out labels right, of 16 bins', agrees, list(map(str, BINS)), paste=True)
    common.table('std over members, of 20 bins', apart, list(map(str, range(20))), paste=True)
    if found := stored.read(c.results / 'deciles.json', stored.flags(c)):
        rows = {
            k: [f'{np.mean(x):.3f}' for x in found[k]] for k in ('strength', 'flipped', 'shuffled')
        }
        common.table('gold accuracy of a decile alone', rows, list(map(str, range(10))), paste=True)
        strength_report.deciles({k: np.array(found[k]) for k in rows}, c.results / 'deciles.png')
    if found := stored.read(c.results / 'folds.json', stored.flags(c)):
        rows = {k: [spread(found[k])] for k in ('out of fold', 'own')}
        common.table('two members, AUROC', rows, ['over seeds'], paste=True)


def pictures(c: Config, cell: str, each: dict[str, list]) -> None:
    """Of an ensemble's cell: the histogram; by strength agreement, and how far members differ."""
    right, wrong = np.sum(each['histogram'], 0)
    groups = {'right labels': right, 'wrong labels': wrong}
    strength_report.histogram(groups, EDGES, c.results / f'strength-{cell}.png')
    mean_Sb, share_Sb = np.array(each['agreement']).swapaxes(0, 1)
    path, std_Sk = c.results / f'agreement-{cell}.png', np.array(each['std by bin'])
    strength_report.agreement(mean_Sb, share_Sb, path, std_Sk=std_Sk)


def main(c: Config) -> None:
    """Learn what is missing, then print and draw."""
    parts = dict.fromkeys(c.cells, ensemble) | {'deciles': deciles, 'folds': folds}
    todo = [] if c.only_table else [n for n in parts if not (c.results / f'{n}.json').exists()]
    b = labelling.base(c) if todo else None
    for name in todo:
        made = parts[name](c, b, name if parts[name] is ensemble else OF)
        common.write_json(c.results / f'{name}.json', {'flags': stored.flags(c), **made})
        common.console.print(f'{name}: done')
    table(c)


if __name__ == '__main__':
    common.launch(Config, main)
