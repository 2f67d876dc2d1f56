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

ObjectState = dict[str, tuple[str, Any]]
"""For each attribute its kind, which is a key of :data:`KINDS`, and plain values."""

# Attributes that are no state: how an object was made, what it wraps, what an Atari game can do
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
# Modules whose objects are no state: they render, or write statistics of episodes to files
NOT_STATE_MODULES = ("pygame", "gymnasium.envs.mujoco.mujoco_rendering", "stable_baselines3.common.monitor")
# Objects whose attributes are their state
TRANSPARENT = (RunningMeanStd, gymnasium.wrappers.utils.RunningMeanStd, StackedObservations)


class Kind(NamedTuple):
    """How one kind of attribute is saved.

    :param applies: tells whether a value is of this kind
    :param get: turns a value into plain values
    :param put: takes the existing value and the saved plain values; returns the existing value, changed, or a new one
    """

    applies: Callable[[Any], bool]
    get: Callable[[Any], Any]
    put: Callable[[Any, Any], Any]


def object_state(owner: object, constant: Collection[str] = (), refused: list[str] | None = None) -> ObjectState:
    """Copy what may change in an object: plain attributes, random generators (also of spaces), MuJoCo, Atari.

    Running means and stacks of observations are part of it. Functions, classes, modules and rendering are not.

    :param owner: an environment or a wrapper
    :param constant: names of further attributes to leave out
    :param refused: gets a line for each attribute that cannot be saved; None: the first of them is an error
    :raises PlainStateError: if an attribute cannot be saved; the message names it
    """
    attributes: dict[str, Any] = {}
    for name in ("observation_space", "action_space"):
        # These may be attributes of the class, which vars() of an instance lacks
        space = inspect.getattr_static(type(owner), name, None)
        if isinstance(space, spaces.Space):
            attributes[name] = space
    attributes |= vars(owner)
    state: ObjectState = {}
    for name, value in attributes.items():
        if name in NOT_STATE or name in constant or _never_changes(value):
            continue
        kind = next(kind for kind in KINDS if KINDS[kind].applies(value))
        try:
            if kind == "plain":
                PlainStateWriter().encode(value, f"{type(owner).__name__}.{name}")
            state[name] = (kind, KINDS[kind].get(value))
        except PlainStateError as error:
            if refused is None:
                raise
            refused.append(str(error))
    return state


def set_object_state(owner: object, state: ObjectState) -> None:
    """Put back the state of an object.

    :param owner: an environment or a wrapper
    :param state: what :func:`object_state` has returned
    :raises ValueError: for the name of a method or of a special attribute, which no state contains; and if ``owner``
        lacks an object that the saved one had
    """
    for name, (kind, saved) in state.items():
        if name.startswith("__") or callable(inspect.getattr_static(type(owner), name, None)):
            raise ValueError(f"{type(owner).__name__}.{name} is no state")
        # Not getattr: SB3's wrappers answer with attributes of what they wrap
        existing = vars(owner).get(name, inspect.getattr_static(type(owner), name, None))
        if existing is None and kind not in ("plain", "generator"):
            raise ValueError(f"{type(owner).__name__} has no {name}, as the saved one had: it was made in another way")
        value = KINDS[kind].put(existing, saved)
        if value is not existing:
            setattr(owner, name, value)


def mujoco_state(data: Any) -> dict[str, Any]:  # noqa: ANN401  # mujoco is an optional dependency
    """Copy the integration state of an ``MjData``, and the arrays that MuJoCo derives from it.

    After a step, the derived arrays still belong to the state before it. Environments read them before their next step:
    Ant's reward is the change of the torso's position in these arrays.

    :param data: an ``MjData``
    """
    mujoco = importlib.import_module("mujoco")
    integration = mujoco.mjtState.mjSTATE_INTEGRATION
    state = np.empty(mujoco.mj_stateSize(data.model, integration))
    mujoco.mj_getState(data.model, data, state, integration)
    # The arrays are joined, since each environment has 120 of them
    derived = [getattr(data, name) for name in _derived_arrays()]
    sizes = np.array([array.nbytes for array in derived])
    return {"integration": state, "derived": b"".join(array.tobytes() for array in derived), "sizes": sizes}


