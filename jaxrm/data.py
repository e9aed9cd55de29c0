"""Preference records, and reading them from files and hub data sets.

`load` reads one file or hub data set: `read` yields its rows with the place of each, `preferences`
finds the layout from the columns, checks every row, and says in one line what it took from where.
"""

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from jaxrm.files import DataError as DataError
from jaxrm.files import Row, kind
from jaxrm.files import read as read

Message = dict[str, Any]
Answer = str | tuple[Message, ...]

ROLES = ('system', 'user', 'assistant', 'tool')


class Preference(NamedTuple):
    """One prompt with M candidate answers, ordered (ties allowed), rated, or neither.

    `messages` is the conversation up to the answer, or a plain string that no chat template
    touches. A response is the assistant's reply, the continuation of a plain string, or several
    messages. Rank 0 is best, equal ranks are ties, -1 is absent; `None` means unranked. Of ratings
    ([M][J], NaN missing) larger is better. Margins are in reward units.
    """

    messages: tuple[Message, ...] | str
    responses: tuple[Answer, ...]
    ranks: tuple[int, ...] | None = None
    margins: tuple[float, ...] | None = None
    ratings: tuple[tuple[float, ...], ...] | None = None
    smoothing: float = 0.0
    group: str | None = None
    id: str | None = None


class Loaded(NamedTuple):
    """Records, one printable line on where they came from, and the place of each record."""

    records: list[Preference]
    mapping: str
    where: list[str]


def load(
    path_or_name: str | Path,
    *,
    config: str | None = None,
    split: str | None = None,
    layout: str | None = None,
    chat: bool = False,
) -> Loaded:
    """The checked records of a file or hub data set; options as in `read` and `preferences`."""
    rows = read(path_or_name, config=config, split=split)
    return preferences(rows, layout=layout, chat=chat, source=str(path_or_name))


# Checks of one value. Texts are never quoted: they may be long, private or offensive.


def _fail(where: str, column: str, found: str, expected: str) -> NoReturn:
    raise DataError(f'{where}: {column}: found {found}, expected {expected}')


def _text(value: Any, where: str, column: str) -> str:
    if not isinstance(value, str):
        _fail(where, column, kind(value), 'a string')
    try:
        value.encode()
    except UnicodeEncodeError as error:
        _fail(where, column, f'a lone surrogate at character {error.start}', 'Unicode text')
    return value


