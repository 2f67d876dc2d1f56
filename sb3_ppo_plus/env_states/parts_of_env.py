"""What can be saved of an environment by its attributes, where others cannot: counters, generators, simulators."""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Iterable, Sequence
from typing import Any

import gymnasium as gym
import numpy as np
import torch as th

from sb3_ppo_plus.env_states.differences import first_difference
from sb3_ppo_plus.env_states.object_attributes import attributes_of, class_attributes_of, is_no_state, saves_itself
from sb3_ppo_plus.env_states.object_graph import are_leaves
from sb3_ppo_plus.env_states.object_graph_reader import GraphReader
from sb3_ppo_plus.env_states.object_state import (
    delete_later_attributes,
    names_of_attributes,
    object_states,
    set_object_states,
)
from sb3_ppo_plus.env_states.untrusted_state import set_state_without_trust

PartsState = dict[str, Any]
"""Plain values under "states" (one for each part), "table" and "names"."""

# Arrays in bytes and other containers in items: larger ones, such as a set of data, are not copied at each reset
LARGEST_ARRAY, LARGEST_CONTAINER = 2**20, 2**16
# The same of those that each reset makes anew, such as a map
LARGEST_ARRAY_MADE_ANEW, LARGEST_CONTAINER_MADE_ANEW = 2**14, 2**5
# Bytes of all attributes of an environment above which nobody saves it without asking: each checkpoint would hold them
MOST_BYTES = 32 * 2**20
CONTAINERS = (list, tuple, dict, set, deque)
# Kinds of attributes whose values are entries of the table
OF_TABLE = "linked"


def parts_of_env(env: gym.Env[Any, Any]) -> list[gym.Env[Any, Any]]:
    """Return an environment and those that it and they have as attributes, each once.

    :param env: the environment
    """
    parts = [env]
    for part in parts:
        for value in attributes_of(part).values():
            if isinstance(value, gym.Env) and not any(value is known for known in parts):
                parts.append(value)
    return parts


def containers_of(parts: Sequence[object]) -> dict[tuple[int, str], Any]:
    """Return the attributes that are arrays or other containers.

    :param parts: environments
    :return: each by the index of its environment and its name
    """
    return {
        (index, name): value
        for index, part in enumerate(parts)
        for name, value in attributes_of(part).items()
        if isinstance(value, (np.ndarray, *CONTAINERS))
    }


def large_attributes(containers: dict[tuple[int, str], Any], made_anew: Collection[str]) -> set[str]:
    """Return the names of attributes that take too long to copy at each reset.

    :param containers: what :func:`containers_of` has returned
    :param made_anew: names of those that each reset makes anew
    """
    names = set()
    for (_, name), value in containers.items():
        if isinstance(value, np.ndarray):
            is_large = value.nbytes > (LARGEST_ARRAY_MADE_ANEW if name in made_anew else LARGEST_ARRAY)
        else:
            is_large = len(value) > (LARGEST_CONTAINER_MADE_ANEW if name in made_anew else LARGEST_CONTAINER)
        if is_large:
            names.add(name)
    return names


def too_large(layers: Iterable[object], constant: Collection[str] = ()) -> str:
    """Say which attribute is the largest where all together hold more than :data:`MOST_BYTES`, as data sets do.

    :param layers: environments and wrappers. Those that save themselves are left out
    :param constant: names of attributes that are not saved
    :return: a sentence; "" if they hold less
    """
    seen: set[int] = set()
    sizes: dict[tuple[str, str], int] = {}
    for layer in layers:
        if saves_itself(layer):
            continue
        of_classes = {name: value for (_, name), value in class_attributes_of(layer).items()}
        for name, value in {**of_classes, **attributes_of(layer)}.items():
            if name not in constant and not is_no_state(layer, name):
                sizes[type(layer).__name__, name] = _n_bytes(value, seen)
    n_bytes = sum(sizes.values())
    if n_bytes <= MOST_BYTES:
        return ""
    class_name, name = max(sizes, key=lambda key: sizes[key])
    return (
        f"each checkpoint would hold {n_bytes / 1e6:.0f} MB of its attributes, most of them in {class_name}.{name}. If "
        f'that never changes, name it in ResumableEnv(env, by="auto", constant=[{name!r}]); by="state" saves it'
    )


