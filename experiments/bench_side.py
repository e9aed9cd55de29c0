"""jaxrm's side of bench_trl, which starts it: python -m experiments.bench_side TASK FOLDER.

Reads a number of units from standard input, makes them, and says on standard output how long that
took, again and again until the input ends.
"""

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments import bench
from experiments.bench_turns import Turns
from jaxrm import (
    checkpoint,
    evaluate,
    fused,
    lora,
    packing,
    programs,
    shapes,
    sharding,
    tokens,
    train,
    tree,
)
from jaxrm.backbones import attention
from jaxrm.backbones.layers import Config

PACK = 4096  # tokens, where scores are all that is wanted


def one_device() -> Any:
    """The mesh, as torch has it."""
    return sharding.make_mesh(devices=jax.devices()[:1])


def read(folder: Path) -> tuple[dict[str, Any], Config, tree.Tree, tokens.Tokens]:
    """The sizes, the model, on the devices, and the pairs."""
    about = json.loads((folder / 'about.json').read_text())
    found = checkpoint.load_pretrained(folder / 'model')
    params = sharding.place(found.params, one_device())
    return about, found.config, params, tokens.Tokens(**np.load(folder / 'tokens.npz'))


def model(about: dict[str, Any], config: Config) -> tuple[Any, Any]:
    """The reward model and the mesh; it computes in `dtype`, with the attention that is default."""
    mesh, dtype = one_device(), jnp.dtype(about.get('dtype', 'float32'))
    return bench.model(config, dtype, attention.default(dtype, config, mesh)), mesh


def train_steps(turns: Turns, folder: Path, adapter: bool) -> None:
    """`train.fit` over packs of as many pairs as the other side's batch has, in the mean."""
    about, config, params, t = read(folder)
    rm, mesh = model(about, config)
    learns = {'head': params['head']}
    if adapter:
        learns['lora'] = lora.init(params['backbone'], jax.random.key(0), rank=16)
        frozen = fused.fuse({'backbone': params['backbone']})
    else:
        learns['backbone'], frozen = params['backbone'], {}
    size = bench.mean_size(t, about['train_batch_size'])
    shape = shapes.fit(t, size=size, width=config.D, multiple=attention.row_multiple())
    batches = packing.Batches(t, shape, 1, seed=0)
    tx = train.adamw(1e-4)
    steps = 10**5
    pairs = np.diff(batches.counts(2000)[:, 0])
    turns.wait()

    def hook(done: int, state: train.State, metrics: train.Metrics) -> None:
        if turns.left == 1:
            jax.block_until_ready(state)
        turns.tick(int(pairs[(done - 1) % len(pairs)]))

    train.fit(
        train.start(learns, tx, mesh), frozen, batches, jax.random.key(0), tx=tx, mesh=mesh,
        objective=train.preference(rm.score), steps=steps, hooks=[(1, hook)],
    )  # fmt: skip


def score(turns: Turns, folder: Path, apart: bool) -> None:
    """Scores of pairs, packed in every turn anew; `apart` has each row's prompt to itself."""
    about, config, params, t = read(folder)
    rm, mesh = model(about, config)
    t = tokens.select(t, np.arange(about['rows'] // 2))
    t = tokens.unshare(t) if apart else t
    shape = shapes.fit(t, size=PACK, width=config.D, multiple=attention.row_multiple())
    params, compiled = fused.fuse(params), jax.jit(rm.score)
    turns.wait()
    while True:
        found = evaluate.candidate_scores(compiled, params, t, shape, mesh=mesh, packs=1)
        turns.more = {'scores': in_pairs(found, t)[:64]}
        turns.tick(len(found), len(found))


def in_pairs(score_c: np.ndarray, t: tokens.Tokens) -> list[float]:
    """Scores of chosen and rejected in turn."""
    order = np.lexsort((t.rank, np.repeat(np.arange(len(t.prompt)), np.diff(t.first))))
    return score_c[order].tolist()


# Kernels: the same arrays on both sides

TOKENS, ROW = 2048, 256


def repeat(turns: Turns, fn: Callable[..., Any], args: tuple[jax.Array, ...], flops: float) -> None:
    compiled = jax.jit(fn)
    jax.block_until_ready(compiled(*args))
    turns.wait()
    while True:
        jax.block_until_ready(compiled(*args))
        turns.tick(flops / 1e9)


def linears(turns: Turns, folder: Path) -> None:
    """The seven products of a layer, forward."""
    about = json.loads((folder / 'about.json').read_text())
    D, F, heads = about['D'], about['F'], about['Q'] * about['H']
    draw = lambda *shape: jnp.asarray(np.random.default_rng(0).normal(size=shape), jnp.float32)  # noqa: E731
    x, qkvo, gate_up, down = draw(TOKENS, D), draw(4, D, heads), draw(2, D, F), draw(F, D)

    def fn(x, qkvo, gate_up, down):
        y = [x @ w for w in qkvo]
        h = [x @ w for w in gate_up]
        return y, h, h[0] @ down

    flops = 2 * TOKENS * (4 * D * heads + 3 * D * F)
    repeat(turns, fn, (x, qkvo, gate_up, down), flops)


def attend(turns: Turns, folder: Path) -> None:
    """Causal attention of rows; the FLOPs are those of the triangle."""
    about = json.loads((folder / 'about.json').read_text())
    Q, H, R = about['Q'], about['H'], TOKENS // ROW
    draw = np.random.default_rng(0).normal(size=(3, 1, R, ROW, Q, H))
    q, k, v = jnp.asarray(draw, jnp.float32)
    length = jnp.full((1, R), ROW)
    flops = 4 * R * Q * H * ROW * (ROW + 1) / 2
    repeat(turns, lambda q, k, v: attention.xla(q, k, v, length), (q, k, v), flops)


SIDES: dict[str, Callable[[Turns, Path], None]] = {
    'train_full': lambda turns, folder: train_steps(turns, folder, adapter=False),
    'train_lora': lambda turns, folder: train_steps(turns, folder, adapter=True),
    'score': lambda turns, folder: score(turns, folder, apart=False),
    'score_apart': lambda turns, folder: score(turns, folder, apart=True),
    'linears': linears,
    'attention': attend,
}


if __name__ == '__main__':
    programs.keep(os.environ)
    SIDES[sys.argv[1]](Turns(), Path(sys.argv[2]))
