"""A gate on frozen features: what learns, how, and whether it routes where routing is planted.

In the planted world three clusters of prompts care for one quality each; ratings are the qualities,
most of them missing, and may like length. Features are exact: any failure is the method's.
"""

import dataclasses
import functools
import math

import jax
import numpy as np
import pytest

from experiments import gating
from jaxrm import features, regress, resume, sharding, statistics, train
from jaxrm.tokens import Tokens
from tests.plain import random_tokens

K, D, N = 3, 12, 600
LENGTH = K  # the objective of verbosity, after one for each cluster
C = gating.Gating(
    max_steps=200, train_batch_size=128, learning_rate=1e-2, gating_hidden_dim=32,
    gating_n_hidden=2, initial_scale=20.0,
)  # fmt: skip
SEEDS = range(3)


def mesh_of(devices=1):
    return sharding.make_mesh(devices=jax.devices()[:devices])


def pairs_of(rank_nM) -> Tokens:
    """Tokens of pairs with these ranks; of the rest only the shape is used."""
    some = random_tokens([2] * len(rank_nM))
    return some._replace(
        rank=rank_nM.reshape(-1).astype(np.int32), smoothing=0 * some.smoothing,
        margin=0 * some.margin,
    )  # fmt: skip


@dataclasses.dataclass(frozen=True, eq=False)
class Planted:
    """Pairs to learn from and held-out ones, their features, and the head of stage 1."""

    head: dict
    plain: dict  # the same without a transform
    learnt: tuple
    held: tuple
    oracle: np.ndarray  # [n] of the held-out ones
    length: np.ndarray  # [c]


@functools.cache
def planted(seed, bias=0.0):
    """Qualities and length are drawn apart from each other; `bias` plants length in the ratings."""
    rng = np.random.default_rng(seed)
    mix, cue = rng.normal(size=(K + 1, D)), rng.normal(size=(K, D))

    def some():
        cluster, part = rng.integers(0, K, N), rng.uniform(size=(N, 2, K + 1))
        part[..., :K] = 0.5 + 0.25 * (part[..., :K] - 0.5)
        worth = np.take_along_axis(part, cluster[:, None, None], 2)[..., 0]
        noisy = worth / 0.03 + rng.gumbel(size=worth.shape)
        answer = (part @ mix).reshape(-1, D).astype(np.float32)
        prompt = cue[cluster] + 0.3 * rng.normal(size=(N, D))
        of = features.Cached(answer, prompt.astype(np.float32))
        return of, pairs_of(noisy.argsort(1)[:, ::-1].argsort(1)), worth, part.reshape(-1, K + 1)

    (rated, _, _, part), learnt, held = some(), some(), some()
    rating = part + bias * part[:, [LENGTH]] * (np.arange(K + 1) != LENGTH)
    rating[rng.random(rating.shape) < 0.8] = np.nan
    rows = np.arange(len(part))
    fitted = regress.ridge([(rows, rated.answer_cD)], rating, rows % 5 == 0)
    kernel = fitted.weight_JD.T
    penalty = regress.penalties(learnt[0].answer_cD @ kernel, LENGTH)
    head, plain = (
        {'regression': {'kernel': kernel}, 'transform': t}
        for t in (regress.transform(penalty, LENGTH), np.eye(K + 1, dtype=np.float32))
    )
    oracle = gating.right(held[2].reshape(-1), held[1])
    return Planted(head, plain, learnt[:2], held[:2], oracle, held[3][:, LENGTH])


def lesson(p, head, seed, *, shuffle=False):
    """What a gate learns from and is tested on, in ratings."""
    learnt, held = ((gating.rated(head, of), some) for of, some in (p.learnt, p.held))
    if shuffle:
        rng = np.random.default_rng(seed)
        learnt, held = (gating.shuffled(x, rng) for x in (learnt, held))
    return gating.Lesson(*learnt, seed), held


