"""Wrong flags: each ends with status 2, one error that names the flag, and nothing written."""

import json
import shutil
import subprocess
import sys
from typing import NamedTuple

import numpy as np
import pytest
from torch_goldens import GOLDENS, copy, edit_tensors

from experiments import common, preference
from jaxrm import cli
from jaxrm.datasets import synthetic


class Fault(NamedTuple):
    """Flags of experiments.preference, added to good ones, and words the error must have."""

    name: str
    flags: str
    words: tuple[str, ...]


FAULTS = [
    Fault('negative learning rate', '--learning_rate -1e-3', ('learning_rate', '-0.001')),
    Fault('learning rate not a number', '--learning_rate nan', ('learning_rate', 'nan')),
    Fault('learning rate a word', '--learning_rate fast', ('learning_rate', 'fast', 'FLOAT')),
    Fault('no epochs', '--num_train_epochs 0 --max_steps -1', ('num_train_epochs', '0')),
    Fault('no steps', '--max_steps 0', ('max_steps', '0', 'at least 1')),
    Fault('empty batches', '--train_batch_size 0', ('train_batch_size', 'at least 1')),
    Fault('no accumulation', '--gradient_accumulation_steps 0', ('gradient_accumulation_steps',)),
    Fault('packs not divisible', '--gradient_accumulation_steps 3 --packs 8', ('packs', '8')),
    Fault('rank 0', '--use_peft --lora_r 0', ('lora_r', '0')),
    Fault('no such target', '--use_peft --lora_target_modules xyz', ('targets', "'xyz'", 'top/q')),
    Fault('unknown schedule', '--lr_scheduler_type step', ('lr_scheduler_type', 'cosine')),
    Fault('unknown tracker', '--report_to paper', ('report_to', 'tensorboard')),
    Fault('unknown loss', '--loss hinge', ('loss', 'bradley_terry')),
    Fault('half of the labels flipped', '--robust_epsilon 0.5', ('robust_epsilon', '0.5')),
    Fault('negative regulariser', '--lm_coefficient -1', ('lm_coefficient', '-1')),
    Fault('unknown remat', '--gradient_checkpointing some', ('gradient_checkpointing', 'dots')),
    Fault('unknown dtype', '--dtype int8', ('dtype', 'bfloat16')),
    Fault('never logged', '--logging_steps 0', ('logging_steps',)),
    Fault('never evaluated', '--eval_steps 0', ('eval_steps',)),
    Fault('never saved', '--save_steps 0', ('save_steps',)),
    Fault('tiny vocabulary', '--vocabulary 10', ('vocabulary', '262')),
    Fault('width no head divides', '--hidden_size 20', ('hidden_size', '20', 'multiple of 16')),
    Fault('nothing fits', '--max_length 3', ('records', '3 tokens')),
    Fault('more devices than there are', '--data 16', ('data', '16', '8 devices')),
    Fault('mesh of no devices', '--tensor 0', ('tensor', '0')),
    Fault('mesh that does not divide', '--fsdp 3', ('fsdp', '3', '8 devices')),
    Fault('no such model', '--model_name_or_path nowhere/at/all', ('nowhere/at/all', 'folder')),
    Fault('no such data', '--dataset_train nowhere.jsonl', ('nowhere.jsonl',)),
    Fault('no such layout', '--layout square', ('layout', 'square')),
    Fault('push without a name', '--push_to_hub', ('hub_model_id',)),
    Fault('unknown flag', '--learning_speed 1', ('learning_speed',)),
    Fault('negative seed', '--seed -1', ('seed', '-1')),
]


@pytest.fixture(scope='module')
def pairs(tmp_path_factory):
    path = tmp_path_factory.mktemp('pairs') / 'pairs.jsonl'
    rows = []
    for record in synthetic.preferences(24, seed=0):
        chosen, rejected = (record.responses[record.ranks.index(r)] for r in (0, 1))
        rows.append({'prompt': record.messages, 'chosen': chosen, 'rejected': rejected})
    path.write_text(''.join(json.dumps(row) + '\n' for row in rows))
    return path


