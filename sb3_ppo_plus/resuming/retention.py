"""Which checkpoints are kept: the newest and the best valid ones."""

from __future__ import annotations

import contextlib
import os
import shutil
from pathlib import Path
from typing import NamedTuple

from sb3_ppo_plus.errors import InvalidCheckpointError
from sb3_ppo_plus.resuming.checkpoint_directory import (
    checkpoint_directories,
    checkpoint_index,
    hidden,
    read_checkpoint,
    sync_directory,
)

Stamp = tuple[tuple[str, int, int, int, int], ...]


class _Known(NamedTuple):
    """A checkpoint that was valid when its files had this stamp."""

    stamp: Stamp
    mean_return: float | None


class Retention:
    """Removes the checkpoints that are neither among the newest nor among the best.

    Only valid checkpoints count. It remembers which it has found valid, and reads a checkpoint again only if a file in
    it has another size or time since.

    :param keep_last: number of newest valid checkpoints to keep
    :param keep_best: number of valid checkpoints with the highest mean return to keep; of equal ones the newer
    """

    def __init__(self, keep_last: int, keep_best: int = 0) -> None:
        self.keep_last = keep_last
        self.keep_best = keep_best
        self._known: dict[Path, _Known] = {}

    def remember(self, directory: Path, mean_return: float | None) -> None:
        """Remember a checkpoint that this process has just written.

        :param directory: its directory
        :param mean_return: the mean return in its manifest
        """
        stamp = _stamp(directory)
        if stamp is not None:
            self._known[directory] = _Known(stamp, mean_return)

    def rotate(self, save_path: Path) -> list[str]:
        """Remove what is not kept. A checkpoint is kept as well if fewer than ``keep_last`` valid ones are newer.

        :param save_path: directory of the checkpoints
        :return: a line for each checkpoint that the system refuses to remove, or to list
        """
        try:
            directories = checkpoint_directories(save_path)
        except OSError as error:
            return [f"old checkpoints could not be looked for: {error}"]
        self._known = {directory: self._known[directory] for directory in directories if directory in self._known}
        n_valid = 0
        older = []
        for directory in directories:
            if n_valid == self.keep_last:
                older.append(directory)
            # Where nothing can be removed, whatever is valid, no time is spent on reading
            elif len(directories) > self.keep_last:
                n_valid += self._valid(directory) is not None
        best = self._best(directories) if older else []
        return _remove(save_path, [directory for directory in older if directory not in best])

    def _best(self, directories: list[Path]) -> list[Path]:
        returns: dict[Path, float] = {}
        for directory in directories if self.keep_best > 0 else []:
            known = self._valid(directory)
            if known is not None and known.mean_return is not None:
                returns[directory] = known.mean_return
        ranked = sorted(returns, key=lambda directory: (returns[directory], checkpoint_index(directory)), reverse=True)
        return ranked[: self.keep_best]

    def _valid(self, directory: Path) -> _Known | None:
        known, stamp = self._known.get(directory), _stamp(directory)
        if stamp is None:
            return None
        if known is None or known.stamp != stamp:
            try:
                # The stamp is older than the reading: a change in between is found the next time
                known = _Known(stamp, read_checkpoint(directory).mean_return)
            except InvalidCheckpointError:
                return None
            self._known[directory] = known
        return known


def _stamp(directory: Path) -> Stamp | None:
    """Return what a change of the files would change; None if they cannot be found."""
    try:
        with os.scandir(directory) as entries:
            found = [(entry.name, entry.stat(follow_symlinks=False)) for entry in entries]
    except OSError:
        return None
    stamps = [(name, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns) for name, stat in found]
    return tuple(sorted(stamps))


def _remove(save_path: Path, directories: list[Path]) -> list[str]:
    refused: list[str] = []
    renamed = []
    try:
        for directory in directories:
            # Removing takes many steps. Renamed first, a half-removed directory does not look like a checkpoint
            removed = hidden(directory, "removed")
            try:
                os.rename(directory, removed)
                renamed.append(removed)
            except FileNotFoundError:
                # Somebody else has removed it
                continue
            except OSError as error:
                refused.append(f"an old checkpoint could not be removed: {error}")
        if renamed:
            # After a crash, the renaming must not be lost where the removal is not
            sync_directory(save_path)
        for removed in renamed:
            with contextlib.suppress(FileNotFoundError):
                shutil.rmtree(removed)
    except OSError as error:
        refused.append(f"an old checkpoint could not be removed: {error}")
    return refused
