"""The connection to a worker of a SubprocVecEnv, which notices that the worker hangs or has ended."""

from __future__ import annotations

import contextlib
import math
import pickle
import select
import time
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from typing import Any, NoReturn

from stable_baselines3.common.vec_env import SubprocVecEnv

from sb3_ppo_plus.envs import workers
from sb3_ppo_plus.envs.pipe_cutter import SLICE, PipeCutter
from sb3_ppo_plus.errors import DeadWorkerError, HangingWorkerError

# In seconds: a worker that starts imports packages and builds its environment, for which worker_timeout may be short
MAX_START = 300.0
# The proof of a ResumableEnv is one command. However slow each step is, it takes about so many steps and resets
STEPS_OF_PROOF = 12


@dataclass
class Clock:
    """How long the main process has waited for the workers of one SubprocVecEnv, and how long it may.

    What stops the whole program, such as Ctrl-Z, takes one slice at most.

    :param limit: seconds in which a worker must answer; None: no limit
    :param waited: seconds so far
    :param is_start: whether workers are starting
    :param message: another tuple for each message that is being sent or read, with its worker; None: there is none
    """

    limit: float | None
    waited: float = 0.0
    is_start: bool = False
    message: tuple[WatchedRemote] | None = field(default=None, compare=False)
    _seen: tuple[WatchedRemote] | None = field(default=None, compare=False)

    def overdue(self, span: float) -> int | None:
        """Count the time of a message that is being sent or read. Another thread calls this each second.

        :param span: seconds since the last call
        :return: index of the worker whose message takes too long; None: there is none
        """
        message, before = self.message, self._seen
        self._seen = message
        if message is None or message is not before:
            return None
        self.waited += span
        (remote,) = message
        if self.limit is None or self.waited - remote.sent_at < self.limit:
            return None
        remote.is_overdue = True
        return remote.index


class MoreTime:
    """Within it, workers have more time, which does not count for others.

    :param clock: the clock of the workers
    :param is_start: whether workers are starting
    :param n_steps: how many steps and resets one command takes, each of which may take as long as the limit
    """

    def __init__(self, clock: Clock, is_start: bool, n_steps: int = 1) -> None:
        self._clock = clock
        self._before = clock.limit, clock.waited, clock.is_start
        self._is_start = is_start
        self._n_steps = n_steps

    def __enter__(self) -> None:
        clock = self._clock
        clock.is_start = self._is_start
        clock.limit = None if clock.limit is None else max(self._n_steps * clock.limit, MAX_START)

    def __exit__(self, *error: object) -> None:
        self._clock.limit, self._clock.waited, self._clock.is_start = self._before


def time_for_proof(env: object, n_steps: int = STEPS_OF_PROOF) -> AbstractContextManager[None]:
    """Return a context in which workers have the time for the proof of a ResumableEnv, or for a replay.

    :param env: the innermost vectorised environment, of any class
    :param n_steps: how many steps and resets one command takes
    """
    for remote in getattr(env, "remotes", ()):
        if isinstance(remote, WatchedRemote):
            return MoreTime(remote.clock, False, n_steps)
    return contextlib.nullcontext()


class NoAnswerError(Exception):
    """A worker does not answer.

    :param hang: how it hangs; empty: it has ended, or closed its pipe
    """

    def __init__(self, hang: str = "") -> None:
        super().__init__(hang)
        self.hang = hang


