"""Loading a checkpoint, and continuing the run that wrote it."""

from __future__ import annotations

import io
import time
import warnings
from pathlib import Path
from typing import Any, TypeVar

import torch as th
from stable_baselines3 import PPO
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.type_aliases import GymEnv, MaybeCallback

from sb3_ppo_plus.attributes import PlusModel
from sb3_ppo_plus.distributed.ranks import Ranks
from sb3_ppo_plus.env_states.generator_state import set_global_generator_states
from sb3_ppo_plus.envs.workers import BROKEN_PIPES, NamingDeadWorkers
from sb3_ppo_plus.errors import CheckpointError, DeadWorkerError, WrapperStackError
from sb3_ppo_plus.resuming.callback_state import set_callback_states
from sb3_ppo_plus.resuming.checkpoint_directory import (
    NORMALIZER_FILE,
    Checkpoint,
    best_checkpoint_in,
    newest_checkpoint,
    versions,
)
from sb3_ppo_plus.resuming.migrations import migrated
from sb3_ppo_plus.resuming.run import as_callbacks
from sb3_ppo_plus.resuming.states_of_ranks import files_by_rank, shared_out
from sb3_ppo_plus.resuming.training_state import (
    ARRAYS_FILE,
    MODEL_FILE,
    STATE_FILE,
    pending_logs,
    read_state,
    restore_logs,
    seconds_of_learning,
    set_training_state,
)
from sb3_ppo_plus.untrusted.strict_json import short

Model = TypeVar("Model", bound=PPO)

#: Characters of the name of a log's folder, without trust
MAX_LOG_NAME = 200


def latest_checkpoint(save_path: str | Path) -> Path | None:
    """Return the directory of the newest valid checkpoint. Newer ones that are not valid are warned of.

    :param save_path: as given to :class:`TrainingCheckpoint`
    :return: None if there is no valid checkpoint, so that training has to begin
    """
    checkpoint = newest_checkpoint(save_path)
    return None if checkpoint is None else checkpoint.directory


def best_checkpoint(save_path: str | Path) -> Path | None:
    """Return the directory of the valid checkpoint with the highest mean return of the last episodes at saving.

    ``PPOPlus.load(directory / "model.zip")`` loads its model, and ``load_vec_normalize(directory / "vecnormalize.json",
    env)`` the statistics of its VecNormalize. ``PPOPlus.resume(directory, env)`` goes on from it. Checkpoints that are
    not valid are warned of, and those of an earlier run in this directory count too.

    :param save_path: as given to :class:`TrainingCheckpoint`
    :return: of equal ones the newest; None if there is no valid checkpoint that was saved after an episode had ended
    """
    checkpoint = best_checkpoint_in(save_path)
    return None if checkpoint is None else checkpoint.directory


def load_checkpoint(
    cls: type[Model],
    save_path: str | Path,
    env: GymEnv,
    device: th.device | str,
    *,
    trusts_state: bool | None = None,
    **kwargs: Any,
) -> Model:
    """Load a checkpoint, as :meth:`PPOPlus.resume`.

    :param cls: class of the model
    :param save_path: directory of the checkpoints, or the directory of one checkpoint
    :param env: the environments to go on with
    :param device: device of the model
    :param trusts_state: whether the state of environments, wrappers and callbacks, which are plain values, is put back
        as it is; None: as ``trusted``, the argument of ``PPOPlus.load``, which is about code in ``model.zip``
    :param kwargs: further arguments of ``PPOPlus.load``
    :raises CheckpointError: if there is no valid checkpoint, or it cannot be resumed from
    :raises WrapperStackError: if the number of environments, or their wrappers, differ from the saved ones
    """
    if env is None:
        raise TypeError("env must be the environments to go on with, got None")
    if save_path is None:
        raise TypeError("save_path must be the directory of a run's checkpoints, got None: is there no checkpoint yet?")
    skipped: list[str] = []
    checkpoint = newest_checkpoint(save_path, kwargs.get("trusted", True), skipped)
    if checkpoint is None:
        raise CheckpointError("; ".join([f"there is no valid checkpoint in {save_path}", *skipped[:1]]))
    with NamingDeadWorkers(lambda: [env]):
        return _resumed(cls, checkpoint, env, device, trusts_state, **kwargs)


