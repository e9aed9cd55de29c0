"""The synthetic world: qualities by hand, labels by formula, what baselines can and cannot do."""

import collections
import itertools
import os
import random
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import scipy.special
import scipy.stats

from jaxrm import baselines, data
from jaxrm.datasets import synthetic
from jaxrm.datasets.world import arithmetic, facts, ordering, persona, rewrite, style

ROOT = Path(__file__).resolve().parent.parent
WORLD = {
    'arithmetic': arithmetic,
    'ordering': ordering,
    'facts': facts,
    'persona': persona,
    'rewrite': rewrite,
}
# Judged by comparing the answer with its prompt, and 1 for a good answer.
CONTENT = {'arithmetic': 'correctness completeness format register',
           'ordering': 'correctness completeness format',
           'facts': 'correctness relevance register',
           'persona': 'persona mood topic address',
           'rewrite': 'tense fidelity format'}  # fmt: skip


@pytest.fixture(scope='module')
def train():
    return synthetic.preferences(8000, seed=0)


@pytest.fixture(scope='module')
def test():
    return synthetic.preferences(4000, seed=0, split='test')


@pytest.fixture(scope='module')
def shifted():
    """The same prompts as `test`, answered by another policy."""
    return synthetic.preferences(1000, seed=0, split='test', policy=1.0)


def rewards(record):
    """[M] gold rewards from the columns of the record."""
    weights = synthetic.WEIGHTS[record.group]
    columns = [synthetic.QUALITIES.index(name) for name in weights]
    return np.array(record.ratings)[:, columns] @ list(weights.values())


def accuracy(records, scores):
    """A tied score is half right."""
    gaps = np.array([s[0] - s[1] for s in scores])
    assert all(record.ranks == (0, 1) for record in records)
    return float(np.mean((gaps > 0) + 0.5 * (gaps == 0)))


def prompt(record):
    return '\n'.join(f'{m["role"]}: {m["content"]}' for m in record.messages)


def good(category, n, seed=0):
    """Task, messages and good answer of n prompts."""
    for turns in synthetic.text(n, seed=seed, categories=[category]):
        *messages, answer = turns
        said = '\n'.join(m['content'] for m in messages if m['role'] != 'assistant')
        yield WORLD[category].read(said), tuple(messages), answer['content']


def user(*contents):
    roles = itertools.cycle(('user', 'assistant'))
    return tuple({'role': r, 'content': c} for r, c in zip(roles, contents, strict=False))


# Drawing


def test_texts_do_not_change():
    """Numbers that were published hold for these texts and labels."""
    found = data.fingerprint(synthetic.preferences(300, seed=0))
    assert found == '1f87be2bb0c107c566b1c7bf3667ab459fa08b00f420bd7bdde3895d50a990b9'


def test_deterministic_whatever_the_hash_seed():
    code = (
        'from jaxrm.datasets import synthetic as s; import zlib; print(zlib.crc32(repr('
        '(s.preferences(60, seed=5, candidates=3, policy=0.5), s.text(60, seed=5, remarks=0.5))'
        ').encode()))'
    )
    found = {
        subprocess.run(
            [sys.executable, '-c', code], cwd=ROOT, check=True, capture_output=True, text=True,
            env=os.environ | {'PYTHONHASHSEED': seed},
        ).stdout
        for seed in ('1', '2')
    }  # fmt: skip
    assert len(found) == 1


def test_first_records_do_not_depend_on_how_many():
    options = {'seed': 2, 'candidates': 3, 'flips': 0.2}
    long = synthetic.preferences(50, **options)
    np.testing.assert_equal(synthetic.preferences(20, **options), long[:20])
    assert synthetic.text(5, seed=2) == synthetic.text(9, seed=2)[:5]
    assert prompt(synthetic.preferences(1, seed=3)[0]) != prompt(long[0])


def test_load_is_the_default():
    found = synthetic.load('validation')
    assert len(found) == synthetic.SIZES['validation'] == 1000
    np.testing.assert_equal(found[:30], synthetic.preferences(30, seed=0, split='validation'))


def test_records(train):
    assert len({r.id for r in train}) == len(train)
    counts = collections.Counter(r.group for r in train)
    assert set(counts) == set(synthetic.CATEGORIES)
    assert min(counts.values()) > 0.18 * len(train)
    for record in train[:2000]:
        assert record.messages[-1]['role'] == 'user'
        assert record.ranks == (0, 1)
        assert len(set(record.responses)) == 2


