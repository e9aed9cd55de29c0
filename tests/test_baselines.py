"""Baselines against brute force and planted preferences."""

import gzip
import json
import os
import pathlib
import random

import numpy as np
import pytest
import scipy.optimize

from jaxrm import baselines
from jaxrm.data import Preference


def record(*responses, ranks=None, prompt='Well?'):
    ranks = tuple(range(len(responses))) if ranks is None else ranks
    return Preference(({'role': 'user', 'content': prompt},), responses, ranks)


def test_longer_wins_counts_characters():
    said = ({'role': 'assistant', 'content': 'four'}, {'role': 'user', 'content': 'five5'})
    (scores,) = baselines.longer_wins([record('abc', said, '')])
    np.testing.assert_array_equal(scores, [3, 10, 0])


def test_accuracy_averages_records_and_halves_ties():
    records = [
        record('a', 'b'),
        record('a', 'b', 'c'),
        record('a', 'b', ranks=(0, 0)),
        record('a', 'b', 'c', ranks=(1, -1, 0)),
        Preference('text', ('a', 'b')),
    ]
    scores = [np.array(s, float) for s in ([1, 1], [3, 1, 2], [0, 9], [1, 9, 2], [1, 2])]
    assert baselines.accuracy(records, scores) == pytest.approx((0.5 + 2 / 3 + 1) / 3)
    swapped = [-s for s in scores]
    total = baselines.accuracy(records, scores) + baselines.accuracy(records, swapped)
    assert total == pytest.approx(1)
    assert np.isnan(baselines.accuracy(records[2:3], scores[2:3]))


def test_the_fit_minimises_the_loss_it_says():
    records = [record('x y', 'y'), record('y', 'x'), record('x x x x', 'z', 'y'), record('z', 'y')]
    model = baselines.bag_of_words(records, l2=0.1, min_count=1)
    counts = {'x y': (1, 1, 0), 'y': (0, 1, 0), 'x': (1, 0, 0), 'x x x x': (2, 0, 0), 'z': (0, 0, 1)}

    def loss(weight):
        total = 0.0
        for r in records:
            s = [np.dot(weight, counts[a]) for a in r.responses]
            pairs = [(i, j) for i in range(len(s)) for j in range(i + 1, len(s))]
            total += np.mean([np.log1p(np.exp(s[j] - s[i])) for i, j in pairs])
        return total / len(records) + 0.05 * np.dot(weight, weight)

    best = scipy.optimize.minimize(loss, np.zeros(3), method='Nelder-Mead', tol=1e-10)
    np.testing.assert_allclose([model.weight[model.index[w]] for w in 'xyz'], best.x, atol=1e-3)


@pytest.mark.parametrize(
    'good, bad, filler',
    [('kind', 'cruel', 'one two three four five'), ('好', '坏', '一 二 三 四 五'), ('!', '?', 'a b c')],
)
def test_planted_words_are_found(good, bad, filler):
    rng = random.Random(0)

    def said(mark):
        words = [*rng.choices(filler.split(), k=6), mark]
        rng.shuffle(words)
        return ('' if mark in '好坏' else ' ').join(words)

    records = [record(said(good), said(bad)) for _ in range(200)]
    model = baselines.bag_of_words(records[:100])
    assert baselines.accuracy(records[100:], model(records[100:])) == 1
    assert model.weight[model.index[good]] > 0 > model.weight[model.index[bad]]


def test_words_are_words_and_other_scripts_characters():
    model = baselines.bag_of_words([record('Naïve café, 你好!', 'かな 한국')], l2=1.0, min_count=1)
    assert set(model.index) == {*'naïve café'.split(), *',你好!かな한국'}


def test_ranks_of_many_candidates_are_used_and_absent_ones_are_not():
    records = [record('a', 'b', 'c', 'd', ranks=(0, 1, 2, -1)) for _ in range(20)]
    model = baselines.bag_of_words(records, l2=0.01)
    (scores,) = model(records[:1])
    assert scores[0] > scores[1] > scores[2]
    assert model.weight[model.index['d']] == 0


def test_shapes_of_scores_follow_the_records():
    model = baselines.bag_of_words([record('a', 'b')] * 4, l2=0.1)
    assert [s.shape for s in model([record('a', 'b'), record('a', 'b', 'zzz')])] == [(2,), (3,)]
    assert model([]) == []


def test_nothing_ranked_is_refused():
    with pytest.raises(ValueError, match='no ranked pair'):
        baselines.bag_of_words([record('a', 'b', ranks=(0, 0)), Preference('text', ('a', 'b'))])


@pytest.mark.skipif('JAXRM_DATA' not in os.environ, reason='needs JAXRM_DATA')
@pytest.mark.parametrize(
    'name, expected', [('hh_harmless', 0.59), ('convarg', 0.79), ('politeness', 0.95)]
)
def test_real_sets_give_known_figures(name, expected):
    def read(split):
        path = pathlib.Path(os.environ['JAXRM_DATA']) / 'preference' / f'{name}.{split}.jsonl.gz'
        with gzip.open(path, 'rt', encoding='utf-8') as lines:
            rows = [json.loads(line) for line in lines]
        return [Preference(tuple(r['prompt']), (r['chosen'], r['rejected']), (0, 1)) for r in rows]

    test = read('test')
    model = baselines.bag_of_words(read('train'))
    assert baselines.accuracy(test, model(test)) == pytest.approx(expected, abs=0.06)
