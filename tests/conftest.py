"""What every test runs under: eight simulated CPU devices, strict arithmetic, no network.

JAX reads its settings when it is imported, so they are environment variables here, set before any
test module is; processes that tests start inherit them. JAXRM_TEST_PLATFORM=cuda (or tpu) runs on
an accelerator instead, for the tests marked `gpu`.
"""

import os
import platform
import sys
import tempfile
from pathlib import Path

import pytest

if 'jax' in sys.modules:
    raise RuntimeError('jax was imported before conftest.py: its settings would have no effect')

ROOT = Path(__file__).resolve().parent.parent
# Programs here are compiled more often than they run.
DEVICES = '--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0'
_hub = tempfile.TemporaryDirectory(prefix='jaxrm-hub-')

os.environ.setdefault('PJRT_NPROC', '32')  # collectives of 8 devices deadlock on a few threads
os.environ['JAX_PLATFORMS'] = os.environ.get('JAXRM_TEST_PLATFORM', 'cpu')
os.environ['XLA_FLAGS'] = f'{os.environ.get("XLA_FLAGS", "")} {DEVICES}'.strip()
# Compiled programs are kept for the next run, apart for each machine: they hold its instructions.
os.environ.setdefault('JAX_COMPILATION_CACHE_DIR', str(ROOT / '.jax_cache' / platform.node()))
os.environ.setdefault('JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS', '0.2')
os.environ |= {
    'JAX_NUMPY_RANK_PROMOTION': 'raise',
    'JAX_DEFAULT_MATMUL_PRECISION': 'highest',
    'HF_HOME': _hub.name,  # a test must not find what its author once downloaded
    'HF_HUB_OFFLINE': '1',
    'HF_DATASETS_OFFLINE': '1',
    'TOKENIZERS_PARALLELISM': 'false',
    'MPLBACKEND': 'agg',
}


def pytest_unconfigure() -> None:
    """Remove the empty hub cache."""
    _hub.cleanup()


@pytest.fixture(scope='session')
def data_dir() -> Path:
    """The folder of real data sets that JAXRM_DATA names; without it, the test is skipped."""
    path = os.environ.get('JAXRM_DATA')
    if not path:
        pytest.skip('JAXRM_DATA is not set: it names a folder of preference data sets')
    if not Path(path).is_dir():
        pytest.fail(f'JAXRM_DATA: {path!r} is not a folder')
    return Path(path)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """For the benchmarks seconds pass only where a call says so: it adds to the only element."""
    from experiments import bench

    at = [0.0]
    monkeypatch.setattr(bench.time, 'perf_counter', lambda: at[0])
    monkeypatch.setattr(bench.time, 'monotonic', lambda: at[0])
    return at
