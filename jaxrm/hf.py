"""Tensors of Hugging Face folders: their names, their leaves in the parameter tree, their files."""

import contextlib
import fcntl
import functools
import json
import os
import platform
import re
import shutil
import tempfile
import time
import uuid
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import jax
import ml_dtypes  # noqa: F401  (makes bfloat16 a dtype of numpy)
import numpy as np
from etils import epath

from jaxrm import hf_heads, packing, shards, tree
from jaxrm.backbones.layers import Config
from jaxrm.hf_heads import HEADS as HEADS
from jaxrm.hf_heads import SCALAR, Sizes

CONFIG, ADAPTER = 'config.json', 'adapter_config.json'
DTYPES = {name: dtype.name for name, dtype in shards.DTYPES.items()}
COMPUTED = re.compile(r'rotary_emb\.inv_freq$')  # stored by old releases, follows from the config
LAYER = '{}'
DAY = 86_400.0  # seconds


class Slot(NamedTuple):
    """Where a tensor lives: a leaf, its layer if the leaf is a stack of layers, the leaf's shape.

    The leaf's name starts with its part, as in `backbone/layers/q/kernel`.
    """

    leaf: str
    layer: int | None
    shape: tuple[int, ...]

    @property
    def transposed(self) -> bool:
        """Linear maps are [in, out] here and [out, in] on disk, adapters included."""
        return self.leaf.rsplit('/', 1)[1] in ('kernel', 'a', 'b')

    @property
    def on_disk(self) -> tuple[int, ...]:
        shape = self.shape if self.layer is None else self.shape[1:]
        return shape[::-1] if self.transposed else shape


def head_layout(head: str | None, config: Config, sizes: Sizes = SCALAR) -> dict[str, Slot]:
    """{name: slot} of a head's own tensors; `head` is a key of HEADS or None."""
    leaves = hf_heads.layout(head, config, sizes)
    return {name: Slot(leaf, None, shape) for name, (leaf, shape) in leaves.items()}


def layout(
    family: ModuleType, config: Config, head: str | None, sizes: Sizes = SCALAR
) -> dict[str, Slot]:
    """{name: slot} of every tensor of a model; `head` is a key of HEADS or None."""
    shapes, out = _backbone_shapes(family, config), {}
    for pattern, leaf in family.NAMES:
        if leaf.format('top') not in shapes:
            continue  # what models of other settings have
        if LAYER not in pattern:
            out[pattern] = Slot('backbone/' + leaf, None, shapes[leaf])
            continue
        for i in range(config.L):
            top = i == config.L - 1
            stacked = leaf.format('top' if top else 'layers')
            slot = Slot('backbone/' + stacked, None if top else i, shapes[stacked])
            out[pattern.format(i)] = slot
    return out | head_layout(head, config, sizes)


@functools.lru_cache(64)
def _backbone_shapes(family: ModuleType, config: Config) -> dict[str, tuple[int, ...]]:
    one_token = packing.padded(None, (), (1, 1))  # type: ignore[arg-type]  # no record is read
    variables = jax.eval_shape(family.Backbone(config).init, jax.random.key(0), one_token)
    return {name: leaf.shape for name, leaf in tree.flatten(variables['params']).items()}


# Reading


