"""Linear reward models on pairs of features, many at once: the toy on which strength is measured.

10,000 pairs whose features differ by standard normal numbers in 64 dimensions, one epoch of Adam in
batches of 32. Letters: E members, n pairs, D dimensions.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from jaxrm import losses
from jaxrm.tokens import Tokens

D, PAIRS, BATCH, RATE = 64, 10_000, 32, 0.01


def world(flips, *, temperature=0.0, pairs=PAIRS, width=D, seed=0):
    """Differences x [n, D] in the order of the labels, true gaps [n], and whose labels flipped."""
    rng = np.random.default_rng([seed, width])
    true = rng.normal(size=width)
    true /= np.linalg.norm(true)
    x = rng.normal(size=(pairs, width))
    gap, flipped = x @ true, np.random.default_rng([seed, 1]).random(pairs) < flips
    chance = 1 / (1 + np.exp(-gap / temperature)) if temperature else gap > 0
    better = np.random.default_rng([seed, 2]).random(pairs) < chance
    sign = np.where(better != flipped, 1.0, -1.0)
    return (sign[:, None] * x).astype(np.float32), sign * gap, flipped, true


def pairs(n):
    """Tokens of n pairs, the first answer better; there is nothing in them to read."""
    one, two = np.ones(n, np.int32), np.ones(2 * n, np.int32)
    return Tokens(
        ids=np.zeros(3 * n, np.int32), start=3 * np.arange(n + 1), prompt=one, gate=0 * one,
        first=2 * np.arange(n + 1), length=two, rank=np.tile([0, 1], n).astype(np.int32),
        margin=np.zeros(2 * n, np.float32), rating=np.zeros((2 * n, 0), np.float32),
        smoothing=np.zeros(n, np.float32), group=0 * one - 1, record=np.arange(n),
        candidate=np.tile([0, 1], n).astype(np.int32),
    )  # fmt: skip


def scores(x_nD, w_ED):
    """[E, 2n] float32: the two answers of a pair are half its difference from their mean."""
    half_nE = (x_nD @ w_ED.T).astype(np.float32) / 2
    return np.stack([half_nE, -half_nE], 1).reshape(-1, len(w_ED)).T


def learned(x_EnD, lessons, *, seeds, epochs=1, rate=RATE):
    """w_ED of a member for each lesson, Tokens of which only the labels count.

    x_EnD has a leading 1 where all learn from the same pairs.
    """
    of = lambda name, *shape: jnp.stack([getattr(t, name).reshape(*shape) for t in lessons])  # noqa: E731
    labels = of('rank', -1, 2), of('margin', -1, 2), of('smoothing', -1)
    share = None if len(x_EnD) == 1 and len(lessons) > 1 else 0
    x = jnp.asarray(x_EnD[0] if share is None else x_EnD)
    keys = jax.vmap(jax.random.key)(np.asarray(seeds))
    return np.asarray(_learn(x, labels, keys, jnp.float32(rate), share, epochs))


@functools.partial(jax.jit, static_argnums=(4, 5))
def _learn(x, labels, keys, rate, share, epochs):
    def one(x_nD, labels, key):
        start, order = jax.random.split(key)
        w_D = 0.01 * jax.random.normal(start, x_nD.shape[1:])
        n = len(x_nD) // BATCH * BATCH
        mixed = jax.vmap(lambda k: jax.random.permutation(k, len(x_nD))[:n])
        at = mixed(jax.random.split(order, epochs)).reshape(-1, BATCH)
        step = functools.partial(_adam, x_nD, labels, rate)
        zero = jnp.zeros_like(w_D)
        return jax.lax.scan(step, (w_D, zero, zero, 0.0), at)[0][0]

    return jax.vmap(one, in_axes=(share, 0, 0))(x, labels, keys)


def _adam(x_nD, labels, rate, state, at_B):
    rank_B2, margin_B2, smoothing_B = (x[at_B] for x in labels)

    def loss(w_D):
        half_B = x_nD[at_B] @ w_D / 2
        score_B2 = jnp.stack([half_B, -half_B], 1)
        each_B = losses.bradley_terry(
            score_B2, rank_B2, margin_BM=margin_B2, smoothing_B=smoothing_B
        )
        return each_B.sum() / jnp.maximum(losses.pairs(rank_B2).sum(), 1)

    w_D, m_D, v_D, t = state
    g_D, t = jax.grad(loss)(w_D), t + 1
    m_D, v_D = 0.9 * m_D + 0.1 * g_D, 0.999 * v_D + 0.001 * g_D**2
    unit_D = m_D / (1 - 0.9**t) / (jnp.sqrt(v_D / (1 - 0.999**t)) + 1e-8)
    return (w_D - rate * unit_D, m_D, v_D, t), None


def accuracy(w_ED, true_D, *, pairs=5000):
    """[E] on pairs with the true labels."""
    x_nD = np.random.default_rng(99).normal(size=(pairs, len(true_D)))
    return ((x_nD @ w_ED.T > 0) == (x_nD @ true_D > 0)[:, None]).mean(0)
