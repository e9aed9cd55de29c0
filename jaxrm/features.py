"""Features of a frozen backbone on disk: a record passes through it once, whoever asks later.

A folder belongs to one model. Records are known by their token ids, so that sets which share
records share features, and another chat template is another record. Shards appear whole or not at
all: a stopped pass goes on where it was. What stands on frozen features, such as a gate, learns
from `Batches` of them. Several processes share the folder.

Letters: n records, c candidates, D width; of batches P packs, B prompts, M candidates.
"""

import functools
import hashlib
import itertools
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import ml_dtypes  # noqa: F401  (makes bfloat16 a dtype of numpy)
import numpy as np
from einops import rearrange
from jax.sharding import Mesh
from safetensors import safe_open
from safetensors.numpy import save_file

from jaxrm import evaluate, hf, packing, processes, sharding, tree
from jaxrm.reward import Features
from jaxrm.tokens import Tokens, select

Array = np.ndarray
ABOUT = 'features.json'
NAME = 16  # bytes of a record's name


class Part(NamedTuple):
    """Features of some records of a set of tokens."""

    record_n: Array  # which records
    prompt_nD: Array
    candidate_c: Array  # which candidates, counted through the whole set
    answer_cD: Array


def names(tokens: Tokens) -> list[bytes]:
    """One name for each record: a hash of its ids, of where it is cut, and of where it is read."""
    out = []
    for i in range(len(tokens.prompt)):
        ids = tokens.ids[tokens.start[i] : tokens.start[i + 1]]
        length = tokens.length[tokens.first[i] : tokens.first[i + 1]]
        cut = np.array([tokens.prompt[i], tokens.gate[i], *length], np.int32)
        name = hashlib.blake2b(ids.astype('<i4').tobytes(), digest_size=NAME)
        name.update(cut.astype('<i4').tobytes())
        out.append(name.digest())
    return out


def compute(
    features: Callable[[tree.Tree, packing.Pack], Features],
    params: tree.Tree,
    tokens: Tokens,
    shape: packing.Shape,
    folder: str | Path,
    *,
    model: str,
    mesh: Mesh,
    packs: int,
    every: int = 64,
    dtype: Any = np.float32,
    done: Callable[[int, int], None] = lambda records, of: None,
) -> int:
    """Adds what the folder lacks of `tokens`, and returns how many records that was.

    `features` is already compiled; `model` is any text that tells one set of weights from
    another, such as a hash; a batch has `packs` packs, and every so many batches a shard is
    written, in `dtype`. `done` is told the progress. Raises ValueError for a folder of another
    model or dtype, and for features that are not finite.
    """
    folder, about = Path(folder), {'model': model, 'dtype': np.dtype(dtype).name}
    processes.alone(lambda: _claim(folder, about))
    missing = processes.alone(lambda: _missing(folder, tokens))
    if not missing:
        return 0
    wanted, written = select(tokens, missing), 0
    called, params = names(wanted), sharding.place(params, mesh)
    batches = packing.in_order(wanted, shape, packs)
    for some in iter(lambda: list(itertools.islice(batches, every)), []):
        parts = [
            _part(pack, found, wanted)
            for pack, found in evaluate.passed(features, params, some, mesh)
        ]
        record_n = np.concatenate([p.record_n for p in parts])
        here = [called[r] for r in record_n]
        processes.alone(lambda: _write(folder, here, parts, wanted, dtype))  # noqa: B023
        done(written := written + len(record_n), len(missing))
    return len(missing)


def _claim(folder: Path, about: dict[str, str]) -> None:
    """Makes the folder one of these features, or checks that it is."""
    path = folder / ABOUT
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        hf.write_json(path, about)
    if (found := hf.read_json(path)) != about:
        raise ValueError(f'{path}: found features of {found}, expected {about}')


def _shards(folder: Path) -> list[Path]:
    return sorted(folder.glob('*.safetensors'))


def _shard_names(path: Path) -> list[bytes]:
    with safe_open(path, framework='numpy') as file:
        return [row.tobytes() for row in file.get_tensor('name')]


def _missing(folder: Path, tokens: Tokens) -> list[int]:
    """The first record of each name that no shard has."""
    have = set(itertools.chain.from_iterable(map(_shard_names, _shards(folder))))
    out = []
    for i, name in enumerate(names(tokens)):
        if name not in have:
            have.add(name)
            out.append(i)
    return out


def _part(pack: packing.Pack, found: Features, tokens: Tokens) -> Part:
    answer_BMD, prompt_BD = map(np.asarray, found)
    record_B = pack.record_PB.reshape(-1)
    here_B = record_B >= 0
    record_n = record_B[here_B]
    count_n = tokens.first[record_n + 1] - tokens.first[record_n]
    b, m = packing.spans(count_n)
    candidate_c = tokens.first[record_n][b] + m
    return Part(record_n, prompt_BD[here_B], candidate_c, answer_BMD[here_B][b, m])


