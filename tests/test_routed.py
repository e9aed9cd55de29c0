"""A whole DMoERM from files: who scores what, and what is refused."""

import dataclasses
import functools
import json
import shutil

import jax
import numpy as np
import pytest
from test_scorer import chat
from torch_goldens import GOLDENS, assert_close, edit_json, load

import jaxrm
from jaxrm import cli, mixture_files, routed, scorer, tree
from jaxrm.data import DataError, Preference
from jaxrm.mixture_files import Plan

EXPERTS = ('logic', 'tone', 'length')
CATEGORIES = ('facts', 'small talk')
PLAN = Plan(
    CATEGORIES,
    {'facts': EXPERTS, 'small talk': EXPERTS[:2]},
    normaliser={'facts': (0.5, 2.0), 'small talk': (-1.0, 0.25)},
)
ASKS = [
    f'{word} is it? {"ü" * i}' for i, word in enumerate('which who when why how far old'.split())
]


@functools.cache
def inner():
    """Of the golden files: the base, the experts, and a random MLP of each category."""
    base = load('seqcls')
    folder = GOLDENS.parent / 'mixture'
    found = [jaxrm.checkpoint.load_adapter(folder / 'experts' / e, base) for e in EXPERTS]
    experts = jaxrm.mixture.join([{'lora': a.lora, 'head': a.head} for a in found])
    few = jax.tree.map(lambda x: x[:2], experts)
    model = jaxrm.mixture.Mixture(None, jaxrm.heads.Mixture(4))
    D = base.config.D
    mlps = [model.init_head(jax.random.key(k), 3 - k, D) for k in range(2)]
    return base, (experts, few), mlps, found[0].scale


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp('dmoerm')
    base, experts, mlps, scale = inner()
    mixture_files.write_plan(path, PLAN)
    kernel = 3 * np.random.default_rng(1).normal(size=(base.config.D, 2)).astype(np.float32)
    params = {'backbone': base.backbone, 'head': {'kernel': kernel}}
    mixture_files.export_router(path, params, base)
    for category, of, mlp in zip(CATEGORIES, experts, mlps, strict=True):
        mixture_files.export_base(path, category, base.params, base)
        mixture_files.export_experts(path, category, of, base, lora_scale=scale)
        mixture_files.export_head(path, category, mlp)
    return path


@pytest.fixture(scope='module')
def rm(folder):
    return jaxrm.load(folder)


def talks(count=None):
    return [chat(ask, 'The answer.') for ask in ASKS[:count]]


def routes(rm, conversations=None):
    return [e.category for e in rm.explain(conversations or talks())]


def test_parts_come_back_as_they_were(folder):
    base, experts, mlps, scale = inner()
    assert mixture_files.read_plan(folder) == PLAN
    assert mixture_files.load_router(folder).objectives == CATEGORIES
    config = json.loads((folder / 'router' / 'config.json').read_text())
    assert config['problem_type'] == 'single_label_classification'
    for category, of, mlp in zip(CATEGORIES, experts, mlps, strict=True):
        model, params, found = mixture_files.load_inner(folder, category)
        assert model.expert.lora_scale == scale == 2
        for name, x in tree.flatten({**base.params, 'experts': of, 'mlp': mlp}).items():
            got = tree.flatten(
                {**found.params, 'experts': params['experts'], 'mlp': params['head']}
            )
            np.testing.assert_array_equal(got[name], x, err_msg=name)


def test_each_prompt_is_scored_by_its_category_alone(rm, folder):
    """The other category's model is not run, and its scores are others."""
    found = rm.explain(talks())
    assert {e.category for e in found} == set(CATEGORIES)
    assert isinstance(rm, routed.Routed)
    for i, category in enumerate(CATEGORIES):
        mine = [t for t, e in zip(talks(), found, strict=True) if e.category == category]
        ready = rm.prepare(scorer.parsed(mine)[0])
        assert list(ready.parts) == [i]
        model, params, base = mixture_files.load_inner(folder, category)
        alone = scorer.Scorer(model, params, base.tokenizer, rm.inner[i].mesh, jax.jit(model.score))
        assert_close(rm.score(mine), alone.score(mine))
        other = rm.inner[1 - i].score(mine)
        assert np.abs(rm.score(mine) - other).max() > 1e-2


