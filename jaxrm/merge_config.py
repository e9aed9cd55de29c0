"""Merge recipes: YAML as mergekit reads it, checked before any model is looked at.

A parameter is a number, numbers that run along the layers, or a list of `filter` and `value`, of
which the first whose filter is part of a tensor's name counts.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jaxrm import merge, places, shards
from jaxrm.places import Node

KEYS = (
    'merge_method', 'models', 'slices', 'modules', 'base_model', 'parameters', 'dtype', 'out_dtype',
    'tokenizer', 'tokenizer_source', 'chat_template', 'reward_head', 'lm_head', 'on_mismatch',
    'name',
)  # fmt: skip
DTYPES = sorted(dtype.name for dtype in shards.DTYPES.values())
IGNORED = {'int8_mask'}  # memory for speed, in mergekit

# {parameter: (part of a name, values along the layers), ...}; '' is part of every name.
Settings = Mapping[str, tuple[tuple[str, tuple[Any, ...]], ...]]


class Source(NamedTuple):
    """A model's part in a slice; `layers` is [first, end), None for all."""

    where: str
    model: str
    layers: tuple[int, int] | None
    settings: Settings


class Slice(NamedTuple):
    """Consecutive layers of the output, and how they are made."""

    where: str
    sources: tuple[Source, ...]
    base: str | None
    settings: Settings


class Tokens(NamedTuple):
    """The output's vocabulary; `tokens` as vocabulary.plan takes them."""

    source: str
    tokens: dict[str, dict[str, Any]]
    pad_to_multiple_of: int | None


class Recipe(NamedTuple):
    """A whole recipe; models are named as in the file.

    `settings` are those of the module and of the recipe; `head` is the model whose head is taken
    as it is, '' to average all, None to merge heads like any tensor.
    """

    path: Path
    text: str
    method: str
    slices: tuple[Slice, ...]
    settings: tuple[Settings, ...]
    base: str | None
    dtype: str | None
    out_dtype: str | None
    tokenizer: Tokens | None
    chat_template: str | None
    head: str | None
    on_mismatch: str

    @property
    def models(self) -> tuple[str, ...]:
        """Each once, by first mention in the slices."""
        sources = [source.model for piece in self.slices for source in piece.sources]
        return tuple(dict.fromkeys([*sources, *filter(None, [self.base])]))


# Reading


def read(path: Path) -> Recipe:
    """A recipe from its file; raises ValueError naming the file, line and key of what is wrong."""
    found = places.fields(document := places.read(path), KEYS, ['merge_method'])
    name = places.text(found['merge_method'])
    if name not in merge.METHODS:
        raise places.wrong(found['merge_method'], f'one of {sorted(merge.METHODS)}')
    form, body, settings = _form(document, found, name)
    base = places.text(found['base_model']) if 'base_model' in found else None
    slices = _slices(body, name) if form == 'slices' else _models(body, name, base)
    for piece in slices:
        _check_inputs(piece, name, piece.base or base)
    recipe = Recipe(
        path=path,
        text=path.read_text(encoding='utf-8-sig'),
        method=name,
        slices=slices,
        settings=(*settings, _settings(found.get('parameters'), name)),
        base=base,
        dtype=_choice(found, 'dtype', DTYPES),
        out_dtype=_choice(found, 'out_dtype', DTYPES),
        tokenizer=None,
        chat_template=_template(found.get('chat_template')),
        head=None,
        on_mismatch=_choice(found, 'on_mismatch', ('error', 'keep_first')) or 'error',
    )
    head = _head(found, recipe.models)
    return recipe._replace(tokenizer=_tokenizer(found, recipe.models), head=head)


def _form(
    document: Node, found: Mapping[str, Node], method: str
) -> tuple[str, Node, list[Settings]]:
    """'models' or 'slices', its list, and the settings of the module around it."""
    given = [key for key in ('models', 'slices', 'modules') if key in found]
    if len(given) != 1:
        expected = 'expected one of models, slices and modules'
        raise ValueError(f'{document.where}: found {given or "none"}, {expected}')
    if given != ['modules']:
        return given[0], found[given[0]], []
    inner = places.fields(found['modules'], ['default'], ['default'])['default']
    module = places.fields(inner, ('models', 'slices', 'parameters'))
    given = [key for key in ('models', 'slices') if key in module]
    if len(given) != 1:
        raise ValueError(f'{inner.where}: found {given or "none"}, expected models or slices')
    return given[0], module[given[0]], [_settings(module.get('parameters'), method)]


