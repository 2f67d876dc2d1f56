"""Stored actions as tensors of actions for the environment."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.policies import BasePolicy

from sb3_ppo_plus.envs.tensor_vec_env import is_free_to_wait
from sb3_ppo_plus.policies.actor_critic import ActorCriticPlusPolicy
from sb3_ppo_plus.policies.bounded_distributions import BoundedDistribution
from sb3_ppo_plus.policies.bounds import env_actions

_KNOWN_METHODS = (BasePolicy.unscale_action, ActorCriticPlusPolicy.unscale_action)


class TensorActions:
    """Converts stored actions to the actions that the environment takes, see :func:`env_actions`.

    :param space: the action space
    :param device: where the environment takes its actions
    """

    def __init__(self, space: spaces.Space[Any], device: th.device) -> None:
        self._space, self._device = space, device
        self._is_on_host = is_free_to_wait(device)
        if isinstance(space, spaces.Box):
            # What NumPy makes of float32 actions and these bounds
            dtype = np.result_type(np.float32, space.low.dtype)
            self._low, self._high = (th.from_numpy(bound.astype(dtype)).to(device) for bound in (space.low, space.high))

    def env_actions(self, policy: BasePolicy, actions: th.Tensor) -> th.Tensor:
        """Convert the actions of a step.

        :param policy: the policy that chose the actions
        :param actions: stored actions on the environment's device, shape (n_envs, *action shape)
        :return: for a Box, actions in the env's units and within its bounds; else ``actions`` itself
        """
        if not isinstance(self._space, spaces.Box):
            return actions
        if self._is_on_host or not _is_known(policy):
            return th.from_numpy(env_actions(policy, self._space, actions.cpu().numpy())).to(self._device)
        distribution: Any = getattr(policy, "action_dist", None)
        if isinstance(distribution, BoundedDistribution):
            # As BoundedDistribution.to_bounds
            fraction = distribution.to_unit_interval_on_device(actions)
            actions = (self._low * (1.0 - fraction) + self._high * fraction).to(self._low.dtype)
        elif policy.squash_output:
            actions = self._low + (0.5 * (actions + 1.0) * (self._high - self._low))
        return th.minimum(th.maximum(actions, self._low), self._high)


def _is_known(policy: BasePolicy) -> bool:
    """Whether the policy has no method of a user's own that changes actions, which takes arrays."""
    return type(policy).unscale_action in _KNOWN_METHODS and "unscale_action" not in vars(policy)
