"""What the experiments on DMoERM (arXiv 2403.01197) share: how each of its parts learns.

Everything of one kind learns in one program: all experts of a category, and where several
categories or seeds are trained at once, all of theirs, each on a base of its own.

Letters: E members, G bases, n records, c candidates, D width.
"""

import contextlib
import functools
import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxrm import (
    evaluate,
    features,
    heads,
    lora,
    members,
    mixture,
    packing,
    reward,
    shapes,
    sharding,
    statistics,
    tokens,
    train,
    tree,
)
from jaxrm.backbones import attention

Array = np.ndarray


class Pace(NamedTuple):
    """How members learn: the pairs of a step are a mean, as packs are filled by tokens."""

    learning_rate: float
    epochs: int = 1
    batch: int = 16
    warmup: int = 10
    weight_decay: float = 0.0


class Lesson(NamedTuple):
    """What one member learns from, the seed of its order, and which of the bases it stands on."""

    tokens: tokens.Tokens
    seed: int
    base: int = 0


# Learning


def shape_of(some: tokens.Tokens, width: int, pairs: int, parts: int = 1) -> packing.Shape:
    """A pack of about so many records in all parts."""
    size = int(np.diff(some.start).mean() * pairs / parts)
    return shapes.fit(some, size=size, width=width, multiple=attention.row_multiple())


def on_own_base(
    state: train.State, frozen_G: tree.Tree, batch: Any, key: jax.Array, **options: Any
) -> tuple[train.State, train.Metrics]:
    """`train.step` of a member whose batch says which of the frozen trees is its own."""
    pack, base_P = batch
    mine = jax.tree.map(lambda x_G: x_G[base_P[0]], frozen_G)
    return train.step(state, mine, pack, key, **options)


def _source(of: packing.Batches, base: int | None) -> Callable[[int], Any]:
    if base is None:
        return of
    return lambda i: (of(i), np.full(of.packs, base, np.int32))


