"""What a compiled program sends between chips, read from the text of its optimised HLO.

The text has loops, whose bodies run as often as their counters say, and collectives that overlap
with arithmetic, which stand in several computations under one channel.
"""

import dataclasses
import math
import re
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from jaxrm import packing

BYTES = {
    'pred': 1, 's8': 1, 'u8': 1, 's16': 2, 'u16': 2, 'bf16': 2, 'f16': 2, 's32': 4, 'u32': 4,
    'f32': 4, 's64': 8, 'u64': 8, 'f64': 8, 'c64': 8,
}  # fmt: skip
# What a chip sends of an array, in rings of n chips: of what goes in, or of what comes out.
KINDS = {
    'all-gather': lambda n, given, taken: given * (n - 1) / n,
    'all-reduce': lambda n, given, taken: 2 * taken * (n - 1) / n,
    'reduce-scatter': lambda n, given, taken: taken * (n - 1) / n,
    'all-to-all': lambda n, given, taken: taken * (n - 1) / n,
    'ragged-all-to-all': lambda n, given, taken: taken * (n - 1) / n,
    'collective-broadcast': lambda n, given, taken: taken,
    'collective-permute': lambda n, given, taken: taken,
}
HEAD = re.compile(r'^(ENTRY )?%([^ ]+) \(.*\{$')
ARRAY = re.compile(r'\b([a-z]+\d*)\[([\d,]*)\]')
CALLED = re.compile(r'\b(?:calls|to_apply|body|called_computations)=\{?%([^ ,}]+)')


class Instruction(NamedTuple):
    """One line of a computation."""

    name: str
    type: str
    opcode: str
    operands: tuple[str, ...]
    rest: str  # attributes


Computation = dict[str, Instruction]


@dataclasses.dataclass(frozen=True)
class Collective:
    """One that runs `times` times and makes each chip send `sent` bytes in all."""

    kind: str
    sent: float
    times: int
    shapes: tuple[tuple[int, ...], ...]
    types: tuple[str, ...]
    of: str  # the operation of the source


def _closing(text: str, at: int) -> int:
    """Where the parenthesis that opens at `at` closes."""
    depth = 0
    for i in range(at, len(text)):
        depth += (text[i] == '(') - (text[i] == ')')
        if not depth:
            return i
    return len(text)


def _instruction(line: str) -> Instruction | None:
    found = re.match(r'\s+(?:ROOT )?%([^ ]+) = ', line)
    if not found:
        return None
    start = found.end()
    end = _closing(line, start) + 1 if line[start] == '(' else line.find(' ', start)
    opens = line.find('(', end)
    if end <= 0 or opens < 0:
        return None
    closes = _closing(line, opens)
    operands = tuple(re.findall(r'%([^ ,)]+)', line[opens:closes]))
    opcode = line[end:opens].strip()
    constant = line[opens + 1 : closes] if opcode == 'constant' else ''
    return Instruction(found[1], line[start:end], opcode, operands, constant + line[closes + 1 :])


def computations(text: str) -> tuple[str, dict[str, Computation], dict[str, str]]:
    """(name of the entry, instructions by computation and name, name of each one's root)."""
    found: dict[str, Computation] = {}
    roots: dict[str, str] = {}
    entry = name = ''
    for line in text.splitlines():
        if head := HEAD.match(line):
            name = head[2]
            found[name] = {}
            entry = name if head[1] else entry
        elif name and (made := _instruction(line)):
            found[name][made.name] = made
            if line.lstrip().startswith('ROOT'):
                roots[name] = made.name
    return entry, found, roots


def arrays(text: str) -> list[tuple[str, tuple[int, ...]]]:
    """(dtype, shape) of the arrays of a type."""
    return [
        (t, tuple(int(d) for d in dims.split(',') if d))
        for t, dims in ARRAY.findall(text)
        if t in BYTES
    ]


def size(found: Sequence[tuple[str, tuple[int, ...]]]) -> int:
    """Bytes."""
    return sum(BYTES[t] * math.prod(s) for t, s in found)


def _number(inside: Computation, name: str) -> int | None:
    made = inside.get(name)
    while made and made.opcode in ('copy', 'bitcast', 'convert') and made.operands:
        made = inside.get(made.operands[0])
    found = made and made.opcode == 'constant' and re.match(r'-?\d+', made.rest)
    return int(found[0]) if found else None


