"""Rollout buffers, which yield minibatches."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import torch as th
from gymnasium import spaces
from sb3_contrib.common.maskable.buffers import MaskableDictRolloutBuffer, MaskableRolloutBuffer
from sb3_contrib.common.recurrent.type_aliases import RNNStates
from stable_baselines3.common.buffers import DictRolloutBuffer, RolloutBuffer
from stable_baselines3.common.type_aliases import PyTorchObs

from sb3_ppo_plus.rollout_batch import Minibatch, RolloutBatch
from sb3_ppo_plus.trees import tree_map


class PPOPlusRolloutBuffer(RolloutBuffer):
    """SB3's ``RolloutBuffer``, which makes tensors once per rollout and without copies. SB3 converts each minibatch."""

    advantages_by_scan: bool = False
    """Estimate advantages in float64 without a loop over the steps: equal to SB3's to float32 rounding, not in bits."""

    sequence_length: int | None = None
    """With a memory, minibatches consist of sequences of this length; None: of single transitions."""

    _rollout: RolloutBatch | None = None
    context: dict[str, np.ndarray]
    """The policy's further arguments, shape (buffer_size, n_envs, ...). Empty until the buffer is full."""
    states: list[RNNStates]
    originals: Any = None  # OriginalObservations, to which each step is added; None: nobody needs them
    _valid: np.ndarray | None = None

    def reset(self) -> None:
        """Empty the buffer."""
        self._rollout = self._valid = None
        self.context = {}
        self._contexts: list[dict[str, th.Tensor]] = []
        self.states = []
        super().reset()

    def add(
        self,
        obs: np.ndarray | dict[str, np.ndarray],
        action: np.ndarray,
        reward: np.ndarray,
        episode_start: np.ndarray,
        value: th.Tensor | None,
        log_prob: th.Tensor | None,
        context: dict[str, th.Tensor] | None = None,
    ) -> None:
        """Store one step of every env, as SB3's ``RolloutBuffer.add``, but without intermediate copies.

        :param obs: observations before the step
        :param action: stored actions
        :param reward: rewards, shape (n_envs,)
        :param episode_start: whether ``obs`` begins an episode, shape (n_envs,)
        :param value: value predictions; None: :meth:`set_evaluation` follows
        :param log_prob: log probability of the actions; None: :meth:`set_evaluation` follows
        :param context: the policy's further arguments, tensors of shape (n_envs, ...), with equal names at each step.
            They must not change until the buffer is full
        """
        self._store_observations(obs)
        self.actions[self.pos] = action.reshape(self.n_envs, self.action_dim)
        self.rewards[self.pos] = reward
        self.episode_starts[self.pos] = episode_start
        if value is not None and log_prob is not None:
            self.values[self.pos] = value.cpu().numpy().reshape(-1)
            self.log_probs[self.pos] = log_prob.cpu().numpy().reshape(-1)
        if context:
            self._contexts.append(context)
        if self.originals is not None:
            self.originals.add(self.pos)
        self.pos += 1
        self.full = self.pos == self.buffer_size
        if self.full and self._contexts:
            self._stack_contexts()

    def add_states(self, states: RNNStates) -> None:
        """Store a memory's states before the next step, if a sequence begins with the step.

        :param states: tensors of shape (n_layers, n_envs, ...)
        """
        if self.sequence_length is not None and self.pos % self.sequence_length == 0:
            self.states.append(states)

    def set_evaluation(self, values: th.Tensor, log_probs: th.Tensor) -> None:
        """Store the values and log-probabilities that :meth:`add` was not given in the first steps.

        :param values: value predictions, shape (number of steps * n_envs,), in the order of :meth:`rollout`
        :param log_probs: log probability of the actions, of the shape and order of ``values``
        """
        steps = slice(0, len(values) // self.n_envs)
        self.values[steps] = values.cpu().numpy().reshape(-1, self.n_envs)
        self.log_probs[steps] = log_probs.cpu().numpy().reshape(-1, self.n_envs)
        self._rollout = None

    def replace_log_probs(self, indices: th.Tensor, log_probs: th.Tensor) -> None:
        """Replace log-probabilities of the full buffer.

        :param indices: indices of transitions in :meth:`rollout`, int64, shape (batch,)
        :param log_probs: shape (batch,)
        """
        # On the CPU, the tensors share the memory of the buffer's arrays
        self.rollout().old_log_prob[indices] = log_probs

    def set_mirrored(self, observations: PyTorchObs, actions: th.Tensor) -> None:
        """Keep the mirror images of the full buffer for its minibatches.

        :param observations: of the shape and order of :meth:`rollout`
        :param actions: stored actions, of the shape and order of :meth:`rollout`
        """
        self._rollout = replace(self.rollout(), mirrored={"observations": observations, "actions": actions})

    def set_following(self, observations: PyTorchObs, continues: th.Tensor) -> None:
        """Keep for the minibatches of the full buffer what followed its steps.

        :param observations: one step later, of the shape and order of :meth:`rollout`
        :param continues: whether these belong to the same episode, bool, shape (number of transitions,)
        """
        self._rollout = replace(self.rollout(), following={"observations": observations, "continues": continues})

    def set_valid(self, valid: np.ndarray) -> None:
        """Say which rows of the full buffer are transitions; without it, all are.

        :param valid: shape (buffer_size, n_envs)
        """
        self._valid, self._rollout = valid, None

    @property
    def valid(self) -> np.ndarray | None:
        """Which rows are transitions, in the order of ``values`` and ``returns``; None: all are."""
        return None if self._valid is None else self._flat_context(self._valid).reshape(self.values.shape)

    def compute_returns_and_advantage(self, last_values: th.Tensor, dones: np.ndarray) -> None:
        """Estimate advantages by GAE(lambda) and returns by TD(lambda), as SB3's ``RolloutBuffer`` does.

        :param last_values: value predictions of the observations after the last step
        :param dones: whether the last step ended the episode, shape (n_envs,)
        """
        next_values = np.concatenate((self.values[1:], last_values.cpu().numpy().reshape(1, -1)))
        next_non_terminal = 1.0 - np.concatenate((self.episode_starts[1:], dones.astype(np.float32).reshape(1, -1)))
        deltas = self.rewards + self.gamma * next_values * next_non_terminal - self.values
        decays = self.gamma * self.gae_lambda * next_non_terminal
        if self.advantages_by_scan:
            self.advantages = _discounted_sums(deltas, decays)
        else:
            advantage = np.zeros_like(deltas[0])
            for step in reversed(range(self.buffer_size)):
                advantage = deltas[step] + decays[step] * advantage
                self.advantages[step] = advantage
        self.returns = self.advantages + self.values
        self._rollout = None

    def rollout(self) -> RolloutBatch:
        """Return all transitions of the full buffer as one batch. On the CPU it shares the buffer's memory."""
        if self._rollout is None:
            assert self.full, "The rollout buffer is not full"
            # SB3 casts to float32 too, because the log-probability of a MultiBinary action cannot be computed in int8
            actions = self.to_torch(self._flat(self.actions).astype(np.float32, copy=False), copy=False)
            rollout = RolloutBatch(
                observations=self._observation_tensors(),
                actions=as_policy_takes(actions, self.action_space),
                old_values=self.to_torch(self.values.reshape(-1), copy=False),
                old_log_prob=self.to_torch(self.log_probs.reshape(-1), copy=False),
                advantages=self.to_torch(self.advantages.reshape(-1), copy=False),
                returns=self.to_torch(self.returns.reshape(-1), copy=False),
                valid=None if self._valid is None else self.to_torch(self._flat_context(self._valid), copy=False),
                context={
                    name: self.to_torch(self._flat_context(array), copy=False) for name, array in self.context.items()
                },
            )
            self._rollout = rollout if self.sequence_length is None else self._with_sequences(rollout)
        return self._rollout

    def _with_sequences(self, rollout: RolloutBatch) -> RolloutBatch:
        assert self.sequence_length is not None
        episode_starts = self._flat_context(self.episode_starts.reshape(self.buffer_size, self.n_envs))
        steps, envs = np.mgrid[: self.buffer_size, : self.n_envs]
        sequences = self._flat_context(steps // self.sequence_length * self.n_envs + envs)
        valid = rollout.valid
        if valid is None and self.buffer_size % self.sequence_length > 0:
            valid = th.ones_like(rollout.old_values, dtype=th.bool)
        return replace(
            rollout,
            valid=valid,
            context={**rollout.context, "episode_starts": self.to_torch(episode_starts, copy=False) > 0},
            states=tree_map(lambda *parts: th.cat(parts, dim=1), *self.states),
            sequence_of=self.to_torch(sequences, copy=False),
        )

    def minibatches(self, batch_size: int) -> Iterator[Minibatch]:
        """Yield every transition once, in the random order of SB3's ``RolloutBuffer.get``; the last batch may be short.

        :param batch_size: transitions per minibatch; with a ``sequence_length``, minibatches of whole sequences
        """
        rollout = self.rollout()
        if self.sequence_length is not None:
            sequences = self.indices_of_part()
            indices = sequences[np.random.permutation(len(sequences))]
            for batch_indices in th.split(th.from_numpy(indices).to(self.device), batch_size // self.sequence_length):
                yield Minibatch(rollout, batch_indices)
            return
        indices = self._where_stored(np.random.permutation(self.buffer_size * self.n_envs))
        for batch_indices in th.split(th.from_numpy(indices).to(self.device), batch_size):
            yield Minibatch(rollout, batch_indices)

    def _where_stored(self, numbers: np.ndarray) -> np.ndarray:
        # SB3 numbers the transitions env by env. The arrays hold them step by step, until SB3's get reorders them
        if not self.generator_ready:
            numbers = numbers % self.buffer_size * self.n_envs + numbers // self.buffer_size
        return numbers

    def indices_of_part(self, part: int = 0, n_parts: int = 1) -> np.ndarray:
        """Return indices for :meth:`RolloutBatch.select` of what a part of the environments has done.

        :param part: number of the part; each has equally many environments
        :param n_parts: number of parts
        :return: int64, shape (n_transitions,), or (n_sequences, sequence_length), where -1 is padding
        """
        size = self.n_envs // n_parts
        envs = np.arange(part * size, (part + 1) * size).reshape(-1, 1)
        if self.sequence_length is None:
            numbers: np.ndarray = (envs * self.buffer_size + np.arange(self.buffer_size)).flatten()
            return self._where_stored(numbers)
        n_sequences = -(-self.buffer_size // self.sequence_length)
        steps = np.arange(n_sequences * self.sequence_length).reshape(n_sequences, 1, -1)
        flat = envs * self.buffer_size + steps if self.generator_ready else steps * self.n_envs + envs
        return np.where(steps < self.buffer_size, flat, -1).reshape(-1, self.sequence_length)

    def in_order(self, batch_size: int, part: int = 0, n_parts: int = 1) -> tuple[th.Tensor, ...]:
        """Return indices for :meth:`RolloutBatch.select`: all transitions or sequences of a part, in their order.

        :param batch_size: transitions of the part in each minibatch
        :param part: see :meth:`indices_of_part`
        :param n_parts: see :meth:`indices_of_part`
        """
        indices = self.indices_of_part(part, n_parts)
        if self.sequence_length is None and n_parts == 1:
            indices = np.arange(len(indices))
        return th.split(th.from_numpy(indices).to(self.device), batch_size // (self.sequence_length or 1))

    def _flat(self, array: np.ndarray) -> np.ndarray:
        """Join the axes of steps and envs, unless SB3's ``get`` has joined them already."""
        return array if self.generator_ready else array.reshape(-1, *array.shape[2:])

    def _stack_contexts(self) -> None:
        # One copy of all steps is cheaper than a copy at each step
        for name in self._contexts[0]:
            self.context[name] = th.stack([context[name] for context in self._contexts]).cpu().numpy()
        self._contexts = []

    def _flat_context(self, array: np.ndarray) -> np.ndarray:
        # SB3's get orders its own arrays env by env, but not these
        in_order = array.swapaxes(0, 1) if self.generator_ready else array
        return in_order.reshape(-1, *array.shape[2:])

    def narrows(self, observations: PyTorchObs) -> bool:
        """Whether the buffer's arrays lose digits of these observations, as SB3's do; float32 holds all that matters.

        They have the observation space's dtype, for example uint8, of which VecNormalize makes floats.

        :param observations: the observations that the policy is given
        """
        return _narrows(self.observations, observations)

    def _store_observations(self, obs: Any) -> None:  # noqa: ANN401  # array or dict, as the subclass knows
        self.observations[self.pos] = obs.reshape(self.observations.shape[1:])

    def _observation_tensors(self) -> PyTorchObs:
        return self.to_torch(self._flat(self.observations), copy=False)


class PPOPlusDictRolloutBuffer(PPOPlusRolloutBuffer, DictRolloutBuffer):
    """:class:`PPOPlusRolloutBuffer` for Dict observations, a subclass of SB3's ``DictRolloutBuffer``."""

    def narrows(self, observations: Any) -> bool:  # noqa: ANN401  # a dict here
        """See :meth:`PPOPlusRolloutBuffer.narrows`."""
        return any(_narrows(stored, observations[key]) for key, stored in self.observations.items())

    def _store_observations(self, obs: Any) -> None:  # noqa: ANN401  # array or dict, as the subclass knows
        for key, stored in self.observations.items():
            stored[self.pos] = obs[key].reshape(stored.shape[1:])

    def _observation_tensors(self) -> PyTorchObs:
        return {key: self.to_torch(self._flat(obs), copy=False) for key, obs in self.observations.items()}


def _narrows(stored: np.ndarray, given: Any) -> bool:  # noqa: ANN401  # a tensor
    given_dtype = th.empty(0, dtype=given.dtype).numpy().dtype
    return stored.dtype not in (np.float32, np.float64) and not np.can_cast(given_dtype, stored.dtype)


def _discounted_sums(deltas: np.ndarray, decays: np.ndarray) -> np.ndarray:
    """Solve A[t] = deltas[t] + decays[t] * A[t + 1] in log2(steps) passes.

    After each pass, an element is a sum over twice as many steps as before it.

    :param deltas: shape (n_steps, n_envs)
    :param decays: shape (n_steps, n_envs)
    :return: float32, shape (n_steps, n_envs)
    """
    sums, reach_decays = deltas.astype(np.float64), decays.astype(np.float64)
    reach = 1
    while reach < len(sums):
        # The right-hand sides are computed before either array changes
        sums[:-reach] += reach_decays[:-reach] * sums[reach:]
        reach_decays[:-reach] = reach_decays[:-reach] * reach_decays[reach:]
        reach_decays[-reach:] = 0.0
        reach *= 2
    return sums.astype(np.float32)


# SB3's and sb3-contrib's buffers. Ours do everything that they do
_REPLACED_BUFFERS = (None, RolloutBuffer, DictRolloutBuffer, MaskableRolloutBuffer, MaskableDictRolloutBuffer)


def plus_buffer_class(given: type[RolloutBuffer] | None, observation_space: spaces.Space[Any]) -> type[RolloutBuffer]:
    """Return the class of a model's rollout buffer: ours, or one of the user's own.

    :param given: the argument ``rollout_buffer_class``
    :param observation_space: the observation space
    """
    if given is not None and given not in _REPLACED_BUFFERS:
        return given
    return PPOPlusDictRolloutBuffer if isinstance(observation_space, spaces.Dict) else PPOPlusRolloutBuffer


def obstacle_of_buffer(buffer: RolloutBuffer) -> str | None:
    """Return why an extra cannot add to the minibatches of a buffer, for an error that names the extra; None: it can.

    :param buffer: the rollout buffer
    """
    if isinstance(buffer, PPOPlusRolloutBuffer):
        return None
    name = type(buffer).__name__
    return f"needs a rollout_buffer_class that is None or a subclass of PPOPlusRolloutBuffer, got {name}"


def minibatches(buffer: RolloutBuffer, batch_size: int) -> Iterator[Minibatch]:
    """Yield the transitions of ``buffer`` once, in random order.

    :param buffer: one of ours, or of the user's ``rollout_buffer_class``, whose own ``get`` is then used
    :param batch_size: transitions per minibatch
    """
    if isinstance(buffer, PPOPlusRolloutBuffer):
        yield from buffer.minibatches(batch_size)
        return
    for samples in buffer.get(batch_size):
        batch = RolloutBatch(
            observations=samples.observations,
            actions=as_policy_takes(samples.actions, buffer.action_space),
            old_values=samples.old_values,
            old_log_prob=samples.old_log_prob,
            advantages=samples.advantages,
            returns=samples.returns,
        )
        yield Minibatch(batch)


def as_policy_takes(actions: th.Tensor, action_space: spaces.Space[Any]) -> th.Tensor:
    """Give the buffer's actions the type and shape in which SB3's ``PPO.train`` hands them to the policy.

    :param actions: stored actions, shape (batch, action dim)
    :param action_space: the action space
    """
    return actions.long().flatten() if isinstance(action_space, spaces.Discrete) else actions
