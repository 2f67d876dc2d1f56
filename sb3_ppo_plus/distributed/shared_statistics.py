"""Statistics of a VecNormalize over the environments of all processes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch as th
from stable_baselines3.common.running_mean_std import RunningMeanStd
from stable_baselines3.common.vec_env import VecEnv

from sb3_ppo_plus.distributed.ranks import Ranks
from sb3_ppo_plus.envs.replaced_statistics import ReplacedStatistics, replaced_statistics, statistics_of


class SharedStatistics(ReplacedStatistics):
    """A running mean and variance that takes what the environments of all processes give.

    :param own: the statistics so far, the same in all processes
    :param ranks: the processes
    :param at_each_step: take the values of all processes at each update, with the bits of one process that has all
        environments. False: take those of the others when :meth:`merge` is called
    """

    def __init__(self, own: RunningMeanStd, ranks: Ranks, *, at_each_step: bool) -> None:
        super().__init__(own)
        self._ranks = ranks
        self._at_each_step = at_each_step
        self._begin()

    def _begin(self) -> None:
        self._before = self.copy()
        # What has come since then
        self._own_part = RunningMeanStd(epsilon=0.0, shape=np.shape(self.mean))

    def update(self, arr: np.ndarray) -> None:
        """Take a batch of values, see :meth:`RunningMeanStd.update`.

        :param arr: shape (n_envs of this process, ...)
        """
        if self._at_each_step:
            everywhere = self._ranks.gather(th.from_numpy(np.ascontiguousarray(arr)))
            super().update(everywhere.flatten(0, 1).numpy())
        else:
            super().update(arr)
            self._own_part.update(arr)

    def own_part(self) -> tuple[Any, ...]:
        """Return what the updates since the last :meth:`merge` have brought: mean, variance, number."""
        return self._own_part.mean, self._own_part.var, self._own_part.count

    def merge(self, parts: list[tuple[Any, ...]]) -> None:
        """Take what the updates in all processes have brought. History before them counts once.

        :param parts: the :meth:`own_part` of each process, in their order
        """
        merged = self._before
        for mean, var, count in parts:
            if count:
                merged.update_from_moments(mean, var, count)
        self.mean, self.var, self.count = merged.mean, merged.var, merged.count
        self._begin()


@contextmanager
def sharing_statistics(env: VecEnv | None, ranks: Ranks, *, at_each_step: bool) -> Iterator[None]:
    """Let the normalisers of an environment share their statistics with those of the other processes.

    They begin with the statistics of the first process.

    :param env: the outermost vectorised environment
    :param ranks: the processes
    :param at_each_step: see :class:`SharedStatistics`
    """
    if ranks.size == 1:
        yield
        return
    first = ranks.gather_objects([(each.mean, each.var, each.count) for each in statistics_of(env)], "statistics")[0]
    for own, (mean, var, count) in zip(statistics_of(env), first, strict=True):
        own.mean, own.var, own.count = mean, var, count
    with replaced_statistics(env, lambda name, own: SharedStatistics(own, ranks, at_each_step=at_each_step)):
        yield
