"""What the experiments on a policy that has moved away share: models as members, and J of them.

Pairs are of the world's training distribution and have gold labels, of which each seed turns its
own share round. Sets of answers without labels are of a policy that writes otherwise.

Letters: E members, n records, c answers.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments import devices
from jaxrm import (
    backbones,
    checkpoint,
    heads,
    losses,
    members,
    meta,
    packing,
    report,
    reward,
    shapes,
    sharding,
    tokens,
    train,
    tree,
)
from jaxrm.backbones import attention
from jaxrm.data import Preference
from jaxrm.datasets import synthetic

Array = np.ndarray


@dataclasses.dataclass(frozen=True, kw_only=True)
class Learning(devices.Devices):
    """What a reward model learns from, and how."""

    model_name_or_path: str = 'runs/pretrain/model'  # the decoder to start from
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    pairs: int = 2000
    flips: float = 0.2  # share of labels turned round
    candidates: int = 5  # answers in a set
    train_batch_size: int = 16  # mean number of pairs in a step
    set_batch_size: int = 8  # mean number of sets in a step
    learning_rate: float = 1e-3
    warmup_steps: int = 10
    max_length: int = 128  # longer pairs are dropped


class Start(NamedTuple):
    """The model to start from and the pairs to learn from."""

    rm: reward.RewardModel
    backbone: tree.Tree
    tokenizer: Any
    mesh: Any
    pairs: list[packing.Batches]  # of each member: the same packs, an order and flips of its own


# What a step is beside eta.
VARIANTS: dict[str, dict[str, Any]] = {
    'published': {},
    'keep theta prime': {'apply_to': 'theta_prime'},
    'second order': {'order': 'second'},
    'joint': {'apply_to': 'joint'},
    'Adam inside': {'inner': 'adam'},
}


def start(c: Learning) -> Start:
    """The decoder, and an epoch of pairs."""
    mesh, like = devices.mesh(c), checkpoint.load_pretrained(c.model_name_or_path, kind='backbone')
    attend = attention.default(like.dtype, like.config, mesh)
    backbone = backbones.family(like.model_type).Backbone(like.config, like.dtype, attend)
    rm = reward.RewardModel(backbone, heads.Scalar())
    found = encoded(ordered(synthetic.preferences(c.pairs, seed=0, labels='gold')), like.tokenizer,
                    limit=c.max_length)  # fmt: skip
    stream = batches(found, c.train_batch_size, like.config.D, mesh, epochs=1)
    pairs = [stream.reordered(seed, flipped(found, c.flips, seed)) for seed in c.seeds]
    return Start(rm, like.backbone, like.tokenizer, mesh, pairs)


def ordered(records: Sequence[Preference]) -> list[Preference]:
    """Those whose two answers do not tie."""
    return [record for record in records if record.ranks == (0, 1)]


def encoded(
    records: Sequence[Preference], tokenizer: Any, *, limit: int | None = None
) -> tokens.Tokens:
    return tokens.encode(records, tokenizer, max_length=limit).tokens


def flipped(of: tokens.Tokens, share: float, seed: int) -> tokens.Tokens:
    """The pairs with a share of the labels turned round."""
    turned_n = np.random.default_rng([seed, 1]).random(len(of.prompt)) < share
    return of._replace(rank=np.where(np.repeat(turned_n, 2), 1 - of.rank, of.rank))


def batches(
    of: tokens.Tokens, records: int, width: int, mesh: Any, *, epochs: int | None = None
) -> packing.Batches:
    """Packs of about so many records a step."""
    packs = sharding.data_parallel(mesh)
    size = int(np.diff(of.start).mean() * records / packs)
    shape = shapes.fit(of, size=size, width=width, multiple=16)
    return packing.Batches(of, shape, packs, seed=0, epochs=epochs)


# Learning


def step(state: Any, frozen: Any, batch: Any, key: Any, **options: Any) -> Any:
    """`meta.step` with eta among what is frozen, so that all its values are one program."""
    return meta.step(state, {}, batch, key, eta=frozen['eta'], **options)


def optimiser(c: Learning, steps: int) -> Any:
    """AdamW at a cosine rate."""
    return train.adamw(train.schedule(c.learning_rate, steps, warmup=c.warmup_steps, kind='cosine'))


def stream(c: Learning, s: Start, sets: Sequence[packing.Batches]) -> members.Batches:
    """Batches of pairs and sets of every member, to be read in a thread of its own."""
    own = lambda of, seed: of.reordered(seed, of.tokens)  # noqa: E731
    each = zip(s.pairs, sets, c.seeds, strict=True)
    return members.Batches([meta.Batches(own(a, seed), own(b, seed)) for a, b, seed in each])


def learn(
    c: Learning,
    s: Start,
    variant: str,
    eta: float,
    sets: Sequence[packing.Batches],
    hooks: Sequence[train.Hook] = (),
) -> tree.Tree:
    """Parameters of the members after an epoch of pairs; `sets` are the members'."""
    steps, plain = len(s.pairs[0]), variant == 'vanilla'
    tx, objective = optimiser(c, steps), train.preference(s.rm.score)
    take: train.Step = members.step
    if not plain:
        options = {'spread': meta.spread(s.rm.score), 'dtype': s.rm.backbone.dtype}
        take = functools.partial(members.step, one=step, **options, **VARIANTS[variant])
        if variant != 'joint':  # which has no inner step
            hooks = [*hooks, (1, meta.check_moved)]
    D = s.rm.backbone.config.D
    made = [
        {'backbone': s.backbone, 'head': s.rm.init_head(jax.random.key(seed), D)}
        for seed in c.seeds
    ]
    state = train.fit(
        members.start(members.stack(made), tx, s.mesh),
        {} if plain else {'eta': jnp.float32(eta)},
        members.Batches(s.pairs) if plain else stream(c, s, sets),
        members.keys(c.seeds),
        objective=objective, tx=tx, mesh=s.mesh, steps=steps, step=take, hooks=hooks,
    )  # fmt: skip
    return state.trainable


