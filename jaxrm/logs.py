"""What a run says while it trains: a line a step in metrics.jsonl, a progress bar, trackers."""

import datetime
import json
import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
import optax
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from jaxrm.trackers import Open, Tracker

Line = dict[str, Any]

NAMES = (
    *('step', 'epoch', 'loss', 'accuracy', 'margin', 'min_reward', 'mean_reward', 'max_reward'),
    *('ties', 'count', 'grad_norm', 'learning_rate', 'num_tokens'),
)
TIMES = ('time', 'seconds', 'tokens_per_second')
# What is known after a step rather than measured in it: means are not taken of these.
POSITION = ('step', 'epoch', 'learning_rate', 'num_tokens')


def _number(x: Any) -> int | float:
    """A Python number; a float32 becomes the shortest decimal that reads back as the same."""
    value = np.asarray(x)[()]
    return int(value) if value.dtype.kind in 'biu' else float(str(value))


def _dump(line: Line) -> str:
    """One line of the file. JSON has no NaN or infinity: they become null."""
    finite = {
        k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in line.items()
    }
    return json.dumps(finite, allow_nan=False) + '\n'


def read(path: str | Path) -> list[Line]:
    """The lines of a metrics.jsonl, null as NaN; a last one that was cut short is left out.

    Raises ValueError for a line that is not JSON.
    """
    lines = []
    for i, text in enumerate(Path(path).read_text(encoding='utf-8').split('\n')[:-1], start=1):
        try:
            line = json.loads(text)
        except ValueError as error:
            raise ValueError(f'{path}, line {i}: found {text!r}, expected JSON') from error
        lines.append({k: math.nan if v is None else v for k, v in line.items()})
    return lines


def best(
    lines: Sequence[Mapping[str, float]], name: str, *, greater_is_better: bool | None = None
) -> int:
    """The first step at which a value such as `eval_accuracy` was best; NaNs are left out.

    Less is better of a name that ends in `loss`, unless it is said. ValueError without a value.
    """
    greater = not name.endswith('loss') if greater_is_better is None else greater_is_better
    given = [(line[name], line['step']) for line in lines if name in line]
    found = [at for at in given if not math.isnan(at[0])]
    if not found:
        raise ValueError(f'lines: found no value of {name!r}, expected at least one')
    return int(min(found, key=lambda at: (-at[0] if greater else at[0], at[1]))[1])


def _members(metrics: Mapping[str, Any]) -> Line:
    """Of values [E], one for each of several models, the mean, and as `_std` their spread.

    Of those that are finite: a model that takes no part has NaN.
    """
    out: Line = {}
    for name, x in metrics.items():
        x_E = np.asarray(x)
        if not x_E.ndim:
            out[name] = x_E
            continue
        here = x_E[np.isfinite(x_E)].astype(np.float64)
        both = (here.mean(), here.std()) if len(here) else (math.nan, math.nan)
        out[name], out[f'{name}_std'] = map(np.float32, both)
    return out


def _mean(lines: Sequence[Line]) -> Line:
    """One line for several steps: metrics averaged, the last one's position, rates over all."""
    last = lines[-1]
    out = {
        name: value if name in POSITION else float(np.mean([line[name] for line in lines]))
        for name, value in last.items()
        if name not in TIMES
    }
    timed = [line for line in lines if line['seconds'] > 0]
    seconds = sum(line['seconds'] for line in timed)
    if seconds:
        out['steps_per_second'] = len(timed) / seconds
        if 'tokens_per_second' in last:
            tokens = sum(line['tokens_per_second'] * line['seconds'] for line in timed)
            out['tokens_per_second'] = tokens / seconds
    return out


def _aliases(line: Line) -> Line:
    """The same under the names of older dashboards, for training and for each set evaluated.

    The mean reward and half the margin give the means of both sides: exactly so for pairs.
    """
    out: Line = {}
    for name in line:
        start = name.removesuffix('accuracy')
        margin, mean = (line.get(start + other) for other in ('margin', 'mean_reward'))
        if name != start and margin is not None:
            out |= {f'{start}rewards/accuracies': line[name], f'{start}rewards/margins': margin}
            if mean is not None:
                out[f'{start}rewards/chosen'] = mean + margin / 2
                out[f'{start}rewards/rejected'] = mean - margin / 2
    return out


def _folders(line: Line) -> Line:
    """The names as trackers group them: `train/loss`, and `eval/accuracy` of `eval_accuracy`."""
    parts = {name: name.removeprefix('eval_') for name in line if name != 'step'}
    return {f'{"train" if p == name else "eval"}/{p}': line[name] for name, p in parts.items()}


def _text(mean: Line) -> str:
    """The few numbers that people watch."""
    parts = [f'{name} {mean[name]:.4f}' for name in ('loss', 'accuracy', 'margin') if name in mean]
    rates = {'steps_per_second': '{:.3g} steps/s', 'tokens_per_second': '{:,.0f} tokens/s'}
    parts += [form.format(mean[name]) for name, form in rates.items() if name in mean]
    return '  '.join(parts)


