"""Auto-J's pairwise test set: rows to records in groups of scenarios.

    bench = autoj.load('testdata_pairwise.jsonl')  # wrong rows are named here
    scores = scorer.score_records(bench.records)

The file of GAIR-NLP/auto-j (arXiv 2310.05470) has 1392 rows, 24 of each of 58 scenarios; 373 are
ties. Groups of scenarios are those of DogeRM's evaluation (arXiv 2407.01470): of the 1019 pairs
only 32 are mathematics, where one pair is worth 3 points. A pair is right where the better response
has the higher score; equal scores are not.
"""

import collections
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from jaxrm import data
from jaxrm.data import DataError, Preference
from jaxrm.files import Row
from jaxrm.records import fail, text

GROUPS = {
    'Code': {
        'code_simplification',
        'code_generation',
        'explaining_code',
        'code_to_code_translation',
        'code_correction_rewriting',
    },
    'Math': {'math_reasoning', 'solving_exam_question_with_math'},
}
OTHER = 'Other'
WHOLE = {'Code': 84, 'Math': 32, OTHER: 903}  # pairs of the published file
TIE = 2


class Bench(NamedTuple):
    """Its pairs, the better response first and with its group; how many rows were ties."""

    records: list[Preference]
    where: list[str]
    ties: int


def load(path: str | Path, *, split: str | None = None) -> Bench:
    """The pairs of a file or hub data set; raises DataError naming its line."""
    return bench(data.read(path, split=split))


def bench(rows: Iterable[tuple[str, Row]]) -> Bench:
    """The pairs of (place, row); label 0 is for response 1, 1 for response 2, 2 for neither."""
    records, places, ties = [], [], 0
    for where, row in rows:
        label = _label(row, where)
        texts = [_text(row, name, where) for name in ('prompt', 'response 1', 'response 2')]
        group = _group(_text(row, 'scenario', where))
        if label == TIE:
            ties += 1
            continue
        prompt, *responses = texts
        ordered = (responses[label], responses[1 - label])
        asked = ({'role': 'user', 'content': prompt},)
        records.append(Preference(asked, ordered, ranks=(0, 1), group=group))
        places.append(where)
    if not records:
        raise DataError('rows: found no pair with a better response')
    return Bench(records, places, ties)


def _group(scenario: str) -> str:
    return next((name for name, those in GROUPS.items() if scenario in those), OTHER)


def _label(row: Row, where: str) -> int:
    label = row.get('label')
    if type(label) is not int or label not in (0, 1, TIE):
        fail(where, 'label', repr(label), f'0, 1 or {TIE}')
    return label


def _text(row: Row, name: str, where: str) -> str:
    if name not in row:
        raise DataError(f'{where}: found columns {sorted(row)}, expected {name!r} among them')
    return text(row[name], where, name)


def describe(bench: Bench) -> str:
    """How many pairs, of how many there are in the published file where that is not all."""
    found = collections.Counter(str(record.group) for record in bench.records)
    counts = ', '.join(
        f'{name} {found[name]}' + (f' of {n} (partial)' if found[name] != n else '')
        for name, n in WHOLE.items()
    )
    return f'{len(bench.records)} pairs ({counts}), {bench.ties} ties left out'
