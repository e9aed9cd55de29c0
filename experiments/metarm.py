"""MetaRM (Secrets of RLHF II): what its step and others do to J, and to accuracy far away.

Run:     python -m experiments.pretrain
         python -m experiments.metarm               # what is missing, then the tables
         python -m experiments.metarm --only_table  # from experiments/results/metarm
Cost:    about an hour on two CPU cores, after the first line
Expect:  the table of MetaRM in BENCHMARKS.md

Pairs are of the training distribution, sets of five unlabelled answers of a policy that has moved
away. A cell is one kind of step at one eta: its seeds learn as members of one program. Held out
are pairs of the training distribution and sets of the other. `effect` is what one step does to J on
its own sets beside a plain one from the same weights, by the run's optimiser and by plain descent.
"""

import dataclasses
import time
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments import common, separation, shifted, stored
from jaxrm import members, meta, packing, sharding, tokens, train
from jaxrm.datasets import synthetic

RESULTS = Path(__file__).parent / 'results' / 'metarm'
Array = np.ndarray
GRID = {
    'vanilla': (0.0,),
    'published': (5e-6, 1e-2, 1e-1, 1.0, -1e-1, -1.0, 1e-6, 1e-5),  # below 0: down J, not up
    'keep theta prime': (5e-6, 1e-2, 1e-1),
    'joint': (0.1, 1.0),
    'second order': (0.1, 1.0),
    'Adam inside': (1e-3,),
}

DRAWN = (
    ('vanilla', 0.0), ('published', 0.1), ('published', 1.0), ('published', -1.0),
    ('keep theta prime', 0.01), ('joint', 0.1), ('second order', 0.1), ('second order', 1.0),
    ('Adam inside', 1e-3),
)  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(shifted.Learning):
    sets: int = 1000
    test_pairs: int = 400
    test_sets: int = 150
    policy: float = 1.0  # of the sets: how far it has moved, at most 1
    eval_steps: int = 25
    effect_steps: int = 10
    variants: tuple[str, ...] = ()  # by default all
    results: Path = RESULTS
    only_table: bool = False


class World(NamedTuple):
    """What all cells have in common."""

    start: shifted.Start
    sets: list[packing.Batches]  # of each member
    pairs: tuple[tokens.Tokens, Array]  # held out, and what answers are worth
    held: tuple[tokens.Tokens, Array]


def world(c: Config) -> World:
    """The start, sets to learn from, and what is held out."""
    s = shifted.start(c)

    def made(n: int, **options: Any) -> tuple[tokens.Tokens, Array]:
        records = synthetic.preferences(n, seed=1, labels='gold', **options)
        records = [record for record in records if len(set(record.ranks)) > 1]
        of = shifted.encoded(records, s.tokenizer)
        return of, shifted.gold(records, of)

    moved = {'candidates': c.candidates, 'policy': c.policy}
    sets = meta.unlabelled(made(c.sets, **moved)[0])
    several = shifted.batches(sets, c.set_batch_size, s.rm.backbone.config.D, s.mesh)
    return World(
        s, [several.reordered(seed) for seed in c.seeds], made(c.test_pairs, split='test'),
        made(c.test_sets, split='test', **moved),
    )  # fmt: skip


# A cell


def measures(w: World, params_E: Any) -> dict[str, Array]:
    """[E, n] of the held-out records."""
    pair_Ec, set_Ec = (shifted.scores(w.start, params_E, of) for of, _ in (w.pairs, w.held))
    scale_E = set_Ec.std(1, keepdims=True)
    return {
        'J': shifted.apart(set_Ec, w.held[0]),
        'J scaled': shifted.apart(set_Ec / scale_E, w.held[0]),
        'spread': np.broadcast_to(scale_E, (len(set_Ec), len(w.held[0].prompt))),
        'accuracy': shifted.right(pair_Ec, w.pairs[1], w.pairs[0]),
        'shifted accuracy': shifted.right(set_Ec, w.held[1], w.held[0]),
    }


def effects(c: Config, w: World, variant: str, eta: float) -> Any:
    """A hook that keeps what the step after the present one is going to do, and its list."""
    s, source, steps = w.start, shifted.stream(c, w.start, w.sets), len(w.start.pairs[0])
    given = {'objective': train.preference(s.rm.score), 'spread': meta.spread(s.rm.score)}
    given |= {'dtype': s.rm.backbone.dtype, **shifted.VARIANTS[variant]}
    adam, descent = shifted.optimiser(c, steps), optax.sgd(1e-2)

    @jax.jit
    def both(state, batch, key_E, eta):
        def one(mine, batch, key):
            at = train.State(state.step, *mine)
            by = {'Adam': (at, adam), 'descent': (at._replace(opt=descent.init(mine[0])), descent)}
            return {
                name: meta.effect(at, {}, batch, key, tx=tx, eta=eta, **given)
                for name, (at, tx) in by.items()
            }

        return jax.vmap(one, in_axes=(0, 1, 0))(state[1:], batch, key_E)

    found: list[dict[str, Any]] = []

    def hook(done: int, state: train.State, metrics: train.Metrics) -> None:
        if done == steps:
            return
        batch = sharding.place_batch(source(done).of, s.mesh)
        with jax.set_mesh(s.mesh):
            found.append(both(state, batch, members.keys(c.seeds), jnp.float32(eta)))

    return found, hook