def _check_finite(record_n: Array, owner_n: Array, z_nD: Array, tokens: Tokens) -> None:
    """As they are stored: a cast may have made a number infinite."""
    bad_n = ~np.isfinite(z_nD.astype(np.float32)).all(1)
    if bad_n.any():
        record = tokens.record[record_n[owner_n[bad_n.argmax()]]]
        raise ValueError(f'record {record}: found features that are not finite as {z_nD.dtype}')


def _write(
    folder: Path, called: list[bytes], parts: list[Part], tokens: Tokens, dtype: Any
) -> None:
    record_n = np.concatenate([p.record_n for p in parts])
    count_n = (tokens.first[record_n + 1] - tokens.first[record_n]).astype(np.int32)
    value = {
        'name': np.frombuffer(b''.join(called), np.uint8).reshape(-1, NAME),
        'count': count_n,
        'prompt': np.concatenate([p.prompt_nD for p in parts]).astype(dtype),
        'answer': np.concatenate([p.answer_cD for p in parts]).astype(dtype),
    }
    _check_finite(record_n, np.arange(len(record_n)), value['prompt'], tokens)
    _check_finite(record_n, packing.spans(count_n)[0], value['answer'], tokens)
    there = [int(path.stem) for path in _shards(folder)]
    path = folder / f'{max(there, default=-1) + 1:06d}.safetensors'
    part = path.with_suffix('.part')
    save_file(value, part)
    part.replace(path)


def parts(folder: str | Path, tokens: Tokens) -> Iterator[Part]:
    """The features of every record of `tokens`, a shard at a time, in the order of the shards.

    Raises ValueError when the folder lacks some of them.
    """
    rows: dict[bytes, list[int]] = {}
    for i, name in enumerate(names(tokens)):
        rows.setdefault(name, []).append(i)
    left = len(rows)
    for path in _shards(Path(folder)):
        with safe_open(path, framework='numpy') as file:
            here = [row.tobytes() for row in file.get_tensor('name')]
            pairs = [(at, i) for at, name in enumerate(here) for i in rows.get(name, ())]
            if not pairs:
                continue
            left -= sum(name in rows for name in here)
            count, prompt, answer = (file.get_tensor(k) for k in ('count', 'prompt', 'answer'))
        at_n, record_n = np.array(pairs).T
        b, m = packing.spans(count[at_n])
        first = np.cumsum(count) - count
        candidate_c = tokens.first[record_n][b] + m
        yield Part(record_n, prompt[at_n], candidate_c, answer[first[at_n][b] + m])
    if left:
        raise ValueError(f'{folder}: lacks the features of {left} records of {len(rows)}')


class Cached(NamedTuple):
    """Features of a whole set of tokens."""

    answer_cD: Array
    prompt_nD: Array


def gather(folder: str | Path, tokens: Tokens) -> Cached:
    """All of `tokens` in their order, in memory."""
    answer: Array | None = None
    for part in parts(folder, tokens):
        if answer is None:
            D, dtype = part.answer_cD.shape[1], part.answer_cD.dtype
            answer = np.empty((len(tokens.length), D), dtype)
            prompt = np.empty((len(tokens.prompt), D), dtype)
        answer[part.candidate_c] = part.answer_cD
        prompt[part.record_n] = part.prompt_nD
    if answer is None:
        raise ValueError(f'{folder}: asked for the features of no records')
    return Cached(answer, prompt)


# Batches


class Batch(NamedTuple):
    """Features of P x B prompts, in place of their tokens; fields as in `packing.Pack`."""

    answer_PBMD: packing.Array
    prompt_PBD: packing.Array
    rank_PBM: packing.Array  # int32, -1 absent: such a candidate's features mean nothing
    margin_PBM: packing.Array  # float32
    smoothing_PB: packing.Array  # float32


class Rows(NamedTuple):
    """A `Batch` of features that are on the device, as params['features']: where they stand."""

    answer_PBM: packing.Array  # int32, rows of `Cached.answer_cD`
    prompt_PB: packing.Array  # int32, of `Cached.prompt_nD`
    rank_PBM: packing.Array
    margin_PBM: packing.Array
    smoothing_PB: packing.Array


def rows(tokens: Tokens, record_PB: Array) -> Rows:
    """The batch of these records, rows of `tokens` or -1; M is what the largest record needs."""
    count_n = np.diff(tokens.first)
    m = np.arange(count_n.max())
    here_PBM = (record_PB[..., None] >= 0) & (m < count_n[record_PB][..., None])
    at_PBM = np.where(here_PBM, tokens.first[record_PB][..., None] + m, 0)
    return Rows(
        answer_PBM=at_PBM.astype(np.int32),
        prompt_PB=np.maximum(record_PB, 0).astype(np.int32),
        rank_PBM=np.where(here_PBM, tokens.rank[at_PBM], np.int32(-1)),
        margin_PBM=np.where(here_PBM, tokens.margin[at_PBM], np.float32(0)),
        smoothing_PB=tokens.smoothing[record_PB],
    )


