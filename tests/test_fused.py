"""Fused linears against the decoder on the tree they are a view of: values, dots, places, bytes."""

import dataclasses
import functools
import itertools

import jax
import numpy as np
import plain
import programs
import pytest
from torch_goldens import GOLDENS

from jaxrm import (
    checkpoint,
    flops,
    fused,
    heads,
    lora,
    members,
    packing,
    reward,
    sharding,
    train,
    tree,
)
from jaxrm.backbones.layers import Decoder

SHAPE = packing.Shape(tokens=40, rows=((6, 16),), prompts=4, candidates=4)
CONFIGS = {'tiny': plain.TINY, **plain.FAMILIES}
CONFIGS['one layer'] = dataclasses.replace(plain.TINY, L=1)
CONFIGS['a bias on q alone'] = dataclasses.replace(plain.TINY, biases=('q', 'up'))
KEY = jax.random.key(0)


@functools.cache
def world(name='tiny', targets=lora.ALL_LINEAR):
    """(reward model, four packs, frozen parts, learning parts) with random values everywhere."""
    config = CONFIGS[name]
    rm = reward.RewardModel(Decoder(config), heads.Scalar(), lora_scale=0.5)
    tokens = plain.random_tokens([2, 1, 4, 3, 2])
    packs = packing.plan(tokens, SHAPE, order=np.arange(5))
    pack = packing.fill(tokens, packs, SHAPE, count=4)
    shapes = jax.eval_shape(rm.backbone.init, KEY, pack)['params']
    adapter = jax.eval_shape(lambda: lora.init(shapes, KEY, rank=2, targets=targets))
    head = np.linspace(-0.5, 0.5, config.D, dtype=np.float32)[:, None]
    trainable = {'lora': plain.random_tree(adapter, 1, 0.5), 'head': {'kernel': head}}
    return rm, pack, {'backbone': plain.random_tree(shapes, size=0.7)}, trainable


def step(rm):
    """((loss, metrics), gradients) of what learns, as a function of all parameters."""
    return functools.partial(train.gradients, train.preference(rm.score))


def shapes_of(params):
    return {name: np.shape(x) for name, x in tree.flatten(params).items()}


def on_host(params):
    return jax.tree.map(np.asarray, params)


def close(got, want, relative=1e-5):
    scale = max(np.abs(x).max() for x in jax.tree.leaves(want))
    for name, x in tree.flatten(want).items():
        own = max(np.abs(x).max(), 1e-3 * scale)
        np.testing.assert_allclose(
            tree.flatten(got)[name] / own, x / own, rtol=0, atol=relative, err_msg=name
        )


@pytest.mark.parametrize('parts', [1, 2])
@pytest.mark.parametrize('name', CONFIGS)
def test_split_is_the_inverse(name, parts):
    frozen = world(name)[2]
    for params in (frozen, on_host(frozen)):
        view = fused.fuse(params, parts=parts)
        back = tree.flatten(fused.split(view))
        assert back.keys() == tree.flatten(params).keys()
        for leaf, x in tree.flatten(params).items():
            assert type(back[leaf]) is type(x)
            np.testing.assert_array_equal(back[leaf], x, err_msg=leaf)
        again = fused.fuse(view, parts=parts)
        jax.tree.map(np.testing.assert_array_equal, again, view)
        jax.tree.map(np.testing.assert_array_equal, fused.split(params), params)


def test_kernels_by_hand():
    """Two parts: each has its half of the columns of q, of k and of v."""
    c, w = plain.TINY, world()[2]['backbone']
    view = fused.fuse(w, parts=2)
    Q, K = c.Q * c.H // 2, c.K * c.H // 2
    assert shapes_of(view)['layers/qkv/kernel'] == (c.L - 1, c.D, 2, Q + 2 * K)
    for part in range(2):
        got = view['layers']['qkv']['kernel'][:, :, part]
        sizes = zip('qkv', (Q, K, K), strict=True)
        cut = [w['layers'][n]['kernel'][..., part * s :][..., :s] for n, s in sizes]
        np.testing.assert_array_equal(got, np.concatenate(cut, -1))
    # in the top layer q stays by itself: it is wanted at few tokens
    rest = {'o', 'down', 'gate_up', 'attn_norm', 'mlp_norm'}
    assert set(view['top']) == {'q', 'kv', *rest}
    assert set(view['layers']) == {'qkv', *rest}
    one = fused.fuse(w)['top']['gate_up']['kernel']
    want = [w['top'][n]['kernel'] for n in ('gate', 'up')]
    np.testing.assert_array_equal(one[:, 0], np.concatenate(want, -1))


