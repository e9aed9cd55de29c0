"""The measures of separation by other routes, and the contrastive experiment in small."""

import dataclasses
import json
import re

import numpy as np
import pytest
import unread

from experiments import secrets_contrastive, separation


def clouds(apart, n=60, width=5, seed=0):
    """2n features, those at even places moved along all directions."""
    rng = np.random.default_rng(seed)
    z = rng.normal(size=(2 * n, width)) * np.arange(1, width + 1)
    z[0::2] += apart
    return z.astype(np.float32), np.arange(2 * n) % 2


def slow_silhouette(z, kind):
    out = []
    for i in range(len(z)):
        away = np.array([np.linalg.norm(z[i].astype(float) - x) for x in z])
        same = kind == kind[i]
        a, b = away[same].sum() / (same.sum() - 1), away[~same].mean()
        out.append((b - a) / max(a, b))
    return np.mean(out)


def newton(x, sign, penalty, steps=30):
    """Weights of a logistic regression, the last of them free."""
    w, held = np.zeros(x.shape[1]), np.diag([*[penalty] * (x.shape[1] - 1), 0])
    for _ in range(steps):
        p = 1 / (1 + np.exp(sign * (x @ w)))
        hessian = (x * (p * (1 - p))[:, None]).T @ x + held
        w -= np.linalg.solve(hessian, held @ w - x.T @ (sign * p))
    return w


@pytest.mark.parametrize('apart', [0.0, 1.0, 4.0])
def test_separation_by_other_routes(apart):
    z, kind = clouds(apart)
    assert separation.silhouette(z) == pytest.approx(slow_silhouette(z, kind), abs=1e-6)
    half = len(z) // 2
    x = np.column_stack([(z - z[:half].mean(0)) / z[:half].std(0), np.ones(len(z))])
    want = x[half:] @ newton(x[:half], 1 - 2.0 * kind[:half], 2.0) > 0
    np.testing.assert_array_equal(separation.probe(z, penalty=2.0), want == (kind[half:] == 0))
    _, axes = np.linalg.eigh(np.cov(z.T))
    want = (z - z.mean(0)) @ axes[:, :-3:-1]
    np.testing.assert_allclose(np.abs(separation.plane(z)), np.abs(want), atol=1e-3)


def test_a_crossed_interval_sees_seeds_and_pairs():
    rng = np.random.default_rng(0)
    of_seeds = np.repeat(rng.normal(size=(40, 1)), 50, axis=1)
    of_pairs = np.repeat(rng.normal(size=(1, 60)), 3, axis=0)
    for x, count, size in ((of_seeds, 40, of_seeds[:, 0].std()), (of_pairs, 60, of_pairs[0].std())):
        found = separation.crossed(x)
        assert found.mean == pytest.approx(x.mean())
        assert (found.high - found.low) / 2 == pytest.approx(1.96 * size / count**0.5, rel=0.1)
    assert separation.points(np.full((3, 4), -0.05)) == '-5.0 [-5.0, -5.0]'
    text = [separation.digits(np.array([True, False])), '11']
    np.testing.assert_array_equal(separation.of_digits(text), [[1, 0], [1, 1]])


@pytest.fixture(scope='module')
def config(tmp_path_factory):
    """Flags of a short run from a decoder that has read nothing."""
    folder = tmp_path_factory.mktemp('contrastive')
    model = unread.save(folder, layers=2)
    return secrets_contrastive.Config(
        model_name_or_path=model, results=folder / 'results', seeds=(3, 4),
        cells=('random-0.2',), pairs=48, test_pairs=24, train_batch_size=16, num_train_epochs=1,
        max_length=300, categories=('arithmetic',), data=2, fsdp=4,
    )  # fmt: skip


@pytest.mark.slow
def test_cells_are_learned_once_and_tables_come_from_them(config, capfd, monkeypatch):
    w = secrets_contrastive.world(config)
    assert all((of.prompt == 0).all() for of in w.learn)
    noisy = [of.tokens for of in secrets_contrastive.batches(config, w, 'random-0.2')]
    turned = [of.rank.reshape(-1, 2)[:, 0] for of in noisy]
    assert not np.array_equal(noisy[0].ids, noisy[1].ids)
    assert not np.array_equal(*turned)
    methods = ('baseline', 'two views', 'SimCSE', 'SwAV-diff')
    some = {method: secrets_contrastive.METHODS[method] for method in methods}
    monkeypatch.setattr(secrets_contrastive, 'METHODS', some)
    secrets_contrastive.main(config)
    said = capfd.readouterr().out
    assert len(re.findall(r', random-0.2: [\d.]+ s', said)) == 4
    cells = {
        m: json.loads(secrets_contrastive.path(config, m, 'random-0.2').read_text())
        for m in methods
    }
    for method, cell in cells.items():
        assert [len(x) for x in cell['gold']['right']] == [len(cell['gold']['right'][0])] * 2
        assert cell['gold']['right'][0] != cell['gold']['right'][1]  # two seeds
        assert ('contrastive_loss' in cell['train']) == (method not in ('baseline', 'dropout'))
    assert (config.results / 'features-random-0.2.png').stat().st_size > 10_000
    monkeypatch.setattr(secrets_contrastive, 'learned', None)  # nothing is learned again
    secrets_contrastive.main(config)
    rows = [line for line in capfd.readouterr().out.splitlines() if line.startswith('| ')]
    assert [row.split(' | ')[0] for row in rows] == [f'| {m}' for m in methods]
    other = dataclasses.replace(config, learning_rate=1.0, only_table=True)
    with pytest.raises(ValueError, match=r"'learning_rate': 0\.002.* not .*: 1\.0"):
        secrets_contrastive.main(other)
