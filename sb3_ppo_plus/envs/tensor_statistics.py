"""Running means and variances of tensors, on their device."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch as th
from stable_baselines3.common.running_mean_std import RunningMeanStd

from sb3_ppo_plus.envs.replaced_statistics import ReplacedStatistics


class TensorStatistics(ReplacedStatistics):
    """A running mean and variance in tensors. Its attributes ``mean`` and ``var`` are arrays, as in SB3's class.

    Copies of it, and what is pickled of it, are SB3's ``RunningMeanStd``.

    :param own: the statistics so far
    :param device: where the tensors are
    """

    def __init__(self, own: RunningMeanStd, device: th.device) -> None:
        self._device = device
        # Apple's GPUs have no float64
        self._dtype = th.float32 if device.type == "mps" else th.float64
        super().__init__(own)

    @property
    def mean(self) -> np.ndarray:
        """The mean, as an array."""
        return self.mean_tensor.cpu().numpy().copy()

    @mean.setter
    def mean(self, value: Any) -> None:  # noqa: ANN401  # array, number or tensor
        self.mean_tensor = self._tensor(value)

    @property
    def var(self) -> np.ndarray:
        """The variance, as an array."""
        return self.var_tensor.cpu().numpy().copy()

    @var.setter
    def var(self, value: Any) -> None:  # noqa: ANN401  # array, number or tensor
        self.var_tensor = self._tensor(value)

    def _tensor(self, value: Any) -> th.Tensor:  # noqa: ANN401  # array, number or tensor
        return th.as_tensor(np.asarray(value), dtype=self._dtype).to(self._device).clone()

    def copy(self) -> RunningMeanStd:
        """Return SB3's class with the same numbers."""
        copied = RunningMeanStd(shape=tuple(self.mean_tensor.shape))
        copied.mean, copied.var, copied.count = self.mean, self.var, self.count
        return copied

    def update(self, arr: Any) -> None:  # noqa: ANN401  # tensor or array
        """Take a batch of values, see SB3's ``RunningMeanStd.update``.

        :param arr: shape (batch, ...)
        """
        batch = th.as_tensor(arr).to(self._device, self._dtype)
        var, mean = th.var_mean(batch, dim=0, correction=0)
        count, more = self.count, len(batch)
        delta = mean - self.mean_tensor
        self.mean_tensor = self.mean_tensor + delta * (more / (count + more))
        squares = self.var_tensor * count + var * more + delta.square() * (count * more / (count + more))
        self.var_tensor = squares / (count + more)
        self.count = count + more


def moments_of(statistics: RunningMeanStd, device: th.device) -> tuple[th.Tensor, th.Tensor]:
    """Return mean and variance of any statistics as tensors.

    :param statistics: ours, SB3's, or what replaces them while several processes learn
    :param device: where the tensors shall be
    """
    if isinstance(statistics, TensorStatistics):
        return statistics.mean_tensor, statistics.var_tensor
    return th.as_tensor(statistics.mean).to(device), th.as_tensor(statistics.var).to(device)


def take(statistics: RunningMeanStd, values: th.Tensor) -> None:
    """Update any statistics with a batch of values.

    :param statistics: see :func:`moments_of`
    :param values: shape (batch, ...)
    """
    statistics.update(values if isinstance(statistics, TensorStatistics) else values.cpu().numpy())  # type: ignore[arg-type]  # SB3 declares arrays
