"""The decoder that every family shares: embedding, stacked layers, a top layer, a final norm.

Letters: P packs, N stream tokens, D width, F feed-forward, Q query heads, K key/value heads,
H head width, V vocabulary, L layers, R rows.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jax.ad_checkpoint import checkpoint_name

from jaxrm import fused, sharding
from jaxrm.backbones import attention as attn
from jaxrm.packing import Pack

Array = jax.Array
ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    'silu': nn.silu,
    'gelu_tanh': functools.partial(nn.gelu, approximate=True),
}


@dataclasses.dataclass(frozen=True)
class Band:
    """Which frequencies Llama 3 slows: by their turns over the original context."""

    low: float  # fewer turns: slowed; between the two: in part
    high: float  # more turns: as they are
    original: int  # tokens


@dataclasses.dataclass(frozen=True)
class Rope:
    """Rotary frequencies theta**(-2i/H), over `factor`; with a `band`, only the slow ones."""

    theta: float = 10_000.0
    factor: float = 1.0
    band: Band | None = None


@dataclasses.dataclass(frozen=True)
class Kind:
    """What layers of one decoder may differ in: a token sees `window` tokens, itself the last."""

    window: int | None = None
    rope: Rope = Rope()


@dataclasses.dataclass(frozen=True)
class Config:
    """Sizes and constants of a decoder; `layer_kinds` are indices into `kinds`.

    Raises ValueError unless there is one for each layer, or none where one kind is all.
    """

    V: int
    D: int
    F: int
    L: int
    Q: int
    K: int
    H: int
    norm_eps: float = 1e-5
    tied: bool = False
    max_position: int = 2048
    kinds: tuple[Kind, ...] = (Kind(),)
    layer_kinds: tuple[int, ...] = ()
    biases: tuple[str, ...] = ()  # of q, k, v, o, gate, up, down: those with a bias
    qk_norm: bool = False  # a norm over H, of queries and of keys
    post_norms: bool = False  # a norm on each branch's result, too
    norm_offset: float = 0.0  # a norm multiplies by this + scale
    embed_scale: float = 1.0  # rounded to the compute dtype
    activation: str = 'silu'  # of ACTIVATIONS
    query_scalar: int | None = None  # queries are divided by its root; H by default
    softcap: float | None = None  # on attention's logits
    logit_softcap: float | None = None  # on a language model's

    def __post_init__(self) -> None:
        given, count = self.layer_kinds, len(self.kinds)
        if (given or count > 1) and len(given) != self.L:
            raise ValueError(f'layer_kinds: found {len(given)}, expected {self.L}, one a layer')
        if not set(given) <= set(range(count)):
            raise ValueError(f'layer_kinds: found {sorted(set(given))}, expected below {count}')

    @property
    def of_layer(self) -> tuple[int, ...]:
        """The kind of each layer."""
        return self.layer_kinds or (0,) * self.L

    @property
    def ropes(self) -> tuple[Rope, ...]:
        """The distinct ones."""
        return tuple(dict.fromkeys(kind.rope for kind in self.kinds))

    @property
    def query_scale(self) -> float:
        """What queries are multiplied by."""
        return (self.H if self.query_scalar is None else self.query_scalar) ** -0.5


def frequencies(rope: Rope, H: int) -> Array:
    """[H/2] radians a position; with a band, scaled as in Llama 3.1's release."""
    power = jnp.arange(0, H, 2, dtype=jnp.float32) / H
    freq = 1.0 / rope.theta**power
    band = rope.band
    if band is None:
        return freq / rope.factor
    turns = band.original * freq / (2 * jnp.pi)  # over the original context
    smooth = (turns - band.low) / (band.high - band.low)
    smooth = jnp.clip(smooth, 0.0, 1.0)
    return (1 - smooth) * freq / rope.factor + smooth * freq


def rotary(pos_PN: Array, rope: Rope, H: int) -> tuple[Array, Array]:
    """cos and sin [P, N, 1, H/2], float32."""
    angle = pos_PN[..., None, None].astype(jnp.float32) * frequencies(rope, H)[None, None, None]
    return jnp.cos(angle), jnp.sin(angle)


