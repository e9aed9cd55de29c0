"""Strength, folds and recipes against loops over pairs."""

import math

import numpy as np
import pairs_toy as toy
import pytest
import tiny

from jaxrm import strength, strength_report, tokens
from jaxrm.data import Preference

# Ten reward models' scores of one pair.
CHOSEN = [3.71875, 0.58984375, 3.390625, 0.00680542, -0.6953125]
CHOSEN += [1.0390625, 1.4140625, 0.8359375, 3.078125, 2]
REJECTED = [3.546875, 0.9921875, 2.125, -0.33007812, 1.171875]
REJECTED += [1.2578125, 1.078125, 1.0546875, 3.546875, 2.265625]
MEAN = np.array([-2.0, 0.5, -0.25, 3.0, 0.0, 1.5, -0.25, 9.0, 0.1, 4.0])
ASK = ({'role': 'user', 'content': 'Which one?'},)


def test_mean_and_population_deviation_of_published_scores():
    score = np.array([CHOSEN, REJECTED], np.float32).T
    mean, std = strength.strength(strength.gaps(score, toy.pairs(1)))
    np.testing.assert_allclose(mean, [-0.1331], atol=5e-5)
    np.testing.assert_allclose(std, [0.7560], atol=5e-5)  # 0.7969 would be of a sample
    other = toy.pairs(1)._replace(rank=np.array([1, 0], np.int32))
    found = strength.strength(strength.gaps(score, other))
    np.testing.assert_allclose(found.mean_n, -mean)
    np.testing.assert_allclose(found.std_n, std)


def test_scaled_members_weigh_alike():
    gap = np.random.default_rng(0).normal(size=(3, 50)) * [[1.0], [10.0], [0.1]]
    found = strength.strength(gap, scaled=True).mean_n
    rms = [math.sqrt(sum(x * x for x in row) / 50) for row in gap.tolist()]
    want = [sum(gap[e, i] / rms[e] for e in range(3)) / 3 for i in range(50)]
    np.testing.assert_allclose(found, want)


def test_what_has_no_strength_is_refused():
    score = np.zeros((2, 4), np.float32)
    with pytest.raises(ValueError, match='found float16, expected float32'):
        strength.gaps(score.astype(np.float16), toy.pairs(2))
    tied = toy.pairs(2)._replace(rank=np.array([0, 1, 0, 0], np.int32))
    with pytest.raises(ValueError, match=r'record 1: found ranks \[0, 0\], expected an order'):
        strength.gaps(score, tied)
    three = toy.pairs(2)._replace(first=np.array([0, 3, 4]))
    with pytest.raises(ValueError, match='exactly two answers'):
        strength.gaps(score, three)


def test_scores_of_better_and_worse_answers():
    score = np.arange(8, dtype=np.float32).reshape(2, 4)
    of = toy.pairs(2)._replace(rank=np.array([1, 0, 0, 1], np.int32))
    assert strength.sides(score, of).tolist() == [[[1, 0], [2, 3]], [[5, 4], [6, 7]]]
    with pytest.raises(ValueError, match=r'scores: found \[2, 3\], expected \[members, 4\]'):
        strength.sides(score[:, :3], of)


GAP = np.array([[1.0, -2], [0, 0]])
BAD = {
    'one axis': (lambda: strength.strength(GAP[0]), r'differences: found \[2\], .*members, pairs'),
    'no members': (lambda: strength.strength(GAP[:0]), r'differences: found \[0, 2\]'),
    'NaN': (lambda: strength.strength(GAP * [[1], [np.nan]]), r'differences \[1, 0\]: found nan'),
    'flat': (lambda: strength.strength(GAP, scaled=True), 'member 1: found no difference but 0'),
    'share above': (lambda: strength.recipe('flip', MEAN, share=20), 'share: found 20, expected'),
    'share below': (lambda: strength.recipe('drop', MEAN, share=-0.5), 'share: found -0.5'),
    'share NaN': (lambda: strength.lowest(MEAN, np.nan), 'share: found nan, expected from 0 to 1'),
    'alpha': (lambda: strength.recipe('soft label', MEAN, alpha=1.5), 'alpha: found 1.5, expected'),
    'clip': (lambda: strength.recipe('margin', MEAN, clip=0), 'clip: found 0, expected above 0'),
    'scale': (lambda: strength.recipe('margin', MEAN, scale=-1.0), 'scale: found -1.0, expected'),
    'temperature': (lambda: strength.repair(MEAN, temperature=0.0), 'temperature: found 0.0'),
    'no number': (lambda: strength.recipe('flip', MEAN * np.nan), r'strength \[0\]: found nan'),
    'contrary': (lambda: strength.recipe('flip + drop', MEAN), "recipe: found 'flip . drop', exp"),
    'control': (lambda: strength.recipe('margin + flip + random flip', MEAN), 'no two of'),
    'swaps': (lambda: strength.repair(MEAN, swap_n=MEAN[:3] < 0), r'swap_n: found \[3\], .*\[10\]'),
    'noise': (lambda: strength.fit(MEAN, 0.5), 'noise: found 0.5, expected from 0 to below 0.5'),
    'less noise': (lambda: strength.check_fit(MEAN, -0.1), 'noise: found -0.1'),
    'no pairs': (lambda: strength.fit(MEAN[:0], 0.2), r'strength: found \[0\], expected \[pairs\]'),
    'not known': (lambda: strength.fit(MEAN * np.nan, 0.2), 'expected a finite number'),
    'fold': (lambda: strength.out_of_fold(np.ones((2, 3, 4)), np.array([0, 1, -1, 0])),
             'fold of pair 2: found -1, expected 0 to 1'),
    'folds': (lambda: strength.out_of_fold(np.ones((2, 3, 4)), np.array([0, 2, 1, 0])),
              'fold of pair 1: found 2'),
    'fold lengths': (lambda: strength.out_of_fold(np.ones((2, 3, 4)), np.array([0, 1])),
                     r'found \[2, 3, 4\] and \[2\], expected \[K, E, n\]'),
    'groups': (lambda: strength.agreement(MEAN, MEAN > 0, 11), 'found 11, expected 1 to 10'),
    'tokens': (lambda: strength.relabelled(toy.pairs(3), strength.repair(MEAN)),
               r'swap_n: found \[10\], expected \[3\]'),
    'records': (lambda: strength.repaired([], strength.repair(MEAN)), r'expected \[0\], one of'),
}  # fmt: skip


