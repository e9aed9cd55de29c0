"""Folders that appear whole or not at all, and what killed writers leave beside them."""

import fcntl
import json
import os
import subprocess
import sys
import uuid
from pathlib import Path

import pytest

from jaxrm import hf


def made(folder, text):
    folder.mkdir(parents=True)
    (folder / hf.CONFIG).write_text(json.dumps(text))
    return folder


def text(folder):
    return json.loads((folder / hf.CONFIG).read_text())


def left(folder, suffix='', host=None):
    return folder.with_name(f'.{folder.name}.{host or hf._host()}{uuid.uuid4().hex}{suffix}')


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def write(target, value, **options):
    with hf.whole(target, True, **options) as part:
        (part / hf.CONFIG).write_text(json.dumps(value))


def test_leftovers_are_named_and_removed(tmp_path):
    out = tmp_path / 'out'
    dead, other = made(left(out), 'half'), made(left(out, host='00000000'), 'of another machine')
    made(tmp_path / '.out.mine', 'somebody else has called it so')
    assert hf.tidy(out) == [f'{dead}: removed, as a killed run had left it']
    assert names(tmp_path) == sorted(['.out.mine', other.name])
    os.utime(other, (0, 0))
    assert hf.tidy(out) == [f'{other}: removed, as a killed run had left it']
    assert hf.tidy('gs://bucket/out') == hf.tidy(tmp_path / 'no' / 'where') == []


def test_what_is_being_written_stays(tmp_path):
    """By another process, or by this one."""
    out = tmp_path / 'out'
    part = made(left(out), 'half')
    number = os.open(part, os.O_RDONLY)
    fcntl.flock(number, fcntl.LOCK_EX)
    aside = made(part.with_name(f'{part.name}.old'), 'old')
    os.utime(aside, (0, 0))
    assert hf.tidy(out) == []
    os.close(number)
    assert len(hf.tidy(out)) == 2
    assert text(out) == 'old'
    with hf.whole(out, True) as part:
        assert hf.tidy(out) == []
        assert part.is_dir()


def test_an_old_folder_comes_back(tmp_path, monkeypatch):
    out = made(tmp_path / 'out', 'old')
    rename, steps = Path.rename, []

    def fail_second(self, to):
        steps.append(to)
        if len(steps) == 2:
            raise OSError('full')
        return rename(self, to)

    monkeypatch.setattr(Path, 'rename', fail_second)
    with pytest.raises(OSError, match='full'):
        write(out, 'new')
    assert len(steps) == 3
    assert (text(out), names(tmp_path)) == ('old', ['out'])


KILLED = """
import os, signal, sys
from pathlib import Path
from jaxrm import hf
rename = Path.rename
def once(self, to):
    rename(self, to)
    os.kill(os.getpid(), signal.SIGKILL)
Path.rename = once
with hf.whole(sys.argv[1], True) as part:
    (part / hf.CONFIG).write_text('"new"')
"""


@pytest.mark.slow
def test_killed_between_the_two_steps(tmp_path):
    out = made(tmp_path / 'out', 'old')
    ended = subprocess.run([sys.executable, '-c', KILLED, str(out)], check=False)
    assert (ended.returncode, out.exists(), len(names(tmp_path))) == (-9, False, 2)
    with (
        pytest.raises(ValueError, match='exists, expected no such folder'),
        hf.whole(out, False),
    ):
        pass
    assert (text(out), names(tmp_path)) == ('old', ['out'])
    write(out, 'new')
    assert (text(out), names(tmp_path)) == ('new', ['out'])


def test_nothing_left_stands_in_the_way(tmp_path):
    """A second killed run does not meet what the first one has put aside."""
    out = made(tmp_path / 'out', 'old')
    made(tmp_path / '.out.old', 'older')
    for value in ('new', 'newer'):
        made(left(out, '.old'), 'a run that was killed')
        write(out, value)
        assert (text(out), names(tmp_path)) == (value, ['.out.old', 'out'])
