"""``pull``: nothing of a repository is trusted. The hub is a stand-in on this machine; its client is the real one."""

import io
import itertools
import json
import os
import pickle
import zipfile
from pathlib import Path

import numpy as np
import pytest
from hostile import Payload
from hub_stand_in import HubStandIn, reach, served
from short_runs import files_of, train
from stable_baselines3 import PPO

from sb3_ppo_plus import PPOPlus, zoo

ENV = "Pendulum-v1"
MODEL = f"ppo_plus-{ENV}.zip"
REPO = f"someone/ppo_plus-{ENV}"
PULL = ["pull", "--env", ENV, "-orga", "someone"]
RUN = Path(f"logs/ppo_plus/{ENV}_1")


@pytest.fixture(scope="module")
def pushed(tmp_path_factory):
    """The files of a repository, as ``push`` made them."""
    folder = tmp_path_factory.mktemp("run")
    train(folder, ENV, settings=["normalize:True", "n_steps:64", "batch_size:64"])
    hub = HubStandIn()
    with served(hub) as address, pytest.MonkeyPatch.context() as monkeypatch:
        reach(monkeypatch, address)
        flags = ["--device", "cpu", "--eval-episodes", "1", "--no-render"]
        zoo.main(["push", "--env", ENV, "-f", str(folder / "logs"), "-orga", "someone", *flags])
    return hub.repos[REPO]


