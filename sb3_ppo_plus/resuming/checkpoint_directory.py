"""Checkpoint directories: written atomically, verified when read, rotated.

``SAVE_PATH/checkpoint_000017_204800_steps/`` holds files and their ``manifest.json``. It is written under a hidden
name, synced to the disk, and renamed last. So a directory with its final name is complete, unless it was damaged later.
"""

from __future__ import annotations

import hashlib
import json
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
from sb3_ppo_plus.untrusted.regular_files import open_regular_file
from sb3_ppo_plus.untrusted.strict_json import parse, short

MANIFEST = "manifest.json"
FORMAT = 1
#: It names a few files and versions
MAX_MANIFEST_BYTES = 2**20
_NAME = re.compile(r"checkpoint_(\d+)_\d+_steps")
_LEFTOVER = re.compile(r"\.checkpoint_\d+_\d+_steps\.(?:unfinished|removed)")
_PACKAGES = ("gymnasium", "numpy", "sb3-ppo-plus", "stable-baselines3", "torch")


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that was read and verified.

    :param directory: its directory
    :param files: contents by file name
    :param manifest: contents of ``manifest.json``: format, num_timesteps, created, versions, files
    """

    directory: Path
    files: dict[str, bytes]
    manifest: dict[str, Any]


def write_checkpoint(save_path: Path, files: dict[str, bytes], num_timesteps: int) -> Path:
    """Write a complete checkpoint, or leave nothing that looks like one.

    :param save_path: directory of the checkpoints; it is created if it is missing
    :param files: contents by file name
    :param num_timesteps: number in its name and its manifest
    :return: its directory
    :raises CheckpointError: if the system refuses, for example on a full disk; earlier checkpoints are as they were
    """
    try:
        save_path.mkdir(parents=True, exist_ok=True)
        remove_leftovers(save_path)
        index = max((_index(directory) for directory in checkpoint_directories(save_path)), default=0) + 1
        directory = save_path / f"checkpoint_{index:06d}_{num_timesteps}_steps"
        unfinished = _hidden(directory, "unfinished")
        try:
            unfinished.mkdir()
            for name, content in files.items():
                _write_file(unfinished / name, content)
            _write_file(unfinished / MANIFEST, _manifest(files, num_timesteps))
            _sync_directory(unfinished)
            os.rename(unfinished, directory)
        except BaseException:
            shutil.rmtree(unfinished, ignore_errors=True)
            raise
        _sync_directory(save_path)
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
        if manifest["format"] != FORMAT:
            raise InvalidCheckpointError(f"{directory}: format {manifest['format']}, this version reads {FORMAT}")
        files = {}
        for name, expected in manifest["files"].items():
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


def newest_checkpoint(save_path: str | Path, follows_links: bool = True) -> Checkpoint | None:
    """Read the newest valid checkpoint, and warn of each newer one that is not valid.

    :param save_path: directory of the checkpoints, or the directory of one checkpoint
    :param follows_links: whether what lies in ``save_path`` may be symbolic links
    :return: None if there is no valid checkpoint
    """
    save_path = Path(save_path)
    single = [save_path] if (save_path / MANIFEST).exists() else []
    for directory in single or checkpoint_directories(save_path):
        try:
            if directory.is_symlink() and not (follows_links or single):
                raise InvalidCheckpointError(f"{directory} is a symbolic link")
            return read_checkpoint(directory, follows_links)
        except InvalidCheckpointError as error:
            warnings.warn(f"skipped an invalid checkpoint: {error}", stacklevel=2)
    return None


def checkpoint_directories(save_path: Path) -> list[Path]:
    """List the directories of the checkpoints, valid or not, the newest first.

    :param save_path: directory of the checkpoints
    """
    if not save_path.is_dir():
        return []
    named = [path for path in save_path.iterdir() if _NAME.fullmatch(path.name)]
    return sorted(named, key=_index, reverse=True)


def rotate(save_path: Path, keep_last: int) -> None:
    """Remove all checkpoints that are older than the newest valid ones. Warn if the system refuses.

    :param save_path: directory of the checkpoints
    :param keep_last: number of valid checkpoints to keep
    """
    directories = checkpoint_directories(save_path)
    if len(directories) <= keep_last:
        # None is old enough, valid or not: spare the time of reading their files
        return
    n_valid = 0
    for directory in directories:
        if n_valid < keep_last:
            n_valid += _is_valid(directory)
            continue
        try:
            # Removing takes many steps. Renamed first, a half-removed directory does not look like a checkpoint
            removed = _hidden(directory, "removed")
            os.rename(directory, removed)
            shutil.rmtree(removed)
        except OSError as error:
            warnings.warn(f"an old checkpoint could not be removed: {error}", stacklevel=2)


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


def _index(directory: Path) -> int:
    name = _NAME.fullmatch(directory.name)
    assert name is not None
    return int(name[1])


def _hidden(directory: Path, state: str) -> Path:
    return directory.with_name(f".{directory.name}.{state}")


def _is_valid(directory: Path) -> bool:
    try:
        read_checkpoint(directory)
    except InvalidCheckpointError:
        return False
    return True


def _manifest(files: dict[str, bytes], num_timesteps: int) -> bytes:
    return _sealed(
        {
            "format": FORMAT,
            "num_timesteps": num_timesteps,
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
            "versions": versions(),
            "files": {name: {"size": len(content), "sha256": _sha256(content)} for name, content in files.items()},
        }
    )


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


def _sync_directory(directory: Path) -> None:
    # Windows cannot sync directories
    if os.name == "posix":
        descriptor = os.open(directory, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
