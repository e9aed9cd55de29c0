"""Pictures of preference strength, as PNG files."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from jaxrm.report import CHOSEN, PLAIN, REJECTED, canvas

LINES = ('tab:blue', 'tab:orange', 'tab:green', 'tab:red', 'tab:purple', 'tab:brown', 'tab:pink')


def histogram(
    counts: Mapping[str, np.ndarray], edges: np.ndarray, path: Path, *, title: str = ''
) -> None:
    """How many pairs of each group have which strength, the groups one on the other."""
    drawn, (axis,) = canvas(1)
    below = np.zeros(len(edges) - 1)
    for (name, count), colour in zip(counts.items(), (CHOSEN, REJECTED), strict=False):
        axis.bar(edges[:-1], count, np.diff(edges), below, align='edge', color=colour, alpha=0.7,
                 label=name)  # fmt: skip
        below = below + count
    axis.axvline(0, color='black', linewidth=0.8)
    axis.set(xlabel='mean preference difference', ylabel='pairs', title=title)
    axis.legend(frameon=False)
    drawn.savefig(path, dpi=120)


def deciles(accuracy: Mapping[str, np.ndarray], path: Path) -> None:
    """Accuracy [K, S] of models that learned from one group each, over S seeds, by name."""
    drawn, (axis,) = canvas(1)
    for (name, x_KS), colour in zip(accuracy.items(), LINES, strict=False):
        k = np.arange(len(x_KS))
        axis.plot(k, x_KS.mean(1), 'o-', color=colour, ms=4, label=name)
        axis.vlines(k, x_KS.min(1), x_KS.max(1), color=colour, alpha=0.5)
    axis.axhline(0.5, color=PLAIN, linestyle='--', linewidth=1)
    axis.set(xlabel='decile by rising strength', ylabel='held-out accuracy')
    axis.legend(frameon=False, fontsize=8)
    drawn.savefig(path, dpi=120)


def agreement(
    mean_Sb: np.ndarray, share_Sb: np.ndarray, path: Path, *, std_Sk: np.ndarray | None = None
) -> None:
    """How often other labels agree by strength, of S ensembles and in the mean.

    Beside it how far the members differ, in groups of pairs by rising strength.
    """
    drawn, (axis, *more) = canvas(1 if std_Sk is None else 2)
    if std_Sk is not None:
        more[0].plot(std_Sk.T, '-', color=CHOSEN, alpha=0.3, linewidth=1)
        more[0].plot(std_Sk.mean(0), 'o-', color=CHOSEN, ms=4)
        more[0].set(xlabel='group by rising strength', ylabel='std over members', ylim=(0, None))
    for mean_b, share_b in zip(mean_Sb, share_Sb, strict=True):
        axis.plot(mean_b, share_b, '-', color=CHOSEN, alpha=0.3, linewidth=1)
    axis.plot(mean_Sb.mean(0), share_Sb.mean(0), 'o-', color=CHOSEN, ms=4)
    axis.axhline(0.5, color=PLAIN, linestyle='--', linewidth=1)
    axis.axvline(0, color=PLAIN, linewidth=0.8)
    axis.set(xlabel='mean preference difference', ylabel='labels that agree', ylim=(0, 1.02))
    drawn.savefig(path, dpi=120)


def curves(
    panels: Mapping[str, Mapping[str, Sequence[float]]], steps: Sequence[int], path: Path
) -> None:
    """A panel for each kind of label: accuracy over steps of each method."""
    drawn, axes = canvas(len(panels))
    for axis, (title, lines) in zip(axes, panels.items(), strict=True):
        for (name, values), colour in zip(lines.items(), LINES, strict=False):
            axis.plot(steps, values, '.-', color=colour, label=name)
        axis.set(xlabel='step', title=title)
    axes[0].set(ylabel='accuracy')
    axes[-1].legend(frameon=False, fontsize=7)
    drawn.savefig(path, dpi=120)
