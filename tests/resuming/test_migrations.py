"""Checkpoints of older formats are read, those of newer ones are refused with the version that is needed."""

import json

import pytest
from checkpoint_files import write
from interrupted_runs import interrupted, make_envs

from sb3_ppo_plus import CheckpointError, PPOPlus, latest_checkpoint
from sb3_ppo_plus.errors import InvalidCheckpointError
from sb3_ppo_plus.resuming import checkpoint_directory, migrations
from sb3_ppo_plus.resuming.checkpoint_directory import MANIFEST, _sealed, newest_checkpoint, read_checkpoint


def with_manifest(directory, **changes):
    manifest = json.loads((directory / MANIFEST).read_text())["manifest"]
    (directory / MANIFEST).write_bytes(_sealed(manifest | changes))


def test_there_is_a_migration_from_each_older_format():
    assert sorted(migrations.MIGRATIONS) == list(range(1, migrations.FORMAT))


def test_a_state_of_an_older_format_goes_through_all_migrations_in_order(tmp_path, monkeypatch):
    def halve(state):
        return {**state, "seconds": state.pop("half_seconds") * 2}

    def undo_renaming(state):
        return {**state, "half_seconds": state.pop("half_of_the_seconds")}

    interrupted(tmp_path)
    state_file = latest_checkpoint(tmp_path) / "training_state.json"
    state = json.loads(state_file.read_text())
    seconds = state.pop("seconds")
    files = read_checkpoint(latest_checkpoint(tmp_path)).files
    files["training_state.json"] = json.dumps({**state, "half_of_the_seconds": seconds / 2}).encode()
    checkpoint_directory.write_checkpoint(tmp_path, files, 48)
    monkeypatch.setattr(migrations, "FORMAT", 3)
    monkeypatch.setattr(migrations, "MIGRATIONS", {1: undo_renaming, 2: halve})
    resumed = PPOPlus.resume(tmp_path, make_envs(), device="cpu", trusted=False)
    assert resumed._current_run.continuation["seconds"] == pytest.approx(seconds)


@pytest.mark.parametrize("written", [0, 2, 10**9, True, 1.0, "1", None, [1]])
def test_another_format_is_refused_with_the_version_that_wrote_it(tmp_path, written):
    (directory,) = write(tmp_path, 100)
    with_manifest(directory, format=written, versions={"sb3-ppo-plus": "7.1.0"})
    message = r"its format is .*, this version reads 1\. sb3-ppo-plus '7\.1\.0' wrote it: install that version"
    with pytest.raises(InvalidCheckpointError, match=message):
        read_checkpoint(directory)
    with pytest.warns(UserWarning, match=message):
        assert newest_checkpoint(tmp_path) is None
    with pytest.warns(UserWarning), pytest.raises(CheckpointError, match=message):
        PPOPlus.resume(tmp_path, make_envs())


@pytest.mark.parametrize("versions", [None, {}, [], "7.1.0"])
def test_a_format_whose_version_is_not_named_is_refused(tmp_path, versions):
    (directory,) = write(tmp_path, 100)
    with_manifest(directory, format=2, versions=versions)
    with pytest.raises(InvalidCheckpointError, match="its format is 2"):
        read_checkpoint(directory)
