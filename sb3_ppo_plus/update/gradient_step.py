"""One optimiser step on a minibatch: forward, loss, backward, clipping of the gradient norm, update."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch as th
from stable_baselines3.common.policies import ActorCriticPolicy

from sb3_ppo_plus.buffers import Minibatch, PPOPlusRolloutBuffer, RolloutBatch
from sb3_ppo_plus.tensor_places import tensor_places
from sb3_ppo_plus.update.flat_conditions import obstacle_to_flat_steps
from sb3_ppo_plus.update.flat_parameters import FlatParameters
from sb3_ppo_plus.update.losses import METRICS, LossCoefficients, LossTerms, ppo_loss

# Numbers in a policy beyond which they no longer fit the caches, and copying gradients costs more than flat steps gain
MAX_FLAT_ON_CPU = 2**20

AMP_DTYPES = {True: th.bfloat16, "bf16": th.bfloat16, "fp16": th.float16}


def resolve_amp(amp: bool | str, device: th.device) -> th.dtype | None:
    """Translate the ``amp`` argument into the dtype of autocast; None where it is off.

    :raises ValueError: for a value that is not allowed, or "fp16" on another device than CUDA
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


@dataclass(frozen=True)
class Objective:
    """What is the same for every minibatch of an update.

    :param coefficients: values of the loss's coefficients
    :param normalize_advantage: normalise the advantages of each minibatch
    :param pessimistic_value_clip: see :func:`sb3_ppo_plus.update.losses.value_loss`
    :param max_grad_norm: the gradient is scaled down to this norm where it is larger
    :param kl_limit: no step is taken where approx_kl exceeds this; None: no limit
    :param amp_dtype: dtype of autocast for the policy's forward pass; None: none. The loss is always float32
    """

    coefficients: LossCoefficients
    normalize_advantage: bool
    pessimistic_value_clip: bool
    max_grad_norm: float
    kl_limit: float | None
    amp_dtype: th.dtype | None

    def evaluate(self, policy: ActorCriticPolicy, batch: RolloutBatch) -> tuple[th.Tensor, th.Tensor, th.Tensor | None]:
        """Values, log-probabilities and entropies (or None) of the batch, in the precision of the update."""
        if self.amp_dtype is None:
            values, log_prob, entropy = policy.evaluate_actions(batch.observations, batch.actions, **batch.context)
            return values.flatten(), log_prob, entropy
        with th.autocast(batch.actions.device.type, dtype=self.amp_dtype):
            values, log_prob, entropy = policy.evaluate_actions(batch.observations, batch.actions, **batch.context)
        return values.flatten().float(), log_prob.float(), None if entropy is None else entropy.float()

    def loss(
        self,
        batch: RolloutBatch,
        evaluation: tuple[th.Tensor, th.Tensor, th.Tensor | None],
        coefficients: LossCoefficients | None = None,
    ) -> LossTerms:
        """Loss and metrics of a batch.

        :param evaluation: what :meth:`evaluate` returns
        :param coefficients: instead of the objective's own
        """
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
        """Whether ``approx_kl`` is beyond the limit; the only value of a minibatch for which the host waits."""
        return self.kl_limit is not None and bool(approx_kl > self.kl_limit)


@th.no_grad()
def recompute_log_prob(
    policy: ActorCriticPolicy, objective: Objective, rollout_buffer: PPOPlusRolloutBuffer, batch_size: int
) -> None:
    """Compute a rollout's log-probs anew, as the update will, so that the first ratios are 1.

    Under autocast rounding alone would make them 1 +- 1e-2, and for a squashed Gaussian with a saturated mean and a
    small standard deviation 1 +- 1e-3, since single rows and batches are rounded differently.

    :param policy: the policy, in evaluation mode
    :param objective: of the update
    :param rollout_buffer: full; its log-probs are replaced
    :param batch_size: of the update
    """
    rollout = rollout_buffer.rollout()
    for indices in rollout_buffer.in_order(batch_size):
        log_prob = objective.evaluate(policy, rollout.select(indices))[1]
        is_real = indices.flatten() >= 0
        rollout.old_log_prob[indices.flatten()[is_real]] = log_prob[is_real]


