"""Exact counts on any machine: FLOPs at Llama 3 8B against what has to be done, and programs.

Run:     python -m experiments.bench_counts
Cost:    a minute on two CPU cores, most of it fitting pack shapes
Expect:  the tables on FLOPs and on programs in BENCHMARKS.md; JSON in --output_dir

FLOPs are read from traced programs; the other side of every ratio is the closed form of
`jaxrm.costs`. *Waste* is the program over the real tokens, each once; *of the shape* is the
program over the slots of its packs, used or not, so that it is 1 when nothing else is computed.
*Sharing* is packs with repeated prompts over shared ones, beside the tokens of all rows over those
of the streams. Padded batches are random ones, each padded to its longest row.
"""

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from experiments import bench, common
from jaxrm import costs, flops, members, packing, sharding, tokens, train
from jaxrm.backbones import attention
from jaxrm.tokens import Tokens

STEPS = {
    'lora': costs.Method('adapter', rank=16, remat='none'),
    'full': costs.Method('everything', rank=0, remat='none'),
}
EXPERTS = 5
BATCHES = 8, 16, 64  # pairs, where they are padded


@dataclasses.dataclass(frozen=True)
class Config:
    output_dir: Path = Path('runs/bench')
    model: bench.ModelName = 'llama-3-8b'
    profiles: tuple[bench.ProfileName, ...] = tuple(bench.PROFILES)


# FLOPs


@functools.cache
def programs(name: str) -> dict[str, Callable[[Any], int]]:
    """FLOPs of programs at a model's sizes, as functions of a pack."""
    c = bench.MODELS[name]
    w = bench.parameters(c, STEPS['lora'].rank, jnp.bfloat16)
    key = jax.eval_shape(lambda: jax.random.key(0))
    rm = bench.model(c, jnp.bfloat16, flops.row_attention)
    step = functools.partial(train.gradients, train.preference(rm.score))
    base, head, adapter = ({part: w[part]} for part in ('backbone', 'head', 'lora'))
    return {
        'score': lambda pack: flops.count(rm.score, base | head, pack),
        'lora': lambda pack: flops.count(step, adapter | head, base, pack, key),
        'full': lambda pack: flops.count(step, base | head, {}, pack, key),
    }


def counts(
    profile: str, model: str = 'llama-3-8b', steps: tuple[str, ...] = ('lora', 'full')
) -> dict[str, Any]:
    """Ratios of one profile, of scoring and of these steps, and the shape of its packs."""
    p, c, of = bench.PROFILES[profile], bench.MODELS[model], programs(model)
    t = bench.data(p, vocabulary=c.V)
    shape, packs = bench.packed(t, p.size)
    pack, load = bench.shapes_of(packing.fill(t, packs[:1], shape)), costs.of_shape(shape)
    forward = lambda load: costs.forward(c, load).total  # noqa: E731
    score = of['score'](pack)
    epoch = len(packs) * score
    wide, repeated = bench.packed(tokens.unshare(t), p.size)
    padded = {batch: bench.of_rows(bench.padded(t, batch)) for batch in BATCHES}
    return {
        'shape': shape,
        'packs': len(packs),
        'fill': len(t.ids) / len(packs) / shape.tokens,
        'waste': epoch / forward(costs.of_tokens(t)),
        'sharing': len(repeated) * forward(costs.of_shape(wide)) / epoch,
        'sharing_theory': float(packing.row_lengths(t).sum() / len(t.ids)),
        'padded_over_packed': {batch: forward(load) / epoch for batch, load in padded.items()},
        'score_of_shape': score / forward(load),
        **{f'{s}_of_shape': of[s](pack) / costs.step(c, load, STEPS[s]).total for s in steps},
    }


COLUMNS = {
    'waste': 'waste',
    'fill': 'fill',
    'sharing': 'sharing',
    'score_of_shape': 'scoring, of the shape',
    'lora_of_shape': 'LoRA step, of the shape',
    'full_of_shape': 'full step, of the shape',
}


def row(found: dict[str, Any]) -> list[str]:
    """One profile's cells."""
    digits = {'score_of_shape': 5, 'lora_of_shape': 5, 'full_of_shape': 5}
    cells = [f'{found[name]:.{digits.get(name, 3)}f}' for name in COLUMNS]
    of = found['sharing'] / found['sharing_theory']
    padded = ' / '.join(f'{x:.2f}' for x in found['padded_over_packed'].values())
    return [*cells[:3], f'{of:.3f}', *cells[3:], padded]


HEADER = ('waste', 'fill', 'sharing', 'of theory', *list(COLUMNS.values())[3:],
          'padded in batches of 8 / 16 / 64')  # fmt: skip


