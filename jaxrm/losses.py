"""Preference losses and pair statistics: [B, M] in, [B] out; averaging is the objective's.

Rank 0 is best, equal ranks are ties, -1 is absent. Letters: B prompts, M candidates.
"""

import jax
import jax.numpy as jnp

Array = jax.Array


def _present(x_BM: Array, rank_BM: Array) -> Array:
    """0 at absent candidates: NaN there would pass a mask on the loss in the backward direction."""
    return jnp.where(rank_BM >= 0, x_BM, 0)


def _minus(x_BM: Array, rank_BM: Array) -> Array:
    x_BM = _present(x_BM, rank_BM)
    return x_BM[:, :, None] - x_BM[:, None, :]


def ordered(rank_BM: Array) -> Array:
    """[B, M, M] bool: candidate i is present and strictly better than candidate j."""
    i, j = rank_BM[:, :, None], rank_BM[:, None, :]
    return (i >= 0) & (j >= 0) & (i < j)


def pairs(rank_BM: Array) -> Array:
    """[B] number of ordered pairs."""
    return ordered(rank_BM).sum((1, 2))


def mean_over_pairs(x_BMM: Array, rank_BM: Array) -> Array:
    """[B] mean over ordered pairs; 0 where there is none, whatever stands there."""
    total = jnp.where(ordered(rank_BM), x_BMM, 0).sum((1, 2))
    return total / jnp.maximum(pairs(rank_BM), 1)


def bradley_terry(
    score_BM: Array,
    rank_BM: Array,
    *,
    margin_BM: Array | None = None,
    smoothing_B: Array | None = None,
) -> Array:
    """Mean over ordered pairs of -log sigmoid(z), z = score difference - margin difference.

    With smoothing a, -(1 - a) log sigmoid(z) - a log sigmoid(-z) (Secrets of RLHF II, arXiv
    2401.06080, eq. 5). The margin stands inside the sigmoid as in Llama 2 (arXiv 2307.09288,
    eq. 2); Secrets II prints it outside (eq. 6), where it would have no gradient.
    """
    z_BMM = _minus(score_BM, rank_BM)
    if margin_BM is not None:
        z_BMM -= _minus(margin_BM, rank_BM)
    loss_BMM = jax.nn.softplus(-z_BMM)
    if smoothing_B is not None:
        loss_BMM += smoothing_B[:, None, None] * z_BMM  # softplus(z) - softplus(-z) = z
    return mean_over_pairs(loss_BMM, rank_BM)


def centering(score_BM: Array, rank_BM: Array) -> Array:
    """Mean over ordered pairs of the squared sum of their scores (arXiv 2312.09244, section 2)."""
    score_BM = _present(score_BM, rank_BM)
    return mean_over_pairs(jnp.square(score_BM[:, :, None] + score_BM[:, None, :]), rank_BM)


def accuracy(score_BM: Array, rank_BM: Array) -> Array:
    """[B] share of ordered pairs whose better candidate scores strictly higher."""
    return mean_over_pairs((_minus(score_BM, rank_BM) > 0).astype(jnp.float32), rank_BM)


def ties(score_BM: Array, rank_BM: Array) -> Array:
    """[B] share of ordered pairs whose scores are equal."""
    return mean_over_pairs((_minus(score_BM, rank_BM) == 0).astype(jnp.float32), rank_BM)


def margin(score_BM: Array, rank_BM: Array) -> Array:
    """[B] mean over ordered pairs of the score difference."""
    return mean_over_pairs(_minus(score_BM, rank_BM), rank_BM)


def next_token(logits_PNV: Array, ids_PN: Array, pos_PN: Array) -> tuple[Array, Array]:
    """-log p of each token's successor and whether it has one, both [P, N].

    A token's successor is the next one of the stream at the next position: the first token of a
    second candidate has no predecessor beside it and is not counted.
    """
    logits, target = logits_PNV[:, :-1].astype(jnp.float32), ids_PN[:, 1:, None]
    # A select, not a gather, whose transpose would be a slow scatter into [P, N, V].
    picked = jnp.where(jnp.arange(logits.shape[-1])[None, None] == target, logits, 0).sum(-1)
    nll = jax.nn.logsumexp(logits, axis=-1) - picked
    follows = pos_PN[:, 1:] == pos_PN[:, :-1] + 1
    last = ((0, 0), (0, 1))
    return jnp.pad(jnp.where(follows, nll, 0), last), jnp.pad(follows, last)
