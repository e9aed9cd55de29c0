"""Losses and pair statistics against loops over pairs in numpy float64."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import plain
import pytest

from jaxrm import losses, packing


def pairs(rank):
    """(better, worse) of every ordered pair of one record."""
    here = [m for m, r in enumerate(rank) if r >= 0]
    return [(i, j) for i, j in itertools.product(here, here) if rank[i] < rank[j]]


def mean(values):
    values = list(values)
    return sum(values) / len(values) if values else 0.0


def softplus(x):
    return np.logaddexp(0.0, np.float64(x))


def bradley_terry(score, rank, margin, smoothing):
    def one(i, j):
        z = np.float64(score[i]) - score[j] - (np.float64(margin[i]) - margin[j])
        return (1 - smoothing) * softplus(-z) + smoothing * softplus(z)

    return mean(one(i, j) for i, j in pairs(rank))


def batch(seed, B=7, M=5):
    """Scores with exact ties, ranks with ties and absent candidates (of whole records too)."""
    rng = np.random.default_rng(seed)
    score = rng.integers(-4, 5, (B, M)) / 2 + 0.0
    rank = rng.integers(-1, 3, (B, M))
    rank[0], rank[1], rank[2] = -1, 0, [0, -1, -1, -1, -1]
    rank[3] = rng.permutation(M)
    margin, smoothing = rng.normal(size=(B, M)), rng.uniform(0, 0.5, B)
    f32 = np.float32
    return score.astype(f32), rank.astype(np.int32), margin.astype(f32), smoothing.astype(f32)


@pytest.mark.parametrize('seed', range(4))
def test_bradley_terry_equals_a_loop(seed):
    score, rank, margin, smoothing = batch(seed)
    zero = np.zeros_like(margin)
    cases = [
        ({}, zero, 0 * smoothing),
        ({'margin_BM': margin}, margin, 0 * smoothing),
        ({'smoothing_B': smoothing}, zero, smoothing),
        ({'margin_BM': margin, 'smoothing_B': smoothing}, margin, smoothing),
    ]
    for options, m, a in cases:
        want = [bradley_terry(*row) for row in zip(score, rank, m, a, strict=True)]
        got = losses.bradley_terry(score, rank, **options)
        assert got.shape == (len(score),)
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)


def test_bradley_terry_has_the_gradient_of_differences():
    score, rank, margin, smoothing = batch(9)

    def total(score):
        rows = zip(score, rank, margin, smoothing, strict=True)
        return sum(bradley_terry(*row) for row in rows)

    want = np.zeros(score.shape)
    for at in np.ndindex(score.shape):
        up, down = score.astype(np.float64), score.astype(np.float64)
        up[at] += 1e-5
        down[at] -= 1e-5
        want[at] = (total(up) - total(down)) / 2e-5
    ours = lambda s: losses.bradley_terry(s, rank, margin_BM=margin, smoothing_B=smoothing).sum()  # noqa: E731
    np.testing.assert_allclose(jax.grad(ours)(jnp.array(score)), want, atol=1e-6)


@pytest.mark.parametrize('seed', range(3))
def test_scaled_bradley_terry_equals_a_loop(seed):
    score, rank, margin, smoothing = batch(seed)

    def one(b, a):
        x, m = score[b].astype(np.float64), margin[b].astype(np.float64)
        cost = lambda z: (1 - a) * softplus(-z) + a * softplus(z)  # noqa: E731
        return mean((m[i] - m[j]) * cost(x[i] - x[j]) for i, j in pairs(rank[b]))

    for options, a in (({}, 0 * smoothing), ({'smoothing_B': smoothing}, smoothing)):
        got = losses.scaled_bradley_terry(score, rank, margin_BM=margin, **options)
        want = [one(b, a[b]) for b in range(len(score))]
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize('epsilon', [0.0, 0.1, 0.45])
def test_robust_equals_a_loop(epsilon):
    score, rank, margin, smoothing = batch(2)

    def one(b, a):
        x = score[b].astype(np.float64) - margin[b]
        cost = lambda z: (1 - a) * softplus(-z) + a * softplus(z)  # noqa: E731
        e = epsilon
        both = ((1 - e) * cost(x[i] - x[j]) - e * cost(x[j] - x[i]) for i, j in pairs(rank[b]))
        return mean(both) / (1 - 2 * e)

    for options, a in (({}, 0 * smoothing), ({'smoothing_B': smoothing}, smoothing)):
        got = losses.robust(score, rank, epsilon=epsilon, margin_BM=margin, **options)
        want = [one(b, a[b]) for b in range(len(score))]
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=2e-6)


def test_robust_is_unbiased():
    """Its mean over flipped and right labels is the loss of the right ones."""
    score, e = jnp.array([[0.7, -0.4]]), 0.2
    right, flipped = (losses.robust(score, jnp.array([r]), epsilon=e) for r in ((0, 1), (1, 0)))
    want = losses.bradley_terry(score, jnp.array([[0, 1]]))
    np.testing.assert_allclose((1 - e) * right + e * flipped, want, rtol=1e-6)


def test_regression_equals_a_loop_and_what_is_missing_does_not_matter():
    rng = np.random.default_rng(0)
    rate, rating = rng.normal(size=(2, 4, 3, 2)).astype(np.float32)
    rating[rng.random(rating.shape) < 0.4] = np.nan
    rate[np.isnan(rating)] = np.nan
    loss, here = losses.regression(rate, rating)
    want = [0 if np.isnan(r) else (x - r) ** 2 for x, r in zip(rate.flat, rating.flat, strict=True)]
    np.testing.assert_allclose(loss.ravel(), want, rtol=1e-6)
    np.testing.assert_array_equal(here, ~np.isnan(rating))
    gradient = jax.grad(lambda x: losses.regression(x, rating)[0].sum())(jnp.asarray(rate))
    want = np.where(np.isnan(rating), 0, 2 * (rate.astype(np.float64) - rating))
    np.testing.assert_allclose(gradient, want, rtol=1e-5)


@pytest.mark.parametrize('gap', [1e4, -1e4, 3e38])
@pytest.mark.parametrize('smoothing', [0.0, 0.25])
def test_huge_gaps_stay_finite(gap, smoothing):
    score, rank = jnp.array([[gap, 0.0, 7.0]]), jnp.array([[0, 1, -1]])
    loss = lambda s: losses.bradley_terry(s, rank, smoothing_B=jnp.array([smoothing]))[0]  # noqa: E731
    value, gradient = jax.value_and_grad(loss)(score)
    np.testing.assert_allclose(value, softplus(-gap) + smoothing * gap, rtol=1e-6)
    slope = smoothing - (gap < 0)
    np.testing.assert_allclose(gradient, [[slope, -slope, 0]], atol=1e-6)


def test_known_values():
    score, rank = jnp.array([[1.0, 3.0]]), jnp.array([[0, 1]])
    np.testing.assert_allclose(losses.bradley_terry(score, rank), np.log1p(np.exp(2.0)), rtol=1e-6)
    # a margin as large as the difference leaves a coin toss
    margin = jnp.array([[-1.0, 1.0]])
    loss = losses.bradley_terry(score, rank, margin_BM=margin)
    np.testing.assert_allclose(loss, np.log(2), rtol=1e-6)
    np.testing.assert_allclose(losses.centering(score, rank), 16.0)
    np.testing.assert_allclose(losses.margin(score, rank), -2.0)


@pytest.mark.parametrize('seed', range(3))
def test_pair_statistics_equal_loops(seed):
    score, rank, *_ = batch(seed)
    x = score.astype(np.float64)
    want = {
        losses.pairs: lambda b: len(pairs(rank[b])),
        losses.centering: lambda b: mean((x[b, i] + x[b, j]) ** 2 for i, j in pairs(rank[b])),
        losses.accuracy: lambda b: mean(x[b, i] > x[b, j] for i, j in pairs(rank[b])),
        losses.ties: lambda b: mean(x[b, i] == x[b, j] for i, j in pairs(rank[b])),
        losses.margin: lambda b: mean(x[b, i] - x[b, j] for i, j in pairs(rank[b])),
    }
    for fn, loop in want.items():
        got = fn(rank) if fn is losses.pairs else fn(score, rank)
        np.testing.assert_allclose(got, [loop(b) for b in range(len(score))], rtol=1e-5, atol=1e-6)
    ordered = np.zeros((*rank.shape, rank.shape[1]), bool)
    for b, row in enumerate(rank):
        for i, j in pairs(row):
            ordered[b, i, j] = True
    np.testing.assert_array_equal(losses.ordered(rank), ordered)


@pytest.mark.parametrize('seed', range(3))
def test_swapping_ranks_turns_the_accuracy_around(seed):
    score, rank, *_ = batch(seed)
    swapped = np.where(rank >= 0, rank.max() - rank, -1)
    has = np.asarray(losses.pairs(rank)) > 0
    before, tied = losses.accuracy(score, rank), losses.ties(score, rank)
    want = np.where(has, 1 - before - tied, 0)
    np.testing.assert_allclose(losses.accuracy(score, swapped), want, atol=1e-6)
    np.testing.assert_allclose(losses.ties(score, swapped), tied, atol=1e-6)
    np.testing.assert_allclose(
        losses.margin(score, swapped), -losses.margin(score, rank), atol=1e-6
    )


def test_only_the_order_of_ranks_counts_and_candidates_may_be_permuted():
    score, rank, margin, smoothing = batch(11)
    options = {'margin_BM': margin, 'smoothing_B': smoothing}
    want = losses.bradley_terry(score, rank, **options)
    stretched = np.where(rank >= 0, rank * 17 + 3, -1)
    np.testing.assert_array_equal(losses.bradley_terry(score, stretched, **options), want)
    order = np.random.default_rng(0).permutation(5)
    options['margin_BM'] = margin[:, order]
    got = losses.bradley_terry(score[:, order], rank[:, order], **options)
    np.testing.assert_allclose(got, want, rtol=1e-6)


@pytest.mark.parametrize('odd', [np.inf, np.nan, 3e38])
def test_what_stands_at_absent_candidates_does_not_matter(odd):
    score, rank, margin, smoothing = batch(5)
    dirty = jnp.where(rank < 0, odd, score)
    fns = (losses.bradley_terry, losses.centering, losses.accuracy, losses.ties, losses.margin)
    for fn in fns:
        np.testing.assert_array_equal(fn(dirty, rank), fn(jnp.array(score), rank))
    for fn in (losses.bradley_terry, losses.centering):
        gradient = jax.grad(lambda s: fn(s, rank).sum())(dirty)
        assert not np.asarray(gradient)[rank < 0].any()
        clean = jax.grad(lambda s: fn(s, rank).sum())(jnp.array(score))
        np.testing.assert_array_equal(gradient, clean)


@pytest.mark.parametrize('seed', range(3))
def test_next_token_equals_a_loop_over_trees(seed):
    shape = packing.Shape(tokens=40, rows=((4, 8), (4, 16)), prompts=5, candidates=4)
    t = plain.random_tokens([2, 1, 4, 0, 3, 2], seed=seed)
    packs = packing.plan(t, shape, order=np.arange(6))
    pack = packing.fill(t, packs, shape, count=len(packs) + 1)
    logits = np.random.default_rng(seed).normal(size=(*pack.ids_PN.shape, 37)) * 3
    want, has = np.zeros(pack.ids_PN.shape), np.zeros(pack.ids_PN.shape, bool)
    for p, b in np.argwhere(pack.record_PB >= 0):
        rows, flat = plain.rows(t, pack.record_PB[p, b]), [s[p] for s in pack.slot]
        for m, ids in enumerate(rows):
            streams = [row for slot in flat for row in slot]
            stream = streams[pack.row_PBM[p, b, m]]
            prompt = t.prompt[pack.record_PB[p, b]]
            for k in range(len(ids) - 1):
                if m and k < prompt:  # of a later candidate, the prompt has been counted and
                    continue  # nobody predicts its first token: its predecessor is elsewhere
                at = (p, stream[k])
                x = logits[at].astype(np.float64)
                want[at] = np.log(np.exp(x).sum()) - x[ids[k + 1]]
                has[at] = True
    got, count = losses.next_token(jnp.asarray(logits, jnp.float32), pack.ids_PN, pack.pos_PN)
    np.testing.assert_array_equal(count, has)
    np.testing.assert_allclose(got, want, atol=1e-5)


def pair(gap, **options):
    """Bradley-Terry of one pair whose better answer scores higher by `gap`."""
    score = jnp.stack([gap / 2, -gap / 2])[None]
    return losses.bradley_terry(score, jnp.array([[0, 1]]), **options)[0]


def test_no_margin_and_no_smoothing_is_bradley_terry_bit_for_bit():
    score, rank, *_ = batch(3)
    zero = jnp.zeros_like(score)
    got = losses.bradley_terry(score, rank, margin_BM=zero, smoothing_B=zero[:, 0])
    np.testing.assert_array_equal(got, losses.bradley_terry(score, rank))


def test_swapping_answers_turns_the_difference_and_the_margin_belongs_to_the_order():
    gap, margin = jnp.float32(0.8), jnp.array([[0.3, 0.0]])
    score, swapped = jnp.array([[0.4, -0.4]]), jnp.array([[1, 0]])
    got = losses.bradley_terry(score, swapped)[0]
    np.testing.assert_array_equal(got, pair(-gap))
    # margin 0.3 stays with the first answer, now the worse one: z = -0.8 + 0.3
    got = losses.bradley_terry(score, swapped, margin_BM=margin)[0]
    np.testing.assert_allclose(got, softplus(0.5), rtol=1e-6)


@pytest.mark.parametrize(('alpha', 'margin'), [(0.1, 0.0), (0.3, 1.7), (0.1, -2.0)])
def test_the_optimum_with_smoothing_and_margin(alpha, margin):
    """At margin + log((1 - alpha) / alpha), where the slope is 0; 2.197 for 0.1 without margin."""
    options = {'margin_BM': jnp.array([[margin, 0.0]]), 'smoothing_B': jnp.array([alpha])}
    slope = jax.grad(lambda gap: pair(gap, **options))
    best = margin + np.log((1 - alpha) / alpha)
    assert abs(slope(jnp.float32(best))) < 1e-6
    for gap in (-3.0, 0.0, 4.0):
        want = 1 / (1 + np.exp(-(gap - margin))) - (1 - alpha)
        np.testing.assert_allclose(slope(jnp.float32(gap)), want, atol=1e-6)
    assert pair(jnp.float32(best), **options) < pair(jnp.float32(best + 0.2), **options)


def test_a_margin_outside_the_sigmoid_would_teach_nothing():
    """Equation 6 of Secrets II as printed: a constant, with the slope of no margin at all."""
    gap, margin = jnp.float32(0.6), 1.5
    printed = lambda gap: pair(gap) - margin  # noqa: E731
    inside = lambda gap: pair(gap, margin_BM=jnp.array([[margin, 0.0]]))  # noqa: E731
    np.testing.assert_array_equal(jax.grad(printed)(gap), jax.grad(pair)(gap))
    np.testing.assert_allclose(jax.grad(inside)(gap), -1 / (1 + np.exp(gap - margin)), rtol=1e-5)
    assert jax.grad(inside)(gap) < 2 * jax.grad(pair)(gap)


@pytest.mark.parametrize('seed', range(2))
def test_saturating_equals_a_loop(seed):
    score, rank, margin, smoothing = batch(seed)
    score = 4 * score
    sigmoid = lambda z: 1 / (1 + np.exp(-np.float64(z)))  # noqa: E731
    cost = lambda z: -np.log(sigmoid(z) + 1e-5)  # noqa: E731

    def one(b, m, a):
        gaps = (np.float64(score[b, i]) - score[b, j] - (m[i] - m[j]) for i, j in pairs(rank[b]))
        return mean((1 - a) * cost(z) + a * cost(-z) for z in gaps)

    none = 0 * margin
    got = losses.saturating(score, rank)
    np.testing.assert_allclose(got, [one(b, none[b], 0) for b in range(7)], atol=2e-6)
    got = losses.saturating(score, rank, margin_BM=margin, smoothing_B=smoothing)
    np.testing.assert_allclose(got, [one(b, margin[b], smoothing[b]) for b in range(7)], atol=5e-6)


def test_saturating_gives_up_on_pairs_that_are_very_wrong():
    """At -10 its slope is 18 % short, at -11.5 half, at -15 only 3 % are left, at -1e4 none."""
    order = jnp.array([[0, 1]])
    slope = jax.grad(lambda gap: losses.saturating(jnp.stack([gap, 0 * gap])[None], order)[0])
    found = [float(slope(jnp.float32(gap))) for gap in (0.0, -10.0, -11.5, -15.0, -1e4, 1e4)]
    np.testing.assert_allclose(found, [-0.5, -0.82, -0.503, -0.0297, 0, 0], atol=1e-3)
