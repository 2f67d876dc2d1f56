"""``python -m sb3_ppo_plus.zoo resume RUN_FOLDER``: goes on with a run of ``train`` that was ended, in its folder."""

from __future__ import annotations

import argparse
import functools
import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import rl_zoo3.exp_manager
import rl_zoo3.train
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.logger import TensorBoardOutputFormat, configure
from stable_baselines3.common.vec_env import VecEnv, VecNormalize
from tensorboard.compat.proto.event_pb2 import Event, SessionLog  # type: ignore[import-untyped]  # it has no types

from sb3_ppo_plus.distributed.agreement import done_by_all
from sb3_ppo_plus.distributed.process_group import is_launched
from sb3_ppo_plus.envs.questions import has_attribute
from sb3_ppo_plus.errors import CheckpointError, UntrustedFileError
from sb3_ppo_plus.ppo_plus import PPOPlus
from sb3_ppo_plus.resuming.resume import load_checkpoint
from sb3_ppo_plus.zoo.enjoy import saving_statistics_twice
from sb3_ppo_plus.zoo.interrupted_run import InterruptedRun, read_run
from sb3_ppo_plus.zoo.parser import ZooParser, argparse_with
from sb3_ppo_plus.zoo.processes import working_together
from sb3_ppo_plus.zoo.registration import register, with_members
from sb3_ppo_plus.zoo.train import CheckpointedExperiment
from sb3_ppo_plus.zoo.vectorized import take_key

# Lines above the rows of a monitor.csv
N_HEADER_LINES = 2


class FinishedRun(Exception):
    """Nothing is left to do."""


