"""What a merge recipe asks for, from settings and headers alone: before weights are read."""

import copy
import dataclasses
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxrm import (
    backbones,
    chat,
    chat_templates,
    checkpoint,
    hf,
    hf_config,
    hf_heads,
    merge,
    merge_config,
    merge_steps,
    shards,
    vocabulary,
)
from jaxrm.backbones.layers import Config
from jaxrm.merge_config import Recipe
from jaxrm.merge_steps import EMBEDDING, LAYER, Input, Step

LM_HEAD = 'lm_head.weight'
TABLES = (EMBEDDING, LM_HEAD)  # these have a row a token
SPECIAL = ('bos_token_id', 'eos_token_id', 'pad_token_id')
COPY, AVERAGE = 'passthrough', 'warm'  # methods for heads
NO_REWARDS = {'lm_head': 'a language model', 'categories': 'categories'}


class Model(NamedTuple):
    """An input; `name` is as in the recipe, `like` has no arrays."""

    name: str
    folder: Path
    like: checkpoint.Pretrained
    sizes: hf_heads.Sizes
    entries: dict[str, shards.Entry]


@dataclasses.dataclass(frozen=True, eq=False)
class Merge:
    """A merge that can be done; `like` is the output without arrays, `notes` what to know of it."""

    recipe: Recipe
    models: tuple[Model, ...]
    like: checkpoint.Pretrained
    sizes: hf_heads.Sizes
    slots: dict[str, hf.Slot]
    steps: dict[str, Step]
    dtypes: dict[str, np.dtype]
    heads: frozenset[str]  # tensors that reward_head says where to take from
    rows: vocabulary.Plan | None
    notes: tuple[str, ...]

    @property
    def tensors(self) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
        """{name: (shape, dtype)} of the output."""
        return {name: (slot.on_disk, self.dtypes[name]) for name, slot in self.slots.items()}

    @property
    def bytes(self) -> int:
        return sum(shards.size(*each) for each in self.tensors.values())


# Before the merge


def prepare(path: str | os.PathLike) -> Merge:
    """What a recipe asks for; raises ValueError for what cannot be done as it says."""
    recipe = merge_config.read(Path(path))
    models = tuple(_model(recipe, name) for name in recipe.models)
    first = _first(recipe, models)
    depths = {model.name: model.like.config.L for model in models}
    notes = _check_models(recipe, models, first)
    try:
        rows, notes_of_rows, like = _vocabulary(recipe, models, first)
    except ValueError as error:
        raise ValueError(f'{recipe.path}: {error}') from error
    origins = merge_steps.origins(recipe, depths)
    config = _config(recipe, {m.name: m for m in models}, like.config, origins)
    like = dataclasses.replace(like, config=config)
    kind, sizes = like.head_kind, models[first].sizes
    slots = hf.layout(backbones.family(like.model_type), like.config, kind, sizes)
    heads = frozenset(hf.head_layout(kind, like.config, sizes) if recipe.head is not None else ())
    steps = merge_steps.steps(recipe, depths, [name for name in slots if name not in heads])
    steps += [_head_step(name, recipe, models) for name in slots if name in heads]
    named = {step.name: _untied(step, models) for step in steps}
    _check_tensors(recipe, models, slots, named.values(), first)
    for step in named.values():
        merge.complete(
            step.method, step.parameters, len(step.inputs), f'{recipe.path}: {step.name}'
        )
    dtypes = {name: _dtype(recipe, models, step) for name, step in named.items()}
    notes += [*notes_of_rows, *_notes_of_pad(recipe, models[first], like, dtypes[EMBEDDING])]
    notes += _unused(recipe, [step for name, step in named.items() if name not in heads])
    return Merge(recipe, models, like, sizes, slots, named, dtypes, heads, rows, tuple(notes))


def _model(recipe: Recipe, name: str) -> Model:
    """A model's settings and headers, whose tensors are those of its class."""
    folder = _folder(recipe, name)
    where = folder / hf.CONFIG
    if (folder / hf.ADAPTER).exists() and not where.exists():
        raise ValueError(f'{folder}: holds an adapter, expected a model: fold it into its base')
    found = checkpoint.look(folder, _kind(where, hf.read_json(where)))
    entries = hf.entries(found.files, found.slots)
    return Model(name, folder, found.like, found.sizes, entries)


