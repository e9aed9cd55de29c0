"""DMoERM on disk: a folder of ordinary checkpoints, and `dmoerm.json` that says how they belong.

    dmoerm.json                    categories in the router's order, their capabilities
    router/                        a transformers classifier of prompts
    CATEGORY/base/                 a transformers reward model, the task's base
    CATEGORY/experts/CAPABILITY/   a PEFT adapter of that base, with a head of its own
    CATEGORY/mixture.safetensors   the MLP, named as by torch's Sequential(Linear, PReLU, Linear)

Each training phase adds its part, so that the next one starts from files. An expert says of which
base it is, by a digest of its weights, and an MLP of which experts and in which order: what stands
on others is refused. Parts that were made elsewhere say nothing, and are taken as they are.
"""

import dataclasses
import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from jaxrm import backbones, bundle, checkpoint, heads, hf, mixture, processes, tree
from jaxrm.backbones import attention
from jaxrm.checkpoint import Pretrained
from jaxrm.reward import RewardModel

FILE, ROUTER, BASE, EXPERTS, HEAD = (
    'dmoerm.json', 'router', 'base', 'experts', 'mixture.safetensors',
)  # fmt: skip
# {tensor: leaf}; a linear map's weight is [out, in] there.
NAMES = {
    'mlp.0.weight': 'hidden/kernel',
    'mlp.0.bias': 'hidden/bias',
    'mlp.1.weight': 'slope',
    'mlp.2.weight': 'out/kernel',
    'mlp.2.bias': 'out/bias',
}


@dataclasses.dataclass(frozen=True)
class Plan:
    """What dmoerm.json says.

    `capabilities` are those of each category, in the order of its experts; `turns` as in
    mixture.shown; `normaliser`, where there is one, is the mean and the standard deviation of each
    category's scores on held-out answers.
    """

    categories: tuple[str, ...]
    capabilities: Mapping[str, tuple[str, ...]]
    turns: str = 'last'
    normaliser: Mapping[str, tuple[float, float]] | None = None
    provenance: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in (*self.categories, *(p for of in self.capabilities.values() for p in of)):
            if not re.fullmatch(r'\w[\w .-]*', name) or name == ROUTER:
                raise ValueError(f'{name!r}: found a name that no folder can have')
        for what, names in {'categories': self.categories, **self.capabilities}.items():
            if len(set(names)) != len(names) or not names:
                raise ValueError(f'{what}: found {tuple(names)}, expected different names')
        if set(self.capabilities) != set(self.categories):
            found, want = sorted(self.capabilities), sorted(self.categories)
            raise ValueError(f'capabilities: found those of {found}, expected those of {want}')
        if self.turns not in mixture.TURNS:
            raise ValueError(f'turns: found {self.turns!r}, expected one of {mixture.TURNS}')
        for name, numbers in (self.normaliser or {}).items():
            if len(numbers) != 2 or not numbers[1] > 0 or not np.isfinite(numbers).all():
                raise ValueError(f'normaliser: {name}: found {numbers}, expected mean and std > 0')
        if self.normaliser is not None and set(self.normaliser) != set(self.categories):
            raise ValueError(
                f'normaliser: found {sorted(self.normaliser)}, expected all categories'
            )


def is_one(path: str | Path) -> bool:
    """Whether a folder holds a DMoERM."""
    return (Path(path) / FILE).exists()


def write_plan(path: str | Path, plan: Plan) -> None:
    """Writes dmoerm.json, over an old one."""

    def write() -> None:
        folder = Path(path)
        folder.mkdir(parents=True, exist_ok=True)
        part = folder / f'.{FILE}'
        hf.write_json(part, {'version': 1, **dataclasses.asdict(plan)})
        part.replace(folder / FILE)

    processes.alone(write)


def read_plan(path: str | Path) -> Plan:
    """dmoerm.json; raises ValueError naming what is wrong in it."""
    where = Path(path) / FILE
    found = hf.read_json(where)
    fields = {f.name for f in dataclasses.fields(Plan)}
    if (version := found.pop('version', None)) != 1:
        raise ValueError(f'{where}: version: found {version!r}, expected 1')
    if set(found) != fields:
        raise ValueError(f'{where}: found {sorted(found)}, expected {sorted(fields)}')
    _check_kinds(where, found)
    try:
        found['categories'] = tuple(found['categories'])
        found['capabilities'] = {k: tuple(v) for k, v in found['capabilities'].items()}
        if found['normaliser'] is not None:
            found['normaliser'] = {k: tuple(v) for k, v in found['normaliser'].items()}
        return Plan(**found)
    except (TypeError, ValueError) as error:
        raise ValueError(f'{where}: {error}') from error


