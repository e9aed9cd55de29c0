"""The `jaxrm` command: thin functions, one a verb."""

import contextlib
import dataclasses
import datetime
import decimal
import functools
import json
import math
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, TextIO

import numpy as np
import tyro
from rich.console import Console

from jaxrm import plan_asked, usage


@dataclasses.dataclass(frozen=True)
class Scoring:
    """How texts become scores."""

    dtype: Annotated[
        Literal['float32', 'bfloat16', 'float16'] | None, tyro.conf.arg(aliases=['--torch-dtype'])
    ] = None
    """Compute dtype; by default the one the model is stored in."""
    max_length: int | None = None
    """Longest row in tokens; by default the model's own limit."""
    truncate: Literal['left'] | None = None
    """Cut over-long prompts at the left instead of refusing them."""
    pooling: Literal['last', 'rightmost_non_pad'] | None = None
    """Which token is read where the model's pad token stands in a text: the last one of the
    answer, or what transformers reads."""
    chat_template: Path | None = None
    """File with another template than the model's own."""
    route: Literal['predicted', 'gold', 'random'] | None = None
    """Of a DMoERM, whose category decides: the router's, the record's own, or chance's."""
    normalise: bool = False
    """Of a DMoERM, bring the scores of all categories to one scale."""
    fsdp: int = 1
    """How many devices share out the weights, each with its part of a batch."""
    tensor: int = 1
    """How many devices share out each layer's heads and feed-forward, with one batch."""


def score(
    model: str,
    data: Annotated[str, tyro.conf.arg(aliases=['--dataset'])],
    output: Path,
    *,
    base: str | None = None,
    scoring: Annotated[Scoring, tyro.conf.OmitArgPrefixes] = Scoring(),
    chat: bool = False,
    layout: str | None = None,
    split: str | None = None,
    column: str = 'score',
    overwrite: bool = False,
) -> None:
    """Score the conversations, pairs or candidates of a file or hub data set.

    Writes the records back in order as JSON Lines, with `score` for a conversation,
    `score_chosen` and `score_rejected` for a pair, `scores` for several candidates.

    Args:
        model: Folder or hub id of a reward model, or of a LoRA adapter on `base`.
        data: .jsonl, .jsonl.gz, .json or .parquet file, or hub data set.
        output: File to write, JSON Lines; it appears when everything is scored.
        base: Folder or hub id of the model that an adapter belongs to.
        scoring: How texts become scores.
        chat: Treat plain strings as a user and an assistant turn.
        layout: Which columns to read, where a file has those of several layouts.
        split: Split of a hub data set.
        column: Name of the new columns: NAME, NAME_chosen and NAME_rejected, or NAMEs.
        overwrite: Replace an existing output file.
    """
    from jaxrm import data as records
    from jaxrm import processes, programs

    programs.begin(os.environ)
    processes.alone(lambda: _check_output(output, overwrite))
    rows = list(records.read(data, split=split))
    loaded = records.preferences(rows, layout=layout, chat=chat, source=data)
    plain = [_row(row, where, column) for where, row in rows]
    processes.check_same({data: plain})
    rm = _scorer(model, base, scoring)
    ready = _prepared(rm, loaded, scoring)
    processes.alone(lambda: print(loaded.mapping, file=sys.stderr))  # nothing is wrong with it
    found = [_columns(loaded.kind, values, column) for values in rm.score_prepared(ready)]
    processes.alone(lambda: _write_lines(output, plain, found))


@dataclasses.dataclass(frozen=True)
class Reading:
    """How data sets are read."""

    split: str | None = None
    """Split of hub data sets."""
    layout: str | None = None
    """Which columns to read, where a file has those of several layouts."""
    chat: bool = False
    """Treat plain strings as a user and an assistant turn."""
    rules: Literal['rewardbench', 'rewardbench-2', 'autoj'] | None = None
    """Read a benchmark's own columns, and also score by its published rules; of Auto-J's pairs
    ties are left out, and rows are code, mathematics and the rest."""
    extra_subsets: tuple[str, ...] = ()
    """Subsets that may be there though they are not of the benchmark."""
    legacy: bool = False
    """Weigh RewardBench's XSTest subsets as first published, with their counts swapped."""


