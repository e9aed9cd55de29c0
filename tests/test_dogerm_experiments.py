"""The experiments on merged reward models: controls, files of generations, and short runs."""

import dataclasses
import functools
import itertools
import json

import jax
import numpy as np
import plain
import pytest
from test_reward import RM, SHAPE, C, data, packed, parameters

from experiments import (
    best_of_n,
    common,
    devices,
    dogerm,
    dogerm_sweep,
    dogerm_world,
    generations,
    warm,
)
from jaxrm import bestofn, checkpoint, heads, reward, sandbox, sharding, tokens, tree
from jaxrm.backbones.layers import Decoder
from jaxrm.data import DataError, Preference
from jaxrm.datasets import synthetic


def leaves(x):
    return {k: np.asarray(v) for k, v in tree.flatten(x).items()}


# Controls


def test_every_layer_stands_elsewhere():
    ours, theirs = leaves(parameters()['backbone']), None
    for seed in range(3):
        theirs = leaves(dogerm.shuffled(parameters()['backbone'], seed))
        for name in ('q/kernel', 'mlp_norm/scale'):
            before, after = (
                [*x[f'layers/{name}'], x[f'top/{name}']] for x in (ours, theirs)
            )  # fmt: skip
            at = [next(i for i, x in enumerate(before) if (x == y).all()) for y in after]
            assert sorted(at) == [0, 1, 2]
            assert all(i != place for place, i in enumerate(at))
    for name in ('embed/embedding', 'norm/scale'):
        np.testing.assert_array_equal(ours[name], theirs[name])


def test_noise_is_as_far_away_and_nowhere():
    one, other = (plain.random_tree(parameters()['backbone'], seed) for seed in (1, 2))
    ours, theirs, found = map(leaves, (one, other, dogerm.noise(one, other, 0)))
    for name, x in ours.items():
        far, step = theirs[name] - x, found[name] - x
        assert np.sqrt((step**2).sum()) == pytest.approx(np.sqrt((far**2).sum()), rel=1e-4)
        if x.size > 500:
            cosine = (step * far).sum() / np.sqrt((step**2).sum() * (far**2).sum())
            assert abs(cosine) < 0.2
    again = leaves(dogerm.noise(one, other, 1))
    assert all((again[name] != x).any() for name, x in found.items())


@functools.cache
def score():
    return jax.jit(RM.score)


def test_hidden_units_in_another_order_are_the_same_function():
    params = {k: parameters()[k] for k in ('backbone', 'head')}
    batch = packed(data([2, 3, 1, 4], 5))
    there = batch.rank_PBM.reshape(-1, SHAPE.candidates) >= 0
    other = dogerm.permuted(params, 3)
    want, found = (np.asarray(score()(p, batch))[there] for p in (params, other))
    np.testing.assert_allclose(found, want, rtol=0, atol=1e-4)
    for name, x in leaves(params).items():
        assert (leaves(other)[name] != x).any(), name
    middle = jax.tree.map(lambda x, y: (x + y) / 2, params, other)
    assert np.abs(np.asarray(score()(middle, batch))[there] - want).max() > 0.1
    odd = {**params, 'backbone': {**params['backbone'], 'bias': np.zeros(3)}}
    with pytest.raises(ValueError, match='backbone/bias: found a leaf that is none of a llama'):
        dogerm.permuted(odd, 0)


# Vocabularies


WORDS = ('<a>', '<b>', '<c>')


def like(words, rows, seed):
    """A model of a tokenizer that knows these words in this order, with so many rows."""
    made = common.train_tokenizer([], 262)
    made.add_tokens(list(words))
    config = dataclasses.replace(C, V=rows)
    table = np.random.default_rng(seed).normal(size=(rows, C.D)).astype(np.float32)
    return checkpoint.Pretrained('llama', config, made, {'embed': {'embedding': table}})


