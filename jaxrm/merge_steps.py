"""Which tensors of which models a merge recipe makes a tensor from, with which parameters.

What a source says goes before what its slice, the module and the whole recipe say. Along a slice of
L layers, layer l is at t = l / (L - 1), an only layer at 1, and what belongs to no layer at 0: the
embedding as part of the first slice, the rest as part of the last. Filters are compared with the
names that tensors have in the source, or in the output for what is of the whole merge.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from jaxrm import merge
from jaxrm.merge_config import Recipe, Settings, Slice

LAYER = re.compile(r'(?<=\.layers\.)\d+(?=\.)')
EMBEDDING = 'model.embed_tokens.weight'


class Input(NamedTuple):
    """A tensor of a model, by the model's place in Recipe.models."""

    model: int
    tensor: str


class Step(NamedTuple):
    """How one tensor of the output is made, for merge.array.

    A parameter that each input has is a tuple in their order.
    """

    name: str
    method: str
    inputs: tuple[Input, ...]
    base: Input | None
    parameters: dict[str, Any]


def steps(recipe: Recipe, layers: Mapping[str, int], names: Sequence[str]) -> list[Step]:
    """How each of the output's tensors is made, from models of so many layers.

    Raises ValueError for layers that a model has not, and a parameter that is needed and not given.
    """
    along = _along_output(recipe, layers)
    out = []
    for name in names:
        found = LAYER.search(name)
        if found is None:
            piece = recipe.slices[0 if name == EMBEDDING else -1]
            out.append(_step(recipe, piece, name, None, 0.0))
        else:
            piece, i, n = along[int(found.group())]
            out.append(_step(recipe, piece, name, i, i / (n - 1) if n > 1 else 1.0))
    return out


def origins(recipe: Recipe, layers: Mapping[str, int]) -> list[dict[str, int]]:
    """{model: its layer} of what each of the output's layers is made from."""
    return [
        {s.model: (s.layers[0] if s.layers else 0) + i for s in piece.sources}
        for piece, i, _ in _along_output(recipe, layers)
    ]


def _along_output(recipe: Recipe, layers: Mapping[str, int]) -> list[tuple[Slice, int, int]]:
    """The slice of each of the output's layers, its place there, and the slice's layers."""
    counts = [_length(piece, layers) for piece in recipe.slices]
    pairs = zip(recipe.slices, counts, strict=True)
    return [(piece, i, n) for piece, n in pairs for i in range(n)]


def _length(piece: Slice, layers: Mapping[str, int]) -> int:
    counts = []
    for source in piece.sources:
        has = layers[source.model]
        first, end = source.layers or (0, has)
        if end > has:
            raise ValueError(f'{source.where}: found layers up to {end}, {source.model} has {has}')
        counts.append(end - first)
    if len(set(counts)) > 1:
        each = {source.model: n for source, n in zip(piece.sources, counts, strict=True)}
        raise ValueError(f'{piece.where}: found {each} layers, expected as many of each model')
    return counts[0]


def _step(recipe: Recipe, piece: Slice, name: str, i: int | None, t: float) -> Step:
    method = merge.METHODS[recipe.method]
    base_model = (piece.base or recipe.base) if method.base != 'none' else None
    inputs, base, levels = [], None, []
    for source in piece.sources:
        first = source.layers[0] if source.layers else 0
        tensor = name if i is None else LAYER.sub(str(first + i), name)
        found = Input(recipe.models.index(source.model), tensor)
        if source.model == base_model:
            base = found
        else:
            inputs.append(found)
            levels.append((source, tensor))
    outer = (piece.settings, *recipe.settings)
    parameters: dict[str, Any] = {}
    for key, parameter in method.parameters.items():
        if not parameter.each:
            parameters[key] = _value(outer, key, parameter, name, t, f'{recipe.path}: parameters')
            continue
        parameters[key] = tuple(
            _value((s.settings, *outer), key, parameter, there, t, f'{s.where} ({s.model})')
            for s, there in levels
        )
    return Step(name, recipe.method, tuple(inputs), base, parameters)


def _value(
    levels: Sequence[Settings],
    key: str,
    parameter: merge.Parameter,
    name: str,
    t: float,
    where: str,
) -> Any:
    value = resolve(levels, key, name, t)
    if value is None and parameter.default is None:
        raise ValueError(f'{where}: {name}: found no {key}, which has no default')
    return parameter.default if value is None else value


def resolve(levels: Sequence[Settings], parameter: str, name: str, t: float) -> Any:
    """What the first of the levels says that says anything of this tensor, or None."""
    for settings in levels:
        for part, values in settings.get(parameter, ()):
            if part in name:
                return _at(values, t)
    return None


def _at(values: Sequence[Any], t: float) -> Any:
    """Numbers are interpolated, others stand until the next one."""
    if len(values) == 1:
        return values[0]
    if all(isinstance(x, float | int) and not isinstance(x, bool) for x in values):
        return merge.gradient(values, t)
    return values[int(t * (len(values) - 1))]
