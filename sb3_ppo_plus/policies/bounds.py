"""Action spaces that PPOPlus takes, and actions within the bounds of their space."""

from __future__ import annotations

from typing import Any

import numpy as np
from gymnasium import spaces
from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm
from stable_baselines3.common.policies import BasePolicy

from sb3_ppo_plus.policies.flat_actions import HYBRID_SPACES


class AcceptsHybridActions(OnPolicyAlgorithm):
    """Lets Tuple and Dict action spaces pass the check of SB3's constructor.

    In a subclass of both, it comes between PPO, which names the spaces of SB3, and the class that checks them.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        if kwargs.get("supported_action_spaces") is not None:
            kwargs["supported_action_spaces"] = (*kwargs["supported_action_spaces"], *HYBRID_SPACES)
        super().__init__(*args, **kwargs)


def clip_to_bounds(actions: np.ndarray, space: spaces.Box) -> np.ndarray:
    """Clip actions to the bounds of their space.

    :param actions: in the env's units, shape (n_envs, *action shape)
    :param space: the action space
    :return: the clipped actions
    """
    # np.clip does this with more overhead
    bounded: np.ndarray = np.minimum(np.maximum(actions, space.low), space.high)
    return bounded


def env_actions(policy: BasePolicy, action_space: spaces.Space[Any], actions: np.ndarray) -> Any:  # noqa: ANN401  # an array, or a list of structures
    """Convert stored actions to the actions that the environment takes.

    :param policy: the policy that chose the actions
    :param action_space: the action space
    :param actions: stored actions, shape (n_envs, *action shape)
    :return: for a Box, actions in the env's units and within its bounds; for a Tuple or Dict, the structure of each
        environment; for any other space, ``actions`` itself
    """
    if not isinstance(action_space, spaces.Box):
        # SB3 declares action_dist for some policies only; those of Tuple and Dict spaces have a HybridDistribution
        return policy.action_dist.to_env(actions) if isinstance(action_space, HYBRID_SPACES) else actions  # type: ignore[union-attr, operator]
    if policy.squash_output:
        # A user's own policy may round beyond a bound, so clipping comes after this
        actions = policy.unscale_action(actions)
    return clip_to_bounds(actions, action_space)