def _check_kinds(where: Path, found: Mapping[str, Any]) -> None:
    """A string is a list of letters, and 3 has none: such fields are named."""

    def names(value: Any) -> bool:
        return isinstance(value, list) and all(isinstance(x, str) for x in value)

    def numbers(value: Any) -> bool:
        return isinstance(value, list) and all(type(x) in (int, float) for x in value)

    def every(check: Any) -> Any:
        return lambda value: isinstance(value, dict) and all(map(check, value.values()))

    kinds = {
        'categories': (names, 'a list of names'),
        'capabilities': (every(names), 'lists of names by category'),
        'normaliser': (lambda x: x is None or every(numbers)(x), 'mean and std by category'),
        'provenance': (lambda x: isinstance(x, dict), 'an object'),
    }
    for field, (right, expected) in kinds.items():
        if not right(found[field]):
            raise ValueError(f'{where}: {field}: found {found[field]!r}, expected {expected}')


# Which parts belong together


def digest(folder: Path) -> str:
    """Of the weights in a checkpoint's folder; of an adapter with its settings."""
    out = hashlib.sha256()
    for file in sorted([*folder.glob('*.safetensors'), *folder.glob(hf.ADAPTER)]):
        with open(file, 'rb') as opened:
            out.update(hashlib.file_digest(opened, 'sha256').digest())
    return out.hexdigest()


def digests(path: str | Path, category: str) -> dict[str, str]:
    """Of a category's experts, in the order of the plan."""
    names, folder = read_plan(path).capabilities[category], _of(path, category) / EXPERTS
    return {name: digest(folder / name) for name in names}


def check_experts(path: str | Path, category: str) -> None:
    """Raises ValueError for an expert that learned on another base than the one that is there."""
    folder = _of(path, category)
    base = digest(folder / BASE)
    for name in read_plan(path).capabilities[category]:
        where = folder / EXPERTS / name / bundle.FILE
        said = hf.read_json(where) if where.exists() else {}
        was = said.get('provenance', {}).get('base_digest', base)
        if was != base:
            found = f'is of a base {was[:12]}, found {base[:12]} in {BASE}'
            raise ValueError(f'{where.parent}: {found}: it was replaced')


def check_head(path: str | Path, category: str) -> None:
    """Raises ValueError for an MLP that learned on other experts, or in another order."""
    where = _of(path, category) / HEAD
    said = head_metadata(where).get('experts')
    if said is None:
        return
    was, now = json.loads(said), digests(path, category)
    if list(was) != list(now):
        raise ValueError(f'{where}: is of experts {list(was)}, expected {list(now)}')
    for name, found in now.items():
        if was[name] != found:
            here = f'is of {name!r} {was[name][:12]}, found {found[:12]} in {EXPERTS}'
            raise ValueError(f'{where}: {here}: it was replaced')


def head_metadata(where: Path) -> dict[str, str]:
    """What an MLP's file says of itself: 'experts' and 'provenance', values of JSON."""
    return _read_head(where)[1]


