"""Processes that train together, through torch.distributed."""

from __future__ import annotations

import contextlib
import os
import pickle
import sys
import time
import traceback
from collections.abc import Callable
from types import TracebackType
from typing import Any

import torch as th
import torch.distributed as dist

from sb3_ppo_plus.distributed.fresh_store import fresh_store, outlives_attempts
from sb3_ppo_plus.distributed.ranks import Ranks, sum_in_order
from sb3_ppo_plus.errors import RankFailedError
from sb3_ppo_plus.torch_private import default_store, forget_group

#: What torchrun and Ray Train tell each process
LAUNCHER_VARIABLES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
# Gathering goes round the ring of processes once, a sum twice, in pieces. Of few bytes the messages' number counts
MAX_GATHERED_BYTES = 2**16
# How long a process waits for a message before it falls asleep
SECONDS_AWAKE = 0.002
# How long a process that fails waits for the others to read why: its end may be the end of the store
SECONDS_OF_FAREWELL = 3.0
# How long the others wait until it has printed its traceback. Launchers end all processes soon after the first one
SECONDS_OF_PRINTING = 5.0


def share_of(n_envs: int) -> tuple[int, int]:
    """Return which of a number of environments are those of this process.

    :param n_envs: number of environments of all processes
    :return: how many this process has, and the index of its first one. Without a launcher: ``(n_envs, 0)``
    :raises ValueError: if they cannot be shared out evenly
    """
    if dist.is_available() and dist.is_initialized():
        rank, size = dist.get_rank(), dist.get_world_size()
    else:
        rank, size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    if n_envs % size != 0:
        raise ValueError(
            f"n_envs must be a multiple of the number of processes, got n_envs={n_envs} and {size} processes: "
            f"{n_envs - n_envs % size or size} is one"
        )
    return n_envs // size, n_envs // size * rank


