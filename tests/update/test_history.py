"""What an update logs of its minibatches."""

import math

import torch as th

from sb3_ppo_plus.update.history import UpdateHistory
from sb3_ppo_plus.update.losses import METRICS


def history_of(grad_norms, **settings):
    metrics = []
    for number, grad_norm in enumerate(grad_norms):
        row = th.full((len(METRICS),), float(number))
        row[METRICS.index("grad_norm")] = grad_norm
        metrics.append(row)
    return UpdateHistory(metrics, epoch_starts=[0], n_epochs_done=1, **settings)


def test_a_gradient_that_overflows_under_float16_is_left_out_of_the_norm_alone():
    logged = history_of([math.inf, 1.0, math.nan, 3.0]).logged()
    assert logged["grad_norm"] == 2.0 and logged["overflowed_steps"] == 2
    assert logged["value_loss"] == 1.5


def test_without_a_finite_gradient_no_norm_is_logged():
    logged = history_of([math.inf, math.inf]).logged()
    assert "grad_norm" not in logged
    assert logged["loss"] == 1.0


def test_the_minibatch_that_target_kl_stopped_has_no_gradient():
    logged = history_of([1.0, 2.0, math.nan], was_stopped=True).logged()
    assert logged["grad_norm"] == 1.5 and logged["early_stopped"] == 1
    assert "overflowed_steps" not in logged


def test_minibatches_are_counted_within_their_epoch():
    # With a memory, a rollout may have more minibatches than n_steps * n_envs / batch_size
    history = UpdateHistory(epoch_starts=[0, 4, 8])
    assert [history.place_of(index) for index in (0, 3, 4, 9)] == [(0, 0), (0, 3), (1, 0), (2, 1)]
