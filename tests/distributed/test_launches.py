"""Runs that the real torchrun starts: one rank fails, and all end, or all are started again and go on to the bit."""

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
from launched_run import (
    BEFORE_TRAINING,
    CAUGHT,
    N_STEPS,
    N_UPDATES,
    OF_THE_LAUNCHER,
    STEPS,
    TESTS,
    UPDATE,
    environment_of_ranks,
    is_alive,
    launch,
    torchrun,
    train,
)
from launches import campaign
from rank_runs import results_of
from states import assert_same_bits

pytestmark = [pytest.mark.heavy, pytest.mark.timeout(600)]


def never_killed(distributed):
    """What both ranks of a run without fault and without checkpoints end with."""

    def run(rank):
        os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2"}
        return train(distributed)

    return results_of(2, run)


@pytest.mark.parametrize(("distributed", "rank"), [(True, 0), (True, 1), ("exact", 0), ("exact", 1)])
def test_a_run_that_torchrun_restarts_after_a_kill_ends_with_the_bits_of_one_never_killed(distributed, rank, tmp_path):
    launched = launch(tmp_path, str(distributed), ("sigkill", rank, STEPS // 2 + 5), max_restarts=2)
    assert launched.status == 0, launched.output
    assert launched.n_attempts == 2
    assert launched.seconds < 20
    assert_same_bits(launched.results, never_killed(distributed))


def test_a_run_whose_launcher_gets_a_sigterm_ends_with_a_checkpoint_and_goes_on_when_it_is_launched_again(tmp_path):
    stopped = launch(tmp_path, "True", (OF_THE_LAUNCHER, 1, STEPS // 2 + 5))
    assert stopped.status not in (0, None), stopped.output
    assert [result["state"]["num_timesteps"] for result in stopped.results] == [(N_UPDATES // 2 + 1) * UPDATE] * 2
    again = launch(tmp_path, "True")
    assert again.status == 0, again.output
    assert_same_bits(again.results, never_killed(True))


@pytest.mark.parametrize("rank", [0, 1])
def test_after_an_exception_in_one_rank_all_end_and_its_traceback_comes_first(rank, tmp_path):
    launched = launch(tmp_path, "True", ("exception", rank, N_STEPS + 3))
    assert (launched.status, launched.results) == (1, [])
    assert launched.seconds < 20
    own, others = (launched.output.find(text) for text in ("raise RuntimeError", "Connection closed by peer"))
    assert f"[rank{rank}]: RuntimeError: broken on purpose" in launched.output
    assert own >= 0 and (others == -1 or own < others), launched.output


def test_after_an_exception_that_a_script_catches_the_other_rank_ends(tmp_path):
    launched = launch(tmp_path, "True", (CAUGHT, 0, N_STEPS + 3))
    assert (launched.status, launched.results) == (1, []), launched.output
    assert "RankFailedError: training has ended in another process, rank 0:" in launched.output


@pytest.mark.parametrize("kind", BEFORE_TRAINING)
@pytest.mark.parametrize("rank", [0, 1])
def test_after_an_error_of_one_rank_before_training_all_end(kind, rank, tmp_path):
    launched = launch(tmp_path, "True", (kind, rank, 0))
    assert (launched.status, launched.results) == (1, []), launched.output
    assert "ValueError: broken on purpose" in launched.output


def test_the_campaign_counts_what_it_launches(capsys):
    assert campaign(1, seed=0, kinds=("stop", "sigkill"))
    table = capsys.readouterr().out.splitlines()[-2:]
    assert [row.split(" | ")[1:3] for row in table] == [["1", "0"], ["1", "0"]]
    assert table[1].endswith("| 1 of 1 | 1 of 1 |")


def test_the_example_that_a_user_copies_goes_on_after_a_kill(tmp_path):
    command = [*torchrun("--standalone", "--nproc-per-node", "2", "--max-restarts", "2")]
    command += [str(TESTS.parent / "examples/torchrun.py"), "--timesteps", "81920", "--folder", str(tmp_path / "run")]
    with (tmp_path / "output").open("w") as output:
        launcher = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=environment_of_ranks())
        try:
            while not list((tmp_path / "run").glob("checkpoint_*")):
                assert launcher.poll() is None, (tmp_path / "output").read_text()
                time.sleep(0.05)
            victims = [pid for pid in children_of(launcher.pid) if is_alive(pid)]
            os.kill(victims[-1], signal.SIGKILL)
            status = launcher.wait()
        finally:
            launcher.terminate()
            launcher.wait()
    printed = (tmp_path / "output").read_text()
    assert len(victims) == 2
    assert status == 0, printed
    assert "Resumed from" in printed and "81920 steps are done" in printed
    # Started again, it has nothing more to do
    again = subprocess.run(command, capture_output=True, text=True, env=environment_of_ranks())
    assert again.returncode == 0 and "the run is finished: it has done its 81920 timesteps" in again.stderr


def children_of(pid):
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
