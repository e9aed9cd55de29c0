"""The decoder on packs against plain code: scan, adapters, vmap, remat, top-layer cut, shard_map."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import plain
import pytest
from jax.sharding import PartitionSpec

from jaxrm import lora, packing, tree
from jaxrm.backbones import attention
from jaxrm.backbones.layers import Decoder

C = plain.TINY
SHAPE = packing.Shape(tokens=40, rows=((4, 8), (3, 16)), prompts=4, candidates=4)


@functools.cache
def world():
    tokens = plain.random_tokens([2, 1, 4, 0, 3])
    packs = packing.plan(tokens, SHAPE, order=np.arange(5))
    pack = packing.fill(tokens, packs, SHAPE, count=len(packs) + 1)
    shapes = jax.eval_shape(Decoder(C).init, jax.random.key(0), pack)['params']
    weights = plain.random_tree(shapes)
    adapters = [
        plain.random_tree(lora.init(shapes, jax.random.key(0), rank=2), seed, 0.5)
        for seed in (1, 2)
    ]
    return tokens, pack, weights, adapters


def expected(tokens, weights, adapter=None):
    """{(record, candidate): (gate state, last state)} from plain code."""
    return {
        (i, m): plain.states(weights, row, C, adapter)[jnp.array([tokens.gate[i], len(row) - 1])]
        for i in range(len(tokens.prompt))
        for m, row in enumerate(plain.rows(tokens, i))
    }


def chosen(states_PRTD, pack):
    """{(record, candidate): states} from the packed result."""
    out = {}
    for p, b in zip(*np.nonzero(pack.record_PB >= 0), strict=True):
        i = int(pack.record_PB[p, b])
        M = max(1, int((pack.rank_PBM[p, b] >= 0).sum()))
        for m in range(M):
            out[i, m] = states_PRTD[p, pack.row_PBM[p, b, m]]
    return out


def assert_close(got, want, tolerance=1e-5):
    assert got.keys() == want.keys()
    for key in want:
        np.testing.assert_allclose(got[key], want[key], rtol=0, atol=tolerance, err_msg=str(key))


@pytest.mark.parametrize('remat', ['none', 'dots', 'full'])
@pytest.mark.parametrize('adapted', [False, True])
def test_states_equal_plain_code(remat, adapted):
    tokens, pack, weights, (adapter, _) = world()
    variables = {'params': weights} | ({'lora': adapter} if adapted else {})
    got = jax.jit(Decoder(C, remat=remat).apply)(variables, pack)
    want = jax.jit(lambda w, a: expected(tokens, w, a))(weights, adapter if adapted else None)
    assert_close(chosen(got, pack), want)


def test_all_states_agree_with_the_top_layer_cut():
    tokens, pack, weights, _ = world()
    model = Decoder(C)
    every = model.apply({'params': weights}, pack, read='all')
    cut = model.apply({'params': weights}, pack)
    at = attention.at_read(every, pack)
    assert_close(chosen(at, pack), chosen(cut, pack))
    with pytest.raises(ValueError, match="'first'"):
        model.apply({'params': weights}, pack, read='first')


def loss_of(states, pack, seed=0):
    """A scalar that depends on every chosen state of a present row, and on no other."""
    return scalar(chosen(states, pack), seed)


def scalar(states, seed=0):
    direction = np.random.default_rng(seed).normal(size=(2, C.D)) / 8
    return sum(jnp.tanh((states[k] * direction).sum()) * (1 + 0.3 * k[1]) for k in states)


@functools.cache
def plain_gradients(expert):
    tokens, _, weights, adapters = world()
    loss = lambda w, a: scalar(expected(tokens, w, a))  # noqa: E731
    return jax.jit(jax.value_and_grad(loss, (0, 1)))(weights, adapters[expert])


def assert_gradients_close(got, want, relative=1e-5):
    scale = max(float(jnp.abs(x).max()) for x in jax.tree.leaves(want))
    for name, x in tree.flatten(want).items():
        own = max(float(jnp.abs(x).max()), 1e-3 * scale)
        np.testing.assert_allclose(
            tree.flatten(got)[name] / own, x / own, rtol=0, atol=relative, err_msg=name
        )


@pytest.mark.parametrize('remat', ['none', 'dots', 'full'])
def test_gradients_equal_plain_code(remat):
    tokens, pack, weights, (adapter, _) = world()
    model = Decoder(C, remat=remat)

    def packed(w, a):
        return loss_of(model.apply({'params': w, 'lora': a}, pack), pack)

    got = jax.jit(jax.grad(packed, (0, 1)))(weights, adapter)
    _, want = plain_gradients(0)
    assert_gradients_close(got[0], want[0])
    assert_gradients_close(got[1], want[1])


def sharded(mesh):
    """The reference attention as a kernel that cannot be partitioned would be called."""
    data = PartitionSpec('data')
    return jax.shard_map(
        attention.xla, mesh=mesh, in_specs=(data, data, data, data), out_specs=data, check_vma=False
    )


@pytest.mark.parametrize('remat', ['none', 'full'])
def test_experts_under_vmap_with_a_kernel_under_shard_map(remat):
    tokens, pack, weights, adapters = world()
    mesh = jax.make_mesh((2,), ('data',), axis_types=(jax.sharding.AxisType.Auto,))
    extra = packing.fill(tokens, packing.plan(tokens, SHAPE, order=np.arange(5)), SHAPE, count=4)
    model = Decoder(C, remat=remat, attention=sharded(mesh))

    def experts(stack):
        one = lambda a: loss_of(model.apply({'params': weights, 'lora': a}, extra), extra)  # noqa: E731
        return jax.vmap(one)(stack)

    losses, pullback = jax.vjp(jax.jit(experts), lora.stack(adapters))
    (got,) = pullback(jnp.array([1.0, 2.0]))
    for e in range(2):
        want, (_, gradient) = plain_gradients(e)
        np.testing.assert_allclose(losses[e], want, rtol=1e-5)
        ours = jax.tree.map(lambda x: x[e] / (e + 1), got)  # noqa: B023
        assert_gradients_close(ours, gradient)