def test_rows_are_matched_by_their_tokens():
    one, two = like(WORDS, 270, 0), like([WORDS[2], WORDS[0], '<x>', WORDS[1]], 272, 1)
    (ours, theirs), tokenizer = dogerm.aligned([one, two], ['rm', 'lm'])
    ours, theirs = (x['embed']['embedding'] for x in (ours, theirs))
    table = [m.backbone['embed']['embedding'] for m in (one, two)]
    ids, before = tokenizer.get_vocab(), [m.tokenizer.get_vocab() for m in (one, two)]
    assert ids['<x>'] not in before[0].values()
    for word in '<|end|>', *WORDS:
        np.testing.assert_array_equal(ours[ids[word]], table[0][before[0][word]])
        np.testing.assert_array_equal(theirs[ids[word]], table[1][before[1][word]])
    for x in (ours, theirs):  # so that every mixture has it
        np.testing.assert_array_equal(x[ids['<x>']], table[1][before[1]['<x>']])
    (same, _), kept = dogerm.aligned([one, like(WORDS, 270, 2)], ['rm', 'lm'])
    assert same['embed']['embedding'] is table[0]
    assert kept is one.tokenizer


def test_models_of_other_functions_are_refused():
    two = dataclasses.replace(like(WORDS, 270, 0), config=dataclasses.replace(C, norm_eps=0.1))
    with pytest.raises(ValueError, match=r'norm_eps: rm has 1e-\d+, lm has 0.1'):
        dogerm.aligned([like(WORDS, 270, 0), two], ['rm', 'lm'])


# Curves and choices


def test_accuracy_at_every_share_equals_loops():
    of = data([2, 3, 2], 4)
    score_Kc = np.random.default_rng(0).normal(size=(4, 7))
    found = dogerm.right(score_Kc, of)
    for k, n in itertools.product(range(4), range(3)):
        rank, s = (x[of.first[n] : of.first[n + 1]] for x in (of.rank, score_Kc[k]))
        pairs = [s[a] > s[b] for a, b in itertools.permutations(range(len(s)), 2)
                 if rank[a] < rank[b]]  # fmt: skip
        assert found[k, n] == pytest.approx(np.mean(pairs) if pairs else np.nan, nan_ok=True)


def of_accuracy(*each, n=20):
    return np.array([np.arange(n) < round(x * n) for x in each], float)


def test_a_share_is_chosen_on_validation_pairs_alone():
    of = dogerm.shares(3)
    assert of == (0, 0.5, 1)
    picks = [
        dogerm.chosen(of, of_accuracy(0.5, 0.9, 0.6), of_accuracy(0.5, 0.6, 0.8)),
        dogerm.chosen(of, of_accuracy(0.9, 0.5, 0.5), of_accuracy(0.7, 0.9, 0.5)),
    ]
    assert [(x['share'], x['best'], x['gap']) for x in picks] == [(0.5, 1, 0.2), (0, 0.5, 0.2)]
    assert [x['right']['chosen'].count('1') for x in picks] == [12, 14]
    found = dogerm.gains(picks)
    assert found['unmerged'] == '0.600'
    assert found['at the chosen share'].startswith('0.650 [')
    assert found['above unmerged'].startswith('+5.0 [')
    assert found['above share 1'].startswith('+0.0 [')
    assert (found['shares'], found['oracle gap']) == ('0.25 (0 to 0.5)', '20.0')
    with pytest.raises(ValueError, match='shares: found 1, expected at least 2'):
        dogerm.shares(1)


def test_texts_of_the_domain_end_with_remarks():
    c = dogerm_world.Config(domain='arithmetic')
    inside, outside = dogerm_world.categories(c, True), dogerm_world.categories(c, False)
    assert (inside, len(outside)) == (('arithmetic',), 4)
    made = dogerm_world.texts(c, 60, 0, inside)
    remarked = [r for r in made if not isinstance(r.responses[0], str)]
    assert 0.5 < len(remarked) / 60 < 0.9
    for record in remarked:
        assert [m['role'] for m in record.responses[0]] == ['assistant', 'user']
    for record in made:
        answer = record.responses[0]
        said = answer if isinstance(answer, str) else answer[0]['content']
        assert synthetic.gold(record.messages, said).category == 'arithmetic'


