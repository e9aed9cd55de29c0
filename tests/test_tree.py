"""Trees by name, and policies as lists of (pattern, value)."""

import pytest

from jaxrm import tree

TREE = {'layers': {'q': {'kernel': 1}, 'norm': {'scale': 2}}, 'top': {'q': {'kernel': 3}}}
LEAVES = {'layers/q/kernel': 1, 'layers/norm/scale': 2, 'top/q/kernel': 3}


def test_flatten_and_back():
    assert tree.flatten(TREE) == LEAVES
    assert tree.unflatten(LEAVES) == TREE


def test_map_named_sees_names_and_keeps_the_tree():
    seen = tree.map_named(lambda name, x: (name, x), TREE)
    assert tree.flatten(seen) == {name: (name, x) for name, x in LEAVES.items()}
    assert tree.unflatten(LEAVES) == TREE


def test_the_first_pattern_found_in_a_name_wins():
    got = tree.by_pattern(list(LEAVES), [('scale', 'a'), ('^layers/', 'b'), ('', 'c')])
    assert got == {'layers/q/kernel': 'b', 'layers/norm/scale': 'a', 'top/q/kernel': 'c'}


def test_a_pattern_behind_a_wider_one_is_not_unused():
    policy = [('kernel', 'a'), ('layers/q', 'b'), ('scale', 'c')]
    assert tree.by_pattern(list(LEAVES), policy)['layers/q/kernel'] == 'a'


def test_a_name_without_a_pattern_raises():
    with pytest.raises(ValueError, match=r"'top/q/kernel'.*'layers'"):
        tree.by_pattern(list(LEAVES), [('layers', 1)])


def test_a_pattern_without_a_name_raises():
    with pytest.raises(ValueError, match=r"\['gate', 'up'\].*layers/q/kernel"):
        tree.by_pattern(list(LEAVES), [('', 0), ('gate', 1), ('up', 2)])
