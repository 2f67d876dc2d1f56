"""Watches the workers of SubprocVecEnvs during ``learn``."""

from __future__ import annotations

import warnings

from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.vec_env import SubprocVecEnv, VecEnv

from sb3_ppo_plus.envs.in_workers import EndsWithMain, env_functions, have_effect
from sb3_ppo_plus.envs.pipe_cutter import PipeCutter
from sb3_ppo_plus.envs.questions import base_of
from sb3_ppo_plus.envs.restarting_remote import Budget, RestartingRemote, episodes_of, known_episodes
from sb3_ppo_plus.envs.watched_remote import Clock, MoreTime, WatchedRemote
from sb3_ppo_plus.envs.workers import BROKEN_PIPES, NamingDeadWorkers, end_workers, eval_envs_of, is_forked


class WorkerWatch(NamingDeadWorkers):
    """A context in which hanging and dead workers are named; those of the training environment may be started anew.

    An evaluation with a worker that is started anew would count an episode that has not ended.

    Workers are watched if there is a time limit, if they may be started anew, or if they are forked: a fork keeps the
    pipes of the others open, so that the main process does not see their end. Without options, only the pipes of forked
    workers that have ended are cut, which takes no time at a step. Other workers are left as they are.

    :param env: the training environment; None: there is none
    :param timeout: seconds in which a worker must answer; None: no limit
    :param max_restarts: how many workers may be started anew within the context
    :param seed: where seeds of new environments come from, if ``reset`` was given none
    :param n_restarts: workers that were started anew before
    """

    def __init__(
        self, env: VecEnv | None, timeout: float | None, max_restarts: int, seed: int | None, n_restarts: int = 0
    ) -> None:
        super().__init__(self._envs_in_use)
        self._env = env
        self._callback: BaseCallback | None = None
        self._timeout = timeout
        self._seed = seed
        self._budget = Budget(max_restarts, total=n_restarts)
        self._watched: dict[SubprocVecEnv, PipeCutter] = {}
        self._is_on = False
        self._can_restart = False

    @property
    def n_restarts(self) -> int | None:
        """Workers that were started anew, those before included; None: there were none, and there can be none."""
        return self._budget.total if self._budget.total or self._can_restart else None

    def __enter__(self) -> None:
        """Watch the environment.

        :raises DeadWorkerError: if a worker does not start
        :raises ValueError: if it could not be started anew
        """
        self._is_on = True
        try:
            self._watch_all()
        except BaseException as error:
            self.__exit__(type(error), error, None)
            raise

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        """Put back SB3's connections.

        :raises DeadWorkerError: if a pipe is broken and a worker is dead
        """
        self._is_on = False
        for env in self._watched:
            env.remotes = tuple(getattr(remote, "remote", remote) for remote in env.remotes)
        try:
            super().__exit__(kind, error, trace)
        finally:
            for env, cutter in self._watched.items():
                if isinstance(error, BROKEN_PIPES) and not env.closed and not _all_are_alive(env):
                    end_workers(env)
                cutter.stop()
            self._watched.clear()
            self._env = self._callback = None

    def watch_evaluations(self, callback: BaseCallback) -> None:
        """Watch the environments on which callbacks evaluate, too.

        :param callback: the callback of ``learn``, with all callbacks inside it
        :raises DeadWorkerError: if a worker does not start
        :raises ValueError: if it could not be started anew
        """
        self._callback = callback
        if self._is_on:
            self._watch_all()
            self._warn_of_no_use()

    def _warn_of_no_use(self) -> None:
        is_asked_for = self._timeout is not None or self._budget.limit > 0
        innermost = [base_of(each) for each in self._envs_in_use() if isinstance(each, VecEnv)]
        if not is_asked_for or any(isinstance(env, SubprocVecEnv) for env in innermost):
            return
        names = dict.fromkeys(type(env).__name__ for env in innermost)
        warnings.warn(
            f"worker_timeout and restart_workers have no effect on {', '.join(names)}, only on the worker processes of "
            "a SubprocVecEnv: make_vec_env(..., vec_env_cls=SubprocVecEnv)",
            stacklevel=2,
        )

    def _envs_in_use(self) -> list[object]:
        return [self._env, *eval_envs_of(self._callback)]

    def _watch_all(self) -> None:
        for each in self._envs_in_use():
            env = base_of(each) if isinstance(each, VecEnv) else None
            if isinstance(env, SubprocVecEnv) and env not in self._watched and not _is_watched(env):
                self._watch(env)

    def _watch(self, env: SubprocVecEnv) -> None:
        # Workers that were started anew before the last checkpoint, whose episodes have to end
        is_pending = any(episode.begun is not None for episode in known_episodes(env))
        may_restart = self._budget.limit > 0 and self._env is not None and env is base_of(self._env)
        is_used = self._timeout is not None or may_restart or is_pending
        if env.closed or not (is_used or is_forked(env)):
            return
        clock = Clock(self._timeout)
        cutter = self._watched[env] = PipeCutter(env, None if self._timeout is None else clock.overdue)
        if not is_used:
            return
        indices = range(len(env.remotes))
        env.remotes = tuple(WatchedRemote(env, index, clock, cutter) for index in indices)
        with MoreTime(clock, is_start=True):
            have_effect(env, EndsWithMain())
            functions = env_functions(env) if may_restart else [b""] * len(indices) if is_pending else []
        self._can_restart = self._can_restart or may_restart
        if functions:
            episodes = episodes_of(env, self._seed)
            connections = env.remotes
            env.remotes = tuple(remote.remote for remote in connections)
            env.remotes = tuple(
                RestartingRemote(connections[index], self._budget, functions[index], episodes[index])
                for index in indices
            )


def _is_watched(env: SubprocVecEnv) -> bool:
    return any(isinstance(remote, WatchedRemote) for remote in env.remotes)


def _all_are_alive(env: SubprocVecEnv) -> bool:
    return all(process.exitcode is None for process in env.processes)
