"""Token trees of a data set."""

from typing import NamedTuple

import numpy as np


class Tokens(NamedTuple):
    """Columnar token trees."""

    ids: np.ndarray
    start: np.ndarray
    prompt: np.ndarray
    gate: np.ndarray
    first: np.ndarray
    length: np.ndarray
    rank: np.ndarray
    margin: np.ndarray
    rating: np.ndarray
    smoothing: np.ndarray
    group: np.ndarray
    record: np.ndarray
    candidate: np.ndarray
