"""The folder of a campaign's unfinished runs: one campaign at a time works in it, and others can pause that one."""

import fcntl
import os
import time
from io import TextIOWrapper
from pathlib import Path

POLL_SECONDS = 0.5


class WorkFolder:
    """Files by which a campaign and the commands ``--pause`` and ``--unpause`` talk.

    ``lock`` is locked while a campaign runs; ``pause`` asks it to pause; ``paused`` is there while all its runs stand.

    :param path: of the folder; made where it is missing
    """

    def __init__(self, path: Path) -> None:
        path.mkdir(parents=True, exist_ok=True)
        self.path = path
        self._request, self._answer = path / "pause", path / "paused"
        self._lock: TextIOWrapper | None = None

    def lock(self) -> None:
        """Lock the folder until this process ends.

        :raises BlockingIOError: where a campaign runs in it
        """
        lock = (self.path / "lock").open("a")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.close()
            raise BlockingIOError(f"another campaign runs in {self.path}: give another --work") from None
        self._lock = lock
        self._answer.unlink(missing_ok=True)

    def is_in_use(self) -> bool:
        """Whether a campaign runs in the folder."""
        with (self.path / "lock").open("a") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return True
        return False

    def wants_pause(self) -> bool:
        """Whether a pause is asked for."""
        return self._request.exists()

    def say_paused(self, is_paused: bool) -> None:
        """Tell who has asked that all runs stand, or that they go on.

        :param is_paused: which of both
        """
        if is_paused:
            self._answer.touch()
        else:
            self._answer.unlink(missing_ok=True)

    def pause(self) -> str:
        """Have the campaign stop its runs where they stand; wait until they do.

        :return: what has happened
        """
        self._request.touch()
        while self.is_in_use():
            if self._answer.exists():
                return "paused; --unpause goes on"
            time.sleep(POLL_SECONDS / 5)
        self._request.unlink(missing_ok=True)
        return f"no campaign runs in {self.path}"

    def unpause(self) -> str:
        """Have the campaign go on; wait until it does.

        :return: what has happened
        """
        self._request.unlink(missing_ok=True)
        while self.is_in_use():
            if not self._answer.exists():
                return "goes on"
            time.sleep(POLL_SECONDS / 5)
        return f"no campaign runs in {self.path}"


def wait_until_stopped(pid: int) -> None:
    """Wait until a child of this process stands or has ended; its end can be asked for afterwards.

    :param pid: of the child
    """
    os.waitid(os.P_PID, pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)
