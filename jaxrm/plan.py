"""Whether a run fits a machine, what it holds and sends, and how fast it can be at the best.

Everything here is a formula. What a layer's working set takes is fitted to programs of the TPU's
compiler (`WORK`); `plan_compile` checks a plan with the real one.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType

from jaxrm import costs, machines, packing, sharding
from jaxrm.backbones.layers import Config

BLOCK = 128  # tokens: streams and rows are multiples of it
ANSWERS = 2  # a prompt, in the pack shape that is assumed
SLOTS = 1.5, 1.0  # of short and of long rows, a token of the stream
REMATS: tuple[costs.Remat, ...] = ('none', 'dots', 'mlp', 'full')
HALF = 2  # bytes of bfloat16
SHARE = 0.95  # of the memory a run may take: the rest is for what is not counted


class Mesh(NamedTuple):
    """Sizes of the mesh's axes, as in `sharding.make_mesh`."""

    data: int
    fsdp: int
    tensor: int

    @property
    def shards(self) -> int:
        """Parts of a batch."""
        return self.data * self.fsdp

    def __str__(self) -> str:
        return ' x '.join(f'{name} {n}' for name, n in self._asdict().items() if n > 1) or 'alone'


@dataclasses.dataclass(frozen=True)
class Run:
    """A program: a model, what learns, the machine, its mesh, and the pack of each data shard."""

    config: Config
    method: costs.Method
    machine: machines.Machine
    mesh: Mesh
    shape: packing.Shape

    @property
    def tokens(self) -> int:
        """Of the stream, in a step, of one member."""
        return self.shape.tokens * self.mesh.shards


class Sent(NamedTuple):
    """What a chip sends in a step, in rings."""

    what: str
    kind: str
    bytes: int


@dataclasses.dataclass(frozen=True)
class Estimate:
    """What a run takes: bytes of one chip, FLOPs of all, and seconds of a step at the least."""

    run: Run
    held: dict[str, int]
    sent: tuple[Sent, ...]
    flops: int
    seconds: dict[str, float]

    @property
    def total(self) -> int:
        """Bytes of one chip."""
        return sum(self.held.values())

    @property
    def fits(self) -> bool:
        """Whether they are there, and a little more."""
        return self.total <= SHARE * self.run.machine.chip.memory

    @property
    def limit(self) -> str:
        """What takes longest."""
        return max(self.seconds, key=lambda name: self.seconds[name])

    @property
    def bound(self) -> float:
        """Seconds of a step if everything overlaps with what takes longest."""
        return self.seconds[self.limit]


def up(x: float, multiple: int = BLOCK) -> int:
    """The next multiple from x on."""
    return math.ceil(x / multiple) * multiple


def shape_of(tokens: int, longest: int) -> packing.Shape:
    """A pack of pairs: rows of the longest length and of half of it, as many as packs of pairs use.

    Per token of the stream there are 2.5 slots of rows, as in well-filled packs of chat data.
    """
    ends = sorted({up(longest / 2), up(longest)})
    slots = SLOTS if len(ends) == 2 else (sum(SLOTS),)
    rows = tuple((math.ceil(n * tokens / s), s) for n, s in zip(slots, ends, strict=True))
    prompts = math.ceil(sum(r for r, _ in rows) / ANSWERS)
    return packing.Shape(tokens, rows, prompts, ANSWERS)


# Bytes


def _state(c: Config, method: costs.Method, mesh: Mesh) -> costs.State:
    """Of one chip; raises ValueError for a mesh that does not divide the model."""
    abstract: Any = AbstractMesh(tuple(mesh), sharding.AXES, axis_types=(AxisType.Auto,) * 3)
    sharding.check_heads(abstract, query=c.Q, key=c.K)

    def count(leaves: costs.Leaves) -> int:
        shapes = {n: jax.ShapeDtypeStruct(s, np.float32) for n, s in leaves.items()}
        placed = sharding.shardings(shapes, abstract)
        return sum(math.prod(placed[n].shard_shape(s)) for n, s in leaves.items())

    return costs.state(c, method, count=count)


class Work(NamedTuple):
    """What the arithmetic of one layer holds at a time, fitted to compiled programs.

    `weights` is in layers of gathered weights, `layer` in what a layer's activations take where
    nothing is rematerialised.
    """

    weights: float
    layer: float


