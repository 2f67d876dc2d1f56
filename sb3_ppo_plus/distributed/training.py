"""Training a model together with other processes: how it begins and ends."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch as th

from sb3_ppo_plus.attributes import PlusModel
from sb3_ppo_plus.distributed.agreement import check_alike, share_parameters
from sb3_ppo_plus.distributed.parts import Parts
from sb3_ppo_plus.distributed.process_group import is_launched, join
from sb3_ppo_plus.distributed.ranks import Ranks
from sb3_ppo_plus.distributed.shared_statistics import sharing_statistics

DISTRIBUTED = (False, True, "exact")


def device_of_process(distributed: bool | str, device: th.device | str) -> th.device | str:
    """Return the device of this process's model: with several processes on a host, each has a CUDA device of its own.

    :param distributed: PPOPlus's argument
    :param device: PPOPlus's argument
    """
    chooses = distributed is not False and str(device) in ("auto", "cuda") and th.cuda.is_available()
    return f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if chooses and is_launched() else device


@contextmanager
def counting_all_environments(distributed: bool | str) -> Iterator[None]:
    """Keep SB3's PPO from comparing the batch size of all processes with the environments of this one.

    :param distributed: PPOPlus's argument
    """
    with warnings.catch_warnings():
        if distributed is not False:
            warnings.filterwarnings("ignore", "You have specified a mini-batch size")
        yield


def make_parts(model: PlusModel, *, joins: bool) -> Parts:
    """Make the parts of a model's environments and minibatches.

    :param model: the model
    :param joins: join the other processes, if the model trains with others. A model that is only loaded does not: it
        may be used in a single process
    :raises ValueError: if there is no launcher, or if environments or minibatches cannot be divided
    """
    ranks = join(model.device) if joins and model.distributed else Ranks()
    parts = Parts(model.micro_batches, model.device, ranks, is_exact=model.distributed != True)  # noqa: E712  # "exact" is true too
    parts.check(model)
    n_transitions = model.n_steps * model.n_envs * ranks.size
    if joins and model.distributed is not False and n_transitions % model.batch_size > 0 and ranks.rank == 0:
        warnings.warn(
            f"the last minibatch of each epoch has only {n_transitions % model.batch_size} transitions, since "
            f"batch_size={model.batch_size} does not divide n_steps * environments of all processes = {n_transitions}",
            stacklevel=4,
        )
    if ranks.rank > 0:
        # The first process prints and logs for all
        model.verbose, model.tensorboard_log = 0, None
    return parts


@contextmanager
def training_together(model: Any, total_timesteps: int) -> Iterator[None]:  # noqa: ANN401  # a PPOPlus
    """Train as one of several processes. If one of them fails, all others end with an error that says why.

    :param model: the model; all begin with the parameters and statistics of the first process
    :param total_timesteps: PPOPlus.learn's argument
    :raises ValueError: if the processes would not train alike
    :raises RankFailedError: if another process has failed
    """
    parts: Parts = model._parts
    ranks = parts.ranks
    if ranks.size == 1:
        yield
        return
    try:
        check_alike(model, ranks, {"total_timesteps": total_timesteps})
        share_parameters(model, ranks)
        with sharing_statistics(model.env, ranks, at_each_step=parts.is_exact):
            yield
    except BaseException as error:
        if not getattr(error, "is_of_all_processes", False):
            ranks.fail(error)
        raise
