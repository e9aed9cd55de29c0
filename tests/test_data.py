"""Reading: layouts, places in error messages, splits."""

import gzip
import json
import math

import pytest

from jaxrm import data
from jaxrm.data import DataError, Preference

USER = {'role': 'user', 'content': 'Which one?'}
REPLY = {'role': 'assistant', 'content': 'This one.'}
OTHER = {'role': 'assistant', 'content': 'That one.'}
PAIR = {'prompt': [USER], 'chosen': 'This one.', 'rejected': 'That one.'}


def write(path, rows):
    text = ''.join(json.dumps(row, ensure_ascii=False) + '\n' for row in rows)
    opened = gzip.open if path.name.endswith('.gz') else open
    with opened(path, 'wt', encoding='utf-8') as file:
        file.write(text)
    return str(path)


def loaded(*rows, **options):
    return data.preferences(((f'pairs.jsonl:{i}', r) for i, r in enumerate(rows, 1)), **options)


def fault(*rows, **options):
    with pytest.raises(DataError) as caught:
        loaded(*rows, **options)
    return str(caught.value)


def test_pair_of_messages_and_replies_from_a_compressed_file(tmp_path):
    rows = [PAIR | {'id': str(i), 'subset': 'é\u2028', 'meta': {}} for i in range(3)]
    path = write(tmp_path / 'pairs.jsonl.gz', rows)
    found = data.load(path)
    assert found.records[2] == Preference(
        (USER,), ('This one.', 'That one.'), ranks=(0, 1), group='é\u2028', id='2'
    )
    assert found.where == [f'{path}:{n}' for n in (1, 2, 3)]
    assert found.mapping == (
        'prompt (messages), chosen/rejected (assistant replies), group (subset), id '
        f'(not read: meta) from {path}: 3 records'
    )


def test_the_same_rows_from_every_kind_of_file(tmp_path):
    import pyarrow
    import pyarrow.parquet

    rows = [
        PAIR | {'id': 'a', 'prompt': [{'role': 'system', 'content': ''}, USER], 'margin': 0.5},
        PAIR | {'id': 'b', 'chosen': 'Two\nlines, "quoted", [,]', 'margin': 1.5},
    ]
    lines = data.load(write(tmp_path / 'a.jsonl', rows))
    (tmp_path / 'a.json').write_text('\n ' + json.dumps(rows, indent=1))
    listed = data.load(tmp_path / 'a.json')
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / 'a.parquet')
    columns = data.load(tmp_path / 'a.parquet')
    hub = data.load(str(tmp_path / 'hub')) if write_folder(tmp_path / 'hub', rows) else None
    assert lines.records == listed.records == columns.records == hub.records
    assert lines.records[0].margins == (0.5, 0.0)
    assert listed.where == [f'{tmp_path}/a.json:3', f'{tmp_path}/a.json:19']
    assert columns.where[1] == f'{tmp_path}/a.parquet: row 1'
    assert hub.where[1] == f'{tmp_path}/hub[train] row 1'


def write_folder(folder, rows):
    folder.mkdir()
    return write(folder / 'train.jsonl', rows)


def test_strings_are_plain_text_unless_chat_is_asked_for():
    row = PAIR | {'prompt': 'Which one?'}
    plain, chat = loaded(row), loaded(row, chat=True)
    assert plain.records[0].messages == 'Which one?'
    assert 'prompt (text), chosen/rejected (continuations, no chat template, EOS' in plain.mapping
    assert chat.records[0] == Preference((USER,), ('This one.', 'That one.'), ranks=(0, 1))
    assert 'prompt (one user turn), chosen/rejected (assistant replies)' in chat.mapping


def test_message_answers():
    tool = {'role': 'tool', 'content': '42', 'name': 'sum'}
    row = PAIR | {'chosen': [OTHER, tool, REPLY], 'rejected': [OTHER | {'extra': None}]}
    (record,) = loaded(row).records
    assert record.responses == ((OTHER, tool, REPLY), 'That one.')


