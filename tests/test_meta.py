"""J, and MetaRM's step of a linear model, by hand and by finite differences."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxrm import features, losses, meta, train

D = 5


# J


def apart(score_M):
    """(2 / k^2) sum over i < j of sigmoid |r_i - r_j| by loops."""
    pairs = itertools.combinations(score_M, 2)
    return 2 / len(score_M) ** 2 * sum(1 / (1 + np.exp(-abs(a - b))) for a, b in pairs)


def test_difference_equals_loops_over_those_that_are_there():
    rng = np.random.default_rng(0)
    score = rng.normal(size=(6, 5)).astype(np.float32)
    rank = np.zeros((6, 5), np.int32)
    rank[1, [0, 3]] = rank[2, 1:4] = rank[3, 1:] = rank[4] = -1
    rank[5] = [2, 0, 1, 0, -1]  # an order means nothing
    dirty = np.where(rank >= 0, score, np.nan)
    got, slope = jax.value_and_grad(lambda s: losses.difference(s, rank).sum())(dirty)
    want = [apart(s[r >= 0]) if (r >= 0).any() else 0 for s, r in zip(score, rank, strict=True)]
    np.testing.assert_allclose(losses.difference(dirty, rank), want, rtol=1e-6)
    assert got == pytest.approx(sum(want), rel=1e-6)
    assert want[3] == want[4] == 0
    assert np.isfinite(slope).all()
    assert not slope[rank < 0].any()


def test_of_five_answers_j_is_between_two_fifths_and_four():
    rng = np.random.default_rng(1)
    rank = np.zeros((40, 5), np.int32)
    score = rng.normal(size=(40, 5)).astype(np.float32) * np.logspace(-3, 0.5, 40)[:, None]
    j = np.asarray(losses.difference(score.astype(np.float32), rank))
    assert (j > 0.4).all()
    assert (j < 0.8).all()
    assert j[0] < 0.401
    order = rng.permutation(5)
    np.testing.assert_allclose(losses.difference(score[:, order], rank), j, rtol=1e-6)
    tied = jnp.full((1, 5), 3.0)
    assert float(losses.difference(tied, rank[:1])[0]) == pytest.approx(0.4, rel=1e-6)
    assert not np.asarray(jax.grad(lambda s: losses.difference(s, rank[:1])[0])(tied)).any()
    far = jnp.arange(5.0)[None] * 300
    assert not np.asarray(jax.grad(lambda s: losses.difference(s, rank[:1])[0])(far)).any()


# The step of a linear model, by hand


def linear_score(params, of):
    x = of.answer_PBMD.reshape(-1, *of.answer_PBMD.shape[2:])
    return (x @ params['head']['kernel'])[..., 0]


def linear_batch(seed, *, candidates, ranked, packs=2, prompts=3):
    rng = np.random.default_rng(seed)
    shape = packs, prompts, candidates
    rank = np.broadcast_to(np.arange(candidates) * ranked, shape).astype(np.int32).copy()
    rank[0, 1] = -1  # nothing there
    if not ranked:
        rank[1, 0, 2:] = -1
    zero = np.zeros(shape, np.float32)
    x = rng.normal(size=(*shape, D)).astype(np.float32)
    return features.Batch(x, x[:, :, 0], rank, zero, zero[..., 0])


PAIRS = linear_batch(0, candidates=2, ranked=True)
SETS = linear_batch(1, candidates=5, ranked=False)
W = np.linspace(-0.4, 0.5, D)
LINEAR = {'objective': train.preference(linear_score), 'spread': meta.spread(linear_score)}
LINEAR |= {'dtype': jnp.float32}


def rows(of):
    """[(x [k, D], rank [k])] of the prompts with something there, in float64."""
    x, rank = of.answer_PBMD.astype(np.float64), of.rank_PBM
    return [(x[p][rank[p] >= 0], rank[p][rank[p] >= 0]) for p in np.ndindex(rank.shape[:2])]


def loss(w):
    """Mean of -log sigmoid over the pairs."""
    gaps = [x[0] - x[1] for x, _ in rows(PAIRS) if len(x)]
    return np.mean(np.logaddexp(0, -np.array(gaps) @ w))


def j(w, sets=SETS):
    return np.mean([apart(x @ w) for x, _ in rows(sets) if len(x)])


def numeric(f, w, h=1e-5):
    """Central differences; h must not take two answers past each other, where J has a kink."""
    return np.array([(f(w + h * e) - f(w - h * e)) / (2 * h) for e in np.eye(len(w))])


INNER = {
    'sgd': lambda g: g,
    'normalised_sgd': lambda g: g / np.sqrt((g**2).sum()),
    'adam': lambda g: g / (abs(g) + 1e-8),
}


@functools.partial(jax.jit, static_argnames=('apply_to', 'inner', 'order', 'fn', 'after'))
def linear_step(state, batch, eta, fn=meta.step, **options):
    options = LINEAR | {'tx': optax.sgd(0.3), 'eta': eta} | options
    return fn(state, {}, batch, jax.random.key(0), **options)


def linear_state(w=W, dtype=jnp.float32):
    learns = {'head': {'kernel': jnp.asarray(w, dtype)[:, None]}}
    return train.State(jnp.int32(0), learns, optax.sgd(0.3).init(learns))


def weights(state):
    return np.asarray(state.trainable['head']['kernel'], np.float64)[:, 0]


def ahead(w, eta, inner='sgd'):
    return w + eta * INNER[inner](numeric(j, w))


@pytest.mark.parametrize('apply_to', ['theta', 'theta_prime'])
@pytest.mark.parametrize('inner', INNER)
def test_the_gradient_ahead_is_applied_where_it_should_be(inner, apply_to):
    eta = 0.7
    new, said = linear_step(
        linear_state(), (PAIRS, SETS), eta, inner=inner, apply_to=apply_to, after=True
    )
    prime = ahead(W, eta, inner)
    g = numeric(loss, prime)
    base = {'theta': W, 'theta_prime': prime}[apply_to]
    np.testing.assert_allclose(weights(new), base - 0.3 * g, atol=2e-6)
    slope = numeric(j, W)
    cosine = g @ slope / np.sqrt((g @ g) * (slope @ slope))
    want = {
        'loss': loss(prime), 'spread': j(W), 'spread_after': j(prime), 'cosine': cosine,
        'inner_step': np.sqrt(((prime - W) ** 2).sum() / (W**2).sum()),
        'inner_unmoved': 0, 'grad_norm': np.sqrt(g @ g),
    }  # fmt: skip
    for name, value in want.items():
        assert float(said[name]) == pytest.approx(value, abs=2e-6, rel=2e-5), name
    assert said['spread_after'] > said['spread']
    # a plain step is far from it
    assert abs(base - 0.3 * g - (W - 0.3 * numeric(loss, W))).max() > 1e-3


@pytest.mark.parametrize('inner', ['sgd', 'normalised_sgd'])
def test_second_order_is_the_gradient_of_the_loss_ahead(inner):
    eta = 0.7
    new, said = linear_step(linear_state(), (PAIRS, SETS), eta, inner=inner, order='second')
    through = numeric(lambda w: loss(ahead(w, eta, inner)), W, h=1e-4)
    np.testing.assert_allclose(weights(new), W - 0.3 * through, atol=1e-5)
    g, slope = numeric(loss, ahead(W, eta, inner)), numeric(j, W)
    assert abs(through - g).max() > 1e-2
    cosine = lambda g: g @ slope / np.sqrt((g @ g) * (slope @ slope))  # noqa: E731
    assert float(said['cosine']) == pytest.approx(cosine(g), rel=2e-5)  # before it is pulled back
    assert abs(cosine(g) - cosine(through)) > 1e-3


def test_the_orders_differ_by_a_hessian_to_the_second_order_in_eta():
    def between(eta):
        """What second order adds to the gradient, without what theory says it does."""
        first, second = (
            weights(linear_step(linear_state(), (PAIRS, SETS), eta, order=o)[0])
            for o in ('first', 'second')
        )
        return (first - second) / 0.3

    hessian = np.array([numeric(lambda w: numeric(j, w)[i], W, h=1e-4) for i in range(D)])
    term = hessian @ numeric(loss, W)
    left = {eta: abs(between(eta) - eta * term).max() for eta in (0.8, 0.4, 0.2)}
    assert left[0.8] < 0.5 * abs(0.8 * term).max()
    for eta in (0.8, 0.4):
        assert 3 < left[eta] / left[eta / 2] < 5


def test_joint_descends_the_loss_less_eta_times_j():
    new, said = linear_step(linear_state(), (PAIRS, SETS), 0.7, apply_to='joint')
    both = numeric(lambda w: loss(w) - 0.7 * j(w), W)
    np.testing.assert_allclose(weights(new), W - 0.3 * both, atol=2e-6)
    assert float(said['grad_norm']) == pytest.approx(np.sqrt(both @ both), rel=1e-4)
    assert 'inner_step' not in said
    with pytest.raises(ValueError, match=r'step 3: found no inner_unmoved.* joint has not'):
        meta.check_moved(3, new, said)


def test_the_published_step_lowers_j_beside_a_plain_one():
    """-eta rate grad J' H_L grad J of a linear model, whose loss curves upwards everywhere."""
    eta, H = 0.02, np.array([numeric(lambda w: numeric(loss, w)[i], W, h=1e-4) for i in range(D)])
    slope = numeric(j, W)
    found = linear_step(linear_state(), (PAIRS, SETS), eta, fn=meta.effect)
    want = -eta * 0.3 * slope @ H @ slope
    assert want < 0
    # J itself curves: between the two ends its slope is not that of the beginning
    end = W - 0.3 * numeric(loss, W)
    want *= (numeric(j, end) @ (H @ slope)) / (slope @ (H @ slope))
    assert float(found.ours - found.plain) == pytest.approx(want, rel=0.05)
    assert float(found.plain) == pytest.approx(j(end) - j(W), rel=1e-4)
    other = linear_batch(2, candidates=5, ranked=False)
    held = linear_step(linear_state(), (PAIRS, SETS), eta, fn=meta.effect, held=other)
    assert float(held.plain) == pytest.approx(j(end, other) - j(W, other), rel=1e-4)
    down = linear_step(linear_state(), (PAIRS, SETS), -eta, fn=meta.effect)
    assert down.ours > down.plain
    kept = linear_step(linear_state(), (PAIRS, SETS), eta, fn=meta.effect, apply_to='theta_prime')
    assert kept.ours > kept.plain


