"""The three phases of ArmoRM at a few steps on a tiny decoder, one after the other."""

import dataclasses
import json
import re

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

import jaxrm
from experiments import (
    armorm,
    armorm_features,
    armorm_gate,
    armorm_objectives,
    armorm_real,
    armorm_world,
    common,
    gating,
    variants,
)
from jaxrm import checkpoint, data, evaluate, features, heads, hf_heads, reward, statistics, tree
from jaxrm.backbones.layers import Decoder
from jaxrm.datasets import synthetic
from jaxrm.regress import Scale

SIZES = {'prompts': 120, 'pairs': 96, 'test_pairs': 40, 'rated': 0.9}
GATE = {'max_steps': 4, 'train_batch_size': 16, 'gating_hidden_dim': 8, 'save_steps': 2}
J = len(synthetic.QUALITIES)


@pytest.fixture(scope='module')
def decoder(tmp_path_factory):
    """A folder with a decoder that has read nothing."""
    records = synthetic.preferences(50, seed=0)
    tokenizer = common.train_tokenizer(common.texts(records), 300)
    config = common.tiny(len(tokenizer), width=16, layers=2)
    rm = reward.RewardModel(Decoder(config), heads.LanguageModel(config.V, tied=True))
    params = {'backbone': rm.init_backbone(jax.random.key(0)), 'head': {}}
    like = checkpoint.Pretrained('llama', config, tokenizer)
    folder = tmp_path_factory.mktemp('decoder') / 'model'
    checkpoint.export(folder, params, like, head_kind='lm_head')
    return str(folder)


@pytest.fixture(scope='module')
def phases(decoder, tmp_path_factory):
    """The flags of the three phases, which have run on the world."""
    out = tmp_path_factory.mktemp('phases')
    given = {**SIZES, 'model_name_or_path': decoder, 'cache': out / 'cache'}
    given['features'] = out / 'features'
    given['stored_scales'] = ('verbosity=0:4',)
    one = armorm_features.Config(**given)
    two = armorm_objectives.Config(**given, output_dir=out / 'objectives')
    three = armorm_gate.Config(
        **given, **GATE, objectives=out / 'objectives', output_dir=out / 'gate'
    )
    armorm_features.main(one)
    armorm_objectives.main(two)
    armorm_gate.main(three)
    return one, two, three


def found(c, names=('ratings', 'pairs', 'test')):
    return armorm.sets(c, armorm.tokenizer(c), names)


def result(c):
    return json.loads((c.output_dir / 'result.json').read_text())


def test_a_second_pass_has_nothing_to_do(phases, capfd):
    one, *_ = phases
    armorm_features.main(one)
    said = capfd.readouterr().out
    assert '\n0 records more' in said


def test_the_decoder_reads_every_record_once_and_the_gate_none(phases, tmp_path, monkeypatch):
    folder = {'features': tmp_path / 'features'}
    one, two, three = (dataclasses.replace(c, **folder) for c in phases)
    three = dataclasses.replace(three, objectives=tmp_path / 'two', max_steps=20)
    compute, passed, traced = features.compute, [], []
    through = reward.RewardModel.features

    def counted(call, params, *rest, **options):
        def calls(params, pack):
            passed.append(int((pack.record_PB >= 0).sum()))
            return call(params, pack)

        return compute(calls, params, *rest, **options)

    def seen(*args, **options):
        traced.append(args)
        return through(*args, **options)

    monkeypatch.setattr(features, 'compute', counted)
    monkeypatch.setattr(reward.RewardModel, 'features', seen)
    armorm_features.main(one)
    sets = found(one, ('ratings', 'pairs', 'test', 'reference'))  # the last are the pairs again
    unique = {name for part in sets.values() for name in features.names(part.tokens)}
    assert sum(passed) == len(unique) == sum(SIZES[k] for k in ('prompts', 'pairs', 'test_pairs'))
    assert traced  # from here on the decoder is not even traced again
    del passed[:], traced[:]
    armorm_features.main(one)
    armorm_objectives.main(dataclasses.replace(two, output_dir=tmp_path / 'two'))
    armorm_gate.main(dataclasses.replace(three, output_dir=tmp_path / 'three'))
    assert not passed
    assert not traced


