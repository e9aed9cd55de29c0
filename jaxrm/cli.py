"""The `jaxrm` command: thin functions, one a verb."""

import contextlib
import datetime
import decimal
import json
import math
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, TextIO

import numpy as np
import tyro

ADDED = ('score', 'score_chosen', 'score_rejected', 'scores')


def score(
    model: str,
    data: str,
    output: Path,
    *,
    dtype: Literal['float32', 'bfloat16', 'float16'] | None = None,
    max_length: int | None = None,
    truncate: Literal['left'] | None = None,
    chat: bool = False,
    layout: str | None = None,
    split: str | None = None,
    overwrite: bool = False,
) -> None:
    """Score the conversations, pairs or candidates of a file or hub data set.

    Writes the records back in order as JSON Lines, with `score` for a conversation,
    `score_chosen` and `score_rejected` for a pair, `scores` for several candidates.

    Args:
        model: Folder or hub id of a reward model.
        data: .jsonl, .jsonl.gz, .json or .parquet file, or hub data set.
        output: File to write, JSON Lines; it appears when everything is scored.
        dtype: Compute dtype; by default the one the model is stored in.
        max_length: Longest row in tokens; by default the model's own limit.
        truncate: Cut over-long prompts at the left instead of refusing them.
        chat: Treat plain strings as a user and an assistant turn.
        layout: Which columns to read, where a file has those of several layouts.
        split: Split of a hub data set.
        overwrite: Replace an existing output file.
    """
    from jaxrm import data as records
    from jaxrm import scorer

    _check_output(output, overwrite)
    rows = list(records.read(data, split=split))
    loaded = records.preferences(rows, layout=layout, chat=chat, source=data)
    plain = [_row(row, where) for where, row in rows]
    rm = scorer.load(model, dtype=dtype)
    ready = rm.prepare(
        loaded.records, max_length=max_length, overlong=truncate or 'error', where=loaded.where
    )
    print(loaded.mapping, file=sys.stderr)  # now that nothing is wrong with the input
    scores = rm.score_prepared(ready)
    with _written_whole(output) as file:
        for row, values in zip(plain, scores, strict=True):
            file.write(json.dumps({**row, **_columns(row, values)}, ensure_ascii=False) + '\n')


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


def _row(row: dict[str, Any], where: str) -> dict[str, Any]:
    """The row as JSON holds it."""
    if taken := sorted(set(ADDED) & set(row)):
        raise ValueError(f'{where}: column {taken[0]!r} is there already, the scores go there')
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


def _columns(row: dict[str, Any], values: np.ndarray) -> dict[str, Any]:
    numbers = [float(str(x)) for x in values]  # the shortest decimals that give the float32 back
    if row.get('chosen') is not None:
        return {'score_chosen': numbers[0], 'score_rejected': numbers[1]}
    return {'score': numbers[0]} if row.get('messages') is not None else {'scores': numbers}


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


def main() -> None:
    """Entry point: wrong input ends with status 2 and one line."""
    try:
        tyro.extras.subcommand_cli_from_dict({'score': score}, prog='jaxrm')
    except (ValueError, OSError) as error:
        line = ' '.join(str(error).split())
        print(f'jaxrm: {line}', file=sys.stderr)
        sys.exit(2)


if __name__ == '__main__':
    main()
