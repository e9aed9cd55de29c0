"""Packs against rows rebuilt one token at a time from (ids, slot), and plans against counting."""

import collections

import numpy as np
import plain
import pytest

from jaxrm import packing, tokens

SHAPE = packing.Shape(tokens=40, rows=((4, 8), (4, 16)), prompts=5, candidates=4)
SEEDS = range(6)


def mixed(seed, n=40):
    """Records of 0 to 4 candidates with random groups; some candidates absent or tied."""
    rng = np.random.default_rng(seed)
    t = plain.random_tokens(rng.integers(0, 5, n), seed=seed)
    rank = np.where(rng.random(len(t.rank)) < 0.15, -1, t.rank)
    return t._replace(
        rank=rank.astype(np.int32),
        group=rng.integers(-1, 3, n).astype(np.int32),
        record=np.sort(rng.choice(10 * n, n, replace=False)),
    )


def packed(t, seed=0, shape=SHAPE, empty=1):
    packs = packing.plan(t, shape, order=np.random.default_rng(seed).permutation(len(t.prompt)))
    return packs, packing.fill(t, packs, shape, count=len(packs) + empty)


def places(pack):
    """(record, p, b) of every prompt."""
    return [(int(pack.record_PB[p, b]), p, b) for p, b in np.argwhere(pack.record_PB >= 0)]


def row_of(pack, p, row):
    """(slots counted over all classes, stream indices of the row's slots, read) of a row."""
    first = 0
    for slot, read in zip(pack.slot, pack.read, strict=True):
        R, S = slot.shape[1:]
        if row < R:
            return first + row * S + np.arange(S), slot[p, row], read[p, row]
        row, first = row - R, first + R * S
    raise AssertionError('no such row')


def true_length(t, i, m):
    return int(t.prompt[i] + t.length[t.first[i] + m])


@pytest.mark.parametrize('seed', SEEDS)
def test_a_plan_covers_each_record_once_and_respects_capacity(seed):
    t = mixed(seed)
    order = np.random.default_rng(seed).permutation(40)[:33]
    packs = packing.plan(t, SHAPE, order=order, window=16)
    assert sorted(i for p in packs for i in p) == sorted(order)
    for members in packs:
        lengths = [true_length(t, i, m) for i in members for m in range(len(plain.rows(t, i)))]
        assert sum(t.start[i + 1] - t.start[i] for i in members) <= SHAPE.tokens
        assert len(members) <= SHAPE.prompts
        assert len(lengths) <= 8
        assert sum(n > 8 for n in lengths) <= 4


