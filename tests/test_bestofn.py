"""Best-of-n against every subset there is, whole-number binomials, and published values."""

import itertools
import math
from fractions import Fraction

import numpy as np
import pytest

from jaxrm import bestofn, intervals

NS = (1, 2, 3, 5, 6)


def by_hand(proxy, gold, n):
    """The mean over all subsets of n of the mean gold of those that score highest."""
    picks = []
    for subset in itertools.combinations(range(len(proxy)), n):
        top = max(proxy[i] for i in subset)
        picks.append(np.mean([gold[i] for i in subset if proxy[i] == top]))
    return np.mean(picks)


def samples(seed, ties, N=6):
    rng = np.random.default_rng(seed)
    proxy = rng.integers(0, 3, N).astype(float) if ties else rng.normal(size=N)
    return proxy, rng.normal(size=N)


@pytest.mark.parametrize('ties', [False, True])
def test_expected_is_the_mean_over_all_subsets(ties):
    for seed in range(20):
        proxy, gold = samples(seed, ties)
        for n in range(1, 7):
            want = by_hand(proxy, gold, n)
            np.testing.assert_allclose(bestofn.expected(proxy, gold, n), want, rtol=1e-12)


def test_ends():
    proxy, gold = samples(1, ties=False)
    np.testing.assert_allclose(bestofn.expected(proxy, gold, 1), gold.mean(), rtol=1e-13)
    assert bestofn.expected(proxy, gold, 6) == gold[proxy.argmax()]
    assert bestofn.expected(np.zeros(6), gold, 4) == pytest.approx(gold.mean(), rel=1e-13)


def test_estimates_are_those_of_fresh_draws():
    """Unbiased: the mean estimate from N samples is the worth of n fresh ones, by enumeration."""
    proxy, gold = np.array([0.0, 1, 2]), np.array([5.0, -1, 2])  # three answers, equally likely

    def mean(n, worth):
        draws = itertools.product(range(3), repeat=n)
        return np.mean([worth(np.array(draw)) for draw in draws])

    for n in (1, 2, 3):
        fresh = mean(n, lambda at: gold[at[proxy[at].argmax()]])
        found = mean(4, lambda at, n=n: bestofn.expected(proxy[at], gold[at], n))
        np.testing.assert_allclose(found, fresh, rtol=1e-12)


