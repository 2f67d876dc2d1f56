"""Acting in a rollout as SB3 does: the policy is called at each step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch as th
from sb3_contrib.common.recurrent.type_aliases import RNNStates
from stable_baselines3.common.buffers import RolloutBuffer
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.type_aliases import PyTorchObs

from sb3_ppo_plus.trees import tree_map

# Numbers in the observations of one forward pass after a rollout: 16 MiB of float32
EVALUATION_CHUNK = 2**22


class RolloutActor:
    """Chooses the actions of a rollout and predicts the values that it needs, bit for bit as SB3 does.

    :param policy: the policy
    """

    states: RNNStates | None = None
    """Of the policy's memory, after the last step; None: it has none."""

    def __init__(self, policy: ActorCriticPolicy) -> None:
        self.policy = policy

    @th.no_grad()
    def act(
        self, observations: PyTorchObs, episode_starts: np.ndarray | None, context: dict[str, th.Tensor]
    ) -> tuple[th.Tensor, th.Tensor | None, th.Tensor | None]:
        """Choose the actions of one step.

        :param observations: shape (n_envs, *observation shape), or a dict of such
        :param episode_starts: which of them begin an episode, shape (n_envs,)
        :param context: further keyword arguments of the policy, such as action_masks
        :return: stored actions, shape (n_envs, *action shape); values (n_envs, 1) and log-probabilities (n_envs,), or
            None for both where :meth:`finish` computes them
        """
        actions, values, log_probs = self.policy(observations, **context)
        return actions, values, log_probs

    def terminal_value(
        self,
        observation: Any,  # noqa: ANN401  # array or dict
        index: int,
        step: int,
    ) -> th.Tensor | float | None:
        """Predict the value of the observation with which an env's episode was truncated.

        :param observation: as ``infos[index]["terminal_observation"]`` holds it
        :param index: of the env
        :param step: of the rollout
        :return: None where :meth:`finish` bootstraps from it
        """
        # One at a time: in a batch the value may differ from SB3's in the last bit. And as a tensor: SB3's sum with the
        # reward is in float32, also where a VecEnv's rewards are in float64
        return th.from_numpy(predict_values(self.policy, [observation]))[0]

    @th.no_grad()
    def last_values(self, observations: PyTorchObs, episode_starts: np.ndarray) -> th.Tensor:
        """Predict the values of the observations after the last step.

        :param observations: shape (n_envs, *observation shape), or a dict of such
        :param episode_starts: which of them begin an episode, shape (n_envs,)
        :return: shape (n_envs, 1)
        """
        return self.policy.predict_values(observations)

    def finish(self, rollout_buffer: RolloutBuffer, gamma: float) -> None:
        """Fill in what was left out of the steps: nothing.

        :param rollout_buffer: the full buffer
        :param gamma: discount factor of the values that timeouts are bootstrapped from
        """


@th.no_grad()
def predict_values(
    policy: ActorCriticPolicy, observations: list[Any], predict: Callable[[PyTorchObs], th.Tensor] | None = None
) -> np.ndarray:
    """Value predictions of single observations, in few large batches.

    :param observations: as ``infos[i]["terminal_observation"]`` holds them
    :param predict: instead of the policy's ``predict_values``
    :return: shape (len(observations),)
    """
    predict = predict or policy.predict_values
    tensors = [policy.obs_to_tensor(observation)[0] for observation in observations]
    together: PyTorchObs = tree_map(lambda *parts: th.cat(parts), tensors[0], *tensors[1:])
    chunks = _chunks(together, len(tensors))
    values = [predict(tree_map(lambda part, i=i: part[i], together)).flatten() for i in chunks]
    predictions: np.ndarray = th.cat(values).cpu().numpy()
    return predictions


def _chunks(observations: PyTorchObs, n_observations: int) -> tuple[th.Tensor, ...]:
    indices = th.arange(n_observations, device=leaves_of(observations)[0].device)
    return th.split(indices, rows_of_chunk(observations))


def rows_of_chunk(observations: PyTorchObs) -> int:
    """Observations of one forward pass after a rollout, of which the memory is bounded."""
    numbers_each = sum(leaf[0].numel() for leaf in leaves_of(observations))
    return max(1, EVALUATION_CHUNK // numbers_each)


def leaves_of(observations: PyTorchObs) -> list[th.Tensor]:
    """Return the tensors of observations."""
    return list(observations.values()) if isinstance(observations, dict) else [observations]