def _read_head(where: Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    try:
        with safe_open(where, 'numpy') as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise ValueError(f'{where}: cannot be read: {error}') from error


# Parts out; each is what one phase learns


def export_router(path: str | Path, params: tree.Tree, like: Pretrained, **options: Any) -> None:
    """The classifier of prompts; options as in checkpoint.export."""
    like = dataclasses.replace(like, objectives=read_plan(path).categories)
    checkpoint.export(Path(path) / ROUTER, params, like, head_kind='categories', **options)


def export_base(
    path: str | Path, category: str, params: tree.Tree, like: Pretrained, **options: Any
) -> None:
    """A category's base with its scalar head; options as in checkpoint.export."""
    checkpoint.export(_of(path, category) / BASE, params, like, **options)


def export_experts(
    path: str | Path, category: str, experts: tree.Tree, like: Pretrained, *, lora_scale: float,
    **options: Any,
) -> None:  # fmt: skip
    """A category's experts, {'lora', 'head'} with a leading E, in the order of the plan.

    The base is in the folder already: their provenance names it. Options as in
    checkpoint.export_adapter.
    """
    base = {'base_digest': processes.first() and digest(_of(path, category) / BASE)}
    provenance = {**(options.pop('provenance', None) or {}), **base}
    names, flat = read_plan(path).capabilities[category], tree.flatten(experts)
    if odd := {name: x.shape for name, x in flat.items() if len(x) != len(names)}:
        raise ValueError(f'experts: found {odd}, expected a leading axis of {len(names)}')
    for i, name in enumerate(names):
        one = tree.unflatten({leaf: x[i] for leaf, x in flat.items()})
        checkpoint.export_adapter(
            _of(path, category) / EXPERTS / name, one, like,
            lora_scale=lora_scale, base=f'{category}/{BASE}', provenance=provenance, **options,
        )  # fmt: skip


def export_head(
    path: str | Path, category: str, head: tree.Tree, *, provenance: Mapping[str, Any] | None = None
) -> None:
    """A category's MLP, whose experts are in the folder already."""
    flat = {leaf: np.asarray(x) for leaf, x in processes.to_first(tree.flatten(head)).items()}
    out = {name: np.ascontiguousarray(_turned(name, flat[leaf])) for name, leaf in NAMES.items()}

    def write() -> None:
        part = _of(path, category) / f'.{HEAD}'
        said = {'experts': digests(path, category), 'provenance': dict(provenance or {})}
        text = {name: json.dumps(value) for name, value in said.items()}
        save_file(out, part, metadata={'format': 'pt', **text})
        part.replace(part.with_name(HEAD))

    processes.alone(write)


def _of(path: str | Path, category: str) -> Path:
    plan = read_plan(path)
    if category not in plan.categories:
        raise ValueError(f'category: found {category!r}, expected one of {plan.categories}')
    return Path(path) / category


def _turned(name: str, x: np.ndarray) -> np.ndarray:
    return x.T if x.ndim == 2 else x


# Parts in


def load_router(path: str | Path, *, dtype: Any = None) -> Pretrained:
    """The classifier of prompts; raises ValueError unless its categories are the plan's."""
    plan = read_plan(path)
    found = checkpoint.load_pretrained(Path(path) / ROUTER, kind='categories', dtype=dtype)
    if found.objectives != plan.categories:
        names = found.objectives
        raise ValueError(f'{path}: {ROUTER} knows {names}, expected {plan.categories}')
    return found


def load_base(path: str | Path, category: str, *, dtype: Any = None) -> Pretrained:
    """A category's base with its scalar head."""
    return checkpoint.load_pretrained(_of(path, category) / BASE, dtype=dtype)


def load_experts(path: str | Path, category: str, base: Pretrained) -> tuple[tree.Tree, float]:
    """A category's experts, in the order of the plan, and the scale of their adapters.

    Raises ValueError for one that is missing, or that differs in kind from the first.
    """
    folder, names = _of(path, category) / EXPERTS, read_plan(path).capabilities[category]
    found = [checkpoint.load_adapter(folder / name, base) for name in names]
    trees: list[tree.Tree] = []
    for name, adapter in zip(names, found, strict=True):
        if adapter.head is None:
            raise ValueError(f'{folder / name}: found no head, expected that of an expert')
        trees.append({'lora': adapter.lora, 'head': adapter.head})
        first, this = (
            {leaf: x.shape for leaf, x in tree.flatten(t).items()} for t in (trees[0], trees[-1])
        )
        if first != this or adapter.scale != found[0].scale:
            raise ValueError(f'{folder / name}: is another kind of adapter than {names[0]!r}')
    return mixture.join(trees), found[0].scale


def load_head(path: str | Path, category: str, *, experts: int, width: int) -> tree.Tree:
    """A category's MLP; raises ValueError unless it is for so many experts of this width."""
    where = _of(path, category) / HEAD
    if not where.exists():
        raise ValueError(f'{where}: no such file, expected the MLP of {category!r}')
    found, _ = _read_head(where)
    if set(found) != set(NAMES):
        raise ValueError(f'{where}: found {sorted(found)}, expected {sorted(NAMES)}')
    hidden = found['mlp.0.weight'].shape[0]
    shapes = {'mlp.0.weight': (hidden, experts * width), 'mlp.0.bias': (hidden,)}
    shapes |= {'mlp.1.weight': (1,), 'mlp.2.weight': (1, hidden), 'mlp.2.bias': (1,)}
    for name, want in shapes.items():
        if found[name].shape != want:
            raise ValueError(f'{where}: {name} is {found[name].shape}, expected {want}')
    return tree.unflatten({leaf: _turned(name, found[name]) for name, leaf in NAMES.items()})


def load_inner(
    path: str | Path, category: str, *, dtype: Any = None, mesh: Any = None
) -> tuple[mixture.Mixture, tree.Tree, Pretrained]:
    """A category's whole inner model: its functions, its parameters, and its base as found.

    Raises ValueError for parts that do not belong together.
    """
    base = load_base(path, category, dtype=dtype)
    experts, scale = load_experts(path, category, base)
    count = len(tree.flatten(experts['head'])['kernel'])
    head = load_head(path, category, experts=count, width=base.config.D)
    check_experts(path, category)
    check_head(path, category)
    model = mixture.Mixture(
        reward_model(base, mesh, scale), heads.Mixture(head['hidden']['bias'].shape[0])
    )
    return model, {'backbone': base.backbone, 'experts': experts, 'head': head}, base


def reward_model(found: Pretrained, mesh: Any, lora_scale: float = 1.0) -> RewardModel:
    """The functions of a checkpoint that was loaded."""
    compute = jnp.dtype(found.dtype)
    backbone = backbones.family(found.model_type).Backbone(
        found.config, compute, attention.default(compute, found.config, mesh)
    )
    return RewardModel(
        backbone, heads.of(str(found.head_kind), found.config, found.head or {}), lora_scale
    )
