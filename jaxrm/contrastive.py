"""Contrastive losses of Secrets of RLHF II (arXiv 2401.06080, section 3.1): items in, [n] out.

An item is a response's feature, or a difference of two; each comes in two views, s and t, which
differ by their dropout masks. An item that is not `here` is in no denominator and in no marginal,
and its loss is 0; averaging is the objective's. Letters: n items, D width, K prototypes, B
prompts, M candidates.
"""

import jax
import jax.numpy as jnp
import numpy as np

Array = jax.Array


# Items


def responses(z_BMD: Array, rank_BM: Array) -> tuple[Array, Array]:
    """Every response's feature [B * M, D], and which of them are there."""
    return z_BMD.reshape(-1, z_BMD.shape[-1]), rank_BM.reshape(-1) >= 0


def differences(z_BMD: Array, rank_BM: Array) -> tuple[Array, Array]:
    """z_i - z_j and z_j - z_i [B * M * (M - 1), D] of candidates i < j, and which are there.

    There are those of candidates of different rank; which of the two is the better changes only
    the order of the items.
    """
    i, j = np.triu_indices(rank_BM.shape[1], 1)
    present_BM = rank_BM >= 0
    here_BT = present_BM[:, i] & present_BM[:, j] & (rank_BM[:, i] != rank_BM[:, j])
    gap_nD = (z_BMD[:, i] - z_BMD[:, j]).reshape(-1, z_BMD.shape[-1])
    return jnp.concatenate([gap_nD, -gap_nD]), jnp.tile(here_BT.reshape(-1), 2)


# Losses


def unit(x: Array, axis: int = -1) -> Array:
    """x over its norm along the axis; 0, with no gradient, where the norm is below 1e-12."""
    square = jnp.sum(jnp.square(x), axis=axis, keepdims=True)
    some = square > 1e-24
    return jnp.where(some, x * jax.lax.rsqrt(jnp.where(some, square, 1)), 0)


def _cosines(x_nD: Array, y_Dm: Array) -> Array:
    """In float32 whatever the accelerator: by default it may round both to fewer bits."""
    return jnp.matmul(x_nD, y_Dm, precision='highest')


def _units(x_nD: Array, here_n: Array) -> Array:
    """0 at absent items: NaN there would pass a mask on the loss in the backward direction."""
    return unit(jnp.where(here_n[:, None], x_nD.astype(jnp.float32), 0))


def simcse(s_nD: Array, t_nD: Array, here_n: Array, *, temperature: float = 0.05) -> Array:
    """-log softmax over items j of cos(s_i, t_j) / temperature, at j = i (eq. 9; one direction).

    The temperature is that of SimCSE (arXiv 2104.08821); Secrets II does not say its own.
    """
    logits_nn = _cosines(_units(s_nD, here_n), _units(t_nD, here_n).T) / temperature
    total_n = jax.nn.logsumexp(logits_nn, axis=1, where=here_n[None, :])
    return jnp.where(here_n, total_n - jnp.diagonal(logits_nn), 0)


def sinkhorn(
    score_nK: Array, here_n: Array, *, epsilon: float = 0.05, iterations: int = 3
) -> Array:
    """Assignments q_nK of items to prototypes: each item's sum to 1, each prototype's to about n/K.

    Sinkhorn-Knopp on exp(score / epsilon) as in SwAV's released code (arXiv 2006.09882), in logs;
    no gradient goes through it.
    """
    here_nK = jnp.broadcast_to(here_n[:, None], score_nK.shape)
    log_nK = jnp.where(here_nK, jax.lax.stop_gradient(score_nK).astype(jnp.float32), 0) / epsilon

    def shared_out(_, log_nK):  # the sums that are aimed at would cancel
        log_nK -= jax.nn.logsumexp(log_nK, axis=0, where=here_nK, keepdims=True)
        return jax.nn.log_softmax(log_nK, axis=1)

    log_nK = jax.lax.fori_loop(0, iterations, shared_out, log_nK)
    return jnp.where(here_nK, jax.nn.softmax(log_nK, axis=1), 0)


def swav(
    s_nD: Array,
    t_nD: Array,
    here_n: Array,
    *,
    prototype_DK: Array,
    temperature: float = 0.1,
    epsilon: float = 0.05,
    iterations: int = 3,
) -> Array:
    """Cross entropy of a view's prototypes against the other view's assignments (eq. 7 and 8).

    The mean over both ways, as in SwAV's released code (arXiv 2006.09882), whose temperature,
    epsilon and iterations these are. Secrets II prints the sum and not these three: its beta for
    the sum is 2 beta here. Prototypes are taken at unit length.
    """
    prototype_DK = unit(prototype_DK.astype(jnp.float32), axis=0)
    s_nK, t_nK = (_cosines(_units(x_nD, here_n), prototype_DK) for x_nD in (s_nD, t_nD))
    q_s, q_t = (sinkhorn(x, here_n, epsilon=epsilon, iterations=iterations) for x in (s_nK, t_nK))
    log_s, log_t = (jax.nn.log_softmax(x / temperature, axis=1) for x in (s_nK, t_nK))
    return -(q_t * log_s + q_s * log_t).sum(1) / 2


def statistics(s_nD: Array, t_nD: Array, here_n: Array) -> dict[str, Array]:
    """What shows a collapse: `feature_variance`, mean over D of that over the items, and cosines.

    `view_cosine` is that of an item's two views, `item_cosine` that of two items in different
    views, both in the mean.
    """
    n = jnp.maximum(here_n.sum(), 1)
    s_nD = jnp.where(here_n[:, None], s_nD.astype(jnp.float32), 0)
    cosine_nn = _cosines(unit(s_nD), _units(t_nD, here_n).T)
    same = jnp.trace(cosine_nn)
    away_nD = jnp.where(here_n[:, None], s_nD - s_nD.sum(0, keepdims=True) / n, 0)
    return {
        'feature_variance': jnp.square(away_nD).sum(0).mean() / n,
        'view_cosine': same / n,
        'item_cosine': (cosine_nn.sum() - same) / jnp.maximum(n * (n - 1), 1),
    }
