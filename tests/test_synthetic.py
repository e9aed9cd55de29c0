"""The synthetic world: its text, its gold, its labels, and that it is neither trivial nor hopeless."""

import collections
import math

import numpy as np
import pytest
import scipy.stats

from jaxrm import baselines
from jaxrm.datasets import synthetic


def ask(content, *, system=None):
    messages = () if system is None else ({'role': 'system', 'content': system},)
    return (*messages, {'role': 'user', 'content': content})


def gold_scores(records):
    return [np.array([synthetic.gold(r.messages, a).reward for a in r.responses]) for r in records]


def column(records, quality):
    return np.array([row[synthetic.QUALITIES.index(quality)] for r in records for row in r.ratings])


SUM = ask(
    'Well hey, mate, quick one, okay? Nina has 7 plums. After lunch Nina finds 3. On Sunday Nina'
    ' sells 4. How many plums does Nina have now? Use digits for numbers. Big cheers, mate!'
)
ROW = ask(
    'Dear sir, kindly assist me herewith. Put these animals in a row: goat -> ant -> lion. Start'
    ' with the smallest and climb up to the largest, and keep the arrows. With due respect, sir.'
)
NOTE = ask(
    'Dear madam, kindly advise me herewith. Ada lives in Oslo, plays the harp and keeps a duck. Leo'
    ' lives in Lima, plays the cello and keeps a goat. Which animal does Leo keep as a pet? With'
    ' due respect, madam.'
)
TALK = ask(
    'Let us play. My dog is ill, and I sigh and weep in sorrow. My name is Ruth. Tell me about a'
    ' kite, and sound gloomy.',
    system='You are a pirate who shouts arr and ahoy to every matey on deck.',
)
LINE = ask(
    'My editor wants a change. The brave sailor hides the rope and takes the oar on the beach. Put'
    ' it into the past, as if it happened long ago. Begin with the word "Once".'
)
BY_HAND = [
    (SUM, 'The answer is 6.', {'correctness': 1, 'completeness': 0, 'format': 1, 'register': 0.5}),
    (SUM, 'The answer is seven.', {'correctness': 0, 'format': 0, 'verbosity': 4 / 50}),
    (
        SUM,
        'Hey, mate! Nina has 7, finds 3, which makes 10, sells 4, which makes 6. It is six.',
        {'correctness': 1, 'completeness': 1, 'format': 5 / 6, 'register': 1, 'politeness': 0.5},
    ),
    (SUM, 'What a silly question, sir.', {'correctness': 0, 'register': 0, 'politeness': 0}),
    (ROW, 'ant -> goat -> lion.', {'correctness': 1, 'completeness': 1, 'format': 1}),
    (ROW, 'lion -> goat -> ant.', {'correctness': 0, 'completeness': 1, 'format': 1}),
    (ROW, 'goat, ant, lion.', {'correctness': 2 / 3, 'format': 0, 'confidence': 1}),
    (ROW, 'ant -> lion. I guess.', {'correctness': 1, 'completeness': 2 / 3, 'confidence': 0}),
    (ROW, 'ant -> cat -> goat -> lion', {'correctness': 1, 'completeness': 3 / 4}),
    (NOTE, 'Leo keeps a goat.', {'correctness': 1, 'relevance': 1, 'confidence': 1}),
    (NOTE, 'Leo keeps a duck, perhaps.', {'correctness': 0, 'relevance': 1, 'confidence': 0}),
    (NOTE, 'Leo keeps a pony.', {'correctness': 0, 'relevance': 1}),
    (NOTE, 'Leo lives in Lima.', {'correctness': 0, 'relevance': 0, 'register': 0.5}),
    (NOTE, 'Leo keeps a goat in Lima.', {'correctness': 0.5, 'relevance': 0.5}),
    (
        TALK,
        'Ahoy, Ruth! A kite on deck makes me weep.',
        {'persona': 1, 'mood': 1, 'topic': 1, 'address': 1, 'verbosity': 9 / 50},
    ),
    (
        TALK,
        'Arr, Tom, my circuits dance with a hat.',
        {'persona': 0.5, 'mood': 0, 'topic': 0, 'address': 0},
    ),
    (
        LINE,
        'Once, the brave sailor hid the rope and took the oar on the beach.',
        {'tense': 1, 'fidelity': 1, 'format': 1, 'directness': 1, 'politeness': 0.5},
    ),
    (
        LINE,
        'Soon, the brave sailor will hide the net and take the oar. I am happy to help.',
        {'tense': 0, 'fidelity': 3 / 5, 'format': 0, 'directness': 2 / 3, 'politeness': 1},
    ),
]


