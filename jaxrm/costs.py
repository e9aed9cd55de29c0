"""What a reward model costs, by formula: FLOPs of a pass or a step, bytes of state and activations.

The FLOPs are those that `flops.count` reads from the traced programs; a test holds them together.
Nothing here needs a device, or shapes of arrays: a Config and a Load are enough.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Literal, NamedTuple

import numpy as np

from jaxrm import packing
from jaxrm.backbones.layers import KEPT, Config
from jaxrm.tokens import Tokens

LINEARS = ('q', 'k', 'v', 'o', 'gate', 'up', 'down')
Learns = Literal['nothing', 'adapter', 'everything']
Remat = Literal['none', 'dots', 'mlp', 'full']  # in the order of what is kept
# Products of queries with a width of keys, 2 FLOPs each: of the kernel on rows, forward and
# backward, which recomputes the logits; of the top layer's few queries, which does not.
KERNEL, PLAIN = (2, 5), (2, 4)


@dataclasses.dataclass(frozen=True)
class Method:
    """What learns, and how: a LoRA of a rank on some linears, all weights, or nothing (scoring).

    `members` of one kind share what is frozen, and each has a load of its own.
    """

    learns: Learns = 'adapter'
    rank: int = 16  # 0: no adapter
    targets: tuple[str, ...] = LINEARS
    remat: Remat = 'full'
    members: int = 1

    def __post_init__(self) -> None:
        if unknown := set(self.targets) - set(LINEARS):
            raise ValueError(f'targets: found {sorted(unknown)}, expected some of {LINEARS}')
        if self.learns == 'adapter' and self.rank < 1:
            raise ValueError(f'rank: found {self.rank}, expected at least 1')


SCORING = Method('nothing', rank=0, remat='none')


class Load(NamedTuple):
    """What goes through the model: tokens through the linears, rows through attention."""

    tokens: int
    rows: tuple[tuple[int, int], ...]  # (how many, how long)
    reads: int  # tokens of the top layer whose states are read: two a row
    seen: int  # keys that those see, all together
    scores: int


def of_shape(shape: packing.Shape, packs: int = 1) -> Load:
    """The load of packs of a shape, padding included."""
    rows = tuple((packs * r, s) for r, s in shape.rows)
    count, slots = sum(r for r, _ in rows), sum(r * s for r, s in rows)
    scores = packs * shape.prompts * shape.candidates
    return Load(packs * shape.tokens, rows, 2 * count, 2 * slots, scores)


def of_tokens(tokens: Tokens) -> Load:
    """What records need at the least: every real token once, rows at their true lengths."""
    length = packing.row_lengths(tokens)
    gate = np.repeat(tokens.gate, np.diff(tokens.first))
    lengths, counts = np.unique(length, return_counts=True)
    rows = tuple((int(n), int(s)) for n, s in zip(counts, lengths, strict=True))
    seen = int((length + gate + 1).sum())
    return Load(len(tokens.ids), rows, 2 * len(length), seen, len(length))


# Sizes


def linears(c: Config) -> dict[str, tuple[int, int]]:
    """(in, out) of each linear of a layer."""
    heads, keys = c.Q * c.H, c.K * c.H
    return {
        'q': (c.D, heads),
        'k': (c.D, keys),
        'v': (c.D, keys),
        'o': (heads, c.D),
        'gate': (c.D, c.F),
        'up': (c.D, c.F),
        'down': (c.F, c.D),
    }


def layer_weights(c: Config) -> int:
    """Elements of a layer's kernels."""
    return sum(a * b for a, b in linears(c).values())


Leaves = dict[str, tuple[int, ...]]  # shapes by name


def _layer(c: Config) -> Leaves:
    norms = [
        'attn_norm',
        'mlp_norm',
        *(('attn_post_norm', 'mlp_post_norm') if c.post_norms else ()),
    ]
    out: Leaves = {f'{name}/scale': (c.D,) for name in norms}
    out |= {f'{name}/scale': (c.H,) for name in ('q_norm', 'k_norm') if c.qk_norm}
    out |= {f'{name}/kernel': sizes for name, sizes in linears(c).items()}
    return out | {f'{name}/bias': linears(c)[name][1:] for name in c.biases}


def _stacked(c: Config, layer: Leaves) -> Leaves:
    lower = {f'layers/{name}': (c.L - 1, *shape) for name, shape in layer.items()}
    return (lower if c.L > 1 else {}) | {f'top/{name}': shape for name, shape in layer.items()}


