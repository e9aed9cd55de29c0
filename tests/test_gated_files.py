"""Gated models in folders: the released layout in and out, and what only looks like one."""

import dataclasses
import functools
import json
import math
import shutil

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec
from safetensors.numpy import load_file, save_file
from torch_goldens import FAMILIES, GOLDENS, edit_json, load

from jaxrm import bundle, checkpoint, heads, hf, hf_heads, sharding
from jaxrm.regress import Scale
from jaxrm.reward import RewardModel

GATED = GOLDENS.parent / 'gated'
INDEX = 'model.safetensors.index.json'
KEYS = {
    'num_objectives': 19,
    'gating_temperature': 10,
    'gating_hidden_dim': 32,
    'gating_n_hidden': 3,
}


def tensors(folder):
    """Those of all files, which the index, if there is one, places right."""
    found = {f.name: load_file(f) for f in sorted(folder.glob('*.safetensors'))}
    if (folder / INDEX).exists():
        listed = json.loads((folder / INDEX).read_text())['weight_map']
        assert listed == {name: file for file, held in found.items() for name in held}
    return {name: x for held in found.values() for name, x in held.items()}


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name, x in expected.items():
        assert found[name].dtype == x.dtype, name
        np.testing.assert_array_equal(found[name], x, err_msg=name)


def copy(tmp_path, name='k19'):
    return shutil.copytree(GATED / name, tmp_path / name)


# In and out


def test_the_released_layout_is_read_as_it_is():
    p, raw = load(GATED / 'k19'), tensors(GATED / 'k19')
    assert (p.head_kind, p.temperature, p.bundle) == ('gated', 10, None)
    dtypes = {part: {x.dtype.name for x in jax.tree.leaves(p.params[part])} for part in p.params}
    assert dtypes == {'backbone': {'bfloat16'}, 'head': {'float32'}, 'gate': {'float32'}}
    np.testing.assert_array_equal(p.head['transform'], raw['reward_transform_matrix'])
    assert (p.head['transform'][4] <= 0).all()  # penalties in a row, not in a column
    kernel = p.head['regression']['kernel']
    np.testing.assert_array_equal(kernel, raw['regression_layer.weight'].T)
    for i in range(4):
        layer = p.gate[f'layer_{i}']
        np.testing.assert_array_equal(layer['kernel'], raw[f'gating.layers.{i}.weight'].T)
        np.testing.assert_array_equal(layer['bias'], raw[f'gating.layers.{i}.bias'])
    np.testing.assert_array_equal(p.gate['scale'], raw['gating.logit_scale'])


def test_objectives_without_names_have_the_published_ones():
    p = load(GATED / 'k19')
    assert len(p.objectives) == len(set(p.objectives)) == 19
    assert p.objectives[4] == 'helpsteer-verbosity'
    assert p.objectives[6] == 'ultrafeedback-instruction_following'
    assert p.objectives[10] == 'beavertails-is_safe'
    assert p.objectives[17] == 'code-instruction-following'
    assert p.scales == (Scale(0, 4),) * 5 + (None,) * 14
    assert load(GATED / 'k5').objectives == tuple(f'objective {j}' for j in range(5))


@pytest.mark.parametrize(('name', 'limit'), [('k19', 40_000), ('k19', 10**9), ('k5', 10**9)])
def test_a_round_trip_gives_back_every_byte(tmp_path, name, limit):
    p, out = load(GATED / name), tmp_path / 'out'
    checkpoint.export(out, p.params, p, max_shard_bytes=limit)
    assert_same(tensors(out), tensors(GATED / name))
    assert (out / INDEX).exists() == (limit < 10**9)
    again = checkpoint.load_pretrained(out)
    assert again.hf_config['architectures'] == ['LlamaForRewardModelWithGating']
    assert 'auto_map' not in again.hf_config
    want = {key: json.loads((GATED / name / 'config.json').read_text())[key] for key in KEYS}
    assert {key: again.hf_config[key] for key in KEYS} == want
    assert again.bundle['objectives'] == list(p.objectives)
    assert (again.objectives, again.scales) == (p.objectives, p.scales)
    checkpoint.export(tmp_path / 'more', again.params, again, max_shard_bytes=limit)
    for file in out.iterdir():
        assert (tmp_path / 'more' / file.name).read_bytes() == file.read_bytes(), file.name


def made(base, J=3, hidden=8):
    """Head and gate for a backbone, and the names and scales they go by."""
    model = RewardModel(None, heads.Gated(heads.Gate(J, hidden, layers=2, temperature=4.0)))
    init = lambda key: (model.init_head(key, base.config.D), model.init_gate(key, base.config.D))  # noqa: E731
    rng, shapes = np.random.default_rng(0), jax.eval_shape(init, jax.random.key(0))
    head, gate = jax.tree.map(lambda x: rng.normal(size=x.shape).astype(np.float32), shapes)
    names, scales = ('helpful', 'honest', 'long'), (Scale(1, 5), None, Scale(0, 4))
    like = dataclasses.replace(base, objectives=names, scales=scales, temperature=4.0)
    return {'backbone': base.backbone, 'head': head, 'gate': gate}, like


