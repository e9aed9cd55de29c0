"""Objectives, the step and the loop: exact accumulation, frozen parts, schedules, hooks."""

import dataclasses
import functools
import logging
import re
import threading

import jax
import jax.numpy as jnp
import numpy as np
import optax
import plain
import pytest

from jaxrm import heads, lora, losses, packing, reward, sharding, train, tree
from jaxrm.backbones.layers import Decoder

SHAPE = packing.Shape(tokens=64, rows=((6, 8), (8, 16)), prompts=5, candidates=4)


def score(params, pack):
    """A cheap score of a candidate: of its last token and its prompt's closing one."""
    read_PRT = np.concatenate if isinstance(pack.read[0], np.ndarray) else jnp.concatenate
    read_PRT = read_PRT(pack.read, axis=1)
    take = jax.vmap(lambda x, i: x[i])
    ids_PBMT = take(take(pack.ids_PN, read_PRT), pack.row_PBM)
    x = params['backbone']['embed']['embedding'][ids_PBMT]
    z = jnp.tanh(x[..., 0, :] + 2 * x[..., 1, :])
    return (z @ params['head']['kernel'])[..., 0].reshape(-1, pack.row_PBM.shape[-1])


def parameters(seed=0):
    rng = np.random.default_rng(seed)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)  # noqa: E731
    return {'backbone': {'embed': {'embedding': draw(37, 4)}}, 'head': {'kernel': draw(4, 1)}}


def batch(seed=0, packs=8):
    """Packs with unequal numbers of prompts that have a pair, three of them with none at all."""
    t = plain.random_tokens([4, 3, 2, 4, 2, 1, 0, 3, 4, 2, 2], seed=seed)
    plan = [[0, 1], [2], [5, 6], [], [3, 4, 8], [7], [], [9, 10]]
    return packing.fill(t, [np.array(p, np.int64) for p in plan], SHAPE, count=packs)


def one_device():
    axes = (jax.sharding.AxisType.Auto,) * 3
    return jax.make_mesh((1, 1, 1), sharding.AXES, axis_types=axes, devices=jax.devices()[:1])


def statistics(score_BM, rank_BM):
    """The preference objective's numbers by loops over prompts."""
    by_prompt, rewards = [], []
    for x, rank in zip(np.asarray(score_BM, np.float64), rank_BM, strict=True):
        here = [m for m in range(len(x)) if rank[m] >= 0]
        pairs = [(i, j) for i in here for j in here if rank[i] < rank[j]]
        if not pairs:
            continue
        gaps = np.array([x[i] - x[j] for i, j in pairs])
        own = [x[m] for m in sorted({m for pair in pairs for m in pair})]
        rewards += own
        by_prompt.append(
            [
                np.logaddexp(0, -gaps).mean(),
                (gaps > 0).mean(),
                gaps.mean(),
                (gaps == 0).mean(),
                np.mean(own),
                np.mean([(x[i] + x[j]) ** 2 for i, j in pairs]),
            ]
        )
    names = ['loss', 'accuracy', 'margin', 'ties', 'mean_reward', 'centering']
    means = dict(zip(names, np.mean(by_prompt, 0), strict=True))
    ends = {'min_reward': min(rewards), 'max_reward': max(rewards)}
    return means | ends | {'count': len(by_prompt)}


def plain_loss(score_BM, rank_BM, margin_BM, smoothing_B):
    return losses.bradley_terry(score_BM, rank_BM)


OBJECTIVE = train.preference(score, plain_loss)


@functools.partial(jax.jit, static_argnames=('objective', 'microbatches'))
def gradients(trainable, pack, objective=OBJECTIVE, microbatches=1):
    return train.gradients(
        objective, trainable, {}, pack, jax.random.key(0), microbatches=microbatches
    )


