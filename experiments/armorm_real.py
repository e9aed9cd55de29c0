"""ArmoRM on real data: ratings of truth, a gate for pairs of another kind, three seeds: the tables.

Run:     JAXRM_DATA=DIR python -m experiments.real_data          # whose frozen decoder this reads
         JAXRM_DATA=DIR python -m experiments.armorm_real        # what is missing, then the tables
         python -m experiments.armorm_real --only_table          # from its folder of results
Cost:    half a minute of work of a CPU core, after the first line and the decoder's pass
Expect:  the tables of real data below the gate's in BENCHMARKS.md

Two objectives, truthful and informative, are fitted to one file of answers and tested on another
with other questions. The gate then learns from the train pairs of each set. The seed draws the
rated prompts that choose the penalties, the gate's start and its batches; a cell is kept as JSON.
None of the ratings is a rating of length, so that there is no transform. The best weights can all
be 0: a tie counts as half right here, as in `armorm_gate`.
"""

import dataclasses
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from experiments import armorm, common, devices, gating
from jaxrm import evaluate, features, intervals, regress, tokens

Array = np.ndarray
SETS = ('hh_harmless', 'qa_feedback')
RATINGS = 'ratings/truthfulqa_truth_info'
RESULTS = Path(__file__).parent / 'results' / 'armorm_real'


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(gating.Gating, devices.Devices):
    model_name_or_path: str = 'runs/real_data/pretrain/model'
    features: Path = Path('runs/armorm_real/features')
    seeds: tuple[int, ...] = (0, 1, 2)
    train_batch_size: int = 256
    max_steps: int = 300
    gating_hidden_dim: int = 128
    initial_scale: float = 10.0
    only_table: bool = False


class Fitted(NamedTuple):
    """What the gates of a set and a seed stand on: ratings of pairs, and errors of the ratings."""

    seed: int
    errors: dict[str, dict[str, float]]
    learnt: gating.Pairs
    held: gating.Pairs
    test: armorm.Set


def fitted(c: Config, mesh: Any, name: str, seed: int, data: Path) -> Fitted:
    """The objectives, fitted to one file of ratings and tested on the other."""
    flags = armorm.Data(
        model_name_or_path=c.model_name_or_path, features=c.features, seed=seed, chat=True,
        dataset_ratings=f'{data / RATINGS}.train.jsonl.gz', verbosity='informative',
        dataset_pairs=str(data / 'preference' / f'{name}.train.jsonl.gz'),
        dataset_test=str(data / 'preference' / f'{name}.test.jsonl.gz'),
    )  # fmt: skip
    other = dataclasses.replace(flags, dataset_ratings=f'{data / RATINGS}.test.jsonl.gz')
    found = armorm.compute(flags, mesh, ('ratings', 'pairs', 'test'))
    rated = armorm.compute(other, mesh, ('ratings',))['ratings']
    o = armorm.objectives(flags, found['ratings'], found['pairs'], debias=False)
    learnt, held = (
        (gating.rated(o.head, features.gather(c.features, some)), some)
        for some in (found['pairs'].tokens, found['test'].tokens)
    )
    return Fitted(seed, errors(c, o, found['ratings'], rated), learnt, held, found['test'])


def cells(c: Config, mesh: Any, name: str, seeds: Sequence[int], data: Path) -> list[dict]:
    """For each seed errors of the objectives, and which held-out pairs are right by which weights.

    The gates of all seeds learn in one program.
    """
    each = [fitted(c, mesh, name, seed, data) for seed in seeds]
    tasks = [task for f in each for task in ((f.learnt, f.held), shuffled(f))]
    seed_of = np.repeat(seeds, 2).tolist()
    lessons = [gating.Lesson(*learnt, s) for (learnt, _), s in zip(tasks, seed_of, strict=True)]
    rm, gates = gating.learn(c, lessons, len(each[0].errors), mesh=mesh)
    score = [gating.scores(rm, gate, held, mesh)
             for (_, held), gate in zip(tasks, gates, strict=True)]  # fmt: skip
    out = []
    for f, gate_c, other_c in zip(each, score[::2], score[1::2], strict=True):
        by = {'gate': gate_c, 'gate, shuffled prompts': other_c, **gating.alike(f.learnt, f.held)}
        prompts = evaluate.prompts([f.test.records[i] for i in f.test.tokens.record])
        out.append({
            'objectives': f.errors,
            'right': {k: halves(x_c, f.test.tokens) for k, x_c in by.items()},
            'prompt': intervals.numbered(prompts, len(prompts)).tolist(),
        })  # fmt: skip
    return out


def shuffled(f: Fitted) -> tuple[gating.Pairs, gating.Pairs]:
    """The same pairs, where the gate reads prompts of others."""
    rng = np.random.default_rng(f.seed)
    return gating.shuffled(f.learnt, rng), gating.shuffled(f.held, rng)


