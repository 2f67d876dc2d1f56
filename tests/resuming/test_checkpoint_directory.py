import itertools
import json
import os
import resource
import shutil
import signal
import warnings
from pathlib import Path

import pytest
from checkpoint_files import FILES, files_at, flip, write
from forks import in_a_fork

from sb3_ppo_plus.errors import CheckpointError, InvalidCheckpointError
from sb3_ppo_plus.resuming import checkpoint_directory
from sb3_ppo_plus.resuming.checkpoint_directory import (
    MANIFEST,
    _sealed,
    checkpoint_directories,
    newest_checkpoint,
    read_checkpoint,
)
from sb3_ppo_plus.resuming.retention import Retention

SYSTEM_CALLS = ("open", "write", "fsync", "close", "mkdir", "rename", "unlink", "rmdir")


def test_a_checkpoint_is_read_as_it_was_written(tmp_path):
    (directory,) = write(tmp_path / "new" / "folder", 100)
    checkpoint = newest_checkpoint(tmp_path / "new" / "folder")
    assert checkpoint.directory == directory and directory.name == "checkpoint_000001_100_steps"
    assert checkpoint.files == files_at(100)
    assert checkpoint.manifest["num_timesteps"] == 100
    assert {"python", "torch", "numpy", "gymnasium", "stable-baselines3", "sb3-ppo-plus"} < set(
        checkpoint.manifest["versions"]
    )
    assert newest_checkpoint(directory) == checkpoint


def test_the_newest_is_the_last_written_whatever_its_steps(tmp_path):
    directories = write(tmp_path, 300, 100, 200)
    assert newest_checkpoint(tmp_path).directory == directories[-1]
    assert checkpoint_directories(tmp_path) == directories[::-1]


@pytest.mark.parametrize("name", ["nothing_here", "empty"])
def test_without_checkpoints_the_newest_is_none(tmp_path, name):
    (tmp_path / "empty").mkdir()
    assert newest_checkpoint(tmp_path / name) is None


@pytest.mark.parametrize("name", [*FILES, MANIFEST])
@pytest.mark.parametrize(
    "damage",
    [
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(path.read_bytes()[:-1]),
        lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
        lambda path: path.write_bytes(path.read_bytes() + b"\0"),
        lambda path: path.unlink(),
        lambda path: (path.unlink(), path.mkdir()),
        *(
            lambda path, place=place: flip(path, int(place * (8 * path.stat().st_size - 1)))
            for place in (0, 0.3, 0.6, 1)
        ),
    ],
    ids=[
        "empty",
        "torn",
        "halved",
        "longer",
        "missing",
        "directory",
        *(f"flipped_{place}" for place in (0, 0.3, 0.6, 1)),
    ],
)
def test_a_damaged_checkpoint_is_skipped_with_a_warning_that_names_it(tmp_path, name, damage):
    intact, damaged = write(tmp_path, 100, 200)
    damage(damaged / name)
    with pytest.raises(InvalidCheckpointError, match=name):
        read_checkpoint(damaged)
    with pytest.warns(UserWarning, match=rf"skipped an invalid checkpoint: .*{damaged.name}"):
        assert newest_checkpoint(tmp_path).directory == intact


def test_every_bit_of_the_manifest_counts(tmp_path):
    (directory,) = write(tmp_path, 100)
    manifest = (directory / MANIFEST).read_bytes()
    for bit in range(0, 8 * len(manifest), 7):
        flip(directory / MANIFEST, bit)
        with pytest.raises(InvalidCheckpointError):
            read_checkpoint(directory)
        (directory / MANIFEST).write_bytes(manifest)
    read_checkpoint(directory)


@pytest.mark.parametrize(
    "text", [b"null", b"[]", b'{"manifest": null}', b'{"manifest": {"files": 3}}', b"\xff", b"[" * 10**5]
)
def test_a_manifest_of_another_form_is_invalid(tmp_path, text):
    (directory,) = write(tmp_path, 100)
    (directory / MANIFEST).write_bytes(text)
    with pytest.raises(InvalidCheckpointError, match=MANIFEST):
        read_checkpoint(directory)


