"""Preference records, and reading them from files and hub data sets.

`load` reads one file or hub data set: `read` yields its rows with the place of each, `preferences`
finds the layout from the columns, checks every row, and says in one line what it took from where.
"""

import gzip
import hashlib
import json
import math
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

Message = dict[str, Any]
Answer = str | tuple[Message, ...]
Row = dict[str, Any]

ROLES = ("system", "user", "assistant", "tool")


class DataError(ValueError):
    """Data that cannot be used: the message names the place, what is there, what is expected."""


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


# Reading: every row comes with its place, `file:line` for text.


def read(
    path_or_name: str | Path, *, config: str | None = None, split: str | None = None
) -> Iterator[tuple[str, Row]]:
    """(place, row) of a .jsonl, .jsonl.gz, .json or .parquet file, or of a hub data set.

    `config` and `split` belong to hub names; a hub data set with several splits needs one named.
    """
    name = str(path_or_name)
    reader = next((r for suffix, r in _READERS.items() if name.endswith(suffix)), None)
    if reader is None and not Path(name).is_file():
        return _hub_rows(name, config, split)
    if reader is None:
        raise DataError(f"{name}: found suffix {Path(name).suffix!r}, expected {list(_READERS)}")
    if config or split:
        raise DataError(f"{name}: config and split belong to hub data sets, not to files")
    if not Path(name).is_file():
        raise DataError(f"{name}: no such file")
    return reader(name)


def _json_lines(path: str) -> Iterator[tuple[str, Row]]:
    opened: Any = gzip.open if path.endswith(".gz") else open
    try:
        with opened(path, "rb") as file:
            for number, line in enumerate(file, 1):
                text = _decoded(line, f"{path}:{number}")
                if text.strip():
                    yield f"{path}:{number}", _object(_parsed(text, path, number), path, number)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise DataError(f"{path}: damaged gzip file ({error})") from error


def _json_list(path: str) -> Iterator[tuple[str, Row]]:
    text = _decoded(Path(path).read_bytes(), path)
    rows = _parsed(text, path, 1)
    if not isinstance(rows, list):
        raise DataError(f"{path}: found {_kind(rows)}, expected a list of objects")
    between, decoder = re.compile(r"[\s,]*"), json.JSONDecoder()
    line, last, at = 1, 0, text.index("[") + 1 if rows else 0
    for row in rows:  # parsed above; scanned again only for the lines
        at = between.match(text, at).end()  # type: ignore[union-attr]
        line, last = line + text.count("\n", last, at), at
        yield f"{path}:{line}", _object(row, path, line)
        at = decoder.raw_decode(text, at)[1]


def _parquet(path: str) -> Iterator[tuple[str, Row]]:
    import pyarrow
    import pyarrow.parquet

    try:
        batches = pyarrow.parquet.ParquetFile(path).iter_batches(batch_size=1024)
        rows = (row for batch in batches for row in batch.to_pylist())
        for number, row in enumerate(rows):
            yield f"{path}: row {number}", row
    except pyarrow.ArrowException as error:
        raise DataError(f"{path}: {error}") from error


def _hub_rows(name: str, config: str | None, split: str | None) -> Iterator[tuple[str, Row]]:
    import datasets

    try:
        found = datasets.load_dataset(name, config, split=split)
    except (OSError, ValueError) as error:
        raise DataError(f"{name}: neither a file nor a readable data set: {error}") from error
    if isinstance(found, dict):
        if len(found) != 1:
            raise DataError(f"{name}: found splits {sorted(found)}, expected `split` to name one")
        ((split, found),) = found.items()
    return ((f"{name}[{split}] row {number}", row) for number, row in enumerate(found))


_READERS: dict[str, Callable[[str], Iterator[tuple[str, Row]]]] = {
    ".jsonl": _json_lines,
    ".jsonl.gz": _json_lines,
    ".json": _json_list,
    ".parquet": _parquet,
}


def _decoded(raw: bytes, where: str) -> str:
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{where}: byte {error.start + 1}: not UTF-8 text") from error


def _parsed(text: str, path: str, line: int) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        place = f"{path}:{line + error.lineno - 1}: column {error.colno}"
        raise DataError(f"{place}: {error.msg}") from error


def _object(row: Any, path: str, line: int) -> Row:
    if not isinstance(row, dict):
        raise DataError(f"{path}:{line}: found {_kind(row)}, expected an object")
    return row


# Checks of one value. Texts are never quoted: they may be long, private or offensive.


def _kind(value: Any) -> str:
    words = {str: "a string", list: "a list", dict: "an object", type(None): "null"}
    return words.get(type(value)) or repr(value)


def _fail(where: str, column: str, found: str, expected: str) -> NoReturn:
    raise DataError(f"{where}: {column}: found {found}, expected {expected}")