class Log:
    """A hook for every step, to be entered as a context: `hooks=[(1, log), ...]`.

    A step's metrics are read when the next one has been dispatched, so the loop never waits for
    the step just begun; `flush` and leaving the context read what is left. In metrics.jsonl, in
    the local folder `directory`, `time` is in seconds since 1970 and `seconds` the time since the
    line before, null on the first of a start, which compiles. `steps` is the length of the run,
    `progress(steps done)` gives fields such as `epoch` and `num_tokens`, `schedule` the learning
    rate. Console and `trackers` (see trackers.choose) get means over `logging_steps` steps.

    A run that goes on from step `start` cuts the file there. With hooks in the order log,
    evaluations, saver, and `Saver(before=log.flush)`, a run that was killed and restarted ends
    with the file of an undisturbed one, time fields aside.
    """

    def __init__(
        self,
        directory: str | Path,
        *,
        steps: int,
        start: int = 0,
        logging_steps: int = 10,
        progress: Callable[[int], Mapping[str, float]] | None = None,
        schedule: optax.Schedule | None = None,
        console: Console | None = None,
        trackers: Sequence[Open] = (),
    ):
        self._path = Path(directory) / 'metrics.jsonl'
        self._steps, self._start, self._every = steps, start, logging_steps
        self._progress = progress or (lambda step: {})
        self._schedule = schedule
        main = jax.process_index() == 0
        self._writes, self._console = main, console if main else None
        self._open, self._trackers = trackers if main else (), list[Tracker]()
        self._pending: tuple[int, Mapping[str, jax.Array]] | None = None
        self._window: list[Line] = []
        self._written: set[tuple[str, ...]] = set()
        self._last: float | None = None

    def __enter__(self) -> Self:
        if self._schedule is not None:  # all at once: a call a step would queue behind the step
            self._rates = np.asarray(jax.jit(jax.vmap(self._schedule))(jnp.arange(self._steps)))
        if self._writes:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._cut()
            self._file = self._path.open('a', encoding='utf-8')
        self._trackers = [begin(self._path.parent, self._start) for begin in self._open]
        self._bar = None
        if self._console is not None and self._console.is_terminal:
            columns = MofNCompleteColumn(), BarColumn(), TextColumn('{task.description}')
            self._bar = Progress(*columns, TimeRemainingColumn(), console=self._console)
            self._bar.start()
            self._task = self._bar.add_task('', total=self._steps, completed=self._start)
        return self

    def __exit__(self, kind, error, trace) -> None:
        try:
            self.flush()
        finally:
            if self._bar is not None:
                self._bar.stop()
            for tracker in self._trackers:
                tracker.close(error is not None)
            if self._writes:
                self._file.close()
        if isinstance(error, SystemExit):
            self._print(str(error))

    def __call__(self, done: int, state: Any, metrics: Mapping[str, jax.Array]) -> None:
        """Keeps the metrics of this step and writes those of the one before."""
        for x in metrics.values():
            x.copy_to_host_async()
        self.flush()
        self._pending = done, metrics

    def flush(self) -> None:
        """Writes the step that is kept, waiting for it."""
        if self._pending is None:
            return
        (done, metrics), self._pending = self._pending, None
        line = self._line(done, metrics)
        self._append(line)
        self._window.append(line)
        if self._bar is not None:
            self._bar.update(self._task, completed=done)
        if done % self._every == 0 or done == self._steps:
            self._report(_mean(self._window))
            self._window = []

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """Writes results such as `eval_accuracy`, after the step kept.

        Call `flush` before an evaluation begins, else its time counts as the step's. What a
        restarted run writes again, by step and names, is not written twice.
        """
        self.flush()
        line = {'step': step, **{name: _number(x) for name, x in values.items()}}
        if self._key(line) not in self._written:
            self._written.add(self._key(line))
            self._append(line | {'time': round(time.time(), 3)})
            self._track(line)
            shown = '  '.join(f'{name} {line[name]:.6g}' for name in values)
            self._print(f'step {step}  {shown}')
        self._last = time.perf_counter()

    def _line(self, done: int, metrics: Mapping[str, Any]) -> Line:
        values = {'step': done, **_members(metrics), **self._progress(done)}
        if self._schedule is not None:
            values['learning_rate'] = self._rates[done - 1]
        rest = sorted(values.keys() - set(NAMES))
        line: Line = {name: _number(values[name]) for name in (*NAMES, *rest) if name in values}
        now = time.perf_counter()
        seconds = math.nan if self._last is None else now - self._last
        self._last = now
        line |= {'time': round(time.time(), 3), 'seconds': round(seconds, 6)}
        if 'num_tokens' in line:
            tokens = line['num_tokens'] - self._progress(done - 1)['num_tokens']
            line['tokens_per_second'] = round(tokens / seconds, 1)
        return line

    def _cut(self) -> None:
        """Leaves the lines of steps done before the start, and reads what is to be gone on with."""
        if not self._path.exists():
            return
        lines = read(self._path) if self._start else []
        lines = [line for line in lines if line['step'] <= self._start]
        part = self._path.with_suffix('.part')
        part.write_text(''.join(map(_dump, lines)), encoding='utf-8')
        os.replace(part, self._path)
        begun = self._start - self._start % self._every
        self._window = [line for line in lines if 'loss' in line and line['step'] > begun]
        self._written = {self._key(line) for line in lines if 'loss' not in line}

    @staticmethod
    def _key(line: Line) -> tuple[str, ...]:
        return str(line['step']), *sorted(set(line) - {'step', *TIMES})

    def _append(self, line: Line) -> None:
        if self._writes:
            self._file.write(_dump(line))
            self._file.flush()  # a killed process loses nothing

    def _report(self, mean: Line) -> None:
        self._track(mean)
        text = _text(mean)
        if self._bar is not None:
            self._bar.update(self._task, description=text)
            return
        if 'steps_per_second' in mean:
            left = (self._steps - mean['step']) / mean['steps_per_second']
            text += f'  eta {datetime.timedelta(seconds=round(left))}'
        self._print(f'step {mean["step"]}/{self._steps}  {text}')

    def _track(self, line: Line) -> None:
        for tracker in self._trackers:
            tracker.write(line['step'], _folders(line | _aliases(line)))

    def _print(self, text: str) -> None:
        if self._console is not None:
            self._console.print(text, markup=False, highlight=False, soft_wrap=True)