def test_a_plan_packs_inside_windows():
    t = mixed(0)
    packs = packing.plan(t, SHAPE, order=np.arange(40), window=10)
    assert [{int(i) // 10 for i in p} for p in packs] == [{int(p[0]) // 10} for p in packs]


@pytest.mark.parametrize('seed', SEEDS)
def test_every_row_is_the_prompt_and_one_candidate(seed):
    t = mixed(seed)
    _, pack = packed(t, seed)
    met = []
    for i, p, b in places(pack):
        for m, ids in enumerate(plain.rows(t, i)):
            _, stream, read = row_of(pack, p, pack.row_PBM[p, b, m])
            at = stream[: len(ids)]
            np.testing.assert_array_equal(pack.ids_PN[p, at], ids)
            np.testing.assert_array_equal(pack.pos_PN[p, at], np.arange(len(ids)))
            np.testing.assert_array_equal(stream[len(ids) :], 0)
            assert list(read) == [stream[t.gate[i]], stream[len(ids) - 1]]
        met.append(i)
    assert sorted(met) == list(range(40))


@pytest.mark.parametrize('seed', SEEDS)
def test_each_token_stands_once_and_pads_are_never_read(seed):
    t = mixed(seed)
    packs, pack = packed(t, seed)
    back_end = sum(s[0].size for s in pack.slot)
    flat = [np.concatenate([s[p].ravel() for s in pack.slot]) for p in range(len(pack.ids_PN))]
    reads = [set(map(tuple, np.concatenate([r[p] for r in pack.read]))) for p in range(len(flat))]
    for p in range(len(flat)):
        used, allowed = set(), {(0, 0)}
        for i, at, b in places(pack):
            if at != p:
                continue
            tree, heads = [], []
            for m, ids in enumerate(plain.rows(t, i)):
                slots, stream, read = row_of(pack, p, pack.row_PBM[p, b, m])
                allowed.add(tuple(read))
                shared = t.prompt[i] if m else 0
                heads.append(stream[: t.prompt[i]])
                for k in range(shared, len(ids)):  # what this row alone gives back to the stream
                    assert pack.back_PN[p, stream[k]] == slots[k]
                tree += list(stream[shared : len(ids)])
            assert all((h == heads[0]).all() for h in heads)
            # the tree is one stretch of the stream, equal to the record's ids
            first = tree[0]
            assert tree == list(range(first, first + len(tree)))
            want = t.ids[t.start[i] : t.start[i + 1]]
            np.testing.assert_array_equal(pack.ids_PN[p, first : first + len(tree)], want)
            assert not used & set(tree)
            used |= set(tree)
        rest = np.setdiff1d(np.arange(SHAPE.tokens), list(used))
        assert (pack.back_PN[p, rest] == back_end).all()
        back = pack.back_PN[p, sorted(used)]
        assert len(set(back)) == len(used)
        np.testing.assert_array_equal(flat[p][back], sorted(used))
        assert reads[p] <= allowed
    assert (pack.record_PB[len(packs) :] == -1).all()


@pytest.mark.parametrize('seed', SEEDS)
def test_what_is_known_of_records_and_candidates_lands_at_their_place(seed):
    t = mixed(seed)
    _, pack = packed(t, seed)
    for i, p, b in places(pack):
        c, M = slice(t.first[i], t.first[i + 1]), t.first[i + 1] - t.first[i]
        np.testing.assert_array_equal(pack.rank_PBM[p, b], [*t.rank[c], *[-1] * (4 - M)])
        np.testing.assert_array_equal(pack.margin_PBM[p, b, :M], t.margin[c])
        np.testing.assert_array_equal(pack.rating_PBMJ[p, b, :M], t.rating[c])
        assert np.isnan(pack.rating_PBMJ[p, b, M:]).all()
        assert pack.smoothing_PB[p, b] == t.smoothing[i]
        assert pack.group_PB[p, b] == t.group[i]
        assert len(set(pack.row_PBM[p, b, :M])) == M
    none = pack.record_PB < 0
    assert (pack.rank_PBM[none] == -1).all()
    assert (pack.group_PB[none] == -1).all()
    assert (pack.row_PBM[none] == 0).all()


def test_rows_are_held_by_one_candidate_each():
    _, pack = packed(mixed(1))
    for p in range(len(pack.ids_PN)):
        rows = [
            pack.row_PBM[q, b, m]
            for i, q, b in places(pack)
            for m in range(4)
            if q == p and pack.rating_PBMJ[q, b, m, 0] == pack.rating_PBMJ[q, b, m, 0]
        ]
        assert len(rows) == len(set(rows))


def test_fields_have_the_documented_types():
    _, pack = packed(mixed(2))
    floats = {'margin_PBM', 'rating_PBMJ', 'smoothing_PB'}
    for name, x in pack._asdict().items():
        for array in x if isinstance(x, tuple) else [x]:
            assert array.dtype == (np.float32 if name in floats else np.int32), name


def test_rows_overflow_into_a_longer_class_and_the_longest_stay():
    length = np.array([3, 4, 5, 6, 7, 9])  # six rows, four places in the class of 8
    t = plain.random_tokens([1] * 6, prompt=(1, 2), own=(1, 2))
    total = length + 1
    t = t._replace(
        ids=np.arange(total.sum(), dtype=np.int32),
        start=np.append(0, np.cumsum(total)),
        length=length.astype(np.int32),
    )
    shape = SHAPE._replace(prompts=6)
    (members,) = packing.plan(t, shape, order=np.arange(6))
    pack = packing.fill(t, [members], shape)
    rows = {i: pack.row_PBM[p, b, 0] for i, p, b in places(pack)}
    assert rows[5] >= 4
    assert sorted(rows.values()) == [0, 1, 2, 3, 4, 5]
    for i, p, _ in places(pack):
        _, stream, _ = row_of(pack, p, rows[i])
        got = pack.ids_PN[p, stream[: total[i]]]
        np.testing.assert_array_equal(got, t.ids[t.start[i] : t.start[i + 1]])


def test_empty_packs_stand_anywhere():
    t = mixed(3, n=3)
    none = np.empty(0, np.int64)
    pack = packing.fill(t, [none, np.array([2]), none, np.array([0, 1])], SHAPE, count=5)
    assert {i: p for i, p, _ in places(pack)} == {2: 1, 0: 3, 1: 3}
    end = sum(s[0].size for s in pack.slot)
    for p in (0, 2, 4):
        assert (pack.back_PN[p] == end).all()
        assert not pack.ids_PN[p].any()
        assert (pack.rank_PBM[p] == -1).all()
    alone = packing.fill(t, [np.array([2])], SHAPE)
    np.testing.assert_array_equal(pack.ids_PN[1], alone.ids_PN[0])
    np.testing.assert_array_equal(packing.fill(t, [], SHAPE, count=1).record_PB, [[-1] * 5])


@pytest.mark.parametrize('seed', SEEDS)
def test_unshared_records_give_the_same_rows(seed):
    t = mixed(seed)
    u = tokens.unshare(t)
    shape = packing.Shape(tokens=64, rows=((4, 8), (6, 16)), prompts=5, candidates=4)
    packing.check_fits(u, shape)
    _, pack = packed(u, seed, shape)
    seen = collections.Counter()
    for i, p, b in places(pack):
        for m, ids in enumerate(plain.rows(t, i)):
            _, stream, read = row_of(pack, p, pack.row_PBM[p, b, m])
            np.testing.assert_array_equal(pack.ids_PN[p, stream[: len(ids)]], ids)
            np.testing.assert_array_equal(pack.pos_PN[p, stream[: len(ids)]], np.arange(len(ids)))
            assert list(read) == [stream[t.gate[i]], stream[len(ids) - 1]]
            seen.update((p, int(s)) for s in stream[: len(ids)])
    assert set(seen.values()) == {1}  # nothing stands in two rows
    np.testing.assert_array_equal(packing.row_lengths(u), packing.row_lengths(t))


def test_padded_rows_are_the_plain_rows():
    t = mixed(4)
    records = np.array([5, 0, 17, 3])
    rows = [(i, m, ids) for i in records for m, ids in enumerate(plain.rows(t, i))]
    pack = packing.padded(t, records, (len(rows) + 2, 16))
    assert pack.slot is None
    for p, (i, m, ids) in enumerate(rows):
        np.testing.assert_array_equal(pack.ids_PN[p], [*ids, *[0] * (16 - len(ids))])
        np.testing.assert_array_equal(pack.pos_PN[p], np.arange(16))
        assert list(pack.read[0][p, 0]) == [t.gate[i], len(ids) - 1]
        assert pack.record_PB[p, 0] == i
        assert pack.rank_PBM[p, 0, 0] == t.rank[t.first[i] + m]
    assert (pack.record_PB[len(rows) :] == -1).all()


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        ({'rows': ((4, 8),)}, r'record {long}\D.*\b15\b.*\b8\b'),
        ({'candidates': 3}, r'record {many}\D.*\b4\b.*\b3\b'),
        ({'tokens': 16}, r'record {big}\D.*tokens.*\b16\b'),
        ({'rows': ((1, 8), (1, 16))}, r'record {rows}\D.*rows over.*\b[12]\b'),
    ],
)
def test_check_fits_names_the_record(change, message):
    # prompts of 1 token: one of 15 in a row; one with 4 candidates; all in records 100, 101, ...
    t = plain.random_tokens([1, 2, 1, 4], prompt=(1, 2))
    length = np.array([1, 1, 1, 14, 6, 6, 6, 6], np.int32)
    start = np.cumsum([0, 2, 3, 15, 25])
    ids = np.zeros(start[-1], np.int32)
    t = t._replace(length=length, start=start, ids=ids, record=np.array([100, 103, 105, 107]))
    names = {'long': 105, 'many': 107, 'big': 107, 'rows': 107}
    packing.check_fits(t, SHAPE)
    with pytest.raises(ValueError, match=message.format(**names)):
        packing.check_fits(t, SHAPE._replace(**change))


