"""Preference strength: how far an ensemble prefers each pair's better answer, and what follows.

The mean over reward models of the score difference says which labels are likely to be wrong
(Secrets of RLHF II, arXiv 2401.06080, section 2). A recipe makes of it what each pair is learned
with: whether it is turned round, how far its label is softened, and its margin.

Letters: E members, n pairs, c candidates, K folds.
"""

import hashlib
import json
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxrm import statistics
from jaxrm.records import Preference
from jaxrm.statistics import Calibration
from jaxrm.tokens import Tokens

Array = np.ndarray


class Strength(NamedTuple):
    """Of each pair, over the members: float64 [n]."""

    mean_n: Array  # below 0 where the members prefer the answer that is labelled worse
    std_n: Array  # of the population: E divides


def gaps(score_Ec: Array, tokens: Tokens) -> Array:
    """[E, n] float64, each pair's score of the better answer minus that of the worse.

    Raises ValueError for records that are not an ordered pair, and for scores in half precision:
    what is to be found are small differences of large scores.
    """
    score_En2 = sides(score_Ec, tokens).astype(np.float64)
    return score_En2[..., 0] - score_En2[..., 1]


def sides(score_Ec: Array, tokens: Tokens) -> Array:
    """[E, n, 2] scores of each pair's better and worse answer, as `annotations.save` wants them.

    Raises ValueError as `gaps` does.
    """
    if score_Ec.dtype not in (np.float32, np.float64):
        raise ValueError(f'scores: found {score_Ec.dtype}, expected float32')
    if score_Ec.shape[1:] != tokens.rank.shape:
        shape = f'[members, {len(tokens.rank)}]'
        raise ValueError(f'scores: found {list(score_Ec.shape)}, expected {shape}')
    better_n = _better(tokens)
    return np.stack([score_Ec[:, better_n], score_Ec[:, better_n ^ 1]], axis=-1)


def _better(tokens: Tokens) -> Array:
    """[n] candidate that is the better one; the other is its neighbour, `^ 1`."""
    if not (np.diff(tokens.first) == 2).all():
        raise ValueError('tokens: found a record without exactly two answers, expected pairs')
    rank_n2 = tokens.rank.reshape(-1, 2)
    if (bad := np.flatnonzero((rank_n2[:, 0] == rank_n2[:, 1]) | (rank_n2 < 0).any(1))).size:
        where = f'record {tokens.record[bad[0]]}'
        raise ValueError(f'{where}: found ranks {rank_n2[bad[0]].tolist()}, expected an order')
    return 2 * np.arange(len(rank_n2)) + rank_n2.argmin(1)


def strength(gap_En: Array, *, scaled: bool = False) -> Strength:
    """Mean and population deviation over the members.

    A member whose scores are larger weighs more; `scaled` divides each one's differences by their
    root mean square first. Raises ValueError for what is no number, and then for a member that
    scores all answers alike.
    """
    gap_En = _numbers('differences', gap_En, 'members', 'pairs')
    if scaled:
        size_E1 = np.sqrt(np.square(gap_En).mean(1, keepdims=True))
        if (flat := np.flatnonzero(size_E1 == 0)).size:
            raise ValueError(f'member {flat[0]}: found no difference but 0, expected some')
        gap_En = gap_En / size_E1
    return Strength(gap_En.mean(0), gap_En.std(0))


def _numbers(name: str, x: Any, *axes: str) -> Array:
    """float64; ValueError for another number of axes, an empty one, and what is not finite."""
    x = np.asarray(x, np.float64)
    if x.ndim != len(axes) or not x.size:
        raise ValueError(f'{name}: found {list(x.shape)}, expected [{", ".join(axes)}]')
    if (bad := np.argwhere(~np.isfinite(x))).size:
        raise ValueError(f'{name} {bad[0].tolist()}: found {x[*bad[0]]}, expected a finite number')
    return x


def _within(name: str, value: float, ok: bool, expected: str) -> None:
    if not ok:
        raise ValueError(f'{name}: found {value}, expected {expected}')


