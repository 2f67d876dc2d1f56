"""Checkpoints are written in the background, from snapshots that are finished."""

import io
import os
import resource
import signal
import threading
import time
import zipfile
from pathlib import Path

import pytest
from environments import ToyEnv
from interrupted_runs import StopAfter, learned, make_envs, make_model, steps_of
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.vec_env import SubprocVecEnv, VecNormalize
from states import assert_same_bits, state_of

from sb3_ppo_plus import CheckpointError, PPOPlus, TrainingCheckpoint, latest_checkpoint
from sb3_ppo_plus.resuming import checkpoint_writer
from sb3_ppo_plus.resuming.checkpoint_writer import CheckpointWriter
from sb3_ppo_plus.resuming.training_state import take_snapshot
from sb3_ppo_plus.saving.model_snapshot import ModelSnapshots

FOREVER = 120


class Disk:
    """Stands between the writer and the disk. Where it is slow, writing ends when somebody waits for it."""

    def __init__(self, monkeypatch):
        self.is_slow, self.is_full = False, False
        self.n_waits = 0
        self.when_it_goes_on = lambda: None
        self.threads = []
        self._begun, self._may_go_on = threading.Event(), threading.Event()
        self._write, self._wait = checkpoint_writer.write_checkpoint, CheckpointWriter.wait
        monkeypatch.setattr(checkpoint_writer, "write_checkpoint", self._write_slowly)
        self._settle = CheckpointWriter.settle
        monkeypatch.setattr(CheckpointWriter, "settle", lambda writer: (self.go_on(), self._settle(writer)))
        monkeypatch.setattr(CheckpointWriter, "wait", lambda writer: self._waited_for(writer))

    def is_writing(self):
        """Whether a checkpoint is being written. It waits until writing has begun."""
        return self.is_slow and self._begun.wait(FOREVER)

    def go_on(self):
        self._may_go_on.set()

    def _write_slowly(self, *arguments):
        self.threads.append(threading.current_thread())
        if self.is_slow and threading.current_thread() is not threading.main_thread():
            self._may_go_on.clear()
            self._begun.set()
            assert self._may_go_on.wait(FOREVER)
            self._begun.clear()
            self.when_it_goes_on()
        if self.is_full:
            raise CheckpointError(f"no room at {arguments[2]} steps")
        return self._write(*arguments)

    def _waited_for(self, writer):
        if self.is_slow and writer._in_flight is not None and not writer._in_flight.done():
            assert self._begun.wait(FOREVER)
            self.n_waits += 1
            self.go_on()
        self._wait(writer)


@pytest.fixture
def disk(monkeypatch):
    return Disk(monkeypatch)


class At(BaseCallback):
    """Does something in the rollout, at a number of steps."""

    def __init__(self, num_timesteps, do):
        super().__init__()
        self.at, self.do = num_timesteps, do

    def _on_step(self):
        if self.num_timesteps == self.at:
            self.do()
        return True


def test_training_goes_on_while_a_checkpoint_is_written_and_its_bits_are_those_of_its_update(tmp_path, disk):
    disk.is_slow = True
    seen = []

    def look():
        assert disk.is_writing()
        seen.append((steps_of(tmp_path), model.last_checkpoint))

    model = make_model(VecNormalize(make_envs()))
    model.learn(96, [TrainingCheckpoint(1, tmp_path), At(24, look), At(40, look), StopAfter(48)])
    # The checkpoint at 32 steps has waited for the one at 16
    assert [steps for steps, _ in seen] == [[], [16]]
    assert seen[0][1] is None and seen[1][1].endswith("_16_steps")
    assert disk.n_waits == 3
    expected = learned(env=VecNormalize(make_envs()))
    for steps in (16, 32, 48):
        (directory,) = tmp_path.glob(f"checkpoint_*_{steps}_steps")
        resumed = PPOPlus.resume(directory, VecNormalize(make_envs()), device="cpu")
        resumed.continue_learning()
        assert_same_bits(state_of(resumed), expected)


def test_a_snapshot_does_not_change_with_training():
    model, files, snapshots = make_model(VecNormalize(make_envs())), [], []

    class Snap(BaseCallback):
        def _on_step(self):
            return True

        def on_update_end(self):
            snapshots.append(take_snapshot(model, self, ModelSnapshots()))
            files.append(snapshots[-1].files())
            return True

    model.learn(64, Snap())
    for snapshot, at_once in zip(snapshots, files, strict=True):
        later = snapshot.files()
        assert later["training_state.json"] == at_once["training_state.json"]
        assert later["training_state.bin"] == at_once["training_state.bin"]
        assert without_times(later["model.zip"]) == without_times(at_once["model.zip"])


def without_times(archive):
    with zipfile.ZipFile(io.BytesIO(archive)) as opened:
        return {name: opened.read(name) for name in opened.namelist()}