@pytest.mark.parametrize('what', BAD)
def test_what_means_nothing_is_refused(what):
    call, fault = BAD[what]
    with pytest.raises(ValueError, match=fault):
        call()


def test_a_share_and_a_sign_choose_different_pairs():
    low = np.flatnonzero(strength.lowest(MEAN, 0.2))
    assert low.tolist() == [0, 2]  # of the two at -0.25 the first
    assert np.flatnonzero(MEAN < 0).tolist() == [0, 2, 6]
    assert not strength.lowest(MEAN, 0).any()
    assert strength.lowest(MEAN, 1).all()


def test_folds_keep_prompts_together_and_are_balanced():
    prompts = [[f'prompt {i // 2}'] for i in range(200)]
    fold = strength.folds(prompts, 5)
    assert (fold[0::2] == fold[1::2]).all()
    assert np.bincount(fold).tolist() == [40] * 5
    order = np.random.default_rng(0).permutation(200)
    np.testing.assert_array_equal(strength.folds([prompts[i] for i in order], 5), fold[order])
    assert (strength.folds(prompts, 5, seed=1) != fold).any()
    with pytest.raises(ValueError, match='found 1, expected at least 2'):
        strength.folds(prompts, 1)


def test_out_of_fold_takes_members_that_did_not_learn_the_pair():
    fold = np.array([0, 1, 2, 1, 0])
    gap = np.arange(3)[:, None, None] * 100 + np.arange(2)[:, None] * 10 + np.arange(5) + 0.0
    want = [[100 * k + 10 * e + i for i, k in enumerate(fold)] for e in range(2)]
    np.testing.assert_array_equal(strength.out_of_fold(gap, fold), want)
    left = strength.without(toy.pairs(5), fold == 1)
    assert left.rank.reshape(5, 2).tolist() == [[0, 1], [0, 0], [0, 1], [0, 0], [0, 1]]


@pytest.mark.parametrize(('right', 'noise', 'memorised'), [(820, 0.2, False), (870, 0.2, True)])
def test_the_alarm_allows_for_chance(right, noise, memorised):
    """Three standard errors of 1000 labels with 20 % wrong are 3.8 points."""
    found = strength.fit(np.where(np.arange(1000) < right, 1.0, -1.0), noise)
    assert found.accuracy == right / 1000
    assert found.limit == pytest.approx(0.8 + 3 * math.sqrt(0.16 / 1000))
    assert found.memorised == memorised


# Recipes


def expected(name, mean, share, alpha, scale, clip):
    """Rows of (swap, alpha, margin, keep) as the rules say them, one pair at a time."""
    order = sorted(range(len(mean)), key=lambda i: (mean[i], i))
    low = set(order[: round(share * len(mean))])
    rows = []
    for i, mu in enumerate(mean):
        swap = 'flip' in name and i in low
        oriented = -mu if swap else mu
        margin = scale * min(max(oriented, -clip), clip) if 'margin' in name else 0.0
        soft = alpha if 'soft' in name and mu < 0 and not swap else 0.0
        rows.append((swap, soft, margin, not ('drop' in name and i in low)))
    return rows


@pytest.mark.parametrize(
    'name', [*strength.PUBLISHED, 'soft label', 'drop', 'drop + margin', 'flip + soft label']
)
@pytest.mark.parametrize(('scale', 'clip'), [(1.0, math.inf), (0.5, 3.0)])
def test_recipes_follow_their_rules(name, scale, clip):
    found = strength.recipe(name, MEAN, share=0.2, alpha=0.3, scale=scale, clip=clip)
    want = expected(name, MEAN, 0.2, 0.3, scale, clip)
    for column, values in zip(found, zip(*want, strict=True), strict=True):
        np.testing.assert_allclose(column.astype(float), np.array(values, float), rtol=1e-6)