WORK: dict[costs.Learns, Work] = {
    'nothing': Work(1.2, 0.5),
    'adapter': Work(1.5, 2.25),
    'everything': Work(3.5, 2.25),
}


def _work(run: Run, load: costs.Load) -> int:
    c, method = run.config, run.method
    fitted = WORK[method.learns]
    kept = costs.Method('adapter', max(method.rank, 1), method.targets, 'none', method.members)
    layer = costs.layer_activations(c, load, kept)
    weights = HALF * costs.layer_weights(c) / run.mesh.tensor
    gathered = fitted.weights * weights if run.mesh.fsdp > 1 else 0
    # What learns is cast before it is gathered, each chip's part of all layers at once.
    cast = c.L * weights / run.mesh.fsdp * (method.learns == 'everything')
    return int(gathered + cast + fitted.layer * layer / run.mesh.tensor)


def _held(run: Run, state: costs.State, load: costs.Load) -> dict[str, int]:
    return {
        **state._asdict(),
        'activations': costs.activations(run.config, load, run.method),
        'logits': 0,  # a reward model has none
        'workspace': _work(run, load),
    }


# Collectives


def _ring(bytes_: float, n: int) -> float:
    """What each of n chips sends of an array that they gather, or scatter the sum of."""
    return bytes_ * (n - 1) / n


def _weights_sent(run: Run) -> Iterator[Sent]:
    """Weights forward and backward (what is computed again uses the backward's), gradients."""
    c, method, mesh = run.config, run.method, run.mesh
    times = 1 if method.learns == 'nothing' else 2
    kernels = HALF * c.L * costs.layer_weights(c) / mesh.tensor
    low = HALF * costs.elements(costs.adapter_leaves(c, method)) * method.members / mesh.tensor
    yield Sent('weights', 'all-gather', round(times * _ring(kernels, mesh.fsdp)))
    if low:  # half of an adapter is split among the chips that share the weights
        yield Sent('adapters', 'all-gather', round(times * _ring(low / 2, mesh.fsdp)))
    if method.learns == 'everything':
        yield Sent('gradients', 'reduce-scatter', round(_ring(kernels, mesh.fsdp)))
        part = kernels / mesh.fsdp  # that chips of several groups hold alike
        yield Sent('gradients', 'all-reduce', round(2 * _ring(part, mesh.data)))
    elif method.learns == 'adapter':
        yield Sent('gradients', 'all-reduce', round(2 * _ring(low, mesh.shards)))


def _stream_sent(run: Run) -> Iterator[Sent]:
    """Embeddings to their tokens, and what chips that share the heads add up."""
    c, method, mesh = run.config, run.method, run.mesh
    one = HALF * run.shape.tokens * method.members * c.D
    parts = mesh.fsdp * mesh.tensor
    yield Sent('embeddings', 'all-to-all', round(_ring(one, parts)))
    if method.learns == 'everything':
        yield Sent('embeddings', 'reduce-scatter', round(_ring(2 * c.V * c.D, mesh.fsdp)))
    times = 2 if method.learns == 'nothing' else 4 + 2 * (method.remat == 'full')
    summed = 2 * times * (c.L - 1) * _ring(one, mesh.tensor)
    yield Sent('activations', 'all-reduce', round(summed))


def sent(run: Run) -> tuple[Sent, ...]:
    """What a chip has to send in a step at the least, by what it is."""
    found = (*_weights_sent(run), *_stream_sent(run))
    return tuple(s for s in found if s.bytes)


# The whole


def estimate(run: Run) -> Estimate:
    """Raises ValueError for a mesh that does not divide the model."""
    chip, load = run.machine.chip, costs.of_shape(run.shape)
    state = _state(run.config, run.method, run.mesh)
    flops = costs.step(run.config, load, run.method).total * run.mesh.shards
    moved = costs.moved(run.config, load, run.method, state.gradients)
    traffic = sent(run)
    seconds = {
        'compute': flops / run.machine.chips / chip.peak,
        'memory': sum(moved) / chip.bandwidth,
        'network': sum(s.bytes for s in traffic) / run.machine.network if traffic else 0.0,
    }
    return Estimate(run, _held(run, state, load), traffic, flops, seconds)


# The search


