"""What one update went through, and what is logged of it."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

import torch as th

from sb3_ppo_plus.update.losses import METRICS


@dataclass
class UpdateHistory:
    """The metrics of an update's minibatches, which stay on their device until the update is over.

    :param metrics: of every minibatch whose loss was computed, float32 of shape (len(METRICS),)
    :param last_epoch_start: index in ``metrics`` of the last epoch's first minibatch
    :param n_epochs_begun: epochs that were begun
    :param n_epochs_done: epochs that were completed
    :param was_stopped: whether ``target_kl`` forbade the step of the last minibatch
    :param is_fine: which minibatches' loss and gradient were finite, bool; None: all
    """

    metrics: list[th.Tensor] = field(default_factory=list)
    last_epoch_start: int = 0
    n_epochs_begun: int = 0
    n_epochs_done: int = 0
    was_stopped: bool = False
    is_fine: th.Tensor | None = None

    def begin_epoch(self) -> None:
        """Note that what follows belongs to another epoch."""
        self.last_epoch_start = len(self.metrics)
        self.n_epochs_begun += 1

    @cached_property
    def table(self) -> th.Tensor:
        """Metrics of all minibatches, float64 on the CPU, of shape (n_minibatches, len(METRICS)); of a whole update."""
        # One transfer for all minibatches; float64, in which SB3 averages
        return th.stack(self.metrics).double().cpu()

    def logged(self) -> dict[str, float]:
        """Values by the names under which SB3's PPO logs them, and ours: means over the minibatches.

        As in SB3, approx_kl is the mean over the last epoch, and loss is that of the last minibatch. Minibatches whose
        loss or gradient is not finite are left out.
        """
        table = self.table
        start, n_stepped = self.last_epoch_start, len(table) - self.was_stopped
        if self.is_fine is not None:
            start, n_stepped = int(self.is_fine[:start].sum()), int(self.is_fine[:n_stepped].sum())
            table = table[self.is_fine]
        counts = {"early_stopped": int(self.was_stopped), "n_epochs_done": self.n_epochs_done}
        if len(table) == start:
            return dict(counts)
        mean = dict(zip(METRICS, table.mean(dim=0).tolist(), strict=True))
        of_last_epoch = dict(zip(METRICS, table[start:].mean(dim=0).tolist(), strict=True))
        # The minibatch that was stopped has no gradient
        grad_norms = table[:n_stepped, METRICS.index("grad_norm")]
        return {
            "entropy_loss": mean["entropy_loss"],
            "policy_gradient_loss": mean["policy_loss"],
            "value_loss": mean["value_loss"],
            "approx_kl": of_last_epoch["approx_kl"],
            "clip_fraction": mean["clip_fraction"],
            "value_clip_fraction": mean["value_clip_fraction"],
            "loss": table[-1, METRICS.index("loss")].item(),
            **({"grad_norm": grad_norms.mean().item()} if len(grad_norms) else {}),
            **counts,
        }