@pytest.mark.parametrize('family', ['llama', 'qwen2'])
def test_a_gate_on_another_backbone(tmp_path, family):
    base = load(FAMILIES[family], kind='backbone')
    params, like = made(base)
    checkpoint.export(tmp_path / 'out', params, like)
    again = checkpoint.load_pretrained(tmp_path / 'out')
    assert again.hf_config['architectures'] == [f'{family.title()}ForRewardModelWithGating']
    assert again.bundle['scales'] == [[1, 5], None, [0, 4]]
    assert (again.objectives, again.scales) == (like.objectives, like.scales)
    jax.tree.map(np.testing.assert_array_equal, again.params, params)
    head = {**again.head, 'gate': again.gate}
    found = heads.of('gated', again.config, head, temperature=again.temperature)
    assert found == heads.Gated(heads.Gate(3, 8, 2, 4.0))


def test_what_does_not_fit_is_not_written(tmp_path):
    params, like = made(load(FAMILIES['llama'], kind='backbone'))
    write = functools.partial(checkpoint.export, tmp_path / 'out')
    gateless = {k: v for k, v in params.items() if k != 'gate'}
    for wrong, about, message in (
        (params, {'temperature': None}, r'^temperature: found None'),
        (params, {'objectives': ('a', 'b', 'a')}, r'^objectives: found .* different names'),
        (params, {'scales': ()}, None),
        (params, {'scales': (None,) * 2}, r'^objectives: found .* and 2 scales'),
        (
            params,
            {'objectives': ('a', 'b')},
            r'gate/layer_2/bias: found \(3,\), expected \(2,\)',
        ),
        (gateless, {}, r'gate/layer_0/bias: found nothing, expected \(3,\)'),
    ):
        if message:
            with pytest.raises(ValueError, match=message):
                write(wrong, dataclasses.replace(like, **about))
            assert not (tmp_path / 'out').exists()
        else:
            write(wrong, dataclasses.replace(like, **about))
            assert checkpoint.load_pretrained(tmp_path / 'out').scales == (None,) * 3
            shutil.rmtree(tmp_path / 'out')


def test_its_backbone_alone(tmp_path):
    p = load(GATED / 'k19', kind='backbone')
    assert (p.head, p.gate, p.head_kind, p.objectives) == (None, None, None, ())
    head = {'kernel': np.ones((32, 1), np.float32)}
    checkpoint.export(tmp_path / 'out', {**p.params, 'head': head}, p)
    again = checkpoint.load_pretrained(tmp_path / 'out')
    assert again.head_kind == 'score'
    assert not KEYS.keys() & again.hf_config.keys()


# Look-alikes


def spoiled(tmp_path, change=(), config=()):
    """k5 with tensors and keys of config.json replaced; None removes."""
    folder, change = copy(tmp_path, 'k5'), dict(change)
    held = load_file(folder / 'model.safetensors') | change
    held = {name: x for name, x in held.items() if x is not None}
    save_file(held, folder / 'model.safetensors', metadata={'format': 'pt'})
    edit_json(folder / 'config.json', **dict(config))
    return folder


def zeros(*shape):
    return np.zeros(shape, np.float32)