@functools.cache
def learned():
    """Scores [c] of the held-out answers, by name and seed: all gates learn in one program."""
    tasks = {}
    for seed in SEEDS:
        p, likes = planted(seed), planted(seed, bias=0.5)
        tasks['gate', seed] = lesson(p, p.plain, seed)
        tasks['shuffled', seed] = lesson(p, p.plain, seed, shuffle=True)
        tasks['plain', seed] = lesson(likes, likes.plain, seed)
        tasks['head', seed] = lesson(likes, likes.head, seed)
    rm, gates = gating.learn(C, [x for x, _ in tasks.values()], K + 1, mesh=mesh_of())
    each = zip(tasks.items(), gates, strict=True)
    return {key: gating.scores(rm, gate, held, mesh_of()) for (key, (_, held)), gate in each}


def test_the_gate_routes_where_routing_is_planted():
    """It is near the oracle and beyond all that cannot read the prompt, over seeds."""
    right = {name: [] for name in ('gate', 'shuffled', 'uniform', 'best', 'any sign', 'oracle')}
    for seed in SEEDS:
        p = planted(seed)
        ratings = [(gating.rated(p.plain, of), some) for of, some in (p.learnt, p.held)]
        found = {name: learned()[name, seed] for name in ('gate', 'shuffled')}
        found |= dict(
            zip(('uniform', 'best', 'any sign'), gating.alike(*ratings).values(), strict=True)
        )
        for name, score in found.items():
            right[name].append(gating.right(score, p.held[1]).mean())
        right['oracle'].append(p.oracle.mean())
    mean = {name: np.mean(x) for name, x in right.items()}
    assert mean['gate'] > mean['oracle'] - 0.02, mean
    assert mean['oracle'] > 0.85
    for name in ('shuffled', 'uniform', 'best', 'any sign'):
        gap = np.subtract(right['gate'], right[name])
        assert gap.mean() - 3 * gap.std(ddof=1) / math.sqrt(len(gap)) > 0.1, (name, right)


def test_the_transform_takes_length_out_of_the_score():
    """Raters like length and preferences do not know it: the gate alone cannot mend that."""
    found = {'plain': [], 'head': []}
    for seed in SEEDS:
        p = planted(seed, bias=0.5)
        for name in found:
            score = learned()[name, seed]
            likes = statistics.spearman(score, p.length)
            found[name].append((gating.right(score, p.held[1]).mean(), likes))
    (accuracy, likes), (debiased, little) = (np.mean(x, 0) for x in found.values())
    assert likes > 0.6, found
    assert abs(little) < 0.1, found
    assert debiased > accuracy - 0.01, found
    assert debiased > np.mean([planted(seed, 0.5).oracle.mean() for seed in SEEDS]) - 0.03


def begun(c, p, *, devices=1):
    """A model of ratings, a state before its first step, and batches."""
    mesh, rm = mesh_of(devices), gating.model(c, K + 1)
    gate = gating.start(rm, D, seed=0, scale=c.initial_scale)
    state = train.start({'gate': gate}, gating.optimiser(c)[1], mesh)
    of, some = p.learnt
    return rm, gate, state, gating.stream(c, gating.rated(p.head, of), some, mesh, 0)


def run(c, p, *, hooks=(), saved=None):
    """The gate and the state after train.fit; goes on from `saved`."""
    rm, _, state, batches = begun(c, p)
    if saved is not None:
        state = resume.restore(saved, state, run={})
    history = []

    def keep(done, state, metrics):  # the next step takes the state's place
        history.append((state, metrics, float(state.trainable['gate']['scale'][0])))

    hooks, key = [(1, keep), *hooks], jax.random.key(0)
    return gating.fit(c, rm, state, batches, key, mesh=mesh_of(), hooks=hooks), history


def leaves(tree):
    named = jax.tree_util.tree_leaves_with_path(tree)
    return {sharding.leaf_name(path): np.asarray(x) for path, x in named}


SHORT = dataclasses.replace(C, max_steps=6, initial_scale=1.0)


@pytest.fixture(scope='module')
def short():
    """A few steps from a scale of 1, uninterrupted."""
    return run(SHORT, planted(0))


