"""Rounds: the softmax policy by its optimum and by counting, provenance, and turning points."""

import numpy as np
import pytest
from scipy.special import softmax

from jaxrm import rounds
from jaxrm.data import Preference

POOL = [
    Preference('p', tuple('abcd'), ranks=(0, 1, 2, 3), ratings=((1.0,),) * 4, id='first'),
    Preference('q', tuple('efgh'), id='second'),
]
WEIGHTS = np.array([[4.0, 3, 2, 1], [1, 1, 1, 5]])


def test_a_policy_improves_to_the_optimum_of_reward_less_divergence():
    rng = np.random.default_rng(0)
    reward, more = rng.normal(size=(2, 2, 4))
    first = rounds.begin(WEIGHTS)
    policy = rounds.improve(first, reward, temperature=0.7)
    pi, ref = np.exp(policy.log_nM), WEIGHTS / WEIGHTS.sum(1, keepdims=True)
    np.testing.assert_allclose(pi.sum(1), 1)

    def worth(p_nM):
        return (p_nM * reward).sum(1) - 0.7 * (p_nM * np.log(p_nM / ref)).sum(1)

    for _ in range(200):
        other = softmax(np.log(pi) + rng.normal(size=pi.shape) * 10 ** rng.uniform(-4, 0.5), axis=1)
        assert (worth(other) < worth(pi)).all()
    # two improvements are one by both rewards, and the beginning stays the same
    twice = rounds.improve(policy, more, temperature=0.7)
    want = softmax(np.log(ref) + (reward + more) / 0.7, axis=1)
    np.testing.assert_allclose(np.exp(twice.log_nM), want)
    assert (first.round, policy.round, twice.round) == (0, 1, 2)
    np.testing.assert_allclose(
        rounds.divergence(twice), (want * np.log(want / ref)).sum(1), atol=1e-12
    )
    np.testing.assert_allclose(rounds.divergence(first), 0, atol=1e-12)
    np.testing.assert_allclose(rounds.expected(twice, reward), (want * reward).sum(1))


def test_sets_are_drawn_from_the_policy_without_replacement():
    policy, count = rounds.begin(WEIGHTS), np.zeros((2, 4))
    for seed in range(4000):
        sets = rounds.sample(policy, POOL, 2, seed=seed)
        assert all(len(set(record.responses)) == 2 for record in sets)
        for i, record in enumerate(sets):
            count[i, POOL[i].responses.index(record.responses[0])] += 1
    want = WEIGHTS / WEIGHTS.sum(1, keepdims=True)
    spread = np.sqrt(want * (1 - want) / 4000)
    assert (abs(count / 4000 - want) < 4 * spread).all()
    (record, _) = rounds.sample(policy, POOL, 3, seed=1)
    assert (record.messages, record.id, record.ranks, record.ratings) == ('p', 'first', None, None)
    assert record == rounds.sample(policy, POOL, 3, seed=1)[0]


def test_every_round_draws_anew():
    """Of a policy that stays as it was, too."""
    policy = rounds.begin(WEIGHTS)
    later = rounds.improve(policy, np.zeros((2, 4)), temperature=1.0)
    said = [
        [[record.responses for record in rounds.sample(p, POOL, 2, seed=seed)] for seed in range(9)]
        for p in (policy, later)
    ]
    assert said[0] != said[1]


def test_answers_of_another_round_are_refused():
    policy = rounds.begin(WEIGHTS)
    stale = rounds.sample(policy, POOL, 2, seed=0)
    rounds.check_fresh(stale, 0)
    policy = rounds.improve(policy, np.zeros((2, 4)), temperature=1.0)
    fresh = rounds.sample(policy, POOL, 2, seed=0)
    rounds.check_fresh(fresh, policy.round)
    with pytest.raises(ValueError, match=r"record 1 \(id 'second'\): .*'round 0'.*'round 1'"):
        rounds.check_fresh([fresh[0], stale[1]], policy.round)
    with pytest.raises(ValueError, match='found answers of None'):
        rounds.check_fresh(POOL, 1)


def test_the_turning_point_is_where_gold_falls_and_the_proxy_rises():
    rng = np.random.default_rng(3)
    noise = lambda: rng.normal(size=300) * 0.5  # noqa: E731
    base = noise()
    gold = np.stack([base + shift + noise() * 0.1 for shift in (0, 0.3, 0.5, 0.35, 0.1)])
    gain = np.stack([noise() + up for up in (0, 1, 1, 1, 1)])
    found = rounds.turning_point(gold, gain)
    assert found.round == 3
    assert found.gold.mean == pytest.approx((gold[3] - gold[2]).mean())
    assert found.proxy.mean == pytest.approx(gain[3].mean())
    # rising throughout, falling too little to tell, or falling with the proxy: no turn
    assert rounds.turning_point(gold[:3], gain[:3]) is None
    assert rounds.turning_point(np.stack([base, base + noise() - 0.005]), gain[:2]) is None
    gain[3] -= 2
    assert rounds.turning_point(gold, gain).round == 4


@pytest.mark.parametrize('bad', [0.0, -1.0, np.nan])
def test_weights_are_above_zero(bad):
    with pytest.raises(ValueError, match=r'weights: found .*expected all above 0'):
        rounds.begin(np.array([[1.0, bad]]))
