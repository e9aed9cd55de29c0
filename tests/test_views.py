"""The two-view objective: what it adds up, whose masks differ, and that devices do not matter.

What does not need a decoder is tested with a model that is compiled in a moment.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import plain
import pytest

from jaxrm import (
    contrastive,
    flops,
    heads,
    losses,
    packing,
    reward,
    sharding,
    tokens,
    train,
    tree,
    views,
)
from jaxrm.backbones import attention
from jaxrm.backbones.layers import Decoder

C = plain.TINY
SHAPE = packing.Shape(tokens=64, rows=((6, 8), (6, 16)), prompts=4, candidates=3)
RM = reward.RewardModel(Decoder(C), heads.Scalar())
K, BETA, RATE = 5, 0.7, 0.3


class Light:
    """A reward model whose features are of two tokens: the last, and its prompt's closing one."""

    rewards = staticmethod(RM.rewards)

    @staticmethod
    def features(params, pack, *, dropout, key):
        ids_PRT = attention.take(pack.ids_PN, jnp.concatenate(pack.read, axis=1))
        x_PBMTD = params['backbone']['embed']['embedding'][attention.take(ids_PRT, pack.row_PBM)]
        z_PBMD = jnp.tanh(x_PBMTD[..., 0, :] + 2 * x_PBMTD[..., 1, :])
        keep = jax.random.bernoulli(key, 1 - dropout, z_PBMD.shape)
        z_PBMD = jnp.where(keep, z_PBMD / (1 - dropout), 0)
        merge = lambda x: x.reshape(-1, *x.shape[2:])  # noqa: E731
        return reward.Features(merge(z_PBMD), merge(z_PBMD[:, :, 0]))


@functools.cache
def light():
    """Its parameters."""
    w = parameters()
    return w | {'backbone': {'embed': w['backbone']['embed']}}


@functools.cache
def parameters():
    pack = packing.fill(plain.random_tokens([1]), [np.arange(1)], SHAPE)
    backbone = jax.eval_shape(RM.backbone.init, jax.random.key(0), pack)['params']
    return {
        'backbone': plain.random_tree(backbone),
        'head': plain.random_tree({'kernel': np.zeros((C.D, 1))}, 2),
        'prototypes': views.init_prototypes(jax.random.key(1), C.D, K),
    }


@functools.cache
def shared():
    t = plain.random_tokens([2, 3, 2, 1, 2, 2, 3, 2, 2, 2], seed=2)
    order = np.arange(len(t.rank)) - np.repeat(t.first[:-1], np.diff(t.first))
    return t._replace(rank=order.astype(np.int32))


def packed(t, count=8):
    packs = packing.plan(t, SHAPE, order=np.arange(len(t.prompt)))
    return packing.fill(t, packs, SHAPE, count=count)


@functools.cache
def pack():
    """Unshared, with packs that are full, and some that are empty."""
    return packed(tokens.unshare(shared()))


passes = jax.jit(functools.partial(views.two, RM), static_argnames='dropout')


def two(key, dropout=RATE):
    return passes(parameters(), pack(), key, dropout=dropout)


def here():
    return pack().rank_PBM.reshape(-1, 3) >= 0


# Views


def test_views_are_two_passes_with_keys_of_their_own():
    key = jax.random.key(3)
    z = two(key)
    one = jax.jit(functools.partial(RM.features, dropout=RATE))
    for v, own in enumerate(jax.random.split(key)):
        want = one(parameters(), pack(), key=own)
        np.testing.assert_allclose(z.answer_BMD[v][here()], want.answer_BMD[here()], atol=1e-5)
    s, t = (contrastive.unit(x)[here()] for x in z.answer_BMD)
    cosine = (s * t).sum(1)
    assert cosine.max() < 0.99  # of every item
    assert cosine.mean() > 0.2


def test_without_dropout_the_views_are_the_same_and_training_refuses_that():
    z = two(jax.random.key(3), dropout=0.0)
    np.testing.assert_array_equal(*z.answer_BMD)
    for rate in (0.0, -0.1, 1.0, np.nan):
        with pytest.raises(ValueError, match=rf'dropout: found {rate}, expected above 0.* below 1'):
            views.preference(RM, dropout=rate)


