"""The values of truncated episodes, and the values that are computed after the rollout."""

from __future__ import annotations

from typing import Any

import numpy as np
from stable_baselines3.common.buffers import RolloutBuffer

from sb3_ppo_plus.buffers import PPOPlusRolloutBuffer
from sb3_ppo_plus.envs.output_check import EnvOutputCheck
from sb3_ppo_plus.rollout.actor import RolloutActor


class RolloutValues:
    """Bootstraps timeouts, and writes what the actor computes after the rollout into the buffer.

    When a time limit truncates an episode, the discounted value of its terminal observation is added to its last
    reward, as in SB3. Nothing is added when an episode terminates.

    :param actor: predicts the values
    :param gamma: discount factor
    :param check_output: refuses terminal observations that are not finite
    """

    def __init__(self, actor: RolloutActor, gamma: float, check_output: EnvOutputCheck) -> None:
        self._actor = actor
        self._gamma = gamma
        self._check_output = check_output
        self._steps: list[int] = []
        self._indices: list[int] = []
        self._observations: list[Any] = []

    def bootstrap_timeouts(
        self, rewards: np.ndarray, dones: np.ndarray, infos: list[dict[str, Any]], step: int
    ) -> None:
        """Add to rewards the values of the episodes that a step has truncated.

        :param rewards: rewards of the step, shape (n_envs,); changed in place
        :param dones: which episodes ended with the step, shape (n_envs,)
        :param infos: the infos that the envs returned for the step
        :param step: index of the step in the rollout
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
                self._observations.append(observation)
            else:
                rewards[index] += self._gamma * value

    def finish(self, rollout_buffer: RolloutBuffer) -> None:
        """Write the values and log-probabilities of steps, and add the values of timeouts to the rewards.

        :param rollout_buffer: the full buffer
        """
        evaluation = self._actor.evaluate_later(rollout_buffer)
        if evaluation is not None:
            assert isinstance(rollout_buffer, PPOPlusRolloutBuffer)
            rollout_buffer.set_evaluation(*evaluation)
        if self._observations:
            values = self._actor.terminal_values(self._observations)
            rollout_buffer.rewards[self._steps, self._indices] += self._gamma * values
        self._actor.end_rollout()
