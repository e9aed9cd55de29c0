"""Merging arrays: mergekit's results, float64 formulas, identities, shards."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from jaxrm import merge, sharding

GOLDENS = Path(__file__).parent / 'goldens' / 'merge'
CASES = json.loads((GOLDENS / 'cases.json').read_text())
SHAPE = (12, 16)
NEEDED = {'weight': 0.5, 't': 0.3}


@pytest.fixture(scope='module')
def arrays():
    with np.load(GOLDENS / 'arrays.npz') as file:
        return dict(file)


def call(method, xs, base, **more):
    """merge.array with the fewest parameters and as many inputs as the method takes."""
    rule = merge.METHODS[method]
    needed = {k: v for k, v in NEEDED.items() if k in rule.parameters}
    base = None if rule.base == 'none' else base
    return merge.array(method, xs[: rule.most], base=base, **(needed | more))


def bits(x):
    """As whole numbers: zeros of both signs differ."""
    x = np.asarray(x)
    return x.view({2: np.uint16, 4: np.uint32}[x.dtype.itemsize])


# Results of mergekit


@pytest.mark.parametrize('name', CASES)
def test_equals_mergekit(name, arrays):
    case = CASES[name]
    cut = (lambda x: x) if case['rows'] is None else (lambda x: x[0])
    base = case['base'] and cut(arrays[case['base']])
    y = merge.array(
        case['method'],
        [cut(arrays[x]) for x in case['inputs']],
        base=base,
        masks=arrays.get(f'{name}/masks'),
        **case['parameters'],
    )
    assert isinstance(y, np.ndarray)
    assert y.dtype == np.float32
    np.testing.assert_allclose(y, arrays[f'{name}/result'], rtol=1e-6, atol=1e-6)


def test_della_keeps_as_often_as_mergekit(arrays):
    """From density - epsilon for the smallest entry of a row to density + epsilon."""
    x, want, draws = arrays['base'][:2], arrays['frequencies'], 2000
    zero = np.zeros_like(x)
    kept = np.zeros_like(x)
    for i in range(draws // 500):  # rows are apart: many at once
        many = [np.tile(x, (500, 1)), np.tile(zero, (500, 1))]
        y = merge.array(
            'della_linear', many[:1], base=many[1], weight=1, density=0.4, epsilon=0.3, seed=i,
            rescale=False,
        )  # fmt: skip
        kept += (y != 0).reshape(500, *x.shape).sum(0)
    p = 0.1 + 0.6 * np.argsort(np.argsort(np.abs(x), -1), -1) / 15
    deviation = np.sqrt(p * (1 - p))
    assert (np.abs(kept / draws - p) < 4.5 * deviation / draws**0.5).all()
    assert (np.abs(want - p) < 4.5 * deviation / 4000**0.5).all()


# Formulas


def test_formulas_in_float64(arrays):
    base, *xs = (arrays[x].astype(np.float64) for x in ('base', 'x0', 'x1', 'x2'))
    unit = lambda x: x / np.linalg.norm(x)  # noqa: E731
    angle = lambda a, b: np.arccos((unit(a) * unit(b)).sum())  # noqa: E731
    given = [x.astype(np.float32) for x in xs]
    y = merge.array('slerp', [unit(xs[0])], base=unit(base), t=0.3).astype(np.float64)
    np.testing.assert_allclose(np.linalg.norm(y), 1, rtol=1e-6)
    np.testing.assert_allclose(angle(y, base), 0.3 * angle(xs[0], base), rtol=1e-5)
    y = merge.array('karcher', given, max_iter=50, tol=1e-7).astype(np.float64)
    log = [angle(x, y) * unit(unit(x) - np.cos(angle(x, y)) * unit(y)) for x in xs]
    assert np.abs(sum(log)).max() < 1e-5  # the mean tangent at a mean is zero
    lengths = [np.linalg.norm(x) for x in xs]
    np.testing.assert_allclose(np.linalg.norm(y), np.mean(lengths), rtol=1e-6)
    y = merge.array('warm', given)
    np.testing.assert_allclose(y, np.mean(xs, 0), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize('density', [0.1, 0.34, 0.5, 0.99])
@pytest.mark.parametrize('shape', [(7, 11), (77,), (7, 11, 2)])
def test_trimming_keeps_the_first_of_equals(shape, density):
    """Exactly int(density n) entries, of few magnitudes, by a stable sort."""
    rng = np.random.default_rng(1)
    x = rng.integers(-3, 4, shape).astype(jnp.bfloat16)
    zero = np.zeros_like(x)
    y = merge.array('ties', [x], base=zero, weight=1, density=density)
    flat, count = x.astype(np.float32).ravel(), int(density * x.size)
    want = np.zeros_like(flat)
    largest = np.argsort(-np.abs(flat), kind='stable')[:count]
    want[largest] = flat[largest]
    np.testing.assert_array_equal(y.astype(np.float32).ravel(), want)
    gamma = 0.2
    y = merge.array('breadcrumbs', [x], base=zero, weight=1, density=density, gamma=gamma)
    first = min(int(gamma * x.size), x.size - count)
    middle = np.argsort(-np.abs(flat), kind='stable')[first : first + count]
    want = np.zeros_like(flat)
    want[middle] = flat[middle]
    np.testing.assert_array_equal(y.astype(np.float32).ravel(), want)


def test_signs_by_sum_or_by_count():
    base = np.zeros((1, 3), np.float32)
    xs = [np.array([row], np.float32) for row in ([5, 1, 0], [-1, 1, 0], [-2, -3, -4])]
    options = {'base': base, 'weight': 1, 'density': 1.0}
    by_sum = merge.array('ties', xs, **options)
    np.testing.assert_array_equal(by_sum, [[5, -3, -4]])
    by_count = merge.array('ties', xs, sign='count', **options)
    np.testing.assert_array_equal(by_count, [[-1.5, 1, -4]])


@pytest.mark.parametrize(('cosine', 'straight'), [(0.9997, True), (0.9993, False)])
def test_slerp_goes_straight_between_nearly_equal_directions(cosine, straight):
    """From a cosine of 0.9995 on; the sums differ by 5e-5."""
    x, y, t = np.array([1.0, 0]), np.array([cosine, (1 - cosine**2) ** 0.5]), 0.3
    a = np.arccos(cosine)
    arc = (np.sin((1 - t) * a) * x + np.sin(t * a) * y) / np.sin(a)
    want = (1 - t) * x + t * y if straight else arc
    given = [np.stack([z, np.zeros(2)]).astype(np.float32) for z in (x, y)]
    found = merge.array('slerp', given[1:], base=given[0], t=t)
    np.testing.assert_allclose(found[0], want, rtol=2e-6)


@pytest.mark.parametrize('method', ['dare_linear', 'dare_ties', 'della_linear', 'della'])
def test_what_is_dropped_is_made_up_for_without_being_asked(method, arrays):
    base, x = arrays['base'], arrays['x0']
    mask, step = np.random.default_rng(3).random(SHAPE) < 0.4, x.astype(np.float64) - base
    y = merge.array(method, [x], base=base, weight=1, density=0.5, masks=[mask])
    factor = np.abs(step).sum() / np.abs(step[mask]).sum()
    np.testing.assert_allclose(y, base + mask * step * factor, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize('sign', ['sum', 'count'])
def test_a_tie_of_signs_goes_to_the_positive(sign):
    """As in mergekit, where a sum of 0 is positive."""
    xs = [np.array([row], np.float32) for row in ([2, -3], [-2, 3])]
    y = merge.array('ties', xs, base=np.zeros((1, 2), np.float32), weight=1, sign=sign)
    np.testing.assert_array_equal(y, [[2, 3]])


SLOW = [[1, 0, 0.3], [np.cos(1.9), np.sin(1.9), 0.3], [np.cos(3.1), np.sin(3.1), 0.3]]
FAST = [[1, 1, -1], [1, -1, 1], [-1, 1, 1], [1, 0.2, 0.1]]
SMALL = [[1, 0, 0], [0, 2, 0], [0, 0, 5e-9]]


@pytest.mark.parametrize(
    ('method', 'rows', 'default', 'other'),
    [
        ('karcher', SLOW, {'max_iter': 10}, {'max_iter': 9}),
        ('karcher', SLOW, {'max_iter': 10}, {'max_iter': 11}),
        ('karcher', FAST, {'tol': 1e-5}, {'tol': 1e-6}),
        ('karcher', FAST, {'tol': 1e-5}, {'tol': 1e-4}),
        ('multislerp', SMALL, {'eps': 1e-8}, {'eps': 6e-9}),
        ('multislerp', SMALL, {'eps': 1e-8}, {'eps': 1e-7}),
    ],
)
def test_defaults_are_mergekits(method, rows, default, other):
    """On what they make a difference for."""
    xs = [np.array([row], np.float32) for row in rows]
    found, same, not_same = (call(method, xs, None, **more) for more in ({}, default, other))
    np.testing.assert_array_equal(bits(found), bits(same))
    assert (bits(found) != bits(not_same)).any()


# Identities


@pytest.mark.parametrize('dtype', [np.float32, jnp.bfloat16, np.float16])
@pytest.mark.parametrize('method', merge.METHODS)
def test_one_rounding_and_merging_a_model_with_itself(method, dtype, arrays):
    """Inputs of 16 bits give what float32 gives, rounded; of equal ones, those bits."""
    low = [arrays[x].astype(dtype) for x in ('x0', 'x1', 'base')]
    low[0][0, 0] = low[2][0, 0] = -0.0
    more = {'density': 0.5} if 'density' in merge.METHODS[method].parameters else {}
    y = call(method, low[:2], low[2], **more)
    assert y.dtype == dtype
    high = call(method, [x.astype(np.float32) for x in low[:2]], low[2].astype(np.float32), **more)
    assert high.dtype == np.float32
    np.testing.assert_array_equal(bits(y), bits(high.astype(dtype)))
    np.testing.assert_array_equal(bits(call(method, low[:1] * 2, low[0], **more)), bits(low[0]))


def test_ends_are_exact(arrays):
    """A weight of 1 beside 0, and t at 0 and 1, give that input bit for bit."""
    a, b = arrays['base'].copy(), arrays['x0'].copy()
    a[0, 0], b[0, 1] = -0.0, -0.0
    b[1, 1] = np.inf  # of no weight
    np.testing.assert_array_equal(bits(merge.array('linear', [a, b], weight=[1, 0])), bits(a))
    b[1, 1] = 2.0
    for t, want in ((0, a), (1, b)):
        y = merge.array('linear', [a, b], weight=[1 - t, t])
        np.testing.assert_array_equal(bits(y), bits(want))
        for other in (b, (a + 1e-3 * b).astype(np.float32)):
            want = other if t else a
            y = merge.array('slerp', [other], base=a, t=t)
            np.testing.assert_array_equal(bits(y), bits(want))


def test_methods_agree_where_they_should(arrays):
    base, near, *xs = (arrays[x] for x in ('base', 'near', 'x0', 'x1'))
    weight = [0.3, 0.7]
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6)  # noqa: E731
    linear = merge.array('linear', xs, weight=weight)
    close(merge.array('task_arithmetic', xs, base=base, weight=weight), linear)
    close(merge.array('task_arithmetic', xs[1:], base=xs[0], weight=0.7), linear)
    straight = merge.array('linear', [base, near], weight=[0.7, 0.3])
    close(merge.array('slerp', [near], base=base, t=0.3), straight)
    for method in ('ties', 'dare_ties', 'della', 'breadcrumbs'):
        close(merge.array(method, xs[:1], base=base, weight=1), xs[0])
    close(merge.array('warm', xs), merge.array('linear', xs, weight=1))


@pytest.mark.parametrize('method', [m for m, rule in merge.METHODS.items() if rule.most is None])
def test_order_of_inputs_changes_nothing(method, arrays):
    xs = [arrays[x] for x in ('x0', 'x1', 'x2')]
    rule, more = merge.METHODS[method], {}
    if 'weight' in rule.parameters:
        more['weight'] = [0.3, 0.5, 0.4]
    if 'density' in rule.parameters:
        rng = np.random.default_rng(0)
        more |= {'density': [0.5, 0.3, 0.7], 'masks': rng.random((3, *SHAPE)) < 0.5}
    y = call(method, xs, arrays['base'], **more)
    more = {k: [v[i] for i in (2, 0, 1)] for k, v in more.items()}
    again = call(method, [xs[i] for i in (2, 0, 1)], arrays['base'], **more)
    np.testing.assert_allclose(y, again, rtol=1e-6, atol=1e-6)


# Chance


def test_drawn_masks(arrays):
    """Of the seed, the array's name and the input's place, and of nothing else."""
    base, x = np.zeros((64, 64), np.float32), np.ones((64, 64), np.float32)
    options = {'base': base, 'density': 0.25, 'rescale': False}
    draw = lambda name, weight=(1, 2), **more: merge.array(  # noqa: E731
        'dare_linear', [x, x], name=name, weight=weight, **(options | more)
    )
    y = draw('a')
    first, second = y % 2 == 1, y >= 2
    np.testing.assert_array_equal(draw('a'), y)
    np.testing.assert_array_equal(draw('a', weight=(1, 0)) == 1, first)
    for other in (draw('b'), draw('a', seed=1)):
        assert 0.2 < (other != y).mean() < 0.8
    assert 0.1 < (first & second).mean() / first.mean() < 0.4  # drawn apart
    deviation = (0.25 * 0.75 / x.size) ** 0.5
    for mask in (first, second):
        assert abs(mask.mean() - 0.25) < 5 * deviation


@pytest.mark.parametrize('method', ['dare_linear', 'della_linear'])
def test_rescaling(method, arrays):
    base, x = arrays['base'], arrays['x0']
    step = (x - base).astype(np.float64)
    mask = np.random.default_rng(3).random(SHAPE) < 0.4
    chance = np.full(SHAPE, 0.5)
    if method == 'della_linear':
        chance += 0.2 * (2 * np.argsort(np.argsort(np.abs(step), -1), -1) / 15 - 1)
    of_rule = {
        'none': np.ones(SHAPE),
        'l1': np.abs(step).sum() / np.abs(step[mask]).sum(),
        'inverse_density': 1 / chance,
    }
    epsilon = {'epsilon': 0.2} if method == 'della_linear' else {}
    for rule, factor in of_rule.items():
        y = merge.array(
            method, [x], base=base, weight=1, density=0.5, rescale=rule, masks=[mask], **epsilon
        )
        np.testing.assert_allclose(y, base + mask * step * factor, rtol=1e-6, atol=1e-6)
    y = merge.array(method, [x], base=base, weight=1, density=0, rescale='inverse_density')
    np.testing.assert_array_equal(y, base)


# Devices


@pytest.mark.parametrize('method', merge.METHODS)
def test_shards_give_what_one_device_gives(method, arrays):
    """Bit by bit where arrays enter by their elements and counts only."""
    mesh = sharding.make_mesh(data=1, fsdp=2, tensor=4)
    where = NamedSharding(mesh, PartitionSpec('fsdp', 'tensor'))
    rule = merge.METHODS[method]
    more = {'density': 0.5} if 'density' in rule.parameters else {}
    given = [arrays[x].astype(jnp.bfloat16) for x in ('x0', 'x1', 'base')]
    *xs, base = (jax.device_put(x, where) for x in given)
    y = call(method, xs, base, name='w', **more)
    assert y.sharding == where
    want = call(method, given[:2], given[2], name='w', **more)
    if method in ('slerp', 'nuslerp', 'multislerp', 'karcher', 'model_stock'):
        np.testing.assert_allclose(np.float32(y), np.float32(want), rtol=2**-8)
    else:
        np.testing.assert_array_equal(bits(y), bits(want))


# Errors


X = np.ones((2, 3), np.float32)


@pytest.mark.parametrize(
    ('method', 'xs', 'more', 'error'),
    [
        ('mean', [X], {}, "merge method: found 'mean', expected one of"),
        ('linear', [X, X[:1]], {'weight': 1}, r'w: found shapes \[\(2, 3\), \(1, 3\)\]'),
        ('linear', [X, X], {}, 'w: found no weight, which linear needs'),
        ('linear', [X, X], {'weight': [1]}, 'w: weight: found 1, expected 2, one an input'),
        ('linear', [X, X], {'weight': [1, -1]}, r'w: weight: found \[1, -1\], which add up to 0'),
        ('linear', [X], {'weight': 'x'}, "w: weight: found 'x', expected a number"),
        ('linear', [X], {'weight': np.nan}, 'w: weight: found nan, expected a number'),
        ('linear', [X], {'weight': 1, 'base': X}, 'w: found a base, which linear does not take'),
        ('linear', [X], {'weight': 1, 't': 1}, r"w: found parameters \['t'\] of linear, expected"),
        ('linear', [X], {'weight': 1, 'normalize': 1}, 'normalize: found 1, expected true or'),
        ('ties', [X], {'weight': 1}, 'w: found no base, which ties needs'),
        ('ties', [X], {'weight': 1, 'base': X, 'density': 1.1}, 'density: found 1.1, expected a'),
        ('ties', [X], {'weight': 1, 'base': X, 'rescale': 'l2'}, "rescale: found 'l2', expected"),
        ('slerp', [X, X], {'t': 0.5, 'base': X}, 'w: found 2 inputs of slerp, expected 1 to 1'),
        ('model_stock', [X], {'base': X}, 'w: found 1 inputs of model_stock, expected at least 2'),
        ('della', [X], {'weight': 1, 'base': X, 'density': 0.9}, 'density: found 0.9 and epsilon'),
        ('karcher', [X], {'max_iter': 2.5}, 'max_iter: found 2.5, expected'),
    ],
)  # fmt: skip
def test_what_does_not_fit_raises(method, xs, more, error):
    with pytest.raises(ValueError, match=error):
        merge.array(method, xs, name='w', **more)


def test_numbers_that_are_not_floats_are_passed_on():
    ids = np.arange(3)
    np.testing.assert_array_equal(merge.array('linear', [ids, ids.copy()], weight=1), ids)
    for other in (ids[::-1], ids.astype(np.int32), np.ones(3, np.float32)):
        with pytest.raises(ValueError, match=r'w: found .* expected equal ones or floats'):
            merge.array('linear', [ids, other], name='w', weight=1)
