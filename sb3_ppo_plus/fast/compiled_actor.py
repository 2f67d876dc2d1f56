"""Acting in compiled graphs: actions alone at each step, their values and log-probabilities after the rollout."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import replace
from functools import partial
from typing import Any, Self, TypeGuard

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.buffers import RolloutBuffer
from stable_baselines3.common.distributions import Distribution, StateDependentNoiseDistribution
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.type_aliases import PyTorchObs

from sb3_ppo_plus.buffers import PPOPlusRolloutBuffer
from sb3_ppo_plus.fast.captured import Graph
from sb3_ppo_plus.fast.functional import call_with
from sb3_ppo_plus.fast.graphs import CompilationReporter, GraphCache
from sb3_ppo_plus.fast.policy_changes import (
    METHODS_OF_ACTING,
    has_known_modules,
    layout_of,
    structural_copy,
)
from sb3_ppo_plus.fast.users_code import UsersCode
from sb3_ppo_plus.fast.watch import PartsWatch
from sb3_ppo_plus.policies.actor_critic import ActorCriticPlusPolicy
from sb3_ppo_plus.rollout.actor import RolloutActor, predict_values, rows_of_chunk, values_in_chunks
from sb3_ppo_plus.rollout_batch import RolloutBatch
from sb3_ppo_plus.torch_private import versions_of
from sb3_ppo_plus.trees import tree_flatten, tree_leaves, tree_map, tree_unflatten
from sb3_ppo_plus.update.tensor_places import tensor_places

# How many observations one forward pass after a rollout takes. The activations of more do not fit the CPU's caches
EVALUATION_ROWS = 2048


class CompiledActor(RolloutActor):
    """Computes the actions at each step, and values and log-probabilities after the rollout, in compiled graphs.

    Callbacks and environments may edit the actions that the buffer stores. As in SB3, the log-probabilities are those
    of the actions that were chosen.

    Values and log-probabilities are computed at each step, together with the actions, in three cases:

    - The features extractor learns. It does most of the work, and would run twice.
    - The policy has parts that may answer differently later.
    - The rollout buffer stores observations in a type that cannot hold them.

    When a callback changes the policy during a rollout, the steps before the change are evaluated with the policy that
    took them, and the later steps are evaluated one by one. The graphs draw the random numbers that eager mode draws.
    If a graph cannot be compiled, one warning says why, and its work is done eagerly.

    :param policy: a policy for which :func:`can_act_alone` is True
    :param options: options of TorchInductor
    :param reporter: told what was compiled, or why it could not be
    :param users_code: decides whether each step looks for new methods, hooks and settings
    """

    batches_timeouts = True

    def __init__(
        self,
        policy: ActorCriticPlusPolicy,
        options: dict[str, Any],
        reporter: CompilationReporter,
        users_code: UsersCode | None = None,
    ) -> None:
        super().__init__(policy)
        self.users_code = users_code or UsersCode()
        self.policy: ActorCriticPlusPolicy = policy
        self.n_parts = 1
        """In how many parts the environments act, one after another."""
        self._options, self._reporter = options, reporter
        self._graphs = GraphCache(policy, options, reporter)
        self._watch = PartsWatch(policy)
        self._policy_at_start = policy
        self._state_at_start: Hashable = None
        self._buffer: RolloutBuffer | None = None
        self.begin_rollout()

    def __reduce__(self) -> tuple[type[Self], tuple[Any, ...]]:
        # All else belongs to one rollout, or is compiled code, which cannot be pickled
        return type(self), (self.policy, self._options, self._reporter, self.users_code)

    @property
    def n_compilations(self) -> int:
        """How many graphs were compiled."""
        return self._graphs.n_compilations

    @property
    def has_given_up(self) -> bool:
        """Whether no graph will be compiled any more."""
        return self._graphs.has_given_up

    @property
    def defers_timeouts(self) -> bool:
        """Whether a change would be noticed, see :attr:`RolloutActor.defers_timeouts`."""
        self._follow_changes()
        return self._defers

    def begin_rollout(self, rollout_buffer: RolloutBuffer | None = None) -> None:
        """Notice what has changed since the last rollout."""
        self._buffer = rollout_buffer
        # The buffer stores the array that callbacks get; so does env.step, unless the actions are clipped
        self._may_be_edited = self.users_code.may_run or not isinstance(self.policy.action_space, spaces.Box)
        # Whether values of timeouts may wait until the end. Without versions, nobody would notice a parameter that is
        # changed in place during the rollout
        self._defers = has_known_modules(self.policy) and versions_of(self.policy.parameters()) is not None
        self.leaves_evaluation = self._defers and not _features_are_learned(self.policy)
        self._has_changed = False
        self._n_later = 0
        self._chosen: list[th.Tensor] = []
        self._take_note()
        if self._is_eager:
            self._defers = self.leaves_evaluation = False
        # If a callback changes the policy, the steps before the change are evaluated with this copy
        self._watch_at_start, self._tensors_at_start = self._watch, {}
        if self._defers:
            self._tensors_at_start = {
                name: tensor.clone() for name, tensor in zip(self._names, self._tensors, strict=True)
            }
            if self._graphs.state.python != self._state_at_start:
                self._policy_at_start, self._state_at_start = structural_copy(self.policy), self._graphs.state.python

    def _take_note(self) -> None:
        self._acting = self._function_of_acting()
        places = tensor_places(self.policy)
        self._names = [*places]
        self._places = list(places.values())
        # Calls with detached tensors need no th.no_grad, which takes time
        self._tensors = [tensor.detach() for tensor in self._places]
        self._parameters = list(self.policy.parameters())
        self._graphs.refresh()
        self._is_eager = self._graphs.state.hindrance is not None or not can_act_alone(self.policy)
        self._graph: Graph | None = None
        self._layout: list[tuple[th.Size, th.dtype]] | None = None
        if self._watch.has_changed():
            self._watch = PartsWatch(self.policy)
        self._seen_addresses_and_versions = self._addresses_and_versions()

    def _function_of_acting(self) -> Callable[..., Any]:
        return _act if self.leaves_evaluation else _act_and_evaluate

    def _addresses_and_versions(self) -> list[int]:
        # Without the versions of buffers, because a policy may change its buffers itself
        return [*map(th.Tensor.data_ptr, self._places), *(versions_of(self._parameters) or ())]

    def _follow_changes(self) -> None:
        """Notice what a callback has changed since the last step."""
        if self._is_eager:
            return
        has_changed = self._addresses_and_versions() != self._seen_addresses_and_versions
        if not has_changed and self._watch.has_changed(self.users_code.may_run):
            # A callback that calls predict sets attributes and sets them back. Then the graphs still hold
            has_same_tensors = [*map(id, tensor_places(self.policy).values())] == [*map(id, self._places)]
            has_changed = not (has_same_tensors and self._graphs.is_current())
            self._watch = PartsWatch(self.policy)
        if has_changed:
            self._has_changed, self._defers, self.leaves_evaluation = True, False, False
            self._take_note()

    def act(
        self, observations: PyTorchObs, episode_starts: np.ndarray | None, context: dict[str, th.Tensor]
    ) -> tuple[th.Tensor, th.Tensor | None, th.Tensor | None]:
        """Choose actions, see :meth:`RolloutActor.act`. Values and log-probabilities may be None."""
        self._follow_changes()
        if self._is_eager:
            return super().act(observations, episode_starts, context)
        actions, *others = self._compute(observations, context)
        values, log_probs = others or (None, None)
        if self.leaves_evaluation and self._may_be_edited:
            self._chosen.append(actions.clone())
        return actions, values, log_probs

    def _compute(self, observations: PyTorchObs, context: dict[str, Any]) -> tuple[th.Tensor, ...]:
        """Return what the function of acting returns, from a graph if there is one."""
        noise = _exploration_matrices(self.policy)
        # A graph reads the memory of its inputs in the layout and type for which it was compiled
        leaves = [leaf.contiguous() for leaf in tree_leaves((observations, context, noise))]
        layout = [(leaf.shape, leaf.dtype) for leaf in leaves]
        if layout != self._layout:
            self._keep_from_narrowing(observations)
            self._graph = self._find_graph("acting", self._acting, (observations, context, noise))
            self._layout = layout
        self._n_later += self.leaves_evaluation
        computed: tuple[th.Tensor, ...]
        if self._graph is None:
            with th.no_grad():
                computed = self._acting(self.policy, observations, context, noise)
        else:
            computed = self._graph(*leaves, *self._tensors)
        return computed

    def _keep_from_narrowing(self, observations: PyTorchObs) -> None:
        """Evaluate at each step from now on, if the buffer cannot store the observations exactly."""
        buffer = self._buffer
        if self.leaves_evaluation and isinstance(buffer, PPOPlusRolloutBuffer) and buffer.narrows(observations):
            self.leaves_evaluation = False
            self._acting = _act_and_evaluate

    def terminal_value(self, observation: Any, index: int) -> th.Tensor | float | None:  # noqa: ANN401  # array or dict
        """Return None if the value can be computed after the rollout. Otherwise compute it now."""
        self._follow_changes()
        return None if self._defers else super().terminal_value(observation, index)

    def evaluate_later(self, rollout_buffer: RolloutBuffer) -> tuple[th.Tensor, th.Tensor] | None:
        """Compute values and log-probabilities with the policy that took the steps."""
        assert isinstance(rollout_buffer, PPOPlusRolloutBuffer)
        self._follow_changes()
        if not self._n_later:
            return None
        n_steps, n_envs = self._n_later // self.n_parts, rollout_buffer.n_envs
        rollout = rollout_buffer.rollout().select(slice(0, n_steps * n_envs))
        if self._chosen:
            stored = rollout.actions
            rollout = replace(rollout, actions=th.cat(self._chosen).reshape(stored.shape).to(stored.dtype))
        if self.n_parts == 1:
            return self._evaluate_rollout(rollout)
        values, log_probs = th.empty_like(rollout.old_values), th.empty_like(rollout.old_log_prob)
        rows_of_parts = th.arange(n_steps * n_envs, device=values.device).view(n_steps, self.n_parts, -1).unbind(1)
        for rows in rows_of_parts:
            values[rows.flatten()], log_probs[rows.flatten()] = self._evaluate_rollout(rollout.select(rows.flatten()))
        return values, log_probs

    def terminal_values(self, observations: list[Any], indices: list[int]) -> np.ndarray:
        """Predict the values of timeouts, with the policy that took the steps."""
        return predict_values(self.policy, observations, self._predict())

    def values_of(self, observations: PyTorchObs) -> th.Tensor:
        """Predict values with the policy that took the steps, see :meth:`RolloutActor.values_of`."""
        return values_in_chunks(observations, self._predict())

    def _predict(self) -> Callable[[PyTorchObs], th.Tensor]:
        is_other = self._has_changed
        return partial(self._call_with_policy_at_start, _predict_values) if is_other else self.policy.predict_values

    def end_rollout(self) -> None:
        """Release the copies of the policy's parameters, and notice what has changed during the rollout."""
        self._tensors_at_start, self._chosen = {}, []
        if not self._is_eager:
            self.users_code.end_rollout(self._watch, self._graphs)

    def _call_with_policy_at_start(self, function: Callable[..., Any], *arguments: Any) -> Any:  # noqa: ANN401  # as the function returns
        """Call a function with the policy as it was when the rollout began."""
        with self._watch_at_start.code_as_before():
            return call_with(self._tensors_at_start, function, self._policy_at_start, *arguments)

    @th.no_grad()
    def _evaluate_rollout(self, rollout: RolloutBatch) -> tuple[th.Tensor, th.Tensor]:
        """Compute values and log-probabilities, shape (n_transitions,), in passes that fit caches and memory."""
        n_transitions = len(rollout.actions)
        size = min(EVALUATION_ROWS, n_transitions, rows_of_chunk(rollout.observations))
        values, log_probs = th.empty_like(rollout.old_values), th.empty_like(rollout.old_log_prob)
        graph: Graph | None = None
        for start in range(0, n_transitions, size):
            # The last pass takes some rows again, so that all passes have one size and need one graph
            rows = slice(min(start, n_transitions - size), min(start, n_transitions - size) + size)
            batch = rollout.select(rows)
            arguments = (batch.observations, batch.context, batch.actions)
            if start == 0 and not self._has_changed:
                graph = self._find_graph("evaluating a rollout", _evaluate, arguments)
            if graph is not None:
                evaluation = graph(*tree_flatten(arguments)[0], *self._tensors)
            elif self._has_changed:
                evaluation = self._call_with_policy_at_start(_evaluate, *arguments)
            else:
                evaluation = _evaluate(self.policy, *arguments)
            values[rows], log_probs[rows] = evaluation
        return values, log_probs

    @th.no_grad()
    def _find_graph(self, what: str, function: Callable[..., Any], arguments: tuple[Any, ...]) -> Graph | None:
        leaves, spec = tree_flatten(tree_map(th.Tensor.contiguous, arguments))
        policy, names = self.policy, self._names

        def call(*given: th.Tensor) -> tuple[th.Tensor, ...]:
            tensors = dict(zip(names, given[len(leaves) :], strict=True))
            called: tuple[th.Tensor, ...] = call_with(
                tensors, function, policy, *tree_unflatten(given[: len(leaves)], spec)
            )
            return called

        inputs = [*leaves, *self._tensors]
        key = (function.__name__, spec, tuple(names), layout_of(inputs))
        return self._graphs.get(key, what, lambda: call, inputs)


