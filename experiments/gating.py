"""The gate of the ArmoRM experiments: how it learns on features, and what it has to beat.

What is frozen about an answer is its ratings: they are computed once, and all that a gate learns
from is J ratings an answer and the prompt's feature.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from scipy import stats
from scipy.optimize import minimize
from scipy.special import expit

from jaxrm import (
    evaluate,
    features,
    heads,
    intervals,
    members,
    reward,
    sharding,
    statistics,
    tokens,
    train,
    tree,
)

Array = np.ndarray
Pairs = tuple[features.Cached, tokens.Tokens]
Score = Callable[..., jax.Array]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Gating:
    """How the gate learns; by default as in ArmoRM's public script, softmax over the objectives.

    With `learning_rate` 1e-3 the scale of the score moves by about 1 in 2,000 steps. Where a good
    scale is much larger than `initial_scale`, the loss is all but linear in the weights, and the
    gate comes to choose one objective a prompt rather than to weigh them.
    """

    learning_rate: float = 1e-3
    lr_scheduler_type: Literal['cosine', 'linear', 'constant'] = 'cosine'
    weight_decay: float = 0.0
    max_steps: int = 2000
    train_batch_size: int = 1024  # prompts, drawn with replacement
    dropout: float = 0.2
    gating_temperature: float = 10.0
    gating_hidden_dim: int = 1024
    gating_n_hidden: int = 3
    initial_scale: float = 1.0
    learn_scale: bool = True
    script_softmax: bool = False  # over the pair, without the transform, as in the public script


class Lesson(NamedTuple):
    """What one gate learns from; ratings [c, J] are in the place of the answers' features."""

    rated: features.Cached
    pairs: tokens.Tokens
    seed: int
    scale: float | None = None  # to start from, where it is not the flag's


def plain(J: int) -> tree.Tree:
    """The head of answers whose features are their ratings."""
    one_JJ = np.eye(J, dtype=np.float32)
    return {'regression': {'kernel': one_JJ}, 'transform': one_JJ}


def rates(head: Mapping[str, Any], of: features.Cached, *, script: bool = False) -> Array:
    """[c, J] float32, freed from verbosity, unless as the public `script` has them."""
    rate_cJ = of.answer_cD.astype(np.float32) @ head['regression']['kernel']
    return rate_cJ if script else rate_cJ @ head['transform']


def rated(head: Mapping[str, Any], of: features.Cached, *, script: bool = False) -> features.Cached:
    """`of` with ratings for the answers' features."""
    return of._replace(answer_cD=rates(head, of, script=script))


def shuffled(pairs: Pairs, rng: np.random.Generator) -> Pairs:
    """The same, where the gate reads prompts of other pairs."""
    of, some = pairs
    return of._replace(prompt_nD=rng.permutation(of.prompt_nD)), some


def model(c: Gating, J: int) -> reward.RewardModel:
    """A model of features alone, without a backbone."""
    sizes = c.gating_hidden_dim, c.gating_n_hidden, c.gating_temperature
    return reward.RewardModel(None, heads.Gated(heads.Gate(J, *sizes, c.script_softmax)))


def start(rm: reward.RewardModel, D: int, *, seed: int, scale: float) -> tree.Tree:
    """A fresh gate for prompts of this width."""
    made = rm.init_gate(jax.random.key(seed), D)
    return {**made, 'scale': jnp.full_like(made['scale'], scale)}


def optimiser(c: Gating) -> tuple[Any, optax.GradientTransformation]:
    """The learning rate by step, and AdamW without a clip."""
    rate = train.schedule(c.learning_rate, c.max_steps, kind=c.lr_scheduler_type)
    tx = train.adamw(rate, weight_decay=c.weight_decay, max_grad_norm=np.inf)
    if c.learn_scale:
        return rate, tx
    scale = lambda params: tree.map_named(lambda name, _: name == 'gate/scale', params)  # noqa: E731
    return rate, optax.chain(tx, optax.masked(optax.set_to_zero(), scale))


def stream(
    c: Gating, of: features.Cached, pairs: tokens.Tokens, mesh: Any, seed: int
) -> features.Batches:
    """Batches of `train_batch_size` pairs in all."""
    packs = sharding.data_parallel(mesh)
    if c.train_batch_size % packs:
        raise ValueError(f'train_batch_size: {c.train_batch_size}, expected a multiple of {packs}')
    size = c.train_batch_size // packs
    return features.Batches(of, pairs, packs=packs, prompts=size, seed=seed)


def by_prompt(rm: reward.RewardModel) -> Score:
    """score_BM of (params, features.Batch): the weights are those of the prompt."""
    return features.scored(rm.rewards)


def fit(
    c: Gating, rm: reward.RewardModel, state: train.State, batches: Callable[[int], Any],
    key: jax.Array, *, mesh: Any, hooks: Sequence[train.Hook] = (), step: train.Step = train.step,
    score: Callable[[reward.RewardModel], Score] = by_prompt,
) -> tree.Tree:  # fmt: skip
    """The gate after all steps, learned from batches of ratings; nothing else learns."""
    objective = train.preference(score(rm), dropout=c.dropout)
    state = train.fit(
        state, {'head': plain(rm.head.gate.objectives)}, batches, key, objective=objective,
        tx=optimiser(c)[1], mesh=mesh, steps=c.max_steps, step=step, hooks=hooks,
    )  # fmt: skip
    return state.trainable['gate']


