"""The RL Zoo integration: hyperparameter file, registration, command line, schedules, hyperparameter search."""

import argparse
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import rl_zoo3.enjoy
import rl_zoo3.train
import yaml
from environments import MaskedEnv
from rl_zoo3 import ALGOS
from rl_zoo3.exp_manager import ExperimentManager
from rl_zoo3.utils import SimpleLinearSchedule
from stable_baselines3 import PPO
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.utils import ConstantSchedule
from stable_baselines3.common.vec_env import VecNormalize

from sb3_ppo_plus import PPOPlus, ResumableEnv, zoo
from sb3_ppo_plus.resuming.checkpoint_directory import checkpoint_directories
from sb3_ppo_plus.zoo import hyperparams as zoo_hyperparams
from sb3_ppo_plus.zoo import train as zoo_train

ROOT = Path(__file__).parents[2]
CLASSIC = ["CartPole-v1", "Acrobot-v1", "MountainCar-v0", "MountainCarContinuous-v0", "Pendulum-v1"]
NO_VELOCITIES = ["CartPoleNoVel-v1", "PendulumNoVel-v1", "LunarLanderNoVel-v3"]
TOY_TEXT = ["Taxi-v4"]
BOX2D = ["LunarLander-v3", "LunarLanderContinuous-v3", "BipedalWalker-v3"]
MUJOCO = [
    f"{name}-v5"
    for name in (
        "HalfCheetah",
        "Hopper",
        "Walker2d",
        "Ant",
        "Swimmer",
        "Humanoid",
        "Reacher",
        "InvertedDoublePendulum",
    )
]
SCHEDULES = ["lin_3e-4", "cos_3e-4", "warmup_cos_3e-4", "exp_3e-4_1e-5", "lin_3e-4_1e-5", "3e-4", 3e-4, None]


@pytest.fixture(autouse=True)
def registered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    zoo.register()
    monkeypatch.chdir(tmp_path)


def manager(algo: str, env_id: str, hyperparams: dict[str, Any] | None = None) -> ExperimentManager:
    config = str(zoo.hyperparams_file()) if algo == "ppo_plus" else None
    return ExperimentManager(
        argparse.Namespace(), algo, env_id, "logs", eval_freq=-1, verbose=0, config=config, hyperparams=hyperparams
    )


def set_up(algo: str, env_id: str, hyperparams: dict[str, Any] | None = None) -> Any:
    result = manager(algo, env_id, hyperparams).setup_experiment()
    assert result is not None
    return result[0]


def preprocessed(algo: str, hyperparams: dict[str, Any]) -> dict[str, Any]:
    return manager(algo, "CartPole-v1")._preprocess_hyperparams({"n_timesteps": 100, **hyperparams})[0]


# --- the hyperparameter file ---


@pytest.mark.parametrize("env_id", [*CLASSIC, *TOY_TEXT, *BOX2D, *MUJOCO, *NO_VELOCITIES, "atari", "default"])
def test_the_file_has_an_entry(env_id):
    assert env_id in yaml.safe_load(zoo.hyperparams_file().read_text())


def test_the_default_entry_normalises():
    assert zoo.load_hyperparams("default")["normalize"]


# The last two have no entry of their own: they get `atari` and `default`.
@pytest.mark.parametrize(
    "env_id", [*CLASSIC, *TOY_TEXT, *BOX2D, *MUJOCO, *NO_VELOCITIES, "ALE/Pong-v5", "MountainCarNoVel-v0"]
)
def test_every_entry_builds_a_model(env_id):
    entry = zoo.load_hyperparams(env_id)
    # Rollout buffers of full length would only cost time and memory.
    n_steps = min(entry.get("n_steps", 2048), 64)
    model = set_up("ppo_plus", env_id, {"n_steps": n_steps})

    assert isinstance(model, PPOPlus)
    assert model.n_steps == n_steps
    assert model.n_envs == entry.get("n_envs", 1)
    assert model.batch_size == entry.get("batch_size", 64)
    assert model.gamma == entry.get("gamma", 0.99)
    assert model.use_sde == entry.get("use_sde", False)
    assert (model.get_vec_normalize_env() is not None) == entry.get("normalize", False)
    model.env.close()


def test_taxi_is_masked():
    model = set_up("ppo_plus", "Taxi-v4", {"n_steps": 16})
    assert model.policy.action_masking
    model.env.close()


