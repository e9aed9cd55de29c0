"""Asking the TPU's compiler about a plan, in a process of its own."""

import dataclasses
import importlib.util
import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxrm import plan
from jaxrm.machines import Machine

# What libtpu would otherwise ask the network for, a lock that only one process can have, and a
# cache that has no place for programs of devices that are not there.
ENVIRONMENT = {
    'JAX_PLATFORMS': 'cpu',
    'JAX_ENABLE_COMPILATION_CACHE': 'false',
    'ALLOW_MULTIPLE_LIBTPU_LOAD': '1',
    'TPU_SKIP_MDS_QUERY': '1',
    'TPU_ACCELERATOR_TYPE': 'v5litepod-16',
    'TPU_WORKER_HOSTNAMES': 'localhost',
    'TPU_WORKER_ID': '0',
}


def check(machine: Machine) -> None:
    """Raises ValueError where there is nothing to compile with."""
    if not machine.tpu:
        raise ValueError(
            f'--compile: found {machine.name}, expected a TPU: GPUs have no such compiler'
        )
    if importlib.util.find_spec('libtpu') is None:
        raise ValueError("--compile: found no libtpu: pip install 'jaxrm[plan]'")


def request(
    run: plan.Run, hf: Mapping[str, Any], cache: Path, options: Mapping[str, str]
) -> dict[str, Any]:
    """What `plan_compile` reads; `hf` are the keys of the model's config.json."""
    return {
        'config': dict(hf),
        'method': dataclasses.asdict(run.method),
        'machine': run.machine.name,
        'mesh': list(run.mesh),
        'shape': list(run.shape),
        'cache': str(cache.expanduser().resolve()),
        'options': dict(options),
    }


def confirm(
    run: plan.Run,
    hf: Mapping[str, Any],
    cache: Path,
    environ: Mapping[str, str],
    *,
    options: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """What the compiler, with these options, makes of a run.

    Raises ValueError with its last words when it fails.
    """
    ours = {k: v for k, v in environ.items() if not k.startswith(('JAX_', 'XLA_'))}
    with tempfile.TemporaryDirectory() as folder:
        asked, result = Path(folder, 'request.json'), Path(folder, 'result.json')
        asked.write_text(json.dumps(request(run, hf, cache, options or {})), encoding='utf-8')
        command = [sys.executable, '-P', '-m', 'jaxrm.plan_compile', str(asked), str(result)]
        done = subprocess.run(command, env=ours | ENVIRONMENT, capture_output=True, text=True)
        if done.returncode:
            said = ' '.join(done.stderr.split())[-1000:]
            raise ValueError(f'the compiler failed (status {done.returncode}): {said}')
        return json.loads(result.read_text(encoding='utf-8'))
