"""One way from the environments of other libraries to SB3's ``VecEnv``."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import gymnasium as gym
import torch as th
from gymnasium.vector import VectorEnv
from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm
from stable_baselines3.common.type_aliases import GymEnv
from stable_baselines3.common.vec_env import VecEnv

from sb3_ppo_plus.envs.batched_vec_env import BatchedVecEnv
from sb3_ppo_plus.envs.simulators.brax_vec_env import BraxVecEnv, is_brax
from sb3_ppo_plus.envs.simulators.gymnasium_tensors import GymnasiumTensorVecEnv, is_gymnasium_of_tensors
from sb3_ppo_plus.envs.simulators.rsl_rl_vec_env import RslRlVecEnv, is_rsl_rl
from sb3_ppo_plus.envs.tensor_vec_env import TensorVecEnv


def as_vec_env(env: Any) -> VecEnv:  # noqa: ANN401  # of any library
    """Return an environment that steps in batches as a VecEnv of SB3.

    SB3's wrappers, callbacks and ``evaluate_policy`` take it. ``PPOPlus(policy, env)`` does this itself.

    :param env: an environment of ``gymnasium.vector``, among them those of EnvPool's ``make_gymnasium``; one of Isaac
        Lab, ManiSkill or another with Gymnasium's five values as tensors; one of rsl_rl, Brax or MuJoCo Playground; or
        a VecEnv, such as a :class:`TensorVecEnv`, which is returned as it is
    :raises TypeError: for anything else
    :raises ValueError: for an environment that the adapter cannot use
    """
    if isinstance(env, VecEnv):
        return env
    adapter = _adapter_of(env)
    if adapter is None:
        raise TypeError(
            "env must step in batches: of gymnasium.vector, Isaac Lab, ManiSkill, rsl_rl, Brax, or a VecEnv, "
            f"got {env!r}"
        )
    return adapter(env)


def in_batches(env: Any) -> Any:  # noqa: ANN401  # anything that SB3 takes
    """Return :func:`as_vec_env` of an environment that steps in batches, and anything else as it is.

    :param env: an environment, or its id
    """
    adapter = None if isinstance(env, VecEnv) else _adapter_of(env)
    return env if adapter is None else adapter(env)


def _adapter_of(env: Any) -> Callable[[Any], VecEnv] | None:  # noqa: ANN401  # of any library
    if is_gymnasium_of_tensors(env):
        return GymnasiumTensorVecEnv
    if isinstance(env, VectorEnv):
        return BatchedVecEnv
    if isinstance(env, gym.Env):
        return None
    if is_rsl_rl(env):
        return RslRlVecEnv
    return BraxVecEnv if is_brax(env) else None


def device_for(env: Any, device: th.device | str) -> th.device | str:  # noqa: ANN401  # an environment, or its id
    """Return the device of a model: "auto" is that of an environment on tensors.

    :param env: the environment
    :param device: PPOPlus's argument
    """
    return env.device if isinstance(env, TensorVecEnv) and str(device) == "auto" else device


def hint_at_cpu(env: VecEnv | None, device: th.device) -> None:
    """Warn if a small network is on another device than the environments, as SB3's PPO does.

    :param env: the environments
    :param device: where the policy, an MLP, is
    """
    if device.type != "cpu" and not isinstance(env, TensorVecEnv):
        warnings.warn(
            f"device={device}: for an MLP, sending observations to it and waiting for actions at each step may take "
            "longer than computing them. device='cpu', with compile=True, may be faster",
            stacklevel=4,
        )


class AcceptsVectorEnvs(OnPolicyAlgorithm):
    """Lets environments that step in batches in where SB3 wants a VecEnv or a single environment.

    In a subclass of both, it comes between PPO and the class that wraps environments.
    """

    @staticmethod
    def _wrap_env(env: GymEnv, verbose: int = 0, monitor_wrapper: bool = True) -> VecEnv:
        # The constructor, ``load`` and ``set_env`` all come through here
        taken: Any = in_batches(env)
        wrapped = OnPolicyAlgorithm._wrap_env(taken, verbose, monitor_wrapper)
        if isinstance(taken, TensorVecEnv) and not isinstance(wrapped, TensorVecEnv):
            warnings.warn(
                f"{taken} is used through arrays, which is slower, since SB3 transposes images whose channels come "
                f"last: let it return channels first, got {taken.observation_space}",
                stacklevel=2,
            )
        return wrapped
