"""From what `jaxrm plan` is asked to the plan that is found."""

from typing import Any

from jaxrm import costs, machines, plan, plan_models, plan_report
from jaxrm.plan_asked import Asked

LEARNS = {name: learns for learns, name in plan_report.METHODS.items()}


def _method(asked: Asked) -> costs.Method:
    targets = tuple(name.removesuffix('_proj') for name in asked.lora_target_modules)
    if asked.members < 1:
        raise ValueError(f'members: found {asked.members}, expected at least 1')
    if asked.method != 'lora' and targets:
        raise ValueError(f'lora_target_modules: found {targets} with {asked.method}, expected none')
    if asked.method == 'score' and asked.remat not in (None, 'none'):
        raise ValueError(f'remat: found {asked.remat!r} with score, which keeps nothing')
    if asked.method == 'full' and asked.members > 1:
        raise ValueError(f'members: found {asked.members} with full, which shares nothing')
    several = asked.method == 'score' and asked.members > 1  # each has an adapter of its own
    rank = asked.lora_r if asked.method == 'lora' or several else 0
    targets = targets or costs.LINEARS
    return costs.Method(LEARNS[asked.method], rank, targets, 'none', asked.members)


def read(asked: Asked) -> tuple[plan.Wanted, dict[str, Any]]:
    """What is to be searched, and the keys of the model's config.json.

    Raises ValueError for what does not exist or does not go together.
    """
    if asked.max_length < 1:
        raise ValueError(f'max_length: found {asked.max_length}, expected at least 1')
    machine, method = machines.parse(asked.machine), _method(asked)
    hf = plan_models.config_json(asked.model)
    config = plan_models.config(asked.model, hf)
    longest, sizes = asked.max_length, (asked.remat, asked.fsdp, asked.tensor)
    return plan.Wanted(config, method, machine, longest, *sizes), hf


def made(asked: Asked, wanted: plan.Wanted) -> tuple[plan_report.Found, plan.Run]:
    """The plan, and the run that it is of."""
    best = plan.best(wanted, asked.tokens)
    return plan_report.of(asked.model, best, plan.largest(wanted)), best.run
