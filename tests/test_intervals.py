"""Intervals against resampling one by one and simulation, p-values against scipy."""

import numpy as np
import pytest
import scipy.stats

from jaxrm import intervals
from jaxrm.intervals import compare, interval, mcnemar, paired


def test_equals_resampling_one_by_one():
    x = np.random.default_rng(0).normal(size=60)
    draws = [
        np.random.default_rng([1, i]).choice(x, 60, replace=True).mean() for i in range(20_000)
    ]
    low, high = np.quantile(draws, [0.025, 0.975])
    found = interval(x, draws=20_000)
    assert found.mean == x.mean()
    np.testing.assert_allclose(found[1:], (low, high), rtol=0, atol=0.01)


def test_prompts_come_and_go_together():
    """The same as drawing prompts one by one and averaging all their records."""
    rng = np.random.default_rng(0)
    names = rng.integers(0, 40, 200).tolist()
    x = rng.normal(size=40)[names] + 0.1 * rng.normal(size=200)
    of = [x[[n == name for n in names]] for name in sorted(set(names))]
    draws = []
    for i in range(10_000):
        picked = np.random.default_rng([1, i]).integers(0, len(of), len(of))
        draws.append(np.concatenate([of[k] for k in picked]).mean())
    found = interval(x, prompts=[f'prompt {n}' for n in names], draws=10_000)
    assert found.mean == x.mean()
    np.testing.assert_allclose(found[1:], np.quantile(draws, [0.025, 0.975]), rtol=0, atol=0.02)
    assert found.high - found.low > 1.5 * np.diff(interval(x)[1:])


def test_several_values_of_the_same_records():
    """Each as by itself."""
    rng = np.random.default_rng(0)
    x, names = rng.normal(size=(90, 3)), rng.integers(0, 30, 90).tolist()
    for prompts in (None, names):
        for k, found in enumerate(intervals.each(x, prompts=prompts, draws=200)):
            assert found == pytest.approx(interval(x[:, k], prompts=prompts, draws=200), rel=1e-12)


def test_repeating_a_record_adds_nothing():
    x = np.random.default_rng(0).normal(size=50)
    names = list(range(50))
    assert interval(np.repeat(x, 3), prompts=np.repeat(names, 3).tolist()) == pytest.approx(
        interval(x, prompts=names), rel=1e-12
    )
    assert interval(x, prompts=names) == interval(x)


def test_leaves_out_nan_and_repeats_itself():
    x = np.random.default_rng(0).normal(size=50)
    with_gaps = np.insert(x, [3, 3, 20], np.nan)
    assert interval(with_gaps) == interval(x) == interval(list(x))
    assert interval(with_gaps, prompts=range(53)) == interval(x)
    assert interval(x) != interval(x, seed=1)
    assert interval(np.full(9, 0.5)) == (0.5, 0.5, 0.5)
    assert str(interval(np.full(9, 0.5))) == '0.500 [0.500, 0.500]'
    assert np.isnan(interval(np.zeros(0))).all()
    assert np.isnan(interval(np.full(3, np.nan))).all()


def test_prompts_that_do_not_fit():
    with pytest.raises(ValueError, match='prompts: found 2, expected 3'):
        interval(np.zeros(3), prompts=['a', 'b'])


def test_in_chunks():
    """A set so large that draws come a few at a time."""
    x = np.random.default_rng(0).normal(size=100_000)
    low, high = interval(x, draws=200)[1:]
    assert high - low == pytest.approx(2 * 1.96 * x.std() / np.sqrt(len(x)), rel=0.2)


def covered(sets, truth, *, draws, prompt_n=None):
    """Share of the simulated sets [n, simulations] whose interval holds the truth."""
    drawn = intervals._resampled(np.asarray(sets, float), draws, 0, prompt_n)
    low, high = np.quantile(drawn, [0.025, 0.975], axis=0)
    found = interval(sets[:, 5], prompts=None if prompt_n is None else list(prompt_n), draws=draws)
    np.testing.assert_allclose(found[1:], (low[5], high[5]))
    return ((low <= truth) & (high >= truth)).mean()


