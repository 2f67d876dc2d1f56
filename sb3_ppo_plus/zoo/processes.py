"""``train`` and ``resume`` in the processes of a launcher such as torchrun: each has a share of one run's environments.

The first process prints, and writes all files but the episodes (``monitor.csv``) of the others' environments.
"""

from __future__ import annotations

import argparse
import atexit
import contextlib
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

import numpy as np
import torch as th
import torch.distributed as dist

from sb3_ppo_plus.distributed.process_group import is_launched, join
from sb3_ppo_plus.distributed.ranks import Ranks
from sb3_ppo_plus.zoo.hyperparams import ALGO


def ranks_of_run() -> Ranks:
    """Return the processes of this run; without a launcher, this one alone."""
    return join(th.device("cuda" if th.cuda.is_available() else "cpu")) if is_launched() else Ranks()


def still_joined(ranks: Ranks) -> Ranks:
    """Return the processes with which this one can still exchange something; itself alone after an interrupt.

    :param ranks: the processes of the run
    """
    return ranks if ranks.size > 1 and dist.is_initialized() else Ranks()


@contextmanager
def working_together(algo: str | None = ALGO) -> Iterator[Ranks]:
    """Join the other processes until this one ends. All but the first print nothing meanwhile, but for errors.

    :param algo: the algorithm
    :raises SystemExit: in several processes, for another algorithm than ``ppo_plus``, which cannot share out its work
    """
    had_joined = dist.is_available() and dist.is_initialized()
    ranks = ranks_of_run()
    with contextlib.ExitStack() as stack:
        if is_launched() and not had_joined:
            # Not earlier: the same processes could not join each other again
            atexit.register(_leave)
        if ranks.size > 1 and algo not in (ALGO, None):
            raise SystemExit(f"--algo must be {ALGO} in {ranks.size} processes, got {algo}: it trains in one")
        if ranks.rank > 0:
            nowhere = stack.enter_context(open(os.devnull, "w", encoding="utf-8"))
            stack.enter_context(contextlib.redirect_stdout(nowhere))
        yield ranks


def check_alone(command: str) -> None:
    """Check that a command that works in one process was not started in several.

    :param command: the command
    :raises SystemExit: in several processes
    """
    size = os.environ.get("WORLD_SIZE", "1")
    if is_launched() and size != "1":
        raise SystemExit(f"{command} works in one process, start it without torchrun: there are {size}")


def _leave() -> None:
    # An error in training has done it already
    if dist.is_initialized():
        dist.destroy_process_group()


def check_flags(parsed: argparse.Namespace, refuse: Callable[[str], NoReturn]) -> None:
    """Refuse flags of ``train`` that several processes cannot share, and let them have one random seed.

    :param parsed: the flags
    :param refuse: called with a message
    """
    ranks = ranks_of_run()
    if ranks.size == 1:
        return
    together = f"in {ranks.size} processes that train together (torchrun)"
    if parsed.optimize_hyperparameters:
        refuse(
            f"argument -optimize: not {together}. Start each of several searches without torchrun, with one --storage "
            "and one --study-name: they share out the trials"
        )
    if parsed.track:
        refuse(f"argument --track: not {together}. -tb FOLDER logs for TensorBoard, from the first one")
    if parsed.seed < 0:
        # As the RL Zoo draws it, which would do so in each process
        own = np.random.randint(2**32 - 1, dtype="int64").item()
        parsed.seed = ranks.gather_objects(own)[0]


def add_distributed(hyperparams: dict[str, Any]) -> None:
    """Let the model of several processes train in all of them, unless its hyperparameters say how.

    :param hyperparams: the hyperparameters, which get ``distributed``
    :raises ValueError: if they forbid it, or if ``n_envs`` cannot be shared out evenly
    """
    if not is_launched():
        return
    ranks = ranks_of_run()
    distributed = hyperparams.setdefault("distributed", True)
    if ranks.size > 1 and not distributed:
        raise ValueError(
            f'distributed must be True or "exact" in {ranks.size} processes, got {distributed!r}: each would train a '
            "model of its own in the same folder"
        )
    n_envs = hyperparams.get("n_envs", 1)
    if n_envs % ranks.size != 0:
        raise ValueError(
            f"n_envs must be a multiple of the number of processes, got n_envs={n_envs} and {ranks.size} processes: "
            f"--hyperparams n_envs:{-(-n_envs // ranks.size) * ranks.size} is one"
        )


def launched_by(n_processes: int) -> str:
    """Return how a command begins that starts a module in as many processes, for a message.

    :param n_processes: their number
    """
    if n_processes == 1:
        return "python -m"
    here = int(os.environ.get("LOCAL_WORLD_SIZE", n_processes))
    others = "" if here == n_processes else f"--nnodes {n_processes // here} "
    return f"torchrun {others}--nproc-per-node {here} -m"
