"""Exact matrix-multiplication FLOPs of a function, read from its jaxpr; nothing runs.

A compiler's own count takes the body of a loop once, and a causal kernel is a black box to it.
"""

import math
from collections.abc import Callable, Iterator
from typing import Any

import jax

from jaxrm.backbones import attention

FORWARD, BACKWARD = 'row_attention', 'row_attention_backward'


def _named(name: str, fn: Callable[..., Any]) -> Callable[..., Any]:
    """fn as an equation of this name, by which `count` knows it."""

    def call(*args):
        return fn(*args)

    call.__name__ = name
    return jax.jit(call)


def _gradients(q, k, v, length, g):
    return jax.vjp(lambda q, k, v: attention.xla(q, k, v, length), q, k, v)[1](g)


_forward, _backward = _named(FORWARD, attention.xla), _named(BACKWARD, _gradients)


@jax.custom_vjp
def row_attention(q_PRSQH, k_PRSKH, v_PRSKH, length_PR) -> jax.Array:
    """`attention.xla`, which `count` takes for a causal kernel: s <= t only, no weights kept."""
    return _forward(q_PRSQH, k_PRSKH, v_PRSKH, length_PR)


row_attention.defvjp(
    lambda *x: (_forward(*x), x),
    lambda x, g: (*_backward(*x, g), None),
)

# Products of a query with a key's width: logits and output; those two again, and dq, dk, dv.
PRODUCTS = {FORWARD: 2, BACKWARD: 5}


def _row_attention(equation) -> int:
    *rows, S, Q, H = equation.outvars[0].aval.shape  # of the output, or of the queries' gradient
    return PRODUCTS[equation.params['name']] * 2 * math.prod(rows) * Q * H * (S * (S + 1) // 2)


def _dot(equation) -> int:
    ((contract, _), _), lhs = equation.params['dimension_numbers'], equation.invars[0].aval
    return 2 * equation.outvars[0].aval.size * math.prod(lhs.shape[i] for i in contract)


def _inner(equation) -> Iterator[Any]:
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
    inner = [_jaxpr(x) for x in _inner(equation)]
    if equation.params.get('name') in PRODUCTS and any(inner):  # rematerialising splits off masks
        return _row_attention(equation)
    if name == 'while' and any(inner):
        raise ValueError('while: matrix multiplications in a loop of unknown length')
    if name in ('conv_general_dilated', 'pallas_call', 'ragged_dot_general'):
        raise ValueError(f'{name}: its FLOPs cannot be read from the jaxpr')
    return _times(equation) * (max(inner, default=0) if name == 'cond' else sum(inner))


def _jaxpr(jaxpr) -> int:
    return sum(map(_equation, jaxpr.eqns))


def count(fn: Callable[..., Any], *args: Any) -> int:
    """FLOPs (two a multiply-add) of the matrix multiplications in fn(*args), over all devices.

    Arguments may be shapes (jax.ShapeDtypeStruct). Of a `cond` the dearest branch counts. Raises
    ValueError for a `while` loop around one, a convolution or a Pallas kernel.
    """
    return _jaxpr(jax.make_jaxpr(fn)(*args).jaxpr)