@pytest.mark.parametrize('draw', ['coin', 'normal'])
def test_covers_the_truth(draw):
    """In 3000 simulated test sets of 200 prompts the interval holds the true mean 93 to 97 %."""
    rng = np.random.default_rng(7)
    sets = rng.random((200, 3000)) < 0.7 if draw == 'coin' else rng.normal(size=(200, 3000)) + 0.7
    assert 0.93 <= covered(sets, 0.7, draws=1000) <= 0.97


def answers(prompt_n, simulations, rng):
    """Right or wrong, 70 % right in all, where records of a prompt go together."""
    chance = np.where(rng.random((prompt_n.max() + 1, simulations)) < 0.5, 0.9, 0.5)
    return rng.random((len(prompt_n), simulations)) < chance[prompt_n]


def test_covers_the_truth_with_several_records_a_prompt():
    rng = np.random.default_rng(7)
    prompt_n = np.repeat(np.arange(150), rng.integers(1, 7, 150))
    sets = answers(prompt_n, 2000, rng)
    assert 0.93 <= covered(sets, 0.7, draws=1000, prompt_n=prompt_n) <= 0.97
    assert covered(sets, 0.7, draws=1000) < 0.91  # what taking records for prompts would do


@pytest.mark.slow
@pytest.mark.parametrize('prompts', [100, 400, 2000])
@pytest.mark.parametrize('rate', [0.55, 0.7, 0.9])
def test_covers_the_truth_at_many_sizes(prompts, rate):
    """Coins, coins in groups, and differences of two models that agree on most records."""
    rng = np.random.default_rng([prompts, int(100 * rate)])
    several = np.repeat(np.arange(prompts), rng.integers(1, 5, prompts))
    coins = rng.random((prompts, 4000)) < rate
    chance = np.where(rng.random((prompts, 4000)) < 0.5, rate - 0.05, rate + 0.05)
    grouped = rng.random((len(several), 4000)) < chance[several]
    second = np.where(rng.random((prompts, 4000)) < 0.7, coins, rng.random((prompts, 4000)) < 0.5)
    gap = coins.astype(float) - second
    for sets, truth, names in (
        (coins, rate, None),
        (grouped, rate, several),
        (gap, 0.3 * (rate - 0.5), None),
    ):
        assert 0.93 <= covered(sets, truth, draws=2000, prompt_n=names) <= 0.97


def test_paired_is_the_interval_of_the_difference():
    rng = np.random.default_rng(0)
    x = rng.normal(size=100)
    y = x + 0.05 * rng.normal(size=100) - 0.1
    y[3] = np.nan
    found = paired(x, y)
    assert found == interval(x - y)
    assert found.low > 0 > interval(x).low  # what only a paired comparison shows
    turned = paired(y, x)
    assert turned.mean == pytest.approx(-found.mean)


def test_mcnemar_equals_scipy():
    for n in (1, 2, 7, 30, 1001):
        for k in {0, 1, n // 3, n // 2, n - 1, n}:
            want = scipy.stats.binomtest(k, n, 0.5).pvalue
            assert mcnemar(k, n - k) == pytest.approx(want, rel=1e-9)
            assert mcnemar(k, n - k) == mcnemar(n - k, k)
    assert mcnemar(0, 0) == 1
    assert 0 < mcnemar(400, 5000) < 1e-300 or mcnemar(400, 5000) == 0


def test_comparison():
    first = np.array([1, 1, 0, 0, 1, 1 / 3, np.nan, 1])
    second = np.array([1, 0, 0, 1, 0, 2 / 3, 1, np.nan])
    found = compare(first, second, prompts=list('abcdefgh'))
    assert (found.first_only, found.second_only) == (2, 2)
    assert found.difference == paired(first, second)
    assert found.difference.mean == pytest.approx((1 - 1 + 1 - 1 / 3) / 6)
    assert found.p_value == 1
    clear = compare(np.ones(20), np.zeros(20))
    assert (clear.first_only, clear.p_value) == (20, 2 / 2**20)
    assert str(clear).endswith('20 right by the first alone, 0 by the second alone, p = 1.9e-06')


def test_comparison_keeps_prompts_together():
    rng = np.random.default_rng(0)
    names = np.repeat(np.arange(40), 5)
    first, second = (rng.random(40)[names] < 0.6 for _ in 'ab')
    found = compare(first, second, prompts=names.tolist())
    assert found.difference == paired(first, second, prompts=names.tolist())
    assert np.diff(found.difference[1:]) > 1.5 * np.diff(paired(first, second)[1:])
