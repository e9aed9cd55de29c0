"""Baselines against sums by hand, a brute-force optimum, and what is known of real data."""

import numpy as np
import pytest
import scipy.optimize

from jaxrm import baselines, data
from jaxrm.data import Preference


def pair(better, worse, ranks=(0, 1)):
    return Preference('', (better, worse), ranks)


def random_sets(n=60, seed=0):
    """Records of one to four answers of six words, with ties and absent candidates."""
    rng = np.random.default_rng(seed)
    vocabulary = np.array('red green blue, small! tall'.split())
    records = []
    for size in rng.integers(1, 5, n):
        answers = [' '.join(rng.choice(vocabulary, rng.integers(1, 7))) for _ in range(size)]
        records.append(Preference('', tuple(answers), tuple(rng.integers(-1, 3, size).tolist())))
    return records


def objective(records, column, l2):
    """Loss + l2 |w|^2 / 2 by loops, as a function of w."""
    pairs = []
    for record in records:
        found = [
            (a, b)
            for a, i in zip(record.responses, record.ranks, strict=True)
            for b, j in zip(record.responses, record.ranks, strict=True)
            if 0 <= i < j
        ]
        pairs += [(a, b, len(found)) for a, b in found]
    n = sum(1 / size for *_, size in pairs)

    def features(text):
        tokens = text.replace(',', ' , ').replace('!', ' ! ').split()
        return np.array([tokens.count(word) ** 0.5 for word in column])

    def value(w):
        total = sum(
            np.log1p(np.exp(-w @ (features(a) - features(b)))) / size for a, b, size in pairs
        )
        return total / n + l2 / 2 * w @ w

    return value


@pytest.mark.parametrize('l2', [1e-3, 0.1])
def test_optimum_by_finite_differences(l2):
    records = random_sets()
    model = baselines.bag_of_words(records, l2=l2)
    assert set(model.column) == {'red', 'green', 'blue', 'small', 'tall', ',', '!'}
    value = objective(records, model.column, l2)
    slope = scipy.optimize.approx_fprime(model.weight, value, 1e-6)
    assert np.abs(slope).max() < 1e-4
    found = scipy.optimize.minimize(value, np.zeros(7), method='BFGS').x
    np.testing.assert_allclose(model.weight, found, rtol=0, atol=2e-2)
    assert np.abs(model.weight).max() > 0.1


def test_optimum_in_closed_form():
    """Three of four prefer `yes`: the gap of the two words solves one equation."""
    records = [pair('yes thanks', 'no thanks')] * 3 + [pair('no thanks', 'yes thanks')]
    for l2 in (1e-9, 0.05):
        model = baselines.bag_of_words(records, l2=l2, min_count=1)
        weight = dict(zip(model.column, model.weight, strict=True))
        half = scipy.optimize.brentq(
            lambda g, l2=l2: 0.75 - 1 / (1 + np.exp(-2 * g)) - l2 * g, 0, 5
        )
        assert weight['yes'] == pytest.approx(half, abs=1e-3)
        assert weight['no'] == pytest.approx(-half, abs=1e-3)
        assert weight['thanks'] == 0
        (score,) = model([pair('Yes', 'yes yes no')])
        assert score == pytest.approx([half, (2**0.5 - 1) * half], abs=2e-3)
    assert 2 * half < np.log(3)


def test_each_record_counts_once():
    """A record of four candidates weighs as much as a pair."""
    many = Preference('', ('a', 'b', 'b', 'b'), (0, 1, 1, 1))
    found = baselines.bag_of_words([many, pair('b', 'a')], l2=1e-3)
    np.testing.assert_allclose(found.weight, 0, atol=1e-5)


def test_ties_and_absent_candidates_are_no_pairs():
    records = [pair('good', 'bad'), pair('fine', 'bad')] * 3
    idle = [
        pair('odd', 'even', (0, 0)),
        pair('odd', 'even', (0, -1)),
        pair('odd', 'even', None),
        Preference('', ('odd',), (0,)),
    ]
    one, two = (baselines.bag_of_words(r, l2=0.01) for r in (records, records + idle))
    assert one.column == two.column
    np.testing.assert_array_equal(one.weight, two.weight)
    with pytest.raises(ValueError, match='no ranked pair'):
        baselines.bag_of_words(idle)
    partly = Preference('', ('good', 'odd', 'bad'), (0, -1, 1))
    weight = baselines.bag_of_words([partly] * 4, l2=0.01).weight
    assert weight[1] == 0 < weight[0]


