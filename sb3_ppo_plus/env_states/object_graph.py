"""Shared objects, arrays with common memory and functions with state, as a table of plain values.

Each entry of the table is a list: the kind of an object, and its contents. An **item** of the contents is a leaf (None,
a number, text, bytes); ``[number]``, which is an entry of the table; ``[text]``, a class or a callable that holds
nothing, which must be the same when the state is put back; or ``[]``, which is no state: what is there stays.
"""

from __future__ import annotations

import copy
import functools
import logging
import random
import types
from collections import Counter, OrderedDict, deque
from collections.abc import Collection, Mapping
from re import Pattern
from typing import Any

import gymnasium as gym
import gymnasium.wrappers.utils
import numpy as np
import torch as th
from gymnasium import spaces
from gymnasium.envs.registration import EnvSpec
from stable_baselines3.common.running_mean_std import RunningMeanStd
from stable_baselines3.common.vec_env import VecEnv
from stable_baselines3.common.vec_env.stacked_observations import StackedObservations

from sb3_ppo_plus.env_states.callable_parts import (
    BOUND,
    function_parts,
    is_stateless_callable,
    place_of,
    reference_to,
)
from sb3_ppo_plus.env_states.generator_state import generator_state, space_generator_states
from sb3_ppo_plus.env_states.immutable_values import IMMUTABLE, parts_of_immutable
from sb3_ppo_plus.env_states.object_attributes import attributes_of, is_no_state
from sb3_ppo_plus.env_states.overlapping_arrays import View, overlapping, views_of
from sb3_ppo_plus.env_states.plain_state import PlainStateWriter
from sb3_ppo_plus.env_states.simulator_state import is_mujoco_model
from sb3_ppo_plus.errors import PlainStateError

Item = Any
"""A leaf or a list, see above."""

# Modules of those whose objects are state all the same
STATE_MODULES = ("pygame.rect", "pygame.math", "pygame.sprite", "pygame.mask", "pygame.geometry")
# Modules whose objects are no state: they render, or write statistics of episodes to files
NOT_STATE_MODULES = ("pygame", "gymnasium.envs.mujoco.mujoco_rendering", "stable_baselines3.common.monitor")
# Objects whose attributes are their state
TRANSPARENT = (RunningMeanStd, gymnasium.wrappers.utils.RunningMeanStd, StackedObservations)
GENERATORS = (np.random.Generator, np.random.RandomState, random.Random)
SEQUENCES: dict[type[Any], str] = {list: "list", tuple: "tuple", set: "set", deque: "deque", frozenset: "frozenset"}
MAPPINGS: dict[type[Any], str] = {dict: "dict", OrderedDict: "ordered", Counter: "counter"}
# Objects of a class that nobody changes; the class may get another one in its place
CONSTANTS = (Pattern, np.dtype)
# Flag of classes that Python code has defined
_HEAP_TYPE = 1 << 9
# Containers that are plain values. Files have no frozensets
_PLAIN = (SEQUENCES.keys() | MAPPINGS.keys()) - {frozenset}
_LEAVES: set[type[Any]] = {type(None), bool, int, float, str, bytes}
_LEAVES |= {np.bool_, np.int8, np.int16, np.int32, np.int64, np.uint8, np.uint16, np.uint32, np.uint64}
_LEAVES |= {np.float16, np.float32, np.float64}


def is_leaf(value: object) -> bool:
    """Whether a value is plain and has no parts.

    :param value: any value
    """
    return type(value) in _LEAVES or (isinstance(value, np.generic) and not isinstance(value, np.void))


def are_leaves(values: Collection[object]) -> bool:
    """Whether all values are of usual types without parts. It is quick; False says nothing.

    :param values: the values
    """
    return _LEAVES.issuperset(map(type, values))


def is_stateless(value: object) -> bool:
    """Whether a value holds nothing that may change and matters: classes, modules, rendering, loggers.

    :param value: any value
    """
    if isinstance(value, EnvSpec | types.ModuleType | type | logging.Logger | logging.Handler):
        return True
    return _holds_no_state(type(value).__module__) or is_mujoco_model(value) or is_stateless_callable(value)


