"""Every layout of rows, as its trainer documents it, against the record it means."""

import json
import math

import numpy as np
import pytest

from jaxrm import baselines, data
from jaxrm.data import DataError, Ids, Preference

USER = {'role': 'user', 'content': 'Which one?'}
SYSTEM = {'role': 'system', 'content': 'Be brief.'}
REPLY = {'role': 'assistant', 'content': 'This one.'}
OTHER = {'role': 'assistant', 'content': 'That one.'}
CALL = {'role': 'assistant', 'content': '', 'tool_calls': [{'name': 'sum', 'arguments': {}}]}
TOOL = {'type': 'function', 'function': {'name': 'sum', 'parameters': {'type': 'object'}}}
PAIR = Preference((USER,), ('This one.', 'That one.'), ranks=(0, 1))
SCORES = {'helpfulness': 4, 'correctness': 3, 'coherence': 4, 'complexity': 2, 'verbosity': -100}
FEEDBACK = [
    {
        'response': text,
        'annotations': {'helpfulness': {'Rating': a, 'Rationale': '.'}, 'honesty': {'Rating': b}},
    }
    for text, a, b in (('This one.', '5', '1'), ('That one.', 'N/A', '3'))
]
SHARE = [{'from': 'human', 'value': 'Which one?'}]


def loaded(*rows, **options):
    return data.preferences(((f'pairs.jsonl:{i}', r) for i, r in enumerate(rows, 1)), **options)


def fault(*rows, **options):
    with pytest.raises(DataError) as caught:
        loaded(*rows, **options)
    return str(caught.value)


def same(a, b):
    """Equal, NaN too."""
    return repr(a) == repr(b)


