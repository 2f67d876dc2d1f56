"""The connection to a worker of a SubprocVecEnv that is started anew when it hangs or has ended."""

from __future__ import annotations

import multiprocessing
import pickle
import warnings
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
from stable_baselines3.common.vec_env import SubprocVecEnv
from stable_baselines3.common.vec_env.base_vec_env import CloudpickleWrapper
from stable_baselines3.common.vec_env.subproc_vec_env import _worker

from sb3_ppo_plus.envs import workers
from sb3_ppo_plus.envs.in_workers import MakesItAgain, earlier_effects
from sb3_ppo_plus.envs.watched_remote import MoreTime, NoAnswerError, WatchedRemote


@dataclass
class Budget:
    """How many workers may be started anew in one ``learn``.

    :param limit: the argument ``restart_workers``
    :param used: restarts in this ``learn``
    :param total: restarts of the model so far
    """

    limit: int
    used: int = 0
    total: int = 0


@dataclass
class Episode:
    """What the main process knows of a worker's episode. It is kept from one ``learn`` to the next.

    :param seeds: seeds of later environments, drawn from the last seed given to ``reset``
    :param last_observation: the last observation of the worker
    :param begun: first observation and info of a new environment, whose episode the next step begins; None: the
        episode is going on
    :param reason: why there is a new environment
    """

    seeds: np.random.Generator | None = None
    last_observation: Any = None
    begun: tuple[Any, dict[str, Any]] | None = None
    reason: str = ""


_EPISODES: WeakKeyDictionary[SubprocVecEnv, list[Episode]] = WeakKeyDictionary()


def episodes_of(env: SubprocVecEnv, seed: int | None) -> list[Episode]:
    """Return what is known of the episodes of all workers.

    :param env: the vectorised environment
    :param seed: where seeds of new environments come from if no worker has been given one yet; None: they get none
    """
    if env not in _EPISODES:
        generators = [None if seed is None else np.random.default_rng([seed, index]) for index in range(env.num_envs)]
        _EPISODES[env] = [Episode(generator) for generator in generators]
    return _EPISODES[env]


def known_episodes(env: object) -> list[Episode]:
    """Return what is known of the episodes of all workers.

    :param env: the innermost vectorised environment, of any class
    :return: empty if no worker could be started anew so far
    """
    return _EPISODES.get(env, []) if isinstance(env, SubprocVecEnv) else []


