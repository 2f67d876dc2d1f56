"""A wrapper for environments that put an action mask into their infos."""

from __future__ import annotations

from typing import Any, SupportsFloat

import gymnasium as gym
import numpy as np


class MaskFromInfo(gym.Wrapper[Any, Any, Any, Any]):
    """Offers the ``action_mask`` that an environment puts into its infos, as Gymnasium's Taxi does.

    :param env: the environment
    """

    def __init__(self, env: gym.Env[Any, Any]) -> None:
        super().__init__(env)
        self._mask: np.ndarray | None = None

    def reset(self, **kwargs: Any) -> tuple[Any, dict[str, Any]]:
        """Begin an episode."""
        observation, info = self.env.reset(**kwargs)
        self._mask = info["action_mask"]
        return observation, info

    def step(self, action: Any) -> tuple[Any, SupportsFloat, bool, bool, dict[str, Any]]:  # noqa: ANN401  # any space's
        """Take a step."""
        observation, reward, terminated, truncated, info = self.env.step(action)
        self._mask = info["action_mask"]
        return observation, reward, terminated, truncated, info

    def action_masks(self) -> np.ndarray:
        """Return the mask of the last info."""
        return np.asarray(self._mask)