def test_a_route_is_the_prompts(rm, monkeypatch):
    """Whatever the answers and however many; every distinct prompt is read once."""
    seen, real = [], routed.logits

    def logits(route, params, prompts, *rest, **options):
        seen.extend(p.messages for p in prompts)
        return real(route, params, prompts, *rest, **options)

    monkeypatch.setattr(routed, 'logits', logits)
    asks = [chat(ask) for ask in ASKS]
    one = [Preference(tuple(a), ('x',)) for a in asks]
    many = [Preference(tuple(a), tuple(f'y {i}' for i in range(5))) for a in asks]
    first = rm.prepare(one)
    both = rm.prepare(many + one)
    np.testing.assert_array_equal(both.route_n, np.tile(first.route_n, 2))
    assert len(seen) == 2 * len(ASKS)
    before = chat('who is it?', 'Nobody.', ASKS[0])
    assert rm.prepare([Preference(tuple(before), ('x',))]).logits_nC[0] != pytest.approx(
        first.logits_nC[0]
    )  # earlier questions count


def test_routes_can_be_given(rm):
    records = [Preference(tuple(chat(a)), ('x', 'y'), group=CATEGORIES[1]) for a in ASKS]
    assert rm.prepare(records, route='gold').route_n.tolist() == [1] * len(ASKS)
    by_chance = rm.prepare(records, route='random').route_n
    assert set(by_chance.tolist()) == {0, 1}
    np.testing.assert_array_equal(rm.prepare(records, route='random').route_n, by_chance)
    with pytest.raises(DataError, match="record 0: group: found 'odd', expected one of"):
        rm.prepare([records[0]._replace(group='odd')], route='gold')
    with pytest.raises(ValueError, match="route: found 'soft', expected one of"):
        rm.prepare(records, route='soft')


def test_an_explanation_has_the_route_and_the_experts(rm):
    for found, score in zip(rm.explain(talks()), rm.score(talks()), strict=True):
        assert found.score == pytest.approx(score, abs=1e-6)
        assert sum(found.probabilities.values()) == pytest.approx(1)
        assert max(found.probabilities, key=found.probabilities.get) == found.category
        assert tuple(found.capabilities) == PLAN.capabilities[found.category]
        assert found.category in str(found)
        assert 'tone' in str(found)
    experts = routes(rm).index('facts')
    model, params, _ = rm.inner[0].model, rm.inner[0].params, None
    one = {'backbone': params['backbone'], **jax.tree.map(lambda x: x[1], params['experts'])}
    alone = dataclasses.replace(
        rm.inner[0], model=model.expert, params=one, compiled=jax.jit(model.expert.score)
    )
    tone = rm.explain([talks()[experts]])[0].capabilities['tone']
    assert_close(tone, alone.score([talks()[experts]])[0])


def test_a_normaliser_is_applied_when_asked_for(rm):
    normal = dataclasses.replace(rm, normalise=True)
    for raw, score, category in zip(
        rm.score(talks()), normal.score(talks()), routes(rm), strict=True
    ):
        mean, std = PLAN.normaliser[category]
        assert score == pytest.approx((raw - mean) / std, abs=1e-5)
    bare = dataclasses.replace(normal, plan=dataclasses.replace(PLAN, normaliser=None))
    with pytest.raises(ValueError, match='normalise: found no normaliser'):
        bare.score(talks(1))


