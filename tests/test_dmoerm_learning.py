"""How the parts of DMoERM learn: experts on bases of their own, MLPs on features."""

import dataclasses
import functools

import jax
import numpy as np
import plain
import pytest
import train_tiny

from experiments import dmoerm
from experiments.dmoerm import Lesson, Mixing, Pace
from jaxrm import features, heads, members, packing, reward, sharding, tokens, train, tree
from jaxrm.backbones.layers import Decoder

CONFIG = dataclasses.replace(plain.TINY, L=1)
D = CONFIG.D
ONE = sharding.make_mesh(devices=jax.devices()[:1])
RM = reward.RewardModel(Decoder(CONFIG), heads.Scalar(), lora_scale=2.0)
PACE = Pace(0.05, epochs=1, batch=6, warmup=1)
SETS = [plain.random_tokens([2] * 18, seed=seed) for seed in range(3)]


@functools.cache
def bases():
    """Two that differ, with heads."""
    _, _, frozen, trainable = train_tiny.model(CONFIG)
    shapes = {**frozen, 'head': trainable['head']}
    return [plain.random_tree(shapes, seed, 0.5) for seed in (1, 2)]


def starts(count):
    return dmoerm.experts(bases(), count, seeds=[0, 1], rank=2, targets=r'/(q|v)/')


def test_fresh_experts_say_what_their_base_says():
    """Features and rewards, before anything is learned; no adapter is another's."""
    start_E = starts(2)
    for g, base in enumerate(bases()):
        experts = jax.tree.map(lambda x, g=g: x[2 * g : 2 * g + 2], start_E)
        lora = experts['lora']['top']['q']
        assert not np.any(lora['b'])
        assert np.abs(lora['a'][0] - lora['a'][1]).max() > 0.1
        model, pack = dmoerm.mixture_of(RM), one_pack()
        z = jax.jit(model.features)({'backbone': base['backbone'], 'experts': experts}, pack)
        own = jax.jit(RM.features)(base, pack)
        said = model.capabilities({'experts': experts}, z)
        want = np.asarray(own.answer_BMD) @ np.asarray(base['head']['kernel'])
        here = np.asarray(pack.rank_PBM).reshape(said.shape[:2]) >= 0
        for e in range(2):
            mine = np.asarray(z.answer_BMD)[..., e * D : (e + 1) * D]
            np.testing.assert_allclose(mine[here], own.answer_BMD[here], rtol=0, atol=1e-6)
            np.testing.assert_allclose(np.asarray(said)[here][:, e], want[here][:, 0], atol=1e-5)


@functools.cache
def shape():
    return dmoerm.shape_of(dmoerm.joined(SETS), D, PACE.batch)


def one_pack():
    return packing.Batches(SETS[0], shape(), 1, seed=0)(0)


def test_experts_of_several_bases_learn_as_alone():
    """In one program, each on its own base: as the same expert with that base alone."""
    objective = train.preference(RM.score)
    start_E = starts(2)
    on = [0, 0, 1, 1]
    lessons = [Lesson(SETS[i % 3], 5 + i, g) for i, g in enumerate(on)]
    frozen_G = {'backbone': members.stack([b['backbone'] for b in bases()])}
    both = dmoerm.learned(PACE, start_E, lessons, shape(), objective, mesh=ONE, frozen=frozen_G,
                          own=True)  # fmt: skip
    for i in (1, 2):
        alone = dmoerm.learned(
            PACE, members.stack([members.select(start_E, i)]), [lessons[i]], shape(), objective,
            mesh=ONE, frozen={'backbone': bases()[on[i]]['backbone']},
        )  # fmt: skip
        got, want = (tree.flatten(jax.device_get(t)) for t in (both, alone))
        for name, x in want.items():
            np.testing.assert_allclose(got[name][i], x[0], rtol=0, atol=1e-5, err_msg=name)
        other = tree.flatten(jax.device_get(start_E))
        assert all(np.abs(x[0] - other[name][i]).max() > 1e-3 for name, x in want.items())


def test_joined_sets_have_the_same_rows():
    some = [plain.random_tokens([2, 3], seed=1), plain.random_tokens([2, 0, 4], seed=2)]
    found, n = dmoerm.joined(some), 0
    for of in some:
        for i in range(len(of.prompt)):
            for got, want in zip(plain.rows(found, n), plain.rows(of, i), strict=True):
                np.testing.assert_array_equal(got, want)
            n += 1
    np.testing.assert_array_equal(found.rank, np.concatenate([x.rank for x in some]))
    back = tokens.select(found, [2, 3, 4])
    np.testing.assert_array_equal(back.ids, some[1].ids)


