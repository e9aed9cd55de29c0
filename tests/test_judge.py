"""What a judge is asked, how it is understood, and what is kept of it."""

import math
import random

import numpy as np
import pytest

from jaxrm import data, evaluate, judge
from jaxrm.data import Preference
from jaxrm.datasets import synthetic
from jaxrm.judge import Question, Verdict
from jaxrm.records import Ids

USER, OTHER = ({'role': 'user', 'content': text} for text in ('Which river?', 'And a lake?'))
SAID = {'role': 'assistant', 'content': 'The Nile.'}
RULES = {'role': 'system', 'content': 'Be brief.'}


def record(*responses, messages=(USER,), **fields):
    return Preference(messages, responses, **fields)


def verdicts(records, answer, points=None, **options):
    return list(judge.verdicts(judge.comparisons(records, points), answer, **options))


def words_of(question):
    """A judge of the number of words; equal ones go to the first."""
    return '1' if len(question.first.split()) >= len(question.second.split()) else '2'


# Asking


def test_every_pair_in_every_capability_in_both_orders():
    """k m (m - 1) questions a prompt."""
    records = [record('a', 'b b', 'c c c', group='g'), record('a', 'b', group='h')]
    points = {'g': {'logic': 'it follows', 'style': ''}, 'h': {'logic': ''}}
    asked = list(judge.comparisons(records, points))
    questions = [q for c in asked for q in c.questions]
    assert len(questions) == 2 * 3 * 2 + 1 * 2 * 1
    assert len(set(questions)) == len(questions)
    want = {
        (x, y, name)
        for name in ('logic', 'style')
        for x in records[0].responses
        for y in records[0].responses
        if x != y
    }
    assert {(q.first, q.second, q.capability) for q in questions[:12]} == want
    assert {q.definition for q in questions if q.capability == 'logic'} == {'it follows', ''}
    assert {q.query for q in questions} == {'Which river?'}
    for each in asked:
        texts = records[each.record].responses
        one, other = each.questions
        assert (one.first, one.second) == (texts[each.a], texts[each.b])
        assert (other.first, other.second) == (texts[each.b], texts[each.a])


def test_absent_and_equal_answers_are_not_compared():
    records = [record('a', 'b', 'a', 'c', ranks=(0, 1, 2, -1))]
    pairs = [{c.a, c.b} for c in judge.comparisons(records, None)]
    assert pairs == [{0, 1}, {1, 2}]


def test_which_answer_is_first_says_nothing_of_its_rank():
    """Records have the better answer first; a judge that is asked once must not profit."""
    records = synthetic.preferences(400, seed=1, labels='gold')
    first = np.mean([c.a == 0 for c in judge.comparisons(records, None)])
    assert 0.5 - 4 * 0.025 < first < 0.5 + 4 * 0.025
    turned = [r._replace(responses=r.responses[::-1]) for r in records]
    asked, again = (list(judge.comparisons(x, None)) for x in (records, turned))
    assert [c.questions for c in asked] == [c.questions for c in again]


@pytest.mark.parametrize(
    ('messages', 'query', 'said'),
    [
        ((USER,), 'conversation', 'Which river?'),
        ('Once upon', 'last', 'Once upon'),
        ((RULES, USER), 'last', 'Which river?'),
        ((USER, SAID, OTHER), 'last', 'And a lake?'),
        (
            (RULES, USER, SAID, OTHER),
            'conversation',
            'System: Be brief.\n\nUser: Which river?\n\nAssistant: The Nile.\n\nUser: And a lake?',
        ),
    ],
)
def test_queries(messages, query, said):
    (asked,) = judge.comparisons([record('a', 'b', messages=messages)], None, query=query)
    assert [q.query for q in asked.questions] == [said, said]


def test_the_template_has_everything_once_and_in_order():
    question = Question('the {query}', 'reply {first}', 'reply {second}', 'logic', 'it follows')
    said = judge.render(question)
    places = [said.index(x) for x in (question.query, question.first, question.second)]
    assert places == sorted(places)
    assert said.count('in respect of logic (it follows)') == 2
    assert 'in respect of logic?' in judge.render(question._replace(definition=''))
    assert 'as a whole' in judge.render(question._replace(capability=None))
    judge.check_template(judge.TEMPLATE)
    judge.check_template('{{"q": "{query}"}} {first} {second} {respect}')


