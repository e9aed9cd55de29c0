"""DMoERM, phase 3: the MLP over the features of a category's experts, and the finished model.

Run:     python -m experiments.dmoerm_mixture             # after dmoerm_experts, on the same data
Cost:    a minute on two CPU cores for tiny models on the world's pairs
Expect:  a table of accuracies by route, and a folder that jaxrm.load takes

Learns from the other 40 % of the human labels of a category, of which 30 % of the prompts are held
out: the MLP is kept as it was when its loss there was least, and the normaliser is the mean and the
standard deviation of its scores there. All else is frozen: features are computed once.
"""

import dataclasses
import json
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from experiments import common, dmoerm, dmoerm_phases
from experiments.dmoerm_phases import Found, Phase
from jaxrm import data, evaluate, features, hf, members, mixture_files, routed
from jaxrm.data import Preference


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(Phase):
    learning_rate: float = 1e-3
    max_steps: int = 200
    train_batch_size: int = 64
    eval_steps: int = 10
    weight_decay: float = 0.01


def main(c: Config) -> None:
    """Train what is missing, then measure."""
    found = dmoerm_phases.begin(c)
    normaliser = dict(found.plan.normaliser or {})
    for category in found.plan.categories:
        folder = c.output_dir / category
        dmoerm_phases.check_there(folder / mixture_files.BASE, 'dmoerm_base')
        for name in found.plan.capabilities[category]:
            dmoerm_phases.check_there(folder / mixture_files.EXPERTS / name, 'dmoerm_experts')
        mixture_files.check_experts(c.output_dir, category)
        if category not in normaliser or not finished(c, category):
            normaliser[category] = mlp(c, found, category)
    if normaliser != found.plan.normaliser:
        plan = dataclasses.replace(found.plan, normaliser=normaliser)
        mixture_files.write_plan(c.output_dir, plan)
    if found.data.test and not measured(c, found):
        measure(c, found)


def finished(c: Config, category: str) -> bool:
    """Whether an MLP is there, by these flags; ValueError for one of others or other experts."""
    path = c.output_dir / category / mixture_files.HEAD
    if not path.exists():
        return False
    mixture_files.check_head(c.output_dir, category)
    was = json.loads(mixture_files.head_metadata(path).get('provenance', '{}'))
    dmoerm_phases.check_same(path, was, dmoerm_phases.provenance(c))
    return True


def subject(c: Config, found: Found) -> dict[str, Any]:
    """What result.json is of: the test set, and the MLPs, which say of which experts they are."""
    heads = {k: mixture_files.digest(c.output_dir / k) for k in found.plan.categories}
    return {'test': data.fingerprint(found.data.test), 'heads': heads}


def measured(c: Config, found: Found) -> bool:
    """Whether result.json is of this test set and these models."""
    path = c.output_dir / 'result.json'
    return path.exists() and hf.read_json(path).get('of') == subject(c, found)


def mlp(c: Config, found: Found, category: str) -> tuple[float, float]:
    """One category's, written to the folder; mean and standard deviation of its held-out scores."""
    base = mixture_files.load_base(c.output_dir, category)
    expert_E, scale = mixture_files.load_experts(c.output_dir, category, base)
    model = dmoerm.mixture_of(mixture_files.reward_model(base, found.mesh, scale))
    records = dmoerm_phases.human(found, category, 'mixture')
    some = dmoerm_phases.encoded(c, records, base.tokenizer, category)
    shape = dmoerm.shape_of(some, base.config.D, 32)
    params = {'backbone': base.backbone, 'experts': expert_E}
    of = dmoerm.cached(model, params, some, shape, found.mesh)
    part = dmoerm.split(of, some, dmoerm_phases.held(some, records, 0.3), c.seed)
    mixing = dmoerm.Mixing(c.learning_rate, c.max_steps, c.train_batch_size, c.eval_steps,
                           c.weight_decay)  # fmt: skip
    head = members.select(dmoerm.mixed(mixing, model, [part], found.mesh), 0)
    mixture_files.export_head(c.output_dir, category, head,
                              provenance=dmoerm_phases.provenance(c))  # fmt: skip
    score_c = features.candidate_scores(
        jax.jit(features.scored(model.rewards)), {'head': head}, part.held_of, part.held,
        mesh=found.mesh,
    )  # fmt: skip
    return float(score_c.mean()), float(score_c.std())


def measure(c: Config, found: Found) -> None:
    """Accuracy on the test set by every way to choose the route, of each category and overall."""
    model, records = routed.load(c.output_dir, mesh=found.mesh), found.data.test
    known = [r for r in records if r.group in found.plan.categories]
    rows, said = {}, {}
    for route in routed.ROUTES:
        ready = model.prepare(known, route=route)
        right_n = right(known, model.score_prepared(ready))
        said[route] = evaluate.interval(right_n, prompts=evaluate.prompts(known))
        each = [right_n[[r.group == name for r in known]] for name in found.plan.categories]
        rows[route] = [said[route], *(f'{np.nanmean(x):.3f}' for x in each)]
    chosen = np.array(found.plan.categories)[model.prepare(known).route_n]
    hit = float(np.mean(chosen == [r.group for r in known]))
    common.table('accuracy by route', rows, ['all', *found.plan.categories], paste=True)
    common.console.print(f'prompts that the router names right: {hit:.3f}')
    result = {'of': subject(c, found), 'accuracy': said, 'router': hit}
    common.write_json(c.output_dir / 'result.json', result)


def right(records: Sequence[Preference], scores: Sequence[Any]) -> np.ndarray:
    """[n] accuracy of each record, NaN for one without an order."""
    return evaluate.pairs(evaluate.ranks(records), scores).accuracy


if __name__ == '__main__':
    common.launch(Config, main)
