"""Token trees of a data set: each record's shared prompt once, then each candidate's own tokens.

`encode` renders records with the tokenizer's chat template and tokenises once, in batches.
"""

import bisect
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tokenizers import Encoding

from jaxrm import cache as caches
from jaxrm import chat
from jaxrm.data import DataError, Ids, Preference, fingerprint
from jaxrm.pooling import Pad, pad_of, shared_length

FORMAT = 2  # of the cache: raise it when the same records would give other arrays
CHUNK = 1024  # records rendered and tokenised at a time
OVERLONG = ('drop', 'error', 'left')


class Tokens(NamedTuple):
    """n token trees with c candidates and T tokens in all, columnar.

    A *row* is what is scored: the prompt and one candidate's own tokens. A record without answers
    has one candidate entry of length 0 and rank -1, and ends at its gate.
    """

    ids: (
        np.ndarray
    )  # int32 [T]; record i is ids[start[i]:start[i+1]], prompt once, candidates after
    start: np.ndarray  # int64 [n+1]
    prompt: np.ndarray  # int32 [n], length of the part all candidates share
    gate: np.ndarray  # int32 [n], index in a row of the token that closes the last user turn
    first: np.ndarray  # int64 [n+1]; candidates of record i are first[i]:first[i+1]
    length: np.ndarray  # int32 [c], own tokens
    rank: np.ndarray  # int32 [c], 0 best
    margin: np.ndarray  # float32 [c]
    rating: np.ndarray  # float32 [c, J], NaN missing
    smoothing: np.ndarray  # float32 [n]
    group: np.ndarray  # int32 [n], into the group names, -1 none
    record: np.ndarray  # int64 [n], index of the record in the list that was encoded
    candidate: np.ndarray  # int32 [c], index of the candidate in its record, -1 without answers


class Report(NamedTuple):
    """What became of the records. `saved` is the share of all rows' tokens that sharing avoids."""

    records: int
    candidates: int
    tokens: int
    longest: int
    dropped: int
    merged: int
    saved: float

    def __str__(self) -> str:
        return (
            f'{self.records} records, {self.candidates} candidates, {self.tokens} tokens '
            f'({self.saved:.0%} saved by sharing prompts), longest row {self.longest}; '
            f'{self.dropped} over-long records dropped; '
            f'{self.merged} share less than their prompt (a token crosses its end)'
        )


class Encoded(NamedTuple):
    """Token trees, what became of the records, and the names `Tokens.group` points to."""

    tokens: Tokens
    report: Report
    groups: tuple[str, ...]


def encode(
    records: Sequence[Preference],
    tokenizer: Any,
    *,
    max_length: int | None = None,
    overlong: str = 'drop',
    pooling: str | None = None,
    pad_id: int | None = None,
    cache: str | Path | None = None,
    write: bool = True,
    where: Sequence[str] | None = None,
) -> Encoded:
    """Token trees of the records, with a fast transformers tokenizer.

    Messages go through the chat template. Plain text gets EOS; its prompt may be empty, and the
    gate is then the row's first token. Rows start with exactly one BOS if the template or the
    tokenizer adds one. Token ids are taken as they are. Records with a row over `max_length` tokens
    are dropped, refused (`error`), or cut at the left of the prompt after BOS (`left`).

    A score is read at a row's last token. Where a row holds the pad token (`pad_id`, by default the
    tokenizer's) that is ambiguous, and refused unless `pooling` says what is meant: the `last`
    token, or the `rightmost_non_pad` one, which transformers reads; pads at a row's end then go.

    `cache` is a folder to keep the result in (without `write`, only to look there); `where` names
    the records in errors. Raises DataError.
    """
    if overlong not in OVERLONG:
        raise ValueError(f'overlong: found {overlong!r}, expected one of {OVERLONG}')
    options = _Options(max_length, overlong, pad_of(tokenizer, pooling, pad_id))
    if cache is None:
        return _encode(records, tokenizer, options, where)
    key = caches.digest(FORMAT, options, _identity(tokenizer), fingerprint(records))
    if not caches.path_of(cache, key).exists():
        made = _encode(records, tokenizer, options, where)
        if not write:
            return made
        about = {'report': made.report, 'groups': made.groups}
        caches.save(cache, key, made.tokens._asdict(), about)
    arrays, about = caches.load(cache, key)
    return Encoded(Tokens(**arrays), Report(*about['report']), tuple(about['groups']))


