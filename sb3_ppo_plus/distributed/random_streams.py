"""Streams of PyTorch's random numbers, one for each part of the environments.

Any policy draws its numbers from PyTorch's default generator. A part has a state of this generator of its own, so that
its numbers do not depend on how many parts the same process has.
"""

from __future__ import annotations

from types import TracebackType

import numpy as np
import torch as th


class RandomStream:
    """A context in which PyTorch's default generators draw from a stream of its own: the CPU's, and a CUDA device's.

    :param entropy: integers of at least 0, from which the stream's beginning follows
    :param device: the policy's device
    """

    def __init__(self, entropy: list[int], device: th.device) -> None:
        self._device = device if device.type == "cuda" else None
        (seed,) = np.random.SeedSequence(entropy).generate_state(1, np.uint64)
        self._states = [th.Generator(each).manual_seed(int(seed >> 1)).get_state() for each in self._devices()]
        self._outer: list[th.Tensor] = []

    def _devices(self) -> list[th.device]:
        return [th.device("cpu"), *([self._device] if self._device is not None else [])]

    @property
    def states(self) -> list[th.Tensor]:
        """States of the CPU's generator, and of the CUDA device's if there is one: uint8 tensors on the CPU."""
        return self._states

    @states.setter
    def states(self, states: list[th.Tensor]) -> None:
        self._states = [state.clone() for state in states]

    def __enter__(self) -> None:
        self._outer = self._exchange(self._states)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._states, self._outer = self._exchange(self._outer), []

    def _exchange(self, states: list[th.Tensor]) -> list[th.Tensor]:
        """Set the states of the default generators; return those that they had."""
        generator = th.default_generator
        before = [generator.get_state()]
        generator.set_state(states[0])
        if self._device is not None:
            before.append(th.cuda.get_rng_state(self._device))
            th.cuda.set_rng_state(states[1], self._device)
        return before
