"""Preference strength and recipes on linear reward models, where the true labels are known.

The bounds are what a right implementation reaches with room to spare; values in comments are what
an independent simulation of the same toy gave.
"""

import functools

import numpy as np
import pairs_toy as toy
import pytest
from scipy.stats import spearmanr

from jaxrm import strength

MEMBERS = 10
NOISE = {'p 0.1': (0.1, 0.0), 'p 0.2': (0.2, 0.0), 'p 0.3': (0.3, 0.0), 'sampled': (0.2, 0.5)}


@pytest.fixture(scope='module')
def ensembles():
    """Worlds, and the score differences [E, n] of members that learned them, by kind of noise."""
    worlds = {k: toy.world(p, temperature=t) for k, (p, t) in NOISE.items()}
    x = np.repeat(np.stack([w[0] for w in worlds.values()]), MEMBERS, axis=0)
    plain = toy.pairs(toy.PAIRS)
    seeds = np.tile(np.arange(MEMBERS), len(worlds))
    w_ED = toy.learned(x, [plain] * len(x), seeds=seeds).reshape(len(worlds), MEMBERS, -1)
    gaps = {
        k: strength.gaps(toy.scores(world[0], w), plain)
        for (k, world), w in zip(worlds.items(), w_ED, strict=True)
    }
    return worlds, gaps, dict(zip(worlds, w_ED, strict=True))


def brute_auroc(score, positive):
    p, q = score[positive], score[~positive]
    q = np.sort(q)
    below = np.searchsorted(q, p, 'left') + np.searchsorted(q, p, 'right')
    return below.mean() / 2 / len(q)


@pytest.mark.parametrize('kind', NOISE)
def test_strength_finds_flipped_labels(ensembles, kind):
    worlds, gaps, _ = ensembles  # 0.998, 0.993, 0.969, and 0.842 where the oracle has 0.851
    _, gap, flipped, _ = worlds[kind]
    found = brute_auroc(-gaps[kind].mean(0), flipped)
    single = [brute_auroc(-x, flipped) for x in gaps[kind]]
    assert found >= 0.95 * brute_auroc(-gap, flipped)
    assert found >= np.mean(single)
    assert strength.auroc(-gaps[kind].mean(0), flipped) == pytest.approx(found, abs=1e-12)
    if kind == 'p 0.2':
        assert found >= 0.985
        assert np.mean(single) <= found - 0.005  # 0.975: the members err apart


def test_flipped_labels_are_in_the_lowest_deciles(ensembles):
    worlds, gaps, _ = ensembles
    flipped = worlds['p 0.2'][2]
    mean = strength.strength(gaps['p 0.2']).mean_n
    rate = [flipped[i].mean() for i in strength.bins(mean, 10)]  # 1.00, 0.85, 0.15, 0.03, 0, ...
    assert rate[0] >= 0.85
    assert max(rate[5:]) <= 0.02
    assert flipped[strength.lowest(mean, 0.2)].mean() >= 0.85


