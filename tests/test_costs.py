"""The formulas of what a model costs, against traced programs and published sizes."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import plain
import pytest

from jaxrm import costs, flops, heads, packing, plan_compile, plan_models, reward, train, tree
from jaxrm.backbones.layers import Config, Decoder, Kind

LLAMA = Config(V=1009, D=96, F=200, L=5, Q=6, K=2, H=20)
# The window of the top layer alone, since `flops.count` takes the widest of several kinds.
GEMMA = dataclasses.replace(
    LLAMA,
    post_norms=True,
    qk_norm=True,
    biases=('q', 'k'),
    kinds=(Kind(window=40), Kind()),
    layer_kinds=(1, 1, 1, 1, 0),
)
SHAPE = packing.Shape(tokens=256, rows=((4, 64), (3, 128)), prompts=5, candidates=3)
PACKS = 2
LOAD = costs.of_shape(SHAPE, PACKS)
REMATS = ('none', 'dots', 'mlp', 'full')


def model(c, method):
    backbone = Decoder(c, jnp.bfloat16, attention=flops.row_attention, remat=method.remat)
    return reward.RewardModel(backbone, heads.Scalar())


@functools.cache
def parts(c, method):
    """(what learns, what is frozen) as shapes."""
    return plan_compile.parts(model(c, costs.SCORING), method)


@functools.cache
def pack():
    found = packing.fill(plain.random_tokens([2]), [np.arange(1)], SHAPE, count=PACKS)
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(np.shape(x), jnp.result_type(x)), found)


def program(c, method):
    """The gradients of a step, or the scores, and their arguments as shapes."""
    learning, frozen = parts(c, method)
    score = model(c, method).score
    if method.learns == 'nothing':
        return score, ({**learning, **frozen}, pack())
    key = jax.eval_shape(lambda: jax.random.key(0))
    step = functools.partial(train.gradients, train.preference(score))
    return step, (learning, frozen, pack(), key)


QV = ('q', 'v')
ADAPTER, EVERYTHING = ('adapter', 4, costs.LINEARS), ('everything', 0, costs.LINEARS)
FAST = [
    (LLAMA, costs.SCORING),
    (GEMMA, costs.Method('adapter', 4, QV, 'none')),
    (LLAMA, costs.Method(*ADAPTER, 'full')),
    (GEMMA, costs.Method(*EVERYTHING, 'mlp')),
]
MORE = [
    (c, costs.Method(*how, remat))
    for c in (LLAMA, GEMMA)
    for how in (('nothing', 4, QV), ('adapter', 4, QV), ADAPTER, EVERYTHING)
    for remat in (('none',) if how[0] == 'nothing' else REMATS)
]


def named(case):
    c, m = case
    return f'{"gemma" if c is GEMMA else "llama"}-{m.learns}-{m.rank}-{len(m.targets)}-{m.remat}'


@pytest.mark.parametrize(
    'case',
    FAST + [pytest.param(m, marks=pytest.mark.slow) for m in MORE if m not in FAST],
    ids=named,
)
def test_flops_are_those_of_the_traced_program(case):
    c, method = case
    step, args = program(c, method)
    assert costs.step(c, LOAD, method).total == flops.count(step, *args)


def test_members_cost_as_many_times_one():
    one = costs.Method('adapter', 4)
    assert costs.step(LLAMA, LOAD, dataclasses.replace(one, members=3)).total == (
        3 * costs.step(LLAMA, LOAD, one).total
    )


def scans(jaxpr, length):
    for e in jaxpr.eqns:
        if e.primitive.name == 'scan' and e.params['length'] == length:
            yield e
        else:
            for inner in flops.inner(e):
                yield from scans(inner, length)


def stacked(c, method):
    """Bytes that the scan over layers, forward, leaves for the one backward."""
    step, args = program(c, method)
    forward = next(scans(jax.make_jaxpr(step)(*args).jaxpr, c.L - 1))
    kept = [v.aval for v in forward.outvars if v.aval.ndim and v.aval.shape[0] == c.L - 1]
    return sum(x.size * x.dtype.itemsize for x in kept if x.size >= LOAD.tokens)


@pytest.mark.parametrize('learns', ['adapter', 'everything'])
@pytest.mark.parametrize('remat', ['full', 'mlp', 'dots'])
def test_activations_are_what_the_scan_over_layers_leaves(learns, remat):
    method = costs.Method(learns, 4 * (learns == 'adapter'), remat=remat)
    assert costs.activations(LLAMA, LOAD, method) == stacked(LLAMA, method)


@pytest.mark.parametrize('learns', ['adapter', 'everything'])
def test_activations_without_rematerialisation(learns):
    """To 3 %: small things aside, and what a kernel keeps of rows, which `flops` does not do."""
    method = costs.Method(learns, 4 * (learns == 'adapter'), remat='none')
    rows = sum(n * s for n, s in LOAD.rows)
    kernels = 2 * (LLAMA.L - 1) * rows * (LLAMA.Q * LLAMA.H + 2 * LLAMA.Q)
    want = stacked(LLAMA, method) + kernels
    assert costs.activations(LLAMA, LOAD, method) == pytest.approx(want, rel=0.03)


@pytest.mark.parametrize('c', [LLAMA, GEMMA], ids=['llama', 'gemma'])
def test_leaves_are_those_of_the_model(c):
    method = costs.Method('adapter', 4, QV)
    learning, frozen = parts(c, method)
    shapes = lambda t: {n: x.shape for n, x in tree.flatten(t).items()}  # noqa: E731
    assert costs.backbone_leaves(c) == shapes(frozen['backbone'])
    assert costs.adapter_leaves(c, method) == shapes(learning['lora'])


@pytest.mark.parametrize(
    ('name', 'published', 'separate_head'),
    [
        ('llama-3-8b', 8_030_261_248, True),
        ('llama-3.2-1b', 1_235_814_400, False),
        ('mistral-7b', 7_248_023_552, True),
        ('qwen2.5-7b', 7_615_616_512, True),
        ('qwen3-8b', 8_190_735_360, True),
        ('gemma-2-2b', 2_614_341_888, False),
        ('gemma-2-9b', 9_241_705_984, False),
    ],
)
def test_sizes_of_known_models(name, published, separate_head):
    c = plan_models.config(name, plan_models.config_json(name))
    assert c.tied != separate_head
    assert costs.elements(costs.backbone_leaves(c)) == published - separate_head * c.V * c.D


def test_state_of_adam_and_of_frozen_weights():
    total = costs.elements(costs.backbone_leaves(LLAMA))
    low = costs.elements(costs.adapter_leaves(LLAMA, costs.Method('adapter', 4)))
    adapter = costs.state(LLAMA, costs.Method('adapter', 4, members=2))
    n = 2 * (low + LLAMA.D)
    assert adapter == (2 * total, 4 * n, 8 * n, 4 * n)
    n = total + LLAMA.D
    assert costs.state(LLAMA, costs.Method('everything', 0)) == (4 * n, 0, 8 * n, 4 * n)
    assert costs.state(LLAMA, costs.SCORING) == (2 * total, 4 * LLAMA.D, 0, 0)


def test_load_of_records_is_every_real_token_once():
    t = plain.random_tokens([2, 3, 1])
    load = costs.of_tokens(t)
    rows = [len(row) for i in range(3) for row in plain.rows(t, i)]
    assert load.tokens == len(t.ids)
    assert sorted(s for n, s in load.rows for _ in range(n)) == sorted(rows)
    gates = [int(t.gate[i]) + 1 for i in range(3) for _ in plain.rows(t, i)]
    assert load.seen == sum(rows) + sum(gates)
    assert load.reads == 2 * len(rows)


@pytest.mark.parametrize(('length', 'window'), [(7, None), (7, 3), (3, 7)])
def test_pairs_of_a_row(length, window):
    want = sum(1 for i in range(length) for j in range(i + 1) if i - j < (window or length))
    assert costs.pairs(length, window) == want


def test_wrong_methods():
    with pytest.raises(ValueError, match='targets'):
        costs.Method('adapter', 4, ('q_proj',))
    with pytest.raises(ValueError, match='rank'):
        costs.Method('adapter', 0)


def test_what_memory_must_move_is_every_operand_once():
    """Llama 3 8B: 4.5 MB a token forward, weights of 13.96 GB."""
    c = plan_models.config('llama-3-8b', plan_models.config_json('llama-3-8b'))
    load = costs.Load(1, ((1, 1),), 2, 2, 1)
    moved = costs.moved(c, load, costs.SCORING, 0)
    sizes = costs.linears(c)
    inputs = {'qkv': c.D, 'o': c.Q * c.H, 'gate_up': c.D, 'down': c.F}
    once = sum(out for _, out in sizes.values()) + sum(inputs.values())
    assert moved.activations == 2 * c.L * once
    assert moved.weights == 2 * c.L * sum(math.prod(s) for s in sizes.values())
    assert moved.optimiser == 0
