"""Minibatches of a rollout, and the rollout buffers that yield them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.buffers import DictRolloutBuffer, RolloutBuffer
from stable_baselines3.common.type_aliases import PyTorchObs


@dataclass(frozen=True, slots=True)
class RolloutBatch:
    """The transitions of one minibatch, as tensors on the policy's device.

    :param observations: shape (batch, *observation shape), or a dict of such tensors
    :param actions: the stored actions: int64 of shape (batch,) for Discrete, else float32 of shape (batch, action dim)
    :param old_values: value predictions at the time of the rollout, shape (batch,)
    :param old_log_prob: log probability of the actions at the time of the rollout, shape (batch,)
    :param advantages: GAE(lambda) estimates, shape (batch,)
    :param returns: TD(lambda) targets of the value function, shape (batch,)
    :param valid: marks the real elements of a padded minibatch, shape (batch,); None: all of them
    :param context: further keyword arguments of ``policy.evaluate_actions``
    """

    observations: PyTorchObs
    actions: th.Tensor
    old_values: th.Tensor
    old_log_prob: th.Tensor
    advantages: th.Tensor
    returns: th.Tensor
    valid: th.Tensor | None = None
    context: dict[str, Any] = field(default_factory=dict)

    def select(self, indices: th.Tensor) -> RolloutBatch:
        """Return the transitions at ``indices``, a tensor of int64."""
        observations = self.observations
        return RolloutBatch(
            observations={key: obs[indices] for key, obs in observations.items()}
            if isinstance(observations, dict)
            else observations[indices],
            actions=self.actions[indices],
            old_values=self.old_values[indices],
            old_log_prob=self.old_log_prob[indices],
            advantages=self.advantages[indices],
            returns=self.returns[indices],
        )


class Minibatch(NamedTuple):
    """A minibatch that is gathered where it is needed, which may be inside a compiled function.

    :param rollout: where the transitions are
    :param indices: which of them belong to the minibatch, int64, shape (batch,); None: all
    """

    rollout: RolloutBatch
    indices: th.Tensor | None = None

    def batch(self) -> RolloutBatch:
        """Gather the transitions."""
        return self.rollout if self.indices is None else self.rollout.select(self.indices)


class PPOPlusRolloutBuffer(RolloutBuffer):
    """SB3's ``RolloutBuffer``, converted to tensors once per rollout, where SB3 converts every minibatch it yields."""

    _rollout: RolloutBatch | None = None

    def reset(self) -> None:
        """Empty the buffer."""
        self._rollout = None
        super().reset()

    def rollout(self) -> RolloutBatch:
        """All transitions of the full buffer as one batch, env by env as SB3's ``swap_and_flatten`` orders them."""
        if self._rollout is None:
            assert self.full, "The rollout buffer is not full"
            self._flatten()
            # SB3 casts to float32 too: a MultiBinary action's int8 has no log-probability
            actions = self.actions.astype(np.float32, copy=False)
            self._rollout = RolloutBatch(
                observations=self._observation_tensors(),
                actions=_as_policy_takes(self.to_torch(actions, copy=False), self.action_space),
                old_values=self.to_torch(self.values.reshape(-1), copy=False),
                old_log_prob=self.to_torch(self.log_probs.reshape(-1), copy=False),
                advantages=self.to_torch(self.advantages.reshape(-1), copy=False),
                returns=self.to_torch(self.returns.reshape(-1), copy=False),
            )
        return self._rollout

    def minibatches(self, batch_size: int) -> Iterator[Minibatch]:
        """Yield every transition once, in the random order of SB3's ``RolloutBuffer.get``; the last batch may be short.

        :param batch_size: transitions per minibatch
        """
        rollout = self.rollout()
        indices = th.from_numpy(np.random.permutation(self.buffer_size * self.n_envs)).to(self.device)
        for batch_indices in th.split(indices, batch_size):
            yield Minibatch(rollout, batch_indices)

    def _flatten(self) -> None:
        # In place and marked as done, as in SB3's RolloutBuffer.get: images are not held twice, and get still works
        if not self.generator_ready:
            self._flatten_observations()
            for name in ("actions", "values", "log_probs", "advantages", "returns"):
                setattr(self, name, self.swap_and_flatten(getattr(self, name)))
            self.generator_ready = True

    def _flatten_observations(self) -> None:
        self.observations = self.swap_and_flatten(self.observations)

    def _observation_tensors(self) -> PyTorchObs:
        return self.to_torch(self.observations, copy=False)


class PPOPlusDictRolloutBuffer(PPOPlusRolloutBuffer, DictRolloutBuffer):
    """The same for Dict observations, on SB3's ``DictRolloutBuffer``."""

    def _flatten_observations(self) -> None:
        self.observations = {key: self.swap_and_flatten(obs) for key, obs in self.observations.items()}

    def _observation_tensors(self) -> PyTorchObs:
        return {key: self.to_torch(obs, copy=False) for key, obs in self.observations.items()}


def minibatches(buffer: RolloutBuffer, batch_size: int) -> Iterator[Minibatch]:
    """Yield the transitions of ``buffer`` once, in random order.

    :param buffer: one of ours, or any ``rollout_buffer_class`` of the user's, whose own ``get`` is then asked
    :param batch_size: transitions per minibatch
    """
    if isinstance(buffer, PPOPlusRolloutBuffer):
        yield from buffer.minibatches(batch_size)
        return
    for samples in buffer.get(batch_size):
        batch = RolloutBatch(
            observations=samples.observations,
            actions=_as_policy_takes(samples.actions, buffer.action_space),
            old_values=samples.old_values,
            old_log_prob=samples.old_log_prob,
            advantages=samples.advantages,
            returns=samples.returns,
        )
        yield Minibatch(batch)


def _as_policy_takes(actions: th.Tensor, action_space: spaces.Space[Any]) -> th.Tensor:
    """Give the buffer's actions the type and shape in which SB3's ``PPO.train`` hands them to the policy."""
    return actions.long().flatten() if isinstance(action_space, spaces.Discrete) else actions