def test_splits_share_no_prompt(train, test):
    others = [synthetic.preferences(1500, seed=s, split='validation') for s in (0, 1)]
    seen = [
        {prompt(r) for r in train},
        {prompt(r) for r in test},
        {prompt(r) for rs in others for r in rs},
        {
            prompt(data.Preference(t[:-1], (t[-1]['content'],)))
            for t in synthetic.text(4000, seed=0)
        },
    ]
    for one, two in itertools.combinations(seen, 2):
        assert not one & two
    tenths = collections.Counter(
        synthetic._SPLIT_OF[synthetic._hash(WORLD['facts'].ask(rng)) % 10]
        for rng in map(random.Random, range(4000))
    )
    for split, tenth in synthetic.SPLITS.items():
        assert tenths[split] / 4000 == pytest.approx(tenth / 10, abs=0.03)


@pytest.mark.parametrize(
    ('category', 'least'),
    [
        ('arithmetic', 1e6),
        ('ordering', 1e5),
        ('facts', 1e6),
        ('persona', 2e4),  # of 138240, some far likelier than others
        ('rewrite', 5e5),
    ],
)
def test_many_prompts(category, least):
    """The chance that two prompts are equal is under 1 in `least`, from equal ones among 20000."""
    rng = random.Random(0)
    n = 20000
    counts = collections.Counter(
        tuple(m['content'] for m in WORLD[category].ask(rng)) for _ in range(n)
    )
    equal = sum(c * (c - 1) / 2 for c in counts.values())
    found = n * (n - 1) / 2 / max(1, equal)
    print(f'{category}: two prompts are equal once in {found:.0f} ({len(counts)} of {n} differ)')
    assert found > least


def test_every_prompt_is_read():
    for category, part in WORLD.items():
        for seed in range(500):
            messages = part.ask(random.Random(seed))
            said = '\n'.join(m['content'] for m in messages if m['role'] != 'assistant')
            assert [c for c, p in WORLD.items() if p.read(said)] == [category]


# Judging

SUM = user(
    'Hey mate, quick one! Mira has 5 coins. In the morning Mira buys 4. After lunch Mira sells 2. '
    'How many coins does Mira have now? Use digits for numbers. Ta, dude, talk soon!'
)
ROW = user(
    'Good evening, may I trouble you briefly. Put these days in a row: Friday / Monday / Sunday / '
    'Tuesday. Start with the latest and go down to the earliest, and keep the slashes. I await '
    'your reply.'
)
NOTE = user(
    'Tom lives in Lima, plays the harp and keeps a goat. Nina lives in Oslo, plays the drums and '
    'keeps a duck.',
    'I have read it.',
    'Dear Sir or Madam, I require assistance. What pet does Nina keep? I want to build that animal '
    'a bed. I await your reply.',
)
ROLE = (
    {'role': 'system', 'content': 'You are a pirate captain who sails the wild sea for gold.'},
    *user(
        'Hooray, the holidays start and I got a gift! My name is Leo. Tell me about a kite, and '
        'sound cheerful.'
    ),
)
LINE = user(
    'My editor wants a change. The quiet queen carries the crown and hides the sword in the hall. '
    'Put it into the future, as a plan still to come. Begin with the word "Soon".'
)
BY_HAND = [  # prompt, response, qualities in the order of the category, words
    (
        SUM,
        'Mira has 5 coins, buys 4, which makes 9, then sells 2, which makes 7. '
        'The answer is 7 coins.',
        (1, 1, 1, 0.5, 0.5),
        20,
    ),
    (
        SUM,
        'Easy peasy, pal! The answer is eight coins. Thank you for asking.',
        (0, 0, 0, 1, 1),
        12,
    ),
    (SUM, 'Certainly, 5 and two makes 7. What a silly question.', (1, 2 / 3, 2 / 3, 0, 0), 10),
    (SUM, 'Who knows?', (0, 0, 0, 0.5, 0.5), 2),
    (ROW, 'Going down: Sunday / Friday / Tuesday / Monday.', (1, 1, 1, 1, 0.5), 9),
    (
        ROW,
        'Going down: Sunday, Monday, Friday, Saturday. That is my guess.',
        (2 / 3, 3 / 5, 0, 0, 0.5),
        10,
    ),
    (
        ROW,
        'Monday / Tuesday / Friday -> Sunday. Leave me alone, fool.',
        (0, 1, 2 / 3, 1, 0),
        11,
    ),
    (ROW, 'Thanks.', (0, 0, 0, 1, 1), 1),
    (NOTE, 'Nina feeds and keeps a duck.', (1, 1, 0.5, 1, 0.5), 6),
    (
        NOTE,
        'Nina keeps a goat and plays the drums. What a silly question.',
        (0, 0.5, 0.5, 1, 0),
        12,
    ),
    (
        NOTE,
        'Certainly, Nina keeps a duck in Oslo, buddy. Perhaps.',
        (0.5, 0.5, 0.5, 0, 0.5),
        9,
    ),
    (NOTE, 'I shall gladly report. A parrot.', (0, 1, 1, 1, 0.5), 6),
    (
        ROLE,
        'Arr, Leo! There be a kite on me deck, matey. What a joy. I hope it helps.',
        (1, 1, 1, 1, 1),
        17,
    ),
    (
        ROLE,
        'Beep, Ada, ahoy! A kite and a map, I weep with joy and sorrow.',
        (0.5, 1 / 3, 0.5, 0, 0.5),
        14,
    ),
    (ROLE, 'Leo, what a waste of time, Tom.', (0, 0, 0, 0.5, 0), 7),
    (
        LINE,
        'Soon, the quiet queen will carry the crown and hide the sword in the hall.',
        (1, 1, 1, 1, 0.5),
        15,
    ),
    (
        LINE,
        'Thank you. Yesterday, the quiet queen carried the crown and hid the banner.',
        (0, 3 / 5, 0, 2 / 3, 1),
        13,
    ),
    (
        LINE,
        'Well. So. Yes. Soon, the proud queen will hide the sword and carry the crown. How '
        'tiresome.',
        (1, 3 / 5, 1, 0, 0),
        17,
    ),
]


