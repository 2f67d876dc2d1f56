"""A thread that cuts the pipes of workers from which the main process would wait for ever."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import socket
import threading
import time
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from typing import Any

from stable_baselines3.common.vec_env import SubprocVecEnv

# In seconds: how often it is asked whether a message takes too long
SLICE = 1.0


class PipeCutter:
    """Cuts the pipe of a worker that has ended, and of one whose message takes too long.

    Forked workers hold the pipes of the others open, so that nobody sees the end of a dead one. This costs a step
    nothing: the thread sleeps until a worker ends. After the cut, reading is an EOFError once all that the worker has
    sent is read, and writing a BrokenPipeError. On Windows, where pipes are no sockets, nothing is cut: a
    message of which a worker takes or gives a part only has no time limit there.

    :param env: the vectorised environment, with SB3's connections
    :param overdue: gets the seconds since the last call, at most ``SLICE``, and returns the index of a worker whose
        message takes too long, or None. None: messages take as long as they take
    """

    def __init__(self, env: SubprocVecEnv, overdue: Callable[[float], int | None] | None = None) -> None:
        self._overdue = overdue
        # Guards the processes and pipes by index
        self._lock = threading.Lock()
        self._workers: dict[int, tuple[Any, socket.socket]] = {}
        self._is_over = False
        self._alarm, self._bell = multiprocessing.Pipe(duplex=False)
        for index, remote in enumerate(env.remotes):
            self.attach(index, env.processes[index], remote)
        self._thread = threading.Thread(target=self._run, name="cuts pipes of workers", daemon=True)
        self._thread.start()

    def attach(self, index: int, process: Any, remote: Connection) -> None:  # noqa: ANN401  # SB3 gives it no type
        """Watch a worker, also in place of an earlier one.

        :param index: index of the worker
        :param process: its process
        :param remote: the main process's end of its pipe
        """
        if not hasattr(socket, "AF_UNIX"):
            return
        # A descriptor of its own: once it is closed, the number of the other one may soon belong to something else
        pipe = socket.socket(fileno=os.dup(remote.fileno()))
        with self._lock:
            before = self._workers.get(index)
            self._workers[index] = process, pipe
        if before is not None:
            before[1].close()
        self._bell.send_bytes(b"")

    def stop(self) -> None:
        """End the thread."""
        self._is_over = True
        self._bell.send_bytes(b"")
        self._thread.join()
        for _, pipe in self._workers.values():
            pipe.close()
        self._alarm.close()
        self._bell.close()

    def _run(self) -> None:
        began = time.monotonic()
        while not self._is_over:
            with self._lock:
                # Held while waiting, since a process that is collected closes its sentinel
                workers = dict(self._workers)
            ends: dict[Any, int] = {process.sentinel: index for index, (process, _) in workers.items()}
            for ready in wait([self._alarm, *ends], None if self._overdue is None else SLICE):
                if ready is self._alarm:
                    self._alarm.recv_bytes()
                else:
                    self._cut(ends[ready], workers[ends[ready]])
            if self._overdue is not None:
                now = time.monotonic()
                index = self._overdue(min(now - began, SLICE))
                began = now
                if index in workers:
                    self._cut(index, workers[index])

    def _cut(self, index: int, worker: tuple[Any, socket.socket]) -> None:
        with self._lock:
            # Not the pipe of one that was started anew meanwhile
            if self._workers.get(index) is worker:
                del self._workers[index]
                _shut_down(worker[1])


def _shut_down(pipe: socket.socket) -> None:
    # An error: the other end was closed before
    with contextlib.suppress(OSError):
        pipe.shutdown(socket.SHUT_RDWR)
    pipe.close()