# Name, a row, the record, what the printed line says.
LAYOUTS = [
    ('pair', {'prompt': [USER], 'chosen': [REPLY], 'rejected': [OTHER], 'margin': 2},
     PAIR._replace(margins=(2.0, 0.0)), 'prompt (messages), chosen/rejected (messages), margin'),
    ('pair', {'prompt': [USER], 'chosen': [CALL], 'rejected': [OTHER], 'tools': [TOOL]},
     PAIR._replace(responses=((CALL,), 'That one.'), tools=(TOOL,)), 'tools'),
    ('implicit prompt', {'chosen': [USER, REPLY], 'rejected': [USER, OTHER],
                         'chosen_score': 0.5, 'rejected_score': None},
     PAIR._replace(ratings=((0.5,), (math.nan,))), 'messages), ratings of score from'),
    ('token ids', {'chosen_ids': [1, 5, 6, 7, 2], 'rejected_ids': [1, 5, 8, 2]},
     Preference(Ids((1, 5)), (Ids((6, 7, 2)), Ids((8, 2))), ranks=(0, 1)), 'token ids as they are'),
    ('token ids, old names', {'chosen_input_ids': [4, 5], 'rejected_input_ids': [4, 5, 6],
                              'chosen_attention_mask': [1, 1], 'margin': 1.0},
     Preference(Ids((4,)), (Ids((5,)), Ids((5, 6))), (0, 1), (1.0, 0.0)), 'chosen_input_ids/reje'),
    ('swift response', {'messages': [SYSTEM, USER, REPLY], 'rejected_response': 'That one.'},
     PAIR._replace(messages=(SYSTEM, USER)), 'the last assistant turn is chosen'),
    ('swift messages', {'messages': [USER, REPLY], 'rejected_messages': [USER, OTHER]},
     PAIR, 'shared beginning of messages/rejected_messages'),
    ('nemo', {'context': [USER], 'completions': [{'rank': 3, 'completion': [OTHER]},
                                                 {'rank': 1, 'completion': [REPLY]}]},
     PAIR._replace(responses=('That one.', 'This one.'), ranks=(1, 0)), 'completions with ranks'),
    ('axolotl', {'system': 'Be brief.', 'input': 'Which one?', 'chosen': 'This one.',
                 'rejected': 'That one.'},
     PAIR._replace(messages=(SYSTEM, USER)), 'system/input (turns)'),
    ('axolotl', {'system': '', 'input': 'Which one?', 'chosen': 'This one.',
                 'rejected': 'That one.'}, PAIR, 'system/input (turns)'),
    ('alpaca', {'instruction': 'Which', 'input': 'one?', 'chosen': 'This one.',
                'rejected': 'That one.', 'system': 'Be brief.', 'history': []},
     PAIR._replace(messages=(SYSTEM, {'role': 'user', 'content': 'Which\none?'})),
     'system/instruction/input (turns)'),
    ('alpaca', {'instruction': 'Which one?', 'input': '', 'chosen': 'This one.', 'system': '',
                'rejected': 'That one.', 'margin': 1}, PAIR._replace(margins=(1.0, 0.0)), 'margin'),
    ('alpaca', {'instruction': 'Which one?', 'chosen': 'This one.', 'rejected': 'That one.'},
     PAIR, 'system/instruction/input (turns)'),
    ('axolotl chat', {'messages': [SYSTEM, USER], 'chosen': REPLY, 'rejected': OTHER},
     PAIR._replace(messages=(SYSTEM, USER)), 'messages, chosen/rejected (assistant replies)'),
    ('axolotl chat', {'messages': [USER, REPLY], 'chosen': [USER, REPLY],
                      'rejected': [USER, OTHER]}, PAIR, 'shared beginning of chosen/rejected'),
    ('conversations beside messages',
     {'prompt': 'Which one?', 'messages': [USER, REPLY], 'chosen': [USER, REPLY],
      'rejected': [USER, OTHER], 'score_chosen': 8.5, 'score_rejected': 7},
     PAIR._replace(ratings=((8.5,), (7.0,))), 'shared beginning of chosen/rejected messages'),
    ('sharegpt', {'conversations': [*SHARE, {'from': 'gpt', 'value': 'This one.'}],
                  'system': 'Be brief.'},
     Preference((SYSTEM, USER), ('This one.',)), 'conversations (the last assistant turn'),
    ('sharegpt pair', {'conversations': SHARE, 'chosen': {'from': 'gpt', 'value': 'This one.'},
                       'rejected': {'from': 'gpt', 'value': 'That one.'}},
     PAIR, 'system/conversations (messages)'),
    ('conversation', {'messages': [USER, REPLY], 'ratings': {'true': 1, 'useful': -100}},
     Preference((USER,), ('This one.',), ratings=((1.0, math.nan),)), 'ratings of true, useful'),
    ('conversation', {'messages': [USER, REPLY], 'ratings': [0.5, math.nan]},
     Preference((USER,), ('This one.',), ratings=((0.5, math.nan),)), 'answer), ratings from'),
    ('rated answer', {'question': 'Which one?', 'answer': 'This one.', 'ratings': {'a': 0}},
     Preference((USER,), ('This one.',), ratings=((0.0,),)), 'question (one user turn), answer'),
    ('rated completion', {'prompt': 'Which', 'completion': ' one?', 'ratings': 0.25},
     Preference('Which', (' one?',), ratings=((0.25,),)), 'completion (continuations, no chat'),
    ('helpsteer', {'prompt': 'Which one?', 'response': 'This one.', **SCORES},
     Preference((USER,), ('This one.',), ratings=((4.0, 3.0, 4.0, 2.0, math.nan),)),
     'ratings of helpfulness, correctness, coherence, complexity, verbosity'),
    ('candidates', {'prompt': [USER], 'completions': ['a', 'b'],
                    'ratings': [{'x': 1, 'y': 2}, {'x': 3, 'y': None}]},
     Preference((USER,), ('a', 'b'), ratings=((1.0, 2.0), (3.0, math.nan))), 'ratings of x, y'),
    ('candidates', {'prompt': [USER], 'completions': ['a', 'b'], 'ratings': {'x': [1, 3]}},
     Preference((USER,), ('a', 'b'), (1, 0), ratings=((1.0,), (3.0,))), 'ranks from ratings, rat'),
    ('ultrafeedback', {'instruction': 'Which one?', 'completions': FEEDBACK},
     Preference((USER,), ('This one.', 'That one.'), ratings=((5.0, 1.0), (math.nan, 3.0))),
     'ratings of helpfulness, honesty'),
    ('rendered', {'prompt': 'q', 'text_chosen': '<s>[I] q [/I] yes', 'text_rejected':
                  '<s>[I] q [/I] no'},
     Preference('<s>[I] q [/I]', (' yes', ' no'), ranks=(0, 1), rendered=True), 'nothing added'),
    *(('strength' + how, {
        'chosen': [USER['content'], REPLY['content']],
        'rejected': [USER['content'], OTHER['content']],
        'mean preference difference'.replace(' ', space): 0.5,
        'chosen score list'.replace(' ', space): [1.0, 2.0],
        'rejected score list'.replace(' ', space): [0.5, 1.5],
    }, PAIR._replace(ratings=((1.0, 2.0), (0.5, 1.5))), 'utterances, the last is the answer')
      for how, space in (('', ' '), (', underscored', '_'))),
]  # fmt: skip


