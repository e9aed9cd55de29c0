"""Ridge against dense float64 solutions and scikit-learn; debiasing against scipy, by penalty."""

import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from jaxrm import regress

N, D, J = 600, 12, 5


@pytest.fixture(scope='module')
def rated():
    """Features, ratings with 70 to 90 % missing (two objectives share their rows), held rows."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(N, D)).astype(np.float32)
    y = x @ rng.normal(size=(D, J)) + rng.normal(size=(N, J)) * [0.1, 0.3, 3.0, 1.0, 30.0]
    missing = rng.random((N, J)) > [0.1, 0.3, 0.2, 0.3, 0.2]
    missing[:, 3] = missing[:, 1]
    y[missing] = np.nan
    return x, y, rng.random(N) < 0.25


def chunks(x, *rows):
    return [(at, x[at]) for at in rows or [np.arange(len(x))]]


def dense(x, y, held, alpha):
    """Weights and held-out error of one objective by the normal equations."""
    x, here = x.astype(np.float64), ~np.isnan(y)
    a, b = x[here & ~held], y[here & ~held]
    w = np.linalg.solve(a.T @ a + alpha * np.eye(D), a.T @ b)
    return w, np.mean((x[here & held] @ w - y[here & held]) ** 2)


def test_equals_dense_solution(rated):
    x, y, held = rated
    rows = np.random.default_rng(1).permutation(N)
    fit = regress.ridge(chunks(x, *np.split(rows, [7, 300])), y, held)
    for j in range(J):
        by_alpha = [dense(x, y[:, j], held, a) for a in regress.ALPHAS]
        error = np.array([e for _, e in by_alpha])
        np.testing.assert_allclose(fit.mse_JA[j], error, rtol=1e-9)
        assert fit.alpha_J[j] == regress.ALPHAS[error.argmin()]
        np.testing.assert_allclose(fit.weight_JD[j], by_alpha[error.argmin()][0], rtol=1e-5)
    assert len(set(fit.alpha_J)) > 2  # the objectives do need different penalties


def test_equals_scikit_learn():
    """Seven objectives of four masks, features of float32; `reference/make_ridge_goldens.py`."""
    with np.load(Path(__file__).parent / 'goldens' / 'ridge' / 'values.npz') as file:
        want = dict(file)
    x_ND, y_NJ, alphas = want['x_ND'], want['y_NJ'], tuple(want['alphas'])
    parts = chunks(x_ND, *np.array_split(np.arange(len(x_ND)), 3))
    fit = regress.ridge(parts, y_NJ, want['held_N'], alphas=alphas)
    np.testing.assert_array_equal(fit.alpha_J, want['alpha_J'])
    np.testing.assert_allclose(fit.mse_JA, want['mse_JA'], rtol=1e-9)
    np.testing.assert_allclose(fit.weight_JD, want['weight_JD'], rtol=1e-6, atol=1e-7)
    predicted_NJ = x_ND.astype(np.float64) @ fit.weight_JD.T
    np.testing.assert_allclose(predicted_NJ, want['predicted_NJ'], rtol=0, atol=1e-5)
    assert np.isnan(y_NJ).mean() > 0.8
    assert len(set(fit.alpha_J)) > 3


def test_variance_is_what_the_mean_scores(rated):
    x, y, held = rated
    fit = regress.ridge(chunks(x), y, held)
    mean = np.nanmean(y[~held], axis=0)
    np.testing.assert_allclose(fit.variance_J, np.nanmean((y[held] - mean) ** 2, axis=0))


def test_chunks_do_not_matter(rated, monkeypatch):
    x, y, held = rated
    whole = regress.ridge(chunks(x), y, held)
    monkeypatch.setattr(regress, 'ROWS', 17)
    parts = regress.ridge(chunks(x, *np.array_split(np.arange(N), 9)), y, held)
    np.testing.assert_allclose(parts.mse_JA, whole.mse_JA, rtol=1e-10)


def test_rows_without_a_rating_do_not_count(rated):
    x, y, held = rated
    other = np.where(np.isnan(y[:, :1]), 1e3, x)
    a, b = (regress.ridge(chunks(z), y[:, :1], held) for z in (x, other))
    np.testing.assert_array_equal(a.weight_JD, b.weight_JD)
    np.testing.assert_array_equal(a.mse_JA, b.mse_JA)


def test_one_matrix_for_objectives_rated_together(rated):
    _, y, _ = rated
    assert regress._groups(y) == [[0], [1, 3], [2], [4]]


# Cost


def peak(rows, D=128, size=2000):
    """Peak bytes of a fit to so many rows of D float32, made a chunk at a time."""
    label_NJ = np.random.default_rng(0).normal(size=(rows, 1))
    held_N = np.arange(rows) % 5 == 0

    def streamed():
        for i in range(0, rows, size):
            x_nD = np.random.default_rng(i).normal(size=(size, D)).astype(np.float32)
            yield np.arange(i, i + size), x_nD

    tracemalloc.start()
    try:
        regress.ridge(streamed(), label_NJ, held_N)
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def check_flat(rows):
    """Some bytes a row for the labels, and none of the 512 of its features."""
    assert (peak(rows) - peak(10_000)) / (rows - 10_000) < 32


def test_memory_does_not_grow_with_the_features():
    check_flat(50_000)


@pytest.mark.slow
def test_memory_of_a_million_rows():
    check_flat(1_000_000)


def test_an_objective_or_penalty_more_is_hardly_more_work(monkeypatch):
    """Flops of 19 objectives on five masks and nine penalties, against a fit of each of the 171."""
    rows, D, J, A = 12_000, 32, 19, len(regress.ALPHAS)
    rng = np.random.default_rng(4)
    mask_J = np.arange(J) % 5
    y_NJ = rng.normal(size=(rows, J))
    y_NJ[(rng.random((rows, 5)) < 0.85)[:, mask_J]] = np.nan
    held_N = rng.random(rows) < 0.2
    passed, solved = [], []
    plus, eigh = regress._Gram.plus, np.linalg.eigh

    def counted(self, x_nD, y_nk):
        passed.append(2 * len(x_nD) * D * (D + y_nk.shape[1]))
        return plus(self, x_nD, y_nk)

    def decomposed(xx_DD):
        solved.append(9 * D**3)  # symmetric QR with vectors
        return eigh(xx_DD)

    monkeypatch.setattr(regress._Gram, 'plus', counted)
    monkeypatch.setattr(np.linalg, 'eigh', decomposed)
    x_ND = rng.normal(size=(rows, D)).astype(np.float32)
    regress.ridge(chunks(x_ND), y_NJ, held_N)
    rated_NJ = ~np.isnan(y_NJ)
    each_once = 2 * D * (D * rated_NJ[:, :5].sum() + rated_NJ.sum())
    assert sum(passed) == each_once
    assert len(solved) == 5
    weights_and_errors = 4 * D * D * J * A
    ours = sum(passed) + sum(solved) + weights_and_errors
    kept = int(rated_NJ[~held_N].sum())
    naive = A * (2 * D * (D + 1) * kept + J * D**3 // 3)  # its errors not even counted
    assert naive > 20 * ours


def test_more_columns_than_rows():
    rng = np.random.default_rng(1)
    x, y = rng.normal(size=(20, 40)), rng.normal(size=(20, 1))
    held = np.arange(20) < 5
    fit = regress.ridge(chunks(x), y, held, alphas=(1e-4, 1.0))
    a = x[~held]
    w = a.T @ np.linalg.solve(a @ a.T + fit.alpha_J[0] * np.eye(15), y[~held, 0])
    np.testing.assert_allclose(fit.weight_JD[0], w, rtol=1e-4, atol=1e-6)


def test_recovers_planted_weights_and_penalises_noise():
    rng = np.random.default_rng(2)
    x, w = rng.normal(size=(2000, 100)), rng.normal(size=100)
    y = (x @ w)[:, None] + rng.normal(size=(2000, 3)) * [0.01, 10.0, 100.0]
    fit = regress.ridge(chunks(x), y, np.arange(2000) % 2 == 0)
    cosine = fit.weight_JD @ w / np.linalg.norm(fit.weight_JD, axis=1) / np.linalg.norm(w)
    assert cosine[0] > 0.9999 > 0.99 > cosine[1] > 0.9
    assert fit.alpha_J[0] < fit.alpha_J[1] < fit.alpha_J[2]


def test_first_of_equal_penalties():
    x = np.eye(4)
    fit = regress.ridge(chunks(x), np.zeros((4, 1)), np.arange(4) % 2 == 0, alphas=(0.5, 1.0, 2.0))
    assert fit.alpha_J[0] == 0.5


@pytest.mark.parametrize(
    ('change', 'words'),
    [
        (lambda x, y, h: (x[:-1], y, h), 'row 599 0 times'),
        (lambda x, y, h: (x, y[:-1], h[:-1]), 'to 599, expected as many, of the 599'),
        (lambda x, y, h: (np.where(np.arange(N)[:, None] == 3, np.nan, x), y, h), 'row 3'),
        (lambda x, y, h: (x, np.where(np.arange(N)[:, None] == 4, np.inf, y), h), 'honest.*row 4'),
        (lambda x, y, h: (x, np.where(h[:, None], np.nan, y), h), 'honest.*held-out'),
        (lambda x, y, h: (x, np.where(h[:, None], y, np.nan), h), 'honest.*training'),
        (lambda x, y, h: (x, y, h[:-1]), 'held: found'),
    ],
)
def test_refuses(rated, change, words):
    x, y, held = change(*rated)
    with pytest.raises(ValueError, match=words):
        regress.ridge(chunks(x), y, held, names=['honest', 'b', 'c', 'd', 'e'])


def biased(v=1):
    """Rewards with some, much, no and negative dependence on objective v, and a constant one."""
    rng = np.random.default_rng(3)
    wordy = rng.normal(size=2000).round(1)  # ties
    free = rng.normal(size=(2000, 6))
    dependence = [0.3, 0.0, 5.0, 0.0, -0.5, 0.9]
    reward = free + wordy[:, None] * dependence
    reward[:, v] = wordy
    return np.column_stack([reward, np.full(2000, 0.7)])


def by_hand(reward, j, v, threshold):
    for penalty in regress.PENALTIES:
        if stats.spearmanr(reward[:, j] - penalty * reward[:, v], reward[:, v])[0] <= threshold:
            return penalty
    return 1.0


@pytest.mark.parametrize(('v', 'threshold'), [(1, 0.03), (3, 0.0), (1, 0.2)])
def test_penalties_are_the_first_that_pass(v, threshold):
    reward = biased(v)
    found = regress.penalties(reward, v, threshold=threshold)
    for j in set(range(6)) - {v}:
        assert found[j] == by_hand(reward, j, v, threshold)
    assert found[v] == found[6] == 1.0  # verbosity itself, and a constant
    assert found[4] == 0.0  # anti-correlated already
    assert found[2] == 1.0  # never passes
    assert 0 < found[0] < found[5] <= 1


def test_transform_removes_verbosity():
    reward = biased()
    T = regress.transform(regress.penalties(reward, 1), 1)
    np.testing.assert_array_equal(np.delete(T, 1, 0), np.delete(np.eye(7, dtype='f'), 1, 0))
    assert T[1, 1] == 0
    after = reward @ T
    np.testing.assert_array_equal(after[:, 1], 0)
    for j in (0, 3, 4, 5):
        assert stats.spearmanr(after[:, j], reward[:, 1])[0] <= regress.THRESHOLD == 0.03


@pytest.mark.parametrize('name', ['spearman', 'pearson'])
def test_correlations_equal_scipy(name):
    x, ours, scipys = biased(), getattr(regress, name), getattr(stats, f'{name}r')
    want = [scipys(x[:, j], x[:, 1])[0] for j in range(6)]
    np.testing.assert_allclose(ours(x[:, :6], x[:, 1]), want, rtol=1e-12)
    assert np.isnan(ours(x[:, 6:], x[:, 1])).all()


def test_penalties_by_another_correlation():
    """An outlier in verbosity makes Pearson's see what ranks do not."""
    reward = biased()
    reward[:5, [0, 1]] += 40.0
    found = regress.penalties(reward, 1, correlation=regress.pearson)
    for j in (0, 3, 4, 5):
        rho = [stats.pearsonr(reward[:, j] - p * reward[:, 1], reward[:, 1])[0]
               for p in regress.PENALTIES]  # fmt: skip
        passed = [p for p, r in zip(regress.PENALTIES, rho, strict=True) if r <= 0.03]
        assert found[j] == (passed or [1.0])[0]
    assert (found != regress.penalties(reward, 1)).any()