def halves(score_c: Array, some: tokens.Tokens) -> str:
    """Of each held-out pair 2 where it is right, 1 where it is tied, or 0."""
    rank, score = (evaluate.by_record(x_c, some) for x_c in (some.rank, score_c))
    found = evaluate.pairs(rank, score)
    return ''.join(str(int(x)) for x in 2 * found.accuracy + found.ties)


def errors(
    c: Config, fitted: armorm.Objectives, learnt: armorm.Set, held: armorm.Set
) -> dict[str, dict[str, float]]:
    """Mean squared errors on the rated answers of the other file, and of the learnt file's mean."""
    rate_cJ = gating.rates(fitted.head, features.gather(c.features, held.tokens))
    columns: dict[str, Any] = {
        'alpha': fitted.fitted.alpha_J,
        'mse': np.nanmean((held.tokens.rating - rate_cJ) ** 2, axis=0),
        'mse of the mean': np.nanmean(
            (held.tokens.rating - np.nanmean(learnt.tokens.rating, axis=0)) ** 2, axis=0
        ),
        'spearman': [
            regress.spearman(rate_cJ[here, j : j + 1], held.tokens.rating[here, j])[0]
            for j, here in enumerate(np.isfinite(held.tokens.rating).T)
        ],
    }  # fmt: skip
    return {name: {k: float(x[j]) for k, x in columns.items()}
            for j, name in enumerate(fitted.names)}  # fmt: skip


def learn(c: Config, data: Path) -> None:
    """Every cell that has no result yet."""
    mesh = devices.mesh(c)
    for name in SETS:
        paths = {seed: RESULTS / f'{name}-{seed}.json' for seed in c.seeds}
        missing = [seed for seed, path in paths.items() if not path.exists()]
        made = cells(c, mesh, name, missing, data) if missing else []
        for seed, cell in zip(missing, made, strict=True):
            common.write_json(paths[seed], {'flags': flags(c), **cell})


def flags(c: Config) -> dict[str, Any]:
    """Those that a cell depends on."""
    return {f.name: getattr(c, f.name) for f in dataclasses.fields(gating.Gating)}


def finished(c: Config, name: str) -> list[dict[str, Any]]:
    """Those that there are; ValueError for one of other flags."""
    paths = [RESULTS / f'{name}-{seed}.json' for seed in c.seeds]
    found = {path: json.loads(path.read_text()) for path in paths if path.exists()}
    for path, one in found.items():
        if one['flags'] != flags(c):
            raise ValueError(f'{path}: is of a run with {one["flags"]}, not {flags(c)}')
    return list(found.values())


def gate_table(c: Config, name: str) -> None:
    """Accuracy, mean over seeds, with an interval over test prompts; what the gate adds."""
    if not (found := finished(c, name)):
        return
    prompts: list[int] = found[0]['prompt']
    rows: dict[str, Sequence[Any]] = {}
    each = {k: np.array([[int(d) / 2 for d in one['right'][k]] for one in found])
            for k in found[0]['right']}  # fmt: skip
    for weights, right_sn in each.items():
        seeds, gate_n = right_sn.mean(1), each['gate'].mean(0)
        above = evaluate.paired(gate_n, right_sn.mean(0), prompts=prompts)
        rows[weights] = [
            str(evaluate.interval(right_sn.mean(0), prompts=prompts)),
            f'{seeds.min():.3f} to {seeds.max():.3f}', '' if weights == 'gate' else str(above),
        ]  # fmt: skip
    common.table(f'{name}, {len(prompts)} pairs, {len(found)} seeds', rows,
                 ['accuracy [95 %]', 'over seeds', 'gate - this'], paste=True)  # fmt: skip


def objective_table(c: Config) -> None:
    """Errors on the rated answers of the test file, means over seeds, and their spread."""
    found = [one['objectives'] for one in finished(c, SETS[0])]
    rows: dict[str, Sequence[Any]] = {}
    for name in found[0] if found else ():
        of = {k: np.array([one[name][k] for one in found]) for k in found[0][name]}
        explained = 1 - of['mse'] / of['mse of the mean']
        rows[name] = [
            f'{of["mse"].mean():.4f}', f'{of["mse of the mean"].mean():.4f}',
            f'{explained.mean():.3f}', f'{explained.min():.3f} to {explained.max():.3f}',
            f'{of["spearman"].mean():.3f}',
        ]  # fmt: skip
    common.table('objectives on answers to other questions', rows,
                 ['mse', 'mse of the mean', 'explained', 'over seeds', 'Spearman'],
                 paste=True)  # fmt: skip


def main(c: Config) -> None:
    """Learn, then print."""
    if not c.only_table:
        if 'JAXRM_DATA' not in os.environ:
            sys.exit('JAXRM_DATA is not set: it names the folder with preference/*.jsonl.gz')
        learn(c, Path(os.environ['JAXRM_DATA']))
    objective_table(c)
    for name in SETS:
        gate_table(c, name)


if __name__ == '__main__':
    common.launch(Config, main)
