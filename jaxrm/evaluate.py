"""Scores of a whole set, pair accuracy by prompt, and bootstrap intervals over prompts.

Scores of a set are one array [M] per record, in the order of its responses, whatever made them.
"""

import itertools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from jaxrm import packing, sharding, tree
from jaxrm.data import Preference
from jaxrm.packing import Pack
from jaxrm.tokens import Tokens

Score = Callable[[tree.Tree, Pack], jax.Array]  # (params, pack) -> score_BM


def candidate_scores(
    score: Score, params: tree.Tree, tokens: Tokens, shape: packing.Shape, *, mesh: Mesh, packs: int
) -> np.ndarray:
    """[c] float32, the score of every candidate of `tokens`; `score` is already compiled.

    A batch has `packs` packs, a multiple of the mesh's data axes.
    """
    out = np.full(len(tokens.length), np.nan, np.float32)
    waiting = None
    for pack in itertools.chain(packing.in_order(tokens, shape, packs), [None]):
        if waiting is not None:  # read one batch late, so that the device never waits
            index, found = waiting
            out[index[index >= 0]] = np.asarray(found).reshape(index.shape)[index >= 0]
        if pack is not None:
            waiting = (
                _candidate_index(tokens, pack),
                score(params, sharding.place_batch(pack, mesh)),
            )
    return out


def _candidate_index(tokens: Tokens, pack: Pack) -> np.ndarray:
    """[P, B, M] candidate of `tokens`, -1 where there is none."""
    record_PB, M = pack.record_PB, pack.rank_PBM.shape[2]
    first = np.where(record_PB >= 0, tokens.first[record_PB], 0)[..., None]
    count = np.where(record_PB >= 0, tokens.first[record_PB + 1] - tokens.first[record_PB], 0)[
        ..., None
    ]
    m = np.arange(M)[None, None]
    return np.where(m < count, first + m, -1)


def by_record(score_c: np.ndarray, tokens: Tokens) -> list[np.ndarray]:
    """Scores [M] of each record of `tokens`."""
    return np.split(score_c, tokens.first[1:-1])


class Pairs(NamedTuple):
    """Averages over each record's ordered pairs, [n]; NaN for a record that has none."""

    accuracy: np.ndarray  # share of pairs with the better candidate strictly higher
    ties: np.ndarray  # share with equal scores
    margin: np.ndarray  # score of the better minus score of the worse


def pairs(ranks: Sequence[Sequence[int]], scores: Sequence[np.ndarray]) -> Pairs:
    """Pair statistics of every record; rank 0 is best, equal ranks are no pair, -1 is absent."""
    rows = [_pairs(np.asarray(r), np.asarray(s)) for r, s in zip(ranks, scores, strict=True)]
    return Pairs(*np.array(rows).reshape(-1, 3).T)


def _pairs(rank: np.ndarray, score: np.ndarray) -> tuple[float, float, float]:
    if rank.shape != score.shape:
        raise ValueError(f'scores: found {score.shape}, expected {rank.shape} as the ranks')
    i, j = np.nonzero((rank[:, None] < rank[None]) & (rank[:, None] >= 0))
    if not len(i):
        return (np.nan,) * 3
    gap = score[i].astype(float) - score[j]
    return (gap > 0).mean(), (gap == 0).mean(), gap.mean()


def ranks(records: Sequence[Preference]) -> list[Sequence[int]]:
    """Ranks of every record; an unranked one has all 0."""
    return [r.ranks if r.ranks is not None else (0,) * len(r.responses) for r in records]


class Interval(NamedTuple):
    """A mean with a 95 % interval."""

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        return f'{self.mean:.3f} [{self.low:.3f}, {self.high:.3f}]'


def _resampled(x_n: np.ndarray, draws: int, seed: int) -> np.ndarray:
    """[draws] means of `x_n` resampled with replacement."""
    rng = np.random.default_rng(seed)
    n = len(x_n)
    # Counts of a resample are multinomial; chunks keep the memory bounded.
    chunk = max(1, 4_000_000 // n)
    parts = [
        rng.multinomial(n, np.full(n, 1 / n), size=min(chunk, draws - at)) @ x_n / n
        for at in range(0, draws, chunk)
    ]
    return np.concatenate(parts)


def interval(x_n: np.ndarray, *, draws: int = 2000, seed: int = 0) -> Interval:
    """Mean of a value per prompt and its percentile bootstrap interval; NaNs are left out."""
    x_n = np.asarray(x_n, float)
    x_n = x_n[~np.isnan(x_n)]
    if not len(x_n):
        return Interval(np.nan, np.nan, np.nan)
    low, high = np.quantile(_resampled(x_n, draws, seed), [0.025, 0.975])
    return Interval(float(x_n.mean()), float(low), float(high))


def paired(x_n: np.ndarray, y_n: np.ndarray, *, draws: int = 2000, seed: int = 0) -> Interval:
    """Mean and interval of x - y, two values of each prompt: x is above y if `low` is above 0."""
    return interval(np.asarray(x_n, float) - np.asarray(y_n, float), draws=draws, seed=seed)