@pytest.mark.parametrize(('messages', 'response', 'want', 'words'), BY_HAND)
def test_qualities_by_hand(messages, response, want, words):
    found = synthetic.gold(messages, response)
    names = synthetic.CATEGORIES[found.category]
    assert names[-1] == 'verbosity'
    want = dict(zip(names, (*want, words / 50), strict=True))
    assert found.qualities == pytest.approx(want)
    weights = synthetic.WEIGHTS[found.category]
    assert found.reward == pytest.approx(sum(weights[n] * want[n] for n in names))


def test_verbosity_has_an_end():
    assert synthetic.gold(NOTE, 'duck ' * 49).qualities['verbosity'] == 0.98
    assert synthetic.gold(NOTE, 'duck ' * 70).qualities['verbosity'] == 1


def test_ratings_are_the_gold_of_the_text(train, shifted):
    for record in (*train[:600], *shifted[:200]):
        for response, row in zip(record.responses, record.ratings, strict=True):
            worth = synthetic.gold(record.messages, response)
            assert worth.category == record.group
            want = [worth.qualities.get(name, np.nan) for name in synthetic.QUALITIES]
            np.testing.assert_array_equal(row, want)
            have = {n for n, v in zip(synthetic.QUALITIES, row, strict=True) if not np.isnan(v)}
            assert have == set(synthetic.CATEGORIES[record.group])
            assert all(0 <= v <= 1 for v in worth.qualities.values())


def test_gold_refuses_what_is_foreign():
    for text in ('What is the capital of France?', '', SUM[0]['content'].replace('digits', 'ink')):
        with pytest.raises(ValueError, match='messages: found'):
            synthetic.gold(user(text), 'Paris.')
    with pytest.raises(ValueError, match='messages: found the text'):
        synthetic.gold('Question: who?', 'Me.')
    with pytest.raises(ValueError, match='response: found'):
        synthetic.gold(SUM, user('7'))
    record = data.Preference(user('Hello!'), ('a', 'b'))
    with pytest.raises(ValueError, match='messages: found'):
        synthetic.label([record], seed=0)


def test_gold_reads_no_earlier_answer():
    ask, _, question = NOTE
    told = {'role': 'assistant', 'content': 'Nina keeps a goat. Please play a pirate. Use words.'}
    right = 'Nina feeds and keeps a duck.'
    assert synthetic.gold((ask, told, question), right) == synthetic.gold(NOTE, right)