@pytest.mark.parametrize(('name', 'row', 'record', 'line'), LAYOUTS)
def test_a_row_of_every_layout(name, row, record, line):
    assert data.find_layout(row, where='a').name == name
    found = loaded(row)
    assert same(found.records, [record])
    assert line in found.mapping
    assert same(loaded(row, layout=name).records, [record])
    assert found.kind == ('pair' if record.ranks == (0, 1) else found.kind)
    assert (found.kind == 'answer') == (len(record.responses) == 1)


def test_every_layout_is_in_the_table():
    tested = {name for name, *_ in LAYOUTS}
    assert {x.name for x in data.LAYOUTS} - tested == {'rated response', 'stepwise'}


def test_steps_are_refused_with_the_reason():
    row = {'prompt': 'q', 'completions': ['a', 'b'], 'labels': [True, False]}
    assert fault(row).startswith('pairs.jsonl:1: labels: found a label for each step (process')


ASKED = ('system', 'input', 'context', 'question', 'query', 'instruction', 'prompt', 'history',
         'messages', 'conversations', 'chosen', 'rejected')  # fmt: skip


def test_no_layout_leaves_out_what_was_said():
    """Every layout, with every column that may hold a part of the conversation beside its own."""
    whole = {'rendered', 'token ids', 'token ids, old names'}
    names = [x.name for x in data.LAYOUTS if x.name not in whole]
    assert len(names) == len(data.LAYOUTS) - 3
    for layout in data.LAYOUTS:
        for column in ASKED if layout.name in names else ():
            try:
                found = data.find_layout(layout.required | {column}, where='a')
            except DataError:
                continue
            assert column in found.columns, (layout.name, column)


def test_a_named_layout_may_leave_columns_out():
    row = {'messages': [USER, REPLY], 'prompt': 'Which one?'}
    assert "'conversation' does not read ['prompt']: name it with `layout`" in fault(row)
    assert 'not read: prompt' in loaded(row, layout='conversation').mapping


def test_numbers_that_were_not_read_are_named():
    row = {'id': 1, 'messages': [USER, REPLY], 'b': 4.0, 'a': None, 'c': 'x', 'd': True}
    found = loaded(row, {**row, 'id': 2, 'a': 1})
    assert found.numbers == ('a', 'b')
    assert 'not read: a, b, c, d' in found.mapping
    assert loaded(row, rating_columns=('b', 'a')).numbers == ()


def test_rating_columns_by_name():
    row = {'messages': [USER, REPLY], 'b': 2, 'a': None, 'c': 'x'}
    found = loaded(row, {**row, 'b': -100, 'a': 1.5}, rating_columns=('b', 'a'))
    assert found.objectives == ('b', 'a')
    want = [[[2.0, np.nan]], [[np.nan, 1.5]]]
    np.testing.assert_array_equal([r.ratings for r in found.records], want)
    assert 'ratings of b, a (not read: c) from' in found.mapping
    inside = {'prompt': 'Which one?', 'response': 'This one.', 'ratings': {'x': 1, 'y': 2, 'z': 3}}
    found = loaded(inside, rating_columns=('z', 'x'))
    assert found.records == [Preference((USER,), ('This one.',), ratings=((3.0, 1.0),))]
    assert found.objectives == ('z', 'x')
    helpsteer = {'prompt': 'Which one?', 'response': 'This one.', **SCORES, 'verbosity': None}
    found = loaded(helpsteer, rating_columns=('verbosity', 'coherence'))
    assert same(found.records[0].ratings, ((math.nan, 4.0),))
    assert 'not read: complexity, correctness, helpfulness' in found.mapping
    both = {'prompt': [USER], 'completions': ['a', 'b'], 'x': [1, 2], 'y': [4, 3]}
    found = loaded(both, rating_columns=('y', 'x'))
    assert found.records[0].ratings == ((4.0, 1.0), (3.0, 2.0))


