"""Closed-form fits on frozen features: ridge regression by objective, and verbosity debiasing.

Both are ArmoRM's (arXiv 2406.12845, sections 2.2 and 2.3; RLHFlow's released stage-1 and stage-2
scripts). Letters: N rows, D width, J objectives, A penalties of the grid.
"""

import dataclasses
import math
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import numpy as np
from scipy.stats import rankdata

Array = np.ndarray

ALPHAS = tuple(10.0**k for k in range(-4, 5))
PENALTIES = (0, 0.01, 0.025, 0.05, 0.075, 0.1, 0.125, *(round(0.05 * k, 2) for k in range(3, 20)))
THRESHOLD = 0.03
ROWS = 4096  # of features held in float64 at a time


class Ridge(NamedTuple):
    """One linear map per objective, no intercept."""

    weight_JD: Array  # float32
    alpha_J: Array  # the penalty chosen
    mse_JA: Array  # on the held-out rows, for every penalty
    variance_J: Array  # of the held-out labels around the training mean: what a constant scores


class _Gram(NamedTuple):
    """Sums over the rows on which a group of k objectives is rated, in float64."""

    xx_DD: Array
    xy_Dk: Array
    y_k: Array
    yy_k: Array
    rows: int

    def plus(self, x_nD: Array, y_nk: Array) -> '_Gram':
        xx, xy = x_nD.T @ x_nD, x_nD.T @ y_nk
        new = (xx, xy, y_nk.sum(0), np.square(y_nk).sum(0), len(x_nD))
        return _Gram(*(a + b for a, b in zip(self, new, strict=True)))


def ridge(
    features: Iterable[tuple[Array, Array]],
    label_NJ: Array,
    held_N: Array,
    *,
    alphas: Sequence[float] = ALPHAS,
    names: Sequence[str] | None = None,
) -> Ridge:
    """For each objective, argmin |y - Xw|^2 + alpha |w|^2 over its rated rows that are not held.

    `features` yields (rows [n], X [n, D]): chunks of any size and dtype in any order, that hold
    every row of the labels once. NaN in `label_NJ` is a missing rating. The sum of squares is not
    divided by the number of rows. The penalty is the one with the least mean squared error on the
    held rows, the first such in the grid; the weights are those fitted without them. Memory is two
    D x D matrices for each set of objectives that are rated on the same rows. Raises ValueError for
    an objective without rated rows on one side, for values that are not finite, and for a row that
    is missing or there twice.
    """
    names = names or [f'objective {j}' for j in range(label_NJ.shape[1])]
    label_NJ = np.asarray(label_NJ, np.float64)
    held_N = np.asarray(held_N, bool)
    _check_labels(label_NJ, held_N, names, alphas)
    groups = _groups(label_NJ)
    kept, held = _sums(features, label_NJ, held_N, groups)
    J, A = label_NJ.shape[1], len(alphas)
    weight_JAD = np.empty((J, A, kept[0].xx_DD.shape[0]))
    mse_JA, variance_J = np.empty((J, A)), np.empty(J)
    for columns, k, h in zip(groups, kept, held, strict=True):
        weight_JAD[columns] = _solve(k, alphas)
        mse_JA[columns] = _mse(weight_JAD[columns], h)
        mean_k = k.y_k / k.rows
        variance_J[columns] = (h.yy_k - 2 * mean_k * h.y_k) / h.rows + mean_k**2
    best_J = mse_JA.argmin(1)
    chosen_JD = weight_JAD[np.arange(J), best_J]
    return Ridge(chosen_JD.astype(np.float32), np.asarray(alphas)[best_J], mse_JA, variance_J)


