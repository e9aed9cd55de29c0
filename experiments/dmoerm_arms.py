"""The arms of the DMoERM experiment on the synthetic world: what each trains, and what it scores.

An arm gives scores of all held-out answers for each seed, before anything is chosen by a route.

Letters: S seeds, C categories, K members of an ensemble, E experts, G = S x C groups (seeds first),
n records, c candidates.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from experiments import devices, dmoerm, gating, stored
from experiments.dmoerm import Lesson, Pace
from jaxrm import (
    backbones,
    cache,
    checkpoint,
    data,
    evaluate,
    features,
    heads,
    judge,
    members,
    mixture,
    packing,
    reward,
    sharding,
    tokens,
    train,
    tree,
)
from jaxrm.backbones import attention
from jaxrm.data import Preference
from jaxrm.datasets import stand_in, synthetic

Array = np.ndarray
Arm = dict[str, Array]


class World(NamedTuple):
    """Pairs of all seeds in one set, of which an arm takes its rows, and what they start from."""

    c: Any
    rm: reward.RewardModel
    backbone: tree.Tree
    tokenizer: Any
    mesh: Any
    records: list[Preference]
    pool: tokens.Tokens
    seed_n: Array
    first_n: Array  # of the 60 % of the prompts that the bases learn from
    held_records: list[Preference]
    held: tokens.Tokens
    shape: packing.Shape  # to learn in
    wide: packing.Shape  # to score in

    def rows(self, seed: int, category: int | None = None, part: bool | None = None) -> Array:
        """Which pairs of the pool are of a seed, a category, a part of the prompts."""
        at_n = self.seed_n == seed
        at_n = at_n if category is None else at_n & (self.pool.group == category)
        return np.flatnonzero(at_n if part is None else at_n & (self.first_n == part))

    def groups(self) -> list[tuple[int, int]]:
        return [(s, k) for s in self.c.seeds for k in range(len(self.c.categories))]


def made(c: Any, flips: float, categories: Sequence[str] | None = None) -> World:
    """The world of an arm's flags; with `categories` of others than the flags name."""
    c, mesh = c.of(categories), devices.mesh(c)
    like = checkpoint.load_pretrained(c.model_name_or_path, kind='backbone')
    attend = attention.default(like.dtype, like.config, mesh)
    decoder = backbones.family(like.model_type).Backbone(like.config, like.dtype, attend)
    labels = {'labels': 'sampled', 'flips': flips}
    sets = [(name, seed) for name in c.categories for seed in c.seeds]
    records, pool, of_n = pairs(c, like.tokenizer, sets, c.pairs, split='train', **labels)
    held_sets = [(name, 0) for name in c.categories]
    held_records, held, _ = pairs(c, like.tokenizer, held_sets, c.test_pairs, split='test',
                                  labels='gold')  # fmt: skip
    seed_n = np.array([sets[i][1] for i in of_n])
    first_n = first(records)
    width, parts = like.config.D, sharding.data_parallel(mesh)
    shape = dmoerm.shape_of(pool, width, c.train_batch_size, parts)
    wide = dmoerm.shape_of(dmoerm.joined([pool, held]), width, 32)
    rm = reward.RewardModel(decoder, heads.Scalar())
    return World(c, rm, like.backbone, like.tokenizer, mesh, records, pool, seed_n, first_n,
                 held_records, held, shape, wide)  # fmt: skip


def first(records: Sequence[Preference]) -> Array:
    """[n] bool: those of the 60 % of the prompts that the bases learn from."""
    kept, _ = data.split_by_prompt(records, 0.4, seed=0)
    return np.isin(np.arange(len(records)), kept)


def pairs(
    c: Any, tokenizer: Any, sets: Sequence[tuple[str, int]], n: int, **how: Any
) -> tuple[list[Preference], tokens.Tokens, Array]:
    """n ordered pairs of each (category, seed) that are short enough, and of which set each is."""
    records, of = [], []
    for i, (name, seed) in enumerate(sets):
        got = synthetic.preferences(round(1.3 * n) + 9, seed=seed, categories=(name,), **how)
        got = [record for record in got if record.ranks == (0, 1)]
        records += got
        of += [i] * len(got)
    found = tokens.encode(records, tokenizer, max_length=c.max_length).tokens
    of_n = np.array(of)[found.record]
    at = np.concatenate([np.flatnonzero(of_n == i)[:n] for i in range(len(sets))])
    if len(at) < n * len(sets):
        raise ValueError(f'max_length: found {len(at)} short pairs, expected {n * len(sets)}')
    some = tokens.select(found, at)
    return [records[i] for i in some.record], some, of_n[at]


def objective(w: World) -> train.Objective:
    return train.preference(w.rm.score)


