"""Two answers to one question by a gated model on one page, as a picture.

From the top: the question, the answers with their scores, and for every objective what it gives to
the difference of the scores, how both answers are rated, and what it counts for this question.
"""

import bisect
import itertools
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxrm import report
from jaxrm.explain import Explanation

FIRST, SECOND, GREY, INK = '#2f6db5', '#dd7a1f', '#7d828c', '#23262b'
PALE, LINES, BETWEEN = '#f3f4f6', '#d4d8de', '#b4bac4'
WIDTH, EDGE, ROW, LINE = 13.0, 0.35, 0.28, 0.205  # inches; a line is one of text
DPI = 130
KINDS = ('.png', '.pdf', '.svg')
Box = tuple[float, float, float, float]
NAMES = 3.15  # where the names end; below where a panel begins, and its width
GAINS, RATINGS, SCALES, WEIGHTS = (3.3, 3.6), (7.15, 2.1), (9.35, 1.1), (10.5, 2.1)


def page(
    explained: Sequence[Explanation],
    path: str | Path,
    *,
    question: str,
    answers: Sequence[str],
    names: Sequence[str] = ('A', 'B'),
    lines: int = 6,
) -> None:
    """Draws two explanations, as `Scorer.explain` gives them of two answers to one question.

    Of each text at most so many lines are shown. Raises ValueError for answers to two questions,
    whose weights differ, and for a path that does not end as one of KINDS.
    """
    first, second = explained
    if Path(path).suffix not in KINDS:
        raise ValueError(f'{path}: found {Path(path).suffix!r}, expected one of {KINDS}')
    if not np.allclose(first.weight_J, second.weight_J, rtol=0, atol=1e-3):
        raise ValueError('explained: found weights that differ, expected answers to one question')
    canvas, half = _Canvas(), (WIDTH - 3 * EDGE) / 2
    names = [canvas.legible(name) for name in names]
    asked = canvas.wrapped(question, WIDTH - 2 * EDGE, lines, size=11)
    said = [canvas.wrapped(answer, half - 0.5, lines, size=10) for answer in answers]
    top = EDGE + LINE * (len(asked) + 2.2)
    card = LINE * max(map(len, said)) + 0.95
    rows = ROW * (len(first.objectives) + 1)
    begin = top + card + 0.95
    canvas.resize(begin + rows + EDGE)
    canvas.text(EDGE, EDGE, 'question', size=9, color=GREY)
    canvas.text(EDGE, EDGE + 1.3 * LINE, '\n'.join(asked), size=11)
    scores, places = (first.score, second.score), (EDGE, 2 * EDGE + half)
    for k, (x, colour) in enumerate(zip(places, (FIRST, SECOND), strict=True)):
        _card(canvas, (x, top, half, card), colour, f'{names[k]}   {scores[k]:.4f}', said[k])
        if (lead := scores[k] - scores[1 - k]) > 0:
            style = {'size': 11, 'weight': 'bold', 'color': colour, 'ha': 'right'}
            canvas.text(x + half - 0.25, top + 0.23, f'preferred by {lead:.4f}', **style)
    _table(canvas, begin, first, second, names)
    canvas.figure.savefig(path, dpi=DPI, facecolor='white')


def _card(canvas: '_Canvas', at: Box, colour: str, title: str, said: Sequence[str]) -> None:
    x, y, _, height = at
    canvas.box(*at, PALE)
    canvas.box(x, y, 0.08, height, colour)
    canvas.text(x + 0.3, y + 0.17, title, size=17, weight='bold', color=colour)
    canvas.text(x + 0.3, y + 0.7, '\n'.join(said), size=10)


