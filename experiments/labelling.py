"""What the experiments on wrong preference labels share: a tiny start, noisy pairs, many members.

Every seed has pairs of its own to learn from; the held-out pairs are common to all. Pairs stand
with the truly better answer first, and `turned` says which labels are wrong.

Letters: E members, n pairs.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from experiments import devices, stored
from jaxrm import (
    backbones,
    cache,
    checkpoint,
    heads,
    members,
    packing,
    reward,
    shapes,
    sharding,
    strength,
    tokens,
    train,
    tree,
)
from jaxrm.backbones import attention
from jaxrm.datasets import synthetic

RESULTS = Path(__file__).parent / 'results'
Array = np.ndarray
Hook = Callable[[int, tree.Tree], None]  # (steps done, what all members are)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(devices.Devices):
    model_name_or_path: str = 'runs/pretrain/model'  # the decoder to start from
    output_dir: Path = Path('runs/secrets')  # of scores, which the tables do not need
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    members: int = 10
    pairs: int = 2000
    test_pairs: int = 800
    categories: tuple[str, ...] = ('arithmetic', 'rewrite')
    learning_rate: float = 2e-3
    num_train_epochs: int = 2
    train_batch_size: int = 16  # mean number of pairs in a step
    warmup_steps: int = 20
    max_length: int = 96  # longer records are left out
    only_table: bool = False


# The start and the pairs


class Base(NamedTuple):
    """The model that all members start from, and how they are scored."""

    rm: reward.RewardModel
    backbone: tree.Tree
    tokenizer: Any
    mesh: Any
    forward: Callable[..., Any]  # compiled: score_BME of ((frozen, trainable_E), pack)


def base(c: Any) -> Base:
    """Of a folder with a decoder and its tokenizer; every member gets a head of its own."""
    mesh, like = devices.mesh(c), checkpoint.load_pretrained(c.model_name_or_path, kind='backbone')
    attend = attention.default(like.dtype, like.config, mesh)
    decoder = backbones.family(like.model_type).Backbone(like.config, like.dtype, attend)
    rm = reward.RewardModel(decoder, heads.Scalar())
    forward = jax.jit(members.scored(rm.score))
    return Base(rm, like.backbone, like.tokenizer, mesh, forward)


def pairs(c: Config, b: Base, n: int, *, seed: int, split: str) -> tokens.Tokens:
    """n pairs of the world that are short enough, the truly better answer first."""
    made = synthetic.preferences(
        3 * n, seed=seed, split=split, labels='gold', categories=c.categories
    )
    ordered = [record for record in made if record.ranks == (0, 1)]
    found = tokens.encode(ordered, b.tokenizer, max_length=c.max_length).tokens
    if len(found.prompt) < n:
        raise ValueError(f'max_length: found {len(found.prompt)} short pairs, expected {n}')
    return tokens.select(found, np.arange(n))


def turned(of: tokens.Tokens, cell: str, seed: int) -> Array:
    """[n] bool, whose labels are wrong: any, or those whose worse answer is the longer one.

    `cell` is the kind and the share. More wrong labels of one kind and seed include the fewer.
    """
    (noise, share), length_n2 = cell.split('-'), of.length.reshape(-1, 2)
    may_n = {
        'random': np.ones(len(length_n2), bool),
        'longer': length_n2[:, 1] > length_n2[:, 0],
    }[noise]
    draw_n = np.where(may_n, np.random.default_rng([seed, 1]).random(len(may_n)), 1.0)
    return draw_n < float(share) / may_n.mean()


def noisy(of: tokens.Tokens, turned_n: Array) -> tokens.Tokens:
    """The pairs with some labels turned round."""
    return of._replace(rank=np.where(np.repeat(turned_n, 2), 1 - of.rank, of.rank))


# Members


class Lesson(NamedTuple):
    """What one member learns from; the seed is of its head and of the order of its packs."""

    tokens: tokens.Tokens
    seed: int


def learned(
    c: Any, b: Base, lessons: Sequence[Lesson], *, hook: Hook | None = None, hooks: int = 8,
    **how: Any,
) -> tree.Tree:  # fmt: skip
    """What the members became, all in one program; `how` has other values of c's flags.

    The hook is called about `hooks` times in equal distances, and at the end.
    """
    c = dataclasses.replace(c, **how)
    packs, D = sharding.data_parallel(b.mesh), b.rm.backbone.config.D
    most = max((lesson.tokens for lesson in lessons), key=lambda of: len(of.prompt))
    size = int(np.diff(most.start).mean() * c.train_batch_size / packs)
    shape = fitting(b, [most, *(lesson.tokens for lesson in lessons)], size)

    @functools.cache
    def plan(i: int) -> packing.Batches:
        epochs = c.num_train_epochs
        return packing.Batches(lessons[i].tokens, shape, packs, seed=0, epochs=epochs)

    first = {id(lesson.tokens.ids): i for i, lesson in reversed([*enumerate(lessons)])}
    each = [plan(first[id(of.ids)]).reordered(seed, of) for of, seed in lessons]
    steps = min(map(len, each))
    tx = train.adamw(
        train.schedule(
            c.learning_rate, steps, warmup=min(c.warmup_steps, steps // 4), kind='cosine'
        )
    )
    head = jax.jit(jax.vmap(lambda key: b.rm.init_head(key, D)))
    heads_E = head(members.keys([lesson.seed for lesson in lessons]))
    shared = lambda x: np.broadcast_to(x, (len(lessons), *x.shape))  # noqa: E731
    start = {'backbone': jax.tree.map(shared, b.backbone), 'head': heads_E}
    every = max(steps // hooks, 1)

    def called(done: int, state: train.State, metrics: Any) -> None:
        if hook and (done == steps or (done % every == 0 and steps - done >= every)):
            hook(done, state.trainable)

    return train.fit(
        members.start(start, tx, b.mesh), {}, members.Batches(each),
        members.keys([lesson.seed for lesson in lessons]), objective=train.preference(b.rm.score),
        tx=tx, mesh=b.mesh, steps=steps, step=members.step, hooks=[(1, called)],
    ).trainable  # fmt: skip


def part(params_E: tree.Tree, i: int, size: int) -> tree.Tree:
    """The i-th so many members."""
    return jax.tree.map(lambda x_E: x_E[i * size : (i + 1) * size], params_E)


def fitting(b: Base, sets: Sequence[tokens.Tokens], size: int = 2048) -> packing.Shape:
    """A shape made for the first set, whose longest rows have room for any pair of all."""
    shape = shapes.fit(sets[0], size=size, width=b.rm.backbone.config.D, multiple=16)
    longest = max(int(packing.row_lengths(of).max()) for of in sets)
    *rows, (R, S) = shape.rows
    return shape._replace(rows=(*rows, (max(R, 2), max(S, -(-longest // 16) * 16))))


def gaps(b: Base, params_E: tree.Tree, of: tokens.Tokens, shape: packing.Shape) -> Array:
    """[E, n] scores of the better answers minus those of the worse."""
    packs = sharding.data_parallel(b.mesh)
    score_Ec = members.scores(b.forward, {}, params_E, of, shape, mesh=b.mesh, packs=packs)
    return strength.gaps(score_Ec, of)


# Ensembles


def scores(c: Any, b: Base, cell: str) -> dict[str, Array]:
    """What the ensembles of all seeds say of their own pairs and of the held-out ones, [S, E, n].

    A cell is a kind of noise and its share. Differences with the truly better answer first, and
    `turned`, whose labels were wrong. Kept in the output folder.
    """
    names = [f.name for f in dataclasses.fields(Config)]
    kept = {k: v for k, v in stored.flags(c).items() if k in names}
    path = c.output_dir / f'{cell}-{cache.digest(kept)[:8]}.npz'
    if path.exists():
        return dict(np.load(path))
    own = [pairs(c, b, c.pairs, seed=seed, split='train') for seed in c.seeds]
    wrong = [turned(of, cell, seed) for of, seed in zip(own, c.seeds, strict=True)]
    params_E = learned(c, b, [
        Lesson(noisy(of, turned_n), 1000 * seed + m)
        for of, turned_n, seed in zip(own, wrong, c.seeds, strict=True)
        for m in range(c.members)
    ])  # fmt: skip
    held, M = held_out(c, b), c.members
    shape = fitting(b, [*own, held])
    out = {
        'own': np.stack([gaps(b, part(params_E, i, M), of, shape) for i, of in enumerate(own)]),
        'turned': np.stack(wrong),
        'test': gaps(b, params_E, held, shape).reshape(len(own), M, -1),
        'test_turned': turned(held, cell, 0),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(path, **out)
    return out


def labelled(gap_En: Array, turned_n: Array) -> Array:
    """The differences with the answer first that is labelled better."""
    return np.where(turned_n, -gap_En, gap_En)


# What to compare on


def held_out(c: Config, b: Base) -> tokens.Tokens:
    """The pairs that are common to all seeds."""
    return pairs(c, b, c.test_pairs, seed=0, split='test')


def right(gap_En: Array, turned_n: Array) -> dict[str, Array]:
    """[E, n] 1 where a pair is scored as its label says, by kind of label; NaN without a label.

    Of differences with the truly better answer first. `agreement` has the pairs whose label is
    right.
    """
    gold_En = (gap_En > 0).astype(float)
    return {
        'gold': gold_En,
        'noisy': np.where(turned_n, gap_En < 0, gold_En),
        'agreement': np.where(turned_n, np.nan, gold_En),
    }


def rounded(x: Any, places: int = 4) -> Any:
    """Numbers for a result file."""
    return np.round(np.asarray(x, float), places).tolist()
