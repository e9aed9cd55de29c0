"""Pictures of a run, as PNG files."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np


def _figure(panels: int) -> tuple[Any, Any]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.2 * panels, 3.6), layout='constrained')
    FigureCanvasAgg(figure)
    axes = [figure.add_subplot(1, panels, i + 1) for i in range(panels)]
    for axis in axes:
        axis.spines[['top', 'right']].set_visible(False)
        axis.grid(alpha=0.25)
    return figure, axes


def _smoothed(x: np.ndarray, width: int) -> np.ndarray:
    """Running mean over up to `width` values around each."""
    ones = np.ones(width)
    return np.convolve(x, ones, 'same') / np.convolve(np.ones(len(x)), ones, 'same')


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
        step, value = np.array(rows, float).T
        axis.plot(step, value, color='tab:blue', alpha=0.25, linewidth=0.8)
        axis.plot(step, _smoothed(value, max(1, len(value) // 20)), color='tab:blue', label='train')
        held = [(r['step'], r[f'eval_{name}']) for r in lines if f'eval_{name}' in r]
        if held:
            axis.plot(*np.array(held, float).T, 'o-', color='tab:orange', label='held out')
        axis.set(xlabel='step', title=name)
        axis.legend(frameon=False)
    figure.savefig(path, dpi=120)


def histogram(groups: Mapping[str, np.ndarray], path: Path, *, xlabel: str = 'reward') -> None:
    """Overlaid histograms of the scores of several groups, such as chosen and rejected."""
    figure, (axis,) = _figure(1)
    bins = np.histogram_bin_edges(np.concatenate(list(groups.values())), bins=40)
    for name, values in groups.items():
        axis.hist(values, bins=bins, alpha=0.55, label=f'{name} (mean {values.mean():.2f})')
    axis.set(xlabel=xlabel, ylabel='answers')
    axis.legend(frameon=False)
    figure.savefig(path, dpi=120)