def _text(value: Any, where: str, column: str) -> str:
    if not isinstance(value, str):
        _fail(where, column, _kind(value), "a string")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        _fail(where, column, f"a lone surrogate at character {error.start}", "Unicode text")
    return value


def _number(value: Any, where: str, column: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or math.isinf(value):
        _fail(where, column, _kind(value), "a number")
    return float(value)


def _list(value: Any, where: str, column: str, length: int | None = None) -> list[Any]:
    if not isinstance(value, list) or not value:
        _fail(where, column, "an empty list" if value == [] else _kind(value), "a list")
    if length is not None and len(value) != length:
        _fail(where, column, f"{len(value)} entries", f"{length}, one for each completion")
    return value


def _messages(value: Any, where: str, column: str) -> tuple[Message, ...]:
    return tuple(
        _message(message, where, f"{column}[{i}]")
        for i, message in enumerate(_list(value, where, column))
    )


def _message(value: Any, where: str, column: str) -> Message:
    """A message without its null entries (columnar files fill what a message lacks with null)."""
    if not isinstance(value, dict):
        _fail(where, column, _kind(value), "a message {role, content}")
    if value.get("role") not in ROLES:
        _fail(where, f"{column}.role", repr(value.get("role")), f"one of {ROLES}")
    _text(value.get("content"), where, f"{column}.content")
    return {key: entry for key, entry in value.items() if entry is not None}


def _prompt(value: Any, where: str, chat: bool) -> tuple[tuple[Message, ...] | str, str]:
    """The prompt and how it was read."""
    if isinstance(value, str):
        text = _text(value, where, "prompt")
        if not text:
            _fail(where, "prompt", "an empty string", "text")
        return (({"role": "user", "content": text},), "one user turn") if chat else (text, "text")
    if not isinstance(value, list):
        _fail(where, "prompt", _kind(value), "a string or a list of messages")
    messages = _messages(value, where, "prompt")
    if messages[-1]["role"] == "assistant":
        _fail(where, "prompt", "an assistant turn at its end", "a prompt that an answer follows")
    return messages, "messages"


def _answer(value: Any, where: str, column: str, prompt: tuple | str) -> tuple[Answer, str]:
    """The answer and how it was read. A lone assistant message is its content."""
    if isinstance(value, str):
        if not _text(value, where, column).strip():
            _fail(where, column, "an empty answer", "text")
        plain = "continuations, no chat template, EOS appended"
        return value, plain if isinstance(prompt, str) else "assistant replies"
    if isinstance(prompt, str):
        expected = "a string, as the prompt is one"
        if isinstance(value, list):
            expected += " (layout='implicit prompt' reads whole conversations)"
        _fail(where, column, _kind(value), expected)
    messages = _messages(value, where, column)
    for end in (0, -1):
        if messages[end]["role"] != "assistant":
            place = f"{column}[{end}].role"
            _fail(where, place, repr(messages[end]["role"]), "'assistant': the answer alone")
    if not messages[-1]["content"].strip():
        _fail(where, column, "an empty answer", "text")
    lone = len(messages) == 1 and set(messages[0]) == {"role", "content"}
    return messages[0]["content"] if lone else messages, "messages"


# Layouts: one reader each, (row, place, chat) -> the record and how its columns were read.


def _pair(row: Row, where: str, chat: bool) -> tuple[Preference, str]:
    prompt, read_prompt = _prompt(row["prompt"], where, chat)
    chosen, read_chosen = _answer(row["chosen"], where, "chosen", prompt)
    rejected, read_rejected = _answer(row["rejected"], where, "rejected", prompt)
    if read_chosen != read_rejected:
        _fail(where, "rejected", read_rejected, f"{read_chosen}, like chosen")
    how = f"prompt ({read_prompt}), chosen/rejected ({read_chosen})"
    return _ordered(prompt, chosen, rejected, row, where), how


def _implicit(row: Row, where: str, chat: bool) -> tuple[Preference, str]:
    """The prompt is the shared beginning: whole turns of messages, characters of strings."""
    sides = row["chosen"], row["rejected"]
    if all(isinstance(side, str) for side in sides):
        if chat:
            _fail(where, "chosen", "a string", "messages: no turns to wrap without a prompt")
        cut = _shared_characters(*sides)
        if not cut:
            _fail(where, "rejected", "no beginning shared with chosen", "a shared prompt")
        row, how = {**row, "prompt": sides[0][:cut]}, "text"
    else:
        chosen, rejected = (_messages(row[side], where, side) for side in ("chosen", "rejected"))
        cut = _shared_turns(chosen, rejected)
        if not cut:
            _fail(where, "rejected", "no prompt shared with chosen", "answers to the same prompt")
        row, how = {**row, "prompt": list(chosen[:cut])}, "messages"
    row = {**row, "chosen": sides[0][cut:], "rejected": sides[1][cut:]}
    return _pair(row, where, chat)[0], f"prompt (shared beginning of chosen/rejected {how})"


def _shared_characters(a: str, b: str) -> int:
    """Length of the shared beginning; each keeps a character, and a space goes to the answers."""
    shortest = min(len(a), len(b))
    cut = next((i for i in range(shortest) if a[i] != b[i]), shortest - 1)
    return cut - 1 if cut > 0 and a[cut - 1] == " " else max(cut, 0)


def _shared_turns(a: Sequence[Message], b: Sequence[Message]) -> int:
    """How many turns the prompt has: what follows it is an assistant turn on both sides."""
    shortest = min(len(a), len(b)) - 1
    cut = next((i for i in range(shortest) if a[i] != b[i]), shortest)
    while cut > 0 and not a[cut]["role"] == b[cut]["role"] == "assistant":
        cut -= 1
    return cut


def _ordered(
    prompt: tuple[Message, ...] | str, chosen: Answer, rejected: Answer, row: Row, where: str
) -> Preference:
    if chosen == rejected:
        _fail(where, "rejected", "the same answer as chosen", "two different answers")
    margin = row.get("margin")
    margins = None if margin is None else (_finite(margin, where, "margin"), 0.0)
    return Preference(prompt, (chosen, rejected), ranks=(0, 1), margins=margins)


def _finite(value: Any, where: str, column: str) -> float:
    number = _number(value, where, column)
    if math.isnan(number):
        _fail(where, column, "NaN", "a number")
    return number


def _candidates(row: Row, where: str, chat: bool) -> tuple[Preference, str]:
    prompt, read_prompt = _prompt(row["prompt"], where, chat)
    given = _list(row["completions"], where, "completions")
    read = [_answer(a, where, f"completions[{i}]", prompt) for i, a in enumerate(given)]
    kinds = sorted({kind for _, kind in read})
    if len(kinds) > 1:
        _fail(where, "completions", " and ".join(kinds), "one kind")
    how = f"prompt ({read_prompt}), completions ({kinds[0]})"
    ratings = _ratings(row, where)
    ranks = _ranks(row, where)
    if ranks is None and ratings is not None and len(ratings[0]) == 1:
        ranks, how = _dense([-r for (r,) in ratings]), f"{how}, ranks from ratings"
    return Preference(prompt, tuple(a for a, _ in read), ranks=ranks, ratings=ratings), how


def _ranks(row: Row, where: str) -> tuple[int, ...] | None:
    """Ranks of which only the order counts, smaller is better; null is absent."""
    if row.get("ranks") is None:
        return None
    given = _list(row["ranks"], where, "ranks", len(row["completions"]))
    values = [
        math.nan if r is None else _number(r, where, f"ranks[{i}]") for i, r in enumerate(given)
    ]
    if any(r < 0 for r in values) or all(math.isnan(r) for r in values):
        _fail(where, "ranks", "none, or one below 0", "ranks from 0 (best) up, null for absent")
    return _dense(values)


def _ratings(row: Row, where: str) -> tuple[tuple[float, ...], ...] | None:
    """[M][J] ratings, one number or a list of J for each completion; null is missing (NaN)."""
    if row.get("ratings") is None:
        return None
    given = _list(row["ratings"], where, "ratings", len(row["completions"]))
    rows = [r if isinstance(r, list) else [r] for r in given]
    if len({len(r) for r in rows}) > 1 or not rows[0]:
        _fail(
            where, "ratings", f"{sorted({len(r) for r in rows})} objectives", "one number of them"
        )
    return tuple(
        tuple(math.nan if v is None else _number(v, where, f"ratings[{i}]") for v in r)
        for i, r in enumerate(rows)
    )


def _dense(values: list[float]) -> tuple[int, ...]:
    """Ranks 0, 1, ... of the values, ties equal; -1 for NaN."""
    order = sorted({v for v in values if not math.isnan(v)})
    return tuple(-1 if math.isnan(v) else order.index(v) for v in values)


def _conversation(row: Row, where: str, chat: bool) -> tuple[Preference, str]:
    messages = _messages(row["messages"], where, "messages")
    if len(messages) < 2 or messages[-1]["role"] != "assistant":
        _fail(where, "messages", "no answer at the end", "a prompt and an assistant turn")
    prompt, _ = _prompt(list(messages[:-1]), where, chat)
    answer, _ = _answer([messages[-1]], where, "messages", prompt)
    return Preference(prompt, (answer,)), "messages (the last assistant turn is the answer)"


class Layout(NamedTuple):
    """Columns a row must have to be read so, columns it may have, and columns that forbid it."""

    name: str
    required: frozenset[str]
    optional: frozenset[str]
    refused: frozenset[str]
    read: Callable[[Row, str, bool], tuple[Preference, str]]


def _layout(name: str, required: str, optional: str, refused: str, read: Callable) -> Layout:
    return Layout(
        name, *(frozenset(names.split()) for names in (required, optional, refused)), read
    )


# Refused columns carry part of the conversation, or say that the columns mean something else.
LAYOUTS = (
    _layout("pair", "prompt chosen rejected", "margin", "tools system input", _pair),
    _layout(
        "implicit prompt",
        "chosen rejected",
        "margin",
        "tools system input context question query instruction history",
        _implicit,
    ),
    _layout(
        "candidates", "prompt completions", "ranks ratings", "tools system labels", _candidates
    ),
    _layout(
        "conversation",
        "messages",
        "",
        "tools system rejected_response rejected_messages completions",
        _conversation,
    ),
)


def find_layout(columns: Iterable[str], *, name: str | None = None, where: str = "") -> Layout:
    """The layout these columns have, the one that needs most of them if one includes another.

    Raises DataError if there is none or the columns fit several; `name` chooses one of LAYOUTS.
    """
    found = frozenset(columns)
    fits = [x for x in LAYOUTS if x.required <= found and name in (None, x.name)]
    fits = [x for x in fits if not any(x.required < y.required for y in fits)]
    columns_found = f"found columns {sorted(found)}"
    if not fits:
        expected = [f"{x.name}: {sorted(x.required)}" for x in LAYOUTS if name in (None, x.name)]
        known = "; ".join(expected) or f"no layout is named {name!r}, there are " + ", ".join(
            x.name for x in LAYOUTS
        )
        raise DataError(f"{where}: {columns_found}, expected {known}")
    if len(fits) > 1:
        names = " or ".join(repr(x.name) for x in fits)
        raise DataError(f"{where}: {columns_found}, which fit {names}: choose one with `layout`")
    if refused := fits[0].refused & found:
        raise DataError(
            f"{where}: {columns_found}; {fits[0].name!r} cannot be read beside {sorted(refused)}"
        )
    return fits[0]


def preferences(
    rows: Iterable[tuple[str, Row]],
    *,
    layout: str | None = None,
    chat: bool = False,
    source: str = "rows",
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
            _fail(where, "layout", _shape(*now), f"{_shape(*first)} as in the rows before")
        records.append(_labelled(record, row, where, ids))
        places.append(where)
    if first is None:
        raise DataError(f"{source}: found no rows, expected at least one")
    mapping = f"{_mapping(first, frozenset().union(*seen), shape)} from {source}"
    return Loaded(records, f"{mapping}: {len(records)} records", places)


def _shape(how: str, optional: frozenset[str]) -> str:
    return ", ".join([how, *sorted(optional)])


def _mapping(first: tuple[str, frozenset[str]], columns: frozenset[str], layout: Layout) -> str:
    group = next((c for c in GROUPS if c in columns), None)
    extra = [f"group ({group})"] if group else []
    extra += ["id"] if "id" in columns else []
    ignored = sorted(columns - layout.required - layout.optional - {group, "id"})
    note = f" (not read: {', '.join(ignored)})" if ignored else ""
    return ", ".join([_shape(*first), *extra]) + note


GROUPS = ("group", "subset")


def _labelled(record: Preference, row: Row, where: str, ids: dict[str, str]) -> Preference:
    """The record with its id and group; `ids` has the place of each id met before."""
    group = next((row[c] for c in GROUPS if row.get(c) is not None), None)
    if group is not None:
        _text(group, where, "group")
    name = row.get("id")
    if name is None:
        return record._replace(group=group)
    if isinstance(name, bool) or not isinstance(name, str | int):
        _fail(where, "id", _kind(name), "a string or an integer")
    if str(name) in ids:
        _fail(where, "id", f"{name!r} again, first at {ids[str(name)]}", "ids to differ")
    ids[str(name)] = where
    return record._replace(group=group, id=str(name))


# Splitting and caching.


def _digest(value: Any) -> bytes:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).digest()


def fingerprint(records: Iterable[Preference]) -> str:
    """A hash of everything in the records and of their order."""
    whole = hashlib.sha256()
    for record in records:
        whole.update(_digest(record))
    return whole.hexdigest()


def split_by_prompt(
    records: Sequence[Preference], fraction: float, *, seed: int = 0
) -> tuple[list[int], list[int]]:
    """Indices of the records kept and of those held out, about `fraction` of all prompts.

    A record's side depends on its prompt and the seed alone: no prompt is on both sides.
    """
    if not 0 <= fraction <= 1:
        raise ValueError(f"fraction: found {fraction}, expected a number from 0 to 1")
    draw = [int.from_bytes(_digest([seed, r.messages])[:8]) for r in records]
    kept = [i for i, d in enumerate(draw) if d >= fraction * 2**64]
    held = [i for i, d in enumerate(draw) if d < fraction * 2**64]
    return kept, held