@pytest.mark.parametrize('microbatches', [1, 2, 8])
@pytest.mark.parametrize('seed', range(3))
def test_metrics_equal_loops_with_and_without_microbatches(seed, microbatches):
    pack, w = batch(seed), parameters(seed)
    metrics, _ = gradients(w, pack, microbatches=microbatches)
    want = statistics(score(w, pack), pack.rank_PBM.reshape(-1, 4))
    centering = want.pop('centering')
    assert metrics.keys() == want.keys()
    for name in want:
        np.testing.assert_allclose(metrics[name], want[name], rtol=1e-5, atol=1e-6, err_msg=name)
    centred = train.preference(score, plain_loss, center_rewards_coefficient=0.25)
    metrics, _ = gradients(w, pack, objective=centred, microbatches=microbatches)
    np.testing.assert_allclose(metrics['loss'], want['loss'] + 0.25 * centering, rtol=1e-5)


@pytest.mark.parametrize('microbatches', [2, 4, 8])
def test_accumulation_equals_one_batch(microbatches):
    pack, w = batch(), parameters()
    objective = train.preference(score)
    _, want = gradients(w, pack, objective=objective)
    _, got = gradients(w, pack, objective=objective, microbatches=microbatches)
    for name, x in tree.flatten(want).items():
        tolerance = 1e-6 * float(jnp.abs(x).max())
        np.testing.assert_allclose(tree.flatten(got)[name], x, rtol=0, atol=tolerance, err_msg=name)


def test_a_batch_without_a_pair_has_no_gradient():
    t = plain.random_tokens([1, 0, 1])
    pack = packing.fill(t, [np.arange(3)], SHAPE, count=4)
    for parts in (1, 4):
        metrics, got = gradients(parameters(), pack, microbatches=parts)
        assert metrics['count'] == metrics['loss'] == 0
        assert not any(np.asarray(x).any() for x in jax.tree.leaves(got))


def test_margins_and_smoothing_reach_the_loss():
    pack, w = batch(), parameters()
    metrics, _ = gradients(w, pack, objective=train.preference(score))
    merge = lambda x: x.reshape(-1, *x.shape[2:])  # noqa: E731
    options = {'margin_BM': merge(pack.margin_PBM), 'smoothing_B': merge(pack.smoothing_PB)}
    rank_BM = merge(pack.rank_PBM)
    loss_B = losses.bradley_terry(score(w, pack), rank_BM, **options)
    has = np.asarray(losses.pairs(rank_BM)) > 0
    np.testing.assert_allclose(metrics['loss'], np.asarray(loss_B)[has].mean(), rtol=1e-5)


def test_microbatches_must_divide_the_packs():
    with pytest.raises(ValueError, match=r'microbatches: 3.* 8 packs'):
        gradients(parameters(), batch(), microbatches=3)


def test_microbatches_keep_every_device_busy():
    """Each part is spread over all devices: no device needs another's packs."""
    mesh = sharding.make_mesh()
    tx = optax.sgd(0.1)
    state = train.start(parameters(), tx, mesh)
    pack = jax.tree.map(lambda x: np.concatenate([x, x]), batch())
    pack = sharding.place_batch(pack, mesh)
    run = functools.partial(train.step, objective=OBJECTIVE, tx=tx, microbatches=2)
    out = sharding.shardings(state, mesh), None
    lowered = jax.jit(run, out_shardings=out).lower(state, {}, pack, jax.random.key(0))
    text = lowered.compile().as_text()
    moved = re.findall(r'all-gather|all-to-all|collective-permute', text)
    assert moved == []
    assert 'all-reduce' in text


# The real model, on one device and on meshes.

C = dataclasses.replace(plain.TINY, V=40, L=2)
RM = reward.RewardModel(Decoder(C), heads.Scalar(), lora_scale=0.5)


def real_parameters():
    pack = batch()
    shapes = jax.eval_shape(RM.backbone.init, jax.random.key(0), pack)['params']
    adapter = plain.random_tree(lora.init(shapes, jax.random.key(0), rank=2), 1, 0.5)
    head = plain.random_tree({'kernel': np.zeros((C.D, 1))}, 2)
    return {'backbone': plain.random_tree(shapes), 'lora': adapter, 'head': head}


