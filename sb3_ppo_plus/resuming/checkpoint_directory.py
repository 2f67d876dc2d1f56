"""Checkpoint directories: written and removed atomically, verified when read.

``SAVE_PATH/checkpoint_000017_204800_steps/`` holds files and their ``manifest.json``. It is written under a hidden
name, synced to the disk, and renamed last; before it is removed, it is renamed and synced first. So a directory with
its final name is complete, also after a crash of the machine, unless it was damaged later.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import math
import os
import platform
import re
import shutil
import sys
import warnings
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch as th

from sb3_ppo_plus.errors import CheckpointError, InvalidCheckpointError, UntrustedFileError
from sb3_ppo_plus.resuming.migrations import FORMAT, check_format
from sb3_ppo_plus.untrusted.regular_files import open_regular_file
from sb3_ppo_plus.untrusted.strict_json import parse, short

MANIFEST = "manifest.json"
BESIDE = "beside"
"""Where the manifest lists files that are no part of the training state. Version 0.1 passes over them."""
NORMALIZER_FILE = "vecnormalize.json"
"""For those who use the model elsewhere. A resume takes the statistics from the state of the environments."""
#: It names a few files and versions
MAX_MANIFEST_BYTES = 2**20
#: A checkpoint has three, and the statistics of a VecNormalize; two of each further process. Several names may be links
#: to one large file
MAX_FILES = 4
#: How many processes a run may have, without trust
MAX_PROCESSES = 64
#: How many newer ones may be invalid, without trust
MAX_TRIES = 20
#: Files of another process than the first: its number, and the name that it has for the first
FILE_OF_RANK = re.compile(r"rank_([1-9]\d*)_(.+)")
_NAME = re.compile(r"checkpoint_(\d+)_\d+_steps")
_LEFTOVER = re.compile(r"\.checkpoint_\d+_\d+_steps\.(?:unfinished|removed)")
_PACKAGES = ("gymnasium", "numpy", "sb3-ppo-plus", "stable-baselines3", "torch")


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that was read and verified.

    :param directory: its directory
    :param files: contents by file name
    :param manifest: contents of ``manifest.json``: format, num_timesteps, mean_return, created, versions, files
    """

    directory: Path
    files: dict[str, bytes]
    manifest: dict[str, Any]

    @property
    def mean_return(self) -> float | None:
        """The mean return at saving. None where no episode had ended; older versions did not write it."""
        value = self.manifest.get("mean_return")
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            return None
        return float(value)


def write_checkpoint(
    save_path: Path, files: dict[str, bytes], num_timesteps: int, mean_return: float | None = None
) -> Path:
    """Write a complete checkpoint, or leave nothing that looks like one.

    :param save_path: directory of the checkpoints; it is created if it is missing
    :param files: contents by file name
    :param num_timesteps: number in its name and its manifest
    :param mean_return: number in its manifest
    :return: its directory
    :raises CheckpointError: if the system refuses, for example on a full disk; earlier checkpoints are as they were
    """
    try:
        make_directory(save_path)
        remove_leftovers(save_path)
        index = max((checkpoint_index(directory) for directory in checkpoint_directories(save_path)), default=0) + 1
        directory = save_path / f"checkpoint_{index:06d}_{num_timesteps}_steps"
        unfinished = hidden(directory, "unfinished")
        try:
            unfinished.mkdir()
            for name, content in files.items():
                _write_file(unfinished / name, content)
            _write_file(unfinished / MANIFEST, _manifest(files, num_timesteps, mean_return))
            sync_directory(unfinished)
            os.rename(unfinished, directory)
        except BaseException:
            shutil.rmtree(unfinished, ignore_errors=True)
            raise
        sync_directory(save_path)
    except OSError as error:
        raise CheckpointError(
            f"the checkpoint at {num_timesteps} steps could not be written to {save_path}: {error}. Earlier "
            "checkpoints are as they were. The model is intact too: continue_learning() goes on from here"
        ) from error
    return directory