def test_rewards_are_read_where_a_remark_begins():
    records = synthetic.preferences(6, seed=0)
    tokenizer = common.train_tokenizer(common.texts(records), 300)
    plain_text = tokens.encode(records, tokenizer).tokens
    found = tokens.encode([dogerm_world.before_remark(r, tokenizer) for r in records], tokenizer)
    user = tokenizer.convert_tokens_to_ids('<|user|>')
    for i in range(6):
        pairs = zip(plain.rows(plain_text, i), plain.rows(found.tokens, i), strict=True)
        for ends, more in pairs:
            np.testing.assert_array_equal([*ends, user], more)
    assert found.tokens.rank.tolist() == plain_text.rank.tolist()


# Files of generations


ROWS = [
    {'question': '1 + 1?', 'gold_answer': 2.0, 'candidates': [
        {'text': 'The answer is 2. Not 3', 'is_correct': True}, {'text': 'A: 3'},
        {'text': 'none', 'is_correct': False}, {'text': 'so 2.0', 'is_correct': False}]},
    {'question': 'f(1) == ??', 'gold_answer': "'a'", 'candidates': [
        {'text': 'x', 'answer': "'a'", 'is_correct': True},
        {'text': 'y', 'answer': 'a', 'is_correct': True},
        {'text': 'z', 'answer': 'b', 'is_correct': False},
        {'text': 'w', 'answer': None, 'is_correct': False}]},
]  # fmt: skip
CODE = {
    'prompt': 'def add(a, b):\n', 'entry_point': 'add',
    'test': 'def check(f):\n    assert f(1, 2) == 3\n',
    'candidates': [{'text': '    return a + b\n'}, {'text': '    return a - b\n'}],
}  # fmt: skip


def written(path, rows):
    path.write_text('\n'.join(map(json.dumps, rows)) + '\n')
    return str(path)


def test_right_answers_and_votes(tmp_path, capsys):
    of = generations.load(written(tmp_path / 'a.jsonl', ROWS))
    assert [g.tolist() for g in of.gold] == [[1, 0, 0, 1], [1, 1, 0, 0]]
    assert of.votes == [[2, 3, None, 2], ['a', 'a', 'b', None]]
    assert '1 of 7 candidates are marked otherwise' in capsys.readouterr().out
    assert [r.responses[1] for r in of.records] == ['A: 3', 'y']
    assert len(generations.load(str(tmp_path / 'a.jsonl'), questions=1).records) == 1


def test_code_runs_only_if_asked(tmp_path, monkeypatch):
    path = written(tmp_path / 'code.jsonl', [CODE])
    with pytest.raises(DataError, match=r'code.jsonl:1: candidates: found None.*--run_code'):
        generations.load(path)
    of = generations.load(path, timeout=20.0, unsafe=True)
    assert (of.gold[0].tolist(), of.votes) == ([1, 0], None)
    assert of.why == [['', 'AssertionError: ']]
    assert generations.ends([*of.why, ['OSError: a', 'OSError: b']]) == {
        'OSError': 2, 'AssertionError': 1
    }  # fmt: skip
    monkeypatch.setattr(sandbox, 'available', lambda: False)
    with pytest.raises(ValueError, match='--unsafe runs them all the same'):
        generations.load(path, timeout=20.0)
    mixed = written(tmp_path / 'mixed.jsonl', [CODE, ROWS[0]])
    with pytest.raises(DataError, match=r'mixed.jsonl:2: found no tests'):
        generations.load(mixed, unsafe=True)


def test_mbpp_programs_are_cut_out_of_their_replies():
    row = {'test_list': ['assert f(2) == 4'], 'test_setup_code': 'K = 2'}
    found = generations.program(row, 'Sure:\n```python\ndef f(x): return x * K\n```\nDone.')
    assert sandbox.run(found, unsafe=True, timeout=20.0).passed