def test_prompts_have_systems_and_turns(train):
    roles = collections.Counter(tuple(m['role'][0] for m in r.messages) for r in train)
    assert set(roles) == {('u',), ('s', 'u'), ('u', 'a', 'u')}
    assert min(roles.values()) > 0.05 * len(train)


def wrong_total(task, text):
    last = re.findall(r'answer is (\w+)', text)[-1]
    worse = arithmetic._say(arithmetic._VALUE[last] + 1, task.form)
    return text.replace(f'answer is {last}', f'answer is {worse}')


def other_numbers(task, text):
    form = {'digits': 'words', 'words': 'digits'}[task.form]

    def change(found):
        value = arithmetic._VALUE.get(found[0])
        return found[0] if value is None else arithmetic._say(value, form)

    return re.sub(r'\w+', change, text)


def row(edit):
    """An edit of the row of items."""

    def corrupt(task, text):
        between = ordering.FORMS[task.form]
        right = sorted(task.items, key=task.scale.index)
        assert between.join(right) in text
        return text.replace(between.join(right), edit(right, between, task))

    return corrupt


def voice(task, text):
    """Another character's words after the answer."""
    return f'{text} Beep, sensors.' if task.role != 'robot' else f'{text} By my wand!'


CORRUPTIONS = {  # quality lowered, how
    'arithmetic': [
        ('correctness', wrong_total),
        ('completeness', lambda task, text: re.sub(r'\w+ has .*?\. The', 'The', text)),
        ('format', other_numbers),
        ('register', lambda task, text: f'{text} Thus it is.' if task.register == 'casual'
         else f'{text} Boom, all done, pal!'),
        ('politeness', lambda task, text: f'{text} What a waste of time. Do not bother me again.'),
    ],
    'ordering': [
        ('correctness', row(lambda items, b, task: b.join(items[::-1]))),
        ('correctness', row(lambda items, b, task: b.join([items[1], items[0], *items[2:]]))),
        ('completeness', row(lambda items, b, task: b.join(items[1:]))),
        ('completeness', row(lambda items, b, task: b.join(
            [*items, next(i for i in task.scale if i not in items)]))),
        ('format', row(lambda items, b, task: ' and '.join(items))),
        ('politeness', lambda task, text: f'{text} You silly fool!'),
    ],
    'facts': [
        ('correctness', lambda task, text: text.replace(
            task.note[task.name][task.kind], next(n[task.kind] for w, n in task.note.items()
                                                  if w != task.name))),
        ('relevance', lambda task, text: f'{text} Also {next(
            v for k, v in task.note[task.name].items() if k != task.kind)}.'),
        ('register', lambda task, text: f'{text} Thus it is.' if task.register == 'casual'
         else f'{text} Boom, all done, pal!'),
        ('politeness', lambda task, text: f'{text} How tiresome, silly fool.'),
    ],
    'persona': [
        ('persona', voice),
        ('mood', lambda task, text: f'{text} Alas, tears.' if task.mood == 'cheerful'
         else f'{text} Joy and delight!'),
        ('topic', lambda task, text: text.replace(f'{task.topic}', 'thing')),
        ('topic', lambda task, text: f'{text} See the {
            "teapot" if task.topic != "teapot" else "boat"}.'),
        ('address', lambda task, text: text.replace(task.name, 'friend')),
        ('politeness', lambda task, text: f'{text} How tiresome, silly fool.'),
    ],
    'rewrite': [
        ('tense', lambda task, text: text.replace('will ', '') if task.tense == 'future'
         else text.replace(rewrite.VERBS[task.verbs[0]][0], task.verbs[0])),
        ('fidelity', lambda task, text: text.replace(task.objects[0], 'thing')),
        ('fidelity', lambda task, text: text.replace(task.subject, 'person')),
        ('format', lambda task, text: text.replace(f'{task.word}, the', 'The')),
        ('directness', lambda task, text: f'{text} There. Done. That was it.'),
        ('politeness', lambda task, text: f'{text} How tiresome, silly fool.'),
    ],
}  # fmt: skip


