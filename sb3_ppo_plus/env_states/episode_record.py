"""The record of an episode: its actions with their types, and what its steps returned, in little memory."""

from __future__ import annotations

import copy
import struct
import zlib
from array import array
from collections.abc import Iterator
from typing import Any

import numpy as np
from gymnasium import spaces

Segment = dict[str, Any]
"""Successive actions of one kind, under "kind" and "values": an array, or a list of other plain values."""
OutputsState = dict[str, np.ndarray]
"""An array for each name in :data:`OUTPUT_TYPES`, with a number for the reset and one for each step."""

# Types of Python whose values fit into an array
PYTHON_DTYPES: dict[str, tuple[type[Any], Any]] = {
    "bool": (bool, np.bool_),
    "int": (int, np.int64),
    "float": (float, np.float64),
}
# Actions for which memory is reserved at first
N_FIRST = 64
# Kinds of dtypes: flags, integers, floats, complex numbers
NUMERIC = "biufc"
OUTPUT_TYPES: dict[str, type[np.generic]] = {"observations": np.uint32, "rewards": np.float64, "ends": np.uint8}


class RecordedActions:
    """Keeps copies of actions: arrays, numbers, and any other plain values."""

    def __init__(self) -> None:
        self._kinds: list[str] = []
        self._values: list[Any] = []
        # The last segment
        self._n = 0
        self._n_before = 0
        self._type: type[Any] | None = None
        self._dtype: Any = None
        self._shape: tuple[int, ...] = ()

    def __len__(self) -> int:
        return self._n_before + self._n

    def append(self, action: Any) -> None:  # noqa: ANN401  # an action of any space
        """Add a copy of an action.

        :param action: the action
        """
        kind = type(action)
        is_array = kind is np.ndarray
        if kind is not self._type or (is_array and (action.dtype != self._dtype or action.shape != self._shape)):
            self._begin(action)
        if self._kinds[-1] == "other":
            self._values[-1].append(copy.deepcopy(action))
        else:
            if self._n == len(self._values[-1]):
                self._values[-1] = np.concatenate([self._values[-1], np.empty_like(self._values[-1])])
            try:
                self._values[-1][self._n] = action
            except OverflowError:
                # An integer too large for an array
                self._begin(action)
                self._values[-1].append(action)
        self._n += 1

    def segments(self) -> list[Segment]:
        """Return copies of all actions."""
        values = [*self._values[:-1], *(part[: self._n] for part in self._values[-1:])]
        return [
            {"kind": kind, "values": part.copy() if kind != "other" else copy.deepcopy(part)}
            for kind, part in zip(self._kinds, values, strict=True)
        ]

    def _begin(self, action: Any) -> None:  # noqa: ANN401  # an action of any space
        """Begin a segment for actions like this one."""
        kind, dtype, shape = "other", None, ()
        if isinstance(action, np.ndarray) and type(action) is np.ndarray and not action.dtype.hasobject:
            kind, dtype, shape = "array", action.dtype, action.shape
        elif isinstance(action, np.generic) and action.dtype.kind in "biuf":
            kind, dtype = "scalar", action.dtype
        else:
            for name, (python_type, of_array) in PYTHON_DTYPES.items():
                # Larger integers fit into no array
                if type(action) is python_type and abs(action) < 2**63:
                    kind, dtype = name, of_array
        if self._values and self._kinds[-1] != "other":
            self._values[-1] = self._values[-1][: self._n]
        self._n_before += self._n
        self._n = 0
        self._kinds.append(kind)
        self._values.append([] if kind == "other" else np.empty((N_FIRST, *shape), dtype))
        self._type, self._dtype, self._shape = type(action), dtype, shape


def actions_in(segments: list[Segment]) -> Iterator[Any]:
    """Yield the actions, each a copy.

    :param segments: what :meth:`RecordedActions.segments` has returned
    """
    for segment in segments:
        kind, values = segment["kind"], segment["values"]
        for value in values:
            if kind == "array":
                yield np.array(value)
            elif kind in PYTHON_DTYPES:
                yield value.item()
            else:
                yield value if kind == "scalar" else copy.deepcopy(value)