def _trips(loop: Instruction, outer: Computation, all_: dict[str, Computation], roots) -> int:
    """How often a loop's body runs: as it says, or as its counter starts, steps and stops."""
    if said := re.search(r'known_trip_count":\{"n":"(\d+)"', loop.rest):
        return int(said[1])
    body, condition = (re.search(rf'{k}=%([^ ,]+)', loop.rest) for k in ('body', 'condition'))
    if not body or not condition:
        raise ValueError(f'{loop.name}: found no body and condition')
    test = all_[condition[1]]
    compare = test[roots[condition[1]]]
    limit = next((n for o in compare.operands if (n := _number(test, o)) is not None), None)
    index = next(
        (
            int(found[1])
            for o in compare.operands
            if o in test and (found := re.match(r', index=(\d+)', test[o].rest))
        ),
        None,
    )
    if limit is None or index is None or 'direction=LT' not in compare.rest:
        raise ValueError(f'{loop.name}: found no counter below a constant')
    given = outer.get(loop.operands[0])
    start = given and given.opcode == 'tuple' and _number(outer, given.operands[index])
    inside = all_[body[1]]
    step = _step(inside, inside[roots[body[1]]], index)
    return -(-(limit - (start or 0)) // step)


def _step(inside: Computation, root: Instruction, index: int) -> int:
    made = inside.get(root.operands[index])
    while made and made.opcode in ('copy', 'bitcast') and made.operands:
        made = inside.get(made.operands[0])
    if made and made.opcode == 'add':
        return next((n for o in made.operands if (n := _number(inside, o)) is not None), 1)
    return 1


def _times(entry: str, all_: dict[str, Computation], roots: dict[str, str]) -> dict[str, int]:
    """How often each computation that runs at all runs."""
    times = {entry: 1}
    stack = [entry]
    while stack:
        name = stack.pop()
        for made in all_[name].values():
            factor = times[name]
            if made.opcode == 'while':
                factor *= _trips(made, all_[name], all_, roots)
            for called in CALLED.findall(made.rest):
                if called in all_ and factor > times.get(called, 0):
                    times[called] = factor
                    stack.append(called)
    return times


def _group(rest: str) -> int:
    """Of how many chips one group of a collective is, in any of the ways it is written."""
    if found := re.search(r'replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}', rest):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", found[1]))
        parts = re.findall(r"'(\w+)'(?::\(\d+\)(\d+))?", found[2])  # an axis, or a part of one
        return math.prod(int(part or sizes[axis]) for axis, part in parts)
    if found := re.search(r'replica_groups=\[\d+,(\d+)\]', rest):
        return int(found[1])
    if found := re.search(r'replica_groups=\{\{([\d,]*)\}', rest):
        return found[1].count(',') + 1
    if 'source_target_pairs=' in rest:
        return 1  # a permutation's does not matter
    raise ValueError(f'replica_groups: not understood: {rest[:200]}')


def _one(made: Instruction, inside: Computation, times: int) -> Collective:
    kind = made.opcode.removesuffix('-start')
    taken = [a for o in made.operands if o in inside for a in arrays(inside[o].type)]
    given = arrays(made.type)
    if made.opcode.endswith('-start') and kind != 'all-reduce':
        given = given[len(taken) :]
    given = [a for a in given if a[1]]
    sent = KINDS[kind](_group(made.rest), size(given), size(taken)) * times
    name = re.search(r'op_name="([^"]*)"', made.rest)
    shapes = tuple(sorted({s for _, s in (*taken, *given)}))
    types = tuple(sorted({t for t, _ in taken}))
    return Collective(kind, sent, times, shapes, types, name[1] if name else '')


def collectives(text: str) -> list[Collective]:
    """Those of the program of one chip, each once, with how often it runs."""
    entry, all_, roots = computations(text)
    found: dict[Any, Collective] = {}
    for name, times in _times(entry, all_, roots).items():
        for made in all_[name].values():
            if made.opcode.removesuffix('-start') not in KINDS:
                continue
            channel = re.search(r'channel_id=(\d+)', made.rest)
            key = channel[1] if channel else made.name
            one = _one(made, all_[name], times)
            if (
                key not in found or one.sent < found[key].sent
            ):  # where it starts, not what it overlaps
                found[key] = one
    return list(found.values())


def along(shape: Sequence[int], lengths: Sequence[int]) -> bool:
    """Whether a dimension is one of the lengths, or several of them laid end to end."""
    return any(d and d % n == 0 for d in shape for n in lengths)


def sums(found: Sequence[Collective]) -> Iterator[Collective]:
    """Those that add up: gradients, and what chips that share a layer have computed of it."""
    return (c for c in found if c.kind in ('all-reduce', 'reduce-scatter'))


def summary(text: str, shape: packing.Shape) -> dict[str, Any]:
    """Bytes that a chip sends: by kind, of the stream and rows, and of what is added up.

    `embedding` are those of the stream that bring embeddings to their chips. An array is the
    stream's or a row's by its lengths, so these should divide no size of the model.
    """
    found = collectives(text)
    lengths = (shape.tokens, *(s for _, s in shape.rows))
    stream = [c for c in found if any(along(s, lengths) for s in c.shapes)]
    embedding = [c for c in stream if '/embed' in c.of]
    rest = [c for c in stream if c not in embedding]
    total = lambda of: round(sum(c.sent for c in of))  # noqa: E731
    kinds = sorted({c.kind for c in found})
    return {
        'sent': {kind: total(c for c in found if c.kind == kind) for kind in kinds},
        'sent_embedding': total(embedding),
        'sent_stream': total(rest),
        'stream': [f'{c.kind} {c.shapes} {c.of}' for c in rest],
        'sums': total(sums(found)),
        'largest_sum': max((math.prod(s) for c in sums(found) for s in c.shapes), default=0),
    }
