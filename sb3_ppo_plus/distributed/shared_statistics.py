"""Statistics of a VecNormalize over the environments of all processes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch as th
from stable_baselines3.common.running_mean_std import RunningMeanStd
from stable_baselines3.common.vec_env import VecEnv, VecNormalize

from sb3_ppo_plus.distributed.ranks import Ranks
from sb3_ppo_plus.envs.questions import wrappers_of


class SharedStatistics(RunningMeanStd):
    """A running mean and variance that takes what the environments of all processes give.

    Copies of it, and what is pickled of it, are SB3's ``RunningMeanStd``.

    :param own: the statistics so far, the same in all processes
    :param ranks: the processes
    :param at_each_step: take the values of all processes at each update, with the bits of one process that has all
        environments. False: take those of the others when :meth:`merge` is called
    """

    def __init__(self, own: RunningMeanStd, ranks: Ranks, *, at_each_step: bool) -> None:
        self.mean, self.var, self.count = own.mean, own.var, own.count
        self._ranks = ranks
        self._at_each_step = at_each_step
        self._begin()

    def _begin(self) -> None:
        self._before = self.copy()
        # What has come since then
        self._own_part = RunningMeanStd(epsilon=0.0, shape=np.shape(self.mean))

    def __reduce__(self) -> tuple[Any, ...]:
        return RunningMeanStd, (), vars(self.copy())

    def __deepcopy__(self, memo: dict[int, Any]) -> RunningMeanStd:
        return self.copy()

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


def normalizers_of(env: VecEnv | None) -> list[VecNormalize]:
    """Return the wrappers of vectorised environments that normalise.

    :param env: the outermost one
    """
    return [wrapper for wrapper in wrappers_of(env) if isinstance(wrapper, VecNormalize)]


def statistics_of(env: VecEnv | None) -> list[RunningMeanStd]:
    """Return all statistics of an environment's normalisers, in a fixed order."""
    found: list[RunningMeanStd] = []
    for normalizer in normalizers_of(env):
        for statistics in _statistics_in(normalizer).values():
            found += statistics.values() if isinstance(statistics, dict) else [statistics]
    return found


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
    with _replaced(env, lambda own: SharedStatistics(own, ranks, at_each_step=at_each_step)):
        yield


@contextmanager
def unshared_statistics(env: VecEnv) -> Iterator[None]:
    """Have SB3's own statistics in the normalisers of an environment, to copy them.

    :param env: the outermost vectorised environment
    """
    before = [(normalizer, _statistics_in(normalizer)) for normalizer in normalizers_of(env)]
    _replace(env, lambda own: own.copy() if isinstance(own, SharedStatistics) else own)
    try:
        yield
    finally:
        for normalizer, statistics in before:
            vars(normalizer).update(statistics)


@contextmanager
def _replaced(env: VecEnv | None, make: Callable[[RunningMeanStd], RunningMeanStd]) -> Iterator[None]:
    """Replace all statistics of an environment's normalisers. Afterwards, they are copies of what is there then."""
    _replace(env, make)
    try:
        yield
    finally:
        _replace(env, RunningMeanStd.copy)


def _statistics_in(normalizer: VecNormalize) -> dict[str, Any]:
    """Return the attributes that hold statistics. A normaliser of rewards alone has none of observations."""
    return {name: vars(normalizer)[name] for name in ("obs_rms", "ret_rms") if name in vars(normalizer)}


def _replace(env: VecEnv | None, make: Callable[[RunningMeanStd], RunningMeanStd]) -> None:
    for normalizer in normalizers_of(env):
        for name, statistics in _statistics_in(normalizer).items():
            if isinstance(statistics, dict):
                vars(normalizer)[name] = {key: make(each) for key, each in statistics.items()}
            else:
                vars(normalizer)[name] = make(statistics)
