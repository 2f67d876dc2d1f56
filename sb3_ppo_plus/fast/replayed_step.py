"""The gradient step of eager mode, with a replay of its loss and gradients, bit for bit."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch as th
from stable_baselines3.common.policies import ActorCriticPolicy

from sb3_ppo_plus.fast.functional import call_with, evaluate_minibatch
from sb3_ppo_plus.fast.policy_changes import layout_of
from sb3_ppo_plus.fast.replays import Replays
from sb3_ppo_plus.rollout_batch import Minibatch, RolloutBatch
from sb3_ppo_plus.trees import TreeSpec, tree_flatten, tree_unflatten
from sb3_ppo_plus.update.gradient_step import GradientStep, Objective, stacked
from sb3_ppo_plus.update.losses import LossCoefficients
from sb3_ppo_plus.update.tensor_places import tensor_places, tensors_of


class _Prepared(NamedTuple):
    """What all minibatches of one update share.

    :param rollout: the rollout that the minibatches come from
    :param inputs: the replay's inputs except the indices
    :param spec: puts the inputs together again
    :param key: what ``number_of`` gives for all constants of the replay, besides the policy
    """

    rollout: RolloutBatch
    inputs: list[th.Tensor]
    spec: TreeSpec
    key: int


class ReplayedGradientStep(GradientStep):
    """Takes the steps of :class:`GradientStep`, by replays if :func:`can_replay` allows them.

    :param policy: the policy; its ``optimizer`` takes the steps
    :param grad_scaler: scales the loss and unscales the gradients under float16
    """

    def __init__(self, policy: ActorCriticPolicy, grad_scaler: th.amp.GradScaler) -> None:
        super().__init__(policy, grad_scaler)
        self.replays = Replays(policy)
        self._prepared: _Prepared | None = None

    def begin_update(self) -> None:
        """Notice what has changed since the last update."""
        super().begin_update()
        self.replays.refresh()

    def end_update(self) -> None:
        """Leave the policy and its optimiser as separate steps would have left them, and release the rollout."""
        super().end_update()
        self._prepared = None

    def _differentiate(
        self, objective: Objective, minibatch: Minibatch
    ) -> tuple[th.Tensor, Sequence[th.Tensor | None]]:
        indices = minibatch.indices
        # Padding changes the shapes of sequences. Autocast keeps casts of parameters between calls
        is_replayed = self.replays.is_usable and objective.amp_dtype is None
        if not is_replayed or self._flat is None or indices is None or indices.dim() != 1:
            return super()._differentiate(objective, minibatch)
        prepared = self._prepared
        if prepared is None or prepared.rollout is not minibatch.rollout:
            prepared = self._prepared = self._prepare(objective, minibatch.rollout)

        found: list[Sequence[th.Tensor | None]] = []

        def eager() -> list[th.Tensor]:
            metrics, gradients = GradientStep._differentiate(self, objective, minibatch)
            found.append(gradients)
            return [metrics, *(gradient for gradient in gradients if gradient is not None)]

        metrics, *computed = self.replays.compute(
            (prepared.key, indices.shape, tuple(self._flat.has_gradient)),
            [indices, *prepared.inputs],
            lambda: self._function(objective, prepared.spec),
            eager,
        )
        if found:
            # Which parameters have a gradient may be another question than which had one
            return metrics, found[-1]
        of_parameters = iter(computed)
        return metrics, [next(of_parameters) if has else None for has in self._flat.has_gradient]

    def _prepare(self, objective: Objective, rollout: RolloutBatch) -> _Prepared:
        coefficients = objective.coefficients
        # Python's numbers are float64. In float32, 1 - clip_range would be rounded twice
        ranges = {
            name: th.tensor(value, dtype=th.float64)
            for name, value in (("clip_range", coefficients.clip_range), ("clip_range_vf", coefficients.clip_range_vf))
            if value is not None
        }
        # In the loss's own dtype, because a float64 factor would change it
        factors = {
            name: th.tensor(value, dtype=th.float32)
            for name, value in coefficients._asdict().items()
            if value is not None and name not in ("clip_range", "clip_range_vf")
        }
        tensors = {name: tensor.detach() for name, tensor in tensor_places(self.policy).items()}
        inputs, spec = tree_flatten((ranges | factors, tensors, tensors_of(rollout.by_field())))
        key = (
            objective.normalize_advantage,
            objective.pessimistic_value_clip,
            objective.symmetry_mode,
            objective.symmetry_coef,
            objective.smoothness,
            coefficients.ent_coef == 0.0,
            spec,
            layout_of(inputs),
        )
        return _Prepared(rollout, inputs, spec, self.replays.number_of(key))

    def _function(self, objective: Objective, spec: TreeSpec) -> Callable[..., tuple[th.Tensor, ...]]:
        """Return :meth:`GradientStep._differentiate` as a function of tensors, which is then replayed."""
        assert self._flat is not None
        places = {id(tensor): name for name, tensor in tensor_places(self.policy).items()}
        with_gradient = [
            places[id(parameter)]
            for parameter, has in zip(self._parameters, self._flat.has_gradient, strict=True)
            if has
        ]
        has_entropy_term = objective.coefficients.ent_coef != 0.0

        def function(indices: th.Tensor, *inputs: th.Tensor) -> tuple[th.Tensor, ...]:
            scalars, tensors, rollout = tree_unflatten(inputs, spec)
            if not has_entropy_term:
                scalars = {**scalars, "ent_coef": 0.0}
            parameters = {name: tensors[name].detach().requires_grad_() for name in with_gradient}
            batch = RolloutBatch(**rollout).select(indices)
            evaluated = call_with(tensors | parameters, evaluate_minibatch, self.policy, objective, batch)
            terms = objective.loss(batch, evaluated, LossCoefficients(**{"clip_range_vf": None, **scalars}))
            gradients = th.autograd.grad(terms.loss, [parameters[name] for name in with_gradient])
            return (stacked(terms), *gradients)

        return function