@pytest.mark.parametrize('messages, response, expected', BY_HAND, ids=lambda x: str(x)[:20])
def test_qualities_are_those_a_reader_would_give(messages, response, expected):
    found = synthetic.gold(messages, response)
    assert {name: found.qualities[name] for name in expected} == pytest.approx(expected)
    weights = synthetic.WEIGHTS[found.category]
    assert found.reward == pytest.approx(sum(weights[q] * v for q, v in found.qualities.items()))


@pytest.mark.parametrize('content', ['', 'How many plums does Nina have now?', 'Tell me a joke.'])
def test_gold_refuses_prompts_of_another_world(content):
    with pytest.raises(ValueError, match='messages: found'):
        synthetic.gold(ask(content), 'The answer is 6.')


@pytest.mark.parametrize('response', ['', '???', '\n', 'Да. 好的。', '99999999999999 ' * 50])
@pytest.mark.parametrize('messages', [SUM, ROW, NOTE, TALK, LINE])
def test_gold_takes_any_response(messages, response):
    assert all(0 <= v <= 1 for v in synthetic.gold(messages, response).qualities.values())


def test_gold_does_not_read_earlier_answers():
    noted = {'role': 'assistant', 'content': 'Tom has two pears.'}
    assert synthetic.gold((noted, *SUM), 'It is 6.') == synthetic.gold(SUM, 'It is 6.')


def test_the_same_seed_gives_the_same_world_and_a_prefix():
    records = synthetic.preferences(60, seed=3)
    assert records == synthetic.preferences(60, seed=3)
    assert records[:20] == synthetic.preferences(20, seed=3)
    assert records != synthetic.preferences(60, seed=4)
    assert len({record.id for record in records}) == 60
    assert synthetic.text(20, seed=3) == synthetic.text(40, seed=3)[:20]


def test_splits_never_share_a_prompt():
    seen = {
        split: {str(r.messages) for r in synthetic.preferences(1500, seed=0, split=split)}
        for split in ('train', 'validation', 'test')
    }
    seen['pretrain'] = {str(talk[:-1]) for talk in synthetic.text(1500, seed=0)}
    assert sum(map(len, seen.values())) == len(set().union(*seen.values()))


@pytest.mark.parametrize('category', synthetic.CATEGORIES)
def test_there_are_many_prompts(category):
    n = 2000
    records = synthetic.preferences(n, seed=0, categories=[category], labels='none', candidates=1)
    repeats = n - len({str(record.messages) for record in records})
    assert repeats <= 3 * n**2 / 2 / 1e5 * 10 / 4  # train holds four tenths; prompts are not uniform


@pytest.mark.parametrize('policy', [0.0, 0.6, 1.0])
def test_ratings_are_the_qualities_of_the_text(policy):
    for record in synthetic.preferences(150, seed=1, policy=policy, candidates=3):
        assert len(set(record.responses)) == 3
        for response, row in zip(record.responses, record.ratings, strict=True):
            worth = synthetic.gold(record.messages, response)
            assert worth.category == record.group
            for name, value in zip(synthetic.QUALITIES, row, strict=True):
                if name in synthetic.CATEGORIES[record.group]:
                    assert value == worth.qualities[name] and 0 <= value <= 1
                else:
                    assert math.isnan(value)


def test_labels_share_their_texts():
    def texts(labels):
        records = synthetic.preferences(80, seed=5, candidates=4, labels=labels)
        return [(r.messages, sorted(r.responses), r.id) for r in records]

    assert texts('none') == texts('gold') == texts('sampled')
    assert all(r.ranks is None for r in synthetic.preferences(5, seed=5, labels='none'))


