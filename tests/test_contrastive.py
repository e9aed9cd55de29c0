"""Contrastive losses against loops and the published algorithm in float64, and closed forms."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrm import contrastive

N, D, K, TAU = 14, 6, 5, 0.2
SWAV = {'temperature': 0.3, 'epsilon': 0.1, 'iterations': 3}
simcse = jax.jit(contrastive.simcse, static_argnames='temperature')
swav = jax.jit(contrastive.swav, static_argnames=tuple(SWAV))
sinkhorn = jax.jit(contrastive.sinkhorn, static_argnames=('epsilon', 'iterations'))


def data(seed=0, n=N, absent=()):
    """Two views that resemble each other, prototypes, and which items are there."""
    rng = np.random.default_rng(seed)
    s = rng.normal(size=(n, D)) * rng.uniform(0.1, 5, (n, 1))
    t = s + 0.3 * rng.normal(size=(n, D))
    here = ~np.isin(np.arange(n), absent)
    return s, t, rng.normal(size=(D, K)), here


def numbers(s, t, prototype, here, nothing=np.nan):
    """The arguments as a program gets them: what is absent may be anything."""
    masked = (np.where(here[:, None], x, nothing) for x in (s, t))
    return *(x.astype(np.float32) for x in masked), here, prototype.astype(np.float32)


# By other routes, all items there


def rows(x):
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def slow_simcse(s, t, tau):
    out = []
    for a in s:
        cosines = [a @ b / np.linalg.norm(a) / np.linalg.norm(b) for b in t]
        out.append(np.log(sum(np.exp(c / tau) for c in cosines)) - cosines[len(out)] / tau)
    return np.array(out)


def slow_sinkhorn(score, epsilon, iterations):
    """As SwAV's code does it: K x B, first divided by its total."""
    Q = np.exp(score.astype(np.float64) / epsilon).T
    Q /= Q.sum()
    for _ in range(iterations):
        Q /= Q.sum(1, keepdims=True) * Q.shape[0]
        Q /= Q.sum(0, keepdims=True) * Q.shape[1]
    return (Q / Q.sum(0, keepdims=True)).T


def slow_swav(s, t, prototype, *, temperature, epsilon, iterations, q=None):
    c = rows(prototype.T)
    scores = rows(s) @ c.T, rows(t) @ c.T
    q_s, q_t = q or [slow_sinkhorn(x, epsilon, iterations) for x in scores]
    log_s, log_t = (
        np.log(np.exp(x / temperature) / np.exp(x / temperature).sum(1, keepdims=True))
        for x in scores
    )
    return -((q_t * log_s).sum(1) + (q_s * log_t).sum(1)) / 2, (q_s, q_t)


ABSENT = [(), (0, 3, 13), tuple(range(1, 14))]


@pytest.mark.parametrize('absent', ABSENT)
def test_losses_equal_loops_over_what_is_there(absent):
    s, t, prototype, here = data(absent=absent)
    *views, _, c = numbers(s, t, prototype, here)
    want = np.zeros(N)
    want[here] = slow_simcse(s[here], t[here], TAU)
    np.testing.assert_allclose(simcse(*views, here, temperature=TAU), want, rtol=1e-5, atol=1e-5)
    want[here], _ = slow_swav(s[here], t[here], prototype, **SWAV)
    got = swav(*views, here, prototype_DK=c, **SWAV)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)


def test_items_in_bfloat16_are_compared_in_float32():
    s, t, prototype, here = data(5)
    half = [jnp.asarray(x, jnp.bfloat16) for x in (s, t, prototype)]
    s, t, prototype = (np.asarray(x, np.float64) for x in half)
    found = simcse(*half[:2], here, temperature=TAU)
    np.testing.assert_allclose(found, slow_simcse(s, t, TAU), rtol=1e-5, atol=1e-5)
    found = swav(*half[:2], here, prototype_DK=half[2], **SWAV)
    np.testing.assert_allclose(found, slow_swav(s, t, prototype, **SWAV)[0], rtol=1e-5)
    found = jax.jit(contrastive.statistics)(*half[:2], here)
    np.testing.assert_allclose(found['feature_variance'], s.var(0).mean(), rtol=1e-5)
    np.testing.assert_allclose(found['view_cosine'], (rows(s) * rows(t)).sum(1).mean(), rtol=1e-5)


@jax.jit
@functools.partial(jax.grad, argnums=(0, 1, 3))
def gradient(s, t, here, prototype):
    one = contrastive.simcse(s, t, here, temperature=TAU)
    return (one + contrastive.swav(s, t, here, prototype_DK=prototype, **SWAV)).sum()


