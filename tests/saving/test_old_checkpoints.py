"""Checkpoints of version 0.1 are resumed, and end as the runs would have ended."""

import copy
import hashlib
import json
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
from old_checkpoints import CHECKPOINT, RUNS, parameters_of
from old_file_cases import INTERRUPTED_AFTER, N_ENVS, N_STEPS, N_UPDATES, TOTAL_TIMESTEPS
from stable_baselines3.common.vec_env import unwrap_vec_normalize
from states import assert_same_bits, state_of

from sb3_ppo_plus import PPOPlus, TrainingCheckpoint, latest_checkpoint

pytestmark = [
    # The archive was written with NumPy 1.26, so that every version since reads it
    pytest.mark.filterwarnings("ignore:numpy.core.* is deprecated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:what follows may differ in the last bits"),
]

ARCHIVE = Path(__file__).parents[1] / "data" / "checkpoints_0_1.tar.gz"
SHA256 = "a5c77db2992308f6c3bad06fac13f3c1550dbfc68415c26989bcca86a98ed1bf"


@pytest.fixture(scope="module")
def old(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoints_0_1")
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(folder, filter="data")
    return folder / "checkpoints"


@pytest.fixture(scope="module")
def whole_runs(tmp_path_factory):
    """Each run, uninterrupted, with the present code: its end, and its checkpoints."""
    runs = {}
    for name, run in RUNS.items():
        folder, model = tmp_path_factory.mktemp(name), run.make_model()
        model.learn(TOTAL_TIMESTEPS, [*run.make_callbacks(), TrainingCheckpoint(1, folder, keep_last=N_UPDATES)])
        runs[name] = (end_of(model), folder)
    return runs


def end_of(model):
    normalizer = unwrap_vec_normalize(model.env)
    return copy.deepcopy(
        {
            "state": state_of(model),
            "observations": model._last_obs,
            "starts": model._last_episode_starts,
            "normalizer": None if normalizer is None else [vars(normalizer.obs_rms), normalizer.returns],
            "episodes": [(episode["r"], episode["l"]) for episode in model.ep_info_buffer],
        }
    )


def test_the_archive_is_the_one_that_version_0_1_has_written(old):
    assert hashlib.sha256(ARCHIVE.read_bytes()).hexdigest() == SHA256, f"{ARCHIVE} must never change"
    for name in RUNS:
        manifest = json.loads((old / name / CHECKPOINT / "manifest.json").read_text())["manifest"]
        assert manifest["format"] == 1 and "mean_return" not in manifest


@pytest.mark.parametrize("trusted", [True, False])
@pytest.mark.parametrize("name", RUNS)
def test_a_run_of_version_0_1_ends_as_if_it_had_not_been_interrupted(name, trusted, old, whole_runs, tmp_path):
    run, (whole, folder) = RUNS[name], whole_runs[name]
    resumed = PPOPlus.resume(old / name, run.make_env(), device="cpu", trusted=trusted)
    assert resumed.num_timesteps == INTERRUPTED_AFTER * N_STEPS * N_ENVS
    at_interruption = end_of(resumed)
    resumed.continue_learning([*run.make_callbacks(), TrainingCheckpoint(1, tmp_path)])
    with np.load(old / f"{name}.npz") as recorded:
        for parameter, value in parameters_of(resumed).items():
            # Another machine may round otherwise
            np.testing.assert_allclose(value, recorded[parameter], rtol=0, atol=1e-3, err_msg=parameter)
    present = PPOPlus.resume(folder / CHECKPOINT, run.make_env(), device="cpu")
    # Where this processor and this NumPy round as those with which the first half ran
    if have_same_bits(at_interruption, end_of(present)):
        assert_same_bits(end_of(resumed), whole)
    # What was resumed is saved anew
    assert PPOPlus.resume(tmp_path, run.make_env(), device="cpu").num_timesteps == TOTAL_TIMESTEPS


def have_same_bits(value, other):
    try:
        assert_same_bits(value, other)
    except AssertionError:
        return False
    return True


def test_old_and_new_checkpoints_lie_in_one_directory(old, tmp_path):
    run = RUNS["mlp"]
    save_path = tmp_path / "run"
    save_path.mkdir()
    shutil.copytree(old / "mlp" / CHECKPOINT, save_path / CHECKPOINT)
    resumed = PPOPlus.resume(save_path, run.make_env(), device="cpu")
    resumed.continue_learning(TrainingCheckpoint(1, save_path, keep_last=2, keep_best=1))
    assert latest_checkpoint(save_path).name.endswith(f"_{TOTAL_TIMESTEPS}_steps")
    assert not (save_path / CHECKPOINT).exists(), "it counts among the valid ones, and has no mean return"
