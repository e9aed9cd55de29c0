"""Explanations by hand, and the page that compares two."""

import dataclasses

import numpy as np
import pytest

from jaxrm import comparison
from jaxrm.explain import Explanation
from jaxrm.regress import Scale

TEXT = """\
objective        rating on its scale        weight   coefficient  contribution
long              0.660   2.8 of 0-4       +0.1000       -0.4500       -0.2970
honest            0.500                    +0.4000       +0.4000       +0.2000
polite            0.200   1.5 of 1-5       +0.5000       +0.5000       +0.1000
score                                      +1.0000       +0.4500       +0.0030"""


def explanation(**changes):
    made = Explanation(
        0.003,
        ('honest', 'polite', 'long'),
        (None, Scale(1, 5), Scale(0, 4)),
        np.float32([0.5, 0.2, 0.66]),
        np.float32([0.4, 0.5, 0.1]),
        np.float32([0.4, 0.5, -0.45]),
    )
    return dataclasses.replace(made, **changes)


def test_an_explanation_by_hand():
    found = explanation()
    np.testing.assert_allclose(found.contribution_J, [0.2, 0.1, -0.297], rtol=1e-6)
    np.testing.assert_allclose(found.rating_J, [np.nan, 1.5, 2.8], rtol=1e-6)
    assert [name for name, _ in found.top(2)] == ['polite', 'long']
    assert found.top(3)[1] == ('long', pytest.approx(-0.45))
    assert [line.split() for line in str(found).splitlines()] == [
        line.split() for line in TEXT.splitlines()
    ]


def test_the_ratings_of_the_published_example():
    """HelpSteer's 5 r - 0.5, from the released model's card."""
    rate = np.float32([0.65625, 0.671875, 0.796875, 0.376953125, 0.359375])
    want = [2.78125, 2.859375, 3.484375, 1.384765625, 1.296875]
    np.testing.assert_array_equal(Scale(0, 4).original(rate), want)


def pixels(path):
    from matplotlib.image import imread

    return imread(path)


def test_two_answers_on_a_page(tmp_path):
    other = explanation(score=0.1, rate_J=np.float32([0.4, 0.1, 0.9]))
    texts = {'question': 'What costs $5, $6?', 'answers': ('世界\x00 <b> _x_ ^2', 'word ' * 400)}
    comparison.page([explanation(), other], tmp_path / 'a.png', **texts)
    comparison.page([other, explanation()], tmp_path / 'b.png', **texts)
    comparison.page([explanation()] * 2, tmp_path / 'c.png', **texts, lines=40, names=('甲', 'B'))
    a, b, c = (pixels(tmp_path / f'{name}.png') for name in 'abc')
    assert a.shape == b.shape
    assert (a != b).any()
    assert c.shape[0] > a.shape[0]
    assert a.shape[1] == 1690


@pytest.mark.parametrize('text', ['W' * 300, 'il ' * 300, '\u25a1' * 300, 'a\n\nWide ' * 40])
def test_no_line_is_wider_than_its_place(text):
    from matplotlib.textpath import TextPath

    rows = comparison._Canvas().wrapped(text, 4.0, 5, size=10)
    wide = [TextPath((0, 0), row, size=10).get_extents().width / 72 for row in rows if row.strip()]
    assert len(rows) == 5
    assert rows[-1].endswith(' \u2026')
    assert max(wide) <= 4.0
    assert max(wide) > 3.5 or text.startswith('a')


def test_bars_and_their_values_have_room():
    canvas = comparison._Canvas()
    axis = canvas.axes(0, 0, 2.1, 1)
    comparison._weights(axis, np.float32([0.9, 0.1]), np.float32([0.1, -1e-9]))
    low, high = axis.get_xlim()
    assert low < 0
    assert high > 0.9
    assert [text.get_text() for text in axis.texts] == ['+0.100', '+0.000']


def test_other_files_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"found '.html', expected one of"):
        comparison.page([explanation()] * 2, tmp_path / 'a.html', question='', answers=('', ''))
    assert not [*tmp_path.iterdir()]


def test_two_questions_do_not_compare(tmp_path):
    other = explanation(weight_J=np.float32([0.5, 0.4, 0.1]))
    with pytest.raises(ValueError, match=r'^explained: found weights that differ'):
        comparison.page([explanation(), other], tmp_path / 'a.png', question='', answers=('', ''))