def _n_bytes(value: Any, seen: set[int]) -> int:  # noqa: ANN401  # any value
    """Return about how many bytes a value takes, without what was seen before: arrays, texts and containers of such."""
    # Not isinstance, which asks the object, and a reference to one that is gone raises an error then
    kind = type(value)
    is_container = issubclass(kind, CONTAINERS)
    if is_container or issubclass(kind, np.ndarray | th.Tensor):
        if id(value) in seen:
            return 0
        seen.add(id(value))
    if is_container:
        parts = [*value.keys(), *value.values()] if issubclass(kind, dict) else value
        return 8 * len(value) + (0 if are_leaves(parts) else sum(_n_bytes(part, seen) for part in parts))
    if issubclass(kind, np.ndarray | th.Tensor):
        return int(value.nbytes)
    return len(value) if issubclass(kind, str | bytes | bytearray) else 8


def state_of_parts(
    parts: Sequence[object], constant: Collection[str] = (), refused: list[str] | None = None
) -> PartsState:
    """Copy what can be saved of environments by their attributes.

    :param parts: the environments
    :param constant: names of attributes to leave out
    :param refused: gets a line for each attribute that cannot be saved
    :return: plain values
    """
    states, table = object_states(parts, parts, constant, [] if refused is None else refused)
    return {"states": states, "table": table, "names": [names_of_attributes(part) for part in parts]}


def set_state_of_parts(parts: Sequence[object], state: PartsState, constant: Collection[str] = ()) -> None:
    """Put back what :func:`state_of_parts` has returned. Attributes that came later are deleted.

    :param parts: the environments
    :param state: the state
    :param constant: names of attributes that stay
    :raises ValueError: for the state of other environments
    """
    _check_number(parts, state)
    set_object_states(parts, state["states"], GraphReader(state["table"], parts, splits_generators=True))
    for part, names in zip(parts, state["names"], strict=True):
        if names is not None:
            delete_later_attributes(part, (*names, *constant))


def set_differing_state_of_parts(parts: Sequence[object], state: PartsState, constant: Collection[str] = ()) -> None:
    """Put back those attributes that differ from a state. Objects that share an equal one go on sharing it.

    :param parts: the environments
    :param state: what :func:`state_of_parts` has returned
    :param constant: names of attributes that stay
    :raises ValueError: for the state of other environments
    """
    set_state_of_parts(parts, {**state, "states": _differing(parts, state, constant)}, constant)


def set_parts_without_trust(parts: Sequence[object], state: PartsState) -> list[str]:
    """Put back numbers that differ, from a file that is not trusted, see :func:`set_state_without_trust`.

    :param parts: the environments
    :param state: what :func:`state_of_parts` has returned, from the file
    :return: names of what was left out
    :raises ValueError: for the state of other environments
    """
    left_out = []
    for part, saved in zip(parts, _differing(parts, state), strict=True):
        left_out += set_state_without_trust(part, saved)
    return left_out


def _differing(parts: Sequence[object], state: PartsState, constant: Collection[str] = ()) -> list[dict[str, Any]]:
    """Return for each part the attributes of a state that differ from what is there."""
    _check_number(parts, state)
    there = state_of_parts(parts, constant)
    # What the numbers of its entries stand for
    is_same_table = first_difference(state["table"], there["table"], "") is None
    differing = []
    for saved, found in zip(state["states"], there["states"], strict=True):
        names = [
            name
            for name, value in saved.items()
            if first_difference(value, found.get(name), "") is not None or (value[0] == OF_TABLE and not is_same_table)
        ]
        differing.append({name: saved[name] for name in names})
    return differing


def _check_number(parts: Sequence[object], state: PartsState) -> None:
    if len(parts) != len(state["states"]):
        raise ValueError(f"the saved state is of {len(state['states'])} environments, here are {len(parts)}")