@pytest.fixture
def hub(pushed, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    hub = HubStandIn({REPO: dict(pushed)})
    with served(hub) as address:
        reach(monkeypatch, address, None)
        yield hub


def refused(match, *flags):
    """``pull`` ends with a message, and leaves nothing."""
    with pytest.raises(SystemExit, match=match):
        zoo.main([*PULL, *flags])
    assert not RUN.exists() and not [path for path in Path().rglob("*") if path.is_file()]


def test_a_pulled_run_is_enjoyed_and_reported(hub, capsys):
    zoo.main(PULL)
    zoo.main(["enjoy", "--env", ENV, "-n", "250", "--no-render", "--device", "cpu"])
    assert "Mean reward" in capsys.readouterr().out
    zoo.main(["report", "logs"])
    zoo.main(PULL)
    assert files_of(RUN) == files_of(RUN.with_name(f"{ENV}_2"))
    assert sorted(path.name for path in RUN.parent.iterdir()) == [RUN.name, f"{ENV}_2"]


def test_only_known_files_of_the_commit_are_asked_for(hub):
    others = ("../../evil", "/etc/evil", "..\\evil", "vec_normalize.pkl", "replay.mp4", "x.py", f"{ENV}/args.yml")
    hub.repos[REPO] |= dict.fromkeys(others, pickle.dumps(Payload(Path("mark").absolute())))
    zoo.main(PULL)
    asked = [request.rpartition("/")[2] for request in hub.requests if "resolve" in request]
    known = {MODEL, "config.yml", "args.yml", "env_kwargs.yml", "vecnormalize.json", "train_eval_metrics.zip"}
    assert set(asked) == known
    assert {path.name for path in RUN.rglob("*") if path.is_file()} == {
        *(f"{ENV}.zip", "config.yml", "args.yml", "env_kwargs.yml", "vecnormalize.json"),
        *("evaluations.npz", "0.monitor.csv", "1.monitor.csv"),
    }
    assert not Path("mark").exists() and not list(Path.cwd().parent.glob("evil"))


def test_pickles_in_the_model_are_not_kept(hub, pushed, tmp_path):
    with zipfile.ZipFile(io.BytesIO(pushed[MODEL])) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    members["data"] = json.dumps({"policy_class": {":type:": "x", ":serialized:": "gASV"}}).encode()
    members["pytorch_variables.pth"] = pickle.dumps(Payload(tmp_path / "mark"))
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    hub.repos[REPO][MODEL] = file.getvalue()
    zoo.main(PULL)
    assert (RUN / f"{ENV}.zip").read_bytes() == pushed[MODEL]
    PPOPlus.load(RUN / f"{ENV}.zip", device="cpu")
    zoo.main([*PULL, "--trust"])
    assert RUN.with_name(f"{ENV}_2").joinpath(f"{ENV}.zip").read_bytes() == file.getvalue()
    assert not (tmp_path / "mark").exists()


def test_yaml_files_are_kept_as_plain_values(hub, capsys):
    evil = "!!python/object/apply:os.system ['touch mark']"
    hub.repos[REPO]["args.yml"] = f"env: {ENV}\nenv_kwargs: null\nevil: {evil}\nseed: [1, {{a: {evil}}}]\n".encode()
    zoo.main(PULL)
    assert "Left out of args.yml, since they are not plain: 'evil', 'seed'" in capsys.readouterr().out
    assert (RUN / ENV / "args.yml").read_text() == f"env: {ENV}\nenv_kwargs: null\n"
    assert not Path("mark").exists()


def test_texts_that_the_rl_zoo_would_evaluate_are_not_kept(hub):
    from rl_zoo3.utils import get_saved_hyperparams

    hub.repos[REPO]["config.yml"] = b"normalize: \"__import__('os').system('touch mark')\"\n"
    zoo.main(PULL)
    assert get_saved_hyperparams(str(RUN / ENV))[0]["normalize"] is True
    assert not Path("mark").exists()


def sb3_model():
    file = io.BytesIO()
    PPO("MlpPolicy", ENV, n_steps=8, batch_size=8, device="cpu").save(file)
    return file.getvalue()


def zipped(**members):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return file.getvalue()


def references(n):
    lines = ["a0: &a0 [1, 1]"] + [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, n)]
    return "\n".join(["normalize: true", *lines]).encode()


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        (MODEL, pickle.dumps(Payload("mark")), "no readable zip archive"),
        (MODEL, sb3_model, "only its pickles say what it is"),
        (MODEL, zipped(**{"../evil": "x"}), "does not belong there"),
        (
            "config.yml",
            b"normalize: !!python/object/apply:os.system ['touch mark']",
            "config.yml: normalize must be plain",
        ),
        (
            "args.yml",
            b"env_kwargs: !!python/object/apply:os.system ['touch mark']",
            "args.yml: env_kwargs must be plain",
        ),
        ("config.yml", b"env_wrapper: os.system\nnormalize: true", "env_wrapper: 'os.system' is none of"),
        ("config.yml", b"env_wrapper: [{rl_zoo3.wrappers.FrameSkip: {skip: 1000000}}]", "must be in"),
        ("config.yml", b"x" * 2**16, "at most 32768 are allowed"),
        ("config.yml", references(25), "more than 10000 values"),
        ("config.yml", b"a: " + b"[" * 60 + b"]" * 60, "32 levels"),
        ("vecnormalize.json", pickle.dumps(Payload("mark")), "is no strict JSON"),
        ("train_eval_metrics.zip", zipped(**{"../evil": "x"}), "does not belong there"),
        ("train_eval_metrics.zip", zipped(**{"0.monitor.csv/../../evil.csv": "x"}), "does not belong there"),
        ("train_eval_metrics.zip", zipped(**{"evaluations.npz": pickle.dumps(Payload("mark"))}), "no readable zip"),
    ],
    ids=lambda value: None if isinstance(value, bytes) else str(value)[:20],
)
def test_hostile_files_are_refused_whole(file, content, message, hub):
    hub.repos[REPO][file] = content() if callable(content) else content
    refused(message)
    assert not Path("mark").exists() and not list(Path.cwd().parent.glob("evil*"))


def test_scores_that_are_pickles_are_refused(hub):
    file = io.BytesIO()
    np.savez(file, timesteps=np.array([Payload("mark")], dtype=object))
    hub.repos[REPO]["train_eval_metrics.zip"] = zipped(**{"evaluations.npz": file.getvalue()})
    refused("no plain array")
    assert not Path("mark").exists()