@pytest.mark.parametrize('rows', [0, 5])
def test_verbosity_without_spread_is_refused(rows):
    with pytest.raises(ValueError, match=f'one value in {rows} rows of objective 1'):
        regress.penalties(np.ones((rows, 3)), 1)


def test_rows_are_not_counted_from_the_end(rated):
    x, y, held = rated
    with pytest.raises(ValueError, match='rows from -600 to -1'):
        regress.ridge([(np.arange(-N, 0), x)], y, held)


def test_published_grid():
    assert len(regress.PENALTIES) == 24
    assert regress.PENALTIES[6:10] == (0.125, 0.15, 0.2, 0.25)
    assert regress.PENALTIES[-1] == 0.95


def test_scale_is_helpsteers():
    scale = regress.Scale(0, 4)
    np.testing.assert_allclose(scale.normalised(np.arange(5)), [0.1, 0.3, 0.5, 0.7, 0.9])
    np.testing.assert_allclose(scale.original([0.65625, 0.359375]), [2.78125, 1.296875])
    np.testing.assert_allclose(regress.Scale(1, 10).original(0.05), 1)


@pytest.mark.parametrize(
    ('low', 'high'),
    [(4, 0), (2, 2), (0, np.inf), (-np.inf, 0), (np.nan, 4), (0, np.nan)],
)
def test_a_scale_has_two_ends(low, high):
    with pytest.raises(ValueError, match=rf'^scale: found {low} to {high}, expected two finite'):
        regress.Scale(low, high)
