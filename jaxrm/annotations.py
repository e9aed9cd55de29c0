"""Pairs with the scores that an ensemble gave them, as the strength of HH-RLHF was published.

The columns are those of fnlp/hh-rlhf-strength-cleaned (Secrets of RLHF II, arXiv 2401.06080), whose
names have spaces; the spelling with underscores is read, too. A conversation is a list of
utterances, of which the last is the answer.

Letters: E members of the ensemble, n pairs.
"""

import gzip
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxrm import files, records
from jaxrm.files import DataError, Row, kind
from jaxrm.records import Message, Preference, Read, fail

MEAN, STD = 'mean preference difference', 'std preference difference'
SCORES = ('chosen score list', 'rejected score list')
JUDGE = 'GPT4 label'  # 1 where GPT-4 prefers chosen, 0 where rejected, -1 without its label
PAIR = ('chosen', 'rejected')


class Annotated(NamedTuple):
    """Pairs, the better answer first, with what was measured of each."""

    records: list[Preference]
    mean_n: np.ndarray  # float64, as the file has it
    std_n: np.ndarray  # float64, NaN where the file has none
    score_En2: np.ndarray  # float64; E is 0 without scores
    judge_n: np.ndarray  # int, 1 for the better answer, 0 for the other, -1 for neither


def names(row: Iterable[str]) -> dict[str, str]:
    """How these columns spell each one, which is missing where they do not."""
    found = set(row)
    both = {name: (name, name.replace(' ', '_')) for name in (MEAN, STD, *SCORES, JUDGE)}
    return {name: s for name, spelt in both.items() for s in spelt if s in found}


def read(row: Row, where: str, chat: bool) -> Read:
    """The pair of a row, and its scores as ratings, one of each member."""
    spelt = names(row)
    talks = [_turns(row[side], where, side) for side in PAIR]
    if talks[0][:-1] != talks[1][:-1]:
        fail(where, 'rejected', 'another prompt than chosen', 'the same utterances but the last')
    how = 'chosen/rejected (utterances, the last is the answer)'
    sides = [
        records.answer(talk[-1]['content'], where, side, ())[0]
        for talk, side in zip(talks, PAIR, strict=True)
    ]
    pair = records.pair({}, where, talks[0][:-1], sides, how, worse='rejected')
    if not all(row.get(spelt.get(name, '')) is not None for name in SCORES):
        return pair
    first = records.listed(row[spelt[SCORES[0]]], where, spelt[SCORES[0]])
    ratings = tuple(_scores(row, where, spelt[name], len(first)) for name in SCORES)
    members = tuple(f'member {e}' for e in range(len(first)))
    return Read(pair.record._replace(ratings=ratings), f'{how}, scores of {len(first)}', members)


def _turns(value: Any, where: str, column: str) -> tuple[Message, ...]:
    """Utterances by turns, the last of which is the assistant's."""
    said = [records.text(x, where, column) for x in records.listed(value, where, column)]
    if len(said) < 2:
        fail(where, column, 'one utterance', 'a prompt and an answer')
    roles = [('assistant', 'user')[i % 2] for i in range(len(said))][::-1]
    return tuple({'role': r, 'content': x} for r, x in zip(roles, said, strict=True))


def _scores(row: Row, where: str, column: str, length: int) -> tuple[float, ...]:
    given = records.listed(row[column], where, column)
    if len(given) != length:
        fail(where, column, f'{len(given)} scores', f'{length}, as of chosen')
    return tuple(records.number(x, where, f'{column}[{e}]') for e, x in enumerate(given))


def load(path_or_name: str | Path, *, split: str | None = None) -> Annotated:
    """All of a file or hub data set; see `files.read`. Raises DataError."""
    made, numbers = [], []
    for where, row in files.read(path_or_name, split=split):
        spelt = names(row)
        if MEAN not in spelt or not set(PAIR) <= row.keys():
            raise DataError(f'{where}: found {sorted(row)}, expected {[*PAIR, MEAN]}')
        made.append(read(row, where, False).record)
        mean = records.number(row[spelt[MEAN]], where, spelt[MEAN])
        std, judge = (row.get(spelt.get(name, '')) for name in (STD, JUDGE))
        if judge not in (1, 0, -1, None):
            fail(where, spelt[JUDGE], kind(judge), '1, 0 or -1')
        std = np.nan if std is None else records.number(std, where, spelt[STD])
        numbers.append((mean, std, -1 if judge is None else int(judge)))
    if not made:
        raise DataError(f'{path_or_name}: found no rows, expected at least one')
    mean_n, std_n, judge_n = np.array(numbers, np.float64).T
    return Annotated(made, mean_n, std_n, _stacked(made, str(path_or_name)), judge_n.astype(int))


