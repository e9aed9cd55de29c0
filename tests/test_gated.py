"""Gated multi-objective models: torch's values, what the gate reads, and why a score is what it is.

The goldens are of a module of torch written from the paper; see tests/reference.
"""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gated_tiny import GATED, TALKS, assert_near, five, loaded, record
from torch_goldens import golden

import jaxrm
from jaxrm import heads, packing
from jaxrm.data import Preference
from jaxrm.reward import Features, RewardModel

PARTS = {'rewards': 2e-5, 'weights': 2e-6, 'coefficients': 2e-6, 'score': 5e-5}
VERBOSITY, KEY = 4, jax.random.key(0)


# The head by itself


def drawn(J=5, D=6, *, seed=0, **options):
    """A model without a backbone, its parameters with nothing trivial in them, and features."""
    model = RewardModel(None, heads.Gated(heads.Gate(J, hidden=7, **options)))
    rng = np.random.default_rng(seed)
    draw = lambda x: rng.normal(size=x.shape).astype(np.float32)  # noqa: E731
    inits = {'head': model.init_head, 'gate': model.init_gate}
    shapes = {part: jax.eval_shape(lambda k: init(k, D), KEY) for part, init in inits.items()}
    z = Features(rng.normal(size=(4, 3, D)), rng.normal(size=(4, D)))
    return model, jax.tree.map(draw, shapes), z


def by_hand(params, z, temperature):
    """float64."""
    wide = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
    gate, x = wide['gate'], z.prompt_BD
    for i in range(3):
        x = np.maximum(x @ gate[f'layer_{i}']['kernel'] + gate[f'layer_{i}']['bias'], 0)
    e = np.exp((x @ gate['layer_3']['kernel'] + gate['layer_3']['bias']) / temperature)
    weight_BJ = e / e.sum(1, keepdims=True) * gate['scale'][0]
    adjusted = z.answer_BMD @ wide['head']['regression']['kernel'] @ wide['head']['transform']
    return weight_BJ, np.einsum('bmj,bj->bm', adjusted, weight_BJ)


def taken_apart(model, params, z):
    variables = {'params': {**params['head'], 'gate': params['gate']}}
    return jax.jit(functools.partial(model.head.apply, method='parts'))(variables, *z)


def test_the_head_equals_float64():
    model, params, z = drawn(temperature=3.0)
    weight_BJ, score_BM = by_hand(params, z, 3.0)
    parts = taken_apart(model, params, z)
    assert_near(parts.weight_MJ[:, 0], weight_BJ, 1e-6)
    assert_near(parts.score_M, score_BM, 2e-5)
    assert_near((parts.rate_MJ * parts.coefficient_MJ).sum(-1), score_BM, 2e-5)
    assert_near(jax.jit(model.rewards)(params, z), score_BM, 2e-5)


def test_the_gate_starts_as_torch_would():
    shapes = jax.eval_shape(heads.Gate(19).init, KEY, jnp.zeros((1, 100)))['params']
    kernels = [shapes[f'layer_{i}']['kernel'].shape for i in range(4)]
    assert kernels == [(100, 1024), (1024, 1024), (1024, 1024), (1024, 19)]
    gate = jax.jit(heads.Gate(19, hidden=256, layers=1).init)(KEY, jnp.zeros((1, 100)))['params']
    assert gate['scale'].tolist() == [1.0]
    for part in jax.tree.leaves({k: v for k, v in gate.items() if k != 'scale'}):
        bound = 0.1 if part.shape in ((100, 256), (256,)) else 1 / 16
        assert abs(part).max() <= bound
    kernel = gate['layer_0']['kernel']
    np.testing.assert_allclose([kernel.std(), abs(kernel).max()], [0.1 / 3**0.5, 0.1], rtol=0.01)
    assert {'transform', 'regression'} == set(drawn()[1]['head'])
    np.testing.assert_array_equal(drawn()[0].init_head(KEY, 6)['transform'], np.eye(5))