def _models(node: Node, method: str, base: str | None) -> tuple[Slice, ...]:
    """One slice of all layers; the base is a model, too, if it is not listed."""
    sources = []
    for item in places.items(node):
        found = places.fields(item, ('model', 'parameters'), ['model'])
        settings = _settings(found.get('parameters'), method, each=True)
        sources.append(Source(item.where, places.text(found['model']), None, settings))
    if base is not None and base not in {source.model for source in sources}:
        sources.append(Source(node.where, base, None, {}))
    return (Slice(node.where, tuple(sources), None, {}),)


def _slices(node: Node, method: str) -> tuple[Slice, ...]:
    out = []
    for item in places.items(node):
        found = places.fields(item, ('sources', 'base_model', 'parameters'), ['sources'])
        sources = tuple(_source(x, method) for x in places.items(found['sources']))
        counts = [end - first for first, end in (source.layers for source in sources)]  # type: ignore[misc]
        if len(set(counts)) > 1:
            raise ValueError(f'{item.where}: found {counts} layers, expected as many of each model')
        base = places.text(found['base_model']) if 'base_model' in found else None
        out.append(Slice(item.where, sources, base, _settings(found.get('parameters'), method)))
    return tuple(out)


def _source(node: Node, method: str) -> Source:
    keys = ('model', 'layer_range', 'parameters')
    found = places.fields(node, keys, ['model', 'layer_range'])
    ends = found['layer_range']
    if not isinstance(ends.value, list) or len(ends.value) != 2:
        raise places.wrong(ends, 'a list of the first layer and the one after the last')
    first = places.count(ends.value[0])
    layers = first, places.count(ends.value[1], first + 1)
    settings = _settings(found.get('parameters'), method, each=True)
    return Source(node.where, places.text(found['model']), layers, settings)


def _check_inputs(piece: Slice, name: str, base: str | None) -> None:
    """Whether a slice has the models that the method needs, each once."""
    method, models = merge.METHODS[name], [source.model for source in piece.sources]
    if twice := sorted({model for model in models if models.count(model) > 1}):
        raise ValueError(f'{piece.where}: found {twice[0]!r} more than once, expected each once')
    if method.base == 'required' and base is None:
        raise ValueError(f'{piece.where}: found no base_model, which {name} needs')
    if method.base != 'none' and base is not None and base not in models:
        raise ValueError(f'{piece.where}: found no base_model {base!r}, expected it as a source')
    beside = method.base != 'none' and base is not None
    count, most = len(models) - beside, method.most
    if count < method.least or (most is not None and count > most):
        upper = ' or more' if most is None else '' if most == method.least else f' to {most}'
        expected = f'expected {method.least}{upper}{" beside the base" if beside else ""}'
        raise ValueError(f'{piece.where}: found {count} models, {expected} for {name}')


def _choice(found: Mapping[str, Node], key: str, values: Sequence[str]) -> str | None:
    return places.one_of(found[key], values) if key in found else None


def _template(node: Node | None) -> str | None:
    return None if node is None else places.text(node)


def _head(found: Mapping[str, Node], models: Sequence[str]) -> str | None:
    if 'lm_head' in found:
        places.one_of(found['lm_head'], ['drop'])
        if 'reward_head' not in found:
            raise ValueError(f'{found["lm_head"].where}: found no reward_head to take its place')
    if 'reward_head' not in found:
        return None
    node = found['reward_head']
    keys = places.fields(node, ('source', 'average'))
    if len(keys) != 1:
        raise ValueError(f'{node.where}: found {sorted(keys)}, expected source or average')
    if 'source' in keys:
        return places.one_of(keys['source'], models)
    if not places.flag(keys['average']):
        raise places.wrong(keys['average'], 'true')
    return ''


# The vocabulary


