"""The newest and the best valid checkpoints are kept, and no more is read than needed."""

import os
import shutil

import pytest
from checkpoint_files import flip, remaining, write
from interrupted_runs import make_envs, make_model, steps_of

from sb3_ppo_plus import PPOPlus, TrainingCheckpoint, best_checkpoint, latest_checkpoint
from sb3_ppo_plus.resuming import retention
from sb3_ppo_plus.resuming.checkpoint_directory import MANIFEST, _sealed, checkpoint_directories, read_checkpoint
from sb3_ppo_plus.resuming.retention import Retention


@pytest.mark.parametrize(
    "keep_last, kept", [(1, [500]), (2, [500, 400]), (5, [500, 400, 300, 200, 100]), (9, [500, 400, 300, 200, 100])]
)
def test_rotation_keeps_the_newest(tmp_path, keep_last, kept):
    write(tmp_path, 100, 200, 300, 400, 500)
    Retention(keep_last).rotate(tmp_path)
    assert remaining(tmp_path) == kept


@pytest.mark.parametrize(
    "damaged, keep_last, kept",
    [
        ([500], 1, [500, 400]),
        ([500, 400], 1, [500, 400, 300]),
        ([500, 400, 300, 200, 100], 1, [500, 400, 300, 200, 100]),
        ([400], 2, [500, 400, 300]),
        ([100], 3, [500, 400, 300]),
    ],
)
def test_rotation_counts_valid_checkpoints_only(tmp_path, damaged, keep_last, kept):
    for directory in write(tmp_path, 100, 200, 300, 400, 500):
        if int(directory.name.split("_")[2]) in damaged:
            flip(directory / "model.zip", 77)
    Retention(keep_last).rotate(tmp_path)
    assert remaining(tmp_path) == kept


def test_rotation_leaves_other_files_alone(tmp_path):
    others = [
        tmp_path / "best_model.zip",
        tmp_path / "checkpoint_1",
        tmp_path / ".hidden",
        tmp_path / "checkpoint_1_2_steps.zip",
    ]
    for path in others:
        path.write_text("mine")
    write(tmp_path, 100, 200)
    Retention(1).rotate(tmp_path)
    assert all(path.read_text() == "mine" for path in others)
    assert remaining(tmp_path) == [200]


def test_rotation_says_where_the_system_refuses(tmp_path, monkeypatch):
    write(tmp_path, 100, 200)

    def refuse(*args, **kwargs):
        raise PermissionError("not yours")

    monkeypatch.setattr(os, "rename", refuse)
    assert Retention(1).rotate(tmp_path) == ["an old checkpoint could not be removed: not yours"]
    monkeypatch.undo()
    monkeypatch.setattr(shutil, "rmtree", refuse)
    assert Retention(1).rotate(tmp_path) == ["an old checkpoint could not be removed: not yours"]
    assert remaining(tmp_path) == [200]


@pytest.mark.parametrize("step", ["scandir", "rename", "rmtree"])
def test_a_checkpoint_that_vanishes_meanwhile_is_removed(tmp_path, monkeypatch, step):
    old, *_ = write(tmp_path, 100, 200, 300)
    module = shutil if step == "rmtree" else os
    real = getattr(module, step)

    def vanish_first(path, *args, **kwargs):
        if old.name in str(path):
            remove_all(path)
        return real(path, *args, **kwargs)

    remove_all = shutil.rmtree
    monkeypatch.setattr(module, step, vanish_first)
    assert Retention(1, keep_best=1).rotate(tmp_path) == []
    assert remaining(tmp_path) == [300]


RETURNS = {100: 3.0, 200: 9.0, 300: None, 400: 9.0, 500: 1.0, 600: -2.0}


def write_with_returns(save_path):
    for steps, mean_return in RETURNS.items():
        write(save_path, steps, mean_return=mean_return)


@pytest.mark.parametrize(
    "keep_last, keep_best, kept",
    [
        (1, 0, [600]),
        (1, 1, [600, 400]),
        (1, 2, [600, 400, 200]),
        (1, 3, [600, 400, 200, 100]),
        (3, 1, [600, 500, 400]),
        (3, 2, [600, 500, 400, 200]),
        # The one without a return is never among the best
        (1, 9, [600, 500, 400, 200, 100]),
    ],
)
def test_the_best_are_kept_beside_the_newest_and_of_equal_ones_the_newer(tmp_path, keep_last, keep_best, kept):
    write_with_returns(tmp_path)
    Retention(keep_last, keep_best).rotate(tmp_path)
    assert remaining(tmp_path) == kept


def test_a_damaged_checkpoint_is_not_among_the_best(tmp_path):
    write_with_returns(tmp_path)
    for directory in checkpoint_directories(tmp_path):
        if "_400_" in directory.name:
            flip(directory / "model.zip", 77)
    with pytest.warns(UserWarning, match="skipped an invalid checkpoint"):
        assert best_checkpoint(tmp_path).name.endswith("_200_steps")
    Retention(1, 1).rotate(tmp_path)
    assert remaining(tmp_path) == [600, 200]


