"""`jaxrm merge`: what it says and writes; full disks, kills, and memory."""

import contextlib
import json
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from merge_tiny import DOGERM, LINEAR, command, pair, read, recipe, refused, synthetic
from torch_goldens import edit_json

from jaxrm import checkpoint, merge_files, merge_plan


@pytest.fixture
def run(monkeypatch, capfd):
    return command(monkeypatch, capfd)


@pytest.fixture
def folder(tmp_path):
    return pair(tmp_path)


def test_the_command(folder, run, monkeypatch):
    monkeypatch.chdir(folder.parent)  # the recipe's paths are relative to the recipe
    file = Path(folder.name, 'recipe.yml')
    status, out, err = run(file, '--check')
    assert (status, err) == (0, '')
    assert out.startswith('rm: LlamaForSequenceClassification, 4 layers, 17 rows')
    assert 'left out of domain_lm: lm_head.weight\n' in out
    assert not (folder / 'out').exists()
    status, nothing, said = run(file, folder / 'out', '--max-shard-size', '2KB')
    assert (status, nothing) == (0, '')
    assert ' in 7 files\n' in said
    assert said.splitlines()[:-1] == out.splitlines()[:-1]
    index = json.loads((folder / 'out' / 'model.safetensors.index.json').read_text())
    assert len(set(index['weight_map'].values())) == 7
    sizes = [path.stat().st_size for path in (folder / 'out').glob('*.safetensors')]
    assert max(sizes) < 4000
    whole = read(folder / 'out')
    assert run(file, folder / 'out')[0] == 2
    assert run(file, folder / 'out', '--overwrite')[0] == 0
    assert [p.name for p in (folder / 'out').glob('*.safetensors*')] == ['model.safetensors']
    for name, x in read(folder / 'out').items():
        assert x.tobytes() == whole[name].tobytes()
    assert {path.name for path in folder.iterdir()} == {'rm', 'domain_lm', 'recipe.yml', 'out'}


def test_differences_that_may_be(folder, run):
    rope = {'rope_theta': 9.0, 'rope_type': 'default'}
    edit_json(folder / 'domain_lm' / 'config.json', rope_parameters=rope)
    recipe(folder, DOGERM + 'on_mismatch: keep_first\n')
    status, out, _ = run(folder / 'recipe.yml', '--check')
    assert status == 0
    assert 'rope' in out
    assert run(folder / 'recipe.yml', folder / 'out')[0] == 0
    said = json.loads((folder / 'out' / 'config.json').read_text())
    assert said['rope_parameters']['rope_theta'] == 100


def test_models_of_the_hub(folder, run, monkeypatch):
    known = {('org/rm', 'v1'): 'rm', ('org/lm', None): 'domain_lm'}

    def download(name, *, revision, **_):
        return str(folder / known[name, revision])

    monkeypatch.setattr(checkpoint.huggingface_hub, 'snapshot_download', download)
    text = DOGERM.replace('{source: rm}', '{source: org/rm@v1}')
    recipe(folder, text.replace('model: rm', 'model: org/rm@v1').replace('domain_lm', 'org/lm'))
    status, out, err = run(folder / 'recipe.yml', '--check')
    assert status == 0, err
    assert 'copied from org/rm@v1: score.weight' in out


@pytest.mark.parametrize(
    ('text', 'size'),
    [('5GB', 5 * 10**9), ('500mb', 5 * 10**8), ('2GiB', 2 << 30), ('1000', 1000), ('7 KB', 7000)],
)
def test_sizes(text, size):
    assert merge_files.shard_size(text) == size


# Where it is written, and disks


