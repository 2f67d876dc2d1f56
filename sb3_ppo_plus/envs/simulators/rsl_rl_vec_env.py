"""Environments of rsl_rl."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch as th
from gymnasium import spaces

from sb3_ppo_plus.envs.simulators.observation_groups import ObservationGroups, flatten, space_of
from sb3_ppo_plus.envs.simulators.simulator_vec_env import SimulatorVecEnv, flags, name_of, values_of
from sb3_ppo_plus.envs.tensor_vec_env import Observations, TensorStep


class RslRlVecEnv(SimulatorVecEnv):
    """An environment that follows rsl_rl's ``VecEnv``, with its ``TensorDict`` of observation groups.

    A sole group is the observation, several are a Dict. Episodes in ``extras["time_outs"]`` were truncated: as in
    rsl_rl, the value that is added for them is that of the observation before the step, unless
    ``extras["final_obs"]`` shows the last ones.

    :param env: the environment
    :param groups: names of the observation groups that the policy sees; None: all
    :param action_bound: rsl_rl's actions have no bounds, but SB3's must; they are clipped to -bound and bound
    :raises ValueError: if there is no such group
    """

    def __init__(
        self,
        env: Any,  # noqa: ANN401  # rsl_rl is not imported
        groups: Sequence[str] | None = None,
        action_bound: float = 100.0,
    ) -> None:
        shown = flatten(_first_of(env.get_observations()))
        chosen = ObservationGroups(
            name_of(type(self), env), {name: space_of(part) for name, part in shown.items()}, groups
        )
        action_space = spaces.Box(-action_bound, action_bound, (int(env.num_actions),))
        super().__init__(env, int(env.num_envs), chosen, action_space, env.device, action_bound)

    def seed_tensor(self, seed: int) -> None:
        """Seed the environment, if it has a method ``seed``; the abstract ``VecEnv`` has none.

        :param seed: the seed
        """
        super().seed_tensor(seed)
        if callable(getattr(self.env, "seed", None)):
            self.env.seed(seed)

    def reset_tensor(self) -> Observations:
        """Begin episodes, or, if the environment has no method ``reset``, go on with those that are under way."""
        has_reset = callable(getattr(self.env, "reset", None))
        return self._begun(_first_of(self.env.reset() if has_reset else self.env.get_observations()))

    def step_tensor(self, actions: th.Tensor) -> TensorStep:
        """Step each environment.

        :param actions: shape (n_envs, n_actions)
        """
        # The environment may write into them
        answer = self.env.step(actions.clone())
        groups, rewards, dones, told = values_of(self, answer, 4, "(observations, rewards, dones, extras)")
        dones = flags(self, "dones", dones)
        if told.get("time_outs") is None:
            return self._stepped(groups, rewards, dones, None, told)
        # Some environments renew time_outs only in steps that end an episode
        timeouts = flags(self, "time_outs", told["time_outs"]) & dones
        return self._stepped(groups, rewards, dones & ~timeouts, timeouts, told)


def is_rsl_rl(env: Any) -> bool:  # noqa: ANN401  # anything
    """Whether an environment has the methods of rsl_rl's ``VecEnv``.

    :param env: anything
    """
    return all(hasattr(env, name) for name in ("num_envs", "num_actions", "device", "get_observations", "step"))


def _first_of(answer: Any) -> Any:  # noqa: ANN401  # observations, or a tuple of these and more
    # Environments made for versions before 3 return extras, too
    return answer[0] if isinstance(answer, tuple) else answer
