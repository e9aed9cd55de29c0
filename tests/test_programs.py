"""Where compiled programs are kept, and that the next start finds them all."""

import json
import os
import platform
import subprocess
import sys

import jax
import jaxlib.xla_client
import pytest

from jaxrm import machines, programs

NAMES = 'jax_compilation_cache_dir', 'jax_persistent_cache_min_compile_time_secs'
START = """
import json, os, jax, jax.numpy as jnp
from jaxrm import programs
programs.keep(os.environ)
hits = []
jax.monitoring.register_event_listener(lambda name, **_: hits.append(name))
jax.jit(lambda x: jnp.sin(x) @ x)(jnp.ones((3, 3))).block_until_ready()
names = 'compile_requests_use_cache', 'cache_hits'
print(json.dumps([hits.count(f'/jax/compilation_cache/{name}') for name in names]))
"""


@pytest.fixture
def settings(monkeypatch):
    """What is set, in place of JAX's settings."""
    found = {}
    monkeypatch.setattr(jax.config, 'update', found.__setitem__)
    return found


def test_the_users_cache_folder(settings, tmp_path, monkeypatch):
    programs.keep({'XDG_CACHE_HOME': str(tmp_path)})
    folder = tmp_path / 'jaxrm' / 'programs' / platform.node()
    assert settings == dict(zip(NAMES, (str(folder), 0.0), strict=True))
    monkeypatch.setenv('HOME', str(tmp_path / 'me'))
    programs.keep({})
    assert settings[NAMES[0]].startswith(str(tmp_path / 'me' / '.cache' / 'jaxrm'))


def test_jaxs_own_variables_stay(settings):
    programs.keep({programs.FOLDER: '/somewhere', programs.LEAST: '3'})
    assert settings == {}
    programs.keep({programs.FOLDER: '/somewhere'})
    assert settings == {NAMES[1]: 0.0}


def test_the_share_of_a_gpus_memory():
    """What plans count on; JAX refuses both of its variables, so that either stands."""
    environ = {}
    programs.reserve(environ)
    assert environ == {'XLA_CLIENT_MEM_FRACTION': '0.92'}
    assert machines.parse('h100').chip.memory == int(0.92 * 79 * 2**30)
    for name in programs.FRACTIONS:
        environ = {name: '.5'}
        programs.reserve(environ)
        assert environ == {name: '.5'}


def test_jax_reads_the_share(monkeypatch):
    """When it starts a GPU, which is after it is imported."""
    for name in programs.FRACTIONS:
        monkeypatch.delenv(name, raising=False)
    environ = {}
    programs.reserve(environ)
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    options = jaxlib.xla_client.generate_pjrt_gpu_plugin_options()
    assert options['memory_fraction'] == machines.RESERVED


def test_a_second_start_compiles_nothing(tmp_path):
    """Not even what takes JAX a moment, which it would not keep."""
    environ = {k: v for k, v in os.environ.items() if k not in (programs.FOLDER, programs.LEAST)}
    environ['XDG_CACHE_HOME'] = str(tmp_path)
    run = [sys.executable, '-c', START]
    starts = [
        json.loads(subprocess.run(run, env=environ, check=True, capture_output=True).stdout)
        for _ in range(2)
    ]
    assert starts[0][0] > 0
    assert starts[0][1] == 0
    assert starts[1] == [starts[0][0]] * 2
