"""``train`` and ``resume`` in several processes: one run, as one process with all environments writes it."""

import os
import signal
import sys
import warnings
from contextlib import chdir
from pathlib import Path

import numpy as np
import pytest
import rl_zoo3.exp_manager
import torch as th
import yaml
import zoo_runs
from rank_runs import in_ranks
from rank_runs import results_of as results_of_ranks
from stable_baselines3.common.vec_env import DummyVecEnv
from states import assert_same_bits
from zoo_runs import results_of, start, training, zoo_in

from sb3_ppo_plus import PPOPlus, zoo
from sb3_ppo_plus.errors import PlainStateError
from sb3_ppo_plus.resuming import checkpoint, checkpoint_directory
from sb3_ppo_plus.zoo.train import CheckpointedExperiment

RUN = Path("logs/ppo_plus/CartPole-v1_1")
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
LAUNCHED = (*TORCHRUN, "-m", "sb3_ppo_plus.zoo")
KILLED = (*TORCHRUN, zoo_runs.__file__)
# The exact mode needs four environments in each process
EIGHT = ["n_envs:8", "n_steps:16", "batch_size:64"]
ROLLOUT = 8 * 16
KILLED_AT = 5 * ROLLOUT + 40


def long_training(n_updates, *flags, env_id="CartPole-v1", params=(), **others):
    settings = {"n-timesteps": n_updates * ROLLOUT, "checkpoint-freq": 2 * ROLLOUT} | others
    return training(env_id, n_updates, *flags, params=[*EIGHT, *params], **settings)


def in_two(cwd, *arguments):
    """Run a command in two processes, forked from this one; each returns its seed and its warnings."""

    def run(rank):
        os.chdir(cwd)
        # Forked processes would draw the same numbers
        np.random.seed(rank)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            zoo.main([str(argument) for argument in arguments])
        return th.initial_seed(), [str(warning.message) for warning in caught]

    return in_ranks(2, run)


def both_of(cwd, *arguments):
    outcomes = in_two(cwd, *arguments)
    for outcome in outcomes:
        assert outcome.status == 0, outcome.output
    return outcomes


def files_of(folder):
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


@pytest.mark.heavy
def test_two_processes_write_the_run_of_one(tmp_path):
    flags = ["--save-freq", "256", "-tb", "tb", "--progress"]
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    one_output = zoo_in(tmp_path / "one", *long_training(6, *flags, params=["micro_batches:2"], verbose=1))
    arguments = long_training(6, *flags, params=["distributed:exact"], verbose=1)
    two_output = zoo_in(tmp_path / "two", *arguments, program=LAUNCHED)
    one, two = results_of(tmp_path / "one" / RUN), results_of(tmp_path / "two" / RUN)
    assert [name for name in two if name.endswith("monitor.csv")] == [f"{index}.monitor.csv" for index in range(8)]
    # It holds the last observations of its own environments
    assert one.pop("vecnormalize.pkl") != two.pop("vecnormalize.pkl")
    assert_same_bits(two, one)
    # The others write only a part of checkpoints
    of_others = {name for name in files_of(tmp_path / "two" / RUN) if "/rank_1_" in name}
    assert files_of(tmp_path / "two" / RUN) - of_others == files_of(tmp_path / "one" / RUN)
    assert len(of_others) == 2 * len(list((tmp_path / "two" / RUN / "checkpoints").glob("checkpoint_*")))
    assert len(list((tmp_path / "two/tb").rglob("*tfevents*"))) == 1
    # The first one prints, and there is one bar of all steps
    for line in ("Saving to", "Log path", "iterations      | 6", "768/768", "New best mean reward"):
        assert two_output.count(line) == one_output.count(line), line
    assert "Each of 2 processes has 4 of them" in two_output


@pytest.mark.heavy
@pytest.mark.parametrize("distributed", ["True", "exact"])
def test_a_killed_run_goes_on_with_its_bits(distributed, tmp_path):
    for name in ("whole", "killed"):
        (tmp_path / name).mkdir()
    arguments = long_training(8, "-tb", "tb", params=[f"distributed:{distributed}"])
    zoo_in(tmp_path / "whole", *arguments, program=LAUNCHED)
    output = zoo_in(tmp_path / "killed", KILLED_AT, *arguments, program=KILLED, status=1)
    assert "SIGKILL" in output
    assert not (tmp_path / "killed" / RUN / "CartPole-v1.zip").exists()
    zoo_in(tmp_path / "killed", "resume", RUN, program=LAUNCHED)
    assert_same_bits(results_of(tmp_path / "killed" / RUN), results_of(tmp_path / "whole" / RUN))
    assert len({path.parent for path in (tmp_path / "killed/tb").rglob("*tfevents*")}) == 1