@functools.partial(jax.jit, static_argnames='dropout')
def closing(params, pack, key, dropout):
    """[P, R, D] each row's state at the token that closes its prompt."""
    z_PND = RM.states(params, pack, read='all', dropout=dropout, key=key)
    return attention.at_read(z_PND, pack)[:, :, 0]


def test_candidates_share_masks_on_a_shared_prompt_and_not_on_copies():
    """The state that closes a prompt does not depend on the answers after it, but for its masks."""
    for t, apart in ((shared(), False), (tokens.unshare(shared()), True)):
        of, z = packed(t), {}
        for rate in (0.0, RATE):
            z[rate] = np.asarray(closing(parameters(), of, jax.random.key(0), rate))
        pairs = 0
        for p, b in np.argwhere(of.record_PB >= 0):
            rows = of.row_PBM[p, b][of.rank_PBM[p, b] >= 0]
            for row in rows[1:]:
                np.testing.assert_allclose(z[0.0][p, row], z[0.0][p, rows[0]], atol=1e-5)
                gap = np.abs(z[RATE][p, row] - z[RATE][p, rows[0]]).max()
                assert gap > 0.05 if apart else gap == 0
                pairs += 1
        assert pairs == len(t.length) - len(t.prompt)


# The objective


@jax.jit
def both(s_nD, t_nD, here_n, *, prototype_DK):
    """Both losses at once, so that one program tests both."""
    one = contrastive.simcse(s_nD, t_nD, here_n)
    return one + contrastive.swav(s_nD, t_nD, here_n, prototype_DK=prototype_DK)


ITEMS = {Light: contrastive.differences, RM: contrastive.responses}


def objective(rm):
    return views.preference(rm, both, items=ITEMS[rm], beta=BETA, dropout=RATE)


@functools.cache
def gradients(data, fsdp, *, rm=Light, parts=1):
    """(metrics, gradient) on a mesh of data x fsdp devices."""
    mesh = sharding.make_mesh(data=data, fsdp=fsdp, devices=jax.devices()[: data * fsdp])
    fn = functools.partial(train.gradients, objective(rm), microbatches=parts)
    params = light() if rm is Light else parameters()
    where = sharding.everywhere(mesh), sharding.shardings(params, mesh)
    batch = sharding.place_batch(pack(), mesh)
    with jax.set_mesh(mesh):
        step = jax.jit(fn, out_shardings=where)
        metrics, grads = step(sharding.place(params, mesh), {}, batch, jax.random.key(7))
    return jax.device_get(metrics), {k: np.asarray(x) for k, x in tree.flatten(grads).items()}


@jax.jit
def parts_of(params, pack, key):
    """Each view's accuracy and loss by prompt, and the loss of the items."""
    z = jax.vmap(lambda key: Light.features(params, pack, dropout=RATE, key=key))(
        jax.random.split(key)
    )
    rank_BM = pack.rank_PBM.reshape(-1, 3)
    options = {
        'margin_BM': pack.margin_PBM.reshape(-1, 3),
        'smoothing_B': pack.smoothing_PB.ravel(),
    }
    score_VBM = (z.answer_BMD @ params['head']['kernel'])[..., 0]
    loss_VB = jnp.stack([losses.bradley_terry(x, rank_BM, **options) for x in score_VBM])
    right_VB = jnp.stack([losses.accuracy(x, rank_BM) for x in score_VBM])
    return loss_VB, right_VB, z.answer_BMD