def rotate(x_PNQH: Array, cos: Array, sin: Array, scale: float = 1.0) -> Array:
    """Rotary embedding of halves (not interleaved), times `scale`, computed in float32."""
    a, b = jnp.split(x_PNQH.astype(jnp.float32) * scale, 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1).astype(x_PNQH.dtype)


def _last(x, ndim):
    """A vector as an array of `ndim` axes, along the last."""
    return x.reshape((1,) * (ndim - 1) + (-1,))


def _blended(module: nn.Module, name: str, x: Array, of: Callable[[Array], Array] = lambda y: y):
    """`of` the parameter x, or (1 - t) of it and t of another model's, in float32.

    The collection `blend` holds the other's and t as `share` at the module's path, or nothing. Both
    ends are exact: 1 x + 0 y = x.
    """
    if not module.has_variable('blend', name):
        return of(x)
    t: Any = module.get_variable('blend', 'share')
    other: Any = module.get_variable('blend', name)
    return (1 - t) * of(x).astype(jnp.float32) + t * of(other).astype(jnp.float32)


class Linear(nn.Module):
    """x @ kernel + bias, plus the adapter (x @ a) @ b when the `lora` collection holds one."""

    features: int
    dtype: Any
    bias: bool = False

    @nn.compact
    def __call__(self, x):
        shape = (x.shape[-1], self.features)
        kernel = self.param('kernel', nn.initializers.lecun_normal(), shape, jnp.float32)
        y = x @ _blended(self, 'kernel', kernel).astype(self.dtype)
        if self.bias:
            bias = self.param('bias', nn.initializers.zeros, (self.features,), jnp.float32)
            bias = _blended(self, 'bias', bias)
            y += _last(bias.astype(self.dtype), y.ndim)
        if self.has_variable('lora', 'a'):
            adapter: Any = {part: self.get_variable('lora', part) for part in 'ab'}
            (more,) = _adapted(x, [adapter], self.dtype)
            y += more
        return y


class Joined(nn.Module):
    """Several linears of the same x, whose kernels stand in one; see `fused`."""

    widths: tuple[int, ...]
    dtype: Any

    @nn.compact
    def __call__(self, x, adapters):
        kernel: Any = self.get_variable('params', 'kernel')
        kernel = _blended(self, 'kernel', kernel).astype(self.dtype)
        # As it is stored: reshaped, a scan would keep a copy of it for the backward pass.
        y = jax.lax.dot_general(x, kernel, (((x.ndim - 1,), (0,)), ((), ())))
        if self.has_variable('params', 'bias'):
            bias: Any = self.get_variable('params', 'bias')
            bias = _blended(self, 'bias', bias).astype(self.dtype)
            y += bias.reshape((1,) * (y.ndim - 2) + bias.shape)
        each = zip(fused.columns(y, self.widths), _adapted(x, adapters, self.dtype), strict=True)
        return [one if more is None else one + more for one, more in each]


def _adapted(x, adapters, dtype) -> list[Array | None]:
    """What each adapter adds to its linear of x, None without one; their `a` in one product."""
    found = [w for w in adapters if w is not None]
    if not found:
        return [None] * len(adapters)
    a = jnp.concatenate([w['a'].astype(dtype) for w in found], axis=-1)
    ends = np.cumsum([w['a'].shape[-1] for w in found])[:-1]
    low = iter(jnp.split(checkpoint_name(x @ a, 'low'), ends, axis=-1))
    return [None if w is None else next(low) @ w['b'].astype(dtype) for w in adapters]


class RMSNorm(nn.Module):
    """Root mean square norm, in float32; the result has the dtype asked for."""

    eps: float
    dtype: Any
    offset: float = 0.0

    @nn.compact
    def __call__(self, x):
        init = nn.initializers.constant(1.0 - self.offset)
        scale = self.param('scale', init, (x.shape[-1],), jnp.float32)
        scale = _blended(self, 'scale', scale)
        x = x.astype(jnp.float32)
        x *= jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + self.eps)
        scale = _last(scale.astype(jnp.float32) + self.offset, x.ndim)
        return (x * scale).astype(self.dtype)


Ropes = tuple[tuple[Array, Array], ...]  # `rotary` of each of Config.ropes


