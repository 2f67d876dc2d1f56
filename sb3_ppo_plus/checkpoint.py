"""Checkpoints of a training run, written at the end of an update, from which it goes on bit for bit."""

from __future__ import annotations

import contextlib
import io
import os
import signal
import threading
import time
import warnings
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, TypeVar

import torch as th
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.type_aliases import GymEnv
from stable_baselines3.common.vec_env import VecEnv

from sb3_ppo_plus.callback_state import set_callback_states
from sb3_ppo_plus.checkpoint_directory import (
    Checkpoint,
    CheckpointError,
    checkpoint_directories,
    newest_checkpoint,
    rotate,
    versions,
    write_checkpoint,
)
from sb3_ppo_plus.dead_workers import BROKEN_PIPES, dead_worker_error
from sb3_ppo_plus.generator_state import set_global_generator_states
from sb3_ppo_plus.training_state import (
    ARRAYS_FILE,
    MODEL_FILE,
    STATE_FILE,
    checkpoint_files,
    pending_logs,
    read_state,
    restore_logs,
    seconds_of_learning,
    set_training_state,
)
from sb3_ppo_plus.vec_env_state import WrapperStackError, keep_signals_from_workers

if TYPE_CHECKING:
    from sb3_ppo_plus.ppo_plus import PPOPlus

Model = TypeVar("Model", bound="PPOPlus")


class TrainingCheckpoint(BaseCallback):
    """Writes checkpoints of a training run, from which ``PPOPlus.resume(save_path, env)`` continues it exactly.

    A checkpoint is a directory in ``save_path``, written at the end of an update, after the last one too. It holds
    everything that the rest of the run depends on; of the environments what they tell, see :class:`ResumableEnv`, and
    of callbacks what ``get_state()`` returns, where they have this and ``set_state(state)``.

    With ``on_signal``, SIGTERM and SIGINT (Ctrl-C) have a checkpoint written at the end of the update, where ``learn``
    then returns; a second SIGINT interrupts at once. SIGUSR1 has one written, and learning goes on. The handlers are
    in place during ``learn``, if it runs in the main thread. Workers of a SubprocVecEnv ignore SIGINT and SIGTERM from
    then on, which often reach all processes; forked ones ignore SIGINT only.

    :param save_freq: least number of timesteps, of all environments together, from one checkpoint to the next; with 1
        there is one after every update
    :param save_path: directory of the checkpoints; made where it is missing
    :param keep_last: so many valid checkpoints are kept, older ones are removed
    :param on_signal: handle signals
    :param verbose: 1: print a line for each checkpoint
    :raises ValueError: for numbers below 1
    :raises CheckpointError: during training, where a checkpoint cannot be written; the model stays usable
    """

    comes_last = True

    def __init__(
        self,
        save_freq: int,
        save_path: str | Path,
        keep_last: int = 3,
        on_signal: bool = True,
        verbose: int = 0,
    ) -> None:
        super().__init__(verbose)
        for name, value in (("save_freq", save_freq), ("keep_last", keep_last)):
            if isinstance(value, bool) or not isinstance(value, int):
                raise TypeError(f"{name} must be an int, got {value!r}")
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        self.save_freq = save_freq
        self.save_path = Path(save_path)
        self.keep_last = keep_last
        self.on_signal = on_signal
        self.received_signal: signal.Signals | None = None
        """SIGTERM or SIGINT, if one has come since ``learn`` began, whatever has ended it."""
        self._n_saved_at = 0
        self._signals = _SignalFlags()

    def _init_callback(self) -> None:
        if not hasattr(self.model, "TRAINING_STATE"):
            raise TypeError(f"TrainingCheckpoint needs a PPOPlus, got a {type(self.model).__name__}")
        self.save_path.mkdir(parents=True, exist_ok=True)

    def _on_training_start(self) -> None:
        self.received_signal = None
        self._n_saved_at = self.model.num_timesteps
        # Whatever cannot be saved is said now, not hours later
        unsaved: list[str] = []
        checkpoint_files(self._ppo_plus, self._learn_callback, unsaved)
        if unsaved:
            warnings.warn(f"checkpoints do not hold everything: {'; '.join(sorted(set(unsaved)))}", stacklevel=2)
        if self.model.num_timesteps == 0 and checkpoint_directories(self.save_path):
            warnings.warn(
                f"{self.save_path} holds checkpoints of an earlier run, which this one's will replace; "
                "PPOPlus.resume(save_path, env) would continue it",
                stacklevel=2,
            )
        if self.on_signal and self._signals.install():
            keep_signals_from_workers(self.training_env)

    @property
    def _ppo_plus(self) -> PPOPlus:
        model: Any = self.model
        return model  # type: ignore[no-any-return]  # checked in _init_callback

    @property
    def _learn_callback(self) -> BaseCallback:
        callback = self._ppo_plus._callback
        assert callback is not None
        return callback

    def _on_step(self) -> bool:
        return True

    def on_update_end(self) -> bool:
        """Write a checkpoint where it is time, a signal has come, or training is over.

        :return: False where a signal asks to stop
        """
        model = self._ppo_plus
        is_due = model.num_timesteps - self._n_saved_at >= self.save_freq
        is_over = model.num_timesteps >= model._total_timesteps
        is_requested = self._signals.take_request()
        # Asked last: whatever stops training has been saved, even if the signal comes only now
        self.received_signal = self._signals.stop
        if is_due or is_over or is_requested or self.received_signal is not None:
            self.save()
        return self.received_signal is None

    def save(self) -> Path:
        """Write a checkpoint now; only between two updates is it a state that can be continued.

        :return: its directory
        :raises CheckpointError: where it cannot be written
        """
        model = self._ppo_plus
        files = checkpoint_files(model, self._learn_callback)
        directory = write_checkpoint(self.save_path, files, model.num_timesteps)
        model.last_checkpoint = str(directory)
        self._n_saved_at = model.num_timesteps
        rotate(self.save_path, self.keep_last)
        if self.verbose >= 1:
            print(f"Checkpoint {directory}")
        return directory

    def on_learn_end(self) -> None:
        """Put back the signal handlers; called however ``learn`` ends."""
        self._signals.remove()
        # Also where something else has ended it first: whoever sent the signal waits for the program to end
        self.received_signal = self._signals.stop