@pytest.mark.parametrize(('N', 'n'), [(5, 2), (300, 7), (12_600, 4096), (12_600, 12_500)])
def test_chances_are_binomials(N, n):
    found = bestofn.chances(N, n)
    whole = math.comb(N, n)
    for i in sorted({*range(n, N + 1, max(1, (N - n) // 7)), N}):
        want = float(Fraction(math.comb(i - 1, n - 1), whole))
        np.testing.assert_allclose(found[i - 1], want, rtol=1e-9, atol=1e-300)
    assert not found[: n - 1].any()
    np.testing.assert_allclose(found.sum(), 1, rtol=1e-12)


@pytest.mark.parametrize(
    ('n', 'nats'),
    [(1, 0), (4, 0.636), (16, 1.835), (64, 3.175), (256, 4.549), (1024, 5.932), (12_500, 8.434),
     (60_000, 10.002)],
)  # fmt: skip
def test_kl(n, nats):
    assert round(bestofn.kl(n), 3) == nats


def test_gold_goes_with_its_answer():
    """The order in which the samples stand says nothing; gold in another order does."""
    proxy, gold = zip(*(samples(seed, ties=False) for seed in range(4)), strict=True)
    orders = [np.random.default_rng(b).permutation(6) for b in range(4)]
    moved = [[x[at] for x, at in zip(xs, orders, strict=True)] for xs in (proxy, gold)]
    found = bestofn.best(proxy, gold, NS)
    np.testing.assert_allclose(bestofn.best(*moved, NS), found, rtol=1e-12)
    assert np.abs(bestofn.best(proxy, moved[1], NS) - found).max() > 0.1


def test_the_oracle_is_never_below_and_never_falls():
    proxy, gold = zip(*(samples(seed, ties=False) for seed in range(9)), strict=True)
    oracle = bestofn.best(gold, gold, NS)
    assert (oracle >= bestofn.best(proxy, gold, NS) - 1e-12).all()
    assert (np.diff(oracle) > 0).all()
    right = [np.array([1.0, 0, 0, 1, 0, 0])]  # pass@n = 1 - C(N - c, n) / C(N, n)
    want = [[1 - math.comb(4, n) / math.comb(6, n) for n in NS]]
    np.testing.assert_allclose(bestofn.best(right, right, NS), want, rtol=1e-12)


def test_nested():
    proxy = [np.array([0.0, 2, 2, 1, 3, 3]), np.array([1.0, 1, 1, 1, 1, 1])]
    gold = [np.arange(6.0), 10 + np.arange(6.0)]
    want = [[0, 1, 1, 4, 4], [10, 10, 10, 10, 10]]
    np.testing.assert_array_equal(bestofn.nested(proxy, gold, NS), want)


def test_what_stands_beside_the_proxies():
    right = [np.array([0.0, 1, 0, 1, 1, 0])]
    answers = [['7', '5', '7', '5', '5', None]]
    np.testing.assert_array_equal(bestofn.passes(right, NS), [[0, 1, 1, 1, 1]])
    np.testing.assert_array_equal(bestofn.floor(right, NS), [[0.5] * 5])
    np.testing.assert_array_equal(bestofn.majority(answers, right, NS), [[0, 0, 0, 1, 1]])
    found = bestofn.table({'x': [np.arange(6.0)]}, right, NS, answers=answers)
    assert {k: v.tolist() for k, v in found.items()} == {
        'x': [[0, 1, 0, 1, 0]],
        'random': [[0.5] * 5],
        'oracle': [[0, 1, 1, 1, 1]],
        'majority': [[0, 0, 0, 1, 1]],
    }


def test_a_majority_of_nothing():
    gold = [np.array([3.0, 4, 5])]
    found = bestofn.majority([[None, None, 'a']], gold, (1, 2, 3))
    np.testing.assert_array_equal(found, [[3, 3, 5]])
    found = bestofn.majority([['b', 'a', 'a']], gold, (1, 2, 3))
    np.testing.assert_array_equal(found, [[3, 3, 4]])


def test_curve():
    """A proxy that likes the middle: gold rises, then falls, and the decline says by how much."""
    rng = np.random.default_rng(0)
    proxy = [rng.normal(size=200) for _ in range(40)]
    gold = [p - p**2 / 2 for p in proxy]  # highest at a proxy of 1
    ns = (1, 2, 4, 16, 64, 200)
    found = bestofn.curve(proxy, gold, ns, draws=200)
    each = np.array([[by_rank(p, g, n) for n in ns] for p, g in zip(proxy, gold, strict=True)])
    np.testing.assert_allclose([x.mean for x in found.gold], each.mean(0), rtol=1e-9)
    np.testing.assert_allclose(found.proxy[-1].mean, np.mean([p.max() for p in proxy]))
    assert found.kl == tuple(math.log(n) - 1 + 1 / n for n in ns)
    assert found.peak in (2, 4)
    top = ns.index(found.peak)
    want = intervals.interval(each[:, top] - each[:, -1], draws=200)
    np.testing.assert_allclose(found.decline, want, rtol=1e-9)
    assert found.decline.low > 0.5
    honest = bestofn.curve(proxy, proxy, ns, draws=200)
    assert honest.peak == 200
    assert tuple(honest.decline) == (0, 0, 0)


def by_rank(proxy, gold, n):
    """The estimate written out with whole-number binomials."""
    N, order = len(proxy), np.argsort(proxy)
    whole = math.comb(N, n)
    terms = (float(Fraction(math.comb(i, n - 1), whole)) * gold[order[i]] for i in range(N))
    return math.fsum(terms)


@pytest.mark.parametrize(
    ('call', 'said'),
    [
        (lambda: bestofn.kl(0), 'n: found 0'),
        (lambda: bestofn.chances(3, 4), 'n: found 4, expected 1 to 3'),
        (lambda: bestofn.best([np.ones(3)], [np.ones(3)], [0]), 'n: found 0'),
        (lambda: bestofn.nested([np.ones(3)], [np.ones(3)], [4]), 'n: found 4, expected 1 to 3'),
        (lambda: bestofn.best([np.ones(3)], [np.ones(2)], [1]), r'found \[3\] .* \[2\]'),
        (lambda: bestofn.best([np.ones(3)], [], [1]), r'found \[3\] .* \[\]'),
        (lambda: bestofn.majority([['a']], [np.ones(2)], [1]), r'found \[1\] .* \[2\]'),
        (lambda: bestofn.best([np.array([])], [np.array([])], [1]), 'at least 1'),
        (lambda: bestofn.best([np.array([np.nan])], [np.ones(1)], [1]), 'not finite'),
        (lambda: bestofn.nested([np.ones(1)], [np.array([np.inf])], [1]), 'not finite'),
    ],
)
def test_wrong_input(call, said):
    with pytest.raises(ValueError, match=said):
        call()
