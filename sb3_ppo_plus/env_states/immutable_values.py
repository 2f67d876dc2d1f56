"""Objects that nobody changes, as plain values: members of Enums, paths, ranges, complex numbers."""

from __future__ import annotations

import pathlib
import sys
from enum import Enum, Flag
from typing import Any

from sb3_ppo_plus.env_states.callable_parts import is_same_reference, reference_to

IMMUTABLE = (Enum, pathlib.PurePath, range, complex)
_PATHS = ("PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath")


def parts_of_immutable(value: Any) -> list[Any]:  # noqa: ANN401  # of a class in IMMUTABLE
    """Return what kind of object it is, and its parts: plain values.

    :param value: an object of a class in :data:`IMMUTABLE`
    """
    if isinstance(value, Enum):
        # Flags that are joined have no name of their own
        return ["enum", reference_to(type(value)), value.value if isinstance(value, Flag) else value.name]
    if isinstance(value, pathlib.PurePath):
        return ["path", type(value).__name__, str(value)]
    if isinstance(value, range):
        return ["range", value.start, value.stop, value.step]
    return ["complex", value.real, value.imag]


def made_of_parts(parts: list[Any], existing: object, name: str) -> Any:  # noqa: ANN401  # of a class in IMMUTABLE
    """Make an object of what :func:`parts_of_immutable` has returned. No module is imported.

    :param parts: its parts
    :param existing: what is in its place now, which tells its class
    :param name: what to call it in an error
    :raises ValueError: if this program has no such class, or the class no such member
    """
    kind, *content = parts
    if kind == "range":
        return range(*content)
    if kind == "complex":
        return complex(*content)
    if kind == "path":
        class_name, text = content
        if class_name not in _PATHS:
            raise ValueError(f"{name} was a {class_name}; allowed: {', '.join(_PATHS)}")
        return getattr(pathlib, class_name)(text)
    reference, member = content
    cls: Any = type(existing)
    if not is_same_reference(reference_to(cls), reference):
        cls = _class_at(reference)
    if not (isinstance(cls, type) and issubclass(cls, Enum)):
        raise ValueError(f"{name} was a member of the Enum {reference}, which this program does not have")
    if issubclass(cls, Flag):
        return cls(member)
    if member not in cls.__members__:
        raise ValueError(f"{name} was {member} of the Enum {reference}, which lacks it; there: {list(cls.__members__)}")
    return cls[member]


def _class_at(reference: str) -> object:
    module, _, name = reference.partition(":")
    found: object = sys.modules.get(module)
    for part in name.split("."):
        found = getattr(found, part, None)
    return found
