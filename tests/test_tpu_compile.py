"""Programs for sixteen TPU chips, compiled by the TPU's own compiler without one.

Nothing runs: what is looked at is the optimised program of one chip.
"""

import collections
import functools
import importlib.util
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
# As in tpu_programs.py, which cannot be imported here: it sets up JAX for itself.
N, D, LENGTHS, RANK = 2176, 512, (384, 640), 16
KERNEL = D * 512  # elements of the smallest kernel of a layer
KERNELS = ('splash_mha_fwd_residuals', 'splash_mha_dq_no_residuals', 'splash_mha_dkv_no_residuals')

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec('libtpu') is None,
        reason='libtpu, the compiler for TPUs, is not installed: '
        "./run python -m pip install -c constraints.txt -e '.[tpu]'",
    ),
]


@functools.cache
def compiled(name: str, *sizes: int) -> dict:
    """What `tpu_programs.describe` found; fails with what the compiler said if it did not compile.

    A program that does not fit into a chip's memory does not compile.
    """
    ours = {k: v for k, v in os.environ.items() if not k.startswith(('JAX_', 'XLA_'))}
    command = [sys.executable, str(HERE / 'tpu_programs.py'), name, *map(str, sizes)]
    env = ours | {'PYTHONPATH': str(HERE.parent)}
    result = subprocess.run(command, env=env, capture_output=True, text=True, timeout=900)
    assert result.returncode == 0, result.stderr[-4000:]
    found = json.loads(result.stdout.splitlines()[-1])
    report(name, sizes, found)
    return found


def report(name, sizes, found) -> None:
    """For `pytest -s`: bytes are those of one chip, of a loop's body once."""
    mega = {k: f'{found[k] / 1e6:.1f}' for k in ('argument_bytes', 'temp_bytes')}
    count, size = collections.Counter(), collections.Counter()
    for c in found['collectives']:
        count[c['kind']] += 1
        size[c['kind']] += c['bytes']
    moved = ', '.join(f'{count[k]} {k} {size[k] / 1e6:.2f} MB' for k in sorted(count))
    print(f'\n{name} {sizes}: compiled in {found["seconds"]:.0f} s; MB {mega}; {moved}')


def along(dims, *lengths) -> bool:
    """Whether a dimension is one of the lengths, or several of them laid end to end."""
    return any(d and d % n == 0 for d in dims for n in lengths)


def touching(found, *lengths) -> list[dict]:
    return [c for c in found['collectives'] if any(along(s, *lengths) for s in c['shapes'])]


ADAPTER = [('training', 1, 16, 1), ('training_windows', 1, 16, 1), ('training', 1, 8, 2)]
MEMBERS = [('members', 1, 16, 1), ('members_in_turn', 1, 16, 1)]  # three of ADAPTER[0]
EVERYTHING = ('training_everything', 1, 16, 1)
SCORING = ('scoring', 1, 16, 1)


@pytest.mark.parametrize(
    ('program', 'kinds'),
    [(p, 2 if 'windows' in p[0] else 1) for p in [*ADAPTER, *MEMBERS, EVERYTHING]],
)
def test_kernels_of_training(program, kinds):
    """One of each a row class and kind of layer; the forward one once more, rematerialised."""
    found = collections.Counter(compiled(*program)['kernels'])
    each = len(LENGTHS) * kinds
    assert found == dict(zip(KERNELS, (2 * each, each, each), strict=True))


def test_kernels_of_scoring():
    assert compiled(*SCORING)['kernels'] == ['splash_mha_fwd_no_residuals'] * len(LENGTHS)


@pytest.mark.parametrize('program', [*ADAPTER, *MEMBERS])
def test_the_state_is_updated_in_place(program):
    found = compiled(*program)
    assert found['state'] == found['aliases'] > 0
    assert found['output_bytes'] - found['alias_bytes'] < 2**16  # the metrics


@pytest.mark.parametrize('program', [*ADAPTER, SCORING])
def test_frozen_weights_have_no_gradient(program):
    """None is computed, and nothing of their size is summed over chips."""
    found = compiled(*program)
    assert all(RANK in dims for dims in found['stream_sums'])
    assert bool(found['stream_sums']) == (program != SCORING)
    sums = [c for c in found['collectives'] if c['kind'] in ('all-reduce', 'reduce-scatter')]
    sizes = [math.prod(s) for c in sums for s in c['shapes'] if not along(s, N)]
    assert max(sizes) < KERNEL / program[-1]


def test_the_gradients_of_weights_that_learn_are_seen():
    """What the test above finds nothing of is there when there is something to find."""
    found = compiled(*EVERYTHING)
    assert not all(RANK in dims for dims in found['stream_sums'])
    sums = [c for c in found['collectives'] if c['kind'] in ('all-reduce', 'reduce-scatter')]
    assert max(math.prod(s) for c in sums for s in c['shapes']) >= KERNEL


@pytest.mark.parametrize('program', [*ADAPTER, *MEMBERS, EVERYTHING, SCORING])
def test_rows_stay_on_their_chip(program):
    assert touching(compiled(*program), *LENGTHS) == []


@pytest.mark.parametrize('program', [*ADAPTER, *MEMBERS, SCORING])
def test_of_the_stream_only_embeddings_are_moved(program):
    """The table is split by width: ids go to all chips, each one's part of the vectors comes back.

    Chips that share the heads also add up what each has computed, and all of them get the vectors
    of every pack.
    """
    _, _, fsdp, tensor = program
    streams = (1 if tensor == 1 else fsdp) * (3 if program in MEMBERS else 1)
    moved = touching(compiled(*program), N)
    ids = [c for c in moved if c['integer']]
    assert all('/embed/' in c['of'] for c in ids)
    rest = [c for c in moved if not c['integer']]
    if tensor > 1:
        rest = [c for c in rest if c['kind'] != 'all-reduce']
    assert 0 < sum(c['bytes'] for c in rest) <= N * D * 2 * streams


@pytest.mark.parametrize('program', MEMBERS)
def test_members_share_the_backbone(program):
    """Each adds its state and its batch. One after the other, they share what is left behind, too.

    All at once they do not fit into the memory near the cores, where a single one's arrays are.
    """
    one, three = compiled(*ADAPTER[0]), compiled(*program)
    more = three['argument_bytes'] - one['argument_bytes']
    assert 0 <= more - 2 * one['alias_bytes'] < 2**18
    if program == MEMBERS[1]:
        assert three['temp_bytes'] <= 1.05 * 3 * one['temp_bytes']
