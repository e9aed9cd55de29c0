"""The mesh and the two tables that place arrays on it; the only file that names a mesh axis."""

import math
import re
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

AXES = ('data', 'fsdp', 'tensor')

# Logical axis -> mesh axis. A batch is split over both data axes.
RULES = {
    'packs': ('data', 'fsdp'),
    'groups': 'data',  # of packs whose devices share the weights out
    'width': 'fsdp',
    'heads': 'tensor',
    'ffw': 'tensor',
    'embedding': ('fsdp', 'tensor'),  # a table's width: vocabularies are of any size
    'whole': None,
}

# Leaf name, by suffix, so that optimiser moments and copies find the same rule -> logical axes of
# its last dimensions; leading ones (layers, experts) are not split.
LEAVES = (
    (r'embed/embedding$', ('whole', 'embedding')),
    (r'norm/scale$', ('whole',)),
    (r'/(q|k|v)/kernel$', ('width', 'heads')),
    (r'/(q|k|v)/bias$', ('heads',)),
    (r'/(qkv|kv)/kernel$', ('width', 'heads', 'whole')),  # of `fused`: a part a device
    (r'/(qkv|kv)/bias$', ('heads', 'whole')),
    (r'/o/kernel$', ('heads', 'width')),
    (r'/(gate|up)/kernel$', ('width', 'ffw')),
    (r'/(gate|up)/bias$', ('ffw',)),
    (r'/gate_up/kernel$', ('width', 'ffw', 'whole')),
    (r'/gate_up/bias$', ('ffw', 'whole')),
    (r'/down/kernel$', ('ffw', 'width')),
    (r'/(o|down)/bias$', ('whole',)),
    (r'/(q|k|v|gate|up)/a$', ('width', 'whole')),
    (r'/(q|k|v)/b$', ('whole', 'heads')),
    (r'/(gate|up)/b$', ('whole', 'ffw')),
    (r'/o/a$', ('heads', 'whole')),
    (r'/down/a$', ('ffw', 'whole')),
    (r'/(o|down)/b$', ('whole', 'width')),
    (r'head/(.+/)?kernel$', ('width', 'whole')),
    (r'head/(.+/)?bias$', ('whole',)),
    (r'head/slope$', ('whole',)),
    (r'head/transform$', ('whole', 'whole')),
    (r'prototypes/kernel$', ('width', 'whole')),
    (r'(^|/)share$', ('whole',)),
    (r'(^|/)gate/layer_\d+/kernel$', ('whole', 'whole')),
    (r'(^|/)gate/(layer_\d+/bias|scale)$', ('whole',)),
    (r'features/(answer_cD|prompt_nD)$', ('whole', 'whole')),
    (r'(^|/)count$', ()),  # an optimiser's, one a member
)


def make_mesh(
    *, data: int = -1, fsdp: int = 1, tensor: int = 1, devices: Sequence[Any] | None = None
) -> Mesh:
    """A mesh of `devices`, by default of all; one size may be -1, the rest of them.

    Raises ValueError when the sizes do not multiply to the number of devices.
    """
    sizes, n = [data, fsdp, tensor], len(jax.devices() if devices is None else devices)
    fixed = math.prod(s for s in sizes if s != -1)
    if -1 in sizes and fixed > 0:
        sizes[sizes.index(-1)] = n // fixed
    if math.prod(sizes) != n or min(sizes) < 1:
        raise ValueError(f'mesh {dict(zip(AXES, sizes, strict=True))}: {n} devices are there')
    # Under Explicit axes, the default now, linen's lookups do not type-check.
    kinds = (AxisType.Auto,) * len(AXES)
    return jax.make_mesh(tuple(sizes), AXES, axis_types=kinds, devices=devices)


def partition(*axes: str | None) -> PartitionSpec:
    """Where an array with these logical axes lies: partition('packs', None, 'heads')."""
    return PartitionSpec(*(axis and RULES[axis] for axis in axes))


