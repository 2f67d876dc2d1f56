"""What ``resume`` takes from a folder, what it refuses and why."""

import json
import os
import shutil
import warnings
from contextlib import chdir
from pathlib import Path

import gymnasium as gym
import pytest
import yaml
from environments import ToyEnv
from hostile import Payload
from rl_zoo3.exp_manager import ExperimentManager
from states import assert_same_bits
from test_enjoy import EVIL_YAML
from zoo_runs import ROLLOUT, results_of, start, training

from sb3_ppo_plus import PPOPlus, zoo
from sb3_ppo_plus.errors import UntrustedFileError
from sb3_ppo_plus.resuming.checkpoint_directory import checkpoint_directories
from sb3_ppo_plus.untrusted import plain_yaml
from sb3_ppo_plus.zoo.interrupted_run import CALLBACKS, GYM_PACKAGES, how_to_go_on, read_run
from sb3_ppo_plus.zoo.resume import cut_monitor_file

ENV = "CartPole-v1"
RUN = Path(f"logs/ppo_plus/{ENV}_1")
INNER = RUN / ENV
TOTAL = 4 * ROLLOUT


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """The folder of a run whose newest checkpoint and final model are gone."""
    folder = tmp_path_factory.mktemp("run")
    with chdir(folder):
        zoo.main(training(ENV, 4, verbose=1))
        shutil.rmtree(checkpoint_directories(RUN / "checkpoints")[0])
        (RUN / f"{ENV}.zip").unlink()
    return folder


@pytest.fixture(autouse=True)
def folder(stopped, tmp_path, monkeypatch):
    shutil.copytree(stopped, tmp_path / "copy")
    monkeypatch.chdir(tmp_path / "copy")


def refused(*flags, folder=RUN):
    with pytest.raises(SystemExit) as caught:
        zoo.main(["resume", str(folder), *flags])
    return str(caught.value)


def config(name="config.yml", **members):
    """Alter a YAML file; what is not plain is given as YAML text."""
    plain = yaml.load((INNER / name).read_text(), Loader=plain_yaml._PlainLoader)
    texts = {key: value for key, value in members.items() if isinstance(value, str)}
    plain = {key: value for key, value in (plain | members).items() if key not in texts}
    (INNER / name).write_text(yaml.safe_dump(plain) + "".join(f"{key}: {value}\n" for key, value in texts.items()))


def n_timesteps():
    return PPOPlus.load(RUN / f"{ENV}.zip").num_timesteps


def test_a_run_goes_on_to_its_total_and_then_to_a_new_one(capsys):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        zoo.main(["resume", str(RUN)])
    assert n_timesteps() == TOTAL
    capsys.readouterr()
    zoo.main(["resume", str(RUN)])
    message = capsys.readouterr().out
    assert f"is finished, with {TOTAL} of {TOTAL} timesteps" in message and "--n-timesteps N" in message
    zoo.main(["resume", str(RUN), "-n", str(TOTAL + ROLLOUT)])
    assert n_timesteps() == TOTAL + ROLLOUT
    zoo.main(["resume", str(RUN)])
    assert f"{TOTAL + ROLLOUT} of {TOTAL + ROLLOUT}" in capsys.readouterr().out


def test_with_and_without_trust_the_bits_are_the_same():
    zoo.main(["resume", str(RUN)])
    results = results_of(RUN)
    shutil.rmtree(checkpoint_directories(RUN / "checkpoints")[0])
    zoo.main(["resume", str(RUN), "--trust"])
    assert_same_bits(results_of(RUN), results)


def test_a_kill_before_the_final_model_was_saved_loses_nothing():
    zoo.main(["resume", str(RUN)])
    expected = results_of(RUN)
    older = PPOPlus.load(RUN / f"{ENV}.zip", device="cpu")
    older.num_timesteps = 0
    for torn in (lambda: (RUN / f"{ENV}.zip").write_bytes(b"PK"), lambda: older.save(RUN / f"{ENV}.zip")):
        torn()
        (INNER / "vecnormalize.json").unlink()
        zoo.main(["resume", str(RUN)])
        assert_same_bits(results_of(RUN), expected)
    assert not list(RUN.glob("*unfinished*"))


@pytest.mark.parametrize("name", ["0.monitor.csv", f"{ENV}/vecnormalize.json", "checkpoints"])
def test_nothing_is_written_or_cut_behind_a_link_without_trust(name):
    os.replace(RUN / name, "precious")
    (RUN / name).symlink_to(Path("precious").absolute())
    assert f"{name} is a link" in (message := refused()) and "With --trust" in message
    # A row after the checkpoint is still there
    assert Path("precious").is_dir() or Path("precious").read_text()