def cell(c: Config, w: World, variant: str, eta: float) -> dict[str, Any]:
    """Everything about one kind of step at one eta."""
    began, said = time.time(), list[Any]()
    curves: dict[str, list[Any]] = {'step': []}

    def look(done: int, state: train.State, metrics: train.Metrics) -> None:
        curves['step'].append(done)
        for name, x_En in measures(w, state.trainable).items():
            curves.setdefault(name, []).append(shifted.rounded(x_En.mean(1)))

    hooks: list[train.Hook] = [(1, lambda done, state, m: said.append(m)), (c.eval_steps, look)]
    watched = variant in ('published', 'second order', 'Adam inside')
    seen, hook = effects(c, w, variant, eta) if watched else ([], None)
    hooks += [(c.effect_steps, hook)] if hook else []
    params_E = shifted.learn(c, w.start, variant, eta, w.sets, hooks)
    found = {name: shifted.rounded(x_En) for name, x_En in measures(w, params_E).items()}
    found['spread'] = [x_n[0] for x_n in found['spread']]
    names = ['loss', 'spread', 'cosine', 'inner_step', 'inner_unmoved', 'grad_norm']
    out = {'held out': found, 'curves': curves}
    out['train'] = {
        name: shifted.rounded(np.mean([m[name] for m in said], 0))
        for name in names
        if name in said[0]
    }
    out['effect'] = {
        name: {
            who: [[float(x) for x in getattr(e[name], who)] for e in seen]
            for who in ('ours', 'plain')
        }
        for name in (seen[0] if seen else ())
    }
    return {**out, 'seconds': round(time.time() - began, 1)}


# Tables


def path(c: Config, variant: str, eta: float) -> Path:
    return c.results / f'{variant.replace(" ", "_")}-{eta:g}.json'


def read(c: Config) -> dict[tuple[str, float], dict[str, Any]]:
    """The cells that there are."""
    found = {key: stored.read(path(c, *key), stored.flags(c)) for key in grid(c)}
    return {key: cell for key, cell in found.items() if cell}


def grid(c: Config) -> list[tuple[str, float]]:
    return [(variant, eta) for variant in c.variants or GRID for eta in GRID[variant]]


def held(cell: dict[str, Any], name: str) -> Array:
    """[E, n] of the held-out records."""
    return np.array(cell['held out'][name])


def table(c: Config) -> None:
    """What was held out, beside vanilla; and what the inner step was."""
    found = read(c)
    base, rows = found.get(('vanilla', 0.0)), {}
    for (variant, eta), cell in found.items():
        row = []
        for name in ('J', 'J scaled', 'accuracy', 'shifted accuracy'):
            x_En = held(cell, name)
            row.append(str(separation.crossed(x_En)))
            if base and variant != 'vanilla':
                row[-1] += f'; {separation.points(x_En - held(base, name))}'
        row.append(f'{np.mean(cell["held out"]["spread"]):.2f}')
        step_E = cell['train'].get('inner_step')
        row.append(f'{np.mean(step_E):.1e}' if step_E else '')
        rows[variant if variant == 'vanilla' else f'{variant}, {eta:g}'] = row
    columns = ['J; over vanilla', 'J scaled', 'accuracy', 'shifted accuracy', 'std', 'inner step']
    common.table(f'MetaRM, {len(c.seeds)} seeds', rows, columns, paste=True)


def signs(c: Config) -> None:
    """How often a step gained less J than a plain one would have, and how much less."""
    rows = {}
    for (variant, eta), cell in read(c).items():
        row = []
        for of in cell['effect'].values():
            ours_SE, plain_SE = np.array(of['ours']), np.array(of['plain'])
            gap_SE = ours_SE - plain_SE
            less = (gap_SE < 0).mean()
            row += [f'{less:.2f}', f'{gap_SE.mean():+.1e}', f'{np.abs(plain_SE).mean():.1e}']
        if row:
            rows[f'{variant}, {eta:g}'] = row
    each = ['lower', 'mean gap', 'plain, size']
    columns = [f'{name}, {by}' for by in ('Adam', 'descent') for name in each]
    common.table('J after one step, less that after a plain one', rows, columns, paste=True)


def picture(c: Config) -> None:
    """J and accuracies while the members learn."""
    of = {key: cell['curves'] for key, cell in read(c).items() if key in DRAWN}
    panels = {
        name: {f'{variant} {eta:g}': (x['step'], x[name]) for (variant, eta), x in of.items()}
        for name in ('J', 'J scaled', 'accuracy', 'shifted accuracy')
    }
    shifted.lines(panels, c.results / 'curves.png', xlabel='step')


def main(c: Config) -> None:
    """Learn what is missing, then print and draw."""
    todo = [] if c.only_table else [key for key in grid(c) if not path(c, *key).exists()]
    w = world(c) if todo else None
    for key in todo:
        made = cell(c, w, *key)
        common.write_json(path(c, *key), {'flags': stored.flags(c), **made})
        common.console.print(f'{key}: {made["seconds"]} s')
    table(c)
    signs(c)
    picture(c)


if __name__ == '__main__':
    common.launch(Config, main)
