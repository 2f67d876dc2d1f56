"""State of classes besides their data: in methods, in objects that are called, in classes that serve as namespaces."""

from __future__ import annotations

import sys
import types
from collections.abc import Iterator
from enum import Enum
from functools import cached_property, partialmethod
from typing import Any, NamedTuple

from sb3_ppo_plus.env_states.callable_parts import function_parts
from sb3_ppo_plus.env_states.object_attributes import (
    NOT_STATE,
    SPACES,
    class_attributes_of,
    is_of_library,
    is_special,
    names_of_classes,
)
from sb3_ppo_plus.env_states.object_graph import has_attributes

# Flag of classes that Python code has defined
_HEAP_TYPE = 1 << 9
# What a class keeps of Python's own besides functions
_OF_PYTHON = (types.MemberDescriptorType, types.GetSetDescriptorType, types.WrapperDescriptorType)
_WRAPPERS = (staticmethod, classmethod, property, cached_property, partialmethod)


class Member(NamedTuple):
    """A part of a class that may hold state.

    :param cls: the class
    :param name: the name that the class has it under
    :param value: data, an object that is called, or the function inside a method or property
    :param is_replaced: whether it is a function that another place has put there
    """

    cls: type[Any]
    name: str
    value: Any
    is_replaced: bool = False


def namespaces_of(owner: object) -> dict[str, type[Any]]:
    """Return the classes whose contents are state: an object's own, those inside them, and those that attributes hold.

    :param owner: an environment or a wrapper
    :return: each class by a name; empty for objects of libraries' classes
    """
    owner_class: Any = type(owner)
    own = names_of_classes(owner_class)
    found = dict(own)
    if not own:
        return found
    known = set(own.values())
    waiting = [(f"{owner_class.__name__}.{name}", value) for name, value in getattr(owner, "__dict__", {}).items()]
    waiting += [(f"{name}.{inner}", value) for name, cls in own.items() for inner, value in vars(cls).items()]
    for name, value in waiting:
        if isinstance(value, type) and _is_namespace(value) and value not in known and name not in found:
            known.add(value)
            found[name] = value
            waiting += [(f"{name}.{inner}", part) for inner, part in vars(value).items()]
    return found


def members_of(owner: object) -> dict[str, Member]:
    """Return the state of an object's classes that is not their data, by the names under which it is saved.

    It is in the closures, defaults and attributes of methods, in objects that are called, in the user's own
    ``metadata``, and in the data of classes that serve as namespaces. Functions that another place has put into the
    class are members too.

    :param owner: an environment or a wrapper
    """
    namespaces = namespaces_of(owner)
    if not namespaces:
        return {}
    data = class_attributes_of(owner)
    members = {}
    for class_name, cls in namespaces.items():
        for name, raw in vars(cls).items():
            member = None if (cls, name) in data else _member(cls, name, raw)
            if member is not None:
                members[f"{class_name}.{name}"] = member
    return members


def member_of(owner: object, name: str) -> Member | None:
    """Return one of :func:`members_of`, or what is in its place now.

    :param owner: an environment or a wrapper
    :param name: its name there
    :return: None if there is nothing that could be a member
    """
    class_name, _, attribute = name.rpartition(".")
    cls = namespaces_of(owner).get(class_name)
    if cls is None or attribute not in vars(cls):
        return None
    function = _function_in(vars(cls)[attribute])
    return _member(cls, attribute, vars(cls)[attribute]) if function is None else Member(cls, attribute, function)


def descriptors_of(owner: object) -> Iterator[tuple[str, Any]]:
    """Yield the objects that stand for attributes and that a user's class has made, by their names.

    :param owner: an environment or a wrapper
    """
    for class_name, cls in namespaces_of(owner).items():
        for name, raw in vars(cls).items():
            is_function = isinstance(raw, (types.FunctionType, *_OF_PYTHON, *_WRAPPERS))
            if hasattr(type(raw), "__get__") and not is_function and has_attributes(raw):
                raw_class: Any = type(raw)
                if not is_of_library(raw_class):
                    yield f"{class_name}.{name}", raw


def _member(cls: type[Any], name: str, raw: Any) -> Member | None:  # noqa: ANN401  # any value
    function = _function_in(raw)
    if function is not None:
        is_replaced = not is_special(name) and _is_replaced(cls, name, function)
        holds = is_replaced or any(part != "cell __class__" for part in function_parts(function))
        return Member(cls, name, function, is_replaced) if holds else None
    is_known = name in SPACES or (name in NOT_STATE and name != "metadata")
    if is_special(name) or is_known or isinstance(raw, type) or hasattr(type(raw), "__get__"):
        return None
    return Member(cls, name, raw) if not callable(raw) or has_attributes(raw) else None


def _function_in(raw: object) -> types.FunctionType | None:
    """Return the Python function inside a method, or inside a property that reads."""
    if isinstance(raw, staticmethod | classmethod):
        raw = raw.__func__
    elif isinstance(raw, property):
        raw = raw.fget
    elif isinstance(raw, cached_property | partialmethod):
        raw = raw.func
    return raw if isinstance(raw, types.FunctionType) else None


def _is_replaced(cls: type[Any], name: str, function: types.FunctionType) -> bool:
    return function.__module__ != cls.__module__ or function.__qualname__ != f"{cls.__qualname__}.{name}"


def _is_namespace(cls: type[Any]) -> bool:
    module = cls.__module__.partition(".")[0]
    is_foreign = is_of_library(cls) or module in sys.stdlib_module_names or issubclass(cls, Enum)
    return bool(cls.__flags__ & _HEAP_TYPE) and (module == "__main__" or not is_foreign)
