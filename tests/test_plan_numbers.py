"""Plans beside numbers from elsewhere: data sheets, the TPU's compiler, sums by hand."""

import dataclasses
import json
from pathlib import Path

import pytest

from jaxrm import costs, machines, packing, plan, plan_models, plan_wanted
from jaxrm.backbones.layers import Config

ROOT = Path(__file__).resolve().parent.parent
TINY = Config(V=64, D=64, F=128, L=3, Q=4, K=2, H=16)
LORA = costs.Method('adapter', 4, remat='none')

# TFLOP/s in bfloat16 (dense), GB, GB/s, and GB/s between chips, both ways together.
# cloud.google.com/tpu/docs: v5e, v5p, v6e; NVIDIA's data sheets of H100 SXM, H200 SXM and A100
# 80GB SXM (with sparsity twice these), and its white paper on Ada; PCIe 4.0 x16 has 64 GB/s.
SHEETS = {
    'v5e': (197, 16, 819, 400),
    'v5p': (459, 95, 2765, 1200),
    'v6e': (918, 32, 1640, 800),
    'h100': (1979 / 2, 80, 3350, 900),
    'h200': (1979 / 2, 141, 4800, 900),
    'a100-80gb': (624 / 2, 80, 2039, 600),
    'rtx-4090': (330.3 / 2, 24, 1008, 64),
}


def test_every_machine_is_on_a_sheet():
    assert set(SHEETS) == set(machines.CHIPS)


@pytest.mark.parametrize('name', SHEETS)
def test_chips_are_those_of_the_data_sheets(name):
    chip = machines.CHIPS[name]
    peak, memory, bandwidth, between = SHEETS[name]
    assert chip.peak == pytest.approx(peak * 1e12, rel=0.002)
    assert chip.bandwidth == pytest.approx(bandwidth * 1e9, rel=0.002)
    ports = 2 * chip.axes or 1
    assert 2 * ports * chip.link == between * 1e9
    share = 1 if chip.axes else machines.RESERVED
    assert 0.97 * share * memory * 2**30 < chip.memory < 1.01 * share * memory * 2**30


COMPILED = sorted((ROOT / 'experiments' / 'results' / 'bench_tpu').glob('*.json'))


def run_of(found):
    """What a result of experiments.bench_tpu_compile is of."""
    c = plan_models.config(found['model'], plan_models.config_json(found['model']))
    learns = plan_wanted.LEARNS[found['method']]
    rank = plan_wanted.RANK if learns == 'adapter' else 0
    method = costs.Method(learns, rank, remat=found['remat'])
    pack = found['pack']
    rows = tuple((r, s) for r, s in pack['rows'])
    shape = packing.Shape(pack['tokens'], rows, pack['prompts'], pack['candidates'])
    machine = machines.parse(found['machine'])
    return plan.Run(c, method, machine, plan.Mesh(**found['mesh']), shape)


@pytest.mark.parametrize('path', COMPILED, ids=lambda path: path.stem)
def test_plans_are_what_the_compiler_makes(path):
    """State to the byte but for the batch; what is sent but for the compiler's own detours."""
    found = json.loads(path.read_text(encoding='utf-8'))
    made, planned = found['compiled'], plan.estimate(run_of(found))
    held = planned.held
    assert made['fits']
    assert planned.total < planned.run.machine.chip.memory
    state = held['weights'] + held['adapters'] + held['moments']
    assert 1 <= made['arguments'] / state < 1.001
    temporary = held['gradients'] + held['activations'] + held['workspace']
    least = 0.45 if found['method'] == 'score' else 0.85
    assert least * temporary < made['temporary'] < 1.1 * temporary
    sent = sum(one.bytes for one in planned.sent)
    assert 0.95 < sum(made['sent'].values()) / sent < 1.4


def sent(method, sizes, what, kind):
    shape = packing.Shape(256, ((2, 128), (1, 256)), 2, 2)
    run = plan.Run(TINY, method, machines.parse('v5e:2x4'), plan.Mesh(*sizes), shape)
    (found,) = [s.bytes for s in plan.sent(run) if (s.what, s.kind) == (what, kind)]
    return found


@pytest.mark.parametrize(
    ('learns', 'remat', 'times'),
    [('nothing', 'none', 2), ('adapter', 'none', 4), ('adapter', 'full', 6)],
)
def test_heads_that_are_shared_out_add_up_twice_a_layer_and_pass(learns, remat, times):
    """By hand: after o and after down, of two layers; both of two chips send the whole once."""
    method = costs.Method(learns, 4 * (learns == 'adapter'), remat=remat)
    stream = 256 * 64 * 2
    assert sent(method, (1, 1, 2), 'activations', 'all-reduce') == 2 * times * stream


def test_gradients_of_what_copies_hold():
    """By hand: all 42 factors of rank 4 of an adapter, of 8 chips; 7 kernels of 3 layers, of 2."""
    factors = 3 * 4 * (2 * (64 + 64) + 2 * (64 + 32) + 3 * (64 + 128))
    assert sent(LORA, (8, 1, 1), 'gradients', 'all-reduce') == 2 * 2 * factors * 7 // 8
    kernels = 3 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 128)
    everything = costs.Method('everything', 0, remat='none')
    assert sent(everything, (2, 4, 1), 'gradients', 'all-reduce') == 2 * 2 * (kernels // 4) // 2


@pytest.mark.parametrize(
    ('learns', 'remat', 'passes'),
    [
        ('nothing', 'none', 1),  # forward
        ('adapter', 'none', 2),  # and what comes back
        ('adapter', 'full', 3),  # forward once more
        ('everything', 'none', 3),  # gradients of weights
        ('everything', 'full', 4),
    ],
)
def test_bytes_that_are_moved(learns, remat, passes):
    """By hand: kernels once a pass; what linears read (176 + 128) and write (128 + 64 + 384)."""
    load = costs.Load(10, ((1, 10),), 2, 20, 1)
    method = costs.Method(learns, 4 * (learns == 'adapter'), remat=remat)
    moved = costs.moved(TINY, load, method, learning=1000)
    kernels = 3 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 128)
    assert moved.weights == 2 * passes * kernels
    one = (64 + 64 + 64 + 128) + (64 + 2 * 32) + 64 + 2 * 128 + 64
    assert moved.activations == 2 * passes * 3 * 10 * one
    # the gradient is read; weights and two moments are read and written
    assert moved.optimiser == 7 * 1000


def test_a_plan_leaves_what_remat_leaves():
    """One share of the memory, for what is planned and for what is chosen at the start."""
    c = plan_models.config('llama-3-8b', plan_models.config_json('llama-3-8b'))
    wanted = plan.Wanted(c, costs.Method('adapter'), machines.parse('h100'), 1024)
    most = plan.largest(wanted)
    memory = wanted.machine.chip.memory
    assert 0.94 * memory < most.total <= plan.SHARE * memory
    full = dataclasses.replace(most.run.machine.chip, memory=most.total)
    machine = dataclasses.replace(most.run.machine, chip=full)
    assert not plan.estimate(dataclasses.replace(most.run, machine=machine)).fits
