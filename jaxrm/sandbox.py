"""Running code that a model wrote: in namespaces of its own, with limits, in a folder that goes.

A program has no network and sees no process but its own; it can read what its user can, and write
nothing but up to `disk` bytes in its working folder. Time, memory and processes are limited. This
takes `unshare` of util-linux and a kernel that allows user namespaces; where they are not there,
programs are refused unless `unsafe`, which keeps the limits and nothing else.
"""

import contextlib
import functools
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

# As root of new namespaces: mounts become read-only, but for a fresh one at the working folder
# and this namespace's own /proc; then once more into new ones, where none of it can be undone.
PREPARE = """
set -e
mount --make-rprivate /
mount -t tmpfs -o size=$2,mode=777 tmpfs "$1"
while read -r _ _ _ _ point _; do
  case $point in "$1" | /proc | /proc/*) continue ;; esac
  mount -o remount,bind,ro "$point" || mount -t tmpfs -o ro none "$point"
done </proc/self/mountinfo
cd "$1"
shift 2
exec unshare -r -m "$@"
"""
# Limits, then the program from standard input; descriptor 3 hears how it ended.
RUN = """
import os, resource, sys
report, token, memory, disk, seconds = (int(sys.argv[1]), *sys.argv[2:3], *map(int, sys.argv[3:]))
for name, most in (('AS', memory), ('DATA', memory), ('FSIZE', disk), ('CPU', seconds),
                   ('NOFILE', 64), ('NPROC', 256), ('CORE', 0)):
    limit = getattr(resource, 'RLIMIT_' + name)
    resource.setrlimit(limit, (most, most))
source = sys.stdin.read()
sys.argv, said = ['program'], ''
try:
    exec(compile(source, 'program', 'exec'), {'__name__': '__main__'})
    said = token
except BaseException as error:
    said = f'{type(error).__name__}: {error}'[:300]
finally:
    os.write(report, said.encode(errors='replace'))
    os._exit(0)
"""


class Outcome(NamedTuple):
    """Whether a program ran to its end without an error, and else why not."""

    passed: bool
    why: str = ''


@functools.cache
def available() -> bool:
    """Whether programs can be kept apart here."""
    if shutil.which('unshare') is None:
        return False
    return _execute('', 20.0, 1 << 30, 1 << 20, unsafe=False).passed


def check(*, unsafe: bool = False) -> None:
    """Raises ValueError where programs cannot be kept apart, unless `unsafe`."""
    if not unsafe and not available():
        raise ValueError(
            'sandbox: unshare cannot make namespaces here, so that programs would run with all '
            'rights of this user; --unsafe runs them all the same'
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

    One that leaves early, whatever status it leaves with, has not passed. Raises ValueError where
    it cannot be kept apart, unless `unsafe`.
    """
    check(unsafe=unsafe)
    return _execute(program, timeout, memory, disk, unsafe)


def run_all(programs: Sequence[str], *, workers: int | None = None, **limits) -> list[Outcome]:
    """`run` of every program, several at a time."""
    check(unsafe=limits.get('unsafe', False))
    with ThreadPoolExecutor(workers or os.cpu_count()) as pool:
        return list(pool.map(lambda program: run(program, **limits), programs))


def _execute(program: str, timeout: float, memory: int, disk: int, unsafe: bool) -> Outcome:
    token = secrets.token_hex(16)
    ours, theirs = os.pipe()
    numbers = map(str, (memory, disk, max(int(timeout) + 1, 1)))
    python = [sys.executable, '-I', '-S', '-c', RUN, str(theirs), token, *numbers]
    try:
        with tempfile.TemporaryDirectory(prefix='jaxrm-sandbox-') as folder:
            apart = ['unshare', '-rnpmf', '--mount-proc', '--kill-child', 'sh', '-c', PREPARE]
            command = python if unsafe else [*apart, 'sh', folder, str(disk), *python]
            timed_out = _ends(command, program, folder, theirs, timeout)
        os.close(theirs)
        theirs = -1
        said = os.read(ours, 4096).decode(errors='replace')
    finally:
        for end in (ours, theirs):
            if end >= 0:
                os.close(end)
    if timed_out:
        return Outcome(False, f'ran for more than {timeout:g} s')
    return Outcome(said == token, '' if said == token else said or 'ended before its tests did')


def _ends(command: list[str], program: str, folder: str, report: int, timeout: float) -> bool:
    """Whether the time ran out; no process of the program is left."""
    quiet = subprocess.DEVNULL
    started = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=quiet, stderr=quiet, pass_fds=[report],
        cwd=folder, env={'PATH': os.defpath, 'HOME': folder}, start_new_session=True,
    )  # fmt: skip
    try:
        started.communicate(program.encode(errors='surrogatepass'), timeout=timeout)
        return False
    except subprocess.TimeoutExpired:
        return True
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(started.pid, signal.SIGKILL)
        started.wait()


def humaneval(prompt: str, completion: str, test: str, entry_point: str) -> str:
    """The program of a HumanEval problem: prompt and completion, the tests, and their call."""
    return f'{prompt}{completion}\n{test}\ncheck({entry_point})\n'


def mbpp(code: str, tests: Sequence[str], setup: str = '') -> str:
    """The program of an MBPP problem: the code, what its tests need, and all of them."""
    return '\n'.join([code, setup, *tests, ''])