def template_hash(tokenizer: Any) -> str:
    """A short hash of the chat template: features and scores of two templates do not compare."""
    return caches.digest(chat.template(tokenizer))[:16]


def select(tokens: Tokens, indices: np.ndarray | Sequence[int]) -> Tokens:
    """The given records (rows of `tokens`), in the given order."""
    r = np.asarray(indices, np.int64)
    c = _ranges(tokens.first[r], tokens.first[r + 1] - tokens.first[r])
    t = _ranges(tokens.start[r], tokens.start[r + 1] - tokens.start[r])
    of_candidate = ('length', 'rank', 'margin', 'rating', 'candidate')
    columns = tokens._asdict()
    for name in columns.keys() - {'ids', 'start', 'first'}:
        columns[name] = columns[name][c if name in of_candidate else r]
    columns |= {
        'ids': tokens.ids[t],
        'start': _offsets(np.diff(tokens.start)[r]),
        'first': _offsets(np.diff(tokens.first)[r]),
    }
    return Tokens(**columns)


def unshare(tokens: Tokens) -> Tokens:
    """The same rows with the prompt repeated in every candidate: `prompt` is 0.

    Records without answers stay as they are.
    """
    count, own = np.diff(tokens.first), tokens.length.astype(np.int64)
    owner = np.repeat(np.arange(len(count)), count)
    before = _offsets(own)
    own_start = (tokens.start[:-1] + tokens.prompt - before[tokens.first[:-1]])[owner] + before[:-1]
    # Two pieces for each candidate: the prompt and its own tokens.
    starts = np.column_stack([tokens.start[owner], own_start])
    lengths = np.column_stack([tokens.prompt[owner].astype(np.int64), own])
    answered = tokens.candidate >= 0
    return tokens._replace(
        ids=tokens.ids[_ranges(starts.ravel(), lengths.ravel())],
        start=_offsets(lengths.sum(1))[tokens.first],
        prompt=np.where(answered[tokens.first[:-1]], 0, tokens.prompt).astype(np.int32),
        length=np.where(answered, lengths.sum(1), own).astype(np.int32),
    )


def _offsets(lengths: np.ndarray | list[int]) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])