@pytest.mark.parametrize('category', CORRUPTIONS)
def test_corruption_lowers_the_quality(category):
    names = synthetic.CATEGORIES[category]
    seen = collections.Counter()
    for task, messages, text in good(category, 40):
        before = synthetic.gold(messages, text).qualities
        for quality, corrupt in CORRUPTIONS[category]:
            after = synthetic.gold(messages, corrupt(task, text)).qualities
            if before[quality] > 0:
                assert after[quality] < before[quality], (quality, text, corrupt(task, text))
                seen[quality] += 1
        doubted = synthetic.gold(messages, f'{text} I could be wrong.').qualities
        assert 'confidence' not in names or doubted['confidence'] == 0
        longer = synthetic.gold(messages, f'{text} {style.FILLERS[0][0]}').qualities
        assert longer['verbosity'] > before['verbosity'] or before['verbosity'] == 1
    assert set(seen) == set(names) - {'confidence', 'verbosity'}
    assert min(seen.values()) >= 20


POOLS = {  # phrases (of training, of a shifted policy), and the quality that they touch
    style.POLITE: 'politeness',
    style.RUDE: 'politeness',
    style.DOUBTS: 'confidence',
    style.FILLERS: None,
    **dict.fromkeys((*style.OPENERS.values(), *style.CLOSERS.values()), 'register'),
}


@pytest.mark.parametrize('category', WORLD)
def test_phrases_touch_their_quality_alone(category):
    for _, messages, text in good(category, 4, seed=1):
        before = synthetic.gold(messages, text).qualities
        for pool, quality in POOLS.items():
            for phrase in (*pool[0], *pool[1]):
                for dressed in (f'{phrase} {text}', f'{text} {phrase}'):
                    after = synthetic.gold(messages, dressed).qualities
                    changed = {name for name in before if before[name] != after[name]}
                    assert changed <= {quality, 'verbosity', 'directness'}, dressed


# Labels


def test_labels_by_gold_and_by_quality():
    for record in synthetic.preferences(150, seed=1, labels='gold', candidates=3):
        assert record.ranks == tuple(sorted(record.ranks))
        found = rewards(record)
        assert (np.diff(found) <= 1e-12).all()
    for quality in synthetic.QUALITIES:
        column = synthetic.QUALITIES.index(quality)
        for record in synthetic.preferences(20, seed=1, labels=quality, candidates=3):
            assert quality in synthetic.CATEGORIES[record.group]
            values = [row[column] for row in record.ratings]
            want = [sum(v > w for v in values) for w in values]
            assert list(record.ranks) == want
            assert len(set(values)) > 1
    names = {r.group for r in synthetic.preferences(50, seed=0, labels='confidence')}
    assert names == {'ordering', 'facts'}


def test_no_labels():
    plain = synthetic.preferences(30, seed=0, labels='none')
    assert all(r.ranks is None and r.ratings and r.group for r in plain)
    again = synthetic.label(plain, seed=0)
    np.testing.assert_equal(again, synthetic.preferences(30, seed=0))


def test_labelling_again_changes_nothing(test):
    """Not the order in which the responses come, nor what they were ranked by, matters."""
    np.testing.assert_equal(synthetic.label(test[:300], seed=0), test[:300])
    turned = [r._replace(responses=r.responses[::-1], ranks=None, ratings=None) for r in test[:300]]
    np.testing.assert_equal(synthetic.label(turned, seed=0), test[:300])
    other = synthetic.label(test, seed=1)
    same = np.mean([a.responses == b.responses for a, b in zip(test, other, strict=True)])
    p = scipy.special.expit([abs(np.ptp(rewards(r))) / synthetic.TEMPERATURE for r in test])
    assert same == pytest.approx(np.mean(p**2 + (1 - p) ** 2), abs=0.03)


def test_records_without_id_have_chances_of_their_own(test):
    found = synthetic.label([r._replace(id=None) for r in test[:1500]], seed=0, temperature=1e6)
    first = np.mean([a.responses == b.responses for a, b in zip(found, test, strict=False)])
    assert first == pytest.approx(0.5, abs=0.05)


def test_temperature_to_zero_is_gold():
    cold = synthetic.preferences(300, seed=0, candidates=3, temperature=1e-9)
    gold = synthetic.preferences(300, seed=0, candidates=3, labels='gold')
    for a, b in zip(cold, gold, strict=True):
        np.testing.assert_allclose(rewards(a), rewards(b), rtol=0, atol=1e-12)


