"""What is reported to Ray Train, and when. A module of this test stands in for Ray; test_ray.py has the real one."""

import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch as th
from environments import make_env
from parted_cases import N_ENVS, N_STEPS, Case
from rank_runs import results_of
from stable_baselines3 import PPO
from stable_baselines3.common.callbacks import BaseCallback

from sb3_ppo_plus import PPOPlus, TrainingCheckpoint, latest_checkpoint
from sb3_ppo_plus.distributed import RayTrainReport

UPDATE = N_ENVS * N_STEPS


@pytest.fixture
def reports(monkeypatch):
    """What was reported: metrics, directory of the checkpoint and whether it was there."""
    found = []
    train = ModuleType("ray.train")
    train.Checkpoint = SimpleNamespace(from_directory=Path)
    train.get_context = train.get_checkpoint = lambda: None

    def report(metrics, checkpoint):
        found.append((metrics, checkpoint, checkpoint is not None and (checkpoint / "manifest.json").exists()))

    train.report = report
    ray = ModuleType("ray")
    ray.train = train
    monkeypatch.setitem(sys.modules, "ray", ray)
    monkeypatch.setitem(sys.modules, "ray.train", train)
    return found


def model_of(n_envs=N_ENVS, **kwargs):
    return Case().make_model(n_envs, **kwargs)


@pytest.mark.parametrize("comes_first", [True, False])
def test_each_checkpoint_is_reported_when_it_is_on_the_disk_also_the_last(comes_first, reports, tmp_path):
    callbacks = [RayTrainReport(), TrainingCheckpoint(2 * UPDATE, tmp_path, keep_last=1)]
    model_of().learn(5 * UPDATE, callbacks if comes_first else callbacks[::-1])
    assert [metrics["time/total_timesteps"] for metrics, _, _ in reports] == [2 * UPDATE, 4 * UPDATE, 5 * UPDATE]
    assert all(was_there for _, _, was_there in reports)
    assert reports[-1][1] == latest_checkpoint(tmp_path)


@pytest.mark.parametrize("is_known", [True, False])
def test_a_run_that_goes_on_reports_from_where_unless_ray_knows(is_known, reports, tmp_path, monkeypatch):
    model_of().learn(UPDATE, TrainingCheckpoint(1, tmp_path))
    newest = latest_checkpoint(tmp_path)
    known = SimpleNamespace(path=str(newest)) if is_known else None
    monkeypatch.setattr(sys.modules["ray.train"], "get_checkpoint", lambda: known)
    model = PPOPlus.resume(tmp_path, Case().make_env(N_ENVS), device="cpu")
    model.learn(2 * UPDATE, [RayTrainReport(), TrainingCheckpoint(2 * UPDATE, tmp_path)], reset_num_timesteps=False)
    expected = [(3 * UPDATE, latest_checkpoint(tmp_path))]
    assert [(metrics["time/total_timesteps"], checkpoint) for metrics, checkpoint, _ in reports] == (
        expected if is_known else [(UPDATE, newest), *expected]
    )


@pytest.mark.filterwarnings("ignore:the run is finished")
def test_the_last_checkpoint_is_reported_where_a_worker_died_before_that(reports, tmp_path):
    model_of().learn(UPDATE, TrainingCheckpoint(1, tmp_path))
    model = PPOPlus.resume(tmp_path, Case().make_env(N_ENVS), device="cpu")
    model.continue_learning([RayTrainReport(), TrainingCheckpoint(1, tmp_path)])
    assert [(metrics["train/n_updates"], checkpoint) for metrics, checkpoint, _ in reports] == [
        (2, latest_checkpoint(tmp_path))
    ]


class Logs(BaseCallback):
    def _on_step(self):
        self.logger.record("mine/step", self.num_timesteps)
        return True

    def _on_rollout_end(self):
        for name, value in {"scalar": np.float32(0.5), "tensor": th.tensor(2), "text": "a", "other": object()}.items():
            self.logger.record(f"mine/{name}", value)


def test_all_that_is_logged_is_reported_as_plain_values(reports):
    model = model_of()
    model.learn(3 * UPDATE, [Logs(), RayTrainReport(seconds=0)])
    assert [metrics["time/total_timesteps"] for metrics, _, _ in reports] == [UPDATE, 2 * UPDATE, 3 * UPDATE]
    metrics = reports[-1][0]
    assert all(type(value) in (bool, int, float, str) for value in metrics.values())
    assert metrics["mine/step"] == 3 * UPDATE
    assert (metrics["mine/scalar"], metrics["mine/tensor"], metrics["mine/text"]) == (0.5, 2, "a")
    assert "mine/other" not in metrics
    assert metrics["train/n_updates"] == 6 and metrics["rollout/ep_rew_mean"] == pytest.approx(
        np.mean([episode["r"] for episode in model.ep_info_buffer])
    )
    # It listens no longer
    assert [type(one).__name__ for one in model.logger.output_formats if type(one).__name__ == "_Logged"] == []


def test_without_checkpoints_reports_wait_for_their_time(reports):
    model_of().learn(3 * UPDATE, RayTrainReport(seconds=1000))
    assert reports == []


def test_all_processes_report_equally_often_and_the_first_one_the_checkpoint(reports, tmp_path):
    def train(rank):
        # The clock of the first one counts
        report = RayTrainReport(seconds=1000 if rank == 0 else 0)
        model_of(N_ENVS // 2, distributed=True).learn(4 * UPDATE, [report, TrainingCheckpoint(2 * UPDATE, tmp_path)])
        return [(metrics["time/total_timesteps"], checkpoint is not None) for metrics, checkpoint, _ in reports]

    first, second = results_of(2, train)
    assert first == [(2 * UPDATE, True), (4 * UPDATE, True)]
    assert second == [(2 * UPDATE, False), (4 * UPDATE, False)]


@pytest.mark.usefixtures("reports")
@pytest.mark.parametrize(("seconds", "error"), [("1", TypeError), (True, TypeError), (-1, ValueError)])
def test_seconds_are_a_number_that_is_not_negative(seconds, error):
    with pytest.raises(error, match=f"seconds must be .* got {seconds!r}"):
        RayTrainReport(seconds)


@pytest.mark.usefixtures("reports")
def test_other_algorithms_are_refused():
    with pytest.raises(TypeError, match="RayTrainReport needs a PPOPlus, got a PPO"):
        PPO("MlpPolicy", make_env(), n_steps=8, batch_size=8).learn(8, RayTrainReport())


def test_without_ray_an_error_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    monkeypatch.setitem(sys.modules, "ray.train", None)
    with pytest.raises(ImportError, match=r"RayTrainReport cannot import ray.train .*the extra \[ray\]"):
        RayTrainReport()


def test_outside_of_a_training_function_an_error_says_so(monkeypatch, reports):
    def get_context():
        raise RuntimeError("not here")

    monkeypatch.setattr(sys.modules["ray.train"], "get_context", get_context)
    model = model_of()
    with pytest.raises(ValueError, match=r"in the training function of a .*TorchTrainer.*: not here"):
        model.learn(UPDATE, RayTrainReport())
    assert model.num_timesteps == 0 and reports == []
