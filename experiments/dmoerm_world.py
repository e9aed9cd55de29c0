"""DMoERM on the synthetic world: what its layers are worth, beside ensembles, on noisy labels.

Run:     python -m experiments.pretrain
         python -m experiments.dmoerm_world               # what is missing, then the tables
         python -m experiments.dmoerm_world --only_table  # from experiments/results/
Cost:    about 30 minutes on two CPU cores, after the first line
Expect:  the tables of DMoERM in BENCHMARKS.md

Three categories with three capabilities each, of which two conflict. Human labels are sampled, and
a share of them turned round; capability labels come from a stand-in judge. A cell is one way to
train and one share; all seeds of a cell learn in one program, by one schedule of the longest
lesson: a model with fewer pairs stops before the learning rate has come down. Accuracy is on pairs
of common held-out prompts, by the true order.
"""

import dataclasses
import functools
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from experiments import common, devices, dmoerm, dmoerm_arms, dmoerm_samples, dmoerm_tables, stored
from experiments.dmoerm_arms import World
from jaxrm import members, tokens
from jaxrm.datasets import synthetic

RESULTS = Path(__file__).parent / 'results' / 'dmoerm_world'
Array = np.ndarray
CAPABILITIES = {
    'facts': ('confidence', 'politeness', 'verbosity'),
    'persona': ('persona', 'politeness', 'verbosity'),
    'arithmetic': ('completeness', 'format', 'politeness'),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(devices.Devices):
    model_name_or_path: str = 'runs/pretrain/model'  # the decoder to start from
    output_dir: Path = Path('runs/dmoerm_world')  # of models, which the tables do not need
    results: Path = RESULTS
    cells: tuple[str, ...] = (
        'single-0.25', 'routed-0.25', 'full-0.25', 'overall labels-0.25', 'judge overall-0.25',
        'no outer layer-0.25', 'judge-0.25', 'ensembles-0.25', 'best of n-0.25', 'conflict-0.25',
        'no swap filter-0.25',
        'single-0.0', 'routed-0.0', 'full-0.0', 'ensembles-0.0', 'best of n-0.0',
        'best of n, far-0.25', 'best of n, far-0.0',
    )  # fmt: skip
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    members: int = 5  # of an ensemble
    categories: tuple[str, ...] = tuple(CAPABILITIES)
    pairs: int = 800  # of each category
    test_pairs: int = 300
    learning_rate: float = 2e-3
    num_train_epochs: int = 1
    base_epochs: int = 1  # of the task bases, on 60 % of the prompts
    expert_learning_rate: float = 2e-3
    expert_epochs: int = 1
    train_batch_size: int = 16
    lora_r: int = 32
    max_length: int = 128  # longer records are left out
    judge_noise: float = 0.2
    judge_waver: float = 0.2
    judge_position: float = 0.1
    judge_garbage: float = 0.02
    prompts: int = 12  # of each category, in best of n
    samples: int = 128
    only_table: bool = False

    def of(self, categories: tuple[str, ...] | None) -> 'Config':
        return self if categories is None else dataclasses.replace(self, categories=categories)

    @property
    def capabilities(self) -> Mapping[str, tuple[str, ...]]:
        return CAPABILITIES


def routed_by(score_SCc: Array, route_n: Array, of: tokens.Tokens) -> Array:
    """[S, c] by the model of each record's route."""
    route_c = np.repeat(route_n, np.diff(of.first))
    return np.take_along_axis(score_SCc, route_c[None, None], axis=1)[:, 0]


def right(w: World, score_Sc: Array) -> list[str]:
    """Which held-out pairs are right, a digit each, for each seed."""
    gap_Sn = score_Sc.reshape(len(score_Sc), -1, 2)
    return [''.join('01'[int(a > b)] for a, b in gap_n) for gap_n in gap_Sn]


def by_group(w: World, score_Gc: Array) -> Array:
    return score_Gc.reshape(len(w.c.seeds), len(w.c.categories), -1)


# Cells


def single(w: World, flips: float) -> dict[str, Any]:
    """One model of everything."""
    found = dmoerm_arms.scores(w, dmoerm_arms.singles(w, flips), w.held)
    return {'rows': {'single': right(w, found)}}


def ensembles(w: World, flips: float) -> dict[str, Any]:
    """Several such, and what makes one score of theirs."""
    found = dmoerm_arms.scores(w, dmoerm_arms.ensembles(w, flips), w.held)
    score_SKc = found.reshape(len(w.c.seeds), w.c.members, -1)
    out = {'mean of 3': score_SKc[:, :3].mean(1)}
    combine = {'mean': members.mean, 'WCO': members.wco, 'UWO': members.uwo}
    for name, of in combine.items():
        out[name] = np.stack([of(x_Kc) for x_Kc in score_SKc])
        out[f'{name}, centred'] = np.stack([of(members.centred(x_Kc)) for x_Kc in score_SKc])
    return {'rows': {k: right(w, x) for k, x in out.items()}}


def routed(w: World, flips: float) -> dict[str, Any]:
    """A model of each category: by its own route, and all on all categories."""
    params_G = dmoerm_arms.specialists(w, flips)
    score_SCc = by_group(w, dmoerm_arms.scores(w, params_G, w.held))
    each = {f'of {name}': right(w, score_SCc[:, k]) for k, name in enumerate(w.c.categories)}
    own = routed_by(score_SCc, w.held.group, w.held)
    return {'rows': {'no inner layer': right(w, own)}, 'matrix': each}


def lessons_of(w: World, swap: bool) -> tuple[list[list[tokens.Tokens]], dict[str, Any]]:
    """What the experts of every group learn from, by the judge."""
    c = w.c
    names = sorted({q for name in c.categories for q in c.capabilities[name]})
    winner, said = dmoerm_arms.winners(w, names, swap=swap)
    lessons = [
        [relabelled(w, winner[q], w.rows(s, k)) for q in c.capabilities[c.categories[k]]]
        for s, k in w.groups()
    ]
    return lessons, said


def relabelled(w: World, winner_n: Array, at: Array) -> tokens.Tokens:
    return dmoerm.relabelled(tokens.select(w.pool, at), winner_n[at])


def taught(w: World, flips: float, name: str, lessons: Any) -> Any:
    """The inner models of all groups, on the task bases."""
    base_G = dmoerm_arms.specialists(w, flips, True)
    mixing = [w.rows(s, k, False) for s, k in w.groups()]
    return dmoerm_arms.taught(w, f'{name}-{flips}', base_G, lessons, mixing)


def inner(w: World, flips: float, name: str, lessons: Any) -> tuple[Any, list[Any]]:
    """The same, and what each says of all held-out answers."""
    made = taught(w, flips, name, lessons)
    return made, [dmoerm_arms.says(w, made, g, w.held) for g in range(len(w.groups()))]


def said_by(w: World, made: Any, found: list[Any]) -> dict[str, Array]:
    """[S, C, c] of the MLPs, and of what stands in their place."""
    mixing = [w.rows(s, k, False) for s, k in w.groups()]
    linear = [dmoerm_arms.linear(w, made, g, at, x.rate_cE)
              for g, (at, x) in enumerate(zip(mixing, found, strict=True))]  # fmt: skip
    each = {'': [x.score_c for x in found], ', scalars': linear,
            ', mean of scalars': [x.rate_cE.mean(1) for x in found]}  # fmt: skip
    return {k: by_group(w, np.stack(x)) for k, x in each.items()}


def full(w: World, flips: float) -> dict[str, Any]:
    """DMoERM, by several routes, with and without vectors; the capability matrix."""
    lessons, said = lessons_of(w, True)
    made, found = inner(w, flips, 'full', lessons)
    score = said_by(w, made, found)
    gold_n = w.held.group
    chance_n = np.random.default_rng(0).integers(0, len(w.c.categories), len(gold_n))
    predicted, accuracy = dmoerm_arms.routes(w)
    out = {f'DMoERM{k}': routed_by(x, gold_n, w.held) for k, x in score.items()}
    out['DMoERM, random routes'] = routed_by(score[''], chance_n, w.held)
    out['DMoERM, predicted routes'] = np.concatenate(
        [routed_by(score[''][[i]], route_n, w.held) for i, route_n in enumerate(predicted)]
    )
    base = dmoerm_arms.scores(w, dmoerm_arms.specialists(w, flips, True), w.held)
    out['task bases'] = routed_by(by_group(w, base), gold_n, w.held)
    return {
        'rows': {k: right(w, x) for k, x in out.items()}, 'judge': said, 'router': accuracy,
        'matrix': {name: matrix(w, found, k).round(4).tolist()
                   for k, name in enumerate(w.c.categories)},
    }  # fmt: skip


def matrix(w: World, found: list[Any], category: int) -> Array:
    """[S, experts, capabilities] accuracy of each expert's own score on each true capability."""
    C, names = len(w.c.categories), w.c.capabilities[w.c.categories[category]]
    at_n = w.held.group == category
    column = [synthetic.QUALITIES.index(name) for name in names]
    truth_nQ = np.array([w.held_records[i].ratings for i in np.flatnonzero(at_n)])[..., column]
    gap_nQ = truth_nQ[:, 0] - truth_nQ[:, 1]
    out = []
    for s in range(len(w.c.seeds)):
        rate_n2E = found[s * C + category].rate_cE.reshape(-1, 2, len(names))[at_n]
        sign_nE = np.sign(rate_n2E[:, 0] - rate_n2E[:, 1])
        agree = sign_nE[:, :, None] == np.sign(gap_nQ)[:, None]
        weight = np.broadcast_to((gap_nQ != 0)[:, None], agree.shape)
        out.append((agree * weight).sum(0) / weight.sum(0))
    return np.stack(out)


def no_swap(w: World, flips: float) -> dict[str, Any]:
    """Capability labels by one order alone."""
    made, found = inner(w, flips, 'no swap', lessons_of(w, False)[0])
    score = said_by(w, made, found)['']
    return {'rows': {'no swap filter': right(w, routed_by(score, w.held.group, w.held))}}


def overall(w: World, flips: float) -> dict[str, Any]:
    """As many experts, of the bases' own labels in other orders: an ensemble in its place."""
    count = len(next(iter(w.c.capabilities.values())))
    lessons = [[tokens.select(w.pool, w.rows(s, k, True))] * count for s, k in w.groups()]
    score = said_by(w, *inner(w, flips, 'overall', lessons))
    out = {f'overall labels{k}': routed_by(x, w.held.group, w.held) for k, x in score.items()}
    return {'rows': {k: right(w, x) for k, x in out.items()}}


def judge_overall(w: World, flips: float) -> dict[str, Any]:
    """What decomposition adds: as many experts, of the judge's labels as a whole.

    Prompts, swap filter, experts and passes are those of `full`. And a single model of the human
    labels and these.
    """
    count = len(next(iter(w.c.capabilities.values())))
    winner, said = dmoerm_arms.winners(w, [None])
    lessons = [[relabelled(w, winner[None], w.rows(s, k))] * count for s, k in w.groups()]
    score = said_by(w, *inner(w, flips, 'judge overall', lessons))
    out = {f'judge overall{k}': routed_by(x, w.held.group, w.held) for k, x in score.items()}
    both = [
        dmoerm.joined([tokens.select(w.pool, at), relabelled(w, winner[None], at)])
        for at in map(w.rows, w.c.seeds)
    ]
    of = [(some, 1000 * s) for some, s in zip(both, w.c.seeds, strict=True)]
    params_S = dmoerm_arms.kept(
        w, f'single judged-{flips}', lambda: dmoerm_arms.taught_whole(w, of)
    )
    out['single, judge too'] = dmoerm_arms.scores(w, params_S, w.held)
    return {'rows': {k: right(w, x) for k, x in out.items()}, 'judge': said}


def no_outer(w: World, flips: float) -> dict[str, Any]:
    """One inner model of all categories, with an expert of every capability by name."""
    c = w.c
    names = sorted({q for name in c.categories for q in c.capabilities[name]})
    winner, _ = dmoerm_arms.winners(w, names)
    lessons = [[relabelled(w, winner[q], w.rows(s)) for q in names] for s in c.seeds]
    rows_S = [w.rows(s, None, True) for s in c.seeds]
    of = [(at, 1000 * s) for at, s in zip(rows_S, c.seeds, strict=True)]
    base_S = dmoerm_arms.kept(
        w, f'one base-{flips}', lambda: dmoerm_arms.trained(w, of, c.base_epochs)
    )
    made = dmoerm_arms.taught(w, f'no outer-{flips}', base_S, lessons,
                              [w.rows(s, None, False) for s in c.seeds])  # fmt: skip
    score = np.stack([dmoerm_arms.says(w, made, g, w.held).score_c for g in range(len(c.seeds))])
    return {'rows': {'no outer layer': right(w, score)}}


def judged(w: World, flips: float) -> dict[str, Any]:
    """The judge asked which answer is better; without an answer that stands, half a point."""
    winner, said = dmoerm_arms.winners(w, [None], held=True)
    return {'halves': ''.join({0: '2', 1: '0', -1: '1'}[x] for x in winner[None].tolist()),
            'judge': said}  # fmt: skip


ALIKE, APART = ('arithmetic', 'ordering'), ('facts', 'persona')


def conflict(w: World, flips: float) -> dict[str, Any]:
    """Each task alone, and with one that wants the same or the opposite: equal data of it."""
    w = dmoerm_arms.made(w.c, flips, (*APART, *ALIKE))
    names, out = w.c.categories, {}
    for both in (*((name,) for name in names), APART, ALIKE):
        at = [names.index(name) for name in both]
        lessons = [(np.concatenate([w.rows(s, k) for k in at]), 1000 * s) for s in w.c.seeds]
        score_Sc = dmoerm_arms.scores(w, dmoerm_arms.trained(w, lessons), w.held)
        out[' and '.join(both)] = right(w, score_Sc)
    return {'matrix': out, 'categories': names}


def best_of_n(w: World, flips: float, *, policy: float = 0.5) -> dict[str, Any]:
    """Gold against proxy of what each picks among samples of a policy that has moved so far."""
    singles = dmoerm_arms.ensembles(w, flips)
    alone = dmoerm_arms.specialists(w, flips)
    made = taught(w, flips, 'full', lessons_of(w, True)[0])
    return dmoerm_samples.curves(w, singles, alone, made, policy)


CELLS = {
    'single': single, 'ensembles': ensembles, 'routed': routed, 'full': full,
    'overall labels': overall, 'judge overall': judge_overall, 'no outer layer': no_outer,
    'no swap filter': no_swap, 'conflict': conflict, 'judge': judged, 'best of n': best_of_n,
    'best of n, far': functools.partial(best_of_n, policy=1.0),
}  # fmt: skip


def learn(c: Config) -> None:
    """Every cell that has no result yet, in the order of the flag."""
    worlds: dict[float, World] = {}
    for cell in c.cells:
        path, (name, flips) = c.results / f'{cell}.json', cell.rsplit('-', 1)
        if path.exists():
            continue
        begun, share = time.monotonic(), float(flips)
        if share not in worlds:
            worlds = {share: dmoerm_arms.made(c, share)}
        found = CELLS[name](worlds[share], share)
        common.write_json(path, {'flags': stored.flags(c), **found})
        common.console.print(f'{cell}: done in {time.monotonic() - begun:.0f} s')


def main(c: Config) -> None:
    """Learn what is missing, then print and draw."""
    if not c.only_table:
        learn(c)
    dmoerm_tables.show(c.results, c.cells, stored.flags(c), CAPABILITIES)


if __name__ == '__main__':
    common.launch(Config, main)