def read_checkpoint(directory: Path, follows_links: bool = True) -> Checkpoint:
    """Read a checkpoint, and verify the sizes and hashes of its files.

    :param directory: its directory
    :param follows_links: whether its files may be symbolic links
    :raises InvalidCheckpointError: if it is incomplete or altered, or holds what is no regular file; the message names
        the file
    """
    try:
        text = _read(directory / MANIFEST, None, follows_links)
        manifest = parse(text, str(directory / MANIFEST))["manifest"]
        if text != _sealed(manifest):
            raise InvalidCheckpointError(f"{directory}: {MANIFEST} was altered")
        check_format(manifest, str(directory))
        files = {}
        listed = {**manifest["files"], **manifest.get(BESIDE, {})}
        n_of_others = sum(FILE_OF_RANK.fullmatch(name) is not None for name in listed)
        has_many = len(listed) - n_of_others > MAX_FILES or (
            n_of_others > 2 * (MAX_PROCESSES - 1) and not follows_links
        )
        if has_many or not isinstance(manifest["versions"], dict):
            raise InvalidCheckpointError(f"{directory}: {MANIFEST} is no manifest")
        for name, expected in listed.items():
            # A name must not lead out of the directory, nor may two names lead to one large file
            if not name or Path(name).name != name:
                raise InvalidCheckpointError(f"{directory}: {MANIFEST} names {short(name)}, which is no file's name")
            files[name] = _read(directory / name, expected["size"], follows_links)
            if _sha256(files[name]) != expected["sha256"]:
                raise InvalidCheckpointError(f"{directory}: {name} was altered")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise InvalidCheckpointError(f"{directory}: {MANIFEST} is no manifest") from error
    return Checkpoint(directory, files, manifest)


def _read(path: Path, size: int | None, follows_links: bool) -> bytes:
    """Read a file of a checkpoint. Its size is checked first: by the manifest, or for itself by a limit."""
    try:
        with open_regular_file(path, follows_links) as file:
            found = os.fstat(file.fileno()).st_size
            if size is None and found > MAX_MANIFEST_BYTES:
                raise InvalidCheckpointError(f"{path.parent}: {path.name} has {found} bytes, which no manifest has")
            if size is not None and found != size:
                raise InvalidCheckpointError(f"{path.parent}: {path.name} has {found} bytes, its manifest says {size}")
            return file.read(found)
    except (OSError, UntrustedFileError) as error:
        raise InvalidCheckpointError(f"{path.parent}: {error}") from error


def newest_checkpoint(
    save_path: str | Path, follows_links: bool = True, skipped: list[str] | None = None
) -> Checkpoint | None:
    """Read the newest valid checkpoint, and warn of each newer one that is not valid.

    :param save_path: directory of the checkpoints, or the directory of one checkpoint
    :param follows_links: whether what lies in ``save_path`` may be symbolic links. If not, the oldest are not tried
        where there are more than 20
    :param skipped: gets a line for each checkpoint that is not valid
    :return: None if there is no valid checkpoint
    """
    directories = _directories(save_path)
    while True:
        for directory in directories if follows_links else directories[:MAX_TRIES]:
            # A directory that was given by its name may itself be a link
            is_given = directory == Path(save_path)
            checkpoint = _read_or_warn(directory, is_given, follows_links, skipped)
            if checkpoint is not None:
                return checkpoint
        # A run that is going on may have replaced all of them meanwhile
        listed, directories = directories, _directories(save_path)
        if directories == listed:
            return None


def best_checkpoint_in(save_path: str | Path) -> Checkpoint | None:
    """Read the valid checkpoint with the highest mean return, and warn of each that is not valid.

    :param save_path: directory of the checkpoints
    :return: of equal ones the newest; None if no valid checkpoint has a mean return
    """
    best: Checkpoint | None = None
    best_return = -math.inf
    for directory in _directories(save_path):
        checkpoint = _read_or_warn(directory, directory == Path(save_path))
        if checkpoint is not None and checkpoint.mean_return is not None and checkpoint.mean_return > best_return:
            best, best_return = checkpoint, checkpoint.mean_return
    return best


def _directories(save_path: str | Path) -> list[Path]:
    save_path = Path(save_path)
    return [save_path] if (save_path / MANIFEST).exists() else checkpoint_directories(save_path)


