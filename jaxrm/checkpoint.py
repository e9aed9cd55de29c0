"""Reward models in and out: Hugging Face folders, PEFT adapters, and the bundle file beside them.

A folder that `export` writes is an ordinary transformers checkpoint with one file more,
`jaxrm.json`: the kind of head, the pooling rule, a hash of the chat template, and provenance.
"""

import dataclasses
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import huggingface_hub
import numpy as np
from transformers import AutoConfig, AutoTokenizer, GenerationConfig

from jaxrm import backbones, hf, lora, peft, tokens, tree
from jaxrm.backbones.layers import Config

BUNDLE = 'jaxrm.json'
WANTED = {'reward': tuple(k for k in hf.HEADS if k != 'lm_head'), 'causal_lm': ('lm_head',)}
DOWNLOAD = ['*.json', '*.safetensors', '*.jinja', 'tokenizer*', 'merges.txt']
NO_DOWNLOAD = ['*/*', 'consolidated*']
LABELS = {'id2label': {0: 'LABEL_0'}, 'label2id': {'LABEL_0': 0}, 'problem_type': 'regression'}
# Keys of a source's config.json that do not carry over: other spellings of what the Config says,
# and what belongs to the source's head or files.
REPLACED = {
    'rope_theta', 'rope_scaling', 'torch_dtype', 'transformers_version', 'auto_map', 'num_labels',
    *LABELS,
}  # fmt: skip


@dataclasses.dataclass(frozen=True, eq=False)
class Pretrained:
    """A checkpoint as found; arrays are numpy's.

    `head_kind` is a key of hf.HEADS, or None when no head was read; `head` is {} when the head is
    the embedding; `hf_config` is config.json. To export a model that was not loaded, make one of
    these from a model type, a Config and a tokenizer.
    """

    model_type: str
    config: Config
    tokenizer: Any = None
    backbone: tree.Tree = dataclasses.field(default_factory=dict)
    head_kind: str | None = None
    head: tree.Tree | None = None
    hf_config: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    generation_config: Mapping[str, Any] | None = None
    bundle: Mapping[str, Any] | None = None

    @property
    def dtype(self) -> np.dtype:
        """Of the embedding."""
        return self.backbone['embed']['embedding'].dtype


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

    `kind` is 'reward' or 'causal_lm' (which need such a head) or 'backbone' (whose head is not
    read). `dtype` converts; by default each array keeps its own. Raises ValueError for anything
    missing, left over or not understood: nothing is ever filled in.
    """
    folder = resolve(path, revision)
    if (folder / hf.ADAPTER).exists() and not (folder / hf.CONFIG).exists():
        raise ValueError(f'{folder}: holds an adapter; load its base and then load_adapter')
    found = hf.read_json(folder / hf.CONFIG)
    family, config = _config(folder, found)
    head = _head(folder, found, kind)
    tokenizer = _tokenizer(folder)
    _check_vocabulary(folder, tokenizer, config)
    bundle = _bundle(folder, head, tokenizer)
    files = hf.find(folder)
    unread = _unread_head(folder, files, head, kind, config)
    kept = None if kind == 'backbone' else head
    params = hf.read(files, hf.layout(family, config, kept), ignored=unread, dtype=dtype)
    generation = folder / 'generation_config.json'
    return Pretrained(
        model_type=found['model_type'],
        config=config,
        tokenizer=tokenizer,
        backbone=params['backbone'],
        head_kind=kept,
        head=params.get('head', {}) if kept else None,
        hf_config=found,
        generation_config=hf.read_json(generation) if generation.exists() else None,
        bundle=bundle,
    )


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
        raise ValueError(f'{path}: no such folder, and not from the hub: {error}') from error
    return Path(found)


def _config(folder: Path, found: Mapping[str, Any]) -> tuple[Any, Config]:
    """The family's module and its Config."""
    family = backbones.family(str(found.get('model_type')))
    if found.get('quantization_config'):
        raise ValueError(f'{folder}: quantization_config is set, expected plain weights')
    try:
        return family, family.config_from_hf(found)
    except KeyError as e:
        raise ValueError(f'{folder / hf.CONFIG}: found no {e}, which has no default') from e


