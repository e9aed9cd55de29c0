"""Parameter trees by name: nested dicts of arrays, whose leaves are called `layers/q/kernel`."""

import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
from flax import traverse_util

Tree = dict[str, Any]


def flatten(tree: Tree) -> dict[str, Any]:
    """{name: leaf}."""
    return traverse_util.flatten_dict(tree, sep='/')


def unflatten(leaves: dict[str, Any]) -> Tree:
    """The tree of {name: leaf}."""
    return traverse_util.unflatten_dict(leaves, sep='/')


def map_named(fn: Callable[..., Any], tree: Tree) -> Tree:
    """fn(name, leaf) at every leaf."""
    name = lambda path: jax.tree_util.keystr(path, simple=True, separator='/')  # noqa: E731
    return jax.tree_util.tree_map_with_path(lambda path, x: fn(name(path), x), tree)


def by_pattern(names: Sequence[str], policy: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    """{name: value of the first pattern found in it}.

    Raises ValueError for a name that no pattern matches and for a pattern that no name uses.
    """
    out, used = {}, set()
    for name in names:
        hits = [i for i, (pattern, _) in enumerate(policy) if re.search(pattern, name)]
        if not hits:
            raise ValueError(f'leaf {name!r} matches none of {[p for p, _ in policy]}')
        out[name] = policy[hits[0]][1]
        used.update(hits)
    unused = [p for i, (p, _) in enumerate(policy) if i not in used]
    if unused:
        raise ValueError(f'patterns {unused} match no leaf of {sorted(names)}')
    return out