def find(folder: Path, stem: str = 'model') -> dict[str, Path]:
    """{tensor name: file} of `<stem>.safetensors`, or of the shards its index lists.

    Raises ValueError when there is neither, or when index and shards disagree.
    """
    single, index = folder / f'{stem}.safetensors', folder / f'{stem}.safetensors.index.json'
    if single.exists():
        return dict.fromkeys(shards.entries(single), single)
    if not index.exists():
        pickles = sorted(p.name for p in folder.glob('*.bin'))
        hint = f'{pickles}, which are pickles and are not read' if pickles else 'no weights'
        raise ValueError(f'{folder}: found {hint}, expected {single.name} or {index.name}')
    listed = read_json(index).get('weight_map')
    if not isinstance(listed, dict) or not all(isinstance(f, str) for f in listed.values()):
        raise ValueError(f'{index}: found no weight_map, expected one from names to files')
    for shard in sorted(set(listed.values())):
        if Path(shard).name != shard or not (folder / shard).exists():
            raise ValueError(f'{index}: names {shard!r}, expected a file beside it')
        here = {name for name, file in listed.items() if file == shard}
        if odd := here ^ set(shards.entries(folder / shard)):
            raise ValueError(f'{folder / shard}: {sorted(odd)[:5]} only here or only in the index')
    return {name: folder / shard for name, shard in listed.items()}


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; raises ValueError naming the file when it holds anything else."""
    if not path.exists():
        raise ValueError(f'{path.parent}: no {path.name}')
    try:
        value = json.loads(path.read_text(encoding='utf-8'))
    except ValueError as e:
        raise ValueError(f'{path}: not JSON: {e}') from e
    if not isinstance(value, dict):
        raise ValueError(f'{path}: found {type(value).__name__}, expected an object')
    return value


def read(files: Mapping[str, Path], slots: Mapping[str, Slot], *, dtype: Any = None) -> tree.Tree:
    """The tree that `slots` describes, as numpy arrays in their stored dtype or in `dtype`.

    One tensor at a time goes into preallocated stacks. Raises ValueError as `entries` does, and
    naming a tensor that holds NaN or infinity.
    """
    leaves: dict[str, np.ndarray] = {}
    for name, entry in entries(files, slots).items():
        _put(leaves, f'{entry.file}: {name}', slots[name], shards.read(entry), dtype)
    return tree.unflatten(leaves)


def entries(files: Mapping[str, Path], slots: Mapping[str, Slot]) -> dict[str, shards.Entry]:
    """Where each tensor lies, file by file.

    Raises ValueError listing the missing and unexpected tensors, or a file's misshapen ones.
    """
    files = {n: f for n, f in files.items() if not COMPUTED.search(n)}
    problems = [
        f'{n}: found nothing, expected {list(s.on_disk)}'
        for n, s in slots.items()
        if n not in files
    ]
    problems += [
        f'{n}: found in {files[n].name}, expected no such tensor' for n in files.keys() - slots
    ]
    _raise(files, problems)
    out: dict[str, shards.Entry] = {}
    for path in sorted(set(files.values())):
        here = {n: e for n, e in shards.entries(path).items() if files.get(n) == path}
        _raise(files, [p for n, e in here.items() for p in _wrong(n, e, slots[n])])
        out |= here
    return out


def read_one(files: Mapping[str, Path], name: str) -> np.ndarray:
    """One tensor as it is on disk."""
    return shards.read(shards.entries(files[name])[name])


def shape_on_disk(files: Mapping[str, Path], name: str) -> tuple[int, ...]:
    """Of one tensor, from its file's header."""
    return shards.entries(files[name])[name].shape


def _wrong(name: str, entry: shards.Entry, slot: Slot) -> Iterator[str]:
    if entry.shape != slot.on_disk:
        yield f'{name}: found shape {list(entry.shape)}, expected {list(slot.on_disk)}'
    if entry.dtype not in DTYPES:
        yield f'{name}: found dtype {entry.dtype}, expected one of {sorted(DTYPES)}'


def _put(leaves: dict[str, np.ndarray], what: str, slot: Slot, x: np.ndarray, dtype: Any) -> None:
    """Writes a tensor into its leaf, made at its first tensor."""
    leaf = leaves.get(slot.leaf)
    if leaf is None:
        leaf = leaves[slot.leaf] = np.empty(slot.shape, dtype or x.dtype)
    if dtype is None and leaf.dtype != x.dtype:
        raise ValueError(f'{what}: found {x.dtype}, other layers are {leaf.dtype}; give a dtype')
    y = cast(what, x, leaf.dtype)
    _fill(leaf[... if slot.layer is None else slot.layer], y, slot.transposed)


def _fill(out: np.ndarray, x: np.ndarray, transposed: bool) -> None:
    """out = x or x.T; in strips, which the cache holds: several times faster than at once."""
    if not transposed:
        out[...] = x
        return
    for i in range(0, len(x), 16):
        out[:, i : i + 16] = x[i : i + 16].T


