"""Environments that return Gymnasium's five values as tensors, such as those of Isaac Lab and ManiSkill."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import gymnasium as gym
import torch as th
from gymnasium.vector import AutoresetMode

from sb3_ppo_plus.envs.simulators.observation_groups import ObservationGroups
from sb3_ppo_plus.envs.simulators.simulator_vec_env import SimulatorVecEnv, flags, name_of, values_of
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
    :raises ValueError: if there is no such group, or if the environment does not begin new episodes in ``step``
    """

    def __init__(
        self,
        env: Any,  # noqa: ANN401  # of a simulator
        groups: Sequence[str] | None = None,
        action_bound: float = 100.0,
    ) -> None:
        _check_autoreset(env)
        chosen = ObservationGroups(name_of(type(self), env), attribute(env, "single_observation_space"), groups)
        action_space, device = attribute(env, "single_action_space"), attribute(env, "device")
        super().__init__(env, int(attribute(env, "num_envs")), chosen, action_space, device, action_bound)
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
        return self._stepped(groups, rewards, terminated, truncated, told, self._successes(told))

    def _successes(self, told: Mapping[str, Any]) -> dict[str, th.Tensor] | None:
        # ManiSkill's infos are those after the reset, where episodes have ended
        last = told.get("final_info")
        success = (last if isinstance(last, Mapping) else told).get("success")
        if isinstance(success, th.Tensor) and success.shape == (self.num_envs,):
            return {"is_success": success}
        return None


def is_gymnasium_of_tensors(env: Any) -> bool:  # noqa: ANN401  # anything
    """Whether an environment of Gymnasium steps in batches of tensors.

    :param env: anything
    """
    if not isinstance(env, gym.Env | gym.vector.VectorEnv):
        return False
    if type(env).__name__ == "NumpyToTorch":
        return True
    names = ("num_envs", "single_observation_space", "single_action_space", "device")
    if not all(attribute(env, name) is not None for name in names):
        return False
    # A wrapper such as ManiSkill's CPUGymWrapper makes a single environment of it
    return bool(env.action_space != attribute(env, "single_action_space"))


def attribute(env: Any, name: str) -> Any:  # noqa: ANN401  # whatever it is
    """Return an attribute of an environment, or of the one inside its wrappers; None if there is none.

    :param env: an environment of Gymnasium
    :param name: name of the attribute
    """
    found = getattr(env, name, None)
    return getattr(env.unwrapped, name, None) if found is None else found


def _check_autoreset(env: Any) -> None:  # noqa: ANN401  # of a simulator
    if type(env).__name__ == "NumpyToTorch":
        raise TypeError(f"{env} makes tensors of arrays, use the environment of arrays: as_vec_env(env.env)")
    is_vector = isinstance(env, gym.vector.VectorEnv)
    mode = (getattr(env, "metadata", None) or {}).get("autoreset_mode")
    if is_vector and (mode not in (None, AutoresetMode.SAME_STEP) or not getattr(env, "auto_reset", True)):
        raise ValueError(
            f"{env} must begin a new episode in the step that has ended one: AutoresetMode.SAME_STEP, and auto_reset "
            f"must not be False, got {mode}, auto_reset={getattr(env, 'auto_reset', True)}"
        )
    if not is_vector and any(kind.__module__.startswith("mani_skill.") for kind in type(env.unwrapped).__mro__):
        raise TypeError(f"{env} begins no new episodes by itself, wrap it in mani_skill's ManiSkillVectorEnv")