def test_words():
    assert baselines._words("Don't PANIC, 42!") == ['don', "'", 't', 'panic', ',', '42', '!']
    assert baselines._words('你好,ABC世界。') == ['你', '好', ',', 'abc', '世', '界', '。']
    assert baselines._words('カナと한글') == list('カナと한글')
    assert baselines._words('naïve Привет') == ['naïve', 'привет']
    turns = ({'role': 'assistant', 'content': 'one two'}, {'role': 'user', 'content': 'three'})
    assert baselines._words(turns) == ['one', 'two', 'three']


def test_chinese_characters_are_learned():
    records = [pair('我很高兴', '我不知道'), pair('高兴地说', '他不说')] * 4
    model = baselines.bag_of_words(records, l2=0.01)
    weight = dict(zip(model.column, model.weight, strict=True))
    assert weight['不'] < 0 < weight['兴']
    (score,) = model([pair('兴', '不')])
    assert score[0] > score[1]


def test_rare_and_unseen_words_count_for_nothing():
    records = [pair('good once', 'bad'), pair('good', 'bad')]
    model = baselines.bag_of_words(records, l2=0.01)
    assert set(model.column) == {'good', 'bad'}
    assert set(baselines.bag_of_words(records, l2=0.01, min_count=1).column) > {'once'}
    scores = model([Preference('', ('once', 'good', '')), Preference('', ('never',))])
    assert [s.shape for s in scores] == [(3,), (1,)]
    np.testing.assert_array_equal(scores[0][[0, 2]], 0)


def test_choice_of_l2():
    """The strength that does best on the last fifth, ever the same."""
    rng = np.random.default_rng(0)
    noisy = []
    for _ in range(300):
        words = [f'w{i}' for i in rng.integers(0, 400, 20)]
        better, worse = ' '.join([*words[:10], 'good']), ' '.join(words[10:])
        noisy.append(pair(*((better, worse) if rng.random() < 0.7 else (worse, better))))
    one, two = (baselines.bag_of_words(noisy) for _ in range(2))
    assert one.l2 == two.l2
    np.testing.assert_array_equal(one.weight, two.weight)

    def held(l2):
        scores = baselines.bag_of_words(noisy[:240], l2=l2)(noisy[240:])
        return np.mean([(s[0] > s[1]) + 0.5 * (s[0] == s[1]) for s in scores])

    assert held(one.l2) == max(held(10.0**k) for k in range(-5, 0))
    assert one.l2 >= 1e-2  # so many words, so few records
    given = baselines.bag_of_words(noisy, l2=one.l2)
    np.testing.assert_array_equal(given.weight, one.weight)


def test_longer_wins():
    turns = ({'role': 'assistant', 'content': 'abc'}, {'role': 'user', 'content': 'de'})
    found = baselines.longer_wins([pair('four', ''), Preference('', (turns, '你好', 'x'))])
    np.testing.assert_array_equal(found[0], [4, 0])
    np.testing.assert_array_equal(found[1], [6, 2, 1])


@pytest.mark.parametrize(
    ('name', 'longer', 'words', 'within'),
    [
        ('hh_harmless', 0.49, 0.59, 0.04),
        ('politeness', 0.58, 0.95, 0.06),  # 116 pairs
        ('convarg', 0.82, 0.79, 0.04),
    ],
)
def test_real_data(data_dir, name, longer, words, within):
    """Accuracies that simple models of others reach on these files."""
    train, test = (
        data.load(data_dir / 'preference' / f'{name}.{split}.jsonl.gz').records
        for split in ('train', 'test')
    )
    if name == 'convarg':
        train = train[::2]
    model = baselines.bag_of_words(train)
    found = [baselines._accuracy(test, x) for x in (baselines.longer_wins(test), model(test))]
    print(f'{name}: longer {found[0]:.3f}, words {found[1]:.3f} (l2 {model.l2:g})')
    assert found == pytest.approx([longer, words], abs=within)
