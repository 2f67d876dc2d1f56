"""Actions within the bounds of their space."""

from __future__ import annotations

from typing import Any

import numpy as np
from gymnasium import spaces
from stable_baselines3.common.policies import BasePolicy


def clip_to_bounds(actions: np.ndarray, space: spaces.Box) -> np.ndarray:
    """Clip actions to the bounds of their space.

    :param actions: in the env's units, shape (n_envs, *action shape)
    :param space: the action space
    :return: the clipped actions
    """
    # np.clip does this with more overhead
    bounded: np.ndarray = np.minimum(np.maximum(actions, space.low), space.high)
    return bounded


def env_actions(policy: BasePolicy, action_space: spaces.Space[Any], actions: np.ndarray) -> np.ndarray:
    """Convert stored actions to the actions that the environment takes.

    :param policy: the policy that chose the actions
    :param action_space: the action space
    :param actions: stored actions, shape (n_envs, *action shape)
    :return: for a Box, actions in the env's units and within its bounds; for any other space, ``actions`` itself
    """
    if not isinstance(action_space, spaces.Box):
        return actions
    if policy.squash_output:
        # A user's own policy may round beyond a bound, so clipping comes after this
        actions = policy.unscale_action(actions)
    return clip_to_bounds(actions, action_space)