@functools.cache
def _holds_no_state(module: str) -> bool:
    """Whether objects of a module's classes are no state."""
    # With the dot, so that pygame_snake is not of pygame
    prefixes, exceptions = (tuple(f"{name}." for name in names) for names in (NOT_STATE_MODULES, STATE_MODULES))
    return f"{module}.".startswith(prefixes) and not f"{module}.".startswith(exceptions)


def plain_copy(value: Any) -> Any:  # noqa: ANN401  # any plain value
    """Copy a plain value, whose parts are not shared.

    :param value: the value
    """
    kind = type(value)
    if kind is np.ndarray:
        return value.copy(order="K")
    if kind is list:
        return value[:] if are_leaves(value) else [plain_copy(part) for part in value]
    if kind is tuple:
        return value if are_leaves(value) else tuple(plain_copy(part) for part in value)
    if kind is dict:
        return {key: plain_copy(part) for key, part in value.items()}
    return value if kind in _LEAVES else copy.deepcopy(value)


def is_generator(value: object) -> bool:
    """Whether a value is a generator of random numbers whose state can be saved.

    :param value: any value
    """
    return isinstance(value, GENERATORS) and not isinstance(value, random.SystemRandom)


def has_attributes(value: object) -> bool:
    """Whether an object holds its attributes and nothing else, so that a method of it, or calling it, uses only these.

    :param value: any value
    """
    if type(value) in SEQUENCES or type(value) in MAPPINGS or is_leaf(value):
        return False
    others = (th.nn.Module, gym.Env, VecEnv, spaces.Space, np.ndarray, th.Tensor, *GENERATORS)
    # A class of C may hide anything
    return not isinstance(value, others) and all(map(_is_of_python, type(value).__mro__[:-1]))


def parts_of(value: Any) -> Collection[Any]:  # noqa: ANN401  # any value
    """Return what a container, a function or another callable holds.

    :param value: the container, or any other value, which has no parts
    """
    if type(value) in SEQUENCES:
        return value  # type: ignore[no-any-return]  # a sequence
    if type(value) in MAPPINGS:
        return [*value.keys(), *value.values()]
    if isinstance(value, types.FunctionType):
        return function_parts(value).values()
    if isinstance(value, BOUND):
        owner = value.__self__
        return attributes_of(owner).values() if has_attributes(owner) else [owner]
    if type(value) is functools.partial:
        return [value.func, value.args, value.keywords, vars(value)]
    if isinstance(value, TRANSPARENT) or (callable(value) and has_attributes(value)):
        return attributes_of(value).values()
    return ()


