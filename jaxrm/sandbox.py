"""Running code that a model wrote: in namespaces of its own, with limits, in a folder that goes.

A program sees no network, no process but its own, and no files but the system's and Python's, read
only; it can write up to `disk` bytes in its working folder. It has no rights and no devices. Its
time is limited, and of each of its processes, of which there are no more than 256, the memory: all
of them together can take more than `memory`, which nothing here bounds.

This keeps the machine safe, and not the result: tests run in the program's own interpreter, and
one that sets out to deceive them can. It takes Linux from 5.12 on with namespaces for users, or
root; where they are not there, programs are refused unless `unsafe`, which keeps the limits and
nothing else: processes that a program has put into a session of their own outlive it there.
"""

import contextlib
import functools
import os
import secrets
import select
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

CHILD = Path(__file__).with_name('sandbox_child.py')
SET_UP = 60.0  # seconds, before the program's own time begins


class Outcome(NamedTuple):
    """Whether a program ran to its end without an error, and else why not."""

    passed: bool
    why: str = ''


def available() -> bool:
    """Whether programs can be kept apart here."""
    try:
        _tried()
    except OSError:
        return False
    return True


@functools.cache
def _tried() -> None:
    """Raises OSError where they can not, and then is asked again the next time."""
    outcome = _execute('', 20.0, 1 << 30, 1 << 20, unsafe=False)
    if not outcome.passed:
        raise OSError(outcome.why)


def check(*, unsafe: bool = False) -> None:
    """Raises ValueError where programs cannot be kept apart, unless `unsafe`."""
    if not unsafe and not available():
        raise ValueError(
            'sandbox: namespaces cannot be made here, so that programs would run with all rights '
            'of this user; --unsafe runs them all the same'
        )


def run(
    program: str,
    *,
    timeout: float = 3.0,
    memory: int = 1 << 30,
    disk: int = 1 << 24,
    unsafe: bool = False,
) -> Outcome:
    """How a Python program, its tests included, ends; limits in seconds and bytes.

    Time runs from when the program begins. One that leaves early, whatever status it leaves with,
    has not passed. Raises ValueError where it cannot be kept apart, unless `unsafe`, and OSError
    where it could not be begun.
    """
    check(unsafe=unsafe)
    return _execute(program, timeout, memory, disk, unsafe)


def run_all(programs: Sequence[str], *, workers: int | None = None, **limits) -> list[Outcome]:
    """`run` of every program, several at a time."""
    check(unsafe=limits.get('unsafe', False))
    with ThreadPoolExecutor(workers or os.cpu_count()) as pool:
        return list(pool.map(lambda program: run(program, **limits), programs))


def _execute(program: str, timeout: float, memory: int, disk: int, unsafe: bool) -> Outcome:
    source, word = program.encode(errors='surrogatepass'), secrets.token_hex(16).encode()
    with (
        tempfile.TemporaryDirectory(prefix='jaxrm-sandbox-') as folder,
        tempfile.TemporaryFile() as code,
        _pipe() as (ours, theirs),
    ):
        code.write(source + word)
        code.flush()
        numbers = (theirs, code.fileno(), len(source), not unsafe, memory, disk)
        command = [sys.executable, '-I', '-S', CHILD, *map(int, numbers), max(int(timeout), 1) + 1]
        quiet = subprocess.DEVNULL
        started = subprocess.Popen(
            [*map(str, command)], stdin=quiet, stdout=quiet, stderr=quiet, cwd=folder,
            pass_fds=[theirs, code.fileno()], start_new_session=True,
            env={'PATH': os.defpath, 'HOME': folder if unsafe else '/tmp'},
        )  # fmt: skip
        os.close(theirs)
        try:
            said = _heard(ours, timeout)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(started.pid, signal.SIGKILL)
            started.wait()
    if said is None:
        return Outcome(False, f'ran for more than {timeout:g} s')
    why = '' if said == word else said.decode(errors='replace') or 'ended before its tests did'
    return Outcome(said == word, why)


@contextlib.contextmanager
def _pipe() -> Iterator[tuple[int, int]]:
    """Its two ends, of which the second is the caller's to close."""
    ours, theirs = os.pipe()
    try:
        yield ours, theirs
    finally:
        os.close(ours)


def _heard(report: int, timeout: float) -> bytes | None:
    """What is said of the program's end, b'' where it says nothing; None when the time is out.

    Raises OSError where it has not begun.
    """
    start = _read(report, SET_UP)
    if start is None or not start.startswith(b'+'):
        why = (start or b'').removeprefix(b'!').decode(errors='replace')
        raise OSError(f'sandbox: the program has not begun: {why or "nothing was heard of it"}')
    return start[1:] or _read(report, timeout)


def _read(report: int, seconds: float) -> bytes | None:
    ready, _, _ = select.select([report], [], [], seconds)
    return os.read(report, 4096) if ready else None


def humaneval(prompt: str, completion: str, test: str, entry_point: str) -> str:
    """The program of a HumanEval problem: prompt and completion, the tests, and their call."""
    return f'{prompt}{completion}\n{test}\ncheck({entry_point})\n'


def mbpp(code: str, tests: Sequence[str], setup: str = '') -> str:
    """The program of an MBPP problem: the code, what its tests need, and all of them."""
    return '\n'.join([code, setup, *tests, ''])