def lowest(mean_n: Array, share: float) -> Array:
    """[n] bool, the share of pairs of least strength; of equal ones the first."""
    _within('share', share, 0 <= share <= 1, 'from 0 to 1')
    out = np.zeros(len(mean_n), bool)
    out[np.argsort(mean_n, kind='stable')[: round(share * len(mean_n))]] = True
    return out


# Out of fold, and what training on one's own labels does to them


def folds(prompts: Sequence[Any], parts: int, *, seed: int = 0) -> Array:
    """int [n], the fold of each pair: equal prompts share one, and folds have about equally many.

    Prompts are values of JSON. The order of the pairs does not matter.
    """
    if parts < 2:
        raise ValueError(f'folds: found {parts}, expected at least 2')
    texts = [json.dumps([seed, prompt]) for prompt in prompts]
    draw = {text: hashlib.sha256(text.encode()).digest() for text in texts}
    place = {text: i for i, text in enumerate(sorted(draw, key=draw.__getitem__))}
    return np.array([place[text] % parts for text in texts])


def without(tokens: Tokens, where_n: Array) -> Tokens:
    """The same tokens, in which the pairs in `where_n` are ties: nothing is learned from them."""
    return tokens._replace(rank=np.where(np.repeat(where_n, 2), 0, tokens.rank))


def out_of_fold(gap_KEn: Array, fold_n: Array) -> Array:
    """[E, n] of each pair by the members that learned without its fold."""
    K, n = gap_KEn.shape[0], gap_KEn.shape[-1]
    if gap_KEn.ndim != 3 or fold_n.shape != (n,):
        found = f'{list(gap_KEn.shape)} and {list(fold_n.shape)}'
        raise ValueError(f'differences and folds: found {found}, expected [K, E, n] and [n]')
    if (bad := np.flatnonzero((fold_n < 0) | (fold_n >= K))).size:
        raise ValueError(f'fold of pair {bad[0]}: found {fold_n[bad[0]]}, expected 0 to {K - 1}')
    return np.ascontiguousarray(gap_KEn[fold_n, :, np.arange(len(fold_n))].T)


class Fit(NamedTuple):
    """How many of their own labels the members agree with, and the most they should."""

    accuracy: float
    limit: float

    @property
    def memorised(self) -> bool:
        return self.accuracy > self.limit


def fit(mean_n: Array, noise: float) -> Fit:
    """For labels of which a share `noise` is expected to be wrong.

    Members that know better than their labels agree with 1 - noise of them, but for chance (three
    standard errors); with more, they have learned wrong labels by heart, and what is below 0 says
    little about the others. Short training or `out_of_fold` helps. Raises ValueError for no
    pairs, for what is no number, and for a noise that is not from 0 to below 0.5.
    """
    mean_n = _numbers('strength', mean_n, 'pairs')
    _within('noise', noise, 0 <= noise < 0.5, 'from 0 to below 0.5')
    slack = 3 * math.sqrt(noise * (1 - noise) / len(mean_n))
    return Fit(float((mean_n > 0).mean()), 1 - noise + slack)


def check_fit(mean_n: Array, noise: float) -> None:
    """Raises ValueError if the members memorised their labels."""
    found = fit(mean_n, noise)
    if found.memorised:
        raise ValueError(
            f'strength: the ensemble agrees with {found.accuracy:.3f} of the labels it learned, '
            f'expected at most {found.limit:.3f} where {noise:.0%} are wrong: it memorised them'
        )


# Recipes


class Repair(NamedTuple):
    """What each pair is learned with, [n]."""

    swap_n: Array  # bool, the answers trade places
    alpha_n: Array  # float32, how far the label is softened
    margin_n: Array  # float32, by how much the better answer is to win, after the swap
    keep_n: Array  # bool


