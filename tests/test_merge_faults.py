"""Merges that cannot be: status 2, one line that names what is wrong, and nothing is written.

`WRONG` is the table.
"""

import os
import shutil

import numpy as np
import pytest
from merge_tiny import DOGERM, LINEAR, SMALL, command, pair, read, recipe, refused, save, variant
from torch_goldens import GOLDENS, edit_json

Q = 'model.layers.1.self_attn.q_proj.weight'


@pytest.fixture
def run(monkeypatch, capfd):
    return command(monkeypatch, capfd)


@pytest.fixture
def folder(tmp_path):
    return pair(tmp_path)


# Wrong input: what is done in the folder, the recipe, other flags, and what the line says


def config(name, **changes):
    return lambda folder: edit_json(folder / name / 'config.json', **changes)


def tensors(name, **changes):
    def spoil(folder):
        found = read(folder / name)
        for key, value in changes.items():
            del found[key.replace('__', '.')]
            if value is not None:
                found[key.replace('__', '.')] = value
        save(folder / name, found)

    return spoil


def sharded(folder):
    shutil.rmtree(folder / 'domain_lm')
    shutil.copytree(GOLDENS / 'seqcls_sharded', folder / 'domain_lm')
    (folder / 'domain_lm' / 'model-00002-of-00004.safetensors').unlink()


def adapter(folder):
    shutil.rmtree(folder / 'domain_lm')
    shutil.copytree(GOLDENS / 'peft', folder / 'domain_lm')


def replaced(name, by):
    def spoil(folder):
        shutil.rmtree(folder / name)
        shutil.copytree(SMALL / by, folder / name)

    return spoil


def nothing(folder):
    pass


def no_tokenizer(folder):
    for file in (folder / 'domain_lm').glob('tokenizer*'):
        file.unlink()


def two_labels(problem):
    def spoil(folder):
        labels = {'id2label': {'0': 'a', '1': 'b'}, 'label2id': {'a': 0, 'b': 1}}
        config('rm', **labels, problem_type=problem)(folder)
        tensors('rm', score__weight=np.zeros((2, 8), np.float32))(folder)

    return spoil


def biases(folder):
    config('domain_lm', attention_bias=True)(folder)
    lm = read(folder / 'domain_lm')
    name = 'model.layers.{}.self_attn.{}_proj.bias'
    more = {name.format(i, x): np.zeros(8, np.float32) for i in range(4) for x in 'qkvo'}
    save(folder / 'domain_lm', lm | more)


def more_keys(folder):
    config('domain_lm', num_key_value_heads=1)(folder)
    lm = read(folder / 'domain_lm')
    cut = ('k_proj.weight', 'v_proj.weight')
    save(folder / 'domain_lm', {n: x[:4] if n.endswith(cut) else x for n, x in lm.items()})


def no_pad(folder):
    edit_json(folder / 'rm' / 'tokenizer_config.json', pad_token=None)


def in_the_way(folder):
    (folder / 'out').mkdir()
    (folder / 'out' / 'letter.txt').write_text('precious')


