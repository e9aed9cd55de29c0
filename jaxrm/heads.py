"""Heads: features [..., D] in, rewards out, in float32."""

import flax.linen as nn
import jax.numpy as jnp


def _kernel(module: nn.Module, shape: tuple[int, int]):
    """Drawn with std 1/sqrt(D + 1), as in Learning to summarize (arXiv 2009.01325)."""
    return module.param(
        'kernel', nn.initializers.normal((shape[0] + 1) ** -0.5), shape, jnp.float32
    )


class Scalar(nn.Module):
    """One linear reward, no bias: z [..., D] -> [...]."""

    @nn.compact
    def __call__(self, z):
        kernel = _kernel(self, (z.shape[-1], 1))
        return (z.astype(jnp.float32) @ kernel.astype(jnp.float32))[..., 0]


class LanguageModel(nn.Module):
    """Next-token logits: z [..., D] -> [..., V]. `tied` multiplies by an embedding table [V, D]."""

    vocabulary: int
    tied: bool = False

    @nn.compact
    def __call__(self, z, embedding=None):
        if self.tied:
            return z @ embedding.T.astype(z.dtype)
        return z @ _kernel(self, (z.shape[-1], self.vocabulary)).astype(z.dtype)
