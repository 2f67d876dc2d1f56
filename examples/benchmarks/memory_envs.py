"""Two small tasks for a memory, registered as TMaze-v0 and CueAndMask-v0."""

from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces


class TMaze(gym.Env):
    """A cue at the start says which way to turn at the end of a corridor; guessing succeeds in half of the episodes.

    Observations: the cue, -1 or 1 in the first step and 0 later, and whether this is the junction. The way through
    the corridor needs no choice. The return is 1 for the right turn and 0 for the wrong one.

    :param length: steps from cue to junction
    """

    def __init__(self, length: int = 20) -> None:
        self.length = length
        self.observation_space = spaces.Box(-1.0, 1.0, (2,), np.float32)
        self.action_space = spaces.Discrete(2)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        super().reset(seed=seed)
        self.goal = int(self.np_random.integers(2))
        self.position = 0
        return np.array([2 * self.goal - 1, 0], np.float32), {}

    def step(self, action: int) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        if self.position == self.length:
            return np.zeros(2, np.float32), float(action == self.goal), True, False, {}
        self.position += 1
        return np.array([0, self.position == self.length], np.float32), 0.0, False, False, {}


class CueAndMask(gym.Env):
    """A cue is shown once; later choices are right relative to it, among the actions that are valid at that step.

    Observations: the cue, one-hot in the first step and 0 later, and whether there is a choice to be made. A few steps
    of waiting follow the cue. Then, at each of 5 steps, only two of the four actions are valid, which only the mask
    tells, and the right one is the first of them counting up from the cue, and round. The return is the fraction of
    right choices; an invalid action ends the episode.
    """

    N_CUES, WAIT, N_CHOICES = 4, 4, 5

    def __init__(self) -> None:
        self.observation_space = spaces.Box(0.0, 1.0, (self.N_CUES + 1,), np.float32)
        # The last action is to wait
        self.action_space = spaces.Discrete(self.N_CUES + 1)

    def action_masks(self) -> np.ndarray:
        """Return what is valid now."""
        return self.mask

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        super().reset(seed=seed)
        self.cue = int(self.np_random.integers(self.N_CUES))
        self.n_steps = 0
        self._draw_mask()
        return np.eye(self.N_CUES + 1, dtype=np.float32)[self.cue], {}

    def _draw_mask(self) -> None:
        self.mask = np.zeros(self.N_CUES + 1, np.bool_)
        valid = self.np_random.choice(self.N_CUES, 2, replace=False) if self.n_steps >= self.WAIT else [self.N_CUES]
        self.mask[valid] = True

    def step(self, action: int) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        is_valid, is_choice = bool(self.mask[action]), self.n_steps >= self.WAIT
        right = next(a for i in range(self.N_CUES) if self.mask[a := (self.cue + i) % self.N_CUES]) if is_choice else -1
        self.n_steps += 1
        is_over = not is_valid or self.n_steps == self.WAIT + self.N_CHOICES
        self._draw_mask()
        observation = np.zeros(self.N_CUES + 1, np.float32)
        observation[-1] = self.n_steps >= self.WAIT
        return observation, float(action == right) / self.N_CHOICES, is_over, False, {}


gym.register("TMaze-v0", TMaze)
gym.register("CueAndMask-v0", CueAndMask)
