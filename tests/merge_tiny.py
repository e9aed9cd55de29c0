"""Tiny checkpoints to merge: variants of those in tests/goldens, made in a test's folder."""

import json
import shutil
import sys
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file
from torch_goldens import GOLDENS
from transformers import AutoTokenizer

from jaxrm import cli, shards

SMALL = GOLDENS.parent / 'recipes'
TABLES = ('model.embed_tokens.weight', 'lm_head.weight')
DOGERM = """
merge_method: linear
models:
  - {model: rm, parameters: {weight: 0.7}}
  - {model: domain_lm, parameters: {weight: 0.3}}
tokenizer: {source: union}
reward_head: {source: rm}
dtype: float32
"""
LINEAR = DOGERM.replace('tokenizer: {source: union}\n', '')


def read(folder):
    """All tensors of a checkpoint."""
    out = {}
    for file in sorted(folder.glob('*.safetensors')):
        out |= load_file(file)
    return out


def save(folder, tensors):
    """Puts tensors into the place of a checkpoint's."""
    for file in folder.glob('*.safetensors*'):
        file.unlink()
    save_file(tensors, folder / 'model.safetensors', metadata={'format': 'pt'})


def variant(source, target, *, noise=0.0, seed=0, tokens=(), pad=0, dtype=None, **config):
    """A copy with noise on all tensors, tokens more (each with a row), and rows without tokens."""
    source = GOLDENS / source if isinstance(source, str) else source
    shutil.copytree(source, target)
    rng, old, new = np.random.default_rng(seed), read(source), {}
    for name, x in old.items():
        y = x.astype(np.float64)
        if name in TABLES:
            y = np.concatenate([y, rng.normal(size=(len(tokens) + pad, y.shape[1]))])
        new[name] = (y + noise * rng.normal(size=y.shape)).astype(dtype or x.dtype)
    save(target, new)
    said = json.loads((target / 'config.json').read_text())
    said['vocab_size'] += len(tokens) + pad
    (target / 'config.json').write_text(json.dumps(said | config))
    if tokens:
        tokenizer = AutoTokenizer.from_pretrained(target)
        tokenizer.add_tokens(list(tokens), special_tokens=True)
        tokenizer.save_pretrained(target)
    return target


def recipe(folder, text):
    """A recipe's file."""
    file = Path(folder) / 'recipe.yml'
    file.write_text(text)
    return file


def synthetic(folder, *, D=512, F=1408, L=24, V=4000, head='lm_head', limit=1 << 26, seed=0):
    """A checkpoint of float32 numbers at random in shards, without a tokenizer; its bytes."""
    rng, folder = np.random.default_rng(seed), Path(folder)
    folder.mkdir()
    shapes = {'model.embed_tokens.weight': (V, D), 'model.norm.weight': (D,)}
    for i in range(L):
        layer = f'model.layers.{i}.'
        shapes |= {f'{layer}self_attn.{x}_proj.weight': (D, D) for x in 'qkvo'}
        shapes |= {f'{layer}mlp.{x}_proj.weight': (F, D) for x in ('gate', 'up')}
        shapes[f'{layer}mlp.down_proj.weight'] = (D, F)
        shapes |= {f'{layer}{x}_layernorm.weight': (D,) for x in ('input', 'post_attention')}
    shapes |= {'lm_head.weight': (V, D)} if head == 'lm_head' else {'score.weight': (1, D)}
    dtype = np.dtype(np.float32)
    made = lambda name: rng.standard_normal(shapes[name], dtype)  # noqa: E731
    shards.write(folder, {name: (s, dtype) for name, s in shapes.items()}, made, limit=limit)
    kind = 'ForCausalLM' if head == 'lm_head' else 'ForSequenceClassification'
    config = {
        'architectures': [f'Llama{kind}'], 'model_type': 'llama', 'dtype': 'float32',
        'hidden_size': D, 'intermediate_size': F, 'num_hidden_layers': L, 'vocab_size': V,
        'num_attention_heads': 8, 'num_key_value_heads': 8, 'hidden_act': 'silu',
        'rms_norm_eps': 1e-5, 'max_position_embeddings': 64, 'pad_token_id': 4, 'eos_token_id': 1,
        'tie_word_embeddings': False,
    }  # fmt: skip
    if head == 'score':
        config |= {'id2label': {0: 'LABEL_0'}, 'problem_type': 'regression'}
    (folder / 'config.json').write_text(json.dumps(config))
    return sum(4 * int(np.prod(shape)) for shape in shapes.values())


def pair(folder):
    """The folder, with small models `rm` and `domain_lm` and the recipe of a merge of them."""
    shutil.copytree(SMALL / 'reward', folder / 'rm')
    shutil.copytree(SMALL / 'math', folder / 'domain_lm')
    recipe(folder, DOGERM)
    return folder


def command(monkeypatch, capfd):
    """run(arguments) -> (status, stdout, stderr) of `jaxrm merge`, in this process."""

    def run(*arguments):
        monkeypatch.setattr(sys, 'argv', ['jaxrm', 'merge', *map(str, arguments)])
        status = 0
        try:
            cli.main()
        except SystemExit as end:
            status = end.code or 0
        return status, *capfd.readouterr()

    return run


def refused(result, message):
    status, out, err = result
    assert (status, out) == (2, ''), err
    assert err.count('\n') == 1, err
    assert err.startswith('jaxrm: ')
    assert message in err
