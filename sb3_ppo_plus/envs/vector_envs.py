"""One way from the environments of other libraries to SB3's ``VecEnv``."""

from __future__ import annotations

import warnings
from typing import Any

import torch as th
from gymnasium.vector import VectorEnv
from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm
from stable_baselines3.common.type_aliases import GymEnv
from stable_baselines3.common.vec_env import VecEnv

from sb3_ppo_plus.envs.batched_vec_env import BatchedVecEnv
from sb3_ppo_plus.envs.tensor_vec_env import TensorVecEnv


def as_vec_env(env: Any) -> VecEnv:  # noqa: ANN401  # of any library
    """Return an environment that steps in batches as a VecEnv of SB3.

    SB3's wrappers, callbacks and ``evaluate_policy`` take it. ``PPOPlus(policy, env)`` does this itself.

    :param env: an environment of ``gymnasium.vector``, among them those of EnvPool's ``make_gymnasium``; or a VecEnv,
        such as a :class:`TensorVecEnv`, which is returned as it is
    :raises TypeError: for anything else
    """
    if isinstance(env, VecEnv):
        return env
    if isinstance(env, VectorEnv):
        return BatchedVecEnv(env)
    raise TypeError(f"env must be a gymnasium.vector.VectorEnv or a VecEnv, got {env!r}")


def device_for(env: Any, device: th.device | str) -> th.device | str:  # noqa: ANN401  # an environment, or its id
    """Return the device of a model: "auto" is that of an environment on tensors.

    :param env: the environment
    :param device: PPOPlus's argument
    """
    return env.device if isinstance(env, TensorVecEnv) and str(device) == "auto" else device


class AcceptsVectorEnvs(OnPolicyAlgorithm):
    """Lets environments that step in batches in where SB3 wants a VecEnv or a single environment.

    In a subclass of both, it comes between PPO and the class that wraps environments.
    """

    @staticmethod
    def _wrap_env(env: GymEnv, verbose: int = 0, monitor_wrapper: bool = True) -> VecEnv:
        # The constructor, ``load`` and ``set_env`` all come through here
        taken: Any = as_vec_env(env) if isinstance(env, VectorEnv) else env
        wrapped = OnPolicyAlgorithm._wrap_env(taken, verbose, monitor_wrapper)
        if isinstance(taken, TensorVecEnv) and not isinstance(wrapped, TensorVecEnv):
            warnings.warn(
                f"{taken} is used through arrays, which is slower, since SB3 transposes images whose channels come "
                f"last: let it return channels first, got {taken.observation_space}",
                stacklevel=2,
            )
        return wrapped