def test_weights_are_shares_of_the_scale():
    z = np.random.default_rng(0).normal(size=(50, 6))
    for temperature in (1.0, 10.0):
        _, params, _ = drawn(temperature=temperature)
        gate = heads.Gate(5, 7, 3, temperature)
        weight = gate.apply({'params': {**params['gate'], 'scale': jnp.array([1.7])}}, z)
        assert (weight >= 0).all()
        assert_near(weight.sum(-1), 1.7, 1e-6)
        assert weight.std() > 1e-3
    flat = heads.Gate(5, 7, 3, 1e9).apply({'params': params['gate']}, z)
    assert_near(flat, float(params['gate']['scale'][0]) / 5, 1e-6)


def test_the_weight_of_a_column_that_is_zero_does_not_matter():
    """That of verbosity, which the transform takes out of itself."""
    model, params, z = drawn()
    gate, (a, b) = params['gate'], (np.array([0.1, 0.3, 0.2, 0.3, 0.1]), np.zeros(5))
    b[:] = a
    b[VERBOSITY] = 0.9
    kernel = jnp.zeros_like(gate['layer_3']['kernel'])
    params['head']['transform'] = np.eye(5, dtype=np.float32)
    params['head']['transform'][VERBOSITY] = [-0.4, -0.3, 0.0, -0.7, 0.0]
    scores = []
    for weight in (a, b):
        last = {'kernel': kernel, 'bias': jnp.float32(10 * np.log(weight))}
        new = {**gate, 'layer_3': last, 'scale': jnp.float32([weight.sum()])}
        scores.append(model.rewards({**params, 'gate': new}, z))
    assert_near(scores[0], scores[1], 1e-6)
    assert np.std(scores[0]) > 0.1


def slope(model, params, z):
    """Of the Bradley-Terry loss of pairs, by the gate's parameters."""

    def loss(gate):
        score_BM = model.rewards({**params, 'gate': gate}, z)
        return -jax.nn.log_sigmoid(score_BM[:, 0] - score_BM[:, 1]).mean()

    return jax.jit(jax.grad(loss))(params['gate'])


@pytest.mark.parametrize('script', [False, True])
def test_the_gate_of_the_public_script_cannot_learn_to_route(script):
    """Its softmax is over the two rows of a pair, which hold the same prompt."""
    z = Features(drawn()[2].answer_BMD[:, :2], drawn()[2].prompt_BD)
    model, params, _ = drawn(script_softmax=script)
    weight = taken_apart(model, params, z).weight_MJ
    slopes = jax.tree.map(lambda x: abs(np.asarray(x)).max(), slope(model, params, z))
    assert slopes.pop('scale') > 1e-3
    scale = float(params['gate']['scale'][0])
    if script:
        assert_near(weight, np.full((4, 2, 5), scale / 2), 1e-6)
        assert max(jax.tree.leaves(slopes)) < 1e-7
    else:
        assert weight.shape == (4, 1, 5)
        assert_near(weight.sum(-1), scale, 1e-6)
        assert all(x > 1e-6 for x in jax.tree.leaves(slopes))


def test_the_public_script_knows_neither_transform_nor_temperature():
    z = Features(drawn()[2].answer_BMD[:, :2], drawn()[2].prompt_BD)
    _, params, _ = drawn()
    rate_BMJ = z.answer_BMD @ np.asarray(params['head']['regression']['kernel'], np.float64)
    want = float(params['gate']['scale'][0]) / 2 * rate_BMJ.sum(-1)
    for temperature in (1.0, 10.0):
        model, *_ = drawn(script_softmax=True, temperature=temperature)
        assert_near(jax.jit(model.rewards)(params, z), want, 1e-5)


def test_the_public_script_needs_pairs():
    model, params, z = drawn(script_softmax=True)
    for M in (1, 3):
        some = Features(z.answer_BMD[:, :M], z.prompt_BD)
        with pytest.raises(ValueError, match=rf'script_softmax: found features \(4, {M}, 6\)'):
            model.rewards(params, some)


