"""MetaRM: training that looks at answers of a policy that has moved on, without labels.

Secrets of RLHF II (arXiv 2401.06080), algorithm 1; MetaRM (arXiv 2405.00438). J says how far apart
a model scores the answers to one prompt. A step climbs J from theta to theta', takes the gradient
of the loss there, and applies it to theta. To first order that is grad L + eta H_L grad J, which
beside a plain step moves J by -eta (learning rate) grad J' H_L grad J: down, wherever the loss
curves upwards. `effect` measures it; `step` also has the steps that do raise J.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxrm import losses, packing, train, tree
from jaxrm.tokens import Tokens, select


def spread(score: Callable[..., jax.Array]) -> train.Objective:
    """J: mean over the prompts with two answers or more of `losses.difference`; to be climbed."""

    def objective(
        params: tree.Tree, pack: packing.Pack, key: jax.Array
    ) -> tuple[jax.Array, train.Metrics]:
        rank_BM = pack.rank_PBM.reshape(-1, pack.rank_PBM.shape[2])
        apart_B = losses.difference(score(params, pack), rank_BM)
        count = ((rank_BM >= 0).sum(1) > 1).sum()
        return apart_B.sum() / jnp.maximum(count, 1), {'count': count}

    return objective


def _dot(a: tree.Tree, b: tree.Tree) -> jax.Array:
    return optax.tree.sum(jax.tree.map(lambda x, y: jnp.sum(x * y, dtype=jnp.float32), a, b))


def _unit(slope: tree.Tree) -> tree.Tree:
    square = _dot(slope, slope)
    rate = jnp.where(square > 0, jax.lax.rsqrt(jnp.where(square > 0, square, 1)), 0)
    return jax.tree.map(lambda g: rate * g, slope)


# What eta is times, made of the gradient of J.
INNER: dict[str, Callable[[tree.Tree], tree.Tree]] = {
    'sgd': lambda slope: slope,
    'normalised_sgd': _unit,  # of length 1 over all leaves
    'adam': lambda slope: jax.tree.map(lambda g: g / (jnp.abs(g) + 1e-8), slope),  # its first step
}
APPLY_TO = ('theta', 'theta_prime', 'joint')
ORDERS = ('first', 'second')


def step(
    state: train.State,
    frozen: tree.Tree,
    batch: tuple[Any, Any],
    key: jax.Array,
    *,
    objective: train.Objective,
    tx: optax.GradientTransformation,
    spread: train.Objective,
    dtype: Any,
    eta: float = 5e-6,
    inner: str = 'sgd',
    apply_to: str = 'theta',
    order: str = 'first',
    after: bool = False,
    microbatches: int = 1,
) -> tuple[train.State, train.Metrics]:
    """One update from a batch of pairs and one of sets; by default as published. Pure.

    The gradient of the loss at theta' = theta + eta INNER[inner](grad J) goes through `tx` and is
    applied to `theta`, or to `theta_prime`, which is then kept. The `second` order differentiates
    theta', too, which attention kernels do not allow, and holds what all microbatches of the sets
    leave behind. `joint` takes no inner step: it descends L - eta J. A negative eta descends J.

    Beside what `train.step` says: `spread` is J at theta, `cosine` that of the gradients of loss
    and J, `inner_step` |theta' - theta| / |theta|, `inner_unmoved` the share of the elements with a
    gradient of J that theta' leaves as they were once cast to `dtype`: the one that the model
    computes in, such as `rm.backbone.dtype`. With `after`, which costs a forward pass of the sets,
    `spread_after` is J at theta'; `effect` measures the whole step. At the published eta, 5e-6, an
    `inner_step` can be so small that the step is a plain one but for rounding: choose eta by it.
    """
    _check(inner, apply_to, order)
    pack, sets = batch
    key, theta = jax.random.fold_in(key, state.step), state.trainable
    gradients = partial(train.gradients, microbatches=microbatches)
    rate = 0.0 if apply_to == 'joint' else eta

    def climb(theta):
        before, slope = gradients(spread, theta, frozen, sets, jax.random.fold_in(key, 1))
        move = lambda p, d: _rounded(p + (rate * d).astype(p.dtype), p.dtype)  # noqa: E731
        return jax.tree.map(move, theta, INNER[inner](slope)), (before['loss'], slope)

    if order == 'first':
        ahead, (before, slope) = climb(theta)
    else:
        ahead, pull, (before, slope) = jax.vjp(climb, theta, has_aux=True)
    metrics, grads = gradients(objective, ahead, frozen, pack, key)
    metrics |= {'spread': before, 'cosine': _cosine(grads, slope)}
    if order == 'second':
        (grads,) = pull(grads)
    if apply_to == 'joint':
        grads = jax.tree.map(lambda g, s: g - eta * s, grads, slope)
    else:
        metrics |= _moved(theta, ahead, slope, dtype)
    if after:
        metrics['spread_after'] = spread({**frozen, **ahead}, sets, key)[0]
    base = ahead if apply_to == 'theta_prime' else theta
    updates, opt = tx.update(grads, state.opt, base)
    new = train.State(state.step + 1, optax.apply_updates(base, updates), opt)
    return new, {**metrics, 'grad_norm': optax.tree.norm(grads)}


def _check(inner: str, apply_to: str, order: str) -> None:
    given = {'inner': (inner, INNER), 'apply_to': (apply_to, APPLY_TO), 'order': (order, ORDERS)}
    for name, (found, known) in given.items():
        if found not in known:
            raise ValueError(f'{name}: found {found!r}, expected one of {sorted(known)}')
    if apply_to == 'joint' and (inner, order) != ('sgd', 'first'):
        raise ValueError(f'joint: found {inner!r} of {order!r} order, but it has no inner step')


def _rounded(x: jax.Array, dtype: Any) -> jax.Array:
    """To what `dtype` holds, in earnest: a compiler may leave out a cast there and back."""
    info = jnp.finfo(dtype)
    return jax.lax.reduce_precision(x, exponent_bits=info.nexp, mantissa_bits=info.nmant)


def _cosine(a: tree.Tree, b: tree.Tree) -> jax.Array:
    size = optax.tree.norm(a) * optax.tree.norm(b)
    return _dot(a, b) / jnp.where(size > 0, size, 1)


def _moved(theta: tree.Tree, ahead: tree.Tree, slope: tree.Tree, dtype: Any) -> train.Metrics:
    """How far theta' is from theta, and in how many elements it is not."""
    gap = jax.tree.map(lambda a, p: a.astype(jnp.float32) - p, ahead, theta)
    felt = jax.tree.map(lambda g: g != 0, slope)
    same = lambda a, p, f: f & (_rounded(a, dtype) == _rounded(p, dtype))  # noqa: E731
    stays = jax.tree.map(same, ahead, theta, felt)
    total = lambda x: sum(leaf.sum(dtype=jnp.float32) for leaf in jax.tree.leaves(x))  # noqa: E731
    return {
        'inner_step': optax.tree.norm(gap) / optax.tree.norm(theta),
        'inner_unmoved': total(stays) / jnp.maximum(total(felt), 1),
    }


