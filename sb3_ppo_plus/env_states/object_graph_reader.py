"""Building objects from the table that an object graph was written into."""

from __future__ import annotations

import functools
import types
from collections import deque
from collections.abc import Sequence
from typing import Any

import numpy as np
from gymnasium import spaces

from sb3_ppo_plus.env_states.callable_parts import (
    BOUND,
    function_parts,
    is_same_reference,
    place_of,
    rebound,
    reference_to,
    set_function_part,
)
from sb3_ppo_plus.env_states.generator_state import Generator, restored_generator, set_space_generator_states
from sb3_ppo_plus.env_states.immutable_values import IMMUTABLE, made_of_parts, parts_of_immutable
from sb3_ppo_plus.env_states.object_attributes import attributes_of, is_no_state
from sb3_ppo_plus.env_states.object_graph import CONSTANTS, MAPPINGS, SEQUENCES, Item
from sb3_ppo_plus.env_states.overlapping_arrays import array_in

_SEQUENCES = {tag: kind for kind, tag in SEQUENCES.items()}
_MAPPINGS = {tag: kind for kind, tag in MAPPINGS.items()}
MISSING = object()
"""Stands for an object that is not there."""


class OtherStructureError(ValueError):
    """What is there was made in another way than what was saved, as after an edit of the code."""