def evaluate(
    model: str,
    data: Annotated[
        tuple[str, ...], tyro.conf.UseAppendAction, tyro.conf.arg(aliases=['--dataset'])
    ],
    output: Path,
    *,
    base: str | None = None,
    baseline: str | None = None,
    baseline_base: str | None = None,
    reading: Annotated[Reading, tyro.conf.OmitArgPrefixes] = Reading(),
    scoring: Annotated[Scoring, tyro.conf.OmitArgPrefixes] = Scoring(),
    pictures: bool = True,
    overwrite: bool = False,
) -> None:
    """Measure a reward model on pairs or ranked candidates, and compare it with another.

    Prints a table, and writes a folder with results.json, examples.jsonl and pictures.

    Args:
        model: Folder or hub id of a reward model, or of a LoRA adapter on `base`.
        data: File or hub data set, as for score; may be given several times.
        output: Folder to write; it appears when everything is done.
        base: Folder or hub id of the model that an adapter belongs to.
        baseline: Another reward model, to be compared on the same records, with the chat template
            of its own.
        baseline_base: Folder or hub id of the model that a baseline's adapter belongs to.
        reading: How data sets are read.
        scoring: How texts become scores.
        pictures: Draw them; needs matplotlib.
        overwrite: Replace the folder of an earlier evaluation.
    """
    from jaxrm import checkpoint, hf, processes, programs, report, results

    programs.begin(os.environ)
    processes.alone(lambda: hf.check_free(output.resolve(), overwrite, [results.RESULTS]))
    if pictures:
        report.check()
    if baseline:
        checkpoint.resolve(baseline)
    sets = results.read(data, **dataclasses.asdict(reading))
    scores, lengths, about, render = _scored(model, sets, scoring, base=base, say=True)
    about = {'model': model, **about, **dataclasses.asdict(reading), 'baseline': baseline}
    other = [None] * len(sets)
    if baseline:
        its_own = dataclasses.replace(scoring, chat_template=None)
        other, _, about['baseline_model'], _ = _scored(baseline, sets, its_own, base=baseline_base)
    found = [results.result(*each) for each in zip(sets, lengths, scores, other, strict=True)]

    def write() -> None:
        with hf.whole(output, overwrite, [results.RESULTS]) as folder:
            results.write(folder, found, about, render=render, pictures=pictures)
        console = Console(width=max(Console().width, 200))  # no number is ever cut short
        for table in results.tables(found):
            console.print(table)

    processes.alone(write)


def merge(
    recipe: Annotated[Path, tyro.conf.arg(metavar='RECIPE')],
    output: Annotated[str | None, tyro.conf.arg(metavar='[OUTPUT]')] = None,
    /,
    *,
    check: bool = False,
    max_shard_size: str = '5GB',
    seed: int = 0,
    overwrite: bool = False,
) -> None:
    """Merge checkpoints by a recipe: reward models with one another, or with language models.

    Reads mergekit's YAML, and `reward_head`, which says whose head the result has. Writes a folder
    that transformers loads; it appears when everything is done.

    Args:
        recipe: YAML file; its paths are relative to it.
        output: Folder to write.
        check: Say what would be done, from settings and headers alone.
        max_shard_size: Of a file of weights, such as 5GB or 500MB.
        seed: Of methods that draw at random.
        overwrite: Replace the folder of another checkpoint.
    """
    from rich.progress import Progress

    from jaxrm import hf, merge_files, merge_plan

    limit = merge_files.shard_size(max_shard_size)
    if output is None and not check:
        raise ValueError('output: found nothing, expected a folder to write, or --check')
    plan = merge_plan.prepare(recipe)
    if output is not None:
        for line in hf.tidy(output):
            print(line, file=sys.stderr)
        merge_files.check_target(plan, output, overwrite=overwrite)
    if output is not None and not check:
        console = Console(stderr=True)
        with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
            step = functools.partial(bar.advance, bar.add_task('merging', total=len(plan.steps)))
            merge_files.write(
                plan,
                output,
                max_shard_bytes=limit,
                seed=seed,
                overwrite=overwrite,
                done=lambda name: step(),
            )
    said = '\n'.join(merge_files.describe(plan, limit))
    print(said, file=sys.stdout if check else sys.stderr)


def plan(asked: Annotated[plan_asked.Asked, tyro.conf.OmitArgPrefixes]) -> None:
    """Say whether a run fits a machine, what it takes, and how fast it can be at the best.

    Nothing runs and no weights are read. Prints bytes by kind, what chips send, the least time of
    a step and what limits it, and the largest step that fits.
    """
    from jaxrm import plan_confirm, plan_report, plan_wanted

    wanted, hf = plan_wanted.read(asked)
    if asked.compile:
        plan_confirm.check(wanted.machine)
    found, run = plan_wanted.made(asked, wanted)
    if asked.compile:
        measured = plan_confirm.confirm(run, hf, asked.cache, os.environ)
        found = plan_report.compiled(found, measured)
    text = json.dumps(found, indent=1) if asked.json else '\n'.join(plan_report.lines(found))
    print(text)


def _scored(
    model: str, sets: Any, how: Scoring, *, base: str | None = None, say: bool = False
) -> tuple[Any, Any, dict[str, Any], Any]:
    """Scores and lengths of every set, what results.json says of the model, and its template."""
    from jaxrm import processes, results

    rm = _scorer(model, base, how)
    ready = [_prepared(rm, found, how) for found in sets]
    if say and processes.first():
        for found in sets:
            print(found.mapping, file=sys.stderr)  # now that nothing is wrong with the input
    scores = [rm.score_prepared(each) for each in ready]
    about = {'base': base, **dataclasses.asdict(how), **results.about(rm)}
    render = functools.partial(rm.tokenizer.apply_chat_template, tokenize=False)
    return scores, [each.lengths() for each in ready], about, render