def _resumed(
    cls: type[Model],
    checkpoint: Checkpoint,
    env: GymEnv,
    device: th.device | str,
    trusts_state: bool | None,
    **kwargs: Any,
) -> Model:
    files = _files_by_rank(checkpoint)
    model: Any = cls.load(io.BytesIO(files[0][MODEL_FILE]), env=env, device=device, **kwargs)
    model._join()
    try:
        trusted = kwargs.get("trusted", True)
        state = _state_for(model, checkpoint, files, trusted)
        if not trusted:
            _check_log_name(state["attributes"]["_tb_log_name"])
        trusts_state = trusted if trusts_state is None else trusts_state
        with model._current_run.watching_workers(model):
            goes_on = set_training_state(model, state, trusts_state)
        continuation = {name: state[name] for name in ("seconds", "logger", "callbacks", "generators")}
        continuation["trusted"] = trusts_state
        model._current_run.continuation = continuation
    except (WrapperStackError, DeadWorkerError, *BROKEN_PIPES):
        raise
    except Exception as error:
        # The hashes are right: either somebody made up these files, or the environments refuse their state
        raise CheckpointError(
            f"{checkpoint.directory} cannot be resumed from: {type(error).__name__}: {error}"
        ) from error
    model.last_checkpoint = str(checkpoint.directory)
    _warn_of_inexactness(checkpoint, goes_on, len(files), model._parts.ranks.size)
    if model.verbose >= 1:
        print(f"Resumed from {checkpoint.directory}")
    resumed: Model = model
    return resumed


def _check_log_name(name: str) -> None:
    is_odd = len(name) > MAX_LOG_NAME or not name.isprintable()
    if is_odd or Path(name).is_absolute() or ".." in Path(name).parts:
        raise ValueError(f"_tb_log_name must be the name of a folder inside tensorboard_log, got {short(name)}")


def _files_by_rank(checkpoint: Checkpoint) -> list[dict[str, bytes]]:
    try:
        files = files_by_rank(checkpoint.files)
    except ValueError as error:
        raise CheckpointError(f"{checkpoint.directory} holds no training state: {error}") from error
    if files[0].keys() - {NORMALIZER_FILE} != {MODEL_FILE, STATE_FILE, ARRAYS_FILE}:
        raise CheckpointError(f"{checkpoint.directory} holds no training state, got {sorted(checkpoint.files)}")
    return files


def _state_for(
    model: PlusModel, checkpoint: Checkpoint, files: list[dict[str, bytes]], trusted: bool
) -> dict[str, Any]:
    """Return the state with which this process goes on."""
    ranks: Ranks = model._parts.ranks
    # Copies of a checkpoint may have other names
    of_all = ranks.gather_objects((checkpoint.directory.name, checkpoint.manifest["files"]), "checkpoints")
    found = [name for name, _ in of_all]
    if any(files_of_rank != of_all[0][1] for _, files_of_rank in of_all):
        raise ValueError(
            f"the processes have found different checkpoints, {found}: do they share {checkpoint.directory}?"
        )
    # With as many processes as before, none reads what belongs to the others
    needed = files[ranks.rank : ranks.rank + 1] if len(files) == ranks.size else files
    states = [migrated(read_state(each, trusted), checkpoint.manifest["format"]) for each in needed]
    return states[0] if len(files) == ranks.size else shared_out(states, ranks, model.n_envs)