@functools.cache
def real_gradients(mesh, parts=1):
    """Of every parameter, computed with parameters and packs placed on the mesh."""
    objective = train.preference(RM.score)
    run = functools.partial(train.gradients, objective, microbatches=parts)
    w = sharding.place(real_parameters(), mesh)
    pack = sharding.place_batch(batch(), mesh)
    out = None, sharding.shardings(w, mesh)
    metrics, got = jax.jit(run, out_shardings=out)(w, {}, pack, jax.random.key(0))
    return jax.device_get((metrics, got))


SLOW = [pytest.param(sizes, marks=pytest.mark.slow) for sizes in [(4, 1, 1), (1, 4, 1), (2, 1, 2)]]


@pytest.mark.parametrize('sizes', [(2, 2, 2), *SLOW])
def test_many_devices_equal_one(sizes):
    auto = (jax.sharding.AxisType.Auto,) * 3
    devices = jax.devices()[: int(np.prod(sizes))]
    mesh = jax.make_mesh(sizes, sharding.AXES, axis_types=auto, devices=devices)
    metrics, got = real_gradients(mesh)
    want_metrics, want = real_gradients(one_device())
    for name, x in want_metrics.items():
        np.testing.assert_allclose(metrics[name], x, rtol=1e-5, err_msg=name)
    for name, x in tree.flatten(want).items():
        own = np.abs(x).max()
        assert own > 0, name
        np.testing.assert_allclose(tree.flatten(got)[name] / own, x / own, atol=1e-5, err_msg=name)


@functools.cache
def epoch():
    """An epoch of variable data with LoRA and head learning: what `fit` did, and said."""
    t = plain.random_tokens([2, 3, 4, 1, 0, 2, 2, 3] * 3, seed=4)
    batches = packing.Batches(t, SHAPE, 8, seed=0, epochs=4)
    w = real_parameters()
    frozen = {'backbone': w['backbone']}
    trainable = {'lora': w['lora'], 'head': w['head']}
    before = jax.device_get((frozen, trainable))
    mesh, tx = sharding.make_mesh(), train.adamw(0.05, weight_decay=0.1)
    start = train.start(trainable, tx, mesh)
    placed = sharding.place(frozen, mesh)
    calls = []
    hooks = [
        (1, lambda done, state, metrics: calls.append(('every', done, metrics))),
        (2, lambda done, state, metrics: calls.append(('second', done, int(state.step)))),
    ]
    state = train.fit(
        start,
        placed,
        batches,
        jax.random.key(0),
        objective=train.preference(RM.score),
        tx=tx,
        mesh=mesh,
        steps=len(batches),
        hooks=hooks,
    )
    return len(batches), before, (placed, trainable), state, calls


def test_fit_compiles_once_calls_hooks_and_leaves_frozen_parts_alone(caplog):
    with jax.log_compiles(), caplog.at_level(logging.WARNING):
        steps, before, after, state, calls = epoch()
    compiled = [r.getMessage() for r in caplog.records if r.getMessage().startswith('Compiling')]
    assert sum('step' in message for message in compiled) == 1, compiled
    assert steps >= 3
    assert int(state.step) == steps
    assert [done for kind, done, _ in calls if kind == 'every'] == list(range(1, steps + 1))
    seconds = [(done, step) for kind, done, step in calls if kind == 'second']
    assert seconds == [(k, k) for k in range(2, steps + 1, 2)]
    # neither the frozen parts nor what the caller still owns has moved, to the bit
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(after), before)


def test_the_state_holds_what_learns_and_nothing_else():
    _, (frozen, trainable), _, state, _ = epoch()
    assert jax.tree.structure(state.trainable) == jax.tree.structure(trainable)
    assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(state.trainable))
    names = [sharding.leaf_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(state)]
    assert not [n for n in names if re.search('embed|norm|kernel', n) and 'head' not in n]
    moved = jax.tree.map(lambda a, b: bool((np.asarray(a) != b).any()), state.trainable, trainable)
    assert all(jax.tree.leaves(moved))
    moments = [n for n in names if '/mu/' in n]
    assert len(moments) == len(jax.tree.leaves(trainable))


