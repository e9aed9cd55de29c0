"""Several models of one kind in one program: an ensemble's members, or a mixture's experts.

What learns has a leading axis of members; what is frozen is shared and stands in memory once. A
step of all is `train.fit(..., step=members.step)`, with batches of members and a key for each.

Letters: E members, P packs, c candidates.
"""

from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from jaxrm import costs, evaluate, packing, plan, processes, remat, train, tree
from jaxrm.backbones.layers import Config
from jaxrm.tokens import Tokens

Array = np.ndarray
# All at once, or one after the other in the memory of one. By default all at once, but on a CPU,
# whose caches do not hold that, one after the other; `choose` looks at the memory first.
How = Literal['vmap', 'scan']


# Trees and states


def keys(seeds: Sequence[int]) -> jax.Array:
    """A key for each seed, [E]."""
    return jax.vmap(jax.random.key)(np.asarray(seeds))


def init(make: Callable[[jax.Array], tree.Tree], seeds: Sequence[int]) -> tree.Tree:
    """make(key) for every seed, as one tree."""
    return jax.vmap(make)(keys(seeds))


def stack(trees: Sequence[tree.Tree]) -> tree.Tree:
    """Members made one by one, as one tree."""
    return jax.tree.map(lambda *x_E: jnp.stack(x_E), *trees)


def select(tree_E: tree.Tree, e: int) -> tree.Tree:
    """One member's tree."""
    return jax.tree.map(lambda x_E: x_E[e], tree_E)


def start(trainable_E: tree.Tree, tx: optax.GradientTransformation, mesh: Mesh) -> train.State:
    """`train.start` of all members, of which each has its own optimiser state."""
    return train.start(trainable_E, tx._replace(init=jax.vmap(tx.init)), mesh)


def average(tree_E: tree.Tree, weight_E: Sequence[float] | None = None) -> tree.Tree:
    """The model whose weights are the members' mean (WARM, arXiv 2401.12187), or weighted sum.

    An adapter's weights are the product of its factors: those of the result stand side by side, so
    that its rank is the sum of the members' ranks. Sums are in float32.
    """
    E = len(jax.tree.leaves(tree_E)[0])
    w_E = np.full(E, 1 / E) if weight_E is None else np.asarray(weight_E, np.float64)
    if w_E.shape != (E,) or not np.isclose(w_E.sum(), 1):
        raise ValueError(f'weights: found {w_E.tolist()}, expected {E} that sum to 1')

    def one(name, x_E):
        weight = jnp.asarray(w_E, jnp.float32).reshape(-1, *(1,) * (x_E.ndim - 1))
        weighted_E = weight * x_E.astype(jnp.float32)
        if not name.startswith('lora/'):
            out = weighted_E.sum(0)
        elif name.endswith('/a'):
            out = jnp.concatenate(list(x_E), axis=-1)
        else:
            out = jnp.concatenate(list(weighted_E), axis=-2)
        return out.astype(x_E.dtype)

    return tree.map_named(one, tree_E)


# Steps


class Batch(NamedTuple):
    """What every member learns from, arrays [P, E, ...], and who does: bool [P, E], None: all."""

    of: Any
    active_PE: Any


def step(
    state: train.State,
    frozen: tree.Tree,
    batch: Any,
    key: jax.Array,
    *,
    one: train.Step = train.step,
    how: How | None = None,
    **options: Any,
) -> tuple[train.State, train.Metrics]:
    """`one` for every member, with metrics [E]; `batch` is a `Batch`, or its arrays [P, E, ...].

    A member that is not active stays as it is, bit for bit, its optimiser's state too. Its metrics
    are NaN, or 0 where they are whole numbers; where some may not be, the metric `active` says who.
    """
    batch, active_PE = batch if isinstance(batch, Batch) else (batch, None)
    active_E = None if active_PE is None else active_PE.any(0)

    def member(mine, batch, key, active):
        before = train.State(state.step, *mine)
        after, metrics = one(before, frozen, batch, key, **options)
        if active is None:
            return after[1:], metrics
        keep = lambda new, old: jnp.where(active, new, old)  # noqa: E731
        said = {name: keep(x, _nothing(x)) for name, x in metrics.items()}
        return jax.tree.map(keep, after[1:], before[1:]), {**said, 'active': active}

    learnt_E, metrics_E = _over(how, member, state[1:], batch, key, active_E)
    return train.State(state.step + 1, *learnt_E), metrics_E


def choose(
    c: Config,
    method: costs.Method,
    shape: packing.Shape,
    mesh: Mesh,
    *,
    packs: int = 1,
    width: int = 2,
) -> How:
    """How the method's members take a step, by what memory holds; arguments as `remat.choose` has.

    Where the memory is not known it is what is done by default.
    """
    limit = processes.alone(lambda: remat.memory(mesh))
    if limit is None:
        return 'vmap' if _at_once(None) else 'scan'
    fits = remat.needed(c, method, shape, mesh, packs=packs, width=width) <= plan.SHARE * limit
    return 'vmap' if fits else 'scan'