def test_an_evaluation_environment_that_was_not_used_before_the_checkpoint_begins_as_it_would(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    # Checkpoints at 128 and 256 timesteps, and the first evaluation between them
    zoo.main(training("CartPole-v1", 4, **{"eval-freq": 200, "eval-episodes": 3}))
    expected = results_of(RUN)
    shutil.rmtree(checkpoint_directories(RUN / "checkpoints")[0])
    for path in (RUN / f"{ENV}.zip", RUN / "best_model.zip", RUN / "evaluations.npz"):
        path.unlink()
    zoo.main(["resume", str(RUN)])
    assert_same_bits(results_of(RUN), expected)


def test_a_new_total_is_above_the_steps_that_are_done():
    assert f"must be above the {2 * ROLLOUT} timesteps that are done, got 5" in refused("-n", "5")


def test_a_folder_that_is_no_runs_is_named():
    assert "nowhere is no folder" in refused(folder="nowhere")
    message = refused(folder="logs/ppo_plus")
    assert "logs/ppo_plus is no folder of a run" in message and f"such as {RUN}" in message


def test_a_run_without_checkpoints_says_what_to_do():
    for directory in checkpoint_directories(RUN / "checkpoints"):
        shutil.rmtree(directory)
    assert "holds no checkpoint: it was trained with --no-checkpoint" in refused()


def test_a_run_without_a_valid_checkpoint_is_an_error():
    (checkpoint_directories(RUN / "checkpoints")[0] / "model.zip").write_bytes(b"")
    with pytest.warns(UserWarning, match="skipped an invalid checkpoint"):
        assert "there is no valid checkpoint" in refused()


def test_a_run_of_another_algorithm_is_named():
    config("args.yml", algo="sac")
    assert "a run of the algorithm 'sac': only runs of ppo_plus" in refused()


def test_a_run_that_goes_on_elsewhere_is_left_alone():
    rows = (RUN / "0.monitor.csv").read_text()
    code = f"""if True:
        import sys
        from pathlib import Path
        from sb3_ppo_plus.resuming.directory_lock import DirectoryLock
        DirectoryLock(Path({str((RUN / "checkpoints").absolute())!r})).acquire()
        print("locked", flush=True)
        sys.stdin.read()"""
    process = start(["-c", code], ".")
    assert process.stdout.readline() == "locked\n"
    try:
        assert f"in use by another run: process {process.pid}" in refused()
    finally:
        process.kill()
        process.wait()
    assert (RUN / "0.monitor.csv").read_text() == rows


def test_tensorboard_files_that_are_gone_are_a_warning():
    description = json.loads((INNER / "resume.json").read_text())
    (INNER / "resume.json").write_text(json.dumps(description | {"logs": "../gone"}))
    with pytest.warns(UserWarning, match=r"gone, the folder of the run's TensorBoard logs, is gone"):
        zoo.main(["resume", str(RUN)])
    # The new place is noted
    shutil.rmtree(checkpoint_directories(RUN / "checkpoints")[0])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        zoo.main(["resume", str(RUN)])
    assert not [warning for warning in caught if "gone" in str(warning.message)]


class Parking(ToyEnv):
    """The RL Zoo gives monitors of such an environment arguments of its own."""

    def step(self, action):
        *others, info = super().step(action)
        return *others, {**info, "is_success": True}


@pytest.mark.parametrize("is_robotics", [False, True])
def test_monitor_files_go_on_where_the_rl_zoo_gives_them_arguments(is_robotics, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(ExperimentManager, "is_robotics_env", staticmethod(lambda env_id: is_robotics))
    monkeypatch.setitem(gym.registry, "parking-v0", gym.envs.registration.EnvSpec("parking-v0", Parking))
    zoo.main(training("parking-v0", 4, params=["policy:MlpPolicy"]))
    run = Path("logs/ppo_plus/parking-v0_1")
    expected = results_of(run)
    shutil.rmtree(checkpoint_directories(run / "checkpoints")[0])
    zoo.main(["resume", str(run)])
    assert_same_bits(results_of(run), expected)
    assert "is_success" in (run / "0.monitor.csv").read_text()


def test_the_command_that_goes_on_has_the_flags_that_the_run_needs(capsys):
    shutil.copy(RUN / "best_model.zip", RUN / f"{ENV}.zip")
    command = f"To go on: python -m sb3_ppo_plus.zoo resume {RUN}"
    assert how_to_go_on(RUN, ["minigrid"]) == command
    assert capsys.readouterr().out == ""
    assert how_to_go_on(RUN, ["my_envs"]) == f"{command} --gym-packages my_envs"
    config(callback="my_envs.Callback")
    assert how_to_go_on(RUN, ["my_envs"]) == f"{command} --trust"
    shutil.rmtree(RUN / "checkpoints")
    assert "It cannot go on: " in how_to_go_on(RUN, [])


@pytest.mark.parametrize("value", EVIL_YAML)
@pytest.mark.parametrize(
    "name", ["normalize", "env_wrapper", "vec_env_wrapper", "env_kwargs", "callback", "monitor_kwargs", "distributed"]
)
def test_nothing_in_config_yml_is_run(name, value):
    config(**{name: value})
    assert "With --trust, resume runs whatever code" in refused()
    assert not Path("mark").exists()


@pytest.mark.parametrize("value", EVIL_YAML)
@pytest.mark.parametrize("name", ["env_kwargs", "eval_env_kwargs", "seed", "gym_packages", "algo"])
def test_nothing_in_args_yml_is_run(name, value):
    config("args.yml", **{name: value})
    assert refused()
    assert not Path("mark").exists()


@pytest.mark.parametrize("name", ["policy", "policy_kwargs", "learning_rate", "n_timesteps", "rollout_buffer_class"])
def test_what_the_checkpoint_holds_is_not_read_from_config_yml(name):
    config(**{name: EVIL_YAML[0]})
    zoo.main(["resume", str(RUN)])
    assert n_timesteps() == TOTAL and not Path("mark").exists()


def test_pickles_are_not_read_and_with_trust_code_runs():
    (INNER / "vecnormalize.pkl").write_bytes(b"no pickle")
    config(env_kwargs=EVIL_YAML[0])
    refused()
    assert not Path("mark").exists()
    zoo.main(["resume", str(RUN), "--trust"])
    assert Path("mark").exists()


def test_a_normaliser_beside_the_command_line_is_not_unpickled(monkeypatch):
    import pickle

    monkeypatch.chdir(RUN)
    Path(ENV, "vecnormalize.pkl").write_bytes(pickle.dumps(Payload(Path("mark").absolute())))
    zoo.main(["resume", "."])
    assert not Path("mark").exists()


@pytest.mark.parametrize(
    ("members", "name"),
    [
        ({"normalize": "dict(norm_obs=True, norm_reward=False)"}, "normalize"),
        ({"normalize": "\"{'norm_reward': False}\""}, "normalize"),
        ({"monitor_kwargs": "dict(info_keywords=())"}, "monitor_kwargs"),
        ({"callback": "stable_baselines3.common.callbacks.LogEveryNTimesteps: {n_steps: 64}"}, "callback"),
    ],
)
def test_plain_settings_are_read(members, name):
    if name == "callback":
        members = {"callback": [{"stable_baselines3.common.callbacks.LogEveryNTimesteps": {"n_steps": 64}}]}
    config(**members)
    run = read_run(RUN, trusted=False)
    assert isinstance(run.hyperparams[name], dict | list)


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ({"monitor_kwargs": {"filename": "x"}}, "monitor_kwargs must be a mapping of"),
        ({"callback": ["stable_baselines3.common.callbacks.CheckpointCallback"]}, "callback: .* is none of"),
        ({"normalize": "\"__import__('os').getcwd()\""}, "is no plain value"),
        ({"n_envs": 10**9}, "n_envs must be in"),
    ],
)
def test_other_settings_need_trust(members, message):
    config(**members)
    with pytest.raises(UntrustedFileError, match=message):
        read_run(RUN, trusted=False)


