"""What functions, methods and other callables hold besides their code."""

from __future__ import annotations

import functools
import itertools
import operator
import types
from collections.abc import Callable
from typing import Any

import numpy as np

BOUND = (types.MethodType, types.BuiltinMethodType, types.MethodWrapperType)
# Callables that hold nothing that changes
_STATELESS = (
    np.ufunc,
    functools._lru_cache_wrapper,
    operator.attrgetter,
    operator.itemgetter,
    operator.methodcaller,
    types.MethodDescriptorType,
    types.WrapperDescriptorType,
)
# Packages whose callables are compiled functions
_COMPILERS = ("jax", "jaxlib", "numba")
# Names of the module that a process was started with
_SCRIPTS = frozenset(("__main__", "__mp_main__"))


def is_stateless_callable(value: object) -> bool:
    """Whether a callable holds nothing that may change: builtin functions, methods of classes, caches, compiled code.

    :param value: any value
    """
    if isinstance(value, BOUND):
        owner = value.__self__
        return owner is None or isinstance(owner, types.ModuleType | type)
    return isinstance(value, _STATELESS) or (callable(value) and type(value).__module__.partition(".")[0] in _COMPILERS)


def reference_to(value: object) -> str | None:
    """Return what tells a class or a callable that holds nothing from others: "module:name".

    :param value: any value
    :return: None for anything else
    """
    if isinstance(value, type):
        return f"{value.__module__}:{value.__qualname__}"
    if not is_stateless_callable(value):
        return None
    if isinstance(value, operator.attrgetter | operator.itemgetter | operator.methodcaller):
        return repr(value)
    name = getattr(value, "__name__", type(value).__qualname__)
    if isinstance(value, BOUND) and isinstance(value.__self__, types.ModuleType):
        return f"{value.__self__.__name__}:{name}"
    if isinstance(value, BOUND) and isinstance(value.__self__, type):
        return f"{reference_to(value.__self__)}.{name}"
    module = "numpy" if isinstance(value, np.ufunc) else getattr(value, "__module__", None) or "builtins"
    return f"{module}:{getattr(value, '__qualname__', None) or name}"


def is_same_reference(first: str | None, second: str | None) -> bool:
    """Whether two references mean the same. The module of a script has other names where others import it.

    :param first: what :func:`reference_to` has returned
    :param second: the same of another value
    """
    if first == second:
        return True
    if first is None or second is None:
        return False
    (module, _, name), (other_module, _, other_name) = first.rpartition(":"), second.rpartition(":")
    return name == other_name and not _SCRIPTS.isdisjoint((module, other_module))


def place_of(function: types.FunctionType) -> tuple[str, int, int]:
    """Return where a function was defined: "module:name", the line, and where in the line its first instruction is.

    :param function: a Python function
    """
    code = function.__code__
    columns = [column for _, _, column, _ in itertools.islice(code.co_positions(), 3) if column]
    # Two functions of one line, such as the lambdas of a list
    return f"{function.__module__}:{function.__qualname__}", code.co_firstlineno, sum(columns)


def function_parts(function: types.FunctionType) -> dict[str, Any]:
    """Return what a function holds: contents of its closure, its attributes, defaults that are no plain leaf.

    :param function: a Python function
    """
    parts: dict[str, Any] = {}
    for name, cell in _cells(function).items():
        try:
            parts[f"cell {name}"] = cell.cell_contents
        except ValueError:
            # The variable was never set, or was deleted
            continue
    for name, value in sorted(vars(function).items()):
        # functools.wraps leaves the wrapped function in __wrapped__, which a cell holds too
        if not name.startswith("__"):
            parts[f"attribute {name}"] = value
    for index, value in enumerate(function.__defaults__ or ()):
        if not isinstance(value, None | bool | int | float | str | bytes):
            parts[f"default {index}"] = value
    for name, value in (function.__kwdefaults__ or {}).items():
        if not isinstance(value, None | bool | int | float | str | bytes):
            parts[f"keyword {name}"] = value
    return parts


def set_function_part(function: types.FunctionType, name: str, value: object) -> None:
    """Put a part into a function.

    :param function: a Python function
    :param name: a name in :func:`function_parts`
    :param value: the part
    :raises ValueError: if the function has no such part
    """
    kind, _, inner = name.partition(" ")
    cells, defaults = _cells(function), list(function.__defaults__ or ())
    keywords = dict(function.__kwdefaults__ or {})
    if kind == "cell" and inner in cells:
        cells[inner].cell_contents = value
    elif kind == "attribute" and not inner.startswith("__"):
        vars(function)[inner] = value
    elif kind == "default" and inner.isdecimal() and int(inner) < len(defaults):
        defaults[int(inner)] = value
        function.__defaults__ = tuple(defaults)
    elif kind == "keyword" and inner in keywords:
        function.__kwdefaults__ = keywords | {inner: value}
    else:
        raise ValueError(f"{function.__qualname__} has no {name}")


def rebound(existing: Callable[..., Any], owner: object, name: str) -> Callable[..., Any]:
    """Return a method of an object.

    :param existing: a bound method, which is returned if it is the one
    :param owner: the object
    :param name: name of the method
    :raises ValueError: if the object has no such method
    """
    if existing.__name__ == name:
        if existing.__self__ is owner:  # type: ignore[attr-defined]  # a bound method
            return existing
        if isinstance(existing, types.MethodType):
            return types.MethodType(existing.__func__, owner)
    method = getattr(owner, name, None)
    if not isinstance(method, BOUND) or name.startswith("__"):
        raise ValueError(f"{type(owner).__name__} has no method {name}")
    return method


def _cells(function: types.FunctionType) -> dict[str, types.CellType]:
    return dict(zip(function.__code__.co_freevars, function.__closure__ or (), strict=True))
