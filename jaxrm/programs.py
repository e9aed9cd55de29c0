"""Where programs live: kept on disk from one start to the next, and in a GPU's memory."""

import platform
from collections.abc import Mapping, MutableMapping
from pathlib import Path

import jax

from jaxrm import machines, processes

FRACTIONS = 'XLA_CLIENT_MEM_FRACTION', 'XLA_PYTHON_CLIENT_MEM_FRACTION'  # the latter is deprecated
FOLDER, LEAST = 'JAX_COMPILATION_CACHE_DIR', 'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS'


def keep(environ: Mapping[str, str]) -> None:
    """Keeps all of them in the user's cache folder; to be called before anything is compiled.

    What JAX's own variables say stays: JAX_COMPILATION_CACHE_DIR is another folder, and
    JAX_ENABLE_COMPILATION_CACHE=false none. Programs hold the instructions of the machine that
    compiled them, hence a folder for each. By default JAX keeps only what took it a second, which
    at the start of a run leaves dozens to be compiled again.
    """
    if not environ.get(FOLDER):
        given = environ.get('XDG_CACHE_HOME')
        user = Path(given) if given else Path('~').expanduser() / '.cache'
        folder = user / 'jaxrm' / 'programs' / platform.node()
        jax.config.update('jax_compilation_cache_dir', str(folder))
    if not environ.get(LEAST):
        jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.0)


def reserve(environ: MutableMapping[str, str]) -> None:
    """Has JAX take `machines.RESERVED` of a GPU's memory; to be called before it starts a device.

    By default it takes three quarters. What either of its own variables says stays: it refuses to
    start where both are set.
    """
    if not any(environ.get(name) for name in FRACTIONS):
        environ[FRACTIONS[0]] = str(machines.RESERVED)


def begin(environ: MutableMapping[str, str]) -> bool:
    """What a command does before it uses JAX: its memory, the run's other processes, its programs.

    Returns, and raises, as `processes.join`.
    """
    reserve(environ)
    several = processes.join(environ)
    keep(environ)
    return several
