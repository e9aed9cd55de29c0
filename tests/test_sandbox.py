"""Programs of models: what they may do, and what they may not."""

import os
import socket
import subprocess
import time
import uuid
from pathlib import Path

import pytest

from jaxrm import sandbox

apart = pytest.mark.skipif(
    not sandbox.available(), reason='namespaces cannot be made here: programs are refused'
)
EITHER = [pytest.param(False, marks=[apart, pytest.mark.slow]), True]

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
    'import os, sys; os.fork() or sys.exit(0); os.wait()': '',
    'from dataclasses import dataclass\n@dataclass\nclass A:\n    x: "int"\nassert A(1).x': '',
}
LIMITS = {'memory': 1 << 29, 'disk': 1 << 18, 'timeout': 20.0}


@pytest.mark.parametrize('program', ENDS)
@pytest.mark.parametrize('unsafe', EITHER)
def test_how_a_program_ends(program, unsafe, monkeypatch):
    monkeypatch.setenv('SECRET', 'x')
    passed, why = sandbox.run(program, unsafe=unsafe, **LIMITS)
    assert ENDS[program] in why
    assert passed == (ENDS[program] == '')


# Kept apart

# Each of these must fail inside; what it would do is looked for outside, too.
FORBIDDEN = """
import os, resource, socket
def refused(what, *errors):
    try:
        what()
    except errors or OSError:
        return
    raise AssertionError(f'could {what.__name__}')
def write_root(): open('/left', 'w')
def write_system(): open('/usr/left', 'w')
def read_of_caller(): open(FILE)
def reach_port(): socket.create_connection(('127.0.0.1', PORT), 1)
def reach_path():
    s = socket.socket(socket.AF_UNIX); s.connect(PATH)
def reach_abstract():
    s = socket.socket(socket.AF_UNIX); s.connect('\\0' + PATH)
def set_kernel(): open('/proc/sys/vm/swappiness', 'r+')
def open_disk(): os.mknod('/tmp/disk', 0o060666, os.makedev(254, 0)); open('/tmp/disk', 'rb')
def kill_outside(): os.kill(PID, 9)
def be_root(): os.setuid(0)
def remount(): os.chroot('/tmp')
def raise_limit(): resource.setrlimit(resource.RLIMIT_NPROC, (9999, 9999))
for what in (write_root, write_system, read_of_caller, reach_port, reach_path,
             reach_abstract, set_kernel, open_disk, kill_outside, be_root, remount):
    refused(what)
refused(raise_limit, OSError, ValueError)
assert set(os.listdir('/dev')) <= {'null', 'zero', 'full', 'random', 'urandom'}
assert os.getuid() and not os.getgroups()[1:] and os.listdir('.') == []
"""
FORKS = """
import os, time
count = 0
while True:
    try:
        child = os.fork()
    except OSError:
        break
    if not child:
        time.sleep(60)
    count += 1
assert count < 256, count
raise ValueError(f'forked {count // 200}')
"""


@apart
def test_what_a_program_may_not_do(tmp_path):
    """Against ports and sockets on which somebody listens."""
    tmp_path.chmod(0o755)
    path = str(tmp_path / 's')
    made = {'FILE': __file__, 'PATH': path, 'PID': os.getpid()}
    with (
        socket.create_server(('127.0.0.1', 0)) as port,
        socket.socket(socket.AF_UNIX) as named,
        socket.socket(socket.AF_UNIX) as abstract,
    ):
        named.bind(path)
        abstract.bind('\0' + path)
        os.chmod(path, 0o777)
        for server in (port, named, abstract):
            server.listen()
            server.setblocking(False)
        made['PORT'] = port.getsockname()[1]
        given = ''.join(f'{name} = {value!r}\n' for name, value in made.items())
        assert sandbox.run(given + FORBIDDEN, **LIMITS) == (True, '')
        for server in (port, named, abstract):
            with pytest.raises(BlockingIOError):
                server.accept()


@apart
def test_processes_are_counted_and_all_end():
    """For root, too."""
    name = f'jaxrm-{uuid.uuid4().hex}'
    mark = f'import os, ctypes\nctypes.CDLL(None).prctl(15, b"{name[-12:]}", 0, 0, 0)\n'
    assert sandbox.run(mark + FORKS, **LIMITS) == (False, 'ValueError: forked 1')
    time.sleep(0.1)
    for comm in Path('/proc').glob('[0-9]*/comm'):
        try:
            assert name[-12:] not in comm.read_text()
        except OSError:  # it has just ended
            continue


