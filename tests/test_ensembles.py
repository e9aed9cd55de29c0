"""What members say together: heads on shared features, scores, ensembles, averages of weights."""

import dataclasses
import functools

import jax
import numpy as np
import plain
import pytest
import train_tiny

from jaxrm import evaluate, features, heads, lora, members, reward, sharding, train

E = 3
SHAPE = train_tiny.SHAPE
TX = train.adamw(train.schedule(0.02, 8), weight_decay=0.1, max_grad_norm=0.5)
RM, TOKENS, FROZEN, ADAPTED = train_tiny.model(dataclasses.replace(plain.TINY, L=2))
ONE = sharding.make_mesh(devices=jax.devices()[:1])


def starts(like):
    """Trees that differ in every leaf."""
    return [plain.random_tree(like, e, 0.5) for e in range(E)]


# Heads on features


def run(update, state, frozen, batches, key, steps=5):
    """(losses [..., steps], state) of so many updates."""
    losses, frozen = [], sharding.place(frozen, ONE)
    for i in range(steps):
        state, metrics = update(state, frozen, sharding.place_batch(batches(i), ONE), key)
        losses.append(metrics['loss'])
    return np.stack(losses, axis=-1), state


def cached(tokens, D=16):
    draw = lambda n: np.random.default_rng(n).normal(size=(n, D)).astype(np.float32)  # noqa: E731
    return features.Cached(draw(len(tokens.length)), draw(len(tokens.prompt)))


@pytest.mark.parametrize('how', ['vmap', 'scan'])
def test_heads_on_features_that_stay_on_the_device(how):
    of, rm = cached(TOKENS), reward.RewardModel(None, heads.Scalar())
    made = lambda of, e: features.Batches(of, TOKENS, packs=2, prompts=5, seed=e, epochs=True)  # noqa: E731
    objective = train.preference(features.scored(rm.rewards))
    trees = starts({'head': ADAPTED['head']})
    options, key = {'objective': objective, 'tx': TX}, members.keys(range(E))
    state = members.start(members.stack(trees), TX, ONE)
    update = train.jitted(state, ONE, step=functools.partial(members.step, how=how), **options)
    batches = members.Batches([made(None, e) for e in range(E)])
    loss_E, state = run(update, state, {'features': of}, batches, key)
    one = train.jitted(train.start(trees[0], TX, ONE), ONE, **options)
    for e, tree_ in enumerate(trees):
        want, at_end = run(one, train.start(tree_, TX, ONE), {}, made(of, e), key[e])
        np.testing.assert_allclose(loss_E[e], want, rtol=1e-5)
        got = members.select(state.trainable, e)['head']['kernel']
        np.testing.assert_allclose(got, at_end.trainable['head']['kernel'], atol=1e-5)
    score = jax.jit(members.scored(features.scored(rm.rewards), how=how))
    found = features.candidate_scores(score, ({}, state.trainable), of, TOKENS, mesh=ONE)
    kernel_ED = np.asarray(state.trainable['head']['kernel'], np.float64)[..., 0]
    np.testing.assert_allclose(found, of.answer_cD @ kernel_ED.T, atol=1e-5)


