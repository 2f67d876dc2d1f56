"""Taking nested containers apart and putting them together, beside PyTorch's own functions."""

from collections import OrderedDict
from typing import NamedTuple

import pytest
from torch.utils import _pytree

from sb3_ppo_plus.trees import tree_flatten, tree_leaves, tree_map, tree_unflatten


class Pair(NamedTuple):
    first: object
    second: object


TREES = [
    1,
    None,
    [],
    {},
    (1,),
    {"b": 1, "a": [2, (3, None)]},
    OrderedDict(z=1, y={"x": 2}),
    Pair((1, 2), {"a": 3}),
    [Pair(1, []), (), {"a": Pair(2, 3)}],
]


@pytest.mark.parametrize("tree", TREES, ids=str)
def test_a_tree_is_taken_apart_and_put_together_as_by_pytorch(tree):
    leaves, spec = tree_flatten(tree)
    assert leaves == _pytree.tree_leaves(tree) == tree_leaves(tree)
    assert spec.num_leaves == len(leaves)
    again = tree_unflatten(leaves, spec)
    assert again == tree and type(again) is type(tree)


@pytest.mark.parametrize("tree", TREES, ids=str)
def test_a_function_of_leaves_keeps_the_containers(tree):
    mapped = tree_map(lambda *leaves: leaves.count(leaves[0]), tree, tree, tree)
    expected = _pytree.tree_map(lambda _: 3, tree)
    assert mapped == expected and type(mapped) is type(expected)


def test_specs_are_equal_where_containers_and_keys_are():
    specs = [tree_flatten(tree)[1] for tree in TREES]
    for index, spec in enumerate(specs):
        assert [spec == other for other in specs].index(True) == (0 if TREES[index] is None else index)
    assert tree_flatten({"a": 1, "b": 2})[1] == tree_flatten({"a": 3, "b": 4})[1]
    assert hash(tree_flatten({"a": 1})[1]) == hash(tree_flatten({"a": 2})[1])
    for other in ({"b": 1, "a": 2}, {"a": 1}, {"a": 1, "b": [2]}):
        assert tree_flatten({"a": 1, "b": 2})[1] != tree_flatten(other)[1]


def test_trees_of_other_lengths_are_refused():
    with pytest.raises(ValueError, match="zip"):
        tree_map(lambda *leaves: leaves, [1, 2], [1])
