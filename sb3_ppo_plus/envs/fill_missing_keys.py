"""Environments at deployment, which lack observations that only the critic sees."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from gymnasium.vector.utils import create_empty_array
from stable_baselines3.common.vec_env import VecEnv

from sb3_ppo_plus.envs.questions import indices_of_wrapped


class FillMissingKeys(gym.ObservationWrapper[Any, Any, Any]):
    """Adds keys to Dict observations that an environment lacks, all zeros; keys that are not wanted are left out.

    The observations then have the space that a model was trained with. So ``PPOPlus.load(path, env)``, ``set_env`` and
    the statistics of a VecNormalize take the environment. It is for acting and evaluating with a model whose
    ``actor_keys`` the environment has. ``learn`` refuses it, because the critic would see zeros.

    :param env: the environment
    :param observation_space: the Dict space of the model, ``model.observation_space``
    :raises ValueError: if one of the spaces is no Dict, or if they differ in a key that both have
    """

    def __init__(self, env: gym.Env[Any, Any], observation_space: spaces.Space[Any]) -> None:
        super().__init__(env)
        given = env.observation_space
        if not isinstance(observation_space, spaces.Dict) or not isinstance(given, spaces.Dict):
            raise ValueError(f"FillMissingKeys needs two Dict spaces, got {given} and {observation_space}")
        for key, space in given.spaces.items():
            wanted = observation_space.spaces.get(key, space)
            if space != wanted:
                raise ValueError(f"FillMissingKeys: the key {key!r} must have the space {wanted}, got {space}")
        self.observation_space = observation_space
        self._zeros = {
            key: np.asarray(create_empty_array(space, n=1, fn=np.zeros))[0]
            for key, space in observation_space.spaces.items()
            if key not in given.spaces
        }

    def observation(self, observation: dict[str, Any]) -> dict[str, Any]:
        """Return an observation with all keys.

        :param observation: the environment's
        """
        assert isinstance(self.observation_space, spaces.Dict)
        return {key: self._zeros[key] if key in self._zeros else observation[key] for key in self.observation_space}


def refuse_missing_keys(env: VecEnv | None) -> None:
    """Refuse to train where the critic's observations are missing.

    :param env: the training environment
    :raises ValueError: if an environment has a :class:`FillMissingKeys`
    """
    if env is not None and indices_of_wrapped(env, FillMissingKeys):
        raise ValueError(
            "learn needs environments with all keys of the observations, got FillMissingKeys: it is for acting and "
            "evaluating, and the critic would see zeros"
        )
