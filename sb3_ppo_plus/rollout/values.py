"""The values of truncated episodes, and the values that are computed after the rollout."""

from __future__ import annotations

from typing import Any

import numpy as np
from stable_baselines3.common.buffers import RolloutBuffer
from stable_baselines3.common.policies import ActorCriticPolicy

from sb3_ppo_plus.buffers import PPOPlusRolloutBuffer
from sb3_ppo_plus.envs.output_check import EnvOutputCheck
from sb3_ppo_plus.rollout.actor import RolloutActor


class RolloutValues:
    """Bootstraps timeouts, and writes what the actor computes after the rollout into the buffer.

    When a time limit truncates an episode, the discounted value of its terminal observation is added to its last
    reward, as in SB3. Nothing is added when an episode terminates.

    :param actor: chooses the actions of the rollout's first step, and predicts the values
    :param check_output: refuses terminal observations that are not finite
    """

    def __init__(self, actor: RolloutActor, check_output: EnvOutputCheck) -> None:
        self._first_actor = self._actor = actor
        self._check_output = check_output
        self._steps: list[int] = []
        self._indices: list[int] = []
        self._gammas: list[float] = []
        self._observations: list[Any] = []

    def actor_of(self, policy: ActorCriticPolicy) -> RolloutActor:
        """Return the actor of the next steps. It is a new one if a callback has assigned another policy.

        :param policy: the model's policy now
        """
        if policy is not self._actor.policy:
            self._actor = self._actor.successor(policy)
        return self._actor

    def bootstrap_timeouts(
        self, rewards: np.ndarray, dones: np.ndarray, infos: list[dict[str, Any]], step: int, gamma: float
    ) -> None:
        """Add to rewards the values of the episodes that a step has truncated.

        :param rewards: rewards of the step, shape (n_envs,); changed in place
        :param dones: which episodes ended with the step, shape (n_envs,)
        :param infos: the infos that the envs returned for the step
        :param step: index of the step in the rollout
        :param gamma: discount factor, which a callback may change during the rollout
        :raises NonFiniteError: for a terminal observation that is not finite
        """
        for index in dones.nonzero()[0].tolist():
            observation = infos[index].get("terminal_observation")
            if observation is None or not infos[index].get("TimeLimit.truncated", False):
                continue
            self._check_output.terminal(observation, index, step)
            value = self._actor.terminal_value(observation, index)
            if value is None:
                self._steps.append(step)
                self._indices.append(index)
                self._gammas.append(gamma)
                self._observations.append(observation)
            else:
                rewards[index] += gamma * value

    def finish(self, rollout_buffer: RolloutBuffer) -> None:
        """Write the values and log-probabilities of steps, and add the values of timeouts to the rewards.

        :param rollout_buffer: the full buffer
        """
        # Only the first actor leaves something for later
        evaluation = self._first_actor.evaluate_later(rollout_buffer)
        if evaluation is not None:
            assert isinstance(rollout_buffer, PPOPlusRolloutBuffer)
            rollout_buffer.set_evaluation(*evaluation)
        self._add_to_rewards(rollout_buffer)
        self._first_actor.end_rollout()

    def _add_to_rewards(self, rollout_buffer: RolloutBuffer) -> None:
        """Add the values of the timeouts that have waited for the end of the rollout."""
        if self._observations:
            rollout_buffer.rewards[self._steps, self._indices] += self._values_of_observations()

    def _values_of_observations(self) -> np.ndarray:
        """Return the discounted values of the terminal observations that have waited, shape (number of them,)."""
        values = self._first_actor.terminal_values(self._observations, self._indices)
        discounted: np.ndarray = np.array(self._gammas, values.dtype) * values
        return discounted
