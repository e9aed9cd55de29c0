"""Strength, folds, recipes and annotations against loops over pairs and files written by hand."""

import gzip
import json
import math

import numpy as np
import pairs_toy as toy
import pytest
import tiny

from jaxrm import annotations, data, strength, strength_report, tokens
from jaxrm.data import DataError, Preference

# Ten reward models' scores of one pair.
CHOSEN = [3.71875, 0.58984375, 3.390625, 0.00680542, -0.6953125]
CHOSEN += [1.0390625, 1.4140625, 0.8359375, 3.078125, 2]
REJECTED = [3.546875, 0.9921875, 2.125, -0.33007812, 1.171875]
REJECTED += [1.2578125, 1.078125, 1.0546875, 3.546875, 2.265625]
MEAN = np.array([-2.0, 0.5, -0.25, 3.0, 0.0, 1.5, -0.25, 9.0, 0.1, 4.0])
ASK = ({'role': 'user', 'content': 'Which one?'},)
ROW = {'chosen': ['Hi', 'Hello', 'Which one?', 'This one.'],
       'rejected': ['Hi', 'Hello', 'Which one?', 'That one.'],
       'mean preference difference': -0.5, 'std preference difference': 0.25,
       'chosen score list': [1.0, 2.0], 'rejected score list': [1.25, 2.75],
       'GPT4 label': 0}  # fmt: skip


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


@pytest.mark.parametrize('name', [*strength.PUBLISHED, 'soft label', 'drop', 'drop + margin'])
@pytest.mark.parametrize(('scale', 'clip'), [(1.0, math.inf), (0.5, 3.0)])
def test_recipes_follow_their_rules(name, scale, clip):
    found = strength.recipe(name, MEAN, share=0.2, alpha=0.3, scale=scale, clip=clip)
    want = expected(name, MEAN, 0.2, 0.3, scale, clip)
    for column, values in zip(found, zip(*want, strict=True), strict=True):
        np.testing.assert_allclose(column.astype(float), np.array(values, float), rtol=1e-6)


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
    strength_report.agreement(rng.random((2, 5)), rng.random((2, 5)), tmp_path / 'c.png')
    lines = {'base': [0.5, 0.6], 'flip': [0.5, 0.7]}
    strength_report.curves({'gold': lines, 'noisy': lines}, [1, 2], tmp_path / 'd.png')
    assert all((tmp_path / f'{x}.png').read_bytes()[1:4] == b'PNG' for x in 'abcd')


# Annotations


def written(path, *rows):
    path.write_text(''.join(json.dumps(row) + '\n' for row in rows))
    return path


@pytest.mark.parametrize('between', [' ', '_'])
def test_annotations_are_read_in_both_spellings(tmp_path, between):
    row = {name.replace(' ', between): value for name, value in ROW.items()}
    plain = {k: v for k, v in row.items() if k != f'GPT4{between}label'}
    path = written(tmp_path / 'a.jsonl', row, {**plain, 'chosen': [*ROW['chosen'][:3], 'Both.']})
    found = annotations.load(path)
    turns = tuple(
        {'role': role, 'content': said}
        for role, said in zip(('user', 'assistant', 'user'), ROW['chosen'][:3], strict=True)
    )
    first = Preference(
        turns, ('This one.', 'That one.'), (0, 1), ratings=((1.0, 2.0), (1.25, 2.75))
    )
    assert found.records[0] == first
    assert found.judge_n.tolist() == [0, -1]
    np.testing.assert_array_equal(found.mean_n, [-0.5, -0.5])
    np.testing.assert_array_equal(found.std_n, [0.25, 0.25])
    np.testing.assert_array_equal(found.score_En2[:, 0], [[1.0, 1.25], [2.0, 2.75]])
    loaded = data.load(path)
    assert loaded.records == found.records
    assert loaded.kind == 'pair'
    assert 'utterances' in loaded.mapping


def test_annotations_are_written_and_read_back(tmp_path):
    made = [
        Preference(ASK, ('This one.', 'That one.'), ranks=(0, 1)),
        Preference(ASK, ('That “one”.', 'This one.'), ranks=(1, 0)),
    ]
    score = np.stack([CHOSEN, REJECTED], 1)[:, None].repeat(2, 1)
    annotations.save(tmp_path / 'out.jsonl.gz', made, score, judge_n=[1, -1])
    with gzip.open(tmp_path / 'out.jsonl.gz', 'rt') as file:
        rows = [json.loads(line) for line in file]
    assert rows[1]['chosen'] == ['Which one?', 'This one.']
    assert rows[0].keys() == ROW.keys()
    assert rows[0]['chosen score list'] == CHOSEN
    assert rows[0]['mean preference difference'] == pytest.approx(-0.1331, abs=5e-5)
    assert rows[0]['std preference difference'] == pytest.approx(0.7560, abs=5e-5)
    found = annotations.load(tmp_path / 'out.jsonl.gz')
    np.testing.assert_array_equal(found.score_En2, score)
    assert found.judge_n.tolist() == [1, -1]
    assert found.records[1].responses == ('This one.', 'That “one”.')
    assert [p.name for p in tmp_path.iterdir()] == ['out.jsonl.gz']


@pytest.mark.parametrize(
    ('change', 'fault'),
    [
        ({'rejected': ['Hi', 'Hello', 'Who?', 'That.']}, 'another prompt than chosen'),
        ({'rejected': ['That.']}, 'rejected: found one utterance'),
        ({'rejected score list': [1.0]}, 'found 1 scores, expected 2'),
        ({'GPT4 label': 2}, 'GPT4 label: found 2, expected 1, 0 or -1'),
        ({'mean preference difference': 'high'}, 'found a string, expected a number'),
        ({'mean preference difference': None}, 'found a value|found null, expected a number'),
        ({'rejected': ROW['chosen']}, 'the same answer as chosen'),
    ],
)
def test_annotations_that_are_wrong_are_refused(tmp_path, change, fault):
    path = written(tmp_path / 'a.jsonl', {**ROW, **change})
    with pytest.raises(DataError, match=rf'a\.jsonl:1: .*({fault})'):
        annotations.load(path)


@pytest.mark.parametrize(
    ('record', 'fault'),
    [
        (Preference('text', ('a', 'b'), (0, 1)), 'expected messages and answers of text'),
        (Preference(({'role': 'system', 'content': 'x'}, *ASK), ('a', 'b'), (0, 1)), 'roles'),
        (Preference(ASK, ('a', 'b')), 'ranks None'),
    ],
)
def test_what_utterances_cannot_hold_is_not_written(tmp_path, record, fault):
    with pytest.raises(DataError, match=f'record 0: .*{fault}'):
        annotations.save(tmp_path / 'a.jsonl', [record], np.zeros((2, 1, 2)))
    assert not any(tmp_path.iterdir())
