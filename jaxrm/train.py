"""Training: objectives, one pure step, and the loop around it."""

import queue
import re
import threading
from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from jaxrm import losses, sharding, tree
from jaxrm.packing import Pack

Metrics = dict[str, jax.Array]
# (params, batch, key) -> (mean, metrics); metrics['count'] says over how many the mean is taken
Objective = Callable[[tree.Tree, Any, jax.Array], tuple[jax.Array, Metrics]]
Hook = tuple[int, Callable[['int', 'State', Metrics], None]]
# step(state, frozen, batch, key, *, objective, tx, ...) -> (state, metrics), such as `step`
Step = Callable[..., tuple['State', Metrics]]


class State(NamedTuple):
    """What a step changes: the number of steps done, the learning parts, the optimiser's memory."""

    step: jax.Array
    trainable: tree.Tree
    opt: Any


def preference(
    score: Callable[..., jax.Array],
    loss: Callable[..., jax.Array] = losses.bradley_terry,
    *,
    center_rewards_coefficient: float = 0.0,
    dropout: float = 0.0,
) -> Objective:
    """Objective: mean over the prompts that have an ordered pair of `loss` on `score`.

    Metrics carry TRL's names; accuracy, margin and mean reward are averaged by prompt, pairs that
    score equal count as wrong and are also reported as `ties`.
    """

    def objective(params: tree.Tree, pack: Pack, key: jax.Array) -> tuple[jax.Array, Metrics]:
        score_BM = score(params, pack, **_drop(dropout, key))
        return _preference(score_BM, pack, loss, center_rewards_coefficient)

    return objective


def _drop(rate: float, key: jax.Array) -> dict[str, Any]:
    return {'dropout': rate, 'key': key} if rate else {}


def _merge(x: jax.Array) -> jax.Array:
    """[P, B, ...] -> [B, ...], B over all packs."""
    return x.reshape(-1, *x.shape[2:])


def _preference(
    score_BM: jax.Array, pack: Pack, loss: Callable[..., jax.Array], centering: float
) -> tuple[jax.Array, Metrics]:
    rank_BM = _merge(pack.rank_PBM)
    margin_BM, smoothing_B = _merge(pack.margin_PBM), _merge(pack.smoothing_PB)
    loss_B = loss(score_BM, rank_BM, margin_BM=margin_BM, smoothing_B=smoothing_B)
    if centering:
        loss_B += centering * losses.centering(score_BM, rank_BM)
    count = (losses.pairs(rank_BM) > 0).sum()
    mean = lambda x_B: x_B.sum() / jnp.maximum(count, 1)  # noqa: E731
    metrics = {name: mean(f(score_BM, rank_BM)) for name, f in STATISTICS.items()}
    return mean(loss_B), metrics | _extremes(score_BM, rank_BM) | {'count': count}


def generative(
    score_and_logits: Callable[..., tuple[jax.Array, jax.Array]],
    loss: Callable[..., jax.Array] = losses.bradley_terry,
    *,
    lm_coefficient: float,
    beta: float = 0.1,
    center_rewards_coefficient: float = 0.0,
    dropout: float = 0.0,
) -> Objective:
    """Objective: (1 - a) of `preference`'s and a = `lm_coefficient` of `losses.generation`.

    GRM's with the SFT term (arXiv 2406.10216): the features that score stay those of a language
    model. score_and_logits(params, pack) is [B, M] and [P, N, V]. Metrics also have `lm_loss`.
    """

    def objective(params: tree.Tree, pack: Pack, key: jax.Array) -> tuple[jax.Array, Metrics]:
        score_BM, logits_PNV = score_and_logits(params, pack, **_drop(dropout, key))
        value, metrics = _preference(score_BM, pack, loss, center_rewards_coefficient)
        nll_PN, _ = losses.next_token(logits_PNV, pack.ids_PN, pack.pos_PN)
        owner_PN, prompts = best_answers(pack), pack.rank_PBM.shape[1]
        text_PB = losses.generation(losses.log_probability(nll_PN, owner_PN, prompts), beta=beta)
        has_PB = losses.pairs(_merge(pack.rank_PBM)).reshape(text_PB.shape) > 0
        text = jnp.where(has_PB, text_PB, 0).sum() / jnp.maximum(metrics['count'], 1)
        return (1 - lm_coefficient) * value + lm_coefficient * text, metrics | {'lm_loss': text}

    return objective