class Block(nn.Module):
    """One decoder layer: attention and a gated MLP, each behind a norm, on the residual stream.

    `kinds` are those it may be of; which one is an argument, where there are several.
    """

    config: Config
    kinds: tuple[Kind, ...]
    dtype: Any
    attention: attn.Attention
    dropout: float = 0.0

    def setup(self) -> None:
        c = self.config
        norm = lambda: RMSNorm(c.norm_eps, self.dtype, c.norm_offset)  # noqa: E731
        linear = lambda name, n: Linear(n, self.dtype, name in c.biases)  # noqa: E731
        self.attn_norm, self.mlp_norm = norm(), norm()
        if c.post_norms:
            self.attn_post_norm, self.mlp_post_norm = norm(), norm()
        if c.qk_norm:
            self.q_norm, self.k_norm = norm(), norm()
        self.q, self.o = linear('q', c.Q * c.H), linear('o', c.D)
        self.k, self.v = linear('k', c.K * c.H), linear('v', c.K * c.H)
        self.gate, self.up = linear('gate', c.F), linear('up', c.F)
        heads = c.Q * c.H, c.K * c.H, c.K * c.H
        self.qkv, self.kv = Joined(heads, self.dtype), Joined(heads[1:], self.dtype)
        self.gate_up = Joined((c.F, c.F), self.dtype)
        self.down = linear('down', c.D)
        self.drop = nn.Dropout(self.dropout, deterministic=not self.dropout)

    def __call__(self, x_PND, pack: Pack, ropes: Ropes, kind=None):
        """The layer on every token of the stream; a pair, as a scan wants it."""
        h_PND, rope = self.attn_norm(x_PND), self._rope(ropes, kind)
        q, k, v = self._linears(h_PND, 'q', 'k', 'v')
        q_PNQH, (k_PNKH, v_PNKH) = self._query(q, rope), self._key_value(k, v, rope)
        windows = [k.window for k in self.kinds]
        attention = attn.for_kind(self.attention, windows, kind, self.config.softcap)
        o_PNQH = attn.attend(q_PNQH, k_PNKH, v_PNKH, pack, attention)
        return self._residual(x_PND, o_PNQH), None

    def at_read(self, x_PND: Array, pack: Pack, ropes: Ropes) -> Array:
        """The layer's result [P, R, 2, D] at the chosen tokens, R over all row classes."""
        (kind,) = self.kinds
        h_PND, rope = self.attn_norm(x_PND), self._rope(ropes, 0)
        k, v = self._linears(h_PND, 'k', 'v')
        k_PNKH, v_PNKH = self._key_value(k, v, rope)
        x_PRTD, h_PRTD = (attn.at_read(y, pack) for y in (x_PND, h_PND))
        cos, sin = (attn.at_read(y, pack) for y in rope)
        (q,) = self._linears(h_PRTD, 'q')
        q_PRTQH = self._query(q, (cos, sin))
        o_PRTQH = attn.attend_at_read(
            q_PRTQH, k_PNKH, v_PNKH, pack, window=kind.window, softcap=self.config.softcap
        )
        return self._residual(x_PRTD, o_PRTQH)

    def _rope(self, ropes, kind):
        """cos and sin of this layer's kind."""
        at = [self.config.ropes.index(k.rope) for k in self.kinds]
        if len(set(at)) == 1:
            return ropes[at[0]]
        which = jnp.array(at, jnp.int32)[kind]
        return tuple(jax.lax.select_n(which, *tables) for tables in zip(*ropes, strict=True))

    def _linears(self, x, *names):
        """What each of them makes of x; in one product where one kernel holds them all."""
        joined = fused.NAMES.get(names)
        if joined and self.has_variable('params', joined):
            adapters: list[Any] = [self.get_variable('lora', name) for name in names]
            each = getattr(self, joined)(x, adapters)
            return [checkpoint_name(y, name) for y, name in zip(each, names, strict=True)]
        first, *rest = names
        y = checkpoint_name(getattr(self, first)(x), first)
        return [y, *(self._linears(x, *rest) if rest else ())]

    def _heads(self, x, n):
        return rearrange(x, '... (n h) -> ... n h', n=n)

    def _query(self, q, rope):
        # Scaled here, on the stream: rows are longer, and not every kernel takes a scale.
        cos, sin = rope
        q = self._heads(q, self.config.Q)
        q = self.q_norm(q) if self.config.qk_norm else q
        return rotate(q, cos, sin, self.config.query_scale)

    def _key_value(self, k, v, rope):
        k, v = (self._heads(y, self.config.K) for y in (k, v))
        k = self.k_norm(k) if self.config.qk_norm else k
        return rotate(k, *rope), v

    def _residual(self, x, o):
        post, act = self.config.post_norms, ACTIVATIONS[self.config.activation]
        (y,) = self._linears(rearrange(o, '... q h -> ... (q h)'), 'o')
        x += self.drop(self.attn_post_norm(y) if post else y)
        h = self.mlp_norm(x)
        gate, up = self._linears(h, 'gate', 'up')
        (y,) = self._linears(act(gate) * up, 'down')
        return x + self.drop(self.mlp_post_norm(y) if post else y)