@pytest.mark.parametrize('absent', ABSENT[:2])
def test_gradients_equal_finite_differences_with_assignments_held_fast(absent):
    s, t, prototype, here = data(1, absent=absent)
    got = gradient(*numbers(s, t, prototype, here))
    assert not np.asarray(got[0])[~here].any()
    x = s[here], t[here], prototype
    _, q = slow_swav(*x, **SWAV)
    loss = lambda s, t, c: (slow_simcse(s, t, TAU) + slow_swav(s, t, c, q=q, **SWAV)[0]).sum()  # noqa: E731
    for a, g in enumerate((got[0][here], got[1][here], got[2])):
        want = np.zeros(x[a].shape)
        for i in np.ndindex(want.shape):
            step = np.zeros(want.shape)
            step[i] = 1e-5
            moved = lambda sign: [y + sign * step if b == a else y for b, y in enumerate(x)]  # noqa: E731
            want[i] = (loss(*moved(1)) - loss(*moved(-1))) / 2e-5
        np.testing.assert_allclose(g, want, rtol=1e-3, atol=1e-4 * np.abs(want).max())


def test_nothing_there_is_nothing():
    x = numbers(*data(absent=range(N)))
    assert not np.asarray(simcse(*x[:3])).any()
    assert not np.asarray(swav(*x[:3], prototype_DK=x[3])).any()
    assert not any(np.asarray(g).any() for g in gradient(*x))


@pytest.mark.parametrize('tau', [0.05, 0.5])
def test_simcse_closed_forms(tau):
    n = 6
    here = np.ones(n, bool)
    eye = np.eye(n, 8, dtype=np.float32) * np.arange(1, n + 1)[:, None].astype(np.float32)
    want = -np.log(np.exp(1 / tau) / (np.exp(1 / tau) + n - 1))
    np.testing.assert_allclose(simcse(eye, eye, here, temperature=tau), want, rtol=1e-5, atol=1e-7)
    same = np.ones((n, 8), np.float32)
    np.testing.assert_allclose(simcse(same, 3 * same, here, temperature=tau), np.log(n), rtol=1e-5)


def test_simcse_has_anchors_in_s_and_candidates_in_t():
    s, t, _, here = data(2)
    one, other = (simcse(*numbers(a, b, t.T, here)[:3]) for a, b in ((s, t), (t, s)))
    assert np.abs(one - other).max() > 1e-3
    np.testing.assert_allclose(other, slow_simcse(t, s, 0.05), rtol=1e-4, atol=1e-5)


# Sinkhorn


def scores(n, prototypes=20, width=64, seed=0):
    rng = np.random.default_rng(seed)
    z, c = (rows(rng.normal(size=(k, width))) for k in (n, prototypes))
    return (z @ c.T).astype(np.float32)


@pytest.mark.parametrize('iterations', [0, 1, 3, 50])
def test_sinkhorn_equals_the_published_algorithm(iterations):
    score, here = scores(12), ~np.isin(np.arange(12), [0, 7])
    score[~here] = np.nan
    got = sinkhorn(score, here, iterations=iterations)
    want = np.zeros(score.shape)
    want[here] = slow_sinkhorn(score[here], 0.05, iterations)
    np.testing.assert_allclose(got, want, rtol=2e-4, atol=1e-7)
    np.testing.assert_allclose(got.sum(1), here, atol=1e-6)


def test_sinkhorn_shares_prototypes_out():
    for n, within in ((32, 0.35), (64, 0.1)):
        score = scores(n)
        mass = sinkhorn(score, np.ones(n, bool)).sum(0) * score.shape[1] / n
        assert np.abs(mass - 1).max() < within, np.abs(mass - 1).max()
    mass = sinkhorn(score, np.ones(n, bool), iterations=50).sum(0) * score.shape[1] / n
    np.testing.assert_allclose(mass, 1, atol=1e-3)


def test_collapsed_items_are_spread_evenly_and_have_no_signal():
    score = np.repeat(scores(1), 8, 0)
    np.testing.assert_allclose(sinkhorn(score, np.ones(8, bool)), 1 / score.shape[1], rtol=1e-5)
    one = np.ones((8, D), np.float32)
    c = np.eye(D, dtype=np.float32)  # as far from it one as the other
    np.testing.assert_allclose(swav(one, one, np.ones(8, bool), prototype_DK=c), np.log(D), 1e-5)


