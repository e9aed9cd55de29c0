"""DMoERM's outer layer on real pairs: the sources of several sets as categories, three seeds.

Run:     JAXRM_DATA=DIR python -m experiments.real_data    # whose decoder this starts from
         JAXRM_DATA=DIR python -m experiments.dmoerm_real  # what is missing, then the table
         python -m experiments.dmoerm_real --only_table
Cost:    about 10 minutes on two CPU cores, after the first line
Expect:  the table of DMoERM on real data in BENCHMARKS.md

A router learns which set a prompt is from; a reward model of each set and one of all of them learn
the same pairs, `pairs` of each set, so that the single one has seen all that the routed ones have
seen together. The seed draws the pairs, the heads and the orders; a cell is a seed, kept as JSON.
Pairs over `max_length` tokens are left out.
"""

import dataclasses
import os
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from experiments import common, devices, dmoerm, dmoerm_phases, gating, stored
from experiments.dmoerm import Lesson, Pace
from jaxrm import (
    backbones,
    checkpoint,
    data,
    evaluate,
    heads,
    intervals,
    members,
    mixture,
    reward,
    routed,
    sharding,
    tokens,
    train,
    tree,
)
from jaxrm.backbones import attention

Array = np.ndarray
RESULTS = Path(__file__).parent / 'results' / 'dmoerm_real'


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(devices.Devices):
    model_name_or_path: str = 'runs/real_data/pretrain/model'
    results: Path = RESULTS
    sets: tuple[str, ...] = ('hh_harmless', 'convarg', 'qa_feedback', 'politeness', 'chat_zh')
    seeds: tuple[int, ...] = (0, 1, 2)
    pairs: int = 400  # of each set, as far as there are
    test_pairs: int = 150
    learning_rate: float = 1e-3
    num_train_epochs: int = 2
    train_batch_size: int = 16
    max_length: int = 256
    only_table: bool = False


class World(NamedTuple):
    """All pairs of all sets with a set's place as the group, and what learns from them."""

    rm: reward.RewardModel
    like: checkpoint.Pretrained
    mesh: Any
    learn: tokens.Tokens
    asked: list[data.Preference]  # the prompts of `learn`
    test: tokens.Tokens
    asked_test: list[data.Preference]


def made(c: Config, folder: Path) -> World:
    """The pairs that are short enough, at most `test_pairs` of each set to test on."""
    mesh, like = devices.mesh(c), checkpoint.load_pretrained(c.model_name_or_path, kind='backbone')
    attend = attention.default(like.dtype, like.config, mesh)
    decoder = backbones.family(like.model_type).Backbone(like.config, like.dtype, attend)
    sides: list[Any] = []
    parts: list[list[data.Preference]] = []
    for split, most in (('train', None), ('test', c.test_pairs)):
        records = [
            record._replace(group=name)
            for name in c.sets
            for record in data.load(folder / f'{name}.{split}.jsonl.gz', chat=True).records
        ]
        parts.append(records)
        some = tokens.encode(records, like.tokenizer, max_length=c.max_length).tokens
        at = [np.flatnonzero(some.group == k)[:most] for k in range(len(c.sets))]
        some = tokens.select(some, np.concatenate(at))
        sides += [some, [mixture.asked(records[i]) for i in some.record]]
    dmoerm_phases.check_apart(*parts, 'train')
    return World(reward.RewardModel(decoder, heads.Scalar()), like, mesh, *sides)


def drawn(c: Config, w: World, seed: int) -> list[Array]:
    """The rows of each set that a seed learns from."""
    rng = np.random.default_rng(seed)
    each = [np.flatnonzero(w.learn.group == k) for k in range(len(c.sets))]
    return [rng.permutation(at)[: c.pairs] for at in each]


