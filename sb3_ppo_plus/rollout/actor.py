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

# How many numbers the observations of one forward pass after a rollout may have: 16 MiB of float32
EVALUATION_CHUNK = 2**22


class RolloutActor:
    """Chooses the actions of a rollout and predicts its values, bit for bit as SB3 does.

    :param policy: the policy
    """

    states: RNNStates | None = None
    """States of the policy's memory after the last step; None: the policy has no memory."""

    batches_timeouts = False
    """Whether values of timeouts are predicted in a batch on the CPU too, where SB3 predicts one at a time."""

    def __init__(self, policy: ActorCriticPolicy) -> None:
        self.policy = policy

    @property
    def defers_timeouts(self) -> bool:
        """Whether :meth:`values_of` gives, after the rollout, the values that observations of this step have now."""
        return False

    def begin_rollout(self, rollout_buffer: RolloutBuffer | None = None) -> None:
        """Notice what has changed since the last rollout.

        :param rollout_buffer: the buffer that stores the rollout; None: it is not known
        """

    @th.no_grad()
    def act(
        self, observations: PyTorchObs, episode_starts: np.ndarray | None, context: dict[str, th.Tensor]
    ) -> tuple[th.Tensor, th.Tensor | None, th.Tensor | None]:
        """Choose the actions of one step.

        :param observations: shape (n_envs, *observation shape), or a dict of them
        :param episode_starts: True where an observation begins an episode, shape (n_envs,)
        :param context: other keyword arguments of the policy, such as action_masks
        :return: stored actions, shape (n_envs, *action shape); values (n_envs, 1) and log-probabilities (n_envs,), or
            None for both if :meth:`evaluate_later` computes them
        """
        actions, values, log_probs = self.policy(observations, **context)
        return actions, values, log_probs

    def terminal_value(
        self,
        observation: Any,  # noqa: ANN401  # array or dict
        index: int,
    ) -> th.Tensor | float | None:
        """Predict the value of the last observation of an env's truncated episode.

        :param observation: ``infos[index]["terminal_observation"]``
        :param index: index of the env
        :return: the value; None: :meth:`terminal_values` predicts it at the end of the rollout
        """
        # SB3 predicts one observation at a time. In a batch the last bit of the value may differ. The result is a
        # tensor, because SB3 adds it to the reward in float32, even if a VecEnv's rewards are float64
        return th.from_numpy(predict_values(self.policy, [observation]))[0]

    @th.no_grad()
    def last_values(self, observations: PyTorchObs, episode_starts: np.ndarray) -> th.Tensor:
        """Predict the values of the observations after the last step.

        :param observations: shape (n_envs, *observation shape), or a dict of them
        :param episode_starts: True where an observation begins an episode, shape (n_envs,)
        :return: shape (n_envs, 1)
        """
        return self.policy.predict_values(observations)

    def evaluate_later(self, rollout_buffer: RolloutBuffer) -> tuple[th.Tensor, th.Tensor] | None:
        """Compute the values and log-probabilities that :meth:`act` left out.

        :param rollout_buffer: the full buffer, which is not changed
        :return: values and log-probabilities of the first steps of the rollout, each of shape (steps * n_envs,) in the
            order of ``PPOPlusRolloutBuffer.rollout``; None: :meth:`act` has computed all of them
        """
        return None

    def terminal_values(self, observations: list[Any], indices: list[int]) -> np.ndarray:
        """Predict the values for which :meth:`terminal_value` returned None, in one batch.

        :param observations: the ``infos[i]["terminal_observation"]`` of these episodes
        :param indices: indices of their envs
        :return: shape (len(observations),)
        """
        return predict_values(self.policy, observations)

    def values_of(self, observations: PyTorchObs) -> th.Tensor:
        """Predict the values of many observations, in few large batches.

        :param observations: shape (batch, *observation shape), or a dict of them
        :return: shape (batch,)
        """
        return values_in_chunks(observations, self.policy.predict_values)

    def end_rollout(self) -> None:
        """Release what belongs to the rollout."""

    def successor(self, policy: ActorCriticPolicy) -> RolloutActor:
        """Return the actor for the rest of a rollout after a callback has replaced the policy.

        It computes all values at each step.

        :param policy: the other policy
        """
        return RolloutActor(policy)


@th.no_grad()
def predict_values(
    policy: ActorCriticPolicy, observations: list[Any], predict: Callable[[PyTorchObs], th.Tensor] | None = None
) -> np.ndarray:
    """Predict the values of single observations, in few large batches.

    :param policy: the policy
    :param observations: single observations, such as ``infos[i]["terminal_observation"]``
    :param predict: called instead of the policy's ``predict_values``; None: the policy's
    :return: shape (len(observations),)
    """
    predict = predict or policy.predict_values
    tensors = [policy.obs_to_tensor(observation)[0] for observation in observations]
    together: PyTorchObs = tree_map(lambda *parts: th.cat(parts), tensors[0], *tensors[1:])
    predictions: np.ndarray = values_in_chunks(together, predict).cpu().numpy()
    return predictions


@th.no_grad()
def values_in_chunks(observations: PyTorchObs, predict: Callable[[PyTorchObs], th.Tensor]) -> th.Tensor:
    """Predict the values of many observations, in few large batches.

    :param observations: shape (batch, *observation shape), or a dict of them
    :param predict: predicts the values of a batch
    :return: shape (batch,)
    """
    first = leaves_of(observations)[0]
    chunks = th.split(th.arange(len(first), device=first.device), rows_of_chunk(observations))
    return th.cat([predict(tree_map(lambda part, i=i: part[i], observations)).flatten() for i in chunks])


def rows_of_chunk(observations: PyTorchObs) -> int:
    """Return how many observations one forward pass after a rollout takes, so that its memory is limited.

    :param observations: shape (batch, *observation shape), or a dict of them
    """
    numbers_each = sum(leaf[0].numel() for leaf in leaves_of(observations))
    return max(1, EVALUATION_CHUNK // numbers_each)


def leaves_of(observations: PyTorchObs) -> list[th.Tensor]:
    """Return the tensors of observations.

    :param observations: a tensor, or a dict of tensors
    """
    return list(observations.values()) if isinstance(observations, dict) else [observations]
