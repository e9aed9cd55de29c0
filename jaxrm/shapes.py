"""Pack shapes: how many tokens, and how many rows of which lengths, suit a data set."""

import numpy as np

from jaxrm import packing
from jaxrm.packing import Shape
from jaxrm.tokens import Tokens

# What `fit` tries: ends of row classes beside the maximum, and rows over what is expected.
QUANTILES = (), (0.6,), (0.5, 0.9), (0.4, 0.8), (0.5, 0.8, 0.97), (0.25, 0.5, 0.75, 0.95)
SLACKS = 1.0, 1.1, 1.25, 1.4, 1.6, 1.8


def _shape(tokens: Tokens, size: int, quantiles, multiple: int, slack: float) -> Shape:
    """Row classes end at quantiles of row length and at the maximum, rounded up to `multiple`.

    There are `slack` times as many rows of each as a full pack is expected to need (packs of short
    records need more), and never fewer than any single record takes.
    """
    length, total = packing.row_lengths(tokens), np.diff(tokens.start)
    ends = np.quantile(length, [*quantiles, 1.0])
    ends = np.unique(np.ceil(ends / multiple).astype(int) * multiple)
    records = size / total.mean()
    guess = Shape(size, tuple((0, int(s)) for s in ends), 1, 1)
    most = packing.needs(tokens, guess)[:, 2:].max(0)  # rows of at least each class, of one record
    rows: list[tuple[int, int]] = []
    longer = 0
    for k in reversed(range(len(ends))):
        low = ends[k - 1] if k else 0
        share = ((length > low) & (length <= ends[k])).sum() / len(total)
        count = max(round(share * records * slack), int(most[k]) - longer, 1)
        longer += count
        rows.insert(0, (int(count), int(ends[k])))
    prompts, candidates = int(np.ceil(records * 1.6)) + 1, int(np.diff(tokens.first).max())
    return Shape(size, tuple(rows), prompts, candidates)


def cost(shape: Shape, packs: int, *, width: int) -> float:
    """Token equivalents of a forward pass over `packs`: linears, and causal attention on rows.

    A decoder layer of width D costs about 24 D^2 FLOPs a token in its linears and 2 D S^2 a row
    of causal attention, hence S^2 / 12 D tokens.
    """
    return packs * (shape.tokens + sum(r * s * s for r, s in shape.rows) / (12 * width))


def fit(tokens: Tokens, *, size: int, width: int = 4096, multiple: int = 128) -> Shape:
    """The cheapest of some pack shapes of about `size` tokens, by packing a sample of the data.

    `size` grows to hold the longest record. Raises ValueError when there is no record.
    """
    n = len(tokens.start) - 1
    if not n:
        raise ValueError('no record to fit a pack shape to')
    size = -(-max(size, int(np.diff(tokens.start).max())) // multiple) * multiple
    sample = np.random.default_rng(0).permutation(n)[:2048]

    def priced(shape: Shape) -> tuple[float, Shape]:
        return cost(shape, len(packing.plan(tokens, shape, order=sample)), width=width), shape

    best = None
    for ends in QUANTILES:
        tried = (priced(_shape(tokens, size, ends, multiple, slack)) for slack in SLACKS)
        found = min(tried, key=lambda x: x[0])
        worth = 0.99 if len(ends) > 3 else 1.0  # a fifth class has to save a percent
        if best is None or found[0] < worth * best[0]:
            best = found
    assert best is not None
    return best[1]
