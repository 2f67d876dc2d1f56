"""Runs a function in several processes of one process group, forked from this one, which has everything loaded."""

import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch as th
import torch.distributed as dist
from forks import begin_fork


@dataclass
class Outcome:
    """How a rank has ended.

    :param status: its exit code, or minus the signal's number
    :param result: what the function returned; None if it raised an error
    :param output: what it has printed
    :param seconds: how long it ran
    """

    status: int
    result: Any
    output: str
    seconds: float


def in_ranks(size: int, function: Callable[[int], Any], seconds: float = 120.0) -> list[Outcome]:
    """Call ``function(rank)`` in each of ``size`` processes of a gloo group.

    :param size: number of processes
    :param function: returns what ``torch.save`` can save
    :param seconds: processes that run longer print where they stand and are killed
    """
    folder = Path(tempfile.mkdtemp())
    started = time.monotonic()
    children = [_start(folder, size, rank, function, seconds) for rank in range(size)]
    ended: dict[int, tuple[int, float]] = {}
    while len(ended) < size:
        for rank, child in enumerate(children):
            if rank not in ended:
                done, status = os.waitpid(child, os.WNOHANG)
                if done:
                    ended[rank] = os.waitstatus_to_exitcode(status), time.monotonic() - started
        if time.monotonic() - started > seconds:
            for rank, child in enumerate(children):
                if rank not in ended:
                    os.kill(child, signal.SIGKILL)
                    os.waitpid(child, 0)
                    ended[rank] = -signal.SIGKILL, seconds
        time.sleep(0.01)
    outcomes = []
    for rank in range(size):
        path = folder / f"{rank}.pt"
        result = th.load(path, weights_only=False) if path.exists() else None
        status, taken = ended[rank]
        outcomes.append(Outcome(status, result, (folder / f"{rank}.txt").read_text(), taken))
    return outcomes


def results_of(size: int, function: Callable[[int], Any]) -> list[Any]:
    """Call ``function(rank)`` in each of ``size`` processes, and return the results. None may fail."""
    outcomes = in_ranks(size, function)
    for rank, outcome in enumerate(outcomes):
        assert outcome.status == 0, f"rank {rank}: {outcome.output}"
    return [outcome.result for outcome in outcomes]


def _start(folder: Path, size: int, rank: int, function: Callable[[int], Any], seconds: float) -> int:
    child = os.fork()
    if child != 0:
        return child
    status = 1
    try:
        output = os.open(folder / f"{rank}.txt", os.O_WRONLY | os.O_CREAT)
        os.dup2(output, 1)
        os.dup2(output, 2)
        sys.stdout = os.fdopen(1, "w", buffering=1, closefd=False)
        sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
        # It prints where it stands before it is killed
        begin_fork(seconds - 5, and_end=False)
        dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=size)
        result = function(rank)
        th.save(result, folder / f"{rank}.tmp")
        os.rename(folder / f"{rank}.tmp", folder / f"{rank}.pt")
        status = 0
    except SystemExit as leaving:
        # As Python does it: a text is printed
        status = leaving.code if isinstance(leaving.code, int) else 1
        if isinstance(leaving.code, str):
            print(leaving.code, file=sys.stderr)
    except BaseException:
        # As at the end of a program
        sys.excepthook(*sys.exc_info())
    finally:
        sys.stderr.flush()
        os._exit(status)