def _scorer(model: str, base: str | None, how: Scoring) -> Any:
    from jaxrm import chat, loading, sharding

    mesh = sharding.make_mesh(fsdp=how.fsdp, tensor=how.tensor)
    rm = loading.load(model, base=base, dtype=how.dtype, mesh=mesh, normalise=how.normalise)
    if how.chat_template is None:
        return rm
    return rm.with_tokenizer(chat.with_template(rm.tokenizer, how.chat_template))


def _prepared(rm: Any, found: Any, how: Scoring) -> Any:
    routed = {} if how.route is None else {'route': how.route}
    if routed and not hasattr(rm, 'router'):
        raise ValueError(f'--route: found {how.route!r}, but this model has no router')
    return rm.prepare(
        found.records,
        max_length=how.max_length,
        overlong=how.truncate or 'error',
        pooling=how.pooling,
        where=found.where,
        **routed,
    )


def _check_output(path: Path, overwrite: bool) -> None:
    """What would only be found after the scoring."""
    if path.suffix in ('.gz', '.json', '.parquet'):
        raise ValueError(f'{path}: found suffix {path.suffix!r}, but JSON Lines are written')
    if path.is_dir() or (path.exists() and not overwrite):
        raise ValueError(f'{path}: already there (--overwrite replaces a file)')
    if not path.parent.is_dir():
        raise ValueError(f'{path}: {path.parent} is not a folder')
    if not os.access(path.parent, os.W_OK):
        raise ValueError(f'{path}: {path.parent} is not writable')


def _added(column: str) -> dict[str, list[str]]:
    """The new columns of records of each `data.Loaded.kind`."""
    pair = [f'{column}_chosen', f'{column}_rejected']
    return {'answer': [column], 'pair': pair, 'candidates': [f'{column}s']}


def _row(row: dict[str, Any], where: str, column: str) -> dict[str, Any]:
    """The row as JSON holds it."""
    if taken := sorted({x for names in _added(column).values() for x in names} & set(row)):
        raise ValueError(
            f'{where}: column {taken[0]!r} is there already, the scores go there: choose another '
            'name with --column'
        )
    return {column: _json(value, f'{where}: {column}') for column, value in row.items()}


def _json(value: Any, where: str) -> Any:
    """The value as JSON holds it: NaN is null, what columnar files have of dates is text."""
    if isinstance(value, dict):
        return {key: _json(entry, where) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_json(entry, where) for entry in value]
    if isinstance(value, float) and not math.isfinite(value):
        if math.isnan(value):
            return None
    elif value is None or isinstance(value, str | int | float):
        return value
    elif isinstance(value, datetime.date | datetime.time | datetime.timedelta | decimal.Decimal):
        return str(value)
    raise ValueError(f'{where}: found {type(value).__name__} {value!r:.40}, which JSON cannot hold')


def _columns(kind: str, values: np.ndarray, column: str) -> dict[str, Any]:
    """The scores of a record of a `data.Loaded.kind`."""
    numbers = [float(str(x)) for x in values]  # the shortest decimals that give the float32 back
    given = [numbers] if kind == 'candidates' else numbers
    return dict(zip(_added(column)[kind], given, strict=True))


def _write_lines(path: Path, rows: list[dict[str, Any]], found: list[dict[str, Any]]) -> None:
    with _written_whole(path) as file:
        for row, scores in zip(rows, found, strict=True):
            file.write(json.dumps({**row, **scores}, ensure_ascii=False) + '\n')


@contextlib.contextmanager
def _written_whole(path: Path) -> Iterator[TextIO]:
    """A text file that appears under its name only when all of it is written."""
    part = path.with_name(f'.{path.name}.{os.getpid()}')
    try:
        with open(part, 'w', encoding='utf-8') as file:
            yield file
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def _later(verb: Callable[..., None]) -> Callable[..., Callable[[], None]]:
    """The verb, to be called when its flags are known to be right."""

    @functools.wraps(verb)
    def given(*args: Any, **options: Any) -> Callable[[], None]:
        return functools.partial(verb, *args, **options)

    return given


def main() -> None:
    """Entry point: wrong input ends with status 2 and one line."""
    verbs: dict[str, Any] = {f.__name__: _later(f) for f in (score, evaluate, merge, plan)}
    try:
        with usage.one_line():
            run = tyro.extras.subcommand_cli_from_dict(verbs, prog='jaxrm')
        run()
    except (ValueError, OSError) as error:
        line = ' '.join(str(error).split())
        print(f'jaxrm: {line}', file=sys.stderr)
        sys.exit(2)
