"""Rounds of a policy and a reward model: whose answers are whose, how far it went, where it turned.

The policy is explicit: for every prompt a softmax over a pool of answers, which improves by the
rewards of its answers and needs no model that writes. Round r learns from answers of the policy of
round r, and of no other: `group` of a record says whose they are.

Letters: n prompts, M answers in the pool of each, R rounds.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from jaxrm.data import Preference
from jaxrm.intervals import Interval, interval, paired

Array = np.ndarray


class Policy(NamedTuple):
    """Log-probabilities of the answers, of the policy it all began with, and the round it is of."""

    log_nM: Array
    reference_nM: Array
    round: int = 0


def begin(weight_nM: Array) -> Policy:
    """The policy of round 0, by weights of the answers; ValueError for one that is not above 0."""
    weight_nM = np.asarray(weight_nM, np.float64)
    if not (weight_nM > 0).all():
        raise ValueError(f'weights: found {weight_nM.min()}, expected all above 0')
    log_nM = _normal(np.log(weight_nM))
    return Policy(log_nM, log_nM)


def improve(policy: Policy, reward_nM: Array, *, temperature: float) -> Policy:
    """The policy of the next round: pi exp(reward / temperature).

    It has the most reward less `temperature` times its divergence from this round's.
    """
    log_nM = policy.log_nM + np.asarray(reward_nM, np.float64) / temperature
    return Policy(_normal(log_nM), policy.reference_nM, policy.round + 1)


def _normal(log_nM: Array) -> Array:
    top_n1 = log_nM.max(1, keepdims=True)
    return log_nM - top_n1 - np.log(np.exp(log_nM - top_n1).sum(1, keepdims=True))


def expected(policy: Policy, x_nM: Array) -> Array:
    """[n] mean of a value of the answers."""
    return (np.exp(policy.log_nM) * x_nM).sum(1)


def divergence(policy: Policy) -> Array:
    """[n] KL(pi || pi of round 0), in nats."""
    return expected(policy, policy.log_nM - policy.reference_nM)


# Whose answers


def name(round: int) -> str:
    """The `group` of a record of this round."""
    return f'round {round}'


def sample(
    policy: Policy, pool: Sequence[Preference], answers: int, *, seed: int
) -> list[Preference]:
    """Sets of different answers that the policy gives, in the order of their drawing, unranked.

    Drawn without replacement, by the largest log-probabilities and Gumbel noise.
    """
    rng = np.random.default_rng([seed, policy.round])
    order_nM = np.argsort(-(policy.log_nM + rng.gumbel(size=policy.log_nM.shape)), axis=1)
    return [
        record._replace(
            responses=tuple(record.responses[m] for m in order_M[:answers]),
            ranks=None, margins=None, ratings=None, group=name(policy.round),
        )
        for record, order_M in zip(pool, order_nM, strict=True)
    ]  # fmt: skip


def check_fresh(records: Sequence[Preference], round: int) -> None:
    """Raises ValueError naming the first record that is not of the policy of this round."""
    for i, record in enumerate(records):
        if record.group != name(round):
            found = f'found answers of {record.group!r}, expected {name(round)!r}'
            raise ValueError(f'record {i} (id {record.id!r}): {found}')


# Where it turned


class Turn(NamedTuple):
    """The first round whose policy lost gold while it gained by its model, and how much of both."""

    round: int
    gold: Interval
    proxy: Interval


def turning_point(gold_Rn: Array, gain_Rn: Array) -> Turn | None:
    """When it would have been better to stop: by gold rewards of each round's policy, by prompt.

    Row 0 is of round 0. `gain_Rn` is what a policy has over the one before it by the model it was
    improved with: models of two rounds do not compare. A change counts where its 95 % interval over
    prompts does not hold 0; None without such a round.
    """
    for r in range(1, len(gold_Rn)):
        gold, proxy = paired(gold_Rn[r], gold_Rn[r - 1]), interval(gain_Rn[r])
        if gold.high < 0 < proxy.low:
            return Turn(r, gold, proxy)
    return None