def repair(
    mean_n: Array,
    *,
    swap_n: Array | None = None,
    keep_n: Array | None = None,
    soft_n: Array | None = None,
    alpha: float = 0.0,
    temperature: float | None = None,
    scale: float = 0.0,
    clip: float = math.inf,
) -> Repair:
    """Turns `swap_n` round, drops all but `keep_n`, softens `soft_n`, gives all a margin.

    The margin is `scale` times the strength within +-`clip`, of a swapped pair the negated one:
    it belongs to the new order. Soft labels are `alpha`, or with a temperature 1 - sigmoid(mean /
    temperature), by default of pairs below 0; a swapped pair has none. Raises ValueError for
    options out of their ranges, and for arrays of another length.
    """
    mean_n = _numbers('strength', mean_n, 'pairs')
    _within('alpha', alpha, 0 <= alpha <= 1, 'from 0 to 1')
    _within('clip', clip, clip > 0, 'above 0')
    _within('scale', scale, 0 <= scale < math.inf, 'from 0 on')
    if temperature is not None:
        _within('temperature', temperature, 0 < temperature < math.inf, 'above 0')
    for name, x_n in (('swap_n', swap_n), ('keep_n', keep_n), ('soft_n', soft_n)):
        if x_n is not None and x_n.shape != mean_n.shape:
            raise ValueError(f'{name}: found {list(x_n.shape)}, expected {list(mean_n.shape)}')
    none_n = np.zeros(len(mean_n), bool)
    swap_n = none_n if swap_n is None else swap_n
    soft_n = (mean_n < 0 if soft_n is None else soft_n) & ~swap_n
    if temperature is not None:
        softness_n = np.exp(-np.logaddexp(0, mean_n / temperature))
    else:
        softness_n = np.full(len(mean_n), alpha)
    margin_n = scale * np.clip(np.where(swap_n, -mean_n, mean_n), -clip, clip)
    return Repair(
        swap_n,
        np.where(soft_n, softness_n, 0).astype(np.float32),
        margin_n.astype(np.float32),
        ~none_n if keep_n is None else keep_n,
    )


PARTS = ('flip', 'random flip', 'drop', 'soft label', 'margin')
PUBLISHED = ('flip', 'margin', 'flip + margin', 'soft label + margin')
CONTRARY = (('flip', 'drop'), ('flip', 'random flip'))  # the same pairs, or the control


def recipe(
    name: str,
    mean_n: Array,
    *,
    share: float = 0.1,
    alpha: float = 0.1,
    temperature: float | None = None,
    scale: float = 1.0,
    clip: float = math.inf,
    seed: int = 0,
) -> Repair:
    """The recipe of this name: one of PARTS, or several joined by ' + ', as the PUBLISHED ones are.

    `share` of the pairs is flipped or dropped, those of least strength; as many random ones, drawn
    by the seed, are what to compare with. The paper gives no share and no alpha. For a rule by sign
    or threshold use `repair` itself: `repair(mean_n, swap_n=mean_n < tau)`, with `keep_n=mean_n >=
    tau` to drop. Raises ValueError for parts that are unknown or CONTRARY, and as `repair` does.
    """
    parts = name.split(' + ')
    if unknown := set(parts) - set(PARTS):
        raise ValueError(f'recipe: found {sorted(unknown)}, expected some of {PARTS}')
    if any(set(pair) <= set(parts) for pair in CONTRARY):
        raise ValueError(f'recipe: found {name!r}, expected no two of {CONTRARY}')
    low_n = lowest(mean_n, share)
    drawn_n = lowest(np.random.default_rng(seed).random(len(mean_n)), share)
    swap_n = (low_n & ('flip' in parts)) ^ (drawn_n & ('random flip' in parts))
    return repair(
        mean_n,
        swap_n=swap_n,
        keep_n=~low_n if 'drop' in parts else None,
        soft_n=None if 'soft label' in parts else np.zeros(len(mean_n), bool),
        alpha=alpha,
        temperature=temperature,
        scale=scale if 'margin' in parts else 0.0,
        clip=clip,
    )


