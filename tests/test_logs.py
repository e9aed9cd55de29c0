"""The log: what stands in its lines, when it reads a step, and how it goes on after a restart."""

import io
import json
import math

import numpy as np
import pytest
from rich.console import Console

from jaxrm import logs, trackers, train


class Value:
    """A number on a device that notes when it is read."""

    def __init__(self, value, step=0, reads=None):
        self.value, self.step, self.reads = (
            np.float32(value),
            step,
            reads if reads is not None else [],
        )

    def copy_to_host_async(self):
        pass

    def __array__(self, dtype=None, copy=None):
        self.reads.append(self.step)
        return np.asarray(self.value, dtype)


def metrics(step, reads=None):
    return {
        name: Value(value, step, reads)
        for name, value in (('grad_norm', 1 / step), ('loss', 0.1 * step), ('accuracy', step % 2))
    }


def progress(step):
    return {'num_tokens': 100 * step, 'epoch': step / 4}


def run(folder, steps, *, start=0, last=None, **options):
    """Logs steps start + 1 to `last`, with an evaluation every second step."""
    with logs.Log(folder, steps=steps, start=start, progress=progress, **options) as log:
        for step in range(start + 1, (last or steps) + 1):
            log(step, None, metrics(step))
            if step % 2 == 0:
                log.write(step, {'eval_accuracy': step / 10})
    return logs.read(folder / 'metrics.jsonl')


def timeless(lines):
    return [{k: v for k, v in line.items() if k not in logs.TIMES} for line in lines]


def test_lines(tmp_path):
    schedule = train.schedule(0.5, 3, warmup=2)
    lines = run(tmp_path, 3, schedule=schedule)
    assert [line['step'] for line in lines] == [1, 2, 2, 3]
    first, second, evaluation, _ = lines
    names = 'step epoch loss accuracy grad_norm learning_rate num_tokens'.split()
    assert list(first) == [*names, 'time', 'seconds', 'tokens_per_second']
    assert first['epoch'] == 0.25
    assert [line['learning_rate'] for line in lines if 'loss' in line] == [0.25, 0.5, 0.5]
    assert timeless([evaluation]) == [{'step': 2, 'eval_accuracy': 0.2}]
    assert math.isnan(first['seconds'])
    assert second['tokens_per_second'] == pytest.approx(100 / second['seconds'], rel=0.1)


def test_numbers_are_strict_json_and_short(tmp_path):
    with logs.Log(tmp_path, steps=1) as log:
        log(
            1, None, {'loss': Value(math.nan), 'max_reward': Value(-math.inf), 'margin': Value(0.1)}
        )
    text = (tmp_path / 'metrics.jsonl').read_text()
    line = json.loads(text, parse_constant=lambda name: pytest.fail(f'{name} is not JSON'))
    assert (line['loss'], line['max_reward'], line['margin']) == (None, None, 0.1)
    assert math.isnan(logs.read(tmp_path / 'metrics.jsonl')[0]['loss'])


def test_several_models_have_a_mean_and_a_spread_of_those_that_take_part(tmp_path):
    values = {'loss': [1.0, math.nan, 4.0], 'count': [3, 0, 6], 'accuracy': [math.nan] * 3}
    with logs.Log(tmp_path, steps=1) as log:
        log(1, None, {name: Value(x) for name, x in values.items()})
    (line,) = logs.read(tmp_path / 'metrics.jsonl')
    assert (line['loss'], line['loss_std'], line['count']) == (2.5, 1.5, 3)
    assert line['count_std'] == pytest.approx(6**0.5)
    assert math.isnan(line['accuracy'])


@pytest.mark.parametrize('dtype', [np.float32, np.float64, np.float16])
def test_numbers_read_back_the_same(dtype):
    for x in np.random.default_rng(0).normal(size=100).astype(dtype):
        assert dtype(logs._number(x)) == x


def test_only_the_step_before_is_read(tmp_path):
    reads = []
    with logs.Log(tmp_path, steps=4) as log:
        for step in (1, 2, 3, 4):
            log(step, None, metrics(step, reads))
            assert set(reads) == set(range(1, step))
        log.flush()
        assert set(reads) == {1, 2, 3, 4}


def test_leaving_writes_the_last_step_whatever_happened(tmp_path):
    def fail():
        with logs.Log(tmp_path, steps=4) as log:
            log(1, None, metrics(1))
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert [line['step'] for line in logs.read(tmp_path / 'metrics.jsonl')] == [1]


@pytest.mark.parametrize('start', range(6))
@pytest.mark.parametrize('ahead', [0, 2])
def test_a_restarted_log_is_that_of_an_undisturbed_run(tmp_path, start, ahead):
    whole = run(tmp_path / 'whole', 7)
    if start + ahead:
        run(tmp_path / 'cut', 7, last=start + ahead)
        with (tmp_path / 'cut' / 'metrics.jsonl').open('a') as file:
            file.write('{"step": 9, "lo')
    assert timeless(run(tmp_path / 'cut', 7, start=start)) == timeless(whole)


