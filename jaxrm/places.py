"""YAML values that know where they stand, so that what is wrong with one can name its line."""

import math
import re
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml

DEPTH = 100  # of lists and mappings in one another
MOST = 100_000  # values, those that an alias repeats counted again
MERGE = 'tag:yaml.org,2002:merge'  # the key <<
_FLOAT = re.compile(r'[-+]?\d+(\.\d*)?[eE][-+]?\d+')  # YAML 1.1 wants 1.0e-5, people write 1e-5


class Node(NamedTuple):
    """A value: a scalar, a list of Nodes, or a dict of them by name.

    `where` is the place, as in `recipe.yml:3: models[0].parameters`.
    """

    where: str
    value: Any


def read(path: Path) -> Node:
    """The one document of a YAML file, a mapping; raises ValueError with the line otherwise."""
    try:
        text = path.read_text(encoding='utf-8-sig')
    except UnicodeDecodeError as error:
        raise ValueError(f'{path}: byte {error.start + 1}: not UTF-8 text') from error
    except OSError as error:
        raise ValueError(f'{path}: cannot be read: {error.strerror}') from error
    try:
        documents = list(yaml.compose_all(text, yaml.SafeLoader))
        if len(documents) != 1:
            hint = ', a file for each stage' if len(documents) > 1 else ''
            raise ValueError(f'{path}: found {len(documents)} YAML documents, expected 1{hint}')
        found = _node(documents[0], str(path), '', iter(range(MOST)))
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise ValueError(f'{path}:{line}: not YAML: {error.problem}') from error
    except yaml.YAMLError as error:
        raise ValueError(f'{path}: not YAML: {error}') from error
    if not isinstance(found.value, dict):
        raise wrong(found, 'a mapping')
    return found


def _node(node: yaml.Node, path: str, name: str, left: Iterator[int], depth: int = 0) -> Node:
    where = f'{path}:{node.start_mark.line + 1}' + (f': {name}' if name else '')
    if depth > DEPTH or next(left, None) is None:
        raise ValueError(f'{where}: found over {MOST} values, or lists over {DEPTH} deep')
    if isinstance(node, yaml.SequenceNode):
        inner = [_node(x, path, f'{name}[{i}]', left, depth + 1) for i, x in enumerate(node.value)]
        return Node(where, inner)
    if not isinstance(node, yaml.MappingNode):
        return Node(where, _scalar(node, where))
    out: dict[str, Node] = {}
    more: list[yaml.Node] = []
    for key, value in node.value:
        line = f'{path}:{key.start_mark.line + 1}'
        if not isinstance(key, yaml.ScalarNode):
            raise ValueError(f'{line}: {name or "recipe"}: found a key that is not plain text')
        if key.tag == MERGE:
            more += value.value if isinstance(value, yaml.SequenceNode) else [value]
            continue
        inside = f'{name}.{key.value}' if name else key.value
        if key.value in out:
            raise ValueError(f'{line}: {inside}: found again, expected each key once')
        made = _node(value, path, inside, left, depth + 1)
        out[key.value] = made._replace(where=f'{line}: {inside}')
    for value in more:  # what stands here goes before it, and what is first before the rest
        made = _node(value, path, name, left, depth + 1)
        if not isinstance(made.value, dict):
            raise wrong(made, 'a mapping behind <<')
        out = made.value | out
    return Node(where, out)


def _scalar(node: yaml.Node, where: str) -> Any:
    try:
        value = yaml.SafeLoader('').construct_object(node)
    except (yaml.YAMLError, ValueError) as error:
        said = getattr(error, 'problem', None) or error
        raise ValueError(f'{where}: found {node.value!r:.40}: {said}') from error
    plain = isinstance(value, str) and node.style is None
    return float(value) if plain and _FLOAT.fullmatch(value) else value


def wrong(node: Node, expected: str) -> ValueError:
    """The error for a value that is not as expected."""
    words = {dict: 'a mapping', list: 'a list', type(None): 'nothing'}
    found = words.get(type(node.value)) or repr(node.value)[:80]
    return ValueError(f'{node.where}: found {found}, expected {expected}')


def fields(node: Node, known: Collection[str], required: Sequence[str] = ()) -> dict[str, Node]:
    """A mapping's values that are not null; raises ValueError for keys unknown or missing."""
    if not isinstance(node.value, dict):
        raise wrong(node, f'a mapping with {sorted(known)}')
    for key, value in node.value.items():
        if key not in known:
            raise ValueError(f'{value.where}: no such key, expected one of {sorted(known)}')
    found = {key: value for key, value in node.value.items() if value.value is not None}
    if missing := [key for key in required if key not in found]:
        raise ValueError(f'{node.where}: found no {missing[0]!r}, expected one')
    return found


def items(node: Node) -> list[Node]:
    """A list that has something in it."""
    if not isinstance(node.value, list) or not node.value:
        raise wrong(node, 'a list of at least one')
    return node.value


def text(node: Node) -> str:
    if not isinstance(node.value, str) or not node.value:
        raise wrong(node, 'text')
    return node.value


def one_of(node: Node, values: Collection[Any]) -> Any:
    if not isinstance(node.value, str | int | float) or node.value not in values:
        raise wrong(node, f'one of {list(values)}')
    return next(value for value in values if value == node.value)


def flag(node: Node) -> bool:
    """A boolean; 0 and 1 are as good."""
    if isinstance(node.value, float) or node.value not in (False, True):
        raise wrong(node, 'true or false')
    return bool(node.value)


def number(node: Node) -> float:
    if type(node.value) not in (int, float) or not math.isfinite(node.value):
        raise wrong(node, 'a number')
    return node.value


def count(node: Node, least: int = 0) -> int:
    if type(node.value) is not int or node.value < least:
        raise wrong(node, f'a whole number from {least}')
    return node.value