def test_nothing_but_the_gate_learns(short):
    """The optimiser does not even remember anything else; the head is no argument of a fit."""
    gate, history = short
    before, after = leaves(begun(SHORT, planted(0))[1]), leaves(gate)
    assert before.keys() == after.keys()
    assert all((before[name] != after[name]).any() for name in before)
    (state, *_) = history[-1]
    kept = {name for name, x in leaves(state.opt).items() if x.ndim}
    assert kept
    assert all('/gate/' in name for name in kept)
    assert sum(x.size for x in leaves(state.opt).values() if x.ndim) == 2 * sum(
        x.size for x in after.values()
    )


def test_a_scale_that_does_not_learn():
    c = dataclasses.replace(SHORT, learn_scale=False, max_steps=3)
    gate, _ = run(c, planted(0))
    before = leaves(begun(c, planted(0))[1])
    assert gate['scale'].tolist() == [1.0]
    assert all((x != before[name]).any() for name, x in leaves(gate).items() if name != 'scale')


def test_gates_together_are_gates_alone(short):
    """Of other seeds, with other data and another scale to start from."""
    mesh, lessons = mesh_of(), []
    for seed in (0, 1):
        of, some = planted(seed).learnt
        lessons.append(gating.Lesson(gating.rated(planted(seed).head, of), some, seed))
    lessons[1] = lessons[1]._replace(scale=3.0)
    both = gating.learn(SHORT, lessons, K + 1, mesh=mesh)[1]
    alone = gating.learn(SHORT, lessons[1:], K + 1, mesh=mesh)[1]
    for one, other in ((short[0], both[0]), (alone[0], both[1])):
        for name, x in leaves(one).items():
            np.testing.assert_allclose(leaves(other)[name], x, rtol=1e-4, atol=1e-5, err_msg=name)
    assert abs(both[1]['scale'] - 3) < 0.1


def test_ratings_are_all_that_a_gate_needs_of_answers():
    """Scores and slopes by ratings are those of the whole head on the features."""
    p, rm = planted(0, bias=0.5), gating.model(C, K + 1)
    gate = gating.start(rm, D, seed=3, scale=2.0)
    of, some = p.held
    rated = gating.rated(p.head, of)
    objective = train.preference(features.scored(rm.rewards))
    slopes = jax.jit(functools.partial(train.gradients, objective))
    want, found = (
        slopes({'gate': gate}, {'head': head}, features.batch(x, some, np.arange(N)[None]), None)
        for head, x in ((p.head, of), (gating.plain(K + 1), rated))
    )
    for a, b in zip(*map(jax.tree.leaves, (want, found)), strict=True):
        np.testing.assert_allclose(b, a, rtol=1e-4, atol=1e-6)
    assert abs(rated.answer_cD - gating.rates(p.head, of, script=True)).max() > 0.1


def test_the_first_loss_is_that_of_a_coin(short):
    """Within the gap of the scores, as |log(1 + exp(-x)) - log 2| <= |x| / 2 + x^2 / 8."""
    first = short[1][0][1]
    p = planted(0)
    rate = gating.rates(p.head, p.learnt[0]).reshape(N, 2, -1)
    most = np.abs(rate[:, 0] - rate[:, 1]).max()
    assert 0 < abs(float(first['loss']) - math.log(2)) < most / 2 + most**2 / 8
    assert abs(float(first['loss']) - math.log(2)) < 0.05


def test_the_learning_rate_falls_along_a_cosine_to_nothing():
    c = gating.Gating()
    rate, _ = gating.optimiser(c)
    t = np.array([0, 1, 500, 1000, 1999, 2000])
    want = 1e-3 * (1 + np.cos(np.pi * t / 2000)) / 2
    np.testing.assert_allclose([float(rate(x)) for x in t], want, rtol=1e-4, atol=1e-9)


def test_the_scale_moves_by_the_learning_rate(short):
    """AdamW without warm-up: its first step is the rate, whatever the loss."""
    assert abs(short[1][0][2] - 1) == pytest.approx(SHORT.learning_rate, rel=1e-3)


