"""Low-rank adapters (LoRA, arXiv 2106.09685) as a tree beside the backbone's.

At each adapted linear the tree holds `a` [in, r] and `b` [r, out] (with a leading layer axis
where layers are stacked); the layer's result grows by scale * (x @ a) @ b, scale = alpha / r.
"""

import re

import jax
import jax.numpy as jnp

from jaxrm import tree

ALL_LINEAR = r'/(q|k|v|o|gate|up|down)/'
QV = r'/(q|v)/'


def init(backbone: tree.Tree, key: jax.Array, *, rank: int, targets: str = ALL_LINEAR) -> tree.Tree:
    """A float32 adapter tree: `a` uniform as in PEFT (Kaiming, a=sqrt(5)), `b` zero.

    `targets` is a regular expression searched in leaf names such as `layers/q/kernel`; `backbone`
    may hold shapes only. Raises ValueError when nothing matches, for rank < 1, and for a `fused`
    backbone, whose linears are not all there.
    """
    if rank < 1:
        raise ValueError(f'rank: {rank}, expected at least 1')
    for name in tree.flatten(backbone):
        if re.search(r'/(qkv|kv|gate_up)/kernel$', name):
            raise ValueError(f'backbone: found {name}, expected kernels as they are stored')
    leaves = {n: x for n, x in tree.flatten(backbone).items() if n.endswith('/kernel')}
    chosen = {n: x for n, x in leaves.items() if re.search(targets, n)}
    if not chosen:
        raise ValueError(f'targets: {targets!r} matches none of {sorted(leaves)}')
    out = {}
    for (name, x), k in zip(
        sorted(chosen.items()), jax.random.split(key, len(chosen)), strict=True
    ):
        *stack, fan_in, fan_out = x.shape
        bound = fan_in**-0.5
        shape = (*stack, fan_in, rank)
        path = name.removesuffix('kernel')
        out[path + 'a'] = jax.random.uniform(k, shape, jnp.float32, -bound, bound)
        out[path + 'b'] = jnp.zeros((*stack, rank, fan_out), jnp.float32)
    return tree.unflatten(out)


def scaled(lora: tree.Tree, scale: float) -> tree.Tree:
    """The tree with `b` times `scale`: what the backbone adds as it is."""
    return tree.map_named(lambda name, x: x * scale if name.endswith('/b') else x, lora)


def fold(backbone: tree.Tree, lora: tree.Tree, scale: float) -> tree.Tree:
    """The backbone with scale * a @ b added to its kernels, in float32, in the stored dtype."""
    flat, adapters = tree.flatten(backbone), tree.flatten(lora)
    for name in adapters:
        if not name.endswith('/a'):
            continue
        path = name.removesuffix('a')
        if path + 'kernel' not in flat:
            raise ValueError(f'adapter {path!r} has no kernel in the backbone')
        kernel = flat[path + 'kernel']
        delta = jnp.matmul(
            adapters[path + 'a'].astype(jnp.float32),
            adapters[path + 'b'].astype(jnp.float32),
            precision='highest',
        )
        flat[path + 'kernel'] = (kernel.astype(jnp.float32) + scale * delta).astype(kernel.dtype)
    return tree.unflatten(flat)
