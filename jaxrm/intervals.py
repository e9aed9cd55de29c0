"""Bootstrap intervals over prompts, and two models compared on the same records."""

from collections.abc import Hashable, Sequence
from typing import NamedTuple

import numpy as np


class Interval(NamedTuple):
    """A mean with a 95 % interval."""

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        return f'{self.mean:.3f} [{self.low:.3f}, {self.high:.3f}]'


def _resampled(
    x_n: np.ndarray, draws: int, seed: int, prompt_n: np.ndarray | None = None
) -> np.ndarray:
    """[draws] means of `x_n` over prompts drawn with replacement, each with all its records."""
    prompt_n = np.arange(len(x_n)) if prompt_n is None else _dense(prompt_n)
    count_k = np.bincount(prompt_n)
    n, total_k = len(count_k), np.zeros((len(count_k), *x_n.shape[1:]))
    np.add.at(total_k, prompt_n, x_n)
    rng = np.random.default_rng(seed)
    # How often each prompt comes is multinomial; chunks keep the memory bounded.
    chunk = max(1, 4_000_000 // n)
    parts = []
    for at in range(0, draws, chunk):
        times = rng.multinomial(n, np.full(n, 1 / n), size=min(chunk, draws - at))
        parts.append(((times @ total_k).T / (times @ count_k)).T)
    return np.concatenate(parts)


def _dense(number_n: np.ndarray) -> np.ndarray:
    """The same numbers without gaps, from 0."""
    _, dense_n = np.unique(number_n, return_inverse=True)
    return dense_n


def interval(
    x_n: np.ndarray,
    *,
    prompts: Sequence[Hashable] | None = None,
    draws: int = 2000,
    seed: int = 0,
) -> Interval:
    """Mean of a value per record and its percentile bootstrap interval; NaNs are left out.

    What is drawn is prompts: records with equal entries of `prompts` come and go together; without
    it each record is its own prompt. Of few prompts it is too narrow: it held the truth in 94 to
    96 % of simulated sets of 100 prompts, in 90 to 96 % of 10, in 75 to 79 % of 4.
    """
    x_n = np.asarray(x_n, float)
    there = ~np.isnan(x_n)
    if not there.any():
        return Interval(np.nan, np.nan, np.nan)
    prompt_n = None if prompts is None else numbered(prompts, len(x_n))[there]
    drawn = _resampled(x_n[there], draws, seed, prompt_n)
    low, high = np.quantile(drawn, [0.025, 0.975])
    return Interval(float(x_n[there].mean()), float(low), float(high))


def each(
    x_nK: np.ndarray,
    *,
    prompts: Sequence[Hashable] | None = None,
    draws: int = 2000,
    seed: int = 0,
) -> list[Interval]:
    """`interval` of K values of each record, none of them NaN, all from the same draws."""
    x_nK = np.asarray(x_nK, float)
    prompt_n = None if prompts is None else numbered(prompts, len(x_nK))
    low_K, high_K = np.quantile(_resampled(x_nK, draws, seed, prompt_n), [0.025, 0.975], axis=0)
    mean_K = x_nK.mean(0)
    return [Interval(*map(float, x)) for x in zip(mean_K, low_K, high_K, strict=True)]


def numbered(names: Sequence[Hashable], length: int) -> np.ndarray:
    """int [n], equal where the names are."""
    if len(names) != length:
        raise ValueError(f'prompts: found {len(names)}, expected {length}, one for each record')
    number: dict[Hashable, int] = {}
    return np.array([number.setdefault(name, len(number)) for name in names], int)


def paired(
    x_n: np.ndarray,
    y_n: np.ndarray,
    *,
    prompts: Sequence[Hashable] | None = None,
    draws: int = 2000,
    seed: int = 0,
) -> Interval:
    """Mean and interval of x - y, two values of each record: x is above y if `low` is above 0."""
    gap_n = np.asarray(x_n, float) - np.asarray(y_n, float)
    return interval(gap_n, prompts=prompts, draws=draws, seed=seed)


# Two models


class Comparison(NamedTuple):
    """The accuracies of two models on the same records."""

    difference: Interval  # of the first minus of the second
    first_only: int  # records on which the first alone is right, of several pairs more often right
    second_only: int
    p_value: float  # exact McNemar's

    def __str__(self) -> str:
        found = f'{self.difference}; {self.first_only} right by the first alone, '
        return f'{found}{self.second_only} by the second alone, p = {self.p_value:.2g}'


def compare(
    first_n: np.ndarray,
    second_n: np.ndarray,
    *,
    prompts: Sequence[Hashable] | None = None,
    draws: int = 2000,
    seed: int = 0,
) -> Comparison:
    """Two models by their `Pairs.accuracy`: paired bootstrap over prompts, and McNemar's test.

    The test counts records, as if no two shared a prompt; the interval does not.
    """
    gap_n = np.asarray(first_n, float) - np.asarray(second_n, float)
    up, down = int((gap_n > 0).sum()), int((gap_n < 0).sum())
    drawn = interval(gap_n, prompts=prompts, draws=draws, seed=seed)
    return Comparison(drawn, up, down, mcnemar(up, down))


def mcnemar(first_only: int, second_only: int) -> float:
    """Two-sided exact p-value of McNemar's test: discordant records fall either way like a coin."""
    n = first_only + second_only
    term = total = 1  # of the binomial tail, in whole numbers
    for k in range(min(first_only, second_only)):
        term = term * (n - k) // (k + 1)
        total += term
    return min(1.0, 2 * total / 2**n)