def learned(
    pace: Pace, start_E: tree.Tree, lessons: Sequence[Lesson], shape: packing.Shape,
    objective: train.Objective, *, mesh: Any, frozen: tree.Tree | None = None, own: bool = False,
    hooks: Sequence[train.Hook] = (), saver: Callable[..., Any] | None = None,
    how: members.How | None = None,
) -> tree.Tree:  # fmt: skip
    """What the members became, in one program with as many packs a step for each.

    All have one schedule, of the longest lesson: a member whose lesson ends before stays as it is,
    with a learning rate that has not come down yet. With `own` the leaves of
    `frozen` have a leading axis of bases, of which each lesson names one. saver(state, steps) gives
    the state to go on from, and what saves it. `how` is that of `members.step`.
    """
    packs = sharding.data_parallel(mesh)
    each = [packing.Batches(x.tokens, shape, packs, seed=x.seed, epochs=pace.epochs)
            for x in lessons]  # fmt: skip
    batches = members.Batches(
        [_source(of, x.base if own else None) for of, x in zip(each, lessons, strict=True)],
        [len(of) for of in each],
    )
    steps = len(batches)
    rate = train.schedule(pace.learning_rate, steps, warmup=min(pace.warmup, steps // 4),
                          kind='cosine')  # fmt: skip
    tx = train.adamw(rate, weight_decay=pace.weight_decay)
    one = on_own_base if own else train.step
    state, saved = members.start(start_E, tx, mesh), contextlib.nullcontext()
    if saver:
        state, saved = saver(state, steps)
        hooks = [*hooks, (1, saved)]
    with saved:
        return train.fit(
            state, frozen or {}, batches, members.keys([x.seed for x in lessons]),
            objective=objective, tx=tx, mesh=mesh, steps=steps,
            step=functools.partial(members.step, one=one, how=how), hooks=hooks,
        ).trainable  # fmt: skip


def whole(
    rm: reward.RewardModel, backbone: tree.Tree, seeds: Sequence[int], width: int
) -> tree.Tree:
    """Members that start from one backbone, each with a head of its own."""
    head = jax.jit(jax.vmap(lambda key: rm.init_head(key, width)))
    shared = lambda x: np.broadcast_to(x, (len(seeds), *x.shape))  # noqa: E731
    return {'backbone': jax.tree.map(shared, backbone), 'head': head(members.keys(seeds))}


def probed(
    pace: Pace, rm: reward.RewardModel, backbone: tree.Tree, lessons: Sequence[Lesson],
    shape: packing.Shape, *, mesh: Any,
) -> tree.Tree:  # fmt: skip
    """A head for each lesson [E, ...], learned on the frozen backbone; its seed is the lesson's."""
    start_E = whole(rm, {}, [x.seed for x in lessons], rm.backbone.config.D)['head']
    return dict(jax.device_get(learned(
        pace, {'head': start_E}, lessons, shape, train.preference(rm.score), mesh=mesh,
        frozen={'backbone': backbone},
    ))['head'])  # fmt: skip


def experts(
    bases: Sequence[tree.Tree], count: int, *, seeds: Sequence[int], rank: int, targets: str
) -> tree.Tree:
    """`count` experts for each base, that do not change it yet: an adapter, the base's head."""
    keys = [jax.random.split(jax.random.key(seed), count) for seed in seeds]
    made = jax.vmap(lambda key: lora.init(bases[0]['backbone'], key, rank=rank, targets=targets))
    return members.stack([
        {'lora': members.select(lora_E, e), 'head': base['head']}
        for base, lora_E in zip(bases, map(made, keys), strict=True) for e in range(count)
    ])  # fmt: skip


# Token trees


def joined(sets: Sequence[tokens.Tokens]) -> tokens.Tokens:
    """All records of several sets, one after the other; `record` and `group` are as they were."""
    columns = {k: np.concatenate([getattr(x, k) for x in sets]) for k in tokens.Tokens._fields}
    for name in ('start', 'first'):
        length = np.concatenate([np.diff(getattr(x, name)) for x in sets])
        columns[name] = np.concatenate([[0], np.cumsum(length)])
    return tokens.Tokens(**columns)


def relabelled(of: tokens.Tokens, winner_n: Array) -> tokens.Tokens:
    """The pairs that have a winner (0 or 1, -1 for none), ranked by it."""
    at = np.flatnonzero(winner_n >= 0)
    some = tokens.select(of, at)
    rank_n2 = np.stack([winner_n[at] == 1, winner_n[at] == 0], axis=1)
    return some._replace(rank=rank_n2.astype(np.int32).reshape(-1))


# The head, on features


@functools.cache
def features_of(model: mixture.Mixture) -> Callable[..., jax.Array]:
    """Compiled: [B, M, E x D] of (params, pack)."""
    return jax.jit(lambda params, pack: model.features(params, pack).answer_BMD)


def cached(
    model: mixture.Mixture, params: tree.Tree, some: tokens.Tokens, shape: packing.Shape, mesh: Any
) -> features.Cached:
    """Features of all experts of every answer; those of prompts have no width."""
    packs, only = sharding.data_parallel(mesh), {k: params[k] for k in ('backbone', 'experts')}
    z_cD = evaluate.candidate_scores(features_of(model), only, some, shape, mesh=mesh, packs=packs)
    return features.Cached(z_cD, np.zeros((len(some.prompt), 0), np.float32))


class Mixing(NamedTuple):
    """How the MLPs learn: so many steps at most, of which the best by held-out loss counts."""

    learning_rate: float = 1e-3
    steps: int = 200
    batch: int = 64
    every: int = 10
    weight_decay: float = 0.01


class Part(NamedTuple):
    """Features and pairs that one MLP learns from, those that choose when, and its seed."""

    of: features.Cached
    pairs: tokens.Tokens
    held_of: features.Cached
    held: tokens.Tokens
    seed: int


def split(of: features.Cached, some: tokens.Tokens, held_n: Array, seed: int) -> Part:
    """A part by which records are held out."""
    sides = []
    for at in (np.flatnonzero(~held_n), np.flatnonzero(held_n)):
        c = np.concatenate([np.arange(some.first[i], some.first[i + 1]) for i in at])
        sides += [features.Cached(of.answer_cD[c], of.prompt_nD[at]), tokens.select(some, at)]
    return Part(*sides, seed)


def mixed(c: Mixing, model: mixture.Mixture, parts: Sequence[Part], mesh: Any) -> tree.Tree:
    """The MLPs [E] of all parts, in one program; the experts are not even there."""
    score = features.scored(model.rewards)
    forward, packs = jax.jit(score), sharding.data_parallel(mesh)
    size = -(-c.batch // packs)
    tx = train.adamw(train.schedule(c.learning_rate, c.steps, kind='cosine'),
                     weight_decay=c.weight_decay)  # fmt: skip
    kD = parts[0].of.answer_cD.shape[1]
    init = jax.jit(jax.vmap(lambda key: model.init_head(key, 1, kD)))
    start_E = {'head': init(members.keys([part.seed for part in parts]))}
    best = Best(len(parts))
    batches = members.Batches([
        features.Batches(x.of, x.pairs, packs=packs, prompts=size, seed=x.seed, epochs=True)
        for x in parts
    ])  # fmt: skip

    def losses(now_E: tree.Tree) -> Array:
        return np.array([
            held_loss(features.candidate_scores(forward, members.select(now_E, e), x.held_of,
                                                x.held, mesh=mesh), x.held)
            for e, x in enumerate(parts)
        ])  # fmt: skip

    def hook(done: int, state: train.State, _: Any) -> None:
        if done % c.every == 0 or done == c.steps:
            now_E = jax.device_get(state.trainable)
            best.see(done, now_E, -losses(now_E))

    train.fit(
        members.start(start_E, tx, mesh), {}, batches, members.keys([x.seed for x in parts]),
        objective=train.preference(score), tx=tx, mesh=mesh, steps=c.steps, step=members.step,
        hooks=[(1, hook)],
    )  # fmt: skip
    return best.tree['head']


class Best:
    """The best that each member was, by a value that is to be high."""

    def __init__(self, count: int):
        self.value, self.step = np.full(count, -np.inf), np.zeros(count, int)
        self.tree: Any = None

    def see(self, done: int, now_E: tree.Tree, value_E: Array) -> None:
        better = value_E > self.value
        if self.tree is None:
            self.tree = jax.tree.map(np.array, now_E)
        for e in np.flatnonzero(better):
            jax.tree.map(lambda kept, x, e=e: kept.__setitem__(e, x[e]), self.tree, now_E)
        self.value = np.where(better, value_E, self.value)
        self.step = np.where(better, done, self.step)


def held_loss(score_c: Array, some: tokens.Tokens) -> float:
    """Mean -log sigmoid of the differences of all ordered pairs."""
    rank, score = (evaluate.by_record(x_c, some) for x_c in (some.rank, score_c))
    at, flat = statistics.ordered(rank), np.concatenate(score)
    return float(np.logaddexp(0, flat[at.worse] - flat[at.better]).mean())


def mixture_of(rm: reward.RewardModel) -> mixture.Mixture:
    """The inner model whose experts are this model; its MLP is as wide as the decoder."""
    return mixture.Mixture(rm, heads.Mixture(rm.backbone.config.D))


# Leaves


def digests(params: Mapping[str, Any]) -> dict[str, str]:
    """A hash of every leaf by its name: what moved in a phase, and what did not."""
    flat = tree.flatten(dict(params))
    return {k: hashlib.sha256(np.ascontiguousarray(x).tobytes()).hexdigest()
            for k, x in flat.items()}  # fmt: skip


def moved(before: Mapping[str, str], after: Mapping[str, str]) -> set[str]:
    """The names of leaves that changed; both have the same leaves."""
    if before.keys() != after.keys():
        raise ValueError(f'leaves: found {sorted(before.keys() ^ after.keys())} on one side alone')
    return {name for name in before if before[name] != after[name]}
