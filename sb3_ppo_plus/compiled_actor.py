"""Acting in compiled graphs: actions alone at each step, their values and log-probabilities after the rollout."""

from __future__ import annotations

from typing import Any, TypeGuard

import numpy as np
import torch as th
from stable_baselines3.common.buffers import RolloutBuffer
from stable_baselines3.common.distributions import Distribution, StateDependentNoiseDistribution
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.type_aliases import PyTorchObs
from torch.func import functional_call
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from sb3_ppo_plus.acting import RolloutActor, leaves_of, predict_values, rows_of_chunk
from sb3_ppo_plus.buffers import PPOPlusRolloutBuffer, RolloutBatch
from sb3_ppo_plus.compiled_graph import CompilationReporter, Graph, GraphCache
from sb3_ppo_plus.policies import ActorCriticPlusPolicy
from sb3_ppo_plus.tracing import tensor_places

# Observations of one forward pass after a rollout, whose activations should stay in a cache
EVALUATION_ROWS = 2048


class CompiledActor(RolloutActor):
    """Computes the actions at each step, and values and log-probabilities after the rollout, in compiled graphs.

    All three come at each step where the features extractor learns: it would do most of the work twice. The graphs draw
    the random numbers of eager mode. Where they cannot be compiled, one warning says why, and the same is computed
    eagerly.

    :param policy: the policy, see :func:`can_act_alone`
    :param options: TorchInductor's
    :param reporter: told of what was compiled, or could not be
    """

    def __init__(self, policy: ActorCriticPlusPolicy, options: dict[str, Any], reporter: CompilationReporter) -> None:
        super().__init__(policy)
        self.policy: ActorCriticPlusPolicy = policy
        self._graphs = GraphCache(policy, options, reporter)
        self.evaluates_afterwards = not _features_are_learned(policy)
        self._acting = (_Acting if self.evaluates_afterwards else _ActingAndEvaluating)(policy)
        self._evaluating = _Evaluating(policy)
        self._names: list[str] = []
        self._tensors: list[th.Tensor] = []
        self._graph: Graph | None = None
        self._layout: list[tuple[th.Size, th.dtype]] | None = None
        self._timeouts: list[tuple[int, int, Any]] = []

    @property
    def n_compilations(self) -> int:
        """Graphs that were compiled."""
        return self._graphs.n_compilations

    def begin_rollout(self) -> None:
        """Take note of whatever has changed since the last rollout."""
        places = tensor_places(self.policy)
        self._names = [f"policy.{name}" for name in places]
        # Detached, so that no call needs to enter a no_grad
        self._tensors = [tensor.detach() for tensor in places.values()]
        self._graphs.refresh()
        self._layout = None
        self._timeouts = []

    def act(
        self, observations: PyTorchObs, episode_starts: np.ndarray | None, context: dict[str, th.Tensor]
    ) -> tuple[th.Tensor, th.Tensor | None, th.Tensor | None]:
        """Choose actions; values and log-probabilities are None where :meth:`finish` computes them."""
        noise = _exploration_matrices(self.policy)
        # A graph reads its inputs' memory by the layout and type that it was compiled for
        leaves = [leaf.contiguous() for leaf in (*leaves_of(observations), *context.values(), *noise)]
        layout = [(leaf.shape, leaf.dtype) for leaf in leaves]
        if layout != self._layout:
            self._graph = self._find_graph("acting", self._acting, (observations, context, noise))
            self._layout = layout
        if self._graph is None:
            with th.no_grad():
                computed = self._acting(observations, context, noise)
        else:
            computed = self._graph(*leaves, *self._tensors)
        actions, values, log_probs = (*computed, None, None)[:3]
        return actions, values, log_probs

    def terminal_value(self, observation: Any, index: int, step: int) -> None:  # noqa: ANN401  # array or dict
        """Leave the value to :meth:`finish`, which predicts all in a batch."""
        self._timeouts.append((step, index, observation))

    def finish(self, rollout_buffer: RolloutBuffer, gamma: float) -> None:
        """Fill in the values and log-probabilities of the steps, and bootstrap from the values of timeouts."""
        assert isinstance(rollout_buffer, PPOPlusRolloutBuffer)
        if self.evaluates_afterwards:
            rollout_buffer.set_evaluation(*self._evaluate(rollout_buffer.rollout()))
        if self._timeouts:
            steps, indices, observations = zip(*self._timeouts, strict=True)
            rollout_buffer.rewards[steps, indices] += gamma * predict_values(self.policy, list(observations))

    def _evaluate(self, rollout: RolloutBatch) -> tuple[th.Tensor, th.Tensor]:
        """Values and log-probabilities, shape (n_transitions,), in as many passes as caches and memory ask for."""
        n_transitions = len(rollout.actions)
        size = min(EVALUATION_ROWS, n_transitions, rows_of_chunk(rollout.observations))
        values, log_probs = th.empty_like(rollout.old_values), th.empty_like(rollout.old_log_prob)
        graph: Graph | None = None
        for start in range(0, n_transitions, size):
            # The last rows overlap those before, so that all passes need the same graph
            rows = slice(min(start, n_transitions - size), min(start, n_transitions - size) + size)
            batch = rollout.select(rows)
            arguments = (batch.observations, batch.context, batch.actions)
            if start == 0:
                graph = self._find_graph("evaluating a rollout", self._evaluating, arguments)
            if graph is None:
                with th.no_grad():
                    evaluation = self._evaluating(*arguments)
            else:
                evaluation = graph(*tree_flatten(arguments)[0], *self._tensors)
            values[rows], log_probs[rows] = evaluation
        return values, log_probs

    @th.no_grad()
    def _find_graph(self, what: str, module: th.nn.Module, arguments: tuple[Any, ...]) -> Graph | None:
        leaves, spec = tree_flatten(tree_map(th.Tensor.contiguous, arguments))
        names = self._names

        def function(*given: th.Tensor) -> tuple[th.Tensor, ...]:
            tensors = dict(zip(names, given[len(leaves) :], strict=True))
            called: tuple[th.Tensor, ...] = functional_call(
                module, tensors, tuple(tree_unflatten(given[: len(leaves)], spec)), tie_weights=False
            )
            return called

        key = (what, str(spec), *((leaf.shape, leaf.dtype) for leaf in leaves))
        return self._graphs.get(key, what, lambda: function, [*leaves, *self._tensors])


