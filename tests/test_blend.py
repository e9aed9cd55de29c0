"""Two backbones mixed inside the scorer: exact ends, one program, no third model."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import plain
import pytest
from test_reward import RM, SHAPE, C, data, packed, parameters, shapes

from jaxrm import reward, tree
from jaxrm.backbones.layers import Linear

SHARES = (0.0, 0.3, 0.7, 1.0)


@functools.cache
def batch():
    return packed(data([2, 3, 1, 4], 5))


@functools.cache
def other():
    return plain.random_tree(shapes(), 7)


@functools.cache
def score():
    return jax.jit(RM.score)


def scored(backbone, **parts):
    there = batch().rank_PBM.reshape(-1, SHAPE.candidates) >= 0
    found = score()({**parameters(), 'backbone': backbone, **parts}, batch())
    return np.asarray(found)[there]


def blended(share):
    ours = parameters()['backbone']
    return scored(ours, blend=reward.blend(ours, other(), share))


def mixed(share_L):
    """The third model, in float64: what must not be needed."""

    def leaf(name, a, b):
        t = {'layers': share_L[:-1], 'top': share_L[-1:]}.get(name.split('/')[0], share_L[:1])
        a, b = (np.asarray(x, np.float64) for x in (a, b))
        t = t.reshape(-1, *(1,) * (a.ndim - 1)) if name.startswith('layers') else t[0]
        return ((1 - t) * a + t * b).astype(np.float32)

    ours, theirs = (tree.flatten(x) for x in (parameters()['backbone'], other()))
    return tree.unflatten({name: leaf(name, x, theirs[name]) for name, x in ours.items()})


def test_ends_are_exact_and_a_sweep_is_one_program():
    before = score()._cache_size()
    found = [blended(share) for share in SHARES]
    assert score()._cache_size() == before + 1
    np.testing.assert_array_equal(found[0], scored(parameters()['backbone']))
    np.testing.assert_array_equal(found[-1], scored(other()))
    for share, scores in zip(SHARES, found, strict=True):
        expected = scored(mixed(np.full(C.L, share)))
        np.testing.assert_allclose(scores, expected, rtol=0, atol=1e-5)
    assert np.abs(found[1] - found[0]).max() > 1e-2


def test_a_share_a_layer():
    share_L = np.linspace(0.9, 0.1, C.L)
    expected = scored(mixed(share_L))
    np.testing.assert_allclose(blended(share_L), expected, rtol=0, atol=1e-5)
    assert np.abs(expected - blended(share_L[::-1])).max() > 1e-2


@pytest.mark.parametrize('dtype', [np.float32, jnp.bfloat16])
def test_biases_and_small_floats(dtype):
    """Every linear's bias is mixed, and kernels of 16 bits in float32, rounded once."""
    linear = Linear(5, np.float32, bias=True)
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, 3)).astype(np.float32)
    a, b = (
        {'kernel': rng.normal(size=(3, 5)).astype(dtype), 'bias': rng.normal(size=5).astype(dtype)}
        for _ in range(2)
    )
    y = linear.apply({'params': a, 'blend': {**b, 'share': np.float32(0.3)}}, x)
    w, c = (
        0.7 * a[n].astype(np.float64) + 0.3 * b[n].astype(np.float64) for n in ('kernel', 'bias')
    )
    np.testing.assert_allclose(y, x @ w + c, rtol=0, atol=1e-5)


def test_no_third_model_is_made():
    """No operation outside the loop over layers gives an array of a stacked kernel's shape."""
    params = {**parameters(), 'blend': reward.blend(parameters()['backbone'], other(), 0.5)}
    stacked = {x.shape for x in jax.tree.leaves(shapes()['layers']) if x.ndim == 3}
    assert (C.L - 1, C.D, C.F) in stacked
    made = jax.make_jaxpr(RM.score)(params, batch()).jaxpr
    found = {var.aval.shape for eqn in made.eqns for var in eqn.outvars}
    assert not found & stacked


def test_bad_parts_are_refused():
    ours = parameters()['backbone']
    lacking = {**other(), 'top': {k: v for k, v in other()['top'].items() if k != 'q'}}
    with pytest.raises(ValueError, match=r'blend: top/q/kernel is \(\d+, \d+\) here and None'):
        reward.blend(ours, lacking, 0.5)
    with pytest.raises(ValueError, match=r'share: found the shape \(2, 2\), expected \(\) or'):
        reward.blend(ours, other(), np.zeros((2, 2)))