WRONG = {
    'no question': ({'question': None}, "expected 'question' or 'prompt'"),
    'no candidates': ({'candidates': []}, 'expected a list of objects'),
    'no text': ({'candidates': [{'answer': '1'}]}, "objects with a 'text'"),
    'no mark': ({'candidates': [{'text': 'a'}]}, 'found None, expected is_correct'),
}


@pytest.mark.parametrize('name', WRONG)
def test_wrong_rows_are_named(name, tmp_path):
    change, message = WRONG[name]
    path = written(tmp_path / 'a.jsonl', [ROWS[0], ROWS[1] | change])
    with pytest.raises(DataError) as error:
        generations.load(path)
    assert str(error.value).startswith(f'{path}:2: ')
    assert message in str(error.value)


def test_orders_are_those_of_the_candidates_and_their_marks(tmp_path):
    of = generations.load(written(tmp_path / 'a.jsonl', ROWS))
    scores = [np.array([0.1, 0.9, 0.3, 0.5]), np.array([3.0, 1.0, 2.0, 0.0])]
    assert generations.doubling(of.gold) == [1, 2, 4]
    found = generations.over_orders(of, bestofn.nested, scores, 4000)
    pairs = [*itertools.combinations(range(4), 2)]
    for b in range(2):
        s, g = scores[b], of.gold[b]
        best = lambda some: g[max(some, key=lambda i: s[i])]  # noqa: E731
        want = [g.mean(), np.mean([best(pair) for pair in pairs]), best(range(4))]
        np.testing.assert_allclose(found[b], want, atol=0.03)
    lines = generations.baselines(of, 50)
    assert set(lines) == {'random', 'oracle (pass@n)', 'longest', 'majority vote'}
    np.testing.assert_allclose(lines['oracle (pass@n)'], [[0.5, 5 / 6, 1], [0.5, 5 / 6, 1]])
    np.testing.assert_array_equal(lines['majority vote'][:, -1], [1, 1])
    assert best_of_n.short('runs/a/model') == 'a'
    assert best_of_n.short('x/gsm8k_candidates.jsonl.gz') == 'gsm8k'
    assert best_of_n.short('runs/merged-0.3/model') == 'merged-0.3'


def test_answers_that_run_on_are_cut_for_models():
    tokenizer = common.train_tokenizer(['abcabc abc'], 300)
    (record,) = best_of_n.cut([Preference('', ('x' * 9, 'abc', ''))], tokenizer, 4)
    assert record.responses == ('xxxx', 'abc', '')


# Short runs


@pytest.fixture(scope='module')
def decoders(tmp_path_factory):
    """A language model, and a reward model of the same sizes with another vocabulary."""
    folder, made = tmp_path_factory.mktemp('models'), []
    for i, (kind, size) in enumerate({'lm_head': 320, 'score': 300}.items()):
        records = synthetic.preferences(40, seed=i)
        tokenizer = common.train_tokenizer(common.texts(records), size)
        config = common.tiny(len(tokenizer), width=16, layers=2)
        head = heads.Scalar() if i else heads.LanguageModel(config.V, tied=True)
        rm = reward.RewardModel(Decoder(config), head)
        params = {'backbone': rm.init_backbone(jax.random.key(i)), 'head': {}}
        if i:
            params['head'] = rm.init_head(jax.random.key(i), 16)
        like = checkpoint.Pretrained('llama', config, tokenizer)
        path = folder / kind / 'model'
        checkpoint.export(path, params, like, head_kind=kind if not i else None)
        made.append(path)
    return made


@pytest.fixture
def one_device(monkeypatch):
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    monkeypatch.setattr(devices, 'mesh', lambda c: mesh)


