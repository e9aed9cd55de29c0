"""Every experiment at a few steps on a tiny model, restarted, killed, and one after the other."""

import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import huggingface_hub
import jax
import numpy as np
import pytest

import jaxrm
from experiments import common, preference, pretrain, quickstart
from jaxrm import checkpoint, data, evaluate, sharding, tokens, train
from jaxrm.datasets import synthetic

ROOT = Path(__file__).resolve().parent.parent
SMALL = {'vocabulary': 300, 'hidden_size': 16, 'num_hidden_layers': 2}
STEPS = {'max_steps': 3, 'warmup_steps': 1, 'train_batch_size': 16, 'logging_steps': 2}


def write_pairs(path, count, **options):
    with open(path, 'w', encoding='utf-8') as file:
        for record in synthetic.preferences(count, **options):
            chosen, rejected = (record.responses[record.ranks.index(r)] for r in (0, 1))
            row = {'prompt': record.messages, 'chosen': chosen, 'rejected': rejected}
            file.write(json.dumps(row) + '\n')
    return str(path)


@pytest.fixture(scope='session')
def pairs(tmp_path_factory):
    """Files of training and test pairs."""
    folder = tmp_path_factory.mktemp('pairs')
    train = write_pairs(folder / 'pairs.jsonl', 160, seed=0)
    test = write_pairs(folder / 'test.jsonl', 40, seed=0, split='test')
    return {'dataset_train': train, 'dataset_test': test}


def flags(**values):
    """The same as --flags."""
    given = ((f'--{k}', v) for k, v in values.items())
    return [x for k, v in given for x in ([k] if v is True else [k, str(v)])]


def command(module, **values):
    return [sys.executable, '-m', f'experiments.{module}', *flags(**values)]


def start(module, cwd, **values):
    """A process of the experiment; it finds the packages wherever it runs."""
    env = os.environ | {'PYTHONPATH': str(ROOT)}
    options = {'stdout': subprocess.PIPE, 'stderr': subprocess.STDOUT, 'text': True}
    return subprocess.Popen(command(module, **values), cwd=cwd, env=env, **options)


def finished(process):
    out, _ = process.communicate(timeout=600)
    assert process.returncode == 0, out
    return out


def check_folder(folder):
    """What preference leaves behind, and that the exported model gives the accuracy it says."""
    result = json.loads((folder / 'result.json').read_text())
    for name in ('curves.png', 'scores.png'):
        assert (folder / name).stat().st_size > 10_000
    assert set(result['accuracy']) == {'reward model', 'longer wins', 'bag of words'}
    mean = np.mean(result['right'])
    assert result['accuracy']['reward model'][0] == pytest.approx(mean, abs=1e-3)
    return result


class Hub:
    """Stands in for the hub: what is asked of it, and the folder it is sent."""

    def __init__(self):
        self.asked, self.files = [], {}

    def create_repo(self, repo, **options):
        self.asked.append(('create', repo, options['private']))
        return types.SimpleNamespace(repo_id=f'me/{repo}')

    def upload_folder(self, repo_id, folder_path, **options):
        self.asked.append(('upload', repo_id))
        self.files = {p.name: p.read_bytes() for p in folder_path.iterdir()}
        return types.SimpleNamespace(commit_url='https://hub/1')


@pytest.fixture
def fake_hub(monkeypatch):
    found = Hub()
    monkeypatch.setattr(huggingface_hub, 'HfApi', lambda: found)
    monkeypatch.setattr(huggingface_hub, 'get_token', lambda: 'secret')
    return found


@pytest.fixture
def tracked(monkeypatch):
    """What wandb is given, {(step, name): value}."""
    seen = {}
    log = lambda values, step: seen.update({(step, k): v for k, v in values.items()})  # noqa: E731
    run = types.SimpleNamespace(log=log, finish=lambda exit_code: None)
    monkeypatch.setitem(sys.modules, 'wandb', types.SimpleNamespace(init=lambda **about: run))
    return seen


