"""Pair statistics against loops, intervals against simulation, scores against one row at a time."""

import functools
import itertools

import jax
import numpy as np
import plain
import pytest

from jaxrm import evaluate, heads, packing, reward, sharding
from jaxrm.backbones.layers import Decoder
from jaxrm.data import Preference

RM = reward.RewardModel(Decoder(plain.TINY), heads.Scalar())
TOKENS = plain.random_tokens([2, 3, 1, 4, 2, 0, 2, 3] * 3)


def random_set(n=200, seed=0):
    """Ranks with ties and absent candidates, and scores of few values, so that they tie too."""
    rng = np.random.default_rng(seed)
    sizes = rng.integers(1, 6, n)
    ranks = [tuple(rng.integers(-1, 4, m).tolist()) for m in sizes]
    return ranks, [rng.integers(-2, 3, m).astype(np.float32) / 4 for m in sizes]


def brute_force(ranks, scores):
    """[n, 3] of plain loops over ordered pairs."""
    out = []
    for rank, score in zip(ranks, scores, strict=True):
        gaps = []
        for i, j in itertools.permutations(range(len(rank)), 2):
            if rank[i] >= 0 and rank[j] >= 0 and rank[i] < rank[j]:
                gaps.append(float(score[i]) - float(score[j]))
        n = len(gaps)
        right, tied = sum(g > 0 for g in gaps), sum(g == 0 for g in gaps)
        out.append([right / n, tied / n, sum(gaps) / n] if n else [np.nan] * 3)
    return np.array(out).T


def test_pairs_equal_brute_force():
    ranks, scores = random_set()
    want = brute_force(ranks, scores)
    assert 0 < np.isnan(want[0]).mean() < 1
    np.testing.assert_allclose(evaluate.pairs(ranks, scores), want, rtol=0, atol=1e-12)


def test_swapping_better_and_worse_turns_accuracy_around():
    ranks, scores = random_set(seed=1)
    found = evaluate.pairs(ranks, scores)
    most = 10
    turned = evaluate.pairs([[most - r if r >= 0 else r for r in rank] for rank in ranks], scores)
    np.testing.assert_allclose(turned.accuracy, 1 - found.accuracy - found.ties, rtol=0, atol=1e-15)
    np.testing.assert_array_equal(turned.ties, found.ties)
    np.testing.assert_allclose(turned.margin, -found.margin, rtol=0, atol=1e-15)
    pairs = [(0, 1)] * 200
    gaps = np.random.default_rng(2).integers(-1, 2, (200, 2)).astype(np.float32)
    right, wrong = (evaluate.pairs(p, gaps) for p in (pairs, [(1, 0)] * 200))
    assert 0 < right.ties.mean() < 1
    assert (wrong.accuracy == 1 - right.accuracy - right.ties).all()


def test_records_without_a_pair_are_nan():
    ranks = [(0,), (0, 0), (-1, 0), (-1, -1), (0, 1)]
    found = evaluate.pairs(ranks, [np.arange(len(r), dtype=np.float32) for r in ranks])
    np.testing.assert_array_equal(np.isnan(found), [[True] * 4 + [False]] * 3)
    assert evaluate.interval(found.accuracy) == (0, 0, 0)


def test_an_empty_set():
    assert [x.shape for x in evaluate.pairs([], [])] == [(0,)] * 3
    assert np.isnan(evaluate.interval(np.zeros(0))).all()


def test_close_scores_are_no_tie():
    scores = [np.array([1, np.nextafter(np.float32(1), np.float32(2))], np.float32)]
    assert evaluate.pairs([(1, 0)], scores).accuracy == 1
    assert evaluate.pairs([(0, 1)], scores) == (0, 0, -(2.0**-23))


@pytest.mark.parametrize(
    ('ranks', 'scores'),
    [
        ([(0, 1)], [np.zeros(3)]),
        ([(0, 1, 2)], [np.zeros(2)]),
        ([(0, 1)] * 2, [np.zeros(2)]),
    ],
)
def test_ranks_and_scores_that_do_not_fit(ranks, scores):
    with pytest.raises(ValueError):  # noqa: PT011
        evaluate.pairs(ranks, scores)


def test_ranks_of_records():
    records = [Preference('a', ('b', 'c'), ranks=(1, 0)), Preference('a', ('b', 'c', 'd'))]
    assert evaluate.ranks(records) == [(1, 0), (0, 0, 0)]


