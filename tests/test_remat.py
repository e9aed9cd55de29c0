"""What each policy of rematerialisation keeps and computes again, and which one is chosen."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import plain
import pytest

from jaxrm import (
    costs,
    flops,
    fused,
    heads,
    lora,
    members,
    packing,
    plan,
    remat,
    reward,
    sharding,
    train,
)
from jaxrm.backbones.layers import KEPT, Config, Decoder

LLAMA = Config(V=128256, D=4096, F=14336, L=32, Q=32, K=8, H=128)
SHAPE = packing.Shape(tokens=72, rows=((4, 8), (6, 16)), prompts=4, candidates=2)
GEMMA = dataclasses.replace(plain.FAMILIES['gemma2'], kinds=plain.TINY.kinds, layer_kinds=())
CONFIGS = {'tiny': plain.TINY, 'gemma2': GEMMA}
KEY = jax.eval_shape(lambda: jax.random.key(0))
RANK = 3


@functools.cache
def program(name, how, targets):
    """(gradients, their arguments as shapes), of an adapter; of the whole model where None."""
    c = CONFIGS[name]
    decoder = Decoder(c, attention=flops.row_attention, remat=how)
    rm = reward.RewardModel(decoder, heads.Scalar())
    backbone = jax.eval_shape(rm.init_backbone, KEY)
    learns = {'head': {'kernel': jax.ShapeDtypeStruct((c.D, 1), jnp.float32)}}
    frozen = {'backbone': backbone}
    if targets is None:
        learns, frozen = learns | frozen, {}
    else:
        pattern = f'/({"|".join(targets)})/'
        adapter = functools.partial(lora.init, backbone, rank=RANK, targets=pattern)
        learns['lora'] = jax.eval_shape(adapter, KEY)
    packs = packing.fill(plain.random_tokens([2]), [np.arange(1)], SHAPE)
    return functools.partial(train.gradients, train.preference(rm.score)), learns, frozen, packs


def method(how, targets):
    if targets is None:
        return costs.Method('everything', rank=0, remat=how)
    return costs.Method('adapter', rank=RANK, targets=targets, remat=how)


@pytest.mark.parametrize(
    'targets', [costs.LINEARS, ('q', 'v'), None], ids=['linears', 'qv', 'whole']
)
@pytest.mark.parametrize('how', KEPT)
@pytest.mark.parametrize(
    'name', ['tiny', pytest.param('gemma2', marks=pytest.mark.slow)]
)  # fmt: skip
def test_what_is_computed_again(name, how, targets):
    step, learns, frozen, pack = program(name, how, targets)
    load = costs.of_shape(SHAPE)
    want = costs.step(CONFIGS[name], load, method(how, targets))
    found = flops.count(step, learns, frozen, pack, KEY)
    assert found == want.total
    none = costs.step(CONFIGS[name], load, method('none', targets)).total
    assert found >= none


def kept(jaxpr, layers):
    """Elements of a token of the stream that the forward loop hands to the backward one."""
    for e in jaxpr.eqns:
        if e.primitive.name == 'scan' and e.params['length'] == layers:
            made = [x.aval.shape for x in e.outvars]
            here = [s for s in made if s[:1] == (layers,) and SHAPE.tokens in s]
            return sum(map(math.prod, here)) // layers // SHAPE.tokens
        for x in e.params.values():
            sub = getattr(x, 'jaxpr', x)
            if hasattr(sub, 'eqns') and (found := kept(sub, layers)) is not None:
                return found
    return None


@pytest.mark.parametrize('how', KEPT)
def test_what_is_kept(how):
    c = plain.TINY
    step, learns, frozen, pack = program('tiny', how, costs.LINEARS)
    q, k, low = c.Q * c.H, c.K * c.H, RANK * 7
    want = {
        'full': c.D,
        'mlp': c.D + 2 * c.F + low,
        'dots': c.D + q + 2 * k + c.D + 2 * c.F + low,
    }[how]
    assert costs.saved(c, method(how, costs.LINEARS)) == (want, 0)
    for backbone in (frozen, jax.eval_shape(fused.fuse, frozen)):
        jaxpr = jax.make_jaxpr(step)(learns, backbone, pack, KEY).jaxpr
        assert kept(jaxpr, c.L - 1) == want


def chosen(monkeypatch, gigabytes, tokens, *, mesh=None, of=None, **options):
    mesh = mesh or sharding.make_mesh(devices=jax.devices()[:1])
    monkeypatch.setattr(remat, 'memory', lambda mesh: gigabytes * 10**9)
    shape = packing.Shape(tokens, ((tokens // 512, 512), (tokens // 512, 1024)), 64, 2)
    return remat.choose(LLAMA, of or costs.Method(), shape, mesh, **options)


def test_what_is_chosen(monkeypatch):
    """Of an adapter on 8B: 15 GB of weights, and by the token about 2.7 and 2 MB beside work."""
    assert chosen(monkeypatch, 78, 8192) == 'dots'
    ladder = [chosen(monkeypatch, 78, n) for n in range(4096, 60000, 4096)]
    assert sorted(ladder, key=remat.LADDER.index) == ladder
    assert set(ladder) == set(remat.LADDER)
    assert chosen(monkeypatch, 20, 8192) == 'full'
    assert chosen(monkeypatch, 78, 4096, packs=8) == chosen(monkeypatch, 78, 32768)
    assert chosen(monkeypatch, 60, 8192) == 'dots'
    assert chosen(monkeypatch, 60, 8192, width=4) == 'full'
    over = sharding.make_mesh(data=1, fsdp=8)
    assert chosen(monkeypatch, 30, 8192) == 'full'
    assert chosen(monkeypatch, 30, 8192, mesh=over) != 'full'  # weights are shared out
    everything = costs.Method('everything', rank=0)
    assert chosen(monkeypatch, 78, 1024, of=everything) == 'full'  # 32 GB of weights, and moments


def test_members_one_after_the_other_keep_what_one_keeps(monkeypatch):
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    five = costs.Method(members=5)
    needed = {
        (members, at_once): remat.needed(
            LLAMA, costs.Method(members=members), SHAPE, mesh, packs=100, width=2, at_once=at_once
        )
        for members, at_once in ((1, True), (5, False), (5, True))
    }
    state = 12 * (costs.elements(costs.adapter_leaves(LLAMA, five)) + LLAMA.D)
    assert needed[5, False] - needed[1, True] == 4 * state  # weights and moments in float32
    assert needed[5, True] - needed[5, False] > 4 * state // 3  # and gradients, and activations
    assert chosen(monkeypatch, 78, 8192, of=five) == chosen(monkeypatch, 74, 8192)


def test_members_take_their_step_at_once_where_memory_holds_them(monkeypatch):
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    full = costs.Method(remat='full', members=5)
    shape = SHAPE._replace(tokens=8192, rows=((16, 512), (16, 1024)))

    def how(gigabytes, of=full, **options):
        memory = None if gigabytes is None else gigabytes * 10**9
        monkeypatch.setattr(remat, 'memory', lambda mesh: memory)
        return members.choose(LLAMA, of, shape, mesh, **options)

    needed = remat.needed(LLAMA, full, shape, mesh, packs=1, width=2) / 1e9
    assert how(needed / plan.SHARE + 0.1) == 'vmap'
    assert how(needed) == 'scan'
    assert how(needed, dataclasses.replace(full, members=2)) == 'vmap'
    assert how(needed / plan.SHARE + 0.1, packs=2) == 'scan'
    assert how(None) == ('scan' if jax.default_backend() == 'cpu' else 'vmap')


def test_without_a_known_memory_nothing_is_computed_again():
    mesh = sharding.make_mesh()
    assert jax.default_backend() != 'cpu' or remat.memory(mesh) is None
    if jax.default_backend() == 'cpu':
        assert remat.choose(LLAMA, costs.Method(), SHAPE, mesh) == 'none'


def test_a_policy_that_there_is_not():
    rm = reward.RewardModel(Decoder(plain.TINY, remat='auto'), heads.Scalar())
    backbone = rm.init_backbone(jax.random.key(0))
    pack = packing.fill(plain.random_tokens([2]), [np.arange(1)], SHAPE)
    with pytest.raises(ValueError, match="remat: found 'auto', expected none or one of"):
        rm.score({'backbone': backbone, 'head': {}}, pack)
