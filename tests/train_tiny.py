"""A tiny training run: the first steps, and as a process of its own that tests kill."""

import argparse
import os
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import plain
from rich.console import Console

from jaxrm import heads, lora, packing, processes, resume, reward, sharding, train
from jaxrm.backbones.layers import Decoder
from jaxrm.logs import Log

SHAPE = packing.Shape(tokens=48, rows=((4, 8), (4, 16)), prompts=6, candidates=3)
SAVE_STEPS = 4


def arguments():
    parser = argparse.ArgumentParser()
    parser.add_argument('directory', type=Path)
    parser.add_argument('--steps', type=int, default=16)
    parser.add_argument('--state', help='folder of the checkpoints, by default in directory')
    parser.add_argument('--sleep', type=float, default=0.0, help='seconds after every step')
    return parser.parse_args()


def model(config=plain.TINY):
    """A reward model, its data, and fixed random parameters: those that stay, those that learn."""
    rm = reward.RewardModel(Decoder(config), heads.Scalar(), lora_scale=2.0)
    tokens = plain.random_tokens([2, 3, 2, 2] * 5)
    pack = packing.Batches(tokens, SHAPE, 1, seed=0)(0)
    shapes = jax.eval_shape(rm.backbone.init, jax.random.key(0), pack)['params']
    adapter = jax.eval_shape(lambda key: lora.init(shapes, key, rank=2), jax.random.key(0))
    head = {'kernel': np.linspace(-0.5, 0.5, config.D, dtype=np.float32)[:, None]}
    trainable = {'lora': plain.random_tree(adapter, 1, 0.5), 'head': head}
    return rm, tokens, {'backbone': plain.random_tree(shapes)}, trainable


def counts(batches, steps):
    """Tokens and epochs after 0, 1, ... steps."""
    records = [b[b >= 0] for b in (batches(i).record_PB for i in range(steps))]
    tokens = [np.diff(batches.tokens.start)[r].sum() for r in records]
    prompts = np.cumsum([0, *map(len, records)])
    return np.cumsum([0, *tokens]), prompts / len(batches.tokens.prompt)


def head_sum(state):
    return jnp.abs(state.trainable['head']['kernel']).sum()


def named(tree):
    """{name: leaf on the host} of what any processes hold."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {sharding.leaf_name(path): processes.fetch(x) for path, x in leaves}


def first_steps(mesh, *, full, steps=5, tx=None, state=None):
    """(losses, gradient of the first step by leaf, state) of a run on 4 packs a step."""
    rm, tokens, frozen, trainable = model()
    if full:
        trainable, frozen = {'head': trainable['head'], **frozen}, {}
    # A trace without decay is the gradient; a large eps keeps rounding from turning into steps.
    tx = optax.chain(optax.trace(0.0), tx or train.adamw(0.01, weight_decay=0.1, eps=1e-4))
    losses, gradient = [], {}

    def keep(done, state, metrics):
        losses.append(float(metrics['loss']))
        if not gradient:
            gradient.update(named(state.opt[0].trace))

    state = train.fit(
        state or train.start(trainable, tx, mesh),
        frozen,
        packing.Batches(tokens, SHAPE, 4, seed=3),
        jax.random.key(4),
        objective=train.preference(rm.score),
        tx=tx,
        mesh=mesh,
        steps=steps,
        hooks=[(1, keep)],
    )
    return np.array(losses), gradient, state


def main():
    args = arguments()
    processes.join(os.environ)
    mesh = sharding.make_mesh(fsdp=-1, data=1)
    rm, tokens, frozen, trainable = model()
    schedule = train.schedule(0.05, args.steps, warmup=2)
    tx = train.adamw(schedule, weight_decay=0.1)
    batches = packing.Batches(tokens, SHAPE, sharding.data_parallel(mesh), seed=3)
    num_tokens, epoch = counts(batches, args.steps)
    run = {'steps': args.steps, 'data': resume.digest(tokens)}
    saved = args.state or args.directory / 'checkpoints'
    state = resume.restore(saved, train.start(trainable, tx, mesh), run=run)
    log = Log(
        args.directory,
        steps=args.steps,
        start=int(state.step),
        logging_steps=5,
        progress=lambda step: {'epoch': epoch[step], 'num_tokens': num_tokens[step]},
        schedule=schedule,
        console=Console(),
    )
    saver = resume.Saver(
        saved, steps=args.steps, every=SAVE_STEPS, keep=2, run=run, before=log.flush
    )
    evaluate = lambda done, state, _: log.write(done, {'eval_head': head_sum(state)})  # noqa: E731
    hooks = [(1, log), (1, lambda *_: time.sleep(args.sleep)), (SAVE_STEPS, evaluate), (1, saver)]
    with log, saver:
        state = train.fit(
            state,
            sharding.place(frozen, mesh),
            batches,
            jax.random.key(4),
            objective=train.preference(rm.score),
            tx=tx,
            mesh=mesh,
            steps=args.steps,
            hooks=hooks,
        )
    final = named(state)
    processes.alone(lambda: np.savez(args.directory / 'final.npz', **final))


if __name__ == '__main__':
    main()