def check_pushed(hub, pairs):
    """Made before the run, sent after it: the exported model and a card."""
    assert hub.asked == [('create', 'pears', True), ('upload', 'me/pears')]
    assert {'model.safetensors', 'config.json', 'README.md'} <= hub.files.keys()
    card = hub.files['README.md'].decode()
    for said in ('- reward-trainer', '# me/pears', 'trained from scratch on `pairs.jsonl`'):
        assert said in card
    assert 'held-out accuracy of reward model' in card
    assert str(Path(pairs['dataset_train']).parent) not in card


def test_preference(tmp_path, pairs, capfd, fake_hub, tracked):
    out = tmp_path / 'run'
    c = preference.Config(
        **pairs, **SMALL, **STEPS, output_dir=out, cache=tmp_path / 'cache', eval_steps=2,
        result=tmp_path / 'copy.json', report_to=('wandb',),
        push_to_hub=True, hub_model_id='pears', hub_private_repo=True,
    )  # fmt: skip
    before = common.compiled.cache_info().misses
    preference.main(c)
    assert common.compiled.cache_info().misses == before + 1  # for all evaluations together
    said = capfd.readouterr().out
    assert '3 steps of 8 packs' in said
    assert 'test.jsonl: accuracy' in said
    result = check_folder(out)
    assert json.loads((tmp_path / 'copy.json').read_text()) == result
    assert str(tmp_path) not in json.dumps(result)
    lines = jaxrm.logs.read(out / 'metrics.jsonl')
    assert [line['step'] for line in lines if 'loss' in line] == [1, 2, 3]
    (held,) = [line for line in lines if 'eval_accuracy' in line]
    names = 'loss accuracy margin min_reward mean_reward max_reward ties'.split()
    assert list(held) == ['step', *(f'eval_{name}' for name in names), 'time']
    assert tracked[2, 'eval/rewards/accuracies'] == held['eval_accuracy']
    assert tracked[2, 'train/rewards/margins'] == tracked[2, 'train/margin']
    check_pushed(fake_hub, pairs)
    records = data.load(pairs['dataset_test']).records
    found = jaxrm.load(out / 'model').score_records(records)
    right = evaluate.pairs(evaluate.ranks(records), found).accuracy
    np.testing.assert_allclose(right, result['right'], rtol=0, atol=1e-4)
    preference.main(c)
    assert 'result.json is there already' in re.sub(r'\s', ' ', capfd.readouterr().out)


def test_sides_are_taken_by_rank():
    found = common.sides([(1, 0), (0, 1, -1, 2)], [np.array([1.0, 2]), np.array([3.0, 4, 5, 6])])
    assert {k: v.tolist() for k, v in found.items()} == {'chosen': [2, 3], 'rejected': [1, 4, 6]}


def test_tables_show_text_as_it_is(capsys):
    common.table('[bold]', {'[a] :smile:': ['[/b]']}, ['c'])
    said = capsys.readouterr().out
    assert all(text in said for text in ('[bold]', '[a] :smile:', '[/b]'))


def test_flags_are_those_of_trl(monkeypatch):
    """Names that people bring along are accepted, and none is cut short or turned around."""
    argv = ['--dataset_train', 'a', '--dataset_test', 'b', '--learning_rate', '1e-4']
    argv += ['--num_train_epochs', '2', '--use_peft', '--lora_r', '8', '--seed', '3']
    argv += ['--center_rewards_coefficient', '0.01', '--output_dir', 'x', '--max_length', '99']
    monkeypatch.setattr(sys, 'argv', ['preference', *argv])
    c = common.parse(preference.Config)
    assert (c.dataset_train, c.learning_rate, c.use_peft, c.lora_r) == ('a', 1e-4, True, 8)
    assert (c.output_dir, c.center_rewards_coefficient, c.max_length) == (Path('x'), 0.01, 99)


@pytest.mark.parametrize('argv', [[], ['--dataset_train', 'a'], ['--dataset_tests', 'a']])
def test_wrong_flags(argv, monkeypatch):
    monkeypatch.setattr(sys, 'argv', ['preference', *argv])
    with pytest.raises(ValueError, match='dataset_test'):
        common.parse(preference.Config)