def check_moved(done: int, state: Any, metrics: train.Metrics) -> None:
    """A hook: ValueError where the inner step left over 99 % of what it was to move as it was.

    The step is then a plain one at a higher price: eta is below what the numbers can hold. Steps
    without an inner step, such as `joint`, have nothing to check: ValueError, too.
    """
    if 'inner_unmoved' not in metrics:
        found = f'step {done}: found no inner_unmoved in {sorted(metrics)}'
        raise ValueError(f'{found}, expected a step that has an inner step, which joint has not')
    share_E = np.atleast_1d(metrics['inner_unmoved'])
    share = max(share_E[~np.isnan(share_E)], default=0.0)  # a member that takes no part has NaN
    if share > 0.99:
        found = f'found {share:.2%} of the elements with a gradient of J not moved'
        raise ValueError(f'step {done}: inner step: {found}, expected at most 99 %: raise eta')


class Effect(NamedTuple):
    """What a step does to J, and what a plain one from the same state does."""

    ours: jax.Array
    plain: jax.Array


def effect(
    state: train.State,
    frozen: tree.Tree,
    batch: tuple[Any, Any],
    key: jax.Array,
    *,
    objective: train.Objective,
    tx: optax.GradientTransformation,
    spread: train.Objective,
    held: Any = None,
    **options: Any,
) -> Effect:
    """The gain in J on the batch's sets, or on `held` others; `options` are those of `step`."""
    given = {'objective': objective, 'tx': tx}
    ours, _ = step(state, frozen, batch, key, spread=spread, **given, **options)
    plain, _ = train.step(state, frozen, batch[0], key, **given)
    sets = batch[1] if held is None else held
    J = lambda at: spread({**frozen, **at.trainable}, sets, key)[0]  # noqa: E731
    return Effect(J(ours) - J(state), J(plain) - J(state))


# Data


class Batches(NamedTuple):
    """Batches of pairs and of sets side by side; i asks for both, so that it is a pure function."""

    pairs: Callable[[int], packing.Pack]
    sets: Callable[[int], packing.Pack]

    def __call__(self, i: int) -> tuple[packing.Pack, packing.Pack]:
        return self.pairs(i), self.sets(i)


def unlabelled(tokens: Tokens) -> Tokens:
    """Sets of different answers: every rank is 0, and an answer that came before is absent.

    Two equal answers always score alike. A record left with one is dropped; ValueError for all.
    """
    rank = np.where(tokens.rank >= 0, 0, -1).astype(np.int32)
    for i, first in enumerate(tokens.first[:-1]):
        own = tokens.ids[tokens.start[i] + tokens.prompt[i] : tokens.start[i + 1]]
        ends = np.cumsum(tokens.length[first : tokens.first[i + 1]])
        seen = set()
        for c, text in enumerate(np.split(own, ends[:-1]), first):
            if rank[c] == 0 and text.tobytes() in seen:
                rank[c] = -1
            elif rank[c] == 0:
                seen.add(text.tobytes())
    several = np.add.reduceat(rank >= 0, tokens.first[:-1], dtype=np.int64) > 1
    if not several.any():
        raise ValueError(f'sets: found no two different answers in {len(several)} records')
    return select(tokens._replace(rank=rank), np.flatnonzero(several))
