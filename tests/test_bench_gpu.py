"""The benchmark for GPUs: what it would ask of the device, and in small every cell."""

import dataclasses
import json
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import pytest

from experiments import bench, bench_cells, bench_gpu, bench_gpu_cells
from jaxrm import plan

ROOT = Path(__file__).resolve().parent.parent


class Device:
    def memory_stats(self):
        return {'peak_bytes_in_use': 7}


def test_what_does_not_fit_into_the_budget_is_skipped(tmp_path, clock, monkeypatch):
    monkeypatch.setattr(bench_gpu.jax, 'devices', lambda: [Device()])
    run = bench_gpu_cells.Run(False, 1, 20.0, tmp_path, {})
    found = bench_gpu.cell(run, 30, lambda run: {'never': 1})
    assert found == {'skipped': '20 s are left, it may take 30'}
    assert bench_gpu.cell(run, 10, lambda run: {'a': 1}) == {
        'a': 1, 'peak_bytes_in_use': 7, 'cell_seconds': 0
    }  # fmt: skip
    found = bench_gpu.cell(run, 10, lambda run: {}['b'])
    assert found['failed'] == "KeyError: 'b'"


def test_what_did_not_fit_is_tried_with_less_kept():
    jobs = {name: bench_cells.Job(None, dataclasses.replace(bench_cells.LORA, remat=name))
            for name in ('dots', 'mlp', 'full')}  # fmt: skip
    full = {'failed': 'XlaRuntimeError: RESOURCE_EXHAUSTED: out of memory'}
    found = bench_cells.smaller(jobs, dict.fromkeys(jobs, full))
    assert {name: job.method.remat for name, job in found.items()} == {'dots': 'mlp', 'mlp': 'full'}
    other = {'failed': 'ValueError: no'}
    assert not bench_cells.smaller(jobs, {'dots': other, 'mlp': {'median': 1}, 'full': full})


def flags(folder, *more):
    bench.write(folder / 'gpu.json', {})
    return bench_gpu.arguments(['--output_dir', str(folder), *more])


@pytest.fixture
def at_home(monkeypatch):
    """Nothing of the environment changes."""
    monkeypatch.setattr(bench_gpu.programs, 'reserve', lambda environ: None)
    monkeypatch.setattr(bench_gpu.programs, 'keep', lambda environ: None)


def test_nothing_is_timed_of_a_device_that_computes_wrongly(tmp_path, monkeypatch, at_home):
    cells = {'ceilings': (0, lambda run: {}), 'probe': (0, lambda run: 1 / 0), 'lora-8b': (0, None)}
    monkeypatch.setattr(bench_gpu, 'CELLS', cells)
    c = flags(tmp_path, '--cells', 'lora-8b', '--tiny')
    with pytest.raises(SystemExit, match='1'):
        bench_gpu.on_device(c, float('inf'))
    found = json.loads((tmp_path / 'gpu.json').read_text())
    assert found['probe']['failed'].startswith('ZeroDivisionError')
    assert 'lora-8b' not in found


def test_another_process_goes_on_behind_the_cell_that_ended_one(tmp_path, monkeypatch, at_home):
    def crash(run):
        raise KeyboardInterrupt  # as nothing that a cell may catch

    fine = 0, lambda run: {'fine': 1}
    cells = {'ceilings': fine, 'probe': fine, 'lora-8b': (0, crash), 'score-8b': fine}
    monkeypatch.setattr(bench_gpu, 'CELLS', cells)
    c = flags(tmp_path, '--tiny')
    with pytest.raises(KeyboardInterrupt):
        bench_gpu.on_device(c, float('inf'))
    bench_gpu.on_device(c, float('inf'))
    found = json.loads((tmp_path / 'gpu.json').read_text())
    assert found['lora-8b'] == bench_gpu.ENDED
    assert found['score-8b']['fine'] == 1


def test_without_a_gpu_it_ends_at_once(tmp_path, capsys, at_home):
    with pytest.raises(SystemExit, match='2'):
        bench_gpu.on_device(flags(tmp_path), float('inf'))
    assert capsys.readouterr().out == 'error: found cpu, expected a GPU; --tiny runs anywhere\n'


@pytest.mark.parametrize(
    ('more', 'why'),
    [(['--rounds', '-1'], '--rounds: found -1'), (['--cells', 'nope'], "invalid choice: 'nope'")],
    ids=['rounds', 'cells'],
)
def test_wrong_flags_are_one_line(tmp_path, capsys, more, why):
    with pytest.raises(SystemExit, match='2'):
        flags(tmp_path, *more)
    assert why in capsys.readouterr().err.splitlines()[-1]


def test_a_copy_holds_no_more_than_what_it_copies():
    held = []

    def copy(x):
        held.append(sum(a.nbytes for a in jax.live_arrays() if a.shape == (123, 7)))
        return x + 1

    x = bench_gpu_cells.again(copy, jnp.zeros((123, 7)), 10)
    assert float(x[0, 0]) == 10
    assert max(held) <= 3 * x.nbytes