def test_objective_is_the_sum_of_its_parts():
    metrics, _ = gradients(1, 1)
    *by_prompt, z_VBMD = jax.device_get(parts_of(light(), pack(), jax.random.key(7)))
    rank_BM = pack().rank_PBM.reshape(-1, 3)
    has = (rank_BM[:, 1:] >= 0).any(1)
    assert metrics['count'] == has.sum() == 9
    loss_V, right_V = (x_VB[:, has].mean(1) for x_VB in by_prompt)
    np.testing.assert_allclose(metrics['rm_loss'], loss_V.mean(), rtol=1e-4)
    np.testing.assert_allclose(metrics['accuracy'], right_V.mean(), rtol=1e-4)
    assert abs(loss_V[0] - loss_V[1]) > 1e-3
    # the items that are there, by loops
    at = [(b, i, j) for b in range(len(rank_BM)) for i in range(3) for j in range(3)
          if min(rank_BM[b, i], rank_BM[b, j]) >= 0 and i != j]  # fmt: skip
    s, t = (np.stack([z_BMD[b, i] - z_BMD[b, j] for b, i, j in at]) for z_BMD in z_VBMD)
    loss_n = both(s, t, np.ones(len(at), bool), prototype_DK=light()['prototypes']['kernel'])
    np.testing.assert_allclose(metrics['contrastive_loss'], loss_n.mean(), rtol=1e-4)
    total = metrics['rm_loss'] + BETA * metrics['contrastive_loss']
    np.testing.assert_allclose(metrics['loss'], total, rtol=1e-6)
    assert metrics['min_reward'] < metrics['mean_reward'] < metrics['max_reward']
    assert metrics['item_cosine'] < metrics['view_cosine'] < 1
    assert metrics['feature_variance'] > 0.01


def test_centering_is_that_of_both_views():
    centred, plain_ = (
        jax.jit(views.preference(Light, both, dropout=RATE, center_rewards_coefficient=x))
        for x in (0.3, 0.0)
    )
    given = light(), pack(), jax.random.key(7)
    gap = centred(*given)[1]['rm_loss'] - plain_(*given)[1]['rm_loss']
    *_, z_VBMD = jax.device_get(parts_of(*given))
    score_VBM = (z_VBMD @ np.asarray(light()['head']['kernel']))[..., 0]
    rank_BM, each = pack().rank_PBM.reshape(-1, 3), []
    for score_BM in score_VBM:
        for score_M, rank_M in zip(score_BM, rank_BM, strict=True):
            sums = [score_M[i] + score_M[k] for i in range(3) for k in range(3)
                    if rank_M[i] >= 0 and rank_M[i] < rank_M[k]]  # fmt: skip
            each += [np.mean(np.square(sums))] if sums else []
    np.testing.assert_allclose(gap, 0.3 * np.mean(each), rtol=1e-4)


def test_packs_in_which_candidates_share_their_prompt_are_found_out():
    objective_ = jax.jit(views.preference(Light, both, dropout=RATE))
    said = [objective_(light(), of, jax.random.key(0))[1] for of in (packed(shared()), pack())]
    several = (np.diff(shared().first) > 1).mean()
    np.testing.assert_allclose([x['shared'] for x in said], [several, 0], rtol=1e-6)
    views.check_unshared(4, None, said[1])
    with pytest.raises(ValueError, match=r'step 4: .*90% of the prompts .* tokens\.unshare'):
        views.check_unshared(4, None, said[0])
    of_members = {'shared': np.array([0.0, np.nan, 0.5])}
    with pytest.raises(ValueError, match='50%'):
        views.check_unshared(4, None, of_members)


def test_prototypes_are_there_where_they_are_compared_with_and_nowhere_else():
    key, w = jax.random.key(0), light()
    without = {k: x for k, x in w.items() if k != 'prototypes'}
    for contrast, params, expected in (
        (contrastive.swav, without, r'\[.*\], expected the part, for swav'),
        (functools.partial(contrastive.simcse, temperature=0.1), w, 'expected no such part'),
    ):
        with pytest.raises(ValueError, match=f'prototypes: found {expected}|{expected}'):
            views.preference(Light, contrast)(params, pack(), key)
    tx = views.on_sphere(optax.sgd(0.1))
    head = {'head': w['head']}
    with pytest.raises(ValueError, match=r"prototypes: found \['head'\], expected that part"):
        tx.update(head, tx.init(head), head)


def assert_same(found, want):
    (metrics, grads), (of_metrics, of_grads) = found, want
    for name, x in of_metrics.items():
        np.testing.assert_allclose(metrics[name], x, rtol=1e-5, atol=1e-6, err_msg=name)
    for name, x in of_grads.items():
        size = np.abs(x).max()
        assert size > 0, name
        np.testing.assert_allclose(grads[name] / size, x / size, atol=1e-5, err_msg=name)


