"""Statistics of a VecNormalize that are replaced while a model learns."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
from stable_baselines3.common.running_mean_std import RunningMeanStd
from stable_baselines3.common.vec_env import VecEnv, VecNormalize

from sb3_ppo_plus.envs.questions import wrappers_of
from sb3_ppo_plus.trees import tree_leaves, tree_map

Make = Callable[[str, RunningMeanStd], RunningMeanStd]
"""Makes statistics of the name of their attribute, "obs_rms" or "ret_rms", and of those that are there."""


class ReplacedStatistics(RunningMeanStd):
    """A running mean and variance. Copies of it, and what is pickled of it, are SB3's ``RunningMeanStd``.

    :param own: the statistics so far
    """

    def __init__(self, own: RunningMeanStd) -> None:
        self.mean, self.var, self.count = own.mean, own.var, own.count

    def __reduce__(self) -> tuple[Any, ...]:
        return RunningMeanStd, (), vars(self.copy())

    def __deepcopy__(self, memo: dict[int, Any]) -> RunningMeanStd:
        return self.copy()


class StatisticsOfSome(ReplacedStatistics):
    """A running mean and variance that takes the rows of some environments.

    :param own: the statistics so far
    :param rows: tells which rows of the next update count, bool of shape (n_envs,)
    """

    def __init__(self, own: RunningMeanStd, rows: Callable[[], np.ndarray]) -> None:
        super().__init__(own)
        self._rows = rows

    def update(self, arr: np.ndarray) -> None:
        """Take a batch of values, see :meth:`RunningMeanStd.update`.

        :param arr: shape (n_envs, ...)
        """
        counted = arr[self._rows()]
        if len(counted):
            super().update(counted)


def normalizers_of(env: VecEnv | None) -> list[VecNormalize]:
    """Return the wrappers of vectorised environments that normalise.

    :param env: the outermost one
    """
    return [wrapper for wrapper in wrappers_of(env) if isinstance(wrapper, VecNormalize)]


def statistics_of(env: VecEnv | None) -> list[RunningMeanStd]:
    """Return all statistics of an environment's normalisers, in a fixed order."""
    found: list[RunningMeanStd] = []
    for normalizer in normalizers_of(env):
        for statistics in statistics_in(normalizer).values():
            found += tree_leaves(statistics)
    return found


@contextmanager
def own_statistics(env: VecEnv) -> Iterator[None]:
    """Have SB3's own statistics in the normalisers of an environment, to copy them.

    :param env: the outermost vectorised environment
    """
    before = [(normalizer, statistics_in(normalizer)) for normalizer in normalizers_of(env)]
    _replace(env, lambda name, own: own.copy() if isinstance(own, ReplacedStatistics) else own)
    try:
        yield
    finally:
        for normalizer, statistics in before:
            vars(normalizer).update(statistics)


@contextmanager
def replaced_statistics(env: VecEnv | None, make: Make) -> Iterator[None]:
    """Replace all statistics of an environment's normalisers. Afterwards, they are copies of what is there then.

    :param env: the outermost vectorised environment
    :param make: what makes statistics of those that are there
    """
    _replace(env, make)
    try:
        yield
    finally:
        _replace(env, lambda name, own: own.copy())


def statistics_in(normalizer: VecNormalize) -> dict[str, Any]:
    """Return the attributes that hold statistics. A normaliser of rewards alone has none of observations.

    :param normalizer: the normaliser
    """
    return {name: vars(normalizer)[name] for name in ("obs_rms", "ret_rms") if name in vars(normalizer)}


def _replace(env: VecEnv | None, make: Make) -> None:
    for normalizer in normalizers_of(env):
        for name, statistics in statistics_in(normalizer).items():
            vars(normalizer)[name] = tree_map(partial(make, name), statistics)
