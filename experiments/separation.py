"""How far apart the features of better and worse answers are, and intervals over seeds and prompts.

Letters: E members, n pairs, c answers, of which the even ones are the better ones, D width.
"""

import numpy as np
from scipy.optimize import minimize

from jaxrm.intervals import Interval

Array = np.ndarray


def probe(z_cD: Array, penalty: float = 1.0) -> Array:
    """[c / 2] bool: the answers of the second half that a logistic regression tells right.

    It knows the first half; features are scaled by its mean and deviation, and the constant is
    free.
    """
    half = len(z_cD) // 4 * 2
    z_cD = (z_cD - z_cD[:half].mean(0)) / (z_cD[:half].std(0) + 1e-6)
    x = np.column_stack([z_cD, np.ones(len(z_cD))]).astype(np.float64)
    sign_c = np.where(np.arange(len(x)) % 2, -1.0, 1.0)
    seen, sign = x[:half], sign_c[:half]

    def loss(w: Array) -> tuple[float, Array]:
        z, held = sign * (seen @ w), np.append(w[:-1], 0)
        pull = -seen.T @ (sign / (1 + np.exp(z))) + penalty * held
        return np.logaddexp(0, -z).sum() + penalty * held @ held / 2, pull

    found = minimize(loss, np.zeros(x.shape[1]), jac=True, method='L-BFGS-B')
    return sign_c[half:] * (x[half:] @ found.x) > 0


def silhouette(z_cD: Array) -> float:
    """Mean of (b - a) / max(a, b): distances in the mean to the other kind, and to one's own."""
    z = z_cD.astype(np.float64)
    square = (z**2).sum(1)
    apart = np.sqrt(np.maximum(square[:, None] + square[None] - 2 * z @ z.T, 0))
    np.fill_diagonal(apart, 0)
    kind, c = np.arange(len(z)) % 2, np.arange(len(z))
    total = np.stack([apart[:, 0::2].sum(1), apart[:, 1::2].sum(1)])
    a, b = total[kind, c] / (len(z) // 2 - 1), total[1 - kind, c] / (len(z) // 2)
    return float(((b - a) / np.maximum(a, b)).mean())


def plane(z_cD: Array) -> Array:
    """[c, 2] the two principal components."""
    away = z_cD - z_cD.mean(0)
    return away @ np.linalg.svd(away, full_matrices=False)[2][:2].T


def crossed(x_En: Array, *, draws: int = 2000) -> Interval:
    """Mean, and its 95 % bootstrap interval over members and pairs, both drawn anew.

    Pairs with a NaN are left out. Of few members it is too narrow: the variance of five drawn with
    replacement is 4/5 of what it should be.
    """
    x_En = x_En[:, ~np.isnan(x_En).any(0)]
    rng = np.random.default_rng(0)
    of_E, of_n = (rng.multinomial(k, np.full(k, 1 / k), size=draws) / k for k in x_En.shape)
    low, high = np.quantile(((of_E @ x_En) * of_n).sum(1), [0.025, 0.975])
    return Interval(float(x_En.mean()), float(low), float(high))


def points(gap_En: Array) -> str:
    """A difference in hundredths, with its interval."""
    mean, low, high = (100 * x for x in crossed(gap_En))
    return f'{mean:+.1f} [{low:+.1f}, {high:+.1f}]'


def digits(right_n: Array) -> str:
    """A digit each, for a result file."""
    return ''.join(str(int(x)) for x in right_n)


def of_digits(texts: list[str]) -> Array:
    """[E, n] float of a text for each member."""
    return np.array([list(map(int, text)) for text in texts], float)
