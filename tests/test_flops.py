"""The FLOP counter by hand."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

from jaxrm import flops
from jaxrm.backbones import attention


def struct(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def test_dots_equal_the_compilers_count():
    def fn(x, w, u):
        y = jnp.einsum('bij,bjk->bik', x, w)
        return jnp.einsum('bik,bil->kl', y, u), y[0].T @ jnp.ones((4, 3))

    args = struct(3, 4, 5), struct(3, 5, 6), struct(3, 4, 7)
    assert flops.count(fn, *args) == 2 * (3 * 4 * 5 * 6 + 3 * 4 * 6 * 7) + 2 * 6 * 4 * 3
    zeros = [jnp.zeros(a.shape) for a in args[:2]]
    once = lambda x, w: jnp.einsum('bij,bjk->bik', x, w)  # noqa: E731
    compiled = jax.jit(once).lower(*zeros).compile().cost_analysis()['flops']
    assert flops.count(once, *args[:2]) == compiled


def test_loops_branches_and_rematerialisation():
    x, w, one = struct(8, 16), struct(5, 16, 16), 2 * 8 * 16 * 16
    layer = lambda c, w: (jnp.tanh(c @ w), None)  # noqa: E731

    def stack(x, w, body=layer):
        return jax.lax.scan(body, x, w)[0].sum()

    kept = functools.partial(stack, body=jax.checkpoint(layer))
    assert flops.count(stack, x, w) == 5 * one
    assert flops.count(jax.jit(stack), x, w) == 5 * one
    assert flops.count(jax.grad(stack, (0, 1)), x, w) == 15 * one
    assert flops.count(jax.grad(kept, (0, 1)), x, w) == 20 * one
    assert flops.count(jax.vmap(stack, (0, None)), struct(3, 8, 16), w) == 15 * one
    either = lambda p, x, w: jax.lax.cond(p, stack, lambda x, w: (x @ w[0]).sum(), x, w)  # noqa: E731
    assert flops.count(either, jnp.array(True), x, w) == 5 * one


def test_shards_are_counted_together():
    mesh = jax.make_mesh((4, 2), ('a', 'b'), axis_types=(AxisType.Auto,) * 2)
    spec = PartitionSpec('a')
    dot = jax.shard_map(
        lambda x, w: x @ w, mesh=mesh, in_specs=(spec, PartitionSpec()), out_specs=spec,
        axis_names={'a'},
    )  # fmt: skip
    assert flops.count(jax.jit(dot), struct(8, 16), struct(16, 4)) == 2 * 8 * 16 * 4


def test_what_cannot_be_counted_raises():
    dots = lambda x: jax.lax.while_loop(lambda x: x[0, 0] < 9, lambda x: x @ x, x)  # noqa: E731
    with pytest.raises(ValueError, match='while'):
        flops.count(dots, struct(4, 4))
    free = lambda x: jax.lax.while_loop(lambda x: x[0] < 9, lambda x: x + 1, x)  # noqa: E731
    assert flops.count(free, struct(4)) == 0
    conv = functools.partial(jax.lax.conv, window_strides=(1,), padding='SAME')
    with pytest.raises(ValueError, match='conv'):
        flops.count(conv, struct(1, 1, 8), struct(1, 1, 3))


def test_row_attention_counts_pairs_and_computes_attention():
    rng = np.random.default_rng(0)
    draw = lambda *s: jnp.asarray(rng.normal(size=s), jnp.float32)  # noqa: E731
    q, k, v, n = draw(2, 3, 5, 4, 8), draw(2, 3, 5, 2, 8), draw(2, 3, 5, 2, 8), jnp.full((2, 3), 5)
    pairs = 2 * 3 * 4 * sum(t + 1 for t in range(5))
    loss = lambda fn: lambda q, k, v: (fn(q, k, v, n) ** 2).sum()  # noqa: E731
    assert flops.count(flops.row_attention, q, k, v, n) == 2 * 2 * 8 * pairs
    step = jax.grad(loss(flops.row_attention), (0, 1, 2))
    assert flops.count(step, q, k, v) == (2 + 5) * 2 * 8 * pairs
    want = jax.grad(loss(attention.xla), (0, 1, 2))(q, k, v)
    for a, b in zip(step(q, k, v), want, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


def test_windows_are_counted_and_of_kinds_of_layers_the_widest():
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.normal(size=(1, 2, 9, n, 4)), jnp.float32) for n in (4, 2, 2))
    n, options = jnp.full((1, 2), 9), {'window': 3, 'softcap': 1.5}
    pairs = 2 * 4 * sum(min(t + 1, 3) for t in range(9))
    short = functools.partial(flops.row_attention, **options)
    loss = lambda fn: lambda q, k, v: (fn(q, k, v, n) ** 2).sum()  # noqa: E731
    assert flops.count(short, q, k, v, n) == 2 * 2 * 4 * pairs
    step = jax.grad(loss(short), (0, 1, 2))
    assert flops.count(step, q, k, v) == (2 + 5) * 2 * 4 * pairs
    want = jax.grad(loss(functools.partial(attention.xla, **options)), (0, 1, 2))(q, k, v)
    for a, b in zip(step(q, k, v), want, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)
    either = lambda i, *x: attention.for_kind(flops.row_attention, (3, 5), i, None)(*x)  # noqa: E731
    widest = functools.partial(flops.row_attention, window=5)
    assert flops.count(either, jnp.int32(0), q, k, v, n) == flops.count(widest, q, k, v, n)
    assert flops.count(widest, q, k, v, n) > flops.count(short, q, k, v, n)
