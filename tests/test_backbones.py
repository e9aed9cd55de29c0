"""The decoder on packs against plain code: scan, adapters, vmap, remat, top layer, shard_map."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import plain
import pytest
from jax.sharding import PartitionSpec

from jaxrm import lora, members, packing, tree
from jaxrm.backbones import attention
from jaxrm.backbones.layers import Decoder

C = plain.TINY
CONFIGS = {'tiny': C, **plain.FAMILIES}
SHAPE = packing.Shape(tokens=40, rows=((2, 6), (3, 8), (3, 16)), prompts=4, candidates=4)


@functools.cache
def world(name='tiny'):
    tokens = plain.random_tokens([2, 1, 4, 0, 3])
    packs = packing.plan(tokens, SHAPE, order=np.arange(5))
    pack = packing.fill(tokens, packs, SHAPE, count=len(packs) + 1)
    shapes = jax.eval_shape(Decoder(CONFIGS[name]).init, jax.random.key(0), pack)['params']
    weights = plain.random_tree(shapes)
    adapters = [
        plain.random_tree(lora.init(shapes, jax.random.key(0), rank=2), seed, 0.5)
        for seed in (1, 2)
    ]
    return tokens, pack, weights, adapters


@functools.cache
def rows():
    """(ids [rows, longest], gate and last token [rows, 2]) of every candidate, right-padded."""
    tokens = world()[0]
    ids = [(i, row) for i in range(len(tokens.prompt)) for row in plain.rows(tokens, i)]
    longest = max(len(row) for _, row in ids)
    table = np.array([[*row, *[0] * (longest - len(row))] for _, row in ids])
    return table, np.array([(tokens.gate[i], len(row) - 1) for i, row in ids])


def expected(weights, adapter=None, config=C):
    """[rows, 2, D] gate states and last states from plain code, which is causal."""
    ids, at = rows()
    states = jax.vmap(lambda row: plain.states(weights, row, config, adapter))(ids)
    return jax.vmap(lambda h, i: h[i])(states, at)


def chosen(states_PRTD, pack):
    """The same from the packed result, in the same order."""
    where = {int(i): (p, b) for (p, b), i in np.ndenumerate(pack.record_PB) if i >= 0}
    counts = np.diff(world()[0].first)
    places = [(*where[i], m) for i in sorted(where) for m in range(counts[i])]
    p, b, m = np.array(places).T
    return states_PRTD[p, pack.row_PBM[p, b, m]]


def test_padding_at_the_end_changes_nothing_in_plain_code():
    _, _, weights, (adapter, _) = world()
    ids, at = rows()
    k = int(at[:, 1].argmin())
    alone = jax.jit(lambda w: plain.states(w, ids[k, : at[k, 1] + 1], C, adapter))(weights)
    want = jax.jit(expected)(weights, adapter)
    np.testing.assert_allclose(alone[at[k]], want[k], rtol=0, atol=1e-5)


def scalar(states_RTD, seed=0):
    """A number that depends on every state of a row."""
    direction = np.random.default_rng(seed).normal(size=(1, 2, C.D)) / 8
    weight = 1 + 0.3 * np.arange(len(states_RTD))
    return (jnp.tanh((states_RTD * direction).sum((1, 2))) * weight).sum()


@functools.cache
def plain_gradients(expert, name='tiny'):
    """((number, states), gradients) from plain code."""
    _, _, weights, adapters = world(name)
    with_states = lambda w, a: (scalar(states := expected(w, a, CONFIGS[name])), states)  # noqa: E731
    return jax.jit(jax.value_and_grad(with_states, (0, 1), has_aux=True))(weights, adapters[expert])


def assert_gradients_close(got, want, relative=1e-5):
    scale = max(float(jnp.abs(x).max()) for x in jax.tree.leaves(want))
    for name, x in tree.flatten(want).items():
        own = max(float(jnp.abs(x).max()), 1e-3 * scale)
        np.testing.assert_allclose(
            tree.flatten(got)[name] / own, x / own, rtol=0, atol=relative, err_msg=name
        )


QUICK = ('tiny', 'qwen3', 'gemma2', 'gemma3_text')  # between them they have everything


@pytest.mark.parametrize(
    ('name', 'remat'),
    [
        ('tiny', 'none'),
        ('tiny', 'dots'),
        *(
            pytest.param(n, 'full', marks=[] if n in QUICK else pytest.mark.slow, id=n)
            for n in CONFIGS
        ),
    ],
)
def test_states_and_gradients_equal_plain_code(name, remat):
    _, pack, weights, (adapter, _) = world(name)
    model = Decoder(CONFIGS[name], remat=remat)

    def packed(w, a):
        states = chosen(model.apply({'params': w, 'lora': a}, pack), pack)
        return scalar(states), states

    gradients = jax.jit(jax.value_and_grad(packed, (0, 1), has_aux=True))
    (value, states), got = gradients(weights, adapter)
    (want_value, want_states), want = plain_gradients(0, name)
    np.testing.assert_allclose(states, want_states, rtol=0, atol=1e-5)
    np.testing.assert_allclose(value, want_value, rtol=1e-5)
    assert_gradients_close(got[0], want[0])
    assert_gradients_close(got[1], want[1])


def test_states_without_an_adapter_and_without_the_top_layer_cut():
    _, pack, weights, _ = world()
    model = Decoder(C)

    @jax.jit
    def both(w):
        every = model.apply({'params': w}, pack, read='all')
        return chosen(model.apply({'params': w}, pack), pack), chosen(at_read(every), pack)

    at_read = functools.partial(attention.at_read, pack=pack)
    cut, every = both(weights)
    want = jax.jit(expected)(weights)
    np.testing.assert_allclose(cut, want, rtol=0, atol=1e-5)
    np.testing.assert_allclose(every, want, rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="'first'"):
        model.apply({'params': weights}, pack, read='first')


@pytest.mark.parametrize('kind', [0, 1])
@pytest.mark.parametrize('name', ['gemma2', 'gemma3_text'])
def test_the_top_layer_cut_knows_windows_caps_and_ropes(name, kind):
    config = dataclasses.replace(CONFIGS[name], L=1, layer_kinds=(kind,))
    pack = world()[1]
    model = Decoder(config)
    shapes = jax.eval_shape(model.init, jax.random.key(0), pack)['params']

    @jax.jit
    def both(w):
        cut, every = (model.apply({'params': w}, pack, read=read) for read in ('last', 'all'))
        return chosen(cut, pack), chosen(attention.at_read(every, pack), pack)

    cut, every = both(weights := plain.random_tree(shapes))
    want = jax.jit(functools.partial(expected, config=config))(weights)
    np.testing.assert_allclose(cut, want, rtol=0, atol=1e-5)
    np.testing.assert_allclose(every, want, rtol=0, atol=1e-5)


def kernel(seen):
    """The reference attention as one that takes static windows; those it was given are added."""

    def attend(*rows, window, softcap):
        seen.add(window)
        return attention.xla(*rows, window=window, softcap=softcap)

    return attend


def test_kernels_get_static_windows():
    _, pack, weights, _ = world('gemma3_text')
    config = dataclasses.replace(CONFIGS['gemma3_text'], layer_kinds=(0, 1, 0))  # two in the scan
    model = Decoder(config, attention=kernel(seen := set()))
    states = jax.jit(lambda w: chosen(model.apply({'params': w}, pack), pack))(weights)
    want = jax.jit(functools.partial(expected, config=config))(weights)
    np.testing.assert_allclose(states, want, rtol=0, atol=1e-5)
    assert seen == {4, None}


@pytest.mark.slow
@pytest.mark.parametrize('name', ['qwen2', 'gemma2'])
def test_gradients_pass_the_choice_of_a_kernel(name):
    _, pack, weights, (adapter, _) = world(name)
    model = Decoder(CONFIGS[name], attention=kernel(set()), remat='full')

    def packed(w, a):
        return scalar(chosen(model.apply({'params': w, 'lora': a}, pack), pack))

    got = jax.jit(jax.grad(packed, (0, 1)))(weights, adapter)
    _, want = plain_gradients(0, name)
    assert_gradients_close(got[0], want[0])
    assert_gradients_close(got[1], want[1])


def sharded(mesh):
    """The reference attention as a kernel that cannot be partitioned would be called."""
    data = PartitionSpec('data')

    def attend(*rows, **options):
        local = functools.partial(attention.xla, **options)
        specs = {'in_specs': (data,) * 4, 'out_specs': data, 'check_vma': False}
        return jax.shard_map(local, mesh=mesh, **specs)(*rows)

    return attend


@pytest.mark.parametrize('remat', ['none', 'full'])
def test_experts_under_vmap_with_a_kernel_under_shard_map(remat):
    tokens, _, weights, adapters = world()
    mesh = jax.make_mesh((2,), ('data',), axis_types=(jax.sharding.AxisType.Auto,))
    pack = packing.fill(tokens, packing.plan(tokens, SHAPE, order=np.arange(5)), SHAPE, count=4)
    model = Decoder(C, remat=remat, attention=sharded(mesh))

    def experts(stack):
        states = lambda a: model.apply({'params': weights, 'lora': a}, pack)  # noqa: E731
        return jax.vmap(lambda a: scalar(chosen(states(a), pack)))(stack)

    def weighted(stack):
        numbers = experts(stack)
        return (numbers * jnp.array([1.0, 2.0])).sum(), numbers

    (_, numbers), got = jax.jit(jax.value_and_grad(weighted, has_aux=True))(members.stack(adapters))
    for e in range(2):
        (want, _), (_, gradient) = plain_gradients(e)
        np.testing.assert_allclose(numbers[e], want, rtol=1e-5)
        ours = jax.tree.map(lambda x: x[e] / (e + 1), got)
        assert_gradients_close(ours, gradient)
