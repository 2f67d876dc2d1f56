"""Acting with a memory: its states during a rollout."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch as th
from sb3_contrib.common.recurrent.type_aliases import RNNStates
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.type_aliases import PyTorchObs

from sb3_ppo_plus.policies.actor_critic import ActorCriticPlusPolicy
from sb3_ppo_plus.rollout.actor import RolloutActor
from sb3_ppo_plus.trees import tree_leaves, tree_map


class MemoryActor(RolloutActor):
    """Acts with a policy's memory, whose states it carries from step to step.

    :param policy: a policy with a memory
    :param states: the states after the last rollout. If they are None or do not fit, it begins with initial states
    :param n_envs: number of environments
    """

    def __init__(self, policy: ActorCriticPlusPolicy, states: RNNStates | None, n_envs: int) -> None:
        super().__init__(policy)
        self.policy: ActorCriticPlusPolicy = policy
        self._n_envs = n_envs
        initial = policy.initial_states(n_envs)
        is_usable = states is not None and _shapes(states) == _shapes(initial)
        self.states: RNNStates = states if is_usable and states is not None else initial

    @th.no_grad()
    def act(
        self, observations: PyTorchObs, episode_starts: np.ndarray | None, context: dict[str, th.Tensor]
    ) -> tuple[th.Tensor, th.Tensor | None, th.Tensor | None]:
        """Choose actions, and keep the states after the step; see :meth:`RolloutActor.act`."""
        whole_context: dict[str, Any] = {**context, **self.context(episode_starts)}
        actions, values, log_probs, states = self.policy.forward_step(observations, **whole_context)
        assert states is not None
        self.states = states
        return actions, values, log_probs

    @th.no_grad()
    def last_values(self, observations: PyTorchObs, episode_starts: np.ndarray) -> th.Tensor:
        """Predict the values after the last step; see :meth:`RolloutActor.last_values`."""
        return self.policy.predict_values(observations, **self.context(episode_starts))

    @th.no_grad()
    def terminal_value(self, observation: Any, index: int) -> float:  # noqa: ANN401  # array or dict
        """Predict the value with the states of the ended episode, see :meth:`RolloutActor.terminal_value`."""
        tensor, _ = self.policy.obs_to_tensor(observation)
        states = tree_map(lambda part: part[:, index : index + 1], self.states)
        return self.policy.predict_values(tensor, states).item()

    def successor(self, policy: ActorCriticPolicy) -> MemoryActor:
        """Return the actor that goes on from the states of this one, see :meth:`RolloutActor.successor`."""
        assert isinstance(policy, ActorCriticPlusPolicy)
        return MemoryActor(policy, self.states, self._n_envs)

    def context(self, episode_starts: np.ndarray | None) -> dict[str, Any]:
        """Return the arguments by which the policy remembers.

        :param episode_starts: True where an observation begins an episode, shape (n_envs,)
        """
        assert episode_starts is not None
        if isinstance(episode_starts, th.Tensor):
            # Of environments on a device
            starts = episode_starts.to(self.policy.device)
        else:
            starts = th.as_tensor(np.asarray(episode_starts, dtype=np.bool_), device=self.policy.device)
        return {"states": self.states, "episode_starts": starts}


def _shapes(states: RNNStates) -> list[th.Size]:
    return [part.shape for part in tree_leaves(states)]