def _head(folder: Path, found: Mapping[str, Any], kind: str) -> str:
    """The kind of head by the model class; raises ValueError unless it is of the kind wanted."""
    if kind != 'backbone' and kind not in WANTED:
        raise ValueError(f"kind: {kind!r}, expected 'backbone' or one of {list(WANTED)}")
    where, classes = folder / hf.CONFIG, found.get('architectures') or []
    kinds = [k for k, h in hf.HEADS.items() if any(c.endswith(h.architecture) for c in classes)]
    if len(kinds) != 1:
        known = [f'...{h.architecture}' for h in hf.HEADS.values()]
        raise ValueError(f'{where}: architectures is {classes}, expected one of {known}')
    if kind != 'backbone' and kinds[0] not in WANTED[kind]:
        want = [f'...{hf.HEADS[k].architecture}' for k in WANTED[kind]]
        raise ValueError(f'{where}: architectures is {classes}, {kind!r} expected one of {want}')
    labels = len(found.get('id2label') or [0])
    if kind == 'reward' and found.get('num_labels', labels) != 1:
        raise ValueError(f'{where}: found {found.get("num_labels", labels)} labels, expected 1')
    return kinds[0]


def _unread_head(
    folder: Path, files: Mapping[str, Path], head: str, kind: str, config: Config
) -> list[str]:
    """Head tensors to pass over: all for a backbone, a tied one that repeats the embedding."""
    name = hf.HEADS[head].tensor
    if kind == 'backbone':
        return [name]
    if not (head == 'lm_head' and config.tied and name in files):
        return []
    embedding = 'model.embed_tokens.weight'
    if embedding in files and not np.array_equal(
        hf.read_one(files, name), hf.read_one(files, embedding)
    ):
        raise ValueError(f'{folder}: {name} differs from {embedding}, expected tied embeddings')
    return [name]


def _tokenizer(folder: Path) -> Any:
    """The folder's tokenizer, or None when there is none; never touches the network."""
    if not any(folder.glob('tokenizer*')):
        return None
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    for key in ('is_local', 'local_files_only'):  # how it was loaded is not part of it
        tokenizer.init_kwargs.pop(key, None)
    return tokenizer


def _check_vocabulary(where: Path | str, tokenizer: Any, config: Config) -> None:
    if tokenizer is None:
        return
    token, last = max(tokenizer.get_vocab().items(), key=lambda item: item[1])
    if last >= config.V:
        raise ValueError(f'{where}: token {token!r} has id {last}, expected less than {config.V}')


def _template(tokenizer: Any) -> str | None:
    return tokens.template_hash(tokenizer) if getattr(tokenizer, 'chat_template', None) else None


def _bundle(folder: Path, head: str | None, tokenizer: Any) -> dict[str, Any] | None:
    """jaxrm.json, if there is one; raises ValueError when it does not fit the rest."""
    if not (folder / BUNDLE).exists():
        return None
    found = hf.read_json(folder / BUNDLE)
    want = {'version': 1, 'head': head, 'pooling': 'last', 'template': _template(tokenizer)}
    for key, value in want.items():
        if found.get(key) != value:
            raise ValueError(f'{folder / BUNDLE}: {key} is {found.get(key)!r}, expected {value!r}')
    return found


# Out


def export(
    path: str | os.PathLike,
    params: tree.Tree,
    like: Pretrained,
    *,
    head_kind: str = 'score',
    lora_scale: float = 1.0,
    dtype: Any = None,
    provenance: Mapping[str, Any] | None = None,
    max_shard_bytes: int = 5 * 10**9,
    overwrite: bool = False,
) -> None:
    """Writes a folder that transformers loads and that gives the same scores there.

    `like` says everything but the arrays: family, Config, tokenizer, other keys of config.json. A
    'lora' part is folded into the kernels with `lora_scale`. Arrays keep their dtype, or take
    `dtype`. The folder appears whole or not at all. Raises ValueError for a folder in the way, for
    arrays that do not fit, and for a reward model without a pad id of its own.
    """
    if head_kind not in hf.HEADS:
        raise ValueError(f'head_kind: {head_kind!r}, expected one of {sorted(hf.HEADS)}')
    slots = hf.layout(backbones.family(like.model_type), like.config, head_kind)
    leaves = tree.flatten({part: x for part, x in params.items() if part != 'lora'})
    _check_leaves(leaves, _shapes(slots))
    dtypes = {name: np.dtype(dtype or leaf.dtype) for name, leaf in leaves.items()}
    config = _hf_config(like, head_kind, dtypes['backbone/embed/embedding'])
    adapters = tree.flatten({'lora': params.get('lora', {})})
    _check_leaves(adapters, _shapes(peft.slots_of_leaves(slots, adapters)))

    def value(slot: hf.Slot) -> np.ndarray:
        return _folded(slot, leaves, adapters, lora_scale)

    with hf.whole(path, overwrite) as folder:
        config.save_pretrained(folder)
        if head_kind == 'lm_head':
            _generation(like, config).save_pretrained(folder)
        if like.tokenizer is not None:
            like.tokenizer.save_pretrained(folder)
        hf.write_json(folder / BUNDLE, _new_bundle(like, head_kind, provenance))
        hf.write(folder, slots, value, dtypes, limit=max_shard_bytes)


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


