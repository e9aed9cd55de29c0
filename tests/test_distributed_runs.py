"""Whole runs of two processes that share nothing but the training state's folder."""

import json
import random

import children
import numpy as np
import pytest
from safetensors.numpy import load_file

pytestmark = pytest.mark.slow

WORDS = 'alpha beta gamma delta epsilon zeta eta theta iota kappa'.split()
SMALL = ('--vocabulary', 300, '--hidden_size', 32, '--num_hidden_layers', 2)
SHORT = ('--max_steps', 4, '--eval_steps', 2, '--save_steps', 2, '--train_batch_size', 8)


def write_pairs(path, count, seed):
    draw = random.Random(seed)
    say = lambda n: ' '.join(draw.choices(WORDS, k=draw.randint(1, n)))  # noqa: E731
    rows = [
        {
            'prompt': [{'role': 'user', 'content': say(6)}],
            'chosen': [{'role': 'assistant', 'content': f'yes {say(8)}'}],
            'rejected': [{'role': 'assistant', 'content': say(9)}],
        }
        for _ in range(count)
    ]
    path.write_text(''.join(json.dumps(row) + '\n' for row in rows))
    return path


@pytest.fixture(scope='module')
def world(tmp_path_factory):
    """A folder with data, and one for each process to stand in."""
    folder = tmp_path_factory.mktemp('world')
    for name in ('first', 'second'):
        (folder / name).mkdir()
    write_pairs(folder / 'train.jsonl', 40, 0)
    write_pairs(folder / 'test.jsonl', 12, 1)
    return folder


def command(world, *flags):
    data = ('--dataset_train', world / 'train.jsonl', '--dataset_test', world / 'test.jsonl')
    return '-m', 'experiments.preference', *data, *SHORT, *flags


def both(world, command, status=0):
    """What two processes of two devices print, each in its own folder."""
    cwd = world / 'first', world / 'second'
    run = children.pair(command, devices=2, cwd=cwd, cache=world / 'compiled')
    return children.finish_all(run, status)


def files(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob('*') if path.is_file())


@pytest.fixture(scope='module')
def trained(world):
    """The folder of a model that two processes trained; only the first has written into its own."""
    flags = *SMALL, '--output_dir', 'run', '--checkpoint_dir', world / 'state', '--fsdp', 2
    outs = both(world, command(world, *flags, '--tensor', 2))
    assert 'step 4/4' in outs[0]
    assert outs[1] == ''
    return world / 'first' / 'run'


def test_the_first_process_writes_everything_and_the_others_nothing(world, trained):
    assert files(world / 'second') == []
    found = files(trained)
    for name in ('metrics.jsonl', 'curves.png', 'scores.png', 'result.json', 'model/config.json'):
        assert name in found
    assert not [name for name in found if 'part' in name or '/.' in name]
    lines = [json.loads(line) for line in (trained / 'metrics.jsonl').read_text().splitlines()]
    assert [line['step'] for line in lines if 'loss' in line] == [1, 2, 3, 4]
    assert [line['step'] for line in lines if 'eval_accuracy' in line] == [2, 4]
    assert (world / 'state' / '4').is_dir()
    assert len(json.loads((trained / 'result.json').read_text())['right']) == 12


def test_a_finished_run_is_not_run_again_by_any_process(world, trained):
    flags = *SMALL, '--output_dir', 'run', '--checkpoint_dir', world / 'state', '--fsdp', 2
    outs = both(world, command(world, *flags, '--tensor', 2))
    assert 'is there already' in outs[0]
    outs = both(world, command(world, *flags, '--learning_rate', 0.5), 2)
    assert 'learning_rate 0.001, not 0.5' in outs[0]
    assert 'process 0: ' in outs[1]


def scores(path):
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return np.array([[row['score_chosen'], row['score_rejected']] for row in rows])


def score(world, model, output):
    data = ('--data', world / 'test.jsonl', '--output', output)
    return '-m', 'jaxrm', 'score', '--model', model, *data


def test_scores_of_the_export(world, trained):
    model = trained / 'model'
    outs = both(world, (*score(world, model, 'scores.jsonl'), '--fsdp', 2, '--tensor', 2))
    assert outs == ['', '']
    assert files(world / 'second') == []
    one = children.start(score(world, model, world / 'one.jsonl'), devices=1)
    children.finish(one, quiet=False)
    got, want = scores(world / 'first' / 'scores.jsonl'), scores(world / 'one.jsonl')
    assert want.shape == (12, 2)
    assert want.std() > 1e-3
    np.testing.assert_allclose(got, want, atol=1e-6)
    right = json.loads((trained / 'result.json').read_text())['right']
    assert right == (want[:, 0] > want[:, 1]).tolist()


def test_the_evaluation_of_the_export(world, trained):
    """Written once, by the first; the accuracy is the one that the run found."""
    command = ('-m', 'jaxrm', 'evaluate', '--model', trained / 'model', '--output', 'found')
    outs = both(world, (*command, '--data', world / 'test.jsonl', '--fsdp', 4, '--no-pictures'))
    assert outs[1] == ''
    assert files(world / 'second') == []
    assert files(world / 'first' / 'found') == ['examples.jsonl', 'results.json']
    accuracy = json.loads((trained / 'result.json').read_text())['accuracy']['reward model'][0]
    assert f'{accuracy:.3f}' in outs[0]


def test_an_adapter_on_the_export_is_folded_into_what_is_exported(world, trained):
    flags = '--model_name_or_path', trained / 'model', '--use_peft', '--lora_r', 4
    flags += '--output_dir', 'lora', '--checkpoint_dir', world / 'lora-state', '--fsdp', -1
    both(world, command(world, *flags, '--data', 1, '--learning_rate', 0.05))
    assert files(world / 'second') == []
    was, now = (
        load_file(world / 'first' / run / 'model' / 'model.safetensors') for run in ('run', 'lora')
    )
    assert was.keys() == now.keys()
    for name, x in was.items():
        moved = (x != now[name]).any()
        assert moved == ('_proj' in name or name == 'score.weight'), name


def test_processes_with_unequal_data_say_so(world):
    write_pairs(world / 'first' / 'mine.jsonl', 20, 2)
    write_pairs(world / 'second' / 'mine.jsonl', 20, 3)
    flags = *SMALL, '--output_dir', 'unequal', '--checkpoint_dir', world / 'unequal'
    outs = both(world, (*command(world, *flags), '--dataset_train', 'mine.jsonl'), 2)
    (world / 'second' / 'mine.jsonl').unlink()
    for out in outs:
        assert 'process 1 has another than process 0' in out


def test_a_process_without_its_file_does_not_keep_the_other_waiting(world):
    write_pairs(world / 'first' / 'only.jsonl', 20, 2)
    flags = *SMALL, '--output_dir', 'alone', '--checkpoint_dir', world / 'alone'
    command_ = *command(world, *flags), '--dataset_train', 'only.jsonl'
    cwd = world / 'first', world / 'second'
    run = children.pair(command_, devices=2, cwd=cwd, cache=world / 'compiled')
    outs = [child.communicate(timeout=100)[0] for child in run]
    assert all(child.returncode != 0 for child in run)
    assert 'error: only.jsonl' in outs[1]
