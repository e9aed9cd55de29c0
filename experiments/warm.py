"""The average of reward models' weights (WARM, arXiv 2401.12187) against the mean of their scores.

Run:     python -m experiments.warm               # what is missing, then the tables
         python -m experiments.warm --only_table  # from experiments/results/warm
Cost:    about 15 minutes on two CPU cores
Expect:  the tables of WARM in BENCHMARKS.md

Members of a seed learn the same pairs of the synthetic world, of which a share has wrong labels, in
orders of their own. A cell is how they begin: `shared` from one decoder with one head, probed while
the decoder was frozen, as the method has it; with a random `own heads` each; as `other units`,
which is the shared beginning with hidden units in another order for each member, so that all
compute the same function by other weights; and with an `own initialisation`, decoders that have
read nothing. The last two must break the average, not the ensemble. Memorised are wrong labels of
the training pairs that a model agrees with. Between the first two members, accuracy on the straight
line of weights tells whether they are linearly connected. All seeds and members of a cell are one
program.
"""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import numpy as np

from experiments import common, dmoerm, dogerm, labelling, stored
from experiments.dmoerm import Lesson, Pace
from experiments.labelling import Base
from experiments.separation import crossed, digits, of_digits, points
from jaxrm import members, report, strength_report, tokens, train, tree

CELLS = ('shared', 'own heads', 'other units', 'own initialisation')
WAYS = ('members', 'average', 'ensemble')
LINE = tuple(i / 10 for i in range(11))
Array = np.ndarray


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(labelling.Config):
    output_dir: Path = Path('runs/warm')
    results: Path = dogerm.RESULTS / 'warm'
    members: int = 4
    pairs: int = 800
    test_pairs: int = 800
    turned: float = 0.25  # share of the labels that are wrong
    learning_rate: float = 2e-3
    num_train_epochs: int = 6  # long enough to memorise
    probe_epochs: int = 4
    probe_learning_rate: float = 1e-2


# Beginnings


def probed(c: Config, b: Base, own: list[tokens.Tokens]) -> list[tree.Tree]:
    """A head for each seed, learned on the frozen decoder."""
    pace = Pace(c.probe_learning_rate, c.probe_epochs, c.train_batch_size)
    lessons = [Lesson(of, seed) for of, seed in zip(own, c.seeds, strict=True)]
    made = dmoerm.probed(pace, b.rm, b.backbone, lessons, shape_of(c, b, own), mesh=b.mesh)
    return [members.select(made, s) for s in range(len(c.seeds))]


def shape_of(c: Config, b: Base, own: list[tokens.Tokens]) -> Any:
    return dmoerm.shape_of(dmoerm.joined(own), b.rm.backbone.config.D, c.train_batch_size)


def begins(b: Base, cell: str, head: tree.Tree, seed: int) -> tree.Tree:
    """A member; `seed` is its own."""
    key = jax.random.key(seed)
    fresh = b.rm.init_head(key, b.rm.backbone.config.D)
    one = {'backbone': b.backbone, 'head': fresh if cell.startswith('own') else head}
    if cell == 'own initialisation':
        return {**one, 'backbone': b.rm.init_backbone(key)}
    return dogerm.permuted(one, seed) if cell == 'other units' else one


def learned(
    c: Config, b: Base, cell: str, own: list[tokens.Tokens], probes: list[tree.Tree]
) -> list[tree.Tree]:
    """Each seed's members, as one tree."""
    lessons, starts = [], []
    for of, head, seed in zip(own, probes, c.seeds, strict=True):
        for m in range(c.members):
            lessons.append(Lesson(of, 1000 * seed + m))
            starts.append(begins(b, cell, head, 1000 * seed + m))
    shape = shape_of(c, b, own)
    pace = Pace(c.learning_rate, c.num_train_epochs, c.train_batch_size, c.warmup_steps)
    made = jax.device_get(dmoerm.learned(
        pace, members.stack(starts), lessons, shape, train.preference(b.rm.score), mesh=b.mesh
    ))  # fmt: skip
    return [labelling.part(made, s, c.members) for s in range(len(c.seeds))]


# What became of them


def gaps(b: Base, params_E: tree.Tree, of: tokens.Tokens, shape: Any) -> dict[str, Array]:
    """[1 or E, n] differences, the truly better answer first: members, average, ensemble."""
    each_En = labelling.gaps(b, params_E, of, shape)
    one = jax.tree.map(lambda x: x[None], members.average(params_E))
    return {
        'members': each_En,
        'average': labelling.gaps(b, one, of, shape),
        'ensemble': each_En.mean(0, keepdims=True),
    }