class PolicyEvaluation(th.nn.Module):
    """The policy's evaluation of a batch as a module's forward, which ``functional_call`` asks for.

    :param policy: the policy
    :param objective: of the update
    """

    def __init__(self, policy: ActorCriticPolicy, objective: Objective) -> None:
        super().__init__()
        self.policy = policy
        self.objective = objective

    def forward(self, batch: RolloutBatch) -> tuple[th.Tensor, th.Tensor, th.Tensor | None]:
        """Evaluate the batch, see :meth:`Objective.evaluate`.

        :raises RuntimeError: where the policy replaces its parameters, which a graph would not follow
        """
        before = tensor_places(self.policy)
        evaluation = self.objective.evaluate(self.policy, batch)
        replaced = [name for name, tensor in tensor_places(self.policy).items() if tensor is not before.get(name)]
        if replaced:
            raise RuntimeError(f"the policy puts a new tensor in place of its {', '.join(replaced)} in each call")
        return evaluation


class GradientStep:
    """Takes the steps of a policy's updates, on flat parameters where that is SB3's step to the bit.

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

    @property
    def has_gradient(self) -> list[bool] | None:
        """Which of the policy's parameters the loss depends on; None: unknown as yet, or the steps are not flat."""
        return None if self._flat is None else self._flat.has_gradient

    def flatten(self, has_gradient: list[bool]) -> None:
        """Step on flat parameters from the next minibatch on, without finding out :attr:`has_gradient`."""
        self._note_changes()
        if self._obstacle_to_flat is None:
            self._flat = FlatParameters(self.policy.optimizer, self._parameters, has_gradient)

    def begin_update(self) -> None:
        """Take note of whatever the user or a load has changed since the last update."""
        self._note_changes()
        if self._flat is not None:
            self._flat.borrow()

    def _note_changes(self) -> None:
        self._parameters = list(self.policy.parameters())
        self._obstacle_to_flat = self._find_obstacle()
        if self._obstacle_to_flat is not None or (
            self._flat is not None and not self._flat.fits_still(self.policy.optimizer, self._parameters)
        ):
            self._flat = None

    def _find_obstacle(self) -> str | None:
        """Why steps are not flat; None: they are."""
        if self.grad_scaler.is_enabled():
            return "a GradScaler scales the loss under amp='fp16', and no graph holds that; amp='bf16' needs none"
        obstacle = obstacle_to_flat_steps(self.policy, self.policy.optimizer, self._parameters)
        return obstacle or self._reason_against_flat()

    def _reason_against_flat(self) -> str | None:
        """Why flat steps would have other bits than SB3's, or take more time; None: neither."""
        if any(group.get("fused") for group in self.policy.optimizer.param_groups):
            return "a fused kernel rounds the end of a tensor in another way than the rest"
        if not all(parameter.is_contiguous() for parameter in self._parameters):
            return "BLAS rounds by the layout of a parameter, and one is not contiguous"
        numbers = sum(parameter.numel() for parameter in self._parameters)
        if self.policy.device.type == "cpu" and numbers > MAX_FLAT_ON_CPU:
            return "the policy is larger than the caches"
        return None

    def end_update(self) -> None:
        """Leave the policy and its optimiser as their own steps would have left them."""
        if self._flat is not None:
            self._flat.give_back()

    def __call__(self, objective: Objective, minibatch: Minibatch) -> tuple[th.Tensor, bool]:
        """Compute the loss of a minibatch and take a step, unless the limit of approx_kl forbids it.

        Nor is a step taken where the loss or its gradient is not finite, which the metrics show.

        :return: the metrics, see ``losses.METRICS``, with a gradient norm of NaN where the limit forbade the step; and
            whether it did not
        """
        return (self._flat_step if self._obstacle_to_flat is None else self._plain_step)(objective, minibatch)

    def _plain_step(self, objective: Objective, minibatch: Minibatch) -> tuple[th.Tensor, bool]:
        batch = minibatch.batch()
        terms = objective.loss(batch, objective.evaluate(self.policy, batch))
        metrics = stacked(terms)
        if objective.forbids_step(terms.approx_kl):
            return _with_grad_norm(metrics, None), False
        self.policy.optimizer.zero_grad()
        self.grad_scaler.scale(terms.loss).backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
        return _with_grad_norm(metrics, self._clip_and_step(objective.max_grad_norm, terms.loss)), True

    def _clip_and_step(self, max_grad_norm: float, loss: th.Tensor) -> th.Tensor:
        optimizer = self.policy.optimizer
        self.grad_scaler.unscale_(optimizer)
        grad_norm = th.nn.utils.clip_grad_norm_(self._parameters, max_grad_norm)
        # A scaler makes sure itself, and lowers its scale
        if not self.grad_scaler.is_enabled() and not (grad_norm.isfinite() & loss.isfinite()):
            return grad_norm
        self.grad_scaler.step(optimizer)
        self.grad_scaler.update()
        return grad_norm

    def _flat_step(self, objective: Objective, minibatch: Minibatch) -> tuple[th.Tensor, bool]:
        self._ran_policy = False
        metrics, gradients = self._differentiate(objective, minibatch)
        if objective.forbids_step(metrics[METRICS.index("approx_kl")]):
            return _with_grad_norm(metrics, None), False
        loss = metrics[METRICS.index("loss")]
        if not self._is_flat_for(gradients) and not self._flatten_anew(gradients):
            self._set_gradients(gradients)
            return _with_grad_norm(metrics, self._clip_and_step(objective.max_grad_norm, loss)), True
        assert self._flat is not None
        with_gradient = [gradient for gradient in gradients if gradient is not None]
        return _with_grad_norm(metrics, self._flat.step(with_gradient, objective.max_grad_norm, loss)), True

    def _is_flat_for(self, gradients: Sequence[th.Tensor | None]) -> bool:
        return (
            self._flat is not None
            and self._flat.fits(gradients)
            # Only code of the user's that runs within the policy changes anything amid an update
            and not (self._ran_policy and self._flat.was_touched(self.policy.optimizer))
        )

    def _flatten_anew(self, gradients: Sequence[th.Tensor | None]) -> bool:
        """Build the flat parameters that a step needs; False where that is not possible any more."""
        before = self._parameters
        self.end_update()
        self._note_changes()
        if self._obstacle_to_flat is not None or [*map(id, before)] != [*map(id, self._parameters)]:
            self._flat, self._parameters = None, before
            return False
        if self._flat is None or not self._flat.fits(gradients):
            has_gradient = [gradient is not None for gradient in gradients]
            self._flat = FlatParameters(self.policy.optimizer, self._parameters, has_gradient)
        self._flat.borrow()
        return True

    def _set_gradients(self, gradients: Sequence[th.Tensor | None]) -> None:
        for parameter, gradient in zip(self._parameters, gradients, strict=True):
            # As backward leaves them, in the parameter's layout
            parameter.grad = None if gradient is None else th.empty_like(parameter).copy_(gradient)

    def _differentiate(
        self, objective: Objective, minibatch: Minibatch
    ) -> tuple[th.Tensor, Sequence[th.Tensor | None]]:
        """Metrics but for the norm, and the gradient of each parameter; None where the loss does not depend on it."""
        self._ran_policy = True
        batch = minibatch.batch()
        terms = objective.loss(batch, objective.evaluate(self.policy, batch))
        trainable = [parameter for parameter in self._parameters if parameter.requires_grad]
        computed = iter(th.autograd.grad(terms.loss, trainable, allow_unused=True))
        return stacked(terms), [next(computed) if p.requires_grad else None for p in self._parameters]


def stacked(terms: LossTerms) -> th.Tensor:
    """Put the metrics into one tensor, without the gradient."""
    return th.stack(terms).detach()


def _with_grad_norm(metrics: th.Tensor, grad_norm: th.Tensor | None) -> th.Tensor:
    return th.cat([metrics, th.full_like(metrics[:1], th.nan) if grad_norm is None else grad_norm.reshape(1)])
