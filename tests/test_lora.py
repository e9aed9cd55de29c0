"""Adapters as trees: which leaves, how drawn, scaled, folded and stacked."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrm import lora, tree

D, F, LINEAR = 6, 10, ('q', 'k', 'v', 'o', 'gate', 'up', 'down')


def backbone(dtype=np.float32):
    rng = np.random.default_rng(0)
    width = dict.fromkeys(LINEAR, (D, D)) | {'gate': (D, F), 'up': (D, F), 'down': (F, D)}

    def layer(*lead):
        kernels = {n: {'kernel': rng.normal(size=(*lead, *s))} for n, s in width.items()}
        return kernels | {'attn_norm': {'scale': np.ones((*lead, D))}}

    out = {'embed': {'embedding': rng.normal(size=(9, D))}, 'layers': layer(3), 'top': layer()}
    return jax.tree.map(lambda x: jnp.asarray(x, dtype), out)


def names(adapter):
    return {n.rsplit('/', 1)[0] for n in tree.flatten(adapter)}


@pytest.mark.parametrize(
    ('targets', 'layers', 'linears'),
    [
        (lora.ALL_LINEAR, ('layers', 'top'), LINEAR),
        (lora.QV, ('layers', 'top'), ('q', 'v')),
        ('^top/', ('top',), LINEAR),
        ('/down/', ('layers', 'top'), ('down',)),
    ],
)
def test_targets(targets, layers, linears):
    adapter = lora.init(backbone(), jax.random.key(0), rank=2, targets=targets)
    assert names(adapter) == {f'{layer}/{n}' for layer in layers for n in linears}


def test_shapes_and_values():
    weights = backbone()
    adapter = tree.flatten(lora.init(weights, jax.random.key(0), rank=4))
    for name, kernel in tree.flatten(weights).items():
        if not name.endswith('kernel'):
            continue
        *lead, fan_in, fan_out = kernel.shape
        a, b = (adapter[name.removesuffix('kernel') + x] for x in 'ab')
        assert a.shape == (*lead, fan_in, 4)
        assert b.shape == (*lead, 4, fan_out)
        assert a.dtype == b.dtype == jnp.float32
        assert not np.asarray(b).any()
        # PEFT: Kaiming with a = sqrt(5) is uniform below sqrt(6 / (1 + 5) / fan in)
        assert 0.7 * fan_in**-0.5 < np.abs(a).max() <= fan_in**-0.5
    values = np.concatenate([x.ravel() for n, x in adapter.items() if n.endswith('/a')])
    assert len(np.unique(values)) > 0.99 * len(values)  # no two linears share a draw


def test_shapes_are_enough_and_the_key_decides():
    shapes = jax.eval_shape(backbone)
    a = lora.init(shapes, jax.random.key(0), rank=2)
    jax.tree.map(np.testing.assert_array_equal, a, lora.init(backbone(), jax.random.key(0), rank=2))
    b = lora.init(shapes, jax.random.key(1), rank=2)
    assert (a['top']['q']['a'] != b['top']['q']['a']).all()


def test_what_cannot_be_adapted_raises():
    with pytest.raises(ValueError, match=r"targets: '/rotor/'.*layers/q/kernel"):
        lora.init(backbone(), jax.random.key(0), rank=2, targets='/rotor/')
    with pytest.raises(ValueError, match='rank: 0'):
        lora.init(backbone(), jax.random.key(0), rank=0)
    stray = {'layers': {'rotor': {'a': jnp.ones((D, 2)), 'b': jnp.ones((2, D))}}}
    with pytest.raises(ValueError, match='layers/rotor/'):
        lora.fold(backbone(), stray, 1.0)


def random_adapter(seed=1):
    rng = np.random.default_rng(seed)
    fresh = lora.init(backbone(), jax.random.key(seed), rank=2)
    return jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), jnp.float32), fresh)


@pytest.mark.parametrize('dtype', [np.float32, jnp.bfloat16])
def test_fold_adds_the_product_and_touches_nothing_else(dtype):
    weights, adapter = backbone(dtype), random_adapter()
    folded, flat = tree.flatten(lora.fold(weights, adapter, 0.25)), tree.flatten(adapter)
    for name, x in tree.flatten(weights).items():
        assert folded[name].dtype == dtype
        if not name.endswith('kernel'):
            np.testing.assert_array_equal(folded[name], x)
            continue
        a, b = (np.float64(flat[name.removesuffix('kernel') + y]) for y in 'ab')
        want = np.float64(x) + 0.25 * np.einsum('...ir,...ro->...io', a, b)
        got = np.float64(folded[name])
        exact = 1e-5 if dtype == np.float32 else 2**-8
        np.testing.assert_allclose(got, want, rtol=exact, atol=1e-5)


def test_scaled():
    one = random_adapter(1)
    for name, x in tree.flatten(lora.scaled(one, 3.0)).items():
        before = tree.flatten(one)[name]
        np.testing.assert_array_equal(x, before * 3 if name.endswith('/b') else before)
