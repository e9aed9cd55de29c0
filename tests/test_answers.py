"""Answers taken out of generated text."""

import pytest

from jaxrm import answers

NUMBERS = {
    'He has 3 apples. The answer is 12.': 12,
    'The answer is 5. No: The answer is 7 of 9': 7,
    'First 4, then 1,234 dollars': 1234,
    'It cost $1,234,567.50.': 1234567.5,
    'Below zero: -3': -3,
    'The answer is -0.5 degrees': -0.5,
    'A half is .5': 0.5,
    'x = 5.': 5,
    'The answer is unknown': None,
    'no number, none': None,
    '': None,
    '10-4': -4,
    'The answer is 18 (3 * 6)': 18,
    '7 The answer is': None,
}


@pytest.mark.parametrize('text', NUMBERS)
def test_number(text):
    assert answers.number(text) == NUMBERS[text]


def test_right_answers():
    assert answers.gold('3 * 6 = <<3*6=18>>18\n#### 1,018') == 1018
    assert answers.gold('so\n#### -2.5') == -2.5
    for wrong in ('the answer is 4', '#### nan', 'so\n#### inf', '#### -Infinity', '####'):
        with pytest.raises(ValueError, match="expected one ending in '#### n'"):
            answers.gold(wrong)
    assert answers.same(18.0, 18)
    assert not answers.same(18.5, 18)
    assert not answers.same(None, 0)


CODE = {
    'def f():\n    return 1\nprint(f())': 'def f():\n    return 1',
    'Here:\n```python\ndef f(): pass\n```\nIt works.': '\ndef f(): pass',
    'Here:\n```\ndef f(): pass\n\nassert f()\n```': '\ndef f(): pass\n',
    '```\nold\n```\n```python\nnew\n```': '\nnew',
    'So\n```py\nnew\n```': '\nnew',
    '```Python\nnew\n```': '\nnew',
    '``` python3\nnew\n```': '\nnew',
    '```c\nold\n```\n```PY\nnew\n```': '\nnew',
    '```c\nint x;\n```': '\nint x;',
    '```x = 1\n```': 'x = 1',
    '```python def f(): pass\n```': ' def f(): pass',
    'x = 1\nif x:\n    y = 2': 'x = 1',
    'x = "\\nclass"': 'x = "\\nclass"',
    'def f():\n    pass\nclass A: pass': 'def f():\n    pass',
}


@pytest.mark.parametrize('text', CODE)
def test_code(text):
    assert answers.code(text) == CODE[text]