@pytest.mark.parametrize(
    ('chosen', 'rejected', 'turns'),
    [
        ([USER, REPLY], [USER, OTHER], 1),
        ([USER, REPLY, USER, REPLY], [USER, REPLY, USER, OTHER], 3),
        ([USER, REPLY, USER, REPLY], [USER, OTHER, USER, REPLY], 1),
        ([USER, REPLY, USER, REPLY], [USER, REPLY], 1),
    ],
)
def test_implicit_prompt_of_messages(chosen, rejected, turns):
    (record,) = loaded({'chosen': chosen, 'rejected': rejected}).records
    assert list(record.messages) == chosen[:turns]
    for answer, whole in zip(record.responses, (chosen, rejected), strict=True):
        rest = [{'role': 'assistant', 'content': answer}] if isinstance(answer, str) else answer
        assert list(rest) == whole[turns:]


@pytest.mark.parametrize(
    ('chosen', 'rejected', 'prompt'),
    [
        ('The sky is blue.', 'The sky is green.', 'The sky is'),  # the space goes to the answers
        ('Q: a? A: yes', 'Q: a? A: no', 'Q: a? A:'),
        ('abc', 'abcd', 'ab'),
    ],
)
def test_implicit_prompt_of_strings(chosen, rejected, prompt):
    (record,) = loaded({'chosen': chosen, 'rejected': rejected}).records
    assert record.messages == prompt
    assert [prompt + r for r in record.responses] == [chosen, rejected]


def test_candidates_with_ranks_and_ratings():
    row = {'prompt': [USER], 'completions': ['a', 'b', 'c', 'd']}
    assert loaded(row).records[0].ranks is None
    ranked = loaded(row | {'ranks': [7, 2, None, 2]}).records[0]
    assert ranked.ranks == (1, 0, -1, 0)
    rated = loaded(row | {'ratings': [1, 5, 3.5, 5]})
    assert rated.records[0].ranks == (2, 0, 1, 0)
    assert rated.records[0].ratings == ((1.0,), (5.0,), (3.5,), (5.0,))
    assert 'ranks from ratings' in rated.mapping
    many = loaded(row | {'ratings': [[1, 2], [3, None], [5, 6], [7, 8]]}).records[0]
    assert many.ranks is None
    assert many.ratings[0] == (1, 2)
    assert math.isnan(many.ratings[1][1])
    both = loaded(row | {'ratings': [1, 5, 3, 5], 'ranks': [0, 1, 2, 3]}).records[0]
    assert both.ranks == (0, 1, 2, 3)


def test_conversation_for_scoring():
    (record,) = loaded({'messages': [USER, REPLY, USER, OTHER]}).records
    assert record == Preference((USER, REPLY, USER), ('That one.',))


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        ({'prompt': 3}, 'prompt: found 3, expected a string or a list of messages'),
        ({'prompt': []}, 'prompt: found an empty list, expected a list'),
        ({'prompt': ''}, 'prompt: found an empty string, expected text'),
        ({'prompt': ['x']}, 'prompt[0]: found a string, expected a message {role, content}'),
        ({'prompt': [{'role': 'bot', 'content': ''}]}, "prompt[0].role: found 'bot', expected one"),
        ({'prompt': [{'role': 'user'}]}, 'prompt[0].content: found null, expected a string'),
        ({'prompt': [USER, REPLY]}, 'prompt: found an assistant turn at its end'),
        ({'chosen': None}, "found columns ['prompt', 'rejected'] and null in ['chosen'], expected"),
        ({'chosen': 5}, 'chosen: found 5, expected a list'),
        ({'chosen': ' \n'}, 'chosen: found an empty answer, expected text'),
        ({'chosen': '\ud800'}, 'chosen: found a lone surrogate at character 0'),
        ({'chosen': [REPLY]}, 'rejected: found assistant replies, expected messages, like chosen'),
        ({'chosen': [USER, REPLY]}, "chosen[0].role: found 'user', expected 'assistant'"),
        ({'chosen': 'That one.'}, 'rejected: found the same answer as chosen'),
        ({'margin': 'big'}, 'margin: found a string, expected a number'),
        ({'margin': math.nan}, 'margin: found nan, expected a number'),
        ({'margin': True}, 'margin: found True, expected a number'),
        ({'id': [1]}, 'id: found a list, expected a string or an integer'),
        ({'subset': 3}, 'group: found 3, expected a string'),
        ({'prompt': 'Q', 'chosen': [REPLY]}, 'chosen: found a list, expected a string, as'),
    ],
)
def test_every_bad_pair_is_named(change, message):
    assert fault(PAIR, PAIR | change).startswith(f'pairs.jsonl:2: {message}')


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        ({'completions': []}, 'completions: found an empty list'),
        ({'completions': ['a', '']}, 'completions[1]: found an empty answer'),
        ({'completions': ['a', [REPLY]]}, 'completions: found assistant replies and messages'),
        ({'ranks': [0]}, 'ranks: found 1 entries, expected 2'),
        ({'ranks': [0, -1]}, 'ranks: found none, or one below 0'),
        ({'ranks': [None, None]}, 'ranks: found none, or one below 0'),
        ({'ranks': [0, '1']}, 'ranks[1]: found a string'),
        ({'ratings': [1, [2, 3]]}, 'ratings: found [1, 2] objectives'),
        ({'ratings': [[1], [math.inf]]}, 'ratings[1][0]: found inf, expected a number'),
        ({'ratings': [1, None]}, 'ratings: found a missing one, expected a number for every'),
        ({'labels': [True, False]}, 'labels: found a label for each step (process supervision)'),
    ],
)
def test_every_bad_list_of_candidates_is_named(change, message):
    row = {'prompt': [USER], 'completions': ['a', 'b']}
    assert fault(row | change).startswith(f'pairs.jsonl:1: {message}')