# Scores


@functools.cache
def forward(rm: reward.RewardModel) -> Callable[..., jax.Array]:
    return jax.jit(members.scored(rm.score))


def scores(s: Start, params_E: tree.Tree, of: tokens.Tokens) -> Array:
    """[E, c] of every answer."""
    shape = shapes.fit(of, size=4096, width=s.rm.backbone.config.D, multiple=16)
    packs = sharding.data_parallel(s.mesh)
    return members.scores(forward(s.rm), {}, params_E, of, shape, mesh=s.mesh, packs=packs)


def apart(score_Ec: Array, of: tokens.Tokens) -> Array:
    """[E, n] J of each record; all have as many answers."""
    M = int(np.diff(of.first)[0])
    rank_EnM = np.broadcast_to(of.rank.reshape(-1, M), (len(score_Ec), len(of.prompt), M))
    each = jax.vmap(losses.difference)(score_Ec.reshape(rank_EnM.shape), rank_EnM)
    return np.asarray(each)


def right(score_Ec: Array, gold_c: Array, of: tokens.Tokens) -> Array:
    """[E, n] share of a record's pairs, of those that gold orders, that the scores order so."""
    M = int(np.diff(of.first)[0])
    score, gold = score_Ec.reshape(len(score_Ec), -1, M), gold_c.reshape(-1, M)
    better = gold[:, :, None] > gold[:, None]
    found = (score[:, :, :, None] > score[:, :, None]) & better
    with np.errstate(invalid='ignore'):
        return found.sum((2, 3)) / better.sum((1, 2))


def gold(records: Sequence[Preference], of: tokens.Tokens) -> Array:
    """[c] gold rewards of the answers that were encoded."""
    owner = np.repeat(of.record, np.diff(of.first))
    kept = zip(owner, of.candidate, strict=True)
    return np.array(
        [synthetic.gold(records[i].messages, records[i].responses[m]).reward for i, m in kept]
    )


def rounded(x: Any) -> Any:
    """To six digits, for a file."""
    return np.vectorize(lambda value: float(f'{value:.6g}'))(np.asarray(x, float)).tolist()


# Cells on disk, and pictures


def lines(panels: dict[str, dict[str, tuple[Any, Any]]], path: Path, *, xlabel: str) -> None:
    """A panel for each title: of every name the mean of y [S, E] over x [S], and its members."""
    figure, axes = report.canvas(len(panels))
    for axis, (title, named) in zip(axes, panels.items(), strict=True):
        for i, (name, (x_S, y_SE)) in enumerate(named.items()):
            axis.plot(x_S, y_SE, color=f'C{i}', alpha=0.15, linewidth=0.8)
            axis.plot(x_S, np.mean(y_SE, 1), 'o-', color=f'C{i}', ms=3, label=name)
        axis.set(xlabel=xlabel, title=title)
    axes[-1].legend(frameon=False, fontsize=7, loc='upper left', bbox_to_anchor=(1, 1))
    figure.savefig(path, dpi=120)
