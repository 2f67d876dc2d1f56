"""Environments that return Gymnasium's five values as tensors, such as those of Isaac Lab and ManiSkill."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import gymnasium as gym
import torch as th
from gymnasium.vector import AutoresetMode

from sb3_ppo_plus.envs.simulators.observation_groups import ObservationGroups, flatten
from sb3_ppo_plus.envs.simulators.simulator_vec_env import SimulatorVecEnv, attribute, flags, name_of, values_of
from sb3_ppo_plus.envs.tensor_vec_env import Observations, TensorStep


class GymnasiumTensorVecEnv(SimulatorVecEnv):
    """An environment with ``num_envs``, ``single_observation_space``, ``single_action_space`` and ``device``.

    ``reset(seed=...)`` returns two values, ``step`` five, whose tensors have a row for each environment; it begins a
    new episode where one has ended. Observation groups, such as "policy" and "critic", are a Dict, a sole one is the
    observation. Last observations of episodes are those of ``final_obs`` or ``final_observation`` in the infos; without
    them, the value that is added for a truncated episode is that of the observation before the step, as in rsl_rl.
    ``success`` in the infos is logged as ``rollout/success_rate``.

    :param env: Isaac Lab's environment, with or without Gymnasium's wrappers, or a ``ManiSkillVectorEnv``
    :param groups: names of the observation groups that the policy sees; None: all
    :param action_bound: bound of actions that have none. SB3 needs finite bounds; 100 is what Isaac Lab gives SB3
    :param random_first_lengths: whether episodes begin as if some of their steps were over; the environment needs
        ``episode_length_buf`` and ``max_episode_length``, as Isaac Lab's has
    :raises ValueError: if there is no such group, or if the environment does not begin new episodes in ``step``
    """

    def __init__(
        self,
        env: Any,  # noqa: ANN401  # of a simulator
        groups: Sequence[str] | None = None,
        action_bound: float = 100.0,
        random_first_lengths: bool = False,
    ) -> None:
        _check_autoreset(env)
        chosen = ObservationGroups(name_of(type(self), env), attribute(env, "single_observation_space"), groups)
        action_space, device = attribute(env, "single_action_space"), attribute(env, "device")
        num_envs = int(attribute(env, "num_envs"))
        super().__init__(env, num_envs, chosen, action_space, device, action_bound, random_first_lengths)
        self._seed: int | None = None

    def seed_tensor(self, seed: int) -> None:
        """Keep the seed for the reset that follows.

        :param seed: the seed
        """
        super().seed_tensor(seed)
        self._seed = seed

    def reset_tensor(self) -> Observations:
        """Begin an episode in each environment."""
        answer = self.env.reset() if self._seed is None else self.env.reset(seed=self._seed)
        self._seed = None
        if not isinstance(answer, tuple) or len(answer) != 2:
            raise ValueError(f"{self}: reset must return (observations, infos), got {type(answer).__name__}")
        self._spread_lengths()
        return self._begun(answer[0])

    def step_tensor(self, actions: th.Tensor) -> TensorStep:
        """Step each environment.

        :param actions: shape (n_envs, *action shape)
        """
        # The environment may write into them
        answer = self.env.step(actions.clone())
        expected = "(observations, rewards, terminated, truncated, infos)"
        groups, rewards, terminated, truncated, told = values_of(self, answer, 5, expected)
        terminated, truncated = flags(self, "terminated", terminated), flags(self, "truncated", truncated)
        final = told.get("final_obs", told.get("final_observation"))
        # ManiSkill's infos are those after the reset, where episodes have ended
        last = told.get("final_info")
        success = (last if isinstance(last, Mapping) else told).get("success")
        extras = None
        if isinstance(success, th.Tensor) and success.shape == (self.num_envs,):
            extras = {"is_success": success}
        log = told.get("log", _metrics_of_ended(last, terminated, truncated))
        return self._stepped(groups, rewards, terminated, truncated, final, log, extras)


def is_gymnasium_of_tensors(env: Any) -> bool:  # noqa: ANN401  # anything
    """Whether an environment of Gymnasium steps in batches of tensors.

    :param env: anything
    """
    if isinstance(env, gym.vector.VectorEnv):
        # It may simulate on a device and return arrays
        return _is_array_wrapper(env) or (hasattr(env, "device") and _returns_tensors(env))
    if not isinstance(env, gym.Env):
        return False
    if _is_bare_mani_skill(env):
        return True
    names = ("num_envs", "single_observation_space", "single_action_space", "device")
    has_batches = all(hasattr(env, name) or hasattr(env.unwrapped, name) for name in names)
    # A wrapper such as ManiSkill's CPUGymWrapper makes a single environment of it
    return has_batches and bool(env.action_space != attribute(env, "single_action_space"))


def _returns_tensors(env: Any) -> bool:  # noqa: ANN401  # of gymnasium.vector
    observations, _ = env.reset()
    return any(isinstance(part, th.Tensor) for part in flatten(observations).values())


def _metrics_of_ended(last: object, terminated: th.Tensor, truncated: th.Tensor) -> dict[str, th.Tensor]:
    """Return the means, over the episodes that have ended, of what ManiSkill records of them.

    :param last: the last infos of episodes, or None
    :param terminated: bool, shape (n_envs,)
    :param truncated: bool, shape (n_envs,)
    """
    metrics = last.get("episode") if isinstance(last, Mapping) else None
    if not isinstance(metrics, Mapping):
        return {}
    ends = terminated | truncated
    return {name: th.where(ends, value.float(), 0.0).sum() / ends.sum() for name, value in metrics.items()}


def _is_array_wrapper(env: Any) -> bool:  # noqa: ANN401  # of gymnasium.vector
    return type(env).__name__ == "NumpyToTorch"


def _is_of_mani_skill(env: Any) -> bool:  # noqa: ANN401  # of Gymnasium
    return any(kind.__module__.startswith("mani_skill.") for kind in type(env.unwrapped).__mro__)


def _is_bare_mani_skill(env: Any) -> bool:  # noqa: ANN401  # of Gymnasium
    if isinstance(env, gym.vector.VectorEnv) or not _is_of_mani_skill(env):
        return False
    while isinstance(env, gym.Wrapper):
        if type(env).__name__ == "CPUGymWrapper":
            return False
        env = env.env
    return True


def _check_autoreset(env: Any) -> None:  # noqa: ANN401  # of a simulator
    is_vector = isinstance(env, gym.vector.VectorEnv)
    if is_vector and _is_array_wrapper(env):
        raise TypeError(f"{env} makes tensors of arrays, use the environment of arrays: as_vec_env(env.env)")
    if _is_bare_mani_skill(env):
        raise TypeError(f"{env} begins no new episodes by itself, wrap it in mani_skill's ManiSkillVectorEnv")
    # Isaac Lab has it in its cfg
    cfg = getattr(env.unwrapped, "cfg", None)
    mode = (getattr(env, "metadata", None) or {}).get("autoreset_mode", getattr(cfg, "autoreset_mode", None))
    if mode not in (None, AutoresetMode.SAME_STEP, AutoresetMode.SAME_STEP.value) or not getattr(
        env, "auto_reset", True
    ):
        raise ValueError(
            f"{env} must begin a new episode in the step that has ended one: AutoresetMode.SAME_STEP, and auto_reset "
            f"must not be False, got {mode}, auto_reset={getattr(env, 'auto_reset', True)}"
        )
    if is_vector and mode is None and not _is_of_mani_skill(env):
        warnings.warn(f'{env} has no metadata["autoreset_mode"], it is taken for SAME_STEP', stacklevel=4)
