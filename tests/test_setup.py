"""The script `run`: which interpreter it picks, and when it installs."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
BASH = shutil.which('bash') or 'bash'
PYTHON = sys.executable

# Stands in for an interpreter: probes run for real, environments are made of itself, pip and
# everything else only leave a line in $FAKE_LOG.
FAKE = f"""#!{BASH}
case "$1 $2" in
  '-I '*) exec '{PYTHON}' "$@" ;;
  '-m venv') mkdir -p "$3/bin" && cp "$0" "$3/bin/python" ;;
  '-m pip') echo pip >>"$FAKE_LOG"; echo 'no such package'; exit "${{FAKE_PIP:-0}}" ;;
  --version*) echo Python 3.12.0 ;;
  *) echo "$*" >>"$FAKE_LOG" ;;
esac
"""
SHIM = f'#!{BASH}\necho "pyenv: $0: command not found" >&2\nexit 127\n'
OLD = f"""#!{BASH}
exec '{PYTHON}' -I -c 'import sys; sys.version_info = (3, 11, 9); exec(sys.argv[1])' "$3"
"""
STRIPPED = f"""#!{BASH}
exec '{PYTHON}' -I -c 'import sys; sys.modules["ensurepip"] = None; exec(sys.argv[1])' "$3"
"""


def install(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)
    return path


def run(root: Path, *args: str, path: str, **env: str) -> subprocess.CompletedProcess[str]:
    """`run` of the checkout `root` with nothing in the environment but what is given."""
    env = {'PATH': path, 'HOME': str(root / 'home'), **env}
    command = [BASH, str(root / 'run'), *args]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize(
    ('found', 'chosen'),
    [
        ({'python3.13': SHIM, 'python3.12': FAKE}, 'python3.12'),
        ({'python3.12': OLD, 'python3': FAKE}, 'python3'),
        ({'python3.13': STRIPPED, 'python3': OLD, 'python': FAKE}, 'python'),
        ({'python3.13': FAKE, 'python3.12': FAKE}, 'python3.13'),
    ],
)
def test_first_usable_interpreter_on_path(tmp_path, found, chosen):
    for name, text in found.items():
        install(tmp_path / name, text)
    result = run(ROOT, 'which-python', path=str(tmp_path))
    assert (result.returncode, result.stdout, result.stderr) == (0, f'{chosen}\n', '')


@pytest.mark.parametrize('variable', ['HOME', 'PYENV_ROOT'])
def test_interpreter_of_pyenv(tmp_path, variable):
    pyenv = tmp_path / '.pyenv' if variable == 'HOME' else tmp_path
    install(pyenv / 'versions/3.11.9/bin/python', FAKE)
    python = install(pyenv / 'versions/3.12.9/bin/python', FAKE)
    install(tmp_path / 'shims/python3.12', SHIM)
    result = run(ROOT, 'which-python', path=str(tmp_path / 'shims'), **{variable: str(tmp_path)})
    assert result.stdout == f'{python}\n'


def test_interpreter_of_variable(tmp_path):
    install(tmp_path / 'python3.13', FAKE)
    python = install(tmp_path / 'elsewhere/py', FAKE)
    path = str(tmp_path)
    assert run(ROOT, 'which-python', path=path, JAXRM_PYTHON=str(python)).stdout == f'{python}\n'
    wrong = run(ROOT, 'which-python', path=path, JAXRM_PYTHON='/nowhere/python')
    assert wrong.returncode == 1
    assert wrong.stderr == ('run: JAXRM_PYTHON=/nowhere/python is not Python >= 3.12 with venv\n')


@pytest.mark.parametrize('found', [{}, {'python3': OLD, 'python3.12': SHIM}])
def test_no_interpreter_is_one_line(tmp_path, found):
    for name, text in found.items():
        install(tmp_path / name, text)
    result = run(ROOT, 'which-python', path=str(tmp_path))
    assert (result.returncode, result.stdout) == (1, '')
    assert result.stderr.count('\n') == 1
    assert 'install python3.12' in result.stderr


@pytest.fixture
def checkout(tmp_path):
    """A copy of what set-up reads, with a fake interpreter; calling it returns (result, log)."""
    root = tmp_path / 'a checkout'
    root.mkdir()
    for name in ('run', 'pyproject.toml', 'constraints.txt'):
        shutil.copy(ROOT / name, root)
    python = install(tmp_path / 'fake', FAKE)
    log = tmp_path / 'log'

    def call(*args, **env):
        log.write_text('')
        known = {'JAXRM_PYTHON': str(python), 'FAKE_LOG': str(log)}
        result = run(root, *args, path=os.defpath, **known, **env)
        return result, log.read_text().splitlines()

    call.root = root
    return call


def test_installs_once(checkout):
    result, log = checkout('test', '-x')
    assert (result.returncode, log) == (0, ['pip', '-m pytest -n 2 --dist loadfile -x'])
    assert 'installing into .venv' in result.stderr
    result, log = checkout('quickstart', '--steps', '2')
    assert (result.stderr, log) == ('', ['-m experiments.quickstart --steps 2'])
    result, log = checkout('python', '-m', 'something', 'two words')
    assert log == ['-m something two words']


@pytest.mark.parametrize('name', ['pyproject.toml', 'constraints.txt'])
def test_installs_again_when_requirements_change(checkout, name):
    checkout('test')
    with (checkout.root / name).open('a') as file:
        file.write('# changed\n')
    assert checkout('test')[1] == ['pip', '-m pytest -n 2 --dist loadfile']


def test_installs_again_after_an_interruption(checkout):
    result, log = checkout('test', FAKE_PIP='1')
    assert (result.returncode, log) == (1, ['pip'])
    assert 'no such package' in result.stderr
    assert checkout('test')[1] == ['pip', '-m pytest -n 2 --dist loadfile']


def test_installs_again_when_moved(checkout, tmp_path):
    checkout('test')
    moved = tmp_path / 'moved'
    checkout.root.rename(moved)
    log = tmp_path / 'log'
    known = {'JAXRM_PYTHON': str(tmp_path / 'fake'), 'FAKE_LOG': str(log)}
    run(moved, 'test', path=os.defpath, **known)
    assert log.read_text().splitlines()[-2:] == ['pip', '-m pytest -n 2 --dist loadfile']


def test_status_of_the_command_is_kept(checkout):
    checkout('test')
    install(checkout.root / '.venv/bin/jaxrm', f'#!{BASH}\necho "$@"; exit 7\n')
    result, _ = checkout('jaxrm', 'score', 'a b')
    assert (result.returncode, result.stdout) == (7, 'score a b\n')


def test_unknown_command_shows_usage():
    result = run(ROOT, 'tset', path='')
    assert (result.returncode, result.stdout) == (2, '')
    assert './run quickstart' in result.stderr