def test_what_is_not_alike_stays_apart():
    view = fused.fuse(world('a bias on q alone')[2])['backbone']
    assert {'q', 'k', 'v', 'gate', 'up'} <= set(view['layers'])
    assert {'q', 'kv', 'gate', 'up'} <= set(view['top'])
    w = on_host(world()[2]['backbone'])
    w['layers']['up'] = {'kernel': w['layers']['up']['kernel'].astype(np.float16)}
    assert {'qkv', 'gate', 'up'} <= set(fused.fuse(w)['layers'])
    both = {**world('llama')[2], 'lora': world()[3]['lora'], 'head': {}}
    assert fused.fuse(both)['lora'] == both['lora']
    assert fused.fuse(both)['head'] == {}


QUICK = ('llama', 2)  # biases and adapters everywhere


@functools.cache
def plain_step(name, targets):
    rm, pack, frozen, trainable = world(name, targets)
    return jax.jit(step(rm))(trainable, frozen, pack, KEY)


CASES = [
    pytest.param(name, parts, id=f'{name}-{parts}', marks=[pytest.mark.slow] * (case != QUICK))
    for case in itertools.product(CONFIGS, (1, 2))
    for name, parts in [case]
]


@pytest.mark.parametrize(('name', 'parts'), CASES)
def test_scores_and_gradients_are_those_of_the_plain_tree(name, parts):
    for targets in (lora.ALL_LINEAR, lora.QV) if name == 'tiny' else (lora.ALL_LINEAR,):
        rm, pack, frozen, trainable = world(name, targets)
        metrics, grads = jax.jit(step(rm))(trainable, fused.fuse(frozen, parts=parts), pack, KEY)
        want_metrics, want = plain_step(name, targets)
        for key, x in want_metrics.items():
            np.testing.assert_allclose(metrics[key], x, rtol=1e-6, atol=1e-6, err_msg=key)
        close(grads, want)


def test_states_of_all_tokens_and_without_an_adapter():
    rm, pack, frozen, _ = world()
    states = jax.jit(functools.partial(rm.states, read='all'))
    got = states(fused.fuse(frozen, parts=2), pack)
    np.testing.assert_allclose(got, states(frozen, pack), rtol=0, atol=3e-6)


def test_a_blend_of_fused_trees():
    rm, pack, frozen, trainable = world('llama')
    other = plain.random_tree(frozen['backbone'], 7)
    share = np.linspace(0.2, 0.8, plain.TINY.L)
    score = jax.jit(rm.score)

    def blended(of):
        ours, theirs = of(frozen['backbone']), of(other)
        return score({'backbone': ours, 'head': trainable['head'],
                      'blend': reward.blend(ours, theirs, share)}, pack)  # fmt: skip

    want = blended(lambda w: w)
    np.testing.assert_allclose(blended(fused.fuse), want, rtol=0, atol=3e-6)
    assert np.abs(want - score({**frozen, 'head': trainable['head']}, pack)).max() > 1e-3


@pytest.mark.slow
def test_members_share_a_fused_base():
    rm, pack, frozen, trainable = world()
    twice = members.stack([trainable, jax.tree.map(lambda x: -x, trainable)])
    score = jax.jit(members.scored(rm.score, how='vmap'))
    want = score((frozen, twice), pack)
    np.testing.assert_allclose(score((fused.fuse(frozen), twice), pack), want, rtol=0, atol=3e-6)


# What the program is made of.


def equations(fn, *args):
    """All of the program's text, those of a loop's body once."""

    def inner(jaxpr):
        for e in jaxpr.eqns:
            yield e
            for x in jax.tree.leaves(list(e.params.values()), is_leaf=lambda x: hasattr(x, 'eqns')):
                sub = getattr(x, 'jaxpr', x)
                if hasattr(sub, 'eqns'):
                    yield from inner(sub)

    return inner(jax.make_jaxpr(fn)(*args).jaxpr)


def dots(fn, *args):
    return sum(e.primitive.name == 'dot_general' for e in equations(fn, *args))


@pytest.mark.parametrize('name', ['tiny', 'qwen2'])
def test_fewer_products_of_as_many_flops(name):
    rm, pack, frozen, trainable = world(name)
    view, score = fused.fuse(frozen), lambda w, pack: rm.score({**w, **head}, pack)
    head = {'head': trainable['head']}
    assert flops.count(score, view, pack) == flops.count(score, frozen, pack)
    # a layer: q, k, v to one and gate, up to one; the top layer: k, v to one and gate, up to one
    assert dots(score, view, pack) == dots(score, frozen, pack) - 3 - 2
    args = pack, KEY
    want = flops.count(step(rm), trainable, frozen, *args)
    assert flops.count(step(rm), trainable, view, *args) == want
    # Forward as above, and the same number of `a`; backward the gradients of states and of `a`
    fewer = dots(step(rm), trainable, frozen, *args) - dots(step(rm), trainable, view, *args)
    assert fewer == 2 * (3 + 2) + (3 + 2) * 3


