"""Environments of rsl_rl."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch as th
from gymnasium import spaces

from sb3_ppo_plus.envs.simulators.observation_groups import ObservationGroups, flatten, space_of
from sb3_ppo_plus.envs.simulators.simulator_vec_env import SimulatorVecEnv, flags, name_of, values_of
from sb3_ppo_plus.envs.tensor_vec_env import Observations, TensorStep


class RslRlVecEnv(SimulatorVecEnv):
    """An environment that follows rsl_rl's ``VecEnv``, with its ``TensorDict`` of observation groups.

    A sole group is the observation, several are a Dict. Episodes in ``extras["time_outs"]`` were truncated: as in
    rsl_rl, the value that is added for them is that of the observation before the step, unless
    ``extras["final_obs"]`` shows the last ones. In the older form of legged_gym, whose ``step`` returns five values,
    the groups are "policy" and, if there are privileged observations, "critic".

    :param env: the environment
    :param groups: names of the observation groups that the policy sees; None: all
    :param action_bound: rsl_rl's actions have no bounds, but SB3's must; they are clipped to -bound and bound
    :param random_first_lengths: whether episodes begin as if some of their steps were over, as rsl_rl's runner can;
        the environment needs ``episode_length_buf`` and ``max_episode_length``
    :raises ValueError: if there is no such group, or for a bound that is not a positive number
    """

    def __init__(
        self,
        env: Any,  # noqa: ANN401  # rsl_rl is not imported
        groups: Sequence[str] | None = None,
        action_bound: float = 100.0,
        random_first_lengths: bool = False,
    ) -> None:
        shown = _observed(env)
        chosen = ObservationGroups(name_of(type(self), env), shown, groups, space_of)
        # MuJoCo Playground's wrapper may lack a device
        device = getattr(env, "device", None) or next(iter(flatten(shown).values())).device
        action_space = spaces.Box(-np.inf, np.inf, (int(env.num_actions),))
        super().__init__(env, int(env.num_envs), chosen, action_space, device, action_bound, random_first_lengths)

    def seed_tensor(self, seed: int) -> None:
        """Seed the environment, if it has a method ``seed``; the abstract ``VecEnv`` has none.

        :param seed: the seed
        """
        super().seed_tensor(seed)
        if callable(getattr(self.env, "seed", None)):
            self.env.seed(seed)

    def reset_tensor(self) -> Observations:
        """Begin episodes, or, if the environment has no method ``reset``, go on with those that are under way."""
        if callable(getattr(self.env, "reset", None)):
            self.env.reset()
        self._spread_lengths()
        return self._begun(_observed(self.env))

    def step_tensor(self, actions: th.Tensor) -> TensorStep:
        """Step each environment.

        :param actions: shape (n_envs, n_actions)
        """
        # The environment may write into them
        answer = self.env.step(actions.clone())
        if isinstance(answer, tuple) and len(answer) == 5:
            observations, privileged, *others = answer
            answer = (_in_groups(observations, privileged), *others)
        groups, rewards, dones, told = values_of(self, answer, 4, "(observations, rewards, dones, extras)")
        dones, final, log = flags(self, "dones", dones), told.get("final_obs"), told.get("log", told.get("episode"))
        if told.get("time_outs") is None:
            return self._stepped(groups, rewards, dones, None, final, log)
        # Some environments renew time_outs only in steps that end an episode
        timeouts = flags(self, "time_outs", told["time_outs"]) & dones
        return self._stepped(groups, rewards, dones & ~timeouts, timeouts, final, log)


def is_rsl_rl(env: Any) -> bool:  # noqa: ANN401  # anything
    """Whether an environment has the methods of rsl_rl's ``VecEnv``.

    :param env: anything
    """
    return all(hasattr(env, name) for name in ("num_envs", "num_actions", "get_observations", "step"))


def _observed(env: Any) -> Any:  # noqa: ANN401  # tensors in groups
    observations = env.get_observations()
    if isinstance(observations, tuple):
        # Environments made for versions before 3 return extras, too
        observations = observations[0]
    privileged = getattr(env, "get_privileged_observations", None)
    return _in_groups(observations, privileged() if callable(privileged) else None)


def _in_groups(observations: Any, privileged: Any) -> Any:  # noqa: ANN401  # tensors in groups
    if privileged is None or not isinstance(observations, th.Tensor):
        return observations
    return {"policy": observations, "critic": privileged}