@pytest.fixture(scope='module')
def jobs():
    """What every cell measures of models of real sizes, as shapes, by name; and what it says."""
    found, told = {}, {}

    class Planned(bench_gpu_cells.Run):
        room = bench_gpu_cells.CARD.memory

        def setup(self, name):
            return bench_cells.Setup(
                bench.MODELS[name], {}, jnp.dtype(jnp.bfloat16), None, None, 128
            )

        def measured(self, s, jobs, rounds=None, *, choose=True):
            for name, job in jobs.items():
                found[f'{at}: {name}'] = s.config, bench_cells.fitted(s.config, job, self.room)
            spent = {'packs': 4.0, 'vmap': 2.0, 'one by one': 8.0}
            return {
                n: {'seconds': [spent.get(n, 3.0)], 'records': 1, 'done_flops': 1} for n in jobs
            }

    run = Planned(False, 1, 0.0, ROOT, {})
    for at, (_, cell) in bench_gpu_cells.CELLS.items():
        if at.startswith(('lora', 'score', 'pairs', 'best', 'experts', 'fused', 'whole')):
            told[at] = cell(run)
    return found, told


def test_every_program_fits_a_card_of_80_gb(jobs):
    jobs, _ = jobs
    bytes_ = {name: bench_cells.planned(*of) for name, of in jobs.items()}
    assert len(bytes_) >= 23
    assert max(bytes_.values()) < plan.SHARE * bench_gpu_cells.CARD.memory
    assert bytes_['experts-8b: vmap'] > bytes_['experts-8b: scan'] > 15e9
    assert bytes_['fused-8b: plain'] - bytes_['fused-8b: fused'] > 14e9  # the base twice
    assert {job.method.remat for _, job in jobs.values()} == {'dots', 'none'}
    scores = [job for _, job in jobs.values() if job.method.remat == 'none']
    assert all(job.method.learns == 'nothing' for job in scores)


def test_what_cells_say_of_times(jobs):
    _, told = jobs
    assert told['lora-8b']['share_of_row_gathers'] == [0.25] * 3
    assert told['experts-8b']['vmap over one by one'] == [0.25] * 3
    assert told['fused-8b']['fused over plain']['wall'] == 1


def test_remat_is_what_there_is_room_for(jobs):
    c, job = jobs[0]['lora-8b: packs']
    at = {p: bench_cells.planned(c, job._replace(method=dataclasses.replace(job.method, remat=p)))
          for p in ('none', 'dots', 'mlp', 'full')}  # fmt: skip
    assert at['none'] > 80e9 > at['dots'] > at['mlp'] > at['full']
    for policy in ('dots', 'mlp'):
        room = int(at[policy] / plan.SHARE) + 1
        assert bench_cells.fitted(c, job, room).method.remat == policy
        assert bench_cells.fitted(c, job, int(0.99 * room)).method.remat != policy


def test_the_rest_of_the_memory_is_tokens():
    memory = [Memory(temp, 20 * 10**9) for temp in (6 * 10**9, 10 * 10**9)]
    found = bench_gpu_cells.line_of(2000, 4000, memory, 100 * 10**9)
    assert (found['bytes_per_token'], found['bytes_at_0']) == (2e6, 22e9)
    assert found['fits'] == (plan.SHARE * 100e9 - 22e9) // 2e6
    assert found['fits_80gb'] == (plan.SHARE * bench_gpu_cells.CARD.memory - 22e9) // 2e6


class Memory(NamedTuple):
    temp_size_in_bytes: int
    argument_size_in_bytes: int


def test_row_gathers_are_what_rows_do_without():
    share = bench_gpu_cells.more({'seconds': [4.0, 2.0, 5.0]}, {'seconds': [3.0, 1.5, 4.0]})
    assert share == pytest.approx([0.25, 0.225, 0.25])


def test_distance_is_of_all_leaves():
    want, found = {'a': jnp.array([3.0]), 'b': jnp.array([4.0])}, {'a': jnp.zeros(1)}
    assert bench_gpu_cells.distance(want, found | {'b': jnp.array([4.0])}) == pytest.approx(0.6)
    assert not bench_gpu_cells.distance(want, found | {'b': jnp.array([jnp.nan])}) < 0.05


def test_a_cell_of_the_gpu_benchmark(tmp_path):
    ceilings = {'matmul_flops_per_s': 1e9}
    run = bench_gpu_cells.Run(True, 3, float('inf'), tmp_path, {'ceilings': ceilings})
    cell = bench_gpu_cells.best_of(run, bench_gpu_cells.BIG)
    shared, apart, ratio = cell['shared'], cell['apart'], cell['shared over apart']
    assert 1.5 < ratio['flops'] < 1.1 * cell['token_ratio'] < 2.1
    assert shared['needed_flops'] < shared['done_flops']
    assert shared['naive_flops'] / shared['records'] == pytest.approx(
        apart['naive_flops'] / apart['records']
    )
    assert shared['fol_effective'] > 1.5 * shared['fol']
    assert (shared['rounds'], shared['asked_rounds'], shared['attention']) == (3, 3, 'xla')
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
    found = tiny(tmp_path, *bench_gpu.CELLS, 'torch')
    assert [name for name in found if name in bench_gpu.CELLS] == list(bench_gpu.CELLS)
    assert found['ceilings']['matmul_flops_per_s'] > 0
    assert 0 <= found['probe']['gradients'] < 1e-3
    for name in bench_gpu.CELLS:
        assert not {'failed', 'skipped'} & set(found[name]), found[name]
        assert not [x for x in found[name].values() if isinstance(x, dict) and 'failed' in x]
    limits = found['limit-8b']
    assert limits['none']['bytes_per_token'] > limits['dots']['bytes_per_token'] > 0
    assert limits['none']['ran'] > 0
    assert limits['dots']['remat'] == found['lora-8b']['packs']['remat'] == 'dots'
    assert found['whole-8b']['cut over lm_head']['flops'] > 1.01
    per = found['experts-8b']
    assert per['vmap']['done_flops'] == per['one by one']['done_flops']
    assert found['torch']
