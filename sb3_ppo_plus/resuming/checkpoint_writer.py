"""Writes the checkpoints of one run: in the background or at once, one after the other, and removes old ones."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from sb3_ppo_plus.resuming.checkpoint_directory import write_checkpoint
from sb3_ppo_plus.resuming.directory_lock import DirectoryLock
from sb3_ppo_plus.resuming.retention import Retention
from sb3_ppo_plus.resuming.training_state import Snapshot


class CheckpointWriter:
    """Writes snapshots into a directory that it keeps locked. At most one is being written at a time.

    Its thread is no daemon: a program that ends first waits for the checkpoint that is being written.

    :param save_path: directory of the checkpoints
    :param keep_last: see :class:`Retention`
    :param keep_best: see :class:`Retention`
    :param when_written: gets the directory of each checkpoint when it is on the disk; the background thread calls it
    """

    def __init__(self, save_path: Path, keep_last: int, keep_best: int, when_written: Callable[[Path], None]) -> None:
        # Absolute: the program may change its working directory meanwhile
        self.save_path = save_path.absolute()
        self._when_written = when_written
        self._lock = DirectoryLock(self.save_path)
        self._retention = Retention(keep_last, keep_best)
        self._executor: ThreadPoolExecutor | None = None
        self._in_flight: Future[Path] | None = None
        self._refused: list[str] = []

    def __getstate__(self) -> dict[str, Any]:
        # A user's function in the model may refer to this object, and is saved with the model
        return {**vars(self), "_lock": DirectoryLock(self.save_path), "_executor": None, "_in_flight": None}

    def open(self) -> None:
        """Lock the directory, and start the thread for writing in the background.

        :raises CheckpointError: if another run uses the directory, or no checkpoint can be written there
        """
        self._lock.acquire()
        self._executor = ThreadPoolExecutor(1, type(self).__name__)
        # Starting a thread may take milliseconds: now, rather than at the first checkpoint
        self._executor.submit(int).result()

    def close(self) -> None:
        """Wait for the checkpoint that is being written, end the thread, and unlock the directory.

        If the wait is interrupted, the thread does the rest.

        :raises CheckpointError: if that checkpoint could not be written
        """
        try:
            self.wait()
        finally:
            if self._in_flight is None:
                self._end(waits=True)
            else:
                # The wait was interrupted: the thread goes on, and needs the lock until it is done
                self._in_flight.add_done_callback(lambda _: self._end(waits=False))

    def _end(self, waits: bool) -> None:
        executor, self._executor = self._executor, None
        if executor is not None:
            executor.shutdown(wait=waits)
        self._lock.release()

    def wait(self) -> None:
        """Wait until nothing is being written.

        :raises CheckpointError: if what was being written could not be written
        """
        in_flight = self._in_flight
        if in_flight is not None:
            try:
                in_flight.result()
            finally:
                # An interrupt of this thread leaves the other one at work
                if in_flight.done():
                    self._in_flight = None
        refused, self._refused = self._refused, []
        for line in refused:
            warnings.warn(line, stacklevel=2)

    def settle(self) -> None:
        """Wait until nothing is being written. Leave the error of what could not be written to :meth:`wait`."""
        if self._in_flight is not None:
            self._in_flight.exception()

    def write(self, snapshot: Snapshot) -> Path:
        """Write a snapshot now.

        :param snapshot: the snapshot
        :return: the directory of the checkpoint, which is on the disk
        :raises CheckpointError: if it cannot be written, or the one before could not be
        """
        self.wait()
        was_locked = self._lock.is_held
        self._lock.keep()
        try:
            return self._write(snapshot)
        finally:
            if not was_locked:
                self._lock.release()
            self.wait()

    def write_in_background(self, snapshot: Snapshot) -> None:
        """Begin to write a snapshot. :meth:`wait` has been called since the last one.

        :param snapshot: the snapshot
        :raises CheckpointError: if another run has taken the directory
        """
        assert self._in_flight is None
        if self._executor is None:
            self.open()
        else:
            self._lock.keep()
        assert self._executor is not None
        self._in_flight = self._executor.submit(self._write, snapshot)

    def _write(self, snapshot: Snapshot) -> Path:
        directory = write_checkpoint(self.save_path, snapshot.files(), snapshot.num_timesteps, snapshot.mean_return)
        self._retention.remember(directory, snapshot.mean_return)
        self._when_written(directory)
        self._refused += self._retention.rotate(self.save_path)
        return directory
