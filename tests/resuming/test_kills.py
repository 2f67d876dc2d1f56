"""Runs that are killed and resumed in another process."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch as th
from interrupted_runs import learned, make_envs
from killed_runs import N_STEPS as N_STEPS_OF_KILLED_RUNS
from resume_cases import CASES, INTERRUPTED_AFTER, N_STEPS
from states import assert_same_bits, state_of

from sb3_ppo_plus import PPOPlus


def run_script(script, *arguments):
    """Run a script beside the tests, which imports modules as the tests do. Return what it says on stderr."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([*sys.path, str(script.parent)])}
    command = [sys.executable, str(script), *map(str, arguments)]
    ran = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert ran.returncode == 0, ran.stderr
    return ran.stderr


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """Folder with the results of whole runs, and of runs that were killed and resumed."""
    folder = tmp_path_factory.mktemp("runs")
    for command in ("interrupt", "resume"):
        said = run_script(Path(__file__).parents[1] / "resume_cases.py", command, folder)
        assert "were reset" not in said and "do not hold everything" not in said
    return folder


# The first case waits for all runs, and three of them compile
@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", CASES)
def test_a_run_that_is_killed_and_resumed_in_another_process_equals_one_without_interruption(results, name):
    whole, resumed = (th.load(results / f"{name}.{kind}", weights_only=False) for kind in ("whole", "resumed"))
    done = INTERRUPTED_AFTER * N_STEPS * whole["n_envs"]
    # The last entry is what was not dumped yet
    rest = [log for log in whole["logs"][:-1] if log["time/total_timesteps"] > done]
    assert len(rest) >= 2
    assert_same_bits(resumed, {**whole, "logs": [*rest, whole["logs"][-1]]})


def test_a_run_that_is_killed_at_any_operation_on_files_resumes_to_the_end_of_a_whole_run(tmp_path):
    run_script(Path(__file__).parent / "killed_runs.py", tmp_path)
    expected = learned(N_STEPS_OF_KILLED_RUNS)
    directories = [directory for directory in tmp_path.iterdir() if directory.name.isdigit()]
    assert len(directories) >= 8
    for save_path in directories:
        model = PPOPlus.resume(save_path, make_envs(), device="cpu")
        model.continue_learning()
        assert_same_bits(state_of(model), expected)
