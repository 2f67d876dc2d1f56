"""Training a model together with other processes: how it begins and ends."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch as th
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.logger import (
    CSVOutputFormat,
    HumanOutputFormat,
    JSONOutputFormat,
    TensorBoardOutputFormat,
)
from stable_baselines3.common.type_aliases import MaybeCallback

from sb3_ppo_plus.attributes import PlusModel
from sb3_ppo_plus.callback_hooks import iterate_callbacks
from sb3_ppo_plus.distributed.agreement import check_alike, share_parameters
from sb3_ppo_plus.distributed.parts import Parts
from sb3_ppo_plus.distributed.process_group import is_launched, join, rank_of_launch
from sb3_ppo_plus.distributed.ranks import Ranks
from sb3_ppo_plus.distributed.shared_statistics import sharing_statistics
from sb3_ppo_plus.envs.batched_vec_env import statistics_of_transitions
from sb3_ppo_plus.envs.questions import base_of

OF_FILES = (HumanOutputFormat, JSONOutputFormat, CSVOutputFormat, TensorBoardOutputFormat)
DISTRIBUTED = (False, True, "exact")


def device_of_process(distributed: bool | str, device: th.device | str) -> th.device | str:
    """Return the device of this process's model: with several processes on a host, each has a CUDA device of its own.

    :param distributed: PPOPlus's argument
    :param device: PPOPlus's argument
    """
    chooses = distributed is not False and str(device) in ("auto", "cuda") and th.cuda.is_available()
    if not (chooses and is_launched()):
        return device
    # Some launchers show each process its own device only
    return f"cuda:{int(os.environ.get('LOCAL_RANK', '0')) % th.cuda.device_count()}"


@contextmanager
def counting_all_environments(distributed: bool | str) -> Iterator[None]:
    """Keep SB3's PPO from comparing the batch size of all processes with the environments of this one.

    :param distributed: PPOPlus's argument
    """
    if distributed is False:
        yield
        return
    with warnings.catch_warnings():
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
    is_exact = model.distributed != True  # noqa: E712  # "exact" is true too
    # A model that is loaded joins when it learns; until then its environments may be reset with the seeds of this rank
    rank_of_envs = rank_of_launch() if model.distributed else 0
    parts = Parts(model.micro_batches, model.device, ranks, is_exact=is_exact, rank_of_envs=rank_of_envs)
    if joins:
        # A model that is only loaded may be used with any number of environments
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


def _acting_together(callback: MaybeCallback) -> list[str]:
    """Describe the callbacks that exchange something with those of the other processes."""
    given = callback if isinstance(callback, list) else [callback]
    children = [child for each in given if isinstance(each, BaseCallback) for child in iterate_callbacks(each)]
    together = [child for child in children if getattr(child, "acts_together", False)]
    return [f"{type(child).__name__} with save_freq={getattr(child, 'save_freq', None)}" for child in together]


@contextmanager
def _logging_for_all(model: Any, ranks: Ranks) -> Iterator[None]:  # noqa: ANN401  # a PPOPlus
    """Keep a logger that the user has made from writing what the first process writes, into the same files."""
    if ranks.rank == 0 or not model._custom_logger:
        yield
        return
    formats = list(model.logger.output_formats)
    model.logger.output_formats[:] = [each for each in formats if not isinstance(each, OF_FILES)]
    try:
        yield
    finally:
        model.logger.output_formats[:] = formats


def _seed_apart(model: PlusModel, parts: Parts) -> None:
    """Seed the environments of each process apart, where all have the same seeds: by a script, or since a load."""
    env = model.env
    seeds = [] if env is None else list(getattr(base_of(env), "_seeds", ()))
    of_all = parts.ranks.gather_objects(seeds, "seeds")
    if seeds and seeds[0] is not None and of_all.count(of_all[0]) > 1:
        parts.seed_envs(env, of_all[0][0])


def _warn_of_processes_apart(model: Any) -> None:  # noqa: ANN401  # a PPOPlus
    n_processes = os.environ.get("WORLD_SIZE", "1")
    if model.distributed is False and is_launched() and n_processes != "1":
        warnings.warn(
            f"each of {n_processes} processes trains a model of its own: distributed=True makes it one model",
            stacklevel=5,
        )


@contextmanager
def training_together(
    model: Any,  # noqa: ANN401  # a PPOPlus
    total_timesteps: int,
    callback: MaybeCallback,
    log_interval: int,
    tb_log_name: str,
    reset_num_timesteps: bool,
    progress_bar: bool,
) -> Iterator[None]:
    """Train as one of several processes. If one of them fails, all others end with an error that says why.

    The parameters are those of PPOPlus.learn.

    :param model: the model; all begin with the parameters and statistics of the first process
    :raises ValueError: if the processes would not train alike
    :raises RankFailedError: if another process has failed
    """
    parts: Parts = model._parts
    ranks = parts.ranks
    if ranks.size == 1:
        _warn_of_processes_apart(model)
        with statistics_of_transitions(model.env):
            yield
        return
    try:
        others = {
            "total_timesteps": total_timesteps,
            "reset_num_timesteps": reset_num_timesteps,
            "whether environments were reset": model._last_obs is not None,
            "callbacks that act together": _acting_together(callback),
        }
        check_alike(model, ranks, others)
        share_parameters(model, ranks)
        _seed_apart(model, parts)
        with sharing_statistics(model.env, ranks, at_each_step=parts.is_exact), _logging_for_all(model, ranks):
            yield
    except BaseException as error:
        if not getattr(error, "is_of_all_processes", False):
            ranks.fail(error)
        raise