def test_each_objective_is_the_ridge_of_its_own_ratings(phases):
    """Against the normal equations on the rows that have a rating and are not held out."""
    _, two, _ = phases
    rated = found(two)['ratings']
    answer_cD = features.gather(two.features, rated.tokens).answer_cD.astype(np.float64)
    _, held = data.split_by_prompt(rated.records, 0.2, seed=0)
    here_c = ~np.repeat(np.isin(np.arange(len(rated.records)), held), 2)
    kernel_DJ = load_file(two.output_dir / 'head.safetensors')['regression/kernel']
    said = result(two)
    assert said['names'] == list(synthetic.QUALITIES)
    assert 0 < len(held) < len(rated.records)
    for j, name in enumerate(said['names']):
        label_c = rated.tokens.rating[:, j].astype(np.float64)
        use_c = here_c & ~np.isnan(label_c)
        x, y = answer_cD[use_c], label_c[use_c]
        alpha = said['objectives'][name]['alpha']
        want_D = np.linalg.solve(x.T @ x + alpha * np.eye(x.shape[1]), x.T @ y)
        np.testing.assert_allclose(x @ kernel_DJ[:, j], x @ want_D, atol=2e-4)
        other_c = ~here_c & ~np.isnan(label_c)
        mse = np.mean((label_c[other_c] - answer_cD[other_c] @ want_D) ** 2)
        assert said['objectives'][name]['mse'] == pytest.approx(mse, rel=1e-3)
        variance = np.mean((label_c[other_c] - y.mean()) ** 2)
        assert said['objectives'][name]['mse of the mean'] == pytest.approx(variance)


def test_penalties_are_those_of_the_reference(phases):
    _, two, _ = phases
    head, said = load_file(two.output_dir / 'head.safetensors'), result(two)['objectives']
    v, T_JJ = synthetic.QUALITIES.index('verbosity'), head['transform']
    np.testing.assert_allclose(-T_JJ[v], [said[n]['penalty'] - (n == 'verbosity') for n in said])
    np.testing.assert_array_equal(np.delete(T_JJ, v, 0), np.delete(np.eye(J), v, 0))
    pairs = found(two)['pairs'].tokens
    reward_cJ = features.gather(two.features, pairs).answer_cD @ head['regression/kernel']
    for j, name in enumerate(said):
        for key, x_cJ in (('with verbosity', reward_cJ), ('after', reward_cJ @ T_JJ)):
            if j != v:
                want = statistics.spearman(x_cJ[:, j], reward_cJ[:, v])
                assert said[name][key] == pytest.approx(want, abs=1e-3)
        # rounding may change the place of a rank or two
        assert j == v or said[name]['penalty'] == 1 or said[name]['after'] <= 0.03 + 1e-5


def test_the_export_scores_as_the_gate_did(phases):
    _, _, three = phases
    test = found(three)['test']
    model = jaxrm.load(three.output_dir / 'model')
    scores = model.score_records(test.records)
    right = evaluate.pairs(evaluate.ranks(test.records), scores).accuracy
    assert result(three)['left_out'] == {'pairs': 0, 'ratings': 0, 'reference': 0}
    said = result(three)['accuracy']
    assert said['gate'][0][0] == pytest.approx(right.mean(), abs=1e-6)
    assert set(said) == {
        'gate', 'uniform weights', 'best weights', 'best weights of any sign'
    }  # fmt: skip
    record = test.records[0]
    talk = [*record.messages, {'role': 'assistant', 'content': record.responses[0]}]
    (why,) = model.explain([talk])
    assert why.objectives == synthetic.QUALITIES
    assert why.contribution_J.sum() == pytest.approx(scores[0][0], abs=1e-5)
    assert why.scales == tuple(Scale(0, 4) if n == 'verbosity' else None for n in why.objectives)
    config = json.loads((three.output_dir / 'model' / 'config.json').read_text())
    assert [config[k] for k in hf_heads.GATING] == [J, 10, 8, 3]


def test_nothing_but_the_gate_differs_from_what_it_stands_on(phases, decoder):
    _, two, three = phases
    after = checkpoint.load_pretrained(three.output_dir / 'model')
    before = tree.flatten(checkpoint.load_pretrained(decoder, kind='backbone').backbone)
    for name, x in tree.flatten(after.backbone).items():
        assert x.tobytes() == before[name].tobytes(), name
    head = load_file(two.output_dir / 'head.safetensors')
    for name, x in tree.flatten(after.head).items():
        np.testing.assert_array_equal(x, head[name])