def best_answers(pack: Pack) -> jax.Array:
    """[P, N] the prompt of whose best answers a token is part, -1 for all others.

    An answer is what follows the token that closes the last user turn. Tokens that candidates share
    stand in the stream as the first one's: of a best answer that is not the record's first, those
    are missing. Pairs have it first.
    """
    rank_PBM, rows = pack.rank_PBM, sum(slot.shape[1] for slot in pack.slot)
    P, B, _ = rank_PBM.shape
    ordered_PBMM = losses.ordered(_merge(rank_PBM)).reshape(P, B, *rank_PBM.shape[2:] * 2)
    best_PBM = ordered_PBMM.any(3) & ~ordered_PBMM.any(2)
    owner_PBM = jnp.where(best_PBM, jnp.arange(B)[None, :, None], -1)
    none_R = jnp.full(rows + 1, -1)
    owner_PR = jax.vmap(lambda row, owner: none_R.at[row].max(owner))(pack.row_PBM, owner_PBM)
    # The row of every slot of all classes end to end, and one past the end for padding.
    row = np.repeat(np.arange(rows), [s.shape[2] for s in pack.slot for _ in range(s.shape[1])])
    row_PN = jnp.asarray(np.append(row, rows))[pack.back_PN]
    take = jax.vmap(lambda x, i: x[i])
    gate_PR = take(pack.pos_PN, jnp.concatenate(pack.read, axis=1)[..., 0])
    gate_PR = jnp.pad(gate_PR, ((0, 0), (0, 1)))
    return jnp.where(pack.pos_PN > take(gate_PR, row_PN), take(owner_PR, row_PN), -1)


def regression(rate: Callable[..., jax.Array], *, dropout: float = 0.0) -> Objective:
    """Objective: mean over all ratings that there are of `losses.regression`.

    rate(params, pack) is [B, M, J], such as the score of a model with a MultiObjective head.
    """

    def objective(params: tree.Tree, pack: Pack, key: jax.Array) -> tuple[jax.Array, Metrics]:
        rate_BMJ = rate(params, pack, **_drop(dropout, key))
        loss_BMJ, here_BMJ = losses.regression(rate_BMJ, _merge(pack.rating_PBMJ))
        count = here_BMJ.sum()
        return loss_BMJ.sum() / jnp.maximum(count, 1), {'count': count}

    return objective


def classification(logits: Callable[..., jax.Array], *, dropout: float = 0.0) -> Objective:
    """Objective: mean over the prompts of a group of -log softmax(logits)[group].

    logits(params, pack) is [B, C], such as the score of a model with a Router head; the groups of
    `pack` are numbered as its categories.
    """

    def objective(params: tree.Tree, pack: Pack, key: jax.Array) -> tuple[jax.Array, Metrics]:
        logits_BC = logits(params, pack, **_drop(dropout, key))
        group_B = _merge(pack.group_PB)
        there_B, count = group_B >= 0, (group_B >= 0).sum()
        mean = lambda x_B: jnp.sum(x_B, where=there_B) / jnp.maximum(count, 1)  # noqa: E731
        loss_B = optax.softmax_cross_entropy_with_integer_labels(logits_BC, group_B)
        accuracy = mean((logits_BC.argmax(-1) == group_B).astype(jnp.float32))
        return mean(loss_B), {'accuracy': accuracy, 'count': count}

    return objective


def _ranked(rank_BM: jax.Array) -> jax.Array:
    """[B, M] bool: the candidate stands in an ordered pair."""
    ordered_BMM = losses.ordered(rank_BM)
    return ordered_BMM.any(1) | ordered_BMM.any(2)


def _mean_reward(score_BM: jax.Array, rank_BM: jax.Array) -> jax.Array:
    """[B] mean score of the candidates that stand in an ordered pair."""
    here_BM = _ranked(rank_BM)
    return jnp.sum(score_BM, axis=1, where=here_BM) / jnp.maximum(here_BM.sum(1), 1)


STATISTICS = {
    'accuracy': losses.accuracy,
    'margin': losses.margin,
    'ties': losses.ties,
    'mean_reward': _mean_reward,
}