# Programs that run here


def tiny() -> tuple[bench.Config, Any, dict[str, Any], Tokens, packing.Shape]:
    """A small model with its weights, records of many lengths, and a pack shape for them."""
    c = bench.MODELS['tiny']
    rm = bench.model(c, jnp.float32, attention.xla)
    w = bench.drawn(bench.parameters(c, 4))
    t = bench.data(bench.Profile((20, 12), (10, 6), 2, 256, 100), vocabulary=c.V)
    longest = -(-int(packing.row_lengths(t).max()) // 16) * 16
    return c, rm, w, t, packing.Shape(256, ((14, longest),), 10, 2)


TX = train.adamw(1e-3)


def compilations() -> dict[str, Any]:
    """Programs compiled up to each step of three epochs, and how many packs of a step are used."""
    _, rm, w, t, shape = tiny()
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    learns = {part: w[part] for part in ('lora', 'head')}
    state, seen, by_step = train.start(learns, TX, mesh), [0], []

    def note(event: str, duration: float, **about: Any) -> None:
        seen[0] += event == '/jax/core/compile/backend_compile_duration'

    jax.monitoring.register_event_duration_secs_listener(note)
    batches = packing.Batches(t, shape, 4, seed=0, epochs=3)
    filled = [(batches(i).record_PB >= 0).any(1).sum().item() for i in range(len(batches))]
    seen[0] = 0
    train.fit(
        state, {'backbone': w['backbone']}, batches, jax.random.key(0), tx=TX, mesh=mesh,
        objective=train.preference(rm.score), steps=len(batches),
        hooks=[(1, lambda done, state, metrics: by_step.append(seen[0]))],
    )  # fmt: skip
    return {'by_step': by_step, 'packs': filled}


def _ways(rm: Any, w: dict[str, Any], count: int) -> dict[str, tuple[Any, dict, Any, Any]]:
    """(state, frozen, key, step) of one adapter, of several, and of everything."""
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    options: dict[str, Any] = {'objective': train.preference(rm.score), 'tx': TX}
    one = functools.partial(train.step, **options)
    base, learns = {'backbone': w['backbone']}, {part: w[part] for part in ('lora', 'head')}
    of_all = members.start(members.stack([learns] * count), TX, mesh)
    every = functools.partial(members.step, how='vmap', **options)
    key, keys = jax.random.key(0), members.keys(range(count))
    return {
        'LoRA step': (train.start(learns, TX, mesh), base, key, one),
        f'LoRA step of {count} experts': (of_all, base, keys, every),
        'full step': (train.start(learns | base, TX, mesh), {}, key, one),
    }


def nbytes(*values: Any) -> int:
    """Bytes of all arrays in trees."""
    return sum(x.nbytes for x in jax.tree.leaves(values))


def compiled(count: int = EXPERTS) -> dict[str, dict[str, int]]:
    """Bytes of small programs as they are compiled here; `alias` is what they take in place."""
    _, rm, w, t, shape = tiny()
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    batches = packing.Batches(t, shape, 1, seed=0)
    out = {}
    for name, (state, frozen, key, step) in _ways(rm, w, count).items():
        several = key.shape != ()
        batch = members.Batches([batches] * count)(0) if several else batches(0)
        made = train.jitted(state, mesh, step=step).lower(state, frozen, batch, key).compile()
        memory = made.memory_analysis()
        out[name] = {
            'arguments': memory.argument_size_in_bytes,
            'state': nbytes(state),
            'frozen': nbytes(frozen),
            'batch': nbytes(batch),
            'alias': memory.alias_size_in_bytes,
            'outputs': memory.output_size_in_bytes,
            'temp': memory.temp_size_in_bytes,
        }
    return out


def main(c: Config) -> None:
    """Prints both tables and writes what they are made of."""
    found = {name: counts(name, c.model) for name in c.profiles}
    common.table(
        f'{c.model}: FLOPs', {name: row(x) for name, x in found.items()}, HEADER, paste=True
    )
    steps, made = compilations(), compiled()
    last = steps['by_step'][-1]
    common.console.print(
        f'{len(steps["by_step"])} steps of three epochs: {steps["by_step"][0]} programs up '
        f'to the first were compiled, {last - steps["by_step"][1]} after the second'
    )
    rows = {name: list(x.values()) for name, x in made.items()}
    common.table('bytes of small programs', rows, list(next(iter(made.values()))), paste=True)
    whole = {'machine': bench.machine(), 'flops': found, 'compilations': steps, 'bytes': made}
    bench.write(c.output_dir / 'counts.json', whole)


if __name__ == '__main__':
    common.launch(Config, main)
