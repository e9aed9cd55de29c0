"""A reward model: a backbone, an optional adapter on it, and a head."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from einops import rearrange

from jaxrm import lora, tree
from jaxrm.backbones import attention
from jaxrm.packing import Pack


class Features(NamedTuple):
    """States at each candidate's last token and at each prompt's closing token, float32."""

    answer_BMD: jax.Array
    prompt_BD: jax.Array


@dataclasses.dataclass(frozen=True)
class RewardModel:
    """Functions of params = {'backbone', 'head', optionally 'lora'}; B counts over all packs."""

    backbone: Any  # a linen module
    head: Any
    lora_scale: float = 1.0

    def states(
        self, params: tree.Tree, pack: Pack, *, read='last', dropout=0.0, key=None
    ) -> jax.Array:
        """The backbone's states, adapter included; see `backbones.layers.Decoder`."""
        if dropout and key is None:
            raise ValueError(f'dropout: {dropout} needs a key, found None')
        variables: dict[str, Any] = {'params': params['backbone']}
        if 'lora' in params:
            variables['lora'] = lora.scaled(params['lora'], self.lora_scale)
        rngs = {'dropout': key} if dropout else None
        return self.backbone.apply(variables, pack, read=read, dropout=dropout, rngs=rngs)

    def features(self, params: tree.Tree, pack: Pack, *, dropout=0.0, key=None) -> Features:
        """Features of every candidate and prompt; those of absent ones mean nothing."""
        z_PRTD = self.states(params, pack, dropout=dropout, key=key)
        answer_PBMD = attention.take(z_PRTD[:, :, 1], pack.row_PBM)
        prompt_PBD = attention.take(z_PRTD[:, :, 0], pack.row_PBM[:, :, 0])
        answer_BMD = rearrange(answer_PBMD, 'p b m d -> (p b) m d')
        return Features(answer_BMD, rearrange(prompt_PBD, 'p b d -> (p b) d'))

    def score(self, params: tree.Tree, pack: Pack, *, dropout=0.0, key=None) -> jax.Array:
        """score_BM, float32."""
        z = self.features(params, pack, dropout=dropout, key=key)
        return self.head.apply({'params': params['head']}, z.answer_BMD)

    def logits(self, params: tree.Tree, pack: Pack) -> jax.Array:
        """Next-token logits [P, N, V] of every stream token; the head is a LanguageModel."""
        z_PND = self.states(params, pack, read='all')
        embedding = params['backbone']['embed']['embedding']
        return self.head.apply({'params': params['head']}, z_PND, embedding)

    def init_backbone(self, key: jax.Array) -> tree.Tree:
        """Fresh float32 backbone parameters."""
        zero = jnp.zeros((1, 1), jnp.int32)
        read, one = (zero[..., None].repeat(2, -1),), zero[..., None]
        pack = Pack(zero, zero, None, None, read, *(one,) * 3, one[..., None], *(zero,) * 3)
        return jax.jit(self.backbone.init)(key, pack)['params']

    def init_head(self, key: jax.Array, width: int) -> tree.Tree:
        """Fresh head parameters for features of this width."""
        return self.head.init(key, jnp.zeros((1, 1, width))).get('params', {})
