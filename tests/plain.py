"""A llama in plain code, one unpadded row at a time: the oracle of the backbone tests."""

import jax
import jax.numpy as jnp
import numpy as np

from jaxrm import tree
from jaxrm.backbones.layers import Config
from jaxrm.tokens import Tokens

TINY = Config(V=37, D=16, F=24, L=3, Q=4, K=2, H=4, rope_theta=100.0)


def _norm(x, scale, eps):
    return x / jnp.sqrt((x * x).mean(-1, keepdims=True) + eps) * scale[None]


def _rope(x, theta):
    T, _, H = x.shape
    angle = np.arange(T)[:, None, None] * theta ** (-2 * np.arange(H // 2)[None, None] / H)
    z = (x[..., : H // 2] + 1j * x[..., H // 2 :]) * np.exp(1j * angle)  # rotate in the plane
    return jnp.concatenate([z.real, z.imag], -1)


def _layer(x, w, adapter, c: Config):
    def linear(name, h):
        y = h @ w[name]['kernel']
        if adapter and name in adapter:
            y = y + h @ adapter[name]['a'] @ adapter[name]['b']
        return y

    T = len(x)
    h = _norm(x, w['attn_norm']['scale'], c.norm_eps)
    q = _rope(linear('q', h).reshape(T, c.Q, c.H), c.rope_theta)
    k = _rope(linear('k', h).reshape(T, c.K, c.H), c.rope_theta)
    v = linear('v', h).reshape(T, c.K, c.H)
    k, v = (jnp.repeat(y, c.Q // c.K, axis=1) for y in (k, v))
    logits = jnp.einsum('tqh,sqh->qts', q, k) / np.sqrt(c.H)
    logits = jnp.where(np.tril(np.ones((1, T, T), bool)), logits, -jnp.inf)
    heads = jnp.einsum('qts,sqh->tqh', jax.nn.softmax(logits, -1), v)
    x = x + linear('o', heads.reshape(T, c.Q * c.H))
    h = _norm(x, w['mlp_norm']['scale'], c.norm_eps)
    return x + linear('down', jax.nn.silu(linear('gate', h)) * linear('up', h))


def states(backbone, ids, c: Config, lora=None):
    """[T, D] states after the final norm of one row of token ids."""
    x = backbone['embed']['embedding'][ids]
    for i in range(c.L - 1):
        layer = jax.tree.map(lambda w: w[i], backbone['layers'])
        adapter = jax.tree.map(lambda w: w[i], lora['layers']) if lora else None
        x = _layer(x, layer, adapter, c)
    x = _layer(x, backbone['top'], lora['top'] if lora else None, c)
    return _norm(x, backbone['norm']['scale'], c.norm_eps)


def rows(tokens: Tokens, i: int) -> list[np.ndarray]:
    """The full id rows of record i's candidates."""
    own = tokens.ids[tokens.start[i] : tokens.start[i + 1]]
    prompt, own = own[: tokens.prompt[i]], own[tokens.prompt[i] :]
    length = tokens.length[tokens.first[i] : tokens.first[i + 1]]
    return [np.concatenate([prompt, part]) for part in np.split(own, np.cumsum(length)[:-1])]


def random_tree(shapes, seed=0, size=1.0):
    """Random values for every leaf, far from any initialisation."""
    rng = np.random.default_rng(seed)

    def draw(name, x):
        value = size * rng.normal(size=x.shape) / np.sqrt(x.shape[-2] if x.ndim > 1 else 4)
        return jnp.asarray(value + ('scale' in name), jnp.float32)

    return tree.map_named(draw, shapes)


def random_tokens(candidates, *, seed=0, prompt=(1, 9), own=(1, 7), vocabulary=37) -> Tokens:
    """Records with these numbers of candidates (0: no answer), random ids, ranks and lengths."""
    rng = np.random.default_rng(seed)
    M = np.array(candidates)
    prompts = rng.integers(*prompt, len(M))
    length = [rng.integers(*own, max(m, 1)) * (m > 0) for m in M]
    total = prompts + [int(n.sum()) for n in length]
    c = int(np.maximum(M, 1).sum())
    rank = np.concatenate([rng.integers(0, max(m, 1), max(m, 1)) - (m == 0) for m in M])
    fields = {
        'ids': rng.integers(0, vocabulary, total.sum()).astype(np.int32),
        'start': np.append(0, np.cumsum(total)),
        'prompt': prompts.astype(np.int32),
        'gate': np.array(
            [rng.integers(0, p) if m else p - 1 for p, m in zip(prompts, M, strict=True)], np.int32
        ),
        'first': np.append(0, np.cumsum(np.maximum(M, 1))),
        'length': np.concatenate(length).astype(np.int32),
        'rank': rank.astype(np.int32),
        'margin': rng.normal(size=c).astype(np.float32),
        'rating': rng.normal(size=(c, 2)).astype(np.float32),
        'smoothing': rng.uniform(0, 0.3, len(M)).astype(np.float32),
        'group': np.full(len(M), -1, np.int32),
        'record': np.arange(len(M)),
    }
    if 'candidate' in Tokens._fields:
        fields['candidate'] = np.concatenate([np.arange(max(m, 1)) for m in M]).astype(np.int32)
    return Tokens(**fields)
