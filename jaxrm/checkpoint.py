"""Reward models in and out: Hugging Face folders, PEFT adapters, and the bundle file beside them.

A folder that `export` writes is an ordinary transformers checkpoint with one file more,
`jaxrm.json` (see `bundle`). Of a head that transformers has no class for, only the layout is
ordinary: the tensors have the names they came with.
"""

import dataclasses
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import huggingface_hub
import numpy as np
from transformers import GenerationConfig

from jaxrm import backbones, bundle, fused, hf, hf_config, hf_heads, lora, peft, processes, tree
from jaxrm.backbones.layers import Config
from jaxrm.regress import Scale

DOWNLOAD = ['*.json', '*.safetensors', '*.jinja', 'tokenizer*', 'merges.txt']
NO_DOWNLOAD = ['*/*', 'consolidated*']


@dataclasses.dataclass(frozen=True, eq=False)
class Pretrained:
    """A checkpoint as found; arrays are numpy's.

    `head_kind` is a key of hf.HEADS, or None when no head was read; `head` is {} when the head is
    the embedding; `objectives` names what a head of 'ratings', 'categories' or 'gated' gives;
    `gate`, `temperature` and `scales` (of the ratings, None where unknown) belong to a 'gated' one;
    `hf_config` is config.json. To export a model that was not loaded, make one of these from a
    model type, a Config and a tokenizer.
    """

    model_type: str
    config: Config
    tokenizer: Any = None
    backbone: tree.Tree = dataclasses.field(default_factory=dict)
    head_kind: str | None = None
    head: tree.Tree | None = None
    objectives: tuple[str, ...] = ()
    hf_config: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    generation_config: Mapping[str, Any] | None = None
    bundle: Mapping[str, Any] | None = None
    gate: tree.Tree | None = None
    temperature: float | None = None
    scales: tuple[Scale | None, ...] = ()

    @property
    def params(self) -> tree.Tree:
        """The parts that there are: 'backbone', 'head', 'gate'."""
        parts = {'backbone': self.backbone, 'head': self.head, 'gate': self.gate}
        return {name: part for name, part in parts.items() if part is not None}

    @property
    def dtype(self) -> np.dtype:
        """Of the embedding."""
        return self.backbone['embed']['embedding'].dtype


class Found(NamedTuple):
    """A checkpoint before its arrays are read: `like` has none, `files` are by tensor."""

    like: Pretrained
    files: dict[str, Path]
    slots: dict[str, hf.Slot]
    sizes: hf_heads.Sizes


class Adapter(NamedTuple):
    """A LoRA adapter: its tree, alpha / r, and what of a head and a tokenizer came with it."""

    lora: tree.Tree
    scale: float
    head: tree.Tree | None
    tokenizer: Any


# In


def load_pretrained(
    path: str | os.PathLike, *, kind: str = 'reward', dtype: Any = None, revision: str | None = None
) -> Pretrained:
    """A checkpoint from a folder, or from the hub when `path` is an id such as 'org/name'.

    `kind` is 'reward', 'ratings', 'categories' or 'causal_lm' (which need such a head) or
    'backbone' (whose head is not read). `dtype` converts; by default each array keeps its own.
    Raises ValueError for anything missing, left over or not understood: nothing is ever filled in.
    """
    like, files, slots, _ = look(resolve(path, revision), kind)
    params = hf.read(files, slots, dtype=dtype)
    head = params.get('head', {}) if like.head_kind else None
    return dataclasses.replace(
        like, backbone=params['backbone'], head=head, gate=params.get('gate')
    )


def look(folder: Path, kind: str) -> Found:
    """What `load_pretrained` finds in a folder before it reads the arrays."""
    where = folder / hf.CONFIG
    if (folder / hf.ADAPTER).exists() and not where.exists():
        raise ValueError(f'{folder}: holds an adapter; its base has to be given')
    found = hf.read_json(where)
    family, config = hf_config.read(where, found)
    files = hf.find(folder)
    head = hf_heads.find(where, found, files, kind)
    hf_config.check_against(where, found, config, len(files), kind)
    tokenizer = bundle.read_tokenizer(folder)
    bundle.check_vocabulary(folder, tokenizer, config)
    kept = None if kind == 'backbone' else head
    beside = bundle.read(folder, kept, tokenizer)
    unread = _unread_head(folder, files, head, kind, config)
    names = hf_heads.objectives(where, found) if kind in hf_heads.PROBLEMS else ()
    sizes, temperature = _sizes(files, kept, max(len(names), 1)), None
    scales: tuple[Scale | None, ...] = ()
    if kept == 'gated':
        sizes, temperature = hf_heads.gating(where, found)
        names, scales = bundle.objectives(folder, beside, sizes.rewards)
    generation = folder / 'generation_config.json'
    like = Pretrained(
        model_type=found['model_type'],
        config=config,
        tokenizer=tokenizer,
        head_kind=kept,
        objectives=names,
        hf_config=found,
        generation_config=hf.read_json(generation) if generation.exists() else None,
        bundle=beside,
        temperature=temperature,
        scales=scales,
    )
    used = {n: f for n, f in files.items() if n not in unread and not hf.COMPUTED.search(n)}
    return Found(like, used, hf.layout(family, config, kept, sizes), sizes)


