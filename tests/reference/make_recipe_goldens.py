"""Merge tiny checkpoints by the recipes in tests/goldens/recipes with mergekit.

Run (in the torch environment of README.md with mergekit, from the repository root):
    python tests/reference/make_recipe_goldens.py

Made with mergekit 0.1.5, torch 2.13.0 and transformers 5.23.0. The recipes are written by hand and
are read by jaxrm as they are here.

    recipes/<name>.yml          a recipe
    recipes/<name>.safetensors  the tensors that mergekit merges by it
    recipes/results.json        of each, what config.json and the tokenizer of the result say
    recipes/templates.json      a conversation in mergekit's chat templates, by name
    recipes/<model>/            fine-tunes of one base, and reward models, at random
    recipes/versions.json       versions
"""

import json
import logging
import os
import tempfile
from importlib.metadata import version
from pathlib import Path

import numpy as np
import yaml
from mergekit.config import MergeConfiguration
from mergekit.merge import run_merge
from mergekit.options import MergeOptions
from safetensors.numpy import save_file
from safetensors.torch import load_file
from safetensors.torch import save_file as save_torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

SEED = 70
ROOT = Path(__file__).resolve().parents[1] / 'goldens' / 'recipes'
D, F, L = 8, 16, 4
WORDS = ['<unk>', '<pad>', '<s>', '</s>', *'a river runs into the lake and asks who is not there ?'.split()]
TALK = [
    {'role': 'system', 'content': ' Be brief. '},
    {'role': 'user', 'content': ' Hi '},
    {'role': 'assistant', 'content': ' Hello '},
    {'role': 'user', 'content': 'Bye'},
    {'role': 'assistant', 'content': 'Ciao'},
]
TEMPLATE = "{% for m in messages %}{{ m['role'] + ' ' + m['content'] + ' ' }}{% endfor %}"
OTHER = TEMPLATE.replace("' ' }}", "' ; ' }}")
TAGS = ['<|im_start|>', '<|im_end|>']


def tokenizer(folder, words, added=(), template=TEMPLATE):
    backend = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token='<unk>'))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    ends = {'bos_token': '<s>', 'eos_token': '</s>', 'pad_token': '<pad>', 'unk_token': '<unk>'}
    made = PreTrainedTokenizerFast(tokenizer_object=backend, **ends)
    made.add_special_tokens({'additional_special_tokens': list(added)})
    made.chat_template = template
    made.save_pretrained(folder)
    return len(made)


def shapes(V, head):
    out = {'model.embed_tokens.weight': (V, D), 'model.norm.weight': (D,)}
    for i in range(L):
        layer = f'model.layers.{i}.'
        out |= {f'{layer}self_attn.{x}_proj.weight': (D, D) for x in 'qkvo'}
        out |= {f'{layer}mlp.{x}_proj.weight': (F, D) for x in ('gate', 'up')}
        out[f'{layer}mlp.down_proj.weight'] = (D, F)
        out |= {f'{layer}{x}_layernorm.weight': (D,) for x in ('input', 'post_attention')}
    heads = {'lm_head': {'lm_head.weight': (V, D)}, 'score': {'score.weight': (1, D)}}
    return out | heads.get(head, {})