def _check_labels(label_NJ: Array, held_N: Array, names: Sequence[str], alphas) -> None:
    if held_N.shape != label_NJ.shape[:1]:
        raise ValueError(f'held: found {held_N.shape}, expected {label_NJ.shape[:1]}')
    if not len(alphas) or min(alphas) <= 0:
        raise ValueError(f'alphas: found {tuple(alphas)}, expected positive numbers')
    for name, y_N in zip(names, label_NJ.T, strict=True):
        if np.isinf(y_N).any():
            raise ValueError(f'{name}: found an infinite rating in row {np.isinf(y_N).argmax()}')
        for side, of_N in (('training', ~held_N), ('held-out', held_N)):
            if np.isnan(y_N[of_N]).all():
                raise ValueError(f'{name}: found no rating among the {side} rows, expected some')


def _groups(label_NJ: Array) -> list[list[int]]:
    """Objectives that are rated on exactly the same rows, together: one Gram matrix each."""
    groups: dict[bytes, list[int]] = {}
    for j, y_N in enumerate(label_NJ.T):
        groups.setdefault(np.packbits(np.isnan(y_N)).tobytes(), []).append(j)
    return list(groups.values())


def _sums(
    features: Iterable[tuple[Array, Array]], label_NJ: Array, held_N: Array, groups: list[list[int]]
) -> tuple[list[_Gram], list[_Gram]]:
    """Of each group, over the rows that are not held and over those that are."""
    kept: list[_Gram] = []
    held: list[_Gram] = []
    seen_N = np.zeros(len(label_NJ), int)
    for row_n, x_nD in _chunks(features):
        if len(row_n) != len(x_nD) or min(row_n) < 0 or max(row_n) >= len(label_NJ):
            raise ValueError(
                f'features: found {len(x_nD)} for {len(row_n)} rows from {min(row_n)} to '
                f'{max(row_n)}, expected as many, of the {len(label_NJ)} rows of the labels'
            )
        np.add.at(seen_N, row_n, 1)
        if not np.isfinite(x_nD).all():
            row = row_n[(~np.isfinite(x_nD)).any(1).argmax()]
            raise ValueError(f'features: found a value that is not finite in row {row}')
        if not kept:
            kept, held = ([_empty(x_nD.shape[1], len(g)) for g in groups] for _ in range(2))
        for i, columns in enumerate(groups):
            y_nk = label_NJ[row_n][:, columns]
            rated_n = ~np.isnan(y_nk[:, 0])
            for sums, side_n in ((kept, ~held_N[row_n]), (held, held_N[row_n])):
                if (use_n := rated_n & side_n).any():
                    sums[i] = sums[i].plus(x_nD[use_n], y_nk[use_n])
    if (seen_N != 1).any():
        row = (seen_N != 1).argmax()
        raise ValueError(f'features: found row {row} {seen_N[row]} times, expected once')
    return kept, held


def _chunks(features: Iterable[tuple[Array, Array]]) -> Iterable[tuple[Array, Array]]:
    for row_n, x_nD in features:
        for i in range(0, len(x_nD), ROWS):
            yield row_n[i : i + ROWS], np.asarray(x_nD[i : i + ROWS], np.float64)


def _empty(D: int, k: int) -> _Gram:
    return _Gram(np.zeros((D, D)), np.zeros((D, k)), np.zeros(k), np.zeros(k), 0)


def _solve(gram: _Gram, alphas: Sequence[float]) -> Array:
    """[k, A, D] weights: the whole grid from one eigendecomposition."""
    value_D, vector_DD = np.linalg.eigh(gram.xx_DD)
    value_D = np.maximum(value_D, 0)  # of a rank-deficient matrix rounding makes some negative
    y_Dk = vector_DD.T @ gram.xy_Dk
    w_AkD = [(vector_DD @ (y_Dk / (value_D[:, None] + a))).T for a in alphas]
    return np.stack(w_AkD, axis=1)


def _mse(weight_kAD: Array, gram: _Gram) -> Array:
    """[k, A] mean of (y - Xw)^2, from the sums alone."""
    quadratic_kA = np.einsum('kad,de,kae->ka', weight_kAD, gram.xx_DD, weight_kAD, optimize=True)
    linear_kA = np.einsum('kad,dk->ka', weight_kAD, gram.xy_Dk)
    return (quadratic_kA - 2 * linear_kA + gram.yy_k[:, None]) / gram.rows


