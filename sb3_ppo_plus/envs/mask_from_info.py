"""A wrapper for environments that put an action mask into their infos."""

from __future__ import annotations

from typing import Any, SupportsFloat

import gymnasium as gym
import numpy as np


class MaskFromInfo(gym.Wrapper[Any, Any, Any, Any]):
    """Gives an environment ``action_masks()``, which returns the ``action_mask`` of its last info.

    Gymnasium's Taxi puts its masks into the infos.

    :param env: an environment whose infos all have the key ``action_mask``
    """

    def __init__(self, env: gym.Env[Any, Any]) -> None:
        super().__init__(env)
        self._mask: np.ndarray | None = None

    def reset(self, **kwargs: Any) -> tuple[Any, dict[str, Any]]:
        """Begin an episode, and keep its first mask.

        :param kwargs: arguments of the environment's ``reset``
        """
        observation, info = self.env.reset(**kwargs)
        self._mask = info["action_mask"]
        return observation, info

    def step(self, action: Any) -> tuple[Any, SupportsFloat, bool, bool, dict[str, Any]]:  # noqa: ANN401  # of any space
        """Take a step, and keep its mask.

        :param action: an action of the environment's action space
        """
        observation, reward, terminated, truncated, info = self.env.step(action)
        self._mask = info["action_mask"]
        return observation, reward, terminated, truncated, info

    def action_masks(self) -> np.ndarray:
        """Return the mask of the last info, True or 1 where an action is valid."""
        return np.asarray(self._mask)