def backbone_leaves(c: Config) -> Leaves:
    """Shapes of a backbone's parameters."""
    ends: Leaves = {'embed/embedding': (c.V, c.D), 'norm/scale': (c.D,)}
    return ends | _stacked(c, _layer(c))


def adapter_leaves(c: Config, method: Method) -> Leaves:
    """Shapes of an adapter's; none without one."""
    sizes, rank = linears(c), method.rank
    names = method.targets if rank else ()
    layer: Leaves = {f'{name}/a': (sizes[name][0], rank) for name in names}
    return _stacked(c, layer | {f'{name}/b': (rank, sizes[name][1]) for name in names})


def elements(leaves: Leaves) -> int:
    """How many numbers they have."""
    return sum(math.prod(shape) for shape in leaves.values())


# FLOPs


class Flops(NamedTuple):
    """FLOPs (two a multiply-add) by what they are spent on."""

    linears: int
    adapters: int
    attention: int
    head: int

    @property
    def total(self) -> int:
        """All of them."""
        return sum(self)


Through = dict[str, int]  # tokens through each linear


def _lower(c: Config, load: Load) -> Through:
    return dict.fromkeys(LINEARS, (c.L - 1) * load.tokens)


def _through(c: Config, load: Load) -> Through:
    """Of all layers: of the top one only k and v take the whole stream."""
    top = {name: load.tokens if name in 'kv' else load.reads for name in LINEARS}
    return {name: n + top[name] for name, n in _lower(c, load).items()}


def _linear(c: Config, through: Through) -> dict[str, int]:
    return {name: 2 * through[name] * a * b for name, (a, b) in linears(c).items()}


def _adapter(c: Config, through: Through, method: Method) -> dict[str, tuple[int, int]]:
    """FLOPs of the two factors at each adapted linear."""
    sizes, rank = linears(c), method.rank
    return {
        name: (2 * through[name] * sizes[name][0] * rank, 2 * through[name] * rank * sizes[name][1])
        for name in method.targets
        if rank
    }


def pairs(length: int, window: int | None = None) -> int:
    """(query, key) pairs of a causal row; a token sees `window` tokens, itself the last."""
    w = min(window or length, length)
    return w * (w + 1) // 2 + (length - w) * w


def _attention(c: Config, load: Load, kernel: int, plain: int) -> int:
    """FLOPs of so many products on the rows of the lower layers, and at what the top one reads."""
    on_rows = 0
    for kind in c.of_layer[:-1]:
        window = c.kinds[kind].window
        on_rows += sum(n * pairs(s, window) for n, s in load.rows)
    return 2 * c.Q * c.H * (kernel * on_rows + plain * load.seen)


def forward(c: Config, load: Load, method: Method = SCORING) -> Flops:
    """FLOPs of the scores of a load: the top layer is computed where it is read."""
    through = _through(c, load)
    adapters = sum(a + b for a, b in _adapter(c, through, method).values())
    one = Flops(
        sum(_linear(c, through).values()),
        adapters,
        _attention(c, load, KERNEL[0], PLAIN[0]),
        2 * c.D * load.scores,
    )
    return _times(one, method.members)


def step(c: Config, load: Load, method: Method) -> Flops:
    """FLOPs of the gradients of a load (of the scores, where nothing learns)."""
    if method.learns == 'nothing':
        return forward(c, load, method)
    once = forward(c, load, dataclasses.replace(method, members=1))
    again = _recomputed(c, load, method)
    weights = once.linears if method.learns == 'everything' else 0
    one = Flops(
        2 * once.linears + weights + again.linears,
        3 * once.adapters + again.adapters,
        _attention(c, load, sum(KERNEL), sum(PLAIN)) + again.attention,
        3 * once.head,
    )
    return _times(one, method.members)


def _recomputed(c: Config, load: Load, method: Method) -> Flops:
    """What the backward pass computes again of the lower layers; the top one keeps everything.

    The last product of a layer is not needed for it, unless a norm follows.
    """
    if method.remat == 'none':
        return Flops(0, 0, 0, 0)
    attention, lower = _attention(c, load, KERNEL[0], 0), _lower(c, load)
    linear, adapter = _linear(c, lower), _adapter(c, lower, method)
    kept = KEPT[method.remat]
    again = [n for n in LINEARS if n not in kept and (n != 'down' or c.post_norms)]
    low = 0 if 'low' in kept else sum(a for a, _ in adapter.values())
    adapters = low + sum(adapter[n][1] for n in again if n in adapter)
    if 'o' in kept and 'o' not in adapter and method.learns != 'everything':
        attention = 0  # nobody asks for what went into it
    return Flops(sum(linear[n] for n in again), adapters, attention, 0)


