"""Where action masks come from, and what they must be.

An environment offers masks in one of two ways: by a method ``action_masks()``, as for sb3-contrib's MaskablePPO, or
under the key ``action_mask`` of Dict observations, as in PettingZoo and RLlib. True or 1 marks a valid action.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import gymnasium as gym
import numpy as np
import torch as th
from gymnasium import spaces
from sb3_contrib.common.maskable.utils import EXPECTED_METHOD_NAME
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv, VecEnvWrapper

from sb3_ppo_plus.policies.mask_layout import flat_mask, mask_names
from sb3_ppo_plus.policies.masked_distributions import mask_sizes
from sb3_ppo_plus.policies.masks import MASK_KEY, check_masks, has_mask_key


class ActionMaskSource:
    """Gets the action masks of each step of a rollout.

    :param env: the training environment
    :param action_space: its action space
    :param policy: the policy that uses the masks; it may find them among the observations by itself
    """

    def __init__(self, env: VecEnv, action_space: spaces.Space[Any], policy: BasePolicy) -> None:
        self._env = env
        self._envs = envs_of(env)
        self._sizes = mask_sizes(action_space)
        self._names = mask_names(action_space)
        self._action_space = action_space
        self._shape = (env.num_envs, sum(self._sizes))
        self._starts = np.cumsum([0, *self._sizes[:-1]])
        self._device = None if policy.device.type == "cpu" else policy.device
        self._in_observations = has_mask_key(env.observation_space)
        self._policy_finds_them = self._in_observations and bool(getattr(policy, "has_mask_key", False))

    def ask(self, observations: Any, step: int) -> np.ndarray:  # noqa: ANN401  # array or dict
        """Get the masks of a step.

        :param observations: those before the step
        :param step: index of the step in the rollout, for the message of an error
        :return: bool, shape (n_envs, mask size)
        :raises ValueError: for masks of a wrong shape, or where an environment has no valid action
        """
        if self._in_observations:
            # A copy: the VecEnv may write its next observations into this array
            masks = np.array(observations[MASK_KEY])
        else:
            masks = _stacked(self._ask_envs(), self._shape[1], step, self._names)
        return self._checked(masks, step)

    def _checked(self, masks: np.ndarray, step: int) -> np.ndarray:
        # This runs at each step, so valid masks pass by a few fast operations. Searching bytes is faster than all()
        if masks.dtype == np.bool_ and masks.shape == self._shape:
            has_choice = np.logical_or.reduceat(masks, self._starts, axis=1)
            if b"\0" not in has_choice.tobytes():
                return masks
        return check_masks(masks, self._sizes, step, self._names)

    def _ask_envs(self) -> list[Any]:
        if self._envs is None:
            masks = self._env.env_method(EXPECTED_METHOD_NAME)
        else:
            masks = [env.get_wrapper_attr(EXPECTED_METHOD_NAME)() for env in self._envs]
        return [flat_mask(self._action_space, mask) for mask in masks] if self._names else masks

    def context(self, masks: np.ndarray) -> dict[str, th.Tensor]:
        """Make the policy's keyword arguments.

        :param masks: as :meth:`ask` returned them
        :return: ``action_masks`` on the policy's device; empty if the policy finds the masks among the observations
        """
        if self._policy_finds_them:
            return {}
        tensor = th.from_numpy(masks)
        return {"action_masks": tensor if self._device is None else tensor.to(self._device)}


def envs_of(env: VecEnv) -> list[gym.Env[Any, Any]] | None:
    """Return the environments whose methods may be called directly, in place of ``env_method``, which is slower.

    :param env: the outermost vectorised environment
    :return: None if they run in other processes, or if a wrapper has its own ``env_method``
    """
    while isinstance(env, VecEnvWrapper) and type(env).env_method is VecEnvWrapper.env_method:
        env = env.venv
    if isinstance(env, DummyVecEnv) and type(env).env_method is DummyVecEnv.env_method:
        return env.envs
    return None


def _stacked(given: list[Any], size: int, step: int, names: Sequence[str]) -> np.ndarray:
    try:
        masks = np.array(given)
    except ValueError:
        # The masks do not all have one shape
        masks = np.empty(0)
    if masks.size == len(given) * size:
        return masks
    for index, mask in enumerate(given):
        if np.size(mask) != size:
            of_names = f" for {', '.join(names)}" if names else ""
            raise ValueError(
                f"action_masks() of env {index} must return the shape ({size},){of_names}, got {np.shape(mask)} at "
                f"step {step} of the rollout"
            )
    return np.array([np.reshape(mask, size) for mask in given])