class _Acting(th.nn.Module):
    """The policy's choice of actions as a module's forward, which ``functional_call`` asks for."""

    def __init__(self, policy: ActorCriticPlusPolicy) -> None:
        super().__init__()
        self.policy = policy

    def forward(
        self, observations: PyTorchObs, context: dict[str, Any], noise: list[th.Tensor]
    ) -> tuple[th.Tensor, ...]:
        return (self._stored(self._sample(self.policy.get_distribution(observations, **context), noise)),)

    def _sample(self, distribution: Distribution, noise: list[th.Tensor]) -> th.Tensor:
        if isinstance(distribution, StateDependentNoiseDistribution):
            # Inputs of the graph, as they are drawn anew
            distribution.exploration_mat, distribution.exploration_matrices = noise
        return distribution.get_actions()

    def _stored(self, actions: th.Tensor) -> th.Tensor:
        return actions.reshape(-1, *(self.policy.action_space.shape or ()))


class _ActingAndEvaluating(_Acting):
    """Actions with their values and log-probabilities, in the same form."""

    def forward(
        self, observations: PyTorchObs, context: dict[str, Any], noise: list[th.Tensor]
    ) -> tuple[th.Tensor, ...]:
        values, distribution = self.policy.value_and_distribution(observations, **context)
        actions = self._sample(distribution, noise)
        return self._stored(actions), values, distribution.log_prob(actions)


class _Evaluating(th.nn.Module):
    """The policy's values and log-probabilities, in the same form."""

    def __init__(self, policy: ActorCriticPlusPolicy) -> None:
        super().__init__()
        self.policy = policy

    def forward(
        self, observations: PyTorchObs, context: dict[str, th.Tensor], actions: th.Tensor
    ) -> tuple[th.Tensor, th.Tensor]:
        values, distribution = self.policy.value_and_distribution(observations, **context)
        return values.flatten(), distribution.log_prob(actions)


# What acting and evaluating together passes through, and what it does apart. Private ones are overridden too
_METHODS_OF_ACTING = (
    "forward",
    "forward_step",
    "evaluate_actions",
    "extract_features",
    "get_distribution",
    "predict_values",
    "value_and_distribution",
    "_distribution_and_state",
    "_evaluate",
    "_get_action_dist_from_latent",
    "_masked_distribution",
)


def can_act_alone(policy: ActorCriticPolicy) -> TypeGuard[ActorCriticPlusPolicy]:
    """Whether actions, values and log-probs may be computed apart: nothing in a subclass changes how they are made."""
    return isinstance(policy, ActorCriticPlusPolicy) and all(
        getattr(type(policy), name) is getattr(ActorCriticPlusPolicy, name) for name in _METHODS_OF_ACTING
    )


def _features_are_learned(policy: ActorCriticPolicy) -> bool:
    extractors = {policy.features_extractor, policy.pi_features_extractor, policy.vf_features_extractor}
    return any(parameter.numel() for extractor in extractors for parameter in extractor.parameters())


def _exploration_matrices(policy: ActorCriticPolicy) -> list[th.Tensor]:
    distribution = policy.action_dist
    if not isinstance(distribution, StateDependentNoiseDistribution):
        return []
    return [distribution.exploration_mat.detach(), distribution.exploration_matrices.detach()]
