"""Finds out who else draws from the random generators that an environment draws from, between its steps."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np

from sb3_ppo_plus.env_states.differences import first_difference
from sb3_ppo_plus.env_states.generator_state import (
    GLOBAL_GENERATORS,
    generator_state,
    global_generator_states,
    restored_generator,
    set_global_generator_states,
)

# Steps in which all generators are looked at. Those that an environment shares are looked at for good
N_WATCHED = 64
OWN = "own"
"""Stands for the environment's ``np_random``. Others: "python", "numpy" and "torch", the global ones of the process."""


class OutsideDraws:
    """Remembers the states of shared generators before those steps before which somebody else has used them.

    Wrappers may draw from ``np_random`` of the environment. Everybody draws from global generators, such as SB3 after a
    rollout, so that one which the environment uses is looked at for good. What an environment begins to use, or a
    wrapper to share, after the first :data:`N_WATCHED` steps is not noticed.

    :param env: the environment
    """

    def __init__(self, env: gym.Env[Any, Any]) -> None:
        self._env = env
        self._n_steps = 0
        self._shared = set(GLOBAL_GENERATORS)
        self._used: set[str] = set()
        self._before: dict[str, Any] = {}
        self._after: dict[str, Any] = {}
        self._notes: list[tuple[int, str, Any]] = []
        self.is_watching = True
        """Whether :meth:`before` and :meth:`after` have to be called."""

    def begin(self) -> None:
        """Begin an episode, after its reset."""
        self._notes = []
        if self.is_watching:
            self._after = self._states()

    def before(self, index: int) -> None:
        """Look at the generators before a step.

        :param index: number of steps before it in the episode
        """
        self._before = self._states()
        for name, state in self._before.items():
            if first_difference(self._after.get(name), state, "") is not None:
                self._shared.add(name)
                self._notes.append((index, name, state))

    def after(self) -> None:
        """Look at the generators after a step."""
        self._after = self._states()
        for name, state in self._after.items():
            if first_difference(self._before.get(name), state, "") is not None:
                self._used.add(name)
        self._n_steps += 1
        if self._n_steps == N_WATCHED:
            self.is_watching = not self._used.isdisjoint(self._shared)

    def used_globals(self) -> list[str]:
        """Return the names of the global generators that steps of the environment have used."""
        return sorted(self._used & GLOBAL_GENERATORS.keys())

    def notes(self) -> list[tuple[int, str, Any]]:
        """Return the states that generators had before steps: number of steps, name and state of the generator."""
        return [note for note in self._notes if note[1] in self._used]

    def set_notes(self, notes: list[tuple[int, str, Any]]) -> None:
        """Go on in an episode that was replayed.

        :param notes: what :meth:`notes` has returned
        """
        self._notes = [(index, name, state) for index, name, state in notes]
        # The saved environment may have found out what this one has not
        found = {name for _, name, _ in notes}
        self._used |= found
        self._shared |= found
        self.is_watching = self.is_watching or bool(found)

    def forget_states(self) -> None:
        """Take no difference for a draw that is due to generators which were put back."""
        if self.is_watching:
            self._after = self._states()

    def _states(self) -> dict[str, Any]:
        # After the first steps, only those that matter
        names = {OWN, *GLOBAL_GENERATORS} if self._n_steps < N_WATCHED else self._used & self._shared
        states = {name: get() for name, get in GLOBAL_GENERATORS.items() if name in names}
        own = self._env.unwrapped._np_random
        if own is not None and OWN in names:
            states[OWN] = generator_state(own)
        return states


def set_generator(env: gym.Env[Any, Any], name: str, state: Any) -> None:  # noqa: ANN401  # a generator's state
    """Put back the state of a generator before a step.

    :param env: the environment
    :param name: :data:`OWN`, or the name of a global generator
    :param state: its state
    :raises ValueError: for a name that no generator has
    """
    if name == OWN:
        own: Any = restored_generator(env.unwrapped._np_random, state)
        assert isinstance(own, np.random.Generator)
        env.unwrapped._np_random = own
        return
    states = global_generator_states()
    if name not in states:
        raise ValueError(f"{name} is no generator of random numbers")
    set_global_generator_states({**states, name: state})