def test_start_copies():
    """The first step donates the state: what it was made from must survive."""
    w, tx = parameters(), optax.sgd(0.1)
    mesh = one_device()
    mine = jax.device_put(w, jax.devices()[0])
    state = train.start(mine, tx, mesh)
    jax.jit(lambda s: jax.tree.map(lambda x: x + 1, s), donate_argnums=0)(state)
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(mine), jax.device_get(w))
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), w)
    masters = train.start(half, tx, mesh).trainable
    assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(masters))


def test_a_step_uses_another_key_each_time():
    def objective(params, pack, key):
        return (params['head']['kernel'] * 0).sum(), {'count': 1, 'draw': jax.random.uniform(key)}

    tx, key = optax.sgd(0.1), jax.random.key(1)
    state = train.start(parameters(), tx, one_device())
    draws = []
    for _ in range(2):
        state, metrics = train.step(state, {}, batch(), key, objective=objective, tx=tx)
        draws.append(float(metrics['draw']))
    assert draws[0] != draws[1]
    assert draws[0] == float(jax.random.uniform(jax.random.fold_in(key, 0)))


def fit(batches, steps, **options):
    tx, mesh = optax.sgd(0.1), sharding.make_mesh()
    options = {'objective': OBJECTIVE, 'tx': tx, 'mesh': mesh} | options
    state = train.start(parameters(), options['tx'], mesh)
    return train.fit(state, {}, batches, jax.random.key(0), steps=steps, **options)


def test_an_error_in_batches_surfaces_after_the_steps_before_it():
    done = []

    def batches(i):
        if i == 2:
            raise OSError('the disk is gone')
        return batch()

    with pytest.raises(OSError, match='the disk is gone'):
        fit(batches, 5, hooks=[(1, lambda k, state, metrics: done.append(k))])
    assert done == [1, 2]


def test_an_error_in_a_hook_ends_the_thread_that_reads_ahead():
    def hook(done, state, metrics):
        raise KeyError('hook')

    before = threading.active_count()
    with pytest.raises(KeyError, match='hook'):
        fit(lambda i: batch(), 50, hooks=[(1, hook)])
    assert threading.active_count() <= before


def test_fit_goes_on_from_the_states_step():
    asked = []

    def batches(i):
        asked.append(i)
        return batch(i)

    tx, mesh = optax.adam(0.1), sharding.make_mesh()
    options = {'objective': OBJECTIVE, 'tx': tx, 'mesh': mesh}
    whole = fit(batches, 4, tx=tx)
    assert asked == [0, 1, 2, 3]
    state = fit(batches, 2, tx=tx)
    half = train.fit(state, {}, batches, jax.random.key(0), steps=4, **options)
    assert asked == [0, 1, 2, 3, 0, 1, 2, 3]
    same = lambda a, b: np.testing.assert_array_equal(np.asarray(a), np.asarray(b))  # noqa: E731
    jax.tree.map(same, half, whole)
    assert train.fit(half, {}, batches, jax.random.key(0), steps=4, **options) is half


@pytest.mark.parametrize('warmup', [0, 1, 4])
@pytest.mark.parametrize('kind', ['constant', 'linear', 'cosine'])
def test_schedule(kind, warmup):
    rate = train.schedule(0.5, 12, warmup=warmup, kind=kind)
    rest = 12 - warmup
    after = {
        'constant': lambda t: 1.0,
        'linear': lambda t: 1 - t / rest,
        'cosine': lambda t: (1 + np.cos(np.pi * t / rest)) / 2,
    }[kind]
    for step in range(12):
        part = (step + 1) / warmup if step < warmup else after(step - warmup)
        np.testing.assert_allclose(rate(step), 0.5 * part, rtol=1e-6, atol=1e-7)
    if kind != 'constant':
        np.testing.assert_allclose(rate(12), 0, atol=1e-7)


def test_schedule_names_what_it_knows():
    with pytest.raises(ValueError, match=r"'step'.*cosine"):
        train.schedule(0.1, 10, kind='step')


