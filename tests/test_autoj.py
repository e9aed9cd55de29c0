"""Auto-J's pairwise rows: who is better, in which group, and what is refused."""

import json

import numpy as np
import pytest

from jaxrm import autoj, results
from jaxrm.data import DataError

# scenario, label, and the scores of response 1 and 2
ROWS = [
    ('math_reasoning', 0, 2.0, 1.0),
    ('solving_exam_question_with_math', 1, 2.0, 1.0),
    ('code_generation', 1, 0.0, 3.0),
    ('explaining_code', 0, 1.0, 1.0),
    ('code_to_code_translation', 2, 5.0, 1.0),
    ('solving_exam_question_without_math', 1, -1.0, 0.0),
    ('chitchat', 0, 0.5, 0.25),
    ('language_polishing', 2, 0.0, 0.0),
    ('chitchat', 1, 0.5, 0.25),
]


def rows():
    return [
        {
            'scenario': scenario,
            'label': label,
            'prompt': f'question {i}',
            'response 1': f'one {i}',
            'response 2': f'two {i}',
        }
        for i, (scenario, label, *_) in enumerate(ROWS)
    ]


def written(folder, given):
    path = folder / 'testdata_pairwise.jsonl'
    path.write_text('\n'.join(map(json.dumps, given)) + '\n')
    return path


def test_rows_become_pairs_and_ties_go(tmp_path):
    bench = autoj.load(written(tmp_path, rows()))
    assert bench.ties == 2
    assert [r.responses[0] for r in bench.records] == [
        'one 0', 'two 1', 'two 2', 'one 3', 'two 5', 'one 6', 'two 8'
    ]  # fmt: skip
    groups = ['Math', 'Math', 'Code', 'Code', 'Other', 'Other', 'Other']
    assert [r.group for r in bench.records] == groups
    assert [where.rpartition(':')[2] for where in bench.where] == [
        '1',
        '2',
        '3',
        '4',
        '6',
        '7',
        '9',
    ]
    assert bench.records[1].messages == ({'role': 'user', 'content': 'question 1'},)
    assert all(r.ranks == (0, 1) and len(r.responses) == 2 for r in bench.records)


def test_accuracy_by_group(tmp_path):
    """As of any set; equal scores are not right."""
    (found,) = results.read([str(written(tmp_path, rows()))], rules='autoj')
    assert found.mapping.endswith(
        '7 pairs (Code 2 of 84 (partial), Math 2 of 32 (partial), Other 3 of 903 (partial)), '
        '2 ties left out'
    )
    worth = {f'{who} {i}': x for i, row in enumerate(ROWS)
             for who, x in zip(('one', 'two'), row[2:], strict=True)}  # fmt: skip
    scores = [np.array([worth[text] for text in r.responses]) for r in found.records]
    said = results.result(found, [np.array([3, 4])] * 7, scores).model
    means = {name: x.accuracy.mean for name, x in said.subsets.items()}
    assert means == pytest.approx({'Math': 1 / 2, 'Code': 1 / 2, 'Other': 2 / 3})
    assert said.whole.accuracy.mean == pytest.approx(4 / 7)
    with pytest.raises(ValueError, match='reads its own columns'):
        results.read(['x.jsonl'], rules='autoj', chat=True)


def test_the_published_file_is_known_by_its_counts():
    places = {'code_generation': 84, 'math_reasoning': 32, 'chitchat': 903}
    given = [
        (f'f:{i}', {'scenario': scenario, 'label': i % 2, 'prompt': f'{scenario} {i}',
                    'response 1': 'a', 'response 2': 'b'})
        for scenario, n in places.items() for i in range(n)
    ]  # fmt: skip
    said = autoj.describe(autoj.bench(given))
    assert said == '1019 pairs (Code 84, Math 32, Other 903), 0 ties left out'


WRONG = {
    'label of another kind': ({'label': '0'}, "label: found '0', expected 0, 1 or 2"),
    'label that is true': ({'label': True}, 'label: found True, expected 0, 1 or 2'),
    'no label': ({'label': None}, 'label: found None'),
    'label out of range': ({'label': 3}, 'label: found 3'),
    'no text': ({'prompt': ['a']}, 'prompt: found a list, expected a string'),
}


@pytest.mark.parametrize('name', WRONG)
def test_wrong_rows_are_named_by_file_and_line(name, tmp_path):
    change, message = WRONG[name]
    given = rows()
    given[2] |= change
    path = written(tmp_path, given)
    with pytest.raises(DataError) as error:
        autoj.load(path)
    assert str(error.value).startswith(f'{path}:3: ')
    assert message in str(error.value)


def test_a_file_of_other_columns_is_refused(tmp_path):
    given = rows()
    del given[4]['response 2']
    path = written(tmp_path, given)
    with pytest.raises(DataError, match="expected 'response 2' among them") as error:
        autoj.load(path)
    assert str(error.value).startswith(f'{path}:5: ')
    with pytest.raises(DataError, match='found no pair with a better response'):
        autoj.load(written(tmp_path, [row for row in rows() if row['label'] == 2]))
