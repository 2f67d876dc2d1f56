"""A lock on a directory of checkpoints, so that two runs do not write into it. It dies with its process."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import socket
import stat
import sys
import warnings
from datetime import UTC, datetime
from pathlib import Path

from sb3_ppo_plus.errors import CheckpointError
from sb3_ppo_plus.resuming.checkpoint_directory import MANIFEST, is_name_of_checkpoint, make_directory
from sb3_ppo_plus.untrusted.strict_json import short

if sys.platform == "win32":
    import msvcrt
else:
    import fcntl

LOCK_FILE = ".lock"
# As long as the longest name of a checkpoint's file
LONGEST_PATH = Path(f".checkpoint_{10**9}_{10**15}_steps.unfinished/training_state.json")
# Errors of file systems that have no locks
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EINVAL)
# Far behind the text, since nobody can read what Windows has locked
LOCKED_BYTE = 2**20

_held: dict[tuple[int, int], DirectoryLock] = {}
"""The locks of this process by device and number of the directory: to the system, all its threads are one owner."""

if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=lambda: _forget_inherited())


class DirectoryLock:
    """A lock of this process on a directory of checkpoints.

    It is a lock of the system on ``SAVE_PATH/.lock``, whose text names the owner.

    :param save_path: an absolute path
    """

    def __init__(self, save_path: Path) -> None:
        self.save_path = save_path
        self._descriptor: int | None = None

    @property
    def is_held(self) -> bool:
        """Whether this object has the lock."""
        return self._descriptor is not None

    def acquire(self) -> None:
        """Create the directory if it is missing, and lock it.

        Where the file system has no locks, it warns, and locks nothing.

        :raises CheckpointError: if another run has locked it; the message names its process. Also if no checkpoint can
            be written there: no permission, no directory, a path that is too long, or one inside a checkpoint
        """
        _check_path(self.save_path)
        try:
            make_directory(self.save_path)
            with contextlib.suppress(FileNotFoundError):
                # A path that is too long is an error now, and not at the first checkpoint
                os.lstat(self.save_path / LONGEST_PATH)
            if _held.setdefault(_number(self.save_path), self) is not self:
                raise CheckpointError(
                    f"{self.save_path} is in use by another TrainingCheckpoint of this process, {os.getpid()}. Give "
                    "each run a save_path of its own"
                )
            self._open_and_lock()
        except OSError as error:
            self.release()
            raise CheckpointError(f"no checkpoints can be written to {self.save_path}: {error}") from error
        except CheckpointError:
            self.release()
            raise

    def keep(self) -> None:
        """Take the lock again where it was lost, such as where its file was removed.

        :raises CheckpointError: as :meth:`acquire`
        """
        if self._descriptor is not None:
            try:
                if os.path.samestat(os.fstat(self._descriptor), os.stat(self.save_path / LOCK_FILE)):
                    _lock(self._descriptor)
                    return
            except OSError as error:
                if error.errno in NO_LOCKS:
                    return
            self.release()
        self.acquire()

    def release(self) -> None:
        """Give the lock back. Its file stays: to remove it could remove the lock of another process."""
        for number in [number for number, lock in _held.items() if lock is self]:
            del _held[number]
        descriptor = self._descriptor
        if descriptor is not None:
            with contextlib.suppress(OSError):
                _unlock(descriptor)
            # Last: whoever sees that it is not held may take it at once
            self._descriptor = None
            os.close(descriptor)

    def _forget(self) -> None:
        """Close the file in a forked process, and leave the lock to the process that took it."""
        descriptor, self._descriptor = self._descriptor, None
        if descriptor is not None:
            os.close(descriptor)

    def _open_and_lock(self) -> None:
        path = self.save_path / LOCK_FILE
        flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
        try:
            descriptor = self._descriptor = os.open(path, flags, 0o666)
        except PermissionError as error:
            if not path.is_file():
                raise
            # In a folder that users share, it may belong to another one
            warnings.warn(
                f"{path} cannot be opened ({error}): nothing stops a second run from writing its checkpoints there too",
                stacklevel=2,
            )
            return
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, "not a regular file", str(path))
        try:
            _lock(descriptor)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                raise CheckpointError(
                    f"{self.save_path} is in use by another run: {_owner(descriptor)}. Give each run a save_path of "
                    "its own"
                ) from error
            if error.errno not in NO_LOCKS:
                raise
            warnings.warn(
                f"the file system of {self.save_path} has no locks ({error}): nothing stops a second run from writing "
                "its checkpoints there too",
                stacklevel=2,
            )
        owner = {"pid": os.getpid(), "host": socket.gethostname(), "since": _now()}
        os.ftruncate(descriptor, 0)
        os.write(descriptor, json.dumps(owner).encode())


def _check_path(save_path: Path) -> None:
    if os.path.lexists(save_path / MANIFEST):
        raise CheckpointError(f"save_path must be the directory of the checkpoints; {save_path} is one checkpoint")
    for path in (save_path, *save_path.parents):
        if is_name_of_checkpoint(path.name):
            raise CheckpointError(
                f"save_path must not be inside a checkpoint, got {save_path}: a run in {path.parent} would remove "
                f"{path.name}"
            )


def _number(path: Path) -> tuple[int, int]:
    status = os.stat(path)
    return status.st_dev, status.st_ino


def _lock(descriptor: int) -> None:
    """Lock an open file for this process, or raise OSError: EACCES or EAGAIN if another process has locked it."""
    if sys.platform == "win32":
        os.lseek(descriptor, LOCKED_BYTE, os.SEEK_SET)
        msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
        os.lseek(descriptor, 0, os.SEEK_SET)
    else:
        # Not lockf, whose lock ends when any part of the process closes the file, such as a backup of the directory
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _unlock(descriptor: int) -> None:
    """Give a lock back, also where a forked process still has the file open."""
    if sys.platform != "win32":
        fcntl.flock(descriptor, fcntl.LOCK_UN)


def _forget_inherited() -> None:
    """Close the files of locks in a forked process, which would keep them locked after the end of its parent."""
    for lock in set(_held.values()):
        lock._forget()
    _held.clear()


def _owner(descriptor: int) -> str:
    try:
        owner = json.loads(os.read(descriptor, 4096))
        return f"process {int(owner['pid'])} on {short(owner['host'])}, since {short(owner['since'])}"
    except (OSError, ValueError, KeyError, TypeError):
        return "another process"


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
