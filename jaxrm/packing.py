"""Packs: every prompt stands once in a token stream, followed by its candidates.

Letters: P packs, N stream tokens, R rows, S row length, B prompts, M candidates, J objectives.
A *row* is what attention sees: a prompt followed by one candidate, right-padded to S. Rows come
in a few static length classes; everything but attention runs on the stream.
"""

import copy
import functools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxrm.tokens import Tokens


class Shape(NamedTuple):
    """Static sizes of one pack: N tokens, row classes ((R, S), ...) with S ascending, B, M."""

    tokens: int
    rows: tuple[tuple[int, int], ...]
    prompts: int
    candidates: int


Array = Any  # numpy's on the host, jax's inside a program


class Pack(NamedTuple):
    """P packs as arrays; int32 unless said otherwise, -1 marks what is absent.

    `slot` holds for each class the stream index of every row slot (0 where unused), `back_PN` the
    slot, counted over all classes laid end to end, whose attention output a token reads (one past
    the end on padding), `read` the stream index of the prompt's closing token and of the last
    token of each row, `row_PBM` the row that holds a candidate. `slot=None` is the padded layout:
    every stream is its own row.
    """

    ids_PN: Array
    pos_PN: Array
    slot: Any  # a tuple of [P, R, S], one a class, or None
    back_PN: Array
    read: tuple[Array, ...]  # [P, R, 2] a class
    row_PBM: Array
    rank_PBM: Array
    margin_PBM: Array  # float32
    rating_PBMJ: Array  # float32, NaN where missing
    smoothing_PB: Array  # float32
    group_PB: Array
    record_PB: Array  # row of `Tokens`


