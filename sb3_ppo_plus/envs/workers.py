"""The worker processes of a SubprocVecEnv: an error names those that have died; all are ended together.

SB3 alone raises an EOFError without a message.
"""

from __future__ import annotations

import contextlib
import signal
import time
from collections.abc import Callable, Iterable
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess

from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.vec_env import SubprocVecEnv, VecEnv

from sb3_ppo_plus.callback_hooks import iterate_callbacks
from sb3_ppo_plus.envs.questions import base_of
from sb3_ppo_plus.errors import DeadWorkerError

# What SB3 raises when a worker has closed its end of the pipe
BROKEN_PIPES = (EOFError, ConnectionError)
# In seconds: a worker closes its pipe a little before its process ends
MAX_WAIT = 2.0
# In seconds: how long all workers together may take to close their environments before they are killed
MAX_CLOSE = 1.0
# In seconds: how often a process is asked whether it has ended
POLL = 0.005


class NamingDeadWorkers:
    """A context that raises :class:`DeadWorkerError` in place of SB3's error about a broken pipe.

    A generator-based context manager would keep its frame and the error in a reference cycle, together with what was
    being sent. Python 3.12.1 crashes when it collects that cycle.

    :param envs: returns the vectorised environments in use; other objects are ignored
    """

    def __init__(self, envs: Callable[[], Iterable[object]]) -> None:
        self._envs = envs

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        """Raise the error that names the dead workers.

        :raises DeadWorkerError: if a pipe is broken and a worker of these environments is dead
        """
        if not isinstance(error, BROKEN_PIPES):
            return
        dead = dead_worker_error(self._envs())
        if dead is not None:
            try:
                raise dead from error
            finally:
                del dead


def eval_envs_of(callback: BaseCallback | None) -> list[object]:
    """Return the environments on which callbacks evaluate.

    :param callback: the callback of ``learn``, with all callbacks inside it; None: no callback
    :return: ``eval_env`` of each callback; None for a callback without one
    """
    children = [] if callback is None else iterate_callbacks(callback)
    return [getattr(child, "eval_env", None) for child in children]


def dead_worker_error(envs: Iterable[object]) -> DeadWorkerError | None:
    """Make an error that names the dead workers of some environments.

    :param envs: vectorised environments; other objects are ignored
    :return: the error to raise, or None where every worker is alive
    """
    subprocess_envs = [base_of(each) for each in envs if isinstance(each, VecEnv)]
    dead = [text for each in subprocess_envs if isinstance(each, SubprocVecEnv) for text in _dead_workers(each)]
    return DeadWorkerError("; ".join(dict.fromkeys(dead))) if dead else None


def _dead_workers(env: SubprocVecEnv) -> Iterable[str]:
    ended = wait([process.sentinel for process in env.processes], MAX_WAIT)
    for index, process in enumerate(env.processes):
        if process.sentinel in ended:
            wait_for_end(process, MAX_WAIT)
        if process.exitcode is not None:
            yield f"{name_of(env, index)} {how_it_ended(process.exitcode)}"


def name_of(env: SubprocVecEnv, index: int) -> str:
    """Name a worker for a message.

    :param env: the vectorised environment
    :param index: index of the worker
    """
    return f"worker {index} of {len(env.processes)} of the SubprocVecEnv"


def how_it_ended(code: int) -> str:
    """Say how a process has ended.

    :param code: its exit code; below 0: the signal that killed it
    """
    if code < 0:
        # Real-time signals have no names
        is_named = -code in set(signal.Signals)
        return f"was killed by {signal.Signals(-code).name if is_named else f'signal {-code}'}"
    hint = " (an exception in the environment: its traceback is above, on stderr)" if code == 1 else ""
    return f"ended with exit code {code}{hint}"


def is_forked(env: SubprocVecEnv) -> bool:
    """Whether the workers are forks of the main process, which do not notice that it has ended.

    :param env: the vectorised environment
    """
    return getattr(env.processes[0], "_start_method", None) == "fork"


def wait_for_end(process: BaseProcess, seconds: float) -> None:
    """Wait until a process has ended, but no longer than this.

    ``join`` waits without a limit for one that has closed its end of a pipe and goes on, as a worker that has called
    ``exec`` does.

    :param process: the process
    :param seconds: the limit
    """
    until = time.monotonic() + seconds
    while process.exitcode is None and time.monotonic() < until:
        time.sleep(POLL)


def end_workers(env: SubprocVecEnv) -> None:
    """End all workers, and kill those that do not close their environment at once. The environment is then closed.

    :param env: the vectorised environment
    """
    for remote in env.remotes:
        with contextlib.suppress(OSError, ValueError):
            remote.send(("close", None))
    until = time.monotonic() + MAX_CLOSE
    for process in env.processes:
        wait_for_end(process, until - time.monotonic())
        if process.is_alive():
            process.kill()
    for process in env.processes:
        wait_for_end(process, MAX_WAIT)
    for remote in env.remotes:
        remote.close()
    env.waiting, env.closed = False, True
