"""What a LoRA step keeps for its backward pass and computes again, by rematerialisation policy.

Run:     python -m experiments.bench_remat
Cost:    half a minute on one CPU core; nothing is computed, programs are traced
Expect:  the table on rematerialisation in BENCHMARKS.md; JSON in --output_dir

Bytes are those that the loop over layers hands from the forward pass to the backward, of a token of
the stream, all layers together; FLOPs are against those of `none`. Both are read from the traced
program; beside them the closed form (`jaxrm.costs`), by which `--gradient_checkpointing auto`
chooses. Frozen weights are as they are read and fused: both must give the same.
"""

import dataclasses
import functools
import math
from pathlib import Path
from typing import Any, get_args

import jax
import jax.numpy as jnp

from experiments import bench, common
from jaxrm import costs, flops, fused, packing, train


@dataclasses.dataclass(frozen=True)
class Config:
    output_dir: Path = Path('runs/bench')
    model: str = 'llama-3-8b'
    profile: str = 'ultrafeedback'
    lora_r: int = 16


def handed(jaxpr: Any, layers: int) -> int | None:
    """Bytes that come out of the first loop over layers, a part for each layer."""
    for e in jaxpr.eqns:
        if e.primitive.name == 'scan' and e.params['length'] == layers:
            made = [x.aval for x in e.outvars if x.aval.shape[:1] == (layers,)]
            return sum(math.prod(x.shape) * x.dtype.itemsize for x in made)
        for inner in flops.inner(e):
            if (found := handed(inner, layers)) is not None:
                return found
    return None


def counts(c: Config, remat: costs.Remat, shape: packing.Shape, pack: Any) -> dict[str, Any]:
    """Of one policy: bytes and FLOPs of the program, of both layouts, and by formula."""
    sizes, method = bench.MODELS[c.model], costs.Method('adapter', rank=c.lora_r, remat=remat)
    w = bench.parameters(sizes, c.lora_r, jnp.bfloat16)
    rm = bench.model(sizes, jnp.bfloat16, flops.row_attention, remat)
    step = functools.partial(train.gradients, train.preference(rm.score))
    learns = {part: w[part] for part in ('lora', 'head')}
    key, load = jax.eval_shape(lambda: jax.random.key(0)), costs.of_shape(shape)
    out: dict[str, Any] = {
        'formula_bytes': costs.activations(sizes, load, method),
        'formula_flops': costs.step(sizes, load, method).total,
    }
    for name, backbone in {
        'plain': w['backbone'], 'fused': jax.eval_shape(fused.fuse, w['backbone'])
    }.items():  # fmt: skip
        args = learns, {'backbone': backbone}, pack, key
        out[name] = {
            'bytes': handed(jax.make_jaxpr(step)(*args).jaxpr, sizes.L - 1),
            'flops': flops.count(step, *args),
        }
    return out


def main(c: Config) -> None:
    """Counts, prints, writes."""
    p = bench.PROFILES[c.profile]
    t = bench.data(p, vocabulary=bench.MODELS[c.model].V)
    shape, packs = bench.packed(t, p.size)
    pack = bench.shapes_of(packing.fill(t, packs[:1], shape))
    found = {remat: counts(c, remat, shape, pack) for remat in get_args(costs.Remat)}
    least = min(x['plain']['flops'] for x in found.values())
    million = shape.tokens * 1e6
    rows = {
        remat: [
            ' / '.join(f'{x[way]["bytes"] / million:.3f}' for way in ('plain', 'fused')),
            f'{x["formula_bytes"] / million:.3f}',
            ' / '.join(f'{x[way]["flops"] / least:.4f}' for way in ('plain', 'fused')),
            f'{x["formula_flops"] / x["plain"]["flops"]:.6f}',
        ]
        for remat, x in found.items()
    }
    columns = ('MB a token: plain / fused', 'by formula', 'FLOPs: plain / fused',
               'FLOPs by formula, over the program')  # fmt: skip
    common.table(f'{c.model}, LoRA {c.lora_r}, {shape}', rows, columns, paste=True)
    bench.write(c.output_dir / 'remat.json', {'shape': shape, 'policies': found})


if __name__ == '__main__':
    common.launch(Config, main)
