"""The state of environments and wrappers as plain values: attributes, generators, spaces, simulators."""

from __future__ import annotations

import copy
import importlib
import inspect
import random
import sys
from collections.abc import Callable, Collection
from functools import cache
from types import ModuleType
from typing import Any, NamedTuple

import gymnasium.wrappers.utils
import numpy as np
from gymnasium import spaces
from gymnasium.envs.registration import EnvSpec
from stable_baselines3.common.running_mean_std import RunningMeanStd
from stable_baselines3.common.vec_env.stacked_observations import StackedObservations

from sb3_ppo_plus.errors import PlainStateError
from sb3_ppo_plus.resuming.generator_state import (
    generator_state,
    restored_generator,
    set_space_generator_states,
    space_generator_states,
)
from sb3_ppo_plus.resuming.plain_state import PlainStateWriter

State = dict[str, tuple[str, Any]]
"""By attribute: its kind, a key of :data:`KINDS`, and plain values."""

# How an object was made, what is inside it, what an Atari game can do
NOT_STATE = {
    "_action_set",
    "_cached_spec",
    "_ezpickle_args",
    "_ezpickle_kwargs",
    "_metadata",
    "_saved_kwargs",
    "class_attributes",
    "env",
    "metadata",
    "obs_spaces",
    "spec",
    "venv",
}
# Rendering, and files of episodes' statistics
NOT_STATE_MODULES = ("pygame", "gymnasium.envs.mujoco.mujoco_rendering", "stable_baselines3.common.monitor")
# Objects whose attributes are their state
TRANSPARENT = (RunningMeanStd, gymnasium.wrappers.utils.RunningMeanStd, StackedObservations)


class Kind(NamedTuple):
    """How one kind of attribute is saved.

    :param applies: whether a value is of this kind
    :param get: makes plain values of a value
    :param put: takes the existing value and the saved one; returns the existing value, changed, or another
    """

    applies: Callable[[Any], bool]
    get: Callable[[Any], Any]
    put: Callable[[Any, Any], Any]


def object_state(owner: object, constant: Collection[str] = (), refused: list[str] | None = None) -> State:
    """Copy what may change in ``owner``: plain attributes, random generators, also of spaces, MuJoCo, Atari.

    Running means and stacks of observations are part of it; functions, classes, modules and rendering are not.

    :param owner: an environment or a wrapper
    :param constant: names of further attributes to leave out
    :param refused: takes a line about each attribute that cannot be saved; None: the first one is an error
    :raises PlainStateError: for an attribute that cannot be saved, by name
    """
    of_class = {
        name: value
        for name in ("observation_space", "action_space")
        if isinstance(value := inspect.getattr_static(type(owner), name, None), spaces.Space)
    }
    state: State = {}
    for name, value in {**of_class, **vars(owner)}.items():
        if name in NOT_STATE or name in constant or _never_changes(value):
            continue
        kind = next(kind for kind in KINDS if KINDS[kind].applies(value))
        try:
            if kind == "plain":
                PlainStateWriter().describe(value, f"{type(owner).__name__}.{name}")
            state[name] = (kind, KINDS[kind].get(value))
        except PlainStateError as error:
            if refused is None:
                raise
            refused.append(str(error))
    return state


def set_object_state(owner: object, state: State) -> None:
    """Put back what :func:`object_state` has returned.

    :raises ValueError: for what it never returns: a method, or an attribute of Python's own; and for an object inside
        ``owner`` that is not there
    """
    for name, (kind, saved) in state.items():
        if name.startswith("__") or callable(inspect.getattr_static(type(owner), name, None)):
            raise ValueError(f"{type(owner).__name__}.{name} is no state")
        # Not getattr: a wrapper of SB3 answers for what it wraps
        existing = vars(owner).get(name, inspect.getattr_static(type(owner), name, None))
        if existing is None and kind not in ("plain", "generator"):
            raise ValueError(f"{type(owner).__name__} has no {name}, as the saved one had: it was made in another way")
        value = KINDS[kind].put(existing, saved)
        if value is not existing:
            setattr(owner, name, value)


def mujoco_state(data: Any) -> dict[str, Any]:  # noqa: ANN401  # mujoco is an optional dependency
    """Full integration state of an ``MjData``, and the derived arrays, which lag one step behind it after a step.

    Environments read those before their next step: Ant's reward is the change of the torso's lagging position.
    """
    mujoco = importlib.import_module("mujoco")
    integration = mujoco.mjtState.mjSTATE_INTEGRATION
    state = np.empty(mujoco.mj_stateSize(data.model, integration))
    mujoco.mj_getState(data.model, data, state, integration)
    # One array for all: there are 120 of them in each environment
    derived = [getattr(data, name) for name in _derived_arrays()]
    sizes = np.array([array.nbytes for array in derived])
    return {"integration": state, "derived": b"".join(array.tobytes() for array in derived), "sizes": sizes}