def _folder(recipe: Recipe, name: str) -> Path:
    """Of a path relative to the recipe's file, or of a hub id, as in org/name@revision."""
    beside = recipe.path.parent / name
    if beside.is_dir():
        return beside
    if '+' in name:
        raise ValueError(f'{recipe.path}: {name}: expected no adapter: fold it into its base first')
    path, _, revision = name.partition('@')
    if Path(path).exists() or (recipe.path.parent / path).exists():
        raise ValueError(f'{recipe.path}: {name}: {beside} is no folder (paths are relative to it)')
    try:
        return checkpoint.resolve(path, revision or None)
    except ValueError as error:
        raise ValueError(f'{recipe.path}: {error}') from error


def _kind(where: Path, found: Mapping[str, Any]) -> str:
    """A key of hf_heads.WANTED, by config.json."""
    given = found.get('architectures') or []
    if isinstance(given, list) and any(str(c).endswith(hf_heads.CAUSAL) for c in given):
        return 'causal_lm'
    several = hf_heads.count_labels(where, found) != 1
    problems = {problem: kind for kind, problem in hf_heads.PROBLEMS.items()}
    return problems.get(str(found.get('problem_type')), 'reward') if several else 'reward'


def _first(recipe: Recipe, models: Sequence[Model]) -> int:
    """The model whose settings, tokenizer and kind of head the output has.

    Raises ValueError for heads that cannot be merged, or that are not there.
    """
    kinds = {model.name: model.like.head_kind for model in models}
    rewards = [model for model in models if model.like.head_kind not in NO_REWARDS]
    if recipe.head is None:
        chosen = recipe.base or models[0].name
        if len(set(kinds.values())) > 1:
            expected = 'expected the same, or a reward_head that says which the result has'
            raise ValueError(f'{recipe.path}: found heads {kinds}, {expected}')
        alike = models
    elif recipe.head:
        chosen = recipe.head
        if what := NO_REWARDS.get(str(kinds[chosen])):
            expected = f'{chosen} has a head of {what}, expected one of rewards'
            raise ValueError(f'{recipe.path}: reward_head: {expected}')
        alike = ()
    else:
        if not rewards:
            raise ValueError(f'{recipe.path}: reward_head: found {kinds}, expected a reward model')
        chosen, alike = rewards[0].name, rewards
    odd = [m.name for m in alike if _of_head(m) != _of_head(alike[0])]
    if odd:
        raise ValueError(f'{recipe.path}: {odd[0]} and {alike[0].name} have different heads')
    return recipe.models.index(chosen)


def _of_head(model: Model) -> tuple[Any, ...]:
    like = model.like
    return like.head_kind, model.sizes, like.objectives, like.temperature, like.scales


def _check_models(recipe: Recipe, models: Sequence[Model], first: int) -> list[str]:
    """Notes on differences that may be; raises ValueError for families and settings that differ."""
    order = [models[first], *(m for i, m in enumerate(models) if i != first)]
    types = {model.name: model.like.model_type for model in order}
    if len(set(types.values())) > 1:
        raise ValueError(f'{recipe.path}: found model types {types}, expected the same')
    head = order[0].like.config
    configs = []
    for model in order:
        config = model.like.config
        if models[first].like.head_kind != 'lm_head':
            config = dataclasses.replace(config, tied=head.tied)  # there is no head to tie
        if recipe.slices[0].sources[0].layers is not None:
            config = dataclasses.replace(config, L=1, kinds=(config.kinds[0],), layer_kinds=())
        configs.append(config)
    how = 'keep_first' if recipe.on_mismatch == 'keep_first' else 'raise'
    try:
        return merge.check_configs(configs, [model.name for model in order], on_mismatch=how)
    except ValueError as error:
        raise ValueError(f'{recipe.path}: {error}') from error


def _config(
    recipe: Recipe, models: Mapping[str, Model], config: Config, origins: Sequence[dict[str, int]]
) -> Config:
    """The output's Config: its layers have the kinds that they had where they come from."""
    kinds = []
    for i, origin in enumerate(origins):
        configs = {name: models[name].like.config for name in origin}
        found = {name: c.kinds[c.of_layer[origin[name]]] for name, c in configs.items()}
        if len(set(found.values())) > 1 and recipe.on_mismatch == 'error':
            raise ValueError(f'{recipe.path}: layer {i} would be merged of {found}')
        first = config.kinds[0] if len(config.kinds) == 1 else next(iter(found.values()))
        kinds.append(first if recipe.on_mismatch == 'keep_first' else next(iter(found.values())))
    distinct = tuple(dict.fromkeys(kinds))
    of_layer = tuple(map(distinct.index, kinds)) if len(distinct) > 1 else ()
    return dataclasses.replace(config, L=len(kinds), kinds=distinct, layer_kinds=of_layer)


