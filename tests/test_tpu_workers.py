"""What a worker does on a TPU, in a pod and under SLURM; a whole run of two of them, preempted."""

import json
import os
import subprocess

import children
import pytest
from cloud_tiny import BASH, ROOT, SHOW, TRAIN, WORDS, Cloud, checkout, write
from test_distributed_runs import SHORT, SMALL, write_pairs


@pytest.fixture
def cloud(tmp_path):
    """Makes one in the test's folder."""
    return lambda *plans, **more: Cloud(tmp_path, plans or (('ACTIVE',),), **more)


def worker(cloud, tmp_path, *words, index=0, **settings):
    root = tmp_path / 'checkout'
    if not root.exists():
        checkout(root, train=TRAIN)
    return cloud(
        *words, root=root, script='worker.sh', JAX_PROCESS_ID=index, BUCKET='gs://b', **settings
    )


def test_the_first_worker_keeps_its_output_folder(cloud, tmp_path):
    pod = cloud()
    (pod.buckets / 'b/runs/mine').mkdir(parents=True)
    (pod.buckets / 'b/runs/mine/before').touch()
    here = tmp_path / 'checkout' / 'runs' / 'mine'
    command = 'run', 'bash', '-c', 'mkdir -p "$2"; touch "$2/after"; exit 7', 'x', '--output_dir'
    assert worker(pod, tmp_path, *command, 'runs/mine', index=1)[0] == 7
    assert not (pod.buckets / 'b/runs/mine/after').exists()
    assert not (here / 'before').exists()
    assert worker(pod, tmp_path, *command, 'runs/mine')[0] == 7
    assert (here / 'before').exists()
    assert (pod.buckets / 'b/runs/mine/after').exists()
    status, _, err = worker(pod, tmp_path, 'run', 'true')
    assert status == 1
    assert 'expected --output_dir DIR' in err


def test_results_that_cannot_be_kept_are_an_error(cloud, tmp_path):
    pod = cloud(deny=['storage rsync --recursive --exclude'])
    status, _, err = worker(pod, tmp_path, 'run', 'true', '--output_dir=runs/mine')
    assert status == 1
    assert 'PERMISSION_DENIED' in err


def test_a_signal_reaches_the_run(cloud, tmp_path):
    text = 'trap "echo saved; exit 143" TERM; kill -TERM $PPID; while :; do sleep 0.05; done'
    status, out, _ = worker(cloud(), tmp_path, 'run', 'bash', '-c', text, 'x', '--output_dir', 'o')
    assert (status, out) == (143, 'saved\n')


SRUN = f"""#!{BASH}
while [[ $1 == --* ]]; do shift; done
"$@"
"""


@pytest.mark.parametrize(('code', 'requeued'), [(0, False), (2, False), (143, True)])
def test_slurm(cloud, tmp_path, code, requeued):
    pod = cloud()
    write(tmp_path / 'bin' / 'srun', SRUN)
    write(tmp_path / 'bin' / 'scontrol', f'#!{BASH}\necho "$@" >"$HOME/scontrol"\n')
    job = {'SLURM_SUBMIT_DIR': ROOT, 'SLURM_JOB_ID': 12, 'VENV': 'none'}
    command = 'bash', '-c', 'printf "%s," "$@"; exit "$1"', 'x', code, *WORDS
    status, out, _ = pod(*command, script='slurm.sbatch', **job)
    assert status == code
    assert out == ''.join(f'{word},' for word in (code, *WORDS))
    assert (tmp_path / 'scontrol').exists() == requeued
    if requeued:
        assert (tmp_path / 'scontrol').read_text() == 'requeue 12\n'


