"""Merging arrays, and whole parameter trees, by the published ways to merge models.

Letters of the formulas: x_0 is the base, x_i an input, d_i = x_i - x_0, w_i its weight. METHODS
says what each method takes; `array` merges one array, `trees` whole trees, leaf by leaf. Everything
is computed in float32 from inputs of any float dtype, and rounded once.
"""

import dataclasses
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxrm import tree
from jaxrm.merge_methods import METHODS as METHODS
from jaxrm.merge_methods import Parameter as Parameter

Array = jax.Array | np.ndarray
Value = Any  # a number; numbers to interpolate over the layers; (pattern, value) pairs
STACK, TOP = re.compile('(^|/)layers/'), re.compile('(^|/)top/')


# One array


def array(
    method: str,
    inputs: Sequence[Array],
    *,
    base: Array | None = None,
    name: str = '',
    seed: int = 0,
    dtype: Any = None,
    masks: Sequence[Array] | None = None,
    **parameters: Any,
) -> Array:
    """One array from several of one shape, by a method of METHODS.

    `base` is apart and never one of `inputs`. A parameter that each input has is a sequence in
    their order, or one number for all; 'lambda' is passed as **{'lambda': 0.5}. numpy arrays give a
    numpy array; with jax arrays among the inputs the result is a jax array that lies where the
    first one does. The dtype is the inputs' common one, or `dtype`. Integers and booleans must be
    equal in all inputs and are passed on. Random methods draw from (seed, name, place in inputs)
    alone; `masks`, True where an entry of d_i is kept, take the place of what they would draw.
    Raises ValueError naming the array for shapes, numbers of inputs or parameters that do not fit.
    """
    if method not in METHODS:
        raise ValueError(f'merge method: found {method!r}, expected one of {sorted(METHODS)}')
    where, rule = name or method, METHODS[method]
    _check_inputs(where, method, inputs, base)
    given = complete(method, parameters, len(inputs), where)
    everyone = [*inputs, *(() if base is None else (base,))]
    if not all(jnp.issubdtype(x.dtype, jnp.floating) for x in everyone):
        return _same(where, everyone)
    if rule.random:
        given |= {'name': name, 'seed': seed, 'masks': masks}
    try:
        out = rule.merge(inputs, base, dtype or jnp.result_type(*everyone), **given)
    except ValueError as e:
        raise ValueError(f'{where}: {e}') from e
    placed = [x.sharding for x in everyone if isinstance(x, jax.Array)]
    return jax.device_put(out, placed[0]) if placed else np.asarray(out)


def _check_inputs(where: str, method: str, inputs: Sequence[Array], base: Array | None) -> None:
    rule = METHODS[method]
    if rule.base == ('required' if base is None else 'none'):
        raise ValueError(
            f'{where}: found {"no" if base is None else "a"} base, which {method} '
            f'{"needs" if base is None else "does not take"}'
        )
    most = len(inputs) if rule.most is None else rule.most
    if not rule.least <= len(inputs) <= most:
        expected = f'at least {rule.least}' if rule.most is None else f'{rule.least} to {rule.most}'
        raise ValueError(f'{where}: found {len(inputs)} inputs of {method}, expected {expected}')
    shapes = [x.shape for x in inputs] + ([] if base is None else [base.shape])
    if len(set(shapes)) > 1:
        raise ValueError(f'{where}: found shapes {shapes}, expected one')


def complete(method: str, given: Mapping[str, Any], n: int, where: str) -> dict[str, Any]:
    """All parameters of a method; raises ValueError for those that are not as METHODS says."""
    found = _parameters(where, method, given, n)
    try:
        METHODS[method].check(**found)
    except ValueError as error:
        raise ValueError(f'{where}: {error}') from error
    return found


def _parameters(where: str, method: str, given: Mapping[str, Any], n: int) -> dict[str, Any]:
    known = METHODS[method].parameters
    if odd := given.keys() - known:
        expected = f'of {sorted(known)}' if known else 'none'
        raise ValueError(
            f'{where}: found parameters {sorted(odd)} of {method}, expected {expected}'
        )
    out = {}
    for key, parameter in known.items():
        value = given.get(key, parameter.default)
        if value is None:
            raise ValueError(f'{where}: found no {key}, which {method} needs')
        several = isinstance(value, Sequence | np.ndarray) and not isinstance(value, str)
        if not parameter.each:
            out[key] = _checked(f'{where}: {key}', parameter, value)
            continue
        values = value if several else [value] * n
        if len(values) != n:
            raise ValueError(f'{where}: {key}: found {len(values)}, expected {n}, one an input')
        out[key] = [_checked(f'{where}: {key}', parameter, v) for v in values]
    return out