def _hf_config(like: Pretrained, head: str, dtype: np.dtype) -> Any:
    """The config object of transformers: the source's keys under what is known here."""
    kept = {k: v for k, v in like.hf_config.items() if k not in REPLACED and not k.startswith('_')}
    ends = {k: getattr(like.tokenizer, k, None) for k in ('bos_token_id', 'eos_token_id')}
    values = {**ends, **kept, **backbones.family(like.model_type).config_to_hf(like.config)}
    if head != 'lm_head':
        values |= {**LABELS, 'pad_token_id': _pad_id(like, values)}
    _check_vocabulary('tokenizer', like.tokenizer, like.config)
    values['dtype'] = dtype.name
    model_type = values.pop('model_type')
    config = AutoConfig.for_model(model_type, **values)
    config.architectures = [
        type(config).__name__.removesuffix('Config') + hf.HEADS[head].architecture
    ]
    return config


def _pad_id(like: Pretrained, values: Mapping[str, Any]) -> int:
    """The tokenizer's pad id, or without a tokenizer the config's.

    transformers pools at the last token that is not pad, so it must be no other token's id.
    """
    pad, ends = values.get('pad_token_id'), values.get('eos_token_id')
    ends = ends if isinstance(ends, list) else [ends]
    if like.tokenizer is not None:
        pad, ends = like.tokenizer.pad_token_id, [*ends, like.tokenizer.eos_token_id]
    if pad is None or pad in ends or not 0 <= pad < like.config.V:
        raise ValueError(
            f'pad_token_id: found {pad}, expected an id below {like.config.V} that is not an end '
            f'of text ({ends}); set tokenizer.pad_token to a token of its own'
        )
    return pad


def _generation(like: Pretrained, config: Any) -> GenerationConfig:
    if like.generation_config is None:
        return GenerationConfig.from_model_config(config)
    return GenerationConfig.from_dict(dict(like.generation_config))


def _new_bundle(
    like: Pretrained, head: str | None, provenance: Mapping[str, Any] | None
) -> dict[str, Any]:
    if provenance is None:
        provenance = (like.bundle or {}).get('provenance', {})
    return {
        'version': 1,
        'head': head,
        'pooling': 'last',
        'template': _template(like.tokenizer),
        'provenance': dict(provenance),
    }


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

    def value(slot: hf.Slot) -> np.ndarray:
        return np.asarray(adapters[slot.leaf])[... if slot.layer is None else slot.layer]

    with hf.whole(path, overwrite) as folder:
        hf.write_json(folder / hf.ADAPTER, config)
        if like.tokenizer is not None:
            like.tokenizer.save_pretrained(folder)
        hf.write_json(folder / BUNDLE, _new_bundle(like, head, provenance))
        hf.write(folder, slots, value, dtypes, limit=1 << 62, stem='adapter_model')


def load_adapter(
    path: str | os.PathLike, like: Pretrained, *, dtype: Any = None, revision: str | None = None
) -> Adapter:
    """A plain LoRA adapter of PEFT's, for the backbone of `like`.

    Raises ValueError for another method, a variant of LoRA (rsLoRA, DoRA, per-module ranks), an
    adapter that covers a kernel in some layers only, or a classifier's without its head.
    """
    folder = resolve(path, revision)
    rank, alpha, head = peft.read_config(folder / hf.ADAPTER)
    tokenizer = _tokenizer(folder)
    _check_vocabulary(folder, tokenizer, like.config)
    _bundle(folder, head, tokenizer)
    files = hf.find(folder, 'adapter_model')
    layout = hf.layout(backbones.family(like.model_type), like.config, None)
    slots = peft.slots_of_names(layout, files, rank) | peft.head_slots(head, like.config)
    params = hf.read(files, slots, dtype=dtype)
    return Adapter(params['lora'], alpha / rank, params.get('head'), tokenizer)
