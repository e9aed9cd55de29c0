"""Preference losses and pair statistics: [B, M] in, [B] out; averaging is the objective's.

Rank 0 is best, equal ranks are ties, -1 is absent. Letters: B prompts, M candidates, J objectives;
of language modelling P packs, N stream tokens, V vocabulary.
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
    return mean_over_pairs(_logistic(z_BMM, smoothing_B), rank_BM)


def _logistic(z_BMM: Array, smoothing_B: Array | None) -> Array:
    loss_BMM = jax.nn.softplus(-z_BMM)
    if smoothing_B is None:
        return loss_BMM
    return loss_BMM + smoothing_B[:, None, None] * z_BMM  # softplus(z) - softplus(-z) = z


def scaled_bradley_terry(
    score_BM: Array, rank_BM: Array, *, margin_BM: Array, smoothing_B: Array | None = None
) -> Array:
    """Mean over ordered pairs of -m log sigmoid(score difference), m the margin difference.

    Scaled Bradley-Terry of HelpSteer2-Preference (arXiv 2410.01257): m says how much better the
    better answer is, so it has to be positive; a pair of margin 0 weighs nothing.
    """
    loss_BMM = _logistic(_minus(score_BM, rank_BM), smoothing_B)
    return mean_over_pairs(_minus(margin_BM, rank_BM) * loss_BMM, rank_BM)


def robust(
    score_BM: Array,
    rank_BM: Array,
    *,
    epsilon: float,
    margin_BM: Array | None = None,
    smoothing_B: Array | None = None,
) -> Array:
    """((1 - e) L(z) - e L(-z)) / (1 - 2e), mean over ordered pairs, where L is Bradley-Terry.

    The loss of rDPO (arXiv 2403.00409) on rewards: in the mean over labels of which a share e < 1/2
    is flipped, it is L of the right ones. As smoothing a makes L(-z) = L(z) + (1 - 2a) z, it is L
    with smoothing (a - e) / (1 - 2e).
    """
    given_B = 0.0 if smoothing_B is None else smoothing_B
    smoothing_B = jnp.broadcast_to((given_B - epsilon) / (1 - 2 * epsilon), rank_BM.shape[:1])
    return bradley_terry(score_BM, rank_BM, margin_BM=margin_BM, smoothing_B=smoothing_B)


def saturating(
    score_BM: Array,
    rank_BM: Array,
    *,
    epsilon: float = 1e-5,
    margin_BM: Array | None = None,
    smoothing_B: Array | None = None,
) -> Array:
    """Mean over ordered pairs of -log(sigmoid(z) + epsilon), as the code of MOSS-RLHF has it.

    Bradley-Terry up to a ceiling: a pair that is wrong by more than -log(epsilon) teaches nothing,
    whether its label is wrong or the model. To compare with models that learned by it.
    """
    z_BMM = _minus(score_BM, rank_BM)
    if margin_BM is not None:
        z_BMM -= _minus(margin_BM, rank_BM)
    cost = lambda z: -jnp.log(jax.nn.sigmoid(z) + epsilon)  # noqa: E731
    if smoothing_B is None:
        return mean_over_pairs(cost(z_BMM), rank_BM)
    a_BMM = smoothing_B[:, None, None]
    return mean_over_pairs((1 - a_BMM) * cost(z_BMM) + a_BMM * cost(-z_BMM), rank_BM)


def centering(score_BM: Array, rank_BM: Array) -> Array:
    """Mean over ordered pairs of the squared sum of their scores (arXiv 2312.09244, section 2)."""
    score_BM = _present(score_BM, rank_BM)
    return mean_over_pairs(jnp.square(score_BM[:, :, None] + score_BM[:, None, :]), rank_BM)


def difference(score_BM: Array, rank_BM: Array) -> Array:
    """(2 / k^2) sum over i < j of sigmoid |r_i - r_j|, of the k candidates that are there.

    How far apart a model scores answers that nobody ordered (Secrets of RLHF II, arXiv 2401.06080,
    eq. 11), to be maximised: (k - 1) / 2k where all tie, below (k - 1) / k. Ties have no gradient.
    """
    here_BM = rank_BM >= 0
    other_MM = ~jnp.eye(rank_BM.shape[1], dtype=bool)
    pair_BMM = here_BM[:, :, None] & here_BM[:, None, :] & other_MM[None]  # each from both sides
    apart_BMM = jax.nn.sigmoid(jnp.abs(_minus(score_BM, rank_BM)))
    count_B = jnp.maximum(here_BM.sum(1), 1)
    return jnp.where(pair_BMM, apart_BMM, 0).sum((1, 2)) / jnp.square(count_B)


def regression(rate_BMJ: Array, rating_BMJ: Array) -> tuple[Array, Array]:
    """Squared error of each rating and whether it is there (not NaN), both [B, M, J].

    Stage 1 of ArmoRM (arXiv 2406.12845, eq. 1), over the ratings that there are.
    """
    here_BMJ = ~jnp.isnan(rating_BMJ)
    gap_BMJ = jnp.where(here_BMJ, rate_BMJ, 0) - jnp.where(here_BMJ, rating_BMJ, 0)
    return jnp.square(gap_BMJ), here_BMJ


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


def log_probability(nll_PN: Array, owner_PN: Array, prompts: int) -> Array:
    """[P, B] log p of the texts whose tokens `owner_PN` gives to a prompt, -1 to none.

    nll_PN is that of `next_token`: what it does not count is missing here, too.
    """
    mine_PNB = owner_PN[:, 1:, None] == jnp.arange(prompts)[None, None]
    return -jnp.where(mine_PNB, nll_PN[:, :-1, None], 0).sum(1)


def generation(log_probability_B: Array, *, beta: float = 0.1) -> Array:
    """-log sigmoid(beta log p(best answer | prompt)): GRM's SFT term (arXiv 2406.10216)."""
    return jax.nn.softplus(-beta * log_probability_B)
