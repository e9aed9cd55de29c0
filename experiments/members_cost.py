"""What several models of one program cost beside as many steps of one: time, bytes, FLOPs.

Run:     python -m experiments.members_cost
Cost:    a few minutes on two CPU cores
Expect:  the table on members in BENCHMARKS.md

Rounds of all programs take turns in one process, so that others' work on the machine falls on all.
Ratios are medians over rounds with their quartiles, and of the fastest rounds. `adapters` are LoRA
adapters and heads on one frozen decoder, `full` whole models, `heads` linear heads on features that
stay on the device. A cell that is there is not measured again.
"""

import dataclasses
import functools
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from experiments import common, devices
from jaxrm import (
    features,
    flops,
    heads,
    members,
    packing,
    reward,
    shapes,
    sharding,
    tokens,
    train,
    tree,
)
from jaxrm.datasets import synthetic

KINDS = ('adapters', 'full', 'heads')
TX = train.adamw(1e-3, weight_decay=0.1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(devices.Devices):
    results: Path = Path('experiments/results/members_cost')
    members: tuple[int, ...] = (5, 10)
    pairs: int = 2000
    tokens: tuple[int, ...] = (512, 2048)  # of a pack, which is a step
    prompts: int = 32  # in a step of a head
    hidden_size: int = 64
    rounds: int = 20
    only_table: bool = False


class Task(NamedTuple):
    """What one model learns."""

    trainable: tree.Tree
    frozen: tree.Tree
    objective: train.Objective
    batches: Callable[[int], Callable[[int], Any]]  # of a member


def decoder(c: Config, kind: str, size: int) -> Task:
    """A model from scratch on packs of the synthetic world."""
    records = synthetic.preferences(c.pairs, seed=0)
    options = common.Model(use_peft=kind == 'adapters', hidden_size=c.hidden_size)
    start = common.start(options, common.texts(records), mesh=devices.mesh(c), seed=0)
    encoded = tokens.encode(records, start.like.tokenizer, max_length=96).tokens
    shape = shapes.fit(encoded, size=size, width=c.hidden_size, multiple=16)
    packs = packing.Batches(encoded, shape, sharding.data_parallel(devices.mesh(c)), seed=0)
    objective = train.preference(start.rm.score)
    return Task(start.trainable, start.frozen, objective, packs.reordered)


def head(c: Config) -> Task:
    """A linear head on random features, which take as long as others."""
    rng = np.random.default_rng(0)
    draw = lambda n: rng.normal(size=(n, c.hidden_size)).astype(np.float32)  # noqa: E731
    records = synthetic.preferences(c.pairs, seed=0)
    tokenizer = common.train_tokenizer(common.texts(records), 1024)
    encoded = tokens.encode(records, tokenizer).tokens
    of = features.Cached(draw(len(encoded.length)), draw(len(encoded.prompt)))
    rm = reward.RewardModel(None, heads.Scalar())
    objective = train.preference(features.scored(rm.rewards))
    mesh = devices.mesh(c)
    size = {'packs': sharding.data_parallel(mesh), 'prompts': c.prompts, 'epochs': True}
    batches = lambda seed: features.Batches(None, encoded, seed=seed, **size)  # noqa: E731
    trainable = {'head': rm.init_head(jax.random.key(0), c.hidden_size)}
    return Task(trainable, {'features': of}, objective, batches)


class Way(NamedTuple):
    """What goes into a step of several members at once, of several in turn, or of one."""

    state: train.State
    batches: Callable[[int], Any]
    key: jax.Array
    step: train.Step
    frozen: tree.Tree


def way(task: Task, mesh: Any, how: str | None, count: int) -> Way:
    """`how` is that of members.step; None for one alone."""
    keys, each = members.keys(range(count)), [task.batches(e) for e in range(count)]
    frozen = sharding.place(task.frozen, mesh)
    options: Any = {'objective': task.objective, 'tx': TX}
    if how is None:
        state, step = (
            train.start(task.trainable, TX, mesh),
            functools.partial(train.step, **options),
        )
        return Way(state, each[0], keys[0], step, frozen)
    state = members.start(members.stack([task.trainable] * count), TX, mesh)
    step = functools.partial(members.step, how=how, **options)
    return Way(state, members.Batches(each), keys, step, frozen)


def program(w: Way, mesh: Any) -> tuple[Callable[[], Any], dict[str, int]]:
    """A call that makes a step, and what its program is like."""
    batch = w.batches(0)
    placed, at = sharding.place_batch(batch, mesh), [w.state]
    with jax.set_mesh(mesh):
        update = train.jitted(w.state, mesh, step=w.step)
        compiled = update.lower(w.state, w.frozen, placed, w.key).compile()
    memory = compiled.memory_analysis()

    def advance() -> Any:
        at[0], _ = compiled(at[0], w.frozen, placed, w.key)
        return at[0]

    return advance, {
        'argument_bytes': memory.argument_size_in_bytes,
        'temp_bytes': memory.temp_size_in_bytes,
        'state_bytes': sum(x.nbytes for x in jax.tree.leaves(w.state)),
        'frozen_bytes': sum(x.nbytes for x in jax.tree.leaves(w.frozen)),
        'flops': flops.count(w.step, w.state, w.frozen, batch, w.key),
    }


def clock() -> tuple[float, float]:
    return time.perf_counter(), time.process_time()


def loop(c: Config, task: Task, mesh: Any, how: str | None, count: int) -> list[float]:
    """Wall and CPU seconds of a step in the whole loop, making of batches included."""
    w, at, every = way(task, mesh, how, count), [], 100
    note = lambda done, state, metrics: at.append((jax.block_until_ready(state), clock())[1])  # noqa: E731
    train.fit(
        w.state, w.frozen, w.batches, w.key, objective=task.objective, tx=TX, mesh=mesh,
        steps=3 * every, step=w.step, hooks=[(every, note)],
    )  # fmt: skip
    return (np.subtract(at[2], at[0]) / (2 * every)).tolist()


def measure(c: Config, kind: str, task: Task, count: int) -> dict[str, Any]:
    """Wall and CPU seconds of each round, and bytes, by program: `one` is so many single steps."""
    mesh = devices.mesh(c)
    ways = {'one': None, 'vmap': 'vmap', 'scan': 'scan'}
    made = {name: program(way(task, mesh, how, count), mesh) for name, how in ways.items()}
    spent: dict[str, list[Any]] = {name: [] for name in made}
    for _ in range(c.rounds + 2):  # the first ones warm up
        for name, (advance, _) in made.items():
            start = clock()
            for _ in range(count if name == 'one' else 1):
                state = advance()
            jax.block_until_ready(state)
            spent[name].append(np.subtract(clock(), start).tolist())
    out = {name: {**about, 'seconds': spent[name][2:]} for name, (_, about) in made.items()}
    for _ in range(c.rounds if kind == 'heads' else 0):
        for name, how in ways.items():
            out[name].setdefault('loop', []).append(loop(c, task, mesh, how, count))
    return out


def row(count: int, found: dict[str, Any]) -> list[str]:
    """Ratios of members to so many steps of one, each way."""
    one, out = found['one'], []
    for way in ('vmap', 'scan'):
        wall, single = (np.array(x['seconds'])[:, 0] for x in (found[way], one))
        low, mid, high = np.quantile(wall / single, (0.25, 0.5, 0.75))
        temp = found[way]['temp_bytes'] / one['temp_bytes'] / count
        work = found[way]['flops'] / one['flops'] / count
        fastest = wall.min() / single.min()
        out += [f'{mid:.2f} ({low:.2f} to {high:.2f})', f'{fastest:.2f}', f'{temp:.2f}']
        assert work == 1
    for way in ('vmap', 'scan') if 'loop' in one else ():
        wall, single = (np.array(x['loop'])[:, 0] for x in (found[way], one))
        mid, fastest = np.median(wall / single), wall.min() / single.min()
        text = f'{mid:.2f} times one step in the loop, fastest {fastest:.2f}'
        common.console.print(f'{count} {way}: {text}')
    more = found['vmap']['argument_bytes'] - one['argument_bytes']
    mega = lambda n: f'{n / 2**20:.2f}'  # noqa: E731
    return [*out, mega(one['frozen_bytes']), mega(one['state_bytes']), mega(more / (count - 1))]


COLUMNS = (
    *('vmap: time / M steps', 'fastest', 'temp / M'),
    *('scan: time / M steps', 'fastest', 'temp / M'),
    *('MiB frozen', 'a state', 'a member more'),
)


def main(c: Config) -> None:
    """Measures the cells that are not there, and prints the table."""
    rows = {}
    for kind in KINDS:
        for size in c.tokens if kind != 'heads' else (c.prompts,):
            task = functools.cache(
                lambda k=kind, n=size: head(c) if k == 'heads' else decoder(c, k, n)
            )
            for count in c.members:
                path = c.results / f'{kind}-{size}-{count}.json'
                if not path.exists() and not c.only_table:
                    common.write_json(path, measure(c, kind, task(), count))
                if path.exists():
                    found = json.loads(path.read_text())
                    rows[f'{kind}, {size} a step, M = {count}'] = row(count, found)
    common.table('members of one program', rows, COLUMNS, paste=True)


if __name__ == '__main__':
    common.launch(Config, main)
