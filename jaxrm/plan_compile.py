"""The program of a plan, compiled by the TPU's own compiler for chips that are only described.

A process of its own, `python -m jaxrm.plan_compile REQUEST RESULT`, both files of JSON: it needs
the package libtpu, which holds the whole compiler, and no TPU. A result is kept in a folder under
a hash of the program and of the compiler. `plan_confirm` starts it.
"""

import functools
import gzip
import hashlib
import importlib.metadata
import json
import re
import secrets
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding

from jaxrm import costs, fused, heads, lora, members, packing, plan_hlo, reward, sharding, train
from jaxrm.backbones import family, splash
from jaxrm.backbones.layers import Config, Decoder

SCALE = 2.0  # of an adapter; any number gives the same program

Shapes = Any  # a tree of jax.ShapeDtypeStruct


def _on(shapes: Shapes, places: Any) -> Shapes:
    place = lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s)  # noqa: E731
    return jax.tree.map(place, shapes, places)


def _several(axis: int, count: int, shapes: Shapes) -> Shapes:
    def more(x):
        shape = (*x.shape[:axis], count, *x.shape[axis:])
        return jax.ShapeDtypeStruct(shape, x.dtype, sharding=x.sharding)

    return jax.tree.map(more, shapes)


def parts(rm: reward.RewardModel, method: costs.Method) -> tuple[Shapes, Shapes]:
    """(what learns, what is frozen) as shapes; frozen weights in bfloat16."""
    key = jax.random.key(0)
    backbone = jax.eval_shape(rm.init_backbone, key)
    head = jax.eval_shape(lambda: rm.init_head(key, rm.backbone.config.D))
    if method.learns == 'everything':
        return {'backbone': backbone, 'head': head}, {}
    half = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.bfloat16), backbone)
    if not method.rank:
        return {'head': head}, {'backbone': half}
    targets = f'/({"|".join(method.targets)})/'
    init = functools.partial(lora.init, rank=method.rank, targets=targets)
    return {'lora': jax.eval_shape(init, backbone, key), 'head': head}, {'backbone': half}


def _batch(shape: packing.Shape, mesh: Mesh) -> Shapes:
    """A pack for each data shard."""
    P, N, B, M = sharding.data_parallel(mesh), shape.tokens, shape.prompts, shape.candidates
    where = NamedSharding(mesh, sharding.partition('packs'))
    of = lambda *s, dtype=jnp.int32: jax.ShapeDtypeStruct((P, *s), dtype, sharding=where)  # noqa: E731
    real = functools.partial(of, dtype=jnp.float32)
    return packing.Pack(
        ids_PN=of(N),
        pos_PN=of(N),
        slot=tuple(of(r, s) for r, s in shape.rows),
        back_PN=of(N),
        read=tuple(of(r, 2) for r, _ in shape.rows),
        row_PBM=of(B, M),
        rank_PBM=of(B, M),
        margin_PBM=real(B, M),
        rating_PBMJ=real(B, M, 0),
        smoothing_PB=real(B),
        group_PB=of(B),
        record_PB=of(B),
    )


def lowered(c: Config, method: costs.Method, shape: packing.Shape, mesh: Mesh, attention) -> Any:
    """The step as `train.fit` runs it, or the scores, for arrays placed on the mesh."""
    backbone = Decoder(c, jnp.bfloat16, attention, remat=method.remat)
    rm = reward.RewardModel(backbone, heads.Scalar(), SCALE)
    learning, frozen = parts(rm, method)
    fuse = functools.partial(fused.fuse, parts=sharding.tensor_parallel(mesh))
    frozen = jax.eval_shape(fuse, frozen)
    frozen, batch = _on(frozen, sharding.shardings(frozen, mesh)), _batch(shape, mesh)
    E = method.members
    with jax.set_mesh(mesh):
        if method.learns == 'nothing':
            return _scores(rm, _on(learning, sharding.shardings(learning, mesh)), frozen, batch, E)
        tx = train.adamw(1e-4)
        init = tx.init if E == 1 else jax.vmap(tx.init)
        learning = learning if E == 1 else _several(0, E, learning)
        start = lambda t: train.State(jnp.zeros((), jnp.int32), t, init(t))  # noqa: E731
        state = jax.eval_shape(start, learning)
        options = {'objective': train.preference(rm.score), 'tx': tx}
        key: Any = jax.eval_shape(lambda: jax.random.key(0))
        if E > 1:
            options |= {'step': members.step, 'how': 'vmap'}
            key, batch = jax.eval_shape(lambda: members.keys(range(E))), _several(1, E, batch)
        update: Any = train.jitted(state, mesh, **options)
        return update.lower(_on(state, sharding.shardings(state, mesh)), frozen, batch, key)


