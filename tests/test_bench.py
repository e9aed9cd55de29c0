"""The benchmark harness: what it counts and how it takes turns; in small, every cell for GPUs."""

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from experiments import bench, bench_cells, bench_gpu, bench_trl
from jaxrm import costs, packing

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def clock(monkeypatch):
    """Seconds pass only where a call says so."""
    at = [0.0]
    monkeypatch.setattr(bench.time, 'perf_counter', lambda: at[0])
    monkeypatch.setattr(bench.time, 'monotonic', lambda: at[0])
    return at


def calls(clock, order, **seconds):
    def call(name):
        order.append(name)
        clock[0] += seconds[name]
        return jnp.zeros(())

    return {name: (lambda n=name: call(n)) for name in seconds}


def test_calls_take_turns_and_the_first_rounds_do_not_count(clock):
    order = []
    found = bench.alternate(calls(clock, order, a=1.0, b=2.0), 4, warmup=2)
    assert order == ['a', 'b'] * 6
    assert found == {'a': [1.0] * 4, 'b': [2.0] * 4}


def test_rounds_end_with_the_time_but_not_before_the_least(clock):
    found = bench.alternate(calls(clock, [], a=1.0), 100, warmup=2, until=6.5, least=3)
    assert len(found['a']) == 5
    found = bench.alternate(calls(clock, [], a=1.0), 100, warmup=2, until=0, least=3)
    assert len(found['a']) == 3


def test_ratios_are_taken_round_by_round():
    assert bench.ratio([2, 4, 9], [1, 2, 3]) == (2, 2, 2.5)
    assert bench.said((2, 1.25, 2.5)) == '2.00 (1.25 to 2.50)'


def small(**more):
    config = bench.Config(V=50, D=16, F=32, L=2, Q=2, K=1, H=8)
    return bench_cells.Setup(config, {}, jnp.float32, None, None, 8, **more)


def lengths(n, seed=0):
    rng = np.random.default_rng(seed)
    return bench.trees(rng.integers(3, 30, n), rng.integers(1, 20, (n, 2)), vocabulary=50)


def test_a_batch_brings_its_share_of_the_records():
    s, t = small(), lengths(200)
    shared, apart = (bench_cells.packed(s, t, 256, apart=apart) for apart in (False, True))
    for b in (shared, apart):
        assert b.load.tokens == 256 == b.pack.ids_PN.shape[1]
        assert b.records == pytest.approx(b.share * 200)
        assert b.tokens == pytest.approx(b.share * len(t.ids))
        assert b.needed == costs.of_tokens(t)  # what is real is the same
    assert 1.2 < shared.records / apart.records < 2


def test_padded_rows_are_as_long_as_batches_are_in_the_mean():
    s, t = small(), lengths(200)
    b = bench_cells.padded(s, t, 4)
    mean = np.mean([length for _, length in bench.padded(t, 4)])
    ((rows, length),) = b.load.rows
    assert (rows, b.pack.ids_PN.shape) == (8, (8, length))
    assert mean <= length + 1
    assert length < mean + 8
    assert (b.records, b.padded) == (4, True)


@pytest.mark.parametrize('gathers', [False, True], ids=['rows', 'packs'])
def test_even_rows_are_full(gathers):
    b = bench_cells.even(small(), 6, 10, gathers=gathers)
    assert b.load.tokens == b.tokens == 60
    assert b.pack.ids_PN.size == 60
    assert (b.pack.slot is None) != gathers
    assert (b.pack.rank_PBM >= 0).sum() == 6
    assert b.padded != gathers


def test_speed_is_per_record():
    made = {
        'a': bench_cells.Program(None, None, 0, 30, 2, 0),
        'b': bench_cells.Program(None, None, 0, 60, 1, 0),
    }
    found = {'a': {'seconds': [1.0, 1.0]}, 'b': {'seconds': [3.0, 3.0]}}
    ratio = bench_cells.faster(found, made, 'a', 'b')  # 2 in 1 s, 1 in 3 s
    assert (ratio['wall'], ratio['flops'], ratio['of_flops']) == (6, 4, 1.5)


def test_rows_of_pairs_are_the_whole_texts():
    t = lengths(3)
    t = t._replace(rank=np.array([1, 0, 0, 1, 0, 1], np.int32))
    for i, (chosen, rejected) in enumerate(bench_trl.rows(t)):
        ids = t.ids[t.start[i] : t.start[i + 1]].tolist()
        cut, end = t.prompt[i], t.prompt[i] + t.length[2 * i]
        sides = ids[:end], ids[:cut] + ids[end:]
        assert [chosen, rejected] == list(sides[::-1] if i == 0 else sides)
    assert packing.row_lengths(t).sum() == sum(
        len(row) for row in itertools.chain(*bench_trl.rows(t))
    )