def test_an_entry_is_the_callers_own():
    zoo.load_hyperparams("HalfCheetah-v5")["policy_kwargs"]["activation_fn"] = "changed"
    assert zoo.load_hyperparams("HalfCheetah-v5")["policy_kwargs"]["activation_fn"] == "relu"
    assert zoo.load_hyperparams("Hopper-v5")["policy_kwargs"]["activation_fn"] == "relu"


@pytest.mark.parametrize(
    ("env_id", "key"),
    [
        ("ALE/Pong-v5", "atari"),
        ("ALE/NotYetRegistered-v5", "atari"),
        ("PongNoFrameskip-v4", "atari"),
        ("FrozenLake-v1", "default"),
        ("NotRegistered-v0", "default"),
    ],
)
def test_ids_without_an_entry_fall_back_as_in_the_rl_zoo(env_id, key):
    assert zoo.load_hyperparams(env_id) == zoo.load_hyperparams(key)


def test_the_packaged_file_comes_before_the_checkouts(tmp_path, monkeypatch):
    monkeypatch.setattr(zoo_hyperparams, "__file__", str(tmp_path / "sb3_ppo_plus" / "zoo" / "hyperparams.py"))
    checkout = tmp_path / "zoo_hyperparams" / "ppo_plus.yml"
    packaged = tmp_path / "sb3_ppo_plus" / "zoo_hyperparams" / "ppo_plus.yml"
    with pytest.raises(FileNotFoundError, match="reinstall sb3-ppo-plus"):
        zoo.hyperparams_file()
    for path in (checkout, packaged):
        path.parent.mkdir(parents=True)
        path.touch()
        assert zoo.hyperparams_file() == path.resolve()


# --- hyperparameters on their way through the RL Zoo ---


@pytest.mark.parametrize("key", zoo.SCHEDULED_ARGUMENTS)
@pytest.mark.parametrize("value", SCHEDULES)
def test_schedules_reach_ppo_plus_as_they_were_written(key, value):
    assert preprocessed("ppo_plus", {key: value})[key] == value


def test_a_schedule_means_in_the_zoo_what_it_means_in_ppo_plus():
    model = set_up("ppo_plus", "CartPole-v1", {"learning_rate": "cos_1e-3", "clip_range_vf": None})
    assert model.lr_schedule(0.25) == pytest.approx(1e-3 * (1 - np.cos(np.pi * 0.25)) / 2)
    assert model.clip_range_vf is None


@pytest.mark.parametrize("value", ["lin_0.1", "cos_0.1"])
def test_schedules_of_other_algorithms_stay_the_rl_zoos(value):
    processed = preprocessed("ppo", {"learning_rate": value, "clip_range": 0.2, "ent_coef": "kept"})
    assert isinstance(processed["learning_rate"], SimpleLinearSchedule)
    assert isinstance(processed["clip_range"], ConstantSchedule)
    assert processed["ent_coef"] == "kept"
    with pytest.raises(ValueError):
        preprocessed("ppo", {"learning_rate": "warmup_cos_3e-4"})


def test_other_algorithms_keep_their_class_and_their_hyperparameters():
    model = set_up("ppo", "CartPole-v1")
    assert type(model) is PPO
    assert isinstance(model.learning_rate, SimpleLinearSchedule)


@pytest.mark.parametrize("as_text", [False, True])
def test_policy_kwargs_may_be_a_mapping_or_a_string(as_text):
    policy_kwargs = {"activation_fn": "relu", "net_arch": {"pi": [8], "vf": [16]}}
    model = set_up(
        "ppo_plus", "CartPole-v1", {"policy_kwargs": str(policy_kwargs) if as_text else policy_kwargs, "n_envs": 1}
    )
    assert type(model.policy.mlp_extractor.policy_net[1]).__name__ == "ReLU"
    assert model.policy.mlp_extractor.latent_dim_vf == 16
    # What is saved for `enjoy` is what was given, whatever the model made of it.
    saved = Path("logs/ppo_plus/CartPole-v1_1/CartPole-v1/config.yml").read_text()
    assert "relu" in saved
    assert "python/name" not in saved


def test_preprocessing_leaves_the_saved_hyperparameters_alone():
    normalize, policy_kwargs = {"norm_reward": False}, {"net_arch": [8]}
    hyperparams = {"n_timesteps": 1, "normalize": normalize, "policy_kwargs": policy_kwargs, "gamma": 0.5}
    processed = manager("ppo_plus", "CartPole-v1")._preprocess_hyperparams(hyperparams)[0]
    processed["policy_kwargs"]["net_arch"].append(16)
    assert normalize == {"norm_reward": False}
    assert policy_kwargs == {"net_arch": [8]}


