"""Two dropout views of a pack: preference with a contrastive loss beside it, and prototypes.

Secrets of RLHF II (arXiv 2401.06080, section 3.1). Packs are those of `tokens.unshare`d records:
where candidates share their prompt's tokens they also share the masks on it, and a view would tell
apart prompts, not responses.
"""

import inspect
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxrm import contrastive, losses, train, tree
from jaxrm.backbones import attention
from jaxrm.packing import Pack
from jaxrm.reward import Features, RewardModel


def two(
    rm: RewardModel, params: tree.Tree, pack: Pack, key: jax.Array, *, dropout: float
) -> Features:
    """Features of the pack under two independent sets of masks, [2, B, ...].

    One program for both, so that weights are brought to the devices once.
    """
    view = lambda key: rm.features(params, pack, dropout=dropout, key=key)  # noqa: E731
    return jax.vmap(view)(jax.random.split(key))


def preference(
    rm: RewardModel,
    contrast: Callable[..., jax.Array] = contrastive.simcse,
    loss: Callable[..., jax.Array] = losses.bradley_terry,
    *,
    items: Callable[..., tuple[jax.Array, jax.Array]] = contrastive.responses,
    beta: float = 1.0,
    dropout: float = 0.05,
    center_rewards_coefficient: float = 0.0,
) -> train.Objective:
    """Objective: `train.preference`'s, averaged over two views, plus beta times the contrast.

    `contrast` and `items` are functions of `contrastive`; the items are those of all packs of the
    batch, on however many devices, and their losses are averaged. Prototypes are the part
    'prototypes' of the parameters. With micro-batches an item has only those of its own part
    against it. The metric `shared` is the share of prompts that `check_unshared` refuses. Raises
    ValueError without dropout, since the views would be the same, and where the part 'prototypes'
    is there and `contrast` has no use for it, or the other way round.
    """
    if not 0 < dropout < 1:
        expected = 'above 0, for two views to differ, and below 1'
        raise ValueError(f'dropout: found {dropout}, expected {expected}')
    options = {'center_rewards_coefficient': center_rewards_coefficient}

    def objective(params: tree.Tree, pack: Pack, key: jax.Array) -> tuple[jax.Array, train.Metrics]:
        prototypes = _prototypes(params, contrast)
        z = two(rm, params, pack, key, dropout=dropout)

        def compared(z):
            score = lambda params, _: rm.rewards(params, z)  # noqa: E731
            return train.preference(score, loss, **options)(params, pack, key)

        value_V, metrics_V = jax.vmap(compared)(z)
        rank_BM = pack.rank_PBM.reshape(-1, pack.rank_PBM.shape[-1])
        (s_nD, here_n), (t_nD, _) = (items(z_BMD, rank_BM) for z_BMD in z.answer_BMD)
        loss_n = contrast(s_nD, t_nD, here_n, **prototypes)
        found = {
            'rm_loss': value_V.mean(),
            'contrastive_loss': loss_n.sum() / jnp.maximum(here_n.sum(), 1),
            'shared': _shared(pack),
        }
        value = found['rm_loss'] + beta * found['contrastive_loss']
        return value, _both(metrics_V) | found | contrastive.statistics(s_nD, t_nD, here_n)

    return objective


def _both(metrics_V: train.Metrics) -> train.Metrics:
    """One value of each metric from those of the two views, which have the same prompts."""
    reduce: dict[str, Any] = {'min_': jnp.min, 'max_': jnp.max, 'count': lambda x_V: x_V[0]}
    return {
        name: next((f for start, f in reduce.items() if name.startswith(start)), jnp.mean)(x_V)
        for name, x_V in metrics_V.items()
    }


def _shared(pack: Pack) -> jax.Array:
    """The share of prompts, of those with candidates, of which two read one closing token."""
    if pack.slot is None:  # every row is a stream of its own
        return jnp.float32(0)
    here_PBM = pack.rank_PBM >= 0
    closing_PR = jnp.concatenate(pack.read, axis=1)[..., 0]
    closing_PBM = attention.take(closing_PR, pack.row_PBM)
    same_PBMM = closing_PBM[..., None] == closing_PBM[..., None, :]
    both_PBMM = here_PBM[..., None] & here_PBM[..., None, :]
    other_MM = ~jnp.eye(here_PBM.shape[-1], dtype=bool)
    shared_PB = (same_PBMM & both_PBMM & other_MM[None, None]).any((2, 3))
    return shared_PB.sum() / jnp.maximum(here_PBM.any(2).sum(), 1)


def check_unshared(done: int, state: Any, metrics: train.Metrics) -> None:
    """A hook: ValueError where candidates share their prompt's tokens, and so the masks on them."""
    share = np.max(np.asarray(metrics['shared']), initial=0.0, where=~np.isnan(metrics['shared']))
    if share > 0:
        found = f'found {share:.0%} of the prompts shared by several candidates'
        raise ValueError(f'step {done}: packs: {found}, expected those of tokens.unshare')


# Prototypes


def _prototypes(params: tree.Tree, contrast: Callable[..., jax.Array]) -> dict[str, jax.Array]:
    """What `contrast` takes of the part 'prototypes'; ValueError where only one of them is."""
    takes = 'prototype_DK' in inspect.signature(contrast).parameters
    if takes != ('prototypes' in params):
        found, expected = f'found {sorted(params)}', ('no such part', 'the part')[takes]
        name = getattr(contrast, '__name__', contrast)
        raise ValueError(f'prototypes: {found}, expected {expected}, for {name}')
    return {'prototype_DK': params['prototypes']['kernel']} if takes else {}


def init_prototypes(key: jax.Array, width: int, count: int) -> tree.Tree:
    """The part 'prototypes': `kernel` [width, count], columns uniform on the unit sphere."""
    return {'kernel': contrastive.unit(jax.random.normal(key, (width, count)), axis=0)}


def on_sphere(
    tx: optax.GradientTransformation, *, rate: float = 1.0
) -> optax.GradientTransformation:
    """`tx`, after which prototypes are brought back to unit length, every step.

    Their updates are first multiplied by `rate`: what moves a network's weights well may turn a
    unit vector hardly at all. `train.adamw` has no decay on them.
    """

    def project(updates, params):
        if 'prototypes' not in updates:
            raise ValueError(f'prototypes: found {sorted(updates)}, expected that part among them')
        move = lambda u, p: contrastive.unit(p + rate * u, axis=-2) - p  # noqa: E731
        moved = jax.tree.map(move, updates['prototypes'], params['prototypes'])
        return {**updates, 'prototypes': moved}

    return optax.chain(tx, optax.stateless(project))