def test_learn_returns_when_the_last_checkpoint_is_written(tmp_path, disk):
    disk.is_slow = True
    model = make_model()
    # Neither the end of training nor a signal: the checkpoint at 16 steps is in flight when learn ends
    model.learn(96, [TrainingCheckpoint(1, tmp_path), StopAfter(16)])
    assert disk.n_waits == 1 and steps_of(tmp_path) == [16]
    assert model.last_checkpoint == str(latest_checkpoint(tmp_path))


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit])
def test_learn_waits_for_the_checkpoint_also_where_training_fails(tmp_path, disk, error):
    disk.is_slow = True

    def fail():
        raise error

    model = make_model()
    with pytest.raises(error):
        model.learn(96, [TrainingCheckpoint(1, tmp_path), At(24, fail)])
    assert steps_of(tmp_path) == [16]


def test_an_interrupt_at_the_end_leaves_the_rest_to_the_thread(tmp_path, disk):
    disk.is_slow = True
    disk.when_it_goes_on = lambda: signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
    model, checkpoint = make_model(), TrainingCheckpoint(1, tmp_path, on_signal=False)
    # Shells let processes in the background ignore SIGINT
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            model.learn(96, [checkpoint, StopAfter(16)])
    finally:
        signal.signal(signal.SIGINT, before)
    disk.is_slow = False
    checkpoint.wait_for_checkpoint()
    assert steps_of(tmp_path) == [16]
    while checkpoint._writer._lock.is_held:
        # The thread gives it back last
        time.sleep(0.001)
    model.continue_learning(TrainingCheckpoint(1, tmp_path))
    assert_same_bits(state_of(model), learned())


def test_a_write_that_failed_is_the_error_of_the_next_checkpoint_and_training_can_go_on(tmp_path, disk):
    def fill():
        disk.is_full = True

    model, checkpoint = make_model(), TrainingCheckpoint(1, tmp_path)
    with pytest.raises(CheckpointError, match="no room at 32 steps"):
        model.learn(96, [checkpoint, At(24, lambda: (checkpoint.wait_for_checkpoint(), fill()))])
    assert model.num_timesteps == 48 and steps_of(tmp_path) == [16]
    assert model.last_checkpoint.endswith("_16_steps")
    disk.is_full = False
    model.continue_learning(checkpoint)
    assert_same_bits(state_of(model), learned())
    assert steps_of(tmp_path) == [64, 80, 96]


def test_a_write_that_failed_is_the_error_at_the_end_of_learn(tmp_path, disk):
    disk.is_full = True
    model = make_model()
    with pytest.raises(CheckpointError, match="no room at 16 steps"):
        model.learn(96, [TrainingCheckpoint(1, tmp_path), StopAfter(16)])
    # Also where learn is called while an exception is handled
    try:
        raise RuntimeError("outside")
    except RuntimeError:
        with pytest.raises(CheckpointError, match="no room at 16 steps"):
            make_model().learn(96, [TrainingCheckpoint(1, tmp_path), StopAfter(16)])


def test_a_write_that_failed_does_not_hide_why_training_has_failed(tmp_path, disk):
    def fail():
        raise RuntimeError("broken")

    disk.is_full = True
    with (
        pytest.warns(UserWarning, match="training has ended with an exception, and: no room at 16 steps"),
        pytest.raises(RuntimeError, match="broken"),
    ):
        make_model().learn(96, [TrainingCheckpoint(1, tmp_path), At(24, fail)])


def test_an_error_of_training_can_name_the_checkpoint_that_is_being_written(tmp_path, disk):
    seen = []

    def look():
        assert disk.is_writing() and model.last_checkpoint is None
        model._current_run.wait_for_checkpoints()
        seen.append(model.last_checkpoint)

    disk.is_slow = True
    model = make_model()
    model.learn(32, [TrainingCheckpoint(1, tmp_path), At(24, look)])
    assert len(seen) == 1 and seen[0].endswith("_16_steps")


def test_waiting_leaves_the_error_of_a_failed_write_for_later(tmp_path, disk):
    disk.is_full = True
    model, checkpoint = make_model(), TrainingCheckpoint(1, tmp_path)
    checkpoint.wait_for_checkpoint()
    with pytest.raises(CheckpointError, match="no room at 16 steps"):
        model.learn(96, [checkpoint, At(24, checkpoint.wait_for_checkpoint)])
    assert model.num_timesteps == 32


def test_all_callbacks_hear_of_the_end_of_learn_where_a_write_has_failed(tmp_path, disk):
    heard = []

    class Hears(BaseCallback):
        def _on_step(self):
            return True

        def on_learn_end(self):
            heard.append(threading.active_count())

    n_threads = threading.active_count()
    disk.is_full = True
    with pytest.raises(CheckpointError):
        make_model().learn(96, [Hears(), TrainingCheckpoint(1, tmp_path), StopAfter(16)])
    assert heard == [n_threads], "the thread has ended"


