"""Merging trees: mergekit's results, policies by name and layer, devices, what does not match."""

import dataclasses
from pathlib import Path

import jax
import numpy as np
import pytest

from jaxrm import merge, sharding, tree
from jaxrm.backbones.layers import Config, Kind, Rope

GOLDENS = Path(__file__).parent / 'goldens' / 'merge'


def test_trees_equal_mergekit():
    """By layer, and by rows as they lie on disk: linear maps are stored the other way round."""
    names = {
        'model.embed_tokens.weight': 'embed/embedding',
        'model.norm.weight': 'norm/scale',
        'self_attn.q_proj.weight': 'q/kernel',
        'input_layernorm.weight': 'attn_norm/scale',
    }
    with np.load(GOLDENS / 'trees.npz') as file:
        found = {key: file[key] for key in file}

    def read(which):
        leaves = {}
        for name, leaf in names.items():
            if name.startswith('model'):
                leaves[leaf] = found[f'{which}:{name}']
                continue
            x = np.stack([found[f'{which}:model.layers.{i}.{name}'] for i in range(3)])
            x = x.swapaxes(-1, -2) if leaf.endswith('kernel') else x
            leaves |= {f'layers/{leaf}': x[:2], f'top/{leaf}': x[2]}
        return leaves

    base, *models = (tree.unflatten(read(i)) for i in range(4))
    weight = [0.3, 0.5, 0.4]
    for method, more in (
        ('linear', {'weight': weight}),
        ('model_stock', {'base': base, 'filter_wise': True}),
        ('ties', {'base': base, 'weight': weight, 'density': 0.5}),
    ):
        got, want = tree.flatten(merge.trees(method, models, **more)), read(method)
        for leaf, y in want.items():
            np.testing.assert_allclose(got[leaf], y, rtol=1e-6, atol=1e-6, err_msg=leaf)


def small_tree(seed, layers=3):
    rng = np.random.default_rng(seed)
    new = lambda *shape: rng.normal(size=shape).astype(np.float32)  # noqa: E731
    leaves = {'embed/embedding': new(8, 4), 'norm/scale': new(4), 'top/q/kernel': new(4, 8)}
    if layers > 1:
        leaves['layers/q/kernel'] = new(layers - 1, 4, 8)
    return tree.unflatten(leaves)


def test_policies_and_gradients():
    a, b = small_tree(0), small_tree(1)
    weight = [1.0, [('embed', 0.0), ('q/', [0.0, 1.0]), ('', 3.0)]]
    y = merge.trees('linear', [a, b], weight=weight, normalize=False)
    mixed = lambda x, w: x[0] + w * x[1]  # noqa: E731
    close = lambda y, x: np.testing.assert_allclose(y, x, rtol=1e-6, atol=1e-6)  # noqa: E731
    np.testing.assert_array_equal(y['embed']['embedding'], a['embed']['embedding'])
    close(y['norm']['scale'], mixed([x['norm']['scale'] for x in (a, b)], 3))
    kernels = [x['layers']['q']['kernel'] for x in (a, b)]
    close(
        y['layers']['q']['kernel'],
        np.stack([mixed([k[i] for k in kernels], i / 2) for i in (0, 1)]),
    )
    close(y['top']['q']['kernel'], mixed([x['top']['q']['kernel'] for x in (a, b)], 1))
    with pytest.raises(ValueError, match=r"\['nothing'\] match no leaf"):
        merge.trees('linear', [a, b], weight=[[('nothing', 1.0), ('', 1.0)], 1.0])
    with pytest.raises(ValueError, match='weight: found 3, expected 2, one an input'):
        merge.trees('linear', [a, b], weight=[0.1, 0.2, 0.7])
    t = [('norm', 0.0), ('', [0.0, 1.0])]
    y = merge.trees('slerp', [b], base=a, t=t)
    np.testing.assert_array_equal(y['norm']['scale'], b['norm']['scale'] * 0 + a['norm']['scale'])
    np.testing.assert_array_equal(y['top']['q']['kernel'], b['top']['q']['kernel'])


def test_gradient():
    assert merge.gradient(0.3, 0.9) == 0.3
    assert merge.gradient([0, 1, 0], 0.25) == 0.5
    assert merge.gradient([0.2, 0.4], 1) == 0.4
    one = merge.trees('passthrough', [small_tree(0, layers=1)], scale=[[0.0, 1.0]])
    np.testing.assert_array_equal(one['top']['q']['kernel'], small_tree(0, 1)['top']['q']['kernel'])
    assert not one['embed']['embedding'].any()