def _table(
    canvas: '_Canvas', y: float, first: Explanation, second: Explanation, names: Sequence[str]
) -> None:
    """A row an objective, those that decide most on top, below one of all together."""
    gain_J = first.contribution_J - second.contribution_J
    order = np.argsort(-abs(gain_J), kind='stable')
    _rows(canvas, y, [(first.objectives[j], _scales(first, second, j)) for j in order])

    def panel(at: tuple[float, float], title: str, more: str, centre: bool = False) -> Any:
        (x, width), ha = at, 'center' if centre else 'left'
        x_text = x + width / 2 if centre else x
        canvas.text(x_text, y - 0.6, title, size=10.5, weight='bold', ha=ha)
        canvas.text(x_text, y - 0.34, more, size=8.5, color=GREY, ha=ha)
        axis = canvas.axes(x, y, width, ROW * (len(order) + 1))
        axis.set(ylim=(len(order) + 0.5, -0.5), yticks=[], xticks=[])
        return axis

    a, b = names
    sides = f'\u25c2 for {b}     for {a} \u25b8'
    _gains(panel(GAINS, f'contribution, {a} \u2212 {b}', sides, True), gain_J[order])
    on_scales = ", and on the raters' scale" if any(first.scales) else ''
    axis = panel(RATINGS, 'rating', f'from 0 to 1{on_scales}')
    _ratings(axis, first.rate_J[order], second.rate_J[order])
    axis = panel(WEIGHTS, 'weight for this question', 'dotted: as the gate gives it')
    _weights(axis, first.weight_J[order], first.coefficient_J[order])


def _rows(canvas: '_Canvas', y: float, rows: Sequence[tuple[str, str]]) -> None:
    """The stripes, and what stands in them as text."""
    style = {'size': 9.5, 'ha': 'right', 'va': 'center'}
    canvas.text(NAMES, y + ROW / 2, 'all together', weight='bold', **style)
    for k, (name, scales) in enumerate(rows, 1):
        top, middle = y + ROW * k, y + ROW * (k + 0.5)
        canvas.box(EDGE, top, WIDTH - 2 * EDGE, ROW, PALE if k % 2 else 'white')
        canvas.text(NAMES, middle, canvas.legible(name), **style)
        canvas.text(SCALES[0], middle, scales, size=8, va='center', color=GREY)
    canvas.box(EDGE, y + ROW - 0.008, WIDTH - 2 * EDGE, 0.016, GREY)


def _scales(first: Explanation, second: Explanation, j: int) -> str:
    """Both ratings on the scale of the raters, if it is known."""
    scale, ratings = first.scales[j], [one.rating_J[j] for one in (first, second)]
    if scale is None:
        return ''
    return f'{ratings[0]:.1f} | {ratings[1]:.1f} of {scale.low:g}-{scale.high:g}'


def _bars(
    axis: Any, value_K: np.ndarray, first: int, colours: Any, digits: int, also: Any = ()
) -> None:
    """Bars from a line at 0, the first in this row, each with its value at its end.

    There is room for the bars, their values, and bars of the values `also`.
    """
    at_K, all_k = first + np.arange(len(value_K)), np.append(value_K, also)
    axis.barh(at_K, value_K, 0.62, color=colours)
    axis.axvline(0, color=INK, linewidth=0.8)
    most, signs = abs(all_k).max() or 1.0, [(side * all_k > 0).any() for side in (-1, 1)]
    room = 2.2 if all(signs) else 1.5
    left, right = ((room if there else 0.05) * most for there in signs)
    axis.set_xlim(-left, right)
    for value, at in zip(value_K, at_K, strict=True):
        side, ha = (1, 'left') if value >= 0 else (-1, 'right')
        style = {'fontsize': 8, 'color': INK, 'va': 'center', 'ha': ha}
        style |= {'textcoords': 'offset points', 'weight': 'normal' if at else 'bold'}
        shown = round(float(value), digits) + 0.0  # no -0
        axis.annotate(f'{shown:+.{digits}f}', (value, at), (4 * side, 0), **style)


def _gains(axis: Any, gain_J: np.ndarray) -> None:
    gain_K = np.append(gain_J.sum(), gain_J)
    _bars(axis, gain_K, 0, [FIRST if gain > 0 else SECOND for gain in gain_K], 4)
    most = max(map(abs, axis.get_xlim()))
    axis.set_xlim(-most, most)


def _ratings(axis: Any, a_J: np.ndarray, b_J: np.ndarray) -> None:
    at_J = 1 + np.arange(len(a_J))
    low, high = min(0, a_J.min(), b_J.min()), max(1, a_J.max(), b_J.max())
    marks = (0, 0.5, 1) if high - low < 3 else (0, 1)
    axis.vlines(marks, 0.55, at_J[-1] + 0.5, color=LINES, linewidth=0.8)
    for x in marks:
        axis.text(x, 0.1, f'{x:g}', fontsize=8, color=GREY, ha='center', va='center')
    axis.hlines(at_J, np.minimum(a_J, b_J), np.maximum(a_J, b_J), color=BETWEEN, linewidth=3)
    axis.plot(b_J, at_J, 'o', color=SECOND, ms=6.5)
    axis.plot(a_J, at_J, 'o', color=FIRST, ms=6.5)
    margin = 0.05 * (high - low)
    axis.set_xlim(low - margin, high + margin)


