"""Short runs of the experiments on wrong labels, from a decoder that has read nothing."""

import gzip
import json

import numpy as np
import pytest
import unread

from experiments import labelling, secrets_real, secrets_recipes, secrets_strength
from jaxrm.datasets import synthetic

SMALL = {'seeds': (0, 1), 'members': 2, 'pairs': 60, 'test_pairs': 24, 'train_batch_size': 24}
SMALL |= {'max_length': 300, 'num_train_epochs': 1}
WORLD = {'categories': ('arithmetic',)}
CELLS = {
    'random-0.2': ('baseline', 'flip + margin', 'soft label by strength', 'drop',
                   'baseline, half the rate'),
    'random-0': ('baseline', 'drop'),
}  # fmt: skip


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp('secrets')
    unread.save(out)
    return out


def flags(folder, name):
    given = {'model_name_or_path': str(folder / 'model'), 'output_dir': folder / 'scores'}
    return SMALL | given | {'results': folder / name}


def strict(path):
    """What any reader of JSON makes of the file."""

    def refuse(name):
        raise AssertionError(f'{path}: {name}')

    return json.loads(path.read_text(), parse_constant=refuse)


def printed(capfd):
    """The rows of Markdown by their first column."""
    rows = [line.strip('| \n').split(' | ') for line in capfd.readouterr().out.splitlines()
            if line.startswith('| ')]  # fmt: skip
    return [(row[0], row[1:]) for row in rows]


def test_what_is_not_known_is_null_and_leaves_a_table_blank():
    turned = np.random.default_rng(0).random(40) < 0.2
    gap = np.random.default_rng(1).normal(size=(3, 40))
    some, none = (secrets_strength.seed_cell(gap, x, gap, x) for x in (turned, turned & False))
    for name in ('auroc', 'scaled', 'spearman'):
        assert isinstance(some[name], float)
        assert none[name] is None
    assert none['members'] == [None] * 3
    assert json.loads(json.dumps(none, allow_nan=False)) == none
    assert secrets_strength.spread([None, None]) == ''
    assert secrets_strength.spread([0.5, None]) == ''
    assert secrets_strength.spread([[None] * 3] * 2) == ''
    assert secrets_strength.spread([0.25, 0.5]).startswith('0.375')
    assert secrets_strength.spread([[0.25, 0.5], [0.5, 0.75]]).startswith('0.500')


@pytest.mark.slow
def test_strength(folder, capfd, monkeypatch):
    c = secrets_strength.Config(
        cells=('random-0.2', 'random-0'),
        folds=2,
        decile_epochs=1,
        **flags(folder, 'strength'),
        **WORLD,
    )
    secrets_strength.main(c)
    rows = printed(capfd)
    found, clean, alone, folds = (
        strict(c.results / f'{name}.json')
        for name in ('random-0.2', 'random-0', 'deciles', 'folds')
    )
    assert [0 < seed['auroc'] < 1 for seed in found['seeds']] == [True] * 2
    assert [seed['auroc'] for seed in clean['seeds']] == [None] * 2
    assert np.shape(alone['strength']) == np.shape(alone['shuffled']) == (10, 2)
    assert np.shape(alone['flipped']) == (2, 2)
    assert len(folds['out of fold']) == 2
    wide = [(name, cells) for name, cells in rows if len(cells) == 20]
    want = np.mean([seed['std by bin'] for seed in found['seeds']], 0)
    assert [name for name, _ in wide] == ['random-0.2', 'random-0']
    assert wide[0][1] == [f'{x:.2f}' for x in want]
    (_, (auroc, one, scaled, *_)), (_, (*blank, _, _, _, _, _)) = rows[:2]
    for said, name in ((auroc, 'auroc'), (scaled, 'scaled'), (one, 'members')):
        assert said.startswith(f'{np.mean([seed[name] for seed in found["seeds"]]):.3f}')
    assert blank == [''] * 3
    assert {path.name for path in c.results.glob('*.png')} == {
        f'{what}-{cell}.png' for what in ('strength', 'agreement') for cell in c.cells
    } | {'deciles.png'}
    monkeypatch.setattr(labelling, 'learned', None)  # nothing is learned again
    secrets_strength.main(c)
    assert printed(capfd) == rows


@pytest.mark.slow
def test_recipes(folder, capfd, monkeypatch):
    monkeypatch.setattr(secrets_recipes, 'CELLS', CELLS)
    c = secrets_recipes.Config(curve_pairs=12, **flags(folder, 'recipes'), **WORLD)
    secrets_recipes.main(c)
    rows = printed(capfd)
    for cell, names in CELLS.items():
        for name in names:
            found = strict(secrets_recipes.path(c, cell, name))
            assert len(found['right']) == 2
            assert np.shape(found['curve']['gold'])[1] == 2
    assert [name for name, _ in rows] == [
        name for names in CELLS.values() for name in (*names, *names)
    ]
    assert (c.results / 'curves-random-0.2.png').exists()
    monkeypatch.setattr(labelling, 'learned', None)
    secrets_recipes.main(c)
    assert printed(capfd) == rows


@pytest.mark.slow
def test_real_pairs(folder, capfd, monkeypatch):
    """Files of real pairs' layout, with pairs of the synthetic world in them."""
    cells = ('convarg-0.2', 'hh_harmless-0')
    made = folder / 'data' / 'preference'
    made.mkdir(parents=True)
    for i, name in enumerate(('convarg.train', 'convarg.test', 'hh_harmless.train',
                              'hh_harmless.test')):  # fmt: skip
        records = synthetic.preferences(150, seed=i, labels='gold', categories=('arithmetic',))
        rows = [
            {'prompt': list(r.messages), 'chosen': r.responses[0], 'rejected': r.responses[1]}
            for r in records
            if r.ranks == (0, 1)
        ]
        with gzip.open(made / f'{name}.jsonl.gz', 'wt') as file:
            file.writelines(json.dumps(row) + '\n' for row in rows)
    monkeypatch.setenv('JAXRM_DATA', str(folder / 'data'))
    monkeypatch.setattr(secrets_real, 'CELLS', cells)
    c = secrets_real.Config(**flags(folder, 'real'))
    secrets_real.main(c)
    rows = printed(capfd)
    noisy, plain = (strict(c.results / f'{cell}.json') for cell in cells)
    assert noisy['right'].keys() - plain['right'].keys() == {'right labels'}
    assert set(plain['right']) == {'baseline', *secrets_real.RECIPES}
    assert all(len(x) == 2 for x in noisy['right'].values())
    assert 'auroc' in noisy['seeds'][0]
    assert 'auroc' not in plain['seeds'][0]
    names = [name for name, _ in rows]
    assert names.count('baseline') == 2
    assert names.count('right labels') == 1
    assert all((c.results / f'strength-{cell}.png').exists() for cell in cells)
    monkeypatch.setattr(labelling, 'base', None)
    monkeypatch.delenv('JAXRM_DATA')
    secrets_real.main(c)
    assert printed(capfd) == rows
