"""Two runs do not write into one directory, and no run begins where it cannot write."""

import errno
import fcntl
import os
import shutil
import signal
import socket
from contextlib import contextmanager

import pytest
from forks import in_a_fork
from interrupted_runs import StopAfter, interrupted, make_envs, make_model, steps_of
from stable_baselines3.common.callbacks import BaseCallback

from sb3_ppo_plus import CheckpointError, PPOPlus, TrainingCheckpoint, latest_checkpoint
from sb3_ppo_plus.resuming import directory_lock
from sb3_ppo_plus.resuming.directory_lock import LOCK_FILE, DirectoryLock

pytestmark = pytest.mark.filterwarnings("ignore:.*holds checkpoints of an earlier run")


@contextmanager
def another_process(do):
    """A fork that does something and then waits until it is killed. Gives its id when that is done."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            do()
            os.write(writing, b"done")
            signal.pause()
        finally:
            os._exit(1)
    os.close(writing)
    assert os.read(reading, 4) == b"done"
    os.close(reading)
    try:
        yield child
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def is_free(save_path):
    """Whether another process could lock the directory. This process's locks are lost by no test of it."""
    return in_a_fork(DirectoryLock(save_path).acquire) == 0


def test_a_second_run_is_an_error_before_its_first_step_that_names_the_first(tmp_path):
    with another_process(DirectoryLock(tmp_path).acquire) as pid:
        model = make_model()
        message = rf"{tmp_path} is in use by another run: process {pid} on '{socket.gethostname()}', since '20..-"
        with pytest.raises(CheckpointError, match=message):
            model.learn(32, TrainingCheckpoint(1, tmp_path))
        assert model.num_timesteps == 0
    # Its file is still there, but the lock has died with the process
    assert (tmp_path / LOCK_FILE).exists()
    model.learn(32, TrainingCheckpoint(1, tmp_path))
    assert steps_of(tmp_path) == [16, 32]


