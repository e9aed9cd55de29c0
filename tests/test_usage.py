"""Wrong flags are one line, whatever tyro draws."""

import dataclasses
import io
import sys
from typing import Literal

import pytest
import tyro

from jaxrm import usage


@dataclasses.dataclass(frozen=True)
class Flags:
    """Some."""

    model: str
    """A name that is explained at such a length that the box in which tyro says so has several
    lines of it."""
    kind: Literal['none', 'some', 'all'] | None = None
    """What kind."""
    count: int | None = None
    """How many."""
    share: float = 0.5
    names: tuple[str, ...] = ()


GOOD = ['--model', 'm']


def parsed(args):
    with usage.one_line():
        return tyro.cli(Flags, args=args, prog='tool')


@pytest.fixture(params=['utf-8', 'ascii'])
def drawn(request, monkeypatch):
    """As on a terminal with line-drawing characters, and without."""
    monkeypatch.setattr(sys, 'stdout', io.TextIOWrapper(io.BytesIO(), encoding=request.param))


@pytest.mark.usefixtures('drawn')
@pytest.mark.parametrize(
    ('args', 'line'),
    [
        ([*GOOD, '--kind', 'x'], "--kind: found 'x', expected one of all, none, some"),
        ([*GOOD, '--count', 'few'], "--count: found 'few', expected INT"),
        ([*GOOD, '--share', 'half'], "--share: found 'half', expected FLOAT"),
        ([], 'found nothing for --model STR'),
        ([*GOOD, '--cuont', '3'], 'Unrecognized options: --cuont, 3, perhaps --count'),
        ([*GOOD, 'stray'], 'Unrecognized options: stray'),
        ([*GOOD, '--share'], "Missing value for argument '--share'. Expected 1 values"),
    ],
    ids=['choice', 'optional', 'number', 'missing', 'misspelt', 'stray', 'no-value'],
)
def test_the_flag_what_was_found_and_what_is_expected(args, line):
    with pytest.raises(ValueError, match='tool') as caught:
        parsed(args)
    assert str(caught.value) == f'{line} (see tool --help)'


@pytest.mark.usefixtures('drawn')
@pytest.mark.parametrize('columns', ['30', '400'])
def test_the_width_of_the_terminal_does_not_matter(monkeypatch, columns):
    monkeypatch.setenv('COLUMNS', columns)
    with pytest.raises(ValueError, match="--kind: found 'x', expected one of all, none, some"):
        parsed([*GOOD, '--kind', 'x'])


def test_right_flags_and_help_are_left_alone(capsys):
    assert parsed([*GOOD, '--count', '3']) == Flags('m', count=3)
    with pytest.raises(SystemExit) as stopped:
        parsed(['--help'])
    assert stopped.value.code == 0
    assert 'How many' in capsys.readouterr().out


def test_what_is_not_a_box_is_still_one_line():
    assert usage.told('tool: error:\n  nothing\n will do') == 'tool: error: nothing will do'
    assert usage.told('│ a new kind of\n│ trouble. │') == 'a new kind of trouble'