def _tokenizer(found: Mapping[str, Node], models: Sequence[str]) -> Tokens | None:
    if 'tokenizer_source' in found:
        node = found['tokenizer_source']
        if 'tokenizer' in found:
            raise ValueError(f'{node.where}: found tokenizer, too, expected one of them')
        return Tokens(_vocabulary(node, models), {}, None)
    if 'tokenizer' not in found:
        return None
    keys = places.fields(found['tokenizer'], ('source', 'tokens', 'pad_to_multiple_of'))
    source = _vocabulary(keys['source'], models) if 'source' in keys else 'union'
    pad = places.count(keys['pad_to_multiple_of'], 1) if 'pad_to_multiple_of' in keys else None
    given = keys['tokens'] if 'tokens' in keys else Node('', {})
    if not isinstance(given.value, dict):
        raise places.wrong(given, 'a mapping from tokens')
    tokens = {token: _token(node, models) for token, node in given.value.items()}
    return Tokens(source, tokens, pad)


def _vocabulary(node: Node, models: Sequence[str]) -> str:
    """'union', 'base' or a model; older recipes write 'model:<model>'."""
    source = places.text(node).removeprefix('model:')
    if source not in ('union', 'base', *models):
        raise places.wrong(node, f'union, base or one of {list(models)}')
    return source


def _token(node: Node, models: Sequence[str]) -> dict[str, Any]:
    keys = places.fields(node, ('source', 'force'))
    out: dict[str, Any] = {'force': places.flag(keys['force']) if 'force' in keys else False}
    if 'source' not in keys:
        return out
    source = keys['source']
    if isinstance(source.value, str):
        return {**out, 'source': places.one_of(source, models)}
    inner = places.fields(source, ('kind', 'model', 'token', 'token_id'), ['kind'])
    kind = places.one_of(inner['kind'], ('zero', 'model_token'))
    if kind == 'zero':
        places.fields(source, ['kind'])
        return {**out, 'source': {'kind': kind}}
    named = places.fields(source, inner, ['kind', 'model'])
    if len(named.keys() & {'token', 'token_id'}) != 1:
        raise ValueError(f'{source.where}: found {sorted(named)}, expected token or token_id')
    which: dict[str, Any] = (
        {'token': places.text(named['token'])}
        if 'token' in named
        else {'token_id': places.count(named['token_id'])}
    )
    model = places.one_of(named['model'], models)
    return {**out, 'source': {'kind': kind, 'model': model, **which}}


# Parameters


def _settings(node: Node | None, method: str, *, each: bool = False) -> Settings:
    """Of a source if `each`, which may only say what each input has."""
    if node is None:
        return {}
    known = merge.METHODS[method].parameters
    found = places.fields(node, [*known, *IGNORED])
    out = {}
    for name, value in found.items():
        if name in IGNORED:
            places.flag(value)
            continue
        if each and not known[name].each:
            raise ValueError(f'{value.where}: is of the whole merge, expected beside merge_method')
        out[name] = _setting(value, known[name])
    return out


def _setting(node: Node, parameter: merge.Parameter) -> tuple[tuple[str, tuple[Any, ...]], ...]:
    entries = node.value if isinstance(node.value, list) else [node]
    if not any(isinstance(entry.value, dict) for entry in entries):
        return (('', _along(node, parameter)),)
    out = []
    for entry in entries:
        found = places.fields(entry, ('filter', 'value'), ['value'])
        part = places.text(found['filter']) if 'filter' in found else ''
        out.append(('' if part == '*' else part, _along(found['value'], parameter)))
    return tuple(out)


def _along(node: Node, parameter: merge.Parameter) -> tuple[Any, ...]:
    """The values along the layers, one if it is the same for all."""
    if isinstance(node.value, list) and parameter.kind is not int:
        return tuple(_single(value, parameter) for value in places.items(node))
    return (_single(node, parameter),)


def _single(node: Node, parameter: merge.Parameter) -> Any:
    kind, least, most = parameter.kind, parameter.least, parameter.most
    if isinstance(kind, tuple):
        return places.one_of(node, kind)
    if kind is bool:
        return places.flag(node)
    value = places.count(node) if kind is int else places.number(node)
    if not least <= value <= most:
        raise places.wrong(node, f'a number from {least} to {most}')
    return value
