"""Flags that say how a run uses its devices, and where it keeps what it goes on from."""

import dataclasses
import re
from typing import Any

import numpy as np
from jax.sharding import Mesh

from jaxrm import costs, members, packing, remat, shapes, sharding, tokens
from jaxrm.backbones import attention


@dataclasses.dataclass(frozen=True)
class Devices:
    """The mesh of all devices of all processes, and the folder they share.

    Of several processes each needs JAX_COORDINATOR_ADDRESS (host:port of the first),
    JAX_NUM_PROCESSES and JAX_PROCESS_ID in its environment; TPU pods, SLURM and Open MPI set what
    is needed by themselves.
    """

    data: int = -1  # parts of the batch on copies of the weights; -1 for what the others leave
    fsdp: int = 1  # parts of the batch on parts of the weights
    tensor: int = 1  # parts of each layer's heads and feed-forward
    checkpoint_dir: str | None = None  # of training state, also gs://; by default in output_dir


ASIDE = tuple(f.name for f in dataclasses.fields(Devices))  # they change nothing that comes out


def mesh(c: Devices) -> Mesh:
    """The mesh of the flags."""
    return sharding.make_mesh(data=c.data, fsdp=c.fsdp, tensor=c.tensor)


def checkpoints(c: Any) -> str:
    """Where the training state is kept."""
    return c.checkpoint_dir or str(c.output_dir / 'checkpoints')


def packs(c: Any, encoded: tokens.Tokens, mesh: Mesh, width: int) -> tuple[packing.Shape, int]:
    """A pack shape for about `train_batch_size` prompts a step, and how many packs a step has."""
    parts = sharding.data_parallel(mesh) * c.gradient_accumulation_steps
    count = parts if c.packs is None else c.packs
    if count < 1 or count % parts:
        raise ValueError(f'packs: {count}, expected a multiple of {parts}')
    size = int(np.diff(encoded.start).mean() * c.train_batch_size / count)
    return shapes.fit(encoded, size=size, width=width, multiple=attention.row_multiple()), count


def economical(c: Any, start: Any, encoded: tokens.Tokens, mesh: Mesh) -> Any:
    """The start of a run on these records: with --gradient_checkpointing auto, as memory allows."""
    shape, count = packs(c, encoded, mesh, start.rm.backbone.config.D)
    each = count // sharding.data_parallel(mesh) // c.gradient_accumulation_steps
    return kept(c, start, shape, mesh, packs=each)


def kept(
    c: Any, start: Any, shape: packing.Shape, mesh: Mesh, *, packs: int = 1, count: int = 1
) -> Any:
    """The same for so many packs of a shape on each part of the mesh; `count` are the members."""
    if c.gradient_checkpointing != 'auto':
        return start
    backbone = start.rm.backbone
    options = {'packs': packs, 'width': np.dtype(backbone.dtype).itemsize}
    chosen = remat.choose(backbone.config, _method(c, count), shape, mesh, **options)
    rm = dataclasses.replace(start.rm, backbone=backbone.clone(remat=chosen))
    return start._replace(rm=rm)


def how(c: Any, rm: Any, shape: packing.Shape, mesh: Mesh, count: int) -> members.How:
    """How so many members take a step, with a pack each on each part of the mesh."""
    backbone = rm.backbone
    method = dataclasses.replace(_method(c, count), remat=backbone.remat)
    width = np.dtype(backbone.dtype).itemsize
    return members.choose(backbone.config, method, shape, mesh, width=width)


def _method(c: Any, count: int) -> costs.Method:
    """What learns, by the flags; an adapter where there is no choice."""
    if not getattr(c, 'use_peft', True):
        return costs.Method('everything', rank=0, members=count)
    targets = tuple(n for n in costs.LINEARS if re.search(c.lora_target_modules, f'/{n}/'))
    return costs.Method('adapter', c.lora_r, targets or costs.LINEARS, members=count)