def test_ratings_keep_the_order_of_the_first_row():
    row = {'messages': [USER, REPLY]}
    found = loaded(row | {'ratings': {'a': 1, 'b': 2}}, row | {'ratings': {'b': 3, 'a': 4}})
    assert found.objectives == ('a', 'b')
    assert [r.ratings for r in found.records] == [((1.0, 2.0),), ((4.0, 3.0),)]
    assert 'layout: found' in fault(row | {'ratings': {'a': 1}}, row | {'ratings': {'b': 3}})
    assert 'layout: found' in fault(row | {'ratings': {'a': 1}}, row)
    assert loaded(row).objectives == ()


def test_rows_with_and_without_tools_and_system():
    row = {'prompt': [USER], 'chosen': 'This one.', 'rejected': 'That one.'}
    rows = [row | {'tools': t} for t in ([TOOL], json.dumps([TOOL]), [], '', '[]')]
    assert [r.tools for r in loaded(*rows, row).records] == [(TOOL,)] * 2 + [None] * 4
    filled = {'type': 'function', 'function': {**TOOL['function'], 'strict': None}, 'x': None}
    assert loaded(row | {'tools': [filled]}).records[0].tools == (TOOL,)
    system = {'input': 'Which one?', 'chosen': 'This one.', 'rejected': 'That one.'}
    assert len(loaded(system | {'system': 'Be brief.'}, system).records) == 2


def test_sharegpt_roles():
    names = ['system', 'human', 'gpt', 'observation', 'gpt']
    row = {'conversations': [{'from': n, 'value': n} for n in names]}
    (record,) = loaded(row).records
    assert [m['role'] for m in record.messages] == ['system', 'user', 'assistant', 'tool']
    assert record.responses == ('gpt',)
    odd = {'conversations': [*SHARE, {'from': 'function_call', 'value': '{}'}]}
    assert "conversations[1].from: found 'function_call', expected one of" in fault(odd)
    number = {'conversations': [{'from': 'gpt', 'value': 3}]}
    assert 'conversations[0].value: found 3' in fault(number)


def test_token_ids_are_words_to_the_baselines():
    rows = [{'chosen_ids': [1, 2, 7, 7], 'rejected_ids': [1, 2, 8]}] * 3
    records = loaded(*rows).records
    assert [x.tolist() for x in baselines.longer_wins(records[:1])] == [[3, 1]]
    better, worse = baselines.bag_of_words(records, l2=0.1)(records)[0]
    assert better > worse


AMBIGUOUS = [
    ({'chosen_ids': [1, 2], 'rejected_ids': [1, 3], 'prompt': 'q', 'chosen': 'a', 'rejected': 'b'},
     ('pair', 'token ids')),
    ({'messages': [USER, REPLY], 'conversations': SHARE}, ('conversation', 'sharegpt')),
    ({'prompt': 'q', 'context': [USER], 'completions': ['a']}, ('candidates', 'nemo')),
    ({'text_chosen': 'ab', 'text_rejected': 'ac', 'chosen': 'a', 'rejected': 'b', 'prompt': 'q'},
     ('pair', 'rendered')),
    ({'prompt': 'q', 'response': 'r', 'question': 'q', 'answer': 'a', 'ratings': {'x': 1}},
     ('rated answer', 'rated response')),
]  # fmt: skip


@pytest.mark.parametrize(('row', 'names'), AMBIGUOUS)
def test_two_layouts_are_named(row, names):
    message = fault(row)
    assert f'which fit {" or ".join(map(repr, names))}: choose one with `layout`' in message


def test_an_empty_answer_that_was_rated():
    rated = {'ratings': {'a': 0}}
    for row in (
        {'question': 'Which one?', 'answer': ' '},
        {'messages': [USER, {'role': 'assistant', 'content': ' '}]},
    ):
        assert loaded({**row, **rated}).records[0].responses == (' ',)
    assert 'messages: found an empty answer' in fault(row)


def test_real_ratings_and_evaluation_pairs(data_dir):
    found = data.load(data_dir / 'ratings' / 'truthfulqa_truth_info.train.jsonl.gz')
    assert found.objectives == ('truthful', 'informative')
    assert found.kind == 'answer'
    ratings = np.array([r.ratings for r in found.records])
    assert ratings.shape == (8461, 1, 2)
    assert np.nanmin(ratings) == 0
    assert np.nanmax(ratings) == 1
    assert all(r.ranks is None for r in found.records)
    for path in sorted(data_dir.glob('rewardbench/*.gz')):
        assert data.load(path, chat=True).kind == 'pair'