def is_action_of(space: spaces.Space[Any], action: Any) -> bool:  # noqa: ANN401  # from a file without trust
    """Whether an action from a file without trust is as those of a space: integers inside it, finite numbers elsewhere.

    :param space: the action space
    :param action: the action
    """
    if isinstance(space, spaces.Dict):
        is_dict = isinstance(action, dict) and action.keys() == space.spaces.keys()
        return is_dict and all(is_action_of(part, action[key]) for key, part in space.spaces.items())
    if isinstance(space, spaces.Tuple):
        is_like = isinstance(action, tuple | list) and len(action) == len(space.spaces)
        return is_like and all(map(is_action_of, space.spaces, action))
    if not isinstance(action, bool | int | float | np.ndarray | np.generic):
        return False
    array = np.asarray(action)
    if array.dtype.kind not in "biuf" or not np.isfinite(array).all():
        return False
    if isinstance(space, spaces.Box):
        # A wrapper may go past the bounds by a rounding, and environments clip
        return array.shape == space.shape
    return array.dtype.kind in "biu" and space.contains(array.astype(np.int64) if array.ndim == 0 else array)


class RecordedOutputs:
    """Keeps a checksum of each observation, each reward, and whether the step ended the episode: 13 bytes for each."""

    def __init__(self) -> None:
        self._observations = array("I")
        self._rewards = array("d")
        self._ends = array("B")

    def __len__(self) -> int:
        return len(self._ends)

    def append(self, observation: Any, reward: Any = 0.0, terminated: Any = False, truncated: Any = False) -> None:  # noqa: ANN401  # whatever an environment returns
        """Add what a reset or a step has returned.

        :param observation: the observation
        :param reward: the reward
        :param terminated: whether the episode ended
        :param truncated: whether it was cut off
        """
        self._observations.append(checksum(observation))
        self._rewards.append(float(reward))
        self._ends.append(bool(terminated) + 2 * bool(truncated))

    def state(self) -> OutputsState:
        """Return copies of all."""
        values = (self._observations, self._rewards, self._ends)
        return {name: np.array(value, OUTPUT_TYPES[name]) for name, value in zip(OUTPUT_TYPES, values, strict=True)}

    def difference(self, saved: OutputsState) -> str | None:
        """Say what the last step has returned that was another one in a saved episode.

        :param saved: what :meth:`state` has returned
        :return: a text; None: it is the same
        """
        last = len(self) - 1
        if int(saved["observations"][last]) != self._observations[last]:
            return "the observation is another one"
        reward, saved_reward = self._rewards[last], float(saved["rewards"][last])
        if struct.pack("d", reward) != struct.pack("d", saved_reward):
            return f"the reward is {reward!r}, it was {saved_reward!r}"
        ends, saved_ends = self._ends[last], int(saved["ends"][last])
        return None if ends == saved_ends else f"the episode {_text(ends)}, it {_text(saved_ends)}"


def checksum(observation: Any, before: int = 0) -> int:  # noqa: ANN401  # of any space
    """Return 32 bits that tell an observation from others.

    :param observation: arrays, numbers and texts, or dicts and sequences of such
    :param before: the checksum of what comes before it
    """
    if isinstance(observation, np.ndarray) and observation.dtype.kind in NUMERIC:
        data: Any = observation if observation.flags.c_contiguous else observation.tobytes()
        return zlib.crc32(data, before)
    if isinstance(observation, dict | list | tuple) or (isinstance(observation, np.ndarray) and observation.ndim > 0):
        for part in observation.values() if isinstance(observation, dict) else observation:
            before = checksum(part, before)
        return before
    # What a text tells of any other object may hold its address
    is_plain = isinstance(observation, bool | int | float | str | bytes | np.generic | None)
    return zlib.crc32(repr(observation if is_plain else type(observation)).encode(), before)


def _text(ends: int) -> str:
    return ("went on", "was terminated", "was truncated", "was terminated and truncated")[ends % 4]