def rank_of_launch() -> int:
    """Return the number of this process among those that were launched together; 0 without a launcher."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank()
    return int(os.environ["RANK"]) if is_launched() else 0


def is_launched() -> bool:
    """Whether this process was started together with others, or has joined a process group already."""
    if not dist.is_available():
        return False
    return dist.is_initialized() or all(name in os.environ for name in LAUNCHER_VARIABLES)


def join(device: th.device) -> Ranks:
    """Join the process group of the launcher, or the one that exists already.

    :param device: the policy's device
    :raises ValueError: without a launcher
    """
    if not is_launched():
        missing = [name for name in LAUNCHER_VARIABLES if name not in os.environ]
        raise ValueError(
            "distributed must be False in a process without a launcher, which sets the environment variables "
            f"{', '.join(LAUNCHER_VARIABLES)} (missing: {', '.join(missing) or 'torch.distributed'}): start the script "
            "by `torchrun --nproc-per-node 2 SCRIPT`, or in Ray Train. What several processes have trained goes on in "
            "one with PPOPlus.load(..., distributed=False) or resume(..., distributed=False), and all environments"
        )
    if not dist.is_initialized():
        _make_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    return ProcessRanks()


_groups_of_cpu: list[tuple[Any, Any]] = []
"""The default group, and the group that sends tensors of the CPU beside it."""


_groups_left: list[str] = []
"""The backends of groups that this process has left after an error."""


def _group_of_cpu() -> Any:  # noqa: ANN401  # a process group, whose type is not public
    if not _groups_of_cpu or _groups_of_cpu[0][0] is not dist.group.WORLD:
        _groups_of_cpu[:] = [(dist.group.WORLD, dist.new_group(backend="gloo"))]
    return _groups_of_cpu[0][1]


def _make_group(backend: str) -> None:
    if not outlives_attempts():
        if _groups_left:
            raise RuntimeError(
                "training has failed in this process before, and the processes have left each other. Their launcher "
                "cannot bring them together again: start the script anew (torchrun could)"
            )
        dist.init_process_group(backend)
        return
    # As init_process_group does it. It is not in the list of what the module exports
    store, rank, size = next(dist.rendezvous("env://"))  # type: ignore[attr-defined]
    dist.init_process_group(backend, store=fresh_store(store, rank, size), rank=rank, world_size=size)


class ProcessRanks(Ranks):
    """The processes of torch.distributed's default group.

    Where that group sends no tensors of the CPU, as the one that Ray Train makes for GPUs, a second one does.
    """

    def __init__(self) -> None:
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        self.has_failed = False
        self._group_of_cpu = None if "cpu:" in str(dist.get_backend_config()) else _group_of_cpu()

    def gather(self, tensor: th.Tensor) -> th.Tensor:
        """Return the tensors of all processes, see :meth:`Ranks.gather`."""
        gathered = tensor.new_empty((self.size, *tensor.shape))
        # The rows share the memory of the whole. Gathering into one tensor has other names in other releases
        self._together(dist.all_gather, list(gathered.unbind()), tensor.contiguous(), group=self._group_for(tensor))
        return gathered

    def sum(self, tensor: th.Tensor) -> th.Tensor:
        """Return the sum over all processes, see :meth:`Ranks.sum`."""
        if tensor.device.type == "cpu" and tensor.nbytes <= MAX_GATHERED_BYTES:
            return sum_in_order(self.gather(tensor).unbind())
        summed = tensor.contiguous()
        self._together(dist.all_reduce, summed, group=self._group_for(tensor))
        return summed

    def _group_for(self, tensor: th.Tensor) -> Any:  # noqa: ANN401  # a process group, whose type is not public
        return self._group_of_cpu if tensor.device.type == "cpu" else None

    def gather_objects(self, value: Any, what: str = "a value") -> list[Any]:  # noqa: ANN401  # anything that can be pickled
        """Return the values of all processes, see :meth:`Ranks.gather_objects`."""
        # On the CPU, whatever the device of the policy is: torch's own all_gather_object chooses it by the backend
        content = th.frombuffer(bytearray(pickle.dumps((what, value))), dtype=th.uint8)
        sizes = self.gather(th.tensor(len(content))).tolist()
        padded = th.zeros(max(sizes), dtype=th.uint8)
        padded[: len(content)] = content
        rows = self.gather(padded)
        tagged = [pickle.loads(row[:size].numpy().tobytes()) for row, size in zip(rows, sizes, strict=True)]
        for rank, (theirs, _) in enumerate(tagged):
            if theirs != what:
                raise RankFailedError(
                    f"rank {self.rank} shares {what} while rank {rank} shares {theirs}: all must do the same, with the "
                    "same callbacks"
                )
        return [each for _, each in tagged]

    def any(self, flag: bool) -> bool:
        """Whether the flag is True in one of the processes, see :meth:`Ranks.any`."""
        return bool(self.gather(th.tensor(flag)).any())

    def fail(self, error: BaseException) -> None:
        """Tell the other processes why this one ends, and let what they wait for fail.

        :param error: the error that ends this process's training
        """
        if self.has_failed:
            return
        self.has_failed = True
        # Whatever goes wrong here, the error itself is what the user must see
        with contextlib.suppress(Exception):
            store = default_store()
            if store is not None and not isinstance(error, RankFailedError):
                text = "".join(traceback.format_exception(error))
                store.set("sb3_ppo_plus/failure", f"rank {self.rank}:\n{text}")
                # It needs no other's reason
                store.add("sb3_ppo_plus/farewells", 1)
                _tell_when_printed(store)
            # What is kept would keep the connections, on which the others wait
            forget_group(dist.group.WORLD)
            _groups_of_cpu.clear()
            _groups_left.append(str(dist.get_backend()))
            self._group_of_cpu = None
            dist.destroy_process_group()
            until = time.monotonic() + SECONDS_OF_FAREWELL
            while store is not None and self.rank == 0 and time.monotonic() < until:
                if store.add("sb3_ppo_plus/farewells", 0) >= self.size:
                    break
                time.sleep(0.05)

    def _together(self, collective: Callable[..., Any], *arguments: Any, **keywords: Any) -> None:
        """Do something that ends when all processes do it.

        :param collective: a function of torch.distributed whose last positional argument is this process's tensor
        """
        if self.has_failed:
            raise RankFailedError(f"rank {self.rank} has failed in training before, and has left the others")
        try:
            work = collective(*arguments, async_op=True, **keywords)
            if arguments[-1].device.type == "cpu":
                _wait_awake(work)
            work.wait()
        except (RuntimeError, ValueError) as error:
            if isinstance(error, th.OutOfMemoryError):
                raise
            raise RankFailedError(self._reason(error)) from error

    def _reason(self, error: Exception) -> str:
        with contextlib.suppress(Exception):
            store = default_store()
            until = time.monotonic() + 1.0
            while store is not None and time.monotonic() < until:
                if store.check(["sb3_ppo_plus/failure"]):
                    report = store.get("sb3_ppo_plus/failure").decode()
                    store.add("sb3_ppo_plus/farewells", 1)
                    _wait_until_printed(store)
                    return f"training has ended in another process, {report}"
                time.sleep(0.05)
        return f"training with the other processes has failed. One of them may have been killed, or is gone: {error}"


def _wait_awake(work: Any) -> None:  # noqa: ANN401  # a Work, whose type is not public
    """Wait a little without falling asleep, and let whatever else wants to run go first.

    A message between two processes of a machine takes less time than waking up: 80 minibatches of a small network took
    170 ms so, in place of 220 ms, on a virtual machine.
    """
    if not hasattr(os, "sched_yield"):
        return
    until = time.perf_counter() + SECONDS_AWAKE
    while not work.is_completed() and time.perf_counter() < until:
        os.sched_yield()


def _tell_when_printed(store: Any) -> None:  # noqa: ANN401  # a Store of torch.distributed
    """Tell the other processes when the traceback of this one, which is ending, is printed."""
    hook = sys.excepthook

    def print_and_tell(kind: type[BaseException], error: BaseException, where: TracebackType | None) -> None:
        hook(kind, error, where)
        with contextlib.suppress(Exception):
            store.set("sb3_ppo_plus/printed", "")

    sys.excepthook = print_and_tell


def _wait_until_printed(store: Any) -> None:  # noqa: ANN401  # as above
    # It may go on after the error, and its store may end with it
    with contextlib.suppress(Exception):
        until = time.monotonic() + SECONDS_OF_PRINTING
        while time.monotonic() < until and not store.check(["sb3_ppo_plus/printed"]):
            time.sleep(0.02)
