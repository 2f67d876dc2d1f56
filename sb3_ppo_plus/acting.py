"""Acting apart from evaluating: only actions at each step, their values and log-probabilities after the rollout."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch as th
from stable_baselines3.common.distributions import StateDependentNoiseDistribution
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.type_aliases import PyTorchObs
from torch.func import functional_call
from torch.utils._pytree import tree_map

from sb3_ppo_plus.buffers import RolloutBatch
from sb3_ppo_plus.compiled_graph import CompilationReporter, GraphCache, tensor_places
from sb3_ppo_plus.policies import ActorCriticPlusPolicy

# Numbers in the observations of one forward pass after a rollout: 16 MiB of float32
EVALUATION_CHUNK = 2**22


class CompiledActor:
    """Computes only the actions at each step, in a compiled graph that draws the random numbers of eager mode.

    :param policy: the policy, see :func:`can_act_alone`
    :param options: TorchInductor's
    :param reporter: told of what was compiled, or could not be
    """

    def __init__(self, policy: ActorCriticPolicy, options: dict[str, Any], reporter: CompilationReporter) -> None:
        self.policy = policy
        self._graphs = GraphCache(policy, options, reporter)
        self._places: dict[str, th.Tensor] = {}

    @property
    def n_compilations(self) -> int:
        """Graphs that were compiled."""
        return self._graphs.n_compilations

    def begin_rollout(self) -> None:
        """Take note of whatever has changed since the last rollout."""
        self._places = tensor_places(self.policy)
        self._graphs.refresh()

    @th.no_grad()
    def act(self, observations: PyTorchObs, context: dict[str, th.Tensor]) -> th.Tensor:
        """Choose actions.

        :param observations: shape (n_envs, *observation shape), or a dict of such
        :param context: further keyword arguments of the policy, such as action_masks
        :return: stored actions, shape (n_envs, *action shape)
        """
        noise = _exploration_matrices(self.policy)
        varying = [*_leaves(observations), *context.values(), *noise]
        leaves = [*varying, *self._places.values()]
        key = (*context, *((leaf.shape, leaf.dtype) for leaf in varying))
        graph = self._graphs.get(key, "acting", lambda: self._function(observations, list(context), len(noise)), leaves)
        actions = graph(*leaves)[0] if graph else self.policy.get_distribution(observations, **context).get_actions()
        stored: th.Tensor = actions.reshape(-1, *(self.policy.action_space.shape or ()))
        return stored

    def _function(self, observations: PyTorchObs, context: list[str], n_noise: int) -> Callable[..., tuple[th.Tensor]]:
        module = _Acting(self.policy)
        names = [f"policy.{name}" for name in self._places]

        def function(*leaves: th.Tensor) -> tuple[th.Tensor]:
            given = iter(leaves)
            observation = {k: next(given) for k in observations} if isinstance(observations, dict) else next(given)
            arguments = (observation, {name: next(given) for name in context}, [next(given) for _ in range(n_noise)])
            return (functional_call(module, dict(zip(names, given, strict=True)), arguments, tie_weights=False),)

        return function


class _Acting(th.nn.Module):
    """The policy's choice of actions as a module's forward, which ``functional_call`` asks for."""

    def __init__(self, policy: ActorCriticPolicy) -> None:
        super().__init__()
        self.policy = policy

    def forward(self, observations: PyTorchObs, context: dict[str, th.Tensor], noise: list[th.Tensor]) -> th.Tensor:
        distribution = self.policy.get_distribution(observations, **context)
        if isinstance(distribution, StateDependentNoiseDistribution):
            # Inputs of the graph, as they are drawn anew
            distribution.exploration_mat, distribution.exploration_matrices = noise
        return distribution.get_actions()


def can_act_alone(policy: ActorCriticPolicy) -> bool:
    """Whether actions, values and log-probs may be computed apart: nothing in a subclass changes how they are made."""
    cls = type(policy)
    return (
        isinstance(policy, ActorCriticPlusPolicy)
        and cls.forward is ActorCriticPlusPolicy.forward
        and cls.get_distribution is ActorCriticPlusPolicy.get_distribution
        and cls.predict_values is ActorCriticPlusPolicy.predict_values
        and cls.evaluate_actions is ActorCriticPlusPolicy.evaluate_actions
        and cls._get_action_dist_from_latent is ActorCriticPlusPolicy._get_action_dist_from_latent
    )


@th.no_grad()
def evaluate_rollout(policy: ActorCriticPlusPolicy, rollout: RolloutBatch) -> tuple[th.Tensor, th.Tensor]:
    """Compute the values and log-probabilities of a rollout in few large batches.

    :return: values and log-probabilities, both of shape (n_transitions,)
    """
    values, log_probs = [], []
    for indices in _chunks(rollout.observations, len(rollout.actions)):
        batch = rollout.select(indices)
        value, distribution = policy.value_and_distribution(batch.observations, **batch.context)
        values.append(value.flatten())
        log_probs.append(distribution.log_prob(batch.actions))
    return th.cat(values), th.cat(log_probs)


@th.no_grad()
def predict_values(policy: ActorCriticPolicy, observations: list[Any]) -> np.ndarray:
    """Value predictions of single observations, in few large batches.

    :param observations: as ``infos[i]["terminal_observation"]`` holds them
    :return: shape (len(observations),)
    """
    tensors = [policy.obs_to_tensor(observation)[0] for observation in observations]
    together: PyTorchObs = tree_map(lambda *parts: th.cat(parts), tensors[0], *tensors[1:])
    chunks = _chunks(together, len(tensors))
    values = [policy.predict_values(tree_map(lambda part, i=i: part[i], together)).flatten() for i in chunks]
    predictions: np.ndarray = th.cat(values).cpu().numpy()
    return predictions


def _chunks(observations: PyTorchObs, n_observations: int) -> tuple[th.Tensor, ...]:
    leaves = _leaves(observations)
    numbers_each = sum(leaf[0].numel() for leaf in leaves)
    return th.split(th.arange(n_observations, device=leaves[0].device), max(1, EVALUATION_CHUNK // numbers_each))


def _leaves(observations: PyTorchObs) -> list[th.Tensor]:
    return list(observations.values()) if isinstance(observations, dict) else [observations]


def _exploration_matrices(policy: ActorCriticPolicy) -> list[th.Tensor]:
    distribution = policy.action_dist
    if not isinstance(distribution, StateDependentNoiseDistribution):
        return []
    return [distribution.exploration_mat.detach(), distribution.exploration_matrices.detach()]