Q_KEY = 'model__layers__1__self_attn__q_proj__weight'
NAN = np.full((8, 8), np.nan, np.float32)
WRONG = {
    'unknown key': (nothing, DOGERM + 'colour: red\n', (), 'recipe.yml:9: colour: no such key'),
    'unknown method': (nothing, DOGERM.replace('linear', 'cubic'), (), "found 'cubic', expected"),
    'unknown parameter': (nothing, DOGERM.replace('0.7', '0.7, t: 1'), (), 'parameters.t: no such'),
    'no weight': (nothing, DOGERM.replace('weight: 0.3', ''), (), '(domain_lm): model.e'),
    'no base': (nothing, DOGERM.replace('linear', 'ties'), (), 'found no base_model, which ties'),
    'no models': (nothing, 'merge_method: linear\nmodels: []\n', (), 'models: found a list'),
    'no such model': (nothing, DOGERM.replace('domain_lm', 'lm'), (), 'lm: no such folder'),
    'not on the hub': (
        nothing,
        DOGERM.replace('domain_lm', 'a/b@c'),
        (),
        'a/b: no such folder, an',
    ),
    'a plus': (nothing, DOGERM.replace('domain_lm', 'domain_lm+x'), (), 'expected no adapter'),
    'a file': (nothing, DOGERM.replace('domain_lm', 'recipe.yml'), (), 'recipe.yml is no folder'),
    'an adapter': (adapter, DOGERM, (), 'holds an adapter, expected a model'),
    'another family': (
        config('domain_lm', model_type='mistral', architectures=['MistralForCausalLM']),
        DOGERM,
        (),
        "found model types {'rm': 'llama', 'domain_lm': 'mistral'}",
    ),
    'another rope': (
        config('domain_lm', rope_parameters={'rope_theta': 9.0, 'rope_type': 'default'}),
        DOGERM,
        (),
        'rope',
    ),
    'another depth': (
        lambda folder: variant('causal', folder / 'deep'),
        DOGERM.replace('domain_lm', 'deep'),
        (),
        'L: rm has 4, deep has 3',
    ),
    'no class': (config('rm', architectures=None), DOGERM, (), 'architectures is [], expected one'),
    'another depth, which keep_first does not mend': (
        lambda folder: variant('causal', folder / 'wide'),
        LINEAR.replace('domain_lm', 'wide') + 'on_mismatch: keep_first\ntokenizer: {source: rm}\n',
        (),
        "models: found {'rm': 4, 'wide': 3} layers, expected as many of each model",
    ),
    'biases, which keep_first does not mend': (
        biases,
        DOGERM + 'on_mismatch: keep_first\n',
        (),
        'domain_lm: found model.layers.*.self_attn.k_proj.bias, which rm does not have',
    ),
    'more heads of keys': (
        more_keys,
        DOGERM + 'on_mismatch: keep_first\n',
        (),
        'self_attn.k_proj.weight: found shape [4, 8], expected [8, 8]',
    ),
    'missing shard': (
        sharded,
        DOGERM,
        (),
        "names 'model-00002-of-00004.safetensors', expected a f",
    ),
    'missing tensor': (tensors('rm', **{Q_KEY: None}), DOGERM, (), f'{Q}: found nothing'),
    'another shape': (
        tensors('domain_lm', **{Q_KEY: np.zeros((4, 8), np.float32)}),
        DOGERM,
        (),
        f'{Q}: found shape [4, 8], expected [8, 8]',
    ),
    'whole numbers': (
        tensors('domain_lm', **{Q_KEY: np.zeros((8, 8), np.int32)}),
        DOGERM,
        (),
        f'{Q}: found dtype I32',
    ),
    'not a number': (
        tensors('domain_lm', **{Q_KEY: NAN}),
        DOGERM,
        (),
        f'domain_lm/model.safetensors: {Q}: found 64 values that are not finite as float32',
    ),
    'not a number, and no dtype': (
        tensors('rm', **{Q_KEY: NAN}),
        DOGERM.replace('dtype: float32', ''),
        (),
        f'rm/model.safetensors: {Q}: found 64 values that are not finite as float32',
    ),
    'too large once merged': (
        tensors('rm', **{Q_KEY: np.full((8, 8), 60000, np.float32)}),
        LINEAR.replace('0.7', '2').replace('dtype: float32', 'parameters: {normalize: false}')
        + 'out_dtype: float16\n',
        (),
        f'recipe.yml: {Q}: linear: found 64 values that are not finite as float16',
    ),
    'too large for half': (
        tensors('domain_lm', **{Q_KEY: np.full((8, 8), 1e6, np.float32)}),
        DOGERM.replace('float32', 'float16'),
        (),
        'not finite as float16',
    ),
    'other tokens': (
        replaced('domain_lm', 'tags'),
        LINEAR,
        (),
        "found '<|im_start|>' at None in r",
    ),
    'other ids': (
        replaced('domain_lm', 'shuffled'),
        LINEAR,
        (),
        'expected the same, or a tokenize',
    ),
    'no tokenizer': (no_tokenizer, DOGERM, (), 'domain_lm has none, expected one to align tokens'),
    'head of a language model': (
        nothing,
        DOGERM.replace('{source: rm}', '{source: domain_lm}'),
        (),
        'reward_head: domain_lm has a head of a language model, expected one of rewards',
    ),
    'two kinds of heads': (
        nothing,
        DOGERM.replace('reward_head: {source: rm}', ''),
        (),
        "found heads {'rm': 'score', 'domain_lm': 'lm_head'}, expected the same, or a reward_head",
    ),
    'no reward model': (
        replaced('rm', 'code'),
        DOGERM.replace('source: rm', 'average: true'),
        (),
        'expected a reward model',
    ),
    'two labels': (two_labels(None), DOGERM, (), 'found 2 labels, expected 1'),
    'two categories': (
        two_labels('single_label_classification'),
        DOGERM,
        (),
        'reward_head: rm has a head of categories, expected one of rewards',
    ),
    'no head': (tensors('rm', score__weight=None), DOGERM, (), 'score.weight: found nothing'),
    'no pad token': (no_pad, DOGERM, (), 'recipe.yml: rm: pad_token_id: found None, expected'),
    'no such template': (
        nothing,
        DOGERM + 'chat_template: morse\n',
        (),
        "found 'morse', expected o",
    ),
    'a template of nothing': (
        nothing,
        DOGERM + "chat_template: '{{ bos_token }}'\n",
        (),
        'does not show what is said',
    ),
    'out is there': (in_the_way, DOGERM, (), 'out: exists, expected no such folder'),
    'out is something else': (
        in_the_way,
        DOGERM,
        ('--overwrite',),
        'replaces what holds config.js',
    ),
    'no size': (nothing, DOGERM, ('--max-shard-size', 'big'), "max_shard_size: found 'big'"),
}


@pytest.mark.parametrize('name', WRONG)
def test_wrong_input(folder, run, name):
    spoil, text, flags, message = WRONG[name]
    spoil(folder)
    recipe(folder, text)
    before = {path.name for path in folder.iterdir()}
    refused(run(folder / 'recipe.yml', folder / 'out', *flags), message)
    assert {path.name for path in folder.iterdir()} == before
    assert 'letter.txt' in os.listdir(folder / 'out') if 'out' in before else True
