"""Best-of-n on files of generations: what reward models pick, beside votes, chance and the best.

Run:     JAXRM_DATA=DIR python -m experiments.best_of_n --models MODEL [MODEL ...]
         python -m experiments.best_of_n --models MODEL --dataset_name mine.jsonl --run_code
         python -m experiments.best_of_n --models MODEL --only_table
Cost:    a pass over all candidates for each model: for a tiny one minutes on two CPU cores
Expect:  the tables of best-of-n in BENCHMARKS.md, and a picture for each file

Of the first n candidates, n doubling, each model takes the one it scores highest. Files hold
several policies' answers in a fixed order: candidates are put into `orders` random ones, and a
question counts by its mean over them. Rows are as in experiments.generations; code runs with
--run_code alone, in namespaces of its own (--unsafe: as it is, where there are none). A cell is a
model on a file; other contents of a file of the same name are refused.
"""

import dataclasses
import functools
import hashlib
import itertools
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

import jaxrm
from experiments import common, dogerm, generations, stored
from experiments.generations import Bench
from jaxrm import bestofn, evaluate, intervals, report, sandbox, strength_report
from jaxrm.data import Preference

FILES = ('gsm8k', 'cruxeval', 'humaneval')
Array = np.ndarray


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    models: tuple[Path, ...]  # folders of reward models, or hub ids
    dataset_name: tuple[str, ...] = ()  # by default the files bon/* of JAXRM_DATA
    results: Path = dogerm.RESULTS / 'best_of_n'
    questions: int | None = None  # at most so many of each file
    orders: int = 20
    run_code: bool = False
    unsafe: bool = False  # run code without keeping it apart
    timeout: float = 3.0  # seconds a program
    max_length: int | None = None  # longer texts lose the left of their prompt; else the model's
    max_answer: int = 1024  # tokens of an answer that models see: what runs on is cut off
    only_table: bool = False


def cell(c: Config, name: str, path: str, of: Bench, curves: dict[str, Array]) -> None:
    """A file of curves [B, K] on the data at `path`."""
    prompt_B = intervals.numbered(evaluate.prompts(of.records), len(of.gold))
    rounded = {k: np.round(x_BK, 3).tolist() for k, x_BK in curves.items()}
    said = {
        'flags': flags(c, path), 'n': generations.doubling(of.gold), 'prompt': prompt_B.tolist()
    }  # fmt: skip
    if of.why is not None:
        said['ends'] = generations.ends(of.why)
    common.write_json(c.results / f'{name}.json', {**said, 'curves': rounded})


def read(c: Config, name: str, path: str) -> dict[str, Any] | None:
    return stored.read(c.results / f'{name}.json', flags(c, path))


def flags(c: Config, path: str) -> dict[str, Any]:
    """Those that a cell depends on: of the settings, some only where they are not the default."""
    names = ('orders', 'questions', 'run_code', 'max_length', 'max_answer')
    found = {name: getattr(c, name) for name in names}
    if c.run_code and (c.unsafe, c.timeout) != (Config.unsafe, Config.timeout):
        found |= {'unsafe': c.unsafe, 'timeout': c.timeout}
    if c.dataset_name and Path(path).is_file():
        found['sha256'] = digest(path)
    return found


@functools.cache
def digest(path: str) -> str:
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def by_name(paths: Sequence[str]) -> dict[str, str]:
    """{what it is called: file}; raises ValueError where two files are called the same."""
    named: dict[str, str] = {}
    for path in paths:
        if (other := named.setdefault(short(path), path)) is not path:
            raise ValueError(f'dataset_name: found {other} and {path}, of which two have one name')
    return named