def assert_same(a, b):
    for x, y in zip(a, b, strict=True):
        if isinstance(x, tuple):
            assert_same(x, y)
        else:
            np.testing.assert_array_equal(x, y)


def test_batch_i_is_a_function_of_i():
    t = mixed(5)
    ours = packing.Batches(t, SHAPE, 3, seed=7, epochs=3)
    whole = [ours(i) for i in range(len(ours))]
    for i in (len(whole) - 1, 4, 0):
        fresh = packing.Batches(t, SHAPE, 3, seed=7, epochs=3)
        assert_same(fresh(i), whole[i])
        assert_same(packing.Batches(t, SHAPE, 3, seed=7)(i), whole[i]) if i < 5 else None
    assert_same(ours(2), whole[2])
    other = packing.Batches(t, SHAPE, 3, seed=8, epochs=3)(0)
    assert (other.ids_PN != whole[0].ids_PN).any()


def test_each_epoch_holds_every_record_once_and_only_the_last_step_is_filled_up():
    t = mixed(6)
    batches = packing.Batches(t, SHAPE, 4, seed=1, epochs=3)
    steps = len(batches)
    whole = [batches(i) for i in range(steps)]
    record = np.concatenate([b.record_PB for b in whole])
    assert collections.Counter(record[record >= 0].tolist()) == dict.fromkeys(range(40), 3)
    filled = (record >= 0).any(1)
    assert not filled[filled.argmin() :].any() or filled.all()
    assert (~filled).sum() < 4
    ordered = record[record >= 0]
    epochs = [ordered[k * 40 : (k + 1) * 40].tolist() for k in range(3)]
    assert [sorted(e) for e in epochs] == [list(range(40))] * 3
    assert epochs[0] != epochs[1]
    size = np.diff(t.start)
    seen = [b.record_PB[b.record_PB >= 0] for b in whole]
    want = np.cumsum([(0, 0), *((len(r), size[r].sum()) for r in seen)], axis=0)
    np.testing.assert_array_equal(batches.counts(steps), want)
    np.testing.assert_array_equal(packing.Batches(t, SHAPE, 4, seed=1).counts(3), want[:4])
    assert want[-1].tolist() == [120, 3 * len(t.ids)]


