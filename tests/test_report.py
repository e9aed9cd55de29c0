"""Pictures are written and show what they are given."""

import math

import numpy as np
import pytest

from jaxrm import report

matplotlib = pytest.importorskip('matplotlib')


def lines(steps=300, seed=0):
    """Metrics as a run writes them, with evaluations in between and a null loss."""
    rng = np.random.default_rng(seed)
    out = []
    for step in range(1, steps + 1):
        far = 1 - math.exp(-step / 80)
        noise = rng.normal(size=3)
        out.append(
            {
                'step': step,
                'loss': math.nan if step == 40 else 0.69 - 0.3 * far + 0.04 * noise[0],
                'accuracy': 0.5 + 0.35 * far + 0.05 * noise[1],
                'margin': 2 * far + 0.2 * noise[2],
            }
        )
        if step % 50 == 0:
            out.append({'step': step, 'eval_accuracy': 0.5 + 0.3 * far, 'eval_margin': 1.8 * far})
    return out


def pixels(path):
    """[height, width, 3] of a PNG, from 0 to 1."""
    import matplotlib.image

    return matplotlib.image.imread(path)[..., :3]


def has_colour(image, colour, least=20):
    near = np.abs(image - matplotlib.colors.to_rgb(colour)).max(-1) < 0.1
    return near.sum() >= least


def test_curves(tmp_path):
    report.curves(lines(), tmp_path / 'curves.png')
    image = pixels(tmp_path / 'curves.png')
    height, width = image.shape[:2]
    assert width > 1200 > 400 > height * 0.9
    for panel in np.array_split(image, 3, axis=1):
        assert has_colour(panel, report.TRAIN)
    held = [has_colour(panel, report.HELD_OUT) for panel in np.array_split(image, 3, axis=1)]
    assert held == [False, True, True]


def test_curves_of_a_short_run(tmp_path):
    report.curves(lines(1), tmp_path / 'one.png')
    report.curves(lines(3), tmp_path / 'three.png', names=['loss'])
    assert pixels(tmp_path / 'three.png').shape[1] < pixels(tmp_path / 'one.png').shape[1]


def test_curves_of_nothing(tmp_path):
    with pytest.raises(ValueError, match="found no value of 'reward'"):
        report.curves(lines(), tmp_path / 'curves.png', names=['reward'])


def test_smoothing_equals_a_loop():
    x = np.random.default_rng(0).normal(size=30)
    x[[4, 20]] = np.nan
    want = [np.nanmean(x[max(i - 2, 0) : i + 3]) for i in range(30)]
    np.testing.assert_allclose(report._smoothed(x, 5), want, rtol=0, atol=1e-12)
    np.testing.assert_array_equal(report._smoothed(x, 1), x)


def test_histogram(tmp_path):
    rng = np.random.default_rng(0)
    groups = {'chosen': rng.normal(size=500) + 1, 'rejected': rng.normal(size=500)}
    report.histogram(groups, tmp_path / 'two.png')
    report.histogram({'all': np.zeros(3)}, tmp_path / 'one.png')
    two, one = pixels(tmp_path / 'two.png'), pixels(tmp_path / 'one.png')
    assert two.std() > 0.05
    assert one.std() > 0.05


def test_histogram_of_nothing(tmp_path):
    with pytest.raises(ValueError, match="'chosen': found 0 finite scores"):
        report.histogram({'chosen': np.zeros(0)}, tmp_path / 'x.png')
