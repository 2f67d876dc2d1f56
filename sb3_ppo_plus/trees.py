"""Tensors inside dicts, lists and tuples: as flat lists, and back. PyTorch's own functions for this are private."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple


class TreeSpec(NamedTuple):
    """A tree without its leaves. Two are equal if their trees have equal containers and keys.

    :param kind: type of the container; None: a leaf
    :param keys: the keys of a dict, in order; else empty
    :param children: the specs of the container's items, in order
    """

    kind: type | None
    keys: tuple[Any, ...] = ()
    children: tuple[TreeSpec, ...] = ()

    @property
    def num_leaves(self) -> int:
        """How many leaves the tree has."""
        return 1 if self.kind is None else sum(child.num_leaves for child in self.children)


_LEAF = TreeSpec(None)


def tree_flatten(tree: Any) -> tuple[list[Any], TreeSpec]:  # noqa: ANN401  # any nested containers
    """Take a tree apart. Everything but dicts, lists and tuples is a leaf.

    :param tree: dicts, lists and tuples inside one another
    :return: the leaves in order, and the tree without them, for :func:`tree_unflatten`
    """
    leaves: list[Any] = []
    return leaves, _flatten_into(leaves, tree)


def _flatten_into(leaves: list[Any], tree: Any) -> TreeSpec:  # noqa: ANN401  # any nested containers
    if isinstance(tree, dict):
        return TreeSpec(type(tree), tuple(tree), tuple(_flatten_into(leaves, item) for item in tree.values()))
    if isinstance(tree, list | tuple):
        return TreeSpec(type(tree), (), tuple(_flatten_into(leaves, item) for item in tree))
    leaves.append(tree)
    return _LEAF


def tree_unflatten(leaves: Iterable[Any], spec: TreeSpec) -> Any:  # noqa: ANN401  # any nested containers
    """Put a tree together, see :func:`tree_flatten`.

    :param leaves: the leaves in order
    :param spec: the tree without them
    """
    return _unflatten_from(iter(leaves), spec)


def _unflatten_from(leaves: Iterator[Any], spec: TreeSpec) -> Any:  # noqa: ANN401  # any nested containers
    if spec.kind is None:
        return next(leaves)
    items = [_unflatten_from(leaves, child) for child in spec.children]
    if issubclass(spec.kind, dict):
        return spec.kind(zip(spec.keys, items, strict=True))
    return _sequence(spec.kind, items)


def tree_leaves(tree: Any) -> list[Any]:  # noqa: ANN401  # any nested containers
    """Return the leaves of a tree in order.

    :param tree: dicts, lists and tuples inside one another
    """
    leaves: list[Any] = []
    _add_leaves(leaves, tree)
    return leaves


def _add_leaves(leaves: list[Any], tree: Any) -> None:  # noqa: ANN401  # any nested containers
    if isinstance(tree, dict):
        tree = tree.values()
    elif not isinstance(tree, list | tuple):
        leaves.append(tree)
        return
    for item in tree:
        _add_leaves(leaves, item)


def tree_map(function: Callable[..., Any], tree: Any, *others: Any) -> Any:  # noqa: ANN401  # any nested containers
    """Apply a function to each leaf, and return the tree of its results.

    :param function: takes a leaf of ``tree``, and the leaves at that place in ``others``
    :param tree: dicts, lists and tuples inside one another
    :param others: trees with the containers and keys of ``tree``
    """
    if isinstance(tree, dict):
        return type(tree)((key, tree_map(function, item, *(o[key] for o in others))) for key, item in tree.items())
    if isinstance(tree, list | tuple):
        return _sequence(type(tree), [tree_map(function, *items) for items in zip(tree, *others, strict=True)])
    return function(tree, *others)


def _sequence(kind: type, items: list[Any]) -> Any:  # noqa: ANN401  # a list or tuple
    # A named tuple takes its items one by one
    return kind(*items) if hasattr(kind, "_fields") else kind(items)