def _weights(axis: Any, weight_J: np.ndarray, counts_J: np.ndarray) -> None:
    """What a rating counts, and where the transform has changed it, the weight itself."""
    _bars(axis, counts_J, 1, GREY, 3, also=weight_J)
    moved_k = 1 + np.flatnonzero(abs(weight_J - counts_J) > 1e-6)
    box = {'fill': False, 'edgecolor': INK, 'linewidth': 1, 'linestyle': ':'}
    axis.barh(moved_k, weight_J[moved_k - 1], 0.62, **box)


class _Canvas:
    """A figure measured in inches from its left and from its top."""

    def __init__(self) -> None:
        report.check()
        from matplotlib import font_manager
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        self.figure, self.height = Figure(), 1.0
        FigureCanvasAgg(self.figure)
        self.font = font_manager.get_font(font_manager.findfont('DejaVu Sans'))

    def resize(self, height: float) -> None:
        self.height = height
        self.figure.set_size_inches(WIDTH, height)

    def legible(self, text: str) -> str:
        """With a box in the place of each letter that the font lacks."""
        known = self.font.get_char_index
        return ''.join(c if c.isspace() or known(ord(c)) else '\u25a1' for c in text)

    def wrapped(self, text: str, width: float, lines: int, *, size: float) -> list[str]:
        """Lines of at most so many inches; what is left out is an ellipsis."""
        parts = [self._lines(part, width, size) for part in self.legible(text).strip().splitlines()]
        rows = [row for part in parts for row in part]
        if len(rows) > lines:
            end = self._fitting(rows[lines - 1], width - 0.3, size)
            rows = [*rows[: lines - 1], rows[lines - 1][:end].rstrip() + ' \u2026']
        return rows

    def _lines(self, text: str, width: float, size: float) -> list[str]:
        """Broken between words, and inside those that are longer than a line."""
        rows = ['']
        for word in re.findall(r'\s*\S+', text):
            fits = self._fitting(rows[-1] + word, width, size) >= len(rows[-1] + word)
            if not fits and rows[-1]:
                rows.append('')
            rest = word if fits else word.lstrip()
            while (end := self._fitting(rest, width, size)) < len(rest):
                rows[-1], rest = rest[:end], rest[end:]
                rows.append('')
            rows[-1] += rest
        return rows

    def _fitting(self, text: str, width: float, size: float) -> int:
        """How many letters from the left are so many inches wide at most; at least one."""
        self.font.set_size(size, DPI)
        wide = [self.font.load_char(ord(c)).horiAdvance / 64 / DPI for c in text]
        return max(bisect.bisect_right([*itertools.accumulate(wide)], width), 1)

    def text(self, x: float, y: float, text: str, **style: Any) -> None:
        """Dollar signs are text: nothing is taken for a formula."""
        plain: dict[str, Any] = {
            'color': INK,
            'va': 'top',
            'parse_math': False,
            'linespacing': 1.35,
        }
        options = plain | style
        self.figure.text(x / WIDTH, 1 - y / self.height, text, **options)

    def _share(self, x: float, y: float, width: float, height: float) -> Box:
        """Of the figure, from its lower left."""
        return x / WIDTH, 1 - (y + height) / self.height, width / WIDTH, height / self.height

    def box(self, x: float, y: float, width: float, height: float, colour: str) -> None:
        from matplotlib.patches import Rectangle

        left, bottom, w, h = self._share(x, y, width, height)
        where = self.figure.transFigure
        style: dict[str, Any] = {'transform': where, 'color': colour, 'linewidth': 0, 'zorder': -1}
        box = Rectangle((left, bottom), w, h, **style)
        self.figure.add_artist(box)

    def axes(self, x: float, y: float, width: float, height: float) -> Any:
        axis = self.figure.add_axes(self._share(x, y, width, height))
        axis.spines[:].set_visible(False)
        axis.tick_params(length=0, labelsize=8, colors=GREY)
        axis.patch.set_visible(False)
        return axis
