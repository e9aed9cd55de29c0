"""DMoERM's inner model (arXiv 2403.01197): experts on one base, whose features one MLP reads.

An expert is an adapter with a head of its own, one for each capability; all of them run for every
answer, on one copy of the base. Which inner model an answer gets is a router's choice, which reads
the prompt alone. The paper's released code draws its backbones at random and never trains the
experts' heads; this follows the paper's figure. Letters: E experts, B prompts, M candidates,
D width.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from einops import rearrange

from jaxrm import heads, tree
from jaxrm.data import DataError, Ids, Preference
from jaxrm.packing import Pack
from jaxrm.reward import Features, RewardModel

TURNS = ('last', 'all')  # of a conversation, that an inner model reads


@dataclasses.dataclass(frozen=True)
class Mixture:
    """Functions of params = {'backbone', 'experts': {'lora', 'head'}, 'head'}.

    The leaves of 'experts' have a leading E; 'head' is that of heads.Mixture. `expert` is the model
    of one expert: its backbone, the experts' kind of head, and the scale of their adapters.
    """

    expert: RewardModel
    head: heads.Mixture

    @property
    def backbone(self) -> Any:
        return self.expert.backbone

    def features(self, params: tree.Tree, pack: Pack) -> Features:
        """Features of all experts end to end, answer_BMD with D = E x width; one pass of the base.

        The prompt's are the first expert's.
        """

        def of(expert: tree.Tree) -> Features:
            return self.expert.features({'backbone': params['backbone'], **expert}, pack)

        answer_EBMD, prompt_EBD = jax.vmap(of)(params['experts'])
        return Features(rearrange(answer_EBMD, 'e b m d -> b m (e d)'), prompt_EBD[0])

    def score(self, params: tree.Tree, pack: Pack) -> jax.Array:
        """score_BM, float32."""
        return self.rewards(params, self.features(params, pack))

    def rewards(self, params: tree.Tree, z: Features, *, dropout=0.0, key=None) -> jax.Array:
        """score_BM, float32, of features; needs no backbone. There is no dropout."""
        if dropout:
            raise ValueError(f'dropout: found {dropout}, expected 0: the head has none')
        score_BM: Any = self.head.apply({'params': params['head']}, z.answer_BMD)
        return score_BM

    def capabilities(self, params: tree.Tree, z: Features) -> jax.Array:
        """[B, M, E] what each expert's own head says; not part of the score."""
        count = len(jax.tree.leaves(params['experts'])[0])
        z_EBMD = rearrange(z.answer_BMD, 'b m (e d) -> e b m d', e=count)

        def of(head: tree.Tree, z_BMD: jax.Array) -> jax.Array:
            return self.expert.head.apply({'params': head}, z_BMD)

        return jnp.moveaxis(jax.vmap(of)(params['experts']['head'], z_EBMD), 0, -1)

    def parts(self, params: tree.Tree, pack: Pack) -> tuple[jax.Array, jax.Array]:
        """score_BM and the capabilities' [B, M, E]."""
        z = self.features(params, pack)
        return self.rewards(params, z), self.capabilities(params, z)

    def init_head(self, key: jax.Array, experts: int, width: int) -> tree.Tree:
        """Fresh parameters of the MLP over so many experts of this width."""
        return self.head.init(key, jnp.zeros((1, experts * width)))['params']


def join(experts: list[tree.Tree]) -> tree.Tree:
    """The part 'experts' of several {'lora', 'head'} of one shape."""
    return jax.tree.map(lambda *x: jnp.stack(x), *experts)


def permuted(params: tree.Tree, order: list[int]) -> tree.Tree:
    """The same model with its experts in another order."""
    kernel = params['head']['hidden']['kernel']
    at = jnp.array(order)
    blocks = rearrange(kernel, '(e d) h -> e d h', e=len(order))[at]
    hidden = {**params['head']['hidden'], 'kernel': rearrange(blocks, 'e d h -> (e d) h')}
    experts = jax.tree.map(lambda x: x[at], params['experts'])
    return {**params, 'experts': experts, 'head': {**params['head'], 'hidden': hidden}}


# What of a conversation each model reads


def shown(record: Preference, turns: str = 'last') -> Preference:
    """The record as an inner model reads it; by default, as released, the last user turn alone."""
    if turns not in TURNS:
        raise ValueError(f'turns: found {turns!r}, expected one of {TURNS}')
    if turns == 'all' or isinstance(record.messages, str | Ids):
        return record
    return record._replace(messages=record.messages[-1:])


def asked(record: Preference, where: str = 'record') -> Preference:
    """The record as the router reads it: what the user said in all turns, and no answer.

    One user turn, as templates may refuse several in a row. Raises DataError without one.
    """
    if isinstance(record.messages, str | Ids):
        return Preference(record.messages, (), group=record.group)
    said = [m['content'] for m in record.messages if m['role'] == 'user']
    if not said:
        raise DataError(f'{where}: messages: found no user turn, which the router reads')
    turn = {'role': 'user', 'content': '\n\n'.join(said)}
    return Preference((turn,), (), group=record.group)