@pytest.fixture(scope='module')
def by_decile(ensembles):
    """True-label accuracy of members that learned one decile alone, by kind and decile."""
    worlds, gaps, _ = ensembles
    lessons, keys, x = [], [], []
    plain = toy.pairs(toy.PAIRS // 10)
    for kind in ('p 0.2', 'sampled'):
        mean = gaps[kind].mean(0)
        mixed = np.random.default_rng(0).permutation(mean)
        for how, by in (('', mean), (' shuffled', mixed)):
            for k, at in enumerate(strength.bins(by, 10)):
                keys.append((kind + how, k))
                x.append(worlds[kind][0][at])
                lessons.append(plain)
        for k, at in enumerate(strength.bins(mean, 10)[:2]):
            keys.append((kind + ' flipped', k))
            x.append(worlds[kind][0][at])
            turn = strength.recipe('flip', np.zeros(len(at)), share=1.0)
            lessons.append(strength.relabelled(plain, turn))
    w = toy.learned(np.stack(x), lessons, seeds=[0] * len(x))
    true = worlds['p 0.2'][3]
    return dict(zip(keys, toy.accuracy(w, true), strict=True))


@pytest.mark.parametrize('kind', ['p 0.2', 'sampled'])
def test_a_decile_alone(by_decile, kind):
    """The lowest teaches the opposite, and turned round the right thing; some teach nothing."""
    found = [by_decile[kind, k] for k in range(10)]  # 0.09, 0.20, 0.59, 0.80, ., 0.86, ..., 0.89
    assert found[0] < 0.3
    assert by_decile[f'{kind} flipped', 0] > 0.8
    assert min(abs(x - 0.5) for x in found[2:5]) < 0.12  # of six worlds 0.02 to 0.11
    assert found[9] > 0.8
    mixed = [by_decile[f'{kind} shuffled', k] for k in range(10)]
    assert np.ptp(mixed) < 0.25 * np.ptp(found)
    assert min(mixed) > 0.6


def test_strength_says_how_often_true_labels_agree(ensembles):
    """Held-out pairs whose labels are flipped, too, in groups by strength."""
    worlds, _, w = ensembles
    rng, true = np.random.default_rng(5), worlds['sampled'][3]
    x = rng.normal(size=(4000, toy.D))
    label = np.where(rng.random(4000) < 1 / (1 + np.exp(-(x @ true) / 0.5)), 1.0, -1.0)
    label *= np.where(rng.random(4000) < 0.2, -1.0, 1.0)
    x *= label[:, None]
    gaps = strength.gaps(toy.scores(x.astype(np.float32), w['sampled']), toy.pairs(4000))
    mean, right = strength.strength(gaps).mean_n, x @ true > 0
    found = strength.agreement(mean, right, 16)
    order = np.argsort(mean, kind='stable').reshape(16, 250)
    np.testing.assert_allclose(found.share_b, right[order].mean(1), atol=1e-12)
    assert found.spearman == pytest.approx(spearmanr(mean[order].mean(1), right[order].mean(1))[0])
    assert found.spearman >= 0.9
    assert found.share_b[-1] >= 0.95
    assert found.share_b[0] <= 0.25
    near = np.abs(mean) < 0.05  # about 170 pairs, of six worlds 0.51 to 0.60
    assert 0.45 <= right[near].mean() <= 0.6


def test_the_alarm_of_memorisation():
    """More features than pairs: after some epochs no label looks wrong any more."""
    n, width = 500, 1000
    x, _, flipped, _ = toy.world(0.2, pairs=n, width=width)
    plain, seeds = toy.pairs(n), range(MEMBERS)
    fold = strength.folds(list(range(n)), 5)
    out = {}
    for epochs in (1, 8):
        learn = functools.partial(toy.learned, x[None], seeds=seeds, epochs=epochs)
        gaps = strength.gaps(toy.scores(x, learn([plain] * MEMBERS)), plain)
        out[epochs] = strength.strength(gaps).mean_n
    assert strength.fit(out[8], 0.2).accuracy == (out[8] > 0).mean() == 1.0
    with pytest.raises(ValueError, match=r'1\.000 of the labels .* memorised'):
        strength.check_fit(out[8], 0.2)
    lessons = [strength.without(plain, fold == k % 5) for k in range(10)]
    gaps = strength.gaps(toy.scores(x, learn(lessons)), plain).reshape(2, 5, 1, n).swapaxes(0, 1)
    clean = strength.strength(strength.out_of_fold(gaps[:, :, 0], fold)).mean_n
    assert (clean < 0).mean() > 0.2  # of others' labels none is known by heart
    strength.check_fit(clean, 0.2)


def test_the_alarm_is_silent_where_nothing_is_memorised(ensembles):
    worlds, gaps, _ = ensembles
    for kind, noise in (('p 0.1', 0.1), ('p 0.2', 0.2), ('p 0.3', 0.3)):
        strength.check_fit(gaps[kind].mean(0), noise)


RECIPES = {
    'flip': {'share': 0.2},
    'margin': {},
    'flip + margin': {'share': 0.2},
    'soft label': {'alpha': 0.5},
    'soft label + margin': {'alpha': 0.5},
    'drop': {'share': 0.2},
    'random flip': {'share': 0.2},
}


@pytest.fixture(scope='module')
def recipes(ensembles):
    """Accuracy of each recipe on true labels, and on flipped ones, in the mean over members."""
    worlds, gaps, _ = ensembles
    x, _, flipped, true = worlds['p 0.2']
    mean, plain = gaps['p 0.2'].mean(0), toy.pairs(toy.PAIRS)
    how = {name: strength.recipe(name, mean, **options) for name, options in RECIPES.items()}
    how['margin above 0'] = strength.recipe('margin', np.maximum(mean, 0))
    how['margin of another pair'] = strength.recipe(
        'margin', np.random.default_rng(0).permutation(mean)
    )
    right = strength.repair(mean, swap_n=flipped)
    lessons = {'base': plain, 'right labels': strength.relabelled(plain, right)}
    lessons |= {name: strength.relabelled(plain, x) for name, x in how.items()}
    seeds = range(20, 25)
    w = toy.learned(
        x[None], [t for t in lessons.values() for _ in seeds], seeds=[*seeds] * len(lessons)
    )
    slow = toy.learned(
        x[None], [lessons[k] for k in ('base', 'drop') for _ in seeds], seeds=[*seeds] * 2,
        rate=toy.RATE / 3,
    )  # fmt: skip
    found = toy.accuracy(np.concatenate([w, slow]), true).reshape(-1, len(seeds)).mean(1)
    return dict(zip([*lessons, 'base, third', 'drop, third'], found, strict=True))


def test_recipes_repair_what_wrong_labels_did(recipes):
    # base 0.90, margin 0.94, soft 0.94, both 0.95, flip 0.957, drop 0.959, right labels 0.975,
    # random flip 0.84
    base = recipes['base']
    for name in ('flip + margin', 'soft label + margin', 'flip', 'margin'):
        assert recipes[name] >= base + 0.03, name
    assert recipes['random flip'] <= base - 0.03
    assert recipes['right labels'] >= max(recipes['flip'], recipes['drop'])


def test_what_the_controls_say(recipes):
    """Dropping is as good as flipping; much of what margins give is not strength's doing."""
    base = recipes['base']
    assert recipes['drop'] >= recipes['flip'] - 0.005
    assert recipes['margin above 0'] >= base + 0.02  # without any sign of a wrong label
    assert base + 0.005 <= recipes['margin of another pair'] <= recipes['margin'] - 0.01
    # A third of the learning rate does for the baseline what margins do, but not what drops do.
    assert recipes['base, third'] >= base + 0.02
    assert recipes['drop, third'] >= recipes['base, third'] + 0.01


def test_noisy_labels_tell_less_than_true_ones(ensembles):
    """With a share p flipped at random, accuracy a on true labels is (1 - 2p) a + p on those."""
    worlds, _, w = ensembles
    true = worlds['p 0.2'][3]
    x = np.random.default_rng(7).normal(size=(20_000, toy.D))
    flipped = np.random.default_rng(8).random(20_000) < 0.2
    for w_D in w['p 0.2'][:3]:
        right = (x @ w_D > 0) == (x @ true > 0)
        noisy = np.where(flipped, ~right, right)
        assert noisy.mean() == pytest.approx(0.6 * right.mean() + 0.2, abs=0.01)
        assert right[~flipped].mean() == pytest.approx(right.mean(), abs=0.01)