# Verbosity


def penalties(
    reward_NJ: Array,
    verbosity: int,
    *,
    threshold: float = THRESHOLD,
    grid: Sequence[float] = PENALTIES,
    correlation: Callable[[Array, Array], Array] | None = None,
) -> Array:
    """[J] share of the verbosity objective to take from each objective.

    For each objective the first penalty of the ascending `grid` at which the correlation (signed;
    by default `spearman`, the published one) of reward - penalty * verbosity with verbosity is at
    most `threshold`; 1 where there is none, for an objective that is constant, and for verbosity
    itself. The rows are single responses, the two of a pair among the others.
    """
    correlation = correlation or spearman
    reward_NJ = np.asarray(reward_NJ, np.float64)
    J = reward_NJ.shape[1]
    if not 0 <= verbosity < J:
        raise ValueError(f'verbosity: found objective {verbosity}, expected one of 0 to {J - 1}')
    if not np.isfinite(reward_NJ).all():
        row = int((~np.isfinite(reward_NJ)).any(1).argmax())
        raise ValueError(f'rewards: found a value that is not finite in row {row}')
    out_J = np.ones(J)
    wordy_N = reward_NJ[:, verbosity]
    if not len(wordy_N) or not np.ptp(wordy_N):
        found = f'one value in {len(wordy_N)} rows'
        raise ValueError(f'verbosity: found {found} of objective {verbosity}, expected several')
    left = [j for j in range(J) if j != verbosity and np.ptp(reward_NJ[:, j])]
    for penalty in grid:
        rho = correlation(reward_NJ[:, left] - penalty * wordy_N[:, None], wordy_N)
        passed = {j for j, r in zip(left, rho, strict=True) if r <= threshold}
        out_J[sorted(passed)] = penalty
        left = [j for j in left if j not in passed]
    return out_J


def transform(penalty_J: Array, verbosity: int) -> Array:
    """[J, J] float32 T with debiased = reward @ T: the identity, less the penalties in one row."""
    T_JJ = np.eye(len(penalty_J))
    T_JJ[verbosity] -= penalty_J
    return T_JJ.astype(np.float32)


def spearman(x_NK: Array, y_N: Array) -> Array:
    """[K] rank correlation of each column with y, ties at their average rank; NaN if constant."""
    return pearson(rankdata(x_NK, axis=0), rankdata(y_N))


def pearson(x_NK: Array, y_N: Array) -> Array:
    """[K] correlation of each column with y; NaN if constant."""
    constant_K = np.ptp(x_NK, axis=0) == 0  # less its mean it may not be 0
    x_NK, y_N = x_NK - x_NK.mean(0), y_N - y_N.mean()
    with np.errstate(invalid='ignore'):
        rho_K = (y_N @ x_NK) / np.sqrt((x_NK**2).sum(0) * (y_N @ y_N))
    return np.where(constant_K, np.nan, rho_K)


# Scales


@dataclasses.dataclass(frozen=True)
class Scale:
    """The numbers a rating can be, `low` to `high` in steps of 1, mapped to bin centres in (0, 1).

    As published for HelpSteer, 0 to 4: (rating + 0.5) / 5. Raises ValueError unless low < high.
    """

    low: float
    high: float

    def __post_init__(self) -> None:
        if not -math.inf < self.low < self.high < math.inf:
            found = f'found {self.low} to {self.high}'
            raise ValueError(f'scale: {found}, expected two finite numbers, the smaller one first')

    def __str__(self) -> str:
        return f'{self.low:g} to {self.high:g}'

    def normalised(self, rating: Array) -> Array:
        return (np.asarray(rating, np.float64) - self.low + 0.5) / (self.high - self.low + 1)

    def original(self, value: Array) -> Array:
        return np.asarray(value, np.float64) * (self.high - self.low + 1) + self.low - 0.5
