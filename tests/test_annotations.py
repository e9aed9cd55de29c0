"""The published layout of pairs with scores: files written by hand, and written and read back."""

import gzip
import json

import numpy as np
import pytest

from jaxrm import annotations, data
from jaxrm.data import DataError, Preference

# Ten reward models' scores of one pair.
CHOSEN = [3.71875, 0.58984375, 3.390625, 0.00680542, -0.6953125]
CHOSEN += [1.0390625, 1.4140625, 0.8359375, 3.078125, 2]
REJECTED = [3.546875, 0.9921875, 2.125, -0.33007812, 1.171875]
REJECTED += [1.2578125, 1.078125, 1.0546875, 3.546875, 2.265625]
ASK = ({'role': 'user', 'content': 'Which one?'},)
ROW = {'chosen': ['Hi', 'Hello', 'Which one?', 'This one.'],
       'rejected': ['Hi', 'Hello', 'Which one?', 'That one.'],
       'mean preference difference': -0.5, 'std preference difference': 0.25,
       'chosen score list': [1.0, 2.0], 'rejected score list': [1.25, 2.75],
       'GPT4 label': 0}  # fmt: skip


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
        (Preference((), ('a', 'b'), (0, 1)), 'found no messages, expected a prompt'),
        (Preference(ASK, ('a', 'b'), (0, 1), tools=({},)), 'found 1 tools, expected none'),
    ],
)
def test_what_utterances_cannot_hold_is_not_written(tmp_path, record, fault):
    with pytest.raises(DataError, match=f'record 0: .*{fault}'):
        annotations.save(tmp_path / 'a.jsonl', [record], np.zeros((2, 1, 2)))
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    ('score', 'judge', 'fault'),
    [
        (np.full((2, 1, 2), np.nan), None, r'record 0: scores: found nan of member 0 \(chosen\)'),
        (np.array([[[1, 2]], [[0, -np.inf]]]), None, r'-inf of member 1 \(rejected\)'),
        (np.zeros((2, 1, 2), np.float16), None, 'scores: found float16, expected float32'),
        (np.zeros((0, 1, 2)), None, r'scores: found \[0, 1, 2\], expected \[members, 1, 2\]'),
        (np.zeros((1, 2)), None, r'scores: found \[1, 2\], expected'),
        (np.zeros(2), None, r'scores: found \[2\], expected'),
        (np.zeros((2, 1, 2)), [1, 0], 'GPT4 label: found 2, expected 1, one of each record'),
        (np.zeros((2, 1, 2)), [2], 'record 0: GPT4 label: found 2, expected 1, 0 or -1'),
        (np.zeros((2, 1, 2)), [0.5], 'record 0: GPT4 label: found 0.5'),
    ],
    ids=range(9),
)
def test_scores_that_load_would_refuse_are_not_written(tmp_path, score, judge, fault):
    record = Preference(ASK, ('a', 'b'), (0, 1))
    with pytest.raises(DataError, match=fault):
        annotations.save(tmp_path / 'a.jsonl', [record], score, judge_n=judge)
    assert not any(tmp_path.iterdir())
