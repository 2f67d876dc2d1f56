"""``push``: what a repository of the hub gets. The hub is a stand-in on this machine; its client is the real one."""

import io
import json
import os
import pickle
import subprocess
import sys
import zipfile
from pathlib import Path

import imageio.v3 as iio
import pytest
import yaml
from hostile import Payload
from hub_stand_in import TOKEN, HubStandIn, reach, served
from huggingface_hub import ModelCard
from short_runs import copy, files_of, train
from stable_baselines3 import PPO
from stable_baselines3.common.evaluation import evaluate_policy
from states import assert_same_bits, state_of

from sb3_ppo_plus import PPOPlus, zoo
from sb3_ppo_plus.zoo import push
from sb3_ppo_plus.zoo.push import PUBLIC_ARGS

ENV = "Pendulum-v1"
RUN = Path(f"logs/ppo_plus/{ENV}_1")
REPO = f"tester/ppo_plus-{ENV}"
PUSH = ["push", "--env", ENV, "-f", "logs", "-orga", "tester", "--device", "cpu", "--eval-episodes", "2", "--no-render"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    train(folder, ENV, "--seed", "3", settings=["normalize:True", "n_steps:64", "batch_size:64"])
    return files_of(folder)


@pytest.fixture
def folder(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    copy(run, tmp_path)
    return RUN


@pytest.fixture
def hub(monkeypatch):
    hub = HubStandIn()
    with served(hub) as address:
        reach(monkeypatch, address)
        yield hub


@pytest.mark.heavy
def test_what_the_shell_pushes_the_shell_pulls_with_the_same_bits(folder):
    hub = HubStandIn()
    with served(hub) as address:
        env = {**os.environ, "HF_ENDPOINT": address, "HF_TOKEN": TOKEN}
        for command in (PUSH, ["pull", "--env", ENV, "-f", "pulled", "-orga", "tester"]):
            subprocess.run(
                [sys.executable, "-m", "sb3_ppo_plus.zoo", *command], env=env, check=True, capture_output=True
            )
    pulled = Path("pulled/ppo_plus", RUN.name)
    ours, theirs = (zipfile.ZipFile(path / f"{ENV}.zip") for path in (RUN, pulled))
    assert {"ppo_plus.json", "policy.pth", "policy.optimizer.pth"} <= set(theirs.namelist())
    assert all(ours.read(name) == theirs.read(name) for name in theirs.namelist())
    for name in ("evaluations.npz", "0.monitor.csv", f"{ENV}/vecnormalize.json"):
        assert (pulled / name).read_bytes() == (RUN / name).read_bytes()
    assert not list(pulled.rglob("*.pkl"))


def test_the_repository_has_the_rl_zoos_files_and_no_pickle(hub, folder):
    zoo.main([*PUSH, "-m", "Mine", "--private"])
    files = hub.repos[REPO]
    assert files.keys() == {
        *("README.md", f"ppo_plus-{ENV}.zip", "args.yml", "config.yml", "env_kwargs.yml", "results.json"),
        *("train_eval_metrics.zip", "vecnormalize.json"),
    }
    assert hub.commits == ["Mine"] and hub.created[0]["visibility"] == "private"
    assert PPOPlus.load(io.BytesIO(files[f"ppo_plus-{ENV}.zip"]), device="cpu").num_timesteps == 128
    with pytest.raises(AssertionError, match="No data found"):
        PPO.load(io.BytesIO(files[f"ppo_plus-{ENV}.zip"]))
    names = zipfile.ZipFile(io.BytesIO(files["train_eval_metrics.zip"])).namelist()
    assert names == ["evaluations.npz", "0.monitor.csv", "1.monitor.csv"]
    settings = {name: yaml.safe_load(files[name]) for name in ("config.yml", "args.yml", "env_kwargs.yml")}
    assert settings["config.yml"]["normalize"] is True and settings["env_kwargs.yml"] == {}
    assert settings["args.yml"]["seed"] == 3
    # Names of users and passwords of databases are in such paths
    assert not {"conf_file", "storage", "tensorboard_log", "log_folder", "wandb_entity"} & settings["args.yml"].keys()


def test_of_the_arguments_of_training_only_those_of_a_closed_list_are_published(hub, folder):
    # The key that the RL Zoo adds with --track holds the whole command line
    path = folder / ENV / "args.yml"
    args = yaml.unsafe_load(path.read_text()) | {"command": None, "of_a_later_rl_zoo": None}
    secret = {name: "sqlite://user:secret@host" for name in args.keys() - PUBLIC_ARGS}
    assert {"storage", "command", "of_a_later_rl_zoo", "log_folder", "wandb_entity"} <= secret.keys()
    path.write_text(yaml.safe_dump({**args, **secret}))
    zoo.main(PUSH)
    assert yaml.safe_load(hub.repos[REPO]["args.yml"]).keys() == args.keys() & PUBLIC_ARGS
    assert not [name for name, content in hub.repos[REPO].items() if b"secret" in content]


def test_the_card_tells_the_measured_score_and_how_to_use_the_model(hub, folder):
    zoo.main([*PUSH, "-name", "other", "--seed", "5"])
    files = hub.repos["tester/other"]
    card = ModelCard(files["README.md"].decode())
    (result,) = card.data.eval_results
    results = json.loads(files["results.json"])
    score = f"{results['mean_reward']:.2f} +/- {results['std_reward']:.2f}"
    assert (result.metric_type, result.metric_value, result.dataset_name) == ("mean_reward", score, ENV)
    assert card.data.library_name == "stable-baselines3" and "reinforcement-learning" in card.data.tags
    assert f"**{score}** in 2 episodes with the most likely actions" in card.text
    assert f"pull --env {ENV} -orga tester -name other -f logs/" in card.text and "--trust" not in card.text
    assert f'hf_hub_download("tester/other", "ppo_plus-{ENV}.zip"), trusted=False)' in card.text
    assert f"train --env {ENV} -n 128 --seed 3" in card.text and "normalize: true" in card.text
    assert results["n_eval_episodes"] == 2 and results["is_deterministic"] is True


def test_the_card_trains_the_same_model(hub, folder):
    zoo.main(PUSH)
    text = hub.repos[REPO]["README.md"].decode().partition("## Training")[2]
    Path("hyperparams.yml").write_text(text.partition("```yaml\n")[2].partition("```")[0])
    command = text.partition("```bash\n")[2].partition("```")[0]
    assert command.startswith("python -m sb3_ppo_plus.zoo train ")
    zoo.main([*command.split()[3:], "--device", "cpu", "--eval-freq", "32", "--eval-episodes", "2", "-f", "again"])
    models = [PPOPlus.load(path / f"{ENV}.zip", device="cpu") for path in (RUN, Path("again/ppo_plus", RUN.name))]
    assert_same_bits(*(state_of(model) for model in models))


def test_scores_that_pull_would_refuse_are_left_out(hub, folder, monkeypatch, capsys):
    size = max(path.stat().st_size for path in folder.glob("*monitor.csv"))
    largest = max(size, (folder / "evaluations.npz").stat().st_size)
    monkeypatch.setattr(push, "MAX_METRICS_BYTES", largest)
    zoo.main(PUSH)
    assert "Left out: the scores of training" in capsys.readouterr().out
    assert "train_eval_metrics.zip" not in hub.repos[REPO]


def test_the_score_is_that_of_evaluate_policy(hub, folder):
    from rl_zoo3.utils import create_test_env, get_saved_hyperparams

    zoo.main([*PUSH, "--seed", "7"])
    # As the RL Zoo itself builds them, with trust
    hyperparams, path = get_saved_hyperparams(str(RUN / ENV), test_mode=True)
    env = create_test_env(ENV, stats_path=path, seed=7, should_render=False, hyperparams=hyperparams)
    mean, std = evaluate_policy(PPOPlus.load(RUN / f"{ENV}.zip", device="cpu", seed=7), env, 2, deterministic=True)
    results = json.loads(hub.repos[REPO]["results.json"])
    assert (results["mean_reward"], results["std_reward"]) == (mean, std)


def test_the_video_is_replay_mp4(hub, folder):
    zoo.main([flag for flag in [*PUSH, "-n", "4"] if flag != "--no-render"])
    Path("replay.mp4").write_bytes(hub.repos[REPO]["replay.mp4"])
    frames = iio.imread("replay.mp4")
    assert frames.shape == (5, 500, 500, 3) and all(frame.std() > 10 for frame in frames)


def test_files_of_an_earlier_push_that_are_none_now_go(hub, folder):
    stale = {"replay.mp4": b"1", "vec_normalize.pkl": b"2", "notes.txt": b"3", "README.md": b"4"}
    hub.repos[REPO] = dict(stale)
    zoo.main(PUSH)
    files = hub.repos[REPO]
    assert "replay.mp4" not in files and "vec_normalize.pkl" not in files
    assert files["notes.txt"] == b"3" and files["README.md"] != b"4"


def test_the_best_model_and_checkpoints_can_be_pushed(hub, folder):
    zoo.main([*PUSH, "--load-best"])
    with (
        zipfile.ZipFile(RUN / "best_model.zip") as best,
        zipfile.ZipFile(io.BytesIO(hub.repos[REPO][f"ppo_plus-{ENV}.zip"])) as pushed,
    ):
        assert pushed.read("policy.pth") == best.read("policy.pth")


def test_nothing_of_the_log_folder_is_run(hub, folder):
    mark = Payload(Path("mark").absolute())
    (folder / ENV / "vecnormalize.pkl").write_bytes(pickle.dumps(mark))
    (folder / "best_model.zip").write_bytes(pickle.dumps(mark))
    zoo.main(PUSH)
    with pytest.raises(SystemExit, match="With --trust, push runs whatever code"):
        zoo.main([*PUSH, "--load-best"])
    (folder / ENV / "config.yml").write_text("normalize: false\nenv_kwargs: !!python/name:os.system ''\n")
    with pytest.raises(SystemExit, match="With --trust, push runs"):
        zoo.main(PUSH)
    assert not Path("mark").exists()


@pytest.mark.parametrize(
    "name",
    ["0.monitor.csv", "evaluations.npz", f"{ENV}/config.yml", f"{ENV}/args.yml", f"{ENV}/vecnormalize.json", ENV],
)
def test_links_to_files_of_the_user_are_not_published(name, hub, folder):
    os.replace(folder / name, "private")
    (folder / name).symlink_to(Path("private").absolute())
    with pytest.raises(SystemExit, match="outside of"):
        zoo.main(PUSH)
    assert hub.repos == {}


def test_with_trust_a_model_that_has_no_plain_form_is_pushed_with_its_pickles(hub, folder, capsys):
    model = PPOPlus.load(folder / f"{ENV}.zip", device="cpu")
    model.learning_rate = lambda progress: 1e-3 * progress
    model.save(folder / f"{ENV}.zip")
    zoo.main([*PUSH, "--trust"])
    assert "The model is pushed with its pickles: " in capsys.readouterr().out
    files = hub.repos[REPO]
    assert files[f"ppo_plus-{ENV}.zip"] == (folder / f"{ENV}.zip").read_bytes()
    assert f"pull --env {ENV} -orga tester -f logs/ --trust" in files["README.md"].decode()
    assert b"holds no pickle" not in files["README.md"]


def test_a_hub_that_refuses_is_one_message_before_the_evaluation(folder, monkeypatch):
    hub = HubStandIn()
    with served(hub) as address:
        for token, message in ((None, "LocalTokenNotFoundError"), ("wrong", "Invalid user token")):
            reach(monkeypatch, address, token)
            with pytest.raises(SystemExit, match=f"{REPO} on the hub: .*{message}"):
                zoo.main(PUSH)
        reach(monkeypatch, address)
        with pytest.raises(SystemExit, match="on the hub: HFValidationError"):
            zoo.main([*PUSH, "-name", "no/name"])
    reach(monkeypatch, "http://127.0.0.1:1")
    with pytest.raises(SystemExit, match=f"{REPO} on the hub: ConnectError"):
        zoo.main(PUSH)
    assert hub.repos == {}


@pytest.mark.parametrize("flags", [["--eval-episodes", "0"], ["-n", "-1"]])
def test_flags_that_make_no_sense_are_named(flags, hub, folder, capsys):
    with pytest.raises(SystemExit):
        zoo.main([*PUSH, *flags])
    assert "must be at least 1" in capsys.readouterr().err
