"""Whatever a crash of the machine loses of what was not synced, the newest valid checkpoint is whole and not older."""

import itertools
import os
import shutil
import warnings

import pytest
from crash_states import Recorder

from sb3_ppo_plus.resuming.checkpoint_directory import (
    best_checkpoint_in,
    checkpoint_directories,
    newest_checkpoint,
    read_checkpoint,
    write_checkpoint,
)
from sb3_ppo_plus.resuming.retention import Retention

# So small that most files take several writes
LARGEST_WRITE = 250


def files_at(num_timesteps):
    text = str(num_timesteps).encode()
    return {"model.zip": text * 300, "training_state.json": b"{%s}" % text, "training_state.bin": text * 250}


def save(save_path, num_timesteps, mean_return, retention):
    directory = write_checkpoint(save_path, files_at(num_timesteps), num_timesteps, mean_return)
    retention.remember(directory, mean_return)
    assert retention.rotate(save_path) == []


def leave_unfinished(save_path):
    """Leave what killed processes leave."""
    for name in (".checkpoint_000003_300_steps.unfinished", ".checkpoint_000001_100_steps.removed"):
        (save_path / name).mkdir()
        (save_path / name / "model.zip").write_bytes(b"half")


@pytest.mark.parametrize(
    "returns, retention, is_killed_before",
    [
        ([None], (1, 0), False),
        ([None, None], (3, 0), False),
        ([None, None], (1, 0), False),
        ([None, None, None, None], (1, 0), True),
        ([5.0, 3.0, 4.0, 1.0], (1, 1), False),
        ([5.0, 3.0, 4.0, 9.0], (2, 1), True),
    ],
    ids=["first", "nothing_removed", "last_removed", "leftovers_removed", "old_best_kept", "new_best"],
)
def test_a_crash_at_any_moment_of_a_save_leaves_a_whole_checkpoint(
    tmp_path, monkeypatch, returns, retention, is_killed_before
):
    root = tmp_path / "root"
    save_path = root / "runs" / "run"
    root.mkdir()
    # All are there, so that the last save has several to remove
    for number, mean_return in enumerate(returns[:-1]):
        write_checkpoint(save_path, files_at(number), number, mean_return)
    if is_killed_before:
        leave_unfinished(save_path)
    recorder, newest = Recorder(root, LARGEST_WRITE), len(returns) - 1
    with recorder.recording(monkeypatch):
        directory = write_checkpoint(save_path, files_at(newest), newest, returns[-1])
        returned_at = len(recorder.operations)
        kept = Retention(*retention)
        kept.remember(directory, returns[-1])
        assert kept.rotate(save_path) == []
    # Rebuilding crash states, it would only cost time
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    assert len(recorder.operations) > 15
    seen = set()
    for n_done in range(len(recorder.operations) + 1):
        for state in recorder.states(n_done):
            has_returned = n_done >= returned_at
            if (state.contents(), has_returned) in seen:
                continue
            seen.add((state.contents(), has_returned))
            crashed = tmp_path / "crashed"
            state.write_to(crashed)
            check(crashed / "runs" / "run", returns, has_returned, retention)
            shutil.rmtree(crashed)
    assert len(seen) > 30


def check(save_path, returns, has_returned, retention):
    newest = len(returns) - 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        checkpoint, best = newest_checkpoint(save_path), best_checkpoint_in(save_path)
    # Each of its final name is whole
    for directory in checkpoint_directories(save_path):
        whole = read_checkpoint(directory)
        assert whole.files == files_at(whole.manifest["num_timesteps"])
    number = -1 if checkpoint is None else checkpoint.manifest["num_timesteps"]
    assert number == newest if has_returned else number in (newest - 1, newest)
    if retention[1] > 0:
        known = returns if number == newest else returns[:-1]
        assert best is not None and best.mean_return == max(known)
    # The next save finds nothing in its way
    save(save_path, newest + 1, 0.0, Retention(*retention))
    assert newest_checkpoint(save_path).manifest["num_timesteps"] == newest + 1
    assert not [path for path in save_path.iterdir() if path.name.startswith(".")]
    assert len(checkpoint_directories(save_path)) <= sum(retention)


def test_the_simulation_finds_what_is_not_synced(tmp_path, monkeypatch):
    outcomes = {}
    for number, synced in enumerate(itertools.product((False, True), repeat=3)):
        root = tmp_path / str(number)
        root.mkdir()
        recorder = Recorder(root)
        with recorder.recording(monkeypatch):
            write_and_rename(root, *synced)
        states = [state.contents() for state in recorder.states(len(recorder.operations))]
        found = [content for state in states for name, content in state if name == "final"]
        is_whole = all(dict(content).get("file") == b"x" * 60 for content in found)
        lasts = all("final" in dict(state) for state in states)
        outcomes[synced] = (is_whole, lasts)
    assert outcomes.pop((True, True, True)) == (True, True)
    assert outcomes.pop((True, True, False)) == (True, False)
    assert not any(is_whole for is_whole, _ in outcomes.values())


def write_and_rename(root, syncs_file, syncs_directory, syncs_root):
    def sync(path):
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)

    os.mkdir(root / "unfinished")
    descriptor = os.open(root / "unfinished" / "file", os.O_WRONLY | os.O_CREAT)
    for _ in range(2):
        os.write(descriptor, b"x" * 30)
    if syncs_file:
        os.fsync(descriptor)
    os.close(descriptor)
    if syncs_directory:
        sync(root / "unfinished")
    os.rename(root / "unfinished", root / "final")
    if syncs_root:
        sync(root)