def cast(name: str, x: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """x as dtype; raises ValueError when a value is, or becomes, infinite or NaN."""
    with np.errstate(over='ignore'):
        y = x.astype(dtype, copy=False)
    if not np.isfinite(y).all():
        count = (~np.isfinite(y)).sum()
        raise ValueError(f'{name}: found {count} values that are not finite as {dtype}')
    return y


def _raise(files: Mapping[str, Path], problems: list[str]) -> None:
    if problems:
        folder = next((f.parent for f in files.values()), '')
        more = [f'and {len(problems) - 8} more'] if len(problems) > 8 else []
        raise ValueError('\n  '.join([f'{folder}: tensors', *sorted(problems)[:8], *more]))


# Writing


def write(
    folder: Path,
    slots: Mapping[str, Slot],
    value: Callable[[Slot], np.ndarray],
    dtypes: Mapping[str, np.dtype],
    *,
    limit: int,
    stem: str = 'model',
) -> None:
    """Writes the tensors as transformers does: one file, or shards of at most `limit` bytes.

    `value(slot)` is the tensor as it stands in the tree, `dtypes` what its leaf is stored in.
    """
    for leaf, dtype in dtypes.items():
        if dtype.name not in DTYPES.values():
            raise ValueError(f'{leaf}: found {dtype}, expected one of {sorted(DTYPES.values())}')
    tensors = {n: (s.on_disk, dtypes[s.leaf]) for n, s in slots.items()}
    made = lambda name: _tensor(name, slots[name], value, dtypes)  # noqa: E731
    shards.write(folder, tensors, made, limit=limit, stem=stem)


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Writes an object as transformers does: sorted, two spaces."""
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + '\n', encoding='utf-8')


def _tensor(
    name: str, slot: Slot, value: Callable[[Slot], np.ndarray], dtypes: Mapping[str, np.dtype]
) -> np.ndarray:
    """A tensor as it goes on disk; contiguous, as the writer takes the bytes as they lie."""
    x = cast(name, value(slot), dtypes[slot.leaf])
    out = np.empty(slot.on_disk, x.dtype)
    _fill(out, x, slot.transposed)
    return out


@contextlib.contextmanager
def whole(
    path: str | os.PathLike, overwrite: bool, holds: Sequence[str] = (CONFIG, ADAPTER)
) -> Iterator[Path]:
    """A folder that takes the place of `path` when the block ends, and is gone if it fails.

    It lies beside `path`, where `tidy` finds what killed processes have left; to a remote one
    (gs://...) the files are copied at the end, those of `holds` last. A folder in the way is an
    error unless `overwrite` and it has one of them.
    """
    if '://' in str(path):
        check_free(epath.Path(path), overwrite, holds)
        with tempfile.TemporaryDirectory() as folder:
            yield Path(folder)
            _upload(epath.Path(folder), epath.Path(path), holds)
        return
    target = Path(path).resolve()
    tidy(target)
    check_free(target, overwrite, holds)
    part = target.with_name(f'.{target.name}.{_host()}{uuid.uuid4().hex}')
    part.mkdir(parents=True)
    try:
        with _held(part):
            yield part
            _replace(part, target)
    finally:
        shutil.rmtree(part, ignore_errors=True)


@contextlib.contextmanager
def _held(folder: Path) -> Iterator[None]:
    """Locked, so that others see that it is being written; the lock goes with this process."""
    number = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(number, fcntl.LOCK_EX)
        yield
    finally:
        os.close(number)


def tidy(path: str | os.PathLike) -> list[str]:
    """Puts right what killed writers of a folder have left beside it, and says what, a line each.

    An old folder that had been put aside comes back, and what was half written goes.
    """
    if '://' in str(path):
        return []
    target, lines = Path(path).resolve(), []
    pattern = re.compile(re.escape(f'.{target.name}.') + r'[0-9a-f]{40}(\.old)?')
    beside = sorted(target.parent.iterdir()) if target.parent.is_dir() else []
    left = [x for x in beside if pattern.fullmatch(x.name) and _abandoned(x)]
    for folder in left:
        if folder.suffix == '.old' and not target.exists():
            folder.rename(target)
            lines.append(f'{target}: put back from {folder.name}, where a killed run had left it')
        else:
            shutil.rmtree(folder, ignore_errors=True)
            lines.append(f'{folder}: removed, as a killed run had left it')
    return lines


def _abandoned(folder: Path) -> bool:
    """Whether nobody writes it: its writer was of this machine and is gone, or it is a day old."""
    part = folder.with_name(folder.name.removesuffix('.old'))
    try:
        age, number = time.time() - part.stat().st_mtime, os.open(part, os.O_RDONLY)
    except FileNotFoundError:  # of the old one and the new one, only the old one is there
        return part != folder
    try:
        fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks
        return age > DAY
    finally:
        os.close(number)
    return age > DAY or part.suffix.startswith(f'.{_host()}')


def _host() -> str:
    return f'{zlib.crc32(platform.node().encode()):08x}'


def _upload(folder: epath.Path, target: epath.Path, holds: Sequence[str]) -> None:
    """Copies the files to where nothing, or an older folder of the kind, is."""
    last = lambda file: (file.name in holds, file.name)  # noqa: E731
    if target.exists():
        for file in sorted(target.iterdir(), key=last, reverse=True):
            file.unlink()
    for file in sorted(folder.iterdir(), key=last):
        file.copy(target / file.name)


def _replace(part: Path, target: Path) -> None:
    """In two steps: a process that dies between them leaves the old one for `tidy`."""
    old = part.with_name(f'{part.name}.old')
    if target.exists():
        target.rename(old)
    try:
        part.rename(target)
    except OSError:
        if old.exists():
            old.rename(target)
        raise
    shutil.rmtree(old, ignore_errors=True)


def check_free(target: Path | epath.Path, overwrite: bool, holds: Sequence[str]) -> None:
    """Raises ValueError unless `whole` may write there."""
    if not target.exists() or (target.is_dir() and not any(target.iterdir())):
        return
    if not overwrite:
        raise ValueError(
            f'{target}: exists, expected no such folder, or --overwrite (in code overwrite=True)'
        )
    if not any((target / name).is_file() for name in holds):
        raise ValueError(f'{target}: overwrite replaces what holds {holds[0]}, and this does not')
