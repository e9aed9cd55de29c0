"""Compiles a program for TPUs that are only described, and prints what is in it, as JSON.

A process of its own for test_tpu_compile.py: needs the package libtpu, which holds the whole
compiler, and no TPU. Arguments: the program, and the sizes of the mesh's three axes.
"""

import os

os.environ |= {
    'JAX_PLATFORMS': 'cpu',
    'JAX_ENABLE_COMPILATION_CACHE': 'false',
    'ALLOW_MULTIPLE_LIBTPU_LOAD': '1',
    'TPU_SKIP_MDS_QUERY': '1',  # this and the rest: what libtpu would ask the network for
    'TPU_ACCELERATOR_TYPE': 'v5litepod-16',
    'TPU_WORKER_HOSTNAMES': 'localhost',
    'TPU_WORKER_ID': '0',
}

import dataclasses
import functools
import json
import math
import re
import sys
import time
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import plain
from jax.experimental import topologies
from jax.sharding import NamedSharding

from jaxrm import heads, lora, members, packing, reward, sharding, train
from jaxrm.backbones import splash
from jaxrm.backbones.layers import Config, Decoder, Kind

CHIPS = 'v5e:4x4'
# No size of a model is, even flattened, a multiple of N = 17 * 128 or of S = 3 * 128, 5 * 128.
SHAPE = packing.Shape(tokens=2176, rows=((7, 384), (4, 640)), prompts=8, candidates=2)
LLAMA = Config(V=30011, D=512, F=1408, L=5, Q=8, K=4, H=128)
# As Gemma 2: every other layer sees a window, attention's logits are capped.
GEMMA = dataclasses.replace(
    LLAMA,
    Q=4,
    K=2,
    H=256,
    kinds=(Kind(window=200), Kind()),
    layer_kinds=(0, 1, 0, 1, 0),
    softcap=50.0,
    post_norms=True,
    norm_offset=1.0,
    embed_scale=LLAMA.D**0.5,
    activation='gelu_tanh',
)
RANK = 16
MEMBERS = 3

COLLECTIVES = {
    'kAllGather': 'all-gather',
    'kAllGatherStart': 'all-gather',
    'kAllReduce': 'all-reduce',
    'kAllReduceStart': 'all-reduce',
    'kAllToAll': 'all-to-all',
    'kCollectiveBroadcast': 'collective-broadcast',
    'kCollectivePermute': 'collective-permute',
    'kCollectivePermuteStart': 'collective-permute',
    'kRaggedAllToAll': 'ragged-all-to-all',
    'kReduceScatter': 'reduce-scatter',
}


def on(tree, shardings):
    """Shapes with a place each."""
    place = lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s)  # noqa: E731
    return jax.tree.map(place, tree, shardings)


def arguments(rm, config, mesh):
    """(trainable, frozen, batch) as shapes: an adapter on a backbone in bfloat16, a pack a chip."""
    key = jax.random.key(0)
    backbone = jax.eval_shape(lambda: rm.init_backbone(key))
    adapter = jax.eval_shape(lambda: lora.init(backbone, key, rank=RANK))
    head = jax.eval_shape(lambda: rm.init_head(key, config.D))
    half = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.bfloat16), backbone)
    frozen = {'backbone': half}
    packs = sharding.data_parallel(mesh)
    pack = packing.fill(plain.random_tokens([2]), [np.arange(1)], SHAPE, count=packs)
    split = NamedSharding(mesh, sharding.partition('packs'))
    batch = on(pack, jax.tree.map(lambda x: split, pack))
    return {'lora': adapter, 'head': head}, on(frozen, sharding.shardings(frozen, mesh)), batch


def training(rm, config, mesh, *, everything=False):
    """One step: the adapter's, or that of the whole model in float32."""
    trainable, frozen, batch = arguments(rm, config, mesh)
    if everything:
        backbone = jax.eval_shape(lambda: rm.init_backbone(jax.random.key(0)))
        trainable, frozen = {'backbone': backbone, 'head': trainable['head']}, {}
    tx = train.adamw(1e-4)
    start = lambda t: train.State(jnp.zeros((), jnp.int32), t, tx.init(t))  # noqa: E731
    state = jax.eval_shape(start, trainable)
    where = sharding.shardings(state, mesh)
    step = functools.partial(train.step, objective=train.preference(rm.score), tx=tx)
    update = jax.jit(step, donate_argnums=0, out_shardings=(where, sharding.everywhere(mesh)))
    key = jax.eval_shape(lambda: jax.random.key(0))
    return update.lower(on(state, where), frozen, batch, key), state


