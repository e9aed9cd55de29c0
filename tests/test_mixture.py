"""The inner model of DMoERM against torch's, and what of it depends on what."""

import functools
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from torch_goldens import GOLDENS, assert_close, load, packed

from jaxrm import heads, mixture, mixture_files, reward, train, tree
from jaxrm.data import DataError, Ids, Preference
from jaxrm.mixture_files import Plan

MIXTURE = GOLDENS.parent / 'mixture'
EXPERTS = ('logic', 'tone', 'length')
PLAN = Plan(('facts',), {'facts': EXPERTS})


@functools.cache
def values():
    with np.load(MIXTURE / 'values.npz') as file:
        return dict(file)


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    """The golden inner model as the only one of a DMoERM, without a router."""
    path = tmp_path_factory.mktemp('dmoerm')
    mixture_files.write_plan(path, PLAN)
    shutil.copytree(GOLDENS / 'seqcls', path / 'facts' / 'base')
    shutil.copytree(MIXTURE / 'experts', path / 'facts' / 'experts')
    shutil.copy(MIXTURE / 'mixture.safetensors', path / 'facts')
    return path


@pytest.fixture(scope='module')
def inner(folder):
    return mixture_files.load_inner(folder, 'facts')


@functools.cache
def features_of(model):
    return jax.jit(model.features)


def features(model, params):
    """[rows, E x D] of the golden rows."""
    pack, at = packed('seqcls')
    return features_of(model)(params, pack), at


def split(z, at):
    found = np.asarray(z.answer_BMD)[at, 0]
    return found.reshape(len(at), -1, load('seqcls').config.D)


# Against torch


def test_features_heads_and_score_are_those_of_torch(inner):
    model, params, _ = inner
    z, at = features(model, params)
    assert_close(split(z, at), values()['z'])
    assert_close(np.asarray(model.capabilities(params, z))[at, 0], values()['r'])
    assert_close(np.asarray(model.rewards(params, z))[at, 0], values()['y'])
    assert np.ptp(values()['z'], axis=1).max() > 0.1  # experts differ
    slope = params['head']['slope']
    flat = {**params, 'head': {**params['head'], 'slope': np.zeros_like(slope)}}
    assert np.abs(np.asarray(model.rewards(flat, z))[at, 0] - values()['y']).max() > 1e-3


# Experts


def changed(params, expert, leaf='lora/layers/q/b'):
    flat = {k: np.array(x) for k, x in tree.flatten(params['experts']).items()}
    flat[leaf][expert] += 1
    return {**params, 'experts': tree.unflatten(flat)}


def test_an_expert_without_effect_is_the_base(inner):
    model, params, base = inner
    flat = tree.flatten(params['experts'])
    still = {k: np.zeros_like(x) if k.endswith('/b') else x for k, x in flat.items()}
    z, at = features(model, {**params, 'experts': tree.unflatten(still)})
    one = reward.RewardModel(model.backbone, heads.Scalar())
    own = jax.jit(one.features)({'backbone': base.backbone}, packed('seqcls')[0])
    for e in range(len(EXPERTS)):
        np.testing.assert_allclose(
            split(z, at)[:, e], np.asarray(own.answer_BMD)[at, 0], rtol=0, atol=1e-6
        )


def test_experts_do_not_touch_each_other(inner):
    model, params, _ = inner
    before, at = features(model, params)
    after, _ = features(model, changed(params, 1))
    same = [np.array_equal(a, b) for a, b in zip(
        split(before, at).swapaxes(0, 1), split(after, at).swapaxes(0, 1), strict=True
    )]  # fmt: skip
    assert same == [True, False, True]


def test_an_order_of_experts_means_nothing(inner):
    model, params, _ = inner
    z, at = features(model, params)
    turned = mixture.permuted(params, [2, 0, 1])
    other, _ = features(model, turned)
    np.testing.assert_array_equal(split(other, at), split(z, at)[:, [2, 0, 1]])
    assert_close(model.rewards(turned, other), model.rewards(params, z), 1e-6)


def test_a_block_of_zeros_is_no_expert(inner):
    model, params, base = inner
    D, z = base.config.D, features(model, params)[0]
    hidden = params['head']['hidden']
    kernel = np.array(hidden['kernel'])
    kernel[D : 2 * D] = 0
    head = {**params['head'], 'hidden': {**hidden, 'kernel': kernel}}
    rest = {**head, 'hidden': {**hidden, 'kernel': np.delete(kernel, slice(D, 2 * D), axis=0)}}
    without = z._replace(answer_BMD=np.delete(z.answer_BMD, slice(D, 2 * D), axis=-1))
    both = model.rewards({'head': head}, z), model.rewards({'head': rest}, without)
    assert_close(*both, 1e-6)