def _scores(rm, learning, frozen, batch, E: int) -> Any:
    if E == 1:
        return jax.jit(rm.score).lower({**frozen, **learning}, batch)

    def each(mine_E, frozen, batch_E):
        one = lambda mine, batch: rm.score({**frozen, **mine}, batch)  # noqa: E731
        return jax.vmap(one, in_axes=(0, 1))(mine_E, batch_E)

    return jax.jit(each).lower(_several(0, E, learning), frozen, _several(1, E, batch))


def key_of(program: str, chips: str, options: Mapping[str, str]) -> str:
    """A hash of the program, of what it is compiled for, and of the compiler and its options."""
    versions = [importlib.metadata.version(name) for name in ('jax', 'libtpu')]
    said = [f'{k}={v}' for k, v in sorted(options.items())]
    return hashlib.sha256('\n'.join([chips, *versions, *said, program]).encode()).hexdigest()


def _compiled(program: Any, options: Mapping[str, str]) -> tuple[dict[str, Any], str]:
    """What the compiler says of a program, and the text of what it made; a refusal is an answer."""
    began = time.perf_counter()
    try:
        made = program.compile(compiler_options=dict(options))
    except jax.errors.JaxRuntimeError as error:
        if not (found := re.search(r'RESOURCE_EXHAUSTED.*?(?=\n\n|$)', str(error), re.DOTALL)):
            raise
        return {'fits': False, 'why': ' '.join(found[0].split())[:400]}, ''
    memory = made.memory_analysis()
    said = {
        'fits': True,
        'seconds': round(time.perf_counter() - began, 1),
        'arguments': memory.argument_size_in_bytes,
        'temporary': memory.temp_size_in_bytes,
        'output': memory.output_size_in_bytes,
        'aliased': memory.alias_size_in_bytes,
    }
    return said, made.as_text()


def _kept(
    folder: Path, key: str, program: Any, options: Mapping[str, str]
) -> tuple[dict[str, Any], str]:
    """`_compiled`, or what an earlier run left in the folder."""
    about, text = folder / f'{key}.json', folder / f'{key}.hlo.gz'
    if about.exists():
        return json.loads(about.read_text()), gzip.decompress(text.read_bytes()).decode()
    said, made = _compiled(program, options)
    folder.mkdir(parents=True, exist_ok=True)
    for path, content in ((text, gzip.compress(made.encode())), (about, json.dumps(said).encode())):
        part = path.with_name(f'.{path.name}.{secrets.token_hex(4)}')
        part.write_bytes(content)
        part.replace(path)
    return said, made


def measure(request: Mapping[str, Any]) -> dict[str, Any]:
    """What the compiler makes of a request of `plan.request`."""
    asked = request['config']
    c = family(asked['model_type']).config_from_hf(asked)
    method = costs.Method(**{**request['method'], 'targets': tuple(request['method']['targets'])})
    tokens, rows, prompts, candidates = request['shape']
    shape = packing.Shape(tokens, tuple((r, s) for r, s in rows), prompts, candidates)
    sizes = dict(zip(('data', 'fsdp', 'tensor'), request['mesh'], strict=True))
    chips = topologies.get_topology_desc(request['machine'], platform='tpu').devices
    mesh = sharding.make_mesh(**sizes, devices=chips)
    program = lowered(c, method, shape, mesh, splash.make(mesh))
    options = request['options']
    key = key_of(program.as_text(), request['machine'], options)
    said, text = _kept(Path(request['cache']), key, program, options)
    versions = {name: importlib.metadata.version(name) for name in ('jax', 'libtpu')}
    found = {**said, **versions, 'options': options, 'key': key}
    return found | (plan_hlo.summary(text, shape) if text else {})


def main() -> None:
    """Reads a request, writes a result."""
    asked, result = sys.argv[1:]
    found = measure(json.loads(Path(asked).read_text(encoding='utf-8')))
    Path(result).write_text(json.dumps(found), encoding='utf-8')


if __name__ == '__main__':
    main()