def _stacked(made: list[Preference], name: str) -> np.ndarray:
    """[E, n, 2] of the ratings."""
    sizes = {len(r.ratings[0]) if r.ratings else 0 for r in made}
    if len(sizes) > 1:
        raise DataError(f'{name}: found {sorted(sizes)} scores in rows, expected the same number')
    if sizes == {0}:
        return np.zeros((0, len(made), 2))
    return np.array([r.ratings for r in made], np.float64).transpose(2, 0, 1)


def save(
    path: str | Path,
    made: Sequence[Preference],
    score_En2: np.ndarray,
    *,
    judge_n: Sequence[int] | None = None,
) -> None:
    """Writes pairs and the scores of their (better, worse) answers, as .jsonl or .jsonl.gz.

    `strength.sides` makes these scores of an ensemble's. The layout has no place for id, group,
    margins, ratings and smoothing of a record: they are not written. Raises DataError, before
    anything is written, for a record that lists of utterances cannot hold (turns of user and
    assistant one after the other, and text, without tools), and for scores and labels that `load`
    would refuse or of which strength means nothing: of no member, in half precision, NaN.
    """
    path = Path(path)
    _check(len(made), score_En2, judge_n)
    gap_En = score_En2[..., 0].astype(np.float64) - score_En2[..., 1]
    mean_n, std_n = gap_En.mean(0), gap_En.std(0)  # of the population
    rows = []
    for i, record in enumerate(made):
        row: Row = _utterances(record, f'record {i}')
        row |= {MEAN: float(mean_n[i]), STD: float(std_n[i])}
        row |= {name: [float(x) for x in score_En2[:, i, m]] for m, name in enumerate(SCORES)}
        rows.append(row if judge_n is None else {**row, JUDGE: int(judge_n[i])})
    text = ''.join(json.dumps(row, ensure_ascii=False) + '\n' for row in rows).encode()
    part = path.with_name(f'{path.name}.part')
    part.write_bytes(gzip.compress(text, mtime=0) if path.suffix == '.gz' else text)
    part.replace(path)


def _check(n: int, score_En2: np.ndarray, judge_n: Sequence[int] | None) -> None:
    """DataError for scores and labels that are not those of n pairs."""
    if score_En2.shape[1:] != (n, 2) or not score_En2.size:
        raise DataError(f'scores: found {list(score_En2.shape)}, expected [members, {n}, 2]')
    if score_En2.dtype not in (np.float32, np.float64):
        raise DataError(f'scores: found {score_En2.dtype}, expected float32')
    if (bad := np.argwhere(~np.isfinite(score_En2))).size:
        e, i, m = bad[0]
        found = f'{score_En2[e, i, m]} of member {e} ({PAIR[m]})'
        raise DataError(f'record {i}: scores: found {found}, expected a finite number')
    if judge_n is None:
        return
    if len(judge_n) != n:
        raise DataError(f'{JUDGE}: found {len(judge_n)}, expected {n}, one of each record')
    for i, judge in enumerate(judge_n):
        if judge not in (1, 0, -1):
            raise DataError(f'record {i}: {JUDGE}: found {judge}, expected 1, 0 or -1')


def _utterances(record: Preference, where: str) -> dict[str, list[str]]:
    turns, ranks = record.messages, record.ranks or ()
    if sorted(ranks) != [0, 1]:
        raise DataError(f'{where}: found ranks {record.ranks}, expected an ordered pair')
    answers = [answer for answer in record.responses if isinstance(answer, str)]
    if isinstance(turns, str | records.Ids) or len(answers) < 2:
        raise DataError(f'{where}: found {kind(turns)}, expected messages and answers of text')
    if record.tools:
        raise DataError(f'{where}: found {len(record.tools)} tools, expected none')
    if not turns:
        raise DataError(f'{where}: found no messages, expected a prompt')
    roles = [turn['role'] for turn in turns]
    if roles != [('user', 'assistant')[i % 2] for i in range(len(roles))][::-1]:
        raise DataError(f'{where}: found the roles {roles}, expected user and assistant by turns')
    said = [turn['content'] for turn in turns]
    return {side: [*said, answers[ranks.index(k)]] for k, side in enumerate(PAIR)}
