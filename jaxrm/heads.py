"""Heads: features [..., D] in, rewards out, in float32."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp


def _kernel(module: nn.Module, shape: tuple[int, int]):
    """Drawn with std 1/sqrt(D + 1), as in Learning to summarize (arXiv 2009.01325)."""
    return module.param(
        'kernel', nn.initializers.normal((shape[0] + 1) ** -0.5), shape, jnp.float32
    )


def _linear(module: nn.Module, z, features: int, bias: bool):
    """z [..., D] @ kernel [D, features], plus a bias if there is one; the module's parameters."""
    y = _product(z, _kernel(module, (z.shape[-1], features)))
    if not bias:
        return y
    return _plus(y, module.param('bias', nn.initializers.zeros, (features,), jnp.float32))


def _product(x, y):
    """In float32 whatever the accelerator: by default it may round both to fewer bits."""
    return jnp.matmul(x.astype(jnp.float32), y.astype(jnp.float32), precision='highest')


def _plus(y, bias):
    return y + bias.astype(jnp.float32).reshape((1,) * (y.ndim - 1) + (-1,))


class Scalar(nn.Module):
    """One linear reward: z [..., D] -> [...]. Some public checkpoints have a bias."""

    bias: bool = False

    @nn.compact
    def __call__(self, z):
        return _linear(self, z, 1, self.bias)[..., 0]


class MultiObjective(nn.Module):
    """J linear ratings, no bias: z [..., D] -> [..., J]."""

    objectives: int

    @nn.compact
    def __call__(self, z):
        return _linear(self, z, self.objectives, False)


class _Layer(nn.Module):
    features: int

    @nn.compact
    def __call__(self, z):
        return _linear(self, z, self.features, True)


class Perceptron(nn.Module):
    """One reward of a layer of rectified units, both maps with a bias: z [..., D] -> [...]."""

    hidden: int

    @nn.compact
    def __call__(self, z):
        h = nn.relu(_Layer(self.hidden, name='hidden')(z))
        return _Layer(1, name='out')(h)[..., 0]


class _Uniform(nn.Module):
    """A linear map with a bias, both drawn as torch does: uniform within 1/sqrt(D)."""

    features: int

    @nn.compact
    def __call__(self, z):
        end = z.shape[-1] ** -0.5
        draw = lambda key, shape: jax.random.uniform(key, shape, minval=-end, maxval=end)  # noqa: E731
        kernel = self.param('kernel', draw, (z.shape[-1], self.features))
        return _plus(_product(z, kernel), self.param('bias', draw, (self.features,)))


class Router(nn.Module):
    """Logits of C categories by a prompt's feature, no bias: z [..., D] -> [..., C]."""

    categories: int

    @nn.compact
    def __call__(self, z):
        return _linear(self, z, self.categories, False)


class Mixture(nn.Module):
    """One reward of the features of E experts end to end: z [..., E x D] -> [...].

    A linear map to `hidden` units, PReLU with one learned slope, a linear map, drawn as torch does
    (DMoERM, arXiv 2403.01197, as in its released code, where `hidden` is D).
    """

    hidden: int

    @nn.compact
    def __call__(self, z):
        h = _Uniform(self.hidden, name='hidden')(z)
        slope = self.param('slope', nn.initializers.constant(0.25), (1,), jnp.float32)
        h = jnp.where(h > 0, h, slope[0].astype(jnp.float32) * h)
        return _Uniform(1, name='out')(h)[..., 0]


class Gate(nn.Module):
    """Weights of J objectives by a prompt's feature: z [..., D] -> [..., J].

    softmax(MLP(z) / temperature) * scale, with `layers` hidden layers of rectified units and one
    learned scale, which the weights sum to (arXiv 2406.12845, as in its released model). `dropout`,
    after each hidden layer, needs rngs={'dropout': key}.

    `script_softmax` is for comparison with RLHFlow's public training script only, whose softmax is
    over the two rows of a pair, [..., 2, D] -> [..., 2, J]. Both are of one prompt: but for dropout
    each weight is scale / 2 whatever the prompt and the temperature, and only the scale learns.
    """

    objectives: int
    hidden: int = 1024
    layers: int = 3
    temperature: float = 10.0
    script_softmax: bool = False

    @nn.compact
    def __call__(self, z, *, dropout=0.0):
        if self.script_softmax and z.shape[-2:-1] != (2,):
            raise ValueError(f'script_softmax: found features {z.shape}, expected rows of pairs')
        for i in range(self.layers):
            z = nn.relu(_Uniform(self.hidden, name=f'layer_{i}')(z))
            if dropout:
                z = nn.Dropout(dropout, deterministic=False)(z)
        logits = _Uniform(self.objectives, name=f'layer_{self.layers}')(z)
        scale = self.param('scale', nn.initializers.ones, (1,), jnp.float32)
        axis = -2 if self.script_softmax else -1
        return nn.softmax(logits / self.temperature, axis=axis) * scale[0].astype(jnp.float32)


