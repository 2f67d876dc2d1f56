"""Signals during training: flags that they set, and worker processes that ignore them."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from multiprocessing.util import Finalize
from types import FrameType
from typing import Any

from stable_baselines3.common.vec_env import SubprocVecEnv, VecEnv

from sb3_ppo_plus.envs.in_workers import EndsWithMain, have_effect
from sb3_ppo_plus.envs.questions import base_of


def keep_signals_from_workers(env: VecEnv) -> None:
    """Let the worker processes of a SubprocVecEnv ignore SIGINT, SIGTERM and SIGUSR1, which would end them.

    Terminals send SIGINT to all processes, and job schedulers send the others. The workers are told to notice when
    their main process has ended: forked ones hold each other's pipes open, and any may hang.

    :param env: the outermost vectorised environment
    """
    base = base_of(env)
    if not isinstance(base, SubprocVecEnv):
        return
    have_effect(base, EndsWithMain())
    for number in _handled():
        have_effect(base, _Ignore(number))
    # At the end of the program, multiprocessing sends workers SIGTERM, which they ignore, and waits for their end
    Finalize(base, _kill, [base.processes], exitpriority=0)


def _handled() -> list[signal.Signals]:
    # Windows has no SIGUSR1
    numbers = [getattr(signal, name, None) for name in ("SIGTERM", "SIGINT", "SIGUSR1")]
    return [number for number in numbers if number is not None]


@dataclass(frozen=True)
class _Ignore:
    """Makes the process that unpickles it ignore a signal."""

    number: signal.Signals

    def __reduce__(self) -> tuple[Any, ...]:
        return signal.signal, (self.number, signal.SIG_IGN)


def _kill(processes: list[BaseProcess]) -> None:
    for process in processes:
        # The id of a process that has ended may belong to another process now
        if process.is_alive():
            process.kill()


class SignalFlags:
    """Flags that signals set, in place of their usual effect. Python handles signals in the main thread only."""

    def __init__(self) -> None:
        self.stop: signal.Signals | None = None
        self._is_requested = False
        self._was_interrupted = False
        self._previous: dict[int, Any] = {}

    def install(self) -> bool:
        """Handle signals from now on, if this is the main thread.

        :return: whether the handlers are in place
        """
        self.stop, self._is_requested, self._was_interrupted = None, False, False
        if threading.current_thread() is not threading.main_thread() or self._previous:
            return False
        for number in _handled():
            # None is a handler that Python did not set and could not put back
            if signal.getsignal(number) is not None:
                self._previous[number] = signal.signal(number, self._note)
        return True

    def remove(self) -> None:
        """Put back the handlers that were there before."""
        while self._previous:
            signal.signal(*self._previous.popitem())

    def _take(self, number: int) -> None:
        """Set the flags of a signal. In a learn inside another one, such as in a callback, it is for both."""
        self._is_requested = True
        if number != getattr(signal, "SIGUSR1", None):
            self.stop = signal.Signals(number)
        outer = getattr(self._previous.get(number), "__self__", None)
        if isinstance(outer, SignalFlags):
            outer._take(number)

    def take_request(self) -> bool:
        """Whether a checkpoint was asked for since the last call."""
        is_requested, self._is_requested = self._is_requested, False
        return is_requested

    def _note(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self._was_interrupted:
            raise KeyboardInterrupt
        self._take(number)
        if number == signal.SIGINT:
            self._was_interrupted = True
            # The signal may have interrupted a print, which does not allow a second one inside
            with contextlib.suppress(OSError):
                os.write(2, b"\nStopping after this update, with a checkpoint; interrupt again to stop at once\n")