def test_wrong_output(folder, run, monkeypatch):
    file = folder / 'recipe.yml'
    refused(run(file), 'output: found nothing, expected a folder to write, or --check')
    before = read(folder / 'rm')
    for out, held in ((folder / 'rm', 'rm'), (folder, 'rm'), (folder / 'x' / '..' / 'rm', 'rm')):
        refused(run(file, out, '--overwrite'), f'holds the input {held}, expected another folder')
    assert read(folder / 'rm').keys() == before.keys()
    refused(run(file, file / 'out'), 'recipe.yml is not a folder that can be written to')
    free = shutil.disk_usage(folder)._replace(free=1000)
    monkeypatch.setattr(shutil, 'disk_usage', lambda path: free)
    refused(run(file, folder / 'out'), 'out: needs 11.1 KB, found 1 KB free')
    assert {path.name for path in folder.iterdir()} == {'rm', 'domain_lm', 'recipe.yml'}


@contextlib.contextmanager
def largest_file(size):
    """Files beyond it fail as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk(folder, run):
    with largest_file(5000):
        refused(run(folder / 'recipe.yml', folder / 'out'), 'File too large')
    assert {path.name for path in folder.iterdir()} == {'rm', 'domain_lm', 'recipe.yml'}
    assert run(folder / 'recipe.yml', folder / 'out')[0] == 0
    before = read(folder / 'out')
    with largest_file(5000):
        refused(run(folder / 'recipe.yml', folder / 'out', '--overwrite'), 'File too large')
    assert read(folder / 'out').keys() == before.keys()
    assert {path.name for path in folder.iterdir()} == {'rm', 'domain_lm', 'recipe.yml', 'out'}


KILLED = """
import os, signal, sys
from jaxrm import merge_files, merge_plan
def kill(*_):
    os.kill(os.getpid(), signal.SIGKILL)
recipe, out, when = sys.argv[1:]
plan = merge_plan.prepare(recipe)
if when.isdigit():
    left = iter(range(int(when)))
    merge_files.write(plan, out, done=lambda name: next(left, None) is None and kill())
module, name = when.split('.')
setattr(getattr(merge_files, module), name, kill)
merge_files.write(plan, out)
"""


@pytest.mark.slow
@pytest.mark.parametrize('when', ['0', '20', '38', 'checkpoint.write_beside', 'shards.flush'])
def test_killed(folder, when):
    """At the first, some, or the last tensor, before what is beside them, and before the end."""
    arguments = [folder / 'recipe.yml', folder / 'out', when]
    ended = subprocess.run([sys.executable, '-c', KILLED, *map(str, arguments)], check=False)
    assert ended.returncode == -signal.SIGKILL
    left = set(folder.iterdir()) - {folder / x for x in ('rm', 'domain_lm')}
    (part,) = left - {folder / 'recipe.yml'}
    assert part.name.startswith('.out.')
    if when == 'shards.flush':
        assert len(read(part)) == 39  # whole, but for its name
    else:
        with pytest.raises(ValueError, match=r'no config\.json'):
            checkpoint.load_pretrained(part)
    merge_files.write(merge_plan.prepare(folder / 'recipe.yml'), folder / 'out')
    assert checkpoint.load_pretrained(folder / 'out').head_kind == 'score'


MEASURED = """
import resource, sys
from jaxrm import merge_files, merge_plan
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
plan = merge_plan.prepare(sys.argv[1])
before = peak()
merge_files.write(plan, sys.argv[2], max_shard_bytes=1 << 26)
print(before, peak())
"""


@pytest.mark.slow
@pytest.mark.parametrize('method', ['linear', 'ties\nbase_model: rm'])
def test_memory_is_that_of_a_few_tensors(tmp_path, method):
    """No more than 16 of the largest, where all of the inputs are several times as much."""
    large = 4000 * 512 * 4
    size = synthetic(tmp_path / 'rm', head='score')
    size += synthetic(tmp_path / 'domain_lm', seed=1)
    file = recipe(tmp_path, LINEAR.replace('linear', method))
    arguments = [sys.executable, '-c', MEASURED, str(file), str(tmp_path / 'out')]
    done = subprocess.run(arguments, check=True, capture_output=True, text=True)
    before, after = map(int, done.stdout.split())
    assert after - before < 16 * large < size / 4
    assert len(list((tmp_path / 'out').glob('*.safetensors'))) > 4
    assert checkpoint.look(tmp_path / 'out', 'reward').like.config.L == 24
