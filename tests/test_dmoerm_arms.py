"""Parts of the DMoERM experiments: who learns from what, what is picked and kept, tables."""

import dataclasses
import functools
import json
from types import SimpleNamespace

import dmoerm_tiny
import jax
import numpy as np
import pytest

from experiments import (
    common,
    devices,
    dmoerm,
    dmoerm_arms,
    dmoerm_cost,
    dmoerm_phases,
    dmoerm_router,
    dmoerm_samples,
    dmoerm_tables,
    dmoerm_world,
)
from jaxrm import judge, mixture_files, sharding
from jaxrm.data import Preference
from jaxrm.datasets import synthetic


@functools.cache
def records():
    return synthetic.preferences(400, seed=0, categories=('facts', 'persona'))


def world(c=None, some=(), **fields):
    """A World with no more than these fields."""
    empty = dict.fromkeys(dmoerm_arms.World._fields)
    return dmoerm_arms.World(**{**empty, 'c': c, 'records': list(some), **fields})


def test_bases_and_mlps_learn_from_60_and_40_of_100_prompts():
    first_n = dmoerm_arms.first(records())
    asked = np.array([repr(r.messages) for r in records()])
    base, rest = set(asked[first_n]), set(asked[~first_n])
    assert not base & rest
    assert 0.53 < len(base) / len(base | rest) < 0.67
    group_n = np.array([['facts', 'persona'].index(r.group) for r in records()])
    seed_n = np.arange(len(asked)) % 2
    w = world(pool=SimpleNamespace(group=group_n), seed_n=seed_n, first_n=first_n)
    want = (seed_n == 1) & (group_n == 0)
    for part, chosen in ((None, want), (True, want & first_n), (False, want & ~first_n)):
        np.testing.assert_array_equal(w.rows(1, 0, part), np.flatnonzero(chosen))


def asked_of(record, pick, monkeypatch, swap=True):
    """The winner by a judge that picks so, of one record, as a whole."""
    c = SimpleNamespace(judge_noise=0, judge_waver=0, judge_position=0, judge_garbage=0)
    monkeypatch.setattr(dmoerm_arms, '_judge', lambda *_: pick)
    return dmoerm_arms.winners(world(c, [record]), [None], swap=swap)[0][None].tolist()


@pytest.mark.parametrize('better', [0, 1])
def test_the_swap_filter_keeps_what_both_orders_say(better, monkeypatch):
    record = Preference('Say', ('good', 'bad') if better == 0 else ('bad', 'good'), ranks=(0, 1))
    knows = lambda q: '1' if q.first == 'good' else '2'  # noqa: E731
    assert asked_of(record, knows, monkeypatch) == [better]
    assert asked_of(record, lambda _: '1', monkeypatch) == [-1]
    assert asked_of(record, lambda _: '2', monkeypatch) == [-1]
    assert asked_of(record, lambda _: 'neither', monkeypatch) == [-1]
    (pair,) = judge.comparisons([record], None)
    assert asked_of(record, lambda _: '1', monkeypatch, swap=False) == [pair.a]


def test_weights_of_other_flags_are_not_taken(tmp_path):
    c = dmoerm_world.Config(output_dir=tmp_path)
    made = []

    def make():
        made.append(1)
        return {'x': np.full(2, float(len(made)))}

    def kept(**flags):
        return dmoerm_arms.kept(world(dataclasses.replace(c, **flags)), 'single', make)['x'][0]

    found = [kept(), kept(), kept(pairs=7), kept(cells=('a-0.0',)), kept(pairs=7)]
    assert found == [1, 1, 2, 1, 2]


def test_gold_is_that_of_the_very_answer(monkeypatch):
    seen = []
    encode = lambda some, _: (seen.extend(some), SimpleNamespace(tokens=None))[1]  # noqa: E731
    monkeypatch.setattr(dmoerm_samples.tokens, 'encode', encode)
    c = SimpleNamespace(categories=('facts', 'persona'), prompts=2, samples=32)
    _, gold_BN, of_B = dmoerm_samples.sampled(world(c), 0.5)
    assert of_B.tolist() == [0, 0, 1, 1]
    answers = [(r.messages, str(x), r.group) for r in seen for x in r.responses]
    assert len(answers) == gold_BN.size
    want = [synthetic.gold(messages, x).reward for messages, x, _ in answers]
    np.testing.assert_array_equal(gold_BN.reshape(-1), want)
    assert len(set(want)) > 10
    assert [g for *_, g in answers[::32]] == ['facts', 'facts', 'persona', 'persona']


