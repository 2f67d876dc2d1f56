"""A rollout buffer whose rollout stays in tensors on the policy's device."""

from __future__ import annotations

from collections.abc import Generator
from typing import Any

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.type_aliases import RolloutBufferSamples
from stable_baselines3.common.vec_env import VecEnv

from sb3_ppo_plus.attributes import PlusModel
from sb3_ppo_plus.buffers import PPOPlusDictRolloutBuffer, PPOPlusRolloutBuffer, as_policy_takes
from sb3_ppo_plus.envs.tensor_vec_env import TensorVecEnv
from sb3_ppo_plus.rollout_batch import RolloutBatch
from sb3_ppo_plus.trees import tree_map

_COLUMNS = ("rewards", "returns", "episode_starts", "values", "log_probs", "advantages")


class _Column:
    """An array of SB3's buffer: on the CPU it shares the memory of the tensor, elsewhere it is a copy."""

    def __set_name__(self, owner: type[Any], name: str) -> None:
        self._name = name

    def __get__(self, buffer: TensorRolloutBuffer, owner: type[Any]) -> Any:  # noqa: ANN401  # array or dict
        return tree_map(lambda tensor: tensor.cpu().numpy(), buffer.tensors[self._name])

    def __set__(self, buffer: TensorRolloutBuffer, value: Any) -> None:  # noqa: ANN401  # array or dict
        buffer.tensors[self._name] = tree_map(lambda array: th.as_tensor(array).to(buffer.device), value)