BATCH_NORM = {
    'gating.layers.2.running_mean': zeros(24),
    'gating.layers.2.running_var': zeros(24),
    'gating.layers.2.num_batches_tracked': np.zeros((), np.int64),
}
WRONG = {
    'QRM by its config': (
        {},
        {'num_quantiles': 19},
        r'config.json: found num_quantiles, a model of q',
    ),
    'QRM by its gate': (
        BATCH_NORM,
        {},
        r'found gating.layers.2.running_mean, a model of quantiles',
    ),
    'other K': (
        {},
        {'num_objectives': 4},
        r'regression_layer.weight: found shape \[5, 32\], .*\[4, 32',
    ),
    'other width': (
        {},
        {'gating_hidden_dim': 25},
        r'gating.layers.0.weight: found shape \[24, 32\]',
    ),
    'other depth': ({}, {'gating_n_hidden': 3}, r'gating.layers.3.weight: found nothing, expected'),
    'no ratings': (
        {'regression_layer.weight': None},
        {},
        r'regression_layer.weight: found nothing, expected \[5, 32\]',
    ),
    'no transform': (
        {'reward_transform_matrix': None},
        {},
        'reward_transform_matrix: found nothing',
    ),
    'no scale': (
        {'gating.logit_scale': None},
        {},
        r'gating.logit_scale: found nothing, expected \[1',
    ),
    'no bias': ({'gating.layers.1.bias': None}, {}, 'gating.layers.1.bias: found nothing'),
    'one layer more': (
        {'gating.layers.3.weight': zeros(5, 5)},
        {},
        'gating.layers.3.weight: found in model.safetensors, expected no such tensor',
    ),
    'a bias too many': ({'regression_layer.bias': zeros(5)}, {}, 'regression_layer.bias: found in'),
    'a score': ({'score.weight': zeros(1, 32)}, {}, 'score.weight: found in'),
    'a language model': ({'lm_head.weight': zeros(307, 32)}, {}, 'lm_head.weight: found in'),
    'no K': ({}, {'num_objectives': None}, r"config.json: found no \['num_objectives'\]"),
    'no temperature': ({}, {'gating_temperature': None}, r"found no \['gating_temperature'\]"),
    'no sizes': (
        {},
        {'gating_hidden_dim': None, 'gating_n_hidden': None},
        r"found no \['gating_hidden_dim', 'gating_n_hidden'\], which a gated",
    ),
    'no number': (
        {},
        {'gating_temperature': 'hot'},
        "gating_temperature is 'hot', expected a number",
    ),
    'cold': ({}, {'gating_temperature': 0}, 'gating_temperature is 0, expected a number above 0'),
    'half a layer': ({}, {'gating_n_hidden': 1.5}, 'gating_n_hidden is 1.5, expected a whole'),
    'a classifier': (
        {},
        {'architectures': ['LlamaForSequenceClassification']},
        r'heads: found those of a gate, expected .*WithGating in architectures',
    ),
    'another reward model': (
        {},
        {'architectures': ['LlamaForRewardModel']},
        r'heads: found those of a gate, expected .*WithGating in architectures',
    ),
    'two labels': ({}, {'id2label': {'0': 'a', '1': 'b'}}, 'found 2 labels, expected 1'),
}


@pytest.mark.parametrize('name', WRONG)
def test_what_only_looks_like_one_is_refused(tmp_path, name):
    change, config, message = WRONG[name]
    with pytest.raises(ValueError, match=message):
        checkpoint.load_pretrained(spoiled(tmp_path, change, config))


def test_it_is_no_classifier_of_ratings():
    for kind, message in (('ratings', 'found a reward with a gate'), ('causal_lm', 'ForCausalLM')):
        with pytest.raises(ValueError, match=message):
            checkpoint.load_pretrained(GATED / 'k5', kind=kind)


@pytest.mark.parametrize(
    ('key', 'value'),
    [
        ('objectives', None),
        ('objectives', ['a', 'b', 'c', 'd']),
        ('objectives', ['a', 'b', 'c', 'd', 'a']),
        ('objectives', ['a', 'b', 'c', 'd', 5]),
        ('scales', None),
        ('scales', [None] * 4),
        ('scales', [[0, 4], [0], None, None, None]),
        ('scales', [[4, 0], None, None, None, None]),
        ('scales', [[2, 2], None, None, None, None]),
        ('scales', [[0, math.inf], None, None, None, None]),
        ('scales', [[math.nan, 4], None, None, None, None]),
        ('scales', [[0, '4'], None, None, None, None]),
    ],
)
def test_names_and_scales_are_those_of_the_model(tmp_path, key, value):
    p = load(GATED / 'k5')
    checkpoint.export(tmp_path / 'out', p.params, p)
    edit_json(tmp_path / 'out' / bundle.FILE, **{key: value})
    with pytest.raises(ValueError, match=rf'jaxrm.json: {key} is .*, expected (5|a list)'):
        checkpoint.load_pretrained(tmp_path / 'out')


def test_the_released_tensors_by_number():
    """301 of them, 6,392,189 numbers in the heads."""
    p = load(GATED / 'k5')
    config = dataclasses.replace(p.config, D=4096, L=32)
    sizes = hf_heads.Sizes(19, 1024, layers=3)
    shapes = hf_heads.layout('gated', config, sizes)
    assert sum(int(np.prod(shape)) for _, shape in shapes.values()) == 6_392_189
    backbone = len(hf.layout(checkpoint.backbones.family('llama'), p.config, None))
    assert backbone + (config.L - p.config.L) * 9 + len(shapes) == 301


def test_every_leaf_has_a_place():
    mesh = sharding.make_mesh(fsdp=2, tensor=2)
    leaves = jax.tree_util.tree_leaves_with_path(
        sharding.shardings(load(GATED / 'k19').params, mesh)
    )
    found = {sharding.leaf_name(path): s.spec for path, s in leaves}
    assert found['head/regression/kernel'] == PartitionSpec('fsdp', None)
    assert found['head/transform'] == PartitionSpec(None, None)
    assert found['gate/scale'] == found['gate/layer_3/bias'] == PartitionSpec(None)
    assert found['gate/layer_0/kernel'] == PartitionSpec(None, None)
    assert found['backbone/top/gate/kernel'] == PartitionSpec('fsdp', 'tensor')
