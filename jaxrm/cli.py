"""The `jaxrm` command: thin functions, one a verb."""

import contextlib
import json
import os
import sys
from pathlib import Path
from typing import Any, Literal

import numpy as np
import tyro


def score(
    model: str,
    data: str,
    output: Path,
    *,
    dtype: Literal['float32', 'bfloat16', 'float16'] | None = None,
    max_length: int | None = None,
    truncate: Literal['left'] | None = None,
    chat: bool = False,
    split: str | None = None,
    overwrite: bool = False,
) -> None:
    """Score the conversations, pairs or candidates of a file or hub data set.

    Writes the records back in order as JSON Lines, with `score` for a conversation,
    `score_chosen` and `score_rejected` for a pair, `scores` for several candidates.

    Args:
        model: Folder or hub id of a reward model.
        data: .jsonl, .jsonl.gz, .json or .parquet file, or hub data set.
        output: File to write.
        dtype: Compute dtype; by default the one the model is stored in.
        max_length: Longest row in tokens; by default the model's own limit.
        truncate: Cut over-long prompts at the left instead of refusing them.
        chat: Treat plain strings as a user and an assistant turn.
        split: Split of a hub data set.
        overwrite: Replace an existing output file.
    """
    from jaxrm import data as records
    from jaxrm import scorer

    if output.exists() and not overwrite:
        raise ValueError(f'{output}: already there (--overwrite replaces it)')
    if not output.parent.is_dir():
        raise ValueError(f'{output}: {output.parent} is not a folder')
    rows = list(records.read(data, split=split))
    loaded = records.preferences(rows, chat=chat, source=data)
    print(loaded.mapping, file=sys.stderr)
    for where, row in rows:
        if taken := sorted({'score', 'score_chosen', 'score_rejected', 'scores'} & set(row)):
            raise ValueError(f'{where}: column {taken[0]!r} is there already, the scores go there')
    rm = scorer.load(model, dtype=dtype)
    overlong = truncate or 'error'
    scores = rm.score_records(
        loaded.records, max_length=max_length, overlong=overlong, where=loaded.where
    )
    with _written_whole(output) as file:
        for (_, row), values in zip(rows, scores, strict=True):
            file.write(json.dumps({**row, **_columns(row, values)}, ensure_ascii=False) + '\n')


def _columns(row: dict[str, Any], values: np.ndarray) -> dict[str, Any]:
    numbers = [float(str(x)) for x in values]  # the shortest decimals that give the float32 back
    if 'chosen' in row:
        return {'score_chosen': numbers[0], 'score_rejected': numbers[1]}
    return {'score': numbers[0]} if 'messages' in row else {'scores': numbers}


@contextlib.contextmanager
def _written_whole(path: Path):
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