class TensorRolloutBuffer(PPOPlusRolloutBuffer):
    """:class:`PPOPlusRolloutBuffer` for the tensors of a :class:`TensorVecEnv`, also with Dict observations.

    Its tensors are on ``device``, and are kept from rollout to rollout. SB3's names for its arrays work too.
    """

    observations: Any = _Column()
    actions: Any = _Column()
    rewards: Any = _Column()
    returns: Any = _Column()
    episode_starts: Any = _Column()
    values: Any = _Column()
    log_probs: Any = _Column()
    advantages: Any = _Column()
    context: dict[str, th.Tensor]  # type: ignore[assignment]  # arrays in the base class

    def reset(self) -> None:
        """Empty the buffer."""
        if "tensors" not in vars(self):
            self.tensors = self._new_tensors()
        self._rollout = None
        self.context, self._contexts, self.states = {}, [], []
        self._n_stored = 0
        self.pos, self.full, self.generator_ready = 0, False, False

    def _new_tensors(self) -> dict[str, Any]:
        steps, space = (self.buffer_size, self.n_envs), self.observation_space
        tensors: dict[str, Any] = {name: th.zeros(steps, device=self.device) for name in _COLUMNS}
        tensors["actions"] = self._zeros((*steps, self.action_dim), self.action_space.dtype)
        # As SB3's buffers, which store a Discrete observation as one number
        shapes: Any = self.obs_shape
        if isinstance(space, spaces.Dict):
            parts = space.items()
            tensors["observations"] = {key: self._zeros((*steps, *shapes[key]), part.dtype) for key, part in parts}
        else:
            tensors["observations"] = self._zeros((*steps, *shapes), space.dtype)
        return tensors

    def _zeros(self, shape: tuple[int, ...], dtype: Any) -> th.Tensor:  # noqa: ANN401  # NumPy's
        return th.zeros(shape, dtype=th.from_numpy(np.zeros(0, dtype)).dtype, device=self.device)

    def store_observations(self, observations: Any) -> None:  # noqa: ANN401  # tensor or dict
        """Store the observations of the next step, before the environment may write into them.

        :param observations: tensors of shape (n_envs, *observation shape), or a dict of them
        """
        stored = self.tensors["observations"]
        if isinstance(stored, dict):
            for key, tensor in stored.items():
                tensor[self.pos] = observations[key].reshape(tensor.shape[1:])
        else:
            stored[self.pos] = observations.reshape(stored.shape[1:])
        self._n_stored = self.pos + 1

    def add(
        self,
        obs: Any,  # noqa: ANN401  # tensors, arrays, or a dict of them
        action: Any,  # noqa: ANN401  # tensor or array
        reward: Any,  # noqa: ANN401
        episode_start: Any,  # noqa: ANN401
        value: th.Tensor | None,
        log_prob: th.Tensor | None,
        context: dict[str, th.Tensor] | None = None,
    ) -> None:
        """Store one step of every env, see :meth:`PPOPlusRolloutBuffer.add`.

        :param obs: as in the base class; not read if :meth:`store_observations` was called for this step
        """
        tensors, pos = self.tensors, self.pos
        if self._n_stored <= pos:
            self.store_observations(tree_map(th.as_tensor, obs))
        tensors["actions"][pos] = th.as_tensor(action).reshape(self.n_envs, self.action_dim)
        tensors["rewards"][pos] = th.as_tensor(reward)
        tensors["episode_starts"][pos] = th.as_tensor(episode_start)
        if value is not None and log_prob is not None:
            tensors["values"][pos] = value.flatten()
            tensors["log_probs"][pos] = log_prob.flatten()
        if context:
            self._contexts.append(context)
        if self.originals is not None:
            self.originals.add(self.pos)
        self.pos += 1
        self.full = self.pos == self.buffer_size
        if self.full and self._contexts:
            self.context = {name: th.stack([each[name] for each in self._contexts]) for name in self._contexts[0]}
            self._contexts = []

    def set_evaluation(self, values: th.Tensor, log_probs: th.Tensor) -> None:
        """Store what :meth:`add` was not given, see :meth:`PPOPlusRolloutBuffer.set_evaluation`."""
        steps = slice(0, len(values) // self.n_envs)
        self.tensors["values"][steps] = values.reshape(-1, self.n_envs)
        self.tensors["log_probs"][steps] = log_probs.reshape(-1, self.n_envs)
        self._rollout = None

    def add_to_rewards(self, steps: th.Tensor, envs: th.Tensor, amounts: th.Tensor) -> None:
        """Add values of timeouts to stored rewards.

        :param steps: indices of the steps, int64, shape (n,)
        :param envs: indices of the envs, int64, shape (n,); each pair of indices comes once
        :param amounts: shape (n,)
        """
        self.tensors["rewards"][steps, envs] += amounts

    def compute_returns_and_advantage(self, last_values: th.Tensor, dones: Any) -> None:  # noqa: ANN401  # tensor or array
        """Estimate advantages and returns, see :meth:`PPOPlusRolloutBuffer.compute_returns_and_advantage`.

        The operations are those of the base class, in their order, so the results have the same bits on the CPU.
        """
        tensors = self.tensors
        values, rewards, starts = tensors["values"], tensors["rewards"], tensors["episode_starts"]
        last_starts = th.as_tensor(dones).to(starts).reshape(1, -1)
        next_values = th.cat((values[1:], last_values.to(values).reshape(1, -1)))
        next_non_terminal = 1.0 - th.cat((starts[1:], last_starts))
        deltas = rewards + self.gamma * next_values * next_non_terminal - values
        decays = self.gamma * self.gae_lambda * next_non_terminal
        if self.advantages_by_scan:
            tensors["advantages"].copy_(_discounted_sums(deltas, decays))
        else:
            advantage = th.zeros_like(deltas[0])
            for step in reversed(range(self.buffer_size)):
                # Not addcmul, which rounds once
                advantage = deltas[step] + decays[step] * advantage
                tensors["advantages"][step] = advantage
        th.add(tensors["advantages"], values, out=tensors["returns"])
        self._rollout = None

    def narrows(self, observations: Any) -> bool:  # noqa: ANN401  # tensor or dict
        """See :meth:`PPOPlusRolloutBuffer.narrows`."""
        stored = self.tensors["observations"]
        if isinstance(stored, dict):
            return any(_narrows(tensor, observations[key]) for key, tensor in stored.items())
        return _narrows(stored, observations)

    def get(self, batch_size: int | None = None) -> Generator[RolloutBufferSamples, None, None]:
        """Yield all transitions in random order, as SB3's buffers do.

        :param batch_size: transitions per minibatch; None: all
        """
        for minibatch in self.minibatches(batch_size or self.buffer_size * self.n_envs):
            batch = minibatch.batch()
            actions = batch.actions.reshape(-1, self.action_dim)
            estimates = (batch.old_values, batch.old_log_prob, batch.advantages, batch.returns)
            observations: Any = batch.observations
            yield RolloutBufferSamples(observations, actions, *estimates)

    def rollout(self) -> RolloutBatch:
        """Return all transitions of the full buffer as one batch, which shares the buffer's memory."""
        if self._rollout is None:
            assert self.full, "The rollout buffer is not full"
            flat = tree_map(lambda tensor: tensor.flatten(0, 1), self.tensors)
            rollout = RolloutBatch(
                observations=flat["observations"],
                # As in the base class
                actions=as_policy_takes(flat["actions"].float(), self.action_space),
                old_values=flat["values"],
                old_log_prob=flat["log_probs"],
                advantages=flat["advantages"],
                returns=flat["returns"],
                context={name: tensor.flatten(0, 1) for name, tensor in self.context.items()},
            )
            self._rollout = rollout if self.sequence_length is None else self._with_sequences(rollout)
        return self._rollout


def _discounted_sums(deltas: th.Tensor, decays: th.Tensor) -> th.Tensor:
    """Solve A[t] = deltas[t] + decays[t] * A[t + 1], as the function of this name for arrays does."""
    sums, reach_decays = deltas.double(), decays.double()
    reach = 1
    while reach < len(sums):
        sums = th.cat((sums[:-reach] + reach_decays[:-reach] * sums[reach:], sums[-reach:]))
        products = reach_decays[:-reach] * reach_decays[reach:]
        reach_decays = th.cat((products, th.zeros_like(reach_decays[-reach:])))
        reach *= 2
    return sums.float()


def _narrows(stored: th.Tensor, given: th.Tensor) -> bool:
    is_wide = stored.dtype in (th.float32, th.float64)
    return not is_wide and th.promote_types(given.dtype, stored.dtype) != stored.dtype


def fit_buffer(model: PlusModel, env: VecEnv | None) -> None:
    """Give a model a rollout buffer of tensors where its environment is a :class:`TensorVecEnv`, else one of arrays.

    A ``rollout_buffer_class`` of the user's own stays. The environment then gives it arrays.

    :param model: the model, with a rollout buffer
    :param env: its environment
    """
    buffer, kind = model.rollout_buffer, model.rollout_buffer_class
    if kind not in (PPOPlusRolloutBuffer, PPOPlusDictRolloutBuffer) or env is None:
        return
    wanted = TensorRolloutBuffer if isinstance(env, TensorVecEnv) else kind
    if type(buffer) is not wanted:
        others: Any = (buffer.action_space, buffer.device, buffer.gae_lambda, buffer.gamma, buffer.n_envs)
        space: Any = buffer.observation_space
        new = wanted(buffer.buffer_size, space, *others)
        for name in ("advantages_by_scan", "sequence_length", "originals"):
            setattr(new, name, getattr(buffer, name))
        model.rollout_buffer = new