def _checked(where: str, parameter: Parameter, value: Any) -> Any:
    """The value as Python's; raises ValueError unless the parameter can have it."""
    kind, value = parameter.kind, value.item() if isinstance(value, np.generic) else value
    if isinstance(kind, tuple):
        fits, expected = value in kind, f'one of {kind}'
    elif kind is bool:
        fits, expected = isinstance(value, bool), 'true or false'
    else:
        number = type(value) in (int, kind) and math.isfinite(value)
        fits = number and parameter.least <= value <= parameter.most
        expected = f'a number from {parameter.least} to {parameter.most}'
    if not fits:
        raise ValueError(f'{where}: found {value!r}, expected {expected}')
    return value


def _same(where: str, everyone: Sequence[Array]) -> Array:
    """The first of arrays that are no floats, and equal."""
    first = everyone[0]
    alike = [x.dtype == first.dtype and np.array_equal(x, first) for x in everyone]
    if not all(alike):
        dtypes = [x.dtype.name for x in everyone]
        raise ValueError(f'{where}: found {dtypes} that differ, expected equal ones or floats')
    return first


# Trees


def trees(
    method: str,
    inputs: Sequence[Mapping[str, Any]],
    *,
    base: Mapping[str, Any] | None = None,
    names: Sequence[str] | None = None,
    seed: int = 0,
    dtype: Any = None,
    **parameters: Any,
) -> dict[str, Any]:
    """Trees of the same leaves, merged leaf by leaf and layer by layer; places are kept.

    A value of a parameter is a number, a sequence of numbers (see `gradient`), or pairs (pattern,
    value), of which the first whose pattern is found in the name counts. `names` are the models'
    names in errors, base last. What not all have, such as heads, is to be left out. Kernels are
    merged as they lie on disk, [out, in]: rows matter to some methods. Raises ValueError naming the
    leaf and the model that lacks it, and for shapes and parameters that do not fit, an unused
    pattern among them.
    """
    everyone = [*inputs, *(() if base is None else (base,))]
    flat = [tree.flatten(dict(x)) for x in everyone]
    _check_leaves(flat, names or [f'tree {i}' for i in range(len(everyone))])
    parts = [part for leaf, x in flat[0].items() for part in _layers(leaf, x.shape, flat[0])]
    settings = _settings(method, parameters, len(inputs), parts)
    out = {}
    for leaf, first in flat[0].items():
        merged = []
        for part in (p for p in parts if p.leaf == leaf):
            xs = [_on_disk(part, x[leaf]) for x in flat]
            apart = None if base is None else xs.pop()
            y = array(
                method,
                xs,
                base=apart,
                name=part.name,
                seed=seed,
                dtype=dtype,
                **settings[part.name],
            )
            merged.append(_on_disk(part._replace(layer=None), y))
        xp: Any = jnp if isinstance(first, jax.Array) else np
        whole = merged[0] if part.layer is None else xp.stack(merged)
        out[leaf] = whole if xp is np else jax.device_put(whole, first.sharding)
    return tree.unflatten(out)


class _Part(NamedTuple):
    """A leaf, or one layer of a stack; `t` is where it is on a gradient."""

    leaf: str
    name: str
    layer: int | None
    t: float


def _layers(leaf: str, shape: tuple[int, ...], leaves: Mapping[str, Any]) -> Iterator[_Part]:
    stacks = [x.shape[0] for name, x in leaves.items() if STACK.search(name)]
    L = stacks[0] + 1 if stacks else 1
    place = lambda layer: layer / (L - 1) if L > 1 else 1.0  # noqa: E731
    if STACK.search(leaf):
        for layer in range(shape[0]):
            yield _Part(leaf, layer_name(leaf, layer, L), layer, place(layer))
    else:
        yield _Part(
            leaf, layer_name(leaf, None, L), None, place(L - 1) if TOP.search(leaf) else 0.0
        )


