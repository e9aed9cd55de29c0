"""Pictures of a run, as PNG files."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

TRAIN, HELD_OUT = 'tab:blue', 'tab:orange'


def _figure(panels: int) -> tuple[Any, Any]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.6 * panels, 3.6), layout='constrained')
    FigureCanvasAgg(figure)
    axes = [figure.add_subplot(1, panels, i + 1) for i in range(panels)]
    for axis in axes:
        axis.spines[['top', 'right']].set_visible(False)
        axis.grid(alpha=0.25)
    return figure, axes


def _smoothed(x: np.ndarray, width: int) -> np.ndarray:
    """Running mean over up to `width` values around each; NaNs are left out."""
    ones, there = np.ones(width), ~np.isnan(x)
    count = np.convolve(there, ones, 'same')
    total = np.convolve(np.where(there, x, 0), ones, 'same')
    return np.divide(total, count, out=np.full(len(x), np.nan), where=count > 0)


def curves(
    lines: Sequence[Mapping[str, float]],
    path: Path,
    *,
    names: Sequence[str] = ('loss', 'accuracy', 'margin'),
) -> None:
    """One panel a metric over steps, from the lines of a metrics.jsonl: values and running mean.

    `eval_` values of the same metric are drawn as points.
    """
    figure, axes = _figure(len(names))
    for axis, name in zip(axes, names, strict=True):
        rows = [(r['step'], r[name]) for r in lines if name in r]
        if not rows:
            raise ValueError(f'lines: found no value of {name!r}, expected at least one')
        step, value = np.array(rows, float).T
        smooth = _smoothed(value, max(1, len(value) // 20))
        axis.plot(step, value, color=TRAIN, alpha=0.25, linewidth=0.8)
        axis.plot(step, smooth, '.-' if len(step) < 20 else '-', color=TRAIN, label='train')
        held = [(r['step'], r[f'eval_{name}']) for r in lines if f'eval_{name}' in r]
        if held:
            axis.plot(*np.array(held, float).T, 'o-', color=HELD_OUT, ms=4, label='held out')
        axis.set(xlabel='step', title=name.replace('_', ' '))
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.legend(frameon=False)
    figure.savefig(path, dpi=120)


def histogram(groups: Mapping[str, np.ndarray], path: Path, *, xlabel: str = 'reward') -> None:
    """Overlaid histograms of the scores of several groups, such as chosen and rejected."""
    for name, values in groups.items():
        count = int(np.isfinite(values).sum())
        if count < max(len(values), 1):
            raise ValueError(f'{name!r}: found {count} finite scores of {len(values)}')
    figure, (axis,) = _figure(1)
    whole = np.concatenate(list(groups.values()))
    bins = np.histogram_bin_edges(whole, bins=int(np.clip(len(whole) / 8, 10, 40)))
    for name, values in groups.items():
        axis.hist(values, bins=bins, alpha=0.55, label=f'{name} (mean {values.mean():.2f})')
    axis.set(xlabel=xlabel, ylabel='answers')
    axis.yaxis.get_major_locator().set_params(integer=True)
    axis.legend(frameon=False, loc='lower center', bbox_to_anchor=(0.5, 1), ncols=len(groups))
    figure.savefig(path, dpi=120)
