"""The callback that writes checkpoints of a training run."""

from __future__ import annotations

import signal
import warnings
from pathlib import Path
from typing import Any

from stable_baselines3.common.callbacks import BaseCallback

from sb3_ppo_plus.argument_checks import is_integer
from sb3_ppo_plus.attributes import PlusModel
from sb3_ppo_plus.resuming.checkpoint_directory import (
    checkpoint_directories,
    rotate,
    write_checkpoint,
)
from sb3_ppo_plus.resuming.proof import prove_envs
from sb3_ppo_plus.resuming.run import Run
from sb3_ppo_plus.resuming.signals import SignalFlags, keep_signals_from_workers
from sb3_ppo_plus.resuming.training_state import (
    checkpoint_files,
)


class TrainingCheckpoint(BaseCallback):
    """Writes checkpoints of a training run, from which ``PPOPlus.resume(save_path, env)`` continues it exactly.

    A checkpoint is a directory in ``save_path``. It is written at the end of an update, also of the last one. It holds
    everything that the rest of the run depends on. Environments are part of it if they have ``get_resume_state()`` and
    ``set_resume_state(state)``, see :class:`ResumableEnv`. Callbacks of your own are part of it if they have
    ``get_state()`` and ``set_state(state)``.

    With ``on_signal``, SIGTERM or SIGINT (Ctrl-C) ends training after the current update: a checkpoint is written, and
    ``learn`` returns. A second SIGINT interrupts at once. After SIGUSR1 a checkpoint is written too, and learning goes
    on. The handlers are in place during ``learn``, if it runs in the main thread. Such signals often reach all
    processes, so the workers of a SubprocVecEnv ignore SIGINT and SIGTERM from then on; forked workers ignore only
    SIGINT.

    :param save_freq: smallest number of timesteps between two checkpoints, counted over all environments; 1: a
        checkpoint after every update
    :param save_path: directory of the checkpoints; it is created if it is missing
    :param keep_last: number of valid checkpoints to keep; older ones are removed
    :param on_signal: whether to handle signals
    :param verbose: 1: print a line for each checkpoint
    :raises TypeError: for a ``save_freq`` or ``keep_last`` that is no integer
    :raises ValueError: for a ``save_freq`` or ``keep_last`` below 1
    :raises ResumeProofError: when training starts, if an environment in a :class:`ResumableEnv` goes on in another way
        after its state was put back
    :raises CheckpointError: during training, if a checkpoint cannot be written; the model stays usable
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
            if not is_integer(value):
                raise TypeError(f"{name} must be an int, got {value!r}")
            if not is_integer(value, 1):
                raise ValueError(f"{name} must be at least 1, got {value}")
        self.save_freq = int(save_freq)
        self.save_path = Path(save_path)
        self.keep_last = int(keep_last)
        self.on_signal = on_signal
        self.received_signal: signal.Signals | None = None
        """SIGTERM or SIGINT, if one arrived during the last ``learn``, even if something else ended it first."""
        self._n_saved_at = 0
        self._signals = SignalFlags()

    def _init_callback(self) -> None:
        if not hasattr(self.model, "TRAINING_STATE"):
            raise TypeError(f"TrainingCheckpoint needs a PPOPlus, got a {type(self.model).__name__}")
        self.save_path.mkdir(parents=True, exist_ok=True)

    def _on_training_start(self) -> None:
        self.received_signal = None
        self._n_saved_at = self.model.num_timesteps
        # Find out now what cannot be saved, not hours later
        unsaved: list[str] = []
        checkpoint_files(self._ppo_plus, self._learn_callback, unsaved)
        if unsaved:
            warnings.warn(f"checkpoints do not hold everything: {'; '.join(sorted(set(unsaved)))}", stacklevel=2)
        prove_envs(self.training_env)
        if self.model.num_timesteps == 0 and checkpoint_directories(self.save_path):
            warnings.warn(
                f"{self.save_path} holds checkpoints of an earlier run. This run's checkpoints will replace them. "
                "PPOPlus.resume(save_path, env) would continue the earlier run",
                stacklevel=2,
            )
        if self.on_signal and self._signals.install():
            keep_signals_from_workers(self.training_env)

    @property
    def _ppo_plus(self) -> PlusModel:
        # Checked in _init_callback
        model: Any = self.model
        resumable: PlusModel = model
        return resumable

    @property
    def _learn_callback(self) -> BaseCallback:
        run: Run = self._ppo_plus._current_run
        assert run.callback is not None
        return run.callback

    def _on_step(self) -> bool:
        return True

    def on_update_end(self) -> bool:
        """Write a checkpoint if ``save_freq`` steps are done, a signal has arrived, or training is over.

        :return: False if a signal asks to stop
        """
        model = self._ppo_plus
        is_due = model.num_timesteps - self._n_saved_at >= self.save_freq
        is_over = model.num_timesteps >= model._total_timesteps
        is_requested = self._signals.take_request()
        # Read last: a signal may arrive during these lines, and one that stops training must have a checkpoint written
        self.received_signal = self._signals.stop
        if is_due or is_over or is_requested or self.received_signal is not None:
            self.save()
        return self.received_signal is None

    def save(self) -> Path:
        """Write a checkpoint now. A run can be continued only from a checkpoint written between two updates.

        :return: its directory
        :raises CheckpointError: if it cannot be written
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
        """Put back the signal handlers. PPOPlus calls this even if ``learn`` ends with an exception."""
        self._signals.remove()
        # Also if something else has ended learn: the sender of the signal expects the program to end
        self.received_signal = self._signals.stop
