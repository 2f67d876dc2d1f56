"""Going back to a moment in place: the same objects with the contents that they had."""

from __future__ import annotations

import types
from collections import deque
from collections.abc import Callable, Collection
from functools import partial
from typing import Any

import gymnasium as gym
import numpy as np
import torch as th
from gymnasium import spaces
from gymnasium.utils import seeding

from sb3_ppo_plus.env_states.callable_parts import BOUND, function_parts, set_function_part
from sb3_ppo_plus.env_states.class_members import descriptors_of, members_of, namespaces_of
from sb3_ppo_plus.env_states.differences import first_difference
from sb3_ppo_plus.env_states.generator_state import generator_state, restored_generator, spaces_inside
from sb3_ppo_plus.env_states.object_attributes import (
    attributes_of,
    class_attributes_of,
    delete_later_class_attributes,
    is_special,
)
from sb3_ppo_plus.env_states.object_graph import (
    TRANSPARENT,
    has_attributes,
    is_generator,
    is_leaf,
    is_stateless,
    parts_of,
)


class Undo:
    """Remembers the contents of all objects that environments hold, each once.

    A saved state gives an environment new lists and arrays. Here the old ones are changed back, so that whatever else
    holds them, such as another environment or a module, still holds the same. Simulators are left out.

    :param layers: the environments and wrappers
    """

    def __init__(self, layers: Collection[gym.Env[Any, Any]]) -> None:
        self._steps: list[Callable[[], object]] = []
        self._contents: dict[int, Any] = {}
        # An id is unique only while its object lives
        self._kept: dict[int, Any] = {id(layer): layer for layer in layers}
        self._layers = layers
        self._spaces: list[spaces.Space[Any]] = []
        for layer in layers:
            self._remember_attributes(layer)
        self.containers = set(self._contents)
        """Ids of the lists, dicts, sets, deques and arrays that attributes hold."""
        self._descriptors: dict[str, tuple[Any, Any]] = {}
        for layer in layers:
            self._remember_classes(layer)

    def make_generators(self) -> None:
        """Give each environment and space a random generator now that would get one at its first use.

        Made later, it would draw other numbers each time. Putting everything back removes it again.
        """
        for layer in self._layers:
            if not isinstance(layer, gym.Wrapper):
                # Made where it is missing
                _ = layer.np_random
        for space in self._spaces:
            if space._np_random is None:
                # Not space.np_random, which may seed the spaces inside it anew
                space._np_random, _ = seeding.np_random()

    def __call__(self) -> None:
        """Put everything back."""
        for step in self._steps:
            step()

    def changed(self, containers: Collection[int]) -> list[Any]:
        """Return those containers whose contents are others now.

        :param containers: ids of containers
        """
        found = [(self._kept[key], self._contents[key]) for key in containers if key in self._contents]
        return [container for container, content in found if first_difference(content, container, "") is not None]

    def changed_descriptors(self) -> list[str]:
        """Return the names of descriptors of users' classes that hold something else now, which no state contains."""
        found = self._descriptors.items()
        return [name for name, (there, saved) in found if first_difference(saved, _copies(there), "") is not None]

    def _remember_classes(self, layer: gym.Env[Any, Any]) -> None:
        for cls in namespaces_of(layer).values():
            self._steps.append(partial(delete_later_class_attributes, cls, set(vars(cls))))
            for name, value in vars(cls).items():
                if not is_special(name):
                    self._steps.append(partial(_set_if_changed, cls, name, value))
        for value in class_attributes_of(layer).values():
            self._remember(value)
        for member in members_of(layer).values():
            self._remember(member.value)
        for name, descriptor in descriptors_of(layer):
            self._descriptors[name] = descriptor, _copies(descriptor)
            self._remember_attributes(descriptor)

    def _remember(self, value: Any) -> None:  # noqa: ANN401  # any value
        if id(value) in self._kept or is_leaf(value) or is_stateless(value):
            return
        self._kept[id(value)] = value
        if isinstance(value, list | dict | set | deque):
            content = self._contents[id(value)] = value.copy()
            self._steps.append(partial(_set_content, value, content))
        elif isinstance(value, np.ndarray):
            if value.flags.writeable:
                array = self._contents[id(value)] = value.copy()
                self._steps.append(partial(np.copyto, value, array))
        elif isinstance(value, th.Tensor):
            self._steps.append(partial(value.detach().copy_, value.detach().clone()))
        elif is_generator(value):
            self._steps.append(partial(restored_generator, value, generator_state(value)))
        elif isinstance(value, spaces.Space):
            for space in spaces_inside(value):
                self._spaces.append(space)
                self._steps.append(partial(setattr, space, "_np_random", space._np_random))
                self._remember(space._np_random)
        elif isinstance(value, types.FunctionType):
            self._steps.append(partial(_set_content, vars(value), dict(vars(value))))
            for name, part in function_parts(value).items():
                self._steps.append(partial(set_function_part, value, name, part))
        elif isinstance(value, BOUND):
            if has_attributes(value.__self__):
                self._remember_attributes(value.__self__)
        elif isinstance(value, TRANSPARENT) or (callable(value) and has_attributes(value)):
            self._remember_attributes(value)
        for part in parts_of(value):
            self._remember(part)

    def _remember_attributes(self, owner: Any) -> None:  # noqa: ANN401  # any object
        attributes = attributes_of(owner)
        self._steps.append(partial(_set_attributes, owner, attributes))
        for value in attributes.values():
            self._remember(value)


def _copies(owner: object) -> dict[str, Any]:
    """Copy what an object holds, so that changes of its lists and dicts show."""
    attributes = attributes_of(owner).items()
    return {name: value.copy() if hasattr(value, "copy") else value for name, value in attributes}


def _set_content(container: Any, content: Any) -> None:  # noqa: ANN401  # a container and a copy
    container.clear()
    add = container.extend if isinstance(container, list | deque) else container.update
    add(content)


def _set_attributes(owner: Any, attributes: dict[str, Any]) -> None:  # noqa: ANN401  # any object
    there = attributes_of(owner)
    for name in there.keys() - attributes.keys():
        object.__delattr__(owner, name)
    for name, value in attributes.items():
        if name not in there or there[name] is not value:
            object.__setattr__(owner, name, value)


def _set_if_changed(owner: Any, name: str, value: Any) -> None:  # noqa: ANN401  # a class and any value
    if vars(owner).get(name) is not value:
        setattr(owner, name, value)