def test_sides_that_score_differently_are_refused():
    same = {'score': {'scores': [1.0, 2.0]}, 'padded_16': {'scores': [1.0, 2.00001]}}
    bench_trl.check('scoring', same)
    bench_trl.check('training', {'train': {}, 'trl': {}})
    with pytest.raises(ValueError, match=r'padded_16 are up to 1\.00e-02'):
        bench_trl.check('scoring', same | {'padded_16': {'scores': [1.0, 2.01]}})


def test_what_does_not_fit_into_the_budget_is_skipped(tmp_path, clock):
    run = bench_gpu.Run(False, 1, 20.0, tmp_path, {})
    found = bench_gpu.cell(run, 'lora', 30, lambda run: {'never': 1})
    assert found == {'skipped': '20 s are left, it may take 30'}
    assert bench_gpu.cell(run, 'lora', 10, lambda run: {'a': 1}) == {'a': 1, 'cell_seconds': 0}
    found = bench_gpu.cell(run, 'lora', 10, lambda run: {}['b'])
    assert found['failed'] == "KeyError: 'b'"


def test_nothing_is_timed_of_a_device_that_computes_wrongly(tmp_path, monkeypatch, clock):
    cells = {'ceilings': (0, lambda run: {}), 'probe': (0, lambda run: 1 / 0), 'lora': (0, None)}
    monkeypatch.setattr(bench_gpu, 'CELLS', cells)
    with pytest.raises(SystemExit):
        bench_gpu.main(['--output_dir', str(tmp_path), '--cells', 'lora'])
    found = json.loads((tmp_path / 'gpu.json').read_text())
    assert found['probe']['failed'].startswith('ZeroDivisionError')
    assert 'lora' not in found


def test_distance_is_of_all_leaves():
    want, found = {'a': jnp.array([3.0]), 'b': jnp.array([4.0])}, {'a': jnp.zeros(1)}
    assert bench_gpu.distance(want, found | {'b': jnp.array([4.0])}) == pytest.approx(0.6)
    assert not bench_gpu.distance(want, found | {'b': jnp.array([jnp.nan])}) < 0.05


def test_a_cell_of_the_gpu_benchmark(tmp_path):
    run = bench_gpu.Run(True, 3, float('inf'), tmp_path, {'ceilings': {'matmul_flops_per_s': 1e9}})
    cell = bench_gpu.best_of(run, bench_gpu.BIG)
    shared, apart, ratio = cell['shared'], cell['apart'], cell['shared over apart']
    assert 1.5 < ratio['flops'] < 1.1 * cell['token_ratio'] < 2.1
    assert shared['needed_flops'] < shared['done_flops']
    assert len(shared['seconds']) == len(apart['seconds']) == 3
    assert shared['fol'] == pytest.approx(shared['flops_per_s'] / 1e9)
    said = bench_gpu.line('shared over apart', ratio)
    assert f'of_flops {ratio["of_flops"]:.4g}' in said


def tiny(folder, *cells):
    out = folder / 'out'
    bench_gpu.main(['--tiny', '--rounds', '3', '--output_dir', str(out), '--cells', *cells])
    return json.loads((out / 'gpu.json').read_text())


@pytest.mark.slow
def test_all_cells_of_the_gpu_benchmark(tmp_path):
    found = tiny(tmp_path, *bench_gpu.CELLS)
    assert list(found)[2:] == list(bench_gpu.CELLS)
    assert found['ceilings']['matmul_flops_per_s'] > 0
    assert 0 <= found['probe']['gradients'] < 1e-3
    for name in bench_gpu.CELLS:
        assert not {'failed', 'skipped'} & set(found[name]), found[name]
    limits = found['limit-8b']
    assert limits['none']['bytes_per_token'] > limits['dots']['bytes_per_token'] > 0
    assert limits['none']['ran'] > 0
    assert found['whole-8b']['cut over lm_head']['flops'] > 1.01
    per = found['experts-8b']
    assert per['vmap']['done_flops'] == per['one by one']['done_flops']


@pytest.mark.slow
def test_a_side_takes_turns(tmp_path, data_dir):
    """jaxrm's side of the comparison with TRL, by itself."""
    c = bench_trl.Config(
        output_dir=tmp_path, pairs=60, rows=8, vocabulary=300, hidden_size=32, num_hidden_layers=2
    )
    bench_trl.prepare(c)
    command = [sys.executable, '-m', 'experiments.bench_side', 'score', str(tmp_path)]
    env = os.environ | {'PYTHONPATH': str(ROOT)}
    done = subprocess.run(
        command, input='8\n8\n', env=env, capture_output=True, text=True, check=True
    )
    first, second = map(json.loads, done.stdout.splitlines())
    assert (first['done'], second['done'], len(first['scores'])) == (8, 8, 8)
    assert first['scores'] == second['scores']
