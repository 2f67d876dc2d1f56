"""Acting as SB3 does, the policy's forward pass replayed from a recording: bit for bit the same."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch as th
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.type_aliases import PyTorchObs
from torch.func import functional_call
from torch.utils._pytree import tree_flatten, tree_unflatten

from sb3_ppo_plus.acting import RolloutActor, leaves_of
from sb3_ppo_plus.lean_distributions import LeanCategoricalDistribution, LeanDiagGaussianDistribution
from sb3_ppo_plus.recording import Recordings
from sb3_ppo_plus.tracing import tensor_places


class RecordedActor(RolloutActor):
    """Chooses the actions of :class:`RolloutActor`, from a recording where the policy consists of well-known parts.

    :param policy: the policy
    """

    def __init__(self, policy: ActorCriticPolicy) -> None:
        super().__init__(policy)
        self.recordings = Recordings(policy)
        self._names: list[str] = []
        self._tensors: list[th.Tensor] = []
        self._shown: list[str] = []
        self._is_lean = False

    def begin_rollout(self) -> None:
        """Take note of whatever has changed since the last rollout."""
        places = tensor_places(self.policy)
        self._names, self._tensors = [*places], [tensor.detach() for tensor in places.values()]
        self._is_lean = isinstance(
            self.policy.action_dist, (LeanDiagGaussianDistribution, LeanCategoricalDistribution)
        )
        self.recordings.refresh()

    def act(
        self, observations: PyTorchObs, episode_starts: np.ndarray | None, context: dict[str, th.Tensor]
    ) -> tuple[th.Tensor, th.Tensor | None, th.Tensor | None]:
        """Choose actions, see :meth:`RolloutActor.act`."""
        if context or not (self._is_lean and self.recordings.is_possible):
            return super().act(observations, episode_starts, context)
        leaves = leaves_of(observations)
        actions, values, log_probs, total, *shown = self.recordings.compute(
            tuple((leaf.shape, leaf.dtype) for leaf in leaves),
            [*leaves, *self._tensors],
            lambda: self._function(observations),
            lambda: self._eager(observations),
        )
        if not math.isfinite(total.item()):
            # Raises what eager mode raises
            with th.no_grad():
                self.policy.get_distribution(observations)
        # Users read policy.action_dist in callbacks
        vars(self.policy.action_dist).update(zip(self._shown, shown, strict=True), _object=None)
        return actions, values, log_probs

    @th.no_grad()
    def _eager(self, observations: PyTorchObs) -> Sequence[th.Tensor]:
        return self._with_distribution(self.policy(observations))

    def _with_distribution(self, computed: tuple[th.Tensor, ...]) -> tuple[th.Tensor, ...]:
        distribution: Any = self.policy.action_dist
        tensors = {name: value for name, value in vars(distribution).items() if isinstance(value, th.Tensor)}
        self._shown = [*tensors]
        return (*computed, distribution.total(), *tensors.values())

    def _function(self, observations: PyTorchObs) -> Callable[..., tuple[th.Tensor, ...]]:
        """Return what is recorded: :meth:`_eager` as a function of tensors."""
        spec, names = tree_flatten(observations)[1], self._names

        @th.no_grad()
        def function(*inputs: th.Tensor) -> tuple[th.Tensor, ...]:
            given = tree_unflatten(inputs[: spec.num_leaves], spec)
            tensors = dict(zip(names, inputs[spec.num_leaves :], strict=True))
            return self._with_distribution(functional_call(self.policy, tensors, (given,), tie_weights=False))

        return function
