"""Puts the state of environments and wrappers back from a file that is not trusted: numbers only."""

from __future__ import annotations

import inspect
from collections import deque
from typing import Any

import numpy as np
import torch as th
from gymnasium import spaces

from sb3_ppo_plus.env_states.callable_parts import is_same_reference, reference_to
from sb3_ppo_plus.env_states.generator_state import restored_generator, set_space_generator_states
from sb3_ppo_plus.env_states.mujoco_state import set_mujoco_state
from sb3_ppo_plus.env_states.object_attributes import attributes_of, is_special, saved_class_attributes_of
from sb3_ppo_plus.env_states.object_graph import GENERATORS, TRANSPARENT, plain_copy
from sb3_ppo_plus.env_states.object_graph_reader import MISSING
from sb3_ppo_plus.env_states.object_state import TABLE
from sb3_ppo_plus.env_states.simulator_state import is_mujoco_data
from sb3_ppo_plus.untrusted.strict_json import short

# Sizes, which memory is reserved for: no run changes them
STRUCTURE = ("num_envs", "n_envs", "n_stack", "num_stack", "stack_size", "frame_stack")
# Kinds of dtypes: flags, integers, floats, complex numbers
_NUMERIC = "biufc"


def set_state_without_trust(owner: object, state: dict[str, tuple[str, Any]]) -> list[str]:
    """Put back what may come from anybody: numbers, flags and arrays in place of such, see :func:`may_replace`.

    So are the states of random generators, of MuJoCo, and of running means. Texts, functions, shared objects, data of
    classes and the states of Atari games are left out: a text could be the folder into which a wrapper writes.

    :param owner: an environment or a wrapper
    :param state: what :func:`object_state` has returned, from the file
    :return: names of what was left out, where it differs from what is there
    :raises ValueError: for the name of a method or of a special attribute, and for the state of another simulator
    """
    there = attributes_of(owner)
    of_classes = saved_class_attributes_of(owner)
    left_out = []
    for name, (kind, saved) in state.items():
        if name == TABLE:
            # Where attributes share objects; none of these are put back
            continue
        full_name = f"{type(owner).__name__}.{short(name)[1:-1]}"
        if "." in name:
            existing = of_classes.get(name, MISSING)
            if not (kind == "plain" and existing is not MISSING and _is_equal(existing, saved)):
                left_out.append(full_name)
            continue
        if kind == "reference":
            # Never put back
            if not isinstance(saved, str) or not is_same_reference(reference_to(there.get(name)), saved):
                left_out.append(full_name)
            continue
        if is_special(name) or callable(inspect.getattr_static(type(owner), name, None)):
            raise ValueError(f"{full_name} is no state")
        inner = _put(owner, name, kind, saved, there.get(name, MISSING))
        left_out += [f"{full_name}{part}" for part in inner]
    return left_out


def _put(owner: object, name: str, kind: str, saved: Any, existing: Any) -> list[str]:  # noqa: ANN401  # any value
    """Put back one attribute. Return the ends of the names of what was left out; "" is the whole attribute."""
    is_plain = kind == "plain" or (kind == "read-only" and isinstance(saved, np.ndarray))
    may_change = name not in STRUCTURE or _is_equal(existing, saved)
    if is_plain and may_change and existing is not MISSING and may_replace(existing, saved):
        if not _is_equal(existing, saved):
            value = plain_copy(saved)
            if kind == "read-only":
                value.flags.writeable = False
            setattr(owner, name, value)
    elif kind == "space" and isinstance(existing, spaces.Space):
        set_space_generator_states(existing, saved)
    elif kind == "generator" and isinstance(existing, GENERATORS):
        # One of another kind is not put in its place
        return [] if restored_generator(existing, saved) is existing else [""]
    elif kind == "mujoco" and is_mujoco_data(existing):
        return [f".model.{part}" for part in set_mujoco_state(existing, saved, trusted=False)]
    elif kind == "object" and isinstance(existing, TRANSPARENT):
        return [f".{part}" for part in set_state_without_trust(existing, saved)]
    elif kind == "objects" and isinstance(existing, dict):
        left_out = []
        for key, state in saved.items():
            if isinstance(existing.get(key), TRANSPARENT):
                left_out += [f"[{short(key)}].{part}" for part in set_state_without_trust(existing[key], state)]
            else:
                left_out.append(f"[{short(key)}]")
        return left_out
    else:
        return [""]
    return []


