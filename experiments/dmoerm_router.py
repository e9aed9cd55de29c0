"""DMoERM, phase 0: a classifier of prompts, which chooses the inner model.

Run:     python -m experiments.dmoerm_router                    # on the synthetic world
         python -m experiments.dmoerm_router --dataset_train pairs.jsonl --capabilities points.json
         (then dmoerm_base, dmoerm_experts and dmoerm_mixture with the same data and output_dir)
Cost:    a minute on two CPU cores for a tiny model
Expect:  all of the world's prompts right

Makes the folder: the categories (groups of the data) and their capabilities, in the order of the
file, and the router. The paper's five categories and 27 points are in points_dmoerm.json. The
router reads what the user said and no answer, learns from logits, and is kept as it was when it
was right most often on held-out prompts. Records of other groups do not teach it; later phases
give them its choice.
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from experiments import common, devices, dmoerm, dmoerm_phases
from experiments.dmoerm_phases import Data, Starting
from jaxrm import data, heads, members, mixture, mixture_files, routed, sharding, tokens, train
from jaxrm.mixture_files import Plan


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(Starting):
    categories: tuple[str, ...] = ()  # by default all of the file
    capabilities: Path | None = None  # JSON: category -> names; by default the world's
    turns: str = 'last'  # what inner models read: the last user turn, or 'all'
    learning_rate: float = 1e-3
    eval_steps: int = 20


def main(c: Config) -> None:
    """Train the classifier, and begin the folder with it."""
    points = dmoerm_phases.capabilities(c.capabilities, c.categories)
    plan = Plan(tuple(points), points, c.turns)
    of, mesh = dmoerm_phases.load(c, plan.categories), devices.mesh(c)
    plan = dataclasses.replace(plan, provenance={'data': data.fingerprint(of.train)})
    if dmoerm_phases.finished(c.output_dir / mixture_files.ROUTER, c):
        return
    start = common.start(c, common.texts(of.train), mesh=mesh, seed=c.seed,
                         head=heads.Router(len(plan.categories)))  # fmt: skip
    prompts = asked(of, plan)
    _, at = data.split_by_prompt(prompts, 0.2, seed=1)
    held = [prompts[i] for i in at]
    some = grouped(tokens.encode(prompts, start.like.tokenizer, max_length=c.max_length), plan)
    learn = tokens.select(some, np.flatnonzero(~np.isin(some.record, at)))
    best, hook = dmoerm.Best(1), right(start, held, plan, mesh)

    def see(done: int, state: Any, _: Any) -> None:
        if done % c.eval_steps == 0 or done == 1:
            now = jax.device_get(state.trainable)
            best.see(done, now, np.array([hook(members.select(now, 0))]))

    pace = dmoerm.Pace(c.learning_rate, c.num_train_epochs, c.train_batch_size, c.warmup_steps)
    shape = dmoerm.shape_of(learn, start.like.config.D, c.train_batch_size,
                            sharding.data_parallel(mesh))  # fmt: skip
    start = devices.kept(c, start, shape, mesh)
    last = dmoerm.learned(
        pace, members.stack([start.trainable]), [dmoerm.Lesson(learn, c.seed)], shape,
        train.classification(start.rm.score), mesh=mesh, hooks=[(1, see)],
    )  # fmt: skip
    last = jax.device_get(last)
    best.see(-1, last, np.array([hook(members.select(last, 0))]))
    said = f'{best.value[0]:.3f} of {len(held)} held-out prompts'
    common.console.print(f'router: {said}, after step {best.step[0]} (-1: the last)')
    mixture_files.write_plan(c.output_dir, plan)
    mixture_files.export_router(c.output_dir, members.select(best.tree, 0), start.like,
                                provenance=dmoerm_phases.provenance(c))  # fmt: skip


def asked(of: Data, plan: Plan) -> list[data.Preference]:
    """What the router reads of the records of known categories, each prompt once."""
    known = [record for record in of.train if record.group in plan.categories]
    prompts = {repr(p.messages): p for p in map(mixture.asked, known)}
    if missing := set(plan.categories) - {p.group for p in prompts.values()}:
        raise ValueError(f'categories: found no record whose group is {sorted(missing)[0]!r}')
    return list(prompts.values())


def grouped(found: tokens.Encoded, plan: Plan) -> tokens.Tokens:
    """The same, with groups numbered as the plan's categories."""
    number = np.array([plan.categories.index(name) for name in found.groups], np.int32)
    return found.tokens._replace(group=number[found.tokens.group])


def right(
    start: common.Start, held: list[data.Preference], plan: Plan, mesh: Any
) -> Callable[[Any], float]:
    """How often parameters name the category of held-out prompts."""
    want = np.array([plan.categories.index(str(p.group)) for p in held])
    forward = jax.jit(start.rm.score)

    def accuracy(params: Any) -> float:
        found = routed.logits(forward, params, held, start.like.tokenizer, mesh=mesh,
                              width=start.like.config.D)  # fmt: skip
        return float((found.argmax(1) == want).mean())

    return accuracy


if __name__ == '__main__':
    common.launch(Config, main)
