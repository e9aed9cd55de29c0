"""The mesh, and a rule for every leaf there is."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import plain
import pytest
from jax.sharding import PartitionSpec

from jaxrm import heads, lora, packing, reward, sharding, train
from jaxrm.backbones.layers import Decoder

AXES = ('data', 'fsdp', 'tensor')


@functools.cache
def parameters():
    """Shapes of everything a reward model or a language model has."""
    shape = packing.Shape(tokens=24, rows=((2, 16),), prompts=2, candidates=2)
    pack = packing.fill(plain.random_tokens([2]), [np.arange(1)], shape)
    backbone = jax.eval_shape(Decoder(plain.TINY).init, jax.random.key(0), pack)['params']
    adapter = jax.eval_shape(lambda: lora.init(backbone, jax.random.key(0), rank=2))
    rm = reward.RewardModel(Decoder(plain.TINY), heads.Scalar())
    head = jax.eval_shape(lambda: rm.init_head(jax.random.key(0), plain.TINY.D))
    return {'backbone': backbone, 'lora': adapter, 'head': head}


def specs(tree, mesh):
    leaves = jax.tree_util.tree_leaves_with_path(sharding.shardings(tree, mesh))
    return {sharding.leaf_name(path): s.spec for path, s in leaves}


def test_every_leaf_of_parameters_and_state_has_a_rule():
    mesh, tx = sharding.make_mesh(fsdp=2, tensor=2), train.adamw(0.1, weight_decay=0.1)
    make = lambda w: train.State(jnp.zeros((), jnp.int32), w, tx.init(w))  # noqa: E731
    state = jax.eval_shape(make, parameters())
    found = specs(state, mesh)
    assert len(found) == len(jax.tree.leaves(state))
    learning = {n.removeprefix('trainable/'): s for n, s in found.items() if 'trainable/' in n}
    assert len(learning) == len(jax.tree.leaves(parameters()))
    for moment in ('mu', 'nu'):
        own = {n.split(f'/{moment}/')[1]: s for n, s in found.items() if f'/{moment}/' in n}
        assert own == learning
    assert found['step'] == PartitionSpec()


def test_rules_by_hand():
    mesh = sharding.make_mesh(fsdp=2, tensor=2)
    found = specs(parameters(), mesh)
    want = {
        'backbone/embed/embedding': ('tensor', 'fsdp'),
        'backbone/layers/q/kernel': (None, 'fsdp', 'tensor'),
        'backbone/top/v/kernel': ('fsdp', 'tensor'),
        'backbone/layers/o/kernel': (None, 'tensor', 'fsdp'),
        'backbone/top/gate/kernel': ('fsdp', 'tensor'),
        'backbone/layers/down/kernel': (None, 'tensor', 'fsdp'),
        'backbone/layers/mlp_norm/scale': (None, None),
        'backbone/norm/scale': (None,),
        'lora/layers/q/a': (None, 'fsdp', None),
        'lora/layers/q/b': (None, None, 'tensor'),
        'lora/top/down/a': ('tensor', None),
        'lora/top/down/b': (None, 'fsdp'),
        'head/kernel': ('fsdp', None),
    }
    for name, axes in want.items():
        assert found[name] == PartitionSpec(*axes), name
    ndim = {
        sharding.leaf_name(path): x.ndim
        for path, x in jax.tree_util.tree_leaves_with_path(parameters())
    }
    assert all(len(found[n]) == ndim[n] for n in ndim)


def test_stacked_adapters_and_experts_find_the_same_rules():
    mesh = sharding.make_mesh()
    stacked = jax.tree.map(lambda x: jax.ShapeDtypeStruct((3, *x.shape), x.dtype), parameters())
    one, many = specs(parameters(), mesh), specs(stacked, mesh)
    assert many == {n: PartitionSpec(None, *s) for n, s in one.items()}


@pytest.mark.parametrize(
    'name', ['backbone/rotor/kernel', 'head/temperature', 'backbone/layers/qq/kernel', 'kernel']
)
def test_a_leaf_without_a_rule_raises_and_is_named(name):
    leaf = jnp.zeros((4, 4))
    tree = functools.reduce(lambda t, part: {part: t}, reversed(name.split('/')), leaf)
    with pytest.raises(ValueError, match=f"no sharding rule for leaf '{name}'"):
        sharding.shardings(tree, sharding.make_mesh())
    with pytest.raises(ValueError, match=f"'{name}'"):
        sharding.place(tree, sharding.make_mesh())


@pytest.mark.parametrize(
    ('sizes', 'want'),
    [
        ({}, (8, 1, 1)),
        ({'data': 1, 'fsdp': -1}, (1, 8, 1)),
        ({'fsdp': 2, 'tensor': 2}, (2, 2, 2)),
        ({'data': 4, 'tensor': -1}, (4, 1, 2)),
    ],
)
def test_meshes(sizes, want):
    mesh = sharding.make_mesh(**sizes)
    assert mesh.axis_names == AXES
    assert tuple(mesh.shape[a] for a in AXES) == want
    assert sharding.data_parallel(mesh) == want[0] * want[1]
    assert set(mesh.axis_types) == {jax.sharding.AxisType.Auto}


@pytest.mark.parametrize(
    'sizes',
    [
        {'data': 3},
        {'data': 16},
        {'fsdp': 3},
        {'fsdp': 16},
        {'data': -1, 'fsdp': -1},
        {'data': 0},
        {'fsdp': 0},
        {'data': -2, 'fsdp': -4},
    ],
)
def test_meshes_that_cannot_be(sizes):
    with pytest.raises(ValueError, match='8 devices'):
        sharding.make_mesh(**sizes)


def test_arrays_and_packs_land_where_the_table_says():
    mesh = sharding.make_mesh(fsdp=2, tensor=2)
    w = sharding.place({'top': {'o': {'kernel': np.arange(64.0).reshape(8, 8)}}}, mesh)
    kernel = w['top']['o']['kernel']
    assert {s.data.shape for s in kernel.addressable_shards} == {(4, 4)}
    np.testing.assert_array_equal(kernel, np.arange(64.0).reshape(8, 8))
    shape = packing.Shape(tokens=24, rows=((1, 8), (2, 16)), prompts=2, candidates=2)
    pack = packing.fill(plain.random_tokens([2]), [np.arange(1)], shape, count=4)
    placed = sharding.place_batch(pack, mesh)
    for x in jax.tree.leaves(placed):
        assert {s.data.shape for s in x.addressable_shards} == {(1, *x.shape[1:])}
