"""Merges of task vectors d_i = x_i - x_0: some entries of each are dropped, the rest added up.

In this order: drop, rescale, weigh, elect signs (the `ties` kinds), sum, normalize, times lambda.
Task arithmetic (arXiv 2212.04089), TIES (2306.01708), DARE (2311.03099), breadcrumbs (2312.06795),
DELLA (2406.11617). Letters: R rows, C columns of an array as a matrix.
"""

import functools
import zlib
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxrm.merge_dense import TINY, Array, host, in_float32, moved

u32 = functools.partial(jnp.asarray, dtype=jnp.uint32)
RULES: dict[Any, str] = {False: 'none', True: 'l1'}


def merge(
    xs: Sequence[Array],
    base: Array,
    dtype: Any,
    *,
    name: str,
    seed: int,
    masks: Sequence[Array] | None,
    weight: Sequence[float],
    density: Sequence[float],
    normalize: bool,
    rescale: bool | str,
    scale: float,
    drop: str | None,
    sign: str | None = None,
    gamma: Sequence[float] | None = None,
    epsilon: Sequence[float] | None = None,
) -> jax.Array:
    """Any of the family: `drop` says how entries are dropped, `sign` how signs are elected.

    `scale` is lambda. Of n entries `density` keeps int(density n); all at 1 and none at 0.
    """
    more: Sequence[float] = gamma or epsilon or [0.0] * len(xs)
    kept = [
        _kept(x, base, drop, p, q, _key(seed, name, i))
        for i, (x, p, q) in enumerate(zip(xs, density, more, strict=True))
    ]
    if masks is not None:
        kept = [jnp.asarray(mask, bool) for mask in masks]
    rule = RULES.get(rescale, str(rescale))
    factor = [
        _factor(rule, x, base, mask, drop, p, q)
        for x, mask, p, q in zip(xs, kept, density, more, strict=True)
    ]
    f32 = functools.partial(np.asarray, dtype=np.float32)
    numbers = f32(weight), f32(scale), f32(_divisor(weight))
    return _added(xs, base, kept, factor, *numbers, dtype=dtype, sign=sign, normalize=normalize)


def check_epsilon(density: Sequence[float], epsilon: Sequence[float]) -> None:
    """Raises ValueError where a chance of keeping an entry would not be between 0 and 1."""
    for p, q in zip(density, epsilon, strict=True):
        if 0 < p < 1 and not 0 < p - q <= p + q < 1:
            raise ValueError(
                f'density: found {p} and epsilon {q}, expected density - epsilon and density + '
                'epsilon between 0 and 1'
            )


def _divisor(weight: Sequence[float]) -> float:
    return sum(weight) if abs(sum(weight)) > TINY else 1.0


def _key(seed: int, name: str, place: int) -> jax.Array:
    """Of an array's name and an input's place: not of what was merged before."""
    key = jax.random.fold_in(jax.random.key(seed), zlib.crc32(name.encode()))
    return jax.random.fold_in(key, place)


@in_float32
def _added(xs, base, kept, factor, weight, scale, divisor, *, sign, normalize):
    """x_0 + lambda * sum of weighted steps, over the weights that took part if `normalize`."""
    steps = [
        w * (f * (x - base if k is None else jnp.where(k, x - base, 0.0)))
        for w, f, k, x in zip(weight, factor, kept, xs, strict=True)
    ]
    if sign is not None:
        votes = steps if sign == 'sum' else [jnp.sign(s) for s in steps]
        elected = jnp.where(sum(votes) >= 0, 1.0, -1.0)
        agree = [jnp.sign(s) == elected for s in steps]
        steps = [jnp.where(a, s, 0.0) for a, s in zip(agree, steps, strict=True)]
        divisor = sum(jnp.where(a, w, 0.0) for a, w in zip(agree, weight, strict=True))
        divisor = jnp.where(jnp.abs(divisor) < TINY, 1.0, divisor)
    total = sum(steps) / divisor if normalize else sum(steps)
    return moved(base, scale * total)


# Rescaling