def kept(w: World, name: str, make: Callable[[], tree.Tree]) -> tree.Tree:
    """Parameters of an earlier cell of the same flags, from the output folder, or made for it."""
    path = w.c.output_dir / f'{name}-{cache.digest(stored.flags(w.c))[:8]}.npz'
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        flat = tree.flatten(jax.device_get(make()))
        np.savez(path.with_suffix('.part.npz'), **flat)
        path.with_suffix('.part.npz').replace(path)
    with np.load(path) as file:
        return tree.unflatten(dict(file))


# Whole models


def trained(w: World, lessons: Sequence[tuple[Array, int]], epochs: int | None = None) -> tree.Tree:
    """Whole models [E], each of rows of the pool with a seed."""
    return taught_whole(w, [(tokens.select(w.pool, rows), seed) for rows, seed in lessons], epochs)


def taught_whole(
    w: World, lessons: Sequence[tuple[tokens.Tokens, int]], epochs: int | None = None
) -> tree.Tree:
    """Whole models [E], each of pairs with a seed."""
    c = w.c
    pace = Pace(c.learning_rate, epochs or c.num_train_epochs, c.train_batch_size)
    start_E = dmoerm.whole(w.rm, w.backbone, [seed for _, seed in lessons], w.rm.backbone.config.D)
    given = [Lesson(some, seed) for some, seed in lessons]
    return dmoerm.learned(pace, start_E, given, w.shape, objective(w), mesh=w.mesh)


@functools.cache
def forward(rm: reward.RewardModel) -> Callable[..., Any]:
    return jax.jit(members.scored(rm.score))


def scores(w: World, params_E: tree.Tree, some: tokens.Tokens, shape: Any = None) -> Array:
    """[E, c] of whole models."""
    packs = sharding.data_parallel(w.mesh)
    return members.scores(forward(w.rm), {}, params_E, some, shape or w.wide, mesh=w.mesh,
                          packs=packs)  # fmt: skip


def singles(w: World, flips: float) -> tree.Tree:
    """A model of all categories together for each seed."""
    lessons = [(w.rows(s), 1000 * s) for s in w.c.seeds]
    return kept(w, f'single-{flips}', lambda: trained(w, lessons))


def ensembles(w: World, flips: float) -> tree.Tree:
    """S x K such models, those of `singles` the first of each seed."""
    others = range(1, w.c.members)
    lessons = [(w.rows(s), 1000 * s + k) for s in w.c.seeds for k in others]
    more = kept(w, f'others-{flips}', lambda: trained(w, lessons))

    def joined(one_S: Array, more_SK: Array) -> Array:
        more_SK = more_SK.reshape(len(one_S), len(others), *one_S.shape[1:])
        both = np.concatenate([one_S[:, None], more_SK], axis=1)
        return both.reshape(-1, *one_S.shape[1:])

    return jax.tree.map(joined, singles(w, flips), more)


def specialists(w: World, flips: float, part: bool | None = None) -> tree.Tree:
    """G models, each of one category; with `part` of 60 % of its prompts, the task bases."""
    lessons = [(w.rows(s, k, part), 1000 * s) for s, k in w.groups()]
    name = 'specialists' if part is None else 'bases'
    epochs = None if part is None else w.c.base_epochs
    return kept(w, f'{name}-{flips}', lambda: trained(w, lessons, epochs))


# Labels of a judge


@functools.cache
def _judge(noise: float, waver: float, position: float, garbage: float) -> stand_in.Judge:
    return stand_in.judge(noise=noise, waver=waver, position=position, garbage=garbage)


def winners(
    w: World, capabilities: Sequence[str | None], *, swap: bool = True, held: bool = False
) -> tuple[dict[Any, Array], dict[str, Any]]:
    """By capability the winner of each pair, -1 for none or of another category; statistics."""
    c, records = w.c, w.held_records if held else w.records
    points = None if None in capabilities else {
        name: dict.fromkeys(c.capabilities[name], '') for name in c.categories
    }  # fmt: skip
    answer = _judge(c.judge_noise, c.judge_waver, c.judge_position, c.judge_garbage)
    found = list(judge.verdicts(judge.comparisons(records, points), answer))
    out = {name: np.full(len(records), -1) for name in capabilities}
    for verdict in found:
        if (winner := verdict.winner(swap=swap)) is not None:
            out[verdict.asked.capability][verdict.asked.record] = winner
    said = {k: x._asdict() for k, x in judge.statistics(found, records).items()}
    return out, said


# Inner models


class Inner(NamedTuple):
    """Inner models of groups: their experts [G x E] and MLPs [G], on bases [G]."""

    base_G: tree.Tree
    expert_E: tree.Tree
    head_G: tree.Tree
    count: int

    def params(self, g: int) -> tree.Tree:
        mine = slice(g * self.count, (g + 1) * self.count)
        return {
            'backbone': members.select(self.base_G, g)['backbone'],
            'experts': jax.tree.map(lambda x: x[mine], self.expert_E),
            'head': members.select(self.head_G, g),
        }


