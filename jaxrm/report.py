"""Pictures of runs and evaluations, as PNG files."""

import importlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxrm.intervals import Interval
from jaxrm.statistics import Calibration

TRAIN, HELD_OUT = 'tab:blue', 'tab:orange'
CHOSEN, REJECTED, PLAIN = 'tab:blue', 'tab:orange', '0.4'


def check() -> None:
    """Raises ValueError when matplotlib is missing, which is first needed at the end of a run."""
    try:
        importlib.import_module('matplotlib')
    except ImportError as error:
        wanted = f"pictures need matplotlib: pip install 'jaxrm[plots]' ({error})"
        raise ValueError(wanted) from error


def canvas(panels: int, *, height: float = 3.6) -> tuple[Any, Any]:
    """A figure to save, and its axes side by side."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.6 * panels, height), layout='constrained')
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
    figure, axes = canvas(len(names))
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
    figure, (axis,) = canvas(1)
    whole = np.concatenate(list(groups.values()))
    bins = np.histogram_bin_edges(whole, bins=int(np.clip(len(whole) / 8, 10, 40)))
    for name, values in groups.items():
        axis.hist(values, bins=bins, alpha=0.55, label=f'{name} (mean {values.mean():.2f})')
    axis.set(xlabel=xlabel, ylabel='answers')
    axis.yaxis.get_major_locator().set_params(integer=True)
    axis.legend(frameon=False, loc='lower center', bbox_to_anchor=(0.5, 1), ncols=len(groups))
    figure.savefig(path, dpi=120)


def reliability(found: Calibration, path: Path) -> None:
    """How often the higher score was right against how sure sigmoid(|margin|) was, by bin.

    Below stands what share of the pairs each bin has.
    """
    figure, (axis,) = canvas(1, height=4.4)
    width, some = found.high_b - found.low_b, found.weight_b > 0
    middle = found.low_b + width / 2
    axis.bar(middle, found.accuracy_b, 0.9 * width, color=CHOSEN, alpha=0.6, label='accuracy')
    dots = found.confidence_b[some], found.accuracy_b[some]
    axis.plot(*dots, 'o', color='black', ms=3.5, label='at the mean confidence')
    axis.plot([0.5, 1], [0.5, 1], '--', color=PLAIN, linewidth=1, label='calibrated')
    axis.set(xlim=(0.49, 1.01), ylim=(0, 1.02), ylabel='accuracy')
    axis.set_title(f'ECE {found.ece:.3f}, Brier {found.brier:.3f}', fontsize=10)
    axis.legend(frameon=False, loc='upper left', fontsize=8)
    axis.tick_params(labelbottom=False)
    share = axis.inset_axes((0, -0.27, 1, 0.2), sharex=axis)
    share.bar(middle, 100 * found.weight_b, 0.9 * width, color=PLAIN, alpha=0.6)
    share.spines[['top', 'right']].set_visible(False)
    share.set(xlabel='confidence, sigmoid(|margin|)', ylabel='% of pairs')
    figure.savefig(path, dpi=120)


def subsets(rows: Sequence[tuple[str, Interval, int]], path: Path) -> None:
    """Accuracy of each (name, interval, number of records), and the line of chance."""
    figure, (axis,) = canvas(1, height=1.2 + 0.28 * max(len(rows), 3))
    figure.set_figwidth(6.4)
    y = np.arange(len(rows))[::-1]
    mean, low, high = np.array([interval for _, interval, _ in rows], float).T
    axis.axvline(0.5, color=PLAIN, linestyle='--', linewidth=1)
    axis.hlines(y, low, high, color=CHOSEN, linewidth=2.5, alpha=0.6)
    axis.plot(mean, y, 'o', color=CHOSEN, ms=5)
    axis.set_yticks(y, [f'{name} ({count})' for name, _, count in rows], fontsize=8)
    axis.set(xlim=(min(0.45, low.min() - 0.03), 1.02), ylim=(-0.7, len(rows) - 0.3))
    axis.set_xlabel('accuracy and 95 % interval over prompts')
    axis.grid(visible=False, axis='y')
    figure.savefig(path, dpi=120)


def against_length(
    groups: Mapping[str, tuple[np.ndarray, np.ndarray]], path: Path, *, unit: str, title: str = ''
) -> None:
    """Scores over lengths of two groups of answers, (lengths, scores), and means by length."""
    figure, (axis,) = canvas(1)
    length, score = (np.concatenate(x).astype(float) for x in zip(*groups.values(), strict=True))
    colours = np.repeat([CHOSEN, REJECTED], [len(x) for x, _ in groups.values()])
    mixed = np.random.default_rng(0).permutation(len(length))  # no group lies above the other
    alpha = float(np.clip(30 / len(length) ** 0.5, 0.08, 0.7))
    axis.scatter(length[mixed], score[mixed], 9, c=colours[mixed], linewidths=0, alpha=alpha)
    for name, colour in zip(groups, (CHOSEN, REJECTED), strict=True):
        axis.plot([], [], 'o', color=colour, ms=3, label=name)
    axis.plot(*_means(length, score), '.-', color='black', linewidth=1.2, label='mean')
    axis.set(xscale='log' if length.min() > 0 else 'symlog', xlabel=unit, ylabel='reward')
    axis.xaxis.set_major_formatter('{x:g}')
    axis.set_title(title, fontsize=10)
    axis.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=120)


def planes(panels: Mapping[str, Mapping[str, np.ndarray]], path: Path) -> None:
    """A panel for each name: the points [n, 2] of two groups."""
    figure, axes = canvas(len(panels))
    for axis, (title, groups) in zip(axes, panels.items(), strict=True):
        for (name, xy), colour in zip(groups.items(), (CHOSEN, REJECTED), strict=True):
            axis.plot(*xy.T, 'o', color=colour, ms=3, alpha=0.5, mew=0, label=name)
        axis.set(xlabel='first component', ylabel='second component', title=title)
        axis.legend(frameon=False)
    figure.savefig(path, dpi=120)


def _means(x: np.ndarray, y: np.ndarray, parts: int = 10) -> tuple[np.ndarray, np.ndarray]:
    """Medians of x and means of y in up to `parts` groups of about equally many, by x."""
    order = np.array_split(np.argsort(x, kind='stable'), min(parts, len(x)))
    return np.array([np.median(x[i]) for i in order]), np.array([y[i].mean() for i in order])