def test_the_command_scores_and_evaluates(rm, folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(jaxrm.loading, 'load', lambda *args, **options: rm)
    rows = [{'prompt': chat(a), 'chosen': 'So it is.', 'rejected': 'No.'} for a in ASKS]
    data = tmp_path / 'pairs.jsonl'
    data.write_text(''.join(json.dumps(row) + '\n' for row in rows))
    cli.score(str(folder), str(data), tmp_path / 'out.jsonl')
    found = [json.loads(line) for line in (tmp_path / 'out.jsonl').read_text().splitlines()]
    chosen = rm.score([chat(a, 'So it is.') for a in ASKS])
    assert_close([row['score_chosen'] for row in found], chosen, 1e-6)
    cli.evaluate(str(folder), (str(data),), tmp_path / 'out', pictures=False)
    results = json.loads((tmp_path / 'out' / 'results.json').read_text())
    right = np.mean([row['score_chosen'] > row['score_rejected'] for row in found])
    assert results['sets']['pairs']['all']['accuracy']['mean'] == pytest.approx(right)
    given(rm, folder, data, monkeypatch)
    monkeypatch.undo()
    with pytest.raises(ValueError, match='expected no base to go with it'):
        jaxrm.load(folder, base=GOLDENS / 'seqcls')
    with pytest.raises(ValueError, match='found no DMoERM'):
        jaxrm.load(GOLDENS / 'seqcls', normalise=True)


def given(rm, folder, data, monkeypatch):
    """The command with --route and --normalise."""
    rows = [{'prompt': chat(a), 'chosen': 'So it is.', 'rejected': 'No.', 'group': CATEGORIES[1]}
            for a in ASKS]  # fmt: skip
    data.write_text(''.join(json.dumps(row) + '\n' for row in rows))
    monkeypatch.setattr(
        jaxrm.loading, 'load',
        lambda *_, **options: dataclasses.replace(rm, normalise=options['normalise']),
    )  # fmt: skip
    out = data.with_name('gold.jsonl')
    monkeypatch.setattr('sys.argv', ['jaxrm', 'score', '--model', str(folder), '--dataset',
                                     str(data), '--output', str(out), '--route', 'gold',
                                     '--normalise'])  # fmt: skip
    cli.main()
    found = [json.loads(line)['score_chosen'] for line in out.read_text().splitlines()]
    raw = rm.inner[1].score([chat(a, 'So it is.') for a in ASKS])
    assert_close(found, (raw + 1) / 0.25, 1e-5)


def broken(folder, tmp_path, change):
    path = shutil.copytree(folder, tmp_path / 'copy')
    change(path)
    return path


def swapped(path):
    order = {'0': CATEGORIES[1], '1': CATEGORIES[0]}
    edit_json(path / 'router' / 'config.json', id2label=order)


def replaced(path):
    """Another base, under its old experts."""
    params, base = load('seqcls').params, load('seqcls')
    head = jax.tree.map(lambda x: x + 1, params['head'])
    mixture_files.export_base(path, 'facts', {**params, 'head': head}, base, overwrite=True)


def turned(path):
    """The experts of the plan in another order."""
    capabilities = {**PLAN.capabilities, 'facts': EXPERTS[::-1]}
    edit_json(path / 'dmoerm.json', capabilities=capabilities)


def other_expert(path):
    """An expert in the place of another one."""
    shutil.rmtree(path / 'facts' / 'experts' / 'tone')
    shutil.copytree(path / 'facts' / 'experts' / 'logic', path / 'facts' / 'experts' / 'tone')


FAULTS = {
    r'experts/logic: is of a base \w{12}, found \w{12} in base': replaced,
    r"mixture.safetensors: is of experts \['logic', 'tone', 'length'\]": turned,
    r"mixture.safetensors: is of 'tone' \w{12}, found \w{12}": other_expert,
    'mixture.safetensors: cannot be read': lambda p: (
        p / 'facts' / 'mixture.safetensors'
    ).write_bytes(b'no such thing'),
    "json: categories: found 'facts', expected a list": lambda p: edit_json(
        p / 'dmoerm.json', categories='facts'
    ),
    "json: capabilities: found .*'logic'.*, expected lists": lambda p: edit_json(
        p / 'dmoerm.json', capabilities={'facts': 'logic', 'small talk': ['tone']}
    ),
    r"json: capabilities: found \['facts'\], expected lists": lambda p: edit_json(
        p / 'dmoerm.json', capabilities=['facts']
    ),
    'json: normaliser: found .*, expected mean and std': lambda p: edit_json(
        p / 'dmoerm.json', normaliser={'facts': '01', 'small talk': [0, 1]}
    ),
    'version: found 2, expected 1': lambda p: edit_json(p / 'dmoerm.json', version=2),
    r"capabilities: found those of \['facts'\]": lambda p: edit_json(
        p / 'dmoerm.json', capabilities={'facts': EXPERTS}
    ),
    'router knows .*small talk.*facts': swapped,
    'tone.* no such folder': lambda p: shutil.rmtree(p / 'facts' / 'experts' / 'tone'),
    'mixture.safetensors: no such file': lambda p: (p / 'facts' / 'mixture.safetensors').unlink(),
    r'mlp.0.weight is \(4, 64\), expected \(4, 96\)': lambda p: shutil.copy(
        p / 'small talk' / 'mixture.safetensors', p / 'facts'
    ),
    'is another kind of adapter': lambda p: edit_json(
        p / 'facts' / 'experts' / 'tone' / 'adapter_config.json', lora_alpha=9
    ),
    'normaliser: facts: found': lambda p: edit_json(
        p / 'dmoerm.json', normaliser={'facts': [0, 0], 'small talk': [0, 1]}
    ),
    'a name that no folder can have': lambda p: edit_json(
        p / 'dmoerm.json', categories=['../x', 'small talk']
    ),
}


@pytest.mark.parametrize('found', FAULTS)
def test_what_is_not_whole_is_refused(folder, tmp_path, found):
    with pytest.raises(ValueError, match=found):
        jaxrm.load(broken(folder, tmp_path, FAULTS[found]))
