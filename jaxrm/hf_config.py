"""config.json of Hugging Face folders: what is read from it, and what is written."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from transformers import AutoConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from jaxrm import backbones, bundle, hf_heads
from jaxrm.backbones.layers import Config

COUNTS = (
    'vocab_size', 'hidden_size', 'intermediate_size', 'num_hidden_layers', 'num_attention_heads',
    'num_key_value_heads', 'head_dim', 'max_position_embeddings',
)  # fmt: skip
NUMBERS = ('rms_norm_eps', 'rope_theta')
# Keys of a source's config.json that do not carry over: other spellings of what the Config says,
# and what belongs to the source's head or files.
REPLACED = {
    'rope_theta', 'rope_scaling', 'rope_local_base_freq', 'sliding_window_pattern', 'torch_dtype',
    'transformers_version', 'auto_map', 'num_labels', 'id2label', 'label2id', 'problem_type',
    *hf_heads.GATING,
}  # fmt: skip


def read(where: Path, found: Mapping[str, Any]) -> tuple[Any, Config]:
    """The family's module and its Config; raises ValueError for sizes that no decoder has."""
    try:
        family = backbones.family(str(found.get('model_type')))
    except ValueError as e:
        raise ValueError(f'{where}: {e}') from e
    for key in ('quantization_config', 'compression_config'):
        if found.get(key):
            raise ValueError(f'{where}: {key} is set, expected plain weights')
    for key in COUNTS:
        size = found.get(key, 1)
        if size is not None and not (type(size) is int and 0 < size < 2**31):
            raise ValueError(f'{where}: {key} is {size!r}, expected a whole number from 1')
    for key in NUMBERS:
        number = found.get(key)
        if number is not None and not (type(number) in (int, float) and 0 < number < math.inf):
            raise ValueError(f'{where}: {key} is {number!r}, expected a number above 0')
    try:
        config = family.config_from_hf(found)
    except KeyError as e:
        raise ValueError(f'{where}: found no {e}, which has no default') from e
    except (TypeError, AttributeError) as e:
        raise ValueError(f'{where}: not as transformers writes it: {e}') from e
    except ValueError as e:
        raise ValueError(f'{where}: {str(e).removeprefix("config.json: ")}') from e
    c, floored = config, not found.get('head_dim') and config.H == config.D // config.Q
    if c.Q % c.K or c.H % 2 or (floored and c.D % c.Q):
        raise ValueError(
            f'{where}: found width {c.D}, {c.Q} heads, {c.K} of keys, head width {c.H}, expected '
            'even heads that divide the width, and as many for each of keys'
        )
    return family, config


def check_against(
    where: Path, found: Mapping[str, Any], config: Config, tensors: int, kind: str
) -> None:
    """Raises ValueError for what does not go with the Config and the number of tensors."""
    if tensors < config.L:
        raise ValueError(f'{where}: found {config.L} layers, but only {tensors} tensors')
    pad = found.get('pad_token_id')
    inside = pad is None or (type(pad) is int and 0 <= pad < config.V)
    if kind in ('reward', *hf_heads.PROBLEMS) and not inside:
        raise ValueError(f'{where}: pad_token_id is {pad!r}, expected an id below {config.V}')


def make(
    like: Any, head: str, sizes: hf_heads.Sizes, dtype: np.dtype, *, own_pad: bool = True
) -> Any:
    """The config object of transformers: the source's keys under what is known here.

    `like` is a checkpoint.Pretrained, `sizes` are those of its head. A reward model's pad token has
    to be no end of text if `own_pad`.
    """
    kept = {k: v for k, v in like.hf_config.items() if k not in REPLACED and not k.startswith('_')}
    ends = {k: getattr(like.tokenizer, k, None) for k in ('bos_token_id', 'eos_token_id')}
    values = {**ends, **kept, **backbones.family(like.model_type).config_to_hf(like.config)}
    if head != 'lm_head':
        names = like.objectives if head in hf_heads.PROBLEMS else ()
        values |= {**hf_heads.labels(head, names), 'pad_token_id': _pad_id(like, values, own_pad)}
    if head == 'gated':
        values |= hf_heads.gating_keys(sizes, like.temperature)
    bundle.check_vocabulary('tokenizer', like.tokenizer, like.config)
    values['dtype'] = dtype.name
    model_type = values.pop('model_type')
    config = AutoConfig.for_model(model_type, **values)
    config.architectures = _architectures(like, head, type(config).__name__.removesuffix('Config'))
    return config


def _architectures(like: Any, head: str, family: str) -> list[str]:
    """The class that has such a head; of those that transformers lacks, the source's."""
    if head in ('score', *hf_heads.PROBLEMS):
        return [family + hf_heads.CLASSIFIER]
    if head == 'gated':
        return [f'{family}For{hf_heads.GATED}']
    if head == 'lm_head':
        return [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[like.model_type]]  # Gemma 3's has another name
    if head == like.head_kind:
        return list(like.hf_config['architectures'])
    return [f'{family}ForRewardModel']


def _pad_id(like: Any, values: Mapping[str, Any], own: bool) -> int:
    """The tokenizer's pad id, or without a tokenizer the config's.

    transformers pools at the last token that is not pad, so it should be no other token's id.
    """
    pad, ends = values.get('pad_token_id'), values.get('eos_token_id')
    ends = ends if isinstance(ends, list) else [ends]
    if like.tokenizer is not None:
        pad, ends = like.tokenizer.pad_token_id, [*ends, like.tokenizer.eos_token_id]
    if pad is None or (own and pad in ends) or not 0 <= pad < like.config.V:
        known = sorted({end for end in ends if end is not None})
        other = f' that is not an end of text ({known})' if own else ''
        raise ValueError(
            f'pad_token_id: found {pad}, expected an id below {like.config.V}{other}; set '
            'tokenizer.pad_token to a token of its own'
        )
    return pad