def test_sinkhorn_is_finite_far_out_and_has_no_gradient():
    score = np.where(scores(12) > 0, 100.0, -100.0).astype(np.float32)
    score[0] = 100.0
    q = sinkhorn(score, np.ones(12, bool))
    assert np.isfinite(q).all()
    np.testing.assert_allclose(q.sum(1), 1, atol=1e-6)
    weight = np.random.default_rng(0).normal(size=score.shape).astype(np.float32)
    pulled = jax.grad(lambda x: (sinkhorn(x, np.ones(12, bool)) * weight).sum())(scores(12))
    assert not np.asarray(pulled).any()


def test_prototypes_count_by_their_direction():
    s, t, prototype, here = data(3)
    x = numbers(s, t, prototype, here)
    again = numbers(7 * s, t, prototype * np.arange(1, K + 1), here)
    one, other = (swav(*y[:3], prototype_DK=y[3]) for y in (x, again))
    np.testing.assert_allclose(one, other, rtol=1e-4)


# Items


def test_differences_are_those_of_ordered_pairs_and_their_negatives():
    rng = np.random.default_rng(0)
    z = rng.normal(size=(4, 3, D)).astype(np.float32)
    rank = np.array([[0, 1, -1], [0, 1, 1], [2, 0, 1], [-1, -1, -1]])
    item_nD, here_n = jax.jit(contrastive.differences)(z, rank)
    want = [
        z[b, i] - z[b, j]
        for b in range(4)
        for i in range(3)
        for j in range(3)
        if min(rank[b, i], rank[b, j]) >= 0 and rank[b, i] != rank[b, j]
    ]
    assert len(want) == here_n.sum() == 2 + 4 + 6
    ordered = lambda x: np.array(sorted(map(tuple, np.asarray(x))))  # noqa: E731
    np.testing.assert_array_equal(ordered(item_nD[np.asarray(here_n)]), ordered(want))
    half = len(item_nD) // 2
    np.testing.assert_array_equal(item_nD[:half], -item_nD[half:])
    np.testing.assert_array_equal(here_n[:half], here_n[half:])


def test_responses_are_those_that_are_there():
    z = np.arange(12, dtype=np.float32).reshape(2, 3, 2)
    item_nD, here_n = contrastive.responses(z, np.array([[0, 1, -1], [0, 0, 1]]))
    np.testing.assert_array_equal(item_nD, z.reshape(6, 2))
    np.testing.assert_array_equal(here_n, [1, 1, 0, 1, 1, 1])


@jax.jit
def of_differences(s, t, rank, prototype):
    (a, here), (b, _) = (contrastive.differences(z, rank) for z in (s, t))
    both = contrastive.simcse(a, b, here), contrastive.swav(a, b, here, prototype_DK=prototype)
    return jnp.stack([x.sum() for x in both])


def test_losses_of_differences_do_not_know_which_is_better():
    rng = np.random.default_rng(0)
    s = rng.normal(size=(5, 2, D)).astype(np.float32)
    t = s + rng.normal(size=s.shape).astype(np.float32)
    c = rng.normal(size=(D, K)).astype(np.float32)
    rank = np.tile([0, 1], (5, 1))
    want = of_differences(s, t, rank, c)
    np.testing.assert_allclose(of_differences(s, t, rank[:, ::-1], c), want, rtol=1e-6)
    turned = np.array([True, False, True, True, False])[:, None, None]
    s, t = (np.where(turned, z[:, ::-1], z) for z in (s, t))
    np.testing.assert_allclose(of_differences(s, t, rank, c), want, rtol=1e-6)


# What is logged


def test_statistics_by_hand():
    s, t, _, here = data(4, absent=(2, 5))
    a, b = s[here], t[here]
    found = jax.jit(contrastive.statistics)(*numbers(s, t, t.T, here)[:3])
    cosine = rows(a) @ rows(b).T
    np.testing.assert_allclose(found['feature_variance'], a.var(0).mean(), rtol=1e-5)
    np.testing.assert_allclose(found['view_cosine'], np.diag(cosine).mean(), rtol=1e-5)
    away = cosine[~np.eye(len(a), dtype=bool)].mean()
    np.testing.assert_allclose(found['item_cosine'], away, rtol=1e-4)


def test_a_vector_of_nothing_has_no_direction_and_no_gradient():
    x = np.array([[0.0, 0.0], [3.0, 4.0], [1e-20, 0.0]], np.float32)
    np.testing.assert_allclose(contrastive.unit(x), [[0, 0], [0.6, 0.8], [0, 0]], rtol=1e-6)
    pulled = jax.grad(lambda x: contrastive.unit(x)[:, 0].sum())(x)
    np.testing.assert_allclose(pulled, [[0, 0], [0.128, -0.096], [0, 0]], atol=1e-6)
