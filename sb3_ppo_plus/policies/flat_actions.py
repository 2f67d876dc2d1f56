"""Tuple and Dict actions as rows of numbers, which the policy and the rollout buffer hold.

A *part* of an action space is a Box, Discrete, MultiDiscrete or MultiBinary inside it. Its *path* is the way to it: the
index of each Tuple and the key of each Dict around it, joined by dots, such as ``"1.angle"``.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from gymnasium import spaces

HYBRID_SPACES = (spaces.Tuple, spaces.Dict)
MAX_EXACT_INTEGER = 2**24
"""Rows are float32, which holds each integer up to this one."""

Structure: TypeAlias = Any
"""An action of a Tuple or Dict space: a tuple or dict of arrays, numbers, and further tuples and dicts."""


class ActionPart(NamedTuple):
    """A part of an action space, and its place in the rows.

    :param path: indices and keys that lead to the part, joined by dots
    :param space: the part
    :param columns: the columns of its numbers
    """

    path: str
    space: spaces.Space[Any]
    columns: slice


class FlatActionSpace(spaces.Box):
    """Rows of float32, each of which holds the stored actions of all parts of a Tuple or Dict space, in order.

    A Box part has the numbers that its distribution stores. A Discrete part has one number, that of the choice from 0
    on. A MultiDiscrete part has one for each choice, a MultiBinary part its zeros and ones.

    :param structure: the action space of the environment
    :raises ValueError: for a part that cannot be used; the error names its path
    """

    def __init__(self, structure: spaces.Space[Any]) -> None:
        self.structure = structure
        self.parts: tuple[ActionPart, ...] = ()
        end = 0
        for path, space in _leaves(structure, ()):
            size = _checked_size(path, space)
            self.parts += (ActionPart(path, space, slice(end, end + size)),)
            end += size
        if not self.parts:
            raise ValueError(f"the action space {structure} has no parts")
        paths = [part.path for part in self.parts]
        if len({*paths}) < len(paths):
            raise ValueError(f"two parts of the action space have the same path: {paths}; give the keys other names")
        super().__init__(-np.inf, np.inf, (end,), np.float32)
        self._skeleton = _numbered(structure, iter(range(len(paths))))

    def __repr__(self) -> str:
        return f"FlatActionSpace({self.structure})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, FlatActionSpace) and bool(self.structure == other.structure)

    def structures(self, of_parts: Sequence[np.ndarray]) -> list[Structure]:
        """Put the actions of parts together.

        :param of_parts: for each part its actions in the env's units, shape (n_envs, *shape of the part)
        :return: the action of each environment
        """
        of_envs = zip(*map(_rows, self.parts, of_parts), strict=True)
        return [_filled(self._skeleton, values) for values in of_envs]

    def values(self, action: Structure) -> list[np.ndarray]:
        """Return the values of all parts of one action, in order.

        :param action: an action of the environment
        """
        return [np.asarray(value) for value in _values(self.structure, action)]

    def row(self, action: Structure) -> np.ndarray:
        """Return the row of one action. The numbers of Box parts are those in the env's units.

        :param action: an action of the environment
        :return: float32, shape (n_columns,)
        """
        numbers = [value.reshape(-1) for value in self.values(action)]
        starts = [np.asarray(getattr(part.space, "start", 0)).reshape(-1) for part in self.parts]
        return np.concatenate([value - start for value, start in zip(numbers, starts, strict=True)], dtype=np.float32)


def flat_action_space(action_space: spaces.Space[Any]) -> spaces.Space[Any]:
    """Return what policy and rollout buffer see of an action space: itself, unless it is a Tuple or Dict.

    :param action_space: the action space of the environment
    :raises ValueError: see :class:`FlatActionSpace`
    """
    return FlatActionSpace(action_space) if isinstance(action_space, HYBRID_SPACES) else action_space


def space_of_env(action_space: spaces.Space[Any]) -> spaces.Space[Any]:
    """Return the action space of the environment, of which :func:`flat_action_space` was made.

    :param action_space: the action space of a policy
    """
    return action_space.structure if isinstance(action_space, FlatActionSpace) else action_space


def parts_of(action_space: spaces.Space[Any]) -> tuple[ActionPart, ...]:
    """Return the parts of an action space; none if it is no Tuple or Dict.

    :param action_space: the action space of an environment or of a policy
    """
    flat = flat_action_space(action_space)
    return flat.parts if isinstance(flat, FlatActionSpace) else ()


def choices_to_env(numbers: np.ndarray, space: spaces.Space[Any]) -> np.ndarray:
    """Convert stored actions of a Discrete, MultiDiscrete or MultiBinary part to those that the environment takes.

    :param numbers: stored actions, shape (n_envs, n_columns)
    :param space: the part
    :return: shape (n_envs, *shape of the part)
    """
    choices = numbers.astype(np.int64).reshape(len(numbers), *(space.shape or ()))
    in_env: np.ndarray = (choices + getattr(space, "start", 0)).astype(space.dtype)
    return in_env


def subspaces(space: spaces.Space[Any]) -> Iterator[tuple[int | str, spaces.Space[Any]]]:
    """Yield the index or key of each space directly in a Tuple or Dict, and that space.

    :param space: the Tuple or Dict
    """
    yield from space.spaces.items() if isinstance(space, spaces.Dict) else enumerate(space.spaces)  # type: ignore[attr-defined]  # a Tuple


def _leaves(space: spaces.Space[Any], path: tuple[str, ...]) -> Iterator[tuple[str, spaces.Space[Any]]]:
    if not isinstance(space, HYBRID_SPACES):
        yield ".".join(path), space
        return
    for key, inner in subspaces(space):
        yield from _leaves(inner, (*path, str(key)))


def _numbered(space: spaces.Space[Any], numbers: Iterator[int]) -> Structure:
    """Return the structure of a space, with the number of each part in its place."""
    if not isinstance(space, HYBRID_SPACES):
        return next(numbers)
    inner = {key: _numbered(subspace, numbers) for key, subspace in subspaces(space)}
    return inner if isinstance(space, spaces.Dict) else tuple(inner.values())


def _rows(part: ActionPart, values: np.ndarray) -> list[Any]:
    # As Gymnasium samples: a number for Discrete, an array of no dimension for a Box of no dimension
    is_scalar_box = values.ndim == 1 and not isinstance(part.space, spaces.Discrete)
    return [values[env, ...] for env in range(len(values))] if is_scalar_box else list(values)


def _filled(skeleton: Structure, values: Sequence[Any]) -> Structure:
    if isinstance(skeleton, dict):
        return {key: _filled(inner, values) for key, inner in skeleton.items()}
    return tuple([_filled(inner, values) for inner in skeleton]) if isinstance(skeleton, tuple) else values[skeleton]


def _values(space: spaces.Space[Any], action: Structure) -> Iterator[Any]:
    if not isinstance(space, HYBRID_SPACES):
        yield action
        return
    for key, inner in subspaces(space):
        yield from _values(inner, action[key])


def _checked_size(path: str, space: spaces.Space[Any]) -> int:
    """Return how many columns a part takes.

    :raises ValueError: for a part that cannot be used
    """
    largest, size = 0.0, math.prod(space.shape or ())
    if isinstance(space, spaces.Box):
        if not (np.isfinite(space.low).all() and np.isfinite(space.high).all()):
            raise ValueError(
                f"part {path!r} of the action space needs finite bounds, got {space}; declare the range that the "
                "environment really uses"
            )
        if not np.issubdtype(space.dtype, np.floating):
            largest = max([0.0, *np.abs(np.array([space.low, space.high], np.float64)).reshape(-1)])
    elif isinstance(space, spaces.Discrete):
        largest, size = float(space.n), 1
    elif isinstance(space, spaces.MultiDiscrete):
        largest = float(space.nvec.max(initial=0))
    elif not isinstance(space, spaces.MultiBinary):
        raise ValueError(
            f"part {path!r} of the action space is {space}, which PPOPlus cannot choose; allowed inside a Tuple or "
            "Dict: Box, Discrete, MultiDiscrete, MultiBinary, Tuple and Dict"
        )
    if size == 0:
        raise ValueError(f"part {path!r} of the action space has no elements, got {space}")
    if largest > MAX_EXACT_INTEGER:
        raise ValueError(
            f"part {path!r} of the action space has integers beyond 2**24={MAX_EXACT_INTEGER}, which a float32 of the "
            f"rollout buffer cannot hold, got {space}"
        )
    return size