def test_tables_of_hand_made_cells(tmp_path, capsys):
    flags = {'categories': ['facts', 'persona'], 'test_pairs': 4}
    rows = {'DMoERM': ['11111110', '11111110'], 'single': ['11110000', '11110010']}
    cells = {
        'full-0.25': {'rows': rows, 'matrix': {'facts': [[[0.9, 0.5], [0.6, 0.45]]] * 2}},
        'judge-0.25': {'halves': '22110000'},
        'conflict-0.25': {
            'categories': ['facts', 'persona'],
            'matrix': {'facts': ['11111111'] * 2, 'persona': ['11111111'] * 2,
                       'facts and persona': ['11001110'] * 2},
        },
    }  # fmt: skip
    for name, cell in cells.items():
        common.write_json(tmp_path / f'{name}.json', {'flags': flags, **cell})
    names = [*cells, 'single-0.25']
    dmoerm_tables.show(tmp_path, names, flags, {'facts': ('logic', 'tone')})
    lines = capsys.readouterr().out.splitlines()

    def line(name):
        (found,) = (x for x in lines if x.startswith(f'| {name} |'))
        return [x.strip() for x in found.strip('|').split('|')][1:]

    assert line('DMoERM')[0].startswith('0.875')
    assert line('DMoERM')[1:3] == ['1.000', '0.750']
    assert line('single')[1:3] == ['1.000', '0.125']
    assert line('single')[3].startswith('+31.2')
    assert line('the judge as a whole')[:3] == ['0.375', '0.750', '0.000']
    assert line('logic') == ['0.900', '0.500']
    assert line('tone') == ['0.600', '0.450']
    assert 'the own expert is best in 2 of 4' in ' '.join(' '.join(lines).split())
    assert line('facts in facts and persona')[:2] == ['1.000', '0.500']
    assert line('persona in facts and persona')[:2] == ['1.000', '0.750']
    with pytest.raises(ValueError, match='is of a run with test_pairs 4, not 5'):
        dmoerm_tables.show(tmp_path, names, {**flags, 'test_pairs': 5}, {})


POINT_FAULTS = {
    '{"facts": "logic"}': r"points.json: 'facts': expected names",
    '{"facts": [["logic"]]}': r"points.json: 'facts': expected names",
    '{"facts": ["logic", "logic"]}': r"points.json: 'facts': found a name twice",
    '["facts"]': r'points.json: found .*, expected an object of groups',
    '{"facts": ': r'points.json: no JSON',
}


@pytest.mark.parametrize('text', POINT_FAULTS)
def test_points_that_are_none(tmp_path, text):
    path = tmp_path / 'points.json'
    path.write_text(text)
    with pytest.raises(ValueError, match=POINT_FAULTS[text]):
        dmoerm_phases.capabilities(path, ())
    path.write_text('{"facts": {"logic": "it follows"}, "chat": ["b", "a"]}')
    want = {'facts': ('logic',), 'chat': ('b', 'a')}
    assert dmoerm_phases.capabilities(path, ()) == want


def test_the_router_is_kept_as_it_was_at_its_best(tmp_path, monkeypatch):
    """Not as it was at last: it gets better, then worse."""
    c, *_ = dmoerm_tiny.flags(dmoerm_tiny.decoder(tmp_path), tmp_path)
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    monkeypatch.setattr(devices, 'mesh', lambda c: mesh)
    values = {2.0: 0.5, 3.0: 0.9, 4.0: 0.1}
    head = lambda params: np.asarray(params['head']['kernel'])  # noqa: E731

    def learned(pace, start_E, lessons, shape, objective, *, mesh, hooks):
        for step, x in enumerate(values):
            now = jax.tree.map(lambda leaf, x=x: np.full(leaf.shape, x, leaf.dtype), start_E)
            for every, hook in hooks:
                assert every == 1
                hook(c.eval_steps * (step + 1), SimpleNamespace(trainable=now), None)
        return now

    monkeypatch.setattr(dmoerm, 'learned', learned)
    monkeypatch.setattr(dmoerm_router, 'right', lambda *_: lambda p: values[head(p).flat[0].item()])
    dmoerm_router.main(c)
    assert set(head({'head': mixture_files.load_router(c.output_dir).head}).flat) == {3.0}


@pytest.mark.slow
def test_every_cell_in_small(tmp_path, monkeypatch):
    """All cells learn and give their tables; best of n makes what another cell did not leave."""
    c = dmoerm_world.Config(
        model_name_or_path=dmoerm_tiny.decoder(tmp_path), output_dir=tmp_path / 'models',
        results=tmp_path / 'results', seeds=(0, 1), members=3, pairs=24, test_pairs=8, lora_r=2,
        train_batch_size=8, max_length=400, prompts=2, samples=16,
    )  # fmt: skip
    cells = ('best of n-0.25', *(x for x in c.cells if x != 'best of n-0.25'))
    dmoerm_world.main(dataclasses.replace(c, cells=cells))
    assert {p.stem for p in c.results.glob('*.json')} == set(c.cells)
    found = json.loads((c.results / 'judge overall-0.25.json').read_text())['rows']
    assert {'judge overall', 'judge overall, scalars', 'single, judge too'} <= set(found)
    assert all(len(text) == 3 * 8 for texts in found.values() for text in texts)


@pytest.mark.slow
def test_costs_in_small(capsys):
    dmoerm_cost.main(dmoerm_cost.Config(
        hidden_size=16, num_hidden_layers=1, experts=2, members=2, lora_r=2, prompts=2, answers=2,
        prompt_length=8, answer_length=4, repeats=1,
    ))  # fmt: skip
    assert '| DMoERM, one by one |' in capsys.readouterr().out
