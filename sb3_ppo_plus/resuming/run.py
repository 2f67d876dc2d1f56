"""The current ``learn`` of a model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from stable_baselines3.common.callbacks import BaseCallback, ConvertCallback
from stable_baselines3.common.logger import Logger
from stable_baselines3.common.type_aliases import MaybeCallback
from stable_baselines3.common.vec_env import VecEnv

from sb3_ppo_plus.attributes import PlusModel
from sb3_ppo_plus.callback_hooks import iterate_callbacks, notify_learn_end
from sb3_ppo_plus.distributed import first_rank
from sb3_ppo_plus.envs.fill_missing_keys import refuse_missing_keys
from sb3_ppo_plus.envs.restarting_env import RestartCounter
from sb3_ppo_plus.envs.worker_watch import WorkerWatch


@dataclass
class Run:
    """What belongs to one ``learn`` and is not saved with the model.

    :param callback: the callback that holds all others; None outside ``learn``
    :param continuation: state from a checkpoint, which the next ``continue_learning`` puts back
    :param restart_counter: counts restarts of the environments
    :param watch: watches the workers of the environments
    :param was_asked_to_stop: whether ``on_update_end`` of a callback has returned False
    """

    callback: BaseCallback | None = None
    continuation: dict[str, Any] | None = None
    restart_counter: RestartCounter | None = None
    watch: WorkerWatch = field(default_factory=lambda: WorkerWatch(None, None, 0, None))
    was_asked_to_stop: bool = False

    def watching_workers(self, model: PlusModel) -> WorkerWatch:
        """Return a context in which hanging and dead workers of the training environment are named, or started anew.

        :param model: the model; ``worker_timeout`` and ``restart_workers`` say what is done
        """
        n_restarts = self.watch.n_restarts or 0
        self.watch = WorkerWatch(model.env, model.worker_timeout, model.restart_workers, model.seed, n_restarts)
        return self.watch

    def begin(self, model: PlusModel, callback: BaseCallback) -> None:
        """Check that the environments are for training, and watch the workers of evaluations.

        :param model: the model, whose environments were reset
        :param callback: the callback that holds all others
        :raises ValueError: for environments that lack what the critic sees
        """
        if getattr(model.policy, "head_keys", None) is not None:
            refuse_missing_keys(model.env)
        self.watch.watch_evaluations(callback)

    def end(self, afterwards: Callable[[BaseCallback], None]) -> None:
        """Call ``on_learn_end`` of the callbacks, which then belong to no run any more.

        :param afterwards: what to do with the callback that holds all others, at last
        """
        callback, self.callback = self.callback, None
        if callback is not None:
            first_rank.take_work_back(callback)
            notify_learn_end(callback, lambda: afterwards(callback))

    def wait_for_checkpoints(self) -> None:
        """Wait until ``last_checkpoint`` is the last one: callbacks may be writing one in the background."""
        for child in iterate_callbacks(self.callback) if self.callback is not None else ():
            if hasattr(child, "wait_for_checkpoint"):
                child.wait_for_checkpoint()

    def log_restarts(self, env: VecEnv, logger: Logger) -> None:
        """Log the number of restarts so far, of environments and of workers, if any can restart.

        :param env: the training environment
        :param logger: the model's logger
        """
        if self.restart_counter is None or self.restart_counter.env is not env:
            self.restart_counter = RestartCounter(env)
        counts = self.restart_counter.count(), self.watch.n_restarts
        known = [count for count in counts if count is not None]
        if known:
            logger.record("rollout/env_restarts", sum(known))


def as_callbacks(callback: MaybeCallback) -> list[BaseCallback]:
    """Turn the argument ``callback`` of ``learn`` into a list.

    :param callback: None, a callback, a function, or a list of callbacks
    """
    if callback is None:
        return []
    given = callback if isinstance(callback, list) else [callback]
    return [one if isinstance(one, BaseCallback) else ConvertCallback(one) for one in given]
