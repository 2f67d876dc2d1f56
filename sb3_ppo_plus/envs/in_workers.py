"""Code that runs in the worker processes of a SubprocVecEnv.

A worker takes SB3's commands only. It runs other code while it unpickles what comes with a command.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import pickle
import signal
import sys
import threading
import time
from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary

import gymnasium as gym
from stable_baselines3.common import monitor
from stable_baselines3.common.vec_env import SubprocVecEnv
from stable_baselines3.common.vec_env.subproc_vec_env import _worker

# In seconds: how long a worker may go on without its main process
GRACE = 2.0
# A name that no environment has
_NO_ATTRIBUTE = "sb3_ppo_plus_asks_for_the_function_that_builds_you"
_EFFECTS: WeakKeyDictionary[SubprocVecEnv, list[object]] = WeakKeyDictionary()
_is_ending_with_main = threading.Event()


def have_effect(env: SubprocVecEnv, effect: object) -> None:
    """Let all workers unpickle an object, also those that are started later in place of these.

    :param env: the vectorised environment
    :param effect: unpickling it has the effect
    """
    env.env_method("__eq__", effect)
    effects = _EFFECTS.setdefault(env, [])
    if effect not in effects:
        effects.append(effect)


def earlier_effects(env: SubprocVecEnv) -> list[tuple[str, Any]]:
    """Return the commands that let a new worker unpickle what the others have unpickled.

    :param env: the vectorised environment
    """
    return [("env_method", ("__eq__", (effect,), {})) for effect in _EFFECTS.get(env, [])]


class EndsWithMain:
    """Ends the process that unpickles it when its main process has ended, even if its environment hangs."""

    def __reduce__(self) -> tuple[Any, ...]:
        return _end_with_main, ()

    def __eq__(self, other: object) -> bool:
        return type(other) is EndsWithMain

    def __hash__(self) -> int:
        return hash(EndsWithMain)


def _end_with_main() -> None:
    main = multiprocessing.parent_process()
    if main is None or _is_ending_with_main.is_set():
        return
    _is_ending_with_main.set()

    def wait_and_end() -> None:
        main.join()
        # A worker that does not hang notices the closed pipe, and ends in order
        time.sleep(GRACE)
        os._exit(1)

    threading.Thread(target=wait_and_end, name="ends with the main process", daemon=True).start()


class SendsItsFunction:
    """Lets the worker that unpickles it send the function that built its environment; its value is a string."""

    def __reduce__(self) -> tuple[Any, ...]:
        return _send_function, ()


def _send_function() -> str:
    frame = sys._getframe()
    while frame.f_code is not _worker.__code__:
        if frame.f_back is None:
            return _NO_ATTRIBUTE
        frame = frame.f_back
    try:
        found: tuple[bytes | None, str] = pickle.dumps(frame.f_locals["env_fn_wrapper"]), ""
    except Exception as error:
        found = None, f"{type(error).__name__}: {error}"
    frame.f_locals["remote"].send(found)
    return _NO_ATTRIBUTE


def env_functions(env: SubprocVecEnv) -> list[bytes]:
    """Get the functions that built the environments. SB3 does not keep them, but each worker has its own.

    :param env: the vectorised environment
    :return: pickled ``CloudpickleWrapper`` of SB3
    :raises ValueError: if a worker is not SB3's, or its function cannot be pickled
    """
    for remote in env.remotes:
        remote.send(("has_attr", SendsItsFunction()))
    functions, problems = [], []
    for index, remote in enumerate(env.remotes):
        found = remote.recv()
        if not isinstance(found, tuple):
            problems.append(f"worker {index} does not run SB3's _worker")
            continue
        remote.recv()
        function, problem = found
        if function is None:
            problems.append(f"the function that makes environment {index} cannot be pickled: {problem}")
        functions.append(function)
    if problems:
        raise ValueError(f"restart_workers must be 0 for this SubprocVecEnv: {'; '.join(problems)}")
    return functions


class MakesItAgain:
    """Builds an environment for a new worker. Its Monitors continue the files of the worker before it.

    :param make_env: builds the environment
    """

    def __init__(self, make_env: Callable[[], gym.Env[Any, Any]]) -> None:
        self.make_env = make_env

    def __call__(self) -> gym.Env[Any, Any]:
        """Build the environment."""
        _handle_signals_as_python_does()
        write_anew = monitor.ResultsWriter.__init__

        def append(self: monitor.ResultsWriter, *args: Any, **kwargs: Any) -> None:
            write_anew(self, *args, **{**kwargs, "override_existing": False})
            if self.file_handler.tell() == 0:
                # Nobody has written a header
                self.file_handler.close()
                write_anew(self, *args, **{**kwargs, "override_existing": True})

        # Only this process has this SB3
        monitor.ResultsWriter.__init__ = append  # type: ignore[method-assign]  # put back below
        try:
            env = self.make_env()
        finally:
            monitor.ResultsWriter.__init__ = write_anew  # type: ignore[method-assign]  # put back what was there
        _continue_clocks(env)
        return env


def _handle_signals_as_python_does() -> None:
    """Remove the handlers that a fork has from its main process, which would keep SIGTERM from ending it."""
    for name in ("SIGTERM", "SIGUSR1", "SIGUSR2", "SIGHUP"):
        number = getattr(signal, name, None)
        if number is not None and callable(signal.getsignal(number)):
            signal.signal(number, signal.SIG_DFL)
    if callable(signal.getsignal(signal.SIGINT)):
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _continue_clocks(env: Any) -> None:  # noqa: ANN401  # whatever a user's function returns
    """Let Monitors count the time from the moment that their file names."""
    while isinstance(env, gym.Wrapper):
        if isinstance(env, monitor.Monitor) and env.results_writer is not None:
            with contextlib.suppress(Exception), open(env.results_writer.file_handler.name) as file:
                env.t_start = float(json.loads(file.readline().removeprefix("#"))["t_start"])
        env = env.env