def together(rm, config, mesh, *, how):
    """One step of several adapters."""
    trainable, frozen, batch = arguments(rm, config, mesh)

    def more(axis, x):
        shape = (*x.shape[:axis], MEMBERS, *x.shape[axis:])
        return jax.ShapeDtypeStruct(shape, x.dtype, sharding=x.sharding)

    tx = train.adamw(1e-4)
    start = lambda t: train.State(jnp.zeros((), jnp.int32), t, jax.vmap(tx.init)(t))  # noqa: E731
    state = jax.eval_shape(start, jax.tree.map(functools.partial(more, 0), trainable))
    where = sharding.shardings(state, mesh)
    options = {'how': how, 'objective': train.preference(rm.score), 'tx': tx}
    update = train.jitted(state, mesh, step=members.step, **options)
    keys = jax.eval_shape(lambda: members.keys(range(MEMBERS)))
    batch = jax.tree.map(functools.partial(more, 1), batch)
    return update.lower(on(state, where), frozen, batch, keys), state


def scoring(rm, config, mesh):
    trainable, frozen, batch = arguments(rm, config, mesh)
    params = {**frozen, **on(trainable, sharding.shardings(trainable, mesh))}
    return jax.jit(rm.score).lower(params, batch), ()


PROGRAMS = {
    'training': (training, LLAMA),
    'members': (functools.partial(together, how='vmap'), LLAMA),
    'members_in_turn': (functools.partial(together, how='scan'), LLAMA),
    'scoring': (scoring, LLAMA),
    'training_windows': (training, GEMMA),
    'training_everything': (functools.partial(training, everything=True), LLAMA),
}


def leaves(shape) -> list:
    return [s for t in shape.tuple_shapes() for s in leaves(t)] if shape.is_tuple() else [shape]


def size(shapes) -> int:
    return sum(math.prod(s.dimensions()) * s.numpy_dtype().itemsize for s in shapes)


def instructions(compiled) -> Iterator:
    """Of all computations of the optimised program of one chip."""
    for module in compiled.runtime_executable().hlo_modules():
        for computation in module.computations():
            yield from computation.instructions()


def collectives(compiled) -> list[dict]:
    """Each once, though those that overlap with arithmetic stand in several computations."""
    found = {}
    for i in instructions(compiled):
        if kind := COLLECTIVES.get(i.opcode.name):
            text = i.to_string()
            channel = re.search(r'channel_id=(\d+)', text)
            name = re.search(r'op_name="([^"]*)"', text)
            taken = [s for o in i.operands() for s in leaves(o.shape)]
            given = leaves(i.shape)
            found[channel[1] if channel else i.name] = {
                'kind': kind,
                'shapes': sorted({tuple(s.dimensions()) for s in (*taken, *given)}),
                'integer': all(s.numpy_dtype().kind in 'iub' for s in taken),
                'bytes': max(size(taken), size(given) - size(taken) * ('Start' in i.opcode.name)),
                'of': name[1] if name else '',
            }
    return list(found.values())


def stream_sums(compiled) -> list[tuple[int, ...]]:
    """Shapes of what is summed over the stream by matrix products: the gradients of weights."""
    along = lambda s: any(d % SHAPE.tokens == 0 for d in s.dimensions() if d)  # noqa: E731
    products = [i for i in instructions(compiled) if i.opcode.name in ('kDot', 'kConvolution')]
    sums = (i for i in products if not along(i.shape) and any(along(o.shape) for o in i.operands()))
    return sorted({tuple(i.shape.dimensions()) for i in sums})


def describe(compiled) -> dict:
    memory = compiled.memory_analysis()
    kernels = [
        i.name for i in instructions(compiled) if 'custom_call_target="tpu_custom' in i.to_string()
    ]
    return {
        'argument_bytes': memory.argument_size_in_bytes,
        'temp_bytes': memory.temp_size_in_bytes,
        'output_bytes': memory.output_size_in_bytes,
        'alias_bytes': memory.alias_size_in_bytes,
        'aliases': len(re.findall('(may|must)-alias', compiled.as_text().partition('\n')[0])),
        'kernels': [re.sub(r'\.\d+$', '', name) for name in kernels],
        'stream_sums': stream_sums(compiled),
        'collectives': collectives(compiled),
    }


def main() -> None:
    name, *sizes = sys.argv[1:]
    lower, config = PROGRAMS[name]
    chips = topologies.get_topology_desc(CHIPS, platform='tpu').devices
    data, fsdp, tensor = map(int, sizes)
    mesh = sharding.make_mesh(data=data, fsdp=fsdp, tensor=tensor, devices=chips)
    backbone = Decoder(config, jnp.bfloat16, splash.make(mesh), remat='full')
    lowered, state = lower(reward.RewardModel(backbone, heads.Scalar(), 2.0), config, mesh)
    began = time.perf_counter()
    compiled = lowered.compile()
    found = {'seconds': time.perf_counter() - began, 'state': len(jax.tree.leaves(state))}
    print(json.dumps(found | describe(compiled)))


if __name__ == '__main__':
    main()