def test_registering_twice_changes_nothing():
    before = ExperimentManager._preprocess_hyperparams
    zoo.register()
    assert ExperimentManager._preprocess_hyperparams is before


# --- the command line ---


class Parsed(Exception):
    """Carries what the RL Zoo's own parser made of the command line."""


def parsed(monkeypatch: pytest.MonkeyPatch, *argv: str) -> Any:
    def stop(*args: Any, **kwargs: Any) -> None:
        raise Parsed(args)

    # The first is for other algorithms
    monkeypatch.setattr(rl_zoo3.train, "ExperimentManager", stop)
    monkeypatch.setattr(zoo_train, "CheckpointedExperiment", stop)
    monkeypatch.setattr(rl_zoo3.enjoy, "get_model_path", stop)
    with pytest.raises(Parsed) as caught:
        zoo.main(argv)
    args = caught.value.args[0]
    if argv[0] == "train":
        return args[0].algo, args[0].conf_file
    _, folder, algo, *_ = args
    return algo, folder


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ([], ("ppo_plus", "ours")),
        (["-f", "elsewhere"], ("ppo_plus", "ours")),
        (["--algo", "ppo_plus", "-params", "gamma:0.9"], ("ppo_plus", "ours")),
        (["--algo", "ppo"], ("ppo", None)),
        (["--algo=ppo"], ("ppo", None)),
        (["-n", "5", "--al", "ppo"], ("ppo", None)),
        (["--a=sac"], ("sac", None)),
        (["-conf", "mine.yml"], ("ppo_plus", "mine.yml")),
        (["-conf=mine.yml"], ("ppo_plus", "mine.yml")),
        (["-con", "mine.yml"], ("ppo_plus", "mine.yml")),
        (["--conf-file", "mine.yml"], ("ppo_plus", "mine.yml")),
        (["--conf-file=mine.yml"], ("ppo_plus", "mine.yml")),
        (["--conf", "mine.yml", "--algo=ppo"], ("ppo", "mine.yml")),
    ],
)
def test_train_gets_what_the_user_did_not_give(monkeypatch, flags, expected):
    algo, config = parsed(monkeypatch, "train", "--env", "CartPole-v1", *flags)
    assert (algo, "ours" if config == str(zoo.hyperparams_file()) else config) == expected


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ([], ("ppo_plus", "logs")),
        (["--algo", "ppo", "--trust"], ("ppo", "rl-trained-agents")),
        (["--trust", "-f", "logs"], ("ppo_plus", "logs")),
        (["--trust", "--alg=ppo", "-f", "logs"], ("ppo", "logs")),
        (["-f", "mine"], ("ppo_plus", "mine")),
        (["-fmine"], ("ppo_plus", "mine")),
        (["-f=mine"], ("ppo_plus", "mine")),
        (["--folder", "mine"], ("ppo_plus", "mine")),
        (["--folder=mine"], ("ppo_plus", "mine")),
        (["--fo", "mine"], ("ppo_plus", "mine")),
    ],
)
def test_enjoy_gets_what_the_user_did_not_give(monkeypatch, flags, expected):
    assert parsed(monkeypatch, "enjoy", "--env", "CartPole-v1", *flags) == expected


@pytest.mark.parametrize("flags", [["--no-such-flag"], ["--algo"], ["--algo", "nope"]])
def test_the_rl_zoo_itself_judges_the_flags_and_the_command_line_is_restored(flags, capsys):
    argv = list(sys.argv)
    with pytest.raises(SystemExit) as caught:
        zoo.main(["train", *flags])
    assert caught.value.code == 2
    assert "python -m sb3_ppo_plus.zoo train" in capsys.readouterr().err
    assert sys.argv == argv


@pytest.mark.parametrize("env_id", ["CartPole-v1", "MountainCarContinuous-v0"])
def test_train_then_enjoy_then_train_on(env_id, capsys):
    run = Path(f"logs/ppo_plus/{env_id}_1")
    train = ["train", "--env", env_id, "--seed", "3", "--device", "cpu", "-n", "64", "--eval-episodes", "1"]
    small = ["-params", "n_steps:16", "n_envs:2", "batch_size:16", "n_epochs:1", "learning_rate:'warmup_cos_1e-3'"]

    zoo.main([*train, "--eval-freq", "32", "--save-freq", "32", *small])
    assert (run / "best_model.zip").is_file()
    assert PPOPlus.load(run / f"{env_id}.zip").num_timesteps == 64

    capsys.readouterr()
    zoo.main(["enjoy", "--env", env_id, "--device", "cpu", "--no-render", "-n", "1200"])
    output = capsys.readouterr().out
    assert f"Loading {run / env_id}.zip" in output
    assert "Mean reward" in output
    zoo.main(["enjoy", "--env", env_id, "--device", "cpu", "--no-render", "-n", "5", "--load-last-checkpoint"])

    zoo.main([*train, "--eval-freq", "-1", "-i", str(run / f"{env_id}.zip"), *small, "vf_coef:'lin_0.5_0.1'"])
    continued = PPOPlus.load(f"logs/ppo_plus/{env_id}_2/{env_id}.zip")
    assert continued.vf_coef == "lin_0.5_0.1"