@pytest.mark.slow
def test_one_after_the_other(tmp_path, pairs, capfd):
    """pretrain, then quickstart and an adapter of preference on what it wrote."""
    read = pretrain.Config(
        output_dir=tmp_path / 'lm', conversations=300, vocabulary=300, hidden_size=16,
        num_hidden_layers=2, max_steps=4, warmup_steps=1, train_batch_size=8, max_length=128,
    )  # fmt: skip
    pretrain.main(read)
    said = capfd.readouterr().out
    loss = float(re.search(r'held-out loss (\S+) nats', said)[1])
    assert 3 < loss < 1.2 * np.log(300), said
    pretrain.main(read)
    assert 'is there already' in re.sub(r'\s', ' ', capfd.readouterr().out)
    lm = str(tmp_path / 'lm' / 'model')

    quick = quickstart.Config(
        model_name_or_path=lm, output_dir=tmp_path / 'quick', pairs=300, test_pairs=60, **STEPS
    )
    quickstart.main(quick)
    assert 'of the oracle' in capfd.readouterr().out
    first = json.loads((tmp_path / 'quick' / 'result.json').read_text())
    quickstart.main(quick)  # every step is done: the same numbers again
    second = json.loads((tmp_path / 'quick' / 'result.json').read_text())
    assert first | {'seconds': 0} == second | {'seconds': 0}

    adapted = preference.Config(
        **pairs, **STEPS, model_name_or_path=lm, use_peft=True, lora_r=4,
        output_dir=tmp_path / 'peft', cache=tmp_path / 'cache',
    )  # fmt: skip
    preference.main(adapted)
    check_folder(tmp_path / 'peft')
    ask = [{'role': 'user', 'content': 'Which?'}, {'role': 'assistant', 'content': 'This one.'}]
    whole = jaxrm.load(tmp_path / 'peft' / 'model').score([ask])
    apart = jaxrm.load(tmp_path / 'peft' / 'adapter', base=lm).score([ask])
    np.testing.assert_allclose(apart, whole, atol=2e-6)
    before = checkpoint.load_pretrained(lm, kind='backbone').backbone
    after = checkpoint.load_pretrained(tmp_path / 'peft' / 'model').backbone
    np.testing.assert_array_equal(before['embed']['embedding'], after['embed']['embedding'])
    assert np.abs(before['top']['q']['kernel'] - after['top']['q']['kernel']).max() > 0


@pytest.mark.slow
def test_quickstart_from_scratch(tmp_path, capfd):
    quickstart.main(
        quickstart.Config(output_dir=tmp_path, pairs=300, test_pairs=60, **SMALL, **STEPS)
    )
    result = json.loads((tmp_path / 'result.json').read_text())
    assert set(result['accuracy']) == {'reward model', 'gold oracle', 'longer wins', 'bag of words'}
    assert [p.name for p in sorted(tmp_path.glob('*.png'))] == ['curves.png', 'scores.png']
    assert f'files are in {tmp_path}' in capfd.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize('rows', ['text', 'completion', 'pairs'])
def test_pretrain_reads_files(tmp_path, rows):
    talks = synthetic.text(200, seed=0)
    made = {
        'text': lambda t: {'text': t[-1]['content'] + f' {t[0]["content"]}'},
        'completion': lambda t: {'prompt': t[0]['content'], 'completion': t[-1]['content']},
        'pairs': lambda t: {'prompt': t[:-1], 'chosen': t[-1]['content'], 'rejected': 'x'},
    }[rows]
    file = tmp_path / 'in.jsonl'
    file.write_text(''.join(json.dumps(made(t)) + '\n' for t in talks))
    c = pretrain.Config(
        output_dir=tmp_path / 'lm', dataset_name=(str(file),), vocabulary=300, hidden_size=16,
        num_hidden_layers=2, max_steps=2, warmup_steps=1, train_batch_size=8, max_length=64,
    )  # fmt: skip
    pretrain.main(c)
    assert checkpoint.load_pretrained(tmp_path / 'lm' / 'model', kind='causal_lm').head == {}


