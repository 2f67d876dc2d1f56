"""One optimiser step on a minibatch: forward, loss, backward, clipping of the gradient norm, update."""

from __future__ import annotations

import torch as th
from stable_baselines3.common.policies import ActorCriticPolicy

from sb3_ppo_plus.buffers import RolloutBatch
from sb3_ppo_plus.losses import LossCoefficients, LossTerms, ppo_loss

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


class GradientStep:
    """The steps of one update: everything that stays the same from minibatch to minibatch.

    :param policy: the policy; its ``optimizer`` takes the steps
    :param coefficients: values of the loss's coefficients in this update
    :param normalize_advantage: normalise the advantages of each minibatch
    :param pessimistic_value_clip: see :func:`sb3_ppo_plus.losses.value_loss`
    :param max_grad_norm: the gradient is scaled down to this norm where it is larger
    :param amp_dtype: dtype of autocast for the policy's forward pass; None: none. The loss is always float32
    :param grad_scaler: scales the loss and unscales the gradients of float16
    """

    def __init__(
        self,
        policy: ActorCriticPolicy,
        coefficients: LossCoefficients,
        *,
        normalize_advantage: bool,
        pessimistic_value_clip: bool,
        max_grad_norm: float,
        amp_dtype: th.dtype | None,
        grad_scaler: th.amp.GradScaler,
    ) -> None:
        self.policy = policy
        self.coefficients = coefficients
        self.normalize_advantage = normalize_advantage
        self.pessimistic_value_clip = pessimistic_value_clip
        self.max_grad_norm = max_grad_norm
        self.amp_dtype = amp_dtype
        self.grad_scaler = grad_scaler

    def evaluate(self, batch: RolloutBatch) -> tuple[th.Tensor, th.Tensor, th.Tensor | None]:
        """Values, log-probabilities and entropies (or None) of the batch, in the precision of the update."""
        with th.autocast(batch.actions.device.type, dtype=self.amp_dtype, enabled=self.amp_dtype is not None):
            values, log_prob, entropy = self.policy.evaluate_actions(batch.observations, batch.actions, **batch.context)
        return values.flatten().float(), log_prob.float(), None if entropy is None else entropy.float()

    def loss(self, batch: RolloutBatch) -> LossTerms:
        """Forward pass: the loss of ``batch`` and its metrics."""
        return ppo_loss(
            batch,
            *self.evaluate(batch),
            self.coefficients,
            normalize_advantage=self.normalize_advantage,
            pessimistic_value_clip=self.pessimistic_value_clip,
        )

    def step(self, loss: th.Tensor) -> th.Tensor:
        """Backward pass and update.

        :param loss: loss of the minibatch
        :return: norm of the gradient before clipping
        """
        optimizer = self.policy.optimizer
        optimizer.zero_grad()
        self.grad_scaler.scale(loss).backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
        self.grad_scaler.unscale_(optimizer)
        grad_norm = th.nn.utils.clip_grad_norm_(self.policy.parameters(), self.max_grad_norm)
        self.grad_scaler.step(optimizer)
        self.grad_scaler.update()
        return grad_norm
