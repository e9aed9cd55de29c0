"""Auto-J's pairwise test set: rows to records, scores to accuracies by group of scenarios.

    bench = autoj.load('testdata_pairwise.jsonl')  # wrong rows are named here
    result = autoj.evaluate(bench, scorer.score_records(bench.records))
    for name, accuracy, pairs in autoj.table(result): ...

The file of GAIR-NLP/auto-j (arXiv 2310.05470) has 1392 rows, 24 of each of 58 scenarios; 373 are
ties. Groups of scenarios are those of DogeRM's evaluation (arXiv 2407.01470): of the 1019 pairs
only 32 are mathematics, where one pair is worth 3 points.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from jaxrm import data, intervals, statistics
from jaxrm.data import DataError, Preference
from jaxrm.files import Row
from jaxrm.intervals import Interval
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


class Result(NamedTuple):
    """Accuracy by group, each pair 1 where the better response has the higher score, and 0 else.

    `equal` counts pairs whose scores are equal, which are not right.
    """

    accuracy: dict[str, Interval]  # of groups that there are, and 'All'
    pairs: dict[str, int]
    equal: int


def load(path: str | Path) -> Bench:
    """The pairs of a file; raises DataError naming its line."""
    return bench(data.read(path))


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


def evaluate(bench: Bench, scores: Sequence[np.ndarray]) -> Result:
    """The result of scores [2] of every record, better response first; ValueError for others."""
    if len(scores) != len(bench.records):
        raise ValueError(f'scores: found {len(scores)}, expected {len(bench.records)}')
    for where, score_M in zip(bench.where, scores, strict=True):
        if np.shape(score_M) != (2,) or not np.isfinite(score_M).all():
            raise ValueError(f'{where}: found scores {score_M}, expected two numbers')
    found = statistics.pairs([(0, 1)] * len(scores), scores)
    group_n = np.array([record.group for record in bench.records])
    prompt_n = np.array([str(record.messages) for record in bench.records])
    accuracy, pairs = {}, {}
    for name in (*GROUPS, OTHER, 'All'):
        at = np.flatnonzero((group_n == name) | (name == 'All'))
        if len(at):
            of_prompt = prompt_n[at].tolist()
            accuracy[name] = intervals.interval(found.accuracy[at], prompts=of_prompt)
            pairs[name] = len(at)
    return Result(accuracy, pairs, int(found.ties.sum()))


def table(result: Result) -> list[tuple[str, Interval, int]]:
    """(group, accuracy, pairs) to print; a group that is not the published one says so."""
    whole = {**WHOLE, 'All': sum(WHOLE.values())}
    rows = []
    for name, accuracy in result.accuracy.items():
        n = result.pairs[name]
        rows.append((name if n == whole[name] else f'{name} (partial)', accuracy, n))
    return rows