def resolve(path: str | os.PathLike, revision: str | None = None) -> Path:
    """The local folder of a path or hub id; only an id that is no folder here is downloaded."""
    folder = Path(path)
    if folder.is_dir():
        return folder
    if folder.exists() or not re.fullmatch(r'[\w-][\w.-]*/[\w.-]+', str(path)):
        raise ValueError(f"{path}: no such folder, expected one or a hub id like 'org/name'")
    try:
        found = huggingface_hub.snapshot_download(
            str(path), revision=revision, allow_patterns=DOWNLOAD, ignore_patterns=NO_DOWNLOAD
        )
    except (OSError, ValueError) as error:
        why = ' '.join(str(error).split())
        raise ValueError(f'{path}: no such folder, and not from the hub: {why}') from error
    return Path(found)


def _sizes(files: Mapping[str, Path], head: str | None, rewards: int) -> hf_heads.Sizes:
    """Of the head's tensors, by the headers of their files."""
    names = {leaf: name for name, leaf in hf.HEADS.get(head or '', {}).items()}
    hidden = names.get('hidden/kernel')
    width = (*hf.shape_on_disk(files, hidden), 0)[0] if hidden else 0
    return hf_heads.Sizes(rewards, width, names.get('bias') in files)


def _unread_head(
    folder: Path, files: Mapping[str, Path], head: str | None, kind: str, config: Config
) -> list[str]:
    """Head tensors to pass over: all for a backbone, a tied one that repeats the embedding.

    A reward head of another class than transformers' may stand on a whole language model.
    """
    lm_head, embedding = 'lm_head.weight', 'model.embed_tokens.weight'
    plain = (None, 'lm_head', 'score', 'gated', *hf_heads.PROBLEMS)
    passed = [] if head in plain else [lm_head]
    if kind == 'backbone':
        return [*passed, *hf_heads.of_head(head, files)]
    if not (head == 'lm_head' and config.tied and lm_head in files):
        return passed
    if embedding in files and not np.array_equal(
        hf.read_one(files, lm_head), hf.read_one(files, embedding)
    ):
        raise ValueError(f'{folder}: {lm_head} differs from {embedding}, expected tied embeddings')
    return [lm_head]


# Out


def export(
    path: str | os.PathLike,
    params: tree.Tree,
    like: Pretrained,
    *,
    head_kind: str | None = None,
    lora_scale: float = 1.0,
    dtype: Any = None,
    provenance: Mapping[str, Any] | None = None,
    max_shard_bytes: int = 5 * 10**9,
    overwrite: bool = False,
) -> None:
    """Writes a folder that transformers loads and that gives the same scores there.

    `like` says everything but the arrays: family, Config, tokenizer, names of ratings, other keys
    of config.json. A linear head becomes a classifier's; one with a bias or hidden units, which
    transformers has no class for, is written as it came, or as `head_kind`. A 'lora' part is folded
    into the kernels with `lora_scale`. Arrays keep their dtype, or take `dtype`. The folder appears
    whole or not at all. Raises ValueError for a folder in the way, for arrays that do not fit, and
    for a reward model without a pad id of its own.
    """
    params = fused.split(params)
    head = params.get('head', {})
    head_kind = head_kind or hf_heads.chosen(head, like.head_kind, like.objectives)
    if head_kind not in hf.HEADS:
        raise ValueError(f'head_kind: {head_kind!r}, expected one of {sorted(hf.HEADS)}')
    several = len(like.objectives) if head_kind in ('gated', *hf_heads.PROBLEMS) else 1
    sizes = hf_heads.sizes(params, several)
    slots = hf.layout(backbones.family(like.model_type), like.config, head_kind, sizes)
    leaves = tree.flatten({part: x for part, x in params.items() if part != 'lora'})
    _check_leaves(leaves, _shapes(slots))
    dtypes = {name: np.dtype(dtype or leaf.dtype) for name, leaf in leaves.items()}
    config = hf_config.make(like, head_kind, sizes, dtypes['backbone/embed/embedding'])
    adapters = tree.flatten({'lora': params.get('lora', {})})
    _check_leaves(adapters, _shapes(peft.slots_of_leaves(slots, adapters)))

    leaves, adapters = processes.to_first(leaves), processes.to_first(adapters)

    def value(slot: hf.Slot) -> np.ndarray:
        return _folded(slot, leaves, adapters, lora_scale)

    def write() -> None:
        with hf.whole(path, overwrite) as folder:
            hf.write(folder, slots, value, dtypes, limit=max_shard_bytes)
            write_beside(folder, like, config, head_kind, provenance)

    processes.alone(write)


def write_beside(
    folder: Path,
    like: Pretrained,
    config: Any,
    head_kind: str,
    provenance: Mapping[str, Any] | None,
) -> None:
    """All but the tensors, config.json last; `config` is of hf_config.make."""
    if head_kind == 'lm_head':
        _generation(like, config).save_pretrained(folder)
    if like.tokenizer is not None:
        like.tokenizer.save_pretrained(folder)
    ratings = bundle.ratings(like.objectives, like.scales) if head_kind == 'gated' else {}
    beside = bundle.make(head_kind, like.tokenizer, provenance, like.bundle)
    hf.write_json(folder / bundle.FILE, beside | ratings)
    config.save_pretrained(folder)


