"""The gradient step of eager mode, its loss and gradients replayed from a recording: bit for bit the same."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import NamedTuple

import torch as th
from stable_baselines3.common.policies import ActorCriticPolicy
from torch.func import functional_call

from sb3_ppo_plus.buffers import Minibatch, RolloutBatch
from sb3_ppo_plus.fast.policy_changes import layout_of
from sb3_ppo_plus.fast.replays import Recordings
from sb3_ppo_plus.trees import TreeSpec, tree_flatten, tree_unflatten
from sb3_ppo_plus.update.gradient_step import GradientStep, Objective, PolicyEvaluation, stacked
from sb3_ppo_plus.update.losses import LossCoefficients
from sb3_ppo_plus.update.tensor_places import tensor_places, tensors_of


class _Prepared(NamedTuple):
    """What stays the same for the minibatches of one update."""

    rollout: RolloutBatch
    inputs: list[th.Tensor]
    spec: TreeSpec
    key: Hashable


class RecordedGradientStep(GradientStep):
    """Takes the steps of :class:`GradientStep`, from a recording where the policy consists of well-known parts.

    :param policy: the policy; its ``optimizer`` takes the steps
    :param grad_scaler: scales the loss and unscales the gradients under float16
    """

    def __init__(self, policy: ActorCriticPolicy, grad_scaler: th.amp.GradScaler) -> None:
        super().__init__(policy, grad_scaler)
        self.recordings = Recordings(policy)
        self._prepared: _Prepared | None = None

    def begin_update(self) -> None:
        """Take note of whatever has changed since the last update."""
        super().begin_update()
        self.recordings.refresh()

    def end_update(self) -> None:
        """Leave the policy's optimiser with the state that its own steps would have, and let go of the rollout."""
        super().end_update()
        self._prepared = None

    def _differentiate(
        self, objective: Objective, minibatch: Minibatch
    ) -> tuple[th.Tensor, Sequence[th.Tensor | None]]:
        indices = minibatch.indices
        # Padded sequences have other shapes; autocast keeps casts of parameters from call to call
        is_recorded = self.recordings.is_possible and objective.amp_dtype is None
        if not is_recorded or self._flat is None or indices is None or indices.dim() != 1:
            return super()._differentiate(objective, minibatch)
        prepared = self._prepared
        if prepared is None or prepared.rollout is not minibatch.rollout:
            prepared = self._prepared = self._prepare(objective, minibatch.rollout)

        def eager() -> list[th.Tensor]:
            metrics, gradients = GradientStep._differentiate(self, objective, minibatch)
            return [metrics, *(gradient for gradient in gradients if gradient is not None)]

        computed = iter(
            self.recordings.compute(
                (prepared.key, indices.shape, tuple(self._flat.has_gradient)),
                [indices, *prepared.inputs],
                lambda: self._function(objective, prepared.spec),
                eager,
            )
        )
        return next(computed), [next(computed) if has else None for has in self._flat.has_gradient]

    def _prepare(self, objective: Objective, rollout: RolloutBatch) -> _Prepared:
        coefficients = objective.coefficients
        # Double, as Python's numbers, so that 1 - clip_range is rounded once
        ranges = {
            name: th.tensor(value, dtype=th.float64)
            for name, value in (("clip_range", coefficients.clip_range), ("clip_range_vf", coefficients.clip_range_vf))
            if value is not None
        }
        # Of the loss's own type, which they are not to change
        factors = {
            name: th.tensor(value, dtype=th.float32)
            for name, value in (("ent_coef", coefficients.ent_coef), ("vf_coef", coefficients.vf_coef))
        }
        tensors = {name: tensor.detach() for name, tensor in tensor_places(self.policy).items()}
        inputs, spec = tree_flatten((ranges | factors, tensors, tensors_of(rollout.by_field())))
        key = (
            objective.normalize_advantage,
            objective.pessimistic_value_clip,
            coefficients.ent_coef == 0.0,
            spec,
            layout_of(inputs),
        )
        return _Prepared(rollout, inputs, spec, key)

    def _function(self, objective: Objective, spec: TreeSpec) -> Callable[..., tuple[th.Tensor, ...]]:
        """Return what is recorded: :meth:`GradientStep._differentiate` as a function of tensors."""
        assert self._flat is not None
        places = {id(tensor): name for name, tensor in tensor_places(self.policy).items()}
        with_gradient = [
            places[id(parameter)]
            for parameter, has in zip(self._parameters, self._flat.has_gradient, strict=True)
            if has
        ]
        evaluation = PolicyEvaluation(self.policy, objective)
        has_entropy_term = objective.coefficients.ent_coef != 0.0

        def function(indices: th.Tensor, *inputs: th.Tensor) -> tuple[th.Tensor, ...]:
            scalars, tensors, rollout = tree_unflatten(inputs, spec)
            if not has_entropy_term:
                scalars = {**scalars, "ent_coef": 0.0}
            parameters = {name: tensors[name].detach().requires_grad_() for name in with_gradient}
            places = {f"policy.{name}": tensor for name, tensor in (tensors | parameters).items()}
            batch = RolloutBatch(**rollout).select(indices)
            evaluated = functional_call(evaluation, places, (batch,), tie_weights=False)
            terms = objective.loss(batch, evaluated, LossCoefficients(**{"clip_range_vf": None, **scalars}))
            gradients = th.autograd.grad(terms.loss, [parameters[name] for name in with_gradient])
            return (stacked(terms), *gradients)

        return function
