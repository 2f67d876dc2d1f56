"""What the steps of an episode returned, in 13 bytes for each: enough to find the first step that differs."""

from __future__ import annotations

import struct
import zlib
from array import array
from typing import Any

import numpy as np

OutputsState = dict[str, np.ndarray]

# Kinds of dtypes: flags, integers, floats, complex numbers
NUMERIC = "biufc"
# Under these names the outputs are saved
_TYPES: dict[str, type[np.generic]] = {"observations": np.uint32, "rewards": np.float64, "ends": np.uint8}


class RecordedOutputs:
    """Keeps a checksum of each observation, each reward, and whether the step ended the episode."""

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
        return {name: np.array(value, _TYPES[name]) for name, value in zip(_TYPES, values, strict=True)}

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