def _check_divides(name: str, size: int, axes: str | tuple[str, ...] | None, mesh: Mesh) -> None:
    names = (axes,) if isinstance(axes, str) else axes or ()
    if size % (parts := math.prod(mesh.shape[axis] for axis in names)):
        where = ' x '.join(f'{axis} {mesh.shape[axis]}' for axis in names)
        raise ValueError(f'{name}: found {size}, expected a multiple of {parts} (mesh: {where})')


def check_heads(mesh: Mesh, **heads: int) -> None:
    """Raises ValueError naming the kind of heads that the mesh cannot share out.

    Leaves do not say it: the kernel of 2 heads of 64 has a multiple of 4 columns.
    """
    for name, count in heads.items():
        _check_divides(name, count, RULES['heads'], mesh)


def _sharding(name: str, shape: tuple[int, ...], mesh: Mesh) -> NamedSharding:
    if not shape:
        return NamedSharding(mesh, PartitionSpec())
    for pattern, axes in LEAVES:
        if re.search(pattern, name):
            spec = partition(*(None,) * (len(shape) - len(axes)), *axes)
            for i, (size, axis) in enumerate(zip(shape, spec, strict=True)):
                _check_divides(f'{name}: dimension {i}', size, axis, mesh)
            return NamedSharding(mesh, spec)
    raise ValueError(f'no sharding rule for leaf {name!r}')


def leaf_name(path: tuple[Any, ...]) -> str:
    """'0/mu/head/kernel' for a path of jax.tree_util."""
    return jax.tree_util.keystr(path, simple=True, separator='/')


def shardings(tree: Any, mesh: Mesh) -> Any:
    """A NamedSharding for every leaf (arrays or shapes).

    Raises ValueError for a leaf without a rule, or with a dimension that the mesh does not divide.
    """
    return jax.tree_util.tree_map_with_path(
        lambda path, x: _sharding(leaf_name(path), np.shape(x), mesh), tree
    )


def everywhere(mesh: Mesh) -> NamedSharding:
    """Of an array that every device holds whole."""
    return NamedSharding(mesh, PartitionSpec())


def _put(x: Any, where: NamedSharding) -> jax.Array:
    if isinstance(x, jax.Array):
        if x.sharding.is_equivalent_to(where, x.ndim) or where.is_fully_addressable:
            return jax.device_put(x, where)
        if not x.is_fully_addressable:
            return jax.jit(lambda x: x, out_shardings=where)(x)
    # Of several processes, device_put would compare what they hold.
    x = np.asarray(x)
    return jax.make_array_from_callback(x.shape, where, lambda at: x[at])


def place(tree: Any, mesh: Mesh) -> Any:
    """The tree's arrays on the mesh, by the tables; every process has all of those on the host."""
    return jax.tree.map(_put, tree, shardings(tree, mesh))


def place_batch(batch: Any, mesh: Mesh) -> Any:
    """A batch of host arrays with its packs split over the data axes."""
    where = NamedSharding(mesh, partition('packs'))
    return jax.tree.map(lambda x: _put(x, where), batch)


def looked_up(x_PND: jax.Array) -> jax.Array:
    """Rows of a table that is split on its width, brought to the devices of their packs.

    In two moves that the compiler knows how to make; left to itself it may gather all packs, or
    keep the width split through all layers. Does nothing where no mesh is set (jax.set_mesh).
    """
    if jax.sharding.get_abstract_mesh().empty:
        return x_PND
    for axes in (('groups', None, 'width'), ('packs', None, None)):
        x_PND = jax.lax.with_sharding_constraint(x_PND, partition(*axes))
    return x_PND


def data_parallel(mesh: Mesh) -> int:
    """Into how many parts a batch is split: P must be a multiple of it."""
    return mesh.shape['data'] * mesh.shape['fsdp']


def tensor_parallel(mesh: Mesh) -> int:
    """Among how many devices the heads of a layer are shared out."""
    return mesh.shape['tensor']