def _vocabulary(
    recipe: Recipe, models: Sequence[Model], first: int
) -> tuple[vocabulary.Plan | None, list[str], checkpoint.Pretrained]:
    """How rows are found, notes on it, and the output with its vocabulary and tokenizer."""
    like, given = models[first].like, recipe.tokenizer
    tokenizers = [model.like.tokenizer for model in models]
    sizes, names = [model.like.config.V for model in models], list(recipe.models)
    if given is None:
        known = [i for i, tokenizer in enumerate(tokenizers) if tokenizer is not None]
        vocabulary.by_id([tokenizers[i].get_vocab() for i in known], [names[i] for i in known])
        if len(set(sizes)) > 1:
            found = dict(zip(names, sizes, strict=True))
            raise ValueError(f'found vocabularies of {found}, expected a tokenizer section')
        plan, notes = None, []
    else:
        if lacking := [n for n, t in zip(names, tokenizers, strict=True) if t is None]:
            raise ValueError(f'tokenizer: {lacking[0]} has none, expected one to align tokens by')
        plan = vocabulary.plan(
            [tokenizer.get_vocab() for tokenizer in tokenizers],
            sizes,
            names=names,
            first=first,
            base=None if recipe.base is None else names.index(recipe.base),
            source=names[first] if given.source == 'base' and not recipe.base else given.source,
            tokens=given.tokens,
            pad_to_multiple_of=given.pad_to_multiple_of,
        )
        notes = vocabulary.describe(plan)
        tokenizer = vocabulary.tokenizer(plan, tokenizers, like=first)
        config = dataclasses.replace(like.config, V=len(plan.tokens))
        like = dataclasses.replace(like, tokenizer=tokenizer, config=config)
        if plan.first != first:
            like = _renumbered(like, models[plan.first].like)
    return plan, notes, _templated(recipe, models, like)


def _renumbered(like: checkpoint.Pretrained, lead: checkpoint.Pretrained) -> checkpoint.Pretrained:
    """With the ids of special tokens in the leading model's vocabulary, its tokenizer's."""

    def found(settings: Mapping[str, Any], key: str) -> Any:
        i, said = getattr(like.tokenizer, key), settings.get(key)
        return said if isinstance(said, list) and i in said else i

    def renumbered(own: Mapping[str, Any], leading: Mapping[str, Any]) -> dict[str, Any]:
        return {k: found(leading, k) if k in SPECIAL else v for k, v in own.items()}

    generation = like.generation_config
    if generation is not None:
        generation = renumbered(generation, lead.generation_config or lead.hf_config)
    return dataclasses.replace(
        like,
        hf_config=renumbered(like.hf_config, lead.hf_config),
        generation_config=generation,
    )


def _notes_of_pad(
    recipe: Recipe, model: Model, like: checkpoint.Pretrained, dtype: np.dtype
) -> list[str]:
    """What to know of the pad token of the model whose settings the output has.

    Raises ValueError where a reward model has none.
    """
    kind = str(like.head_kind)
    try:
        made = hf_config.make(like, kind, model.sizes, dtype, own_pad=False)
    except ValueError as error:
        raise ValueError(f'{recipe.path}: {model.name}: {error}') from error
    ends = [made.eos_token_id, getattr(like.tokenizer, 'eos_token_id', None)]
    ends = [x for end in ends for x in (end if isinstance(end, list) else [end])]
    if kind in NO_REWARDS or made.pad_token_id not in ends:
        return []
    return [
        f'pad token: {made.pad_token_id}, an end of text, as in {model.name}: of texts that end in '
        "it transformers' classifier reads the token before"
    ]


