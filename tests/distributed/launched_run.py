"""A training run that torchrun starts, and in which one rank may fail: the script, and what launches it.

Only the first attempt has a fault. A rank that is started again goes on from the newest checkpoint.
"""

import argparse
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch as th
from environments import ToyEnv
from parted_cases import CASES, N_ENVS, N_STEPS
from stable_baselines3.common.callbacks import BaseCallback
from states import state_of

from sb3_ppo_plus import PPOPlus, TrainingCheckpoint, latest_checkpoint
from sb3_ppo_plus.callback_hooks import iterate_callbacks
from sb3_ppo_plus.distributed import share_of

N_UPDATES = 12
UPDATE = N_ENVS * N_STEPS
#: Steps of each environment in a run
STEPS = N_UPDATES * N_STEPS
CASE = CASES["vec_normalize"]
TESTS = Path(__file__).resolve().parents[1]
#: Faults by the callback that makes them, at a step; the others come before
IN_TRAINING = ("stop", "nan", "exception", "sigterm", "sigkill")
OF_THE_LAUNCHER = "sigterm of the launcher"
#: An exception after which the script goes on, until the other rank has ended
CAUGHT = "caught exception"
BEFORE_TRAINING = ("make_env", "before_learn")


class Fault(BaseCallback):
    """Does what ends one rank, at one of its steps, and notes when.

    :param kind: one of IN_TRAINING, OF_THE_LAUNCHER or CAUGHT
    :param rank: the rank
    :param step: the step, from 1 on
    :param note: file that gets the time
    """

    def __init__(self, kind: str, rank: int, step: int, note: Path) -> None:
        super().__init__()
        self.kind, self.rank, self.step, self.note = kind, rank, step, note

    def _on_step(self) -> bool:
        is_now = self.n_calls == self.step and self.model._parts.ranks.rank == self.rank
        if not is_now or os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0":
            return True
        self.note.write_text(repr(time.time()))
        if self.kind in ("exception", CAUGHT):
            raise RuntimeError("broken on purpose")
        if self.kind == "nan":
            step = ToyEnv.step
            ToyEnv.step = lambda env, action: (*step(env, action)[:1], float("nan"), False, False, {})
        elif self.kind == OF_THE_LAUNCHER:
            os.kill(os.getppid(), signal.SIGTERM)
            # torchrun hands it on
            while signal.SIGTERM not in self._received():
                time.sleep(0.01)
        elif self.kind != "stop":
            os.kill(os.getpid(), signal.SIGTERM if self.kind == "sigterm" else signal.SIGKILL)
        return self.kind != "stop"

    def _received(self) -> list[signal.Signals | None]:
        callbacks = iterate_callbacks(self.model._current_run.callback)
        return [each._signals.stop for each in callbacks if isinstance(each, TrainingCheckpoint)]


def result_of(model: PPOPlus) -> dict[str, Any]:
    """What must be equal at the end of two runs."""
    normalizer = model.get_vec_normalize_env()
    return {
        "state": state_of(model),
        "episodes": [(episode["r"], episode["l"]) for episode in model.ep_info_buffer],
        "observations": model._last_obs,
        "returns": normalizer.returns,
        "mean": normalizer.ret_rms.mean,
    }


def train(distributed: Any, folder: Path | None = None, fault: Fault | None = None) -> dict[str, Any]:
    """Begin the run, or go on with it."""
    n_envs, _ = share_of(N_ENVS)
    callbacks = [] if folder is None else [TrainingCheckpoint(1, folder)]
    callbacks += [] if fault is None else [fault]
    kind = None if fault is None or fault.rank != int(os.environ["RANK"]) else fault.kind
    if kind == "make_env":
        raise ValueError("broken on purpose")
    if folder is not None and latest_checkpoint(folder):
        model = PPOPlus.resume(folder, CASE.make_env(n_envs), device="cpu")
        model.continue_learning(callbacks)
    else:
        model = CASE.make_model(n_envs, distributed=distributed)
        if kind == "before_learn":
            raise ValueError("broken on purpose")
        model.learn(N_UPDATES * UPDATE, callbacks)
    return result_of(model)


