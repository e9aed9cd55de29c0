"""The benchmark harness: what it counts, and how it takes turns."""

import dataclasses
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from experiments import bench, bench_cells, bench_trl
from jaxrm import costs, packing

ROOT = Path(__file__).resolve().parent.parent


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
    found = {
        'a': {'seconds': [1.0, 1.0], 'records': 2, 'done_flops': 30},
        'b': {'seconds': [3.0, 3.0], 'records': 1, 'done_flops': 60},
        'c': {'failed': 'no room'},
    }
    ratio = bench_cells.faster(found, 'a', 'b')  # 2 in 1 s, 1 in 3 s
    assert (ratio['wall'], ratio['flops'], ratio['of_flops']) == (6, 4, 1.5)
    with pytest.raises(ValueError, match='c: no room'):
        bench_cells.faster(found, 'a', 'c')


def test_rates_are_of_the_median():
    p = bench_cells.Program(None, None, needed=60.0, naive=180.0, done=90.0, records=4, tokens=10)
    found = bench_cells.about(p, [2.0, 3.0, 9.0], ceiling=100.0, peak=200.0)
    assert (found['median'], found['records_per_s']) == (3, pytest.approx(4 / 3))
    rates = {'fol': 0.2, 'fol_done': 0.3, 'fol_effective': 0.6, 'mfu': 0.1}
    assert {name: found[name] for name in rates} == pytest.approx(rates)


def test_what_fails_does_not_take_the_rest_with_it():
    found, failed = bench.kept({'a': lambda: 1, 'b': lambda: {}['x'], 'c': lambda: 3})
    assert found == {'a': 1, 'c': 3}
    assert failed == {'b': {'failed': "KeyError: 'x'"}}


def test_steps_one_by_one_are_as_many_as_members():
    seen = []

    def made(state, frozen):
        seen.append((state, frozen))
        return state + 1, {'loss': state}

    at = [0]
    assert bench_cells.repeated(at, 5, 'base')(made)() == {'loss': 4}
    assert seen == [(i, 'base') for i in range(5)]
    assert at == [5]


@pytest.fixture(scope='module')
def drawn():
    config = bench.Config(V=32, D=16, F=32, L=2, Q=2, K=1, H=8)
    return bench_cells.setup(config, jnp.float32)


@pytest.mark.parametrize(
    ('members', 'how', 'calls'),
    [(1, None, 1), (3, None, 3), (3, 'scan', 1)],
    ids=['alone', 'one by one', 'at once'],
)
def test_a_program_needs_the_flops_of_its_real_tokens(drawn, members, how, calls):
    """By hand: full rows, of the lower layer everything, of the top one k, v and what is read."""
    rows, length, D, F, H, r = 2, 16, 16, 32, 8, 16
    b = bench_cells.even(drawn, rows, length, gathers=False)
    method = dataclasses.replace(bench_cells.LORA, members=members, remat='dots')
    p = bench_cells.make(drawn, bench_cells.Job(b, method, how=how))
    sizes = {'q': (D, 2 * H), 'k': (D, H), 'v': (D, H), 'o': (2 * H, D),
             'gate': (D, F), 'up': (D, F), 'down': (F, D)}  # fmt: skip
    N, reads = rows * length, 2 * rows
    want = 0
    for name, (i, o) in sizes.items():
        through = N + (N if name in 'kv' else reads)
        want += through * (4 * i * o + 6 * r * (i + o))  # frozen: twice; learning: three times
    seen = rows * length * (length + 1) // 2
    gate = length // 2  # the prompt's last token sees as many
    want += 2 * 2 * H * (7 * seen + 6 * rows * (length + gate)) + 6 * D * rows
    assert p.needed == members * want
    # Of full rows that share nothing, but for what padding would see.
    assert p.needed < p.naive < 1.01 * p.needed
    assert p.done > p.needed  # attention is computed again
    assert (p.records, p.tokens) == (members * rows / 2, members * N)
    seen = []
    p.call(lambda state, *rest: (state, seen.append(rest)))()
    assert len(seen) == calls


def test_what_is_drawn_fused_is_as_wide_as_what_is_drawn_apart():
    c = bench.Config(V=64, D=64, F=128, L=3, Q=4, K=2, H=16)
    made = bench_cells.setup(c, jnp.float32).params['backbone']
    for layer in ('layers', 'top'):
        for name, x in made[layer].items():
            if 'kernel' in x:
                wide = 128 if name == 'down' else 64
                assert np.std(x['kernel']) == pytest.approx(wide**-0.5, rel=0.1), name
    assert {'qkv', 'gate_up'} <= set(made['layers'])
    assert len({x.tobytes() for x in np.asarray(made['layers']['o']['kernel'])}) == 2


def test_rows_of_pairs_are_the_whole_texts():
    t = lengths(3)
    t = t._replace(rank=np.array([1, 0, 0, 1, 0, 1], np.int32))
    for i, (chosen, rejected) in enumerate(bench.rows(t)):
        ids = t.ids[t.start[i] : t.start[i + 1]].tolist()
        cut, end = t.prompt[i], t.prompt[i] + t.length[2 * i]
        sides = ids[:end], ids[:cut] + ids[end:]
        assert [chosen, rejected] == list(sides[::-1] if i == 0 else sides)
    assert packing.row_lengths(t).sum() == sum(len(row) for row in itertools.chain(*bench.rows(t)))


def test_sides_that_score_differently_are_refused():
    same = {'score': {'scores': [1.0, 2.0]}, 'padded_16': {'scores': [1.0, 2.00001]}}
    bench_trl.check('scoring', same)
    bench_trl.check('training', {'train': {}, 'trl': {}})
    with pytest.raises(ValueError, match=r'padded_16 are up to 1\.00e-02'):
        bench_trl.check('scoring', same | {'padded_16': {'scores': [1.0, 2.01]}})


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
