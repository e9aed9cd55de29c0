"""Programs of models: what they may do, and what they may not."""

import os
import uuid
from pathlib import Path

import pytest

from jaxrm import sandbox

apart = pytest.mark.skipif(
    not sandbox.available(), reason='unshare cannot make namespaces here: programs are refused'
)
LEFT = Path('/tmp') / f'jaxrm-{uuid.uuid4().hex}'

# What a program does, and how it ends; '' where it passes.
ENDS = {
    'assert sum([1, 2]) == 3': '',
    'assert sum([1, 2]) == 4': 'AssertionError',
    'def f(:': 'SyntaxError',
    'import sys; sys.exit(0)': 'SystemExit',
    'import os; os._exit(0)': 'ended before its tests',
    'raise KeyboardInterrupt': 'KeyboardInterrupt',
    'x = [0] * (1 << 28)': 'MemoryError',
    "open('x', 'w').write('a' * 1000)": '',
    "open('x', 'w').write('a' * (1 << 20))": 'File too large',
    "import os; assert 'SECRET' not in os.environ": '',
    "assert __name__ == '__main__'; import sys; assert sys.stdin.read() == ''": '',
}
FORBIDDEN = {
    f"open('{LEFT}', 'w')": 'Read-only file system',
    f"open('{Path.home() / LEFT.name}', 'w')": 'Read-only file system',
    "import socket; socket.create_connection(('127.0.0.1', 9), 1)": 'OSError|Refused',
    "import os; assert not os.system('mount -o remount,rw,bind / 2>/dev/null')": 'AssertionError',
    f'import os; os.kill({os.getpid()}, 9)': 'ProcessLookupError',
    "for i in range(9): open(f'{i}', 'w').write('a' * 60_000)": 'No space left',
}
LIMITS = {'memory': 1 << 29, 'disk': 1 << 18}


@pytest.mark.parametrize('program', ENDS)
@pytest.mark.parametrize('unsafe', [pytest.param(False, marks=apart), True])
def test_how_a_program_ends(program, unsafe, monkeypatch):
    monkeypatch.setenv('SECRET', 'x')
    passed, why = sandbox.run(program, unsafe=unsafe, **LIMITS)
    assert passed == (ENDS[program] == '')
    assert ENDS[program] in why


@apart
@pytest.mark.parametrize('program', FORBIDDEN, ids=range(len(FORBIDDEN)))
def test_what_a_program_may_not_do(program):
    passed, why = sandbox.run(program, **LIMITS)
    assert not passed
    assert any(part in why for part in FORBIDDEN[program].split('|'))
    assert not LEFT.exists()
    assert not (Path.home() / LEFT.name).exists()


@pytest.mark.parametrize('unsafe', [pytest.param(False, marks=apart), True])
def test_time_is_limited_and_nothing_is_left(unsafe):
    name = f'jaxrm-{uuid.uuid4().hex}'
    program = f'import os\nos.execlp("sh", "{name}", "-c", "sleep 60; true")'
    assert sandbox.run(program, timeout=0.5, unsafe=unsafe) == (False, 'ran for more than 0.5 s')
    commands = []
    for status in Path('/proc').glob('[0-9]*/cmdline'):
        try:
            commands.append(status.read_bytes())
        except OSError:  # it has just ended
            continue
    assert not any(name.encode() in command for command in commands)


def test_without_namespaces_programs_are_refused(monkeypatch):
    monkeypatch.setattr(sandbox, 'available', lambda: False)
    with pytest.raises(ValueError, match='sandbox: unshare cannot make namespaces here'):
        sandbox.run('pass')
    with pytest.raises(ValueError, match='--unsafe runs them all the same'):
        sandbox.run_all(['pass'])
    assert sandbox.run('pass', unsafe=True).passed


def test_problems_become_programs():
    add = sandbox.humaneval(
        'def add(a, b):\n', '    return a + b\n', 'def check(f):\n    assert f(1, 2) == 3\n', 'add'
    )
    bad = sandbox.mbpp('def f(x):\n    return x', ['assert f(1) == 1', 'assert f(2) == 3'])
    root = sandbox.mbpp('def f(x):\n    return math.sqrt(x)', ['assert f(4) == 2'], 'import math')
    found = sandbox.run_all([add, bad, root, ''], workers=2, unsafe=True)
    assert [x.passed for x in found] == [True, False, True, True]