@pytest.mark.heavy
def test_one_script_trains_and_resumes_in_the_same_processes(tmp_path):
    resume = ["resume", str(RUN), "--n-timesteps", str(4 * ROLLOUT)]
    script = tmp_path / "script.py"
    script.write_text(
        f"from sb3_ppo_plus import zoo\nzoo.main({long_training(2)!r})\nzoo.main({resume!r})\n", encoding="utf-8"
    )
    zoo_in(tmp_path, program=(*TORCHRUN, str(script)))
    assert PPOPlus.load(tmp_path / RUN / "CartPole-v1.zip").num_timesteps == 4 * ROLLOUT


@pytest.mark.heavy
def test_a_killed_run_of_mujoco_goes_on_with_its_bits(tmp_path):
    for name in ("whole", "killed"):
        (tmp_path / name).mkdir()
    flags = ["--env-kwargs", "max_episode_steps:40"]
    arguments = long_training(8, *flags, env_id="HalfCheetah-v5", params=["normalize:True"])
    zoo_in(tmp_path / "whole", *arguments, program=LAUNCHED)
    zoo_in(tmp_path / "killed", KILLED_AT, *arguments, program=KILLED, status=1)
    run = RUN.with_name("HalfCheetah-v5_1")
    zoo_in(tmp_path / "killed", "resume", run, program=LAUNCHED)
    assert_same_bits(results_of(tmp_path / "killed" / run), results_of(tmp_path / "whole" / run))


@pytest.mark.heavy
def test_sigterm_to_the_launcher_ends_the_run_and_its_message_names_the_launcher(tmp_path):
    process = start([*LAUNCHED, *long_training(10_000, verbose=1)], tmp_path)
    printed = []
    for line in process.stdout:
        printed.append(line)
        if line.startswith("Checkpoint "):
            break
    process.send_signal(signal.SIGTERM)
    output = "".join([*printed, process.communicate()[0]])
    assert "Ended by SIGTERM" in output, output
    command = f"torchrun --nproc-per-node 2 -m sb3_ppo_plus.zoo resume {RUN}"
    assert f"To go on: {command}\n" in output
    total = PPOPlus.load(tmp_path / RUN / "CartPole-v1.zip").num_timesteps + ROLLOUT
    both_of(tmp_path, "resume", RUN, "--n-timesteps", total)
    assert PPOPlus.load(tmp_path / RUN / "CartPole-v1.zip").num_timesteps == total


@pytest.mark.heavy
def test_a_run_of_two_processes_can_be_used_and_prolonged_in_one_and_back_in_two(tmp_path, capsys):
    seeds = [outcome.result[0] for outcome in both_of(tmp_path, *long_training(3, seed=-1))]
    assert seeds[0] == seeds[1]
    with chdir(tmp_path):
        zoo.main(["enjoy", "--env", "CartPole-v1", "--no-render", "-n", "600"])
        assert "Mean reward" in capsys.readouterr().out
        with pytest.warns(UserWarning, match="the checkpoint is of 2 processes, now there are 1"):
            zoo.main(["resume", str(RUN), "--n-timesteps", str(5 * ROLLOUT)])
    outcomes = both_of(tmp_path, "resume", RUN, "--n-timesteps", 7 * ROLLOUT)
    for outcome in outcomes:
        (warning,) = outcome.result[1]
        assert "the checkpoint is of 1 process, now there are 2" in warning
    model = PPOPlus.load(tmp_path / RUN / "CartPole-v1.zip")
    assert (model.num_timesteps, model.distributed) == (7 * ROLLOUT, True)
    # The episodes are those of the environments, whatever process they were in
    episodes = results_of(tmp_path / RUN)
    for index in range(8):
        lengths = [int(length) for _, length in episodes[f"{index}.monitor.csv"][1:]]
        assert 7 * 16 - 100 < sum(lengths) <= 7 * 16
    (arguments,) = tmp_path.rglob("args.yml")
    assert yaml.load(arguments.read_text(), Loader=yaml.UnsafeLoader)["seed"] == seeds[0]


