"""The experiments on a policy that moves away: their measures by loops, and short runs of them."""

import dataclasses
import json

import jax.numpy as jnp
import numpy as np
import pytest
import unread

from experiments import metarm, metarm_rounds, shifted
from jaxrm import checkpoint, heads, meta, packing, reward, rounds, train
from jaxrm.datasets import synthetic

SMALL = {'pairs': 48, 'seeds': (0, 1), 'train_batch_size': 12, 'set_batch_size': 6}
SMALL |= {'max_length': 400}


@pytest.fixture(scope='module')
def decoder(tmp_path_factory):
    """A folder with a decoder that has read nothing."""
    return unread.save(tmp_path_factory.mktemp('decoder'))


def test_measures_equal_loops(decoder):
    tokenizer = checkpoint.load_pretrained(decoder, kind='backbone').tokenizer
    records = synthetic.preferences(4, seed=3, labels='none', candidates=3)
    of = shifted.encoded(records, tokenizer)
    worth = np.array([synthetic.gold(r.messages, a).reward for r in records for a in r.responses])
    np.testing.assert_array_equal(shifted.gold(records, of), worth)
    score = np.random.default_rng(0).normal(size=(2, 12))
    right, apart = shifted.right(score, worth, of), shifted.apart(score, of)
    for e in range(2):
        for i in range(4):
            g, s = worth[3 * i : 3 * i + 3], score[e, 3 * i : 3 * i + 3]
            pairs = [(a, b) for a in range(3) for b in range(3) if g[a] > g[b]]
            assert right[e, i] == pytest.approx(np.mean([s[a] > s[b] for a, b in pairs]))
            each = [1 / (1 + np.exp(-abs(s[a] - s[b]))) for a, b in ((0, 1), (0, 2), (1, 2))]
            assert apart[e, i] == pytest.approx(2 / 9 * sum(each), rel=1e-5)


def test_pools_go_from_near_to_far_and_hold_no_answer_twice():
    c = metarm_rounds.Config(prompts=12, pool=10)
    pool, far = metarm_rounds.pool_of(c)
    assert far.shape == (12, 10)
    assert all(len(set(r.responses)) == 10 for r in pool)
    assert (far == np.repeat(metarm_rounds.KNOBS, 2)).all()
    near = synthetic.preferences(12, seed=2, labels='none', candidates=4)
    for record, same in zip(pool, near, strict=True):
        assert record.messages == same.messages
        assert set(record.responses[:2]) <= set(same.responses)


def flips(of, pairs):
    return (of.rank[::2] != pairs.rank[::2]).mean()


def test_members_see_the_same_pairs_and_their_own_flips(decoder):
    c = shifted.Learning(model_name_or_path=decoder, **SMALL | {'pairs': 300})
    s = shifted.start(dataclasses.replace(c, flips=0.0))
    clean = s.pairs[0].tokens
    assert (clean.rank[::2] == 0).all()
    one, two = (shifted.flipped(clean, 0.2, seed) for seed in (0, 1))
    assert 0.1 < flips(one, clean) < 0.3
    assert 0.15 < flips(one, two) < 0.5
    assert (one.rank[::2] + one.rank[1::2] == 1).all()
    first = [[b(i).record_PB for i in range(len(b))] for b in s.pairs]
    seen = [sorted(np.concatenate([x.ravel() for x in each])) for each in first]
    assert seen[0] == seen[1]
    assert any((a != b).any() for a, b in zip(*first, strict=True))


@pytest.fixture(scope='module')
def started(decoder):
    """(flags, start) of two rounds."""
    c = metarm_rounds.Config(
        model_name_or_path=decoder, rounds=2, prompts=6, pool=10, **SMALL | {'candidates': 3}
    )
    return c, shifted.start(c)


@pytest.fixture
def short(started, monkeypatch):
    """The same, of a loop in which nothing is learned."""
    random = lambda s, params, of: np.random.default_rng(0).normal(size=(2, len(of.rank)))  # noqa: E731
    replaced = {'learn': lambda *args: None, 'scores': random}
    for name, fn in replaced.items():
        monkeypatch.setattr(shifted, name, fn)
    monkeypatch.setattr(metarm_rounds, 'surprise', lambda s, pool: (np.ones(60), np.ones(60)))
    monkeypatch.setattr(metarm_rounds, 'knows', lambda *args: np.zeros(2))
    return started


