"""The state of MuJoCo: of an ``MjData``, and the numbers of its ``MjModel``, which some environments draw anew."""

from __future__ import annotations

import importlib
from functools import cache
from operator import attrgetter
from typing import Any

import numpy as np

# Arrays of an MjModel that no environment changes, and that are large
_SHAPES = ("mesh_", "skin_", "tex_", "bvh_", "oct_")
# Beyond it MuJoCo takes a simulation for unstable, resets it and writes MUJOCO_LOG.TXT
LARGEST = 1e10


def mujoco_state(data: Any) -> dict[str, Any]:  # noqa: ANN401  # mujoco is an optional dependency
    """Copy the integration state of an ``MjData``, the arrays that MuJoCo derives from it, and the model's numbers.

    After a step, the derived arrays still belong to the state before it. Environments read them before their next step:
    Ant's reward is the change of the torso's position in these arrays.

    :param data: an ``MjData``
    """
    mujoco = importlib.import_module("mujoco")
    integration = mujoco.mjtState.mjSTATE_INTEGRATION
    state = np.empty(mujoco.mj_stateSize(data.model, integration))
    mujoco.mj_getState(data.model, data, state, integration)
    # The arrays are joined, since each environment has 120 of them
    derived = [array.tobytes() if _has_fixed_place(data, name, array) else b"" for name, array in _derived_arrays(data)]
    sizes = np.array([len(array) for array in derived])
    model = data.model
    return {
        "integration": state,
        "derived": b"".join(derived),
        "sizes": sizes,
        "model": b"".join(attrgetter(*_names_of_arrays_of_model())(model)),
        "options": np.array(attrgetter(*_names_of_options())(model)),
    }


def set_mujoco_state(data: Any, state: dict[str, Any], trusted: bool = True) -> list[str]:  # noqa: ANN401  # mujoco is an optional dependency
    """Put back the state of an ``MjData``, and the numbers of its model that are other ones.

    :param data: an ``MjData``
    :param state: what :func:`mujoco_state` has returned
    :param trusted: False: of the derived arrays, only those of floats are put back; MuJoCo reads others as indices. The
        model stays as it is
    :return: the names of the model's arrays and options that were put back, or with ``trusted=False`` differ
    :raises ValueError: for the state of another model; without trust also for NaN and numbers that are too large, at
        which MuJoCo writes a file
    """
    mujoco = importlib.import_module("mujoco")
    integration = mujoco.mjtState.mjSTATE_INTEGRATION
    size = mujoco.mj_stateSize(data.model, integration)
    if len(state["integration"]) != size:
        raise ValueError(f"the saved MuJoCo state has {len(state['integration'])} numbers, the model's has {size}")
    if not trusted and not (np.abs(state["integration"]) <= LARGEST).all():
        raise ValueError(f"the saved MuJoCo state has numbers that are NaN or larger than {LARGEST:.0e}")
    # States of earlier versions do not have it
    changed = _set_model(data.model, state, trusted) if "model" in state else []
    mujoco.mj_setState(data.model, data, state["integration"], integration)
    mujoco.mj_forward(data.model, data)
    begin = 0
    for (name, array), size in zip(_derived_arrays(data), state["sizes"].tolist(), strict=True):
        is_saved = array.nbytes == size and _has_fixed_place(data, name, array)
        if is_saved and (trusted or array.dtype.kind == "f"):
            array[...] = np.frombuffer(state["derived"][begin : begin + size], array.dtype).reshape(array.shape)
        begin += size
    return changed


def _set_model(model: Any, state: dict[str, Any], may_change: bool) -> list[str]:  # noqa: ANN401  # mujoco is optional
    """Put back the numbers of a model that are other ones; return their names."""
    arrays = [(name, attrgetter(name)(model)) for name in _names_of_arrays_of_model()]
    names = _names_of_options()
    n_bytes = sum(array.nbytes for _, array in arrays)
    if len(state["model"]) != n_bytes or len(state["options"]) != len(names):
        raise ValueError(f"the saved MuJoCo model has {len(state['model'])} bytes of numbers, the model has {n_bytes}")
    changed = []
    begin = 0
    for name, array in arrays:
        saved = state["model"][begin : begin + array.nbytes]
        begin += array.nbytes
        if array.tobytes() != saved:
            changed.append(name)
            if may_change:
                array[...] = np.frombuffer(saved, array.dtype).reshape(array.shape)
    for name, number in zip(names, state["options"].tolist(), strict=True):
        if attrgetter(name)(model) != number:
            changed.append(name)
            if may_change:
                setattr(model.opt, name.removeprefix("opt."), number)
    return changed


@cache
def _names_of_arrays_of_model() -> list[str]:
    mujoco = importlib.import_module("mujoco")
    model = mujoco.MjModel.from_xml_string("<mujoco/>")
    names = [*_public(model), *(f"opt.{name}" for name in _public(model.opt))]
    return [name for name in names if _is_of_floats(attrgetter(name)(model)) and not name.startswith(_SHAPES)]


@cache
def _names_of_options() -> list[str]:
    mujoco = importlib.import_module("mujoco")
    options = mujoco.MjModel.from_xml_string("<mujoco/>").opt
    return [f"opt.{name}" for name in _public(options) if isinstance(getattr(options, name), float)]


def _public(owner: object) -> list[str]:
    return [name for name in dir(owner) if not name.startswith("_")]


def _is_of_floats(value: object) -> bool:
    return isinstance(value, np.ndarray) and value.dtype.kind == "f"


def _derived_arrays(data: Any) -> list[tuple[str, np.ndarray]]:  # noqa: ANN401  # mujoco is an optional dependency
    return [(name, getattr(data, name)) for name in _names_of_arrays()]


@cache
def _names_of_arrays() -> list[str]:
    mujoco = importlib.import_module("mujoco")
    data = mujoco.MjData(mujoco.MjModel.from_xml_string("<mujoco/>"))
    names = [name for name in dir(data) if isinstance(getattr(data, name), np.ndarray)]
    return [name for name in names if not name.startswith(("_", "efc_", "iefc_"))]


def _has_fixed_place(data: Any, name: str, array: np.ndarray) -> bool:  # noqa: ANN401  # mujoco is optional
    """Whether an array is there at every step, in the buffer that begins with the joints' positions.

    Each step lays the arrays of constraints and islands elsewhere anew, for the contacts that it finds. Where it finds
    none, some of them are memory that nobody has written. No environment of Gymnasium reads them.
    """
    if name == "energy":
        return True
    offset = _address(array) - _address(data.qpos)
    return 0 <= offset < int(data.nbuffer)


def _address(array: np.ndarray) -> int:
    address: int = array.__array_interface__["data"][0]
    return address