def set_mujoco_state(data: Any, state: dict[str, Any]) -> None:  # noqa: ANN401  # as above
    """Put back what :func:`mujoco_state` has returned.

    :raises ValueError: for a state of another model
    """
    mujoco = importlib.import_module("mujoco")
    integration = mujoco.mjtState.mjSTATE_INTEGRATION
    size = mujoco.mj_stateSize(data.model, integration)
    if len(state["integration"]) != size:
        raise ValueError(f"the saved MuJoCo state has {len(state['integration'])} numbers, the model's has {size}")
    mujoco.mj_setState(data.model, data, state["integration"], integration)
    mujoco.mj_forward(data.model, data)
    begin = 0
    for name, size in zip(_derived_arrays(), state["sizes"].tolist(), strict=True):
        array = getattr(data, name)
        # What is as long as there are contacts is as MuJoCo finds it now
        if array.nbytes == size:
            array[...] = np.frombuffer(state["derived"][begin : begin + size], array.dtype).reshape(array.shape)
        begin += size


@cache
def _derived_arrays() -> list[str]:
    mujoco = importlib.import_module("mujoco")
    data = mujoco.MjData(mujoco.MjModel.from_xml_string("<mujoco/>"))
    names = [name for name in dir(data) if isinstance(getattr(data, name), np.ndarray)]
    # Those of constraints are as long as there are contacts, and no environment of Gymnasium reads them
    return [name for name in names if not name.startswith(("_", "efc_", "iefc_"))]


def _never_changes(value: object) -> bool:
    if isinstance(value, EnvSpec | ModuleType | type) or (callable(value) and not isinstance(value, TRANSPARENT)):
        return True
    is_view_of_mujoco = isinstance(value, np.ndarray) and type(_owner_of_memory(value)).__name__ == "PyCapsule"
    return (
        is_view_of_mujoco or _is_of("mujoco", "MjModel", value) or type(value).__module__.startswith(NOT_STATE_MODULES)
    )


def _owner_of_memory(array: np.ndarray) -> object:
    owner: Any = array
    while isinstance(owner, np.ndarray) and owner.base is not None:
        owner = owner.base
    return owner


def _is_of(module: str, name: str, value: object) -> bool:
    # Optional dependencies: without them there are no such objects
    return module in sys.modules and isinstance(value, getattr(sys.modules[module], name))


def _set_atari_state(ale: Any, state: bytes) -> None:  # noqa: ANN401  # ale-py is an optional dependency
    ale.restoreState(importlib.import_module("ale_py").ALEState(state))


def _are_transparent(value: object) -> bool:
    return isinstance(value, dict) and len(value) > 0 and all(isinstance(part, TRANSPARENT) for part in value.values())


def _changed(change: Callable[[Any, Any], None]) -> Callable[[Any, Any], Any]:
    def put(existing: Any, saved: Any) -> Any:  # noqa: ANN401  # of any kind
        change(existing, saved)
        return existing

    return put


def _set_each(existing: dict[Any, Any], saved: dict[Any, State]) -> None:
    for key, state in saved.items():
        set_object_state(existing[key], state)


KINDS = {
    "space": Kind(
        lambda value: isinstance(value, spaces.Space), space_generator_states, _changed(set_space_generator_states)
    ),
    "generator": Kind(
        lambda value: isinstance(value, np.random.Generator | np.random.RandomState | random.Random),
        generator_state,
        restored_generator,
    ),
    "mujoco": Kind(lambda value: _is_of("mujoco", "MjData", value), mujoco_state, _changed(set_mujoco_state)),
    "atari": Kind(
        lambda value: _is_of("ale_py", "ALEInterface", value),
        lambda ale: ale.cloneState(include_rng=True).serialize(),
        _changed(_set_atari_state),
    ),
    "object": Kind(lambda value: isinstance(value, TRANSPARENT), object_state, _changed(set_object_state)),
    "objects": Kind(
        _are_transparent, lambda parts: {key: object_state(part) for key, part in parts.items()}, _changed(_set_each)
    ),
    # Copied both ways: the state may be used again
    "plain": Kind(lambda value: True, copy.deepcopy, lambda existing, saved: copy.deepcopy(saved)),
}
"""Kinds of attributes, the first that applies counts."""