@pytest.mark.parametrize(
    ('template', 'said'),
    [
        ('{query} {first} {second}', "expected .*'respect'"),
        ('{query} {first} {second} {respect} {x}', "found fields .*'x'"),
        ('{query} {first} {second} {respect} {', 'written twice'),
        ('{query} {first} {second} {respect} {}', 'found fields'),
    ],
)
def test_wrong_templates(template, said):
    with pytest.raises(ValueError, match=said):
        judge.check_template(template)


def test_excluded_prompts_are_never_sent():
    """The same conversation in another form is the same, and nothing is asked before it is met."""
    records = [record('a', 'b', messages='Fine'), record('a', 'b')]
    for hidden in [(USER,), 'Which river?', ({'role': 'user', 'content': ' Which\n river?'},)]:
        with pytest.raises(ValueError, match='record 1: found an excluded prompt'):
            judge.comparisons(records, None, excluded=[hidden])
    assert len(list(judge.comparisons(records, None, excluded=[(USER, SAID, OTHER)]))) == 2


@pytest.mark.parametrize(
    ('points', 'said'),
    [
        ({'h': {'logic': ''}}, "record 0: found group 'g'"),
        ({'g': {}}, "record 0: found group 'g'"),
        ({'g': {'a/b': ''}}, "found 'a/b', expected another name"),
        ({'g': {'overall': ''}}, "found 'overall'"),
    ],
)
def test_wrong_points(points, said):
    with pytest.raises(ValueError, match=said):
        judge.comparisons([record('a', 'b', group='g')], points)


def test_token_ids_are_no_text():
    for wrong in (record(Ids([1]), 'b'), record('a', 'b', messages=Ids([1]))):
        with pytest.raises(ValueError, match='found token ids, expected text'):
            list(judge.comparisons([wrong], None))


# Understanding


@pytest.mark.parametrize(
    ('answer', 'only', 'first'),
    [
        ('1', 1, 1),
        ('2.', 2, 2),
        ('**2**', 2, 2),
        ('Reply1', 1, 1),
        ('回复2更好', 2, 2),
        ('(1)\n', 1, 1),
        ('Reply 2 is better than reply 1.', None, 2),
        ('Of the 2 replies, 1 is better.', None, 2),
        ('10 of 10 for reply 2', 2, 1),
        ('A score of 1.5 against 2.5: reply 1', 1, 1),
        ('I am 12 % sure, 2', 2, 1),
        ('1/2', None, 1),
        ('neither', None, None),
        ('', None, None),
        ('3', None, None),
    ],
)
def test_answers(answer, only, first):
    assert (judge.only(answer), judge.first(answer)) == (only, first)
    assert {k: parse(answer) for k, parse in judge.PARSE.items()} == {'only': only, 'first': first}


@pytest.mark.parametrize(
    ('picks', 'winner', 'once'),
    [
        ((1, 2), 7, 7),
        ((2, 1), 5, 5),
        ((1, 1), None, 7),
        ((2, 2), None, 5),
        ((1, None), None, 7),
        ((None, 1), None, None),
        ((None, None), None, None),
    ],
)
def test_winners(picks, winner, once):
    question = Question('q', 'a', 'b', None)
    verdict = Verdict(judge.Comparison(0, None, 7, 5, (question, question)), picks)
    assert (verdict.winner(), verdict.winner(swap=False)) == (winner, once)


# Keeping


@pytest.mark.parametrize('bias', [0.0, 0.3, 0.8, 1.0])
def test_position_bias_yields_consistent_labels_only(bias):
    """A judge that knows the answer but takes the first reply unread with probability p.

    With the better reply first it always says 1; with it second it says 2 when it reads. So 1 - p
    of the pairs are kept, every label is right, and the bias is found as p.
    """
    rng = random.Random(0)
    count = 4000
    records = [record(f'{i} b b', f'{i} a', ranks=(0, 1)) for i in range(count)]
    found = verdicts(records, lambda q: '1' if rng.random() < bias else words_of(q))
    labels = list(judge.labels(found, records))
    said = judge.statistics(found, records)['overall']
    error = 4 * math.sqrt(bias * (1 - bias) / count) + 1e-12
    assert len(labels) == said.kept == round(said.retention * count)
    assert abs(said.retention - (1 - bias)) <= error
    assert abs(said.position_bias - bias) <= error
    assert all(label.responses[0].endswith('b b') for label in labels)
    assert said.agreement == 1 if labels else math.isnan(said.agreement)
    once = list(judge.labels(found, records, swap=False))
    right = np.mean([label.responses[0].endswith('b b') for label in once])
    assert len(once) == count
    assert abs(right - (1 - bias / 2)) <= 4 * math.sqrt(0.25 / count)