def _is_equal(existing: object, saved: object) -> bool:
    # NaN is equal here; arrays are compared by may_replace alone, and put back
    return (
        type(existing) is type(saved)
        and isinstance(existing, str | int | float | bytes | None)
        and (existing == saved or repr(existing) == repr(saved))
    )


def may_replace(existing: object, saved: object) -> bool:
    """Whether a value from a file without trust may take the place of another one.

    It may if it is a number or an array of the same type and shape, or holds only such where the other one holds them.
    A text may not: it could be a path. ``None`` stands for numbers that are missing.

    :param existing: the value in place
    :param saved: the value from the file
    """
    if existing is None:
        return _holds_numbers_only(saved)
    if saved is None:
        # In place of a number, arithmetic would fail
        return isinstance(existing, list | tuple | dict) and _holds_numbers_only(existing, any_keys=True)
    if isinstance(existing, bool | np.bool_):
        return isinstance(saved, bool | np.bool_)
    if is_number(existing) and is_number(saved):
        # A sum of rewards may begin as the integer 0. Arithmetic with a much larger integer would fail
        return not isinstance(saved, int) or abs(saved) < 2**63 or saved == existing
    if isinstance(existing, np.ndarray | np.generic) and isinstance(saved, np.ndarray | np.generic):
        # Arithmetic turns an array of no dimensions into a number. An empty array waits for its first numbers
        is_same = (existing.dtype, existing.shape) == (saved.dtype, saved.shape)
        if existing.dtype.kind in _NUMERIC and saved.dtype.kind in _NUMERIC:
            return is_same or existing.size == 0
        # Texts, such as the map of a game
        return is_same and not existing.dtype.hasobject and existing.tobytes() == saved.tobytes()
    if isinstance(existing, th.Tensor):
        return type(saved) is type(existing) and (saved.dtype, saved.shape) == (existing.dtype, existing.shape)
    if type(existing) is not type(saved):
        return False
    if isinstance(existing, dict):
        assert isinstance(saved, dict)
        if existing.keys() == saved.keys():
            return all(may_replace(value, saved[key]) for key, value in existing.items())
        return _holds_numbers_only(existing) and _holds_numbers_only(saved)
    if isinstance(existing, list | tuple | deque | set):
        assert isinstance(saved, list | tuple | deque | set)
        if isinstance(existing, deque) and existing.maxlen != saved.maxlen:  # type: ignore[union-attr]  # a deque too
            return False
        if len(existing) == len(saved) and not isinstance(existing, set):
            return all(map(may_replace, existing, saved))
        return _holds_numbers_only(existing) and _holds_numbers_only(saved)
    # The same text or bytes change nothing
    return bool(existing == saved)


def _holds_numbers_only(value: object, any_keys: bool = False) -> bool:
    if isinstance(value, dict):
        keys = [] if any_keys else list(value)
        return all(_holds_numbers_only(part, any_keys) for part in [*keys, *value.values()])
    if isinstance(value, list | tuple | deque | set):
        return all(_holds_numbers_only(part, any_keys) for part in value)
    if isinstance(value, np.ndarray | np.generic):
        return value.dtype.kind in _NUMERIC
    return value is None or isinstance(value, bool | int | float | th.Tensor)


def is_number(value: object) -> bool:
    """Whether a value is a number of Python or NumPy, and no flag.

    :param value: any value
    """
    return isinstance(value, int | float | np.number) and not isinstance(value, bool)
