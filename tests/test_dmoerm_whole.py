"""DMoERM in small, in ways that take long: a frozen head, an ensemble, the paper's points."""

import dataclasses
import json
import shutil
from pathlib import Path

import dmoerm_tiny
import jax
import numpy as np
import pytest
from dmoerm_tiny import PHASES, POINTS, D, flags

import jaxrm
from experiments import (
    devices,
    dmoerm_base,
    dmoerm_experts,
    dmoerm_mixture,
    dmoerm_phases,
    dmoerm_router,
    ensemble,
)
from jaxrm import judge, mixture_files, sharding
from jaxrm.datasets import synthetic

pytestmark = pytest.mark.slow


@pytest.fixture(scope='module', autouse=True)
def one_device():
    with pytest.MonkeyPatch.context() as patch:
        mesh = sharding.make_mesh(devices=jax.devices()[:1])
        patch.setattr(devices, 'mesh', lambda c: mesh)
        yield


@pytest.fixture(scope='module')
def decoder(tmp_path_factory):
    return dmoerm_tiny.decoder(tmp_path_factory.mktemp('decoder'))


@pytest.fixture(scope='module')
def based(decoder, tmp_path_factory):
    """The flags of the phases, of which the first two have run."""
    configs = flags(decoder, tmp_path_factory.mktemp('phases'))
    for phase, c in zip(PHASES[:2], configs[:2], strict=True):
        phase.main(c)
    return configs


def test_a_head_may_stay_a_copy_of_the_bases(based, tmp_path):
    c = based[2]
    shutil.copytree(c.output_dir, tmp_path / 'copy')
    dmoerm_experts.main(dataclasses.replace(c, output_dir=tmp_path / 'copy', freeze_head=True))
    for name in POINTS:
        base = mixture_files.load_base(tmp_path / 'copy', name)
        found, _ = mixture_files.load_experts(tmp_path / 'copy', name, base)
        for e in range(2):
            np.testing.assert_array_equal(found['head']['kernel'][e], base.head['kernel'])
        assert np.any(found['lora']['top']['q']['b'])


def test_an_ensemble(decoder, tmp_path):
    c = ensemble.Config(
        output_dir=tmp_path, model_name_or_path=decoder, pairs=60, test_pairs=30, members=3,
        num_train_epochs=1, max_length=400,
    )  # fmt: skip
    ensemble.main(c)
    said = json.loads((tmp_path / 'result.json').read_text())
    assert set(said['accuracy']) == {
        'member 0', 'mean', 'WCO', 'WCO, centred', 'UWO', 'UWO, centred'
    }  # fmt: skip
    of = dmoerm_phases.load(c, c.categories)
    models = [jaxrm.load(tmp_path / str(e) / 'model') for e in range(3)]
    score_EB = [np.concatenate(rm.score_records(of.test)) for rm in models]
    assert np.ptp(score_EB, axis=0).max() > 1e-3
    right = {
        'member 0': score_EB[0], 'mean': np.mean(score_EB, 0), 'WCO': np.min(score_EB, 0),
        'UWO': np.mean(score_EB, 0) - 0.5 * np.var(score_EB, 0),
    }  # fmt: skip
    for name, x in right.items():
        accuracy = np.mean(x[0::2] > x[1::2])
        assert said['accuracy'][name][0] == pytest.approx(accuracy, abs=1e-6)


def test_the_papers_five_categories_and_27_points(decoder, tmp_path):
    """The preset from end to end: the world's categories under the paper's names."""
    path = Path(dmoerm_phases.__file__).with_name('points_dmoerm.json')
    points = json.loads(path.read_text())
    assert [len(x) for x in points.values()] == [6, 5, 5, 6, 5]
    name_of = dict(zip(synthetic.CATEGORIES, points, strict=True))
    rows, labels = [], []
    for split, n in (('train', 100), ('test', 30)):
        records = [r._replace(group=name_of[r.group])
                   for r in synthetic.preferences(n, seed=1, split=split)]  # fmt: skip
        judge.write(tmp_path / f'{split}.jsonl', records)
        rows.append(records)
    for record in rows[0]:
        labels += [record._replace(group=f'{record.group}/{p}', id=f'{record.id} {p}')
                   for p in points[record.group]]  # fmt: skip
    judge.write(tmp_path / 'labels.jsonl', labels)
    same = {
        'output_dir': tmp_path / 'dmoerm', 'dataset_train': str(tmp_path / 'train.jsonl'),
        'dataset_test': str(tmp_path / 'test.jsonl'), 'max_length': 400,
    }  # fmt: skip
    start = {**same, 'model_name_or_path': decoder, 'num_train_epochs': 1}
    dmoerm_router.main(dmoerm_router.Config(**start, capabilities=path))
    dmoerm_base.main(dmoerm_base.Config(**start))
    dmoerm_experts.main(dmoerm_experts.Config(**same, lora_r=2, labels=tmp_path / 'labels.jsonl'))
    dmoerm_mixture.main(dmoerm_mixture.Config(**same, max_steps=10, train_batch_size=16))
    found = jaxrm.load(tmp_path / 'dmoerm')
    assert len([p for of in found.plan.capabilities.values() for p in of]) == 27
    assert [one.params['head']['hidden']['kernel'].shape[0] for one in found.inner] == [
        D * len(x) for x in points.values()
    ]
    assert len(found.score_records(rows[1])) == 30