@pytest.mark.slow
def test_a_short_run_in_the_world(tmp_path, one_device, capfd):
    c = dogerm_world.Config(
        output_dir=tmp_path / 'run', results=tmp_path, seeds=(0, 1), shares=3, base_texts=60,
        base_epochs=1, domain_texts=30, pairs=40, test_pairs=10, hidden_size=16, vocabulary=600,
        max_length=260, num_hidden_layers=2,
    )  # fmt: skip
    dogerm_world.main(c)
    found = json.loads((tmp_path / 'noise.json').read_text())
    ours = json.loads((tmp_path / 'language_model.json').read_text())
    assert np.shape(found['curves']['domain accuracy']) == (2, 3)
    for name, curve in found['curves'].items():  # all begin as the same reward models
        np.testing.assert_array_equal(np.array(curve)[:, 0], np.array(ours['curves'][name])[:, 0])
    assert '| other initialisation |' in capfd.readouterr().out
    assert (tmp_path / 'curves.png').exists()
    dogerm_world.main(dataclasses.replace(c, only_table=True))
    with pytest.raises(ValueError, match='is of a run with'):
        dogerm_world.main(dataclasses.replace(c, only_table=True, pairs=41))


@pytest.mark.slow
def test_a_short_sweep_of_two_vocabularies(tmp_path, decoders, monkeypatch):
    lm, rm = map(str, decoders)
    one = sharding.make_mesh(devices=jax.devices()[:1])
    monkeypatch.setattr(sharding, 'make_mesh', lambda **options: one)
    rows = [
        {'chosen': [*r.messages, {'role': 'assistant', 'content': r.responses[0]}],
         'rejected': [*r.messages, {'role': 'assistant', 'content': r.responses[1]}]}
        for r in synthetic.preferences(24, seed=5, labels='gold') if r.ranks == (0, 1)
    ]  # fmt: skip
    names = [written(tmp_path / f'{i}.jsonl', rows[8 * i :][:8]) for i in range(2)]
    c = dogerm_sweep.Config(
        model_name_or_path=rm, language_model=lm, dataset_validation=names[0],
        dataset_test=names[1], dataset_other=(names[0],), output_dir=tmp_path / 'out', shares=3,
    )  # fmt: skip
    dogerm_sweep.main(c)
    found = json.loads((tmp_path / 'out' / 'result.json').read_text())
    assert found['shares'] == [0, 0.5, 1]
    assert found['curves']['0'] == found['curves']['validation']
    assert np.ptp(found['curves']['test']['mean']) > 0
    assert (tmp_path / 'out' / 'curves.png').exists()
    with pytest.raises(ValueError, match='found a prompt of the test set'):
        dogerm_sweep.main(dataclasses.replace(c, dataset_test=names[0]))


@pytest.mark.slow
def test_a_short_run_of_warm(tmp_path, decoders, one_device, capfd):
    c = warm.Config(
        model_name_or_path=str(decoders[0]), output_dir=tmp_path, results=tmp_path, seeds=(0, 1),
        members=2, pairs=24, test_pairs=16, num_train_epochs=1, probe_epochs=1, max_length=400,
    )  # fmt: skip
    warm.main(c)
    found = json.loads((tmp_path / 'other_units.json').read_text())
    assert np.shape(found['line']) == (2, 11)
    for seed in range(2):
        ends = [found['line'][seed][k] for k in (0, -1)]
        assert found['held out']['members'][seed] == ends
    assert set(found['memorised']) == {'members', 'average', 'ensemble'}
    assert '| own initialisation |' in capfd.readouterr().out
    assert (tmp_path / 'line.png').exists()


@pytest.mark.slow
def test_a_short_run_of_best_of_n(tmp_path, decoders, capfd, monkeypatch):
    one = sharding.make_mesh(devices=jax.devices()[:1])
    monkeypatch.setattr(sharding, 'make_mesh', lambda **options: one)
    path = written(tmp_path / 'sums_candidates.jsonl', ROWS)
    given = {'models': (decoders[1],), 'results': tmp_path, 'dataset_name': (path,)}
    best_of_n.main(best_of_n.Config(**given))
    assert '| score | ' in capfd.readouterr().out
    kept = json.loads((tmp_path / 'score-sums.json').read_text())
    assert np.shape(kept['curves']['score']) == (2, 3)
    assert (tmp_path / 'sums.png').exists()
    best_of_n.main(best_of_n.Config(**given, only_table=True))
    with pytest.raises(ValueError, match='is of a run with'):
        best_of_n.main(best_of_n.Config(**given, orders=3))
