"""Tables and pictures of the DMoERM experiment on the synthetic world, from its result files."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experiments import common, gating, stored
from experiments.separation import crossed, of_digits, points
from jaxrm import report

Array = np.ndarray
Capabilities = Mapping[str, Sequence[str]]


def show(
    folder: Path, cells: Sequence[str], flags: Mapping[str, Any], capabilities: Capabilities
) -> None:
    """Everything that there is; ValueError for a cell of other flags."""
    found = {name: x for name in cells if (x := stored.read(folder / f'{name}.json', flags))}
    for flips in dict.fromkeys(name.rsplit('-', 1)[1] for name in cells):
        mine = {name.rsplit('-', 1)[0]: x for name, x in found.items() if name.endswith(flips)}
        accuracies(mine, flags['categories'], flips)
        matrices(mine, capabilities, flips)
        if 'conflict' in mine:
            conflict(mine['conflict'], flags['test_pairs'], flips)
        for name in ('best of n', 'best of n, far'):
            if name in mine:
                best_of_n(mine[name], f'{name}, flips {flips}', folder)


def accuracies(found: Mapping[str, Any], categories: Sequence[str], flips: str) -> None:
    """Each arm with what DMoERM is above it, and by category."""
    right = {k: of_digits(x) for cell in found.values() for k, x in cell.get('rows', {}).items()}
    if 'judge' in found:
        right['the judge as a whole'] = of_digits([found['judge']['halves']]) / 2
    rows = {}
    for name, x_Sn in right.items():
        n = x_Sn.shape[1] // len(categories)
        each = [f'{x_Sn[:, i * n : (i + 1) * n].mean():.3f}' for i in range(len(categories))]
        over = gating.over_seeds(x_Sn.mean(1))
        gap = ''
        if 'DMoERM' in right and name != 'DMoERM':
            gap = points(right['DMoERM'] - x_Sn)
        rows[name] = [over if len(x_Sn) > 1 else f'{x_Sn.mean():.3f}', *each, gap]
    if rows:
        columns = ['over seeds', *categories, 'DMoERM - this, points']
        common.table(f'gold accuracy, flips {flips}', rows, columns, paste=True)


def matrices(found: Mapping[str, Any], capabilities: Capabilities, flips: str) -> None:
    """Models of one category on all of them, and experts on all capabilities of their category."""
    if 'routed' in found:
        rows = {}
        for name, texts in found['routed']['matrix'].items():
            parts = np.split(of_digits(texts), len(found['routed']['matrix']), axis=1)
            rows[name] = [str(gating.over_seeds(x.mean(1))) for x in parts]
        columns = [name.removeprefix('of ') for name in rows]
        common.table(f'models (rows) on categories, flips {flips}', rows, columns, paste=True)
    for category, x in found.get('full', {}).get('matrix', {}).items():
        x_SEQ, names = np.array(x), capabilities[category]
        best = (x_SEQ.argmax(1) == np.arange(len(names))).sum()
        rows = {
            name: [f'{m:.3f}' for m in row] for name, row in zip(names, x_SEQ.mean(0), strict=True)
        }
        said = f'the own expert is best in {best} of {x_SEQ[:, 0].size}'
        common.table(f'{category}: experts on true capabilities, flips {flips} ({said})', rows,
                     names, paste=True)  # fmt: skip


def conflict(found: Mapping[str, Any], n: int, flips: str) -> None:
    """What a task loses by another one that is learned with it."""
    names, rows = list(found['categories']), {}
    for both in (x for x in found['matrix'] if ' and ' in x):
        for name in both.split(' and '):
            at = slice(names.index(name) * n, (names.index(name) + 1) * n)
            alone, joint = (of_digits(found['matrix'][k])[:, at] for k in (name, both))
            rows[f'{name} in {both}'] = [f'{alone.mean():.3f}', f'{joint.mean():.3f}',
                                         points(joint - alone)]  # fmt: skip
    common.table(f'learned alone, and with another, flips {flips}', rows,
                 ['alone', 'together', 'difference, points'], paste=True)  # fmt: skip


def best_of_n(found: Mapping[str, Any], title: str, folder: Path) -> None:
    """Gold of what each proxy picks, above a blind pick; what is lost after the best n."""
    ns, kl, rows, proxy = found['n'], found['kl'], {}, {}
    picked = {name: np.array(x['gold']) for name, x in found['curves'].items()}
    above = {name: (x - x[..., :1]) / found['std of gold'] for name, x in picked.items()}
    ends = {name: x[..., -1] for name, x in above.items()}
    for name, above_SBn in above.items():
        mean_n = above_SBn.mean((0, 1))
        top = int(mean_n.argmax())
        lost = crossed(above_SBn[..., top] - above_SBn[..., -1])
        picks = [f'{mean_n[ns.index(n)]:+.2f}' for n in ns if n in (4, 16, ns[-1])]
        apart = [ends[name], *([ends['DMoERM'] - ends[name]] if name != 'DMoERM' else [])]
        said = ['{:+.2f} [{:+.2f}, {:+.2f}]'.format(*crossed(x_SB)) for x_SB in apart]
        rows[name] = [*picks, said[0], ns[top], '{:.2f} [{:.2f}, {:.2f}]'.format(*lost),
                      *said[1:]]  # fmt: skip
        proxy[name] = np.array(found['curves'][name]['proxy'])[None]
    columns = [f'n = {n}' for n in ns if n in (4, 16, ns[-1])]
    common.table(f'{title}: gold in its standard deviations', rows,
                 [*columns, 'at the last n', 'best n', 'lost after it', 'DMoERM - this'],
                 paste=True)  # fmt: skip
    name = title.replace(', flips ', '-').replace(',', '').replace(' ', '_')
    gold = {name: x.mean(1) for name, x in above.items()}
    lines({'gold': gold, 'proxy': proxy}, kl, folder / f'{name}.png')


def lines(panels: Mapping[str, Mapping[str, Array]], kl: Sequence[float], path: Path) -> None:
    """A panel for each title: the mean over seeds of every [S, n], and thinly each seed."""
    figure, axes = report.canvas(len(panels))
    for axis, (title, named) in zip(axes, panels.items(), strict=True):
        for i, (name, x_Sn) in enumerate(named.items()):
            axis.plot(kl, x_Sn.T, color=f'C{i}', alpha=0.2, linewidth=0.7)
            axis.plot(kl, x_Sn.mean(0), 'o-', color=f'C{i}', ms=3, label=name)
        axis.set(xlabel='KL from the policy, nats', title=title)
    axes[-1].legend(frameon=False, fontsize=7)
    figure.savefig(path, dpi=120)
