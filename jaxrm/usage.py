"""What is wrong with a command's flags, in one line: tyro draws a box of many."""

import contextlib
import io
import re
import sys
from collections.abc import Iterator

COLOURS = re.compile(r'\x1b\[[0-9;]*m')
FOUND = re.compile(r"(?:from \[|: )'([^']*)'\]?\.?(?: Got errors.*)?$")


@contextlib.contextmanager
def one_line() -> Iterator[None]:
    """Around tyro's reading of flags: raises ValueError, in one line, where it would end."""
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            yield
    except SystemExit as stopped:
        if stopped.code != 2:
            raise
        raise ValueError(told(said.getvalue())) from None
    sys.stderr.write(said.getvalue())


def told(box: str) -> str:
    """The line that says what a box does: the flag, what was found and what is expected."""
    sections = _sections(box)
    if not sections:
        return ' '.join(box.split())
    text, *more = (' '.join(' '.join(lines).split()) for lines in sections)
    line = _choice(text) or _value(text, more) or _missing(sections[0]) or text.rstrip('.')
    for other in more:
        if meant := re.match(r'Perhaps you meant: (-\S+)', other):
            line += f', perhaps {meant[1]}'
        elif other.startswith('Available subcommands: '):
            line += f', expected one of {other.partition(": ")[2]}'
    help_ = re.search(r'\S.* --help$', more[-1].rpartition('helptext, ')[2]) if more else None
    return f'{line} (see {re.sub("^(run:?|see) ", "", help_[0])})' if help_ else line


def _inside(box: str) -> list[str]:
    """The lines of a box, of line-drawing characters or below a title and a rule."""
    lines = COLOURS.sub('', box).splitlines()
    if framed := [line.strip() for line in lines if line.startswith('│')]:
        return [line.removeprefix('│ ').removesuffix('│') for line in framed]
    rules = [i for i, line in enumerate(lines) if re.fullmatch(' -+ ', line)]
    return [line.removeprefix('  ') for line in lines[rules[0] + 1 :]] if rules else []


def _sections(box: str) -> list[list[str]]:
    """The lines inside, between its rules."""
    found: list[list[str]] = [[]]
    for line in _inside(box):
        if re.fullmatch('─+|-+', line.strip()):
            found.append([])
        elif line.strip():
            found[-1].append(line.rstrip())
    return [lines for lines in found if lines]


def _choice(text: str) -> str | None:
    found = re.match(r"invalid choice (.*) for argument '(.*?)'\. Expected one of \((.*)\)\.", text)
    if not found:
        return None
    given, flag, choices = found.groups()
    known = sorted(set(re.findall(r"'([^']*)'", choices)) - {'None'})
    return f'{flag}: found {given}, expected one of {", ".join(known)}'


def _value(text: str, more: list[str]) -> str | None:
    """Of a value that is not of the flag's type."""
    wrong, value = re.match(r'Error parsing (\S+):', text), FOUND.search(text)
    kind = re.search(r'Argument helptext: (?:-\S+,? )*(\S+)', ' '.join(more))
    if not (wrong and value and kind):
        return None
    expected = ' or '.join(part for part in kind[1].split('|') if part != '{None}')
    return f'{wrong[1]}: found {value[1]!r}, expected {expected}'


def _missing(lines: list[str]) -> str | None:
    """Of flags that have to be given, of which a box also has the help, further in."""
    if not lines[0].startswith('Missing from '):
        return None
    names = [line.strip() for line in lines if re.match(r' {4}\S', line)]
    return f'found nothing for {", ".join(names)}'