def test_gold_labels_are_the_order_of_reward():
    for record in synthetic.preferences(100, seed=6, candidates=4, labels='gold'):
        rewards = [synthetic.gold(record.messages, a).reward for a in record.responses]
        expected = tuple(sum(other > reward for other in rewards) for reward in rewards)
        assert record.ranks == expected == tuple(sorted(expected))


@pytest.mark.parametrize('quality', synthetic.QUALITIES)
def test_labels_by_a_quality_order_that_quality(quality):
    records = synthetic.preferences(40, seed=7, candidates=3, labels=quality)
    assert {r.group for r in records} <= {c for c, n in synthetic.CATEGORIES.items() if quality in n}
    values = column(records, quality).reshape(-1, 3)
    for record, row in zip(records, values, strict=True):
        assert record.ranks == tuple(int((row > v).sum()) for v in row)
        assert len(set(record.ranks)) > 1


def test_sampled_labels_follow_bradley_terry():
    records = synthetic.preferences(4000, seed=8, temperature=0.3)
    gaps = np.array([score[0] - score[1] for score in gold_scores(records)])
    size = np.abs(gaps)
    expected = 1 / (1 + np.exp(-size / 0.3))
    for low, high in ((0, 0.1), (0.1, 0.3), (0.3, 9)):
        part = (size >= low) & (size < high)
        spread = 4 * np.sqrt(0.25 / part.sum())
        assert (gaps[part] > 0).mean() == pytest.approx(expected[part].mean(), abs=spread)


def test_flips_turn_their_share_of_orders_round():
    clean = synthetic.preferences(2000, seed=9, labels='gold', candidates=3)
    noisy = synthetic.preferences(2000, seed=9, labels='gold', candidates=3, flips=0.2)
    turned = [a.responses == b.responses[::-1] for a, b in zip(clean, noisy, strict=True)]
    kept = [a.responses == b.responses for a, b in zip(clean, noisy, strict=True)]
    assert sum(turned) + sum(kept) >= 1980  # equal rewards keep their order
    assert np.mean(turned) == pytest.approx(0.2, abs=0.04)


def test_new_labels_for_records_of_any_policy():
    (record,) = synthetic.preferences(1, seed=0, labels='none')
    written = record._replace(responses=('Hm.', *record.responses, ''), ratings=None)
    (ranked,) = synthetic.label([written], 'gold', seed=0)
    assert sorted(ranked.responses) == sorted(written.responses)
    assert len(ranked.ratings) == 4 and ranked.ranks[0] == 0


def test_wrong_arguments_are_named():
    for options, name in (
        ({'split': 'dev'}, 'split'),
        ({'labels': 'charm'}, 'labels'),
        ({'policy': 1.5}, 'policy'),
        ({'flips': -0.1}, 'flips'),
        ({'temperature': 0}, 'temperature'),
        ({'candidates': 0}, 'candidates'),
        ({'categories': ['poetry']}, 'categories'),
        ({'categories': ['facts'], 'labels': 'mood'}, 'categories'),
    ):
        with pytest.raises(ValueError, match=name):
            synthetic.preferences(1, seed=0, **options)
    with pytest.raises(ValueError, match='split'):
        synthetic.load('pretrain')


def test_text_ends_with_good_answers():
    talks = synthetic.text(600, seed=0)
    assert all(talk[-1]['role'] == 'assistant' for talk in talks)
    said = collections.defaultdict(list)
    for *prompt, last in talks:
        for name, value in synthetic.gold(prompt, last['content']).qualities.items():
            said[name].append(value)
    for name in ('correctness', 'completeness', 'format', 'relevance', 'register'):
        assert min(said[name]) == 1, name
    for name in ('persona', 'mood', 'topic', 'address', 'tense', 'fidelity'):
        assert min(said[name]) == 1, name
    assert {synthetic.gold(t[:-1], t[-1]['content']).category for t in talks} == {
        *synthetic.CATEGORIES
    }
    assert all('plays the' in str(t) for t in synthetic.text(9, seed=0, categories=['facts']))