def _warn_of_inexactness(checkpoint: Checkpoint, goes_on: bool, n_saved: int, n_now: int) -> None:
    if n_now != n_saved:
        warnings.warn(
            f"the checkpoint is of {n_saved} process{'es' if n_saved > 1 else ''}, now there are {n_now}: the "
            "environments were shared out anew. Parameters, optimizer, normalizer and counters go on exactly, random "
            "numbers and the callbacks of other processes than the first do not",
            stacklevel=5,
        )
    if not goes_on:
        warnings.warn(
            "the environments have no get_resume_state() and set_resume_state(state), had none when they were saved, "
            "or could not be put back: they were reset, and their episodes begin anew. ResumableEnv gives many "
            "environments both methods",
            stacklevel=5,
        )
    now, then = versions(), checkpoint.manifest["versions"]
    different = [f"{name} {then.get(name)} (now {now.get(name)})" for name in now if now[name] != then.get(name)]
    if different:
        warnings.warn(
            f"what follows may differ in the last bits, since the checkpoint was written with {', '.join(different)}",
            stacklevel=5,
        )


def arguments_to_continue(
    model: PlusModel, callback: MaybeCallback
) -> tuple[int, list[BaseCallback], int | None, str, bool]:
    """Return the arguments of the ``learn`` that finishes another one; warn where there is nothing to continue.

    A user may have asked for more steps in a script that is run again.

    :param model: the model
    :param callback: the callbacks of the ``learn`` that was interrupted
    :return: total_timesteps, callback, log_interval, tb_log_name, reset_num_timesteps
    :raises ValueError: for a model that has never learned
    """
    if model._total_timesteps == 0:
        raise ValueError("there is no learn to continue: call learn, or resume from a checkpoint")
    remaining = model._total_timesteps - model.num_timesteps
    if remaining <= 0:
        warnings.warn(
            f"the run is finished: it has done its {model.num_timesteps} timesteps. learn(more_timesteps, callback, "
            "reset_num_timesteps=False) goes on",
            stacklevel=3,
        )
    # SB3 calls dump_logs at every iteration, and dump_logs chooses by the true interval
    log_interval = None if model._log_interval is None else 1
    return remaining, [*as_callbacks(callback), Continuation(model)], log_interval, model._tb_log_name, False


class Continuation(BaseCallback):
    """Puts back the clock, the logs and the state of the callbacks of a run that is continued.

    ``learn`` sets these up first.

    :param model: the model, before ``learn``
    """

    def __init__(self, model: PlusModel) -> None:
        super().__init__()
        self._num_timesteps_at_start = model._num_timesteps_at_start
        # Without a checkpoint, this model itself was interrupted: its callbacks still have their state
        here: dict[str, Any] = {"seconds": seconds_of_learning(model), "logger": pending_logs(model)}
        state = model._current_run.continuation or here
        self._seconds: float = state["seconds"]
        self._logs: dict[str, Any] = state["logger"]
        self._callback_states: dict[str, Any] | None = state.get("callbacks")
        self._generators: dict[str, Any] | None = state.get("generators")
        self._trusted: bool = state.get("trusted", True)

    def _on_training_start(self) -> None:
        model: Any = self.model
        model.start_time = time.time_ns() - int(self._seconds * 1e9)
        model._num_timesteps_at_start = self._num_timesteps_at_start
        restore_logs(model, self._logs)
        if self._callback_states is not None:
            self._set_callback_states(model._current_run.callback)
        # For the second time: since resume, code that made the callbacks may have drawn random numbers
        if self._generators is not None:
            set_global_generator_states(self._generators)

    def _set_callback_states(self, callback: BaseCallback) -> None:
        assert self._callback_states is not None
        try:
            set_callback_states(callback, self._callback_states, self._trusted)
        except (TypeError, ValueError, LookupError, AttributeError, ArithmeticError) as error:
            if self._trusted:
                raise
            raise CheckpointError(
                f"the state of the callbacks cannot be put back: {type(error).__name__}: {error}"
            ) from error

    def _on_step(self) -> bool:
        return True