def _shapes(slots: Mapping[str, hf.Slot]) -> dict[str, tuple[int, ...]]:
    return {slot.leaf: slot.shape for slot in slots.values()}


def _check_leaves(leaves: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> None:
    for name in sorted(leaves.keys() | shapes):
        found = tuple(leaves[name].shape) if name in leaves else 'nothing'
        want = shapes.get(name, 'no such leaf')
        if found != want:
            raise ValueError(f'params: {name}: found {found}, expected {want}')


def _folded(
    slot: hf.Slot, leaves: Mapping[str, Any], adapters: Mapping[str, Any], scale: float
) -> np.ndarray:
    """A tensor as it stands in the tree, with its adapter, if any, added."""
    at = ... if slot.layer is None else slot.layer
    x = np.asarray(leaves[slot.leaf])[at]
    path = peft.adapter_path(slot.leaf)
    if path + 'a' not in adapters:
        return x
    pair = {part: np.asarray(adapters[path + part])[at] for part in 'ab'}
    return np.asarray(lora.fold({'w': {'kernel': x}}, {'w': pair}, scale)['w']['kernel'])


def _generation(like: Pretrained, config: Any) -> GenerationConfig:
    if like.generation_config is None:
        return GenerationConfig.from_model_config(config)
    return GenerationConfig.from_dict(dict(like.generation_config))


# Adapters


def export_adapter(
    path: str | os.PathLike,
    params: tree.Tree,
    like: Pretrained,
    *,
    lora_scale: float,
    base: str,
    provenance: Mapping[str, Any] | None = None,
    overwrite: bool = False,
) -> None:
    """Writes the 'lora' part, and the 'head' if there is one, as a PEFT adapter over `base`.

    `base` is the hub id or folder that PEFT will load; its tokenizer goes along. With a head it is
    a sequence classifier of one label, whose head is saved whole.
    """
    if not params.get('lora'):
        raise ValueError(f"params: found parts {sorted(params)}, expected 'lora' among them")
    head = 'score' if params.get('head') else None
    adapters = tree.flatten({part: x for part, x in params.items() if part != 'backbone'})
    layout = hf.layout(backbones.family(like.model_type), like.config, None)
    slots = peft.slots_of_leaves(layout, adapters) | peft.head_slots(head, like.config)
    _check_leaves(adapters, _shapes(slots))
    dtypes = {name: np.dtype(leaf.dtype) for name, leaf in adapters.items()}
    config = peft.config(slots, layout, lora_scale, base=base, head=head)

    adapters = processes.to_first(adapters)

    def value(slot: hf.Slot) -> np.ndarray:
        return np.asarray(adapters[slot.leaf])[... if slot.layer is None else slot.layer]

    def write() -> None:
        with hf.whole(path, overwrite) as folder:
            hf.write_json(folder / hf.ADAPTER, config)
            if like.tokenizer is not None:
                like.tokenizer.save_pretrained(folder)
            beside = bundle.make(head, like.tokenizer, provenance, like.bundle)
            hf.write_json(folder / bundle.FILE, beside)
            hf.write(folder, slots, value, dtypes, limit=1 << 62, stem='adapter_model')

    processes.alone(write)


def load_adapter(
    path: str | os.PathLike, like: Pretrained, *, dtype: Any = None, revision: str | None = None
) -> Adapter:
    """A LoRA adapter of PEFT's, for the backbone of `like`.

    Raises ValueError for another method, a variant such as DoRA, tensors that are not those of the
    settings, and a classifier's adapter without its head.
    """
    folder = resolve(path, revision)
    settings = peft.read_config(folder / hf.ADAPTER)
    tokenizer = bundle.read_tokenizer(folder)
    bundle.check_vocabulary(folder, tokenizer, like.config)
    bundle.read(folder, settings.head, tokenizer)
    files = hf.find(folder, 'adapter_model')
    layout = hf.layout(backbones.family(like.model_type), like.config, None)
    params, scale = peft.read(files, layout, like.config, settings, dtype)
    return Adapter(params['lora'], scale, params.get('head'), tokenizer)


def load_adapted(
    path: str | os.PathLike, base: str | os.PathLike, *, dtype: Any = None
) -> tuple[Pretrained, Adapter]:
    """An adapter's base with the adapter's own head and tokenizer, where it has them, and it.

    The base is a reward model, or any model when the adapter has a head. The adapter is not folded.
    """
    folder = resolve(path)
    head = peft.read_config(folder / hf.ADAPTER).head
    found = load_pretrained(base, kind='backbone' if head else 'reward', dtype=dtype)
    adapter = load_adapter(folder, found, dtype=dtype)
    if head:
        found = dataclasses.replace(found, head_kind=head, head=adapter.head)
    if adapter.tokenizer is not None:
        found = dataclasses.replace(found, tokenizer=adapter.tokenizer)
    return found, adapter