# The MLP


def planted(seed, n=120, worse_first=False):
    """Pairs of features, of which the first is better by one direction, and noise of others."""
    rng = np.random.default_rng(seed)
    z_n2D = 0.2 * rng.normal(size=(n, 2, 2 * D)).astype(np.float32)
    z_n2D[:, 0, 3] = np.abs(z_n2D[:, 0, 3]) + 1
    z_n2D[:, 1, 3] = -z_n2D[:, 0, 3]
    some = plain.random_tokens([2] * n, seed=seed)
    some = some._replace(
        rank=np.tile([1, 0] if worse_first else [0, 1], n).astype(np.int32),
        margin=some.margin * 0,
        smoothing=some.smoothing * 0,
    )
    of = features.Cached(z_n2D.reshape(2 * n, -1), np.zeros((n, 0), np.float32))
    held_n = np.arange(n) % 3 == 0
    return of, some, held_n


@pytest.mark.parametrize('worse_first', [False, True])
def test_the_mlp_learns_the_planted_order(worse_first):
    """Rank 0 is better, for the loss, for what chooses the step, and for the scores alike."""
    model = dmoerm.mixture_of(RM)
    of, some, held_n = planted(0, worse_first=worse_first)
    part = dmoerm.split(of, some, held_n, 0)
    mixing = Mixing(learning_rate=1e-2, steps=60, batch=32, every=20)
    head = members.select(dmoerm.mixed(mixing, model, [part], ONE), 0)
    score = jax.jit(features.scored(model.rewards))
    score_c = features.candidate_scores(score, {'head': head}, part.held_of, part.held, mesh=ONE)
    first_n = score_c[0::2] > score_c[1::2]
    assert first_n.mean() == (0.0 if worse_first else 1.0)
    fresh = model.init_head(jax.random.key(0), 1, 2 * D)
    start_c = features.candidate_scores(score, {'head': fresh}, part.held_of, part.held, mesh=ONE)
    assert dmoerm.held_loss(score_c, part.held) < 0.2 < dmoerm.held_loss(start_c, part.held)
    moved = dmoerm.moved(dmoerm.digests(fresh), dmoerm.digests(head))
    assert moved >= set(tree.flatten(head)) - {'out/bias'}  # which differences leave free


def test_held_loss_is_that_of_all_pairs():
    some = plain.random_tokens([2, 3], seed=0)._replace(rank=np.array([1, 0, 0, 2, 1], np.int32))
    score_c = np.array([0.5, -1.0, 2.0, 0.0, 3.0])
    gaps = np.array([-1.5, 2.0, -1.0, 3.0])  # better less worse
    want = np.log1p(np.exp(-gaps)).mean()
    assert dmoerm.held_loss(score_c, some) == pytest.approx(want)


def test_parts_of_features_keep_their_records():
    of, some, held_n = planted(1, n=9)
    part = dmoerm.split(of, some, held_n, 4)
    assert part.held.record.tolist() == [0, 3, 6]
    np.testing.assert_array_equal(part.held_of.answer_cD, of.answer_cD[[0, 1, 6, 7, 12, 13]])
    assert len(part.of.answer_cD) == len(part.pairs.length) == 12


def test_the_best_of_each_member_is_kept():
    best = dmoerm.Best(2)
    for done, values, x in ((1, [0.5, 0.2], 1.0), (2, [0.4, 0.9], 2.0), (3, [0.6, 0.9], 3.0)):
        best.see(done, {'w': np.array([x, 10 * x])}, np.array(values))
    np.testing.assert_array_equal(best.tree['w'], [3, 20])
    assert best.step.tolist() == [3, 2]
    assert best.value.tolist() == [0.6, 0.9]


def test_what_moved_is_named():
    before = dmoerm.digests({'a': {'b': np.zeros(3)}, 'c': np.ones(2)})
    after = dmoerm.digests({'a': {'b': np.array([0, 0, 1e-30])}, 'c': np.ones(2)})
    assert dmoerm.moved(before, after) == {'a/b'}
    with pytest.raises(ValueError, match=r"leaves: found \['c'\]"):
        dmoerm.moved(before, {'a/b': ''})
