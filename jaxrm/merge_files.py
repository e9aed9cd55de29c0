"""Merging checkpoints on disk, with the tensors in memory that one of the output is made from."""

import functools
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes  # noqa: F401  (makes bfloat16 a dtype of numpy)
import numpy as np
from etils import epath

from jaxrm import checkpoint, hf, hf_config, merge, shards, vocabulary
from jaxrm.merge_plan import LM_HEAD, TABLES, Merge, Model, inputs
from jaxrm.merge_steps import EMBEDDING, Input, Step

UNITS = {'': 1, 'B': 1, **{f'{x}B': 1000**i for i, x in enumerate('KMGT', 1)}}
UNITS |= {f'{x}iB': 1024**i for i, x in enumerate('KMGT', 1)}


def shard_size(text: str) -> int:
    """Bytes of a size as transformers has them: '5GB', '500MB', '2GiB', '1000'."""
    found = re.fullmatch(r'(\d+)\s*([KMGT]?i?B?)', text.strip(), re.IGNORECASE)
    units = {unit.upper(): size for unit, size in UNITS.items()}
    if not found or found[2].upper() not in units or not int(found[1]):
        raise ValueError(f"max_shard_size: found {text!r}, expected a size such as '5GB'")
    return int(found[1]) * units[found[2].upper()]


