"""Exact matrix-multiplication FLOPs of a function, read from its jaxpr; nothing runs.

A compiler's own count takes the body of a loop once, and a causal kernel is a black box to it.
"""

import functools
import math
import re
from collections.abc import Callable, Iterator
from typing import Any

import jax

from jaxrm.backbones import attention

# How the equations that stand for causal kernels are named, with their window where there is one.
KERNEL = re.compile(r'row_attention_(forward|backward)(?:_of_(\d+))?')
# Products of a query with a key's width: logits and output; those two again, and dq, dk, dv.
PRODUCTS = {'forward': 2, 'backward': 5}


@functools.cache
def _kernel(way: str, window: int | None, softcap: float | None) -> Callable[..., Any]:
    """`attention.xla`, or its gradients, as an equation by whose name `count` knows it."""
    fn = functools.partial(attention.xla, window=window, softcap=softcap)

    def forward(q, k, v, length):
        return fn(q, k, v, length)

    def backward(q, k, v, length, g):
        return jax.vjp(lambda q, k, v: fn(q, k, v, length), q, k, v)[1](g)

    call = forward if way == 'forward' else backward
    call.__name__ = f'row_attention_{way}' + ('' if window is None else f'_of_{window}')
    return jax.jit(call)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _row_attention(q, k, v, length, window, softcap):
    return _kernel('forward', window, softcap)(q, k, v, length)


_row_attention.defvjp(
    lambda *x: (_row_attention(*x), x[:4]),
    lambda window, softcap, x, g: (*_kernel('backward', window, softcap)(*x, g), None),
)


def row_attention(q_PRSQH, k_PRSKH, v_PRSKH, length_PR, *, window=None, softcap=None) -> jax.Array:
    """`attention.xla`, which `count` takes for a kernel: what is seen only, no weights kept."""
    return _row_attention(q_PRSQH, k_PRSKH, v_PRSKH, length_PR, window, softcap)


def _attended(equation, way: str, window: str | None) -> int:
    *rows, S, Q, H = equation.outvars[0].aval.shape  # of the output, or of the queries' gradient
    w = min(int(window or S), S)
    pairs = w * (w + 1) // 2 + (S - w) * w
    return PRODUCTS[way] * 2 * math.prod(rows) * Q * H * pairs


def _dot(equation) -> int:
    ((contract, _), _), lhs = equation.params['dimension_numbers'], equation.invars[0].aval
    return 2 * equation.outvars[0].aval.size * math.prod(lhs.shape[i] for i in contract)


def inner(equation) -> Iterator[Any]:
    """The jaxprs among an equation's parameters."""
    for value in equation.params.values():
        for x in value if isinstance(value, list | tuple) else [value]:
            if hasattr(x, 'eqns') or hasattr(x, 'jaxpr'):
                yield getattr(x, 'jaxpr', x)


def _times(equation) -> int:
    """How often the inner jaxpr of an equation runs."""
    if equation.primitive.name == 'scan':
        return equation.params['length']
    if equation.primitive.name == 'shard_map':
        mesh, manual = equation.params['mesh'], equation.params['newly_manual_axes']
        return math.prod(mesh.shape[axis] for axis in manual)
    return 1


def _equation(equation) -> int:
    name = equation.primitive.name
    if name == 'dot_general':
        return _dot(equation)
    within = [_jaxpr(x) for x in inner(equation)]
    kernel = KERNEL.fullmatch(str(equation.params.get('name')))
    if kernel and any(within):  # rematerialising splits off masks
        return _attended(equation, *kernel.groups())
    if name == 'while' and any(within):
        raise ValueError('while: matrix multiplications in a loop of unknown length')
    if name in ('conv_general_dilated', 'pallas_call', 'ragged_dot_general'):
        raise ValueError(f'{name}: its FLOPs cannot be read from the jaxpr')
    return _times(equation) * (max(within, default=0) if name == 'cond' else sum(within))


def _jaxpr(jaxpr) -> int:
    return sum(map(_equation, jaxpr.eqns))


def count(fn: Callable[..., Any], *args: Any) -> int:
    """FLOPs (two a multiply-add) of the matrix multiplications in fn(*args), over all devices.

    Arguments may be shapes (jax.ShapeDtypeStruct). Of the branches of a `cond` or `switch` the
    dearest counts, so layers of several windows, chosen as the model runs, count as the widest.
    Raises ValueError for a `while` loop around one, a convolution or a Pallas kernel.
    """
    return _jaxpr(jax.make_jaxpr(fn)(*args).jaxpr)