def test_trees_of_devices():
    """The same as of numpy, and each leaf where it was."""
    given = [{'backbone': small_tree(i)} for i in range(3)]
    mesh = sharding.make_mesh(data=2, fsdp=2, tensor=2)
    placed = [sharding.place(x, mesh) for x in given]
    more = {'weight': 0.5, 'density': 0.5}
    want = tree.flatten(merge.trees('dare_ties', given[1:], base=given[0], **more))
    got = tree.flatten(merge.trees('dare_ties', placed[1:], base=placed[0], **more))
    for name, x in tree.flatten(placed[0]).items():
        assert got[name].sharding == x.sharding, name
        np.testing.assert_allclose(got[name], want[name], rtol=1e-6)  # sums for the rescaling


def test_layers_draw_by_their_names():
    """What a stack's layer draws is what it would draw alone under its name."""
    base = jax.tree.map(np.zeros_like, small_tree(0))
    x = jax.tree.map(np.ones_like, base)
    y = merge.trees('dare_linear', [x], base=base, weight=1, density=0.5, seed=3)
    for layer, kernel in enumerate([*y['layers']['q']['kernel'], y['top']['q']['kernel']]):
        alone = merge.array(
            'dare_linear', [np.ones((8, 4), np.float32)], base=np.zeros((8, 4), np.float32),
            weight=1, density=0.5, seed=3, name=f'layers/{layer}/q/kernel',
        )  # fmt: skip
        np.testing.assert_array_equal(kernel, alone.T)
    assert merge.layer_name('backbone/top/q/kernel', None, 3) == 'backbone/layers/2/q/kernel'
    assert merge.layer_name('embed/embedding', None, 3) == 'embed/embedding'


def test_trees_must_match():
    a, b = small_tree(0), small_tree(1)
    del b['norm']
    with pytest.raises(ValueError, match=r"norm/scale: found nothing in \['lm'\]"):
        merge.trees('linear', [a, b], names=['rm', 'lm'], weight=0.5)
    with pytest.raises(ValueError, match=r"norm/scale: found nothing in \['rm'\]"):
        merge.trees('linear', [b, a], names=['rm', 'lm'], weight=0.5)
    b = small_tree(1)
    b['embed']['embedding'] = b['embed']['embedding'][:6]
    with pytest.raises(ValueError, match=r"embed/embedding: found shapes .*'lm': \(6, 4\)"):
        merge.trees('linear', [a, b], names=['rm', 'lm'], weight=0.5)


def test_configs():
    sizes = {'V': 8, 'D': 4, 'F': 4, 'L': 2, 'Q': 2, 'K': 1, 'H': 2}
    a = Config(**sizes)
    assert merge.check_configs([a, Config(**(sizes | {'V': 9}))], ['rm', 'lm']) == []
    ropes = Kind(rope=Rope(1e6)), Kind(window=64, rope=Rope(1e6))
    b = Config(**sizes, kinds=ropes, layer_kinds=(0, 1), norm_eps=1e-6, tied=True)
    found = merge.check_configs([a, b], ['rm', 'lm'], on_mismatch='keep_first')
    assert found[0] == 'norm_eps: rm has 1e-05, lm has 1e-06'
    assert {line.partition(':')[0] for line in found} == {'norm_eps', 'tied', 'windows', 'ropes'}
    assert 'windows: rm has None, lm has [None, 64]' in found
    with pytest.raises(ValueError, match='tied: rm has False, lm has True'):
        merge.check_configs([a, b], ['rm', 'lm'])


SIZES = {'V': 8, 'D': 4, 'F': 4, 'L': 2, 'Q': 2, 'K': 2, 'H': 2}
CHANGES = {
    **{name: SIZES[name] + 2 for name in 'DFLQH'},
    'K': 1,
    'biases': ('q',),
    'qk_norm': True,
    'post_norms': True,
    'norm_offset': 1.0,
    'embed_scale': 2.0,
    'norm_eps': 1e-6,
    'tied': True,
    'activation': 'gelu_tanh',
    'query_scalar': 7,
    'softcap': 2.0,
    'logit_softcap': 2.0,
}


def test_every_change_of_the_function_is_named():
    """And all fields are thought of: those of kinds are windows and ropes."""
    aside = {'V', 'max_position', 'kinds', 'layer_kinds'}
    assert {f.name for f in dataclasses.fields(Config)} == {*CHANGES, *aside}
    a = Config(**SIZES)
    for name, value in CHANGES.items():
        b = Config(**(SIZES | {name: value}))
        with pytest.raises(ValueError, match=f'{name}: rm has .*, lm has '):
            merge.check_configs([a, b], ['rm', 'lm'])
        (found,) = merge.check_configs([a, b], ['rm', 'lm'], on_mismatch='keep_first')
        assert found.startswith(f'{name}: rm has ')