def test_xpk(cloud, tmp_path):
    """What it hands over runs in a folder with the checkout, as in a pod."""
    pod = cloud()
    root = checkout(tmp_path / 'checkout', show=SHOW)
    save = 'for w; do case $w in --script-dir=*) cp -r "${w#*=}" "$HOME/app" ;; esac; done\n'
    save += 'printf "%s\\0" "$@" >"$HOME/xpk"\n'
    write(tmp_path / 'bin' / 'xpk', f'#!{BASH}\n{save}')
    command = 'python', 'show.py', '--output_dir', 'runs/mine', *WORDS
    settings = {'root': root, 'script': 'xpk.sh', 'CLUSTER': 'c', 'BUCKET': 'gs://b'}
    status, out, _ = pod(*command, DRY_RUN=1, **settings)
    assert (status, out.split()[:3]) == (0, ['xpk', 'workload', 'create'])
    assert pod(*command, **settings)[0] == 0
    given = (tmp_path / 'xpk').read_text().split('\0')
    assert {'--cluster=c', '--workload=pod', '--tpu-type=v6e-16', '--project=p'} <= set(given)
    inner = next(w for w in given if w.startswith('--command=')).removeprefix('--command=')
    env = json.loads((tmp_path / 'environ.json').read_text()) | {'HOME': str(tmp_path / 'app')}
    done = subprocess.run(
        [BASH, '-c', inner], cwd=tmp_path / 'app', env=env | {'TPU_WORKER_ID': '0'},
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    said = [line for line in done.stdout.splitlines() if line.startswith('words')]
    assert json.loads(said[0].partition(' ')[2]) == list(command[2:])
    assert done.returncode == 0, done.stderr


def simulated(cache):
    """What a worker's processes find: one device, and the programs of the undisturbed run."""
    named = ('JAX_PLATFORMS', 'JAX_NUMPY_RANK_PROMOTION', 'JAX_DEFAULT_MATMUL_PRECISION')
    flags = '--xla_backend_optimization_level=0 --xla_force_host_platform_device_count=1'
    return {name: os.environ[name] for name in (*named, 'HF_HUB_OFFLINE', 'MPLBACKEND')} | {
        'PJRT_NPROC': '32',
        'XLA_FLAGS': flags,
        'JAX_COMPILATION_CACHE_DIR': str(cache),
        'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0',
    }


def lines(path):
    """Those of metrics.jsonl, less what is a matter of time."""
    timed = 'time', 'seconds', 'tokens_per_second'
    found = [json.loads(line) for line in path.read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in timed} for line in found]


# A run that has made a certain checkpoint stands still, so that it is preempted then.
FREEZE = """
import os, pathlib, signal, threading, time
place = pathlib.Path(os.environ['BUCKETS'], 'b', 'saved', '4')
def freeze():
    while not place.exists():
        time.sleep(0.002)
    os.kill(os.getpid(), signal.SIGSTOP)
if not place.exists():
    threading.Thread(target=freeze, daemon=True).start()
"""


@pytest.mark.slow
def test_a_preempted_run_of_two_processes_ends_like_an_undisturbed_one(tmp_path):
    data = tmp_path / 'data'
    data.mkdir()
    write_pairs(data / 'train.jsonl', 40, 0)
    write_pairs(data / 'test.jsonl', 12, 1)
    flags = (
        *('--dataset_train', data / 'train.jsonl', '--dataset_test', data / 'test.jsonl'),
        *(*SHORT, *SMALL, '--fsdp', 2, '--max_steps', 8, '--eval_steps', 100),
    )
    plain = '-m', 'experiments.preference', *flags, '--output_dir', 'run'
    folders = tmp_path / 'first', tmp_path / 'second'
    for folder in folders:
        folder.mkdir()
    cache = tmp_path / 'compiled'
    whole = *plain, '--checkpoint_dir', tmp_path / 'state'
    children.finish_all(children.pair(whole, devices=1, cwd=folders, cache=cache))

    (tmp_path / 'cloud').mkdir()
    write(tmp_path / 'freeze' / 'sitecustomize.py', FREEZE)
    environ = simulated(cache) | children.joined(2) | {'PYTHONPATH': str(tmp_path / 'freeze')}
    twice = ('ACTIVE',), ('ACTIVE',)
    pod = Cloud(tmp_path / 'cloud', twice, environ=environ, preempt_at='b/saved/4')
    saved = '--output_dir', 'runs/mine', '--checkpoint_dir', 'gs://b/saved'
    command = 'resume', 'python', '-m', 'experiments.preference', *flags, *saved
    limit = 2 * children.SECONDS
    status, _, err = pod(*command, BUCKET='gs://b', KEEP=3, POLL=2, seconds=limit)
    assert status == 0, f'{err}\n{[pod.log(i) for i in range(2)]}'
    assert (pod.count('create'), pod.count('delete')) == (2, 1)
    assert pod('fetch', 'runs/mine', BUCKET='gs://b', cwd=tmp_path)[0] == 0
    got, want = tmp_path / 'runs' / 'mine', tmp_path / 'first' / 'run'
    said = [lines(run / 'metrics.jsonl') for run in (got, want)]
    assert said[0][-4:] == said[1][-4:]  # of what came just before, the last may be lost
    name = 'model/model.safetensors'
    assert (got / name).read_bytes() == (want / name).read_bytes()
    assert not (pod.home(1) / 'jaxrm' / 'runs' / 'mine').exists()
