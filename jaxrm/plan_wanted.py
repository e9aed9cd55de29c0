"""From what `jaxrm plan` is asked to the plan that is found."""

from typing import Any

from jaxrm import costs, machines, plan, plan_models, plan_report
from jaxrm.backbones.layers import Config
from jaxrm.plan_asked import Asked

LEARNS = {name: learns for learns, name in plan_report.METHODS.items()}
RANK = 16


def _method(asked: Asked, config: Config) -> costs.Method:
    if asked.members < 1:
        raise ValueError(f'members: found {asked.members}, expected at least 1')
    if asked.method == 'score' and asked.remat not in (None, 'none'):
        raise ValueError(f'remat: found {asked.remat!r} with score, which keeps nothing')
    if asked.method == 'full' and asked.members > 1:
        raise ValueError(f'members: found {asked.members} with full, which shares nothing')
    several = asked.method == 'score' and asked.members > 1  # each has an adapter of its own
    if asked.method == 'lora' or several:
        rank, targets = _adapter(asked, config)
        return costs.Method(LEARNS[asked.method], rank, targets, 'none', asked.members)
    for name in ('lora_r', 'lora_target_modules'):
        if (given := getattr(asked, name)) is not None:
            raise ValueError(f'{name}: found {given} with {asked.method}, which has no adapter')
    return costs.Method(LEARNS[asked.method], 0, remat='none')


def _adapter(asked: Asked, config: Config) -> tuple[int, tuple[str, ...]]:
    """Rank and linears."""
    rank = RANK if asked.lora_r is None else asked.lora_r
    if not 1 <= rank <= config.D:
        raise ValueError(f"lora_r: found {rank}, expected 1 to {config.D}, the model's width")
    if asked.lora_target_modules is None:
        return rank, costs.LINEARS
    targets = tuple(name.removesuffix('_proj') for name in asked.lora_target_modules)
    if not targets or set(targets) - set(costs.LINEARS) or len(set(targets)) < len(targets):
        known = [f'{name}_proj' for name in costs.LINEARS]
        given = list(asked.lora_target_modules)
        raise ValueError(f'lora_target_modules: found {given}, expected some of {known}, each once')
    return rank, targets


def read(asked: Asked) -> tuple[plan.Wanted, dict[str, Any]]:
    """What is to be searched, and the keys of the model's config.json.

    Raises ValueError for what does not exist or does not go together.
    """
    machine, hf = machines.parse(asked.machine), plan_models.config_json(asked.model)
    config = plan_models.config(asked.model, hf)
    method, longest, limit = _method(asked, config), asked.max_length, config.max_position
    if not 1 <= longest <= limit:
        raise ValueError(f"max_length: found {longest}, expected 1 to {limit}, the model's own")
    return plan.Wanted(config, method, machine, longest, asked.remat, asked.fsdp, asked.tensor), hf


def made(asked: Asked, wanted: plan.Wanted) -> tuple[plan_report.Found, plan.Run]:
    """The plan, and the run that it is of."""
    best = plan.best(wanted, asked.tokens)
    return plan_report.of(asked.model, best, plan.largest(wanted)), best.run
