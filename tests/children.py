"""Processes that tests start: programs of this repository, alone or in pairs that run together."""

import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
SECONDS = 240  # no child lives longer; with jax.distributed, only SIGKILL ends one that hangs


def start(command, *, devices=2, cache=None, environ=(), cwd=None):
    """Runs `python command` with simulated devices; programs are kept in the folder `cache`."""
    flags = '--xla_backend_optimization_level=0'  # compiles faster
    flags += f' --xla_force_host_platform_device_count={devices}'
    env = os.environ | {'PYTHONPATH': f'{HERE.parent}:{HERE}', 'XLA_FLAGS': flags}
    env |= {'PJRT_NPROC': '32', 'JAXRM_TRACEBACK': '', **dict(environ)}
    if cache is not None:
        env |= {
            'JAX_COMPILATION_CACHE_DIR': str(cache),
            'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0',
            'JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES': '-1',
        }
    return subprocess.Popen(
        [sys.executable, *map(str, command)],
        env=env,
        cwd=cwd,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def joined(count):
    """The environment of processes that run together, less JAX_PROCESS_ID."""
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        address = f'127.0.0.1:{free.getsockname()[1]}'
    return {'JAX_COORDINATOR_ADDRESS': address, 'JAX_NUM_PROCESSES': str(count)}


def pair(command, *, devices=1, cwd=(None, None), **options):
    """Two processes of so many devices each that run the command together."""
    both = joined(2)
    joins = [both | {'JAX_PROCESS_ID': str(i)} for i in range(2)]
    environ = dict(options.pop('environ', ()))
    return [
        start(command, devices=devices, environ=environ | j, cwd=c, **options)
        for j, c in zip(joins, cwd, strict=True)
    ]


def finish(process, status=0, *, quiet=True, seconds=SECONDS):
    """What the process wrote to stdout, once it ended as expected, with nothing on stderr."""
    try:
        out, err = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGKILL)
        out, err = process.communicate()
    assert process.returncode == status, f'{process.returncode}\n{out}\n{err}'
    assert err == '' or not quiet, err
    noise = re.compile(r'Gloo|peer ranks|^[\s\d]*$')  # threads write over each other
    return ''.join(line for line in out.splitlines(True) if not noise.search(line))


def finish_all(children, status=0, **options):
    """`finish` of each; none is left behind. JAX notes what it does on stderr."""
    try:
        return [finish(child, status, quiet=False, **options) for child in children]
    finally:
        for child in children:
            if child.poll() is None:
                child.kill()
                child.communicate()
