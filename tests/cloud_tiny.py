"""A cloud in a folder (see fake_gcloud), and the scripts of a checkout that run in it."""

import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
BASH = shutil.which('bash') or '/bin/bash'
SETTINGS = {'PROJECT': 'p', 'ZONE': 'z', 'NAME': 'pod', 'ACCELERATOR': 'v6e-16', 'POLL': '0.2'}
WHERE = ['--project=p', '--zone=z', '--quiet']

WORDS = [
    'a b',
    "it's",
    '"so"',
    '$HOME',
    '*',
    '',
    '`x`',
    'a  b\\',
    'new\nline',
    'é',
    '--x=a b',
    '!;&',
]

# Says what it was given.
SHOW = 'import json, sys\nprint("words", json.dumps(sys.argv[1:]))\n'
# Trains for 4 steps: each leaves a checkpoint, and a line in the output folder; waits at step 2.
TRAIN = """
import os, pathlib, sys, time
given = dict(zip(sys.argv[1::2], sys.argv[2::2]))
saved, out = (pathlib.Path(given[name]) for name in ('--checkpoint_dir', '--output_dir'))
if os.environ['JAX_PROCESS_ID'] != '0':
    sys.exit()
saved.mkdir(parents=True, exist_ok=True)
if given.get('--fail'):
    sys.exit(int(given['--fail']))
for step in range(1, 5):
    if not (saved / str(step)).exists():
        out.mkdir(parents=True, exist_ok=True)
        with (out / 'steps').open('a') as file:
            file.write(f'{step}\\n')
        (saved / str(step)).touch()
        if step == 2 and '--wait' in given:
            time.sleep(0.5)
            (out / 'two').touch()
            time.sleep(60)
"""

# Stands in for an interpreter on the workers: environments are made of VENV below.
PYTHON312 = f"""#!{BASH}
case "$*" in
  '-m venv '*) mkdir -p "$3/bin" && cp "${{0%/*}}/venv-python" "$3/bin/python" ;;
esac
"""
# pip leaves a line; all else is this interpreter, for which gs:// is a folder.
VENV = f"""#!{BASH}
case "$1 $2" in
  '-m pip') echo "$*" >>"$HOME/pip.log" ;;
  *) exec '{sys.executable}' "${{@/#gs:\\/\\//$BUCKETS/}}" ;;
esac
"""


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)


class Cloud:
    """Where `gcloud` of this PATH acts: `plans` are the states of each resource that is made.

    A look at the resource takes it to its next state. `deny` are the beginnings of commands that
    are not permitted; with `preempt_at`, a path in a bucket, the machines are lost once that is
    there, and the resource `becomes` what the list says.
    """

    def __init__(self, folder, plans=(('ACTIVE',),), *, workers=2, environ=(), **more):
        self.folder = folder
        self.buckets = folder / 'buckets'
        self.buckets.mkdir()
        bin_ = folder / 'bin'
        fake = f'#!{BASH}\nexec {sys.executable} -I -S {HERE / "fake_gcloud.py"} "$@"\n'
        write(bin_ / 'gcloud', fake)
        write(bin_ / 'python3.12', PYTHON312)
        write(bin_ / 'venv-python', VENV)
        self.path = f'{bin_}:{os.environ["PATH"]}'
        start = {'name': 'pod', 'state': None, 'next': [], 'plans': plans, 'workers': workers}
        start |= {'exists': False, 'deny': [], 'preempt_at': None, 'becomes': ['SUSPENDED']}
        (folder / 'resource.json').write_text(json.dumps(start | more))
        there = {'PATH': self.path, 'FAKE_CLOUD': str(folder), 'BUCKETS': str(self.buckets)}
        (folder / 'none.env').touch()
        (folder / 'environ.json').write_text(json.dumps(there | dict(environ)))

    def home(self, worker):
        return self.folder / 'workers' / str(worker)

    def log(self, worker):
        path = self.home(worker) / '.jaxrm' / 'log'
        return path.read_text() if path.exists() else ''

    def calls(self, *start):
        """The commands that gcloud was given; those that begin so."""
        path = self.folder / 'calls.jsonl'
        found = [json.loads(x) for x in path.read_text().splitlines()] if path.exists() else []
        return [call for call in found if call[: len(start)] == list(start)]

    def count(self, verb):
        return len(self.calls('compute', 'tpus', 'queued-resources', verb))

    def __call__(self, *words, root=ROOT, script='tpu.sh', cwd=None, seconds=60, **settings):
        """A finished script: (status, stdout, stderr)."""
        env = {'PATH': self.path, 'HOME': str(self.folder), 'FAKE_CLOUD': str(self.folder)}
        env |= SETTINGS | {'CONFIG': str(self.folder / 'none.env')}  # not one that lies about
        env |= {name: str(x) for name, x in settings.items()}
        command = [BASH, str(root / 'tpu_scripts' / script), *map(str, words)]
        done = subprocess.run(
            command,
            env=env,
            cwd=cwd or self.folder,
            capture_output=True,
            text=True,
            timeout=seconds,
        )
        return done.returncode, done.stdout, done.stderr


def checkout(folder, **files):
    """A small checkout with the scripts, which git knows."""
    shutil.copytree(ROOT / 'tpu_scripts', folder / 'tpu_scripts')
    for name in ('pyproject.toml', 'constraints.txt'):
        (folder / name).write_text(f'# {name}\n')
    (folder / '.gitignore').write_text('/runs/\n')
    for name, text in files.items():
        write(folder / f'{name}.py', text)
    for command in ('init -q', 'add -A'):
        subprocess.run(['git', *command.split()], cwd=folder, check=True)
    return folder


def commands(text):
    """What a dry run prints, as words."""
    return [shlex.split(line)[1:] for line in text.splitlines()]