class Parts(NamedTuple):
    """What a gated score is made of: score = sum_j rate_j coefficient_j.

    coefficient = transform @ weight, so that only what the transform mixes has another coefficient
    than its weight. Weights and coefficients have M = 1 when the gate gives one set a prompt.
    """

    rate_MJ: Any  # as regressed, before the transform
    weight_MJ: Any
    coefficient_MJ: Any
    score_M: Any


class Gated(nn.Module):
    """J linear ratings, weighed by the prompt: answer [..., M, D], prompt [..., D] -> [..., M].

    score = sum_j weight_j (rate @ transform)_j (arXiv 2406.12845); ratings are rows, a transform
    that debiases has its penalties in one row (see `regress.transform`). With a gate's
    `script_softmax` M is 2, and the transform takes no part, as in the script.
    """

    gate: Gate

    def setup(self) -> None:
        J = self.gate.objectives
        self.regression = MultiObjective(J)
        self.transform = self.param('transform', lambda _: jnp.eye(J))

    def __call__(self, answer, prompt, *, dropout=0.0):
        return self.parts(answer, prompt, dropout=dropout).score_M

    def parts(self, answer, prompt, *, dropout=0.0) -> Parts:
        """The same, taken apart; see `Parts`."""
        asked, script = prompt[..., None, :], self.gate.script_softmax
        if script:
            asked = jnp.repeat(asked, answer.shape[-2], axis=-2)
        weight_MJ = self.gate(asked, dropout=dropout)
        coefficient_MJ = weight_MJ if script else _product(weight_MJ, self.transform.T)
        rate_MJ = self.regression(answer)
        return Parts(rate_MJ, weight_MJ, coefficient_MJ, (rate_MJ * coefficient_MJ).sum(-1))


class LanguageModel(nn.Module):
    """Next-token logits: z [..., D] -> [..., V]. `tied` multiplies by an embedding table [V, D].

    With a `softcap`, a logit becomes softcap * tanh(logit / softcap).
    """

    vocabulary: int
    tied: bool = False
    softcap: float | None = None

    @nn.compact
    def __call__(self, z, embedding=None):
        if self.tied:
            logits = z @ embedding.T.astype(z.dtype)
        else:
            logits = z @ _kernel(self, (z.shape[-1], self.vocabulary)).astype(z.dtype)
        if self.softcap is None:
            return logits
        return self.softcap * jnp.tanh(logits / self.softcap)


def of(
    kind: str, config: Any, params: Mapping[str, Any], *, temperature: float | None = None
) -> nn.Module:
    """The module of a checkpoint's head: its kind, the decoder's Config, and its parameters.

    The kinds are those of `hf.HEADS`; sizes that no Config knows are read off the parameters. Those
    of a gated head include its gate's, which has a `temperature`.
    """
    if kind == 'gated':
        width = {n: x['kernel'].shape[-1] for n, x in params['gate'].items() if n != 'scale'}
        layers = len(width) - 1
        if temperature is None:
            raise ValueError('temperature: found None, expected that of the gate')
        return Gated(Gate(width[f'layer_{layers}'], width['layer_0'], layers, float(temperature)))
    if kind == 'lm_head':
        return LanguageModel(config.V, config.tied, config.logit_softcap)
    if kind == 'ratings':
        return MultiObjective(params['kernel'].shape[-1])
    if kind == 'categories':
        return Router(params['kernel'].shape[-1])
    if 'hidden' in params:
        return Perceptron(params['hidden']['kernel'].shape[-1])
    return Scalar(bias='bias' in params)