def test_files_that_are_too_large_are_not_asked_for(hub):
    hub.told_sizes[MODEL] = 2 * 2**20 + 1
    refused(f"{MODEL} has 2097153 bytes; at most 2097152 are allowed\n--max-megabytes is", "--max-megabytes", "2")
    # Trust would not help
    refused("--max-megabytes is the limit of the model; the other files have fixed ones.$", "--max-megabytes", "2")
    assert not any("resolve" in request for request in hub.requests)


def test_scores_that_are_too_large_are_left_out_with_a_line(hub, capsys):
    hub.told_sizes["train_eval_metrics.zip"] = 2**28 + 1
    zoo.main(PULL)
    assert "Left out" in capsys.readouterr().out
    assert (RUN / f"{ENV}.zip").is_file() and not (RUN / "evaluations.npz").exists()


def test_the_old_run_comes_back_where_the_new_one_cannot_take_its_place(hub, monkeypatch):
    zoo.main(PULL)
    (RUN / "mine.txt").write_text("mine")
    replace = os.replace

    def refuse(source, target):
        if Path(source).name == "run":
            raise PermissionError("in use")
        replace(source, target)

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(PermissionError):
        zoo.main([*PULL, "--exp-id", "1", "--force"])
    assert (RUN / "mine.txt").read_text() == "mine"
    assert [path.name for path in RUN.parent.iterdir()] == [RUN.name]


def test_files_that_never_end_are_cut_off_whatever_size_was_told(hub):
    sent = itertools.count()
    hub.repos[REPO]["config.yml"] = (b"x" * 2**16 for _ in sent)
    refused(r"config\.yml has more than 32768 bytes")
    assert next(sent) < 1000


def test_a_normaliser_that_is_only_a_pickle_needs_trust(hub):
    hub.repos[REPO]["vec_normalize.pkl"] = hub.repos[REPO].pop("vecnormalize.json")
    refused(r"has no vecnormalize\.json: only a pickle may say how")
    zoo.main([*PULL, "--trust"])
    assert (RUN / ENV / "vecnormalize.pkl").is_file()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["-orga", "nobody"], f"nobody/ppo_plus-{ENV} on the hub: RepositoryNotFoundError"),
        (["-name", "../x"], "HFValidationError"),
        (["--algo", "ppo"], "Only models of ppo_plus can be loaded without trust"),
        (
            ["--algo", "ppo", "--trust", "-name", f"ppo_plus-{ENV}"],
            f"has no ppo-{ENV}.zip, so that it is no run of ppo",
        ),
    ],
)
def test_what_is_not_there_is_named(flags, message, hub):
    refused(message, *flags)


def test_a_run_that_exists_is_replaced_by_force_only(hub):
    zoo.main([*PULL, "--exp-id", "3"])
    run = RUN.with_name(f"{ENV}_3")
    (run / "mine.txt").write_text("mine")
    with pytest.raises(SystemExit, match=f"{ENV}_3 exists: --force replaces it"):
        zoo.main([*PULL, "--exp-id", "3"])
    assert (run / "mine.txt").exists()
    zoo.main([*PULL, "--exp-id", "3", "--force"])
    assert not (run / "mine.txt").exists() and (run / f"{ENV}.zip").is_file()
    # A refused one replaces nothing
    hub.repos[REPO][MODEL] = b"none"
    with pytest.raises(SystemExit):
        zoo.main([*PULL, "--exp-id", "3", "--force"])
    assert (run / f"{ENV}.zip").is_file()
    with pytest.raises(SystemExit):
        zoo.main([*PULL, "--exp-id", "-1"])


def test_commits_that_are_no_hashes_are_not_asked_for(hub, monkeypatch):
    monkeypatch.setattr("hub_stand_in.COMMIT", "../../../evil")
    zoo.main(PULL)
    assert not any("evil" in request for request in hub.requests)
