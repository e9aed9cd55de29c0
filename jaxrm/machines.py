"""Accelerators by name: what one does, holds and sends, and how many stand together.

Peaks are those of the makers' data sheets (dense bfloat16), bandwidths too, one way.
"""

import dataclasses
import math
import re

GB, TERA = 10**9, 10**12
GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """One accelerator."""

    peak: float  # FLOP/s, dense bfloat16
    memory: int  # bytes that a program may use
    bandwidth: float  # bytes/s of that memory
    link: float  # bytes/s one way, of one link of a TPU, of all together of a GPU
    axes: int = 0  # of a TPU's torus
    around: int = 0  # an axis of this many chips, or a multiple, closes to a ring


@dataclasses.dataclass(frozen=True)
class Machine:
    """Chips that work together; of a TPU `topology` has their number along each axis."""

    name: str
    chip: Chip
    topology: tuple[int, ...]

    @property
    def chips(self) -> int:
        """How many there are."""
        return math.prod(self.topology)

    @property
    def tpu(self) -> bool:
        """Whether it is a slice of TPUs."""
        return self.chip.axes > 0

    @property
    def network(self) -> float:
        """Bytes/s that a chip sends, one way: of a TPU, the one with the fewest links."""
        if not self.tpu:
            return self.chip.link
        return self.chip.link * sum(self._links(n) for n in self.topology)

    def _links(self, along: int) -> int:
        if along == 1:
            return 0
        return 2 if along % self.chip.around == 0 else 1


RESERVED = 0.92  # of a GPU's memory, for JAX's programs: `programs.reserve` asks for as much


def _gpu(peak: float, gib: float, bandwidth: float, link: float) -> Chip:
    """`gib` are what CUDA says it has in all, a little less than what it is sold with."""
    return Chip(peak, int(RESERVED * gib * GIB), bandwidth, link)


# What a program may use of a TPU is what its compiler says.
CHIPS = {
    'v5e': Chip(197 * TERA, int(15.75 * GIB), 819 * GB, 50 * GB, axes=2, around=16),
    'v5p': Chip(459 * TERA, int(95.73 * GIB), 2765 * GB, 100 * GB, axes=3, around=4),
    'v6e': Chip(918 * TERA, int(31.24 * GIB), 1638 * GB, 100 * GB, axes=2, around=16),
    'h100': _gpu(989 * TERA, 79, 3350 * GB, 450 * GB),
    'h200': _gpu(989 * TERA, 139.5, 4800 * GB, 450 * GB),
    'a100-80gb': _gpu(312 * TERA, 79, 2039 * GB, 300 * GB),
    'rtx-4090': _gpu(165 * TERA, 23.5, 1008 * GB, 32 * GB),
}
# Of v5p a type counts cores, two a chip.
TYPES = {'v5litepod': ('v5e', 1), 'v5e': ('v5e', 1), 'v5p': ('v5p', 2), 'v6e': ('v6e', 1)}
MOST = 8  # GPUs of one host; what is between hosts is not known
SLICES = {
    2: ('1x1', '2x2', '2x4', '4x4', '4x8', '8x8', '8x16', '16x16'),
    3: ('2x2x1', '2x2x2', '2x2x4', '2x4x4', '4x4x4', '4x4x8', '4x8x8', '8x8x8', '8x8x16'),
}


def _typed(text: str) -> str:
    """'v6e:4x4' of 'v6e-16' or 'v5p:2x2x1' of 'v5p-8', as clouds name them; else the text."""
    found = re.fullmatch(r'(\w+)-(\d{1,5})', text)
    if not found or found[1] not in TYPES:
        return text
    name, cores = TYPES[found[1]]
    for size in SLICES[CHIPS[name].axes]:
        if cores * math.prod(map(int, size.split('x'))) == int(found[2]):
            return f'{name}:{size}'
    return text


def parse(text: str) -> Machine:
    """The machine of 'v5e:4x4', 'v5p:2x2x2' or 'h100:8'; a GPU alone is 'h100'.

    A TPU may also be called by its accelerator type, as 'v5litepod-16', 'v6e-16' or 'v5p-8'.
    Raises ValueError for one that there is not, naming those that there are.
    """
    name, _, size = _typed(text.lower()).partition(':')
    if name not in CHIPS:
        raise ValueError(
            f'machine: found {text!r}, expected one of {sorted(CHIPS)} with a size, as v6e:4x4, '
            'v6e-16 or h100:8'
        )
    chip = CHIPS[name]
    if chip.axes:
        slices = SLICES[chip.axes]
        if size not in slices:
            raise ValueError(f'machine: found {text!r}, expected {name}: and one of {slices}')
        return Machine(f'{name}:{size}', chip, tuple(int(n) for n in size.split('x')))
    if not re.fullmatch(r'\d{0,3}', size) or not 1 <= int(size or 1) <= MOST:
        raise ValueError(f'machine: found {text!r}, expected {name}: and 1 to {MOST}, of one host')
    return Machine(f'{name}:{size or 1}', chip, (int(size or 1),))
