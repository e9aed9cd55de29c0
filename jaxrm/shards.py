"""Safetensors files, a tensor at a time: reading one, and writing shards of bounded size.

Nothing but the tensor at hand is held in memory, and no file is mapped into it.
"""

import json
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

# By the names of the format, in its order: tensors of a file lie by dtype, last first, then name.
DTYPES = {
    'F16': np.dtype(np.float16),
    'BF16': np.dtype(ml_dtypes.bfloat16),
    'F32': np.dtype(np.float32),
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
MOST = 100_000_000  # bytes of a header, as in the format's own library


class Entry(NamedTuple):
    """Where a tensor lies; `begin` is its first byte in the file."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    begin: int


def entries(file: Path) -> dict[str, Entry]:
    """The tensors of a file, from its header; raises ValueError for what is none."""
    try:
        with open(file, 'rb') as opened:
            size = int.from_bytes(opened.read(8), 'little')
            if not 2 <= size <= MOST:
                raise ValueError(f'found a header of {size} bytes')
            header = json.loads(opened.read(size))
        header.pop('__metadata__', None)
        made = {name: _entry(file, x, 8 + size) for name, x in header.items()}
        end = 8 + size + max((x['data_offsets'][1] for x in header.values()), default=0)
        if end != file.stat().st_size:
            raise ValueError(f'found {file.stat().st_size} bytes, expected {end}')
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f'{file}: not a readable safetensors file: {error}') from error
    return made


def _entry(file: Path, x: Any, start: int) -> Entry:
    begin, end = x['data_offsets']
    if not 0 <= begin <= end or any(type(n) is not int or n < 0 for n in x['shape']):
        raise ValueError(f'found {x} in the header')
    entry = Entry(file, str(x['dtype']), tuple(x['shape']), start + begin)
    if entry.dtype in DTYPES and end - begin != size(entry.shape, DTYPES[entry.dtype]):
        raise ValueError(f'found {end - begin} bytes for {entry.dtype} {list(entry.shape)}')
    return entry


def size(shape: tuple[int, ...], dtype: np.dtype) -> int:
    return math.prod(shape) * dtype.itemsize


def read(entry: Entry) -> np.ndarray:
    """A tensor of a dtype in DTYPES."""
    count = math.prod(entry.shape)
    try:
        found = np.fromfile(entry.file, DTYPES[entry.dtype], count, offset=entry.begin)
    except OSError as error:
        raise ValueError(f'{entry.file}: cannot be read: {error.strerror}') from error
    if found.size < count:
        raise ValueError(f'{entry.file}: ends within a tensor, which it did not before')
    return found.reshape(entry.shape)


def write(
    folder: Path,
    tensors: Mapping[str, tuple[tuple[int, ...], np.dtype]],
    value: Callable[[str], np.ndarray],
    *,
    limit: int,
    stem: str = 'model',
) -> None:
    """Writes tensors of these shapes and dtypes as transformers does.

    That is one file, or shards of at most `limit` bytes and an index; a tensor beyond the limit has
    a shard of its own. `value(name)` is asked once for each; what the disk has not taken when this
    returns, `flush` waits for.
    """
    sizes = {name: size(*each) for name, each in tensors.items()}
    parts = split(sizes, limit)
    files = [f'{stem}-{i + 1:05d}-of-{len(parts):05d}.safetensors' for i in range(len(parts))]
    if len(parts) == 1:
        files = [f'{stem}.safetensors']
    for file, names in zip(files, parts, strict=True):
        _write_one(folder / file, {name: tensors[name] for name in names}, value)
    if len(parts) > 1:
        count = sum(math.prod(shape) for shape, _ in tensors.values())
        where = {name: file for file, names in zip(files, parts, strict=True) for name in names}
        index = {
            'metadata': {'total_parameters': count, 'total_size': sum(sizes.values())},
            'weight_map': where,
        }
        text = json.dumps(index, indent=2, sort_keys=True) + '\n'
        (folder / f'{stem}.safetensors.index.json').write_text(text, encoding='utf-8')


def split(sizes: Mapping[str, int], limit: int) -> list[list[str]]:
    """Names in natural order, cut where the next one would pass the limit."""
    parts: list[list[str]] = []
    current: list[str] = []
    used = 0
    for name in sorted(sizes, key=_natural):
        if sizes[name] > limit:
            parts.append([name])
            continue
        if used + sizes[name] > limit:
            parts.append(current)
            current, used = [], 0
        current.append(name)
        used += sizes[name]
    return [*parts, current] if current else parts


def _natural(name: str) -> list[tuple[bool, int, str]]:
    return [(not p.isdigit(), int(p) if p.isdigit() else 0, p) for p in name.split('.')]


def _write_one(
    path: Path,
    tensors: Mapping[str, tuple[tuple[int, ...], np.dtype]],
    value: Callable[[str], np.ndarray],
) -> None:
    place = list(NAMES)
    order = sorted(tensors, key=lambda name: (-place.index(tensors[name][1]), name))
    header: dict[str, Any] = {'__metadata__': {'format': 'pt'}}
    end = 0
    for name in order:
        shape, dtype = tensors[name]
        begin, end = end, end + size(shape, dtype)
        header[name] = {'dtype': NAMES[dtype], 'shape': shape, 'data_offsets': [begin, end]}
    text = json.dumps(header, separators=(',', ':'), ensure_ascii=False).encode()
    text += b' ' * (-len(text) % 8)
    try:
        with open(path, 'wb') as file:
            file.write(len(text).to_bytes(8, 'little') + text)
            for name in order:
                file.write(_bytes(name, value(name), *tensors[name]))
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error


def _bytes(name: str, x: np.ndarray, shape: tuple[int, ...], dtype: np.dtype) -> memoryview:
    if x.shape != shape or x.dtype != dtype:
        raise ValueError(f'{name}: found {x.dtype} {x.shape}, expected {dtype} {shape}')
    return memoryview(np.ascontiguousarray(x).reshape(-1).view(np.uint8))


def flush(*paths: Path) -> None:
    """Waits until files, or the names in folders, are on the disk."""
    for path in paths:
        number = os.open(path, os.O_RDONLY)
        try:
            os.fsync(number)
        finally:
            os.close(number)
