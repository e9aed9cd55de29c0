"""LoRA adapters as PEFT stores them: tensor names, and the settings in adapter_config.json."""

from collections import Counter
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from jaxrm import hf
from jaxrm.backbones.layers import Config

PREFIX = 'base_model.model.'
CLASSIFIERS = {'score', 'classifier'}  # PEFT lists both for any sequence classifier
# Fields of adapter_config.json that do not change what the stored tensors mean. Any other field
# must be empty or false.
NEUTRAL = {
    'auto_mapping', 'base_model_name_or_path', 'exclude_modules', 'inference_mode',
    'layers_pattern', 'layers_to_transform', 'lora_alpha', 'lora_dropout', 'megatron_core',
    'peft_version', 'qalora_group_size', 'r', 'revision', 'target_modules',
}  # fmt: skip
FIXED = {
    'peft_type': ('LORA',),
    'task_type': ('SEQ_CLS', 'CAUSAL_LM', 'FEATURE_EXTRACTION', None),
    'bias': ('none', None),
    'init_lora_weights': (True, False, 'gaussian', None),  # others change the base's weights
}


def adapter_path(leaf: str) -> str:
    """'backbone/layers/q/kernel' -> 'lora/layers/q/'."""
    return leaf.replace('backbone/', 'lora/', 1).removesuffix('kernel')


def slots_of_leaves(
    slots: Mapping[str, hf.Slot], adapters: Mapping[str, Any]
) -> dict[str, hf.Slot]:
    """{PEFT name: slot} of an adapter's leaves over a model's slots; one rank throughout."""
    ranks = [x.shape[-1] for name, x in adapters.items() if name.endswith('/a')]
    adapted = {name.rsplit('/', 1)[0] + '/' for name in adapters}
    return _adapters(slots, adapted, ranks[0] if ranks else 0)


def slots_of_names(
    slots: Mapping[str, hf.Slot], names: Collection[str], rank: int
) -> dict[str, hf.Slot]:
    """The same from the names in an adapter's file: whatever is adapted in any layer is in all."""
    adapted = {
        adapter_path(slot.leaf)
        for name, slot in slots.items()
        if {f'{PREFIX}{_module(name)}.lora_{part}.weight' for part in 'AB'} & set(names)
    }
    if not adapted:
        raise ValueError(f'adapter: none of its {len(names)} tensors belongs to a known module')
    return _adapters(slots, adapted, rank)


def _adapters(
    slots: Mapping[str, hf.Slot], adapted: Collection[str], rank: int
) -> dict[str, hf.Slot]:
    out = {}
    for name, slot in slots.items():
        path = adapter_path(slot.leaf)
        if path in adapted:
            *stack, fan_in, fan_out = slot.shape
            name = PREFIX + _module(name)
            out[f'{name}.lora_A.weight'] = hf.Slot(path + 'a', slot.layer, (*stack, fan_in, rank))
            out[f'{name}.lora_B.weight'] = hf.Slot(path + 'b', slot.layer, (*stack, rank, fan_out))
    return out


def head_slots(head: str | None, config: Config) -> dict[str, hf.Slot]:
    """The slot of the head that is saved whole with an adapter."""
    return {PREFIX + name: slot for name, slot in hf.head_layout(head, config).items()}


def _module(name: str) -> str:
    return name.removesuffix('.weight')


def config(
    slots: Mapping[str, hf.Slot],
    layout: Mapping[str, hf.Slot],
    scale: float,
    *,
    base: str,
    head: str | None,
) -> dict[str, Any]:
    """adapter_config.json for an adapter's slots over a model's layout."""
    rank = next(slot.shape[-1] for name, slot in slots.items() if '.lora_A.' in name)
    alpha = scale * rank
    return {
        'base_model_name_or_path': base,
        'bias': 'none',
        'fan_in_fan_out': False,
        'inference_mode': True,
        'init_lora_weights': True,
        'lora_alpha': int(alpha) if alpha == int(alpha) else alpha,
        'lora_dropout': 0.0,
        'modules_to_save': [hf.HEADS[head].tensor.removesuffix('.weight')] if head else None,
        'peft_type': 'LORA',
        'r': rank,
        'target_modules': _targets(slots, layout),
        'task_type': 'SEQ_CLS' if head else 'CAUSAL_LM',
    }


def _targets(slots: Mapping[str, hf.Slot], layout: Mapping[str, hf.Slot]) -> list[str]:
    """Last names such as q_proj when all their modules are adapted, else whole names."""
    last = lambda name: name.rsplit('.', 1)[1]  # noqa: E731
    whole = [n.removeprefix(PREFIX).split('.lora_A.')[0] for n in slots if '.lora_A.' in n]
    there = Counter(last(_module(name)) for name in layout)
    full = {name for name, n in Counter(map(last, whole)).items() if n == there[name]}
    return sorted({last(n) if last(n) in full else n for n in whole})


def read_config(path: Path) -> tuple[int, float, str | None]:
    """(rank, alpha, kind of head) of a plain LoRA adapter; raises ValueError for any other."""
    found = hf.read_json(path)
    odd = {k: v for k, v in found.items() if k not in NEUTRAL and k not in FIXED and v}
    odd |= {k: found.get(k) for k, allowed in FIXED.items() if found.get(k) not in allowed}
    saved = set(odd.pop('modules_to_save', []))
    if saved - CLASSIFIERS:
        odd['modules_to_save'] = sorted(saved)
    if odd:
        raise ValueError(f'{path}: found {odd}, expected plain LoRA')
    rank, alpha = found.get('r'), found.get('lora_alpha')
    if not isinstance(rank, int) or rank < 1 or not isinstance(alpha, int | float):
        raise ValueError(f'{path}: found r={rank!r}, lora_alpha={alpha!r}, expected numbers')
    return rank, alpha, 'score' if saved or found.get('task_type') == 'SEQ_CLS' else None