def learn(
    c: Gating, lessons: Sequence[Lesson], J: int, *, mesh: Any,
    score: Callable[[reward.RewardModel], Score] = by_prompt,
) -> tuple[reward.RewardModel, list[tree.Tree]]:  # fmt: skip
    """The model of ratings, and a gate for each lesson, all of them learned in one program."""
    rm, D = model(c, J), lessons[0].rated.prompt_nD.shape[1]
    made = [{'gate': start(rm, D, seed=x.seed, scale=x.scale or c.initial_scale)} for x in lessons]
    state = members.start(members.stack(made), optimiser(c)[1], mesh)
    batches = members.Batches([stream(c, x.rated, x.pairs, mesh, x.seed) for x in lessons])
    keys = members.keys([x.seed for x in lessons])
    gate_E = jax.device_get(
        fit(c, rm, state, batches, keys, mesh=mesh, step=members.step, score=score)
    )
    return rm, [members.select(gate_E, e) for e in range(len(lessons))]


@functools.cache
def _compiled(rm: reward.RewardModel, score: Callable[[reward.RewardModel], Score]) -> Score:
    return jax.jit(score(rm))


def scores(
    rm: reward.RewardModel, gate: tree.Tree, held: Pairs, mesh: Any, *,
    score: Callable[[reward.RewardModel], Score] = by_prompt,
) -> Array:  # fmt: skip
    """[c] of every answer, from its ratings."""
    params = {'head': plain(rm.head.gate.objectives), 'gate': gate}
    return features.candidate_scores(_compiled(rm, score), params, *held, mesh=mesh)


def right(score_c: Array, some: tokens.Tokens, *, ties: float = 0.0) -> Array:
    """[n] accuracy of each record, a tie so far right; NaN for one without an order.

    Of weights that are all 0 every pair is a tie, and a gate is no better for that: where those
    may come, half a tie is right.
    """
    rank, score = (evaluate.by_record(x_c, some) for x_c in (some.rank, score_c))
    found = evaluate.pairs(rank, score)
    return found.accuracy + ties * found.ties


# What weighs all prompts alike


def best_weights(rate_cJ: Array, some: tokens.Tokens, *, negative: bool = False) -> Array:
    """[J] weights with the least Bradley-Terry loss on the pairs: the best a constant gate can do.

    A gate has no `negative` weights. The loss is convex, so that this is found exactly.
    """
    at = statistics.ordered(evaluate.by_record(some.rank, some))
    gap_qJ = (rate_cJ[at.better] - rate_cJ[at.worse]).astype(np.float64)
    share_q = at.weight / at.weight.sum()

    def loss(w_J):
        z_q = gap_qJ @ w_J
        return share_q @ np.logaddexp(0, -z_q), -gap_qJ.T @ (share_q * expit(-z_q))

    bounds = None if negative else [(0, None)] * rate_cJ.shape[1]
    first_J = np.ones(rate_cJ.shape[1])
    return minimize(loss, first_J, jac=True, method='L-BFGS-B', bounds=bounds).x


def alike(learnt: Pairs, held: Pairs) -> dict[str, Array]:
    """Scores [c] of the held-out answers by weights that do not read the prompt.

    `learnt` and `held` are ratings of pairs.
    """
    (learnt_of, some), held_cJ = learnt, held[0].answer_cD
    best = functools.partial(best_weights, learnt_of.answer_cD, some)
    return {
        'uniform weights': held_cJ.mean(1),
        'best weights': held_cJ @ best(),
        'best weights of any sign': held_cJ @ best(negative=True),
    }


# Intervals


def over_seeds(x_s: Sequence[float]) -> intervals.Interval:
    """Mean and 95 % interval by Student's t of one value a seed."""
    mean, n = float(np.mean(x_s)), len(x_s)
    if n < 2:
        return intervals.Interval(mean, np.nan, np.nan)
    half = float(stats.t.ppf(0.975, n - 1) * np.std(x_s, ddof=1) / n**0.5)
    return intervals.Interval(mean, mean - half, mean + half)


def both_intervals(
    of: Mapping[Any, Sequence[Array]], prompts: Sequence[Any]
) -> dict[Any, tuple[str, str]]:
    """Of values by seed and record: their mean with its interval over prompts, and over seeds."""
    all_nK = np.stack([np.concatenate(x_sn) for x_sn in of.values()], axis=1)
    seeds = [over_seeds([x_n.mean() for x_n in x_sn]) for x_sn in of.values()]
    over = intervals.each(all_nK, prompts=prompts)
    each = zip(of, over, seeds, strict=True)
    return {name: (str(o), f'[{s.low:.3f}, {s.high:.3f}]') for name, o, s in each}