class WatchedRemote:
    """Takes the place of a ``Connection`` to a worker. What it lacks is that of the connection.

    :param env: the vectorised environment
    :param index: index of the worker
    :param clock: shared by all workers of ``env``: while the main process waits for one, it waits for all
    :param cutter: ends sending and reading that take too long; None: they take as long as they take
    """

    def __init__(self, env: SubprocVecEnv, index: int, clock: Clock, cutter: PipeCutter | None = None) -> None:
        self.env = env
        self.index = index
        self.clock = clock
        self.cutter = cutter
        self.connect(env.remotes[index])
        self.command: tuple[str, Any] = ("", None)
        self.sent_at = clock.waited

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401  # any attribute of a Connection
        return getattr(self.remote, name)

    def connect(self, remote: Connection) -> None:
        """Watch a connection and the present process of this worker.

        :param remote: the main process's end of the pipe
        """
        self.remote = remote
        self.is_overdue = False
        self._fd = remote.fileno()
        self._sentinel = self.env.processes[self.index].sentinel
        # An object of the standard library's selectors costs several times as much at each step
        self._poll = select.poll() if hasattr(select, "poll") else None
        if self._poll is not None:
            self._poll.register(self._fd, select.POLLIN)
            self._poll.register(self._sentinel, select.POLLIN)

    def send(self, message: tuple[str, Any]) -> None:
        """Send a command. If the worker has ended, or does not take it in time, :meth:`recv` notices it.

        :param message: name of the command, and what belongs to it
        """
        self.command = message
        self.sent_at = self.clock.waited
        self.clock.message = (self,)
        try:
            with contextlib.suppress(*workers.BROKEN_PIPES):
                self.remote.send(message)
        finally:
            self.clock.message = None

    def recv(self) -> Any:  # noqa: ANN401  # what a worker answers
        """Wait for the answer.

        :raises HangingWorkerError: if there is none within the time limit
        :raises DeadWorkerError: if the worker has ended
        """
        try:
            return self.receive()
        except NoAnswerError as error:
            return self.recover(error)

    def receive(self) -> Any:  # noqa: ANN401  # what a worker answers
        """Wait for the answer.

        :raises NoAnswerError: if there is none within the time limit, or the worker has ended
        """
        while not self._is_ready():
            pass
        self.clock.message = (self,)
        try:
            answer = self.remote.recv_bytes()
        except (EOFError, OSError) as error:
            raise NoAnswerError(self._no_answer() if self.is_overdue else "") from error
        finally:
            self.clock.message = None
        # As a Connection's recv. What it raises comes from the objects in the answer, and not from the pipe
        return pickle.loads(answer)

    def recover(self, error: NoAnswerError) -> Any:  # noqa: ANN401  # what a worker answers
        """Answer a command that failed; here it cannot be answered.

        :param error: what :meth:`receive` has raised
        :raises DeadWorkerError: names the worker
        """
        return self.give_up(error.hang, error)

    def give_up(self, hang: str, error: Exception) -> NoReturn:
        """End all workers.

        :param hang: how this worker hangs; empty: it has ended
        :param error: the cause of the error that is raised
        :raises HangingWorkerError: names the worker
        :raises DeadWorkerError: names the workers that have ended
        """
        try:
            if hang:
                hint = "All workers were ended. Raise worker_timeout if the environment is only slow"
                raise HangingWorkerError(f"{self.describe(hang)}{self.note()}. {hint}") from error
            raise DeadWorkerError(f"{self.describe(hang)}{self.note()}") from error
        finally:
            if hang:
                # It would not close its environment when asked to
                self.env.processes[self.index].kill()
            workers.end_workers(self.env)

    def note(self) -> str:
        """Say at the end of an error why the worker is not started anew."""
        return ""

    def describe(self, hang: str) -> str:
        """Say what is wrong with this worker.

        :param hang: how it hangs; empty: it has ended, or closed its pipe
        """
        name = workers.name_of(self.env, self.index)
        if hang:
            return f"{name} {hang}"
        process = self.env.processes[self.index]
        workers.wait_for_end(process, workers.MAX_WAIT)
        return f"{name} {'has closed its pipe' if process.exitcode is None else workers.how_it_ended(process.exitcode)}"

    def _doing(self) -> str:
        if self.clock.is_start:
            return "its start"
        name, data = self.command
        if name in ("env_method", "set_attr"):
            return f"{name} {data[0]!r}"
        return f"{name} {data!r}" if name in ("get_attr", "has_attr") else name

    def _is_ready(self) -> bool:
        """Wait for one slice of time.

        :return: whether there is an answer, or the end of the pipe
        :raises NoAnswerError: if the time is over, or the worker has ended
        """
        limit = self.clock.limit
        left = math.inf if limit is None else limit - (self.clock.waited - self.sent_at)
        # Between two slices the process is asked whether it is alive: its own children may hold its pipes open
        span = min(max(left, 0.0), SLICE)
        began = time.monotonic()
        has_answer, has_ended = self._wait(span)
        self.clock.waited += min(time.monotonic() - began, span)
        if has_answer:
            return True
        process = self.env.processes[self.index]
        if has_ended or not process.is_alive():
            workers.wait_for_end(process, workers.MAX_WAIT)
            if self.remote.poll():
                return True
            raise NoAnswerError
        if left <= span:
            raise NoAnswerError(self._no_answer())
        return False

    def _no_answer(self) -> str:
        return f"has not answered for {self.clock.limit:g} seconds, at {self._doing()}"

    def _wait(self, span: float) -> tuple[bool, bool]:
        """Wait for the pipe and the end of the process; return whether each of them is there."""
        if self._poll is None:
            ready = wait([self.remote, self._sentinel], span)
            return self.remote in ready, self._sentinel in ready
        ready_fds = [fd for fd, _ in self._poll.poll(math.ceil(1000 * span))]
        return self._fd in ready_fds, self._sentinel in ready_fds
