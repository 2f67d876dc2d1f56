"""``benchmark``: the RL Zoo's table of a folder's runs."""

import shutil
import subprocess
import sys
import uuid
from pathlib import Path

import numpy as np
import pytest
from short_runs import copy, files_of, train
from stable_baselines3.common.monitor import load_results

from sb3_ppo_plus import zoo
from sb3_ppo_plus.zoo.benchmark import short_number

ENVS = ("CartPole-v1", "Pendulum-v1")
BENCHMARK = ["benchmark", "-n", "450", "--device", "cpu"]
COLUMNS = ["algo", "env_id", "mean_reward", "std_reward", "n_timesteps", "eval_timesteps", "eval_episodes"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    for env_id in ENVS:
        train(folder, env_id)
    return files_of(folder)


@pytest.fixture
def folder(runs, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    copy(runs, tmp_path)
    return tmp_path / "logs/ppo_plus"


def table(path="benchmark.md"):
    lines = [line for line in Path(path).read_text().splitlines() if line.startswith("|")]
    header, _, *rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return header, [dict(zip(header, row, strict=True)) for row in rows]


def test_the_shell_writes_the_rl_zoos_table(folder):
    subprocess.run([sys.executable, "-m", "sb3_ppo_plus.zoo", *BENCHMARK], check=True, capture_output=True)
    header, rows = table()
    assert header == COLUMNS
    assert [row["env_id"] for row in rows] == list(ENVS)
    assert [row["n_timesteps"] for row in rows] == ["128", "128"]
    assert Path("benchmark.md").read_text() == Path("logs/benchmark/benchmark.md").read_text()


def test_scores_are_those_of_enjoy(folder):
    zoo.main(BENCHMARK)
    for row in table()[1]:
        flags = ["--device", "cpu", "--no-render", "-n", "450", "--reward-log", "rewards"]
        zoo.main(["enjoy", "--env", row["env_id"], *flags])
        episodes = load_results("rewards")
        shutil.rmtree("rewards")
        assert float(row["mean_reward"]) == pytest.approx(episodes["r"].mean(), abs=1e-3)
        assert float(row["std_reward"]) == pytest.approx(np.std(episodes["r"]), abs=1e-3)
        assert int(row["eval_episodes"]) == len(episodes) > 0
        assert int(row["eval_timesteps"]) == episodes["l"].sum()


def test_what_was_evaluated_is_not_evaluated_again_unless_it_has_changed(folder, capsys):
    zoo.main(BENCHMARK)
    first = table()[1]
    capsys.readouterr()
    zoo.main(BENCHMARK)
    assert capsys.readouterr().out.count("Skipping eval") == 2
    assert table()[1] == first
    shutil.copy(folder / f"{ENVS[0]}_1/best_model.zip", folder / f"{ENVS[0]}_1/{ENVS[0]}.zip")
    zoo.main(BENCHMARK)
    assert capsys.readouterr().out.count("Skipping eval") == 1
    zoo.main([*BENCHMARK, "--seed", "1", "--n-envs", "2"])
    assert "Skipping eval" not in capsys.readouterr().out
    # An evaluation that was killed has left no such file
    next(Path("logs/benchmark").rglob("evaluation.json")).unlink()
    zoo.main([*BENCHMARK, "--seed", "1", "--n-envs", "2"])
    assert capsys.readouterr().out.count("Skipping eval") == 1


def test_each_run_of_an_environment_has_its_row(folder):
    shutil.copytree(folder / f"{ENVS[0]}_1", folder / f"{ENVS[0]}_2")
    zoo.main([*BENCHMARK, "--test-mode"])
    assert not Path("benchmark.md").exists() and len(table("logs/benchmark/benchmark.md")[1]) == 1
    zoo.main(BENCHMARK)
    header, rows = table()
    assert header == [*COLUMNS, "exp_id"]
    assert [(row["env_id"], row["exp_id"]) for row in rows] == [(ENVS[0], "1"), (ENVS[0], "2"), (ENVS[1], "1")]
    # The same model with the same seed
    assert rows[0]["mean_reward"] == rows[1]["mean_reward"]


def test_a_run_with_a_uuid_has_its_row(folder):
    (folder / f"{ENVS[0]}_1").rename(folder / f"{ENVS[0]}_1_{uuid.uuid4()}")
    zoo.main(BENCHMARK)
    assert [row["env_id"] for row in table()[1]] == list(ENVS)


def test_a_run_that_cannot_be_evaluated_is_named_and_the_others_are_in_the_table(folder):
    (folder / f"{ENVS[0]}_1/{ENVS[0]}.zip").write_bytes(b"no model")
    with pytest.raises(SystemExit, match=rf"1 of 2 runs are not in the table:\n.*{ENVS[0]}_1: UntrustedFileError"):
        zoo.main(BENCHMARK)
    assert [row["env_id"] for row in table()[1]] == [ENVS[1]]


def test_folders_without_a_model_are_named_and_are_no_failure(folder, capsys):
    for number in (2, 3):
        (folder / f"{ENVS[0]}_{number}").mkdir()
        (folder / f"{ENVS[0]}_{number}/0.monitor.csv").write_text('#{"t_start": 0.0}\nr,l,t\n')
    zoo.main(BENCHMARK)
    assert "2 runs have no model: killed ones get it by resume" in capsys.readouterr().out
    assert [row["env_id"] for row in table()[1]] == list(ENVS)


def test_too_few_steps_for_an_episode_are_named(folder):
    with pytest.raises(SystemExit, match=f"{ENVS[1]}_1: ValueError: no episode ended in 50 steps"):
        zoo.main([*BENCHMARK, "-n", "50"])


def test_other_algorithms_are_left_out_without_trust(folder, capsys):
    shutil.copytree(folder / f"{ENVS[0]}_1", folder.parent / "sac" / f"{ENVS[0]}_1")
    zoo.main([*BENCHMARK, "--no-hub", "--with-mujoco"])
    assert "1 runs of other algorithms than ppo_plus are left out" in capsys.readouterr().out
    assert {row["algo"] for row in table()[1]} == {"ppo_plus"}
    shutil.rmtree(folder)
    with pytest.raises(SystemExit, match="logs holds no run of ppo_plus"):
        zoo.main(BENCHMARK)
    with pytest.raises(SystemExit, match="nowhere is no folder"):
        zoo.main([*BENCHMARK, "--log-dir", "nowhere"])


def test_an_id_that_would_import_a_module_is_not_taken_from_a_folder(folder):
    args = folder / f"{ENVS[0]}_1/{ENVS[0]}/args.yml"
    args.write_text("env: antigravity:CartPole-v1\nenv_kwargs: null\n")
    shutil.copytree(folder / f"{ENVS[0]}_1", folder / "antigravity:CartPole-v1_1")
    zoo.main(BENCHMARK)
    assert "antigravity" not in sys.modules
    assert [row["env_id"] for row in table()[1]] == list(ENVS)


@pytest.mark.parametrize(("n", "text"), [(999, "999"), (1000, "1k"), (99_328, "99k"), (1_003_520, "1M")])
def test_numbers_of_steps_are_short(n, text):
    assert short_number(n) == text
