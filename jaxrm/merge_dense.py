"""Merges whose result is a sum of the inputs, with coefficients for the whole array or for rows.

What coefficients depend on (lengths and angles) is in the inner products of the inputs: arrays are
read once for these, once for the sum, and the geometry between is on the host in float64. Letters:
n inputs, R vectors of an array.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

Array = jax.Array | np.ndarray

COLLINEAR = 0.9995  # slerp goes straight between directions with a larger cosine
TINY = 1e-8  # a length, or a divisor, that counts as zero


def in_float32(fn: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    """fn(xs, base, *numbers, **options), compiled, on float32 copies; its result as `dtype`."""

    @functools.partial(jax.jit, static_argnames=('dtype', 'options'))
    def run(xs, base, *numbers, dtype, options):
        f32 = lambda x: None if x is None else x.astype(jnp.float32)  # noqa: E731
        return fn([f32(x) for x in xs], f32(base), *numbers, **dict(options)).astype(dtype)

    def call(xs, base, *numbers, dtype=jnp.float32, **options):
        fixed = tuple(sorted(options.items()))
        return run(tuple(xs), base, *numbers, dtype=np.dtype(dtype), options=fixed)

    return functools.wraps(fn)(call)


def moved(base: jax.Array, step: jax.Array) -> jax.Array:
    """base + step, where a step of zero leaves a negative zero as it is."""
    return jnp.where(step == 0, base, base + step)


def host(x: jax.Array) -> np.ndarray:
    """A small array in float64, wherever it lies."""
    if not x.is_fully_addressable:
        everywhere = NamedSharding(x.sharding.mesh, PartitionSpec())  # type: ignore[attr-defined]
        x = jax.jit(lambda x: x, out_shardings=everywhere)(x)
    return np.asarray(x).astype(np.float64)


# The two passes


@in_float32
def _combined(xs, base, coefficient, total, heaviest):
    """sum_i c_i v_i = (sum_i c_i) v_h + sum_i c_i (v_i - v_h): exact where the inputs agree."""
    vectors = xs if base is None else [x - base for x in xs]
    anchor = jax.lax.select_n(heaviest, *vectors)
    out = total * anchor
    for c, v in zip(coefficient, vectors, strict=True):
        out = moved(out, jnp.where((c == 0) | (v == anchor), 0.0, c * (v - anchor)))
    return out if base is None else moved(base, out)


def combined(
    xs: Sequence[Array], base: Array | None, coefficient: Sequence[Any], dtype: Any
) -> jax.Array:
    """sum_i c_i x_i, or with a base base + sum_i c_i (x_i - base).

    Each c_i is a number, or an array with as many axes as x that broadcasts to it. When they add
    up to 1, equal inputs give that input bit for bit, and so does an only c_i that is not zero.
    """
    heaviest = np.int32(np.argmax([np.abs(c).mean() for c in coefficient]))
    total = np.sum(coefficient, axis=0)
    f32 = [np.asarray(c, np.float32) for c in coefficient]
    return _combined(xs, base, f32, np.asarray(total, np.float32), heaviest, dtype=dtype)


@in_float32
def _products(xs, base, *, axis):
    vectors = xs if base is None else [x - base for x in xs]
    pairs = [a * b for i, a in enumerate(vectors) for b in vectors[: i + 1]]
    return jnp.stack([jnp.sum(p, axis) for p in pairs])


def gram(xs: Sequence[Array], base: Array | None, axis: int | None) -> np.ndarray:
    """[n, n] inner products of the x_i, or x_i - base; [n, n, R] of the vectors along an axis."""
    sums = host(_products(xs, base, axis=-1 if axis is None else axis))
    if axis is None:
        sums = sums.reshape(len(sums), -1).sum(1)
    n = len(xs)
    out = np.empty((n, n, *sums.shape[1:]))
    out[np.tril_indices(n)] = sums
    out[np.tril_indices(n)[::-1]] = sums
    return out


def _spread(coefficient: np.ndarray, axis: int | None, ndim: int) -> list[np.ndarray]:
    """Coefficients [n] or [n, R] as `combined` takes them."""
    return list(coefficient if axis is None else np.expand_dims(coefficient, axis % ndim + 1))


# Sums


def check_sum(weight: Sequence[float], normalize: bool) -> None:
    """Raises ValueError for weights that are divided by their sum, and have none."""
    if normalize and abs(sum(weight)) < TINY:
        found = list(weight)
        raise ValueError(f'weight: found {found}, which add up to 0, expected not, as normalized')


def linear(xs, base, dtype, *, weight, normalize) -> jax.Array:
    """sum_i w_i x_i, over sum_i w_i if `normalize`."""
    total = sum(weight)
    return combined(xs, None, [w / total if normalize else w for w in weight], dtype)


def average(xs, base, dtype) -> jax.Array:
    """The mean (WARM, arXiv 2401.12187)."""
    return combined(xs, None, [1 / len(xs)] * len(xs), dtype)


def passthrough(xs, base, dtype, *, scale) -> jax.Array:
    """The input, scaled."""
    return combined(xs, None, scale, dtype)


# Angles


def _lengths(products: np.ndarray) -> np.ndarray:
    return np.sqrt(np.einsum('ii...->i...', products))


def _cosines(products: np.ndarray) -> np.ndarray:
    """Vectors of no length, which have none, are taken as they are."""
    length = _lengths(products)
    length = np.where(length > TINY, length, 1.0)
    return np.clip(products / (length[:, None] * length[None]), -1.0, 1.0)


def _arc(cosine: np.ndarray, t: float, straight: np.ndarray) -> np.ndarray:
    """[2, ...] coefficients at t on the great circle, or on the straight line between."""
    angle = np.arccos(cosine)
    sine = np.where(straight, 1.0, np.sin(angle))
    arc = np.stack([np.sin((1 - t) * angle), np.sin(t * angle)]) / sine
    line = np.stack([np.full_like(angle, 1 - t), np.full_like(angle, t)])
    return np.where(straight, line, arc)


def slerp(xs, base, dtype, *, t) -> jax.Array:
    """From the base at t = 0 to the input at 1: sin((1-t)a)/sin(a) x_0 + sin(ta)/sin(a) x_1.

    `a` is the angle between the two, as vectors; straight on where they are nearly collinear.
    """
    both = [base, *xs]
    cosine = _cosines(gram(both, None, None))[0, 1]
    coefficient = _arc(cosine, t, np.abs(cosine) > COLLINEAR)
    return combined(both, None, list(coefficient), dtype)


def nuslerp(xs, base, dtype, *, weight, nuslerp_row_wise, nuslerp_flatten) -> jax.Array:
    """slerp of two inputs, or of their steps from the base, at t = w_2 / (w_1 + w_2).

    Of the arrays as vectors, else of the vectors along the last axis, with `row_wise` the first.
    """
    total = sum(weight)
    t = weight[1] / total if abs(total) > TINY else 0.5
    axis = None if nuslerp_flatten or np.ndim(xs[0]) < 2 else (0 if nuslerp_row_wise else -1)
    cosine = _cosines(gram(xs, base, axis))[0, 1]
    coefficient = _arc(cosine, t, np.sqrt(1 - cosine**2) < TINY)
    return combined(xs, base, _spread(coefficient, axis, np.ndim(xs[0])), dtype)


def multislerp(xs, base, dtype, *, weight, normalize_weights, eps) -> jax.Array:
    """In the direction of the weighted mean of directions, as long as the weighted mean length."""
    w = np.array(weight) / (sum(weight) if normalize_weights else 1)
    if len(xs) == 1:
        return combined(xs, base, [1.0], dtype)
    products = gram(xs, base, None)
    length = _lengths(products)
    each = w / np.maximum(length, eps)
    mean = np.sqrt(max(each @ products @ each, 0.0))
    return combined(xs, base, list(each / max(mean, eps) * (w @ length)), dtype)


def karcher(xs, base, dtype, *, max_iter, tol) -> jax.Array:
    """The point of the sphere with the least squared distances to all directions.

    From their mean by steps of the mean tangent, until it is shorter than `tol`; as long as the
    mean length.
    """
    products = gram(xs, None, None)
    length = _lengths(products)
    inverse = np.where(length > TINY, 1 / np.maximum(length, TINY), 0.0)
    cosine = np.clip(products * inverse[:, None] * inverse[None], -1.0, 1.0)
    point = _karcher_mean(cosine, max_iter, tol)
    return combined(xs, None, list(point * inverse * length.mean()), dtype)


def _karcher_mean(cosine: np.ndarray, max_iter: int, tol: float) -> np.ndarray:
    """[n] coefficients of the mean on the unit vectors with these cosines."""
    n = len(cosine)
    size = lambda a: np.sqrt(max(a @ cosine @ a, 0.0))  # noqa: E731
    point = np.full(n, 1 / n)
    if size(point) < TINY:  # opposite directions have no mean
        point = np.eye(n)[np.argmax(np.diag(cosine))]
    point /= size(point) or 1.0
    for _ in range(max_iter):
        to = np.clip(cosine @ point, -1.0, 1.0)
        angle = np.arccos(to)
        pull = np.where(np.sin(angle) > TINY, angle / np.maximum(np.sin(angle), TINY), 0.0) / n
        step = pull - (pull @ to) * point
        if (distance := size(step)) < tol:
            break
        point = np.cos(distance) * point + np.sin(distance) / distance * step
    return point


def model_stock(xs, base, dtype, *, filter_wise) -> jax.Array:
    """x_0 + t (mean - x_0), t = n c / (1 + (n-1) c), c the mean cosine between two of the d_i.

    arXiv 2403.19522; of whole arrays, or of each row. The base where t has no bound.
    """
    n, axis = len(xs), -1 if filter_wise and np.ndim(xs[0]) > 1 else None
    c = np.mean(_cosines(gram(xs, base, axis))[np.tril_indices(n, -1)], axis=0)
    divisor = 1 + (n - 1) * c
    t = np.where(divisor < 10 * TINY, 0.0, n * c / np.where(divisor < 10 * TINY, 1.0, divisor))
    coefficient = np.repeat(t[None] / n, n, axis=0)
    return combined(xs, base, _spread(coefficient, axis, np.ndim(xs[0])), dtype)