def test_a_step_makes_no_copy_of_the_base():
    """What the forward loop keeps for the backward one has no stack of kernels in it."""
    rm, pack, frozen, trainable = world()
    for parts in (1, 2):
        view = fused.fuse(frozen, parts=parts)
        sizes = {x.size for x in jax.tree.leaves(view['backbone']['layers']) if x.ndim > 2}
        loops = [e for e in equations(step(rm), trainable, view, pack, KEY)
                 if e.primitive.name == 'scan']  # fmt: skip
        assert len(loops) >= 2
        assert not sizes & {x.aval.size for e in loops for x in e.outvars}


def test_a_base_is_on_the_devices_once():
    mesh = sharding.make_mesh(fsdp=2, tensor=2)
    _, _, frozen, trainable = world('llama')
    host = on_host({**frozen, 'lm_head': {}, 'lora': trainable['lora']})
    del frozen, trainable
    before = {id(x) for x in jax.live_arrays()}
    placed = fused.place(host, mesh)
    new = [x for x in jax.live_arrays() if id(x) not in before]
    assert sum(x.nbytes for x in new) == sum(x.nbytes for x in jax.tree.leaves(host))
    assert placed['lm_head'] == {}
    kernel = placed['backbone']['layers']['qkv']['kernel']
    c = plain.TINY
    wide = (c.Q + 2 * c.K) * c.H // 2
    assert {s.data.shape for s in kernel.addressable_shards} == {(c.L - 1, c.D // 2, 1, wide)}
    again = sharding.place(placed, mesh)
    assert all(a is b for a, b in zip(jax.tree.leaves(again), jax.tree.leaves(placed), strict=True))
    jax.tree.map(np.testing.assert_array_equal, on_host(fused.split(placed)), host)


def test_what_the_mesh_does_not_divide_is_named_as_it_is_stored():
    mesh, config = sharding.make_mesh(tensor=4), dataclasses.replace(plain.TINY, K=1, H=6)
    pack = world()[1]
    shapes = jax.eval_shape(Decoder(config).init, KEY, pack)['params']
    host = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), shapes)
    with pytest.raises(ValueError, match=r'layers/k/kernel: dimension 2: found 6, .* 4'):
        fused.place(host, mesh)


def test_a_checkpoint_has_the_tensors_it_came_with(tmp_path):
    like = checkpoint.load_pretrained(GOLDENS / 'seqcls')
    mesh = sharding.make_mesh(fsdp=2, tensor=2)
    shapes = jax.eval_shape(lambda: lora.init(like.backbone, KEY, rank=2))
    params = {**like.params, 'lora': plain.random_tree(shapes, 1, 0.2)}
    for name, given in (('plain', params), ('fused', fused.place(params, mesh))):
        checkpoint.export(tmp_path / name, given, like, lora_scale=0.5)
    written = [(tmp_path / n / 'model.safetensors').read_bytes() for n in ('plain', 'fused')]
    assert written[0] == written[1]
    assert written[0] != (GOLDENS / 'seqcls' / 'model.safetensors').read_bytes()


def test_an_adapter_is_not_made_for_a_view():
    with pytest.raises(ValueError, match=r'backbone: found layers/qkv/kernel'):
        lora.init(fused.fuse(world()[2]['backbone']), KEY, rank=2)
    with pytest.raises(ValueError, match='has no kernel'):
        lora.fold(fused.fuse(world()[2]['backbone']), world()[3]['lora'], 1.0)


def compiled_step(place, sizes):
    rm, pack, frozen, trainable = world()
    mesh = sharding.make_mesh(**sizes)
    trainable = sharding.place(trainable, mesh)
    out = sharding.everywhere(mesh), sharding.shardings(trainable, mesh)
    args = trainable, place(frozen, mesh), sharding.place_batch(pack, mesh), KEY
    with jax.set_mesh(mesh):
        return jax.jit(step(rm), out_shardings=out).lower(*args).compile(), args


@pytest.mark.slow
def test_heads_on_several_devices():
    """The same numbers, and less to send: of a layer's states five gradients become two."""
    sizes = {'data': 1, 'tensor': 2, 'devices': jax.devices()[:2]}
    sent, values = {}, {}
    for how, place in (('plain', sharding.place), ('fused', fused.place)):
        program, args = compiled_step(place, sizes)
        sent[how] = programs.collectives(program.as_text())
        values[how] = jax.device_get(program(*args))
    np.testing.assert_allclose(values['fused'][0]['loss'], values['plain'][0]['loss'], rtol=1e-6)
    close(values['fused'][1], values['plain'][1])
    lower = plain.TINY.L - 1
    # forward o and down; backward q, k, v, gate and up; in the top layer the gradients of k and v
    want = {'plain': lower * (2 + 5) + 2, 'fused': lower * (2 + 2) + 1}
    states = (4, SHAPE.tokens, plain.TINY.D)
    for how, found in sent.items():
        assert sum(s.times for s in found if s.shape == states) == want[how]
        assert {s.kind for s in found} == {'all-reduce', 'all-gather'}  # that of the embedding
