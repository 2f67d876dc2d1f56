"""``enjoy`` runs nothing that a log folder holds or names, unless it is told to trust it."""

import json
import pickle
from contextlib import chdir
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import yaml
from gymnasium.envs.classic_control import PendulumEnv
from hostile import Payload, make_special_file
from stable_baselines3.common.vec_env import VecNormalize

from sb3_ppo_plus import RestartingEnv, UntrustedFileError, zoo
from sb3_ppo_plus.untrusted import plain_yaml
from sb3_ppo_plus.zoo import enjoy as zoo_enjoy

ENV = "MountainCarContinuous-v0"
ENJOY = ["enjoy", "--env", ENV, "--device", "cpu", "--no-render", "-n", "20"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The log folder of a short training run with a normaliser."""
    folder = tmp_path_factory.mktemp("run")
    with chdir(folder):
        small = ["-params", "n_steps:16", "n_envs:2", "batch_size:16", "n_epochs:1"]
        zoo.main(
            ["train", "--env", ENV, "-n", "64", "--eval-freq", "32", "--eval-episodes", "1", "--device", "cpu", *small]
        )
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def folder(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for path, content in run.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return Path(f"logs/ppo_plus/{ENV}_1")


def config(folder, **members):
    """Alter config.yml; what is not plain is given as YAML text."""
    plain = yaml.load((folder / ENV / "config.yml").read_text(), Loader=plain_yaml._PlainLoader)
    texts = {name: value for name, value in members.items() if isinstance(value, str)}
    plain = {name: value for name, value in plain.items() if name not in texts} | {
        name: value for name, value in members.items() if name not in texts
    }
    text = yaml.safe_dump(plain) + "".join(f"{name}: {value}\n" for name, value in texts.items())
    (folder / ENV / "config.yml").write_text(text)


def test_train_writes_plain_statistics_beside_the_pickle(run):
    written = {path.name for path in run}
    assert {"vecnormalize.pkl", "vecnormalize.json"} <= written
    assert VecNormalize.save.__qualname__ == "VecNormalize.save"


def test_enjoy_unpickles_nothing(folder, monkeypatch, capsys):
    for pickled in folder.rglob("*.pkl"):
        pickled.unlink()
    for name in ("pickle.loads", "pickle.load", "cloudpickle.loads"):
        monkeypatch.setattr(name, lambda *args, **kwargs: pytest.fail("unpickled"))
    zoo.main(ENJOY)
    zoo.main([*ENJOY, "--load-best"])
    assert f"Loading {folder / ENV}.zip" in capsys.readouterr().out


def test_with_and_without_trust_the_episodes_are_the_same(folder, capsys):
    outputs = []
    for flags in ([], ["--trust"]):
        zoo.main([*ENJOY, "-n", "1100", *flags])
        output = capsys.readouterr().out
        outputs.append([line for line in output.splitlines() if "Episode Reward" in line or "Mean reward" in line])
    assert outputs[0] == outputs[1] != []


def test_the_rl_zoo_is_left_as_it_was(folder):
    import rl_zoo3.enjoy as enjoy

    before = {name: getattr(enjoy, name) for name in ("create_test_env", "get_saved_hyperparams", "yaml")}
    zoo.main(ENJOY)
    assert {name: getattr(enjoy, name) for name in before} == before


EVIL_YAML = [
    "!!python/object/apply:os.system ['touch mark']",
    "!!python/object/new:os.system ['touch mark']",
    "!!python/name:os.system ''",
    "!!python/module:antigravity ''",
    "!!python/object/apply:subprocess.check_call [['touch', 'mark']]",
    "\"__import__('os').system('touch mark')\"",
    "['touch mark', !!python/object/apply:os.system ['touch mark']]",
    "!own {a: 1}",
]


@pytest.mark.parametrize("value", EVIL_YAML)
@pytest.mark.parametrize(
    "name", ["normalize", "env_wrapper", "vec_env_wrapper", "env_kwargs", "frame_stack", "policy", "callback"]
)
def test_nothing_in_config_yml_is_run(name, value, folder):
    config(folder, **{name: value})
    if name in ("policy", "callback") or (name == "normalize" and value.startswith('"')):
        zoo.main(ENJOY)
    else:
        with pytest.raises(SystemExit, match="With --trust, enjoy runs whatever code"):
            zoo.main(ENJOY)
    assert not Path("mark").exists()


@pytest.mark.parametrize("value", EVIL_YAML)
def test_nothing_in_args_yml_is_run(value, folder):
    (folder / ENV / "args.yml").write_text(f"env_kwargs: {value}\n")
    with pytest.raises(SystemExit, match="With --trust"):
        zoo.main(ENJOY)
    (folder / ENV / "args.yml").write_text(f"env_kwargs: null\nother: {value}\n")
    zoo.main(ENJOY)
    assert not Path("mark").exists()


def test_with_trust_the_rl_zoo_reads_the_folder(folder):
    config(folder, normalize=EVIL_YAML[5])
    with pytest.raises((TypeError, SystemExit)):
        zoo.main([*ENJOY, "--trust"])
    assert Path("mark").exists()


@pytest.mark.parametrize("member", ["vecnormalize.pkl", "vecnormalize.json", "obs_rms.pkl"])
def test_pickles_in_place_of_the_statistics_do_not_run(member, folder):
    (folder / ENV / member).write_bytes(pickle.dumps(Payload(Path("mark").absolute())))
    if member == "vecnormalize.json":
        with pytest.raises(SystemExit, match=r"vecnormalize\.json is no file of save_vec_normalize"):
            zoo.main(ENJOY)
    else:
        zoo.main(ENJOY)
    assert not Path("mark").exists()


def test_a_missing_normaliser_is_named(folder):
    (folder / ENV / "vecnormalize.json").unlink()
    with pytest.raises(SystemExit, match=r"vecnormalize\.json is missing"):
        zoo.main(ENJOY)


def test_a_model_that_is_a_pickle_does_not_run(folder):
    (folder / f"{ENV}.zip").write_bytes(pickle.dumps(Payload(Path("mark").absolute())))
    with pytest.raises(SystemExit, match="is no readable zip archive"):
        zoo.main(ENJOY)
    assert not Path("mark").exists()


@pytest.mark.parametrize(
    "value",
    [
        "os.system",
        ["subprocess.Popen"],
        [{"stable_baselines3.common.monitor.Monitor": {"filename": "/tmp/x"}}],
        ["gymnasium.wrappers.RecordVideo"],
        [{"gymnasium.wrappers.TimeLimit": {"max_episode_steps": "../x"}}],
        [{"gymnasium.wrappers.TimeLimit": [1]}],
        [{"gymnasium.wrappers.TimeLimit": {}, "more": {}}],
        [[]],
        5,
    ],
    ids=str,
)
def test_wrappers_come_from_a_list(value, folder):
    config(folder, env_wrapper=[value] if isinstance(value, str) else value)
    with pytest.raises(SystemExit, match="env_wrapper"):
        zoo.main(ENJOY)


def test_wrappers_frames_and_arguments_of_the_run_are_used(folder, monkeypatch):
    made = []
    wrapper = "gymnasium.wrappers.TimeLimit"
    config(folder, env_wrapper=[{wrapper: {"max_episode_steps": 3}}], env_kwargs={"goal_velocity": 0.25}, frame_stack=2)
    monkeypatch.setattr(zoo_enjoy, "VecFrameStack", lambda env, n: made.append((env, n)) or env)
    zoo.main(ENJOY)
    ((env, n_frames),) = made
    assert n_frames == 2
    (limit,) = env.get_attr("_max_episode_steps")
    assert limit == 3 and env.get_attr("goal_velocity") == [0.25]
    assert isinstance(env, VecNormalize) and not env.training


@pytest.mark.parametrize("name", sorted(zoo_enjoy.ENV_WRAPPERS | zoo_enjoy.VEC_ENV_WRAPPERS))
def test_every_listed_wrapper_exists(name):
    from rl_zoo3.utils import get_class_by_name

    assert isinstance(get_class_by_name(name), type)


def test_wrappers_of_the_hyperparameter_file_are_listed():
    entries = yaml.safe_load(zoo.hyperparams_file().read_text())
    named = [wrapper for entry in entries.values() for wrapper in np.ravel(entry.get("env_wrapper", []))]
    names = {next(iter(wrapper)) if isinstance(wrapper, dict) else wrapper for wrapper in named}
    assert names - zoo_enjoy.ENV_WRAPPERS == set()
    assert len(names) > 1


@pytest.mark.parametrize(
    ("env_id", "wrapper"),
    [
        ("Pendulum-v1", {"sb3_ppo_plus.ResumableEnv": {"constant": ["screen"]}}),
        ("Pendulum-v1", {"sb3_ppo_plus.ResumableEnv": {"by": "replay", "prove": False}}),
        ("Taxi-v4", "sb3_ppo_plus.masking.MaskFromInfo"),
        ("MiniGrid-Empty-5x5-v0", "minigrid.wrappers.FlatObsWrapper"),
    ],
    ids=["ResumableEnv", "by replay", "MaskFromInfo", "minigrid"],
)
def test_a_run_with_our_wrappers_is_enjoyed_without_trust(env_id, wrapper, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    settings = ["n_steps:16", "batch_size:16", "n_epochs:1", "n_envs:1", f"env_wrapper:[{wrapper!r}]"]
    common = ["--env", env_id, "--device", "cpu", "--gym-packages", "minigrid"]
    zoo.main(["train", *common, "-n", "32", "--eval-freq", "-1", "-params", *settings])
    zoo.main(["enjoy", *common, "--no-render", "-n", "250"])
    assert "Mean reward" in capsys.readouterr().out


def test_an_env_that_restarts_is_registered_since_it_is_no_wrapper(tmp_path, monkeypatch, capsys):
    with pytest.raises(TypeError, match="register an id"):
        RestartingEnv(gym.make("CartPole-v1"))

    class Fails(PendulumEnv):
        def step(self, action):
            if self.np_random.random() < 0.02:
                raise RuntimeError("broken")
            return super().step(action)

    monkeypatch.chdir(tmp_path)
    spec = gym.envs.registration.EnvSpec(
        "Fails-v0", lambda **kwargs: RestartingEnv(lambda: Fails(**kwargs)), max_episode_steps=50
    )
    # Gone after the test
    monkeypatch.setitem(gym.registry, "Fails-v0", spec)
    settings = ["n_steps:128", "batch_size:64", "n_epochs:1", "n_envs:1", "normalize:False"]
    common = ["--env", "Fails-v0", "--device", "cpu"]
    with pytest.warns(UserWarning, match="is built anew after RuntimeError: broken"):
        zoo.main(["train", *common, "-n", "256", "--eval-freq", "-1", "-params", *settings])
        zoo.main(["enjoy", *common, "--no-render", "-n", "250"])
    output = capsys.readouterr().out
    assert "env_restarts" in output and "Mean reward" in output


@pytest.mark.parametrize(
    "value", [{"a": "/etc/passwd"}, {"a": "os:system"}, {"a b": 1}, {"a": [["../x"]]}, {"a": "x" * 65}, [1]]
)
def test_arguments_of_the_env_are_plain(value, folder):
    config(folder, env_kwargs=value)
    with pytest.raises(SystemExit, match="env_kwargs"):
        zoo.main(ENJOY)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "- 1",
        "{",
        "a: &x [*x]\nenv_kwargs: {a: *x}",
        "[" * 5000,
        "1: 2",
        "? [a]\n: 1",
        "a: " + "9" * 5000,
        "a: " + ":".join("1" * 50_000),
        "a: 0x" + "f" * 100_000,
        "a: 0b" + "1" * 100_000,
        "a: !!bool x",
        "a: !!timestamp x",
        "a" * 2**21,
    ],
    ids=lambda text: text[:12],
)
def test_yaml_that_is_not_the_rl_zoos_is_refused(text, folder):
    (folder / ENV / "config.yml").write_text(text)
    with pytest.raises(UntrustedFileError):
        zoo_enjoy.read_hyperparams(str(folder / ENV))


def test_references_that_multiply_are_not_followed(folder):
    lines = ["a0: &a0 [1, 1]"] + [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 30)]
    (folder / ENV / "config.yml").write_text("\n".join([*lines, "env_kwargs: {a: *a29}"]))
    with pytest.raises(UntrustedFileError, match="more than 1000 values"):
        zoo_enjoy.read_hyperparams(str(folder / ENV))


def test_mappings_that_merge_others_are_refused(folder):
    lines = ["a0: &a0 {k: 1}"] + [f"a{i}: &a{i} {{<<: [{', '.join([f'*a{i - 1}'] * 9)}]}}" for i in range(1, 7)]
    (folder / ENV / "config.yml").write_text("\n".join(lines))
    with pytest.raises(UntrustedFileError, match="a mapping merges others"):
        zoo_enjoy.read_hyperparams(str(folder / ENV))


@pytest.mark.parametrize("algo", ["ppo", "sac"])
def test_other_algorithms_need_trust(algo):
    with pytest.raises(SystemExit, match="Only models of ppo_plus can be loaded without trust"):
        zoo.main(["enjoy", "--env", "CartPole-v1", "--algo", algo])


def test_a_run_without_config_has_no_normaliser(tmp_path):
    assert zoo_enjoy.read_hyperparams(str(tmp_path / "none")) == ({}, None)
    assert zoo_enjoy.read_hyperparams(str(tmp_path)) == ({"normalize": False, "frame_stack": 0}, str(tmp_path))
    assert json.dumps(zoo_enjoy.read_hyperparams(str(tmp_path))[0])
    assert gym.spec(ENV)


@pytest.mark.parametrize(
    "members",
    [
        {"env_wrapper": [{"rl_zoo3.wrappers.FrameSkip": {"skip": 10**12}}]},
        {"env_wrapper": [{"rl_zoo3.wrappers.FrameSkip": {"skip": 1e12}}]},
        {"env_wrapper": [{"rl_zoo3.wrappers.FrameSkip": {"skip": 60}}] * 2},
        {"env_wrapper": [{"rl_zoo3.wrappers.HistoryWrapper": {"horizon": 10**9}}]},
        {"env_wrapper": [{"rl_zoo3.wrappers.HistoryWrapper": {"horizon": 20}}] * 2},
        {"env_wrapper": [{"gymnasium.wrappers.ResizeObservation": {"shape": [10**6, 10**6]}}]},
        {"env_wrapper": [{"gymnasium.wrappers.DelayObservation": {"delay": 10**9}}]},
        {"env_wrapper": ["gymnasium.wrappers.ClipAction"] * 30},
        {"env_wrapper": [{"gymnasium.wrappers.FrameStackObservation": {"stack_size": 50}}], "frame_stack": 50},
        {"vec_env_wrapper": [{"stable_baselines3.common.vec_env.VecFrameStack": {"n_stack": 10**12}}]},
        {"frame_stack": 10**6},
        {"env_kwargs": {"frame_skip": 10**6}},
        {"env_kwargs": {"size": 10**9}},
    ],
    ids=str,
)
def test_numbers_that_would_take_for_ever_or_fill_the_memory_are_refused(members, folder):
    config(folder, **members)
    with pytest.raises(SystemExit, match="With --trust"):
        zoo.main(ENJOY)


def test_long_episodes_and_usual_wrappers_are_no_attack(folder):
    limit, skip = {"gymnasium.wrappers.TimeLimit": {"max_episode_steps": 10**8}}, {"rl_zoo3.wrappers.FrameSkip": {}}
    config(folder, env_wrapper=[limit, skip], env_kwargs={"goal_velocity": 0.5}, frame_stack=4)
    hyperparams, _ = zoo_enjoy.read_hyperparams(str(folder / ENV))
    assert hyperparams["env_wrapper"] == [limit, skip] and hyperparams["frame_stack"] == 4


@pytest.mark.parametrize("kind", ["fifo", "/dev/zero", "folder", "holes"])
@pytest.mark.parametrize("member", ["config.yml", "args.yml", "vecnormalize.json", "model"])
def test_files_that_are_none_are_not_read(member, kind, folder):
    path = folder / f"{ENV}.zip" if member == "model" else folder / ENV / member
    path.unlink()
    make_special_file(path, kind)
    if member == "args.yml" and kind != "holes":
        # The RL Zoo passes by arguments that are no regular file
        zoo.main(ENJOY)
        return
    with pytest.raises((SystemExit, ValueError)):
        zoo.main(ENJOY)
