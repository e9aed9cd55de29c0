"""The sizes of well-known decoders, and of any folder or hub name, without their weights.

The table has the values of their public config.json files that say how much they cost.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download

from jaxrm import hf, hf_config
from jaxrm.backbones.layers import Config

CONFIG = 'config.json'
SIZES = (
    'vocab_size', 'hidden_size', 'intermediate_size', 'num_hidden_layers', 'num_attention_heads',
    'num_key_value_heads',
)  # fmt: skip
LLAMA3 = {'rms_norm_eps': 1e-5, 'rope_theta': 500000.0, 'max_position_embeddings': 8192}
TIED = {'tie_word_embeddings': True}
QWEN = {'rms_norm_eps': 1e-6, 'rope_theta': 1000000.0, 'max_position_embeddings': 32768}
MISTRAL = {'rms_norm_eps': 1e-5, 'sliding_window': None}
GEMMA_27B = {'head_dim': 128, 'query_pre_attn_scalar': 144}
# model_type, SIZES, what else matters.
MODELS: dict[str, tuple[str, tuple[int, ...], Mapping[str, Any]]] = {
    'llama-3-8b': ('llama', (128256, 4096, 14336, 32, 32, 8), LLAMA3),
    'llama-3-70b': ('llama', (128256, 8192, 28672, 80, 64, 8), LLAMA3),
    'llama-3.2-1b': ('llama', (128256, 2048, 8192, 16, 32, 8), LLAMA3 | TIED),
    'llama-3.2-3b': ('llama', (128256, 3072, 8192, 28, 24, 8), LLAMA3 | TIED | {'head_dim': 128}),
    'mistral-7b': ('mistral', (32768, 4096, 14336, 32, 32, 8), QWEN | MISTRAL),
    'qwen2.5-0.5b': ('qwen2', (151936, 896, 4864, 24, 14, 2), QWEN | TIED),
    'qwen2.5-1.5b': ('qwen2', (151936, 1536, 8960, 28, 12, 2), QWEN | TIED),
    'qwen2.5-7b': ('qwen2', (152064, 3584, 18944, 28, 28, 4), QWEN),
    'qwen3-8b': ('qwen3', (151936, 4096, 12288, 36, 32, 8), QWEN | {'head_dim': 128}),
    'gemma-2-2b': ('gemma2', (256000, 2304, 9216, 26, 8, 4), {'head_dim': 256}),
    'gemma-2-9b': ('gemma2', (256000, 3584, 14336, 42, 16, 8), {'head_dim': 256}),
    'gemma-2-27b': ('gemma2', (256000, 4608, 36864, 46, 32, 16), GEMMA_27B),
}  # fmt: skip


def config_json(name: str) -> dict[str, Any]:
    """The keys of config.json of a model in the table, or of a folder's or a hub model's file.

    Raises ValueError when there is no such model.
    """
    if name.lower() in MODELS:
        model_type, sizes, more = MODELS[name.lower()]
        return {'model_type': model_type, **dict(zip(SIZES, sizes, strict=True)), **more}
    path = Path(name) / CONFIG
    if not path.is_file():
        path = _downloaded(name)
    return hf.read_json(path)


def _downloaded(name: str) -> Path:
    known = f'expected one of {sorted(MODELS)}, a folder with {CONFIG}, or a hub name org/name'
    if name.count('/') != 1 or Path(name).exists():
        raise ValueError(f'model: found {name!r}, {known}')
    try:
        return Path(hf_hub_download(name, CONFIG))
    except (OSError, ValueError) as error:
        why = ' '.join(str(error).split())
        raise ValueError(f'model: found {name!r}, {known}: {why}') from error


def config(name: str, found: Mapping[str, Any]) -> Config:
    """The Config of a model's config.json; raises ValueError for one that no family here reads."""
    return hf_config.read(Path(name) / CONFIG, found)[1]
