"""The decoder that every family shares: embedding, stacked layers, a top layer, a final norm.

Letters: P packs, N stream tokens, D width, F feed-forward, Q query heads, K key/value heads,
H head width, V vocabulary, L layers, R rows.
"""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from einops import rearrange

from jaxrm.backbones import attention as attn
from jaxrm.packing import Pack

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """Llama 3's frequency scaling (`rope_type: llama3`)."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position: int


@dataclasses.dataclass(frozen=True)
class Config:
    """Sizes and constants of a decoder."""

    V: int
    D: int
    F: int
    L: int
    Q: int
    K: int
    H: int
    norm_eps: float = 1e-5
    rope_theta: float = 10_000.0
    rope_scaling: RopeScaling | None = None
    tied: bool = False
    max_position: int = 2048


def frequencies(config: Config) -> Array:
    """[H/2] radians a position; scaled as in Llama 3.1's release where the config says so."""
    power = jnp.arange(0, config.H, 2, dtype=jnp.float32) / config.H
    freq = 1.0 / config.rope_theta**power
    s = config.rope_scaling
    if s is None:
        return freq
    turns = s.original_max_position * freq / (2 * jnp.pi)  # over the original context
    smooth = (turns - s.low_freq_factor) / (s.high_freq_factor - s.low_freq_factor)
    smooth = jnp.clip(smooth, 0.0, 1.0)
    return (1 - smooth) * freq / s.factor + smooth * freq


def rotary(pos_PN: Array, config: Config) -> tuple[Array, Array]:
    """cos and sin [P, N, 1, H/2], float32."""
    angle = pos_PN[..., None, None].astype(jnp.float32) * frequencies(config)[None, None, None]
    return jnp.cos(angle), jnp.sin(angle)


def rotate(x_PNQH: Array, cos: Array, sin: Array, scale: float = 1.0) -> Array:
    """Rotary embedding of halves (not interleaved), times `scale`, computed in float32."""
    a, b = jnp.split(x_PNQH.astype(jnp.float32) * scale, 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1).astype(x_PNQH.dtype)


class Linear(nn.Module):
    """x @ kernel, plus the adapter (x @ a) @ b when the `lora` collection holds one here."""

    features: int
    dtype: Any

    @nn.compact
    def __call__(self, x):
        shape = (x.shape[-1], self.features)
        kernel = self.param('kernel', nn.initializers.lecun_normal(), shape, jnp.float32)
        y = x @ kernel.astype(self.dtype)
        if self.has_variable('lora', 'a'):
            a: Array = self.get_variable('lora', 'a')
            b: Array = self.get_variable('lora', 'b')
            y += (x @ a.astype(self.dtype)) @ b.astype(self.dtype)
        return y


class RMSNorm(nn.Module):
    """Root mean square norm, in float32; the result has the dtype asked for."""

    eps: float
    dtype: Any

    @nn.compact
    def __call__(self, x):
        scale = self.param('scale', nn.initializers.ones, (x.shape[-1],), jnp.float32)
        x = x.astype(jnp.float32)
        x *= jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + self.eps)
        scale = scale.astype(jnp.float32).reshape((1,) * (x.ndim - 1) + (-1,))
        return (x * scale).astype(self.dtype)


class Block(nn.Module):
    """One decoder layer: attention and a gated MLP, each behind a norm, on the residual stream."""

    config: Config
    dtype: Any
    attention: attn.Attention
    dropout: float = 0.0

    def setup(self) -> None:
        c, linear = self.config, lambda n: Linear(n, self.dtype)
        self.attn_norm = RMSNorm(c.norm_eps, self.dtype)
        self.q, self.k, self.v = linear(c.Q * c.H), linear(c.K * c.H), linear(c.K * c.H)
        self.o = linear(c.D)
        self.mlp_norm = RMSNorm(c.norm_eps, self.dtype)
        self.gate, self.up, self.down = linear(c.F), linear(c.F), linear(c.D)
        self.drop = nn.Dropout(self.dropout, deterministic=not self.dropout)

    def __call__(self, x_PND, pack: Pack, rope):
        """The layer on every token of the stream; a pair, as a scan wants it."""
        h_PND = self.attn_norm(x_PND)
        q_PNQH = self._query(h_PND, rope)
        k_PNKH, v_PNKH = self._key_value(h_PND, rope)
        o_PNQH = attn.attend(q_PNQH, k_PNKH, v_PNKH, pack, self.attention)
        return self._residual(x_PND, o_PNQH), None

    def at_read(self, x_PND: Array, pack: Pack, rope: tuple[Array, Array]) -> Array:
        """The layer's result [P, R, 2, D] at the chosen tokens, R over all row classes."""
        h_PND = self.attn_norm(x_PND)
        k_PNKH, v_PNKH = self._key_value(h_PND, rope)
        x_PRTD, h_PRTD = (attn.at_read(y, pack) for y in (x_PND, h_PND))
        cos, sin = (attn.at_read(y, pack) for y in rope)
        q_PRTQH = self._query(h_PRTD, (cos, sin))
        o_PRTQH = attn.attend_at_read(q_PRTQH, k_PNKH, v_PNKH, pack)
        return self._residual(x_PRTD, o_PRTQH)

    def _heads(self, x, n):
        return rearrange(x, '... (n h) -> ... n h', n=n)

    def _query(self, h, rope):
        # Scaled here, on the stream: rows are longer, and not every kernel takes a scale.
        cos, sin = rope
        return rotate(self._heads(self.q(h), self.config.Q), cos, sin, self.config.H**-0.5)

    def _key_value(self, h, rope):
        k, v = (self._heads(y, self.config.K) for y in (self.k(h), self.v(h)))
        return rotate(k, *rope), v

    def _residual(self, x, o):
        x += self.drop(self.o(rearrange(o, '... q h -> ... (q h)')))
        h = self.mlp_norm(x)
        return x + self.drop(self.down(nn.silu(self.gate(h)) * self.up(h)))


class Embed(nn.Module):
    """Token embeddings; an id past the vocabulary gives NaN."""

    config: Config
    dtype: Any

    @nn.compact
    def __call__(self, ids_PN):
        shape = (self.config.V, self.config.D)
        init = nn.initializers.normal(self.config.D**-0.5)
        table = self.param('embedding', init, shape, jnp.float32)
        return jnp.take(table, ids_PN, axis=0).astype(self.dtype)


REMAT = {
    'full': jax.checkpoint_policies.nothing_saveable,
    'dots': jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}


class Decoder(nn.Module):
    """Pack -> float32 states after the final norm.

    `remat` is 'none', 'dots' (keep the linears' results) or 'full' (keep the residual stream).
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
        if self.remat != 'none':
            block = nn.remat(Block, prevent_cse=False, policy=REMAT[self.remat])
        of = (c, self.dtype, self.attention, dropout)
        x_PND = Embed(c, self.dtype, name='embed')(pack.ids_PN)
        rope = rotary(pack.pos_PN, c)
        if c.L > 1:
            layers = nn.scan(
                block,
                variable_axes={'params': 0, 'lora': 0},
                split_rngs={'params': True, 'dropout': True},
                in_axes=(nn.broadcast, nn.broadcast),
                length=c.L - 1,
            )
            x_PND, _ = layers(*of, name='layers')(x_PND, pack, rope)
        top, norm = block(*of, name='top'), RMSNorm(c.norm_eps, jnp.float32, name='norm')
        if read == 'all':
            return norm(top(x_PND, pack, rope)[0])
        return norm(top.at_read(x_PND, pack, rope))