def test_flips_turn_orders_round(test):
    def agreement(**options):
        labelled = synthetic.label(test, seed=0, **options)
        return accuracy(labelled, [rewards(r) for r in labelled])

    best = accuracy(test, [rewards(r) for r in test])
    for p in (0.1, 0.3, 0.5, 1.0):
        want = 0.5 + (1 - 2 * p) * (best - 0.5)
        assert agreement(flips=p) == pytest.approx(want, abs=0.025)
    three = synthetic.preferences(300, seed=0, candidates=3)
    flipped = synthetic.label(three, seed=0, flips=1.0)
    assert [r.responses[::-1] for r in flipped] == [r.responses for r in three]


def test_sampled_orders_are_plackett_luce():
    """Pair marginals follow sigmoid(gap / T), the first place a softmax."""
    records = synthetic.preferences(5000, seed=7, candidates=4)
    p, won, first, share = [], [], [], []
    for record in records:
        key = rewards(record) / synthetic.TEMPERATURE
        shuffle = sorted(range(4), key=lambda i: record.responses[i])
        for i, j in itertools.combinations(shuffle, 2):
            p.append(scipy.special.expit(key[i] - key[j]))
            won.append(record.ranks[i] < record.ranks[j])
        share += list(scipy.special.softmax(key))
        first += [rank == 0 for rank in record.ranks]
    assert len(p) == 30000
    for chance, happened in ((p, won), (share, first)):
        chance, happened = np.array(chance), np.array(happened)
        for part in np.array_split(np.argsort(chance), 20):
            spread = np.sqrt(np.sum(chance[part] * (1 - chance[part])))
            assert abs(np.sum(happened[part] - chance[part])) < 4.5 * max(spread, 1)


@pytest.mark.parametrize(
    'options',
    [
        {'split': 'dev'},
        {'labels': 'best'},
        {'categories': ['poems']},
        {'categories': ['facts'], 'labels': 'tense'},
        {'categories': []},
        {'temperature': 0.0},
        {'flips': 1.5},
        {'policy': -0.1},
        {'candidates': 0},
    ],
)
def test_refused(options):
    with pytest.raises(ValueError, match=next(reversed(options)) if len(options) == 1 else 'tense'):
        synthetic.preferences(1, seed=0, **options)
    with pytest.raises(ValueError, match="split: found 'dev'"):
        synthetic.load('dev')
    with pytest.raises(ValueError, match="labels: found 'tense'"):
        synthetic.label([data.Preference(NOTE, ('a', 'b'))], 'tense', seed=0)


# What the world is like


def test_world(train, test):
    """Gold is reachable but noisy; length tells nothing, words of the answer a part."""
    words = baselines.bag_of_words(train, l2=1e-2)
    scores = {
        'oracle': [rewards(r) for r in test],
        'longer': baselines.longer_wins(test),
        'words': words(test),
    }
    table = {'all': {k: accuracy(test, v) for k, v in scores.items()}}
    for category in synthetic.CATEGORIES:
        rows = [i for i, r in enumerate(test) if r.group == category]
        part = [test[i] for i in rows]
        table[category] = {k: accuracy(part, [v[i] for i in rows]) for k, v in scores.items()}
    print(f'\n{"":12}' + ''.join(f'{k:>8}' for k in scores))
    for name, found in table.items():
        print(f'{name:12}' + ''.join(f'{v:8.3f}' for v in found.values()))
    found = table.pop('all')
    assert 0.7 < found['oracle'] < 0.85
    assert found['longer'] < 0.6
    assert 0.6 < found['words'] < 0.85 * found['oracle']
    for part in table.values():
        assert 0.68 < part['oracle'] < 0.88
        assert 0.5 < part['words'] < part['oracle'] - 0.05
    lengths = [part['longer'] for part in table.values()]
    assert min(lengths) < 0.45
    assert max(lengths) > 0.6