def _ranges(starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """The indices start, ..., start + length - 1 of each range, one after the other."""
    offsets = _offsets(lengths)
    return np.repeat(starts - offsets[:-1], lengths) + np.arange(offsets[-1])


# Ids, and the columns made of them.


class _Tree(NamedTuple):
    """One record's tokens."""

    record: int
    item: chat.Item
    ids: np.ndarray
    prompt: int
    gate: int
    own: list[int]
    merged: bool

    @property
    def longest(self) -> int:
        return self.prompt + max(self.own)


class _Ends(NamedTuple):
    """The codec's ids that rows get apart from their text: BOS (if `adds`), EOS of plain text."""

    bos: Any  # int or None
    adds: bool
    eos: Any  # int or None

    def begin(self, ids: list[int]) -> list[int]:
        """The ids with one BOS if there is or should be one."""
        found = next((k for k, i in enumerate(ids) if i != self.bos), len(ids))
        if found == 0:
            return [self.bos, *ids] if self.adds else ids
        return ids[found - 1 :]


class _Options(NamedTuple):
    """What decides on the result, beside the records and the tokenizer."""

    max_length: int | None
    overlong: str
    pad: Pad


def _ends(tokenizer: Any, codec: chat.Codec) -> _Ends:
    probe = tokenizer.backend_tokenizer.encode('a', add_special_tokens=True)
    begin = probe.attention_mask.index(1)  # a backend may pad
    front = probe.ids[begin : probe.special_tokens_mask.index(0)]
    if len(front) > 1:
        raise ValueError(f'tokenizer: found {len(front)} tokens added in front, expected BOS alone')
    bos, eos = front[0] if front else tokenizer.bos_token_id, tokenizer.eos_token_id
    return _Ends(codec.id_here.get(bos, bos), bool(front), codec.id_here.get(eos, eos))


def _trees(
    items: list[chat.Item], first: int, tokenizer: Any, codec: chat.Codec, ends: _Ends, pad: Pad
) -> Iterator[_Tree]:
    texts = list(chat.texts(items, tokenizer, codec))
    flat = [text for t in texts for text in (t.prompt, *t.rows)]
    encodings = iter(codec.backend.encode_batch(flat, add_special_tokens=False))
    rest = iter(texts)
    for record, item in enumerate(items, first):
        if isinstance(item.messages, Ids):
            gate, (prompt, *rows) = len(item.messages) - 1, _given(item, codec)
        else:
            gate, (prompt, *rows) = _encoded(item, next(rest), encodings, codec, ends)
        yield _tree(record, item, gate, prompt, *pad.settled(item.name, prompt, rows))


def _encoded(
    item: chat.Item, text: chat.Texts, encodings: Iterator[Encoding], codec: chat.Codec, ends: _Ends
) -> tuple[int, list[np.ndarray]]:
    """The gate, and the ids of the prompt and of each row."""
    prompt, tail = next(encodings), _tail(item, ends)
    gate = len(prompt) - 1 if text.closing is None else _token_at(prompt, text.closing)
    begun = ends.begin(prompt.ids)
    rows = [[*ends.begin(next(encodings).ids), *tail] for _ in text.rows]
    return gate + len(begun) - len(prompt), [codec.read(ids, item.name) for ids in (begun, *rows)]


def _given(item: chat.Item, codec: chat.Codec) -> list[np.ndarray]:
    """The ids of the prompt and of each row of a record that is tokenised already."""
    rows = [np.array([*item.messages, *answer], np.int64) for answer in ((), *item.answers)]
    last = max(int(row.max(initial=0)) for row in rows)
    if last >= codec.size:
        raise DataError(f'{item.name}: found the token id {last}, expected less than {codec.size}')
    return [row.astype(np.int32) for row in rows]


def _tree(record: int, item: chat.Item, gate: int, prompt: np.ndarray, *rows: np.ndarray) -> _Tree:
    """The rows as a tree: the longest common beginning, in which every row keeps a token."""
    if gate < 0 and (item.messages or not rows):
        raise DataError(f'{item.name}: found no token in the prompt, expected at least one')
    if not rows:
        return _Tree(record, item, prompt[: gate + 1], gate + 1, gate, [0], False)
    shared = min(
        shared_length(prompt if len(rows) == 1 else row, rows[0]) for row in (rows[1:] or rows)
    )
    shared = min(shared, *(len(row) - 1 for row in rows))
    inside = min(shared, shared_length(prompt, rows[0]))
    if inside == 0 and not isinstance(item.messages, str):
        raise DataError(f'{item.name}: found no token of the prompt that its candidates share')
    own = [len(row) - shared for row in rows]
    ids = np.concatenate([rows[0], *(row[shared:] for row in rows[1:])])
    return _Tree(
        record, item, ids, shared, max(min(gate, inside - 1), 0), own, inside < len(prompt)
    )


def _tail(item: chat.Item, ends: _Ends) -> list[int]:
    if not isinstance(item.messages, str) or item.record.rendered:
        return []
    if ends.eos is None:
        raise ValueError('tokenizer: found no EOS token, which plain text needs at its end')
    return [ends.eos]


def _token_at(encoding: Encoding, character: int) -> int:
    """The last token that begins at the character or before it (it may be made of several)."""
    return bisect.bisect_right(encoding.offsets, (character, math.inf)) - 1


def _cut(tree: _Tree, bos: int | None, max_length: int) -> _Tree:
    """The tree without as many tokens after BOS as its longest row is too long."""
    begin, excess = int(tree.ids[0] == bos), tree.longest - max_length
    if excess > tree.gate - begin:
        raise DataError(
            f'{tree.item.name}: found a row of {tree.longest} tokens, of which '
            f'{tree.longest - tree.gate + begin} cannot be cut, expected at most {max_length}'
        )
    ids = np.delete(tree.ids, slice(begin, begin + excess))
    return tree._replace(ids=ids, prompt=tree.prompt - excess, gate=tree.gate - excess)


def _encode(
    records: Sequence[Preference], tokenizer: Any, options: _Options, where: Sequence[str] | None
) -> Encoded:
    max_length, overlong, pad = options
    if not records:
        raise DataError('found no records to encode')
    codec = chat.codec_of(tokenizer)
    if not all(isinstance(r.messages, str | Ids) for r in records):
        chat.check_template(tokenizer)
    trees: list[_Tree] = []
    ends = _ends(tokenizer, codec)
    bos = None if ends.bos is None else codec.true_id[ends.bos]
    for first in range(0, len(records), CHUNK):
        part = range(first, min(first + CHUNK, len(records)))
        items = [chat.item(records[i], _name(i, records[i], where), codec) for i in part]
        for tree in _trees(items, first, tokenizer, codec, ends, pad):
            if max_length is None or tree.longest <= max_length:
                trees.append(tree)
            elif overlong == 'left':
                trees.append(_cut(tree, bos, max_length))
            elif overlong == 'error':
                found = f'found a row of {tree.longest} tokens'
                raise DataError(f'{tree.item.name}: {found}, expected at most {max_length}')
    if not trees:
        raise DataError(f'found all {len(records)} records over {max_length} tokens')
    groups = tuple(dict.fromkeys(r.group for r in records if r.group is not None))
    tokens = _columns(trees, groups)
    return Encoded(tokens, _report(trees, len(records)), groups)


def _name(index: int, record: Preference, where: Sequence[str] | None) -> str:
    place = where[index] if where is not None else f'record {index}'
    return place if record.id is None else f'{place} (id {record.id!r})'


def _columns(trees: list[_Tree], groups: tuple[str, ...]) -> Tokens:
    records = [t.item.record for t in trees]
    entries = [(t.item.record, m) for t in trees for m in (t.item.present or [-1])]
    ratings = [r.ratings[m] if r.ratings and m >= 0 else None for r, m in entries]
    objectives = {len(x) for x in ratings if x is not None} or {0}
    if len(objectives) > 1:
        raise DataError(f'ratings: found {sorted(objectives)} objectives, expected the same number')
    missing = (math.nan,) * objectives.pop()
    number = {name: k for k, name in enumerate(groups)}
    return Tokens(
        ids=np.concatenate([t.ids for t in trees]),
        start=_offsets([len(t.ids) for t in trees]),
        prompt=np.array([t.prompt for t in trees], np.int32),
        gate=np.array([t.gate for t in trees], np.int32),
        first=_offsets([len(t.own) for t in trees]),
        length=np.array([n for t in trees for n in t.own], np.int32),
        rank=np.array(
            [-1 if m < 0 else r.ranks[m] if r.ranks else 0 for r, m in entries], np.int32
        ),
        margin=np.array(
            [r.margins[m] if r.margins and m >= 0 else 0 for r, m in entries], np.float32
        ),
        rating=np.array([x or missing for x in ratings], np.float32).reshape(len(entries), -1),
        smoothing=np.array([r.smoothing for r in records], np.float32),
        group=np.array([-1 if r.group is None else number[r.group] for r in records], np.int32),
        record=np.array([t.record for t in trees], np.int64),
        candidate=np.array([m for _, m in entries], np.int32),
    )


def _report(trees: list[_Tree], records: int) -> Report:
    tokens = sum(len(t.ids) for t in trees)
    rows = sum(t.prompt * len(t.own) + sum(t.own) for t in trees)
    return Report(
        records=len(trees),
        candidates=sum(len(t.item.present) for t in trees),
        tokens=tokens,
        longest=max(t.longest for t in trees),
        dropped=records - len(trees),
        merged=sum(t.merged for t in trees),
        saved=1 - tokens / rows,
    )


def _identity(tokenizer: Any) -> list[Any]:
    """Everything of the tokenizer that decides on ids."""
    template = tokenizer.get_chat_template() if tokenizer.chat_template else None
    ids = [tokenizer.bos_token_id, tokenizer.eos_token_id]
    return [tokenizer.backend_tokenizer.to_str(), template, tokenizer.special_tokens_map, ids]
