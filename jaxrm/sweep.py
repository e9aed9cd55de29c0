"""How much of another model to mix into a reward model: scores at many shares, and the choice.

(1 - share) of the reward model and share of the other are mixed inside the scorer (`reward.blend`):
a sweep is one program and writes nothing. With a language model of a domain as the other this is
DogeRM (arXiv 2407.01470), whose released code writes a checkpoint for each of 21 shares and has no
rule to choose one. Letters: S shares, n records, c candidates.
"""

from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple

import numpy as np
from jax.sharding import Mesh

from jaxrm import evaluate, intervals, packing, reward, sharding, tree
from jaxrm.intervals import Comparison, Interval
from jaxrm.tokens import Tokens

SHARES = tuple(i / 20 for i in range(21))


def scores(
    score: Callable[..., Any],
    params: tree.Tree,
    other: tree.Tree,
    tokens: Tokens,
    shape: packing.Shape,
    *,
    shares: Sequence[Any] = SHARES,
    mesh: Mesh,
    packs: int,
) -> np.ndarray:
    """[S, c] scores of every candidate; `score` is compiled, `other` is a backbone's tree.

    A share is one number, or [L], one a layer. Options as in evaluate.candidate_scores.
    """
    params, other = (sharding.place(x, mesh) for x in (params, other))
    out = []
    for share in shares:
        blended = {**params, 'blend': reward.blend(params['backbone'], other, share)}
        out.append(evaluate.candidate_scores(score, blended, tokens, shape, mesh=mesh, packs=packs))
    return np.stack(out)


class Choice(NamedTuple):
    """A share chosen on validation records, and what it is worth on others.

    `gap` is what the best share of the test records would add, which nobody can know: it is biased
    upwards, as it is a maximum over all shares.
    """

    row: int
    share: float
    test: Interval  # accuracy at the chosen share
    unmerged: Interval  # and at share 0
    gain: Comparison  # of the two, pair by pair
    best: float  # share with the highest accuracy on the test records
    gap: float


def choose(
    shares: Sequence[float],
    validation_Sn: np.ndarray,
    test_Sm: np.ndarray,
    *,
    prompts: Sequence[Hashable] | None = None,
) -> Choice:
    """The share of the highest mean accuracy on the validation records, the smallest of equals.

    Accuracies are those of evaluate.pairs, by record; `prompts` are the test records'. Raises
    ValueError without the share 0, the model as it was.
    """
    for name, x in (('validation', validation_Sn), ('test', test_Sm)):
        if len(x) != len(shares):
            raise ValueError(f'{name}: found {len(x)} rows, expected {len(shares)}, one a share')
    if 0 not in shares:
        raise ValueError(f'shares: found {list(shares)}, expected 0 among them')
    first = shares.index(0)
    row = best_of(shares, validation_Sn)
    best = best_of(shares, test_Sm)
    gap = np.nanmean(test_Sm[best]) - np.nanmean(test_Sm[row])
    there_m = ~np.isnan(test_Sm[row])
    names = None if prompts is None else [p for p, t in zip(prompts, there_m, strict=True) if t]
    at, was = test_Sm[row][there_m], test_Sm[first][there_m]
    return Choice(
        row,
        shares[row],
        intervals.interval(at, prompts=names),
        intervals.interval(was, prompts=names),
        intervals.compare(at, was, prompts=names),
        shares[best],
        float(gap),
    )


def best_of(shares: Sequence[float], right_Sn: np.ndarray) -> int:
    """The row of the highest mean accuracy; of equal ones the smallest share's."""
    means = np.round(np.nanmean(right_Sn, axis=1), 12)
    return min(range(len(shares)), key=lambda s: (-means[s], shares[s]))


class Drift(NamedTuple):
    """Mean and standard deviation of the rewards at every share, [S]."""

    mean_S: np.ndarray
    std_S: np.ndarray


def drift(score_Sc: np.ndarray) -> Drift:
    """How rewards move and spread as the other model comes in: thresholds do not carry over."""
    return Drift(score_Sc.mean(1), score_Sc.std(1))
