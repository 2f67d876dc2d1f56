"""The passes of an update over the rollout, and the log of them."""

from __future__ import annotations

from collections.abc import Iterator

import torch as th
from stable_baselines3.common.buffers import RolloutBuffer
from stable_baselines3.common.utils import explained_variance

from sb3_ppo_plus.attributes import PlusModel
from sb3_ppo_plus.buffers import minibatches
from sb3_ppo_plus.update.argument_validation import without_argument_validation
from sb3_ppo_plus.update.gradient_step import GradientStep, Objective
from sb3_ppo_plus.update.history import UpdateHistory
from sb3_ppo_plus.update.losses import METRICS, LossCoefficients


def run_epochs(
    gradient_step: GradientStep,
    objective: Objective,
    rollout_buffer: RolloutBuffer,
    n_epochs: int,
    batch_size: int,
    history: UpdateHistory,
) -> Iterator[None]:
    """Take a step on every minibatch of the rollout, ``n_epochs`` times, each time in another random order.

    The update stops at the first minibatch on which the limit of approx_kl forbids a step.

    :param gradient_step: takes the steps
    :param objective: the objective of the update
    :param rollout_buffer: the full buffer
    :param n_epochs: number of passes
    :param batch_size: transitions per minibatch
    :param history: takes the metrics of all minibatches
    :return: yields None after each epoch
    """
    try:
        gradient_step.begin_update()
        with without_argument_validation():
            while history.n_epochs_done < n_epochs and not history.was_stopped:
                _run_epoch(gradient_step, objective, rollout_buffer, batch_size, history)
                yield
    finally:
        gradient_step.end_update()


def _run_epoch(
    gradient_step: GradientStep,
    objective: Objective,
    rollout_buffer: RolloutBuffer,
    batch_size: int,
    history: UpdateHistory,
) -> None:
    history.begin_epoch()
    for minibatch in minibatches(rollout_buffer, batch_size):
        metrics, was_allowed = gradient_step(objective, minibatch)
        history.metrics.append(metrics)
        if not was_allowed:
            history.was_stopped = True
            return
    history.n_epochs_done += 1


def log_update(model: PlusModel, history: UpdateHistory, coefficients: LossCoefficients) -> None:
    """Log what SB3's ``PPO.train`` logs of an update, and the values of the coefficients; print an early stop.

    :param model: the model after the update
    :param history: the history of the update
    :param coefficients: the coefficients' values in the update
    """
    logger, rollout_buffer = model.logger, model.rollout_buffer
    if history.was_stopped and model.verbose >= 1:
        approx_kl = history.metrics[-1][METRICS.index("approx_kl")]
        print(f"Early stopping at step {history.n_epochs_done} due to reaching max kl: {approx_kl:.2f}")
    for name, value in history.logged().items():
        logger.record(f"train/{name}", value)
    values, returns = rollout_buffer.values.flatten(), rollout_buffer.returns.flatten()
    logger.record("train/explained_variance", explained_variance(values, returns))
    log_std = getattr(model.policy, "log_std", None)
    if log_std is not None:
        logger.record("train/std", th.exp(log_std).mean().item())
    logger.record("train/n_updates", model._n_updates, exclude="tensorboard")
    for name, value in coefficients._asdict().items():
        if value is not None:
            logger.record(f"train/{name}", value)