def test_an_optimiser_sees_the_gradient_ahead_and_nothing_else():
    tx, eta, state, w = optax.adam(0.1), 0.7, linear_state(), W
    state = state._replace(opt=tx.init(state.trainable))
    m, v = np.zeros(D), np.zeros(D)
    for t in (1, 2, 3):
        state, _ = meta.step(state, {}, (PAIRS, SETS), jax.random.key(0), tx=tx, eta=eta, **LINEAR)
        g = numeric(loss, ahead(w, eta))
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2
        w = w - 0.1 * (m / (1 - 0.9**t)) / (np.sqrt(v / (1 - 0.999**t)) + 1e-8)
    np.testing.assert_allclose(weights(state), w, atol=1e-4)
    kernel = lambda x: np.asarray(x['head']['kernel'])[:, 0]  # noqa: E731
    np.testing.assert_allclose(kernel(state.opt[0].mu), m, rtol=1e-4, atol=1e-7)
    np.testing.assert_allclose(kernel(state.opt[0].nu), v, rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize('apply_to', ['theta', 'theta_prime'])
def test_weights_decay_from_where_the_update_is_applied(apply_to):
    tx, eta = optax.chain(optax.add_decayed_weights(0.5), optax.sgd(0.3)), 0.7
    state = linear_state()._replace(opt=tx.init(linear_state().trainable))
    options = {'tx': tx, 'eta': eta, 'apply_to': apply_to}
    new, _ = meta.step(state, {}, (PAIRS, SETS), jax.random.key(0), **LINEAR | options)
    prime = ahead(W, eta)
    base = {'theta': W, 'theta_prime': prime}[apply_to]
    want = base - 0.3 * (numeric(loss, prime) + 0.5 * base)
    np.testing.assert_allclose(weights(new), want, atol=2e-6)
    assert abs(prime - W).max() > 1e-2


def test_every_step_has_masks_of_its_own_as_a_plain_one():
    """And those of J are not those of the loss."""

    seen = []

    def listening(objective):
        def said(params, of, key):
            seen.append(float(jax.random.uniform(key)))
            return objective(params, of, key)

        return said

    options = {name: listening(LINEAR[name]) for name in ('objective', 'spread')}
    given, key = {'tx': optax.sgd(0.1), 'objective': options['objective']}, jax.random.key(5)
    for done in (0, 1, 2):
        at = linear_state()._replace(step=jnp.int32(done))
        meta.step(at, {}, (PAIRS, SETS), key, eta=0.1, **LINEAR | given | options)
        train.step(at, {}, PAIRS, key, **given)
    of_j, ours, of_plain = np.reshape(seen, (3, 3)).T
    assert (ours == of_plain).all()
    assert len({*of_j, *ours}) == 6


@pytest.mark.parametrize(
    ('options', 'found'),
    [
        ({'inner': 'newton'}, "inner: found 'newton'.*normalised_sgd"),
        ({'apply_to': 'both'}, "apply_to: found 'both'.*theta_prime"),
        ({'order': 'third'}, "order: found 'third'.*second"),
        ({'apply_to': 'joint', 'order': 'second'}, "joint: found 'sgd' of 'second' order"),
        ({'apply_to': 'joint', 'inner': 'adam'}, "joint: found 'adam'"),
    ],
)
def test_what_is_unknown_raises(options, found):
    with pytest.raises(ValueError, match=found):
        linear_step(linear_state(), (PAIRS, SETS), 0.1, **options)


# An inner step that does nothing


def test_an_inner_step_that_numbers_cannot_hold_is_found_out():
    slope = numeric(j, W)
    state, said = linear_step(linear_state(), (PAIRS, SETS), 5e-6)
    size = 5e-6 * np.sqrt(slope @ slope)
    assert float(said['inner_step']) * np.sqrt(W @ W) == pytest.approx(size, rel=0.05)
    assert said['inner_unmoved'] == 0
    meta.check_moved(1, state, said)
    # near 0.02 to 0.5 numbers of bfloat16 stand 1e-4 to 2e-3 apart
    small = linear_state(dtype=jnp.bfloat16)
    state, said = linear_step(small, (PAIRS, SETS), 5e-6)
    assert (said['inner_step'], said['inner_unmoved']) == (0, 1)
    with pytest.raises(ValueError, match=r'step 7: .*100\.00% .*raise eta'):
        meta.check_moved(7, state, said)
    of_members = lambda *shares: {'inner_unmoved': np.float32(shares)}  # noqa: E731
    meta.check_moved(7, state, of_members(0.985, np.nan))
    with pytest.raises(ValueError, match=r'99\.50%'):
        meta.check_moved(7, state, of_members(0.995, 0.5))
    meta.check_moved(7, state, of_members(np.nan, np.nan))
    with pytest.raises(ValueError, match='100'):
        meta.check_moved(7, state, of_members(0.5, np.nan, 1))


def test_elements_count_as_moved_where_compute_sees_it():
    """Float32 weights that a model casts to bfloat16 may move in vain."""
    w, half = np.linspace(-0.4, 0.5, D) + 1e-4, 2e-3
    slope = numeric(j, w).astype(np.float32)
    to = lambda x: np.asarray(jnp.asarray(x, jnp.float32).astype(jnp.bfloat16))  # noqa: E731
    step = half / abs(slope).max()
    options = LINEAR | {'dtype': jnp.bfloat16}  # which has to be said
    run = functools.partial(meta.step, tx=optax.sgd(0.3), eta=step, **options)
    _, said = run(linear_state(w), {}, (PAIRS, SETS), jax.random.key(0))
    want = (to(w + step * slope) == to(w)).mean()
    assert 0 < want < 1
    assert float(said['inner_unmoved']) == pytest.approx(want)
    with pytest.raises(TypeError, match='dtype'):
        meta.step(linear_state(), {}, (PAIRS, SETS), jax.random.key(0), tx=optax.sgd(0.3),
                  **{k: v for k, v in LINEAR.items() if k != 'dtype'})  # fmt: skip
    # and elements that J does not move at all say nothing
    blind = SETS._replace(answer_PBMD=SETS.answer_PBMD * np.float32([1, 1, 1, 0, 0]))
    _, said = linear_step(linear_state(), (PAIRS, blind), 0.1)
    assert said['inner_unmoved'] == 0
    tied = SETS._replace(answer_PBMD=SETS.answer_PBMD * np.float32(0))
    state, said = linear_step(
        linear_state(), (PAIRS, tied), 0.1, order='second', inner='normalised_sgd'
    )
    assert (said['inner_unmoved'], said['inner_step'], said['cosine']) == (0, 0, 0)
    np.testing.assert_allclose(weights(state), W - 0.3 * numeric(loss, W), atol=1e-6)
