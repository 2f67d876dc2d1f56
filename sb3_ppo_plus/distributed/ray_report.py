"""The callback that tells Ray Train how training goes, and which checkpoint is the newest."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
import torch as th
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.logger import KVWriter
from stable_baselines3.common.utils import safe_mean

from sb3_ppo_plus.attributes import PlusModel
from sb3_ppo_plus.distributed.ranks import Ranks


class RayTrainReport(BaseCallback):
    """Reports metrics and checkpoints to Ray Train, in the training function of a ``TorchTrainer``.

    Each checkpoint that a :class:`TrainingCheckpoint` of the same ``learn`` has written is reported at the end of its
    update, as soon as it is on the disk. Ray copies it into its ``storage_path``; ``ray.train.get_checkpoint()`` finds
    it there on any host, and ``PPOPlus.resume`` reads it. A run that goes on from a checkpoint of which Ray has not
    heard reports that one first. All processes report equally often, as Ray demands; metrics and checkpoint are those
    of the first one.

    Metrics are what the model logs, with the logger's names, and ``time/total_timesteps``.

    Ray takes one report in two seconds. Training waits for it, so keep ``save_freq`` and ``seconds`` above that.

    :param seconds: smallest time between two reports without a new checkpoint; 0: report after each update
    :param verbose: 1: print a line for each checkpoint that is reported
    :raises ImportError: if Ray Train is not installed
    :raises TypeError: for ``seconds`` that are no number
    :raises ValueError: for negative ``seconds``; when training starts, outside a training function of Ray Train
    """

    # After the checkpoints, which come last in all other respects
    comes_last = 2
    acts_together = True

    def __init__(self, seconds: float = 10.0, verbose: int = 0) -> None:
        super().__init__(verbose)
        if isinstance(seconds, bool) or not isinstance(seconds, int | float):
            raise TypeError(f"seconds must be a number, got {seconds!r}")
        if not seconds >= 0:
            raise ValueError(f"seconds must be at least 0, got {seconds}")
        _ray_train()
        self.seconds = seconds
        self._logged = _Logged()
        self._reported: str | None = None
        self._reported_at = 0.0
        self._begins = False

    def _init_callback(self) -> None:
        if not hasattr(self.model, "TRAINING_STATE"):
            raise TypeError(f"RayTrainReport needs a PPOPlus, got a {type(self.model).__name__}")
        try:
            _ray_train().get_context()
        except RuntimeError as error:
            raise ValueError(
                "RayTrainReport must be used in the training function of a ray.train.torch.TorchTrainer, which has not "
                f"started this process: {error}"
            ) from error

    def _on_training_start(self) -> None:
        known = _ray_train().get_checkpoint()
        if self._reported is None and known is not None:
            self._reported = known.path
        self._reported_at = time.monotonic()
        self._begins = True
        self._logged.values.clear()
        self.logger.output_formats.append(self._logged)

    def _on_rollout_start(self) -> None:
        if self._begins:
            # A worker may have died between the writing of a checkpoint and its report
            self._begins = False
            self._report_if_due(of_itself=False)

    def _on_step(self) -> bool:
        return True

    def on_update_end(self) -> bool:
        """Report to Ray, if a checkpoint was written or ``seconds`` have passed.

        :return: True
        """
        self._report_if_due(of_itself=True)
        return True

    def _on_training_end(self) -> None:
        self._report_if_due(of_itself=False)

    def _report_if_due(self, *, of_itself: bool) -> None:
        """Report a new checkpoint.

        :param of_itself: report without one too, if it is time
        """
        ranks: Ranks = self._ppo_plus._parts.ranks
        newest = None
        if ranks.rank == 0:
            # While Ray copies it, nothing may remove it: the next one is not being written yet
            self._ppo_plus._current_run.wait_for_checkpoints()
            newest = self._ppo_plus.last_checkpoint
        is_new = newest is not None and newest != self._reported and Path(newest).is_dir()
        is_time = of_itself and time.monotonic() - self._reported_at >= self.seconds
        # The clock of the first process decides for all
        if ranks.any(ranks.rank == 0 and (is_new or is_time)):
            self._report(newest if is_new else None)

    def _report(self, directory: str | None) -> None:
        train = _ray_train()
        checkpoint = None if directory is None else train.Checkpoint.from_directory(directory)
        train.report(self._metrics(), checkpoint=checkpoint)
        self._reported_at = time.monotonic()
        if directory is not None:
            self._reported = directory
            if self.verbose >= 1:
                print(f"Reported {directory}")

    def _metrics(self) -> dict[str, Any]:
        """Return what was logged last under each name, also since the last dump of the logger."""
        model = self._ppo_plus
        logged = {**self._logged.values, **self.logger.name_to_value, "time/total_timesteps": model.num_timesteps}
        if model.ep_info_buffer:
            for name, key in (("rollout/ep_rew_mean", "r"), ("rollout/ep_len_mean", "l")):
                logged[name] = safe_mean([info[key] for info in model.ep_info_buffer])
        metrics = {name: _plain(value) for name, value in logged.items()}
        return {name: value for name, value in metrics.items() if value is not None}

    def on_learn_end(self) -> None:
        """Listen to the logger no longer. PPOPlus calls this after exceptions too."""
        formats = self.logger.output_formats
        formats[:] = [each for each in formats if each is not self._logged]

    @property
    def _ppo_plus(self) -> PlusModel:
        # Checked in _init_callback
        model: Any = self.model
        reporting: PlusModel = model
        return reporting


class _Logged(KVWriter):
    """Keeps what the logger writes."""

    def __init__(self) -> None:
        self.values: dict[str, Any] = {}

    def write(self, key_values: dict[str, Any], key_excluded: dict[str, tuple[str, ...]], step: int = 0) -> None:
        self.values.update(key_values)

    def close(self) -> None:
        pass


def _plain(value: Any) -> Any:  # noqa: ANN401  # whatever is logged
    """Return a number or a text as a plain value, and None for figures, videos and the like."""
    if isinstance(value, np.generic) or (isinstance(value, th.Tensor | np.ndarray) and value.ndim == 0):
        value = value.item()
    return value if isinstance(value, bool | int | float | str) else None


def _ray_train() -> Any:  # noqa: ANN401  # the module, which may not be installed
    try:
        import ray.train as train
    except ImportError as error:
        raise ImportError(
            f"RayTrainReport cannot import ray.train ({error}): it comes with the extra [ray] of sb3-ppo-plus, or by "
            '`pip install "ray[train]>=2.51,<3"`'
        ) from error
    return train