@dataclass
class Launch:
    """How a launch has ended.

    :param status: exit code of the launcher; None: it hung, and was killed
    :param output: what launcher and ranks have printed
    :param results: of the ranks that came to the end of the script
    :param seconds: from the fault to the end of all ranks of the first attempt; None without a fault in training
    :param n_attempts: how often the ranks were started
    """

    status: int | None
    output: str
    results: list[Any]
    seconds: float | None
    n_attempts: int


def torchrun(*arguments: str) -> list[str]:
    """Return a command of torchrun."""
    return [sys.executable, "-m", "torch.distributed.run", *arguments]


def environment_of_ranks(**others: str) -> dict[str, str]:
    """Return the environment variables for a launch of a script of this folder."""
    paths = [str(TESTS.parent), str(TESTS), str(TESTS / "distributed"), *sys.path]
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths), **others}


def launch(
    folder: Path,
    distributed: str,
    fault: tuple[str, int, int] = ("none", 0, 0),
    max_restarts: int = 0,
    limit: float = 120.0,
) -> Launch:
    """Launch the run with two ranks on this machine, and wait for its end.

    :param folder: an empty folder
    :param distributed: "True" or "exact"
    :param fault: its kind, the rank, and the rank's step
    :param max_restarts: how often torchrun starts the ranks again
    :param limit: seconds after which a launch hangs, and is killed
    """
    given = ["--standalone", "--nproc-per-node", "2", "--max-restarts", str(max_restarts)]
    command = torchrun(*given, __file__, str(folder), distributed, *map(str, fault))
    until = time.monotonic() + limit
    with (folder / "output").open("w") as output:
        launcher = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=environment_of_ranks())
        ended_at = None
        while launcher.poll() is None and time.monotonic() < until:
            if ended_at is None and (folder / "fault").exists() and not any(map(is_alive, pids_of(folder, 0))):
                ended_at = time.time()
            time.sleep(0.02)
    status = launcher.poll()
    if status is None:
        launcher.kill()
        launcher.wait()
        for pid in filter(is_alive, pids_of(folder)):
            os.kill(pid, signal.SIGKILL)
    began = float((folder / "fault").read_text()) if (folder / "fault").exists() else None
    return Launch(
        status,
        (folder / "output").read_text(),
        [th.load(path, weights_only=False) for path in sorted(folder.glob("result_*.pt"))],
        None if began is None else (ended_at or time.time()) - began,
        len({path.name.split("_")[1] for path in folder.glob("pid_*")}),
    )


def pids_of(folder: Path, attempt: int | None = None) -> list[int]:
    """Return the ids of the processes of an attempt, or of all."""
    pattern = f"pid_{'*' if attempt is None else attempt}_*"
    return [int(path.read_text()) for path in folder.glob(pattern)]


def is_alive(pid: int) -> bool:
    """Whether a process runs. One that has ended, and whose parent has not asked how, does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


def write_whole(path: Path, write: Any) -> None:
    """Write a file that others see whole or not at all."""
    beside = path.with_name(f".{path.name}")
    write(beside)
    beside.rename(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("distributed", choices=["True", "exact"])
    parser.add_argument("kind")
    parser.add_argument("rank", type=int)
    parser.add_argument("step", type=int)
    given = parser.parse_args()
    th.set_num_threads(1)
    rank, attempt = os.environ["RANK"], os.environ["TORCHELASTIC_RESTART_COUNT"]
    write_whole(given.folder / f"pid_{attempt}_{rank}", lambda path: path.write_text(str(os.getpid())))
    fault = None if given.kind == "none" else Fault(given.kind, given.rank, given.step, given.folder / "fault")
    distributed = True if given.distributed == "True" else given.distributed
    try:
        result = train(distributed, given.folder / "checkpoints", fault)
    except RuntimeError:
        if given.kind != CAUGHT or int(rank) != given.rank:
            raise
        (other,) = (pid for pid in pids_of(given.folder) if pid != os.getpid())
        while is_alive(other):
            time.sleep(0.02)
        return
    write_whole(given.folder / f"result_{rank}.pt", lambda path: th.save(result, path))


if __name__ == "__main__":
    main()