def model(rng, name, base=None, *, words=WORDS, rows=None, added=(), head='lm_head', **options):
    """Writes a model that is `base`, row by row of its words, and a little noise."""
    folder = ROOT / name
    dtype = options.pop('dtype', np.float32)
    V = max(tokenizer(folder, words, added, options.pop('template', TEMPLATE)), rows or 0)
    tensors = {}
    for key, shape in shapes(V, head).items():
        x = rng.normal(size=shape)
        if base is not None and key in base:
            old = base[key].astype(np.float64)
            if key in ('model.embed_tokens.weight', 'lm_head.weight'):
                ids = [WORDS.index(w) for w in words]
                old = np.concatenate([old[ids], x[len(ids) :]])
            x = old + 0.3 * x
        tensors[key] = x.astype(dtype)
    save_file(tensors, folder / 'model.safetensors', metadata={'format': 'pt'})
    kind = 'LlamaForSequenceClassification' if head == 'score' else 'LlamaForCausalLM'
    config = {
        'architectures': [kind], 'model_type': 'llama', 'dtype': np.dtype(dtype).name,
        'hidden_size': D, 'intermediate_size': F, 'num_hidden_layers': L, 'vocab_size': V,
        'num_attention_heads': 2, 'num_key_value_heads': 2, 'head_dim': 4, 'hidden_act': 'silu',
        'rms_norm_eps': 1e-5, 'max_position_embeddings': 64, 'bos_token_id': words.index('<s>'),
        'eos_token_id': words.index('</s>'), 'pad_token_id': words.index('<pad>'),
        'rope_parameters': {'rope_theta': 100.0, 'rope_type': 'default'},
        'tie_word_embeddings': head == 'tied', 'attention_bias': False, 'mlp_bias': False,
    }  # fmt: skip
    if head == 'score':
        config |= {'id2label': {0: 'LABEL_0'}, 'label2id': {'LABEL_0': 0}}
        config |= {'problem_type': 'regression'}
    (folder / 'config.json').write_text(json.dumps(config | options, indent=2) + '\n')
    return tensors


def make_models():
    rng = np.random.default_rng(SEED)
    base = model(rng, 'base')
    for name in ('math', 'code', 'chat'):
        model(rng, name, base)
    model(rng, 'half', base, dtype=np.float16)
    model(rng, 'tags', base, added=TAGS, template=OTHER)
    model(rng, 'shuffled', base, words=[WORDS[i] for i in rng.permutation(len(WORDS))], rows=20)
    tied = model(rng, 'tied', head='tied')
    model(rng, 'tied_too', tied, head='tied')
    reward = model(rng, 'reward', base, head='score')
    model(rng, 'reward_too', reward, head='score', added=['<|good|>'])


def merged(text, out):
    """The tensors, and what config.json and the tokenizer say."""
    settings = MergeConfiguration.model_validate(yaml.safe_load(text))
    run_merge(settings, out, MergeOptions(quiet=True, write_model_card=False), config_source=text)
    tensors = {}
    for file in Path(out).glob('*.safetensors'):
        tensors |= load_file(file)
    found = AutoTokenizer.from_pretrained(out)
    config = json.loads(Path(out, 'config.json').read_text())
    dtypes = sorted({str(x.dtype).removeprefix('torch.') for x in tensors.values()})
    said = {key: config[key] for key in ('vocab_size', 'num_hidden_layers', 'architectures')}
    said |= {'dtypes': dtypes, 'vocabulary': found.get_vocab(), 'template': found.chat_template}
    return tensors, said


def main():
    make_models()
    os.chdir(ROOT)  # mergekit reads paths from here, jaxrm from the recipe's folder
    results, templates = {}, {}
    for recipe in sorted(Path().glob('*.yml')):
        with tempfile.TemporaryDirectory() as out:
            tensors, results[recipe.stem] = merged(recipe.read_text(), out)
        if results[recipe.stem]['template'] not in (TEMPLATE, OTHER) or 'union' in recipe.read_text():
            results[recipe.stem]['template'] = None  # mergekit's own, or any model's
        save_torch(tensors, f'{recipe.stem}.safetensors')
    for name in ('alpaca', 'chatml', 'exaone', 'llama3', 'mistral'):
        with tempfile.TemporaryDirectory() as out:
            copied = 'merge_method: passthrough\nmodels: [{model: base}]\nchat_template: '
            merged(copied + name, out)
            found = AutoTokenizer.from_pretrained(out)
        cases = ((TALK, False), (TALK[1:], False), (TALK[:4], True), (TALK[1:2], True))
        templates[name] = [
            found.apply_chat_template(talk, tokenize=False, add_generation_prompt=opened)
            for talk, opened in cases
        ]
    write('results.json', results)
    write('templates.json', {'talk': TALK, 'texts': templates})
    names = ('mergekit', 'numpy', 'safetensors', 'tokenizers', 'torch', 'transformers')
    write('versions.json', {'seed': SEED, **{name: version(name) for name in names}})


def write(name, value):
    Path(name).write_text(json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False) + '\n')


if __name__ == '__main__':
    logging.disable()
    main()