@pytest.mark.parametrize(
    ('row', 'message'),
    [
        ({'messages': [USER]}, 'messages: found no answer at the end'),
        ({'messages': [REPLY, REPLY]}, 'prompt: found an assistant turn at its end'),
        ({'chosen': 'Yes', 'rejected': 'No'}, 'rejected: found no beginning shared with'),
        ({'chosen': [USER, REPLY], 'rejected': [REPLY]}, 'rejected: found no prompt shared'),
        ({'question': 'Q', 'chosen': 'AB', 'rejected': 'AC'}, "found columns ['chosen', 'questi"),
        ({'text': 'AB'}, "found columns ['text'], expected pair: ['chosen', 'prompt', 'rejected']"),
        (PAIR | {'messages': [USER]}, 'messages: found something else than chosen, expected the'),
        (PAIR | {'input': 'Q', 'completions': ['a']}, "found columns ['chosen', 'completions', "),
        ({'messages': [USER, REPLY], 'system': 'B'}, "found columns ['messages', 'system']; 'conv"),
    ],
)  # fmt: skip
def test_what_no_layout_fits_is_refused(row, message):
    assert fault(row).startswith(f'pairs.jsonl:1: {message}')


def test_an_ambiguous_layout_can_be_named():
    row = PAIR | {'messages': [USER, REPLY]}
    assert len(loaded(row, layout='pair').records[0].responses) == 2
    assert len(loaded(row, layout='conversation').records[0].responses) == 1
    whole = {'prompt': 'Which one?', 'chosen': [USER, REPLY], 'rejected': [USER, OTHER]}
    assert 'implicit prompt' in fault(whole)
    found = loaded(whole, layout='implicit prompt')
    assert found.records[0] == loaded(PAIR).records[0]
    assert 'not read: prompt' in found.mapping
    assert "expected a layout of ['pair', 'implicit prompt'," in fault(row, layout='par')


def test_rows_of_one_file_have_one_layout():
    implicit = {'chosen': [USER, REPLY], 'rejected': [USER, OTHER]}
    assert fault(PAIR, implicit).startswith('pairs.jsonl:2: layout: found prompt (shared beginning')
    assert 'layout: found prompt (text)' in fault(PAIR, PAIR | {'prompt': 'Q'})
    assert 'margin' in fault(PAIR | {'margin': 1.0}, PAIR)
    assert fault(PAIR, PAIR | {'margin': 1.0}).startswith('pairs.jsonl:2: layout: found')
    assert fault() == 'rows: found no rows, expected at least one'
    assert "'a' again, first at pairs.jsonl:1" in fault(PAIR | {'id': 'a'}, PAIR | {'id': 'a'})
    assert 'pairs.jsonl:2: id' in fault(PAIR | {'id': 1}, PAIR | {'id': '1'})


