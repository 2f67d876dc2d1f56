"""Parametrised actions: which parts of an action are used, given the choices made in others."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import count
from typing import Any, NamedTuple, TypeAlias

from gymnasium import spaces

from sb3_ppo_plus.argument_checks import did_you_mean
from sb3_ppo_plus.policies.flat_actions import HYBRID_SPACES, ActionPart, parts_of, space_of_env, subspaces

UsedParts: TypeAlias = Mapping[str, Sequence[Sequence[str]]]
"""For the path of a Discrete part, a list with the paths of the parts that each choice uses."""


class Condition(NamedTuple):
    """When a part is used: if a Discrete part has one of some choices.

    :param chooser: index of the Discrete part
    :param choices: its choices, counted from 0
    """

    chooser: int
    choices: tuple[int, ...]


def conditions_of(action_space: spaces.Space[Any], used_parts: UsedParts | None) -> list[list[Condition]]:
    """Check ``used_parts``, and say for each part when it is used.

    :param action_space: the action space
    :param used_parts: see :class:`HybridPolicy`
    :return: for each part the conditions, all of which must hold; none: the part is always used
    :raises ValueError: for a path that does not exist, a part that cannot choose or be chosen, or too few or many lists
    :raises TypeError: for a value of another type
    """
    parts = parts_of(action_space)
    conditions: list[list[Condition]] = [[] for _ in parts]
    if used_parts is None:
        return conditions
    if not isinstance(used_parts, Mapping):
        raise TypeError(f"used_parts must be a dict with the path of a Discrete part as key, got {used_parts!r}")
    if not parts:
        raise ValueError(f"used_parts={used_parts!r} needs a Tuple or Dict action space, got {action_space}")
    places = _places(space_of_env(action_space))
    choosers = {path: _chooser(path, parts, branches) for path, branches in used_parts.items()}
    for path, branches in used_parts.items():
        branches_of: dict[int, list[int]] = {}
        for choice, names in enumerate(branches):
            for index in dict.fromkeys(
                i for name in names for i in _named(name, parts, places, path, choosers.values())
            ):
                branches_of.setdefault(index, []).append(choice)
        for index, choices in branches_of.items():
            if len(choices) < len(branches):
                conditions[index].append(Condition(choosers[path], tuple(choices)))
    return conditions


def _chooser(path: object, parts: Sequence[ActionPart], branches: object) -> int:
    """Return the index of the Discrete part with a path."""
    paths = [part.path for part in parts]
    if path not in paths:
        raise ValueError(
            f"used_parts: the action space has no part {path!r}; its parts are {paths}{did_you_mean(path, paths)}"
        )
    index = paths.index(str(path))
    space = parts[index].space
    if not isinstance(space, spaces.Discrete):
        raise ValueError(f"used_parts: part {path!r} must be Discrete to choose what is used, got {space}")
    is_list = isinstance(branches, Sequence) and not isinstance(branches, str)
    if not is_list or not all(isinstance(names, Sequence) and not isinstance(names, str) for names in branches):  # type: ignore[attr-defined]  # a list here
        raise TypeError(
            f"used_parts[{path!r}] must be a list that has, for each choice, a list of the paths it uses, "
            f"got {branches!r}"
        )
    if len(branches) != space.n:  # type: ignore[arg-type]  # a list here
        raise ValueError(
            f"used_parts[{path!r}] must have {space.n} lists, one for each choice of {space}, got {branches!r}"
        )
    return index


def _places(space: spaces.Space[Any]) -> list[tuple[str, list[int]]]:
    """Return the path of each part, Tuple and Dict inside a space, and the indices of the parts there.

    A key may hold a dot, so paths alone do not tell what is inside of what.
    """
    places: list[tuple[str, list[int]]] = []
    _add_places(space, (), count(), places)
    return places


def _add_places(
    space: spaces.Space[Any], path: tuple[str, ...], numbers: Iterator[int], places: list[tuple[str, list[int]]]
) -> list[int]:
    """Add what is in a space to ``places``; return the indices of its parts."""
    if isinstance(space, HYBRID_SPACES):
        inner = [_add_places(each, (*path, str(key)), numbers, places) for key, each in subspaces(space)]
        indices = [index for part in inner for index in part]
    else:
        indices = [next(numbers)]
    if path:
        places.append((".".join(path), indices))
    return indices


def _named(
    name: object,
    parts: Sequence[ActionPart],
    places: Sequence[tuple[str, list[int]]],
    chooser: str,
    choosers: Iterable[int],
) -> list[int]:
    """Return the indices of the part with a path, or of all parts inside the Tuple or Dict with that path."""
    named = [indices for path, indices in places if path == name]
    if not named:
        paths = [part.path for part in parts]
        raise ValueError(
            f"used_parts[{chooser!r}]: the action space has no part {name!r}; its parts are {paths}"
            f"{did_you_mean(name, paths)}"
        )
    if len(named) > 1:
        raise ValueError(
            f"used_parts[{chooser!r}]: {name!r} is the path of two parts of the action space; give the keys other names"
        )
    wrong = [parts[i].path for i in named[0] if i in {*choosers}]
    if wrong:
        raise ValueError(f"used_parts[{chooser!r}]: part {wrong[0]!r} chooses what is used, and is always used")
    return named[0]