def _act(
    policy: ActorCriticPlusPolicy, observations: PyTorchObs, context: dict[str, Any], noise: list[th.Tensor]
) -> tuple[th.Tensor, ...]:
    """Choose actions."""
    distribution = policy.get_distribution(observations, **context)
    return (stored_actions(policy, sample(distribution, noise)),)


def _act_and_evaluate(
    policy: ActorCriticPlusPolicy, observations: PyTorchObs, context: dict[str, Any], noise: list[th.Tensor]
) -> tuple[th.Tensor, ...]:
    """Choose actions, and compute their values and log-probabilities."""
    values, distribution = policy.value_and_distribution(observations, **context)
    actions = sample(distribution, noise)
    return stored_actions(policy, actions), values, distribution.log_prob(actions)


def sample(distribution: Distribution, noise: list[th.Tensor]) -> th.Tensor:
    """Draw actions from a distribution.

    :param distribution: the distribution
    :param noise: gSDE's exploration matrices, or empty
    """
    if isinstance(distribution, StateDependentNoiseDistribution):
        # Inputs of the graph, because new ones are drawn during a rollout
        distribution.exploration_mat, distribution.exploration_matrices = noise
    return distribution.get_actions()


def stored_actions(policy: ActorCriticPlusPolicy, actions: th.Tensor) -> th.Tensor:
    """Return actions in the shape in which the buffer stores them.

    :param policy: the policy
    :param actions: what the distribution has drawn
    """
    return actions.reshape(-1, *(policy.action_space.shape or ()))


def _evaluate(
    policy: ActorCriticPlusPolicy, observations: PyTorchObs, context: dict[str, th.Tensor], actions: th.Tensor
) -> tuple[th.Tensor, th.Tensor]:
    """Compute the values and log-probabilities of given actions."""
    values, distribution = policy.value_and_distribution(observations, **context)
    return values.flatten(), distribution.log_prob(actions)


def _predict_values(policy: ActorCriticPlusPolicy, observations: PyTorchObs) -> th.Tensor:
    # Looked up here, inside ``code_as_before``, so that it is the old method
    return policy.predict_values(observations)


def can_act_alone(policy: ActorCriticPolicy) -> TypeGuard[ActorCriticPlusPolicy]:
    """Whether actions, values and log-probabilities may be computed separately: no method that acts is overridden.

    :param policy: the policy
    """
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