def check_target(plan: Merge, path: str | os.PathLike, *, overwrite: bool = False) -> None:
    """Raises ValueError for a folder in the way or of an input, and for a disk that is too full."""
    if _remote(path):
        return hf.check_free(epath.Path(path), overwrite, [hf.CONFIG])
    target = Path(path).resolve()
    for model in plan.models:
        folder = model.folder.resolve()
        if target == folder or target in folder.parents:
            raise ValueError(f'{path}: holds the input {model.name}, expected another folder')
    hf.check_free(target, overwrite, [hf.CONFIG])
    there = next(folder for folder in target.parents if folder.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise ValueError(f'{path}: {there} is not a folder that can be written to')
    free = shutil.disk_usage(there).free
    if free < plan.bytes:
        raise ValueError(f'{path}: needs {readable(plan.bytes)}, found {readable(free)} free')
    return None


def readable(count: int) -> str:
    """Bytes for people."""
    unit = next((u for u in ('TB', 'GB', 'MB', 'KB') if count >= UNITS[u]), 'B')
    return f'{count / UNITS[unit]:.3g} {unit}' if unit != 'B' else f'{count} bytes'


def write(
    plan: Merge,
    path: str | os.PathLike,
    *,
    max_shard_bytes: int = 5 * 10**9,
    seed: int = 0,
    overwrite: bool = False,
    done: Callable[[str], Any] = lambda name: None,
) -> None:
    """Writes the merged checkpoint, which appears whole or not at all.

    Random methods draw from `seed`; `done(name)` is called after each tensor. Raises ValueError as
    `check_target` does, and naming a tensor with values that are not finite.
    """
    check_target(plan, path, overwrite=overwrite)

    def value(name: str) -> np.ndarray:
        x = tensor(plan, plan.steps[name], seed)
        done(name)
        return x

    like, kind = plan.like, str(plan.like.head_kind)
    config = hf_config.make(like, kind, plan.sizes, plan.dtypes[EMBEDDING], own_pad=False)
    with hf.whole(path, overwrite, [hf.CONFIG]) as folder:
        shards.write(folder, plan.tensors, value, limit=max_shard_bytes)
        checkpoint.write_beside(folder, like, config, kind, {'merge': plan.recipe.text})
        shards.flush(*folder.iterdir(), folder)
    if not _remote(path):
        shards.flush(Path(path).resolve().parent)


def _remote(path: str | os.PathLike) -> bool:
    """Whether it is the address of a bucket."""
    return '://' in str(path)


def tensor(plan: Merge, step: Step, seed: int = 0) -> np.ndarray:
    """A tensor of the output."""
    found = functools.partial(_input, plan, _tables(plan, step))
    slot = plan.slots[step.name]
    try:
        x = merge.array(
            step.method,
            [found(x) for x in step.inputs],
            base=found(step.base) if step.base else None,
            name=merge.layer_name(slot.leaf, slot.layer, plan.like.config.L),
            seed=seed,
            dtype=plan.recipe.dtype or plan.dtypes[step.name],
            **step.parameters,
        )
        return hf.cast(plan.recipe.method, np.asarray(x), plan.dtypes[step.name])
    except ValueError as error:
        for source in inputs(step):  # one that is not finite is named itself
            hf.cast(_where(plan, source), *_as_stored(plan, source))
        raise ValueError(f'{plan.recipe.path}: {step.name}: {error}') from error


def _tables(plan: Merge, step: Step) -> list[np.ndarray]:
    """All models' tables of rows, where there are rows to be found for this tensor."""
    if plan.rows is None or step.name not in TABLES:
        return []
    stored = [_stored(plan, i, step.name) for i in range(len(plan.models))]
    return [_read(plan, x) for x in stored]


def _stored(plan: Merge, model: int, name: str) -> Input:
    """A head that is the embedding is stored as that."""
    tied = name == LM_HEAD and name not in plan.models[model].entries
    return Input(model, EMBEDDING if tied else name)


def _input(plan: Merge, tables: list[np.ndarray], x: Input) -> np.ndarray:
    if tables:
        assert plan.rows is not None
        return np.asarray(vocabulary.table(plan.rows, x.model, tables))
    return _read(plan, x)


def _read(plan: Merge, x: Input) -> np.ndarray:
    """As the recipe's dtype, in which the arithmetic begins."""
    found, _ = _as_stored(plan, x)
    said = plan.recipe.dtype
    return found if said is None else hf.cast(_where(plan, x), found, np.dtype(said))


def _as_stored(plan: Merge, x: Input) -> tuple[np.ndarray, np.dtype]:
    found = shards.read(plan.models[x.model].entries[x.tensor])
    return found, found.dtype


def _where(plan: Merge, x: Input) -> str:
    model = plan.models[x.model]
    return f'{model.name}: {model.entries[x.tensor].file}: {x.tensor}'


# What is said before


def describe(plan: Merge, max_shard_bytes: int = 5 * 10**9) -> list[str]:
    """What would be merged, copied, left out and resized, a line each."""
    config, dtypes = plan.like.config, sorted({dtype.name for dtype in plan.dtypes.values()})
    parts = shards.split({n: shards.size(*x) for n, x in plan.tensors.items()}, max_shard_bytes)
    source = f'copied from {plan.recipe.head}' if plan.recipe.head else 'averaged'
    return [
        *map(_about, plan.models),
        f'merged by {plan.recipe.method}: {len(plan.steps) - len(plan.heads)} tensors',
        *(f'{source}: {name}' for name in sorted(plan.heads)),
        *_left_out(plan),
        *plan.notes,
        f'written: {config.L} layers, {config.V} rows of the vocabulary, {", ".join(dtypes)}, '
        f'{readable(plan.bytes)} in {len(parts)} file{"s" if len(parts) > 1 else ""}',
    ]


def _about(model: Model) -> str:
    c, (kind, *_) = model.like.config, model.like.hf_config['architectures']
    dtypes = sorted({shards.DTYPES[entry.dtype].name for entry in model.entries.values()})
    return f'{model.name}: {kind}, {c.L} layers, {c.V} rows of the vocabulary, {", ".join(dtypes)}'


def _left_out(plan: Merge) -> list[str]:
    """Tensors that nothing is made from, a line for each model."""
    used, lines = {x for step in plan.steps.values() for x in inputs(step)}, []
    for i, model in enumerate(plan.models):
        names = sorted(name for name in model.entries if Input(i, name) not in used)
        more = f' and {len(names) - 3} more' if len(names) > 3 else ''
        lines += [f'left out of {model.name}: {", ".join(names[:3])}{more}'] if names else []
    return lines
