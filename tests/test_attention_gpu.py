"""cuDNN's attention against XLA's in bfloat16, on an NVIDIA GPU.

Run:     JAXRM_TEST_PLATFORM=cuda python -m pytest -m gpu
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import plain
import pytest

from jaxrm import heads, packing, reward, sharding, train, tree
from jaxrm.backbones import attention
from jaxrm.backbones.layers import Config, Decoder

pytestmark = pytest.mark.gpu
C = Config(V=256, D=256, F=512, L=3, Q=4, K=2, H=64)
SHAPE = packing.Shape(tokens=512, rows=((8, 64), (8, 128)), prompts=8, candidates=3)


@pytest.fixture(autouse=True)
def gpu():
    if jax.default_backend() != 'gpu':
        pytest.skip('no NVIDIA GPU')


def rows(P, R, S, Q, K, H, seed=0):
    """Queries, keys, values, cotangents in bfloat16, and row lengths from 1 to S."""
    rng = np.random.default_rng(seed)
    draw = lambda heads: jnp.asarray(rng.normal(size=(P, R, S, heads, H)), jnp.bfloat16)  # noqa: E731
    length = rng.integers(1, S + 1, (P, R)).astype(np.int32)
    length[0, :2] = 1, S
    return draw(Q) * jnp.bfloat16(H**-0.5), draw(K), draw(K), draw(Q), jnp.asarray(length)


def real(x, length):
    """The values at real tokens in float32, zero elsewhere."""
    inside = np.arange(x.shape[2]) < np.asarray(length)[..., None]
    return np.where(inside[..., None, None], np.asarray(x, np.float32), 0)


@functools.partial(jax.jit, static_argnums=0)
def outputs_and_gradients(attend, q, k, v, weight, length):
    """o and the gradients of a weighted sum of it over real tokens."""
    inside = jnp.arange(q.shape[2])[None, None] < length[..., None]

    def loss(q, k, v):
        o = attend(q, k, v, length)
        kept = jnp.where(inside[..., None, None], o * weight, 0)
        return kept.astype(jnp.float32).sum(), o

    (_, o), gradients = jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True)(q, k, v)
    return o, *gradients


def assert_close(got, want, tolerance):
    """By the largest value there is: bfloat16 has eight bits."""
    np.testing.assert_allclose(got / np.abs(want).max(), want / np.abs(want).max(), atol=tolerance)


@pytest.mark.parametrize(
    'sizes',
    [(2, 3, 64, 4, 4, 64), (1, 4, 128, 8, 2, 128), (2, 2, 16, 4, 1, 32), (1, 2, 40, 2, 2, 16)],
)
def test_outputs_and_gradients(sizes):
    *given, length = rows(*sizes)
    got = outputs_and_gradients(attention.cudnn, *given, length)
    want = outputs_and_gradients(attention.xla, *given, length)
    exact = outputs_and_gradients(attention.xla, *(x.astype(jnp.float32) for x in given), length)
    for mine, theirs, truth in zip(got, want, exact, strict=True):
        assert mine.dtype == jnp.bfloat16
        mine, theirs, truth = (real(x, length) for x in (mine, theirs, truth))
        assert_close(mine, truth, 0.02)
        assert_close(mine, theirs, 0.03)


def test_padding_is_not_seen():
    """What stands behind a row's end changes no bit of what is before it."""
    *given, length = rows(2, 4, 64, 4, 2, 64)
    beyond = (jnp.arange(64)[None, None] >= length[..., None])[..., None, None]
    spoiled = [jnp.where(beyond, jnp.bfloat16(100), x) for x in given[:3]]
    clean, dirty = (
        outputs_and_gradients(attention.cudnn, *x, given[3], length) for x in (given[:3], spoiled)
    )
    for a, b in zip(clean, dirty, strict=True):
        np.testing.assert_array_equal(real(a, length), real(b, length))


def test_default_is_cudnn_in_16_bits():
    assert attention.default('bfloat16') is attention.cudnn
    assert attention.default('float16') is attention.cudnn
    assert attention.default('float32') is attention.xla


def model(attend):
    return reward.RewardModel(Decoder(C, jnp.bfloat16, attend), heads.Scalar())


def stepped(attend, mesh, trainable, pack):
    """Parameters and metrics after one step."""
    tx = optax.sgd(1.0)
    step = jax.jit(
        functools.partial(train.step, objective=train.preference(model(attend).score), tx=tx)
    )
    state = train.start(trainable, tx, mesh)
    state, metrics = step(state, {}, pack, jax.random.key(0))
    return state.trainable, metrics


def test_a_training_step():
    """Loss, and the step's gradient in every leaf, near XLA's; both as near to float32."""
    mesh = sharding.make_mesh()
    tokens = plain.random_tokens([2, 3, 2, 2, 3] * 2, prompt=(8, 70), own=(4, 50), vocabulary=C.V)
    packs = packing.plan(tokens, SHAPE, order=np.arange(len(tokens.prompt)))
    count = -(-len(packs) // mesh.size) * mesh.size
    pack = sharding.place_batch(packing.fill(tokens, packs, SHAPE, count=count), mesh)
    rm = model(attention.xla)
    trainable = {
        'backbone': rm.init_backbone(jax.random.key(1)),
        'head': rm.init_head(jax.random.key(2), C.D),
    }
    (got, its), (want, theirs) = (
        stepped(a, mesh, trainable, pack) for a in (attention.cudnn, attention.xla)
    )
    assert float(its['loss']) == pytest.approx(float(theirs['loss']), rel=0.02)
    start, got, want = (tree.flatten(x) for x in (trainable, got, want))
    for name in start:
        mine, other = (np.asarray(x[name] - start[name], np.float32) for x in (got, want))
        away = np.linalg.norm(mine - other) / np.linalg.norm(other)
        assert away < 0.05, (name, away)
