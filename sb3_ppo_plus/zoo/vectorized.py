"""The key ``vectorized: true`` of a hyperparameter entry: environments that step in batches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import gymnasium as gym
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from stable_baselines3.common.vec_env import VecEnv

from sb3_ppo_plus.envs import as_vec_env

KEY = "vectorized"


def take_key(hyperparams: dict[str, Any], env_id: str) -> bool:
    """Take the key out of an entry.

    :param hyperparams: the entry
    :param env_id: id of its environment
    :return: its value; False where it is not there
    :raises ValueError: if it is no bool, or if the environment's own vector code cannot have the entry's wrapper
    """
    value = hyperparams.pop(KEY, False)
    if not isinstance(value, bool):
        raise ValueError(f"{KEY} must be true or false, got {value!r}")
    wrapper = hyperparams.get("env_wrapper")
    if value and wrapper is not None and _has_own_code(env_id):
        raise ValueError(
            f"{KEY}: true uses the vector code of {env_id}, around whose single environments there can be no "
            f"env_wrapper, got {wrapper!r}; vec_env_wrapper is possible"
        )
    return value


def vector_class(env_id: str, env_kwargs: dict[str, Any]) -> Callable[..., VecEnv]:
    """Return what SB3's ``make_vec_env`` takes as ``vec_env_cls``.

    :param env_id: id of the environment. If it is registered with vector code of its own (``vector_entry_point``), this
        is used; then there are no monitor files, and a run that is killed begins new episodes when it goes on
    :param env_kwargs: arguments of the environment
    """

    def make(env_fns: Sequence[Callable[[], gym.Env[Any, Any]]], **kwargs: Any) -> VecEnv:
        if _has_own_code(env_id):
            arguments = {**env_kwargs, **kwargs}
            return as_vec_env(gym.make_vec(env_id, len(env_fns), "vector_entry_point", **arguments))
        return as_vec_env(SyncVectorEnv(env_fns, autoreset_mode=AutoresetMode.SAME_STEP, **kwargs))

    return make


def _has_own_code(env_id: str) -> bool:
    return gym.spec(env_id).vector_entry_point is not None