def test_dropout_is_in_training_alone(short):
    """The first loss is not that of the plain network, the scores are."""
    p = planted(0)
    rm, gate, _, batches = begun(SHORT, p)
    params = {'head': gating.plain(K + 1), 'gate': gate}
    calm = train.preference(features.scored(rm.rewards))(params, batches(0), jax.random.key(0))
    assert abs(float(calm[0]) - float(short[1][0][1]['loss'])) > 1e-6
    rm, gate, *_ = begun(C, p)
    of, some = p.held
    h = of.prompt_nD.astype(np.float64)
    for i in range(3):
        layer = gate[f'layer_{i}']
        h = h @ np.asarray(layer['kernel'], float) + np.asarray(layer['bias'])
        h = np.maximum(h, 0) if i < 2 else h
    weight = np.exp(h / 10) / np.exp(h / 10).sum(1, keepdims=True) * 20
    want = (gating.rates(p.head, of) * np.repeat(weight, 2, axis=0)).sum(1)
    found = gating.scores(rm, gate, (gating.rated(p.head, of), some), mesh_of())
    np.testing.assert_allclose(found, want, rtol=1e-4, atol=1e-5)


def test_devices_share_a_batch(short):
    """Eight devices draw other packs of the same records: the same numbers as one."""
    p, params = planted(0), []
    whole = begun(C, p, devices=8)[3](0)
    for devices in (1, 8):
        rm, _, state, _ = begun(C, p)
        mesh, tx = mesh_of(devices), gating.optimiser(C)[1]
        state = train.start(state.trainable, tx, mesh)
        objective = train.preference(features.scored(rm.rewards))
        update = train.jitted(state, mesh, objective=objective, tx=tx)
        frozen = sharding.place({'head': gating.plain(K + 1)}, mesh)
        batch = sharding.place_batch(whole, mesh)
        with jax.set_mesh(mesh):
            params.append(update(state, frozen, batch, jax.random.key(0))[1])
    for name, x in params[0].items():
        np.testing.assert_allclose(params[1][name], x, rtol=1e-5, err_msg=name)


def test_an_interrupted_run_goes_on_as_if_it_were_not(tmp_path, short):
    def stop(done, state, metrics):
        if done == 5:
            raise KeyboardInterrupt

    saver = resume.Saver(tmp_path, steps=6, every=2, run={})
    with saver, pytest.raises(KeyboardInterrupt):
        run(SHORT, planted(0), hooks=[(1, saver), (1, stop)])
    gate, history = run(SHORT, planted(0), saved=tmp_path)
    assert len(history) == 2
    for name, x in leaves(short[0]).items():
        assert leaves(gate)[name].tobytes() == x.tobytes(), name


def test_best_weights_equal_a_search():
    """Those of a convex loss on two objectives, by brute force over a grid."""
    rng = np.random.default_rng(0)
    rate, rank = rng.normal(size=(400, 2)), np.tile([0, 1], (200, 1))
    rate[0::2] += [0.3, -0.2]
    some = pairs_of(rank)
    gap = rate[0::2] - rate[1::2]
    grid = np.linspace(-1, 1, 161)
    w = np.stack(np.meshgrid(grid, grid, indexing='ij'), -1).reshape(-1, 2)
    loss = np.logaddexp(0, -gap @ w.T).mean(0)
    free = w[loss.argmin()]
    bound = w[np.where((w >= 0).all(1), loss, np.inf).argmin()]
    assert free[1] < 0 == bound[1]
    np.testing.assert_allclose(gating.best_weights(rate, some, negative=True), free, atol=0.0126)
    np.testing.assert_allclose(gating.best_weights(rate, some), bound, atol=0.0126)


def test_a_batch_that_devices_cannot_share():
    p = planted(0)
    c = dataclasses.replace(C, train_batch_size=20)
    with pytest.raises(ValueError, match='train_batch_size: 20, expected a multiple of 8'):
        gating.stream(c, *p.learnt, mesh_of(8), 0)
