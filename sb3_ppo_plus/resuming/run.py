"""The present ``learn`` of a model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from stable_baselines3.common.callbacks import BaseCallback, ConvertCallback
from stable_baselines3.common.logger import Logger
from stable_baselines3.common.type_aliases import MaybeCallback
from stable_baselines3.common.vec_env import VecEnv

from sb3_ppo_plus.envs.restarting_env import RestartCounter


@dataclass
class Run:
    """What lasts as long as a ``learn``, or longer only by chance.

    :param callback: all callbacks of the run; None outside one
    :param continuation: what a checkpoint holds of the run that the next ``continue_learning`` finishes
    :param restart_counter: counts restarts of the environments
    :param was_asked_to_stop: whether ``on_update_end`` of a callback has returned False
    """

    callback: BaseCallback | None = None
    continuation: dict[str, Any] | None = None
    restart_counter: RestartCounter | None = None
    was_asked_to_stop: bool = False

    def log_restarts(self, env: VecEnv, logger: Logger) -> None:
        """Record the restarts of the environments so far, where one of them can restart."""
        if self.restart_counter is None or self.restart_counter.env is not env:
            self.restart_counter = RestartCounter(env)
        n_restarts = self.restart_counter.count()
        if n_restarts is not None:
            logger.record("rollout/env_restarts", n_restarts)


def as_callbacks(callback: MaybeCallback) -> list[BaseCallback]:
    """Return what a user may give to ``learn`` as a list of callbacks."""
    given = callback if isinstance(callback, list) else [] if callback is None else [callback]
    return [one if isinstance(one, BaseCallback) else ConvertCallback(one) for one in given]
