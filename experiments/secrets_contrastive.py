"""Contrastive losses beside the comparison: what they do to the features of a reward model.

Run:     python -m experiments.pretrain
         python -m experiments.secrets_contrastive               # what is missing, then the tables
         python -m experiments.secrets_contrastive --only_table  # from experiments/results/
Cost:    about 20 minutes on two CPU cores, after the first line
Expect:  the tables of contrastive losses in BENCHMARKS.md

Pairs of the synthetic world with gold labels, of which each seed has its own and turns its own
share round. A cell is one method at one share: its seeds learn as members of one program. Packs
repeat the prompt for each answer, also where nothing is dropped, so that all methods see the same
batches. `dropout` is one view with dropout, and `two views` two that nothing contrasts: what is to
be beaten. After a method stands another beta than the paper's; `warm` is a temperature of 0.5.
"""

import dataclasses
import functools
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from experiments import common, devices, labelling, separation, stored
from jaxrm import (
    contrastive,
    members,
    packing,
    report,
    shapes,
    sharding,
    tokens,
    train,
    tree,
    views,
)
from jaxrm.datasets import synthetic

METRICS = ('loss', 'rm_loss', 'contrastive_loss', 'feature_variance', 'view_cosine', 'item_cosine')


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(devices.Devices):
    model_name_or_path: str = 'runs/pretrain/model'  # the decoder to start from
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    cells: tuple[str, ...] = ('random-0.2', 'random-0')  # kinds and shares of wrong labels
    pairs: int = 2000
    test_pairs: int = 800
    categories: tuple[str, ...] = ('arithmetic', 'rewrite', 'ordering')
    learning_rate: float = 2e-3
    num_train_epochs: int = 2
    train_batch_size: int = 16  # mean number of pairs in a step
    warmup_steps: int = 20
    max_length: int = 96  # longer pairs are left out, but for those of another policy
    dropout: float = 0.05
    temperature: float = 0.05  # of SimCSE
    swav_temperature: float = 0.1
    epsilon: float = 0.05  # of Sinkhorn-Knopp
    iterations: int = 3
    prototype_rate: float = 1.0  # times the learning rate
    results: Path = labelling.RESULTS / 'secrets_contrastive'
    only_table: bool = False


class Contrast(NamedTuple):
    """What is contrasted, by which loss, with which weight; K prototypes where there are some."""

    loss: str
    items: Callable[..., Any] = contrastive.responses
    beta: float = 0.0
    prototypes: int = 0
    temperature: float | None = None  # by default the flag's


METHODS = {
    'baseline': None,
    'dropout': None,
    'two views': Contrast('simcse'),
    'SimCSE': Contrast('simcse', beta=1.0),
    'SimCSE-diff': Contrast('simcse', contrastive.differences, 1.0),
    'SimCSE 0.1': Contrast('simcse', beta=0.1),
    'SimCSE 0.01': Contrast('simcse', beta=0.01),
    'SimCSE-diff 0.1': Contrast('simcse', contrastive.differences, 0.1),
    'SimCSE warm': Contrast('simcse', beta=1.0, temperature=0.5),
    'SwAV': Contrast('swav', beta=0.1, prototypes=50),
    'SwAV-diff': Contrast('swav', contrastive.differences, 0.5, 20),
}


class World(NamedTuple):
    """What all cells have in common."""

    base: labelling.Base
    learn: list[tokens.Tokens]  # of each seed, the better answer first, prompts repeated
    test: dict[str, tokens.Tokens]


def world(c: Config) -> World:
    """The model to start from, and pairs of the world."""
    b = labelling.base(c)
    pairs = functools.partial(labelling.pairs, c, b)
    of = {'seed': 0, 'split': 'test', 'labels': 'gold', 'categories': c.categories}
    moved = synthetic.preferences(c.test_pairs, policy=1.0, **of)
    moved = [record for record in moved if record.ranks == (0, 1)]
    test = {
        'gold': pairs(c.test_pairs, seed=0, split='test'),
        'shifted': tokens.encode(moved, b.tokenizer).tokens,
    }
    own = [tokens.unshare(pairs(c.pairs, seed=seed, split='train')) for seed in c.seeds]
    return World(b, own, test)


# A cell


def objective(c: Config, w: World, method: str) -> train.Objective:
    """What a method learns by."""
    of, rm = METHODS[method], w.base.rm
    if of is None:
        return train.preference(rm.score, dropout=c.dropout if method == 'dropout' else 0.0)
    of_swav = {'epsilon': c.epsilon, 'iterations': c.iterations, 'temperature': c.swav_temperature}
    options = of_swav if of.prototypes else {'temperature': of.temperature or c.temperature}
    contrast = functools.partial(getattr(contrastive, of.loss), **options)
    return views.preference(rm, contrast, items=of.items, beta=of.beta, dropout=c.dropout)


def batches(c: Config, w: World, name: str) -> list[packing.Batches]:
    """Of each seed, with those of its labels wrong that a cell's name says."""
    packs, D = sharding.data_parallel(w.base.mesh), w.base.rm.backbone.config.D
    size = int(np.diff(w.learn[0].start).mean() * c.train_batch_size / packs)
    shape, out = shapes.fit(w.learn[0], size=size, width=D, multiple=16), []
    for seed, of in zip(c.seeds, w.learn, strict=True):
        noisy = labelling.noisy(of, labelling.turned(of, name, seed))
        out.append(packing.Batches(noisy, shape, packs, seed=seed, epochs=c.num_train_epochs))
    return out