def test_a_second_callback_of_the_same_process_is_an_error(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    checkpoints = [TrainingCheckpoint(1, tmp_path / name) for name in ("real", "link")]
    with pytest.raises(CheckpointError, match=f"another TrainingCheckpoint of this process, {os.getpid()}"):
        make_model().learn(32, checkpoints)
    assert is_free(tmp_path / "real")


class Look(BaseCallback):
    def __init__(self, look):
        super().__init__()
        self.look = look
        self.seen = []

    def _on_step(self):
        self.seen.append(self.look())
        return True


class Broken(Exception):
    pass


def fail():
    raise Broken


def test_the_lock_is_held_during_learn_and_given_back_at_its_end(tmp_path):
    look = Look(lambda: is_free(tmp_path))
    make_model().learn(16, [look, TrainingCheckpoint(1, tmp_path)])
    assert look.seen == [False] * 8 and is_free(tmp_path)
    with pytest.raises(Broken):
        make_model().learn(16, [Look(fail), TrainingCheckpoint(1, tmp_path)])
    assert is_free(tmp_path)


def test_the_lock_outlives_a_backup_in_the_same_process(tmp_path):
    lock = DirectoryLock(tmp_path / "run")
    lock.acquire()
    # It opens and closes every file
    shutil.copytree(tmp_path / "run", tmp_path / "backup")
    assert not is_free(tmp_path / "run")
    lock.release()
    assert is_free(tmp_path / "run")


def test_the_lock_ends_with_its_process_though_a_forked_worker_lives_on(tmp_path):
    reading, writing = os.pipe()
    lock = DirectoryLock(tmp_path)

    def locked_with_a_worker():
        lock.acquire()
        worker = os.fork()
        if worker == 0:
            signal.pause()
        os.write(writing, str(worker).encode())

    with another_process(locked_with_a_worker):
        worker = int(os.read(reading, 20))
        assert not is_free(tmp_path)
    assert is_free(tmp_path)
    os.kill(worker, signal.SIGKILL)


def test_the_lock_is_taken_again_where_its_file_was_removed(tmp_path):
    lock = DirectoryLock(tmp_path)
    lock.acquire()
    (tmp_path / LOCK_FILE).unlink()
    lock.keep()
    assert not is_free(tmp_path)
    (tmp_path / LOCK_FILE).unlink()
    with another_process(DirectoryLock(tmp_path).acquire) as pid:
        with pytest.raises(CheckpointError, match=f"process {pid}"):
            lock.keep()
        assert not lock.is_held


def test_a_forked_worker_has_no_part_in_the_lock(tmp_path):
    lock = DirectoryLock(tmp_path)
    lock.acquire()
    with another_process(lambda: None):
        assert not is_free(tmp_path)
        lock.release()
        assert is_free(tmp_path)


def test_saving_after_learn_locks_the_directory_for_that_time(tmp_path):
    checkpoint = TrainingCheckpoint(1, tmp_path)
    make_model().learn(96, [checkpoint, StopAfter(16)])
    with (
        another_process(DirectoryLock(tmp_path).acquire) as pid,
        pytest.raises(CheckpointError, match=f"process {pid}"),
    ):
        checkpoint.save()
    assert checkpoint.save() == latest_checkpoint(tmp_path)
    assert steps_of(tmp_path) == [16, 16] and is_free(tmp_path)


def test_reading_needs_no_lock(tmp_path):
    interrupted(tmp_path)
    with another_process(DirectoryLock(tmp_path).acquire):
        assert latest_checkpoint(tmp_path) is not None
        assert PPOPlus.resume(tmp_path, make_envs(), device="cpu").num_timesteps == 48


def test_where_the_file_system_has_no_locks_a_warning_says_so_once(tmp_path, monkeypatch):
    def refuse(*arguments):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with pytest.warns(UserWarning, match="has no locks.*No locks available.*nothing stops a second run") as warned:
        make_model().learn(48, TrainingCheckpoint(1, tmp_path))
    assert len(warned) == 1 and steps_of(tmp_path) == [16, 32, 48]


def too_long(tmp_path):
    # 70 characters fewer than the longest path: the lock's file would fit, a checkpoint's would not
    part, n_left = tmp_path, 4095 - 70 - len(str(tmp_path))
    while n_left > 0:
        part = part / ("d" * min(200, n_left - 1))
        n_left -= 201
    return part


@pytest.mark.parametrize(
    "path_in, message",
    [
        (lambda folder: folder / ("d" * 300), "File name too long"),
        (too_long, "File name too long"),
        (lambda folder: folder / "file", "Not a directory"),
        (lambda folder: folder / "file" / "inside", "Not a directory"),
        (lambda folder: folder / "link", "symbolic link"),
        (lambda folder: folder / "pipe", "not a regular file"),
        (lambda folder: folder / "one", "is one checkpoint"),
        (lambda folder: folder / "checkpoint_000001_16_steps" / "run", "run in .* would remove checkpoint_000001"),
    ],
)
def test_where_nothing_can_be_written_is_an_error_before_the_first_step(tmp_path, path_in, message):
    (tmp_path / "file").touch()
    for name in ("link", "pipe", "one"):
        (tmp_path / name).mkdir()
    (tmp_path / "link" / LOCK_FILE).symlink_to(tmp_path / "file")
    os.mkfifo(tmp_path / "pipe" / LOCK_FILE)
    (tmp_path / "one" / "manifest.json").touch()
    model = make_model()
    with pytest.raises(CheckpointError, match=message):
        model.learn(16, TrainingCheckpoint(1, path_in(tmp_path)))
    assert model.num_timesteps == 0


@pytest.mark.parametrize("code", [errno.EACCES, errno.EROFS])
def test_a_directory_that_must_not_be_written_is_an_error_before_the_first_step(tmp_path, monkeypatch, code):
    def refuse(path, *arguments, **kwargs):
        raise OSError(code, os.strerror(code), str(path))

    monkeypatch.setattr(directory_lock.os, "open", refuse)
    model = make_model()
    with pytest.raises(CheckpointError, match=f"no checkpoints can be written to {tmp_path}: .*{os.strerror(code)}"):
        model.learn(16, TrainingCheckpoint(1, tmp_path))
    assert model.num_timesteps == 0


def test_a_run_inside_the_directory_of_another_is_left_alone(tmp_path):
    inner, outer = TrainingCheckpoint(1, tmp_path / "inner", 1), TrainingCheckpoint(1, tmp_path, 1)
    make_model().learn(64, [inner, outer])
    assert steps_of(tmp_path) == steps_of(tmp_path / "inner") == [64]


def test_a_lock_file_of_another_user_is_no_obstacle(tmp_path, monkeypatch):
    opened = os.open

    def refuse(path, *arguments, **keywords):
        if str(path).endswith(LOCK_FILE):
            raise PermissionError(errno.EACCES, "not yours", str(path))
        return opened(path, *arguments, **keywords)

    (tmp_path / LOCK_FILE).touch()
    monkeypatch.setattr(os, "open", refuse)
    lock = DirectoryLock(tmp_path)
    with pytest.warns(UserWarning, match=r"\.lock cannot be opened .*not yours.*: nothing stops a second run"):
        lock.acquire()
    lock.release()
    (tmp_path / LOCK_FILE).unlink()
    with pytest.raises(CheckpointError, match=r"no checkpoints can be written to .*not yours"):
        lock.acquire()
