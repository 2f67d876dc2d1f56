"""Acting in compiled graphs: actions alone at each step, their values and log-probabilities after the rollout."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from functools import partial
from typing import Any, TypeGuard

import numpy as np
import torch as th
from stable_baselines3.common.buffers import RolloutBuffer
from stable_baselines3.common.distributions import Distribution, StateDependentNoiseDistribution
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.type_aliases import PyTorchObs
from torch.func import functional_call

from sb3_ppo_plus.buffers import PPOPlusRolloutBuffer, RolloutBatch
from sb3_ppo_plus.fast.graphs import CompilationReporter, Graph, GraphCache
from sb3_ppo_plus.fast.policy_changes import (
    METHODS_OF_ACTING,
    has_known_modules,
    layout_of,
    structural_copy,
)
from sb3_ppo_plus.fast.watch import PartsWatch
from sb3_ppo_plus.policies.actor_critic import ActorCriticPlusPolicy
from sb3_ppo_plus.rollout.actor import RolloutActor, leaves_of, predict_values, rows_of_chunk
from sb3_ppo_plus.torch_private import versions_of
from sb3_ppo_plus.trees import tree_flatten, tree_map, tree_unflatten
from sb3_ppo_plus.update.tensor_places import tensor_places

# Observations of one forward pass after a rollout, whose activations should stay in a cache
EVALUATION_ROWS = 2048


class CompiledActor(RolloutActor):
    """Computes the actions at each step, and values and log-probabilities after the rollout, in compiled graphs.

    All three come at each step where the features extractor learns, which would do most of the work twice, where the
    policy has parts that may do something else when they are called later, and where the rollout buffer keeps
    observations in a type that cannot hold them. When a callback changes the policy amid a rollout, the steps before
    are evaluated with the policy that took them, and those that follow one by one. The graphs draw the random numbers
    of eager mode. Where they cannot be compiled, one warning says why, and the same is computed eagerly.

    :param policy: the policy, see :func:`can_act_alone`
    :param options: TorchInductor's
    :param reporter: told of what was compiled, or could not be
    """

    def __init__(self, policy: ActorCriticPlusPolicy, options: dict[str, Any], reporter: CompilationReporter) -> None:
        super().__init__(policy)
        self.policy: ActorCriticPlusPolicy = policy
        self._options, self._reporter = options, reporter
        self._graphs = GraphCache(policy, options, reporter)
        self._evaluating = _Evaluating(policy)
        self._watch = PartsWatch(policy)
        self._kept_policy = policy
        self._state_of_kept: Hashable = None
        self._buffer: RolloutBuffer | None = None
        self.begin_rollout()

    def __reduce__(self) -> tuple[type[CompiledActor], tuple[Any, ...]]:
        # What it holds belongs to one rollout, or is compiled code
        return CompiledActor, (self.policy, self._options, self._reporter)

    @property
    def n_compilations(self) -> int:
        """Graphs that were compiled."""
        return self._graphs.n_compilations

    @property
    def has_given_up(self) -> bool:
        """Whether all is eager from now on."""
        return self._graphs.has_given_up

    def begin_rollout(self, rollout_buffer: RolloutBuffer | None = None) -> None:
        """Take note of whatever has changed since the last rollout.

        :param rollout_buffer: where the rollout is stored
        """
        self._buffer = rollout_buffer
        # In-place changes amid a rollout would go unnoticed without versions
        self._defers = has_known_modules(self.policy) and versions_of(self.policy.parameters()) is not None
        self.evaluates_later = self._defers and not _features_are_learned(self.policy)
        self._has_changed_amid = False
        self._n_later = 0
        self._take_note()
        if self._is_eager:
            self._defers = self.evaluates_later = False
        # For what is left to do after a callback has changed the policy
        self._begun, self._kept = self._watch, {}
        if self._defers:
            self._kept = {name: tensor.clone() for name, tensor in zip(self._names, self._tensors, strict=True)}
            if self._graphs.python_state != self._state_of_kept:
                self._kept_policy, self._state_of_kept = structural_copy(self.policy), self._graphs.python_state

    def _take_note(self) -> None:
        self._acting = (_Acting if self.evaluates_later else _ActingAndEvaluating)(self.policy)
        places = tensor_places(self.policy)
        self._names = [f"policy.{name}" for name in places]
        self._places = list(places.values())
        # Detached, so that no call needs to enter a no_grad
        self._tensors = [tensor.detach() for tensor in self._places]
        self._parameters = list(self.policy.parameters())
        self._graphs.refresh()
        self._is_eager = self._graphs.hindrance is not None or not can_act_alone(self.policy)
        self._graph: Graph | None = None
        self._layout: list[tuple[th.Size, th.dtype]] | None = None
        if self._watch.has_changed():
            self._watch = PartsWatch(self.policy)
        self._memory = self._memory_now()

    def _memory_now(self) -> list[int]:
        # Not the versions of buffers, which a policy may change itself
        return [*map(th.Tensor.data_ptr, self._places), *(versions_of(self._parameters) or ())]

    def _follow_changes(self) -> None:
        """Notice what a callback has changed since the last step."""
        if self._is_eager:
            return
        has_changed = self._memory_now() != self._memory
        if not has_changed and self._watch.has_changed():
            # Whoever predicts in a callback sets attributes, and resets them: this is no reason to compile anew
            has_same_tensors = [*map(id, tensor_places(self.policy).values())] == [*map(id, self._places)]
            has_changed = not (has_same_tensors and self._graphs.is_current())
            self._watch = PartsWatch(self.policy)
        if has_changed:
            self._has_changed_amid, self._defers, self.evaluates_later = True, False, False
            self._take_note()

    def act(
        self, observations: PyTorchObs, episode_starts: np.ndarray | None, context: dict[str, th.Tensor]
    ) -> tuple[th.Tensor, th.Tensor | None, th.Tensor | None]:
        """Choose actions; values and log-probabilities are None where :meth:`evaluate_later` computes them."""
        self._follow_changes()
        if self._is_eager:
            return super().act(observations, episode_starts, context)
        noise = _exploration_matrices(self.policy)
        # A graph reads its inputs' memory by the layout and type that it was compiled for
        leaves = [leaf.contiguous() for leaf in (*leaves_of(observations), *context.values(), *noise)]
        layout = [(leaf.shape, leaf.dtype) for leaf in leaves]
        if layout != self._layout:
            self._keep_from_narrowing(observations)
            self._graph = self._find_graph("acting", self._acting, (observations, context, noise))
            self._layout = layout
        self._n_later += self.evaluates_later
        if self._graph is None:
            with th.no_grad():
                computed = self._acting(observations, context, noise)
        else:
            computed = self._graph(*leaves, *self._tensors)
        actions, values, log_probs = (*computed, None, None)[:3]
        return actions, values, log_probs

    def _keep_from_narrowing(self, observations: PyTorchObs) -> None:
        """Evaluate at each step from now on where the buffer does not keep the observations as they are."""
        buffer = self._buffer
        if self.evaluates_later and isinstance(buffer, PPOPlusRolloutBuffer) and buffer.narrows(observations):
            self.evaluates_later = False
            self._acting = _ActingAndEvaluating(self.policy)

    def terminal_value(self, observation: Any, index: int) -> th.Tensor | float | None:  # noqa: ANN401  # array or dict
        """Put the value off to the end of the rollout, unless it might be another one then."""
        self._follow_changes()
        return None if self._defers else super().terminal_value(observation, index)

    def evaluate_later(self, rollout_buffer: RolloutBuffer) -> tuple[th.Tensor, th.Tensor] | None:
        """Compute the values and log-probabilities of the steps, with the policy that took them."""
        assert isinstance(rollout_buffer, PPOPlusRolloutBuffer)
        self._follow_changes()
        if not self._n_later:
            return None
        return self._evaluate(rollout_buffer.rollout().select(slice(0, self._n_later * rollout_buffer.n_envs)))

    def terminal_values(self, observations: list[Any]) -> np.ndarray:
        """Predict the values of timeouts, with the policy of that time."""
        predict = partial(self._call_as_begun, _Predicting) if self._has_changed_amid else None
        return predict_values(self.policy, observations, predict)

    def end_rollout(self) -> None:
        """Let go of the copies of the policy's parameters."""
        self._kept = {}

    def _call_as_begun(self, module_class: Callable[[ActorCriticPlusPolicy], th.nn.Module], *arguments: Any) -> Any:  # noqa: ANN401  # as the module returns
        """Call what computes with the policy on the policy as it was when the rollout began."""
        with self._begun.code_as_before():
            return functional_call(module_class(self._kept_policy), self._kept, arguments, tie_weights=False)

    @th.no_grad()
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
            if start == 0 and not self._has_changed_amid:
                graph = self._find_graph("evaluating a rollout", self._evaluating, arguments)
            if graph is not None:
                evaluation = graph(*tree_flatten(arguments)[0], *self._tensors)
            elif self._has_changed_amid:
                evaluation = self._call_as_begun(_Evaluating, *arguments)
            else:
                evaluation = self._evaluating(*arguments)
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

        inputs = [*leaves, *self._tensors]
        key = (type(module), spec, tuple(names), layout_of(inputs))
        return self._graphs.get(key, what, lambda: function, inputs)


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


