"""The mesh and the two tables that place arrays on it; the only file that names a mesh axis."""

import math
import re
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

AXES = ('data', 'fsdp', 'tensor')

# Logical axis -> mesh axis. A batch is split over both data axes.
RULES = {
    'packs': ('data', 'fsdp'),
    'width': 'fsdp',
    'heads': 'tensor',
    'ffw': 'tensor',
    'vocabulary': 'tensor',
    'rank': None,
    'rewards': None,
    'scale': None,
}

# Leaf name, by suffix, so that optimiser moments and copies find the same rule -> logical axes of
# its last dimensions; leading ones (layers, experts) are not split.
LEAVES = (
    (r'embed/embedding$', ('vocabulary', 'width')),
    (r'norm/scale$', ('scale',)),
    (r'/(q|k|v)/kernel$', ('width', 'heads')),
    (r'/(q|k|v)/bias$', ('heads',)),
    (r'/o/kernel$', ('heads', 'width')),
    (r'/(gate|up)/kernel$', ('width', 'ffw')),
    (r'/down/kernel$', ('ffw', 'width')),
    (r'/(q|k|v|gate|up)/a$', ('width', 'rank')),
    (r'/(q|k|v)/b$', ('rank', 'heads')),
    (r'/(gate|up)/b$', ('rank', 'ffw')),
    (r'/o/a$', ('heads', 'rank')),
    (r'/down/a$', ('ffw', 'rank')),
    (r'/(o|down)/b$', ('rank', 'width')),
    (r'head/kernel$', ('width', 'rewards')),
)


def make_mesh(*, data: int = -1, fsdp: int = 1, tensor: int = 1) -> Mesh:
    """A mesh of all devices; one size may be -1, the rest of them.

    Raises ValueError when the sizes do not multiply to the number of devices.
    """
    sizes, n = [data, fsdp, tensor], jax.device_count()
    fixed = math.prod(s for s in sizes if s != -1)
    if -1 in sizes and fixed > 0:
        sizes[sizes.index(-1)] = n // fixed
    if math.prod(sizes) != n or min(sizes) < 1:
        raise ValueError(f'mesh {dict(zip(AXES, sizes, strict=True))}: {n} devices are there')
    # Under Explicit axes, the default now, linen's lookups do not type-check.
    return jax.make_mesh(tuple(sizes), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def _spec(name: str, ndim: int) -> PartitionSpec:
    if ndim == 0:
        return PartitionSpec()
    for pattern, axes in LEAVES:
        if re.search(pattern, name):
            return PartitionSpec(*(None,) * (ndim - len(axes)), *(RULES[a] for a in axes))
    raise ValueError(f'no sharding rule for leaf {name!r}')


def leaf_name(path: tuple[Any, ...]) -> str:
    """'0/mu/head/kernel' for a path of jax.tree_util."""
    return jax.tree_util.keystr(path, simple=True, separator='/')


def shardings(tree: Any, mesh: Mesh) -> Any:
    """A NamedSharding for every leaf (arrays or shapes); ValueError for one without a rule."""
    return jax.tree_util.tree_map_with_path(
        lambda path, x: NamedSharding(mesh, _spec(leaf_name(path), np.ndim(x))), tree
    )


def place(tree: Any, mesh: Mesh) -> Any:
    """The tree's arrays on the mesh, by the tables."""
    return jax.tree.map(jax.device_put, tree, shardings(tree, mesh))


def place_batch(batch: Any, mesh: Mesh) -> Any:
    """A batch of host arrays with its packs split over the data axes."""
    where = NamedSharding(mesh, PartitionSpec(RULES['packs']))
    # device_put would have all processes compare their batches.
    put = lambda x: jax.make_array_from_callback(x.shape, where, lambda at: x[at])  # noqa: E731
    return jax.tree.map(put, batch)


def data_parallel(mesh: Mesh) -> int:
    """Into how many parts a batch is split: P must be a multiple of it."""
    return mesh.shape['data'] * mesh.shape['fsdp']
