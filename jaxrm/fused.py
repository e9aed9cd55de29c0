"""Linears that read the same states as one: how frozen weights lie on a device.

Checkpoints, adapters, merging and optimisers know the tensors of HF's layout. What does not learn
may stand differently where it computes: q, k and v of a layer as one kernel, `gate` and `up` as
another. In the top layer, whose queries are only those read, q stays by itself. A decoder takes
either tree, an adapter keeps its own. What learns is never fused: its gradient and its optimiser
would have to be taken apart again at every step.

Letters: D width, t parts, n columns of a part.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxrm import sharding
from jaxrm.tree import Tree

NAMES = {('q', 'k', 'v'): 'qkv', ('k', 'v'): 'kv', ('gate', 'up'): 'gate_up'}


def columns(x: Any, widths: Sequence[int]) -> list[Any]:
    """Of [..., t, n] what belongs to each linear, [..., width]: every part has a share of each."""
    *lead, parts, _ = x.shape
    ends = np.cumsum([w // parts for w in widths])
    return [
        x[..., end - w // parts : end].reshape(*lead, w)
        for w, end in zip(widths, ends, strict=True)
    ]


def _side_by_side(leaves: Sequence[Any], parts: int) -> Any:
    """[..., t, n] of several [..., columns]; on the host where they are."""
    join = np.concatenate if all(isinstance(x, np.ndarray) for x in leaves) else jnp.concatenate
    cut = [x.reshape(*x.shape[:-1], parts, x.shape[-1] // parts) for x in leaves]
    return join(cut, axis=-1)


def _on_device(fn: Callable[..., Any], x: Any, *static: Any) -> Any:
    """fn(x, *static); compiled for arrays of a device, which may be spread over processes."""
    if all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(x)):
        return fn(x, *static)
    return jax.jit(fn, static_argnums=tuple(range(1, 1 + len(static))))(x, *static)


def _alike(linears: Sequence[Any]) -> bool:
    """Whether they can be one: the same parts (kernels; biases or none), each of one dtype."""
    if not all(isinstance(w, dict) and 'kernel' in w for w in linears):
        return False
    if len({frozenset(w) for w in linears}) > 1:
        return False
    return all(len({w[part].dtype for w in linears}) == 1 for part in linears[0])


def _walk(node: Any, parts: int, put: Callable[[str, Any], Any], path: str = '') -> Any:
    """The view of a tree, each leaf of it through `put`, which is told its name."""
    if not isinstance(node, dict):
        return put(path, node)
    rest, out = dict(node), {}
    inside = f'{path}/' if path else ''
    for names, name in NAMES.items():
        top = path.rpartition('/')[2] == 'top'
        if name == ('qkv' if top else 'kv') or not _alike([rest.get(n) for n in names]):
            continue
        linears = [rest.pop(n) for n in names]
        out[name] = {
            part: put(
                f'{inside}{name}/{part}',
                _on_device(_side_by_side, [w[part] for w in linears], parts),
            )
            for part in linears[0]
        }
    return out | {name: _walk(x, parts, put, f'{inside}{name}') for name, x in rest.items()}


def fuse(params: Tree, *, parts: int = 1) -> Tree:
    """The tree with kernels [..., D, t, n] in place of those that read the same states.

    Each of the `parts`, which may be on a device of its own, holds an equal share of every linear.
    Works on any tree with backbones in it, stacked or not; linears of which only some have a bias
    stay apart, as does what is fused already.
    """
    return _walk(params, parts, lambda name, x: x)


def place(params: Tree, mesh: Mesh) -> Tree:
    """`fuse`d and on the mesh. Of a tree on the host, no more than one leaf is there twice.

    Raises ValueError for a leaf that the mesh does not divide, before anything is placed.
    """
    sharding.shardings(params, mesh)
    put = lambda name, x: sharding.place({name: x}, mesh)[name]  # noqa: E731
    return _walk(params, sharding.tensor_parallel(mesh), put)


def split(params: Tree) -> Tree:
    """The inverse of `fuse`; of arrays on the host, of one part, these are views."""
    if not isinstance(params, dict):
        return params
    out: Tree = {}
    for name, x in params.items():
        names = next((of for of, joined in NAMES.items() if joined == name), None)
        if names is None:
            out[name] = split(x)
            continue
        total = x['kernel'].shape[-1] * x['kernel'].shape[-2]
        first = params['o']['kernel'].shape[-2] if name == 'qkv' else total // len(names)
        rest = (total - first) // (len(names) - 1)
        widths = (first, *(rest,) * (len(names) - 1))
        cut = {part: _on_device(columns, leaf, widths) for part, leaf in x.items()}
        out |= {n: {part: leaf[i] for part, leaf in cut.items()} for i, n in enumerate(names)}
    return out
