"""Runs that are killed and resumed in another process."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch as th
from forks import in_a_fork
from interrupted_runs import learned, make_envs, make_model
from resume_cases import CASES, INTERRUPTED_AFTER, N_STEPS
from states import assert_same_bits, state_of

from sb3_ppo_plus import PPOPlus, TrainingCheckpoint


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """Folder with the results of whole runs, and of runs that were killed and resumed."""
    folder = tmp_path_factory.mktemp("runs")
    for command in ("interrupt", "resume"):
        script = Path(__file__).parents[1] / "resume_cases.py"
        # The script imports modules beside conftest.py, as the tests do
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join([*sys.path, str(script.parent)])}
        ran = subprocess.run(
            [sys.executable, str(script), command, str(folder)], capture_output=True, text=True, env=environment
        )
        assert ran.returncode == 0, ran.stderr
        assert "were reset" not in ran.stderr and "do not hold everything" not in ran.stderr
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


class OperationsOnFiles:
    """Counts what this process does with files in a folder, and may kill it. For forks: the hook stays for good.

    :param folder: what is done elsewhere does not count
    :param last: index of the operation before which the process dies
    """

    def __init__(self, folder, last=None):
        self.folder, self.last, self.n_done = str(folder), last, 0
        sys.addaudithook(self)

    def __call__(self, event, arguments):
        if event.startswith(("open", "os.")) and arguments and self.folder in str(arguments[0]):
            if self.n_done == self.last:
                os.kill(os.getpid(), signal.SIGKILL)
            self.n_done += 1


def test_a_run_that_is_killed_at_any_operation_on_files_resumes_to_the_end_of_a_whole_run(tmp_path):
    def learn_in_a_fork(save_path, last=None):
        def learn():
            operations = OperationsOnFiles(save_path, last)
            make_model().learn(48, TrainingCheckpoint(1, save_path, keep_last=1))
            (tmp_path / "count").write_text(str(operations.n_done))

        return in_a_fork(learn)

    assert learn_in_a_fork(tmp_path / "whole") == 0
    n_operations = int((tmp_path / "count").read_text())
    assert n_operations >= 3 * 8
    expected = learned(48)
    # While the second of three checkpoints is written and the first is removed
    for last in range(n_operations // 3, 2 * n_operations // 3 + 1):
        save_path = tmp_path / str(last)
        assert learn_in_a_fork(save_path, last) == -signal.SIGKILL
        model = PPOPlus.resume(save_path, make_envs(), device="cpu")
        model.continue_learning()
        assert_same_bits(state_of(model), expected)