def _times(flops: Flops, members: int) -> Flops:
    return Flops(*(members * x for x in flops))


def model_flops(c: Config, load: Load, method: Method) -> int:
    """FLOPs that are needed, none recomputed: those of a step's rate in tokens/s."""
    return step(c, load, dataclasses.replace(method, remat='none')).total


# Bytes


class State(NamedTuple):
    """Bytes of what a run holds from step to step, and of the gradients."""

    weights: int
    adapters: int
    moments: int
    gradients: int


def state(
    c: Config, method: Method, *, count: Callable[[Leaves], int] = elements, width: int = 2
) -> State:
    """Of all devices, or of one, by a `count` of the elements that one holds.

    Frozen weights have `width` bytes each; what learns is in float32, as Adam's two moments are.
    """
    backbone = count(backbone_leaves(c))
    learning = count({'head/kernel': (c.D, 1)})
    everything = method.learns == 'everything'
    learning += backbone if everything else count(adapter_leaves(c, method))
    learning *= 4 * method.members
    trains = method.learns != 'nothing'
    weights, adapters = (learning, 0) if everything else (width * backbone, learning)
    return State(weights, adapters, 2 * learning * trains, learning * trains)


class Saved(NamedTuple):
    """Elements kept from the forward pass for the backward, of one layer."""

    token: int  # a token of the stream
    slot: int  # a slot of a row


def saved(c: Config, method: Method) -> Saved:
    """What one layer keeps, by the policy of rematerialisation; nothing where nothing learns."""
    if method.learns == 'nothing':
        return Saved(0, 0)
    heads, keys, r = c.Q * c.H, c.K * c.H, method.rank if method.learns == 'adapter' else 0
    low = r * len(method.targets)
    if method.remat != 'none':
        kept, sizes = KEPT[method.remat], linears(c)
        results = [n for n in LINEARS if n in kept and (n != 'down' or c.post_norms)]
        return Saved(c.D + sum(sizes[n][1] for n in results) + low * ('low' in kept), 0)
    # Two normed states, what attended, and six between gate, up and down; in float32 each norm's
    # input, and where its scale learns the result. Rows keep q, k, v and what attended, with the
    # logarithm of what the softmax divides by.
    norms = 4 if method.learns == 'everything' else 2
    stream = (2 + 2 * norms) * c.D + heads + 6 * c.F
    return Saved(stream + low, 2 * heads + 2 * keys + 2 * c.Q)


def layer_activations(c: Config, load: Load, method: Method, *, width: int = 2) -> int:
    """Bytes that one layer keeps of a load from the forward pass for the backward."""
    kept, slots = saved(c, method), sum(n * s for n, s in load.rows)
    return width * (kept.token * load.tokens + kept.slot * slots) * method.members


def activations(c: Config, load: Load, method: Method, *, width: int = 2) -> int:
    """The same of all lower layers; the top one keeps little, where it is read.

    Weights that learn are cast where they are used, and the copies are kept, too, unless a layer is
    computed again.
    """
    cast = method.learns == 'everything' and method.remat == 'none'
    copies = width * layer_weights(c) * cast
    return (c.L - 1) * (layer_activations(c, load, method, width=width) + copies)


def operands(c: Config) -> int:
    """Elements that a layer's linears read and write for each token: what memory must move."""
    heads, keys = c.Q * c.H, c.K * c.H
    read = c.D + heads + c.D + c.F
    written = heads + 2 * keys + c.D + 2 * c.F + c.D
    return read + written


def passes(method: Method) -> int:
    """How often the linears' weights are gone through: forward, again, backward, their gradients.

    That of a weight's own gradient counts as one.
    """
    if method.learns == 'nothing':
        return 1
    return 2 + (method.remat == 'full') + (method.learns == 'everything')


class Moved(NamedTuple):
    """Bytes between a device's memory and its arithmetic."""

    weights: int
    activations: int
    optimiser: int


def moved(c: Config, load: Load, method: Method, learning: int, *, width: int = 2) -> Moved:
    """What one device moves at the least for its load; `learning` are its bytes of gradients.

    Weights are read once a pass, wherever they lie, with what the linears take and give; the
    optimiser reads the gradient, and reads and writes weights and two moments.
    """
    times = passes(method) * width * c.L
    tokens = operands(c) * load.tokens * method.members
    return Moved(times * layer_weights(c), times * tokens, 7 * learning)