def cell(c: Config, w: World, seed: int) -> dict[str, Any]:
    """Which held-out pairs are right by what, and which prompts the router names right."""
    at, width = drawn(c, w, seed), w.like.config.D
    lessons = [Lesson(tokens.select(w.learn, rows), seed) for rows in (*at, np.concatenate(at))]
    packs = sharding.data_parallel(w.mesh)
    shape = dmoerm.shape_of(w.learn, width, c.train_batch_size, packs)
    pace = Pace(c.learning_rate, c.num_train_epochs, c.train_batch_size)

    def taught(some: list[Lesson]) -> tree.Tree:
        start_E = dmoerm.whole(w.rm, w.like.backbone, [seed] * len(some), width)
        return dmoerm.learned(pace, start_E, some, shape, train.preference(w.rm.score), mesh=w.mesh)

    forward, wide = jax.jit(members.scored(w.rm.score)), dmoerm.shape_of(w.test, width, 16)
    score_Ec = np.concatenate([
        members.scores(forward, {}, taught(some), w.test, wide, mesh=w.mesh, packs=packs)
        for some in (lessons[:-1], lessons[-1:])
    ])  # fmt: skip
    route_n = routes(c, w, np.concatenate(at), seed)
    gold_n = w.test.group
    chance_n = np.random.default_rng(seed).integers(0, len(c.sets), len(gold_n))
    given = {'gold': gold_n, 'predicted': route_n, 'random': chance_n}
    rows = {'single': score_Ec[-1]}
    for name, of_n in given.items():
        rows[f'routed, {name}'] = score_Ec[np.repeat(of_n, 2), np.arange(len(score_Ec[0]))]
    right = {k: evaluate.pairs(evaluate.by_record(w.test.rank, w.test),
                               evaluate.by_record(x_c, w.test)).accuracy
             for k, x_c in rows.items()}  # fmt: skip
    asked = [repr(p.messages) for p in w.asked_test]
    return {
        'right': {k: ''.join(str(int(x)) for x in x_n) for k, x_n in right.items()},
        'router': ''.join(str(int(x)) for x in route_n == gold_n),
        'set': gold_n.tolist(), 'prompt': intervals.numbered(asked, len(asked)).tolist(),
    }  # fmt: skip


def routes(c: Config, w: World, at: Array, seed: int) -> Array:
    """[n] the router's sets of the held-out prompts; it learns the prompts of the same pairs."""
    model, width = reward.RewardModel(w.rm.backbone, heads.Router(len(c.sets))), w.like.config.D
    asked = [w.asked[i]._replace(group=str(w.learn.group[i])) for i in at]
    found = tokens.encode(asked, w.like.tokenizer, max_length=c.max_length)
    number = np.array([int(name) for name in found.groups], np.int32)
    some = found.tokens._replace(group=number[found.tokens.group])
    shape = dmoerm.shape_of(some, width, c.train_batch_size, sharding.data_parallel(w.mesh))
    learned = dmoerm.learned(
        Pace(c.learning_rate, 1, c.train_batch_size),
        dmoerm.whole(model, w.like.backbone, [seed], width), [Lesson(some, seed)], shape,
        train.classification(model.score), mesh=w.mesh,
    )  # fmt: skip
    return routed.logits(
        jax.jit(model.score), members.select(learned, 0), w.asked_test, w.like.tokenizer,
        mesh=w.mesh, width=width, max_length=c.max_length,
    ).argmax(1)  # fmt: skip


def flags(c: Config) -> dict[str, Any]:
    """Those that a cell depends on."""
    return {k: v for k, v in stored.flags(c).items() if k != 'seeds'}


def table(c: Config) -> None:
    """Accuracy of each set and of all, over seeds; what the routed models add to the single one."""
    cells = (stored.read(c.results / f'{seed}.json', flags(c)) for seed in c.seeds)
    found = [cell for cell in cells if cell is not None]
    if not found:
        return
    set_n, prompt_n = (np.array(found[0][k]) for k in ('set', 'prompt'))
    digits = lambda text: np.array(list(text), float)  # noqa: E731
    right = {k: np.stack([digits(x['right'][k]) for x in found]) for k in found[0]['right']}
    router = np.stack([digits(x['router']) for x in found])
    rows = {}
    for name, x_Sn in {**right, 'router': router}.items():
        each = [f'{x_Sn[:, set_n == k].mean():.3f}' for k in range(len(c.sets))]
        gap_n = x_Sn.mean(0) - right['single'].mean(0)
        gap = evaluate.interval(gap_n, prompts=prompt_n.tolist())
        beside = '' if name in ('single', 'router') else gap
        rows[name] = [gating.over_seeds(x_Sn.mean(1)), *each, beside]
    common.table(f'{len(found)} seeds: accuracy over seeds', rows,
                 ['all', *c.sets, 'above single, over prompts'], paste=True)  # fmt: skip


def main(c: Config) -> None:
    """Learn what is missing, then print."""
    missing = [seed for seed in c.seeds if not (c.results / f'{seed}.json').exists()]
    if missing and not c.only_table:
        if not (folder := os.environ.get('JAXRM_DATA')):
            raise ValueError('JAXRM_DATA: found nothing, expected a folder with preference/*')
        w = made(c, Path(folder) / 'preference')
        for seed in missing:
            found = {'flags': flags(c), **cell(c, w, seed)}
            common.write_json(c.results / f'{seed}.json', found)
            common.console.print(f'seed {seed}: done')
    table(c)


if __name__ == '__main__':
    common.launch(Config, main)