def _extremes(score_BM: jax.Array, rank_BM: jax.Array) -> Metrics:
    here_BM = _ranked(rank_BM)
    return {
        'min_reward': jnp.min(score_BM, initial=jnp.inf, where=here_BM),
        'max_reward': jnp.max(score_BM, initial=-jnp.inf, where=here_BM),
    }


def language_modelling(logits: Callable[..., jax.Array]) -> Objective:
    """Objective: mean over tokens of -log p(next token); logits(params, pack) -> [P, N, V]."""

    def objective(params: tree.Tree, pack: Pack, key: jax.Array) -> tuple[jax.Array, Metrics]:
        loss_PN, count_PN = losses.next_token(logits(params, pack), pack.ids_PN, pack.pos_PN)
        count = count_PN.sum()
        return loss_PN.sum() / jnp.maximum(count, 1), {'count': count}

    return objective


def _split(batch: Any, parts: int) -> Any:
    """Part a is packs a, a + parts, ...: each part is spread over the devices as the batch is."""

    def split(x):
        if x.shape[0] % parts:
            raise ValueError(f'microbatches: {parts}, expected a divisor of {x.shape[0]} packs')
        return x.reshape(x.shape[0] // parts, parts, *x.shape[1:]).swapaxes(0, 1)

    return jax.tree.map(split, batch)


def _combine(metrics: Metrics) -> Metrics:
    """One value of each metric from those of several micro-batches [A]."""
    count = metrics['count']
    weight = count / jnp.maximum(count.sum(), 1)
    reduce: dict[str, Any] = {'min_': jnp.min, 'max_': jnp.max, 'count': jnp.sum}
    mean: Any = lambda x: jnp.sum(jnp.where(count > 0, x, 0) * weight)  # noqa: E731
    return {
        name: next((f for start, f in reduce.items() if name.startswith(start)), mean)(x)
        for name, x in metrics.items()
    }


def gradients(
    objective: Objective, trainable, frozen, batch, key, *, microbatches: int = 1
) -> tuple[Metrics, tree.Tree]:
    """(metrics and `loss`, gradient) of the objective over the whole batch.

    With `microbatches` the batch is taken in that many parts along P, one after the other, each
    weighted by its count: the result is that of one batch.
    """

    def one(part, key):
        loss = lambda t: objective({**frozen, **t}, part, key)  # noqa: E731
        (value, metrics), grads = jax.value_and_grad(loss, has_aux=True)(trainable)
        return {**metrics, 'loss': value}, grads

    if microbatches == 1:
        return one(batch, key)

    def body(total, xs):
        metrics, grads = one(*xs)
        weight = metrics['count'].astype(jnp.float32)
        return jax.tree.map(lambda t, g: t + weight * g, total, grads), metrics

    zero = jax.tree.map(jnp.zeros_like, trainable)
    parts = _split(batch, microbatches), jax.random.split(key, microbatches)
    total, metrics = jax.lax.scan(body, zero, parts)
    metrics = _combine(metrics)
    return metrics, jax.tree.map(lambda g: g / jnp.maximum(metrics['count'], 1), total)


def step(
    state: State, frozen: tree.Tree, batch: Any, key: jax.Array, *, objective, tx, microbatches=1
) -> tuple[State, Metrics]:
    """One update. Pure: (state, frozen, batch, key) -> (state, metrics)."""
    key = jax.random.fold_in(key, state.step)
    metrics, grads = gradients(
        objective, state.trainable, frozen, batch, key, microbatches=microbatches
    )
    updates, opt = tx.update(grads, state.opt, state.trainable)
    new = State(state.step + 1, optax.apply_updates(state.trainable, updates), opt)
    return new, {**metrics, 'grad_norm': optax.tree.norm(grads)}


def start(trainable: tree.Tree, tx: optax.GradientTransformation, mesh: Mesh) -> State:
    """The state before the first step, on the mesh; float32 copies of what the caller owns.

    Raises ValueError for a leaf that the mesh does not divide, before anything is placed.
    """

    def make(trainable):
        # A copy, since the first step donates it.
        trainable = jax.tree.map(lambda x: jnp.array(x, jnp.float32), trainable)
        return State(jnp.zeros((), jnp.int32), trainable, tx.init(trainable))

    out = sharding.shardings(jax.eval_shape(make, trainable), mesh)
    return jax.jit(make, out_shardings=out)(sharding.place(trainable, mesh))


def schedule(
    learning_rate: float, steps: int, *, warmup: int = 0, kind: str = 'linear'
) -> optax.Schedule:
    """Learning rate by step: up over `warmup`, then 'constant', or 'linear' or 'cosine' to 0."""
    rest = max(steps - warmup, 1)
    after = {
        'constant': optax.constant_schedule(learning_rate),
        'linear': optax.linear_schedule(learning_rate, 0.0, rest),
        'cosine': optax.cosine_decay_schedule(learning_rate, rest),
    }
    if kind not in after:
        raise ValueError(f'schedule: {kind!r}, expected one of {sorted(after)}')
    up = optax.linear_schedule(learning_rate / max(warmup, 1), learning_rate, max(warmup - 1, 1))
    return optax.join_schedules([up, after[kind]], [warmup]) if warmup else after[kind]


def adamw(
    learning_rate: optax.ScalarOrSchedule,
    *,
    weight_decay: float = 0.0,
    max_grad_norm: float = 1.0,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
) -> optax.GradientTransformation:
    """AdamW behind a clip of the global norm; norms, vectors and prototypes do not decay."""
    vector = re.compile(r'norm|/bias$|^prototypes/')  # by name: stacked layers have an axis more
    decays = lambda params: tree.map_named(lambda name, x: not vector.search(name), params)  # noqa: E731
    return optax.chain(
        optax.clip_by_global_norm(max_grad_norm),
        optax.adamw(learning_rate, b1, b2, eps, weight_decay=weight_decay, mask=decays),
    )


def _prefetch(make: Callable[[int], Any], indices: Sequence[int], depth: int = 2) -> Generator[Any]:
    """make(i) for every i, made ahead in a thread."""
    ready: queue.Queue[Any] = queue.Queue(depth)
    stop = threading.Event()

    def work():
        for i in indices:
            try:
                item: tuple[Any, BaseException | None] = (make(i), None)
            except BaseException as error:  # handed to the consumer, which raises it
                item = (None, error)
            while not stop.is_set():
                try:
                    ready.put(item, timeout=0.1)
                    break
                except queue.Full:
                    continue
            if stop.is_set() or item[1]:
                return

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    try:
        for _ in indices:
            batch, error = ready.get()
            if error:
                raise error
            yield batch
    finally:
        stop.set()
        thread.join()


def jitted(state: State, mesh: Mesh, *, step: Step = step, **options: Any) -> Step:
    """`step` with these options, compiled for the mesh; it donates its state."""
    out = sharding.shardings(state, mesh), sharding.everywhere(mesh)
    return jax.jit(partial(step, **options), donate_argnums=0, out_shardings=out)


def fit(
    state: State,
    frozen: tree.Tree,
    batches: Callable[[int], Pack],
    key: jax.Array,
    *,
    objective: Objective,
    tx: optax.GradientTransformation,
    mesh: Mesh,
    steps: int,
    step: Step = step,
    microbatches: int = 1,
    hooks: Sequence[Hook] = (),
) -> State:
    """The state after `steps` steps in all; `state` is donated.

    `step` makes one of them, with the signature of `train.step`; batches(i) is the batch of step i,
    on the host. A hook (every, fn) is called as fn(steps done, state, metrics) after every so many
    steps; arrays are still on the device, and a hook that reads the metrics just given waits for
    the step.
    """
    options = {'objective': objective, 'tx': tx, 'microbatches': microbatches}
    update = jitted(state, mesh, step=step, **options)
    frozen = sharding.place(frozen, mesh)
    indices = range(int(state.step), steps)
    load = lambda i: sharding.place_batch(batches(i), mesh)  # noqa: E731
    with closing(_prefetch(load, indices)) as loaded:  # ends its thread when a hook raises, too
        for done, batch in zip((i + 1 for i in indices), loaded, strict=True):
            with jax.set_mesh(mesh):
                state, metrics = update(state, frozen, batch, key)
            for every, fn in hooks:
                if done % every == 0:
                    fn(done, state, metrics)
    return state
