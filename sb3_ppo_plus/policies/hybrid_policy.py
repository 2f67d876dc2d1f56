"""The policy's side of hybrid actions: rows inside, the environment's own structure outside."""

from __future__ import annotations

from typing import Any

import numpy as np
from gymnasium import spaces
from stable_baselines3.common.type_aliases import Schedule

from sb3_ppo_plus.policies.flat_actions import FlatActionSpace, flat_action_space, space_of_env
from sb3_ppo_plus.policies.hybrid_distribution import HybridDistribution
from sb3_ppo_plus.policies.remembering import RememberingPolicy
from sb3_ppo_plus.policies.used_parts import UsedParts


class HybridPolicy(RememberingPolicy):
    """A policy that can act in Tuple and Dict action spaces, nested ones too.

    :param observation_space: observation space
    :param action_space: action space. For a Tuple or Dict, the policy's own ``action_space`` is a
        :class:`FlatActionSpace`
    :param lr_schedule: learning rate as a function of progress_remaining
    :param used_parts: parametrised actions. The keys are paths of Discrete parts, such as "0" or "kind". The value is a
        list that has, for each choice, a list of the paths of the parts that this choice uses. A part that is named in
        some list is used only if such a choice is made; all others are always used. The loss sees only what was used
    :param kwargs: the other parameters
    :raises ValueError: for a part that the policy cannot choose, or gSDE; for paths that do not exist
    """

    def __init__(
        self,
        observation_space: spaces.Space[Any],
        action_space: spaces.Space[Any],
        lr_schedule: Schedule,
        *,
        used_parts: UsedParts | None = None,
        **kwargs: Any,
    ) -> None:
        action_space = flat_action_space(action_space)
        if isinstance(action_space, FlatActionSpace) and kwargs.get("use_sde", False):
            raise ValueError(f"use_sde=True needs a Box action space, got {action_space.structure}")
        self.used_parts = used_parts
        super().__init__(observation_space, action_space, lr_schedule, **kwargs)

    def _get_constructor_parameters(self) -> dict[str, Any]:
        parameters = {**super()._get_constructor_parameters(), "action_space": space_of_env(self.action_space)}
        return parameters if self.used_parts is None else {**parameters, "used_parts": self.used_parts}

    def predict(
        self,
        observation: np.ndarray | dict[str, np.ndarray],
        state: tuple[np.ndarray, ...] | None = None,
        episode_start: np.ndarray | None = None,
        deterministic: bool = False,
    ) -> tuple[Any, tuple[np.ndarray, ...] | None]:
        """Choose actions in the env's units; matches SB3's ``BasePolicy.predict``.

        For a Tuple or Dict space, the action for one observation is a structure of the space, and the actions for
        several observations are a list of such structures.
        """
        actions, state = super().predict(observation, state, episode_start, deterministic)
        if not isinstance(self.action_dist, HybridDistribution):
            return actions, state
        structures = self.action_dist.to_env(np.atleast_2d(actions))
        return (structures[0] if actions.ndim == 1 else structures), state
