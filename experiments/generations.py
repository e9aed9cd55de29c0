"""Files of generations: questions with sampled answers, and which of these are right.

A row has a `question` or a `prompt` and `candidates` with `text`, and one way to tell right ones:
`is_correct` of each; a number as `gold_answer`, which is compared with the number in the text; or
`test` with `entry_point`, or `test_list`, to run the code with.

Letters: B questions, N candidates, K values of n.
"""

import collections
from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple

import numpy as np

from experiments import common
from jaxrm import answers, bestofn, data, sandbox
from jaxrm.data import DataError, Preference
from jaxrm.files import Row

Array = np.ndarray


class Bench(NamedTuple):
    """Questions with candidates, which of these are right, and their answers to vote with.

    `why` says of each candidate that was run why it is not right, '' where it is.
    """

    records: list[Preference]
    gold: list[Array]
    votes: list[list[Hashable]] | None
    why: list[list[str]] | None = None


# Files


def load(name: str, *, questions: int | None = None, **code: Any) -> Bench:
    """A file's first questions; raises DataError naming the line. With options of `ran` code runs.

    Those of no candidates at all are refused, as is code without options that is not marked.
    """
    rows = list(data.read(name))[:questions]
    if not rows:
        raise DataError(f'{name}: found no rows')
    records = [record(row, where) for where, row in rows]
    gold, why = ran(rows, **code) if code and is_code(rows[0][1]) else (marked(rows), None)
    compare(name, rows, gold)
    if why is not None:
        common.console.print(f'{name}: programs that failed, by their end: {ends(why)}')
    votes = [[vote(row, x) for x in row['candidates']] for _, row in rows]
    known = any(v is not None for each in votes for v in each)
    return Bench(records, gold, votes if known else None, why)


def record(row: Row, where: str) -> Preference:
    """Its question as a user's turn, and all candidates."""
    asked, found = row.get('question', row.get('prompt')), row.get('candidates')
    if not isinstance(asked, str):
        raise DataError(f"{where}: found columns {sorted(row)}, expected 'question' or 'prompt'")
    texts = [x.get('text') if isinstance(x, dict) else None for x in found or ()]
    if not texts or not all(isinstance(text, str) for text in texts):
        raise DataError(f"{where}: candidates: expected a list of objects with a 'text'")
    return Preference(({'role': 'user', 'content': asked},), tuple(texts), id=row.get('id'))


def vote(row: Row, candidate: Row) -> Hashable:
    """The answer of a candidate; of a question with a number, the number in its text."""
    if is_number(row.get('gold_answer')):
        return answers.number(candidate['text'])
    found = candidate.get('answer')
    return found if found is None else str(found).strip().strip('\'"')


def is_number(x: Any) -> bool:
    return isinstance(x, int | float) and not isinstance(x, bool)


def marked(rows: Sequence[tuple[str, Row]]) -> list[Array]:
    """[N] 1 for each right candidate of every row."""
    return [np.array([correct(row, x, where) for x in row['candidates']]) for where, row in rows]


def correct(row: Row, candidate: Row, where: str) -> float:
    """By the number, else as the file says."""
    if is_number(row.get('gold_answer')):
        return float(answers.same(answers.number(candidate['text']), row['gold_answer']))
    if not isinstance(found := candidate.get('is_correct'), bool):
        wanted = 'is_correct, true or false' + ', or --run_code' * is_code(row)
        raise DataError(f'{where}: candidates: found {found!r}, expected {wanted}')
    return float(found)


def compare(name: str, rows: Sequence[tuple[str, Row]], gold: Sequence[Array]) -> None:
    """Says how often the file thinks the same of a candidate."""
    said = [x.get('is_correct') for _, row in rows for x in row['candidates']]
    same = [s == bool(g) for s, g in zip(said, np.concatenate(gold), strict=True) if s is not None]
    if same:
        n = f'{len(same) - sum(same)} of {len(same)}'
        common.console.print(f'{name}: {n} candidates are marked otherwise there')


def is_code(row: Row) -> bool:
    return 'test_list' in row or ('test' in row and 'entry_point' in row)


def program(row: Row, text: str) -> str:
    """A candidate with its tests."""
    if 'test_list' in row:
        setup = row.get('test_setup_code', '')
        return sandbox.mbpp(answers.code(text), row['test_list'], setup)
    return sandbox.humaneval(row['prompt'], text, row['test'], row['entry_point'])


def ran(rows: Sequence[tuple[str, Row]], **options: Any) -> tuple[list[Array], list[list[str]]]:
    """The same by running all candidates, and why each failed; options of sandbox.run_all."""
    if bad := [where for where, row in rows if not is_code(row)]:
        raise DataError(f'{bad[0]}: found no tests, expected test and entry_point, or test_list')
    programs = [program(row, x['text']) for _, row in rows for x in row['candidates']]
    found = iter(sandbox.run_all(programs, **options))
    each = [[next(found) for _ in row['candidates']] for _, row in rows]
    gold = [np.array([outcome.passed for outcome in outcomes], float) for outcomes in each]
    return gold, [[outcome.why for outcome in outcomes] for outcomes in each]


def ends(why: Sequence[Sequence[str]]) -> dict[str, int]:
    """How many programs failed in which way, the most frequent first."""
    kinds = collections.Counter(x.partition(':')[0] for each in why for x in each if x)
    return dict(kinds.most_common())


# Curves


def doubling(gold: Sequence[Array]) -> list[int]:
    """1, 2, 4, ... as far as all questions have candidates."""
    least = min(map(len, gold))
    return [n for n in (2**i for i in range(20)) if n <= least]


def orders(gold: Sequence[Array], count: int) -> list[list[Array]]:
    """So many times an order of each question's candidates."""
    rng = np.random.default_rng(0)
    return [[rng.permutation(len(g)) for g in gold] for _ in range(count)]


def over_orders(of: Bench, curve: Callable[..., Array], values: Sequence[Any], count: int) -> Array:
    """[B, K] of curve(values, gold, ns), in the mean over so many orders."""
    ns = doubling(of.gold)
    each = []
    for order in orders(of.gold, count):
        put = [[x[i] for i in at] for x, at in zip(values, order, strict=True)]
        gold = [g[at] for g, at in zip(of.gold, order, strict=True)]
        each.append(curve(put, gold, ns))
    return np.mean(each, axis=0)


def baselines(of: Bench, count: int) -> dict[str, Array]:
    """What needs no model."""
    ns, length = doubling(of.gold), [[len(text) for text in r.responses] for r in of.records]
    out = {
        'random': bestofn.floor(of.gold, ns),
        'oracle (pass@n)': bestofn.best(of.gold, of.gold, ns),
        'longest': over_orders(of, bestofn.nested, length, count),
    }
    if of.votes:
        out['majority vote'] = over_orders(of, bestofn.majority, of.votes, count)
    return out
