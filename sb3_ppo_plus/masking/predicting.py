"""``predict`` of a model that may have been trained with masks."""

from __future__ import annotations

from typing import Any

import numpy as np
from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm
from stable_baselines3.common.type_aliases import GymEnv

from sb3_ppo_plus.masking.evaluation import MaskedPredictor
from sb3_ppo_plus.policies.actor_critic import predict_with_masks


class PredictsWithMasks(OnPolicyAlgorithm):
    """Adds masks to SB3's ``predict``. In a subclass of both, it comes between PPO and the class that predicts."""

    _mask_use: Any
    _was_given_masks: bool

    def predict(
        self,
        observation: np.ndarray | dict[str, np.ndarray],
        state: tuple[np.ndarray, ...] | None = None,
        episode_start: np.ndarray | None = None,
        deterministic: bool = False,
        action_masks: np.ndarray | None = None,
    ) -> tuple[np.ndarray, tuple[np.ndarray, ...] | None]:
        """Choose actions; the other parameters are those of SB3's ``predict``.

        :param action_masks: True where an action is valid, shape (n_envs, mask size) or (mask size,); None: all are
        :raises ValueError: for masks of a wrong size or without a valid action
        :raises TypeError: for a policy class that takes no masks
        """
        if action_masks is not None:
            return predict_with_masks(self.policy, observation, state, episode_start, deterministic, action_masks)
        self._mask_use.warn_of_no_masks(self)
        return super().predict(observation, state, episode_start, deterministic)

    @property
    def needs_masks(self) -> bool:
        """Whether the model was trained with masks that the observations do not hold."""
        return self._was_given_masks and not getattr(self.policy, "has_mask_key", False)

    def masked(self, env: GymEnv) -> MaskedPredictor:
        """Return this model with a ``predict`` that asks ``env`` for masks, as for SB3's ``evaluate_policy``.

        :param env: the environment in which the model acts: a VecEnv, or a single environment
        :raises ValueError: if it has neither a method ``action_masks()`` nor masks in its observations
        """
        return MaskedPredictor(self, env)