def test_sets_are_of_the_policy_of_as_many_rounds_as_are_done(short, monkeypatch):
    c, s = short
    pool, far = metarm_rounds.pool_of(c)
    first = rounds.begin(np.exp(-far))
    second = rounds.improve(first, far, temperature=1.0)
    metarm_rounds.drawn(c, s, pool, [second, second], 1)
    for stale in ([first, second], [second, first], [first, first]):
        with pytest.raises(ValueError, match=r"record 0 .*'round 0', expected 'round 1'"):
            metarm_rounds.drawn(c, s, pool, stale, 1)
    made = metarm_rounds.loop(c, s, 'published')
    assert len(made['rounds']) == 3
    monkeypatch.setattr(rounds, 'improve', lambda policy, *args, **options: policy)
    with pytest.raises(ValueError, match=r"'round 0', expected 'round 1'"):
        metarm_rounds.loop(c, s, 'published')


def in_half(s):
    """The start of a model that computes in bfloat16."""
    backbone = dataclasses.replace(s.rm.backbone, dtype=jnp.bfloat16)
    return s._replace(rm=dataclasses.replace(s.rm, backbone=backbone))


def test_what_the_inner_step_leaves_is_watched_in_the_dtype_of_compute(started, monkeypatch):
    c, s = started
    fits = []
    monkeypatch.setattr(train, 'fit', lambda state, *_, **options: fits.append(options) or state)
    for variant in ('vanilla', 'joint', 'published'):
        shifted.learn(c, in_half(s), variant, 1.0, s.pairs)
    assert [(1, meta.check_moved) in of['hooks'] for of in fits] == [False, False, True]
    assert [of['step'].keywords['dtype'] for of in fits[1:]] == [jnp.bfloat16] * 2


@pytest.mark.slow
def test_a_step_that_bfloat16_cannot_hold_stops_a_run(started):
    c, s = started
    with pytest.raises(ValueError, match=r'step 1: inner step: .*raise eta'):
        shifted.learn(c, in_half(s), 'published', 5e-6, s.pairs)


@pytest.mark.slow
def test_answers_are_as_likely_as_one_row_at_a_time(decoder):
    c = metarm_rounds.Config(model_name_or_path=decoder, prompts=3, pool=5, **SMALL)
    s, (pool, _) = shifted.start(c), metarm_rounds.pool_of(c)
    found, length = metarm_rounds.surprise(s, pool)
    rm = reward.RewardModel(s.rm.backbone, heads.LanguageModel(s.rm.backbone.config.V, tied=True))
    for i, m in ((0, 0), (2, 4)):
        whole, asked = (
            shifted.encoded([pool[i]._replace(responses=answers)], s.tokenizer)
            for answers in ((pool[i].responses[m],), ())
        )
        n, begun = len(whole.ids), len(asked.ids)
        pack = packing.padded(whole, np.array([0]), (1, n))
        logits = np.asarray(rm.logits({'backbone': s.backbone, 'head': {}}, pack), np.float64)[0]
        each = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        want = -each[np.arange(begun - 1, n - 1), whole.ids[begun:]].sum()
        assert found[5 * i + m] == pytest.approx(want, rel=1e-4)
        assert length[5 * i + m] == n - begun


@pytest.mark.slow
def test_short_runs(decoder, tmp_path, capfd, monkeypatch):
    given = {**SMALL, 'model_name_or_path': decoder, 'results': tmp_path}
    monkeypatch.setattr(metarm, 'GRID', {'vanilla': (0.0,), 'published': (1.0,)})
    one = metarm.Config(**given, sets=18, test_pairs=8, test_sets=6, eval_steps=2, effect_steps=2)
    metarm.main(one)
    cell = json.loads((tmp_path / 'published-1.json').read_text())
    assert np.shape(cell['held out']['J']) == (2, 6)
    assert np.shape(cell['held out']['accuracy']) == (2, 8)
    assert np.shape(cell['curves']['J'])[1] == 2
    assert np.shape(cell['effect']['Adam']['ours'])[1] == 2
    assert min(cell['train']['inner_step']) > 0
    capfd.readouterr()
    monkeypatch.setattr(metarm, 'world', None)  # nothing is left to do
    metarm.main(one)
    assert '| published, 1 |' in capfd.readouterr().out
    assert (tmp_path / 'curves.png').exists()
    with pytest.raises(ValueError, match='is of a run with'):
        metarm.main(dataclasses.replace(one, flips=0.1))
    monkeypatch.setattr(metarm_rounds, 'VARIANTS', {'keep theta prime': 0.1})
    two = metarm_rounds.Config(**given, rounds=2, prompts=8, pool=10)
    metarm_rounds.main(two)
    rows = json.loads((tmp_path / 'rounds-keep_theta_prime.json').read_text())['rounds']
    assert [np.mean(row['kl']) > 0 for row in rows] == [False, True, True]
    assert all(np.mean(row['gain']) > 0 for row in rows[1:])
    assert 'in round' in capfd.readouterr().out
    assert (tmp_path / 'rounds.png').exists()