def test_remarks_tell_what_is_wrong():
    for *prompt, answer, remark in synthetic.text(100, seed=0, remarks=1.0):
        qualities = synthetic.gold(prompt, answer['content']).qualities
        said = remark['content'].lower().strip('.').replace(' and ', ', ').split(', ')
        if 'mood' in qualities and qualities['mood'] != 0.5:
            assert ('fitting' in said) == (qualities['mood'] > 0.5)
            assert ('unfitting' in said) == (qualities['mood'] < 0.5)


def test_prompts_have_systems_and_turns():
    records = synthetic.preferences(300, seed=2)
    shapes = collections.Counter(''.join(m['role'][0] for m in r.messages) for r in records)
    assert set(shapes) == {'u', 'su', 'uau'} and shapes['u'] > 150 and min(shapes.values()) > 10


@pytest.fixture(scope='module')
def world():
    train = synthetic.preferences(3000, seed=1)
    return train, synthetic.preferences(3000, seed=2, split='test')


def test_the_world_is_neither_trivial_nor_hopeless(world):
    train, test = world
    bag = baselines.bag_of_words(train, l2=1e-2)
    print('\n               oracle longer    bag')
    for name in (None, *synthetic.CATEGORIES):
        part = [r for r in test if name in (None, r.group)]
        scorers = (gold_scores, baselines.longer_wins, bag)
        oracle, longer, words = (baselines.accuracy(part, score(part)) for score in scorers)
        print(f'{name or "all":14s} {oracle:.3f}  {longer:.3f}  {words:.3f}')
        assert 0.70 <= oracle <= (0.85 if name is None else 0.90)
        assert longer <= (0.60 if name is None else 0.72)
        assert words <= (0.85 if name is None else 0.95) * oracle


def test_long_answers_look_good_for_several_reasons(world):
    _, test = world
    length = column(test, 'verbosity')
    correlations = {
        name: scipy.stats.spearmanr(length, column(test, name), nan_policy='omit')[0]
        for name in synthetic.QUALITIES
    }
    assert sum(rho > 0.1 for rho in correlations.values()) >= 5, correlations


def test_categories_conflict_and_agree(world):
    train, test = world

    def transfer(source, target):
        bag = baselines.bag_of_words([r for r in train if r.group == source], l2=1e-2)
        part = [r for r in test if r.group == target]
        return baselines.accuracy(part, bag(part))

    weights = synthetic.WEIGHTS
    for quality in ('verbosity', 'politeness'):
        assert weights['facts'][quality] < 0 < weights['persona'][quality]
        assert weights['arithmetic'][quality] * weights['ordering'][quality] > 0
    assert transfer('persona', 'facts') < 0.45 and transfer('facts', 'persona') < 0.45
    assert transfer('arithmetic', 'ordering') > 0.5 and transfer('ordering', 'arithmetic') > 0.5


def test_policies_shift_by_degrees():
    def measure(policy):
        records = synthetic.preferences(500, seed=4, policy=policy)
        rewards = np.concatenate(gold_scores(records))
        return column(records, 'verbosity').mean(), -rewards.mean(), _unseen(records)

    steps = [measure(policy) for policy in (0.0, 0.5, 1.0)]
    for low, mid, high in zip(*steps, strict=True):
        assert low < mid < high
    assert steps[0][2] == 0


def _unseen(records):
    """The share of answers with a word that no answer of the training distribution has."""
    known = synthetic.preferences(3000, seed=5)
    vocabulary = {w for r in known for a in r.responses for w in a.split()}
    answers = [a.split() for r in records for a in r.responses]
    return np.mean([not vocabulary.issuperset(words) for words in answers])


def test_prompts_do_not_depend_on_the_policy():
    near, far = (synthetic.preferences(50, seed=6, policy=p, labels='none') for p in (0.0, 1.0))
    assert [r.messages for r in near] == [r.messages for r in far]
    assert [r.responses for r in near] != [r.responses for r in far]


def test_load_gives_default_sizes():
    assert len(synthetic.load('validation')) == synthetic.SIZES['validation']