def meshes(machine: machines.Machine) -> Iterator[Mesh]:
    """All ways to use the machine's chips, powers of two along each axis."""
    powers = [2**i for i in range(machine.chips.bit_length())]
    for tensor in powers:
        for fsdp in powers:
            if machine.chips % (fsdp * tensor) == 0:
                yield Mesh(machine.chips // (fsdp * tensor), fsdp, tensor)


@dataclasses.dataclass(frozen=True)
class Wanted:
    """What is asked for; None is what the search may choose."""

    config: Config
    method: costs.Method
    machine: machines.Machine
    longest: int  # row, tokens
    remat: costs.Remat | None = None
    fsdp: int | None = None
    tensor: int | None = None


def _asked(wanted: Wanted) -> list[Mesh]:
    """The meshes of the sizes that are asked for; raises ValueError where there is none."""
    found, beside = list(meshes(wanted.machine)), wanted.machine.name
    for axis in ('fsdp', 'tensor'):
        size = getattr(wanted, axis)
        if size is None:
            continue
        sizes = sorted({getattr(mesh, axis) for mesh in found})
        if size not in sizes:
            raise ValueError(f'{axis}: found {size}, expected one of {sizes} on {beside}')
        found = [mesh for mesh in found if getattr(mesh, axis) == size]
        beside += f' with {axis} {size}'
    return found


def _usable(wanted: Wanted) -> list[Mesh]:
    """Those of them that divide the model; raises ValueError where none does."""
    found, why = [], ''
    for mesh in _asked(wanted):
        try:
            _state(wanted.config, wanted.method, mesh)
        except ValueError as error:
            why = str(error)
        else:
            found.append(mesh)
    if not found:
        sizes = {'fsdp': wanted.fsdp, 'tensor': wanted.tensor}
        asked = ', '.join(f'{k} {v}' for k, v in sizes.items() if v)
        beside = f' with {asked}' if asked else ''
        raise ValueError(f'{wanted.machine.name}: found no mesh to use{beside}: {why}')
    return found


def _tried(wanted: Wanted, tokens_of: Callable[[Mesh, costs.Method], int]) -> list[Estimate]:
    """An estimate of every usable mesh with each policy, where it has any tokens."""
    trains, found = wanted.method.learns != 'nothing', []
    remats = (wanted.remat,) if wanted.remat else REMATS if trains else ('none',)
    for mesh in _usable(wanted):
        for remat in remats:
            method = dataclasses.replace(wanted.method, remat=remat)
            if tokens := tokens_of(mesh, method):
                found.append(_estimate(wanted, mesh, method, tokens))
    return found


def _estimate(wanted: Wanted, mesh: Mesh, method: costs.Method, tokens: int) -> Estimate:
    """Of so many tokens a data shard."""
    shape = shape_of(tokens, wanted.longest)
    return estimate(Run(wanted.config, method, wanted.machine, mesh, shape))


def best(wanted: Wanted, tokens: int) -> Estimate:
    """The run of this many tokens a step that is fastest at the best among those that fit.

    Heads are shared out only where nothing fits otherwise, since chips then add up activations.
    Where nothing fits at all, the run that takes least. A pack must hold the longest row: raises
    ValueError for tokens that no mesh divides so.
    """
    row = up(wanted.longest)

    def of(mesh: Mesh, method: costs.Method) -> int:
        each, left = divmod(tokens, mesh.shards)
        return 0 if left or each % BLOCK or each < row else each

    found = _tried(wanted, of)
    if not found:
        shards = min(mesh.shards for mesh in _usable(wanted))
        raise ValueError(
            f'tokens: found {tokens}, expected a multiple of {BLOCK * shards} from {row * shards} '
            f'on: each of {shards} data shards holds a row of {row}'
        )
    fitting = [e for e in found if e.fits]
    if not fitting:
        return min(found, key=lambda e: e.total)
    return min(fitting, key=lambda e: (e.run.mesh.tensor, e.bound, e.total))


def largest(wanted: Wanted) -> Estimate | None:
    """The run with the most tokens a step that fits, of equals the fastest; None where none does.

    Heads are shared out only where nothing fits otherwise.
    """

    def most(mesh: Mesh, method: costs.Method) -> int:
        fits = lambda n: _estimate(wanted, mesh, method, n * BLOCK).fits  # noqa: E731
        low = up(wanted.longest) // BLOCK
        if not fits(low):
            return 0
        high = 2 * low
        while fits(high) and high < 2**16:
            low, high = high, 2 * high
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if fits(middle) else (low, middle)
        return low * BLOCK

    found = _tried(wanted, most)
    return max(found, key=lambda e: (-e.run.mesh.tensor, e.run.tokens, -e.bound), default=None)