def _factor(
    rule: str, x: Array, base: Array, mask: Any, drop: str | None, density: float, epsilon: float
) -> Any:
    """What makes up for the entries that were dropped: a number, or an array of one each."""
    if mask is None or rule == 'none':
        return np.float32(1)
    if rule == 'l1':
        whole, left = host(_sums(x, base, mask)).sum(1)
        return np.float32(whole / left if left else 1)
    if drop == 'rank':
        numbers = np.float32(density), np.float32(epsilon)
        return 1 / _chances([x], base, *numbers) if 0 < density < 1 else np.float32(1)
    return np.float32(1 / density if density else 1)


def _sums(x: Array, base: Array, mask: Array) -> jax.Array:
    """[2, R]: sums of |d| over rows, of all entries and of those kept."""
    return _row_sums([x], base, mask)


@in_float32
def _row_sums(xs, base, mask):
    (x,) = xs
    size = jnp.abs(x - base)
    pair = jnp.stack([jnp.sum(size, -1), jnp.sum(jnp.where(mask, size, 0.0), -1)])
    return pair.reshape(2, -1)


# Dropping


def _kept(
    x: Array, base: Array, drop: str | None, density: float, more: float, key: jax.Array
) -> jax.Array | None:
    """bool, as x; None where all are kept."""
    if drop is None or density >= 1:
        return None
    if density <= 0:
        return jnp.zeros(x.shape, bool)
    if drop == 'smallest':
        first, count = 0, max(int(density * x.size), 1)
    elif drop == 'extremes':
        count = int(density * x.size)
        first = min(int(more * x.size), x.size - count)
    elif drop == 'chance':
        return _drawn(key, np.float32(density), x.shape)
    else:
        return _drawn(key, _chances([x], base, np.float32(density), np.float32(more)), x.shape)
    return _ranked(
        [x], base, np.uint32(first), np.uint32(first + count), skip=first > 0, dtype=bool
    )


@functools.partial(jax.jit, static_argnames='shape')
def _drawn(key, chance, shape):
    return jax.random.bernoulli(key, chance, shape)


@in_float32
def _chances(xs, base, density, epsilon):
    """Of keeping each entry: from density - epsilon for a row's smallest to density + epsilon."""
    (x,) = xs
    size = jnp.abs(x - base)
    rank = jnp.argsort(jnp.argsort(size, axis=-1), axis=-1).astype(jnp.float32)
    last = size.shape[-1] - 1
    return density + epsilon * (2 * rank / last - 1 if last else 0 * rank)


@in_float32
def _ranked(xs, base, first, end, *, skip):
    """Those with places first to end - 1 by |d|, largest first, of equals the earlier."""
    (x,) = xs
    size = jax.lax.bitcast_convert_type(jnp.abs(x - base), jnp.uint32)  # ordered as the floats are
    size_RC = size.reshape(-1, x.shape[-1])
    kept_RC = _largest(size_RC, end)
    if skip:
        kept_RC &= ~_largest(size_RC, first)
    return kept_RC.reshape(x.shape)


def _largest(size_RC, count):
    """The `count` largest; exactly as many, by sums only, so that no array leaves its device."""
    least = _threshold(size_RC, count)
    at_R, at_C = (jax.lax.broadcasted_iota(jnp.int32, size_RC.shape, axis) for axis in (0, 1))
    equal_RC = size_RC == least
    left = count - u32(jnp.sum(size_RC > least))  # of those that equal the threshold
    upto_R = jnp.cumsum(u32(jnp.sum(equal_RC, 1)))
    row = jnp.sum(upto_R <= left)  # rows before it keep all of theirs
    before = jnp.where(row > 0, upto_R[row - 1], 0)
    equal_C = jnp.any(equal_RC & (at_R == row), 0)
    column = jnp.sum(u32(jnp.cumsum(equal_C)) <= left - before)
    return (size_RC > least) | equal_RC & ((at_R < row) | (at_R == row) & (at_C < column))


def _threshold(size_RC, count):
    """The count-th largest number, two bits at a time: 16 passes, which need sums only."""
    add = lambda a, b: tuple(x + y for x, y in zip(a, b, strict=True))  # noqa: E731

    def two_bits(i, found):
        shift = u32(30 - 2 * i)
        higher = [found | (u32(j) << shift) for j in (1, 2, 3)]
        at_least = tuple(u32(size_RC >= h) for h in higher)
        counts = jax.lax.reduce(at_least, (np.uint32(0),) * 3, add, (0, 1))
        return found | (sum(u32(c >= count) for c in counts) << shift)

    return jax.lax.fori_loop(0, 16, two_bits, u32(0))
