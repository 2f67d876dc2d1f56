"""Signals during training: what they ask for, and keeping them from worker processes."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from multiprocessing.process import BaseProcess
from multiprocessing.util import Finalize
from types import FrameType
from typing import Any

from stable_baselines3.common.vec_env import SubprocVecEnv, VecEnv

from sb3_ppo_plus.envs.questions import base_of


def keep_signals_from_workers(env: VecEnv) -> None:
    """Have the worker processes ignore SIGINT and SIGTERM, of which SB3's die.

    A terminal sends the one to all processes, job schedulers the other. Workers that were forked keep SIGTERM: without
    their main process they would not notice their end.
    """
    base = base_of(env)
    if not isinstance(base, SubprocVecEnv):
        return
    is_forked = getattr(base.processes[0], "_start_method", None) == "fork"
    for number in (signal.SIGINT,) if is_forked else (signal.SIGINT, signal.SIGTERM):
        # A worker answers commands only; the argument of this harmless one is made by signal.signal on arrival
        base.env_method("__eq__", _Ignore(number))
    if not is_forked:
        # When the program ends, multiprocessing would send them SIGTERM, and wait
        Finalize(base, _kill, [base.processes], exitpriority=0)


class _Ignore:
    def __init__(self, number: signal.Signals) -> None:
        self.number = number

    def __reduce__(self) -> tuple[Any, ...]:
        return signal.signal, (self.number, signal.SIG_IGN)


def _kill(processes: list[BaseProcess]) -> None:
    for process in processes:
        # One that has ended long ago may have left its number to another
        if process.is_alive():
            process.kill()


class SignalFlags:
    """Takes note of signals instead of what they would do, in the main thread."""

    def __init__(self) -> None:
        self.stop: signal.Signals | None = None
        self._is_requested = False
        self._was_interrupted = False
        self._previous: dict[int, Any] = {}

    def install(self) -> bool:
        """Handle signals from now on, if this is the main thread.

        :return: whether they are
        """
        self.stop, self._is_requested, self._was_interrupted = None, False, False
        if threading.current_thread() is not threading.main_thread() or self._previous:
            return False
        for name in ("SIGTERM", "SIGINT", "SIGUSR1"):
            number = getattr(signal, name, None)
            # A handler that Python does not know could not be put back
            if number is not None and signal.getsignal(number) is not None:
                self._previous[number] = signal.signal(number, self._note)
        return True

    def remove(self) -> None:
        """Put back the handlers that were there before."""
        while self._previous:
            signal.signal(*self._previous.popitem())

    def take_request(self) -> bool:
        """Whether a checkpoint was asked for since the last call."""
        is_requested, self._is_requested = self._is_requested, False
        return is_requested

    def _note(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self._was_interrupted:
            raise KeyboardInterrupt
        self._is_requested = True
        if number == getattr(signal, "SIGUSR1", None):
            return
        self.stop = signal.Signals(number)
        if number == signal.SIGINT:
            self._was_interrupted = True
            # print may not be called again while it runs
            with contextlib.suppress(OSError):
                os.write(2, b"\nStopping after this update, with a checkpoint; interrupt again to stop at once\n")
