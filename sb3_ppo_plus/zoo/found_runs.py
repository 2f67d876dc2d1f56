"""Finds the runs in log folders of the RL Zoo, without trust in them."""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sb3_ppo_plus.errors import UntrustedFileError
from sb3_ppo_plus.untrusted.plain_yaml import read_yaml

#: A run of train --uuid has a UUID after its number
_RUN = re.compile(r"(.+)_((\d{1,9})(?:_[0-9a-f-]{36})?)", re.ASCII)
#: Gymnasium imports the module that an id names before a colon
_ENV_ID = re.compile(r"[\w./-]{1,128}", re.ASCII)
#: Levels of folders below the one given: logs/ALGO/ENV_1
_DEPTH = 3


@dataclasses.dataclass(frozen=True)
class FoundRun:
    """A run's folder.

    :param algo: name of the folder around it, in the RL Zoo the algorithm
    :param env_id: Gymnasium's id as args.yml gives it; without args.yml the name that the folder has before its number
    :param exp_id: the folder's number
    :param folder: the folder
    :param suffix: what its name has after the environment: the number, and with ``--uuid`` a UUID
    """

    algo: str
    env_id: str
    exp_id: int
    folder: Path
    suffix: str

    @property
    def parameters(self) -> Path:
        """The folder of config.yml and args.yml."""
        return self.folder / self.folder.name.removesuffix(f"_{self.suffix}")

    def read(self, name: str) -> dict[str, Any]:
        """Read config.yml or args.yml as plain values. Nothing in it is built.

        :param name: the file's name
        :return: empty if there is no such file in the run's folder, or if it is not the RL Zoo's
        """
        try:
            return read_yaml(own_file(self.parameters / name, self.folder))
        except (OSError, UntrustedFileError):
            return {}


def own_file(path: Path, folder: Path) -> Path:
    """Refuse a file outside of a run's folder: what is pushed or shown is handed on, and a link would hand on another.

    :param path: a file in the folder, or a link there
    :param folder: the run's folder
    :return: the path
    :raises UntrustedFileError: if it is outside
    """
    if not path.resolve().is_relative_to(folder.resolve()):
        raise UntrustedFileError(f"{path} is a link that leads outside of {folder}")
    return path


def find_runs(folder: Path) -> list[FoundRun]:
    """Find the runs in a folder, in the order of algorithm, environment and number. Links are not followed.

    :param folder: a log folder, an algorithm's folder in it, or a run
    :raises SystemExit: if it is no folder
    """
    if not folder.is_dir():
        raise SystemExit(f"{folder} is no folder")
    runs = [_found(path) for path in _folders(folder, _DEPTH) if _is_run(path)]
    return sorted(runs, key=lambda run: (run.algo, run.env_id, run.exp_id, str(run.folder)))


def _folders(folder: Path, depth: int) -> Iterator[Path]:
    yield folder
    if depth == 0 or _is_run(folder):
        return
    with os.scandir(folder) as entries:
        inner = sorted(entry.path for entry in entries if entry.is_dir(follow_symlinks=False))
    for path in inner:
        yield from _folders(Path(path), depth - 1)


def _is_run(folder: Path) -> bool:
    match = _RUN.fullmatch(folder.resolve().name)
    if match is None or not _ENV_ID.fullmatch(match.group(1)):
        return False
    return any(
        [
            (folder / match.group(1)).is_dir(),
            (folder / f"{match.group(1)}.zip").is_file(),
            (folder / "evaluations.npz").is_file(),
            *folder.glob("*monitor.csv"),
        ]
    )


def _found(folder: Path) -> FoundRun:
    folder = folder.resolve()
    match = _RUN.fullmatch(folder.name)
    # Checked by _is_run
    assert match is not None
    name, suffix, exp_id = match.groups()
    run = FoundRun(folder.parent.name, name, int(exp_id), folder, suffix)
    env_id = run.read("args.yml").get("env")
    # The RL Zoo's folder has dashes in place of the id's slashes
    if isinstance(env_id, str) and _ENV_ID.fullmatch(env_id) and env_id.replace("/", "-") == name:
        run = dataclasses.replace(run, env_id=env_id)
    return run