def _templated(
    recipe: Recipe, models: Sequence[Model], like: checkpoint.Pretrained
) -> checkpoint.Pretrained:
    """With the recipe's chat template, if it names one."""
    said = recipe.chat_template
    if said is None:
        return like
    if said == 'auto':
        all_of_them = [getattr(model.like.tokenizer, 'chat_template', None) for model in models]
        given = [template for template in all_of_them if template]
        if not given:
            raise ValueError('chat_template: found none in any model')
        template = max(dict.fromkeys(given), key=given.count)
    elif '{{' in said or '{%' in said:
        template = said
    elif said in chat_templates.NAMED:
        template = chat_templates.NAMED[said]
    else:
        names = ['auto', *chat_templates.NAMED]
        raise ValueError(f'chat_template: found {said!r}, expected one of {names} or Jinja')
    if like.tokenizer is None:
        raise ValueError('chat_template: found no tokenizer to put it into')
    tokenizer = copy.deepcopy(like.tokenizer)
    tokenizer.chat_template = template
    if like.head_kind != 'lm_head':
        chat.check_template(tokenizer)
    return dataclasses.replace(like, tokenizer=tokenizer)


def _head_step(name: str, recipe: Recipe, models: Sequence[Model]) -> Step:
    if recipe.head:
        source = Input(recipe.models.index(recipe.head), name)
        return Step(name, COPY, (source,), None, {'scale': (1.0,)})
    of = [Input(i, name) for i, m in enumerate(models) if m.like.head_kind not in NO_REWARDS]
    return Step(name, AVERAGE, tuple(of), None, {})


def _untied(step: Step, models: Sequence[Model]) -> Step:
    """A model whose head is its embedding has that in the place of a head."""

    def found(x: Input) -> Input:
        tied = x.tensor == LM_HEAD and x.tensor not in models[x.model].entries
        return x._replace(tensor=EMBEDDING) if tied else x

    base = found(step.base) if step.base else None
    return step._replace(inputs=tuple(map(found, step.inputs)), base=base)


def _check_tensors(
    recipe: Recipe,
    models: Sequence[Model],
    slots: Mapping[str, hf.Slot],
    steps: Iterable[Step],
    first: int,
) -> None:
    """Raises ValueError unless all models have the output's tensors, and in its shapes."""
    heads = {name for m in models for name in hf_heads.of_head(m.like.head_kind, m.entries)}
    names = {LAYER.sub('*', name) for name in slots if name not in heads}
    for model in models:
        if odd := {LAYER.sub('*', n) for n in model.entries.keys() - heads} ^ names:
            lacks = min(odd) in names
            which = f'found {"no " if lacks else ""}{min(odd)}, which {models[first].name}'
            has = 'has' if lacks else 'does not have'
            raise ValueError(f'{recipe.path}: {model.name}: {which} {has}')
    for step in steps:
        for i, tensor in inputs(step):
            found, want = models[i].entries[tensor].shape, slots[step.name].on_disk
            rows = recipe.tokenizer is not None and step.name in TABLES
            if found[rows:] != want[rows:]:
                where = f'{recipe.path}: {models[i].name}: {tensor}'
                raise ValueError(f'{where}: found shape {list(found)}, expected {list(want)}')


def _unused(recipe: Recipe, steps: Sequence[Step]) -> list[str]:
    """Notes on filters that no tensor's name has, such as misspelt ones."""
    names = {step.name for step in steps} | {x.tensor for step in steps for x in inputs(step)}
    sources = [source.settings for piece in recipe.slices for source in piece.sources]
    levels = [*sources, *(piece.settings for piece in recipe.slices), *recipe.settings]
    said = [(key, part) for level in levels for key, parts in level.items() for part, _ in parts]
    unused = [(key, part) for key, part in said if not any(part in name for name in names)]
    return [
        f'filter {part!r} of {key}: is part of the name of no tensor that is merged'
        for key, part in dict.fromkeys(unused)
    ]


def inputs(step: Step) -> list[Input]:
    """What a tensor is made from, the base last."""
    return [*step.inputs, *([step.base] if step.base else [])]


def _dtype(recipe: Recipe, models: Sequence[Model], step: Step) -> np.dtype:
    """Of an output tensor: as the recipe says, or that of all inputs, or float32."""
    if said := recipe.out_dtype or recipe.dtype:
        return np.dtype(said)
    found = {models[x.model].entries[x.tensor].dtype for x in inputs(step)}
    return shards.DTYPES[found.pop() if len(found) == 1 else 'F32']
