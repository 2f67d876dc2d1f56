"""Puts the state of environments and wrappers back from a file that is not trusted: numbers only."""

from __future__ import annotations

import inspect
from typing import Any

from gymnasium import spaces

from sb3_ppo_plus.resuming.generator_state import restored_generator, set_space_generator_states
from sb3_ppo_plus.resuming.object_attributes import attributes_of, class_attributes_of
from sb3_ppo_plus.resuming.object_graph import GENERATORS, TRANSPARENT, plain_copy
from sb3_ppo_plus.resuming.object_graph_reader import MISSING
from sb3_ppo_plus.resuming.object_state import TABLE
from sb3_ppo_plus.resuming.simulator_state import is_mujoco_data, set_mujoco_state
from sb3_ppo_plus.resuming.state_checks import may_replace
from sb3_ppo_plus.untrusted.strict_json import short


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
    of_classes = {f"{cls.__name__}.{name}": value for (cls, name), value in class_attributes_of(owner).items()}
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
        if name.startswith("__") or callable(inspect.getattr_static(type(owner), name, None)):
            raise ValueError(f"{full_name} is no state")
        inner = _put(owner, name, kind, saved, there.get(name, MISSING))
        left_out += [f"{full_name}{part}" for part in inner]
    return left_out


def _put(owner: object, name: str, kind: str, saved: Any, existing: Any) -> list[str]:  # noqa: ANN401  # any value
    """Put back one attribute. Return the ends of the names of what was left out; "" is the whole attribute."""
    if kind == "plain" and existing is not MISSING and may_replace(existing, saved):
        if not _is_equal(existing, saved):
            setattr(owner, name, plain_copy(saved))
    elif kind == "space" and isinstance(existing, spaces.Space):
        set_space_generator_states(existing, saved)
    elif kind == "generator" and isinstance(existing, GENERATORS):
        # One of another kind is not put in its place
        return [] if restored_generator(existing, saved) is existing else [""]
    elif kind == "mujoco" and is_mujoco_data(existing):
        set_mujoco_state(existing, saved, trusted=False)
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