def test_a_rule_by_threshold_is_a_repair():
    for tau in (0.0, -0.25, 1.0):
        low_n = np.less(MEAN, tau)
        turned = strength.repair(MEAN, swap_n=low_n, scale=1.0)
        assert turned.swap_n.tolist() == [m < tau for m in MEAN]
        assert turned.margin_n.tolist() == [np.float32(-m if m < tau else m) for m in MEAN]
        kept = strength.repair(MEAN, keep_n=~low_n)
        assert kept.keep_n.tolist() == [m >= tau for m in MEAN]


def test_soft_labels_by_strength_and_controls():
    everywhere = np.ones(len(MEAN), bool)
    found = strength.repair(MEAN, soft_n=everywhere, temperature=2.0)
    np.testing.assert_allclose(found.alpha_n, [1 - 1 / (1 + math.exp(-m / 2)) for m in MEAN])
    drawn = strength.recipe('random flip', MEAN, share=0.3, seed=4).swap_n
    assert drawn.sum() == 3
    assert (drawn == strength.recipe('random flip', 9 - MEAN, share=0.3, seed=4).swap_n).all()
    with pytest.raises(ValueError, match=r"recipe: found \['turn'\]"):
        strength.recipe('turn + margin', MEAN)


@pytest.mark.parametrize('name', ['flip + margin', 'soft label + margin', 'drop'])
def test_records_and_tokens_are_relabelled_alike(name):
    """Whichever answer stands first; margins are of the better answer, ratings go with theirs."""
    made = [
        Preference(ASK, (f'yes {i}', f'no {i}'), ranks=((0, 1), (1, 0))[i % 2],
                   ratings=((1.0,), (2.0,)), id=str(i))
        for i in range(len(MEAN))
    ]  # fmt: skip
    how = strength.recipe(name, MEAN, share=0.3, alpha=0.3)
    rows = expected(name, MEAN, 0.3, 0.3, 1.0, math.inf)
    records = strength.repaired(made, how)
    encoded = tokens.encode(made, tiny.tokenizer()).tokens
    found = strength.relabelled(encoded, how)
    at = iter(records)
    for i, (swap, alpha, margin, keep) in enumerate(rows):
        better = (i + swap) % 2
        rank, margins = (x[2 * i : 2 * i + 2].tolist() for x in (found.rank, found.margin))
        assert rank == ([better, 1 - better] if keep else [0, 0])
        assert found.smoothing[i] == np.float32(alpha)
        assert margins[better] == pytest.approx(margin)
        assert margins[1 - better] == 0
        if keep:
            record = next(at)
            word = ('yes', 'no')[better]
            assert (record.id, record.responses[0]) == (str(i), f'{word} {i}')
            assert record.ranks == (0, 1)
            assert record.margins == pytest.approx((margin, 0))
            assert record.ratings[0] == (1.0 + better,)
            assert record.smoothing == pytest.approx(alpha)
    assert next(at, None) is None
    assert found.ids is encoded.ids
    with pytest.raises(ValueError, match='record 0: found ranks None'):
        strength.repaired([made[0]._replace(ranks=None)], strength.repair(MEAN[:1]))


# What it is worth


def test_auroc_counts_pairs():
    rng = np.random.default_rng(1)
    score, positive = rng.integers(0, 6, 40), rng.random(40) < 0.3
    wins = [(a > b) + 0.5 * (a == b) for a in score[positive] for b in score[~positive]]
    assert strength.auroc(score, positive) == pytest.approx(np.mean(wins))
    assert math.isnan(strength.auroc(score, np.zeros(40, bool)))


def test_calibration_by_strength():
    rng = np.random.default_rng(2)
    mean, gap = rng.normal(size=90), rng.normal(size=90)
    found = strength.calibration(mean, gap, 3)
    order = sorted(range(90), key=lambda i: mean[i])
    for k, part in enumerate(found):
        brier = [(1 - 1 / (1 + math.exp(-gap[i]))) ** 2 for i in order[30 * k : 30 * k + 30]]
        assert part.brier == pytest.approx(np.mean(brier))


def test_pictures(tmp_path):
    rng = np.random.default_rng(0)
    counts = {'right': rng.integers(0, 9, 10), 'wrong': rng.integers(0, 9, 10)}
    strength_report.histogram(counts, np.linspace(-1, 1, 11), tmp_path / 'a.png')
    strength_report.deciles({'alone': rng.random((10, 3))}, tmp_path / 'b.png')
    by_strength = rng.random((2, 2, 5))
    strength_report.agreement(*by_strength, tmp_path / 'c.png', std_Sk=rng.random((2, 20)))
    lines = {'base': [0.5, 0.6], 'flip': [0.5, 0.7]}
    strength_report.curves({'gold': lines, 'noisy': lines}, [1, 2], tmp_path / 'd.png')
    assert all((tmp_path / f'{x}.png').read_bytes()[1:4] == b'PNG' for x in 'abcd')