@pytest.mark.parametrize(
    ('name', 'content', 'message'),
    [
        ('a.jsonl', b'{}\n{"a": }\n', ':2: column 7: not JSON: Expecting value'),
        ('a.jsonl', b'{}\n\n[1]\n', ':3: found a list, expected an object'),
        ('a.jsonl', b'{}\n{"a": "\xff"}\n', ':2: byte 8: not UTF-8 text'),
        ('a.json', b'[{"a": 1},\n {"b" 2}]', ':2: column 7: not JSON: Expecting'),
        ('a.json', b'[{"a": 1},\n 2]', ':2: found 2, expected an object'),
        ('a.json', b'{"a": 1}', ': found an object, expected a list of objects'),
        ('a.jsonl.gz', gzip.compress(b'{"a": 1}\n' * 99, mtime=0)[:-9], ': damaged gzip file'),
        ('a.jsonl.gz', b'{}', ': damaged gzip file'),
        ('a.parquet', b'{}', ': '),
        ('a.csv', b'a,b', ": found suffix '.csv', expected ['.jsonl', '.jsonl.gz'"),
    ],
)
def test_bad_files_are_named_with_line_and_column(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(DataError) as caught:
        list(data.read(path))
    assert str(caught.value).startswith(f'{path}{message}')


def test_bad_names(tmp_path):
    with pytest.raises(DataError, match='no such file'):
        data.read(tmp_path / 'a.jsonl')
    with pytest.raises(DataError, match='belong to hub data sets'):
        data.read(tmp_path / 'a.jsonl', split='train')
    with pytest.raises(DataError, match='some/pairs: neither a file nor a readable data set'):
        data.read('some/pairs')
    folder = tmp_path / 'two'
    write_folder(folder, [PAIR])
    write(folder / 'test.jsonl', [PAIR])
    with pytest.raises(DataError, match=r"found splits \['test', 'train'\], expected `split`"):
        data.read(folder)
    assert len(list(data.read(folder, split='test'))) == 1


def test_a_byte_order_mark_and_empty_lines_are_not_data(tmp_path):
    (tmp_path / 'a.jsonl').write_bytes(b'\xef\xbb\xbf{"a": 1}\r\n\r\n{"a": 2}')
    rows = list(data.read(tmp_path / 'a.jsonl'))
    assert rows == [(f'{tmp_path}/a.jsonl:1', {'a': 1}), (f'{tmp_path}/a.jsonl:3', {'a': 2})]
    (tmp_path / 'b.json').write_text('[]')
    assert list(data.read(tmp_path / 'b.json')) == []


def test_split_by_prompt():
    records = [Preference(f'prompt {i % 400}', (f'answer {i}',)) for i in range(1000)]
    kept, held = data.split_by_prompt(records, 0.2, seed=1)
    assert sorted(kept + held) == list(range(1000))
    prompts = [{records[i].messages for i in part} for part in (kept, held)]
    assert not prompts[0] & prompts[1]
    assert 50 < len(prompts[1]) < 110  # 80 expected, four standard deviations
    assert data.split_by_prompt(records[500:], 0.2, seed=1)[1] == [
        i - 500 for i in held if i >= 500
    ]
    assert data.split_by_prompt(records, 0.2, seed=2)[1] != held
    assert data.split_by_prompt(records, 0.0)[1] == data.split_by_prompt(records, 1.0)[0] == []
    with pytest.raises(ValueError, match=r'fraction: found 1.5'):
        data.split_by_prompt(records, 1.5)


def test_fingerprint_sees_every_field_and_the_order():
    record = Preference((USER,), ('a', 'b'), (0, 1), (1.0, 0.0), ((1.0,), (math.nan,)), 0.0, 'g')
    changes = {
        'messages': 'Which one?',
        'responses': ('b', 'a'),
        'ranks': (1, 0),
        'margins': (2.0, 0.0),
        'ratings': None,
        'smoothing': 0.1,
        'group': None,
        'id': 'x',
        'tools': ({'name': 'sum'},),
        'rendered': True,
    }
    assert set(changes) == set(Preference._fields)
    others = [record._replace(**{field: value}) for field, value in changes.items()]
    prints = {data.fingerprint([r]) for r in [record, *others]}
    assert len(prints) == 1 + len(others)
    assert data.fingerprint([record]) == data.fingerprint([Preference(*record)])
    assert data.fingerprint([record, others[0]]) != data.fingerprint([others[0], record])


def test_real_files(data_dir):
    manifest = json.loads((data_dir / 'MANIFEST.json').read_text())
    rows = {entry['path']: entry['rows'] for entry in manifest}
    paths = [*data_dir.glob('preference/*.gz'), *data_dir.glob('rewardbench/*.gz')]
    assert paths
    for path in paths:
        found = data.load(path)
        assert len(found.records) == rows[str(path.relative_to(data_dir))]
        assert all(r.ranks == (0, 1) and r.id and r.group for r in found.records)