def test_an_epoch_of_features_is_a_permutation():
    batches = features.Batches(None, TOKENS, packs=2, prompts=3, seed=1, epochs=True)
    n, taken = len(batches.records), []
    for i in range(5 * n // 6 + 1):
        first_PB = batches(i).answer_PBM[:, :, 0].ravel()
        taken += (np.searchsorted(TOKENS.first, first_PB, side='right') - 1).tolist()
    epochs = [taken[e * n :][:n] for e in range(5)]
    assert all(sorted(e) == batches.records.tolist() for e in epochs)
    assert len({tuple(e) for e in epochs}) == 5


# Scores


@pytest.mark.parametrize('how', ['vmap', pytest.param('scan', marks=pytest.mark.slow)])
def test_scores_of_all_members_are_those_of_each(how):
    trees, options = starts(ADAPTED), {'mesh': ONE, 'packs': 2}
    one, every = jax.jit(RM.score), jax.jit(members.scored(RM.score, how=how))
    found = members.scores(every, FROZEN, members.stack(trees), TOKENS, SHAPE, **options)
    for got, tree in zip(found, trees, strict=True):
        want = evaluate.candidate_scores(one, {**FROZEN, **tree}, TOKENS, SHAPE, **options)
        np.testing.assert_allclose(got, want, rtol=0, atol=1e-5)
    assert every._cache_size() == 1


def test_ensemble_rules_by_hand():
    score_Ec = np.array([[1.0, 4.0], [3.0, 4.0], [8.0, 1.0]], np.float32)
    assert members.mean(score_Ec).tolist() == [4, 3]
    assert members.wco(score_Ec).tolist() == [1, 1]
    np.testing.assert_allclose(members.uwo(score_Ec, 0.5), [4 - 26 / 6, 3 - 1])  # over E, not E - 1
    assert members.centred(score_Ec).tolist() == [[-1.5, 1.5], [-0.5, 0.5], [3.5, -3.5]]


def test_ensemble_rules_agree_where_members_do():
    rng = np.random.default_rng(0)
    one_c = rng.normal(size=50).astype(np.float32)
    same_Ec = np.tile(one_c, (10, 1))
    for rule in (members.mean, members.wco, members.uwo):
        np.testing.assert_array_equal(rule(same_Ec), one_c)
    score_Ec = rng.normal(size=(10, 50)).astype(np.float32)
    np.testing.assert_array_equal(members.uwo(score_Ec, 0), members.mean(score_Ec))
    assert (members.wco(score_Ec) < members.mean(score_Ec)).all()
    assert (members.uwo(score_Ec, 0.1) < members.mean(score_Ec)).all()


# Trees


def test_starts_of_seeds_are_those_made_one_by_one():
    make = lambda key: {  # noqa: E731
        'head': RM.init_head(key, 16),
        'lora': lora.init(FROZEN['backbone'], jax.random.fold_in(key, 1), rank=2),
    }
    found = members.init(make, (5, 0))
    for e, seed in enumerate((5, 0)):
        close = lambda x, y: np.testing.assert_allclose(x, y, atol=1e-6)  # noqa: E731
        jax.tree.map(close, members.select(found, e), make(jax.random.key(seed)))


@pytest.mark.parametrize('weight_E', [None, (0.5, 0.2, 0.3)])
def test_the_average_has_the_mean_of_the_members_weights(weight_E):
    """Of adapters too: folded into the backbone they are the mean of the folded members."""
    trees = starts(ADAPTED)
    got = members.average(members.stack(trees), weight_E)
    w_E = np.full(E, 1 / E) if weight_E is None else np.array(weight_E)
    mean = lambda *x_E: sum(w * x for w, x in zip(w_E, x_E, strict=True))  # noqa: E731
    fold = lambda w: lora.fold(FROZEN['backbone'], w['lora'], 2.0)  # noqa: E731
    want = jax.tree.map(mean, *map(fold, trees))
    for x, y in zip(jax.tree.leaves(fold(got)), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(x, y, atol=1e-5)
    head = mean(*(w['head']['kernel'] for w in trees))
    np.testing.assert_allclose(got['head']['kernel'], head, atol=1e-6)
    assert got['lora']['layers']['q']['a'].shape == (1, 16, 2 * E)


def test_one_member_is_its_own_average_and_selects_itself():
    trees = starts(FROZEN)
    stacked = members.stack(trees)
    jax.tree.map(np.testing.assert_array_equal, members.select(stacked, 1), trees[1])
    got = members.average(stacked, (0, 0, 1))
    jax.tree.map(np.testing.assert_array_equal, got, trees[2])


@pytest.mark.parametrize(
    ('call', 'message'),
    [
        (lambda: members.average(members.stack(starts(FROZEN)), (0.5, 0.5)), r'expected 3 that'),
        (lambda: members.average(members.stack(starts(FROZEN)), (1, 1, 1)), r'that sum to 1'),
        (lambda: members.Batches([print] * 3, [1, 2]), r'steps: found \[1, 2\], expected 3'),
        (lambda: members.Batches([print] * 3, [1, 0, 2]), r'from 1 on'),
        (lambda: len(members.Batches([print])), 'number of steps has to be given'),
        (lambda: members.scored(RM.score, how='pmap')(({}, {}), None), "how: 'pmap'"),
    ],
)
def test_faults_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