def test_interval_equals_resampling_one_by_one():
    x = np.random.default_rng(0).normal(size=60)
    draws = [
        np.random.default_rng([1, i]).choice(x, 60, replace=True).mean() for i in range(20_000)
    ]
    low, high = np.quantile(draws, [0.025, 0.975])
    found = evaluate.interval(x, draws=20_000)
    assert found.mean == x.mean()
    np.testing.assert_allclose(found[1:], (low, high), rtol=0, atol=0.01)


def test_interval_leaves_out_nan_and_repeats_itself():
    x = np.random.default_rng(0).normal(size=50)
    with_gaps = np.insert(x, [3, 3, 20], np.nan)
    assert evaluate.interval(with_gaps) == evaluate.interval(x) == evaluate.interval(list(x))
    assert evaluate.interval(x) != evaluate.interval(x, seed=1)
    assert evaluate.interval(np.full(9, 0.5)) == (0.5, 0.5, 0.5)
    assert str(evaluate.interval(np.full(9, 0.5))) == '0.500 [0.500, 0.500]'


def test_interval_in_chunks():
    """A set so large that draws come a few at a time."""
    x = np.random.default_rng(0).normal(size=100_000)
    low, high = evaluate.interval(x, draws=200)[1:]
    assert high - low == pytest.approx(2 * 1.96 * x.std() / np.sqrt(len(x)), rel=0.2)


@pytest.mark.parametrize('draw', ['coin', 'normal'])
def test_interval_covers_the_truth(draw):
    """In 3000 simulated test sets of 200 prompts the interval holds the true mean 93 to 97 %."""
    rng = np.random.default_rng(7)
    sets = rng.random((200, 3000)) < 0.7 if draw == 'coin' else rng.normal(size=(200, 3000)) + 0.7
    low, high = np.quantile(evaluate._resampled(sets, 1000, 0), [0.025, 0.975], axis=0)
    np.testing.assert_allclose(evaluate.interval(sets[:, 5], draws=1000)[1:], (low[5], high[5]))
    assert 0.93 <= ((low <= 0.7) & (high >= 0.7)).mean() <= 0.97


def test_paired_is_the_interval_of_the_difference():
    rng = np.random.default_rng(0)
    x = rng.normal(size=100)
    y = x + 0.05 * rng.normal(size=100) - 0.1
    y[3] = np.nan
    found = evaluate.paired(x, y)
    assert found == evaluate.interval(x - y)
    assert found.low > 0 > evaluate.interval(x).low  # what only a paired comparison shows
    turned = evaluate.paired(y, x)
    assert turned.mean == pytest.approx(-found.mean)


# Scores of a set


@functools.cache
def parameters():
    pack = packing.padded(TOKENS, np.array([0]), (4, 16))
    shapes = jax.eval_shape(RM.backbone.init, jax.random.key(0), pack)['params']
    head = plain.random_tree({'kernel': np.zeros((plain.TINY.D, 1))}, 2)
    return {'backbone': plain.random_tree(shapes), 'head': head}


@functools.cache
def one_by_one():
    """[c] scores of one padded row each."""
    rows = packing.padded(TOKENS, np.arange(len(TOKENS.prompt)), (len(TOKENS.length), 16))
    return np.asarray(jax.jit(RM.score)(parameters(), rows))[:, 0]


@pytest.mark.parametrize(
    ('shape', 'packs'),
    [
        (packing.Shape(tokens=48, rows=((4, 8), (4, 16)), prompts=6, candidates=4), 8),
        (packing.Shape(tokens=40, rows=((8, 16),), prompts=3, candidates=5), 16),
        (packing.Shape(tokens=512, rows=((64, 32),), prompts=32, candidates=4), 8),
    ],
)
def test_candidate_scores_equal_one_by_one(shape, packs):
    mesh = sharding.make_mesh(fsdp=2)
    params = sharding.place(parameters(), mesh)
    found = evaluate.candidate_scores(
        jax.jit(RM.score), params, TOKENS, shape, mesh=mesh, packs=packs
    )
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, one_by_one(), rtol=0, atol=1e-5)


def test_scores_by_record():
    found = evaluate.by_record(np.arange(len(TOKENS.length)), TOKENS)
    assert [len(x) for x in found] == [2, 3, 1, 4, 2, 1, 2, 3] * 3
    assert np.concatenate(found).tolist() == list(range(len(TOKENS.length)))
