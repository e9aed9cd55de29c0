"""Plans: what a run holds against arrays on devices, the search, the command."""

import dataclasses
import json
import re
import sys

import jax
import jax.numpy as jnp
import pytest

from jaxrm import (
    cli,
    costs,
    lora,
    machines,
    plan,
    plan_confirm,
    plan_models,
    plan_report,
    plan_wanted,
    sharding,
    train,
    tree,
)
from jaxrm.backbones.layers import Config
from jaxrm.plan_asked import Asked

TINY = Config(V=64, D=64, F=128, L=3, Q=4, K=2, H=16)
LLAMA = plan_models.config('llama-3-8b', plan_models.config_json('llama-3-8b'))
V5E = machines.parse('v5e:4x4')
LORA, FULL = costs.Method('adapter', 4), costs.Method('everything', 0)
BIG = plan.Wanted(LLAMA, costs.Method('adapter'), V5E, 1024)


def run_of(method, mesh, c=TINY, tokens=256, machine=V5E):
    return plan.Run(c, method, machine, plan.Mesh(*mesh), plan.shape_of(tokens, 256))


def mine(tree_):
    """Bytes of the first device."""
    return sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(tree_))


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    ('method', 'sizes'),
    [
        (LORA, (2, 2, 2)),
        pytest.param(FULL, (2, 2, 2), marks=SLOW),
        pytest.param(LORA, (1, 8, 1), marks=SLOW),
        pytest.param(FULL, (1, 8, 1), marks=SLOW),
    ],
    ids=['lora', 'full', 'lora-fsdp', 'full-fsdp'],
)
def test_state_is_what_a_device_holds(method, sizes):
    mesh = sharding.make_mesh(data=sizes[0], fsdp=sizes[1], tensor=sizes[2])
    key = jax.random.key(0)
    backbone = tree.unflatten({n: jnp.zeros(s) for n, s in costs.backbone_leaves(TINY).items()})
    head = {'kernel': jnp.zeros((TINY.D, 1))}
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), backbone)
    learning, frozen = {'backbone': backbone, 'head': head}, {}
    if method is LORA:
        learning = {'lora': lora.init(backbone, key, rank=4), 'head': head}
        frozen = {'backbone': half}
    state = train.start(learning, train.adamw(1e-4), mesh)
    held = plan._state(TINY, method, plan.Mesh(*sizes))
    assert held.weights + held.adapters == mine(state.trainable) + mine(
        sharding.place(frozen, mesh)
    )
    counters = 2 * 4  # the step's own, and the optimiser's
    assert held.moments == mine(state.opt) + mine(state.step) - counters
    assert held.gradients == mine(state.trainable)


