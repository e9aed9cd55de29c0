"""The phases of DMoERM on a tiny decoder, one after the other: what each reads and moves."""

import dataclasses
import json
import shutil
from types import SimpleNamespace

import dmoerm_tiny
import jax
import numpy as np
import plain
import pytest
from dmoerm_tiny import PHASES, POINTS, RANK, D, files, flags
from safetensors.numpy import load_file, save_file

import jaxrm
from experiments import (
    common,
    devices,
    dmoerm,
    dmoerm_base,
    dmoerm_experts,
    dmoerm_mixture,
    dmoerm_phases,
    dmoerm_router,
)
from jaxrm import (
    checkpoint,
    features,
    heads,
    judge,
    lora,
    mixture_files,
    reward,
    sharding,
    tokens,
    tree,
)
from jaxrm.backbones.layers import Decoder
from jaxrm.data import Ids, Preference
from jaxrm.datasets import synthetic


@pytest.fixture(scope='module')
def decoder(tmp_path_factory):
    return dmoerm_tiny.decoder(tmp_path_factory.mktemp('decoder'))


@pytest.fixture(scope='module')
def made(decoder, tmp_path_factory):
    """The flags, and the files after each phase."""
    folder, after = tmp_path_factory.mktemp('phases'), []
    one = sharding.make_mesh(devices=jax.devices()[:1])
    configs = flags(decoder, folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(devices, 'mesh', lambda c: one)
        for phase, c in zip(PHASES, configs, strict=True):
            phase.main(c)
            after.append(files(c.output_dir))
    return configs, after


# What moves


def test_a_phase_adds_its_part_and_leaves_the_others_alone(made):
    _, after = made
    ends = ('router/model.safetensors', '/base/model.safetensors',
            '/adapter_model.safetensors', '/mixture.safetensors')  # fmt: skip
    counts = [1, 2, 4, 2]
    before = {}
    for now, end, count in zip(after, ends, counts, strict=True):
        new = [name for name in now.keys() - before.keys() if name.endswith(end)]
        assert len(new) == count
        kept = before.keys() - {'dmoerm.json'}
        assert {name: now[name] for name in kept} == {name: before[name] for name in kept}
        before = now
    assert after[2]['dmoerm.json'] == after[0]['dmoerm.json'] != after[3]['dmoerm.json']


def leaves(params):
    return dmoerm.digests(jax.device_get(params))


def test_a_base_moves_whole(made, decoder):
    (c, *_), _ = made
    start = checkpoint.load_pretrained(decoder, kind='backbone')
    for category in POINTS:
        base = mixture_files.load_base(c.output_dir, category)
        before, after = leaves({'x': start.backbone}), leaves({'x': base.backbone})
        assert dmoerm.moved(before, after) == set(before)
        fresh = reward.RewardModel(None, heads.Scalar()).init_head(
            jax.random.split(jax.random.key(0), 3)[1], D
        )
        assert dmoerm.moved(leaves(fresh), leaves(base.head)) == {'kernel'}


def test_experts_move_with_their_heads(made):
    """From copies of the base's head, and adapters without effect; every leaf of each."""
    (_, _, c, _), _ = made
    for category, names in POINTS.items():
        base = mixture_files.load_base(c.output_dir, category)
        found, scale = mixture_files.load_experts(c.output_dir, category, base)
        start = dmoerm.experts([base.params], 2, seeds=[0], rank=RANK, targets=lora.QV)
        assert scale == 2
        for e in range(len(names)):
            one, was = (jax.tree.map(lambda x, e=e: x[e], t) for t in (found, start))
            assert not np.any(tree.flatten(was)['lora/top/q/b'])
            np.testing.assert_array_equal(was['head']['kernel'], base.head['kernel'])
            assert dmoerm.moved(leaves(was), leaves(one)) == set(leaves(was))
        first, second = (jax.tree.map(lambda x, e=e: x[e], found) for e in (0, 1))
        assert dmoerm.moved(leaves(first), leaves(second)) == set(leaves(first))
        per_layer = 2 * RANK * (D + D)
        assert sum(x.size for x in jax.tree.leaves(first['lora'])) == 2 * per_layer


def test_the_mlp_moves_whole(made):
    (*_, c), _ = made
    for category in POINTS:
        head = mixture_files.load_head(c.output_dir, category, experts=2, width=D)
        start = dmoerm.mixture_of(reward.RewardModel(Decoder(common.tiny(9, width=D, layers=1)),
                                                     heads.Scalar()))  # fmt: skip
        fresh = start.init_head(jax.random.key(0), 1, 2 * D)
        free = {'out/bias'}  # of which pairs' differences say nothing
        assert dmoerm.moved(leaves(fresh), leaves(head)) - free == set(leaves(head)) - free
        assert head['slope'] != 0.25


# What comes out


def test_the_folder_is_a_model(made):
    """What jaxrm.load gives is what the phases learned, by another way through the same files."""
    (*_, c), _ = made
    rm = jaxrm.load(c.output_dir, mesh=sharding.make_mesh(devices=jax.devices()[:1]))
    records = synthetic.preferences(6, seed=5, split='test', categories=tuple(POINTS))
    turn = lambda x: {'role': 'assistant', 'content': x}  # noqa: E731
    chats = [[*r.messages, turn(x)] for r in records for x in r.responses]
    found, said = rm.score(chats), rm.explain(chats)
    assert np.isfinite(found).all()
    assert np.ptp(found) > 0
    assert {e.category for e in said} <= set(POINTS)
    result = json.loads((c.output_dir / 'result.json').read_text())
    assert set(result['accuracy']) == {'predicted', 'gold', 'random'}
    plan = mixture_files.read_plan(c.output_dir)
    assert plan.capabilities == {k: tuple(v) for k, v in POINTS.items()}
    assert set(plan.normaliser) == set(POINTS)


def test_features_that_were_cached_score_as_the_whole_model(made):
    """Phase 3 on features equals a pass of everything; the normaliser is of held-out scores."""
    (*_, c), _ = made
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    plan = mixture_files.read_plan(c.output_dir)
    of = dmoerm_phases.load(c, plan.categories)
    found = dmoerm_phases.Found(plan, of, mesh)
    model, params, base = mixture_files.load_inner(c.output_dir, 'facts')
    records = dmoerm_phases.human(found, 'facts', 'mixture')
    some = tokens.encode(records, base.tokenizer, max_length=c.max_length).tokens
    shape = dmoerm.shape_of(some, D, 8)
    score_c = jaxrm.evaluate.candidate_scores(
        jax.jit(model.score), params, some, shape, mesh=mesh, packs=1
    )
    cached = dmoerm.cached(model, params, some, shape, mesh)
    by_cache = features.candidate_scores(
        jax.jit(features.scored(model.rewards)), {'head': params['head']}, cached, some, mesh=mesh
    )
    np.testing.assert_allclose(by_cache, score_c, rtol=1e-5, atol=1e-6)
    held_n = dmoerm_phases.held(some, records, 0.3)
    held_c = np.repeat(held_n, 2)
    assert 0.1 < held_n.mean() < 0.5
    want = score_c[held_c].mean(), score_c[held_c].std()
    np.testing.assert_allclose(plan.normaliser['facts'], want, rtol=1e-4, atol=1e-5)


# Data


def tokens_of(records):
    """What `held` needs of their tokens."""
    return SimpleNamespace(record=np.arange(len(records)))


def test_parts_of_the_data_share_no_prompt(made):
    (_, c, *_), _ = made
    plan = mixture_files.read_plan(c.output_dir)
    of = dmoerm_phases.load(c, plan.categories)
    found = dmoerm_phases.Found(plan, of, None)
    big = dmoerm_phases.Found(plan, dmoerm_phases.load(
        dataclasses.replace(c, pairs=2000), plan.categories), None)  # fmt: skip
    for category in POINTS:
        sides = [dmoerm_phases.human(found, category, side) for side in ('base', 'mixture')]
        asked = [{repr(r.messages) for r in side} for side in sides]
        assert not asked[0] & asked[1]
        assert sum(map(len, sides)) == len(of.of(category))
        base, rest = (len(dmoerm_phases.human(big, category, s)) for s in ('base', 'mixture'))
        assert 0.55 < base / (base + rest) < 0.65
        mine = dmoerm_phases.human(big, category, 'mixture')
        asked = sorted({repr(r.messages) for r in mine})
        out_n = dmoerm_phases.held(tokens_of(mine), mine, 0.3)
        out = {repr(r.messages) for r, held in zip(mine, out_n, strict=True) if held}
        assert 0.25 < len(out) / len(asked) < 0.35
    held = {repr(r.messages) for r in of.test}
    assert not held & {repr(r.messages) for r in of.train}


def test_no_prompt_of_the_test_set_teaches_or_is_shown_to_a_judge(made, tmp_path):
    (_, c, experts, _), _ = made
    plan = mixture_files.read_plan(c.output_dir)
    of = dmoerm_phases.load(c, plan.categories)
    with pytest.raises(ValueError, match='dataset_train: record 90: found a prompt of the test'):
        dmoerm_phases.check_apart([*of.train, of.test[0]], of.test, 'dataset_train')
    leaky = dmoerm_phases.Found(plan, of._replace(train=[*of.train, of.test[3]]), None)
    with pytest.raises(ValueError, match='found an excluded prompt'):
        dmoerm_experts.labelled(experts, leaky)
    path = tmp_path / 'labels.jsonl'
    judge.write(path, [of.test[0]._replace(group='facts/politeness', id='x')])
    with pytest.raises(ValueError, match='labels: record 0: found a prompt of the test set'):
        dmoerm_experts.labelled(
            dataclasses.replace(experts, labels=path), dmoerm_phases.Found(plan, of, None)
        )


def test_a_prompt_is_the_same_whatever_its_spaces():
    """By the rule of what is shown to a judge."""
    turn = lambda x: ({'role': 'user', 'content': x},)  # noqa: E731
    one = Preference(turn('How far is it?'), ('x', 'y'), ranks=(0, 1))
    for messages in (turn('How  far\nis it? '), 'How far is it?'):
        some = [one._replace(messages=turn('Who?')), one._replace(messages=messages)]
        with pytest.raises(ValueError, match='labels: record 1: found a prompt of the test set'):
            dmoerm_phases.check_apart(some, [one], 'labels')
    ids = one._replace(messages=Ids((1, 2)))
    dmoerm_phases.check_apart([ids], [one], 'labels')


def test_labels_of_no_expert_are_refused(made, tmp_path, capsys):
    (_, _, c, _), _ = made
    plan = mixture_files.read_plan(c.output_dir)
    found = dmoerm_phases.Found(plan, dmoerm_phases.load(c, plan.categories), None)
    good = found.data.train[0]._replace(group='facts/politeness', id='a')
    own = good._replace(id='b', messages=({'role': 'user', 'content': 'A prompt of its own'},))
    path = tmp_path / 'labels.jsonl'
    c = dataclasses.replace(c, labels=path)
    judge.write(path, [good, own])
    assert len(dmoerm_experts.labelled(c, found)) == 2
    assert '1 of 2 labels are of prompts without a human label' in capsys.readouterr().out
    judge.write(path, [good, own._replace(group='facts/tone'), own._replace(group='facts', id='c')])
    with pytest.raises(ValueError, match="labels: found 2 of 3 of groups as 'facts/tone', expec"):
        dmoerm_experts.labelled(c, found)


def test_labels_point_to_what_is_better(made):
    """A planted direction: experts learn from pairs whose first answer is the better one."""
    (_, _, c, _), _ = made
    plan = mixture_files.read_plan(c.output_dir)
    found = dmoerm_phases.Found(plan, dmoerm_phases.load(c, plan.categories), None)
    sure = dataclasses.replace(c, judge_noise=0.0, judge_position=0.0)
    column = synthetic.QUALITIES.index('politeness')
    pairs = judge.by_group(dmoerm_experts.labelled(sure, found))['facts/politeness']
    rated = synthetic.label(pairs, 'politeness', seed=0)
    assert len(pairs) > 10
    for pair, truth in zip(pairs, rated, strict=True):
        worth = dict(zip(truth.responses, (row[column] for row in truth.ratings), strict=True))
        assert worth[pair.responses[0]] > worth[pair.responses[1]]


def test_winners_become_ranks():
    some = plain.random_tokens([2, 2, 2])
    winner_n = np.array([0, 1, -1])
    found = dmoerm.relabelled(some, winner_n)
    assert found.rank.tolist() == [0, 1, 1, 0]
    np.testing.assert_array_equal(found.ids, tokens.select(some, [0, 1]).ids)


# Going on, and what is refused


def test_a_finished_phase_is_not_run_again(made, monkeypatch, capsys):
    configs, after = made
    monkeypatch.setattr(dmoerm, 'learned', None)
    monkeypatch.setattr(dmoerm, 'mixed', None)
    for phase, c in zip(PHASES, configs, strict=True):
        phase.main(c)
    assert capsys.readouterr().out.count('is there already') == 1 + 2 + 4 + 2
    now = files(configs[0].output_dir)
    assert now == after[-1]
    with pytest.raises(
        ValueError, match=r'router: is of a run with learning_rate 0\.001, not 0\.5'
    ):
        dmoerm_router.main(dataclasses.replace(configs[0], learning_rate=0.5))


def test_an_mlp_is_of_its_flags_its_experts_and_their_base(made, tmp_path):
    configs, _ = made
    shutil.copytree(configs[0].output_dir, tmp_path / 'copy')
    experts, c = (dataclasses.replace(x, output_dir=tmp_path / 'copy') for x in configs[2:])
    with pytest.raises(ValueError, match=r'mixture.safetensors: is of .* max_steps 20, not 21'):
        dmoerm_mixture.main(dataclasses.replace(c, max_steps=21))
    adapter = tmp_path / 'copy' / 'facts' / 'experts' / 'politeness' / 'adapter_model.safetensors'
    weights = load_file(adapter)
    save_file({name: x + 1 for name, x in weights.items()}, adapter, {'format': 'pt'})
    with pytest.raises(ValueError, match=r"mixture.safetensors: is of 'politeness' .*replaced"):
        dmoerm_mixture.main(c)
    base = tmp_path / 'copy' / 'facts' / 'base' / 'model.safetensors'
    save_file({name: x + 1 for name, x in load_file(base).items()}, base, {'format': 'pt'})
    with pytest.raises(ValueError, match=r'experts.politeness: is of a base .*replaced'):
        dmoerm_mixture.main(c)
    with pytest.raises(ValueError, match=r'experts.politeness: is of a run with base_digest'):
        dmoerm_experts.main(experts)


def test_another_test_set_is_measured_anew(made, monkeypatch):
    """And teaches nothing anew."""
    (*_, c), _ = made
    monkeypatch.setattr(dmoerm, 'mixed', None)
    seen = []
    monkeypatch.setattr(dmoerm_mixture, 'measure', lambda c, found: seen.append(found.data.test))
    dmoerm_mixture.main(c)
    assert not seen
    dmoerm_mixture.main(dataclasses.replace(c, test_pairs=7))
    assert [len(test) for test in seen] == [7]


def test_each_phase_names_what_it_lacks(made, tmp_path):
    configs, _ = made
    for c, phase in zip(configs[1:], PHASES[1:], strict=True):
        with pytest.raises(ValueError, match=r'expected what experiments\.dmoerm_router writes'):
            phase.main(dataclasses.replace(c, output_dir=tmp_path))
    shutil.copytree(configs[0].output_dir, tmp_path / 'part')
    shutil.rmtree(tmp_path / 'part' / 'persona' / 'experts' / 'verbosity')
    with pytest.raises(ValueError, match=r'verbosity: .*experiments.dmoerm_experts writes'):
        dmoerm_mixture.main(dataclasses.replace(configs[3], output_dir=tmp_path / 'part'))
    for name in POINTS:
        shutil.rmtree(tmp_path / 'part' / name)
    for phase, c in zip(PHASES[2:], configs[2:], strict=True):
        with pytest.raises(ValueError, match=r'facts.base: .*experiments.dmoerm_base writes'):
            phase.main(dataclasses.replace(c, output_dir=tmp_path / 'part'))
    with pytest.raises(ValueError, match='is of data'):
        dmoerm_base.main(dataclasses.replace(configs[1], flips=0.4))


def test_an_empty_point_is_an_error(made, tmp_path):
    """No expert is left out in silence."""
    (_, _, c, _), _ = made
    found = dmoerm_phases.begin(c)
    labels = judge.by_group(dmoerm_experts.labelled(c, found))
    labels.pop('facts/confidence')
    with pytest.raises(ValueError, match="found no label of 'facts/confidence'"):
        dmoerm_experts.experts(c, found, 'facts', labels)
    with pytest.raises(ValueError, match="capabilities: found none of 'chat'"):
        dmoerm_phases.capabilities(None, ('facts', 'chat'))


def test_records_of_other_groups_go_where_the_router_sends_them(made):
    (_, c, *_), _ = made
    plan = mixture_files.read_plan(c.output_dir)
    of = dmoerm_phases.load(c, plan.categories)
    odd = of._replace(train=[r._replace(group='other') if i % 9 == 0 else r
                             for i, r in enumerate(of.train)])  # fmt: skip
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    found = dmoerm_phases.categorised(c, plan, odd, mesh)
    want = jaxrm.load(c.output_dir, mesh=mesh).prepare(of.train[::9]).route_n
    assert [r.group for r in found.train[::9]] == [plan.categories[k] for k in want]
    assert found.train[1::9] == of.train[1::9]