@pytest.mark.parametrize('mesh', [(8, 1), (2, 4)], ids=str)
def test_devices_do_not_matter(mesh):
    assert_same(gradients(*mesh), gradients(1, 1))


@pytest.mark.slow
@pytest.mark.parametrize('mesh', [(8, 1), (2, 4)], ids=str)
def test_devices_do_not_matter_to_a_decoder(mesh):
    assert_same(gradients(*mesh, rm=RM), gradients(1, 1, rm=RM))


def test_parts_of_a_batch_are_other_batches():
    """So that the test above would see a device that keeps its items to itself."""
    (whole, _), (parts, _) = gradients(1, 1), gradients(1, 1, parts=4)
    assert abs(whole['contrastive_loss'] - parts['contrastive_loss']) > 0.5


def test_cost_is_two_passes_and_the_products_of_items():
    key = jax.eval_shape(lambda: jax.random.key(0))
    w = {k: parameters()[k] for k in ('backbone', 'head')}
    cost = lambda fn: flops.count(functools.partial(train.gradients, fn), w, {}, pack(), key)  # noqa: E731
    once = cost(train.preference(RM.score, dropout=RATE))
    n = here().size
    # cosines in the loss and for what is logged; the first has two gradients
    products = (1 + 1 + 2) * 2 * n * n * C.D
    assert cost(views.preference(RM, dropout=RATE)) == 2 * once + products


# Prototypes


def test_prototypes_stay_on_the_sphere_and_do_not_decay():
    rng = np.random.default_rng(0)
    draw = lambda *shape: rng.normal(size=shape).astype(np.float32)  # noqa: E731
    params = {'head': {'kernel': draw(6, 1)}, 'prototypes': parameters()['prototypes']}
    grads = jax.tree.map(lambda x: draw(*x.shape), params)
    inner = train.adamw(0.05, weight_decay=0.5, max_grad_norm=np.inf)
    tx = views.on_sphere(inner, rate=3.0)
    updates, _ = jax.jit(tx.update)(grads, tx.init(params), params)
    plain_updates, _ = jax.jit(inner.update)(grads, inner.init(params), params)
    np.testing.assert_array_equal(updates['head']['kernel'], plain_updates['head']['kernel'])
    before = np.asarray(params['prototypes']['kernel'], np.float64)
    after = optax.apply_updates(params, updates)['prototypes']['kernel']
    np.testing.assert_allclose(np.linalg.norm(before, axis=0), 1, rtol=1e-6)
    # Adam's first step is the learning rate, against the sign of the gradient
    moved = before - 3 * 0.05 * np.sign(grads['prototypes']['kernel'])
    np.testing.assert_allclose(after, moved / np.linalg.norm(moved, axis=0), atol=1e-5)
    zero = jax.tree.map(np.zeros_like, grads)
    updates, _ = tx.update(zero, tx.init(params), params)
    np.testing.assert_allclose(updates['prototypes']['kernel'], 0, atol=1e-7)
    assert np.abs(updates['head']['kernel']).max() > 1e-3  # decays


def test_prototypes_are_uniform_on_the_sphere():
    kernel = views.init_prototypes(jax.random.key(0), 8, 4000)['kernel']
    np.testing.assert_allclose(np.linalg.norm(kernel, axis=0), 1, rtol=1e-5)
    np.testing.assert_allclose(np.cov(kernel), np.eye(8) / 8, atol=0.01)


@pytest.mark.slow
def test_training_lowers_both_losses_on_a_mesh():
    mesh = sharding.make_mesh(data=4, fsdp=2)
    tx = views.on_sphere(train.adamw(0.01))
    seen = []
    state = train.fit(
        train.start(parameters(), tx, mesh),
        {},
        lambda i: pack(),
        jax.random.key(0),
        objective=objective(RM),
        tx=tx,
        mesh=mesh,
        steps=25,
        hooks=[(1, lambda done, state, metrics: seen.append(metrics))],
    )
    norms = jnp.linalg.norm(state.trainable['prototypes']['kernel'], axis=0)
    np.testing.assert_allclose(norms, 1, rtol=1e-5)
    for name in ('rm_loss', 'contrastive_loss'):
        x = np.array([m[name] for m in seen])
        assert x[-5:].mean() < x[:5].mean() - 0.05, name
