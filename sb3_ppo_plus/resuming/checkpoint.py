"""The callback that writes checkpoints of a training run."""

from __future__ import annotations

import signal
import sys
import warnings
from pathlib import Path
from typing import Any

from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.vec_env import VecEnv

from sb3_ppo_plus.argument_checks import is_integer
from sb3_ppo_plus.attributes import PlusModel
from sb3_ppo_plus.distributed.agreement import done_by_all
from sb3_ppo_plus.distributed.ranks import Ranks
from sb3_ppo_plus.env_states.proof import prove_envs
from sb3_ppo_plus.envs.questions import base_of
from sb3_ppo_plus.envs.workers import eval_envs_of
from sb3_ppo_plus.resuming.checkpoint_directory import checkpoint_directories
from sb3_ppo_plus.resuming.checkpoint_writer import CheckpointWriter
from sb3_ppo_plus.resuming.run import Run
from sb3_ppo_plus.resuming.signals import SignalFlags, keep_signals_from_workers
from sb3_ppo_plus.resuming.states_of_ranks import snapshot_of_all
from sb3_ppo_plus.resuming.training_state import Snapshot, begin_new_episodes, take_snapshot
from sb3_ppo_plus.saving.model_snapshot import ModelSnapshots


class TrainingCheckpoint(BaseCallback):
    """Writes checkpoints of a training run, from which ``PPOPlus.resume(save_path, env)`` continues it exactly.

    A checkpoint is a directory in ``save_path``. It is written at the end of an update, also of the last one. It holds
    everything that the rest of the run depends on, and beside it ``model.zip`` and ``vecnormalize.json`` for use
    elsewhere. Environments are part of it if they have ``get_resume_state()`` and
    ``set_resume_state(state)``, see :class:`ResumableEnv`. Callbacks of your own are part of it if they have
    ``get_state()`` and ``set_state(state)``.

    At the end of an update its state is copied, which takes the memory of the parameters and the optimiser once more.
    A thread turns the copy into files while training goes on; of a model that is not on the CPU, ``model.zip`` is made
    first. A checkpoint that is due earlier waits for the one before. ``learn`` returns when the last is on the disk.

    During ``learn`` the directory is locked: a second run in it is an error that names the process of the first. The
    lock ends with its process.

    With ``on_signal``, SIGTERM or SIGINT (Ctrl-C) ends training after the current update: a checkpoint is written, and
    ``learn`` returns. A second SIGINT interrupts at once. After SIGUSR1 a checkpoint is written too, and learning goes
    on. The handlers are in place during ``learn``, if it runs in the main thread. Such signals often reach all
    processes, so the workers of a SubprocVecEnv ignore all three from then on, those of evaluation environments too.

    :param save_freq: smallest number of timesteps between two checkpoints, counted over all environments; 1: a
        checkpoint after every update
    :param save_path: directory of the checkpoints; it is created if it is missing
    :param keep_last: number of newest valid checkpoints to keep; older ones are removed
    :param on_signal: whether to handle signals
    :param verbose: 1: print a line for each checkpoint
    :param keep_best: number of valid checkpoints to keep for the highest mean return of the last episodes at saving
        (``rollout/ep_rew_mean``), whatever their age; of equal ones the newer. See :func:`best_checkpoint`
    :raises TypeError: for a ``save_freq``, ``keep_last`` or ``keep_best`` that is no integer
    :raises ValueError: for a ``save_freq`` or ``keep_last`` below 1, or a ``keep_best`` below 0
    :raises ResumeProofError: when training starts, if an environment in a :class:`ResumableEnv` goes on in another way
        after its state was put back
    :raises CheckpointError: before the first step, if another run uses the directory, or nothing can be written there.
        Later, if a checkpoint could not be written: at the next one or at the end of ``learn``; the model stays usable
    """

    comes_last = True
    acts_together = True
    """Of several processes, all must have it."""

    def __init__(
        self,
        save_freq: int,
        save_path: str | Path,
        keep_last: int = 3,
        on_signal: bool = True,
        verbose: int = 0,
        keep_best: int = 0,
    ) -> None:
        super().__init__(verbose)
        for name, value, least in (
            ("save_freq", save_freq, 1),
            ("keep_last", keep_last, 1),
            ("keep_best", keep_best, 0),
        ):
            if not is_integer(value):
                raise TypeError(f"{name} must be an int, got {value!r}")
            if not is_integer(value, least):
                raise ValueError(f"{name} must be at least {least}, got {value}")
        self.save_freq = int(save_freq)
        self.save_path = Path(save_path)
        self.keep_last = int(keep_last)
        self.keep_best = int(keep_best)
        self.on_signal = on_signal
        self.received_signal: signal.Signals | None = None
        """SIGTERM or SIGINT, if one arrived during the last ``learn``, even if something else ended it first."""
        self._n_saved_at = 0
        self._signals = SignalFlags()
        self._writer = self._new_writer()
        self._models = ModelSnapshots()
        self._callbacks: BaseCallback = self
        self._outer_exception: BaseException | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_outer_exception": None}

    def _init_callback(self) -> None:
        if not hasattr(self.model, "TRAINING_STATE"):
            raise TypeError(f"TrainingCheckpoint needs a PPOPlus, got a {type(self.model).__name__}")

    def _on_training_start(self) -> None:
        self.received_signal = None
        self._n_saved_at = self.model.num_timesteps
        # learn may be called while an exception is handled
        self._outer_exception = sys.exception()
        self._writer.close()
        self._writer = self._new_writer()
        if self._ranks.rank == 0:
            # It writes the checkpoints of all processes
            self._writer.open()
        # First: a subclass may go on where the state cannot be saved
        if self.on_signal and self._signals.install():
            self._keep_signals_from_workers()
        # Find out now what cannot be saved, not hours later
        unsaved: list[str] = []
        self._snapshot(unsaved)
        if unsaved:
            warnings.warn(f"checkpoints do not hold everything: {'; '.join(sorted(set(unsaved)))}", stacklevel=2)
        # As in one process, which has all environments
        while any(done_by_all(self._ranks, lambda: prove_envs(self.training_env), "proofs")):
            begin_new_episodes(self._ppo_plus)
        self._prove_evaluations()
        if self.model.num_timesteps == 0 and self._ranks.rank == 0 and checkpoint_directories(self.save_path):
            warnings.warn(
                f"{self.save_path} holds checkpoints of an earlier run. This run's checkpoints will replace them. "
                "PPOPlus.resume(save_path, env) would continue the earlier run",
                stacklevel=2,
            )

    def _keep_signals_from_workers(self) -> None:
        """Keep them from those of evaluations too: a checkpoint holds their state."""
        bases = {id(base_of(env)): env for env in (self.training_env, *self._evaluation_envs())}
        for env in bases.values():
            keep_signals_from_workers(env)

    def _prove_evaluations(self) -> None:
        for env in self._evaluation_envs():
            while prove_envs(env, "evaluation environment"):
                env.reset()

    def _evaluation_envs(self) -> list[VecEnv]:
        run: Run = self._ppo_plus._current_run
        envs = eval_envs_of(run.callback)
        return [env for env in envs if isinstance(env, VecEnv) and env is not self.training_env]

    def _new_writer(self) -> CheckpointWriter:
        return CheckpointWriter(self.save_path, self.keep_last, self.keep_best, self._note_written)

    @property
    def _ranks(self) -> Ranks:
        ranks: Ranks = self._ppo_plus._parts.ranks
        return ranks

    @property
    def _ppo_plus(self) -> PlusModel:
        # Checked in _init_callback
        model: Any = self.model
        resumable: PlusModel = model
        return resumable

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
        is_requested, must_stop = self._agree(is_requested, self.received_signal is not None)
        if is_over or must_stop:
            # There is no training left that could go on meanwhile
            self.save()
        elif is_due or is_requested:
            # The error of the checkpoint before comes first
            done_by_all(self._ranks, self._writer.wait, "a wait for a checkpoint")
            snapshot = self._snapshot()
            if self._ranks.rank == 0:
                self._writer.write_in_background(snapshot)
        return not must_stop

    def _agree(self, is_requested: bool, must_stop: bool) -> tuple[bool, bool]:
        """Return whether a signal asks one of the processes for a checkpoint, and whether it asks one to stop."""
        if self._ranks.size == 1:
            return is_requested, must_stop
        # What the first process has written since the last time
        answers = self._ranks.gather_objects((is_requested, must_stop, self._ppo_plus.last_checkpoint), "requests")
        if self._ranks.rank > 0:
            # The first one's writer may have set a newer one meanwhile
            self._ppo_plus.last_checkpoint = answers[0][2]
        return any(answer[0] for answer in answers), any(answer[1] for answer in answers)

    def save(self) -> Path:
        """Write a checkpoint now, and return when it is on the disk.

        A run can be continued only from a checkpoint written between two updates. After ``learn`` has ended, a
        checkpoint holds the callbacks of that ``learn``.

        Of several processes, each must call this; the first one writes.

        :return: its directory
        :raises CheckpointError: if it, or the one before it, cannot be written, or if another run uses the directory
        """
        snapshot = self._snapshot()
        is_first = self._ranks.rank == 0
        paths = done_by_all(self._ranks, lambda: self._writer.write(snapshot) if is_first else Path(), "a checkpoint")
        written = paths[0]
        self._ppo_plus.last_checkpoint = str(written)
        return written

    def wait_for_checkpoint(self) -> None:
        """Wait until no checkpoint is being written. One that fails is an error later, as if nobody had waited."""
        self._writer.settle()

    def _snapshot(self, unsaved: list[str] | None = None) -> Snapshot:
        model = self._ppo_plus
        run: Run = model._current_run
        if run.callback is not None:
            self._callbacks = run.callback
        self._n_saved_at = model.num_timesteps
        if self._ranks.size > 1:
            # It is drawn together, before the first state that may not be saved
            model._parts.entropy()
        return snapshot_of_all(lambda: take_snapshot(model, self._callbacks, self._models, unsaved), self._ranks)

    def _note_written(self, directory: Path) -> None:
        self._ppo_plus.last_checkpoint = str(directory)
        if self.verbose >= 1:
            print(f"Checkpoint {directory}")

    def on_learn_end(self) -> None:
        """Wait for the last checkpoint, and put back the signal handlers. PPOPlus calls this after exceptions too.

        :raises CheckpointError: if the last checkpoint could not be written. If ``learn`` ends with another exception,
            a warning says so
        """
        failure = sys.exception()
        try:
            self._writer.close()
        except Exception as error:
            if failure is None or failure is self._outer_exception:
                raise
            warnings.warn(f"training has ended with an exception, and: {error}", stacklevel=2)
        finally:
            self._signals.remove()
            # Also if something else has ended learn: the sender of the signal expects the program to end
            self.received_signal = self._signals.stop
            self._outer_exception = None
