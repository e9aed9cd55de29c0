"""What the experiments on wrong labels do to labels, and how they compare: by loops over pairs."""

import inspect

import numpy as np
import pairs_toy as toy
import pytest

from experiments import labelling, secrets_recipes
from jaxrm import contrastive, members, meta, strength, views

N = 400


# Those that a paper gives (arXiv 2401.06080: 10 % flipped, beta of SimCSE, dropout; 2405.00438:
# eta; 2006.09882: SwAV's three; 2104.08821: SimCSE's temperature), and our own where none does.
DEFAULTS = [
    (strength.recipe, {'share': 0.1, 'alpha': 0.1, 'scale': 1.0, 'clip': np.inf}),
    (contrastive.simcse, {'temperature': 0.05}),
    (contrastive.swav, {'temperature': 0.1, 'epsilon': 0.05, 'iterations': 3}),
    (contrastive.sinkhorn, {'epsilon': 0.05, 'iterations': 3}),
    (views.preference, {'beta': 1.0, 'dropout': 0.05, 'contrast': contrastive.simcse}),
    (meta.step, {'eta': 5e-6, 'inner': 'sgd', 'apply_to': 'theta', 'order': 'first'}),
    (members.uwo, {'coefficient': 0.5}),
]


@pytest.mark.parametrize(('fn', 'want'), DEFAULTS, ids=lambda x: getattr(x, '__name__', ''))
def test_defaults(fn, want):
    has = inspect.signature(fn).parameters
    assert {name: has[name].default for name in want} == want


@pytest.fixture(scope='module')
def of():
    length = np.random.default_rng(0).integers(1, 9, 2 * N).astype(np.int32)
    return toy.pairs(N)._replace(length=length)


def test_wrong_labels_are_as_many_as_asked_and_more_include_fewer(of):
    for kind in ('random', 'longer'):
        few, many = (labelling.turned(of, f'{kind}-{share}', 3) for share in (0.1, 0.3))
        assert abs(few.mean() - 0.1) < 0.05
        assert abs(many.mean() - 0.3) < 0.07
        assert many[few].all()
        assert not labelling.turned(of, f'{kind}-0', 3).any()
    better, worse = of.length.reshape(-1, 2).T
    assert (worse > better)[labelling.turned(of, 'longer-0.3', 3)].all()
    assert (labelling.turned(of, 'random-0.3', 4) != labelling.turned(of, 'random-0.3', 3)).any()


def test_kinds_of_labels(of):
    turned = labelling.turned(of, 'random-0.2', 0)
    gap = np.random.default_rng(1).normal(size=(2, N))
    found = labelling.right(gap, turned)
    for e in range(2):
        for i in range(0, N, 7):
            gold = gap[e, i] > 0
            assert found['gold'][e, i] == gold
            assert found['noisy'][e, i] == (gold != turned[i])
            here = found['agreement'][e, i]
            assert np.isnan(here) if turned[i] else here == gold
    noisy = labelling.noisy(of, turned)
    assert (noisy.rank.reshape(-1, 2)[:, 0] == turned).all()


@pytest.mark.parametrize('name', [*secrets_recipes.RECIPES, *sorted(secrets_recipes.OTHERS)])
def test_every_recipe_makes_a_lesson(of, name):
    c = secrets_recipes.Config()
    turned = labelling.turned(of, 'random-0.2', 0)
    mean = np.random.default_rng(2).normal(size=N)
    found = secrets_recipes.lesson(c, name, of, turned, mean, 0.2, 5)
    rank, margin = found.tokens.rank.reshape(-1, 2), found.tokens.margin.reshape(-1, 2)
    given, plain = turned.astype(int), name.split(',')[0]
    low = set(np.argsort(mean, kind='stable')[: N // (10 if 'half as' in name else 5)].tolist())
    for i in range(N):
        if plain == 'right labels':
            want = 0
        elif plain in ('flip', 'flip + margin', 'flip half as many'):
            want = given[i] ^ (i in low)
        elif plain == 'drop':
            want = 0 if i in low else given[i]
        else:
            want = given[i]
        if plain != 'random flip':
            assert rank[i, 0] == want
    assert (rank.sum(1) == 0).sum() == (N // 5 if plain == 'drop' else 0)
    if plain == 'random flip':
        assert (rank[:, 0] != given).sum() == N // 5
    soft = found.tokens.smoothing
    if plain == 'soft label by strength':
        np.testing.assert_allclose(soft, 1 / (1 + np.exp(mean)), rtol=1e-5)
    else:
        alpha = 0.1 if '0.1' in plain else c.alpha
        np.testing.assert_allclose(soft, np.where(mean < 0, alpha, 0) * ('soft' in plain))
    assert margin.any() == ('margin' in plain)
    if plain == 'margin above 0':
        assert margin.min() == 0