def test_a_step_sends_the_weights_twice_and_nothing_that_is_frozen():
    """By hand: 15 / 16 of 13.96 GB forward and again backward; adapters' gradients alone."""
    found = {(s.what, s.kind): s.bytes for s in plan.estimate(run_of(LORA, (1, 16, 1), LLAMA)).sent}
    kernels = 32 * (2 * 4096 * 4096 + 2 * 4096 * 1024 + 3 * 4096 * 14336)
    assert found['weights', 'all-gather'] == 2 * 2 * kernels * 15 // 16
    low = 32 * 4 * (2 * (4096 + 4096) + 2 * (4096 + 1024) + 3 * (4096 + 14336))
    assert found['gradients', 'all-reduce'] == 2 * 2 * low * 15 // 16
    assert ('gradients', 'reduce-scatter') not in found
    assert found['embeddings', 'all-to-all'] == 2 * 256 * 4096 * 15 // 16
    everything = plan.estimate(run_of(FULL, (1, 16, 1), LLAMA)).sent
    scattered = [s.bytes for s in everything if (s.what, s.kind) == ('gradients', 'reduce-scatter')]
    assert scattered == [2 * kernels * 15 // 16]
    assert plan.estimate(run_of(LORA, (1, 1, 1), LLAMA)).sent == ()


def test_seconds_are_flops_bytes_and_links():
    found = plan.estimate(run_of(LORA, (1, 16, 1), LLAMA, tokens=4096))
    load = costs.of_shape(found.run.shape)
    flops = costs.step(LLAMA, load, LORA).total
    assert found.flops == 16 * flops
    assert found.seconds['compute'] == pytest.approx(flops / 197e12)
    moved = costs.moved(LLAMA, load, LORA, found.held['gradients'])
    assert found.seconds['memory'] == pytest.approx(sum(moved) / 819e9)
    # a corner of 4 x 4 chips without a way around has two links of 50 GB/s
    assert found.seconds['network'] == pytest.approx(sum(s.bytes for s in found.sent) / 100e9)
    assert found.bound == max(found.seconds.values()) == found.seconds[found.limit]


def test_the_best_run_fits_and_is_the_fastest_that_does():
    best = plan.best(BIG, 65536)
    assert best.fits
    assert best.run.tokens == 65536
    for remat in plan.REMATS:
        for fsdp in (1, 4, 8, 16):
            wanted = dataclasses.replace(BIG, remat=remat, fsdp=fsdp)
            other = plan.best(wanted, 65536)
            assert not other.fits or (other.run.mesh.tensor, other.bound) >= (1, best.bound)


def test_the_largest_run_is_the_last_that_fits():
    most = plan.largest(BIG)
    assert most is not None
    assert most.fits
    more = dataclasses.replace(
        most.run, shape=plan.shape_of(most.run.shape.tokens + plan.BLOCK, BIG.longest)
    )
    assert not plan.estimate(more).fits
    assert not plan.best(BIG, most.run.tokens + plan.BLOCK * 16).fits
    alone = dataclasses.replace(BIG, method=FULL, machine=machines.parse('v5e:1x1'))
    assert plan.largest(alone) is None
    assert not plan.best(alone, 1024).fits


def test_a_pack_holds_the_longest_row():
    wide = dataclasses.replace(BIG, machine=machines.parse('v5e:16x16'))
    few = plan.best(wide, 32768).run
    assert few.mesh.shards <= 32  # of 1024 tokens each
    assert few.shape.tokens >= few.shape.rows[-1][1]
    with pytest.raises(ValueError, match='each of 256 data shards holds a row of 1024'):
        plan.best(dataclasses.replace(wide, tensor=1), 32768)
    long = dataclasses.replace(BIG, method=FULL, longest=8192, machine=machines.parse('v6e:2x2'))
    assert plan.largest(long) is None  # the row's activations do not fit


def test_members_share_the_backbone():
    one = plan.estimate(run_of(LORA, (1, 16, 1), LLAMA))
    three = plan.estimate(run_of(dataclasses.replace(LORA, members=3), (1, 16, 1), LLAMA))
    assert three.held['weights'] == one.held['weights']
    for kind in ('adapters', 'moments', 'gradients', 'activations'):
        assert three.held[kind] == 3 * one.held[kind]
    weights = [s.bytes for e in (one, three) for s in e.sent if s.what == 'weights']
    assert weights[0] == weights[1]
    assert three.flops == 3 * one.flops


def test_pack_shapes_hold_pairs_and_fit_kernels():
    for tokens, longest in ((4352, 1152), (128, 100), (8192, 2048)):
        shape = plan.shape_of(tokens, longest)
        assert all(s % plan.BLOCK == 0 for _, s in shape.rows)
        assert shape.rows[-1][1] >= longest
        assert 2 * shape.prompts >= sum(r for r, _ in shape.rows)
        assert sum(r * s for r, s in shape.rows) >= 2.5 * tokens


@pytest.mark.parametrize(
    ('name', 'chips', 'links'),
    [
        ('v5e:4x4', 16, 2), ('v5e:16x16', 256, 4), ('v5e:8x16', 128, 3), ('v5p:2x2x1', 4, 2),
        ('v5p:4x4x4', 64, 6), ('v6e:2x4', 8, 2), ('v5e:1x1', 1, 0),
    ],
)  # fmt: skip
def test_the_chip_with_the_fewest_links(name, chips, links):
    machine = machines.parse(name)
    assert machine.chips == chips
    assert machine.network == links * machine.chip.link


@pytest.mark.parametrize(
    ('name', 'means'),
    [
        ('v6e-16', 'v6e:4x4'), ('v5litepod-16', 'v5e:4x4'), ('v5e-256', 'v5e:16x16'),
        ('v5p-8', 'v5p:2x2x1'), ('v5p-16', 'v5p:2x2x2'), ('V6E-8', 'v6e:2x4'),
    ],
)  # fmt: skip
def test_types_of_clouds(name, means):
    assert machines.parse(name) == machines.parse(means)


@pytest.mark.parametrize(
    'name',
    'v6e-17 v5p-2 h100-8 v5e v5e:3x4 tpu:4x4 h100:9 h100:0 h100:x v5p:4x4'.split(),
)
def test_machines_that_are_not(name):
    with pytest.raises(ValueError, match='machine: found'):
        machines.parse(name)


def test_models_from_a_folder(tmp_path):
    (tmp_path / 'config.json').write_text(json.dumps(plan_models.config_json('qwen2.5-7b')))
    c = plan_models.config(str(tmp_path), plan_models.config_json(str(tmp_path)))
    assert (c.D, c.L, c.biases) == (3584, 28, ('q', 'k', 'v'))
    (tmp_path / 'config.json').write_text('[1]')
    with pytest.raises(ValueError, match='expected an object'):
        plan_models.config_json(str(tmp_path))
    (tmp_path / 'config.json').write_text('{')
    with pytest.raises(ValueError, match='not JSON'):
        plan_models.config_json(str(tmp_path))


def jaxrm(monkeypatch, capsys, *args):
    """(status, out, err) of the command."""
    monkeypatch.setattr(sys, 'argv', ['jaxrm', 'plan', *args])
    status = 0
    try:
        cli.main()
    except SystemExit as stopped:
        status = stopped.code
    return status, *capsys.readouterr()


GOOD = ('--model', 'llama-3-8b', '--machine', 'v5e:4x4', '--fsdp', '16')


def test_json_has_the_numbers_of_the_text(monkeypatch, capsys):
    status, text, _ = jaxrm(monkeypatch, capsys, *GOOD)
    assert status == 0
    status, out, _ = jaxrm(monkeypatch, capsys, *GOOD, '--json')
    assert status == 0
    found = json.loads(out)
    assert '\n'.join(plan_report.lines(found)) == text.strip()
    assert text.startswith('llama-3-8b (7,504,924,672 parameters, adapter of 41,943,040)')
    assert found['total'] == sum(found['bytes'].values())
    assert found['bytes']['logits'] == 0
    for name, n in found['bytes'].items():
        (said,) = re.findall(rf'^  {name} +([\d,.]+) (GB|kB)$', text, re.MULTILINE)
        assert float(said[0].replace(',', '')) == pytest.approx(n / 1e9, abs=5e-4)


@pytest.mark.parametrize(
    ('args', 'says'),
    [
        (('--machine', 'h100', '--compile'), 'expected a TPU'),
        (('--tokens', '1000'), 'tokens: found 1000'),
        (('--method', 'full', '--members', '3'), 'members: found 3'),
        (('--members', '0'), 'members: found 0'),
        (('--method', 'score', '--remat', 'full'), 'remat: found'),
        (('--method', 'score', '--lora-target-modules', 'q_proj'), 'lora_target_modules: found'),
        (('--lora-target-modules', 'nope'), "lora_target_modules: found ['nope']"),
        (('--lora-target-modules', 'q_proj', 'q'), "['q_proj', 'q'], expected some of"),
        (('--lora-r', '0'), 'lora_r: found 0, expected 1 to 4096'),
        (('--lora-r', '100000'), 'lora_r: found 100000, expected 1 to 4096'),
        (('--method', 'full', '--lora-r', '8'), 'lora_r: found 8 with full'),
        (('--method', 'score', '--lora-r', '8'), 'lora_r: found 8 with score'),
        (('--tensor', '3'), 'tensor: found 3, expected one of [1, 2, 4, 8, 16]'),
        (('--fsdp', '3'), 'fsdp: found 3, expected one of [1, 2, 4, 8, 16]'),
        (('--fsdp', '-1'), 'fsdp: found -1'),
        (('--fsdp', '0'), 'fsdp: found 0'),
        (('--fsdp', '8', '--tensor', '4'), 'tensor: found 4, expected one of [1, 2]'),
        (('--tensor', '16', '--fsdp', '1'), 'found no mesh to use with fsdp 1, tensor 16: key'),
        (('--model', 'nope'), 'model: found'),
        (('--max-length', '0'), 'max_length: found 0'),
        (('--max-length', '100000'), 'max_length: found 100000, expected 1 to 8192'),
        (('--tokens', '1024'), 'a multiple of 256 from 2048 on'),
        (('--machine', 'v6e-17'), 'machine: found'),
        (('--method', 'qlora'), "--method: found 'qlora', expected one of full, lora, score"),
        (('--remat', 'all'), "--remat: found 'all', expected one of dots, full, mlp, none"),
        (('--tokens', 'abc'), "--tokens: found 'abc', expected INT"),
        (('--tokns', '5'), 'perhaps --tokens'),
    ],
    ids=lambda x: '-'.join(x).replace('--', '') if isinstance(x, tuple) else '',
)
def test_wrong_input_ends_with_status_2_and_one_line(monkeypatch, capsys, args, says):
    good = [x for i in (0, 2) if GOOD[i] not in args for x in GOOD[i : i + 2]]
    status, out, err = jaxrm(monkeypatch, capsys, *good, *args)
    assert (status, out, err.count('\n')) == (2, '', 1)
    assert says in err


def test_nothing_to_compile_with(monkeypatch):
    monkeypatch.setattr(plan_confirm.importlib.util, 'find_spec', lambda name: None)
    with pytest.raises(ValueError, match='libtpu'):
        plan_confirm.check(V5E)


def test_what_the_compiler_says_is_compared():
    wanted, _ = plan_wanted.read(Asked('llama-3-8b', 'v5e:4x4', fsdp=16, remat='full'))
    found, _ = plan_wanted.made(Asked('llama-3-8b', 'v5e:4x4'), wanted)
    held = found['bytes']
    made = {
        'fits': True, 'seconds': 1.0, 'jax': '0', 'libtpu': '0', 'sent': {'all-gather': 5, 'x': 3},
        'arguments': 2 * (held['weights'] + held['adapters'] + held['moments']),
        'temporary': 3 * (held['gradients'] + held['activations'] + held['workspace']),
        'sent_stream': 0,
    }  # fmt: skip
    ratio = plan_report.compiled(found, made)['compiled']['measured_over_planned']
    assert (ratio['arguments'], ratio['temporary']) == (2, 3)
    assert ratio['sent'] == 8 / found['sent_total']
    refused = {'fits': False, 'why': 'too large', 'jax': '0', 'libtpu': '0'}
    lines = list(plan_report.lines(plan_report.compiled(found, refused)))
    assert 'refuses' in lines[-1]
    assert 'too large' in lines[-1]
