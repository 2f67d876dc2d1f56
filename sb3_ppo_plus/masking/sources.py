"""Where action masks come from, and what they must be.

An environment offers them by a method ``action_masks()``, as sb3-contrib's MaskablePPO asks for it, or under the key
``action_mask`` of Dict observations, as PettingZoo and RLlib do. True, or 1, marks a valid action.
"""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np
import torch as th
from gymnasium import spaces
from sb3_contrib.common.maskable.utils import EXPECTED_METHOD_NAME
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv, VecEnvWrapper

from sb3_ppo_plus.policies.masked_distributions import mask_sizes
from sb3_ppo_plus.policies.masks import MASK_KEY, check_masks, has_mask_key


class ActionMaskSource:
    """Asks for the masks of each step of a rollout.

    :param env: the training environment
    :param action_space: its action space
    :param policy: which will be given the masks, unless it takes them out of the observations by itself
    """

    def __init__(self, env: VecEnv, action_space: spaces.Space[Any], policy: BasePolicy) -> None:
        self._env = env
        self._envs = envs_of(env)
        self._sizes = mask_sizes(action_space)
        self._shape = (env.num_envs, sum(self._sizes))
        self._starts = np.cumsum([0, *self._sizes[:-1]])
        self._device = None if policy.device.type == "cpu" else policy.device
        self._in_observations = has_mask_key(env.observation_space)
        self._policy_finds_them = self._in_observations and bool(getattr(policy, "has_mask_key", False))

    def ask(self, observations: Any, step: int) -> np.ndarray:  # noqa: ANN401  # array or dict
        """Ask for the masks of a step.

        :param observations: before the step
        :param step: steps done in this rollout, for the message of an error
        :return: bool, shape (n_envs, mask size)
        :raises ValueError: for masks of a wrong shape, or where an environment has no valid action
        """
        if self._in_observations:
            # A copy: they are kept for longer than a VecEnv may keep its observations
            masks = np.array(observations[MASK_KEY])
        else:
            masks = _stacked(self._ask_envs(), self._shape[1], step)
        # At each step, so that few operations must do for what is as it should be
        if masks.dtype == np.bool_ and masks.shape == self._shape:
            has_choice = np.logical_or.reduceat(masks, self._starts, axis=1)
            if b"\0" not in has_choice.tobytes():
                return masks
        return check_masks(masks, self._sizes, step)

    def _ask_envs(self) -> list[Any]:
        if self._envs is None:
            return self._env.env_method(EXPECTED_METHOD_NAME)
        return [env.get_wrapper_attr(EXPECTED_METHOD_NAME)() for env in self._envs]

    def context(self, masks: np.ndarray) -> dict[str, th.Tensor]:
        """Make keyword arguments for the policy.

        :param masks: as :meth:`ask` returned them
        :return: none where the policy finds the masks among the observations
        """
        if self._policy_finds_them:
            return {}
        tensor = th.from_numpy(masks)
        return {"action_masks": tensor if self._device is None else tensor.to(self._device)}


def envs_of(env: VecEnv) -> list[gym.Env[Any, Any]] | None:
    """Find the environments to which ``env_method`` does no more than call their method; None: it may do more."""
    while isinstance(env, VecEnvWrapper) and type(env).env_method is VecEnvWrapper.env_method:
        env = env.venv
    if isinstance(env, DummyVecEnv) and type(env).env_method is DummyVecEnv.env_method:
        return env.envs
    return None


def _stacked(given: list[Any], size: int, step: int) -> np.ndarray:
    try:
        masks = np.array(given)
    except ValueError:
        # They have several shapes
        masks = np.empty(0)
    if masks.size == len(given) * size:
        return masks
    for index, mask in enumerate(given):
        if np.size(mask) != size:
            raise ValueError(
                f"action_masks() of env {index} must return the shape ({size},), got {np.shape(mask)} at step {step} "
                "of the rollout"
            )
    return np.array([np.reshape(mask, size) for mask in given])
