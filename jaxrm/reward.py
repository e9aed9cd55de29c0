"""A reward model: a backbone, an optional adapter on it, and a head."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange

from jaxrm import fused, heads, lora, tree
from jaxrm.backbones import attention
from jaxrm.packing import Pack


class Features(NamedTuple):
    """States at each candidate's last token and at each prompt's closing token, float32."""

    answer_BMD: jax.Array
    prompt_BD: jax.Array


def blend(backbone: tree.Tree, other: tree.Tree, share: Any) -> tree.Tree:
    """The part 'blend' of params: the backbone becomes (1 - share) of itself and share of `other`.

    Mixed where it is used, layer by layer, so that no third model is ever held; `share` is an
    argument of the compiled program, one number or [L], one a layer, of which the embedding and the
    final norm take the first. With a head from elsewhere this is DogeRM (arXiv 2407.01470), whose
    lambda is `share`. Both are fused or neither is; `jaxrm.load` fuses. Raises ValueError for trees
    that differ in a name or a shape.
    """
    ours, theirs = tree.flatten(backbone), tree.flatten(other)
    for name in sorted(ours.keys() | theirs.keys()):
        a, b = (np.shape(x[name]) if name in x else None for x in (ours, theirs))
        if a != b:
            hint = ' (one is fused: see fused.split)' * _half_fused(ours, theirs)
            raise ValueError(
                f'blend: {name} is {a} here and {b} in the other, expected one shape{hint}'
            )
    layers = 1 + (len(jax.tree.leaves(backbone['layers'])[0]) if 'layers' in backbone else 0)
    if np.shape(share) not in ((), (layers,)):
        raise ValueError(f'share: found the shape {np.shape(share)}, expected () or ({layers},)')
    return {'other': other, 'share': jnp.broadcast_to(jnp.asarray(share, jnp.float32), (layers,))}


def _half_fused(ours: tree.Tree, theirs: tree.Tree) -> bool:
    """Whether one tree alone, flat, has kernels of several linears in it."""
    one, other = (
        any(part in fused.NAMES.values() for name in x for part in name.split('/'))
        for x in (ours, theirs)
    )
    return one != other


def _shared_out(other: tree.Tree, share: jax.Array) -> tree.Tree:
    """The collection that layers read: the other's leaves, and at each module its own share."""
    of = {'layers': share[:-1], 'top': share[-1]}
    out = tree.flatten(other)
    for name in list(out):
        out[f'{name.rpartition("/")[0]}/share'] = of.get(name.partition('/')[0], share[0])
    return tree.unflatten(out)


def _check_key(dropout: float, key: Any) -> None:
    if dropout and key is None:
        raise ValueError(f'dropout: {dropout} needs a key, found None')


@dataclasses.dataclass(frozen=True)
class RewardModel:
    """Functions of params = {'backbone', 'head', optionally 'lora'}; B counts over all packs.

    A Gated head has its gate's parameters in a part of their own, 'gate'. A part 'blend' is that of
    `blend`.
    """

    backbone: Any  # a linen module
    head: Any
    lora_scale: float = 1.0

    def states(
        self, params: tree.Tree, pack: Pack, *, read='last', dropout=0.0, key=None
    ) -> jax.Array:
        """The backbone's states, adapter included; see `backbones.layers.Decoder`."""
        _check_key(dropout, key)
        variables: dict[str, Any] = {'params': params['backbone']}
        if 'lora' in params:
            variables['lora'] = lora.scaled(params['lora'], self.lora_scale)
        if 'blend' in params:
            variables['blend'] = _shared_out(**params['blend'])
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
        """score_BM, float32; of a Router, which reads prompts alone, logits [B, C]."""
        return self.rewards(params, self.features(params, pack, dropout=dropout, key=key))

    def rewards(self, params: tree.Tree, z: Features, *, dropout=0.0, key=None) -> jax.Array:
        """score_BM, float32, of features; needs no backbone. `dropout` is inside a gate."""
        variables, inputs = self._head_inputs(params, z)
        if not dropout:
            return self.head.apply(variables, *inputs)
        _check_key(dropout, key)
        return self.head.apply(variables, *inputs, dropout=dropout, rngs={'dropout': key})

    def parts(self, params: tree.Tree, pack: Pack) -> heads.Parts:
        """What the scores of a Gated head are made of, [B, M or 1, J]."""
        variables, inputs = self._head_inputs(params, self.features(params, pack))
        return self.head.apply(variables, *inputs, method='parts')

    def _head_inputs(self, params: tree.Tree, z: Features) -> tuple[tree.Tree, tuple]:
        if isinstance(self.head, heads.Gated):
            return {'params': {**params['head'], 'gate': params['gate']}}, z
        routes = isinstance(self.head, heads.Router)
        return {'params': params['head']}, (z.prompt_BD if routes else z.answer_BMD,)

    def logits(self, params: tree.Tree, pack: Pack) -> jax.Array:
        """Next-token logits [P, N, V] of every stream token; the head is a LanguageModel."""
        z_PND = self.states(params, pack, read='all')
        embedding = params['backbone']['embed']['embedding']
        return self.head.apply({'params': params['head']}, z_PND, embedding)

    def score_and_logits(
        self, params: tree.Tree, pack: Pack, *, dropout=0.0, key=None
    ) -> tuple[jax.Array, jax.Array]:
        """score_BM and logits [P, N, V] of one pass; params['lm_head'] is a LanguageModel's."""
        z_PND = self.states(params, pack, read='all', dropout=dropout, key=key)
        z_PRD = attention.at_read(z_PND, pack)[:, :, 1]
        answer_BMD = rearrange(attention.take(z_PRD, pack.row_PBM), 'p b m d -> (p b) m d')
        embedding = params['backbone']['embed']['embedding']
        language = heads.of('lm_head', self.backbone.config, {})
        logits_PNV: Any = language.apply({'params': params['lm_head']}, z_PND, embedding)
        return self.head.apply({'params': params['head']}, answer_BMD), logits_PNV

    def init_backbone(self, key: jax.Array) -> tree.Tree:
        """Fresh float32 backbone parameters."""
        zero = jnp.zeros((1, 1), jnp.int32)
        read, one = (zero[..., None].repeat(2, -1),), zero[..., None]
        pack = Pack(zero, zero, None, None, read, *(one,) * 3, one[..., None], *(zero,) * 3)
        # Attention has no parameters, and kernels do not take a row of one token.
        backbone = self.backbone.clone(attention=attention.xla, remat='none')
        return jax.jit(backbone.init)(key, pack)['params']

    def init_head(self, key: jax.Array, width: int) -> tree.Tree:
        """Fresh head parameters for features of this width, those of a gate not among them."""
        zero = jnp.zeros((1, 2, width))
        inputs = (zero, zero[:, 0]) if isinstance(self.head, heads.Gated) else (zero,)
        made = self.head.init(key, *inputs).get('params', {})
        return {name: x for name, x in made.items() if name != 'gate'}

    def init_gate(self, key: jax.Array, width: int) -> tree.Tree:
        """Fresh parameters of a Gated head's gate."""
        return self.head.gate.init(key, jnp.zeros((2, width)))['params']