def test_finished_phases_are_not_run_again(phases, capfd):
    _, two, three = phases
    for c, phase in ((two, armorm_objectives), (three, armorm_gate)):
        phase.main(c)
        assert 'result.json is there already' in re.sub(r'\s', ' ', capfd.readouterr().out)
        with pytest.raises(ValueError, match='is of a run with seed 0, not 1'):
            phase.main(dataclasses.replace(c, seed=1))
    assert not any(str(three.features) in (c.output_dir / 'result.json').read_text()
                   for c in (two, three))  # fmt: skip


def test_features_that_are_not_there(phases, tmp_path):
    _, two, _ = phases
    c = dataclasses.replace(two, prompts=130, output_dir=tmp_path)
    with pytest.raises(ValueError, match='lacks the features of 10 records of 130'):
        armorm_objectives.main(c)


def test_a_fit_to_another_model_is_refused(phases, tmp_path):
    _, two, three = phases
    for name in ('head.safetensors', 'result.json'):
        (tmp_path / name).write_bytes((two.output_dir / name).read_bytes())
    said = result(two) | {'model': 'another'}
    (tmp_path / 'result.json').write_text(json.dumps(said))
    c = dataclasses.replace(three, objectives=tmp_path, output_dir=tmp_path / 'gate')
    with pytest.raises(ValueError, match='found a fit to features of another, expected of'):
        armorm_gate.main(c)


@pytest.mark.parametrize(
    ('flag', 'now'),
    [('seed', 1), ('length_bias', 0.5), ('pairs', 95), ('verbosity', 'tone'), ('chat', True)],
)
def test_a_fit_to_other_data_is_refused(phases, tmp_path, flag, now):
    _, two, three = phases
    c = dataclasses.replace(three, output_dir=tmp_path, **{flag: now})
    found = f'is of a run with {flag} {getattr(two, flag)!r}, not {now!r}'
    with pytest.raises(ValueError, match=f'^{re.escape(f"{two.output_dir}: {found}")}$'):
        armorm_gate.main(c)
    armorm_gate.check_same(dataclasses.replace(three, test_pairs=7), result(two))


def test_the_gate_of_the_public_script_is_compared_and_not_exported(phases, tmp_path):
    """It is worth the uniform weights without the transform, and no model to keep."""
    _, two, three = phases
    c = dataclasses.replace(three, output_dir=tmp_path, script_softmax=True, dropout=0.0)
    armorm_gate.main(c)
    said = result(c)['accuracy']
    assert said['gate'] == said['uniform weights'][:1]
    assert not (tmp_path / 'model').exists()
    with pytest.raises(ValueError, match=r'^script_softmax: found a gate that weighs nothing'):
        armorm_gate.export(c, {}, result(two))


def test_a_stopped_gate_goes_on(phases, tmp_path, monkeypatch):
    _, _, three = phases
    c = dataclasses.replace(three, output_dir=tmp_path / 'stopped')
    stream, asked = gating.stream, []

    def failing(*args):
        batches = stream(*args)
        records = batches.records

        def batch(i):
            asked.append(i)
            if i == 3:
                raise KeyboardInterrupt
            return batches(i)

        batch.records = records
        return batch

    monkeypatch.setattr(gating, 'stream', failing)
    with pytest.raises(KeyboardInterrupt):
        armorm_gate.main(c)
    monkeypatch.undo()
    assert asked == [0, 1, 2, 3]
    armorm_gate.main(c)
    assert result(c)['accuracy'] == result(three)['accuracy']
    lines = jaxrm.logs.read(c.output_dir / 'metrics.jsonl')
    assert [line['step'] for line in lines] == [1, 2, 3, 4]


# Flags and tables


@pytest.mark.parametrize(
    ('flags', 'message'),
    [
        ({'dataset_pairs': 'p.jsonl'}, 'dataset_ratings, dataset_pairs: found one of them'),
        ({'rating_scales': ('long',)}, "--rating_scales: found 'long', expected name=low:high"),
        ({'rating_scales': ('short=0:4',)}, "--rating_scales: found 'short', expected one of"),
        (
            {'rating_scales': ('verbosity=0:4',)},
            r"--stored_scales: found \['verbosity'\], which --rating_scales gives, too",
        ),
        ({'verbosity': 'size'}, "--verbosity: found 'size', expected one of"),
    ],
)
def test_wrong_flags(phases, tmp_path, flags, message):
    _, two, _ = phases
    with pytest.raises(ValueError, match=message):
        armorm_objectives.main(dataclasses.replace(two, **flags, output_dir=tmp_path))