@pytest.mark.heavy
def test_a_finished_run_is_saved_by_the_first_process(tmp_path):
    both_of(tmp_path, *long_training(2))
    model = tmp_path / RUN / "CartPole-v1.zip"
    model.unlink()
    outcomes = both_of(tmp_path, "resume", RUN)
    assert [f"{RUN} is finished" in outcome.output for outcome in outcomes] == [True, False]
    assert PPOPlus.load(model).num_timesteps == 2 * ROLLOUT


@pytest.mark.parametrize(
    ("flags", "text"),
    [
        (["--hyperparams", "n_envs:3"], "n_envs=3 and 2 processes: --hyperparams n_envs:4 is one"),
        (["--hyperparams", "n_envs:2", "distributed:False"], 'distributed must be True or "exact" in 2 processes'),
        (["-optimize"], "argument -optimize: not in 2 processes"),
        (["--track"], "argument --track: not in 2 processes"),
        (["--algo", "ppo"], "--algo must be ppo_plus in 2 processes, got ppo"),
    ],
)
def test_what_processes_cannot_share_is_an_error_in_each_that_leaves_no_folder(flags, text, tmp_path):
    for outcome in in_two(tmp_path, "train", "--env", "CartPole-v1", "-n", "64", *flags):
        assert outcome.status in (1, 2)
        assert text in outcome.output
    assert not list(tmp_path.iterdir())


@pytest.mark.heavy
def test_a_run_that_another_one_writes_is_an_error_in_each(tmp_path):
    both_of(tmp_path, *long_training(2))
    lock = checkpoint.CheckpointWriter(tmp_path / RUN / "checkpoints", 1, 0, print)
    lock.open()
    try:
        for outcome in in_two(tmp_path, "resume", RUN, "--n-timesteps", 4 * ROLLOUT):
            assert outcome.status == 1
            assert "another run" in outcome.output or "process" in outcome.output
    finally:
        lock.close()


@pytest.mark.parametrize("fault", ["state", "disk"])
def test_a_checkpoint_that_one_process_cannot_write_ends_no_run(fault, tmp_path, monkeypatch):
    def refuse(*args, **kwargs):
        raise PlainStateError("odd.attribute is a generator") if fault == "state" else OSError(28, "No space left")

    def run(rank):
        os.chdir(tmp_path)
        if fault == "state" and rank == 1:
            monkeypatch.setattr(checkpoint, "take_snapshot", refuse)
        elif fault == "disk" and rank == 0:
            monkeypatch.setattr(checkpoint_directory, "_write_file", refuse)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            zoo.main(long_training(5))
        return [str(warning.message) for warning in caught]

    of_first, of_other = results_of_ranks(2, run)
    assert of_first and all("training goes on without a new checkpoint: " in text for text in of_first)
    assert not of_other
    assert PPOPlus.load(tmp_path / RUN / "CartPole-v1.zip").num_timesteps == 5 * ROLLOUT


def test_a_usual_run_warns_of_nothing_and_only_the_first_process_has_evaluation_environments(tmp_path, monkeypatch):
    made = []
    create = CheckpointedExperiment.create_envs

    def note(self, n_envs, eval_env=False, no_log=False):
        env = create(self, n_envs, eval_env, no_log)
        made.append((eval_env, env.num_envs))
        return env

    monkeypatch.setattr(CheckpointedExperiment, "create_envs", note)

    def run(rank):
        os.chdir(tmp_path)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            zoo.main(long_training(2))
        assert rl_zoo3.exp_manager.make_vec_env.__module__ == "stable_baselines3.common.env_util"
        return made

    assert results_of_ranks(2, run) == [[(True, 1), (False, 4)], [(False, 4)]]


def test_environments_have_the_seeds_of_one_process_also_where_the_run_begins_with_a_model(tmp_path, monkeypatch):
    seeds = []
    reset = DummyVecEnv.reset
    monkeypatch.setattr(DummyVecEnv, "reset", lambda self: seeds.append(list(self._seeds)) or reset(self))

    def run(rank):
        os.chdir(tmp_path)
        zoo.main(long_training(1, "--eval-freq", "-1"))
        zoo.main(long_training(1, "--eval-freq", "-1", "-i", str(RUN / "CartPole-v1.zip")))
        return [each for each in seeds if each[0] is not None]

    assert results_of_ranks(2, run) == [2 * [[3, 4, 5, 6]], 2 * [[7, 8, 9, 10]]]


def test_without_a_launcher_no_process_group_is_made(tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "0")
    with chdir(tmp_path):
        zoo.main(long_training(1))
    assert not th.distributed.is_initialized()
    (config,) = tmp_path.rglob("config.yml")
    assert "distributed" not in config.read_text()
    assert sys.stdout.writable()
