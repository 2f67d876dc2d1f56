"""The campaign of examples/benchmarks: what it runs, that a killed run goes on bit for bit, and what it writes."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import campaign
import campaign_plan
import campaign_results
import campaign_run
import gymnasium as gym
import pytest
import yaml
import zoo_envs
from sb3_arguments import sb3_arguments

BENCHMARKS = Path(__file__).resolve().parent.parent / "examples" / "benchmarks"

# Learns next to nothing, so that the episodes for the scores stay short
TINY = {"policy": "MlpPolicy", "n_envs": 2, "n_steps": 64, "batch_size": 64, "n_epochs": 1, "learning_rate": 1e-6}
TINY_RUN = {"env": "CartPole-v1", "column": "ppo_plus", "variant": "tiny", "entry": TINY, "seeds": [7], "steps": 1_280}
EAGER = {"hyperparams": {"compile": False}}


def write_plan(path, *items):
    path.write_text(yaml.safe_dump({"runs": list(items)}))
    return path


def jobs_of(tmp_path, *items, engine="auto"):
    return campaign_plan.read_plan(write_plan(tmp_path / "plan.yml", *items), engine)


def tiny_job(tmp_path, **changes):
    (job,) = jobs_of(tmp_path, {**TINY_RUN, **EAGER, **changes})
    return job


@pytest.fixture
def few_episodes(monkeypatch):
    monkeypatch.setattr(campaign_run, "N_EPISODES", 2)


def test_the_plans_in_the_repository_list_what_they_should():
    table = campaign_plan.read_plan(BENCHMARKS / "plans" / "table.yml")
    assert len(table) == 16 * 2 * 3
    assert {job.seed for job in table} == {100_000, 200_000, 300_000}
    assert len({job.env for job in table}) == 16
    assert {job.seed for job in table[:32]} == {100_000}, "the first seed of all comes first"
    assert [(job.env, job.column) for job in table[:2]] == [("CartPole-v1", "ppo_plus"), ("CartPole-v1", "sb3")]
    entries = {job.env: job.entry for job in table if job.column == "sb3"}
    assert entries["Hopper-v5"] == "Hopper-v4"
    assert entries["Reacher-v5"] == "Reacher-v2"
    assert entries["LunarLander-v3"] == "LunarLander-v3"
    assert all(job.hyperparams["compile"] for job in table if job.column == "ppo_plus")
    recipe = campaign_plan.read_plan(BENCHMARKS / "plans" / "recipe.yml")
    assert len(recipe) == 8 * 2 * 2
    assert {(job.variant, job.hyperparams["n_envs"]) for job in recipe} == {("plain", 1), ("plain-8-envs", 8)}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"column": "sbx"}, r"unknown column 'sbx'; allowed: \['ppo_plus', 'sb3', 'sb3_tuned'\]"),
        ({"seed": 3}, r"unknown keys \['seed'\]; allowed"),
        ({"steps": 0}, "at least 1, got 0"),
        ({"seeds": [0.5]}, "whole numbers, got 0.5"),
        ({"hyperparams": {"gamma": 0.9}}, "variant must be given"),
        ({"env": "Nowhere-v2"}, "no entry 'Nowhere-v2'"),
        ({"env": "Nowhere-v2", "column": "sb3"}, "no entry Nowhere-v2 or Nowhere-v1 or Nowhere-v0"),
        ({"seeds": [1, 1]}, "twice"),
        ({"column": "sb3", "compile": True}, "compile is not possible: .*100 steps are no whole number"),
    ],
)
def test_what_a_plan_may_not_hold_is_named(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        jobs_of(tmp_path, {"env": "CartPole-v1", "column": "ppo_plus", "seeds": [1], "steps": 100, **changes})


@pytest.mark.parametrize(
    ("entry", "lacking"),
    [
        ("Pendulum-v1:beta", "action_dist: beta"),
        ("Taxi-v4", "schedule ent_coef: lin_0.02"),
        ("TMaze-v0", "memory: lstm"),
        ("CartPoleNoVel-v1", "policy 'MlpLstmPolicy'"),
        ({**TINY, "learning_rate": "cos_3e-4"}, "schedule learning_rate: cos_3e-4"),
        ({**TINY, "critic_learning_rate": 1e-3}, "critic_learning_rate"),
    ],
)
def test_our_numbers_in_sb3_need_all_that_the_entry_uses(tmp_path, entry, lacking):
    item = {"env": "CartPole-v1", "column": "sb3_tuned", "variant": "x", "entry": entry, "seeds": [1], "steps": 100}
    with pytest.raises(ValueError, match=f"SB3's PPO has no .*{lacking}"):
        jobs_of(tmp_path, item)


def test_our_numbers_in_sb3_are_its_arguments(tmp_path):
    (job,) = jobs_of(tmp_path, {"env": "Hopper-v5", "column": "sb3_tuned", "seeds": [1], "steps": 100})
    (peer,) = jobs_of(tmp_path, {"env": "Hopper-v5", "column": "sb3", "seeds": [1], "steps": 100})
    # Our entry is the RL Zoo's, in plain YAML
    assert sb3_arguments(job.hyperparams) == sb3_arguments(peer.hyperparams)
    assert sb3_arguments({"learning_rate": "3e-4"}) == {"learning_rate": 3e-4}
    assert sb3_arguments({"clip_range": "lin_0.2"})["clip_range"](-0.5) == -0.1


def test_sb3_itself_computes_where_ppo_plus_would_round_or_clamp_otherwise():
    line = {"n_envs": 8, "n_steps": 32, "learning_rate": "lin_0.001"}
    assert campaign_plan.choose_engine("sb3", line, 1_000) == "sb3"
    assert campaign_plan.choose_engine("sb3", line, 1_024) == "ppo_plus", "its schedule ends at 0 with the last rollout"
    assert campaign_plan.choose_engine("sb3", {**line, "learning_rate": 1e-3}, 1_000) == "ppo_plus"
    assert campaign_plan.choose_engine("sb3", {"policy_kwargs": "dict(squash_output=True)"}, 2_048) == "sb3"
    assert campaign_plan.choose_engine("sb3", {}, 2_048, "sb3") == "sb3"
    assert campaign_plan.choose_engine("ppo_plus", line, 1_000, "sb3") == "ppo_plus"


def test_runs_with_a_line_are_skipped_unless_something_has_changed(tmp_path):
    job = tiny_job(tmp_path)
    line = {
        **{name: getattr(job, name) for name in ("env", "column", "variant", "engine", "seed", "steps")},
        "hyperparams_hash": job.hyperparams_hash,
    }
    assert campaign_results.not_done([job], [line]) == []
    changed = [tiny_job(tmp_path, **change) for change in ({"seeds": [8]}, {"steps": 99}, {"variant": "other"})]
    changed.append(tiny_job(tmp_path, entry={**TINY, "gamma": 0.9}))
    assert campaign_results.not_done([job, *changed], [line]) == changed
    reordered = replace(job, hyperparams=dict(reversed(job.hyperparams.items())))
    assert campaign_results.not_done([reordered], [line]) == []
    peer, of_peer = replace(job, column="sb3"), {**line, "column": "sb3"}
    assert campaign_results.not_done([peer], [of_peer], "auto") == []
    assert campaign_results.not_done([peer], [of_peer], "sb3") == [peer], "PPOPlus has computed that line"


def test_lines_are_whole(tmp_path):
    path = tmp_path / "plan.jsonl"
    campaign_results.append_line(path, '{"a": 1}\n')
    with path.open("a") as file:
        file.write('{"a": 2')
    assert campaign_results.read_lines(tmp_path) == [{"a": 1}]
    campaign_results.append_line(path, '{"a": 3}\n')
    assert campaign_results.read_lines(tmp_path) == [{"a": 1}, {"a": 3}]
    path.write_text("{\n")
    with pytest.raises(ValueError, match=r"plan\.jsonl, line 1 is no JSON"):
        campaign_results.read_lines(tmp_path)


def test_dry_run_takes_the_time_from_lines_and_guesses_without(tmp_path, capsys):
    plan = write_plan(tmp_path / "plan.yml", {**TINY_RUN, "seeds": [7, 8, 9], "steps": 3_600_000})
    line = {"env": "CartPole-v1", "column": "ppo_plus", "variant": "tiny", "engine": "ppo_plus", "seed": 7}
    given = [str(plan), "--results", str(tmp_path), "--work", str(tmp_path / "work"), "--dry-run"]
    assert campaign.main(given) == 0
    assert re.search(r"ppo_plus, tiny +3 runs .*\(guessed\)", capsys.readouterr().out)
    hyperparams_hash = campaign_plan.read_plan(plan)[0].hyperparams_hash
    times = {"steps": 3_600_000, "steps_done": 3_600_000, "cpu_seconds": 7_200}
    line |= {"hyperparams_hash": hyperparams_hash, **times}
    (tmp_path / "earlier.jsonl").write_text(json.dumps(line) + "\n")
    assert campaign.main([*given, "--workers", "2"]) == 0
    out = capsys.readouterr().out
    assert re.search(r"2 runs +4.00 h \(measured\)", out)
    assert "2 runs left: 4.00 h of one core, 2.00 h with 2 workers" in out
    assert campaign.main([*given, "--seeds", "9"]) == 0
    assert "1 runs left" in capsys.readouterr().out
    assert campaign.main([*given, "--only", "Ant-v5"]) == 2
    assert "the plan has no env Ant-v5; it has ['CartPole-v1']" in capsys.readouterr().err


def test_episodes_for_scores_begin_with_fixed_seeds():
    envs = zoo_envs.ZooEnvs.take_from({"normalize": True}, "CartPole-v1")
    training = envs.for_training(seed=3)
    training.reset()
    env = envs.for_evaluation(training)
    alone = gym.make("CartPole-v1")
    observation = env.reset()
    for seed in range(10_000_000, 10_000_003):
        expected, _ = alone.reset(seed=seed)
        assert (env.get_original_obs()[0] == expected).all()
        assert (observation[0] == training.normalize_obs(expected)).all(), "the statistics are those of training"
        done = [False]
        while not done[0]:
            observation, _, done, _ = env.step([0])


def test_only_what_can_be_saved_gets_checkpoints(tmp_path, few_episodes):
    assert zoo_envs.ZooEnvs("Pendulum-v1").can_be_saved()
    assert zoo_envs.ZooEnvs("Ant-v5").can_be_saved()
    job = tiny_job(tmp_path, env="LunarLander-v3", steps=256)
    line = campaign_run.run(job, tmp_path)
    assert not (tmp_path / "checkpoints").exists()
    assert line["steps_done"] == 256
    assert len(line["scores"]) == 2


@pytest.mark.parametrize(
    "item",
    [
        {"env": "CartPole-v1", "steps": 2_048},
        {"env": "Pendulum-v1", "steps": 600, "variant": "short", "hyperparams": {"n_steps": 128, "clip_range_vf": 0.2}},
        {
            "env": "MountainCarContinuous-v0",
            "steps": 600,
            "variant": "wide",
            "hyperparams": {
                "n_steps": 256,
                "policy_kwargs": "dict(log_std_init=-2, activation_fn=nn.ReLU, net_arch=dict(pi=[8], vf=[8]))",
            },
        },
    ],
    ids=lambda item: item["env"],
)
def test_ppo_plus_computes_the_peer_with_the_bits_of_sb3(tmp_path, few_episodes, item):
    lines = []
    for engine in campaign_plan.ENGINES:
        (job,) = jobs_of(tmp_path, {"column": "sb3", "seeds": [7], **item}, engine=engine)
        lines.append(campaign_run.run(job, tmp_path / engine))
    assert [line["engine"] for line in lines] == ["ppo_plus", "sb3"]
    for name in ("sha256", "scores", "curve", "steps_done", "hyperparams_hash"):
        assert lines[0][name] == lines[1][name], name


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("uninterrupted")
    return campaign_run.run(long_job(folder), folder)


def long_job(folder):
    return tiny_job(folder, steps=20_000)


def start(*arguments):
    return subprocess.Popen([sys.executable, *map(str, arguments)], stdout=subprocess.PIPE, text=True)


def wait_for(condition, what, seconds=600):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"waited for {what}"
        time.sleep(0.02)


@pytest.mark.heavy
def test_a_run_that_was_killed_goes_on_bit_for_bit(tmp_path, uninterrupted):
    (tmp_path / "job.json").write_text(long_job(tmp_path).to_json())
    command = BENCHMARKS / "campaign_run.py", tmp_path, os.getpid()
    process = start(*command)
    wait_for(lambda: len(list(tmp_path.glob("checkpoints/checkpoint_*"))) >= 2, "two checkpoints")
    process.kill()
    assert process.wait() == -signal.SIGKILL, "it has finished too early"
    assert not (tmp_path / "result.json").exists()
    assert start(*command).wait() == 0
    line = json.loads((tmp_path / "result.json").read_text())
    assert line["resumes"] == 1
    assert len(line["curve"]) == 50
    assert [steps for steps, _ in line["curve"]] == list(range(400, 20_001, 400))
    assert line["curve"][-1][1] > 5
    assert len(line["scores"]) == 100
    assert line["mean"] == pytest.approx(sum(line["scores"]) / 100)
    assert min(line["cpu_seconds"], line["wall_seconds"]) > 0
    for name in ("sha256", "scores", "steps_done", "hyperparams"):
        assert line[name] == uninterrupted[name], name
    assert line["curve"] == [list(point) for point in uninterrupted["curve"]]


def test_a_run_that_was_killed_while_it_was_scored_is_not_trained_again(tmp_path, few_episodes, capsys):
    lines = [campaign_run.run(tiny_job(tmp_path), tmp_path) for _ in range(2)]
    assert "goes on at 1280 steps" in capsys.readouterr().out
    assert [line["resumes"] for line in lines] == [0, 1]
    for name in ("sha256", "scores", "curve", "steps_done"):
        assert lines[0][name] == lines[1][name], name


def test_a_run_begins_anew_where_going_on_would_not_be_exact(tmp_path, few_episodes, monkeypatch, capsys):
    campaign_run.run(tiny_job(tmp_path), tmp_path)
    monkeypatch.setattr("sb3_ppo_plus.resuming.resume.versions", lambda: {"torch": "another"})
    line = campaign_run.run(tiny_job(tmp_path), tmp_path)
    assert "begins anew: what follows may differ in the last bits" in capsys.readouterr().out
    assert line["resumes"] == 0


def state_of_process(pid):
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


def begin_campaign(arguments):
    process = start(BENCHMARKS / "campaign.py", *arguments)
    for text in process.stdout:
        if found := re.search(r"begins .*, process (\d+)", text):
            return process, int(found[1])
    raise AssertionError("no run has begun")


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="asks Linux for the states of processes")
@pytest.mark.heavy
def test_a_campaign_pauses_ends_with_its_runs_and_continues(tmp_path, uninterrupted, capsys):
    plan = write_plan(tmp_path / "plan.yml", {**TINY_RUN, **EAGER, "steps": 20_000})
    work, results = tmp_path / "work", tmp_path / "results"
    arguments = [str(plan), "--results", str(results), "--work", str(work), "--nice", "0"]
    pause, unpause = (["--work", str(work), flag] for flag in ("--pause", "--unpause"))
    assert campaign.main(pause) == 0
    assert "no campaign runs" in capsys.readouterr().out

    process, pid = begin_campaign(arguments)
    wait_for(lambda: list(work.glob("*/checkpoints/checkpoint_*")), "a checkpoint")
    assert campaign.main(pause) == 0
    assert state_of_process(pid) == "T"
    assert campaign.main(arguments) == 2
    assert "another campaign runs" in capsys.readouterr().err
    assert campaign.main(unpause) == 0
    assert state_of_process(pid) != "T"
    process.terminate()
    assert process.wait(600) == 128 + signal.SIGTERM
    assert not Path(f"/proc/{pid}").exists()
    assert not list(results.glob("*"))

    process, pid = begin_campaign(arguments)
    process.kill()
    wait_for(lambda: not Path(f"/proc/{pid}").exists(), "the end of a run whose campaign was killed")

    assert start(BENCHMARKS / "campaign.py", *arguments).wait() == 0
    (line,) = campaign_results.read_lines(results)
    assert line["resumes"] >= 1
    assert line["sha256"] == uninterrupted["sha256"]
    assert not list(work.glob("*/")), "files of a run that is done are removed"
    assert campaign.main([*arguments, "--dry-run"]) == 0
    assert "0 runs left" in capsys.readouterr().out


@pytest.mark.heavy
def test_a_run_that_fails_is_reported_and_the_others_go_on(tmp_path):
    broken = {**TINY_RUN, "hyperparams": {"compile": False, "n_steps": -1}, "variant": "broken", "steps": 256}
    plan = write_plan(tmp_path / "plan.yml", broken, {**TINY_RUN, **EAGER, "steps": 256})
    arguments = "--results", tmp_path, "--work", tmp_path / "work", "--nice", "0"
    process = start(BENCHMARKS / "campaign.py", plan, *arguments)
    out, _ = process.communicate()
    assert process.returncode == 1
    log = Path(re.search(r"FAILED .*broken.* see (.*)", out)[1])
    assert "n_steps" in log.read_text()
    assert [line["variant"] for line in campaign_results.read_lines(tmp_path)] == ["tiny"]