def start(w: World, method: str, seed: int) -> tree.Tree:
    """A member: the decoder, and what it has of its own."""
    D, (head, prototypes) = w.base.rm.backbone.config.D, jax.random.split(jax.random.key(seed))
    out = {'backbone': w.base.backbone, 'head': w.base.rm.init_head(head, D)}
    of = METHODS[method]
    if of and of.prototypes:
        out['prototypes'] = views.init_prototypes(prototypes, D, of.prototypes)
    return out


def learned(c: Config, w: World, method: str, name: str) -> tuple[tree.Tree, dict[str, Any]]:
    """What the members became, and their metrics in the last epoch."""
    of, each = METHODS[method], batches(c, w, name)
    steps = min(map(len, each))
    tx = train.adamw(train.schedule(c.learning_rate, steps, warmup=c.warmup_steps, kind='cosine'))
    tx = views.on_sphere(tx, rate=c.prototype_rate) if of and of.prototypes else tx
    seen: list[train.Metrics] = []
    state = train.fit(
        members.start(members.stack([start(w, method, seed) for seed in c.seeds]), tx, w.base.mesh),
        {}, members.Batches(each), members.keys(c.seeds), objective=objective(c, w, method),
        tx=tx, mesh=w.base.mesh, steps=steps, step=members.step,
        hooks=[(1, lambda done, state, metrics: seen.append(metrics))],
    )  # fmt: skip
    last = seen[-(steps // c.num_train_epochs) :]
    names = [name for name in METRICS if name in last[0]]
    return state.trainable, {k: labelling.rounded(np.mean([m[k] for m in last], 0)) for k in names}


def made(c: Config, w: World, method: str, name: str) -> dict[str, Any]:
    """Everything about one method on a cell's labels."""
    began, mesh, rm = time.time(), w.base.mesh, w.base.rm
    params_E, trained = learned(c, w, method, name)
    out: dict[str, Any] = {'train': {**trained, 'seconds': round(time.time() - began, 1)}}
    head_ED = np.asarray(params_E['head']['kernel'])[..., 0]
    learnt_E = {k: params_E[k] for k in ('backbone', 'head')}
    forward = jax.jit(members.scored(lambda p, pack: rm.features(p, pack).answer_BMD))
    for test, of in w.test.items():
        shape, packs = labelling.fitting(w.base, [of]), sharding.data_parallel(mesh)
        z_EcD = members.scores(forward, {}, learnt_E, of, shape, mesh=mesh, packs=packs)
        score_Ec = np.einsum('ecd,ed->ec', z_EcD, head_ED)
        out[test] = {
            'right': list(map(separation.digits, score_Ec[:, 0::2] > score_Ec[:, 1::2])),
            'probe': [separation.digits(separation.probe(z_cD)) for z_cD in z_EcD],
            'silhouette': labelling.rounded([separation.silhouette(z_cD) for z_cD in z_EcD]),
            'plane': labelling.rounded(separation.plane(z_EcD[0])[:600], 2),
        }
    return out


# Tables


def path(c: Config, method: str, name: str) -> Path:
    return c.results / f'{name}-{method.replace(" ", "_")}.json'


def read(c: Config, name: str) -> dict[str, dict[str, Any]]:
    """What there is of a cell, by method."""
    found = {method: stored.read(path(c, method, name), stored.flags(c)) for method in METHODS}
    return {method: x for method, x in found.items() if x}


def right(found: dict[str, Any], test: str, what: str) -> np.ndarray:
    """[E, n] 0 to 1; of the probe the two answers of a prompt together."""
    x_En = separation.of_digits(found[test][what])
    return x_En.reshape(len(x_En), -1, 2).mean(-1) if what == 'probe' else x_En


def table(c: Config, name: str) -> None:
    """Accuracy and separation, and what is above or below two views without a contrast."""
    found, rows = read(c, name), {}
    for method, x in found.items():
        row: list[Any] = []
        for test, what in (('gold', 'right'), ('shifted', 'right'), ('gold', 'probe')):
            x_En = right(x, test, what)
            row.append(str(separation.crossed(x_En)))
            if 'two views' in found and method != 'two views':
                gap_En = x_En - right(found['two views'], test, what)
                row[-1] += f'; {separation.points(gap_En)}'
        s_E, item_E = x['gold']['silhouette'], x['train'].get('item_cosine')
        row.append(f'{np.mean(s_E):.3f} ({min(s_E):.3f} to {max(s_E):.3f})')
        rows[method] = [*row, f'{np.mean(item_E):.2f}' if item_E else '']
    columns = ['gold; over two views', 'shifted', 'probe', 'silhouette', 'item cosine']
    common.table(name, rows, columns, paste=True)


def picture(c: Config, name: str) -> None:
    """The features of the first seed in the plane where they vary most."""
    found = read(c, name)
    if {'baseline', 'SimCSE'} <= found.keys():
        planes = {k: np.array(found[k]['gold']['plane']) for k in ('baseline', 'SimCSE')}
        groups = {k: {'chosen': x[0::2], 'rejected': x[1::2]} for k, x in planes.items()}
        report.planes(groups, c.results / f'features-{name}.png')


def main(c: Config) -> None:
    """Learn what is missing, then print and draw."""
    every = [(method, name) for name in c.cells for method in METHODS]
    todo = [] if c.only_table else [x for x in every if not path(c, *x).exists()]
    w = world(c) if todo else None
    for method, name in todo:
        found = {'flags': stored.flags(c), **made(c, w, method, name)}
        common.write_json(path(c, method, name), found)
        common.console.print(f'{method}, {name}: {found["train"]["seconds"]} s')
    for name in c.cells:
        table(c, name)
        picture(c, name)


if __name__ == '__main__':
    common.launch(Config, main)
