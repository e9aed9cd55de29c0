"""A sweep of shares: one program, its ends, and a choice that never looks at the test records."""

import jax
import numpy as np
import pytest
from test_blend import other
from test_reward import RM, SHAPE, data, parameters

from jaxrm import evaluate, sharding, sweep


def test_a_sweep_is_one_program():
    mesh, tokens = sharding.make_mesh(), data([2] * 6, 3)
    score = jax.jit(RM.score)
    options = {'mesh': mesh, 'packs': sharding.data_parallel(mesh)}
    params = parameters()
    found = sweep.scores(score, params, other(), tokens, SHAPE, **options)
    assert found.shape == (21, 12)
    assert score._cache_size() == 1
    for share, backbone in ((0, params['backbone']), (-1, other())):
        alone = {**params, 'backbone': backbone}
        expected = evaluate.candidate_scores(score, alone, tokens, SHAPE, **options)
        np.testing.assert_array_equal(found[share], expected)
    near = sweep.scores(score, params, other(), tokens, SHAPE, shares=(0.5, 0.5 + 1e-4), **options)
    assert 0 < np.abs(np.diff(near, axis=0)).max() < 1e-2  # continuous
    mean, std = sweep.drift(found)
    assert mean[3] == pytest.approx(found[3].mean())
    assert std[3] == pytest.approx(found[3].std())


def records(*accuracy, n=40):
    """0 and 1 of so many right."""
    return np.array([np.arange(n) < round(a * n) for a in accuracy], float)


def test_the_choice_is_made_on_validation_records():
    shares = [0.0, 0.5, 1.0]
    found = sweep.choose(shares, records(0.5, 0.8, 0.6), records(0.5, 0.7, 0.9))
    assert (found.row, found.share, found.best) == (1, 0.5, 1.0)
    assert found.test.mean == pytest.approx(0.7)
    assert found.unmerged.mean == pytest.approx(0.5)
    assert found.gain.difference.mean == pytest.approx(0.2)
    assert (found.gain.first_only, found.gain.second_only) == (8, 0)
    assert found.gap == pytest.approx(0.2)


def test_of_equal_shares_the_smallest_is_chosen():
    assert sweep.choose([1.0, 0.0, 0.5], records(0.5, 0.5, 0.5), records(1, 0, 0)).share == 0


def test_records_without_an_order_do_not_count():
    test = records(0.5, 1)
    test[:, -20:] = np.nan
    found = sweep.choose([0.0, 0.5], records(0.4, 0.5), test, prompts=[i // 2 for i in range(40)])
    assert (found.test.mean, found.unmerged.mean, found.gap) == (1, 1, 0)


def test_bad_input_is_refused():
    with pytest.raises(ValueError, match=r'shares: found \[0.5, 1.0\], expected 0 among them'):
        sweep.choose([0.5, 1.0], records(1, 1), records(1, 1))
    with pytest.raises(ValueError, match='test: found 1 rows, expected 2'):
        sweep.choose([0.0, 1.0], records(1, 1), records(1))