def test_dropout_is_for_training_and_needs_its_key():
    model, params, z = drawn()
    rewards = jax.jit(functools.partial(model.rewards, dropout=0.5))
    a, b, again = (rewards(params, z, key=jax.random.key(i)) for i in (0, 1, 0))
    np.testing.assert_array_equal(a, again)
    assert abs(a - b).max() > 1e-4
    assert abs(a - jax.jit(model.rewards)(params, z)).max() > 1e-4
    with pytest.raises(ValueError, match=r'dropout: 0.5 needs a key, found None'):
        model.rewards(params, z, dropout=0.5)


# torch's values


def test_every_part_of_a_score_equals_torch():
    case = golden(GATED / 'k19')
    found = loaded().explain(list(TALKS.values()), gate='marker')
    names = zip(PARTS, ('rate_J', 'weight_J', 'coefficient_J', 'score'), strict=True)
    for name, ours in names:
        assert_near(np.array([getattr(x, ours) for x in found]), case[name], PARTS[name])
    assert_near(loaded().score(list(TALKS.values()), gate='marker'), case['score'], 5e-5)


def test_rows_of_ids_equal_torch():
    p, case, _, rows, both = five()
    z, parts = both(p.params, rows)
    assert_near(z.answer_BMD[:, 0], case['hidden'], 1e-5)
    assert_near(z.prompt_BD, case['prompt'], 1e-5)
    for name, got in zip(PARTS, parts, strict=True):
        assert_near(got[:, 0], case[name], PARTS[name])


def test_packed_rows_equal_torch():
    p, case, trees, _, both = five()
    shape = packing.Shape(tokens=160, rows=((2, 32), (3, 48)), prompts=4, candidates=1)
    pack = packing.fill(trees, packing.plan(trees, shape, order=np.arange(4)), shape)
    at = np.argsort(pack.record_PB.reshape(-1))[-4:]
    _, parts = both(p.params, pack)
    for name, got in zip(PARTS, parts, strict=True):
        assert_near(got[at, 0], case[name], PARTS[name])


def test_the_stored_dtypes_are_kept_and_computed_in():
    rm = jaxrm.load(GATED / 'k19')
    assert rm.model.backbone.dtype == jnp.bfloat16
    kinds = {part: {x.dtype.name for x in jax.tree.leaves(rm.params[part])} for part in rm.params}
    assert kinds == {'backbone': {'bfloat16'}, 'head': {'float32'}, 'gate': {'float32'}}
    talks = [TALKS['one turn'], TALKS['two turns']]
    difference = abs(rm.score(talks) - loaded().score(talks))
    assert 1e-5 < difference.max() < 0.1


def test_order_and_company_change_nothing():
    rm, talks = loaded(), list(TALKS.values())[:5]
    scores = rm.score(talks)
    assert_near([rm.score([t])[0] for t in talks[1:3]], scores[1:3], 1e-5)
    assert_near(rm.score(talks[::-1]), scores[::-1], 1e-5)
    prompt = record(TALKS['one turn']).messages
    answers = [TALKS[name][-1]['content'] for name in ('one turn', 'another answer')]
    (pair,) = rm.score_records([Preference(prompt, tuple(answers))])
    assert_near(pair, scores[:2], 1e-5)


# Explanations


def test_contributions_sum_to_the_score():
    rm, talks = loaded(), list(TALKS.values())
    scores = rm.score(talks)
    transform = np.asarray(rm.params['head']['transform'], np.float64)
    for found, score in zip(rm.explain(talks), scores, strict=True):
        assert found.contribution_J.dtype == np.float32
        assert_near(found.contribution_J.sum(dtype=np.float64), score, 5e-6)
        assert_near(found.score, score, 5e-6)
        assert_near(found.coefficient_J, found.weight_J @ transform.T, 1e-6)
        others = np.arange(19) != VERBOSITY
        np.testing.assert_allclose(found.coefficient_J[others], found.weight_J[others], rtol=1e-6)
    assert rm.explain([]) == []


def test_equal_conversations_are_explained_alike():
    a, b, c = loaded().explain([TALKS['one turn'], TALKS['two turns'], TALKS['one turn']])
    assert a.score == c.score != b.score
    np.testing.assert_array_equal(a.rate_J, c.rate_J)
    for x, y in itertools.combinations((a, b, c), 2):
        assert x.objectives is y.objectives
