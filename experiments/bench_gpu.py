"""Everything that is to be measured on one GPU, in one command: rates, limits, ratios.

Run:     python -m experiments.bench_gpu --output_dir DIR             # under nine minutes
         python -m experiments.bench_gpu --output_dir DIR --tiny      # the same anywhere, in small
Expect:  the tables on GPUs in BENCHMARKS.md; DIR/gpu.json, written after every cell

Random weights of real shapes and random tokens. The card's own ceilings come first: a bf16 matrix
product, and a copy. *FoL* is the FLOPs that the real tokens need, each once, over the time and the
measured product; `mfu` is over the data sheet's; `fol_effective` counts the FLOPs of padded rows
that share nothing, for the same records. Cells are in order of importance; of those that --budget
seconds do not leave room for, the output says so. Programs of a cell take turns in one process;
times are medians, of fewer rounds than were asked for where `rounds` is less than `asked_rounds`.

What has the device is a process of its own: it is ended when its time is up, another goes on
behind a cell that ended it, and when none is left torch and jaxrm share the device (see
bench_gpu_torch). Arguments are read by argparse, so that jaxrm's core and JAX are enough.
"""

import argparse
import gc
import json
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from experiments import bench, bench_gpu_torch
from experiments.bench_gpu_cells import CELLS, Run
from jaxrm import programs

FIRST = 'ceilings', 'probe'  # nothing is measured where these fail
BESIDE = 'torch'
SECONDS = {'scoring': 60, 'training, LoRA': 40, 'training, LoRA, TRL': 40}  # left for it
ENDED = {'failed': 'the process that measured it ended'}
TRIES, GRACE = 3, 20


def line(name: str, value: Any) -> str:
    """One row of what is printed: rates and ratios, without the times they are made of."""
    if isinstance(value, dict):
        keep = ('median', 'tokens_per_s', 'records_per_s', 'fol', 'fol_done', 'fol_effective',
                'mfu', 'remat', 'attention', 'rounds', 'wall', 'flops', 'of_flops', 'temp_bytes',
                'ran', 'fits', 'fits_80gb', 'bytes_per_token', 'gathers', 'share_of_attention',
                'failed')  # fmt: skip
        shown = {k: said(value[k]) for k in keep if k in value}
        return f'  {name}: ' + (', '.join(f'{k} {v}' for k, v in shown.items()) or str(value))
    return f'  {name}: {said(value)}'


def said(value: Any) -> str:
    """A number, or numbers, in few digits."""
    if isinstance(value, list):
        return ' '.join(said(x) for x in value)
    return f'{value:.4g}' if isinstance(value, float) else str(value)


def cell(run: Run, need: float, make: Callable[[Run], dict[str, Any]]) -> Any:
    """What a cell found; why there is nothing, where there is not."""
    left = run.until - time.monotonic()
    if left < need and not run.tiny:
        return {'skipped': f'{left:.0f} s are left, it may take {need:.0f}'}
    start = time.monotonic()
    try:
        found = make(run)
    except Exception as error:  # the others are worth having without it
        found = bench.why(error)
    gc.collect()
    stats = {} if run.tiny else jax.devices()[0].memory_stats() or {}
    memory = {n: stats[n] for n in ('peak_bytes_in_use', 'bytes_in_use') if n in stats}
    return {**found, **memory, 'cell_seconds': time.monotonic() - start}


def show(name: str, found: dict[str, Any], until: float) -> None:
    """Prints a cell."""
    print(f'{name}  ({until - time.monotonic():.0f} s left)', flush=True)
    for key, value in found.items():
        print(line(key, value), flush=True)