def batch(of: Cached, tokens: Tokens, record_PB: Array) -> Batch:
    """`rows` with their features."""
    return _gathered(of, rows(tokens, record_PB))


def _gathered(of: Cached, at: Rows) -> Batch:
    return Batch(of.answer_cD[at.answer_PBM], of.prompt_nD[at.prompt_PB], *at[2:])


class Batches:
    """Training batches of P packs of B prompts: batch i is a pure function of (features, seed, i).

    Records are drawn uniformly with replacement from those that have an ordered pair, as in
    ArmoRM's stage 2: every batch is full, whatever the size of the set, and there is no place in an
    epoch to keep. Or, with `epochs`, they are permuted anew in each, and batches take the next ones
    of epochs that follow each other. Features stay on the host in the dtype they come in; without
    them, batches are `Rows`.
    """

    def __init__(
        self,
        of: Cached | None,
        tokens: Tokens,
        *,
        packs: int,
        prompts: int,
        seed: int,
        epochs: bool = False,
    ):
        self._of, self._size, self._seed = of, (packs, prompts), seed
        # Of a record without answers the only rank is -1.
        best_n, worst_n = (f.reduceat(tokens.rank, tokens.first[:-1]) for f in (np.fmin, np.fmax))
        (self.records,) = np.nonzero(best_n < worst_n)
        if not len(self.records):
            found = f'no ordered pair in {len(best_n)} records'
            raise ValueError(f'found {found}, expected at least one')
        self._rows = rows(tokens, np.arange(len(best_n)))
        self._draw = self._next if epochs else self._any
        self._epoch = functools.lru_cache(2)(self._permutation)

    def __call__(self, i: int) -> Batch | Rows:
        record_PB = self.records.take(self._draw(i)).reshape(self._size)
        at = Rows(*(x.take(record_PB, axis=0) for x in self._rows))
        return at if self._of is None else _gathered(self._of, at)

    def _any(self, i: int) -> Array:
        rng = np.random.default_rng([self._seed, i])
        return rng.integers(len(self.records), size=self._size)

    def _permutation(self, epoch: int) -> Array:
        return np.random.default_rng([self._seed, epoch]).permutation(len(self.records))

    def _next(self, i: int) -> Array:
        size, n = math.prod(self._size), len(self.records)
        first, last = divmod(i * size, n), (i + 1) * size // n
        run = np.concatenate([self._epoch(e) for e in range(first[0], last + 1)])
        return run[first[1] :][:size]


def scored(rewards: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    """score_BM of (params, batch), such as `train.preference` wants, by `RewardModel.rewards`.

    For a batch of `Rows`, params['features'] is `Cached`.
    """

    def score(params: tree.Tree, of: Batch | Rows, **options: Any) -> jax.Array:
        if isinstance(of, Rows):
            take = lambda x, i: x.at[i].get(mode='promise_in_bounds')  # noqa: E731
            answer_cD, prompt_nD = params['features']
            found = take(answer_cD, of.answer_PBM), take(prompt_nD, of.prompt_PB)
            of = Batch(*found, of.rank_PBM, of.margin_PBM, of.smoothing_PB)
        merged = (rearrange(x, 'p b ... -> (p b) ...') for x in (of.answer_PBMD, of.prompt_PBD))
        return rewards(params, Features(*merged), **options)

    return score


def candidate_scores(
    score: Callable[[tree.Tree, Batch], jax.Array],
    params: tree.Tree,
    of: Cached,
    tokens: Tokens,
    *,
    mesh: Mesh,
    prompts: int = 4096,
) -> Array:
    """[c] scores of every candidate; `score` is compiled, and takes so many prompts at a time.

    Of several scores each, [c, ...].
    """
    packs, n = sharding.data_parallel(mesh), len(tokens.prompt)
    params, out = sharding.place(params, mesh), np.empty(len(tokens.length), np.float32)
    size = min(-(-n // packs), -(-prompts // packs))
    for start in range(0, n, packs * size):
        record_B = np.arange(start, start + packs * size)
        record_B = np.where(record_B < n, record_B, -1)
        part = batch(of, tokens, record_B.reshape(packs, size))
        with jax.set_mesh(mesh):
            found = processes.whole(score(params, sharding.place_batch(part, mesh)))
        if found.ndim > 2 and out.ndim == 1:
            out = np.empty((len(out), *found.shape[2:]), np.float32)
        record_n = record_B[record_B >= 0]
        b, m = packing.spans(np.diff(tokens.first)[record_n])
        out[tokens.first[record_n][b] + m] = np.asarray(found)[b, m]
    return out
