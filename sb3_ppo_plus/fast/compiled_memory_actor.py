"""Acting with a memory in compiled graphs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch as th
from sb3_contrib.common.recurrent.type_aliases import RNNStates
from stable_baselines3.common.buffers import RolloutBuffer
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.type_aliases import PyTorchObs

from sb3_ppo_plus.fast.compiled_actor import CompiledActor, sample, stored_actions
from sb3_ppo_plus.policies.actor_critic import ActorCriticPlusPolicy
from sb3_ppo_plus.rollout.actor import RolloutActor
from sb3_ppo_plus.rollout.memory_actor import MemoryActor
from sb3_ppo_plus.trees import tree_flatten, tree_leaves, tree_unflatten


class CompiledMemoryActor(CompiledActor):
    """Does in one graph what :class:`MemoryActor` does at each step. Other values are computed eagerly.

    Values and log-probabilities are computed at each step, since later ones would need the states of all steps.
    The parameters are those of :class:`CompiledActor`.
    """

    batches_timeouts = False
    _memory: MemoryActor

    def remember(self, states: RNNStates | None, n_envs: int) -> None:
        """Take over states before a rollout begins.

        :param states: see :class:`MemoryActor`
        :param n_envs: see :class:`MemoryActor`
        """
        self._memory = MemoryActor(self.policy, states, n_envs)
        self._spec = tree_flatten(self._memory.states)[1]

    @property
    def states(self) -> RNNStates:  # type: ignore[override]  # an attribute in the base class
        """States of the policy's memory after the last step."""
        return self._memory.states

    def begin_rollout(self, rollout_buffer: RolloutBuffer | None = None) -> None:
        """Notice what has changed since the last rollout."""
        super().begin_rollout(rollout_buffer)
        self._defers = self.leaves_evaluation = False

    def _function_of_acting(self) -> Callable[..., Any]:
        return _act_and_remember

    def act(
        self, observations: PyTorchObs, episode_starts: np.ndarray | None, context: dict[str, th.Tensor]
    ) -> tuple[th.Tensor, th.Tensor | None, th.Tensor | None]:
        """Choose actions, and keep the states after the step; see :meth:`RolloutActor.act`."""
        self._follow_changes()
        if self._is_eager:
            return self._memory.act(observations, episode_starts, context)
        whole_context = {**context, **self._memory.context(episode_starts)}
        actions, values, log_probs, *states = self._compute(observations, whole_context)
        self._memory.states = tree_unflatten(states, self._spec)
        return actions, values, log_probs

    def last_values(self, observations: PyTorchObs, episode_starts: np.ndarray) -> th.Tensor:
        """Predict the values after the last step; see :meth:`RolloutActor.last_values`."""
        return self._memory.last_values(observations, episode_starts)

    def terminal_value(self, observation: Any, index: int) -> float:  # noqa: ANN401  # array or dict
        """Predict the value with the states of the ended episode, see :meth:`RolloutActor.terminal_value`."""
        return self._memory.terminal_value(observation, index)

    def successor(self, policy: ActorCriticPolicy) -> RolloutActor:
        """Return the actor that goes on from the states of this one, see :meth:`RolloutActor.successor`."""
        return self._memory.successor(policy)


def _act_and_remember(
    policy: ActorCriticPlusPolicy, observations: PyTorchObs, context: dict[str, Any], noise: list[th.Tensor]
) -> tuple[th.Tensor, ...]:
    """Choose actions, and compute their values, their log-probabilities and the states after the step."""
    values, distribution, states = policy.remembering_distribution(observations, **context)
    actions = sample(distribution, noise)
    return stored_actions(policy, actions), values, distribution.log_prob(actions), *tree_leaves(states)