class GraphReader:
    """Builds each object of a table once.

    Containers and arrays are new ones: those that are there may be constants of a module. Functions, generators, spaces
    and objects with attributes are changed where they are.

    :param entries: the table
    :param layers: the environments and wrappers, as given to the writer
    :param splits_generators: whether two places that share a generator now, and did not then, get one each
    """

    def __init__(self, entries: list[list[Any]], layers: Sequence[object], splits_generators: bool = False) -> None:
        self._entries = entries
        self._layers = layers
        self._splits_generators = splits_generators
        self._built: dict[int, Any] = {}
        self._is_building: set[int] = set()
        self._keeps_equal = False
        self.differences: list[str] = []
        """What is there, other than it was saved, and stays, or was put back although the code has changed it."""
        # Kept, since an id is unique only while its object lives
        self._generators: dict[int, object] = {}

    def value(self, item: Item, existing: Any, name: str) -> Any:  # noqa: ANN401  # any value
        """Return the value of an item.

        :param item: the item
        :param existing: what is in its place now, or :data:`MISSING`
        :param name: what to call it in an error
        :raises ValueError: if what is in its place has another structure; the message names it
        """
        if not isinstance(item, list):
            return item
        if not item:
            if existing is MISSING:
                raise OtherStructureError(
                    f"there is no {name}, as there was in the saved one: it was made in another way"
                )
            return existing
        number = item[0]
        if isinstance(number, str):
            check_reference(existing, number, name)
            return existing
        if number not in self._built:
            if number in self._is_building:
                raise ValueError(f"{name} is part of itself")
            self._is_building.add(number)
            try:
                self._built[number] = self._build(number, existing, name)
            finally:
                self._is_building.discard(number)
        return self._built[number]

    def member(self, item: Item, existing: Any, name: str) -> Any:  # noqa: ANN401  # any value
        """Return the value of a part of a class. What equals the saved one stays: a module may hold it, too.

        :param item: the item
        :param existing: the part that is there now
        :param name: what to call it in an error
        :raises OtherStructureError: a ValueError, if what is there was made in another way
        """
        self._keeps_equal = True
        try:
            return existing if self.adopt(item, existing) else self.value(item, existing, name)
        finally:
            self._keeps_equal = False

    def adopt(self, item: Item, existing: Any) -> bool:  # noqa: ANN401  # any value
        """Keep an existing value, and use it wherever the table has it, if it equals the saved one.

        :param item: the item
        :param existing: the value
        :return: whether it does
        """
        found: dict[int, Any] = {}
        if not self._equals(item, existing, found):
            return False
        self._built.update(found)
        return True

    def generator(self, state: Any, existing: object) -> Generator:  # noqa: ANN401  # a generator's state
        """Put a state into a generator, or into a new one.

        :param state: what ``generator_state`` has returned
        :param existing: what is in its place now
        """
        if self._splits_generators and id(existing) in self._generators:
            existing = None
        generator = restored_generator(existing, state)
        self._generators[id(generator)] = generator
        return generator

    def _build(self, number: int, existing: Any, name: str) -> Any:  # noqa: ANN401  # any value
        kind, *content = self._entries[number]
        if kind in _SEQUENCES:
            return self._sequence(number, existing, name)
        if kind in _MAPPINGS:
            mapping = self._built[number] = _MAPPINGS[kind]()
            is_mapping = isinstance(existing, dict)
            for key_item, item in content[0]:
                key = self.value(key_item, MISSING, f"key of {name}")
                there = existing.get(key, MISSING) if is_mapping else MISSING
                mapping[key] = self.value(item, there, f"{name}[{key!r}]")
            return mapping
        if kind == "array" or kind == "tensor":
            # Copied, so that a state can be put back several times
            copied = content[0].copy(order="K") if kind == "array" else content[0].clone()
            return _read_only(copied) if "read-only" in content[1:] else copied
        if kind == "view":
            block, dtype, shape, strides, offset, *read_only = content
            array = array_in(self.value([block], MISSING, name), dtype, shape, strides, offset)
            return _read_only(array) if read_only else array
        if kind == "layer":
            return self._layers[content[0]]
        if kind == "generator":
            return self.generator(content[0], existing)
        if kind in ("enum", "path", "range", "complex"):
            return made_of_parts([kind, *content], existing, name)
        return self._built_in_place(number, existing, name)

    def _sequence(self, number: int, existing: Any, name: str) -> Any:  # noqa: ANN401  # a sequence
        kind, items = _SEQUENCES[self._entries[number][0]], self._entries[number][1]
        there = list(existing) if isinstance(existing, list | tuple | deque) else []
        there += [MISSING] * (len(items) - len(there))
        values = (self.value(item, there[index], f"{name}[{index}]") for index, item in enumerate(items))
        if kind in (tuple, frozenset):
            return kind(values)
        # Known before it is filled, since it may be part of its parts
        sequence: Any = deque(maxlen=self._entries[number][2]) if kind is deque else kind()
        self._built[number] = sequence
        add = sequence.add if kind is set else sequence.append
        for value in values:
            add(value)
        return sequence

    def _built_in_place(self, number: int, existing: Any, name: str) -> Any:  # noqa: ANN401  # any value
        kind, *content = self._entries[number]
        expected: dict[str, Any] = {"function": types.FunctionType, "method": BOUND, "partial": functools.partial}
        expected |= {"space": spaces.Space, "object": object}
        if existing is MISSING or existing is None or not isinstance(existing, expected[kind]):
            there = "nothing" if existing is MISSING else f"a {type(existing).__name__}"
            raise OtherStructureError(f"{name} is {there}, the saved one was a {kind}: it was made in another way")
        if kind == "space":
            set_space_generator_states(existing, content[0])
        elif kind == "function":
            self._put_function(number, existing, name)
        elif kind == "method":
            owner = self.value(content[1], existing.__self__, f"{name}.__self__")
            return rebound(existing, owner, content[0])
        elif kind == "partial":
            parts = {"func": existing.func, "args": existing.args, "keywords": existing.keywords}
            parts["attributes"] = vars(existing)
            new = {part: self.value(item, parts[part], f"{name}'s {part}") for part, item in content[0].items()}
            partial = functools.partial(new["func"], *new["args"], **new["keywords"])
            vars(partial).update(new["attributes"])
            return partial
        else:
            self._put_object(number, existing, name)
        return existing

    def _put_function(self, number: int, existing: types.FunctionType, name: str) -> None:
        # States of earlier versions do not tell the place
        _, saved_name, parts, *saved_place = self._entries[number]
        if existing.__name__ != saved_name:
            self.differences.append(f"{name} is the function {existing.__name__}, the saved one was {saved_name}")
            return
        place = place_of(existing)
        for saved_reference, saved_line, *columns in saved_place:
            # Those of earlier versions have no column
            is_same_place = place[1] == saved_line and columns in ([], [place[2]])
            if not is_same_reference(place[0], saved_reference) or not is_same_place:
                found, saved = f"{place[0]} in line {place[1]}", f"{saved_reference} in line {saved_line}"
                self.differences.append(f"{name} is the function {found}, the saved one was {saved}")
        self._built[number] = existing
        there = function_parts(existing)
        for part, item in parts.items():
            if self._keeps_equal and (part not in there or self.adopt(item, there[part])):
                continue
            value = self.value(item, there.get(part, MISSING), f"{name}'s {part}")
            if value is not there.get(part, MISSING):
                set_function_part(existing, part, value)

    def _put_object(self, number: int, existing: object, name: str) -> None:
        _, class_name, attributes = self._entries[number]
        if type(existing).__qualname__ != class_name:
            raise OtherStructureError(f"{name} is a {type(existing).__qualname__}, the saved one was a {class_name}")
        self._built[number] = existing
        there = attributes_of(existing)
        for key, item in attributes.items():
            if is_no_state(existing, key):
                raise ValueError(f"{name}.{key} is no state")
            if self._keeps_equal and self.adopt(item, there.get(key, MISSING)):
                continue
            value = self.value(item, there.get(key, MISSING), f"{name}.{key}")
            if value is not there.get(key, MISSING):
                # The class may have a __setattr__ of its own
                object.__setattr__(existing, key, value)
        for key in there.keys() - attributes.keys():
            if not is_no_state(existing, key):
                object.__delattr__(existing, key)

    def _equals(self, item: Item, existing: Any, found: dict[int, Any]) -> bool:  # noqa: ANN401  # any value
        if not isinstance(item, list):
            # Not ==, for which True is 1, and NaN is not NaN
            return type(item) is type(existing) and (item == existing or repr(item) == repr(existing))
        if not item:
            return True
        number = item[0]
        if isinstance(number, str):
            return is_same_reference(reference_to(existing), number)
        if number in found or number in self._built:
            return (found | self._built)[number] is existing
        kind, *content = self._entries[number]
        found[number] = existing
        if kind in ("set", "frozenset"):
            is_set = type(existing) is _SEQUENCES[kind]
            return is_set and existing == {self.value(part, MISSING, "") for part in content[0]}
        if kind in ("enum", "path", "range", "complex"):
            return isinstance(existing, IMMUTABLE) and _are_equal(parts_of_immutable(existing), [kind, *content])
        if kind in _SEQUENCES:
            if type(existing) is not _SEQUENCES[kind] or len(existing) != len(content[0]):
                return False
            return all(self._equals(part, there, found) for part, there in zip(content[0], existing, strict=True))
        if kind in _MAPPINGS:
            if type(existing) is not _MAPPINGS[kind] or len(existing) != len(content[0]):
                return False
            keys = [self.value(key, MISSING, "") for key, _ in content[0]]
            same_keys = keys == list(existing)
            return same_keys and all(
                self._equals(part, existing[key], found) for key, (_, part) in zip(keys, content[0], strict=True)
            )
        if kind == "array":
            saved = content[0]
            is_array = type(existing) is np.ndarray and existing.dtype == saved.dtype and existing.shape == saved.shape
            return is_array and existing.tobytes() == saved.tobytes()
        return False


