"""Training under the real Ray Train: what is reported, and a run of which a worker was killed."""

import json
from pathlib import Path

import pytest
from states import assert_same_bits

from sb3_ppo_plus.resuming.checkpoint_directory import checkpoint_directories, read_checkpoint

ray = pytest.importorskip("ray", reason="Ray Train is not installed: pip install -e '.[ray]'")
pytest.importorskip("ray.train.torch", reason="Ray Train is not installed: pip install -e '.[ray]'")
import ray_runs  # noqa: E402  # it needs Ray

N_UPDATES = 6
UPDATE = ray_runs.UPDATE


@pytest.fixture(autouse=True)
def _end_of_ray():
    yield
    ray.shutdown()


# The first worker writes and reports; the second one has nothing of its own
@pytest.mark.heavy
@pytest.mark.parametrize(("distributed", "killed_rank", "from_ray"), [("exact", 1, False), (True, 0, True)])
def test_a_run_of_which_a_worker_was_killed_ends_with_the_bits_of_one_without(
    distributed, killed_rank, from_ray, tmp_path
):
    expected = ray_runs.never_killed(distributed, N_UPDATES)
    try:
        ray_runs.start_ray()
    except Exception as error:
        pytest.skip(f"Ray cannot start on this machine: {error}")
    kill = {"killed_rank": killed_rank, "killed_at": 4 * UPDATE - 8}
    settings = {"distributed": distributed, "n_updates": N_UPDATES, "from_ray": from_ray}
    folder = tmp_path / "killed"
    result = ray_runs.run(folder, tmp_path / "storage", **kill, **settings)
    assert (folder / "killed").read_text() == str(kill["killed_at"])
    assert_is_reported(result, folder)
    end = ray_runs.end_of(folder)
    # Ray may not have heard of the last reports
    assert end["resumed_at"] in ((UPDATE, 2 * UPDATE, 3 * UPDATE) if from_ray else (3 * UPDATE,))
    for name in ("parameters", "statistics"):
        assert_same_bits(end[name], expected[name])


def assert_is_reported(result, folder):
    assert result.error is None
    # Ray's copy is the checkpoint of both workers, whole
    (newest, *_) = checkpoint_directories(folder)
    copy, original = (read_checkpoint(directory) for directory in (Path(result.checkpoint.path), newest))
    assert copy.files == original.files and "rank_1_training_state.json" in copy.files
    metrics = json.loads(json.dumps(result.metrics))
    assert metrics["time/total_timesteps"] == copy.manifest["num_timesteps"] == N_UPDATES * UPDATE
    assert {"train/loss", "time/fps", "time/iterations", "rollout/ep_rew_mean"} <= metrics.keys()
