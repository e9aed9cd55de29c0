"""K reward models of one kind in one program, and one score of theirs: mean, WCO or UWO.

Run:     python -m experiments.ensemble                                 # on the synthetic world
         python -m experiments.ensemble --dataset_train pairs.jsonl --dataset_test test.jsonl
Cost:    four minutes on two CPU cores for five tiny models on the world's pairs
Expect:  the mean a little above a member; in accuracy WCO and UWO differ little from it

Members learn the same pairs from heads and in orders of their own (arXiv 2310.02743): WCO is the
worst of their scores, UWO their mean less `uwo_coefficient` times their population variance. Both
see offsets, which pairs leave free: each is told raw, and of scores centred member by member.
Writes MEMBER/model for each, a checkpoint of its own, and result.json.
"""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import numpy as np

from experiments import common, devices, dmoerm, dmoerm_phases
from experiments.dmoerm_phases import Data, Starting
from jaxrm import checkpoint, evaluate, members, packing, sharding, tokens, train


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(Starting):
    output_dir: Path = Path('runs/ensemble')
    categories: tuple[str, ...] = ('facts', 'persona', 'arithmetic')  # of the world
    members: int = 5
    learning_rate: float = 1e-3
    uwo_coefficient: float = 0.5


def main(c: Config) -> None:
    """Train, export, compare."""
    if dmoerm_phases.finished(c.output_dir / '0' / 'model', c):
        return
    mesh = devices.mesh(c)
    of = dmoerm_phases.load(c, c.categories)
    start = common.start(c, common.texts(of.train), mesh=mesh, seed=c.seed)
    some = dmoerm_phases.encoded(c, of.train, start.like.tokenizer, 'pairs')
    parts = sharding.data_parallel(mesh)
    shape = dmoerm.shape_of(some, start.like.config.D, c.train_batch_size, parts)
    start = devices.kept(c, start, shape, mesh, count=c.members)
    params_E = jax.device_get(learned(c, start, some, shape, mesh))
    if of.test:
        measure(c, start, params_E, of, mesh)
    said: dict[str, Any] = {'lora_scale': start.rm.lora_scale, 'overwrite': True}
    said['provenance'] = dmoerm_phases.provenance(c)
    for e in reversed(range(c.members)):  # the first last: it says that all are there
        one = {**start.frozen, **members.select(params_E, e)}
        checkpoint.export(c.output_dir / str(e) / 'model', one, start.like, **said)


def learned(
    c: Config, start: common.Start, some: tokens.Tokens, shape: packing.Shape, mesh: Any
) -> Any:
    """The learning parts of all members, each from a head and an order of its own."""
    width, seeds = start.like.config.D, [c.seed + e for e in range(c.members)]
    fresh = [start.rm.init_head(jax.random.key(seed), width) for seed in seeds]
    start_E = members.stack([{**start.trainable, 'head': head} for head in fresh])
    pace = dmoerm.Pace(c.learning_rate, c.num_train_epochs, c.train_batch_size, c.warmup_steps)
    return dmoerm.learned(
        pace, start_E, [dmoerm.Lesson(some, seed) for seed in seeds], shape,
        train.preference(start.rm.score), mesh=mesh, frozen=start.frozen,
        saver=dmoerm_phases.saver(c, 'members', some),
        how=devices.how(c, start.rm, shape, mesh, c.members),
    )  # fmt: skip


def combined(score_Ec: np.ndarray, coefficient: float) -> dict[str, np.ndarray]:
    """[c] by every way to make one score of the members'."""
    centred_Ec = members.centred(score_Ec)
    return {
        'member 0': score_Ec[0],
        'mean': members.mean(score_Ec),
        'WCO': members.wco(score_Ec),
        'WCO, centred': members.wco(centred_Ec),
        'UWO': members.uwo(score_Ec, coefficient),
        'UWO, centred': members.uwo(centred_Ec, coefficient),
    }


def measure(c: Config, start: common.Start, params_E: Any, of: Data, mesh: Any) -> None:
    """Accuracy on the test set with intervals over prompts; each against the mean."""
    encoded = tokens.encode(of.test, start.like.tokenizer)
    records = [of.test[i] for i in encoded.tokens.record]
    shape = dmoerm.shape_of(encoded.tokens, start.like.config.D, 32)
    score_Ec = members.scores(
        jax.jit(members.scored(start.rm.score)), start.frozen, params_E, encoded.tokens, shape,
        mesh=mesh, packs=sharding.data_parallel(mesh),
    )  # fmt: skip
    prompts, ranks = evaluate.prompts(records), evaluate.ranks(records)
    right = {
        name: evaluate.pairs(ranks, evaluate.by_record(x_c, encoded.tokens)).accuracy
        for name, x_c in combined(score_Ec, c.uwo_coefficient).items()
    }
    found = {k: evaluate.interval(x, prompts=prompts) for k, x in right.items()}
    above = {k: evaluate.paired(x, right['mean'], prompts=prompts) for k, x in right.items()}
    rows = {k: [found[k], '' if k == 'mean' else above[k]] for k in found}
    common.table(f'{c.members} members: accuracy', rows, ['95 %', 'above the mean'], paste=True)
    common.write_json(c.output_dir / 'result.json', {'accuracy': found, 'above the mean': above})


if __name__ == '__main__':
    common.launch(Config, main)