def adamw_steps(gradients, w, rate, *, decay, clip, b1=0.9, b2=0.999, eps=1e-8):
    """AdamW of a few steps in float64; gradients and w are {name: array}."""
    w = {k: np.float64(x) for k, x in w.items()}
    m = {k: np.zeros_like(x) for k, x in w.items()}
    v = {k: np.zeros_like(x) for k, x in w.items()}
    for t, g in enumerate(gradients, 1):
        norm = sum((np.float64(x) ** 2).sum() for x in g.values()) ** 0.5
        for k in w:
            x = np.float64(g[k]) * min(1, clip / norm)
            m[k], v[k] = b1 * m[k] + (1 - b1) * x, b2 * v[k] + (1 - b2) * x**2
            ahead = m[k] / (1 - b1**t) / ((v[k] / (1 - b2**t)) ** 0.5 + eps)
            vector = 'norm' in k or 'bias' in k
            w[k] = w[k] - rate * (ahead + (0 if vector else decay) * w[k])
    return w


@pytest.mark.parametrize('clip', [0.3, 1e9])
def test_adamw_clips_and_decays_matrices_only(clip):
    rng = np.random.default_rng(0)
    shapes = {
        'backbone/layers/attn_norm/scale': (2, 4),
        'backbone/layers/q/kernel': (2, 4, 4),
        'backbone/layers/q/bias': (2, 4),
        'backbone/norm/scale': (4,),
        'lora/layers/q/a': (2, 4, 1),
        'head/kernel': (4, 1),
    }
    draw = lambda: {k: np.float32(rng.normal(size=s)) for k, s in shapes.items()}  # noqa: E731
    w, steps = draw(), [draw() for _ in range(3)]
    tx = train.adamw(0.1, weight_decay=0.5, max_grad_norm=clip)
    params = tree.unflatten(w)
    opt, update = tx.init(params), jax.jit(tx.update)
    for g in steps:
        updates, opt = update(tree.unflatten(g), opt, params)
        params = optax.apply_updates(params, updates)
    want = adamw_steps(steps, w, 0.1, decay=0.5, clip=clip)
    for name, x in tree.flatten(params).items():
        np.testing.assert_allclose(x, want[name], atol=1e-5, err_msg=name)


def test_grad_norm_is_of_the_gradient_before_clipping():
    pack, w = batch(), parameters()
    tx = train.adamw(0.1, max_grad_norm=1e-3)
    state = train.start(w, tx, one_device())
    step = jax.jit(functools.partial(train.step, objective=OBJECTIVE, tx=tx))
    _, metrics = step(state, {}, pack, jax.random.key(0))
    _, g = gradients(w, pack)
    want = sum((np.asarray(x, np.float64) ** 2).sum() for x in jax.tree.leaves(g)) ** 0.5
    np.testing.assert_allclose(metrics['grad_norm'], want, rtol=1e-5)


def test_language_modelling_learns_and_its_loss_is_the_mean_over_tokens():
    t = plain.random_tokens([2, 3, 1, 2] * 4, seed=3)
    batches = packing.Batches(t, SHAPE, 8, seed=0)
    pack = batches(0)
    rm = reward.RewardModel(
        Decoder(dataclasses.replace(C, V=37, L=1)), heads.LanguageModel(37, tied=True)
    )
    shapes = jax.eval_shape(rm.backbone.init, jax.random.key(0), pack)['params']
    trainable = {'backbone': plain.random_tree(shapes, size=0.3), 'head': {}}
    objective = train.language_modelling(rm.logits)
    seen, mesh, tx = [], one_device(), train.adamw(0.01)
    train.fit(
        train.start(trainable, tx, mesh),
        {},
        lambda i: pack,
        jax.random.key(0),
        objective=objective,
        tx=tx,
        mesh=mesh,
        steps=30,
        hooks=[(1, lambda done, state, metrics: seen.append(metrics['loss']))],
    )
    assert seen[-1] < 0.7 * seen[0]
    logits = np.asarray(rm.logits(trainable, pack), np.float64)
    logp = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    follows = np.argwhere(pack.pos_PN[:, 1:] == pack.pos_PN[:, :-1] + 1)
    want = -np.mean([logp[p, n, pack.ids_PN[p, n + 1]] for p, n in follows])
    np.testing.assert_allclose(seen[0], want, rtol=1e-5)