def test_packages_come_from_a_list_or_from_the_command_line():
    config("args.yml", gym_packages=["minigrid"])
    assert read_run(RUN, trusted=False).arguments["gym_packages"] == ["minigrid"]
    config("args.yml", gym_packages=["antigravity"])
    assert "gym_packages names 'antigravity'" in refused()
    assert read_run(RUN, trusted=False, gym_packages=["json"]).arguments["gym_packages"] == ["json"]
    assert read_run(RUN, trusted=True).arguments["gym_packages"] == ["antigravity"]


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"format": 2}', '{"format": 1, "checkpoint_freq": 0}'])
def test_a_description_that_is_none_is_refused(text):
    (INNER / "resume.json").write_text(text)
    assert "resume.json" in refused()


@pytest.mark.parametrize("name", sorted(CALLBACKS))
def test_every_listed_callback_exists(name):
    from rl_zoo3.utils import get_class_by_name

    assert isinstance(get_class_by_name(name), type)
    assert all(package.isidentifier() for package in GYM_PACKAGES)


def test_rows_after_the_checkpoint_are_cut_and_lost_ones_are_named(tmp_path):
    path = tmp_path / "0.monitor.csv"
    header = '#{"t_start": 0.0, "env_id": "None"}\nr,l,t\n'
    path.write_text(header + "1.0,1,0.1\n2.0,2,0.2\n3.0,3,0.")
    cut_monitor_file(path, 1)
    assert path.read_text() == header + "1.0,1,0.1\n"
    with pytest.warns(UserWarning, match="has lost 2 of its 3 rows"):
        cut_monitor_file(path, 3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        cut_monitor_file(path, 0)
    assert path.read_text() == header


def test_the_environment_of_the_run_is_made_as_it_was(monkeypatch):
    made = []
    make = gym.envs.registration.EnvSpec.make
    monkeypatch.setattr(
        gym.envs.registration.EnvSpec, "make", lambda *args, **kwargs: made.append(kwargs) or make(*args, **kwargs)
    )
    config("args.yml", env_kwargs={"sutton_barto_reward": True})
    zoo.main(["resume", str(RUN)])
    assert len(made) == 3 and all(kwargs == {"sutton_barto_reward": True} for kwargs in made)
