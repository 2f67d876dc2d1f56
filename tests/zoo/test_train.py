"""``train`` writes checkpoints, which change no bit and end no run; without them it is the RL Zoo's."""

import os
import signal
import sys
import warnings
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import rl_zoo3.train
from environments import ToyEnv
from stable_baselines3.common.callbacks import BaseCallback
from states import assert_same_bits
from zoo_runs import ROLLOUT, results_of, start, training, zoo_in

from sb3_ppo_plus import PPOPlus, zoo
from sb3_ppo_plus.errors import DeadWorkerError, PlainStateError
from sb3_ppo_plus.resuming import checkpoint_writer
from sb3_ppo_plus.resuming.checkpoint_directory import checkpoint_directories
from sb3_ppo_plus.zoo.train import CheckpointedExperiment, RunCheckpoint

NO_CHECKPOINT = "--no-checkpoint"
RUN = Path("logs/ppo_plus/CartPole-v1_1")


@pytest.fixture(autouse=True)
def in_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def trained(*arguments, name="run"):
    """Train in a folder of its own; return the run's folder."""
    before = Path.cwd()
    Path(name).mkdir()
    os.chdir(name)
    try:
        zoo.main(arguments)
    finally:
        os.chdir(before)
    return next(Path(name).glob("logs/ppo_plus/*"))


def registered(monkeypatch, make):
    monkeypatch.setitem(gym.registry, "Toy-v0", gym.envs.registration.EnvSpec("Toy-v0", make))


@pytest.mark.parametrize("env_id", ["CartPole-v1", "Pendulum-v1"])
def test_checkpoints_change_no_bit(env_id):
    flags = ["--env-kwargs", "max_episode_steps:20"]
    with_them = trained(*training(env_id, 5, *flags), name="with")
    without = trained(*training(env_id, 5, *flags, NO_CHECKPOINT), name="without")
    assert len(checkpoint_directories(with_them / "checkpoints")) == 3
    assert_same_bits(results_of(with_them), results_of(without))


def test_without_checkpoints_files_and_bits_are_the_rl_zoos(monkeypatch):
    ours = trained(*training("CartPole-v1", 3, NO_CHECKPOINT), name="ours")
    zoo.register()
    flags = [flag for flag in training("CartPole-v1", 3)[1:] if flag not in ("--checkpoint-freq", str(2 * ROLLOUT))]
    flags[flags.index("learning_rate:cos_1e-3")] = "learning_rate:'cos_1e-3'"
    arguments = ["--algo", "ppo_plus", "-conf", str(zoo.hyperparams_file()), *flags]
    monkeypatch.setattr(sys, "argv", ["train.py", *arguments])
    Path("theirs").mkdir()
    monkeypatch.chdir("theirs")
    rl_zoo3.train.train()
    theirs = RUN.absolute()
    monkeypatch.chdir("..")
    names = {path.relative_to(ours) for path in ours.rglob("*")}
    # The one file that enjoy reads without trust
    assert names - {path.relative_to(theirs) for path in theirs.rglob("*")} == {Path("CartPole-v1/vecnormalize.json")}
    for name in ("args.yml", "config.yml"):
        assert (ours / "CartPole-v1" / name).read_text() == (theirs / "CartPole-v1" / name).read_text()
    ours_found, theirs_found = results_of(ours), results_of(theirs)
    del ours_found["vecnormalize.json"]
    assert_same_bits(ours_found, theirs_found)


def test_other_algorithms_and_searches_get_no_checkpoints():
    small = ["-n", "64", "--eval-freq", "-1", "-params", "n_envs:1", "n_steps:32"]
    zoo.main(["train", "--algo", "ppo", "--env", "CartPole-v1", *small])
    search = ["-optimize", "--n-trials", "1", "--no-optim-plots", "--verbose", "0", "--n-evaluations", "1"]
    zoo.main(["train", "--env", "CartPole-v1", *search, *small])
    assert not list(Path("logs").rglob("checkpoints"))


class Unresumable(ToyEnv):
    """Holds a generator object, which no checkpoint can hold, and draws from it: no replay is the same."""

    numbers = iter(np.random.default_rng(0).random, None)

    def step(self, action):
        observation, reward, *others = super().step(action)
        return observation, reward + next(Unresumable.numbers), *others


def test_an_environment_that_cannot_be_resumed_is_one_warning(monkeypatch):
    registered(monkeypatch, Unresumable)
    with pytest.warns(UserWarning) as caught:
        folder = trained(*training("Toy-v0", 4, params=["policy:MlpPolicy"]))
    texts = [str(warning.message) for warning in caught if "episodes begin anew" in str(warning.message)]
    assert len(texts) == 1, texts
    assert PPOPlus.load(folder / "Toy-v0.zip").num_timesteps == 4 * ROLLOUT
    assert checkpoint_directories(folder / "checkpoints")