def on_device(c: argparse.Namespace, until: float) -> None:
    """Runs the cells that no process has begun, writing all there is before and after each.

    Exits with 2 where there is no GPU, with 1 where it does not compute what it should.
    """
    programs.reserve(os.environ)
    programs.keep(os.environ)
    if not c.tiny and jax.default_backend() != 'gpu':
        print(f'error: found {jax.default_backend()}, expected a GPU; --tiny runs anywhere')
        sys.exit(2)
    path = c.output_dir / 'gpu.json'
    found = json.loads(path.read_text())
    found.setdefault('machine', bench.machine())
    run = Run(c.tiny, c.rounds, until, c.output_dir, found)
    for name in (*FIRST, *(x for x in CELLS if x in c.cells and x not in FIRST)):
        if name not in found:
            bench.write(path, found | {name: ENDED})
            found[name] = cell(run, *CELLS[name])
            bench.write(path, found)
            show(name, found[name], until)
        if name in FIRST and {'failed', 'skipped'} & set(found[name]):
            sys.exit(1)


def apart(target: Callable[..., None], *args: Any, until: float) -> int | None:
    """The status of a process that does it; None where it had to be ended."""
    process = multiprocessing.get_context('spawn').Process(target=target, args=args)
    process.start()
    process.join(max(until - time.monotonic(), 1))
    if process.is_alive():
        process.kill()
        process.join()
        return None
    return process.exitcode


def beside(c: argparse.Namespace, until: float) -> dict[str, Any]:
    """What bench_gpu_torch found, or why it found nothing."""
    start = time.monotonic()
    if not (need := reserved(c)):
        absent = ', '.join(bench_gpu_torch.missing('scoring', c.torch_python))
        return {'skipped': f'not installed: {absent}'}
    if until - start < need / 2:
        return {'skipped': f'{until - start:.0f} s are left'}
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as name:
        folder, rounds = Path(name), min(c.rounds, 5)
        if apart(bench_gpu_torch.prepare, folder, c.tiny, until=until) == 0:
            apart(bench_gpu_torch.compare, folder, c.torch_python, rounds, until=until)
        path = folder / 'torch.json'
        found = json.loads(path.read_text()) if path.exists() else ENDED
    return found | {'cell_seconds': time.monotonic() - start}


def reserved(c: argparse.Namespace) -> int:
    """Seconds to leave for what is there to compare with."""
    if BESIDE not in c.cells or bench_gpu_torch.missing('scoring', c.torch_python):
        return 0
    there = [n for n in SECONDS if not bench_gpu_torch.missing(n, c.torch_python)]
    return sum(SECONDS[name] for name in there)


def arguments(argv: list[str]) -> argparse.Namespace:
    """The flags."""
    parser = argparse.ArgumentParser(description=(__doc__ or '').splitlines()[0])
    names = [*CELLS, BESIDE]
    parser.add_argument('--output_dir', type=Path, required=True)
    parser.add_argument('--budget', type=float, default=510, help='seconds, all told')
    parser.add_argument('--rounds', type=int, default=10)
    parser.add_argument('--cells', nargs='*', default=names, choices=names)
    parser.add_argument('--tiny', action='store_true', help='a tiny model, float32, anywhere')
    parser.add_argument('--torch_python', help='an interpreter with torch, where this has none')
    c = parser.parse_args(argv)
    for name in ('rounds', 'budget'):
        if getattr(c, name) < 1:
            parser.error(f'--{name}: found {getattr(c, name)}, expected at least 1')
    return c


def main(argv: list[str]) -> None:
    """Measures all there is time for; the status is 1 where the device computes wrongly."""
    c = arguments(argv)
    until = time.monotonic() + (3600 if c.tiny else c.budget)
    path = c.output_dir / 'gpu.json'
    flags = {n: x for n, x in vars(c).items() if n in ('budget', 'rounds', 'cells', 'tiny')}
    bench.write(path, {'arguments': flags})
    alone = until - reserved(c)
    for _ in range(TRIES):
        status = apart(on_device, c, alone, until=alone + GRACE)
        if status in (0, 1, 2, None):
            break
    if status in (1, 2):
        sys.exit(status)
    if BESIDE in c.cells:
        found = json.loads(path.read_text())
        found[BESIDE] = beside(c, until)
        bench.write(path, found)
        show(BESIDE, found[BESIDE], until)


if __name__ == '__main__':
    main(sys.argv[1:])