def test_batches_without_end_or_start():
    t = mixed(7)
    with pytest.raises(ValueError, match='epochs'):
        len(packing.Batches(t, SHAPE, 2, seed=0))
    once = packing.Batches(t, SHAPE, 2, seed=0, epochs=1)
    with pytest.raises(ValueError, match=f'batch {len(once)}'):
        once(len(once))
    with pytest.raises(ValueError, match='no record'):
        packing.Batches(tokens.select(t, []), SHAPE, 2, seed=0)
    assert list(packing.in_order(tokens.select(t, []), SHAPE, 2)) == []
    assert (packing.Batches(t, SHAPE, 2, seed=0)(50).record_PB >= 0).any()
    with pytest.raises(ValueError, match='record'):
        packing.Batches(t, SHAPE._replace(tokens=8), 2, seed=0)


def test_the_records_of_a_step_depend_on_its_packs_only_by_grouping():
    # Eight packs a step are the packs of two steps of four: no host or device count enters.
    t = mixed(8)
    wide, narrow = (packing.Batches(t, SHAPE, P, seed=3) for P in (8, 4))
    for i in range(3):
        halves = narrow(2 * i).record_PB, narrow(2 * i + 1).record_PB
        np.testing.assert_array_equal(wide(i).record_PB, np.concatenate(halves))


def test_in_order_covers_every_record():
    t = mixed(9)
    batches = list(packing.in_order(t, SHAPE, 3))
    assert {b.ids_PN.shape for b in batches} == {(3, 40)}
    record = np.concatenate([b.record_PB.ravel() for b in batches])
    assert sorted(record[record >= 0]) == list(range(40))
    with pytest.raises(ValueError, match='record'):
        next(packing.in_order(t, SHAPE._replace(tokens=8), 3))


def test_spans():
    owner, offset = packing.spans(np.array([2, 0, 3]))
    np.testing.assert_array_equal(owner, [0, 0, 2, 2, 2])
    np.testing.assert_array_equal(offset, [0, 1, 0, 1, 2])