def spans(length: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(owner, offset) of every element of ranges laid end to end: [2, 1] -> [0 0 1], [0 1 0]."""
    owner = np.repeat(np.arange(len(length)), length)
    return owner, np.arange(len(owner)) - np.repeat(np.cumsum(length) - length, length)


def row_lengths(tokens: Tokens) -> np.ndarray:
    """[c] tokens of each candidate's row: the shared prefix and its own."""
    return np.repeat(tokens.prompt, np.diff(tokens.first)) + tokens.length


def needs(tokens: Tokens, shape: Shape) -> np.ndarray:
    """[n, 2 + classes] what each record takes: tokens, a prompt, rows of at least each class.

    Rows are counted cumulatively from the longest class down, so that a row which overflows its
    own class into a longer one is still a plain comparison of vectors.
    """
    longer = row_lengths(tokens)[:, None] > np.array([0] + [s for _, s in shape.rows[:-1]])
    rows = np.add.reduceat(longer.astype(np.int64), tokens.first[:-1])
    return np.column_stack([np.diff(tokens.start), np.ones(len(rows), np.int64), rows])


def capacity(shape: Shape) -> np.ndarray:
    """[2 + classes] what one pack holds, in the units of `needs`."""
    rows = np.cumsum([r for r, _ in shape.rows][::-1])[::-1]
    return np.array([shape.tokens, shape.prompts, *rows])


def check_fits(tokens: Tokens, shape: Shape) -> None:
    """Raises ValueError naming the first record that no pack of this shape can hold."""
    longest = np.maximum.reduceat(row_lengths(tokens), tokens.first[:-1])
    over = [0] + [s for _, s in shape.rows[:-1]]
    names = ['tokens', 'prompts', *(f'rows over {s}' for s in over)]
    limits = [
        (longest, 'tokens in a row', shape.rows[-1][1]),
        (np.diff(tokens.first), 'candidates', shape.candidates),
        *zip(needs(tokens, shape).T, names, capacity(shape), strict=True),
    ]
    for need, name, have in limits:
        if len(bad := np.flatnonzero(need > have)):
            i = bad[0]
            raise ValueError(
                f'record {tokens.record[i]} needs {need[i]} {name}, but a pack holds {have}'
            )


def _best_fit(need: np.ndarray, have: np.ndarray) -> list[list[int]]:
    """Bins of record positions: longest first, each into the fullest bin that still takes it."""
    bins: list[list[int]] = []
    left = np.empty((len(need), len(have)), np.int64)
    for i in np.argsort(-need[:, 0], kind='stable'):
        room = left[: len(bins)] >= need[i]
        fits = room.all(1)
        if fits.any():
            b = int(np.argmin(np.where(fits, left[: len(bins), 0], np.iinfo(np.int64).max)))
        else:
            b = len(bins)
            bins.append([])
            left[b] = have
        bins[b].append(int(i))
        left[b] -= need[i]
    return bins


def plan(
    tokens: Tokens, shape: Shape, *, order: np.ndarray, window: int = 2048
) -> list[np.ndarray]:
    """Packs as arrays of record positions: best fit inside windows of `order`."""
    need, have = needs(tokens, shape), capacity(shape)
    packs = []
    for at in range(0, len(order), window):
        part = order[at : at + window]
        packs += [part[np.array(b)] for b in _best_fit(need[part], have)]
    return packs


class _Layout(NamedTuple):
    """Where the records (_r) and candidates (_c) of some packs stand."""

    record_r: np.ndarray
    pack_r: np.ndarray
    slot_r: np.ndarray  # b, the prompt's place in its pack
    start_r: np.ndarray  # in the stream
    length_r: np.ndarray
    candidate_c: np.ndarray  # in `Tokens`
    owner_c: np.ndarray  # position in the _r arrays
    m_c: np.ndarray
    start_c: np.ndarray  # of its own tokens, in the stream
    prompt_c: np.ndarray
    length_c: np.ndarray  # of its row
    class_c: np.ndarray
    row_c: np.ndarray  # in its class

    @property
    def pack_c(self) -> np.ndarray:
        return self.pack_r[self.owner_c]


def _choose_rows(pack_c, length_c, shape: Shape) -> tuple[np.ndarray, np.ndarray]:
    """(class, row in the class) of each candidate: its own class or, when full, a longer one."""
    class_c = np.searchsorted([s for _, s in shape.rows], length_c)
    row_c = np.zeros(len(pack_c), np.int64)
    order = np.lexsort((-length_c, pack_c))  # the longest rows of a pack choose first
    used, last = [0] * len(shape.rows), -1
    for c, pack, k in zip(
        order.tolist(), pack_c[order].tolist(), class_c[order].tolist(), strict=True
    ):
        if pack != last:
            used, last = [0] * len(shape.rows), pack
        while used[k] >= shape.rows[k][0]:
            k += 1
        class_c[c], row_c[c] = k, used[k]
        used[k] += 1
    return class_c, row_c


def _place(tokens: Tokens, packs: Sequence[np.ndarray], shape: Shape) -> _Layout:
    """Records in the order given inside each pack, rows by length."""
    record_r = np.concatenate([*packs, np.empty(0, np.int64)]).astype(np.int64)
    pack_r, slot_r = spans(np.array([len(p) for p in packs], np.int64))
    length_r = tokens.start[record_r + 1] - tokens.start[record_r]
    end_r = np.cumsum(length_r)
    start_r = end_r - length_r
    start_r = start_r - start_r[np.arange(len(record_r)) - slot_r]
    count_r = tokens.first[record_r + 1] - tokens.first[record_r]
    owner_c, m_c = spans(count_r)
    candidate_c = tokens.first[record_r][owner_c] + m_c
    own_c = tokens.length[candidate_c].astype(np.int64)
    prompt_c = tokens.prompt[record_r].astype(np.int64)[owner_c]
    before_c = np.cumsum(own_c) - own_c
    before_c = before_c - before_c[np.arange(len(own_c)) - m_c]
    start_c = start_r[owner_c] + prompt_c + before_c
    length_c = prompt_c + own_c
    chosen = _choose_rows(pack_r[owner_c], length_c, shape)
    return _Layout(
        record_r, pack_r, slot_r, start_r, length_r,
        candidate_c, owner_c, m_c, start_c, prompt_c, length_c, *chosen,
    )  # fmt: skip


def _fill_rows(tokens: Tokens, at: _Layout, shape: Shape, P: int):
    """pos_PN, back_PN, slot and read: the exchange between stream and rows."""
    lengths = np.array([s for _, s in shape.rows])
    sizes = np.array([r for r, _ in shape.rows]) * lengths
    first_c = (np.cumsum(sizes) - sizes)[at.class_c] + at.row_c * lengths[at.class_c]
    c, offset = spans(at.length_c)
    own = offset >= at.prompt_c[c]
    stream = np.where(own, at.start_c[c] - at.prompt_c[c], at.start_r[at.owner_c][c]) + offset
    pos = np.zeros((P, shape.tokens), np.int32)
    back = np.full((P, shape.tokens), sizes.sum(), np.int32)
    here = own | (at.m_c[c] == 0)  # a prompt's tokens are read back from its first row only
    pack = at.pack_c[c]
    pos[pack[here], stream[here]] = offset[here]
    back[pack[here], stream[here]] = (first_c[c] + offset)[here]
    slot, read = [], []
    gate_c = tokens.gate[at.record_r][at.owner_c]
    for k, (R, S) in enumerate(shape.rows):
        s, mine = np.zeros((P, R, S), np.int32), at.class_c[c] == k
        s[pack[mine], at.row_c[c][mine], offset[mine]] = stream[mine]
        mine = at.class_c == k
        p, r = at.pack_c[mine], at.row_c[mine]
        ends = np.zeros((P, R, 2), np.int32)
        ends[p, r, 0] = s[p, r, gate_c[mine]]
        ends[p, r, 1] = s[p, r, at.length_c[mine] - 1]
        slot.append(s)
        read.append(ends)
    return pos, back, tuple(slot), tuple(read)


def _scatter(shape: tuple[int, ...], index, value, absent, dtype=np.int32) -> np.ndarray:
    out = np.full(shape, absent, dtype)
    out[index] = value
    return out


def fill(
    tokens: Tokens, packs: Sequence[np.ndarray], shape: Shape, *, count: int | None = None
) -> Pack:
    """The arrays of `packs` (record positions), with empty packs behind them up to `count`."""
    P, B, M = count or len(packs), shape.prompts, shape.candidates
    at = _place(tokens, packs, shape)
    t, offset = spans(at.length_r)
    ids = np.zeros((P, shape.tokens), np.int32)
    ids[at.pack_r[t], at.start_r[t] + offset] = tokens.ids[tokens.start[at.record_r][t] + offset]
    pos, back, slot, read = _fill_rows(tokens, at, shape, P)
    counts = np.array([r for r, _ in shape.rows])
    row_c = (np.cumsum(counts) - counts)[at.class_c] + at.row_c
    of_c, of_r = (at.pack_c, at.slot_r[at.owner_c], at.m_c), (at.pack_r, at.slot_r)
    c, r, f32 = at.candidate_c, at.record_r, np.float32
    rating_cJ = tokens.rating[c]
    return Pack(
        ids_PN=ids,
        pos_PN=pos,
        slot=slot,
        back_PN=back,
        read=read,
        row_PBM=_scatter((P, B, M), of_c, row_c, 0),
        rank_PBM=_scatter((P, B, M), of_c, tokens.rank[c], -1),
        margin_PBM=_scatter((P, B, M), of_c, tokens.margin[c], 0, f32),
        rating_PBMJ=_scatter((P, B, M, rating_cJ.shape[1]), of_c, rating_cJ, np.nan, f32),
        smoothing_PB=_scatter((P, B), of_r, tokens.smoothing[r], 0, f32),
        group_PB=_scatter((P, B), of_r, tokens.group[r], -1),
        record_PB=_scatter((P, B), of_r, r, -1),
    )


def padded(tokens: Tokens, records: np.ndarray, shape: tuple[int, int]) -> Pack:
    """One row a candidate, padded to (rows, length): the oracle that packs are tested against.

    Every stream is its own row, so B = M = 1 and the candidates follow each other along P.
    """
    R, S = shape
    packs = [(int(i), int(c)) for i in records for c in range(tokens.first[i], tokens.first[i + 1])]
    ids, read = np.zeros((R, S), np.int32), np.zeros((R, 1, 2), np.int32)
    rank = np.full((R, 1, 1), -1, np.int32)
    record = np.full((R, 1), -1, np.int32)
    for p, (i, c) in enumerate(packs):
        first, own = tokens.start[i], tokens.length[tokens.first[i] : c + 1].astype(int)
        end = first + tokens.prompt[i] + own.sum()
        row = np.concatenate(
            [tokens.ids[first : first + tokens.prompt[i]], tokens.ids[end - own[-1] : end]]
        )
        ids[p, : len(row)], read[p, 0] = row, (tokens.gate[i], len(row) - 1)
        rank[p], record[p] = tokens.rank[c], i
    zero = np.zeros((R, 1, 1), np.int32)
    return Pack(
        ids_PN=ids,
        pos_PN=np.tile(np.arange(S, dtype=np.int32), (R, 1)),
        slot=None,
        back_PN=None,
        read=(read,),
        row_PBM=zero,
        rank_PBM=rank,
        margin_PBM=zero.astype(np.float32),
        rating_PBMJ=np.full((R, 1, 1, 0), np.nan, np.float32),
        smoothing_PB=np.zeros((R, 1), np.float32),
        group_PB=record * 0 - 1,
        record_PB=record,
    )


class Batches:
    """Training batches of P packs: batch i is a pure function of (tokens, shape, seed, i).

    Each epoch is packed anew from its own permutation, and its packs are shuffled; the packs of
    successive epochs form one stream, of which a step takes the next P, so that no step but the
    last of the last epoch (`epochs=None`: none) is filled up with empty packs.
    """

    def __init__(
        self, tokens: Tokens, shape: Shape, packs: int, *, seed: int, epochs: int | None = None
    ):
        if not len(tokens.prompt):
            raise ValueError('no record to make batches of')
        check_fits(tokens, shape)
        self.tokens, self.shape, self.packs = tokens, shape, packs
        self.seed, self.epochs = seed, epochs
        self._epoch = functools.cache(self._plan)
        self._order: int | None = None
        self._begin()

    def reordered(self, order: int, tokens: Tokens | None = None) -> 'Batches':
        """The same packs, in each epoch in an order of their own, drawn from (order, epoch).

        `tokens` may have other labels: packs depend on lengths alone. They are planned once for
        all that are made of one. Raises ValueError for tokens of other lengths.
        """
        for name in ('start', 'prompt', 'first', 'length') if tokens else ():
            if not np.array_equal(getattr(tokens, name), getattr(self.tokens, name)):
                raise ValueError(f'tokens: their {name} is not that of the packs')
        other = copy.copy(self)
        other.tokens, other._order = tokens or self.tokens, order
        other._begin()
        return other

    def _begin(self) -> None:
        self._stream: list[np.ndarray] = []
        self._counts = [np.zeros((1, 2), np.int64)]  # records and tokens up to each pack
        self._planned = 0

    def _plan(self, epoch: int) -> list[np.ndarray]:
        rng = np.random.default_rng([self.seed, epoch])
        order = rng.permutation(len(self.tokens.prompt))
        packs = plan(self.tokens, self.shape, order=order)
        return [packs[i] for i in rng.permutation(len(packs))]

    def _plan_epoch(self) -> None:
        packs = self._epoch(self._planned)
        if self._order is not None:
            rng = np.random.default_rng([self._order, self._planned])
            packs = [packs[i] for i in rng.permutation(len(packs))]
        size = np.diff(self.tokens.start)
        new = np.array([(len(p), size[p].sum()) for p in packs])
        self._counts.append(self._counts[-1][-1] + np.cumsum(new, axis=0))
        self._stream += packs
        self._planned += 1

    def _take(self, first: int, last: int) -> list[np.ndarray]:
        while len(self._stream) < last and self._planned != self.epochs:
            self._plan_epoch()
        return self._stream[first:last]

    def __len__(self) -> int:
        """Steps in all epochs; ValueError when they are endless."""
        if self.epochs is None:
            raise ValueError('epochs: None, so the number of steps has to be given')
        while self._planned < self.epochs:
            self._plan_epoch()
        return -(-len(self._stream) // self.packs)

    def __call__(self, i: int) -> Pack:
        packs = self._take(i * self.packs, (i + 1) * self.packs)
        if not packs:
            raise ValueError(f'batch {i}: {self.epochs} epochs are only {len(self)} batches')
        return fill(self.tokens, packs, self.shape, count=self.packs)

    def counts(self, steps: int) -> np.ndarray:
        """[steps + 1, 2] records and tokens seen before each step, and after the last one."""
        self._take(0, steps * self.packs)
        done = np.concatenate(self._counts)
        return done[np.minimum(np.arange(steps + 1) * self.packs, len(done) - 1)]


def in_order(tokens: Tokens, shape: Shape, packs: int) -> Iterator[Pack]:
    """Every record once, in batches of P packs, for scoring; `record_PB` says who is where."""
    check_fits(tokens, shape)
    planned = plan(tokens, shape, order=np.arange(len(tokens.prompt)))
    for at in range(0, len(planned), packs):
        yield fill(tokens, planned[at : at + packs], shape, count=packs)