def test_cells_become_a_table(tmp_path, monkeypatch, capfd):
    """Intervals over the seeds are Student's; over prompts, records of a prompt go together."""
    monkeypatch.setattr(armorm_world, 'RESULTS', tmp_path)
    c = armorm_world.Config(seeds=(1, 2), only_table=True)
    for seed, right in ((1, [1, 1, 0, 1]), (2, [1, 1, 1, 1])):
        rows = {
            'gate': {'right': armorm_world.packed(np.array(right)), 'scale': seed},
            'uniform weights': {'right': armorm_world.packed(np.array([0, 1, 0, 1]))},
        }
        prompt = ' '.join([f'{seed:x}'] * 4)
        cell = {'flags': armorm_world.flags(c), 'rows': rows, 'prompt': prompt}
        common.write_json(tmp_path / f'length-language_model-{seed}.json', cell)
    armorm_world.main(c)
    said = capfd.readouterr().out
    half = 12.706 * 0.25 / 2  # t of one degree of freedom
    assert f'| gate | 0.875 [0.750, 1.000] | [{0.875 - half:.3f}, {0.875 + half:.3f}] |  |' in said
    assert '|  |  | scale 1.50 |' in said
    assert '| 0.500 [0.500, 0.500] | [0.500, 0.500] | 0.375 [0.250, 0.500] |' in said
    with pytest.raises(ValueError, match=r'length-language_model-1\.json: is of a run with'):
        armorm_world.main(dataclasses.replace(c, max_steps=7))


def test_real_cells_become_tables(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(armorm_real, 'RESULTS', tmp_path)
    c = armorm_real.Config(seeds=(1, 2), only_table=True)
    for seed, halves in ((1, '2210'), (2, '2222')):
        errors = {'alpha': 1.0, 'mse': 0.1 * seed, 'mse of the mean': 0.4, 'spearman': 0.5}
        right = {'gate': halves, 'uniform weights': '0202'}
        cell = {'objectives': {'truthful': errors}, 'right': right, 'prompt': [0, 1, 2, 2]}
        cell['flags'] = armorm_real.flags(c)
        common.write_json(tmp_path / f'hh_harmless-{seed}.json', cell)
    armorm_real.main(c)
    said = capfd.readouterr().out
    assert '| truthful | 0.1500 | 0.4000 | 0.625 | 0.500 to 0.750 | 0.500 |' in said
    assert '| gate | 0.812 [' in said
    assert '0.625 to 1.000 |  |' in said
    assert '0.500 to 0.500 | 0.312 [' in said
    assert 'qa_feedback' not in said
    with pytest.raises(ValueError, match=r'hh_harmless-1\.json: is of a run with'):
        armorm_real.main(dataclasses.replace(c, max_steps=7))


@pytest.mark.slow
def test_a_cell_of_each_part(decoder, tmp_path, monkeypatch):
    monkeypatch.setattr(armorm_world, 'RESULTS', tmp_path)
    small = {name: dataclasses.field(default=size) for name, size in SIZES.items()}
    data_of = dataclasses.make_dataclass(
        'Small', [(k, object, v) for k, v in small.items()], bases=(armorm.Data,),
        frozen=True, kw_only=True,
    )  # fmt: skip
    monkeypatch.setattr(armorm, 'Data', data_of)
    c = armorm_world.Config(
        language_model=decoder, reward_model=decoder, features=tmp_path / 'features', seeds=(1,),
        max_steps=3, train_batch_size=16, gating_hidden_dim=8,
    )  # fmt: skip
    armorm_world.main(c)
    cells = {p.name: json.loads(p.read_text())['rows'] for p in tmp_path.glob('*.json')}
    assert set(cells) == {f'{part}-1.json' for part in armorm_world.PARTS}
    routing = cells['routing-language_model-1.json']
    assert routing['softmax over the pair']['right'] == routing['uniform weights']['right']
    assert routing['gate, scale frozen at 1']['scale'] == 1
    assert routing['gate, scale from 1']['scale'] != 1
    assert len({json.dumps(routing[name]) for name in variants.VARIANTS}) == len(variants.VARIANTS)
    for rows in cells.values():
        assert {len(row['right']) for row in rows.values()} == {SIZES['test_pairs'] // 4}