class Embed(nn.Module):
    """Token embeddings; an id past the vocabulary gives NaN."""

    config: Config
    dtype: Any

    @nn.compact
    def __call__(self, ids_PN):
        shape = (self.config.V, self.config.D)
        init = nn.initializers.normal(self.config.D**-0.5)
        table = self.param('embedding', init, shape, jnp.float32)
        rows = lambda table: jnp.take(table, ids_PN, axis=0)  # noqa: E731
        x_PND = _blended(self, 'embedding', table, rows).astype(self.dtype)
        x_PND = sharding.looked_up(x_PND)
        scale = self.config.embed_scale
        return x_PND if scale == 1 else x_PND * jnp.asarray(scale, self.dtype)


# What is kept of a layer beside what goes in, by name: results of linears, `low` those of `a`.
KEPT = {
    'full': (),
    'mlp': ('gate', 'up', 'down', 'low'),
    'dots': ('q', 'k', 'v', 'o', 'gate', 'up', 'down', 'low'),
}
REMAT = {how: jax.checkpoint_policies.save_only_these_names(*names) for how, names in KEPT.items()}


class Decoder(nn.Module):
    """Pack -> float32 states after the final norm.

    `remat` is 'none', 'dots' (keep the linears' results), 'mlp' (of them those of gate and up, and
    of down where a norm follows) or 'full' (keep the residual stream alone).
    """

    config: Config
    dtype: Any = jnp.float32
    attention: attn.Attention = attn.xla
    remat: str = 'none'

    @nn.compact
    def __call__(self, pack: Pack, *, read: str = 'last', dropout: float = 0.0):
        """States [P, R, 2, D] at `pack.read`, R over all row classes; all [P, N, D] if read='all'.

        Without 'all', the top layer is computed at the chosen tokens only. A positive `dropout`
        (on both outputs of each layer) needs rngs={'dropout': key}.
        """
        if read not in ('last', 'all'):
            raise ValueError(f"read: {read!r}, expected 'last' or 'all'")
        c, block = self.config, Block
        if self.remat not in ('none', *REMAT):
            raise ValueError(f'remat: found {self.remat!r}, expected none or one of {list(REMAT)}')
        if self.remat != 'none':
            block = nn.remat(Block, prevent_cse=False, policy=REMAT[self.remat])
        of = self.dtype, self.attention, dropout
        x_PND = Embed(c, self.dtype, name='embed')(pack.ids_PN)
        ropes = tuple(rotary(pack.pos_PN, rope, c.H) for rope in c.ropes)
        *lower, last = c.of_layer
        if lower:
            layers = nn.scan(
                block,
                variable_axes={'params': 0, 'lora': 0, 'blend': 0},
                split_rngs={'params': True, 'dropout': True},
                in_axes=(nn.broadcast, nn.broadcast, 0),
                length=c.L - 1,
            )
            used = sorted(set(lower))
            kinds = tuple(c.kinds[i] for i in used)
            index = jnp.array([used.index(i) for i in lower], jnp.int32)
            x_PND, _ = layers(c, kinds, *of, name='layers')(x_PND, pack, ropes, index)
        top = block(c, (c.kinds[last],), *of, name='top')
        norm = RMSNorm(c.norm_eps, jnp.float32, c.norm_offset, name='norm')
        if read == 'all':
            return norm(top(x_PND, pack, ropes)[0])
        return norm(top.at_read(x_PND, pack, ropes))