def _number(value: Any, where: str, column: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        _fail(where, column, kind(value), 'a number')
    return float(value)


def _numbers(values: list[Any], where: str, column: str) -> tuple[float, ...]:
    """The numbers, NaN for null and NaN."""
    return tuple(
        math.nan if v is None or v != v else _number(v, where, f'{column}[{i}]')
        for i, v in enumerate(values)
    )


def _list(value: Any, where: str, column: str, length: int | None = None) -> list[Any]:
    if not isinstance(value, list) or not value:
        _fail(where, column, 'an empty list' if value == [] else kind(value), 'a list')
    if length is not None and len(value) != length:
        _fail(where, column, f'{len(value)} entries', f'{length}, one for each completion')
    return value


def _messages(value: Any, where: str, column: str) -> tuple[Message, ...]:
    given = _list(value, where, column)
    return tuple(_message(m, where, f'{column}[{i}]') for i, m in enumerate(given))


def _message(value: Any, where: str, column: str) -> Message:
    """A message without its null entries (columnar files fill what a message lacks with null)."""
    if not isinstance(value, dict):
        _fail(where, column, kind(value), 'a message {role, content}')
    if value.get('role') not in ROLES:
        _fail(where, f'{column}.role', repr(value.get('role')), f'one of {ROLES}')
    _text(value.get('content'), where, f'{column}.content')
    return {key: entry for key, entry in value.items() if entry is not None}


def _prompt(value: Any, where: str, chat: bool) -> tuple[tuple[Message, ...] | str, str]:
    """The prompt and how it was read."""
    if isinstance(value, str):
        if not (text := _text(value, where, 'prompt')):
            _fail(where, 'prompt', 'an empty string', 'text')
        return (({'role': 'user', 'content': text},), 'one user turn') if chat else (text, 'text')
    if not isinstance(value, list):
        _fail(where, 'prompt', kind(value), 'a string or a list of messages')
    messages = _messages(value, where, 'prompt')
    if messages[-1]['role'] == 'assistant':
        _fail(where, 'prompt', 'an assistant turn at its end', 'a prompt that an answer follows')
    return messages, 'messages'


def _answer(value: Any, where: str, column: str, prompt: tuple | str) -> tuple[Answer, str]:
    """The answer and how it was read. A lone assistant message is its content."""
    if isinstance(value, str):
        if not _text(value, where, column).strip():
            _fail(where, column, 'an empty answer', 'text')
        plain = 'continuations, no chat template, EOS appended'
        return value, plain if isinstance(prompt, str) else 'assistant replies'
    if isinstance(prompt, str):
        expected = 'a string, as the prompt is one'
        if isinstance(value, list):
            expected += " (layout='implicit prompt' reads whole conversations)"
        _fail(where, column, kind(value), expected)
    messages = _messages(value, where, column)
    for end in (0, -1):
        if (role := messages[end]['role']) != 'assistant':
            _fail(where, f'{column}[{end}].role', repr(role), "'assistant': the answer alone")
    if not messages[-1]['content'].strip():
        _fail(where, column, 'an empty answer', 'text')
    lone = len(messages) == 1 and set(messages[0]) == {'role', 'content'}
    return messages[0]['content'] if lone else messages, 'messages'


# Layouts: one reader each, (row, place, chat) -> the record and how its columns were read.


def _pair(row: Row, where: str, chat: bool) -> tuple[Preference, str]:
    prompt, read_prompt = _prompt(row['prompt'], where, chat)
    chosen, read_chosen = _answer(row['chosen'], where, 'chosen', prompt)
    rejected, read_rejected = _answer(row['rejected'], where, 'rejected', prompt)
    if read_chosen != read_rejected:
        _fail(where, 'rejected', read_rejected, f'{read_chosen}, like chosen')
    if chosen == rejected:
        _fail(where, 'rejected', 'the same answer as chosen', 'two different answers')
    margin = row.get('margin')
    margins = None if margin is None else (_number(margin, where, 'margin'), 0.0)
    record = Preference(prompt, (chosen, rejected), ranks=(0, 1), margins=margins)
    return record, f'prompt ({read_prompt}), chosen/rejected ({read_chosen})'


def _implicit(row: Row, where: str, chat: bool) -> tuple[Preference, str]:
    """The prompt is the shared beginning: whole turns of messages, characters of strings."""
    sides = row['chosen'], row['rejected']
    if all(isinstance(side, str) for side in sides):
        if chat:
            _fail(where, 'chosen', 'a string', 'messages: no turns to wrap without a prompt')
        cut = _shared_characters(*sides)
        if not cut:
            _fail(where, 'rejected', 'no beginning shared with chosen', 'a shared prompt')
        row, how = {**row, 'prompt': sides[0][:cut]}, 'text'
    else:
        chosen, rejected = (_messages(row[side], where, side) for side in ('chosen', 'rejected'))
        cut = _shared_turns(chosen, rejected)
        if not cut:
            _fail(where, 'rejected', 'no prompt shared with chosen', 'answers to the same prompt')
        row, how = {**row, 'prompt': list(chosen[:cut])}, 'messages'
    row = {**row, 'chosen': sides[0][cut:], 'rejected': sides[1][cut:]}
    return _pair(row, where, chat)[0], f'prompt (shared beginning of chosen/rejected {how})'


def _shared_characters(a: str, b: str) -> int:
    """Length of the shared beginning; each keeps a character, and a space goes to the answers."""
    shortest = min(len(a), len(b))
    cut = next((i for i in range(shortest) if a[i] != b[i]), shortest - 1)
    return cut - 1 if cut > 0 and a[cut - 1] == ' ' else max(cut, 0)


def _shared_turns(a: Sequence[Message], b: Sequence[Message]) -> int:
    """How many turns the prompt has: what follows it is an assistant turn on both sides."""
    shortest = min(len(a), len(b)) - 1
    cut = next((i for i in range(shortest) if a[i] != b[i]), shortest)
    while cut > 0 and not a[cut]['role'] == b[cut]['role'] == 'assistant':
        cut -= 1
    return cut


def _candidates(row: Row, where: str, chat: bool) -> tuple[Preference, str]:
    prompt, read_prompt = _prompt(row['prompt'], where, chat)
    given = _list(row['completions'], where, 'completions')
    read = [_answer(a, where, f'completions[{i}]', prompt) for i, a in enumerate(given)]
    kinds = sorted({kind for _, kind in read})
    if len(kinds) > 1:
        _fail(where, 'completions', ' and '.join(kinds), 'one kind')
    how = f'prompt ({read_prompt}), completions ({kinds[0]})'
    answers = tuple(answer for answer, _ in read)
    record = Preference(prompt, answers, _ranks(row, where), ratings=_ratings(row, where))
    if record.ranks is not None or record.ratings is None or len(record.ratings[0]) > 1:
        return record, how
    ratings = [r for (r,) in record.ratings]
    if any(map(math.isnan, ratings)):
        _fail(where, 'ratings', 'a missing one', 'a number for every completion, to rank them by')
    return record._replace(ranks=_dense([-r for r in ratings])), f'{how}, ranks from ratings'


def _ranks(row: Row, where: str) -> tuple[int, ...] | None:
    """Ranks of which only the order counts, smaller is better; null is absent."""
    if row.get('ranks') is None:
        return None
    given = _list(row['ranks'], where, 'ranks', len(row['completions']))
    values = _numbers(given, where, 'ranks')
    if any(r < 0 for r in values) or all(map(math.isnan, values)):
        _fail(where, 'ranks', 'none, or one below 0', 'ranks from 0 (best) up, null for absent')
    return _dense(values)


def _ratings(row: Row, where: str) -> tuple[tuple[float, ...], ...] | None:
    """[M][J] ratings, one number or a list of J for each completion; null is missing (NaN)."""
    if row.get('ratings') is None:
        return None
    given = _list(row['ratings'], where, 'ratings', len(row['completions']))
    rows = [r if isinstance(r, list) else [r] for r in given]
    if len(sizes := {len(r) for r in rows}) > 1 or not rows[0]:
        _fail(where, 'ratings', f'{sorted(sizes)} objectives', 'the same number for all')
    return tuple(_numbers(r, where, f'ratings[{i}]') for i, r in enumerate(rows))


def _dense(values: Sequence[float]) -> tuple[int, ...]:
    """Ranks 0, 1, ... of the values, ties equal; -1 for NaN."""
    order = sorted({v for v in values if not math.isnan(v)})
    return tuple(-1 if math.isnan(v) else order.index(v) for v in values)


def _conversation(row: Row, where: str, chat: bool) -> tuple[Preference, str]:
    messages = _messages(row['messages'], where, 'messages')
    if len(messages) < 2 or messages[-1]['role'] != 'assistant':
        _fail(where, 'messages', 'no answer at the end', 'a prompt and an assistant turn')
    prompt, _ = _prompt(list(messages[:-1]), where, chat)
    answer, _ = _answer([messages[-1]], where, 'messages', prompt)
    return Preference(prompt, (answer,)), 'messages (the last assistant turn is the answer)'


class Layout(NamedTuple):
    """Columns a row must have to be read so, columns it may have, and columns that forbid it."""

    name: str
    required: frozenset[str]
    optional: frozenset[str]
    refused: frozenset[str]
    read: Callable[[Row, str, bool], tuple[Preference, str]]


def _layout(name: str, required: str, optional: str, refused: str, read: Any) -> Layout:
    columns = (frozenset(names.split()) for names in (required, optional, refused))
    return Layout(name, next(columns), next(columns), next(columns), read)


# Refused columns carry part of the conversation, or say that the others mean something else.
_ASKS = 'tools system input context question query instruction history'
_TURNS = 'tools system rejected_response rejected_messages completions'
LAYOUTS = (
    _layout('pair', 'prompt chosen rejected', 'margin', 'tools system input', _pair),
    _layout('implicit prompt', 'chosen rejected', 'margin', _ASKS, _implicit),
    _layout(
        'candidates', 'prompt completions', 'ranks ratings', 'tools system labels', _candidates
    ),
    _layout('conversation', 'messages', '', _TURNS, _conversation),
)
GROUPS = ('group', 'subset')


def find_layout(columns: Iterable[str], *, name: str | None = None, where: str = '') -> Layout:
    """The layout these columns have, the one that needs most of them if one includes another.

    Raises DataError if there is none or the columns fit several; `name` chooses one of LAYOUTS.
    """
    found = frozenset(columns)
    fits = [x for x in LAYOUTS if x.required <= found and name in (None, x.name)]
    fits = [x for x in fits if not any(x.required < y.required for y in fits)]
    columns_found = f'found columns {sorted(found)}'
    if not fits:
        near = [f'{x.name}: {sorted(x.required)}' for x in LAYOUTS if name in (None, x.name)]
        expected = '; '.join(near or [f'a layout of {[x.name for x in LAYOUTS]}, not {name!r}'])
        raise DataError(f'{where}: {columns_found}, expected {expected}')
    if len(fits) > 1:
        names = ' or '.join(repr(x.name) for x in fits)
        raise DataError(f'{where}: {columns_found}, which fit {names}: choose one with `layout`')
    if refused := sorted(fits[0].refused & found):
        raise DataError(f'{where}: {columns_found}; {fits[0].name!r} is not read beside {refused}')
    return fits[0]


def preferences(
    rows: Iterable[tuple[str, Row]],
    *,
    layout: str | None = None,
    chat: bool = False,
    source: str = 'rows',
) -> Loaded:
    """Checked records from (place, row) pairs; all rows must have one layout.

    The layout is found from the columns (null counts as missing) unless `layout` names it. String
    prompts are plain text that no template touches; with `chat` each is one user turn.
    """
    records: list[Preference] = []
    places: list[str] = []
    seen: dict[frozenset[str], Layout] = {}
    ids: dict[str, str] = {}
    first: tuple[str, frozenset[str]] | None = None
    for where, row in rows:
        columns = frozenset(c for c, value in row.items() if value is not None)
        if columns not in seen:
            seen[columns] = find_layout(columns, name=layout, where=where)
        shape = seen[columns]
        record, how = shape.read(row, where, chat)
        now = (how, columns & shape.optional)
        first = first or now
        if now != first:
            _fail(where, 'layout', _shape(*now), f'{_shape(*first)} as in the rows before')
        records.append(_labelled(record, row, where, ids))
        places.append(where)
    if first is None:
        raise DataError(f'{source}: found no rows, expected at least one')
    mapping = f'{_mapping(first, frozenset().union(*seen), shape)} from {source}'
    return Loaded(records, f'{mapping}: {len(records)} records', places)


def _shape(how: str, optional: frozenset[str]) -> str:
    return ', '.join([how, *sorted(optional)])


def _mapping(first: tuple[str, frozenset[str]], columns: frozenset[str], layout: Layout) -> str:
    group = [c for c in GROUPS if c in columns][:1]
    extra = [f'group ({c})' for c in group] + ['id'] * ('id' in columns)
    ignored = sorted(columns - layout.required - layout.optional - {*group, 'id'})
    note = f' (not read: {", ".join(ignored)})' if ignored else ''
    return ', '.join([_shape(*first), *extra]) + note


def _labelled(record: Preference, row: Row, where: str, ids: dict[str, str]) -> Preference:
    """The record with its id and group; `ids` has the place of each id met before."""
    group = next((row[c] for c in GROUPS if row.get(c) is not None), None)
    if group is not None:
        _text(group, where, 'group')
    name = row.get('id')
    if name is None:
        return record._replace(group=group)
    if isinstance(name, bool) or not isinstance(name, str | int):
        _fail(where, 'id', kind(name), 'a string or an integer')
    if str(name) in ids:
        _fail(where, 'id', f'{name!r} again, first at {ids[str(name)]}', 'ids to differ')
    ids[str(name)] = where
    return record._replace(group=group, id=str(name))


# Splitting and caching.


def _digest(value: Any) -> bytes:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).digest()


def fingerprint(records: Iterable[Preference]) -> str:
    """A hash of everything in the records and of their order."""
    return hashlib.sha256(b''.join(map(_digest, records))).hexdigest()


def split_by_prompt(
    records: Sequence[Preference], fraction: float, *, seed: int = 0
) -> tuple[list[int], list[int]]:
    """Indices of the records kept and of those held out, about `fraction` of all prompts.

    A record's side depends on its prompt and the seed alone: no prompt is on both sides.
    """
    if not 0 <= fraction <= 1:
        raise ValueError(f'fraction: found {fraction}, expected a number from 0 to 1')
    draw = [int.from_bytes(_digest([seed, r.messages])[:8]) for r in records]
    kept = [i for i, d in enumerate(draw) if d >= fraction * 2**64]
    held = [i for i, d in enumerate(draw) if d < fraction * 2**64]
    return kept, held