def relabelled(tokens: Tokens, how: Repair) -> Tokens:
    """The same pairs with the repair's ranks, margins and smoothing, to learn from.

    A pair that is dropped is a tie: the packs stay as they are. Scores are compared without
    margins, so sets to evaluate on are left alone. Raises ValueError for a repair of other pairs.
    """
    _check_length(how, len(tokens.prompt))
    better_n = np.where(how.swap_n, _better(tokens) ^ 1, _better(tokens))
    rank_c, margin_c = np.ones(len(tokens.rank), np.int32), np.zeros(len(tokens.rank), np.float32)
    rank_c[better_n], margin_c[better_n] = 0, how.margin_n
    new = tokens._replace(rank=rank_c, margin=margin_c, smoothing=how.alpha_n)
    return without(new, ~how.keep_n)


def _check_length(how: Repair, n: int) -> None:
    for name, x_n in how._asdict().items():
        if x_n.shape != (n,):
            raise ValueError(f'{name}: found {list(x_n.shape)}, expected [{n}], one of each pair')


def repaired(records: Sequence[Preference], how: Repair) -> list[Preference]:
    """The records that are kept, the better answer first, with margin and smoothing.

    Raises ValueError for a record that is not an ordered pair, and for a repair of other pairs.
    """
    _check_length(how, len(records))
    out = []
    rows = zip(records, how.swap_n, how.alpha_n, how.margin_n, how.keep_n, strict=True)
    for i, (record, swap, alpha, margin, keep) in enumerate(rows):
        if sorted(record.ranks or ()) != [0, 1]:
            raise ValueError(f'record {i}: found ranks {record.ranks}, expected an ordered pair')
        order = [0, 1] if (record.ranks == (0, 1)) != swap else [1, 0]
        if keep:
            out.append(_ordered(record, order, float(margin), float(alpha)))
    return out


def _ordered(record: Preference, order: list[int], margin: float, alpha: float) -> Preference:
    pick = lambda values: values and tuple(values[m] for m in order)  # noqa: E731
    return record._replace(
        responses=pick(record.responses),
        ratings=pick(record.ratings),
        ranks=(0, 1),
        margins=(margin, 0.0),
        smoothing=alpha,
    )


# What strength is worth


def auroc(score_n: Array, positive_n: Array) -> float:
    """How often a positive scores above a negative, ties half; NaN without one of either."""
    positive_n = np.asarray(positive_n, bool)
    _, at, count = np.unique(score_n, return_inverse=True, return_counts=True)
    rank_n = (np.cumsum(count) - (count - 1) / 2)[at]
    p, q = int(positive_n.sum()), int((~positive_n).sum())
    return float((rank_n[positive_n].sum() - p * (p + 1) / 2) / (p * q)) if p and q else math.nan


def bins(mean_n: Array, parts: int) -> list[Array]:
    """Indices of the pairs in `parts` groups of about equally many, by rising strength."""
    _within('groups', parts, 1 <= parts <= len(mean_n), f'1 to {len(mean_n)}, the pairs')
    return np.array_split(np.argsort(mean_n, kind='stable'), parts)


class Agreement(NamedTuple):
    """How often other labels, such as a judge's, agree with those given, by strength."""

    mean_b: Array  # strength in each group
    share_b: Array  # of labels that agree
    spearman: float  # of the two


def agreement(mean_n: Array, agrees_n: Array, parts: int) -> Agreement:
    """In groups of about equally many pairs."""
    groups = bins(mean_n, parts)
    mean_b, share_b = (np.array([x[i].mean() for i in groups]) for x in (mean_n, agrees_n))
    return Agreement(mean_b, share_b, statistics.spearman(mean_b, share_b))


def calibration(mean_n: Array, gap_n: Array, parts: int) -> list[Calibration]:
    """Of a model's score differences, with the sign of labels that are right, by strength."""
    groups = bins(mean_n, parts)
    return [statistics.calibration(gap_n[i], np.ones(len(i))) for i in groups]