class ResumedExperiment(CheckpointedExperiment):
    """The experiment of a run that goes on from its newest checkpoint.

    :param args: arguments of ``train``, as the run's folder has them
    :param others: the RL Zoo's other arguments
    :param run: the run
    :param total: a new number of timesteps of the whole run; None: that of the run
    :param named: the RL Zoo's other arguments by name
    """

    def __init__(
        self, args: argparse.Namespace, *others: Any, run: InterruptedRun, total: int | None, **named: Any
    ) -> None:
        super().__init__(args, *others, **named)
        self.run = run
        self.total = total
        self.save_path = str(run.folder)
        self.params_path = f"{self.save_path}/{self.env_name}"
        # The RL Zoo then asks _load_pretrained_agent for the model
        self.continue_training = True

    def read_hyperparameters(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """Return the run's hyperparameters, in place of what the hyperparameter file holds today."""
        hyperparams = dict(self.run.hyperparams)
        self.vectorized = take_key(hyperparams, self.env_name.gym_id)
        return hyperparams, dict(self.run.hyperparams)

    def create_envs(self, n_envs: int, eval_env: bool = False, no_log: bool = False) -> VecEnv:
        """Create environments, whose monitor files go on.

        :param n_envs: their number
        :param eval_env: whether they are for evaluations
        :param no_log: write no monitor files
        """
        # The RL Zoo chooses the monitors' arguments itself for some environments
        with with_members(rl_zoo3.exp_manager, {"make_vec_env": _make_envs_that_append}):
            return super().create_envs(n_envs, eval_env, no_log)

    def _maybe_normalize(self, env: VecEnv, eval_env: bool) -> VecEnv:
        """Wrap environments in a new VecNormalize where the run has one: the checkpoint holds its state."""
        if not self.run.description["normalizes"]:
            return env
        kwargs = {**self.normalize_kwargs, **({"norm_reward": False, "training": False} if eval_env else {})}
        return VecNormalize(env, **kwargs)

    def _load_pretrained_agent(self, hyperparams: dict[str, Any], env: VecEnv) -> PPOPlus:
        """Load the newest checkpoint.

        :raises CheckpointError: if there is no valid one
        :raises FinishedRun: if nothing is left to do
        """
        model = load_checkpoint(
            PPOPlus,
            self.run.checkpoints,
            env,
            self.device,
            trusted=self.run.trusted,
            trusts_state=True,
            # Without trust, a model's own one is not taken
            tensorboard_log=self.tensorboard_log,
            distributed=self._distributed(),
        )
        if self.total is not None and self.total <= model.num_timesteps:
            raise CheckpointError(
                f"--n-timesteps must be above the {model.num_timesteps} timesteps that are done, got {self.total}"
            )
        model._total_timesteps = self.total or model._total_timesteps
        if model.num_timesteps >= model._total_timesteps:
            self._finish(model)
        return model

    def _distributed(self) -> bool | str:
        """Return how the model goes on: the run may have had another number of processes."""
        before: bool | str = self.run.hyperparams.get("distributed", False)
        return (before or self.ranks.size > 1) if is_launched() else False

    def _finish(self, model: PPOPlus) -> None:
        """Save the final model, and end. The file that is there may be older: a kill may have come before the save."""
        if self.ranks.rank == 0:
            path = self.folder / f"{self.env_name}.zip"
            unfinished = path.with_name(f"{self.env_name}.unfinished.zip")
            model.save(unfinished)
            os.replace(unfinished, path)
            normalizer = model.get_vec_normalize_env()
            if normalizer is not None:
                normalizer.save(os.path.join(self.params_path, "vecnormalize.pkl"))
        if model.env is not None:
            model.env.close()
        raise FinishedRun(
            f"{self.save_path} is finished, with {model.num_timesteps} of {model._total_timesteps} timesteps: "
            "--n-timesteps N goes on to a new total of N"
        )

    def _save_config(self, saved_hyperparams: dict[str, Any]) -> None:
        """Keep the files that the run has written at its beginning."""
        print(f"Log path: {self.save_path}")

    def learn(self, model: BaseAlgorithm) -> None:
        """Finish the run's ``learn``, with its logs.

        :param model: the model
        """
        assert isinstance(model, PPOPlus)
        self._go_on_logging(model)
        if self.ranks.rank > 0:
            # The first process alone has evaluations
            warnings.filterwarnings("ignore", "the checkpoint holds the state of callbacks that were not given")
        try:
            model.continue_learning(self.callbacks)
        except KeyboardInterrupt:
            # As in the RL Zoo, the model is then saved
            pass
        finally:
            # The RL Zoo's way to close the progress bar
            self.callbacks[0].on_training_end()
            if model.env is not None:
                model.env.close()

    def _go_on_logging(self, model: PPOPlus) -> None:
        logs = self.run.description["logs"]
        if logs is None or self.ranks.rank > 0:
            return
        folder = self.folder / logs
        if not folder.is_dir():
            warnings.warn(
                f"{folder}, the folder of the run's TensorBoard logs, is gone: a new one is made", stacklevel=2
            )
            return
        model.set_logger(configure(os.path.normpath(folder), ["stdout"] * (self.verbose > 0) + ["tensorboard"]))
        for output in model.logger.output_formats:
            if isinstance(output, TensorBoardOutputFormat):
                # TensorBoard leaves out what a killed run has logged after its checkpoint, and logs again
                start = SessionLog(status=SessionLog.START)
                file = output.writer.file_writer
                assert file is not None
                file.add_event(Event(step=model.num_timesteps + 1, session_log=start))

    def note_start(self, checkpoint: BaseCallback) -> None:
        """Cut what was written after the checkpoint, now that no other run can write there, and note new logs.

        :param checkpoint: the callback, whose training begins
        """
        env = checkpoint.training_env
        # An environment with vector code of its own has no monitors
        of_monitors = env.get_attr("episode_returns") if has_attribute(env, "episode_returns") else []
        for index, returns in enumerate(of_monitors, env.num_envs * self.ranks.rank):
            cut_monitor_file(self.folder / f"{index}.monitor.csv", len(returns))
        logs = self.run.description["logs"]
        if logs is not None and self.ranks.rank == 0 and not (self.folder / logs).is_dir():
            self.write_description({**self.run.description, "logs": self.logs_of(checkpoint)})


def _make_envs_that_append(*args: Any, **kwargs: Any) -> VecEnv:
    kwargs["monitor_kwargs"] = {**(kwargs.get("monitor_kwargs") or {}), "override_existing": False}
    return make_vec_env(*args, **kwargs)


def cut_monitor_file(path: Path, n_episodes: int) -> None:
    """Remove the last rows of a monitor file. They will be written again.

    :param path: the file
    :param n_episodes: number of rows to keep
    """
    with path.open("rb+") as file:
        lines = file.readlines()
        # A kill may have left a part of a row
        n_rows = sum(line.endswith(b"\n") for line in lines[N_HEADER_LINES:])
        if n_rows < n_episodes:
            warnings.warn(f"{path} has lost {n_episodes - n_rows} of its {n_episodes} rows", stacklevel=2)
        file.truncate(sum(map(len, lines[: N_HEADER_LINES + min(n_rows, n_episodes)])))


def main(arguments: Sequence[str]) -> None:
    """Go on with a run.

    :param arguments: the flags after the command
    :raises SystemExit: if the run cannot go on, or the flags are wrong
    """
    given = _parser().parse_args(arguments)
    register()
    try:
        with working_together() as ranks:
            runs: list[InterruptedRun] = []
            arguments_of_run = (Path(given.folder), given.trust, given.gym_packages)
            done_by_all(ranks, lambda: runs.append(read_run(*arguments_of_run, is_first=ranks.rank == 0)), "the run")
            with _tracking_on(runs[0]):
                _run(runs[0], given)
    except UntrustedFileError as error:
        raise SystemExit(f"{error}\nWith --trust, resume runs whatever code the folder holds.") from error
    except CheckpointError as error:
        raise SystemExit(str(error)) from error


def _parser() -> ZooParser:
    parser = ZooParser(
        prog="python -m sb3_ppo_plus.zoo resume",
        description="Go on with a run of train that was ended, from its newest checkpoint and in its folder. The "
        "result has the bits of a run without interruption.",
    )
    parser.add_argument("folder", metavar="RUN_FOLDER", help="the run's folder, such as logs/ppo_plus/CartPole-v1_1")
    parser.add_argument(
        "-n",
        "--n-timesteps",
        type=int,
        help="a new total of timesteps, those that are done included (default: the run's). Schedules follow it",
    )
    parser.add_argument("--device", help="PyTorch's device (default: that of the run)")
    parser.add_argument("-P", "--progress", action="store_true", help="display a progress bar")
    parser.add_argument(
        "--gym-packages", nargs="+", metavar="PACKAGE", help="packages of environments to import (default: the run's)"
    )
    parser.add_argument("--trust", action="store_true", help="run whatever code the folder holds or names")
    return parser


def _run(run: InterruptedRun, given: argparse.Namespace) -> None:
    """Have the RL Zoo's ``train`` do it, with the arguments of the run."""
    arguments = {**run.arguments, "checkpoint_freq": run.description["checkpoint_freq"], "no_checkpoint": False}
    arguments["progress"] = given.progress or arguments["progress"]
    arguments["device"] = given.device or arguments["device"]

    class RunsArguments(argparse.ArgumentParser):
        """Returns the arguments of the run."""

        def parse_args(self, *_: Any) -> argparse.Namespace:  # type: ignore[override]  # the RL Zoo gives none
            return argparse.Namespace(**{**vars(super().parse_args([])), **arguments})

    replaced = {
        "argparse": argparse_with(RunsArguments),
        "ExperimentManager": functools.partial(ResumedExperiment, run=run, total=given.n_timesteps),
    }
    with with_members(rl_zoo3.train, replaced), saving_statistics_twice():
        try:
            rl_zoo3.train.train()
        except FinishedRun as finished:
            print(finished)


@contextmanager
def _tracking_on(run: InterruptedRun) -> Iterator[None]:
    """Have Weights & Biases go on with the run's own record."""
    if run.description["wandb"] is None:
        yield
        return
    names = {"WANDB_RUN_ID": run.description["wandb"], "WANDB_RESUME": "allow"}
    added = [name for name in names if name not in os.environ]
    os.environ.update({name: names[name] for name in added})
    try:
        yield
    finally:
        for name in added:
            del os.environ[name]
