"""Acting as SB3 does, with a replay of the policy's forward pass, bit for bit."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import numpy as np
import torch as th
from stable_baselines3.common.buffers import RolloutBuffer
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.type_aliases import PyTorchObs
from torch.func import functional_call

from sb3_ppo_plus.fast.policy_changes import layout_of
from sb3_ppo_plus.fast.replays import Replays
from sb3_ppo_plus.fast.users_code import UsersCode
from sb3_ppo_plus.fast.watch import PartsWatch
from sb3_ppo_plus.policies.lean_distributions import LeanCategoricalDistribution, LeanDiagGaussianDistribution
from sb3_ppo_plus.rollout.actor import RolloutActor, leaves_of
from sb3_ppo_plus.trees import tree_flatten, tree_unflatten
from sb3_ppo_plus.update.tensor_places import tensor_places

# After more changes than this, the rest of the rollout is eager, because noting a change takes as long as a step
MAX_CHANGES = 3


class ReplayedActor(RolloutActor):
    """Chooses the actions of :class:`RolloutActor`, by replays if :func:`can_replay` allows them.

    :param policy: the policy
    :param users_code: decides whether each step looks for new methods, hooks and settings
    """

    def __init__(self, policy: ActorCriticPolicy, users_code: UsersCode | None = None) -> None:
        super().__init__(policy)
        self.users_code = users_code or UsersCode()
        self.replays = Replays(policy)
        self._names: list[str] = []
        self._tensors: list[th.Tensor] = []
        self._attributes: dict[Hashable, tuple[list[str], dict[str, Any]]] = {}
        self._layout = 0
        self._is_replayed = False
        self._n_changes = 0
        self._watch = PartsWatch(policy)

    def __reduce__(self) -> tuple[type[ReplayedActor], tuple[Any, ...]]:
        # All else belongs to one rollout and one process
        return ReplayedActor, (self.policy, self.users_code)

    @property
    def defers_timeouts(self) -> bool:
        """Whether nothing may change the policy during the rollout, see :attr:`RolloutActor.defers_timeouts`."""
        return not self.users_code.may_run

    def begin_rollout(self, rollout_buffer: RolloutBuffer | None = None) -> None:
        """Notice what has changed since the last rollout."""
        self._n_changes = 0
        self._take_note()

    def end_rollout(self) -> None:
        """Notice what has changed during the rollout."""
        if self._is_replayed:
            self.users_code.end_rollout(self._watch, self.replays)

    def _take_note(self) -> None:
        places = tensor_places(self.policy)
        # Not detached: a detached tensor would not show that a callback assigns parameter.data
        self._names, self._tensors = [*places], [*places.values()]
        self._layout = self.replays.number_of(layout_of(self._tensors))
        self.replays.refresh()
        is_lean = isinstance(self.policy.action_dist, (LeanDiagGaussianDistribution, LeanCategoricalDistribution))
        self._is_replayed = is_lean and self.replays.is_usable and self._n_changes <= MAX_CHANGES
        if self._is_replayed and self._watch.has_changed():
            self._watch = PartsWatch(self.policy)

    @th.no_grad()
    def act(
        self, observations: PyTorchObs, episode_starts: np.ndarray | None, context: dict[str, th.Tensor]
    ) -> tuple[th.Tensor, th.Tensor | None, th.Tensor | None]:
        """Choose actions, see :meth:`RolloutActor.act`."""
        if self._is_replayed and self._watch.has_changed(self.users_code.may_run):
            # A callback has changed the policy
            self._n_changes += 1
            self._take_note()
        if not self._is_replayed:
            return super().act(observations, episode_starts, context)
        leaves = [*leaves_of(observations), *context.values()]
        names = tuple(observations) if isinstance(observations, dict) else ()
        key = (names, *context, layout_of(leaves), self._layout)
        actions, values, log_probs, total, *tensors = self.replays.compute(
            key,
            [*leaves, *self._tensors],
            lambda: self._function(observations, context),
            lambda: self._eager(key, observations, context),
        )
        if not math.isfinite(total.item()):
            # This raises the error of eager mode
            self.policy.get_distribution(observations, **context)
        # Users read policy.action_dist in callbacks
        attributes, others = self._attributes[key]
        vars(self.policy.action_dist).update(zip(attributes, tensors, strict=True), **others)
        return actions, values, log_probs

    def _eager(self, key: Hashable, observations: PyTorchObs, context: dict[str, th.Tensor]) -> Sequence[th.Tensor]:
        computed = self._with_distribution(self.policy(observations, **context))
        attributes = vars(self.policy.action_dist)
        names = [name for name, value in attributes.items() if isinstance(value, th.Tensor)]
        self._attributes[key] = names, {name: attributes[name] for name in attributes.keys() - set(names)}
        return computed

    def _with_distribution(self, computed: tuple[th.Tensor, ...]) -> tuple[th.Tensor, ...]:
        distribution: Any = self.policy.action_dist
        return (*computed, distribution.total(), *(v for v in vars(distribution).values() if isinstance(v, th.Tensor)))

    def _function(
        self, observations: PyTorchObs, context: dict[str, th.Tensor]
    ) -> Callable[..., tuple[th.Tensor, ...]]:
        """Return :meth:`_eager` as a function of tensors, which is then replayed."""
        spec, names = tree_flatten((observations, context))[1], self._names

        @th.no_grad()
        def function(*inputs: th.Tensor) -> tuple[th.Tensor, ...]:
            given, given_context = tree_unflatten(inputs[: spec.num_leaves], spec)
            tensors = dict(zip(names, inputs[spec.num_leaves :], strict=True))
            computed = functional_call(self.policy, tensors, (given,), given_context, tie_weights=False)
            return self._with_distribution(computed)

        return function