class GraphWriter:
    """Finds out which attributes share objects, and writes those into a table.

    :param layers: the environments and wrappers whose attributes are written; they are no state themselves
    """

    def __init__(self, layers: Collection[object]) -> None:
        self.entries: list[list[Any]] = []
        """The table."""
        self._layers = {id(layer): index for index, layer in enumerate(layers)}
        self._numbers: dict[int, int] = {}
        # An id is unique only while its object lives
        self._kept: list[object] = list(layers)
        self._seen: dict[int, Any] = {}
        self._arrays: list[tuple[np.ndarray, Any]] = []
        self._views: dict[int, View] = {}
        self._tensors: dict[int, int] = {}
        self._refused: set[int] = set()
        self._linked: set[Any] = set()
        self._leaves_out = False

    def scan(self, value: object, place: Any, is_whole: bool = True) -> None:  # noqa: ANN401  # any key
        """Look at the value of an attribute. Do so for all attributes first.

        :param value: the value
        :param place: what tells the attribute from others
        :param is_whole: False for a part of the value
        """
        if is_leaf(value) or is_stateless(value):
            if not is_whole and not is_leaf(value):
                self._linked.add(place)
            return
        kind = type(value)
        if id(value) in self._seen:
            # Nobody can change a tuple. What is in it has been seen
            if kind is not tuple:
                self._linked |= {place, self._seen[id(value)]}
            return
        self._seen[id(value)] = place
        self._kept.append(value)
        if isinstance(value, th.Tensor):
            self._scan_tensor(value, place)
            return
        if kind is np.ndarray:
            array: Any = value
            self._arrays.append((array, place))
            if array.dtype.hasobject or array.dtype.names is not None:
                self._linked.add(place)
        elif kind not in _PLAIN and not (is_whole and is_generator(value)):
            self._linked.add(place)
        parts = parts_of(value)
        if not are_leaves(parts):
            for part in parts:
                self.scan(part, place, False)

    def finish_scan(self) -> None:
        """Find out which arrays share memory."""
        places = {id(array): place for array, place in self._arrays}
        for group in overlapping([array for array, _ in self._arrays]):
            self._linked |= {places[id(array)] for array in group}
            if any(array.dtype.hasobject or id(array) in self._tensors for array in group):
                self._refused |= {self._tensors.get(id(array), id(array)) for array in group}
                continue
            for array, view in zip(group, views_of(group), strict=True):
                self._views[id(array)] = view

    def is_linked(self, place: Any) -> bool:  # noqa: ANN401  # any key
        """Whether an attribute is no plain value of its own, so that it belongs into the table.

        :param place: as given to :meth:`scan`
        """
        return place in self._linked

    def item(self, value: Any, name: str) -> Item:  # noqa: ANN401  # any value
        """Write a value into the table, if it is no leaf and is not there.

        :param value: the value
        :param name: what to call it in an error
        :return: its item
        :raises PlainStateError: if it cannot be saved; the message names the part. The table is as it was before
        """
        n_entries = len(self.entries)
        try:
            return self._item(value, name)
        except PlainStateError:
            del self.entries[n_entries:]
            self._numbers = {key: number for key, number in self._numbers.items() if number < n_entries}
            raise

    def member(self, value: Any, name: str, is_replaced: bool) -> Item:  # noqa: ANN401  # any value
        """Write a part of a class, see ``class_members``. What cannot be saved of a function or an object is left out.

        :param value: the part
        :param name: what to call it in an error
        :param is_replaced: whether a function must be the same one when it is put back
        :return: its item
        :raises PlainStateError: if nothing of it can be saved
        """
        self._leaves_out = True
        try:
            item = self.item(value, name)
        finally:
            self._leaves_out = False
        if isinstance(value, types.FunctionType) and not is_replaced:
            # Another line after an edit of the code is no difference
            del self.entries[item[0]][3:]
        return item

    def _item(self, value: Any, name: str) -> Item:  # noqa: ANN401  # any value
        if is_leaf(value):
            return value
        if is_stateless(value) or isinstance(value, VecEnv):
            reference = reference_to(value)
            return [] if reference is None else [reference]
        number = self._numbers.get(id(value))
        if number is None:
            number = self._numbers[id(value)] = len(self.entries)
            self._kept.append(value)
            self.entries.append([])
            self.entries[number] = self._entry(value, name)
        elif not self.entries[number] and type(value) in (tuple, functools.partial):
            raise PlainStateError(f"{name} is part of itself")
        return [number]

    def _entry(self, value: Any, name: str) -> list[Any]:  # noqa: ANN401  # any value
        kind = type(value)
        if id(value) in self._layers:
            return ["layer", self._layers[id(value)]]
        if kind in SEQUENCES:
            items = [self._item(part, f"{name}[{index}]") for index, part in enumerate(value)]
            return [SEQUENCES[kind], items, value.maxlen] if kind is deque else [SEQUENCES[kind], items]
        if kind in MAPPINGS:
            pairs = []
            for key, part in value.items():
                pairs.append([self._item(key, f"{name}'s key {key!r}"), self._item(part, f"{name}[{key!r}]")])
            return [MAPPINGS[kind], pairs]
        if kind is np.ndarray or isinstance(value, th.Tensor):
            return self._array(value, name)
        if is_generator(value):
            return ["generator", generator_state(value)]
        if isinstance(value, spaces.Space):
            return ["space", space_generator_states(value)]
        if isinstance(value, IMMUTABLE):
            return parts_of_immutable(value)
        return self._callable(value, name)

    def _array(self, value: Any, name: str) -> list[Any]:  # noqa: ANN401  # an array or a tensor
        if id(value) in self._refused:
            raise PlainStateError(f"{name} shares its memory with a tensor or an array of objects")
        check_plain(value, name)
        # A flag of the array, which its copy lacks
        read_only = [] if isinstance(value, th.Tensor) or value.flags.writeable else ["read-only"]
        if id(value) not in self._views:
            return ["tensor" if isinstance(value, th.Tensor) else "array", copy.deepcopy(value), *read_only]
        block, offset = self._views[id(value)]
        number = self._numbers.get(id(block))
        if number is None:
            number = self._numbers[id(block)] = len(self.entries)
            self.entries.append(["array", block])
        return ["view", number, value.dtype.str, list(value.shape), list(value.strides), offset, *read_only]

    def _callable(self, value: Any, name: str) -> list[Any]:  # noqa: ANN401  # any other value
        if isinstance(value, types.FunctionType):
            parts = self._parts(function_parts(value), f"{name}'s")
            return ["function", value.__name__, parts, list(place_of(value))]
        if isinstance(value, BOUND):
            owner = value.__self__
            is_object = not callable(owner) and has_attributes(owner)
            item = self._instance(owner, name) if is_object else self._item(owner, f"{name}.__self__")
            return ["method", value.__name__, item]
        if type(value) is functools.partial:
            parts = {"func": value.func, "args": value.args, "keywords": value.keywords, "attributes": vars(value)}
            return ["partial", self._parts(parts, f"{name}'s")]
        if isinstance(value, TRANSPARENT) or (callable(value) and has_attributes(value)):
            return self._attributes(value, name)
        check_plain(value, name)
        raise AssertionError(f"{name} is plain")

    def _instance(self, value: object, name: str) -> Item:
        """Write the object that a method belongs to."""
        number = self._numbers.get(id(value))
        if number is None:
            number = self._numbers[id(value)] = len(self.entries)
            self.entries.append([])
            self.entries[number] = self._attributes(value, f"{name}.__self__")
        return [number]

    def _attributes(self, value: object, name: str) -> list[Any]:
        found = sorted(attributes_of(value).items())
        attributes = {key: part for key, part in found if not is_no_state(value, key)}
        return ["object", type(value).__qualname__, self._parts(attributes, f"{name}.")]

    def _parts(self, parts: Mapping[str, Any], name: str) -> dict[str, Item]:
        separator = "" if name.endswith(".") else " "
        if not self._leaves_out:
            return {key: self._item(part, f"{name}{separator}{key}") for key, part in parts.items()}
        items: dict[str, Item] = {}
        for key, part in parts.items():
            try:
                items[key] = self.item(part, f"{name}{separator}{key}")
            except PlainStateError:
                items[key] = []
        return items

    def _scan_tensor(self, tensor: th.Tensor, place: Any) -> None:  # noqa: ANN401  # any key
        # NumPy has no bfloat16, and cannot show sparse tensors
        if tensor.device.type == "cpu" and tensor.layout is th.strided and tensor.dtype is not th.bfloat16:
            array = tensor.detach().numpy()
            self._kept.append(array)
            self._tensors[id(array)] = id(tensor)
            self._arrays.append((array, place))


def _is_of_python(cls: type[Any]) -> bool:
    return bool(cls.__flags__ & _HEAP_TYPE) and not isinstance(vars(cls).get("__new__"), types.BuiltinMethodType)


def check_plain(value: object, name: str) -> None:
    """Raise an error if a value is not plain.

    :param value: the value
    :param name: what to call it in the error
    :raises PlainStateError: the message says where
    """
    if isinstance(value, np.ndarray) and type(value) is not np.ndarray:
        raise PlainStateError(f"{name} is a {type(value).__qualname__}; allowed: NumPy arrays of no subclass")
    PlainStateWriter().encode(value, name)