def _are_equal(parts: list[Any], saved: list[Any]) -> bool:
    if parts[0] == saved[0] == "enum":
        return is_same_reference(parts[1], saved[1]) and parts[2] == saved[2]
    # Not ==, for which NaN is not NaN, and 0 is -0
    return repr(parts) == repr(saved)


def _read_only(array: np.ndarray) -> np.ndarray:
    array.flags.writeable = False
    return array


def check_reference(existing: object, saved: str, name: str) -> None:
    """Check that a class, or a callable that holds nothing, is the saved one.

    :param existing: what is there, or :data:`MISSING`
    :param saved: what ``reference_to`` has returned
    :param name: what to call it in the error
    :raises ValueError: if it is another one
    """
    reference = reference_to(existing)
    if not is_same_reference(reference, saved):
        there = "missing" if existing is MISSING else reference or f"a {type(existing).__qualname__}"
        raise OtherStructureError(f"{name} is {there}, the saved one was {saved}")


def text_of_constant(value: object) -> str:
    """Return a text that tells a constant from others of its class.

    :param value: an object of a class in :data:`CONSTANTS`; in states of earlier versions also in :data:`IMMUTABLE`
    """
    kind = type(value).__qualname__
    return f"{kind} {value!r}" if isinstance(value, (*CONSTANTS, *IMMUTABLE)) else kind