def _at_once(how: How | None) -> bool:
    if how not in ('vmap', 'scan', None):
        raise ValueError(f'how: {how!r}, expected vmap or scan')
    return jax.default_backend() != 'cpu' if how is None else how == 'vmap'


def _nothing(x: jax.Array) -> jax.Array:
    return jnp.full_like(x, jnp.nan if jnp.issubdtype(x.dtype, jnp.floating) else 0)


def _over(
    how: How | None, fn: Callable[..., Any], mine_E, batch, key_E, active_E
) -> tuple[Any, Any]:
    """What fn(mine, batch, key, active) gives for each: what it is then, and more."""
    if _at_once(how):
        return jax.vmap(fn, in_axes=(0, 1, 0, 0))(mine_E, batch, key_E, active_E)

    by_member = jax.tree.map(lambda x_PE: x_PE.swapaxes(0, 1), batch)
    return jax.lax.map(lambda xs: fn(*xs), (mine_E, by_member, key_E, active_E))


class Batches:
    """Batch i of all members, from one source of batches each: a function of i alone if they are.

    Sources may be `packing.Batches.reordered`, one a member; of other data or labels; of features.
    Arrays of all members have the same shapes. Member e is active in the first `steps[e]` steps; by
    default always.
    """

    def __init__(self, of: Sequence[Callable[[int], Any]], steps: Sequence[int] | None = None):
        self.of, self.steps = list(of), steps
        if steps is not None and (len(steps) != len(self.of) or min(steps) < 1):
            raise ValueError(f'steps: found {list(steps)}, expected {len(self.of)} from 1 on')

    def __len__(self) -> int:
        """Steps until the last member is done; ValueError when they are endless."""
        if self.steps is None:
            raise ValueError('steps: None, so the number of steps has to be given')
        return max(self.steps)

    def __call__(self, i: int) -> Batch:
        last = [i + 1] * len(self.of) if self.steps is None else self.steps
        found = [of(min(i, n - 1)) for of, n in zip(self.of, last, strict=True)]
        batch = jax.tree.map(lambda *x_E: np.array(x_E).swapaxes(0, 1), *found)
        if self.steps is None:
            return Batch(batch, None)
        P = len(jax.tree.leaves(batch)[0])
        return Batch(batch, np.tile(i < np.array(last), (P, 1)))


# Scores


def each(
    fn: Callable[[tree.Tree, Any], Any], *, how: How | None = None, axis: int = 0
) -> Callable[[tuple[tree.Tree, tree.Tree], Any], Any]:
    """What fn(params, batch) gives for all members, on an axis of their own.

    A function of ((frozen, trainable_E), batch). All members see the same batch.
    """

    def all_of(params: tuple[tree.Tree, tree.Tree], batch: Any) -> Any:
        frozen, trainable_E = params
        member = lambda mine: fn({**frozen, **mine}, batch)  # noqa: E731
        if _at_once(how):
            return jax.vmap(member, out_axes=axis)(trainable_E)
        found = jax.lax.map(member, trainable_E)
        return jax.tree.map(lambda x_E: jnp.moveaxis(x_E, 0, axis), found)

    return all_of


def scored(
    score: evaluate.Score, *, how: How | None = None
) -> Callable[[tuple[tree.Tree, tree.Tree], Any], jax.Array]:
    """score_BME of ((frozen, trainable_E), batch), to be compiled for `scores`."""
    return each(score, how=how, axis=-1)


def scores(
    scored: Callable[[Any, packing.Pack], jax.Array],
    frozen: tree.Tree,
    trainable_E: tree.Tree,
    tokens: Tokens,
    shape: packing.Shape,
    *,
    mesh: Mesh,
    packs: int,
) -> Array:
    """[E, c] float32, the scores of every candidate; [E, c, J] of several ratings.

    `scored` is that function above, already compiled; see `evaluate.candidate_scores`.
    """
    params: Any = (frozen, trainable_E)
    found = evaluate.candidate_scores(scored, params, tokens, shape, mesh=mesh, packs=packs)
    return np.moveaxis(found, -1, 0)


def centred(score_Ec: Array) -> Array:
    """Each member's scores less their mean: offsets mean nothing, but WCO and UWO see them."""
    score_Ec = np.asarray(score_Ec, np.float64)
    return score_Ec - score_Ec.mean(1, keepdims=True)


def mean(score_Ec: Array) -> Array:
    """[c] float64, the members' mean."""
    return np.asarray(score_Ec, np.float64).mean(0)


def wco(score_Ec: Array) -> Array:
    """[c] float64, the worst case: the least of the members' scores."""
    return np.asarray(score_Ec, np.float64).min(0)


def uwo(score_Ec: Array, coefficient: float = 0.5) -> Array:
    """[c] float64, the mean less `coefficient` times the members' population variance.

    Of the scores themselves, as `wco`: arXiv 2310.02743. With a coefficient of 0 it is the mean.
    """
    score_Ec = np.asarray(score_Ec, np.float64)
    return score_Ec.mean(0) - coefficient * score_Ec.var(0)