@pytest.mark.parametrize('answer', ['both', '', None])
def test_garbage_yields_nothing(answer):
    records = [record('a', 'b b')]
    found = verdicts(records, lambda q: answer)
    assert list(judge.labels(found, records)) == []
    said = judge.statistics(found, records)['all']
    assert (said.unparseable, said.kept) == (1, 0)
    assert math.isnan(said.position_bias)


def test_labels_are_read_back(tmp_path):
    """As data.load reads them: messages and text, ids, groups, and which answer is better."""
    records = [
        record('a', 'b b', 'c c c', messages=(USER, SAID, OTHER), group='g', id='x'),
        record((SAID,), 'b b b', group='g', tools=({'name': 'f'},)),
    ]
    points = {'g': {'logic': '', 'style': ''}}
    labels = list(judge.labels(verdicts(records, words_of, points), records))
    assert judge.write(tmp_path / 'labels.jsonl', labels) == len(labels) == 8
    read = data.load(tmp_path / 'labels.jsonl').records
    assert len(read) == 8
    for label, back in zip(labels, read, strict=True):
        want = [x if isinstance(x, str) else x[0]['content'] for x in label.responses]
        assert back == label._replace(responses=tuple(want))
        assert len(want[0].split()) > len(want[1].split())
        assert back.ranks == (0, 1)
    assert list(judge.by_group(read)) == ['g/logic', 'g/style']
    assert [len(pairs) for pairs in judge.by_group(read).values()] == [4, 4]
    assert [p.name for p in tmp_path.iterdir()] == ['labels.jsonl']


def test_plain_text_without_groups(tmp_path):
    records = [record('a', 'b b', messages='Once')]
    judge.write(tmp_path / 'x.jsonl', judge.labels(verdicts(records, words_of), records))
    (back,) = data.load(tmp_path / 'x.jsonl').records
    assert (back.messages, back.responses, back.group) == ('Once', ('b b', 'a'), 'overall')


def test_rendered_text_is_not_written(tmp_path):
    records = [record('a', 'b b', messages='Once', rendered=True)]
    with pytest.raises(ValueError, match='found a rendered text'):
        judge.write(tmp_path / 'x.jsonl', judge.labels(verdicts(records, words_of), records))
    assert not (tmp_path / 'x.jsonl').exists()


def test_scores_of_the_judge_as_a_baseline():
    """1 for won, 0.5 for no label, 0 for lost, averaged over the others."""
    records = [
        record('a', 'b b', ranks=(1, 0)),  # right
        record('a a a', 'b b', ranks=(1, 0)),  # wrong
        record('a a', 'b b', ranks=(0, 1)),  # no label
        record('a', 'b b', 'c c c', ranks=(2, 1, 0)),
    ]
    found = verdicts(records, words_of)
    scores = judge.scores(found, records)
    assert [x.tolist() for x in scores] == [[0, 1], [1, 0], [0.5, 0.5], [0, 0.5, 1]]
    each = evaluate.pairs(evaluate.ranks(records), scores)
    assert (each.accuracy + each.ties / 2).tolist() == [1, 0, 0.5, 1]
    both = verdicts([record('a', 'b', group='g')], words_of, {'g': {'x': '', 'y': ''}})
    with pytest.raises(ValueError, match='found 2 capabilities, expected one'):
        judge.scores(both, records)


def test_statistics_by_group():
    records = [
        record('a', 'b b', ranks=(1, 0), group='g'),
        record('a a a', 'b b', ranks=(1, 0), group='g'),
        record('a', 'b b', ranks=(0, 0), group='h'),
        record('a a', 'b b', ranks=(0, 1), group='h'),
    ]
    found = verdicts(records, words_of, judge.everywhere(records, {'logic': ''}))
    said = judge.statistics(found, records)
    assert list(said) == ['all', 'g/logic', 'h/logic']
    assert said['g/logic'][:6] == (2, 2, 1, 0, 0, 0)
    assert said['g/logic'].agreement == 0.5
    assert said['h/logic'][:6] == (2, 1, 0.5, 0, 0.5, 0)
    assert math.isnan(said['h/logic'].agreement)  # the only label is of a tie
    assert said['all'][:6] == (4, 3, 0.75, 0, 0.25, 0)
    assert said['all'].agreement == 0.5