def line(b: Base, params_E: tree.Tree, of: tokens.Tokens, shape: Any) -> Array:
    """Accuracy of the first two members mixed at every share of the second."""
    ends = jax.tree.map(lambda x: x[:2], params_E)
    mixed = members.stack([members.average(ends, (1 - t, t)) for t in LINE])
    return (labelling.gaps(b, mixed, of, shape) > 0).mean(1)


def measured(c: Config, b: Base, cell: str, own: list[tokens.Tokens], wrong: list[Array],
             probes: list[tree.Tree]) -> dict[str, Any]:  # fmt: skip
    """A cell: means over members of what is right, digits where there is one model a seed."""
    held, given = (
        labelling.held_out(c, b),
        [labelling.noisy(*x) for x in zip(own, wrong, strict=True)],
    )
    shape = labelling.fitting(b, [*own, held])
    out: dict[str, Any] = {'line': [], 'held out': {}, 'memorised': {}, 'clean': {}}
    for params_E, of, turned_n in zip(learned(c, b, cell, given, probes), own, wrong, strict=True):
        trained, tested = gaps(b, params_E, of, shape), gaps(b, params_E, held, shape)
        out['line'].append(labelling.rounded(line(b, params_E, held, shape)))
        for way in WAYS:
            right_En, told_En = tested[way] > 0, labelling.labelled(trained[way], turned_n) > 0
            said = digits(right_En[0]) if way != 'members' else None
            out['held out'].setdefault(way, []).append(said or labelling.rounded(right_En.mean(1)))
            for name, at in (('memorised', turned_n), ('clean', ~turned_n)):
                found = labelling.rounded(told_En[:, at].mean())
                out[name].setdefault(way, []).append(found)
    return out


# Tables


def path(c: Config, cell: str) -> Path:
    return c.results / f'{cell.replace(" ", "_")}.json'


def row(x: dict[str, Any]) -> list[str]:
    """Of one cell, over seeds."""
    average, ensemble = (of_digits(x['held out'][way]) for way in ('average', 'ensemble'))
    line_SK = np.array(x['line'])
    straight = (1 - np.array(LINE)) * line_SK[:, :1] + np.array(LINE) * line_SK[:, -1:]
    told = [f'{100 * np.mean(x[name][way]):.1f}' for name in ('memorised', 'clean') for way in WAYS]
    less = 100 * (np.array(x['memorised']['average']) - np.array(x['memorised']['ensemble']))
    return [
        f'{np.mean(x["held out"]["members"]):.3f}', str(crossed(average)), str(crossed(ensemble)),
        points(average - ensemble), *told, f'{less.mean():+.1f} ({less.min():+.1f} to '
        f'{less.max():+.1f})', f'{100 * (line_SK - straight).mean(0).min():+.1f}',
    ]  # fmt: skip


def table(c: Config) -> None:
    """A row for each beginning; the lines of weights as a picture."""
    found = {cell: x for cell in CELLS if (x := stored.read(path(c, cell), stored.flags(c)))}
    if not found:
        return
    columns = [
        'held out: members', 'average', 'ensemble', 'average - ensemble, points',
        *(f'{name}: {way}, %' for name in ('memorised', 'clean') for way in WAYS),
        'memorised: average - ensemble (seeds)', 'lowest on the line, points',
    ]  # fmt: skip
    common.table(f'{len(c.seeds)} seeds of {c.members} members',
                 {cell: row(x) for cell, x in found.items()}, columns, paste=True)  # fmt: skip
    drawn, (axis,) = report.canvas(1)
    for (cell, x), colour in zip(found.items(), strength_report.LINES, strict=False):
        axis.plot(LINE, np.mean(x['line'], 0), '.-', color=colour, label=cell)
    axis.set(xlabel='share of the second member', ylabel='held-out accuracy')
    axis.legend(frameon=False, fontsize=7)
    drawn.savefig(c.results / 'line.png', dpi=120)


def main(c: Config) -> None:
    """Learn what is missing, then print and draw."""
    missing = [cell for cell in CELLS if not path(c, cell).exists()]
    if missing and not c.only_table:
        b = labelling.base(c)
        own = [labelling.pairs(c, b, c.pairs, seed=seed, split='train') for seed in c.seeds]
        kind = f'random-{c.turned}'
        wrong = [labelling.turned(of, kind, seed) for of, seed in zip(own, c.seeds, strict=True)]
        probes = probed(c, b, [labelling.noisy(*x) for x in zip(own, wrong, strict=True)])
        for cell in missing:
            made = measured(c, b, cell, own, wrong, probes)
            common.write_json(path(c, cell), {'flags': stored.flags(c), **made})
            common.console.print(f'{cell}: done')
    table(c)


if __name__ == '__main__':
    common.launch(Config, main)