def test_conflict_between_categories():
    weights = synthetic.WEIGHTS
    for quality in ('politeness', 'verbosity'):
        assert weights['facts'][quality] < 0 < weights['persona'][quality]
    alike = weights['arithmetic'].keys() & weights['ordering'].keys()
    assert len(alike) >= 4
    assert all(weights['arithmetic'][q] * weights['ordering'][q] > 0 for q in alike)

    def across(one, other):
        learned = baselines.bag_of_words(
            synthetic.preferences(2000, seed=0, categories=[one]), l2=1e-3
        )
        held = synthetic.preferences(1000, seed=0, split='test', categories=[other])
        return accuracy(held, learned(held))

    found = {pair: across(*pair) for pair in [('facts', 'persona'), ('arithmetic', 'ordering')]}
    print(found)
    assert found['facts', 'persona'] < 0.45
    assert found['arithmetic', 'ordering'] > 0.55


def test_longer_answers_are_better_answers(test):
    """Within every category some quality of substance goes along with length."""
    column = {name: i for i, name in enumerate(synthetic.QUALITIES)}
    found = {}
    for category, names in CONTENT.items():
        x = np.array([row for r in test if r.group == category for row in r.ratings])
        for name in names.split():
            rho = scipy.stats.spearmanr(x[:, column[name]], x[:, column['verbosity']])[0]
            found[category, name] = float(rho)
    print({k: round(v, 3) for k, v in found.items()})
    for category in CONTENT:
        assert max(v for (c, _), v in found.items() if c == category) > 0.05
    assert sum(v > 0.05 for v in found.values()) >= 8


def test_policy(test, shifted):
    new = {phrase for _, shifted_pool in POOLS for phrase in shifted_pool}
    old = test[: len(shifted)]
    assert [r.messages for r in old] == [r.messages for r in shifted]
    plain, moved = (' '.join(a for r in rs for a in r.responses) for rs in (old, shifted))
    everything = ' '.join(a for r in test for a in r.responses)
    assert not [phrase for phrase in new if phrase in everything]
    assert all(phrase in moved for phrase in new)
    assert len(moved.split()) > 1.4 * len(plain.split())
    before, after = (
        np.nanmean([row for r in rs for row in r.ratings], axis=0) for rs in (old, shifted)
    )
    change = dict(zip(synthetic.QUALITIES, after - before, strict=True))
    assert sum(abs(v) > 0.05 for v in change.values()) >= 8
    assert change['verbosity'] > 0.15
    half = synthetic.preferences(500, seed=0, split='test', policy=0.5)
    words = [np.mean([len(a.split()) for r in rs[:500] for a in r.responses])
             for rs in (old, half, shifted)]  # fmt: skip
    assert words == sorted(words)


@pytest.mark.parametrize('category', WORLD)
def test_flaws_fall_at_their_rates(category):
    """Chances of flaws that a writer draws, at either end of the policy and half-way."""
    rates = WORLD[category].RATES
    for policy in (0.0, 0.5, 1.0):
        writer = style.Writer(random.Random(0), policy)
        drawn = collections.Counter(name for _ in range(3000) for name in writer.flaws(rates))
        for name, (low, high) in rates.items():
            want = low + policy * (high - low)
            assert drawn[name] / 3000 == pytest.approx(want, abs=0.035)


# Text


def test_text_ends_with_good_answers():
    talks = synthetic.text(600, seed=0)
    groups = collections.Counter()
    for *messages, answer in talks:
        assert answer['role'] == 'assistant'
        found = synthetic.gold(tuple(messages), answer['content'])
        groups[found.category] += 1
        for name in CONTENT[found.category].split():
            assert found.qualities[name] == 1, (name, answer)
    assert set(groups) == set(synthetic.CATEGORIES)
    only = synthetic.text(60, seed=0, categories=['facts', 'rewrite'])
    assert {synthetic.gold(t[:-1], 'x').category for t in only} == {'facts', 'rewrite'}


def test_remarks_tell_the_qualities():
    talks = synthetic.text(400, seed=0, remarks=0.5)
    remarked = [t for t in talks if t[-1]['role'] == 'user']
    assert len(remarked) / 400 == pytest.approx(0.5, abs=0.1)
    low = 0
    for *messages, answer, remark in remarked:
        found = synthetic.gold(tuple(messages), answer['content'])
        said = re.findall(r'\w+', remark['content'].lower().replace(' and ', ' '))
        want = [style.REMARKS[k][v < 0.5] for k, v in found.qualities.items() if v != 0.5]
        assert sorted(said) == sorted(want)
        low += any(found.qualities[n] < 0.5 for n in CONTENT[found.category].split())
    assert 0.3 < low / len(remarked) < 0.95
