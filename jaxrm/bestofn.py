"""Best-of-n: what the answer a proxy picks of n samples is worth, against n and its KL.

Each prompt has N sampled answers, with a score by the proxy and a gold score of each, in the same
order. `best` is the mean over every subset of n, `nested` the first n samples as they came.
"""

import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from jaxrm.intervals import Interval, interval

Values = Sequence[np.ndarray]  # [N] of every prompt


def kl(n: int) -> float:
    """KL of best-of-n from the policy it samples, in nats: log n - (n-1)/n (arXiv 2210.10760)."""
    if n < 1:
        raise ValueError(f'n: found {n}, expected at least 1')
    return math.log(n) - (n - 1) / n


def chances(N: int, n: int) -> np.ndarray:
    """[N] the chance that the i-th lowest of N is the highest of n drawn: C(i-1, n-1) / C(N, n).

    By the logarithms of each binomial over the next one, so that no N is too large.
    """
    if not 1 <= n <= N:
        raise ValueError(f'n: found {n}, expected 1 to {N}, the number of samples')
    i = np.arange(n + 1, N + 1)
    log_i = np.cumsum(np.log((i - n) / (i - 1))[::-1])[::-1]  # over the chance of the highest
    return n / N * np.concatenate([np.zeros(n - 1), np.exp(log_i), np.ones(1)])


def expected(proxy_N: np.ndarray, gold_N: np.ndarray, n: int) -> float:
    """Mean gold of what the proxy picks, over all subsets of n; of equal scores any is picked.

    The unbiased estimate from N samples of what best-of-n is worth.
    """
    chance_N = chances(len(proxy_N), n)
    rank_N = np.argsort(np.argsort(proxy_N, kind='stable'))
    _, tied_N = np.unique(proxy_N, return_inverse=True)
    shared_k = np.bincount(tied_N, chance_N[rank_N]) / np.bincount(tied_N)
    return float(shared_k[tied_N] @ gold_N)


def best(proxy: Values, gold: Values, ns: Sequence[int]) -> np.ndarray:
    """[B, K] `expected` of every prompt for each n; best(gold, gold, ns) is the oracle's.

    With gold 1 for right and 0 for wrong, the oracle's is the unbiased pass@n.
    """
    _check(proxy, gold)
    pairs = zip(proxy, gold, strict=True)
    return np.array([[expected(p, np.asarray(g, float), n) for n in ns] for p, g in pairs])


def nested(proxy: Values, gold: Values, ns: Sequence[int]) -> np.ndarray:
    """[B, K] gold of the first highest of each prompt's first n samples."""
    _check(proxy, gold)
    return _first(gold, ns, lambda b, n: int(np.argmax(proxy[b][:n])))


def passes(gold: Values, ns: Sequence[int]) -> np.ndarray:
    """[B, K] gold of the best of the first n samples: pass@n, where gold is 1 for right."""
    return nested(gold, gold, ns)


def majority(answers: Sequence[Sequence[Hashable]], gold: Values, ns: Sequence[int]) -> np.ndarray:
    """[B, K] gold of the most frequent answer of the first n, None none; of equals the first.

    Where no sample has an answer, the first sample counts.
    """
    _check_lengths(answers, gold)

    def pick(b: int, n: int) -> int:
        votes: dict[Hashable, int] = {}
        for answer in answers[b][:n]:
            if answer is not None:
                votes[answer] = votes.get(answer, 0) + 1
        return answers[b].index(max(votes, key=lambda a: votes[a])) if votes else 0

    return _first(gold, ns, pick)


def floor(gold: Values, ns: Sequence[int]) -> np.ndarray:
    """[B, K] gold of a sample picked blindly, the same for every n."""
    return np.repeat(np.array([[np.mean(g)] for g in gold]), len(ns), axis=1)


def _first(gold: Values, ns: Sequence[int], pick: Callable[[int, int], int]) -> np.ndarray:
    least = min(map(len, gold), default=0)
    if bad := [n for n in ns if not 1 <= n <= least]:
        raise ValueError(
            f'n: found {bad[0]}, expected 1 to {least}, the fewest samples of a prompt'
        )
    return np.array([[float(gold[b][pick(b, n)]) for n in ns] for b in range(len(gold))])


def _check(scores: Values, gold: Values) -> None:
    """Raises ValueError unless every sample has both, as finite numbers."""
    _check_lengths(scores, gold)
    for b, both in enumerate(zip(scores, gold, strict=True)):
        if not np.isfinite(np.array(both, float)).all():
            raise ValueError(f'prompt {b}: found a score that is not finite, expected numbers')


def _check_lengths(given: Sequence[Sequence | np.ndarray], gold: Values) -> None:
    found, want = [len(x) for x in given], [len(g) for g in gold]
    if found != want or 0 in want:
        raise ValueError(
            f'samples: found {found[:9]} of each prompt and {want[:9]} gold scores, expected the '
            'same number, at least 1'
        )


class Curve(NamedTuple):
    """Means over prompts with their intervals, for each n."""

    n: tuple[int, ...]
    kl: tuple[float, ...]
    proxy: tuple[Interval, ...]
    gold: tuple[Interval, ...]
    decline: Interval  # gold at its peak minus gold at the last n, prompt by prompt

    @property
    def peak(self) -> int:
        """The n with the highest gold."""
        return self.n[max(range(len(self.n)), key=lambda k: self.gold[k].mean)]


def curve(
    proxy: Values, gold: Values, ns: Sequence[int], *, draws: int = 2000, seed: int = 0
) -> Curve:
    """Gold and proxy of best-of-n; intervals over prompts.

    A decline is over-optimisation, and above 0 as it is measured from the highest of noisy means:
    compare it between proxies, or choose the peak on other prompts.
    """
    found = {'proxy': best(proxy, proxy, ns), 'gold': best(proxy, gold, ns)}
    say = lambda x_B: interval(x_B, draws=draws, seed=seed)  # noqa: E731
    means = {k: tuple(say(x_B) for x_B in x_BK.T) for k, x_BK in found.items()}
    gold_BK = found['gold']
    top = int(gold_BK.mean(0).argmax())
    decline = say(gold_BK[:, top] - gold_BK[:, -1])
    return Curve(tuple(ns), tuple(map(kl, ns)), means['proxy'], means['gold'], decline)


def table(
    proxies: Mapping[str, Values],
    gold: Values,
    ns: Sequence[int],
    *,
    answers: Sequence[Sequence[Hashable]] | None = None,
) -> dict[str, np.ndarray]:
    """[B, K] gold of the first n by each proxy, of a blind pick, the oracle, and the majority."""
    found = {name: nested(proxy, gold, ns) for name, proxy in proxies.items()}
    found |= {'random': floor(gold, ns), 'oracle': passes(gold, ns)}
    return found if answers is None else {**found, 'majority': majority(answers, gold, ns)}