@pytest.mark.parametrize('fault', FAULTS, ids=lambda f: f.name.replace(' ', '-'))
def test_flag_is_refused(fault, pairs, tmp_path, monkeypatch, capsys):
    good = f'--dataset_train {pairs} --dataset_test {pairs} --output_dir {tmp_path / "out"}'
    small = '--max_steps 1 --hidden_size 16 --num_hidden_layers 1 --vocabulary 300 --cache None'
    given = f'{good} {small} {fault.flags}'.split()
    monkeypatch.setattr(sys, 'argv', ['preference', *given])
    monkeypatch.delenv('JAXRM_TRACEBACK', raising=False)
    with pytest.raises(SystemExit) as stop:
        common.launch(preference.Config, preference.main)
    assert stop.value.code == 2
    out = capsys.readouterr()
    said = out.out + out.err
    for word in fault.words:
        assert word in said
    assert 'Traceback' not in said
    assert out.err == ''
    assert [line for line in said.splitlines() if 'error: ' in line] == said.splitlines()[-1:]
    assert not (tmp_path / 'out').exists()


def bad_line(folder):
    path = folder / 'pairs.jsonl'
    path.write_text(path.read_text() + '{"prompt": \n')
    return path, GOLDENS / 'seqcls', 'pairs.jsonl:25', 'JSON'


def same_sides(folder):
    path = folder / 'pairs.jsonl'
    row = json.loads(path.read_text().splitlines()[0])
    path.write_text(path.read_text() + json.dumps(row | {'rejected': row['chosen']}))
    return path, GOLDENS / 'seqcls', 'pairs.jsonl:25: rejected', 'the same answer as chosen'


def two_labels(folder):
    model = copy(folder)
    edit_tensors(model, score__weight=np.zeros((2, 32), np.float32))
    return folder / 'pairs.jsonl', model, 'score.weight', '[2, 32]'


def cut_short(folder):
    model = copy(folder)
    weights = model / 'model.safetensors'
    weights.write_bytes(weights.read_bytes()[:-8])
    return folder / 'pairs.jsonl', model, 'model.safetensors', 'not a readable safetensors file'


def language_model(folder):
    return folder / 'pairs.jsonl', GOLDENS / 'causal', 'LlamaForCausalLM', 'expected'


@pytest.mark.parametrize(
    ('verb', 'make'),
    [
        ('score', bad_line),
        ('evaluate', same_sides),
        ('score', two_labels),
        ('evaluate', cut_short),
        ('score', language_model),
    ],
)
def test_command_is_refused(verb, make, pairs, tmp_path):
    """In a process of its own, as a user sees it."""
    shutil.copy(pairs, tmp_path / 'pairs.jsonl')
    path, model, *words = make(tmp_path)
    before = sorted(tmp_path.iterdir())
    flags = ['--model', model, '--data', path, '--output', tmp_path / 'out']
    command = [sys.executable, '-m', 'jaxrm', verb, *map(str, flags)]
    found = subprocess.run(command, capture_output=True, text=True)
    assert found.returncode == 2
    assert found.stdout == ''
    assert found.stderr.startswith('jaxrm: ')
    assert found.stderr.count('\n') == 1
    for word in words:
        assert word in found.stderr
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize(
    ('flags', 'words'),
    [
        ('score --model nowhere --data nowhere.jsonl --output x.jsonl', ('nowhere',)),
        ('score --model nowhere --data {pairs} --output x.parquet', ('x.parquet', 'JSON Lines')),
        ('score --model nowhere --data {pairs} --output gone/x.jsonl', ('gone', 'not a folder')),
        ('evaluate --model nowhere --data {pairs} --output out', ('nowhere', 'folder')),
        ('polish', ('polish', 'score')),
        ('score --model nowhere', ('--data', '--output')),
        ('score --model a --data b --output c --tensor two', ('--tensor', 'two', 'INT')),
        ('evaluate --model a --data b --output c --rules mine', ('--rules', 'mine', 'autoj')),
        ('merge a b --sead 3', ('--sead', '--seed')),
    ],
)
def test_command_flag_is_refused(flags, words, pairs, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, 'argv', ['jaxrm', *flags.format(pairs=pairs).split()])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 2
    out = capsys.readouterr()
    assert (out.out, out.err.count('\n')) == ('', 1)
    for word in words:
        assert word in out.err
    assert not list(tmp_path.iterdir())