@apart
@pytest.mark.slow
def test_a_working_folder_of_its_own():
    fills = "for i in range(9): open(f'{i}', 'w').write('a' * 60_000)"
    assert 'No space left' in sandbox.run(fills, **LIMITS).why
    assert sandbox.run("import os; assert os.listdir('/tmp') == []", **LIMITS).passed


@pytest.mark.parametrize('unsafe', EITHER)
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


def test_time_is_over_though_a_child_goes_on():
    """One with a session of its own, which holds all that it was given."""
    program = 'import os, time\nif not os.fork():\n    os.setsid(); time.sleep(8)\nos._exit(0)'
    began = time.monotonic()
    assert sandbox.run(program, timeout=0.5, unsafe=True) == (False, 'ran for more than 0.5 s')
    assert time.monotonic() - began < 7.5


def test_the_time_is_the_programs_own(monkeypatch):
    """What comes before it does not count."""
    slow, popen = 'import time; time.sleep(1)\n', subprocess.Popen
    code = slow + sandbox.CHILD.read_text()

    def delayed(command, **options):
        at = command.index(str(sandbox.CHILD))
        return popen([*command[:at], '-c', code, *command[at + 1 :]], **options)

    monkeypatch.setattr(subprocess, 'Popen', delayed)
    assert sandbox.run('pass', timeout=0.9, unsafe=True).passed


FORGED = """
import os, sys
said = [x for x in open('/proc/self/cmdline', 'rb').read().split(b'\\0') if len(x) == 32]
frame = sys._getframe(1)
while frame:
    known = [*frame.f_globals.values(), *frame.f_locals.values()]
    said += [x for x in known if isinstance(x, str | bytes) and len(x) == 32]
    frame = frame.f_back
for x in said:
    for fd in range(3, 10):
        try:
            os.write(fd, x if isinstance(x, bytes) else x.encode())
        except OSError:
            pass
os._exit(0)
"""


def test_the_word_for_success_is_not_lying_about():
    assert sandbox.run(FORGED, unsafe=True, **LIMITS) == (False, 'ended before its tests did')


def test_without_namespaces_programs_are_refused(monkeypatch):
    monkeypatch.setattr(sandbox, 'available', lambda: False)
    with pytest.raises(ValueError, match='sandbox: namespaces cannot be made here'):
        sandbox.run('pass')
    with pytest.raises(ValueError, match='--unsafe runs them all the same'):
        sandbox.run_all(['pass'])
    assert sandbox.run('pass', unsafe=True, timeout=20.0).passed


def test_a_failure_to_find_out_is_not_remembered(monkeypatch):
    sandbox._tried.cache_clear()
    ends = iter([(False, 'ran for more than 20 s'), (True, ''), AssertionError])
    monkeypatch.setattr(sandbox, '_execute', lambda *_, **__: sandbox.Outcome(*next(ends)))
    assert [sandbox.available() for _ in range(3)] == [False, True, True]
    sandbox._tried.cache_clear()


def test_what_cannot_begin_says_why(tmp_path, monkeypatch):
    child = tmp_path / 'child.py'
    child.write_text('import os, sys; os.write(int(sys.argv[1]), b"!unshare: no")')
    monkeypatch.setattr(sandbox, 'CHILD', child)
    with pytest.raises(OSError, match='sandbox: the program has not begun: unshare: no'):
        sandbox.run('pass', unsafe=True)


def test_problems_become_programs():
    add = sandbox.humaneval(
        'def add(a, b):\n', '    return a + b\n', 'def check(f):\n    assert f(1, 2) == 3\n', 'add'
    )
    bad = sandbox.mbpp('def f(x):\n    return x', ['assert f(1) == 1', 'assert f(2) == 3'])
    root = sandbox.mbpp('def f(x):\n    return math.sqrt(x)', ['assert f(4) == 2'], 'import math')
    found = sandbox.run_all([add, bad, root, ''], workers=2, unsafe=True, timeout=20.0)
    assert [x.passed for x in found] == [True, False, True, True]