def test_an_evaluation_is_not_written_twice(tmp_path):
    for start in (0, 4):
        run(tmp_path, 4, start=start)
        with logs.Log(tmp_path, steps=4, start=4) as log:
            log.write(4, {'eval_accuracy': 0.4})
            log.write(4, {'test_accuracy': 0.5})
    lines = timeless(logs.read(tmp_path / 'metrics.jsonl'))[-2:]
    assert lines == [{'step': 4, 'eval_accuracy': 0.4}, {'step': 4, 'test_accuracy': 0.5}]


def test_plain_lines_where_there_is_no_terminal(tmp_path):
    out = io.StringIO()
    run(tmp_path, 5, logging_steps=2, console=Console(file=out, width=20))
    lines = out.getvalue().splitlines()
    starts = ['step 2/5  ', 'step 2  ', 'step 4/5  ', 'step 4  ', 'step 5/5  ']
    assert [line[: len(s)] for line, s in zip(lines, starts, strict=True)] == starts
    assert 'loss 0.3500  accuracy 0.5000' in lines[2]
    assert all(unit in lines[2] for unit in (' steps/s', ' tokens/s', 'eta 0:00:00'))
    assert lines[3] == 'step 4  eval_accuracy 0.4'


def test_a_bar_on_a_terminal(tmp_path):
    out = io.StringIO()
    console = Console(file=out, width=120, force_terminal=True, color_system=None)
    run(tmp_path, 5, logging_steps=2, console=console)
    assert '5/5' in out.getvalue()
    assert 'loss 0.5000' in out.getvalue()
    assert 'step 4  eval_accuracy 0.4' in out.getvalue()
    assert 'step 4/5' not in out.getvalue()


def test_without_a_console_nothing_is_shown(tmp_path, capfd):
    run(tmp_path, 5, logging_steps=1)
    assert capfd.readouterr() == ('', '')


def test_why_a_run_stopped_is_shown(tmp_path):
    out = io.StringIO()
    with pytest.raises(SystemExit), logs.Log(tmp_path, steps=5, console=Console(file=out)):
        raise SystemExit('enough')
    assert out.getvalue() == 'enough\n'


class Kept:
    """A tracker that keeps what it is given."""

    def __init__(self):
        self.seen, self.begun, self.closed = {}, None, None

    def open(self, folder, start):
        self.begun = folder, start
        return trackers.Tracker(self.write, lambda failed: setattr(self, 'closed', failed))

    def write(self, step, values):
        self.seen |= {(step, name): value for name, value in values.items()}


@pytest.mark.parametrize('start', [0, 3])
def test_trackers_get_means(tmp_path, start):
    kept = Kept()
    if start:
        run(tmp_path, 4, last=start)
    run(tmp_path, 4, start=start, logging_steps=2, trackers=[kept.open])
    assert (kept.begun, kept.closed) == ((tmp_path, start), False)
    assert kept.seen[4, 'train/loss'] == pytest.approx(0.35)  # of steps 3 and 4, whenever it began
    assert kept.seen[4, 'train/num_tokens'] == 400
    assert kept.seen[4, 'eval/accuracy'] == 0.4
    assert ((2, 'train/loss') in kept.seen) == (start == 0)
    assert not any(name.rpartition('/')[2] == 'step' for _, name in kept.seen)


def test_trackers_get_the_older_names_too(tmp_path):
    """Chosen scores 3 and 1, rejected 1 and 2: the four names of both, training and two sets."""
    kept = Kept()
    seen = {'accuracy': 0.5, 'margin': 0.5, 'mean_reward': 1.75}
    want = {'accuracies': 0.5, 'margins': 0.5, 'chosen': 2.0, 'rejected': 1.5}
    with logs.Log(tmp_path, steps=1, trackers=[kept.open]) as log:
        log(1, None, {name: Value(x) for name, x in {**seen, 'loss': 1}.items()})
        log.write(1, {f'eval_{name}': x for name, x in seen.items()})
        log.write(1, {f'eval_math_{name}': x for name, x in seen.items()})
        log.write(1, {'eval_math_ref_accuracy': 0.25})  # no set: without a margin
    for start in ('train/', 'eval/', 'eval/math_'):
        for name, x in {**{f'rewards/{k}': v for k, v in want.items()}, **seen}.items():
            assert kept.seen[1, f'{start}{name}'] == x
    assert not any('ref_rewards' in name for _, name in kept.seen)
    assert 'rewards/' not in (tmp_path / 'metrics.jsonl').read_text()


def test_trackers_hear_of_a_failure(tmp_path):
    kept = Kept()
    with pytest.raises(KeyError), logs.Log(tmp_path, steps=1, trackers=[kept.open]):
        raise KeyError
    assert kept.closed is True


def test_a_broken_line_is_named(tmp_path):
    path = tmp_path / 'metrics.jsonl'
    path.write_text('{"step": 1}\nhello\n{"step": 2}\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl, line 2: found 'hello'"):
        logs.read(path)