def taught(
    w: World, name: str, base_G: tree.Tree, lessons: Sequence[Sequence[tokens.Tokens]],
    mixing: Sequence[Array],
) -> Inner:  # fmt: skip
    """Inner models: experts of each group's lessons, MLPs of rows of the pool with human labels.

    The experts of all groups learn in one program, each on the base of its group.
    """
    c, G, count = w.c, len(lessons), len(lessons[0])
    bases = [members.select(base_G, g) for g in range(G)]
    start_E = dmoerm.experts(bases, count, seeds=range(G), rank=c.lora_r, targets=r'/(q|v)/')
    flat = [Lesson(x, 10 * g + e, g) for g, of in enumerate(lessons) for e, x in enumerate(of)]
    pace = Pace(c.expert_learning_rate, c.expert_epochs, c.train_batch_size)
    expert_E = kept(w, f'{name}-experts', lambda: dmoerm.learned(
        pace, start_E, flat, w.shape, objective(w), mesh=w.mesh,
        frozen={'backbone': base_G['backbone']}, own=True,
    ))  # fmt: skip
    none = Inner(base_G, expert_E, {'none': np.zeros(G)}, count)

    def heads_of() -> tree.Tree:
        model, parts = dmoerm.mixture_of(w.rm), []
        for g, at in enumerate(mixing):
            some = tokens.select(w.pool, at)
            of = dmoerm.cached(model, none.params(g), some, w.wide, w.mesh)
            held_n = np.random.default_rng(g).random(len(at)) < 0.3
            parts.append(dmoerm.split(of, some, held_n, g))
        return dmoerm.mixed(dmoerm.Mixing(), model, parts, w.mesh)

    return none._replace(head_G=kept(w, f'{name}-heads', heads_of))


class Said(NamedTuple):
    """What an inner model says of answers: its scores, and each expert's own."""

    score_c: Array
    rate_cE: Array


def says(w: World, inner: Inner, g: int, some: tokens.Tokens, shape: Any = None) -> Said:
    """The model of a group on any records."""
    model, params = dmoerm.mixture_of(w.rm), inner.params(g)
    of = dmoerm.cached(model, params, some, shape or w.wide, w.mesh)
    score_c = features.candidate_scores(compiled(model), {'head': params['head']}, of, some,
                                        mesh=w.mesh)  # fmt: skip
    z_cED = of.answer_cD.reshape(len(of.answer_cD), inner.count, -1)
    kernel_ED = np.asarray(params['experts']['head']['kernel'])[..., 0]
    return Said(score_c, np.einsum('ced,ed->ce', z_cED, kernel_ED))


@functools.cache
def compiled(model: mixture.Mixture) -> Callable[..., Any]:
    return jax.jit(features.scored(model.rewards))


def linear(w: World, inner: Inner, g: int, at: Array, rate_cE: Array) -> Array:
    """[c] by the best linear map of the experts' own scores, on rows of the pool."""
    some = tokens.select(w.pool, at)
    weight_E = gating.best_weights(says(w, inner, g, some).rate_cE, some, negative=True)
    return rate_cE @ weight_E


# The router


def prompts(w: World, records: Sequence[Preference]) -> tokens.Tokens:
    """What the router reads, with groups numbered as the categories."""
    asked = [mixture.asked(record) for record in records]
    found = tokens.encode(asked, w.tokenizer)
    number = np.array([w.c.categories.index(name) for name in found.groups])
    return found.tokens._replace(group=number[found.tokens.group].astype(np.int32))


def routes(w: World) -> tuple[Array, list[float]]:
    """[S, n] the routers' categories of held-out prompts, and how often each is right."""
    model = reward.RewardModel(w.rm.backbone, heads.Router(len(w.c.categories)))
    asked, held = prompts(w, w.records), prompts(w, w.held_records)
    width = w.rm.backbone.config.D
    parts = sharding.data_parallel(w.mesh)
    shape = dmoerm.shape_of(dmoerm.joined([asked, held]), width, 16, parts)
    lessons = [
        Lesson(tokens.select(asked, np.flatnonzero((w.seed_n == s) & w.first_n)), s)
        for s in w.c.seeds
    ]
    start_E = dmoerm.whole(model, w.backbone, w.c.seeds, width)
    params_E = dmoerm.learned(Pace(1e-3), start_E, lessons, shape,
                              train.classification(model.score), mesh=w.mesh)  # fmt: skip
    compiled = jax.jit(model.score)
    route_Sn = []
    for i in range(len(w.c.seeds)):
        mine, found = members.select(params_E, i), np.zeros(len(held.prompt), int)
        for pack, logits in evaluate.passed(
            compiled, sharding.place(mine, w.mesh),
            packing.in_order(held, shape, parts), w.mesh,
        ):  # fmt: skip
            record_B = pack.record_PB.reshape(-1)
            found[record_B[record_B >= 0]] = np.asarray(logits).argmax(-1)[record_B >= 0]
        route_Sn.append(found)
    accuracy = [float((route_n == held.group).mean()) for route_n in route_Sn]
    return np.stack(route_Sn), accuracy