class RestartingRemote(WatchedRemote):
    """Starts the worker anew when it hangs or has ended. Its episode ends as truncated, as with ``RestartingEnv``.

    A step that fails returns the last observation before it, reward 0 and ``info["env_restarted"] = True``. Attributes
    that were set on the environment, and the statistics of a Monitor in it, begin anew.

    :param watched: what watches the worker
    :param budget: how many may be started anew
    :param function: builds the environment, as a pickled ``CloudpickleWrapper`` of SB3
    :param episode: what is known of the worker's episode
    """

    def __init__(self, watched: WatchedRemote, budget: Budget, function: bytes, episode: Episode) -> None:
        super().__init__(watched.env, watched.index, watched.clock, watched.cutter)
        self.budget = budget
        self.function = function
        self.episode = episode

    def send(self, message: tuple[str, Any]) -> None:
        """Send a command, see :meth:`WatchedRemote.send`. A new environment takes no step of the old one's episode."""
        name, data = message
        if name == "reset":
            self.episode.begun = None
            if data[0] is not None:
                self.episode.seeds = np.random.default_rng(data[0])
        elif name == "step" and self.episode.begun is not None:
            self.command = message
            return
        super().send(message)

    def recv(self) -> Any:  # noqa: ANN401  # what a worker answers
        """Wait for the answer, or make one up for a worker that was started anew.

        :raises DeadWorkerError: if too many workers were started anew
        """
        name = self.command[0]
        if name == "step" and self.episode.begun is not None:
            return self._end_of_episode()
        answer = super().recv()
        if name in ("step", "reset"):
            self.episode.last_observation = answer[0]
        return answer

    def recover(self, error: NoAnswerError) -> Any:  # noqa: ANN401  # what a worker answers
        """Start the worker anew, and answer the command that was going on.

        :param error: what :meth:`receive` has raised
        :raises DeadWorkerError: if too many workers were started anew
        :raises ValueError: if the new environment has other spaces
        """
        command, hang = self.command, error.hang
        options = command[1][1] if command[0] == "reset" else None
        while self.budget.used < self.budget.limit:
            self._count(hang)
            try:
                begun = self._start_anew(options)
            except NoAnswerError as another:
                hang = another.hang
                continue
            except BaseException:
                workers.end_workers(self.env)
                raise
            return self._answer(command, begun)
        return self.give_up(hang, error)

    def _count(self, hang: str) -> None:
        budget, self.episode.reason = self.budget, self.describe(hang)
        budget.used += 1
        budget.total += 1
        warnings.warn(
            f"{self.episode.reason}: it is started anew, for restart {budget.used} of restart_workers={budget.limit}",
            stacklevel=2,
        )

    def _start_anew(self, options: dict[str, Any] | None) -> tuple[Any, dict[str, Any]]:
        """Replace the process, and return what the ``reset`` of its environment returns.

        :raises NoAnswerError: if the new worker hangs or has ended
        """
        env, old = self.env, self.env.processes[self.index]
        old.kill()
        workers.wait_for_end(old, workers.MAX_WAIT)
        self.remote.close()
        make_env = CloudpickleWrapper(MakesItAgain(pickle.loads(self.function).var))
        remote, work_remote = multiprocessing.Pipe()
        # The same start method as before
        process = type(old)(target=_worker, args=(work_remote, remote, make_env), daemon=True)
        process.start()
        work_remote.close()
        env.processes[self.index] = process
        if self.cutter is not None:
            self.cutter.attach(self.index, process, remote)
        self.connect(remote)
        with MoreTime(self.clock, is_start=True):
            spaces = self._ask("get_spaces", None)
            for effect in earlier_effects(env):
                self._ask(*effect)
        if spaces != (env.observation_space, env.action_space):
            raise ValueError(f"the new environment of {workers.name_of(env, self.index)} has other spaces: {spaces}")
        seed = None if self.episode.seeds is None else int(self.episode.seeds.integers(2**31))
        begun: tuple[Any, dict[str, Any]] = self._ask("reset", (seed, options))
        return begun

    def _ask(self, name: str, data: Any) -> Any:  # noqa: ANN401  # of any command
        super().send((name, data))
        return self.receive()

    def _answer(self, command: tuple[str, Any], begun: tuple[Any, dict[str, Any]]) -> Any:  # noqa: ANN401  # what a worker answers
        observation, info = begun
        if command[0] == "reset":
            return observation, {**info, "env_restarted": True}
        self.episode.begun = begun
        if command[0] == "step":
            return self._end_of_episode()
        super().send(command)
        return super().recv()

    def _end_of_episode(self) -> tuple[Any, float, bool, dict[str, Any], dict[str, Any]]:
        """Answer a step as SB3's worker does where an episode ends and the next one begins."""
        episode = self.episode
        assert episode.begun is not None
        (observation, reset_info), episode.begun = episode.begun, None
        last = observation if episode.last_observation is None else episode.last_observation
        info = {"TimeLimit.truncated": True, "terminal_observation": last}
        info |= {"env_restarted": True, "env_error": episode.reason}
        episode.last_observation = observation
        return observation, 0.0, True, info, reset_info

    def note(self) -> str:
        """Say at the end of an error why the worker is not started anew."""
        if self.budget.limit == 0:
            return ""
        return f"; restart_workers={self.budget.limit}, and as many workers were started anew before"