def cut(records: list[Preference], tokenizer: Any, most: int) -> list[Preference]:
    """The records with at most so many tokens of each answer; says how many were longer."""
    texts = [text for record in records for text in record.responses]
    places = tokenizer(texts, add_special_tokens=False, return_offsets_mapping=True)
    ends = [at[:most][-1][1] if len(at) > most else None for at in places['offset_mapping']]
    if longer := len(ends) - ends.count(None):
        common.console.print(f'{longer} of {len(ends)} answers are over {most} tokens: cut there')
    end = iter(ends)
    return [r._replace(responses=tuple(x[: next(end)] for x in r.responses)) for r in records]


def short(path: str | Path) -> str:
    """What a model or a file is called in tables: a folder `model` by the one that it is in."""
    parts = [part for part in Path(path).parts if part != 'model']
    return re.sub(r'(_candidates)?(\.jsonl?(\.gz)?)?$', '', parts[-1])


def learn(c: Config, files: dict[str, str]) -> None:
    """The cells that are missing."""
    if len({short(m) for m in c.models}) < len(c.models):
        raise ValueError(f'models: found {[*map(str, c.models)]}, of which two have one name')
    open_model = functools.cache(jaxrm.load)
    for name, path in files.items():
        todo = [m for m in c.models if read(c, f'{short(m)}-{name}', path) is None]
        if not todo and read(c, name, path):
            continue
        code = {'timeout': c.timeout, 'unsafe': c.unsafe} if c.run_code else {}
        of = generations.load(path, questions=c.questions, **code)
        cell(c, name, path, of, generations.baselines(of, c.orders))
        for model in todo:
            scorer = open_model(model)
            seen = cut(of.records, scorer.tokenizer, c.max_answer)
            scores = scorer.score_records(seen, max_length=c.max_length, overlong='left')
            found = generations.over_orders(of, bestofn.nested, scores, c.orders)
            cell(c, f'{short(model)}-{name}', path, of, {short(model): found})
            common.console.print(f'{short(model)} on {name}: done')


# Tables


def table(c: Config, name: str, path: str) -> None:
    """Accuracy by n of each model and of what needs none, with intervals over questions."""
    names = [*(f'{short(m)}-{name}' for m in c.models), name]
    found = [x for each in names if (x := read(c, each, path))]
    if not found:
        return
    curves = {k: np.array(x_BK) for x in found for k, x_BK in x['curves'].items()}
    prompts, ns = found[0]['prompt'], found[0]['n']
    rows = {k: [evaluate.interval(x_B, prompts=prompts) for x_B in x_BK.T[1:]]
            for k, x_BK in curves.items()}  # fmt: skip
    title = f'{name}: {len(prompts)} questions, share right of the first n'
    common.table(title, rows, [f'n = {n}' for n in ns[1:]], paste=True)
    drawn, (axis,) = report.canvas(1)
    models, colours = {short(m) for m in c.models}, itertools.cycle(strength_report.LINES)
    for (k, x_BK), colour in zip(curves.items(), colours, strict=False):
        axis.plot(ns, x_BK.mean(0), '.-' if k in models else '.:', color=colour, label=k)
    axis.set(xscale='log', xlabel='n', ylabel='share right', title=name)
    axis.set_xticks(ns, map(str, ns))
    axis.minorticks_off()
    axis.legend(frameon=False, fontsize=7)
    drawn.savefig(c.results / f'{name}.png', dpi=120)


def main(c: Config) -> None:
    """Score what is missing, then print and draw."""
    files = c.dataset_name
    if not files:
        folder = Path(os.environ.get('JAXRM_DATA', 'JAXRM_DATA')) / 'bon'
        files = tuple(str(folder / f'{name}_candidates.jsonl.gz') for name in FILES)
    named = by_name(files)
    if not c.only_table:
        if not c.dataset_name and 'JAXRM_DATA' not in os.environ:
            raise ValueError('JAXRM_DATA: found nothing, expected a folder with bon/*')
        if c.run_code:
            sandbox.check(unsafe=c.unsafe)
        learn(c, named)
    for name, path in named.items():
        table(c, name, path)


if __name__ == '__main__':
    common.launch(Config, main)
