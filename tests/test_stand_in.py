"""The stand-in judge of the synthetic world errs as it is told, by closed forms."""

import math

import numpy as np
import pytest

from jaxrm import judge
from jaxrm.datasets import stand_in, synthetic
from jaxrm.judge import Question


def verdicts(records, answer, points=None):
    return list(judge.verdicts(judge.comparisons(records, points), answer))


def world(n, **options):
    return synthetic.preferences(n, seed=5, categories=['facts', 'arithmetic'], **options)


POINTS = {name: dict.fromkeys(synthetic.CATEGORIES[name], '') for name in ('facts', 'arithmetic')}


def truth(record, capability, answer):
    found = synthetic.gold(record.messages, answer)
    return found.reward if capability is None else found.qualities[capability]


@pytest.mark.parametrize('points', [POINTS, None])
def test_a_perfect_stand_in_finds_every_difference(points):
    records = world(40, candidates=3)
    found = verdicts(records, stand_in.judge(), points)
    for verdict in found:
        asked = verdict.asked
        texts = records[asked.record].responses
        a, b = (
            truth(records[asked.record], asked.capability, texts[m]) for m in (asked.a, asked.b)
        )
        want = asked.a if a > b else asked.b if b > a else None
        assert verdict.winner() == want, asked
    said = judge.statistics(found, records)['all']
    assert (said.retention < 1) == (points is not None)  # qualities tie, rewards hardly ever
    assert said.retention > 0.3


def gaps(records, capability):
    """|difference| of the pairs that differ."""
    out = [
        truth(r, capability, r.responses[0]) - truth(r, capability, r.responses[1]) for r in records
    ]
    return np.abs([x for x in out if x])


def normal(x):
    return 0.5 * (1 + math.erf(x / math.sqrt(2)))


def rightly(found, records, capability):
    """(kept, right) among the pairs that differ."""
    kept = []
    for verdict in found:
        asked, texts = verdict.asked, records[verdict.asked.record].responses
        a, b = (truth(records[asked.record], capability, texts[m]) for m in (asked.a, asked.b))
        if a != b and (winner := verdict.winner()) is not None:
            kept.append(winner == (asked.a if a > b else asked.b))
    return len(kept), np.mean(kept)


def test_opinions_survive_the_swap_and_wavering_does_not():
    """Right with probability Phi(gap / noise), kept or not as the closed forms say."""
    records = synthetic.preferences(800, seed=6, categories=['facts'])
    points = {'facts': {'verbosity': ''}}
    gap = gaps(records, 'verbosity')
    right = np.array([normal(x / 0.2) for x in gap])
    error = 4 * math.sqrt(0.25 / len(gap))

    kept, share = rightly(
        verdicts(records, stand_in.judge(noise=0.2), points), records, 'verbosity'
    )
    assert kept == len(gap)
    assert abs(share - right.mean()) < error
    kept, share = rightly(
        verdicts(records, stand_in.judge(waver=0.2), points), records, 'verbosity'
    )
    both, neither = right**2, (1 - right) ** 2
    assert abs(kept / len(gap) - (both + neither).mean()) < error
    assert abs(share - both.sum() / (both + neither).sum()) < error
    assert right.mean() + 0.05 < share  # what the filter is for


def test_stand_in_settings_are_per_capability_and_repeatable():
    records = world(60)
    answer = stand_in.judge(position={'correctness': 1.0}, garbage={'relevance': 1.0}, seed=1)
    found = verdicts(records, answer, POINTS)
    said = judge.statistics(found, records)
    assert said['facts/correctness'].kept == said['arithmetic/correctness'].kept == 0
    assert said['facts/correctness'].position_bias == 1
    assert said['facts/relevance'].unparseable == 1
    assert said['facts/verbosity'].retention > 0.9
    assert verdicts(records, answer, POINTS) == found
    noisy = [verdicts(records, stand_in.judge(noise=0.3, seed=s), POINTS) for s in (1, 1, 2)]
    assert noisy[0] == noisy[1] != noisy[2]


def test_the_stand_in_is_told_wrong():
    question = Question('Which river?', 'a', 'b', None)
    with pytest.raises(ValueError, match='expected a prompt of the synthetic world'):
        stand_in.judge()(question)
    (asked,) = judge.comparisons(world(1), None)
    with pytest.raises(ValueError, match="capability: found 'charm'"):
        stand_in.judge()(asked.questions[0]._replace(capability='charm'))
    with pytest.raises(ValueError, match=r'position: found 1\.5'):
        stand_in.judge(position=1.5)