def set_mujoco_state(data: Any, state: dict[str, Any]) -> None:  # noqa: ANN401  # mujoco is an optional dependency
    """Put back the state of an ``MjData``.

    :param data: an ``MjData``
    :param state: what :func:`mujoco_state` has returned
    :raises ValueError: for the state of another model
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
        # The length of some arrays depends on the contacts. Where it differs, what mj_forward has found stays
        if array.nbytes == size:
            array[...] = np.frombuffer(state["derived"][begin : begin + size], array.dtype).reshape(array.shape)
        begin += size


@cache
def _derived_arrays() -> list[str]:
    mujoco = importlib.import_module("mujoco")
    data = mujoco.MjData(mujoco.MjModel.from_xml_string("<mujoco/>"))
    names = [name for name in dir(data) if isinstance(getattr(data, name), np.ndarray)]
    # The length of constraints' arrays depends on the contacts, and no environment of Gymnasium reads them
    return [name for name in names if not name.startswith(("_", "efc_", "iefc_"))]


def _never_changes(value: object) -> bool:
    if isinstance(value, EnvSpec | ModuleType | type) or (callable(value) and not isinstance(value, TRANSPARENT)):
        return True
    # Such arrays are saved with the MjData that owns their memory
    is_view_of_mujoco = isinstance(value, np.ndarray) and type(_owner_of_memory(value)).__name__ == "PyCapsule"
    if is_view_of_mujoco or _is_instance("mujoco", "MjModel", value):
        return True
    return type(value).__module__.startswith(NOT_STATE_MODULES)


def _owner_of_memory(array: np.ndarray) -> object:
    owner: Any = array
    while isinstance(owner, np.ndarray) and owner.base is not None:
        owner = owner.base
    return owner


def _is_instance(module: str, name: str, value: object) -> bool:
    # The modules are optional dependencies. While one is not imported, its objects cannot exist
    return module in sys.modules and isinstance(value, getattr(sys.modules[module], name))


def _set_atari_state(ale: Any, state: bytes) -> None:  # noqa: ANN401  # ale-py is an optional dependency
    ale.restoreState(importlib.import_module("ale_py").ALEState(state))


def _are_transparent(value: object) -> bool:
    return isinstance(value, dict) and len(value) > 0 and all(isinstance(part, TRANSPARENT) for part in value.values())


def _in_place(change: Callable[[Any, Any], None]) -> Callable[[Any, Any], Any]:
    def put(existing: Any, saved: Any) -> Any:  # noqa: ANN401  # a value of any kind
        change(existing, saved)
        return existing

    return put


def _set_each(existing: dict[Any, Any], saved: dict[Any, ObjectState]) -> None:
    for key, state in saved.items():
        set_object_state(existing[key], state)


KINDS = {
    "space": Kind(
        lambda value: isinstance(value, spaces.Space), space_generator_states, _in_place(set_space_generator_states)
    ),
    "generator": Kind(
        lambda value: isinstance(value, np.random.Generator | np.random.RandomState | random.Random),
        generator_state,
        restored_generator,
    ),
    "mujoco": Kind(lambda value: _is_instance("mujoco", "MjData", value), mujoco_state, _in_place(set_mujoco_state)),
    "atari": Kind(
        lambda value: _is_instance("ale_py", "ALEInterface", value),
        lambda ale: ale.cloneState(include_rng=True).serialize(),
        _in_place(_set_atari_state),
    ),
    "object": Kind(lambda value: isinstance(value, TRANSPARENT), object_state, _in_place(set_object_state)),
    "objects": Kind(
        _are_transparent, lambda parts: {key: object_state(part) for key, part in parts.items()}, _in_place(_set_each)
    ),
    # Copied in both directions, so that a state can be put back several times
    "plain": Kind(lambda value: True, copy.deepcopy, lambda existing, saved: copy.deepcopy(saved)),
}
"""Kinds of attributes. The first kind that applies to a value is its kind."""
