"""One optimiser step on a minibatch: forward, loss, backward, clipping of the gradient norm, update."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple, Self, TypeAlias

import torch as th
from stable_baselines3.common.buffers import RolloutBuffer
from stable_baselines3.common.policies import ActorCriticPolicy

from sb3_ppo_plus.attributes import PlusModel
from sb3_ppo_plus.buffers import PPOPlusRolloutBuffer
from sb3_ppo_plus.distributed.parts import Parts
from sb3_ppo_plus.rollout_batch import Minibatch, RolloutBatch
from sb3_ppo_plus.update.flat_conditions import obstacle_to_flat_steps
from sb3_ppo_plus.update.flat_parameters import FlatParameters
from sb3_ppo_plus.update.losses import METRICS, LossCoefficients, LossTerms, ppo_loss
from sb3_ppo_plus.update.parted_gradients import sum_of_parts
from sb3_ppo_plus.update.parted_rollout import PartedMinibatch
from sb3_ppo_plus.update.smoothness import Smoothness
from sb3_ppo_plus.update.symmetry import mean_of, with_mirror_loss, with_mirrored

# The numbers of a larger policy do not fit the caches. Copying its gradients takes more time than flat steps save
MAX_FLAT_ON_CPU = 2**20

AnyMinibatch: TypeAlias = Minibatch | PartedMinibatch

AMP_DTYPES = {True: th.bfloat16, "bf16": th.bfloat16, "fp16": th.float16}


def resolve_amp(amp: bool | str, device: th.device) -> th.dtype | None:
    """Translate the ``amp`` argument into the dtype of autocast; None: autocast is off.

    :param amp: False, True, "bf16" or "fp16"
    :param device: device of the policy
    :raises ValueError: for a value that is not allowed, or "fp16" on a device other than CUDA
    """
    if amp is False:
        return None
    if not isinstance(amp, (bool, str)) or amp not in AMP_DTYPES:
        raise ValueError(f"amp must be False, True, 'bf16' or 'fp16', got {amp!r}")
    if AMP_DTYPES[amp] is th.float16 and device.type != "cuda":
        raise ValueError(
            f"amp='fp16' needs a CUDA device, got device={str(device)!r}; allowed here: False, True, 'bf16'"
        )
    return AMP_DTYPES[amp]


def check_amp(model: PlusModel) -> None:
    """Check that a model can have the mixed precision that it asks for.

    :param model: the model
    :raises ValueError: see :func:`resolve_amp`; or for a rollout buffer whose log-probabilities cannot be replaced
    """
    buffer_class = model.rollout_buffer_class
    is_ours = buffer_class is not None and issubclass(buffer_class, PPOPlusRolloutBuffer)
    if resolve_amp(model.amp, model.device) is not None and not is_ours:
        raise ValueError(
            f"amp={model.amp!r} needs a rollout_buffer_class that is None or a subclass of PPOPlusRolloutBuffer, "
            f"got {buffer_class}"
        )


class Evaluation(NamedTuple):
    """What the loss needs of a policy's evaluation of a minibatch.

    :param values: value predictions, shape (batch,)
    :param log_prob: log-probabilities of the actions, shape (batch,)
    :param entropy: entropies, shape (batch,); None: there is no closed form
    :param smooth: what :meth:`Smoothness.actions` has returned; None: the objective has no such terms
    """

    values: th.Tensor
    log_prob: th.Tensor
    entropy: th.Tensor | None
    smooth: th.Tensor | None = None


@dataclass(frozen=True)
class Objective:
    """The settings of an update, for all its minibatches.

    :param coefficients: values of the loss's coefficients
    :param normalize_advantage: normalise the advantages of each minibatch
    :param pessimistic_value_clip: see :func:`sb3_ppo_plus.update.losses.value_loss`
    :param max_grad_norm: a gradient with a larger norm is scaled down to this norm
    :param kl_limit: no step is taken if approx_kl is larger; None: no limit
    :param amp_dtype: dtype of autocast for the policy's forward pass; None: no autocast. The loss is always float32
    :param symmetry_mode: what minibatches with mirror images are for, "augment" or "loss"
    :param symmetry_coef: weight of the term that "loss" adds
    :param smoothness: terms that want smooth actions; None: there are none
    """

    coefficients: LossCoefficients
    normalize_advantage: bool
    pessimistic_value_clip: bool
    max_grad_norm: float
    kl_limit: float | None
    amp_dtype: th.dtype | None
    symmetry_mode: str = "augment"
    symmetry_coef: float = 1.0
    smoothness: Smoothness | None = None

    @classmethod
    def of_update(cls, model: PlusModel, coefficients: LossCoefficients, parts: Parts) -> Self:
        """Make the objective of a model's update.

        :param model: the model
        :param coefficients: values of the loss's coefficients
        :param parts: the parts of the minibatches. Of a whole minibatch, the loss normalises the advantages itself
        """
        return cls(
            coefficients,
            normalize_advantage=model.normalize_advantage and parts.is_whole,
            pessimistic_value_clip=model.pessimistic_value_clip,
            max_grad_norm=model.max_grad_norm,
            kl_limit=None if model.target_kl is None else 1.5 * model.target_kl,
            amp_dtype=resolve_amp(model.amp, model.device),
            symmetry_mode=model.symmetry_mode,
            symmetry_coef=model.symmetry_coef,
            smoothness=Smoothness.of_model(model),
        )

    def evaluate(self, policy: ActorCriticPolicy, batch: RolloutBatch) -> Evaluation:
        """Evaluate a minibatch. Values, log-probabilities and entropies of its mirror images follow, if it has some.

        :param policy: the policy
        :param batch: the minibatch
        """
        observations, actions = with_mirrored(batch) if batch.mirrored else (batch.observations, batch.actions)
        if self.amp_dtype is None:
            values, log_prob, entropy = policy.evaluate_actions(observations, actions, **batch.context)
            return Evaluation(values.flatten(), log_prob, entropy, self._smooth(policy, batch))
        with th.autocast(batch.actions.device.type, dtype=self.amp_dtype):
            values, log_prob, entropy = policy.evaluate_actions(observations, actions, **batch.context)
            smooth = self._smooth(policy, batch)
        return Evaluation(
            values.flatten().float(), log_prob.float(), None if entropy is None else entropy.float(), smooth
        )

    def _smooth(self, policy: ActorCriticPolicy, batch: RolloutBatch) -> th.Tensor | None:
        return None if self.smoothness is None else self.smoothness.actions(policy, batch)

    def loss(
        self, batch: RolloutBatch, evaluation: Evaluation, coefficients: LossCoefficients | None = None
    ) -> LossTerms:
        """Return loss and metrics of a minibatch.

        :param batch: the minibatch
        :param evaluation: what :meth:`evaluate` returned for it
        :param coefficients: used instead of the objective's; None: the objective's
        """
        values, log_prob, entropy, smooth = evaluation
        terms = self._with_images(batch, (values, log_prob, entropy), coefficients)
        if self.smoothness is None or smooth is None:
            return terms
        return self.smoothness.add_to(terms, batch, smooth, coefficients or self.coefficients)

    def _with_images(
        self,
        batch: RolloutBatch,
        evaluation: tuple[th.Tensor, th.Tensor, th.Tensor | None],
        coefficients: LossCoefficients | None,
    ) -> LossTerms:
        if not batch.mirrored:
            return self._loss(batch, evaluation, coefficients)
        n = len(batch.actions)
        values, log_prob, entropy = evaluation
        terms = self._loss(batch, (values[:n], log_prob[:n], None if entropy is None else entropy[:n]), coefficients)
        if self.symmetry_mode == "loss":
            return with_mirror_loss(terms, batch, log_prob[:n], log_prob[n:], self.symmetry_coef)
        of_images = values[n:], log_prob[n:], None if entropy is None else entropy[n:]
        return mean_of(terms, self._loss(batch, of_images, coefficients))

    def _loss(
        self,
        batch: RolloutBatch,
        evaluation: tuple[th.Tensor, th.Tensor, th.Tensor | None],
        coefficients: LossCoefficients | None,
    ) -> LossTerms:
        values, log_prob, entropy = evaluation
        return ppo_loss(
            batch,
            values,
            log_prob,
            entropy,
            coefficients or self.coefficients,
            normalize_advantage=self.normalize_advantage,
            pessimistic_value_clip=self.pessimistic_value_clip,
        )

    def forbids_step(self, approx_kl: th.Tensor) -> bool:
        """Whether ``approx_kl`` is above the limit. It is the only value of a minibatch for which the host waits.

        :param approx_kl: 0-dim
        """
        return self.kl_limit is not None and bool(approx_kl > self.kl_limit)


@th.no_grad()
def recompute_log_prob(
    policy: ActorCriticPolicy, objective: Objective, rollout_buffer: RolloutBuffer, batch_size: int, parts: Parts
) -> None:
    """Where they would differ, compute a rollout's log-probs again in the way of the update: the first ratios are 1.

    Otherwise rounding would make them 1 +- 1e-2 under autocast. For a squashed Gaussian with a saturated mean and a
    small standard deviation they would be 1 +- 1e-3, because PyTorch rounds single rows and batches differently.

    :param policy: the policy; it is in evaluation mode afterwards
    :param objective: the objective of the update
    :param rollout_buffer: the full buffer; its log-probs are replaced, unless it is a class of the user's
    :param batch_size: transitions per minibatch
    :param parts: the parts of the minibatches
    """
    differs = getattr(getattr(policy, "action_dist", None), "log_prob_depends_on_batch_size", False)
    if not isinstance(rollout_buffer, PPOPlusRolloutBuffer) or not (differs or objective.amp_dtype is not None):
        return
    policy.set_training_mode(False)
    objective, rollout = replace(objective, smoothness=None), rollout_buffer.rollout()
    size, n_parts = parts.size_of(batch_size), parts.n_here
    in_order = [indices for part in range(n_parts) for indices in rollout_buffer.in_order(size, part, n_parts)]
    for indices in in_order:
        log_prob = objective.evaluate(policy, rollout.select(indices))[1]
        is_real = indices.flatten() >= 0
        rollout_buffer.replace_log_probs(indices.flatten()[is_real], log_prob[is_real])


class GradientStep:
    """Takes the steps of a policy's updates, on flat parameters if these give SB3's step to the bit.

    :param policy: the policy; its ``optimizer`` takes the steps
    :param grad_scaler: scales the loss and unscales the gradients under float16
    """

    def __init__(self, policy: ActorCriticPolicy, grad_scaler: th.amp.GradScaler) -> None:
        self.policy = policy
        self.grad_scaler = grad_scaler
        self._flat: FlatParameters | None = None
        self._parameters: list[th.nn.Parameter] = []
        self._obstacle_to_flat: str | None = None
        self._ran_policy = False

    def __getstate__(self) -> dict[str, Any]:
        # Copies of a model have parameters of their own, from which they make their flat ones
        return {**vars(self), "_flat": None, "_parameters": []}

    @property
    def has_gradient(self) -> list[bool] | None:
        """Whether the loss depends on each of the policy's parameters; None: not yet known, or steps are not flat."""
        return None if self._flat is None else self._flat.has_gradient

    def flatten(self, has_gradient: list[bool]) -> None:
        """Make the flat parameters before the first minibatch shows which parameters have a gradient.

        :param has_gradient: what :attr:`has_gradient` was in the training that is resumed
        """
        self._note_changes()
        if self._obstacle_to_flat is None:
            self._flat = FlatParameters(self.policy.optimizer, self._parameters, has_gradient)

    def begin_update(self) -> None:
        """Notice what a user or a load has changed since the last update, and fill the flat parameters."""
        self._note_changes()
        if self._flat is not None:
            self._flat.borrow()

    def _note_changes(self) -> None:
        self._parameters = list(self.policy.parameters())
        self._obstacle_to_flat = self._find_obstacle()
        if self._obstacle_to_flat is not None or (
            self._flat is not None and not self._flat.is_current(self.policy.optimizer, self._parameters)
        ):
            self._flat = None

    def _find_obstacle(self) -> str | None:
        """Return why steps are not flat; None: they are."""
        if self.grad_scaler.is_enabled():
            return "a GradScaler scales the loss under amp='fp16', which no graph can do; amp='bf16' needs none"
        obstacle = obstacle_to_flat_steps(self.policy, self.policy.optimizer, self._parameters)
        return obstacle or self._reason_against_flat()

    def _reason_against_flat(self) -> str | None:
        """Return why flat steps would have other bits than SB3's, or take more time; None: they do not."""
        if any(group.get("fused") for group in self.policy.optimizer.param_groups):
            return "a fused kernel rounds the end of a tensor differently from the rest"
        if not all(parameter.is_contiguous() for parameter in self._parameters):
            return "BLAS rounds by the layout of a parameter, and one is not contiguous"
        numbers = sum(parameter.numel() for parameter in self._parameters)
        if self.policy.device.type == "cpu" and numbers > MAX_FLAT_ON_CPU:
            return "the policy is larger than the caches"
        return None

    def end_update(self) -> None:
        """Leave the policy and its optimiser as separate steps would have left them."""
        if self._flat is not None:
            self._flat.give_back()

    def __call__(self, objective: Objective, minibatch: AnyMinibatch) -> tuple[th.Tensor, bool]:
        """Compute the loss of a minibatch and take a step, unless the limit of approx_kl forbids it.

        No step is taken if the loss or its gradient is not finite; the metrics then show this.

        :param objective: the objective of the update
        :param minibatch: the minibatch
        :return: the metrics, see ``losses.METRICS``, and whether the limit of approx_kl allowed the step. Otherwise the
            gradient norm is NaN
        """
        return (self._flat_step if self._obstacle_to_flat is None else self._plain_step)(objective, minibatch)

    def _plain_step(self, objective: Objective, minibatch: AnyMinibatch) -> tuple[th.Tensor, bool]:
        if isinstance(minibatch, PartedMinibatch):
            return self._plain_parted_step(objective, minibatch)
        batch = minibatch.batch()
        terms = objective.loss(batch, objective.evaluate(self.policy, batch))
        metrics = stacked(terms)
        if objective.forbids_step(terms.approx_kl):
            return _with_grad_norm(metrics, None), False
        self.policy.optimizer.zero_grad()
        self.grad_scaler.scale(terms.loss).backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
        return _with_grad_norm(metrics, self._clip_and_step(objective.max_grad_norm, terms.loss)), True

    def _plain_parted_step(self, objective: Objective, minibatch: PartedMinibatch) -> tuple[th.Tensor, bool]:
        metrics, gradients = sum_of_parts(self._parameters, minibatch, partial(self._backward, objective))
        if objective.forbids_step(metrics[METRICS.index("approx_kl")]):
            return _with_grad_norm(metrics, None), False
        for parameter, gradient in zip(self._parameters, gradients, strict=True):
            # Parts of the sum, which share no memory: a copy of a large policy's gradient would take time
            if gradient is None or gradient.stride() == parameter.stride():
                parameter.grad = gradient
            else:
                parameter.grad = th.empty_like(parameter).copy_(gradient)
        loss = metrics[METRICS.index("loss")]
        return _with_grad_norm(metrics, self._clip_and_step(objective.max_grad_norm, loss)), True

    def _backward(self, objective: Objective, minibatch: Minibatch) -> tuple[th.Tensor, Sequence[th.Tensor | None]]:
        """Return what :meth:`_differentiate` returns, computed by ``backward``, which calls hooks of parameters."""
        batch = minibatch.batch()
        terms = objective.loss(batch, objective.evaluate(self.policy, batch))
        self.policy.optimizer.zero_grad()
        self.grad_scaler.scale(terms.loss).backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
        return stacked(terms), [parameter.grad for parameter in self._parameters]

    def _clip_and_step(self, max_grad_norm: float, loss: th.Tensor) -> th.Tensor:
        optimizer = self.policy.optimizer
        self.grad_scaler.unscale_(optimizer)
        grad_norm = th.nn.utils.clip_grad_norm_(self._parameters, max_grad_norm)
        # A scaler checks the gradient itself, and lowers its scale
        if not self.grad_scaler.is_enabled() and not (grad_norm.isfinite() & loss.isfinite()):
            return grad_norm
        self.grad_scaler.step(optimizer)
        self.grad_scaler.update()
        return grad_norm

    def _flat_step(self, objective: Objective, minibatch: AnyMinibatch) -> tuple[th.Tensor, bool]:
        self._ran_policy = False
        if isinstance(minibatch, PartedMinibatch):
            metrics, gradients = sum_of_parts(self._parameters, minibatch, partial(self._differentiate, objective))
        else:
            metrics, gradients = self._differentiate(objective, minibatch)
        return self._flat_step_along(metrics, gradients, objective)

    def _flat_step_along(
        self, metrics: th.Tensor, gradients: Sequence[th.Tensor | None], objective: Objective
    ) -> tuple[th.Tensor, bool]:
        if objective.forbids_step(metrics[METRICS.index("approx_kl")]):
            return _with_grad_norm(metrics, None), False
        loss = metrics[METRICS.index("loss")]
        if not self._is_flat_for(gradients) and not self._flatten_again(gradients):
            self._set_gradients(gradients)
            return _with_grad_norm(metrics, self._clip_and_step(objective.max_grad_norm, loss)), True
        assert self._flat is not None
        with_gradient = [gradient for gradient in gradients if gradient is not None]
        return _with_grad_norm(metrics, self._flat.step(with_gradient, objective.max_grad_norm, loss)), True

    def _is_flat_for(self, gradients: Sequence[th.Tensor | None]) -> bool:
        return (
            self._flat is not None
            and self._flat.fits_gradients(gradients)
            # During an update, only a user's code that runs inside the policy can change anything
            and not (self._ran_policy and self._flat.was_touched(self.policy.optimizer))
        )

    def _flatten_again(self, gradients: Sequence[th.Tensor | None]) -> bool:
        """Build the flat parameters that a step needs; return False if that is not possible, or not any more."""
        before = self._parameters
        self.end_update()
        self._note_changes()
        has_gradient = [gradient is not None for gradient in gradients]
        has_same_parameters = [*map(id, before)] == [*map(id, self._parameters)]
        if self._obstacle_to_flat is not None or not has_same_parameters or not any(has_gradient):
            self._flat, self._parameters = None, before
            return False
        if self._flat is None or not self._flat.fits_gradients(gradients):
            self._flat = FlatParameters(self.policy.optimizer, self._parameters, has_gradient)
        self._flat.borrow()
        return True

    def _set_gradients(self, gradients: Sequence[th.Tensor | None]) -> None:
        for parameter, gradient in zip(self._parameters, gradients, strict=True):
            # In the parameter's layout, as ``backward`` would leave it
            parameter.grad = None if gradient is None else th.empty_like(parameter).copy_(gradient)

    def _differentiate(
        self, objective: Objective, minibatch: Minibatch
    ) -> tuple[th.Tensor, Sequence[th.Tensor | None]]:
        """Return the metrics without the norm, and each parameter's gradient; None: the loss does not depend on it."""
        self._ran_policy = True
        batch = minibatch.batch()
        terms = objective.loss(batch, objective.evaluate(self.policy, batch))
        trainable = [parameter for parameter in self._parameters if parameter.requires_grad]
        computed = iter(th.autograd.grad(terms.loss, trainable, allow_unused=True))
        return stacked(terms), [next(computed) if p.requires_grad else None for p in self._parameters]


def stacked(terms: LossTerms) -> th.Tensor:
    """Put the metrics of a minibatch into one tensor, without gradient.

    :param terms: the loss and its metrics
    """
    return th.stack(terms).detach()


def _with_grad_norm(metrics: th.Tensor, grad_norm: th.Tensor | None) -> th.Tensor:
    return th.cat([metrics, th.full_like(metrics[:1], th.nan) if grad_norm is None else grad_norm.reshape(1)])