@pytest.mark.parametrize("way", ["disk", "state"])
def test_a_checkpoint_that_cannot_be_written_ends_no_run(way, monkeypatch):
    def refuse(*args, **kwargs):
        raise PlainStateError("odd.attribute is a generator") if way == "state" else OSError(28, "No space left")

    if way == "disk":
        monkeypatch.setattr(checkpoint_writer, "write_checkpoint", lambda *args: write_checkpoint(*args))
        from sb3_ppo_plus.resuming import checkpoint_directory

        monkeypatch.setattr(checkpoint_directory, "_write_file", refuse)
        write_checkpoint = checkpoint_directory.write_checkpoint
    else:
        monkeypatch.setattr(RunCheckpoint, "_snapshot", refuse)
    with pytest.warns(UserWarning, match="training goes on without a new checkpoint: .*(No space left|odd.attribute)"):
        folder = trained(*training("CartPole-v1", 5))
    assert PPOPlus.load(folder / "CartPole-v1.zip").num_timesteps == 5 * ROLLOUT
    assert not checkpoint_directories(folder / "checkpoints")


def test_a_users_own_checkpoints_and_resumable_env_are_kept(capsys):
    checkpoint = "{'sb3_ppo_plus.TrainingCheckpoint': {'save_freq': 1, 'save_path': 'own'}}"
    params = ["env_wrapper:sb3_ppo_plus.ResumableEnv", f"callback:{checkpoint}"]
    folder = trained(*training("CartPole-v1", 3, params=params))
    assert checkpoint_directories(Path("run/own"))
    assert not (folder / "checkpoints").exists()
    assert "the zoo writes no other checkpoints" in capsys.readouterr().out


def test_a_run_with_its_own_resumable_env_has_one(monkeypatch):
    envs = []
    create = CheckpointedExperiment.create_envs
    monkeypatch.setattr(
        CheckpointedExperiment, "create_envs", lambda *args, **kwargs: envs.append(create(*args, **kwargs)) or envs[-1]
    )
    trained(*training("CartPole-v1", 1, params=["env_wrapper:sb3_ppo_plus.ResumableEnv"]))
    assert [str(one.unwrapped.envs[0]).count("ResumableEnv") for one in envs] == [1, 1]


class SendSigterm(BaseCallback):
    def _on_step(self):
        if self.num_timesteps == 100:
            os.kill(os.getpid(), signal.SIGTERM)
        return True


def test_sigterm_ends_the_run_after_the_update_and_says_how_it_goes_on(capsys, monkeypatch):
    monkeypatch.setattr("rl_zoo3.callbacks.SendSigterm", SendSigterm, raising=False)
    params = ["callback:rl_zoo3.callbacks.SendSigterm"]
    with pytest.raises(SystemExit) as caught:
        zoo.main(training("CartPole-v1", 4, params=params))
    assert caught.value.code == 128 + signal.SIGTERM
    # Its callback is on no list
    assert f"python -m sb3_ppo_plus.zoo resume {RUN} --trust\n" in capsys.readouterr().out
    assert PPOPlus.load(RUN / "CartPole-v1.zip").num_timesteps == 2 * ROLLOUT
    with pytest.raises(SystemExit, match="With --trust"):
        zoo.main(["resume", str(RUN)])


def test_where_no_checkpoint_can_be_made_a_signal_still_ends_the_run_and_its_model_is_saved(monkeypatch):
    def refuse(*args, **kwargs):
        raise DeadWorkerError("worker 0 of 1 of the SubprocVecEnv was killed by SIGINT")

    monkeypatch.setattr(RunCheckpoint, "_snapshot", refuse)
    monkeypatch.setattr("rl_zoo3.callbacks.SendSigterm", SendSigterm, raising=False)
    with pytest.raises(SystemExit), pytest.warns(UserWarning, match="without a new checkpoint: worker 0"):
        zoo.main(training("CartPole-v1", 4, params=["callback:rl_zoo3.callbacks.SendSigterm"]))
    assert PPOPlus.load(RUN / "CartPole-v1.zip").num_timesteps == 2 * ROLLOUT


def test_no_warning_comes_from_a_usual_run():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        trained(*training("CartPole-v1", 2))


def test_a_run_can_be_killed_from_outside_and_says_where_its_checkpoints_are(tmp_path):
    process = start(["-m", "sb3_ppo_plus.zoo", *training("CartPole-v1", 1000, verbose=1)], tmp_path)
    for line in process.stdout:
        if line.startswith(f"Checkpoint {tmp_path / RUN / 'checkpoints'}"):
            break
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    steps = max(int(path.name.split("_")[2]) for path in checkpoint_directories(RUN / "checkpoints"))
    total = steps + 2 * ROLLOUT
    assert zoo_in(tmp_path, "resume", str(RUN), "--n-timesteps", total)
    assert PPOPlus.load(RUN / "CartPole-v1.zip").num_timesteps == total