def _read_or_warn(
    directory: Path, is_given: bool, follows_links: bool = True, skipped: list[str] | None = None
) -> Checkpoint | None:
    try:
        if directory.is_symlink() and not (follows_links or is_given):
            raise InvalidCheckpointError(f"{directory} is a symbolic link")
        return read_checkpoint(directory, follows_links)
    except InvalidCheckpointError as error:
        # It is no damage if a run that is going on has removed it
        if os.path.lexists(directory):
            warnings.warn(f"skipped an invalid checkpoint: {error}", stacklevel=3)
            if skipped is not None:
                skipped.append(str(error))
        return None


def checkpoint_directories(save_path: Path) -> list[Path]:
    """List the directories of the checkpoints, valid or not, the newest first.

    :param save_path: directory of the checkpoints
    """
    if not save_path.is_dir():
        return []
    named = [path for path in save_path.iterdir() if _NAME.fullmatch(path.name)]
    return sorted(named, key=checkpoint_index, reverse=True)


def checkpoint_index(directory: Path) -> int:
    """Return the number in a checkpoint's name: later checkpoints have greater ones.

    :param directory: its directory
    """
    name = _NAME.fullmatch(directory.name)
    assert name is not None
    return int(name[1])


def is_name_of_checkpoint(name: str) -> bool:
    """Whether a directory of this name is taken for a checkpoint, or for what is left of one.

    :param name: the name, without its parents
    """
    return (_NAME.fullmatch(name) or _LEFTOVER.fullmatch(name)) is not None


def hidden(directory: Path, state: str) -> Path:
    """Return the name that a checkpoint has before it is finished, and while it is removed.

    :param directory: its directory
    :param state: "unfinished" or "removed"
    """
    return directory.with_name(f".{directory.name}.{state}")


def make_directory(save_path: Path) -> None:
    """Create the directory of the checkpoints and its parents, if they are missing, and sync their names to the disk.

    :param save_path: directory of the checkpoints
    :raises OSError: if the system refuses
    """
    missing = [path for path in (save_path, *save_path.parents) if not path.exists()]
    try:
        save_path.mkdir(parents=True, exist_ok=True)
    except FileExistsError as error:
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(save_path)) from error
    for path in missing:
        # One may enter a directory that one must not read
        with contextlib.suppress(PermissionError):
            sync_directory(path.parent)


def sync_directory(directory: Path) -> None:
    """Sync the names in a directory to the disk. Windows has no way to do so.

    :param directory: the directory
    :raises OSError: if the system refuses
    """
    if os.name == "posix":
        descriptor = os.open(directory, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def remove_leftovers(save_path: Path) -> None:
    """Remove unfinished and half-removed checkpoints that a killed process has left.

    :param save_path: directory of the checkpoints
    """
    for path in save_path.iterdir():
        if _LEFTOVER.fullmatch(path.name):
            shutil.rmtree(path, ignore_errors=True)


@cache
def versions() -> dict[str, str]:
    """Return the versions and the kind of machine on which the last bits of a training run depend."""
    return {
        "python": platform.python_version(),
        **{package: _version(package) for package in _PACKAGES},
        "machine": f"{sys.platform} {platform.machine()} {th.backends.cpu.get_cpu_capability()}",
    }


def _version(package: str) -> str:
    try:
        return version(package)
    except ModuleNotFoundError:
        return "not installed as a package"


def _manifest(files: dict[str, bytes], num_timesteps: int, mean_return: float | None) -> bytes:
    listed = {name: {"size": len(content), "sha256": _sha256(content)} for name, content in files.items()}
    beside = {name: listed.pop(name) for name in (NORMALIZER_FILE,) if name in listed}
    manifest = {
        "format": FORMAT,
        "num_timesteps": num_timesteps,
        "mean_return": mean_return,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": versions(),
        "files": listed,
    }
    return _sealed({**manifest, BESIDE: beside} if beside else manifest)


def _sealed(manifest: object) -> bytes:
    # The manifest determines every byte of its file, so that any change of the file is noticed
    seal = _sha256(json.dumps(manifest, sort_keys=True).encode())
    return json.dumps({"manifest": manifest, "sha256": seal}, indent=1, sort_keys=True).encode() + b"\n"


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _write_file(path: Path, content: bytes) -> None:
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), 0o666)
    try:
        remaining = memoryview(content)
        # os.write may write only a part
        while remaining:
            remaining = remaining[os.write(file, remaining) :]
        os.fsync(file)
    finally:
        os.close(file)