class _Predicting(th.nn.Module):
    """The policy's values, in the same form."""

    def __init__(self, policy: ActorCriticPlusPolicy) -> None:
        super().__init__()
        self.policy = policy

    def forward(self, observations: PyTorchObs) -> th.Tensor:
        return self.policy.predict_values(observations)


def can_act_alone(policy: ActorCriticPolicy) -> TypeGuard[ActorCriticPlusPolicy]:
    """Whether actions, values and log-probs may be computed apart: no method of its own changes how they are made."""
    return isinstance(policy, ActorCriticPlusPolicy) and all(
        getattr(type(policy), name) is getattr(ActorCriticPlusPolicy, name) and name not in vars(policy)
        for name in METHODS_OF_ACTING
    )


def _features_are_learned(policy: ActorCriticPolicy) -> bool:
    extractors = {policy.features_extractor, policy.pi_features_extractor, policy.vf_features_extractor}
    return any(parameter.numel() for extractor in extractors for parameter in extractor.parameters())


def _exploration_matrices(policy: ActorCriticPolicy) -> list[th.Tensor]:
    distribution = policy.action_dist
    if not isinstance(distribution, StateDependentNoiseDistribution):
        return []
    return [distribution.exploration_mat.detach(), distribution.exploration_matrices.detach()]
