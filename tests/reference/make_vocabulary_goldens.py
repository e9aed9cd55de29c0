"""Write merges of models with different tokenizers, by mergekit, under tests/goldens/vocabulary.

Run (in the torch environment of README.md with mergekit, from the repository root):
    python tests/reference/make_vocabulary_goldens.py

Made with mergekit 0.1.5, torch 2.13.0 and transformers 5.23.0: mergekit-yaml on decoders of one
layer, width 4, whose tokenizers are lists of words.

    vocabulary/tables.npz     the embedding tables of the models `base`, `a` and `b`, whose last two
                              rows have no token, and of each merge
    vocabulary/cases.json     the tokens of each model by id; of each case the merge method, its
                              parameters, the tokenizer section, and the tokens of the result
    vocabulary/versions.json  versions
"""

import json
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
import yaml
from safetensors.torch import load_file
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

SEED, PADDING = 90, 2
ROOT = Path(__file__).resolve().parents[1] / 'goldens' / 'vocabulary'
WORDS = {
    'base': 'the cat sat on a mat'.split(),
    'a': 'sat mat the dog on ran'.split(),
    'b': 'ran the a mat <|x|> dog on bird'.split(),
}
ADDED = {'base': [], 'a': ['<|a|>'], 'b': ['<|b|>', '<|a|>']}
TOKENS = {
    'cat': {'source': 'base', 'force': True},
    'dog': {'source': {'kind': 'zero'}},
    'bird': {'source': {'kind': 'model_token', 'model': 'a', 'token': 'ran'}, 'force': True},
    '<|x|>': {'source': {'kind': 'model_token', 'model': 'base', 'token_id': 1}},
}
CASES = {
    'linear': ('linear', None, {'source': 'union'}, {}),
    'sum': ('linear', None, {'source': 'union'}, {'normalize': False}),
    'task': ('task_arithmetic', 'base', {'source': 'union'}, {}),
    'source_base': ('task_arithmetic', 'base', {'source': 'base'}, {}),
    'source_a': ('linear', None, {'source': 'a'}, {}),
    'tokens': ('linear', None, {'source': 'union', 'tokens': TOKENS}, {}),
    'task_tokens': ('task_arithmetic', 'base', {'source': 'union', 'tokens': TOKENS}, {}),
    'padded': ('linear', None, {'source': 'union', 'pad_to_multiple_of': 16}, {}),
}
WEIGHT = {'base': 0.3, 'a': 0.5, 'b': 0.4}


def make(folder, name):
    """A model of random weights and its tokenizer."""
    words = ['<unk>', *WORDS[name]]
    backend = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token='<unk>'))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token='<unk>')
    tokenizer.add_tokens([AddedToken(t, special=True) for t in ADDED[name]])
    tokenizer.save_pretrained(folder / name)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer) + PADDING, hidden_size=4, intermediate_size=4,
            num_hidden_layers=1, num_attention_heads=1, tie_word_embeddings=True,
        )
    )  # fmt: skip
    torch.nn.init.normal_(model.model.embed_tokens.weight)
    model.save_pretrained(folder / name)
    return [t for t, _ in sorted(tokenizer.get_vocab().items(), key=lambda x: x[1])]


def table(folder):
    """The embedding of a checkpoint."""
    return load_file(folder / 'model.safetensors')['model.embed_tokens.weight'].numpy()


def placed(section, folder):
    """A tokenizer section with the models' folders."""
    out = json.loads(json.dumps(section))
    for token in out.get('tokens', {}).values():
        source = token['source']
        if isinstance(source, str):
            token['source'] = str(folder / source)
        elif 'model' in source:
            source['model'] = str(folder / source['model'])
    if out['source'] in WORDS and out['source'] != 'base':
        out['source'] = str(folder / out['source'])
    return out


def merge(folder, method, base, section, parameters):
    """The merged table and its tokens."""
    config = {
        'merge_method': method,
        'models': [
            {'model': str(folder / name), 'parameters': {'weight': WEIGHT[name]}}
            for name in WORDS if name != base
        ],
        'parameters': parameters,
        'tokenizer': placed(section, folder),
        'dtype': 'float32',
    }  # fmt: skip
    if base:
        config['base_model'] = str(folder / base)
    (folder / 'merge.yml').write_text(yaml.safe_dump(config))
    out = folder / 'merged'
    command = Path(sys.executable).parent / 'mergekit-yaml'
    subprocess.run([command, folder / 'merge.yml', out], check=True)
    tokens = AutoTokenizer.from_pretrained(out).get_vocab()
    return table(out), [t for t, _ in sorted(tokens.items(), key=lambda x: x[1])]


def main():
    """All files."""
    torch.manual_seed(SEED)
    arrays, cases = {}, {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tokens = {name: make(folder, name) for name in WORDS}
        for name in WORDS:
            arrays[name] = table(folder / name)
        for name, (method, base, section, parameters) in CASES.items():
            arrays[f'{name}/result'], out = merge(folder, method, base, section, parameters)
            cases[name] = dict(
                method=method, base=base, section=section, parameters=parameters, tokens=out
            )
    ROOT.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(ROOT / 'tables.npz', **arrays)
    made = {'tokens': tokens, 'weight': WEIGHT, 'cases': cases}
    (ROOT / 'cases.json').write_text(json.dumps(made, indent=1) + '\n')
    versions = {n: version(n) for n in ('mergekit', 'torch', 'transformers', 'tokenizers', 'numpy')}
    (ROOT / 'versions.json').write_text(json.dumps(versions, indent=2, sort_keys=True) + '\n')


if __name__ == '__main__':
    main()