def test_train_and_enjoy_use_the_masks_of_the_env(monkeypatch, capsys):
    # The env refuses every invalid action
    env_id = "Masked-v0"
    monkeypatch.setitem(gym.registry, env_id, gym.envs.registration.EnvSpec(env_id, entry_point=MaskedEnv))
    small = ["-params", "n_steps:16", "batch_size:16", "n_envs:2"]
    arguments = ["--env", env_id, "--seed", "3", "--device", "cpu"]
    zoo.main(["train", *arguments, "-n", "64", "--eval-episodes", "5", "--eval-freq", "16", *small])
    zoo.main(["enjoy", *arguments, "--no-render", "-n", "200", "--stochastic"])
    assert "Mean reward" in capsys.readouterr().out
    assert ALGOS["ppo_plus"] is PPOPlus


def test_an_entry_may_ask_for_checkpoints_that_can_be_resumed():
    checkpoint = "{'sb3_ppo_plus.TrainingCheckpoint': {'save_freq': 1, 'save_path': 'checkpoints'}}"
    small = ["n_steps:8", "n_envs:2", "batch_size:16", "n_epochs:1", "env_wrapper:'sb3_ppo_plus.ResumableEnv'"]
    train = ["train", "--env", "CartPole-v1", "-n", "32", "--eval-freq", "-1", "--device", "cpu"]
    zoo.main([*train, "-params", *small, f"callback:{checkpoint}"])
    env = make_vec_env("CartPole-v1", n_envs=2, wrapper_class=ResumableEnv)
    model = PPOPlus.resume(checkpoint_directories(Path("checkpoints"))[-1], env)
    assert model.num_timesteps == 16
    assert model.continue_learning().num_timesteps == 32


def test_normalisation_is_saved_for_enjoy():
    small = ["-params", "n_steps:8", "n_epochs:1"]
    zoo.main(["train", "--env", "MountainCarContinuous-v0", "-n", "32", "--eval-freq", "-1", "--device", "cpu", *small])
    statistics = Path("logs/ppo_plus/MountainCarContinuous-v0_1/MountainCarContinuous-v0/vecnormalize.pkl")
    env = manager("ppo_plus", "MountainCarContinuous-v0").create_envs(1, eval_env=True)
    assert VecNormalize.load(str(statistics), env).obs_rms.count == pytest.approx(32 + 4, abs=1)


# The module is already imported, which it never is on a command line.
@pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning")
def test_the_module_runs_and_offers_ppo_plus(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["zoo.py", "train", "--help"])
    with pytest.raises(SystemExit) as caught:
        runpy.run_module("sb3_ppo_plus.zoo", run_name="__main__")
    assert not caught.value.code
    output = capsys.readouterr().out
    assert "ppo_plus" in output
    assert "--optimize-hyperparameters" in output


# --- without the extra ---


@pytest.mark.parametrize(
    ("module", "argv"),
    [
        ("rl_zoo3", ["enjoy", "--env", "CartPole-v1"]),
        ("rl_zoo3.enjoy", ["enjoy", "--env", "CartPole-v1"]),
        ("rl_zoo3", ["resume", "folder"]),
    ],
)
def test_a_missing_rl_zoo_names_the_extra(monkeypatch, module, argv):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(SystemExit, match=r'pip install -e "\.\[zoo\]"'):
        zoo.main(argv)


def test_registering_without_the_rl_zoo_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "rl_zoo3", None)
    with pytest.raises(ImportError, match=r'pip install -e "\.\[zoo\]"'):
        zoo.register()


def test_importing_the_package_leaves_the_extra_alone():
    extras = "{'rl_zoo3', 'optuna', 'yaml', 'seaborn'} & set(sys.modules)"
    # The package itself must not import the module either, or `python -m sb3_ppo_plus.zoo` would warn.
    code = f"""if True:
        import sys, sb3_ppo_plus
        assert "sb3_ppo_plus.zoo" not in sys.modules
        import sb3_ppo_plus.zoo
        assert not {extras}, {extras}"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