class _SignalFlags:
    """Takes note of signals instead of what they would do, in the main thread."""

    def __init__(self) -> None:
        self.stop: signal.Signals | None = None
        self._is_requested = False
        self._was_interrupted = False
        self._previous: dict[int, Any] = {}

    def install(self) -> bool:
        """Handle signals from now on, if this is the main thread.

        :return: whether they are
        """
        self.stop, self._is_requested, self._was_interrupted = None, False, False
        if threading.current_thread() is not threading.main_thread() or self._previous:
            return False
        for name in ("SIGTERM", "SIGINT", "SIGUSR1"):
            number = getattr(signal, name, None)
            # A handler that Python does not know could not be put back
            if number is not None and signal.getsignal(number) is not None:
                self._previous[number] = signal.signal(number, self._note)
        return True

    def remove(self) -> None:
        while self._previous:
            signal.signal(*self._previous.popitem())

    def take_request(self) -> bool:
        """Whether a checkpoint was asked for since the last call."""
        is_requested, self._is_requested = self._is_requested, False
        return is_requested

    def _note(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self._was_interrupted:
            raise KeyboardInterrupt
        self._is_requested = True
        if number == getattr(signal, "SIGUSR1", None):
            return
        self.stop = signal.Signals(number)
        if number == signal.SIGINT:
            self._was_interrupted = True
            # print may not be called again while it runs
            with contextlib.suppress(OSError):
                os.write(2, b"\nStopping after this update, with a checkpoint; interrupt again to stop at once\n")


def latest_checkpoint(save_path: str | Path) -> Path | None:
    """Directory of the newest valid checkpoint; None where there is none, so that training has to begin.

    Warns of newer ones that are not valid.

    :param save_path: as given to :class:`TrainingCheckpoint`
    """
    checkpoint = newest_checkpoint(save_path)
    return None if checkpoint is None else checkpoint.directory


def load_checkpoint(
    cls: type[Model], save_path: str | Path, env: GymEnv, device: th.device | str, **kwargs: Any
) -> Model:
    """Do the work of :meth:`PPOPlus.resume`, with its parameters.

    :param kwargs: further arguments of ``PPOPlus.load``
    """
    if env is None:
        raise TypeError("env must be the environments to go on with, got None")
    checkpoint = newest_checkpoint(save_path)
    if checkpoint is None:
        raise CheckpointError(f"there is no valid checkpoint in {save_path}")
    try:
        return _resumed(cls, checkpoint, env, device, **kwargs)
    except BROKEN_PIPES as error:
        dead = dead_worker_error(env if isinstance(env, VecEnv) else None, None)
        if dead is None:
            raise
        raise dead from error


def _resumed(cls: type[Model], checkpoint: Checkpoint, env: GymEnv, device: th.device | str, **kwargs: Any) -> Model:
    if checkpoint.files.keys() != {MODEL_FILE, STATE_FILE, ARRAYS_FILE}:
        raise CheckpointError(f"{checkpoint.directory} holds {sorted(checkpoint.files)}, which is no training state")
    model = cls.load(io.BytesIO(checkpoint.files[MODEL_FILE]), env=env, device=device, **kwargs)
    try:
        state = read_state(checkpoint.files)
        if not kwargs.get("trusted", True):
            _check_log_name(state["attributes"]["_tb_log_name"])
        goes_on = set_training_state(model, state)
        model._continuation = {name: state[name] for name in ("seconds", "logger", "callbacks", "generators")}
    except (WrapperStackError, *BROKEN_PIPES):
        raise
    except Exception as error:
        # Its hashes are right, so that somebody wrote it so, or the environments refuse their state
        raise CheckpointError(
            f"{checkpoint.directory} cannot be resumed from: {type(error).__name__}: {error}"
        ) from error
    model.last_checkpoint = str(checkpoint.directory)
    _warn_of_inexactness(checkpoint, goes_on)
    if model.verbose >= 1:
        print(f"Resumed from {checkpoint.directory}")
    return model


def _check_log_name(name: str) -> None:
    if Path(name).is_absolute() or ".." in Path(name).parts:
        raise ValueError(f"_tb_log_name must be a name in the folder of the logs, got {name!r}")


def _warn_of_inexactness(checkpoint: Checkpoint, goes_on: bool) -> None:
    if not goes_on:
        warnings.warn(
            "the environments have no get_resume_state() and set_resume_state(state), or had none: they were reset, "
            "their episodes begin anew. ResumableEnv gives both to many",
            stacklevel=5,
        )
    now, then = versions(), checkpoint.manifest["versions"]
    different = [f"{name} {then.get(name)} (now {now.get(name)})" for name in now if now[name] != then.get(name)]
    if different:
        warnings.warn(
            f"what follows may differ in the last bits, since the checkpoint was written with {', '.join(different)}",
            stacklevel=5,
        )


class Continuation(BaseCallback):
    """Puts back the clock, the logs and the callbacks of the run that it continues, once ``learn`` has set them up.

    :param model: the model, before its ``learn``
    """

    def __init__(self, model: PPOPlus) -> None:
        super().__init__()
        self._num_timesteps_at_start = model._num_timesteps_at_start
        # Without a checkpoint's state it is the model itself that was interrupted, and so were its callbacks
        state = model._continuation or {"seconds": seconds_of_learning(model), "logger": pending_logs(model)}
        self._seconds: float = state["seconds"]
        self._logs: dict[str, Any] = state["logger"]
        self._callback_states: dict[str, Any] | None = state.get("callbacks")
        self._generators: dict[str, Any] | None = state.get("generators")

    def _on_training_start(self) -> None:
        model: Any = self.model
        model.start_time = time.time_ns() - int(self._seconds * 1e9)
        model._num_timesteps_at_start = self._num_timesteps_at_start
        restore_logs(model, self._logs)
        if self._callback_states is not None:
            set_callback_states(model._callback, self._callback_states)
        # Once more: whoever made the callbacks may have drawn from them since resume
        if self._generators is not None:
            set_global_generator_states(self._generators)

    def _on_step(self) -> bool:
        return True
