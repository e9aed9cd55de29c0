"""How much of the forward pass a training step keeps for the backward one: what the memory holds.

`dots` keeps all that linears give and computes attention again, 1 to 2 % of a step of an 8B adapter
in a third of the bytes that `none` keeps, which is therefore never chosen where memory is
known. See `backbones.layers.KEPT`.
"""

import dataclasses

from jax.sharding import Mesh

from jaxrm import costs, machines, packing, plan, processes
from jaxrm.backbones.layers import Config

LADDER: tuple[costs.Remat, ...] = ('dots', 'mlp', 'full')  # from the most that is kept to the least


def memory(mesh: Mesh) -> int | None:
    """Bytes that a program may use of the smallest device here; None where that is not known."""
    stats = [device.memory_stats() for device in mesh.local_devices]
    limits = [s['bytes_limit'] for s in stats if s and 'bytes_limit' in s]
    return min(limits) if len(limits) == len(stats) else None


def needed(
    c: Config,
    method: costs.Method,
    shape: packing.Shape,
    mesh: Mesh,
    *,
    packs: int,
    width: int,
    at_once: bool = True,
) -> int:
    """Bytes of one device in a step with so many packs on it; `width` of a number computed with.

    Members take their step together, or not `at_once` but one after the other.
    """
    whole = shape._replace(
        tokens=packs * shape.tokens, rows=tuple((packs * r, s) for r, s in shape.rows)
    )
    here = machines.Machine('here', machines.Chip(1, 1, 1, 1), (mesh.size,))
    sizes = plan.Mesh(*(mesh.shape[axis] for axis in plan.Mesh._fields))
    held = plan.estimate(plan.Run(c, method, here, sizes, whole)).held
    if not at_once:
        one = dataclasses.replace(method, members=1)
        alone = plan.estimate(plan.Run(c, one, here, sizes, whole)).held
        held |= {name: alone[name] for name in ('gradients', 'activations', 'workspace')}
    computed = {'activations', 'workspace'}
    if method.learns != 'everything':  # float32 already
        computed.add('weights')
    return sum(x * width // 2 if name in computed else x for name, x in held.items())


def choose(
    c: Config,
    method: costs.Method,
    shape: packing.Shape,
    mesh: Mesh,
    *,
    packs: int = 1,
    width: int = 2,
) -> costs.Remat:
    """The policy that computes least again of those that fit; 'none' where memory is not known.

    `shape` is that of a pack, of which each part of the mesh has so many at a time. Of several
    members only one is at work: see `members.choose`.
    """
    limit = processes.alone(lambda: memory(mesh))
    if limit is None:
        return 'none'
    for remat in LADDER[:-1]:
        what = dataclasses.replace(method, remat=remat)
        bytes_ = needed(c, what, shape, mesh, packs=packs, width=width, at_once=False)
        if bytes_ <= plan.SHARE * limit:
            return remat
    return LADDER[-1]