def test_save_returns_when_the_checkpoint_is_on_the_disk(tmp_path, disk):
    checkpoint, seen = TrainingCheckpoint(10_000, tmp_path), []
    model = make_model()

    class Saves(BaseCallback):
        def _on_step(self):
            return True

        def on_update_end(self):
            seen.append((checkpoint.save(), steps_of(tmp_path), model.last_checkpoint))
            return True

    model.learn(96, [checkpoint, Saves(), StopAfter(32)])
    assert [steps for _, steps, _ in seen] == [[16], [16, 32]]
    assert [str(directory) for directory, _, _ in seen] == [last for _, _, last in seen]
    assert set(disk.threads) == {threading.main_thread()}


def test_the_thread_is_no_daemon_so_that_the_interpreter_waits_for_it(tmp_path, disk):
    make_model().learn(96, [TrainingCheckpoint(1, tmp_path), StopAfter(48)])
    assert len(disk.threads) == 3
    assert not any(thread.daemon or thread is threading.main_thread() for thread in disk.threads)


def test_workers_can_be_forked_while_a_checkpoint_is_written(tmp_path, disk):
    def fork():
        assert disk.is_writing()
        env = SubprocVecEnv([ToyEnv] * 2, "fork")
        env.reset()
        env.close()

    disk.is_slow = True
    make_model().learn(32, [TrainingCheckpoint(1, tmp_path), At(24, fork)])
    assert steps_of(tmp_path) == [16, 32]


def test_what_could_not_be_removed_is_a_warning_of_the_main_thread(tmp_path, monkeypatch):
    rename = os.rename

    def refuse(old, new):
        if str(new).endswith("removed"):
            raise PermissionError("not yours")
        rename(old, new)

    monkeypatch.setattr(os, "rename", refuse)
    with pytest.warns(UserWarning, match="an old checkpoint could not be removed: not yours"):
        make_model().learn(48, TrainingCheckpoint(1, tmp_path, keep_last=1))
    assert steps_of(tmp_path) == [16, 32, 48]


def test_the_directory_is_that_of_the_start_of_learn_wherever_the_program_goes(tmp_path, monkeypatch):
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    go = At(24, lambda: os.chdir(tmp_path / "elsewhere"))
    make_model().learn(48, [TrainingCheckpoint(1, "checkpoints"), go])
    assert steps_of(tmp_path / "checkpoints") == [16, 32, 48]


def test_a_function_in_the_model_that_refers_to_the_callback_is_saved_and_does_not_grow(tmp_path):
    model, checkpoint = make_model(), TrainingCheckpoint(1, tmp_path, keep_last=6)
    train = model.train

    def trained():
        assert checkpoint.model is model
        train()

    model.train = trained
    model.learn(96, checkpoint)
    sizes = [(path / "model.zip").stat().st_size for path in sorted(tmp_path.glob("checkpoint_*"))]
    assert len(sizes) == 6 and max(sizes) < 1.2 * min(sizes)
    resumed = PPOPlus.resume(tmp_path, make_envs(), device="cpu")
    assert resumed.num_timesteps == 96


class Own(PPOPlus):
    """Adds to what is saved, by a method of its own."""

    def save(self, path, exclude=None, include=None):
        self.saved_by = threading.current_thread()
        super().save(path, [*(exclude or []), "saved_by"], include)


def test_a_save_of_ones_own_is_called_in_the_main_thread(tmp_path):
    model = Own("MlpPolicy", make_envs(), n_steps=8, batch_size=8, device="cpu")
    model.learn(32, TrainingCheckpoint(1, tmp_path))
    assert model.saved_by is threading.main_thread()
    assert Own.resume(tmp_path, make_envs(), device="cpu").num_timesteps == 32


def test_what_the_disk_says_is_in_the_error(tmp_path):
    model, limits = make_model(), resource.getrlimit(resource.RLIMIT_FSIZE)
    checkpoint = TrainingCheckpoint(1, tmp_path)

    def fill():
        checkpoint.wait_for_checkpoint()
        resource.setrlimit(resource.RLIMIT_FSIZE, (5_000, limits[1]))

    try:
        with pytest.raises(CheckpointError, match=r"checkpoint at 48 steps could not be written.*File too large"):
            model.learn(96, [checkpoint, At(40, fill)])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert steps_of(tmp_path) == [16, 32]
    model.continue_learning(TrainingCheckpoint(1, tmp_path / "elsewhere"))
    assert_same_bits(state_of(model), learned())
    assert PPOPlus.resume(tmp_path, make_envs(), device="cpu").num_timesteps == 32
    assert not list(Path(tmp_path).glob(".checkpoint*"))
