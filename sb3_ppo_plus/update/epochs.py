"""The passes of an update over the rollout, and the log of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TypeAlias

import numpy as np
import torch as th
from stable_baselines3.common.buffers import RolloutBuffer
from stable_baselines3.common.utils import explained_variance

from sb3_ppo_plus.attributes import PlusModel
from sb3_ppo_plus.buffers import PPOPlusRolloutBuffer, minibatches
from sb3_ppo_plus.distributed.parts import Parts
from sb3_ppo_plus.update.argument_validation import without_argument_validation
from sb3_ppo_plus.update.coefficients import OPTIONAL_TERMS, terms_in_use
from sb3_ppo_plus.update.gradient_step import AnyMinibatch, GradientStep, Objective
from sb3_ppo_plus.update.history import UpdateHistory
from sb3_ppo_plus.update.losses import METRICS, LossCoefficients
from sb3_ppo_plus.update.parted_rollout import Moments, PartedRollout, moments_of_all
from sb3_ppo_plus.update.smoothness import add_following, check_smoothness
from sb3_ppo_plus.update.symmetry import add_mirrored, check_symmetry

MakeMinibatches: TypeAlias = Callable[[], Iterator[AnyMinibatch]]


def check_extras(model: PlusModel) -> None:
    """Check before the first step that a model can have what it asks for beside PPO's objective.

    :param model: the model, whose environments were reset
    :raises ValueError: see :func:`check_symmetry` and :func:`check_smoothness`
    :raises TypeError: see :func:`check_symmetry`
    """
    check_symmetry(model)
    check_smoothness(model)


def minibatches_of(model: PlusModel, parts: Parts) -> MakeMinibatches:
    """Return what cuts the rollout of a model into minibatches.

    :param model: the model, with a full rollout buffer
    :param parts: the parts of the minibatches
    :raises ValueError: if there are parts, and the rollout buffer is not one of ours
    """
    add_mirrored(model)
    add_following(model)
    buffer, batch_size = model.rollout_buffer, model.batch_size
    if parts.is_whole:
        return lambda: minibatches(buffer, batch_size)
    assert isinstance(buffer, PPOPlusRolloutBuffer)
    normalizes = model.normalize_advantage
    return PartedRollout(buffer, batch_size, parts, model._n_updates, normalize_advantage=normalizes).minibatches


def run_epochs(
    gradient_step: GradientStep,
    objective: Objective,
    make_minibatches: MakeMinibatches,
    n_epochs: int,
    history: UpdateHistory,
) -> Iterator[None]:
    """Take a step on every minibatch of the rollout, ``n_epochs`` times, each time in another random order.

    The update stops at the first minibatch on which the limit of approx_kl forbids a step.

    :param gradient_step: takes the steps
    :param objective: the objective of the update
    :param make_minibatches: cuts the rollout into minibatches, in another random order at each call
    :param n_epochs: number of passes
    :param history: takes the metrics of all minibatches
    :return: yields None after each epoch
    """
    try:
        gradient_step.begin_update()
        with without_argument_validation():
            while history.n_epochs_done < n_epochs and not history.was_stopped:
                _run_epoch(gradient_step, objective, make_minibatches, history)
                yield
    finally:
        gradient_step.end_update()


def _run_epoch(
    gradient_step: GradientStep, objective: Objective, make_minibatches: MakeMinibatches, history: UpdateHistory
) -> None:
    history.begin_epoch()
    for minibatch in make_minibatches():
        metrics, was_allowed = gradient_step(objective, minibatch)
        history.metrics.append(metrics)
        if not was_allowed:
            history.was_stopped = True
            return
    history.n_epochs_done += 1


def _explained_variance(buffer: RolloutBuffer, parts: Parts) -> float:
    """Return SB3's ``explained_variance`` of the value predictions, over all processes."""
    if parts.is_whole:
        values, returns = buffer.values.flatten(), buffer.returns.flatten()
        valid = getattr(buffer, "valid", None)
        if valid is not None:
            values, returns = values[valid.flatten()], returns[valid.flatten()]
        return explained_variance(values, returns)
    assert isinstance(buffer, PPOPlusRolloutBuffer)
    of_parts = [buffer.indices_of_part(part, parts.n_here) for part in range(parts.n_here)]
    moments = []
    for indices in of_parts:
        real = indices[indices >= 0]
        arrays = (buffer.returns, buffer.returns - buffer.values)
        values = np.concatenate([array.reshape(-1)[real].astype(np.float64) for array in arrays])
        moments.append(Moments.of_groups(values, np.repeat([0, 1], len(real)), 2))
    whole = moments_of_all(moments, parts)
    of_returns, of_errors = (whole.squares / whole.number).tolist()
    return np.nan if of_returns == 0 else 1 - of_errors / of_returns


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
    for name, value in history.logged(terms_in_use(model)).items():
        logger.record(f"train/{name}", value)
    logger.record("train/explained_variance", _explained_variance(rollout_buffer, model._parts))
    log_std = getattr(model.policy, "log_std", None)
    if log_std is not None:
        logger.record("train/std", th.exp(log_std).mean().item())
    logger.record("train/n_updates", model._n_updates, exclude="tensorboard")
    for name, value in coefficients._asdict().items():
        if value is not None:
            # The terms themselves are logged by the names of their weights
            logger.record(f"train/{name}_coef" if name in OPTIONAL_TERMS else f"train/{name}", value)