class Killer:
    """Kills this process before or after one of its system calls. A call writes at most an eighth of a file.

    :param kill_at: 2 n: before call n; 2 n + 1: after call n
    """

    def __init__(self, kill_at):
        self.kill_at = kill_at
        self.n_points = 0

    def install(self):
        for name in SYSTEM_CALLS:
            setattr(os, name, self.wrapped(getattr(os, name), name))

    def wrapped(self, call, name):
        def counted(*args, **kwargs):
            if name == "write":
                args = (args[0], args[1][: max(1, len(args[1]) // 8)])
            self.point()
            result = call(*args, **kwargs)
            self.point()
            return result

        return counted

    def point(self):
        if self.n_points == self.kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        self.n_points += 1


def test_a_kill_at_any_step_of_writing_and_rotating_leaves_a_whole_checkpoint(tmp_path, monkeypatch):
    # What a killed process has written is not lost without fsync, and 3,000 calls of it would be slow
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    prepared = tmp_path / "prepared"
    write(prepared, 100, 200)
    seen = set()
    for kill_at in itertools.count():
        save_path = tmp_path / str(kill_at)
        shutil.copytree(prepared, save_path)

        def write_and_rotate(save_path=save_path, kill_at=kill_at):
            Killer(kill_at).install()
            write(save_path, 300)
            Retention(1).rotate(save_path)

        exit_code = in_a_fork(write_and_rotate)
        checkpoint = newest_checkpoint(save_path)
        num_timesteps = checkpoint.manifest["num_timesteps"]
        seen.add(num_timesteps)
        assert num_timesteps in (200, 300) and checkpoint.files == files_at(num_timesteps)
        write(save_path, 400)
        Retention(1).rotate(save_path)
        assert [path.name.split("_")[2] for path in save_path.iterdir()] == ["400"]
        shutil.rmtree(save_path)
        if exit_code != -signal.SIGKILL:
            assert exit_code == 0
            break
    assert kill_at >= 200
    assert seen == {200, 300}


def test_files_are_synced_before_the_rename_and_the_folder_after_it(tmp_path, monkeypatch):
    calls, names = [], {}
    real = {name: getattr(os, name) for name in ("open", "fsync", "rename")}

    def opened(path, *args, **kwargs):
        descriptor = real["open"](path, *args, **kwargs)
        names[descriptor] = Path(path)
        return descriptor

    monkeypatch.setattr(os, "open", opened)
    monkeypatch.setattr(os, "fsync", lambda file: (calls.append(("fsync", names[file])), real["fsync"](file))[1])
    monkeypatch.setattr(os, "rename", lambda old, new: (calls.append(("rename", old)), real["rename"](old, new))[1])
    write(tmp_path, 100)
    kinds = [kind for kind, _ in calls]
    renamed = calls[kinds.index("rename")][1]
    before, after = calls[: kinds.index("rename")], calls[kinds.index("rename") + 1 :]
    assert [path.name for _, path in before] == [*FILES, MANIFEST, renamed.name]
    assert {path.parent for _, path in before} == {renamed, tmp_path}
    assert after == [("fsync", tmp_path)]


@pytest.mark.parametrize("limit", [0, 1, 5_000, 10_240])
def test_a_full_disk_is_one_error_and_earlier_checkpoints_are_as_they_were(tmp_path, limit):
    (directory,) = write(tmp_path, 100)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        with pytest.raises(CheckpointError, match=r"at 200 steps could not be written.*File too large.*as they were"):
            write(tmp_path, 200)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list(tmp_path.iterdir()) == [directory]
    assert newest_checkpoint(tmp_path).files == files_at(100)
    assert write(tmp_path, 200)[0].name == "checkpoint_000002_200_steps"


@pytest.mark.parametrize("call", ["mkdir", "open", "write", "fsync", "rename"])
def test_any_refusal_of_the_system_is_a_checkpoint_error(tmp_path, monkeypatch, call):
    (directory,) = write(tmp_path, 100)

    def refuse(*args, **kwargs):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, call, refuse)
    with pytest.raises(CheckpointError, match=r"Input/output error"):
        write(tmp_path, 200)
    monkeypatch.undo()
    assert newest_checkpoint(tmp_path).directory == directory
    write(tmp_path, 200)
    assert len(list(tmp_path.iterdir())) == 2


def test_a_save_path_that_is_a_file_is_an_error(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match="could not be written"):
        write(tmp_path / "file", 100)


def test_an_interrupt_leaves_nothing_behind(tmp_path, monkeypatch):
    def interrupt(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path, 100)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("value", [10**30, float("inf")], ids=["a number of 31 digits", "infinity"])
def test_a_manifest_is_read_strictly(tmp_path, value):
    (directory,) = write(tmp_path, 100)
    manifest = json.loads((directory / MANIFEST).read_text())["manifest"]
    (directory / MANIFEST).write_bytes(_sealed(manifest | {"num_timesteps": value}))
    with pytest.raises(InvalidCheckpointError, match=r"manifest\.json is no manifest"):
        read_checkpoint(directory)


def test_the_manifest_is_readable(tmp_path):
    (directory,) = write(tmp_path, 100)
    manifest = json.loads((directory / MANIFEST).read_text())["manifest"]
    assert manifest["files"]["training_state.json"]["size"] == len(files_at(100)["training_state.json"])


@pytest.mark.parametrize("name", ["../elsewhere", "/etc/passwd", "folder/model.zip", ""])
def test_a_manifest_names_files_of_its_own_folder_only(tmp_path, name):
    (directory,) = write(tmp_path, 100)
    manifest = json.loads((directory / MANIFEST).read_text())["manifest"]
    entry = next(iter(manifest["files"].values()))
    (directory / MANIFEST).write_bytes(_sealed(manifest | {"files": manifest["files"] | {name: entry}}))
    with pytest.raises(InvalidCheckpointError, match="which is no file's name"):
        read_checkpoint(directory)


def test_a_large_manifest_is_not_read(tmp_path):
    (directory,) = write(tmp_path, 100)
    with (directory / MANIFEST).open("ab") as file:
        file.write(b" " * 2**20)
    with pytest.raises(InvalidCheckpointError, match="which no manifest has"):
        read_checkpoint(directory)


def test_the_names_of_new_folders_are_synced(tmp_path, monkeypatch):
    synced = []
    sync = checkpoint_directory.sync_directory
    monkeypatch.setattr(checkpoint_directory, "sync_directory", lambda path: (synced.append(path), sync(path)))
    write(tmp_path / "new" / "folder", 100)
    assert {tmp_path, tmp_path / "new"} < set(synced)
    synced.clear()
    write(tmp_path / "new" / "folder", 200)
    assert {path for path in synced if not path.name.startswith(".")} == {tmp_path / "new" / "folder"}


def test_checkpoints_that_are_replaced_while_they_are_looked_for_are_looked_for_again(tmp_path, monkeypatch):
    (old,) = write(tmp_path, 100)
    read = checkpoint_directory.read_checkpoint

    def read_late(directory, *arguments):
        if directory == old and old.exists():
            write(tmp_path, 200)
            shutil.rmtree(old)
        return read(directory, *arguments)

    monkeypatch.setattr(checkpoint_directory, "read_checkpoint", read_late)
    # A warning would be an error of this test
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert newest_checkpoint(tmp_path).manifest["num_timesteps"] == 200


def test_a_manifest_names_few_files(tmp_path):
    (directory,) = write(tmp_path, 100)
    manifest = json.loads((directory / MANIFEST).read_text())["manifest"]
    name, entry = next(iter(manifest["files"].items()))
    for number in range(5):
        (directory / f"link {number}").hardlink_to(directory / name)
    files = manifest["files"] | {f"link {number}": entry for number in range(5)}
    (directory / MANIFEST).write_bytes(_sealed(manifest | {"files": files}))
    with pytest.raises(InvalidCheckpointError, match="is no manifest"):
        read_checkpoint(directory)


def test_without_links_only_the_newest_are_tried(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint_directory, "MAX_TRIES", 2)
    directories = write(tmp_path, 100, 200, 300)
    for directory in directories[1:]:
        (directory / MANIFEST).write_text("{}")
    with pytest.warns(UserWarning, match="skipped an invalid checkpoint"):
        assert newest_checkpoint(tmp_path, follows_links=False) is None
        assert newest_checkpoint(tmp_path).directory == directories[0]