@pytest.mark.parametrize('experts', [6, 5])
def test_the_head_reads_all_features_and_nothing_else(experts):
    head = mixture.Mixture(None, heads.Mixture(8)).init_head(jax.random.key(0), experts, 8)
    sizes = {name: x.shape for name, x in tree.flatten(head).items()}
    assert sizes == {
        'hidden/kernel': (experts * 8, 8), 'hidden/bias': (8,), 'slope': (1,),
        'out/kernel': (8, 1), 'out/bias': (1,),
    }  # fmt: skip
    assert head['slope'] == 0.25
    assert 0.9 * (experts * 8) ** -0.5 < abs(head['hidden']['kernel']).max() < (experts * 8) ** -0.5


def test_one_copy_of_the_base_is_read(inner):
    """No operation gives as many kernels of the base as there are experts."""
    model, params, base = inner
    kernels = {x.shape for x in jax.tree.leaves(base.backbone) if x.ndim == 3}
    copies = {(len(EXPERTS), *shape) for shape in kernels} | {
        (shape[0], len(EXPERTS), *shape[1:]) for shape in kernels
    }
    made = jax.make_jaxpr(model.score)(params, packed('seqcls')[0])
    text = str(made).replace(' ', '')
    written = {f'[{",".join(map(str, shape))}]' for shape in copies}
    assert not [shape for shape in written if shape in text]
    assert f'[{",".join(map(str, next(iter(kernels))))}]' in text


# What each model reads


def turns(*said):
    roles = ('user', 'assistant') * len(said)
    return tuple({'role': r, 'content': x} for r, x in zip(roles, said, strict=False))


def test_the_inner_model_reads_the_last_turn_and_the_router_all_questions():
    system = {'role': 'system', 'content': 'S'}
    record = Preference((system, *turns('a', 'b', 'c')), ('x', 'y'), group='facts')
    assert mixture.shown(record).messages == turns('c')
    assert mixture.shown(record).responses == ('x', 'y')
    assert mixture.shown(record, 'all') is record
    assert mixture.asked(record) == Preference(turns('a\n\nc'), (), group='facts')
    assert mixture.asked(record._replace(responses=('z',))) == mixture.asked(record)
    ids = Preference(Ids((1, 2)), (Ids((3,)),))
    assert mixture.asked(ids).messages == ids.messages
    with pytest.raises(DataError, match='row 3: messages: found no user turn'):
        mixture.asked(Preference((system,), ('x',)), 'row 3')
    with pytest.raises(ValueError, match="turns: found 'first', expected one of"):
        mixture.shown(record, 'first')


# The router's objective


def test_a_router_learns_from_logits():
    """A softmax of probabilities could not come below 0.905 of three or more classes."""
    head, rng = heads.Router(5), np.random.default_rng(0)
    centre_CD, group_B = rng.normal(size=(5, 8)), rng.integers(0, 5, 64)
    z_BD = (centre_CD[group_B] + 0.1 * rng.normal(size=(64, 8))).astype(np.float32)

    class Pack:
        group_PB = np.append(group_B, -1)[None]

    z_BD = jnp.concatenate([z_BD, jnp.full((1, 8), 1e3)])  # one of no group
    objective = train.classification(lambda params, pack: head.apply({'params': params}, z_BD))
    value_and_grad = jax.jit(
        jax.value_and_grad(lambda p: objective(p, Pack, jax.random.key(0)), has_aux=True)
    )
    params = head.init(jax.random.key(0), z_BD)['params']
    logits = np.asarray(z_BD[:-1], np.float64) @ np.asarray(params['kernel'], np.float64)
    expected = np.log(np.exp(logits).sum(1)) - logits[np.arange(64), group_B]
    (loss, metrics), _ = value_and_grad(params)
    assert_close(loss, expected.mean())
    assert_close(metrics['accuracy'], (logits.argmax(1) == group_B).mean())
    assert metrics['count'] == 64
    for _ in range(200):
        (loss, metrics), grads = value_and_grad(params)
        params = jax.tree.map(lambda p, g: p - 0.5 * g, params, grads)
    assert loss < 0.1
    assert metrics['accuracy'] > 0.95