def _check_leaves(flat: Sequence[Mapping[str, Any]], names: Sequence[str]) -> None:
    every = sorted(set().union(*flat))
    for leaf in every:
        if lacking := [name for name, x in zip(names, flat, strict=True) if leaf not in x]:
            raise ValueError(
                f'{leaf}: found nothing in {lacking}, expected it in all of {[*names]}'
            )
        shapes = {name: x[leaf].shape for name, x in zip(names, flat, strict=True)}
        if len(set(shapes.values())) > 1:
            raise ValueError(f'{leaf}: found shapes {shapes}, expected one')


def _settings(
    method: str, parameters: Mapping[str, Any], n: int, parts: Sequence[_Part]
) -> dict[str, dict[str, Any]]:
    """{part: {parameter: value}} from what the parameters say."""
    known = METHODS[method].parameters if method in METHODS else {}
    out: dict[str, dict[str, Any]] = {part.name: {} for part in parts}
    for key, value in parameters.items():
        several = key in known and known[key].each and isinstance(value, Sequence)
        if several and len(value) != n:
            raise ValueError(f'{key}: found {len(value)}, expected {n}, one an input')
        columns = [_resolved(v, parts) for v in (value if several else [value])]
        for name, settings in out.items():
            values = [column[name] for column in columns]
            settings[key] = values if several else values[0]
    return out


def _resolved(value: Value, parts: Sequence[_Part]) -> dict[str, Any]:
    """{part: number} of one value."""
    pairs = isinstance(value, Sequence) and value and isinstance(value[0], tuple)
    policy = value if pairs else [('', value)]
    chosen = tree.by_pattern([part.name for part in parts], policy)
    return {part.name: gradient(chosen[part.name], part.t) for part in parts}


def _on_disk(part: _Part, x: Array) -> Array:
    """The layer, or a layer back, with linear maps the other way round."""
    x = x if part.layer is None else x[part.layer]
    return x.T if part.leaf.rsplit('/', 1)[-1] in ('kernel', 'a', 'b') else x


def layer_name(leaf: str, layer: int | None, layers: int) -> str:
    """The name of a leaf's layer, from which random methods draw: 'layers/3/q/kernel'.

    `layer` is its place in a stack, None for the top layer ('top/q/kernel', the last of `layers`)
    and for leaves that belong to none.
    """
    to = layers - 1 if layer is None else layer
    return (TOP if layer is None else STACK).sub(rf'\g<1>layers/{to}/', leaf)


def gradient(values: float | Sequence[float], t: float) -> float:
    """Where t in [0, 1] falls on the line through evenly spaced values.

    Layer l of L is at t = l / (L - 1), what belongs to no layer at 0, an only layer at 1.
    """
    if not isinstance(values, Sequence) or isinstance(values, str):
        return values
    return float(np.interp(t, np.linspace(0, 1, len(values)), values))


# Configs


def check_configs(
    configs: Sequence[Any], names: Sequence[str], *, on_mismatch: str = 'raise'
) -> list[str]:
    """What of backbones' Configs makes other functions of the same weights, one line each.

    Sizes, rope, windows, norms, heads, tying, activation, softcaps; not the vocabulary's size or
    the most positions. Raises ValueError listing it, unless `on_mismatch` is 'keep_first'.
    """
    if on_mismatch not in ('raise', 'keep_first'):
        raise ValueError(f"on_mismatch: {on_mismatch!r}, expected 'raise' or 'keep_first'")
    first, *others = [_function(config) for config in configs]
    found = [
        f'{key}: {names[0]} has {first[key]}, {name} has {other[key]}'
        for name, other in zip(names[1:], others, strict=True)
        for key in first
        if first[key] != other.get(key)
    ]
    if found and on_mismatch == 'raise':
        raise ValueError('\n  '.join(['configs: models that compute different functions', *found]))
    return found


def _function(config: Any) -> dict[str, Any]:
    """What a Config says of the function, by name; kinds of layers by layer."""
    fields = {f.name: getattr(config, f.name) for f in dataclasses.fields(config)}
    for name in ('V', 'max_position', 'kinds', 'layer_kinds'):
        del fields[name]
    fields['biases'] = sorted(config.biases)
    kinds = [config.kinds[i] for i in config.of_layer]
    fields['windows'] = _runs([kind.window for kind in kinds])
    fields['ropes'] = _runs([kind.rope for kind in kinds])
    return fields


def _runs(values: Sequence[Any]) -> Any:
    """One value where all layers have the same."""
    return values[0] if len(set(values)) == 1 else list(values)