@pytest.mark.slow
def test_command_of_the_docstring(tmp_path, pairs):
    """The command at the head of preference.py, from another folder; nothing but its own output."""
    (line,) = re.findall(
        r'^Run: +python -m experiments\.preference (.*)$', preference.__doc__, re.M
    )
    for name in ('pairs.jsonl', 'test.jsonl'):
        (tmp_path / name).write_bytes((Path(pairs['dataset_train']).parent / name).read_bytes())
    made = [sys.executable, '-m', 'experiments.preference', *line.split(), *flags(**SMALL, **STEPS)]
    env = os.environ | {'PYTHONPATH': str(ROOT)}
    done = subprocess.run(made, cwd=tmp_path, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ''
    check_folder(tmp_path / 'runs' / 'preference')


@pytest.mark.slow
def test_killed_and_restarted(tmp_path, pairs):
    """A run that is killed without warning, then told to stop, ends with the same result."""
    values = {**pairs, **SMALL, **STEPS, 'max_steps': 40, 'save_steps': 4, 'eval_steps': 2}
    values['cache'] = tmp_path / 'cache'
    whole = tmp_path / 'whole'
    finished(start('preference', tmp_path, **values, output_dir=whole))
    out = tmp_path / 'killed'
    for steps, how in ((9, signal.SIGKILL), (22, signal.SIGTERM)):
        process = start('preference', tmp_path, **values, output_dir=out)
        wait_for(out / 'metrics.jsonl', steps, process)
        process.send_signal(how)
        process.communicate(timeout=120)
        assert process.returncode != 0
        assert not (out / 'result.json').exists()
    finished(start('preference', tmp_path, **values, output_dir=out))
    want, found = ((x / 'result.json').read_bytes() for x in (whole, out))
    assert found == want
    assert 'there already' in finished(start('preference', tmp_path, **values, output_dir=out))


def wait_for(path, steps, process):
    """Until the file has a line of so many steps."""
    for _ in range(20_000):
        if path.exists() and f'"step": {steps},' in path.read_text():
            return
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.01)
    pytest.fail(f'no step {steps}')


def test_a_run_goes_on_only_as_what_it_was(tmp_path, pairs):
    """Another base of the same name, other flags or another plan of packs are refused."""
    (record,) = synthetic.preferences(1, seed=0)
    c = preference.Config(**pairs, **SMALL, **STEPS, output_dir=tmp_path, use_peft=True)
    mesh, width = sharding.make_mesh(), c.hidden_size
    start = common.start(c, common.texts([record] * 9), mesh=mesh, seed=0)
    records = data.load(pairs['dataset_train']).records
    encoded = tokens.encode(records, start.like.tokenizer).tokens
    objective = train.preference(start.rm.score)

    def run(c, frozen):
        what = {'experiment': 'test'}
        return common.run(
            c, start.trainable, frozen, encoded, objective, mesh=mesh, width=width, what=what
        )

    run(c, start.frozen)
    run(c, start.frozen)  # is at its end and stays there
    other = jax.tree.map(lambda x: 1.01 * x, start.frozen)
    for changed, frozen, name in [
        (c, other, 'start'),
        (dataclasses.replace(c, learning_rate=0.5), start.frozen, 'learning_rate'),
        (dataclasses.replace(c, packs=16), start.frozen, 'packs'),
    ]:
        with pytest.raises(ValueError, match=rf'run.json: {name}: found'):
            run(changed, frozen)
    common.write_json(tmp_path / 'result.json', {'flags': common.identity(c)})
    assert common.finished(c)
    with pytest.raises(ValueError, match=r'result\.json: is of a run with seed 0, not 1'):
        common.finished(dataclasses.replace(c, seed=1))


def test_a_missing_tracker_is_told_before_anything_begins(tmp_path, pairs, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, 'trackio', None)
    given = flags(**pairs, output_dir=tmp_path / 'run', report_to='trackio')
    monkeypatch.setattr(sys, 'argv', ['preference', *given])
    with pytest.raises(SystemExit) as end:
        common.launch(preference.Config, preference.main)
    assert end.value.code == 2
    assert "'trackio' needs the package 'trackio'" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []
