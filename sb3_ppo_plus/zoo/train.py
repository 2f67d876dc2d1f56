"""What ``train`` adds to the RL Zoo's: checkpoints in the run's folder, from which ``resume`` goes on."""

from __future__ import annotations

import argparse
import functools
import json
import os
import signal
import sys
import warnings
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium as gym
import optuna
import rl_zoo3.exp_manager
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from rl_zoo3.exp_manager import ExperimentManager
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.vec_env import VecEnv, unwrap_vec_normalize

from sb3_ppo_plus.distributed.agreement import done_by_all
from sb3_ppo_plus.distributed.process_group import share_of
from sb3_ppo_plus.env_states.resumable_env_for import resumable_env_for
from sb3_ppo_plus.errors import CheckpointError, RankFailedError
from sb3_ppo_plus.resuming.checkpoint import TrainingCheckpoint
from sb3_ppo_plus.zoo.interrupted_run import CHECKPOINTS, DESCRIPTION, FORMAT, how_to_go_on
from sb3_ppo_plus.zoo.processes import add_distributed, ranks_of_run, still_joined
from sb3_ppo_plus.zoo.registration import with_members
from sb3_ppo_plus.zoo.vectorized import take_key, vector_class

EnvWrapper = Callable[[gym.Env[Any, Any]], gym.Env[Any, Any]]


class RunCheckpoint(TrainingCheckpoint):
    """Checkpoints of a run of the zoo, which goes on where one cannot be written: nobody has asked for them.

    :param save_freq: as for :class:`TrainingCheckpoint`
    :param save_path: the same
    :param when_started: called when the directory is locked, before the first step
    :param verbose: 1: print a line for each checkpoint
    """

    def __init__(
        self, save_freq: int, save_path: Path, when_started: Callable[[BaseCallback], None], verbose: int = 0
    ) -> None:
        super().__init__(save_freq, save_path, verbose=verbose)
        self._when_started = when_started

    def _on_training_start(self) -> None:
        try:
            super()._on_training_start()
        except (CheckpointError, RankFailedError):
            raise
        except Exception as error:
            # Saving calls methods of environments, which may raise anything
            self._warn(error)
        self._when_started(self)

    def on_update_end(self) -> bool:
        """Write a checkpoint if one is due. Where that fails, a warning says so.

        :return: False if a signal asks to stop
        """
        try:
            return super().on_update_end()
        except RankFailedError:
            raise
        except Exception as error:
            # The same; a worker that has died is named here too, and the model is to be saved
            self._warn(error)
            return self.received_signal is None

    def on_learn_end(self) -> None:
        """Wait for the last checkpoint. Where it could not be written, a warning says so."""
        try:
            super().on_learn_end()
        except CheckpointError as error:
            self._warn(error)

    def _warn(self, error: Exception) -> None:
        # It has failed in all processes
        if self._ranks.rank == 0:
            warnings.warn(f"training goes on without a new checkpoint: {error}", stacklevel=3)


class CheckpointedExperiment(ExperimentManager):
    """The RL Zoo's experiment, whose run can be resumed.

    :param args: what the RL Zoo's parser returns, with ``checkpoint_freq`` and ``no_checkpoint``, which are taken out
    :param others: the RL Zoo's other arguments
    :param named: the same by name
    """

    def __init__(self, args: argparse.Namespace, *others: Any, **named: Any) -> None:
        # args.yml is then as the RL Zoo writes it
        self.checkpoint_freq: int = vars(args).pop("checkpoint_freq")
        no_checkpoint: bool = vars(args).pop("no_checkpoint")
        super().__init__(args, *others, **named)
        self.ranks = ranks_of_run()
        self.show_progress = self.show_progress and self.ranks.rank == 0
        self.is_checkpointed = not no_checkpoint and not self.optimize_hyperparameters
        self.checkpoint: RunCheckpoint | None = None

    @property
    def folder(self) -> Path:
        """The run's folder."""
        return Path(self.save_path)

    def read_hyperparameters(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """Read the hyperparameters, with those of trial 0 too, which the RL Zoo takes for no trial."""
        if self.trial_id == 0 and self.storage and self.study_name:
            print("Loading from Optuna study...")
            of_trial = self.load_trial(self.storage, self.study_name, 0)
            self.custom_hyperparams = of_trial | (self.custom_hyperparams or {})
        hyperparams, saved = super().read_hyperparameters()
        self.vectorized = take_key(hyperparams, self.env_name.gym_id)
        add_distributed(hyperparams)
        return hyperparams, OrderedDict(sorted(hyperparams.items())) if "distributed" in hyperparams else saved

    def create_log_folder(self) -> None:
        """Create the run's folder, which the first process chooses for all."""
        if self.ranks.size > 1:
            print(f"Each of {self.ranks.size} processes has {share_of(self.n_envs)[0]} of them")
        if self.ranks.rank == 0:
            super().create_log_folder()  # type: ignore[no-untyped-call]  # it has no annotations
        self.save_path, self.params_path = self.ranks.gather_objects((self.save_path, self.params_path))[0]

    def _create_sampler(self, sampler_method: str) -> optuna.samplers.BaseSampler:
        # With the same seed, a study that goes on would draw its first trials again
        seed = self.seed
        self.seed += self._n_trials_so_far()
        try:
            return super()._create_sampler(sampler_method)
        finally:
            self.seed = seed

    def _n_trials_so_far(self) -> int:
        if self.storage is None or self.study_name is None:
            return 0
        storage: Any = self.storage
        if self.storage.endswith(".log"):
            if not Path(self.storage).exists():
                return 0
            storage = JournalStorage(JournalFileBackend(self.storage))
        try:
            return len(optuna.load_study(study_name=self.study_name, storage=storage).trials)
        except KeyError:
            # The study is not there yet
            return 0

    def create_callbacks(self) -> None:
        """Create the RL Zoo's callbacks, and the checkpoints."""
        if any(isinstance(callback, TrainingCheckpoint) for callback in self.callbacks):
            print("The hyperparameters ask for a TrainingCheckpoint: the zoo writes no other checkpoints")
            self.is_checkpointed = False
        if self.ranks.rank > 0:
            # The first process evaluates for all
            self.eval_freq = -1
        super().create_callbacks()  # type: ignore[no-untyped-call]  # it has no annotations
        if self.is_checkpointed:
            self.checkpoint = RunCheckpoint(
                self.checkpoint_freq, self.folder / CHECKPOINTS, self.note_start, min(self.verbose, 1)
            )
            self.callbacks.append(self.checkpoint)

    def create_envs(self, n_envs: int, eval_env: bool = False, no_log: bool = False) -> VecEnv:
        """Create environments, each in a ResumableEnv; for training in several processes, this one's share of them.

        :param n_envs: their number, in all processes
        :param eval_env: whether they are for evaluations
        :param no_log: write no monitor files
        """
        if not eval_env and self.ranks.size > 1:
            n_envs, first = share_of(n_envs)
            # Seeds and monitor files have the numbers that they have in one process
            make_vec_env = vars(rl_zoo3.exp_manager)["make_vec_env"]
            make = functools.partial(make_vec_env, start_index=first)
            with with_members(rl_zoo3.exp_manager, {"make_vec_env": make}):
                return self._create_envs(n_envs, eval_env, no_log)
        return self._create_envs(n_envs, eval_env, no_log)

    def _create_envs(self, n_envs: int, eval_env: bool, no_log: bool) -> VecEnv:
        wrapper, vec_env_class = self.env_wrapper, self.vec_env_class
        if self.is_checkpointed:
            self.env_wrapper = functools.partial(_resumable, wrapper)
        if self.vectorized and not eval_env:
            # SB3's make_vec_env calls it as it would call a class
            self.vec_env_class: Any = vector_class(self.env_name.gym_id, self.env_kwargs)
        try:
            return super().create_envs(n_envs, eval_env, no_log)
        finally:
            self.env_wrapper, self.vec_env_class = wrapper, vec_env_class

    def _save_config(self, saved_hyperparams: dict[str, Any]) -> None:
        """Save the arguments, in the first process.

        :param saved_hyperparams: the hyperparameters
        """
        if self.ranks.rank == 0:
            super()._save_config(saved_hyperparams)

    def note_start(self, checkpoint: BaseCallback) -> None:
        """Write what ``resume`` needs beside the RL Zoo's files.

        :param checkpoint: the callback, whose training begins
        """
        if self.ranks.rank > 0:
            return
        wandb = sys.modules.get("wandb")
        run = getattr(wandb, "run", None) if vars(self.args).get("track") else None
        description = {
            "format": FORMAT,
            "checkpoint_freq": self.checkpoint_freq,
            "normalizes": unwrap_vec_normalize(checkpoint.training_env) is not None,
            "logs": self.logs_of(checkpoint),
            "wandb": None if run is None else run.id,
        }
        self.write_description(description)

    def logs_of(self, checkpoint: BaseCallback) -> str | None:
        """Return where TensorBoard's logs are, seen from the run's folder; None without TensorBoard.

        :param checkpoint: the callback, whose training begins
        """
        # Without TensorBoard, SB3's logger has a temporary folder
        logs = None if self.tensorboard_log is None else checkpoint.logger.get_dir()
        return None if logs is None else _relative(logs, self.folder)

    def write_description(self, description: dict[str, Any]) -> None:
        """Write resume.json.

        :param description: its contents
        """
        path = Path(self.params_path) / DESCRIPTION
        # A kill leaves the whole file or none
        unfinished = path.with_suffix(".unfinished")
        unfinished.write_text(json.dumps(description, indent=1) + "\n", encoding="utf-8")
        os.replace(unfinished, path)

    def save_trained_model(self, model: BaseAlgorithm) -> None:
        """Save the model and its normaliser, in the first process. After a signal, say how the run goes on.

        :param model: the model
        :raises SystemExit: after SIGTERM, whose sender expects the program to end by it
        """
        save = super().save_trained_model
        # The others end when the files are there
        done_by_all(still_joined(self.ranks), lambda: save(model) if self.ranks.rank == 0 else None, "the end")
        received = None if self.checkpoint is None else self.checkpoint.received_signal
        if received is not None and self.ranks.rank == 0:
            how = how_to_go_on(self.folder, self.args.gym_packages, self.ranks.size)
            print(f"Ended by {received.name} at {model.num_timesteps} timesteps. {how}")
        if received is signal.SIGTERM:
            raise SystemExit(128 + received)


def _resumable(wrapper: EnvWrapper | None, env: gym.Env[Any, Any]) -> gym.Env[Any, Any]:
    return resumable_env_for(env if wrapper is None else wrapper(env))


def _relative(logs: str, folder: Path) -> str:
    try:
        return os.path.relpath(logs, folder)
    except ValueError:
        # Another drive of Windows
        return os.path.abspath(logs)
