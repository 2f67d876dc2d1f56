"""The history of one update, and what is logged of it."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch as th

from sb3_ppo_plus.update.losses import METRICS


@dataclass
class UpdateHistory:
    """The metrics of an update's minibatches, which stay on their device until the update ends.

    :param metrics: metrics of every minibatch whose loss was computed, float32 of shape (len(METRICS),)
    :param epoch_starts: index in ``metrics`` of each epoch's first minibatch
    :param n_epochs_done: number of epochs that were completed
    :param was_stopped: whether ``target_kl`` forbade the step on the last minibatch
    :param is_fine: True for minibatches with finite loss and gradient, bool of shape (n_minibatches,); None: all are
    """

    metrics: list[th.Tensor] = field(default_factory=list)
    epoch_starts: list[int] = field(default_factory=list)
    n_epochs_done: int = 0
    was_stopped: bool = False
    is_fine: th.Tensor | None = None

    def begin_epoch(self) -> None:
        """Note that the next minibatches belong to a new epoch."""
        self.epoch_starts.append(len(self.metrics))

    def place_of(self, index: int) -> tuple[int, int]:
        """Return the epoch of a minibatch, and its number in this epoch; both count from 0.

        :param index: its index in ``metrics``
        """
        epoch = bisect_right(self.epoch_starts, index) - 1
        return epoch, index - self.epoch_starts[epoch]

    @cached_property
    def table(self) -> th.Tensor:
        """Metrics of all minibatches of a finished update: float64, on the CPU, shape (n_minibatches, len(METRICS))."""
        # All minibatches are copied at once. SB3 averages in float64
        return th.stack(self.metrics).double().cpu()

    def logged(self, further: Sequence[str] = ()) -> dict[str, float]:
        """Return the values to log, by SB3's names and ours: means over the minibatches.

        As in SB3, approx_kl is the mean over the last epoch, and loss is that of the last minibatch. Minibatches with a
        loss or gradient that is not finite are left out. Under float16, gradients that overflow are left out of
        grad_norm, and counted as overflowed_steps.

        :param further: metrics to log too, of those that most models do not have
        """
        table = self.table
        start, n_stepped = self.epoch_starts[-1], len(table) - self.was_stopped
        if self.is_fine is not None:
            start, n_stepped = int(self.is_fine[:start].sum()), int(self.is_fine[:n_stepped].sum())
            table = table[self.is_fine]
        counts = {"early_stopped": int(self.was_stopped), "n_epochs_done": self.n_epochs_done}
        if len(table) == start:
            return dict(counts)
        mean = dict(zip(METRICS, table.mean(dim=0).tolist(), strict=True))
        last_epoch_mean = dict(zip(METRICS, table[start:].mean(dim=0).tolist(), strict=True))
        # The minibatch that was stopped has no gradient
        grad_norms = table[:n_stepped, METRICS.index("grad_norm")]
        # Under float16, a gradient overflows where the scale is too large. Then the scaler takes no step
        n_all = len(grad_norms)
        grad_norms = grad_norms[grad_norms.isfinite()]
        if len(grad_norms) < n_all:
            counts["overflowed_steps"] = n_all - len(grad_norms)
        return {
            "entropy_loss": mean["entropy_loss"],
            "policy_gradient_loss": mean["policy_loss"],
            "value_loss": mean["value_loss"],
            "approx_kl": last_epoch_mean["approx_kl"],
            "clip_fraction": mean["clip_fraction"],
            "value_clip_fraction": mean["value_clip_fraction"],
            **{name: mean[name] for name in further},
            "loss": table[-1, METRICS.index("loss")].item(),
            **({"grad_norm": grad_norms.mean().item()} if len(grad_norms) else {}),
            **counts,
        }