def test_the_best_checkpoint_is_found(tmp_path):
    assert best_checkpoint(tmp_path) is None
    write(tmp_path, 50)
    assert best_checkpoint(tmp_path) is None
    write_with_returns(tmp_path)
    assert best_checkpoint(str(tmp_path)).name.endswith("_400_steps")
    assert latest_checkpoint(tmp_path).name.endswith("_600_steps")


@pytest.mark.parametrize("value", [True, "9", [9], 10**17, float(2**60)])
def test_only_a_number_is_a_mean_return(tmp_path, value):
    (directory,) = write(tmp_path, 100)
    manifest = read_checkpoint(directory).manifest
    (directory / MANIFEST).write_bytes(_sealed(manifest | {"mean_return": value}))
    expected = float(value) if type(value) in (int, float) else None
    assert read_checkpoint(directory).mean_return == expected
    del manifest["mean_return"]
    (directory / MANIFEST).write_bytes(_sealed(manifest))
    assert read_checkpoint(directory).mean_return is None


@pytest.fixture
def read_directories(monkeypatch):
    """The names of the checkpoints that rotation reads."""
    names = []

    def read(directory):
        names.append(int(directory.name.split("_")[2]))
        return read_checkpoint(directory)

    monkeypatch.setattr(retention, "read_checkpoint", read)
    return names


def test_rotation_reads_only_what_it_does_not_know(tmp_path, read_directories):
    write(tmp_path, 100, 200, 300)
    kept = Retention(2, 1)
    kept.rotate(tmp_path)
    assert read_directories == [300, 200, 100]
    for steps in (400, 500, 600):
        (directory,) = write(tmp_path, steps, mean_return=float(steps))
        kept.remember(directory, float(steps))
        kept.rotate(tmp_path)
    assert read_directories == [300, 200, 100]
    assert remaining(tmp_path) == [600, 500]


@pytest.mark.parametrize(
    "damage",
    [
        lambda directory: flip(directory / "model.zip", 77),
        lambda directory: (directory / "model.zip").unlink(),
        lambda directory: (directory / "training_state.bin").write_bytes(b""),
        lambda directory: os.replace(directory / "training_state.json", directory / "training_state.bin"),
        lambda directory: flip(directory / MANIFEST, 9),
    ],
)
def test_what_was_changed_since_is_read_again_and_does_not_count(tmp_path, read_directories, damage):
    kept = Retention(2)
    for directory in write(tmp_path, 100, 200, 300):
        kept.remember(directory, None)
    damaged = checkpoint_directories(tmp_path)[0]
    # Long after it was written: the clock of a file system may stand still for some milliseconds
    os.utime(damaged / "model.zip", ns=(0, 0))
    damage(damaged)
    kept.rotate(tmp_path)
    assert remaining(tmp_path) == [300, 200, 100]
    assert read_directories == [300]


def test_a_run_keeps_the_best_by_the_mean_return_that_it_logs(tmp_path):
    model = make_model(make_envs(1))
    means = []

    class Logged(TrainingCheckpoint):
        def on_update_end(self):
            means.append(sum(episode["r"] for episode in model.ep_info_buffer) / len(model.ep_info_buffer))
            return super().on_update_end()

    model.learn(96, Logged(1, tmp_path, keep_last=1, keep_best=2))
    written = {steps: mean for steps, mean in zip(range(8, 97, 8), means, strict=True)}
    best = sorted(written, key=lambda steps: (written[steps], steps))[-2:]
    assert steps_of(tmp_path) == sorted({*best, 96})
    directory = best_checkpoint(tmp_path)
    assert directory.name.endswith(f"_{best[-1]}_steps")
    assert read_checkpoint(directory).mean_return == pytest.approx(written[best[-1]])
    assert PPOPlus.resume(directory, make_envs(1), device="cpu").num_timesteps == best[-1]
    assert PPOPlus.resume(tmp_path, make_envs(1), device="cpu").num_timesteps == 96


def test_before_an_episode_has_ended_there_is_no_mean_return(tmp_path):
    model = make_model(make_envs(max_steps=1000, p_terminate=0.0))
    model.learn(16, TrainingCheckpoint(1, tmp_path, keep_best=1))
    assert read_checkpoint(latest_checkpoint(tmp_path)).mean_return is None
    assert best_checkpoint(tmp_path) is None


def test_a_mean_return_that_is_not_finite_is_none(tmp_path):
    model = make_model(make_envs())
    model.learn(16, TrainingCheckpoint(1, tmp_path))
    model.ep_info_buffer.append({"r": float("inf"), "l": 1, "t": 0.0})
    model.learn(16, TrainingCheckpoint(1, tmp_path), reset_num_timesteps=False)
    assert read_checkpoint(latest_checkpoint(tmp_path)).mean_return is None


def test_a_folder_that_cannot_be_listed_is_a_line_and_no_error(tmp_path, monkeypatch):
    def refuse(save_path):
        raise PermissionError("not yours")

    monkeypatch.setattr(retention, "checkpoint_directories", refuse)
    assert Retention(1).rotate(tmp_path) == ["old checkpoints could not be looked for: not yours"]
