"""The PPO objective as pure functions of tensors.

Every function takes ``valid``, a boolean tensor that is True for the real elements of a padded minibatch (``None``: all
are real). Padding changes no mean, standard deviation, loss or metric.
"""

from __future__ import annotations

from typing import NamedTuple

import torch as th
from torch.nn import functional as F

from sb3_ppo_plus.rollout_batch import RolloutBatch


class LossCoefficients(NamedTuple):
    """Values that the coefficients' schedules have in this update.

    :param clip_range: epsilon of the clipped surrogate, > 0
    :param clip_range_vf: clipping range of the value prediction, in units of the return; None: no clipping
    :param ent_coef: weight of the entropy bonus, >= 0
    :param vf_coef: weight of the value loss, >= 0
    :param caps_temporal: weight of a term of :class:`sb3_ppo_plus.update.smoothness.Smoothness`, >= 0; None: no term
    :param caps_spatial: weight of its other term, >= 0; None: no term
    """

    clip_range: float | th.Tensor
    clip_range_vf: float | th.Tensor | None
    ent_coef: float | th.Tensor
    vf_coef: float | th.Tensor
    caps_temporal: float | th.Tensor | None = None
    caps_spatial: float | th.Tensor | None = None


class LossTerms(NamedTuple):
    """The loss of one minibatch and its logged metrics: 0-dim tensors. Only ``loss`` carries a gradient.

    ``caps_temporal`` and ``caps_spatial`` are 0 without :class:`sb3_ppo_plus.update.smoothness.Smoothness`.
    """

    loss: th.Tensor
    policy_loss: th.Tensor
    value_loss: th.Tensor
    entropy_loss: th.Tensor
    approx_kl: th.Tensor
    clip_fraction: th.Tensor
    value_clip_fraction: th.Tensor
    caps_temporal: th.Tensor
    caps_spatial: th.Tensor


def _clamp(x: th.Tensor, low: float | th.Tensor, high: float | th.Tensor) -> th.Tensor:
    return th.clamp(x, low, high)  # type: ignore[arg-type]  # torch declares two numbers or two tensors


def masked_mean(x: th.Tensor, valid: th.Tensor | None, weights: th.Tensor | None = None) -> th.Tensor:
    """Return the mean over the valid elements; 0 if there is none.

    :param x: any shape
    :param valid: True for real elements, in the shape of ``x``; None: all are real
    :param weights: weights of the elements, in the shape of ``x``: their weighted sum is returned; None: the mean is
    """
    if weights is not None:
        return ((x if valid is None else th.where(valid, x, 0.0)) * weights).sum()
    if valid is None:
        return x.mean()
    return th.where(valid, x, 0.0).sum() / valid.sum().clamp(min=1)


def normalize_advantages(advantages: th.Tensor, valid: th.Tensor | None = None) -> th.Tensor:
    """Shift and scale to mean 0 and (unbiased) standard deviation 1, as SB3's ``PPO.train`` does.

    A minibatch of one element has no standard deviation, so it is returned unchanged.

    :param advantages: shape (batch,)
    :param valid: True for real elements, shape (batch,); None: all are real
    """
    if len(advantages) <= 1:
        return advantages
    if valid is None:
        return (advantages - advantages.mean()) / (advantages.std() + 1e-8)
    n_valid = valid.sum()
    centered = advantages - masked_mean(advantages, valid)
    variance = th.where(valid, centered**2, 0.0).sum() / (n_valid - 1).clamp(min=1)
    return th.where(n_valid > 1, centered / (variance.sqrt() + 1e-8), advantages)


def clipped_surrogate(
    advantages: th.Tensor,
    ratio: th.Tensor,
    clip_range: float | th.Tensor,
    valid: th.Tensor | None = None,
    weights: th.Tensor | None = None,
) -> th.Tensor:
    """Return the negative of the clipped surrogate objective (Schulman et al. 2017, eq. 7).

    :param advantages: shape (batch,)
    :param ratio: the action's probability under the current policy, divided by that in the rollout, shape (batch,)
    :param clip_range: epsilon
    :param valid: True for real elements, shape (batch,); None: all are real
    :param weights: see :func:`masked_mean`
    """
    unclipped = advantages * ratio
    clipped = advantages * _clamp(ratio, 1 - clip_range, 1 + clip_range)
    return -masked_mean(th.min(unclipped, clipped), valid, weights)


def value_loss(
    values: th.Tensor,
    old_values: th.Tensor,
    returns: th.Tensor,
    clip_range_vf: float | th.Tensor | None,
    *,
    pessimistic: bool,
    valid: th.Tensor | None = None,
    weights: th.Tensor | None = None,
) -> th.Tensor:
    """Return the mean squared error of the value prediction; its change from ``old_values`` may be clipped.

    SB3's form uses the clipped error only. So a prediction that has left the clipping range gets no gradient, even if
    it went in the wrong direction. The pessimistic form takes, for each sample, the larger of the clipped and the
    unclipped squared error, as OpenAI's baselines do.

    :param values: predictions, shape (batch,)
    :param old_values: predictions at the time of the rollout, shape (batch,)
    :param returns: targets, shape (batch,)
    :param clip_range_vf: largest change that counts; None: no clipping
    :param pessimistic: True: the larger of both errors; False: SB3's clipped error
    :param valid: True for real elements, shape (batch,); None: all are real
    :param weights: see :func:`masked_mean`
    """
    if valid is not None:
        # Padding may hold inf or NaN. Squared, these would make the gradient NaN
        values, old_values, returns = (th.where(valid, x, 0.0) for x in (values, old_values, returns))
    if clip_range_vf is None:
        return _mean_squared_error(returns, values, valid, weights)
    clipped_values = old_values + _clamp(values - old_values, -clip_range_vf, clip_range_vf)
    if pessimistic:
        return masked_mean(th.max((returns - values) ** 2, (returns - clipped_values) ** 2), valid, weights)
    return _mean_squared_error(returns, clipped_values, valid, weights)


def _mean_squared_error(
    targets: th.Tensor, predictions: th.Tensor, valid: th.Tensor | None, weights: th.Tensor | None
) -> th.Tensor:
    if valid is None and weights is None:
        # mse_loss, as in SB3, because its backward rounds differently from that of a mean of squares
        return F.mse_loss(targets, predictions)
    return masked_mean((targets - predictions) ** 2, valid, weights)


def entropy_loss(
    entropy: th.Tensor | None,
    log_prob: th.Tensor,
    valid: th.Tensor | None = None,
    weights: th.Tensor | None = None,
) -> th.Tensor:
    """Return the negative mean entropy.

    Some distributions have no entropy in closed form (gSDE with squash_output). It is then estimated from log_prob, as
    in SB3.

    :param entropy: entropy of each sample's action distribution, shape (batch,), or None
    :param log_prob: log probability of the stored actions, shape (batch,)
    :param valid: True for real elements, shape (batch,); None: all are real
    :param weights: see :func:`masked_mean`
    """
    return -masked_mean(-log_prob if entropy is None else entropy, valid, weights)


def approximate_kl(log_ratio: th.Tensor, valid: th.Tensor | None = None, weights: th.Tensor | None = None) -> th.Tensor:
    """Return an estimate of KL(old || new) that is never negative (http://joschu.net/blog/kl-approx.html, k3).

    :param log_ratio: log of the probability ratio new / old of each action, shape (batch,)
    :param valid: True for real elements, shape (batch,); None: all are real
    :param weights: see :func:`masked_mean`
    """
    return masked_mean((th.exp(log_ratio) - 1) - log_ratio, valid, weights)


def ppo_loss(
    batch: RolloutBatch,
    values: th.Tensor,
    log_prob: th.Tensor,
    entropy: th.Tensor | None,
    coefficients: LossCoefficients,
    *,
    normalize_advantage: bool,
    pessimistic_value_clip: bool,
) -> LossTerms:
    """Compute PPO's loss of one minibatch and its metrics, from the present policy's evaluation of it.

    :param batch: the minibatch
    :param values: value predictions, shape (batch,)
    :param log_prob: log probability of ``batch.actions``, shape (batch,)
    :param entropy: entropy of the action distributions, shape (batch,), or None if there is no closed form
    :param coefficients: values of the coefficients
    :param normalize_advantage: normalise the advantages over the minibatch
    :param pessimistic_value_clip: see :func:`value_loss`
    """
    valid, weights = batch.valid, batch.weights
    clip_range, clip_range_vf, ent_coef, vf_coef = coefficients[:4]
    advantages = normalize_advantages(batch.advantages, valid) if normalize_advantage else batch.advantages
    log_ratio = log_prob - batch.old_log_prob
    if valid is not None:
        # exp of a padded element's log-ratio may overflow, and 0 * inf would make the gradient NaN
        log_ratio = th.where(valid, log_ratio, 0.0)
    ratio = th.exp(log_ratio)

    policy_term = clipped_surrogate(advantages, ratio, clip_range, valid, weights)
    value_term = value_loss(
        values,
        batch.old_values,
        batch.returns,
        clip_range_vf,
        pessimistic=pessimistic_value_clip,
        valid=valid,
        weights=weights,
    )
    entropy_term = entropy_loss(entropy, log_prob, valid, weights)
    if isinstance(ent_coef, float) and ent_coef == 0.0:
        # Its gradient would be 0, but would take time
        entropy_term = entropy_term.detach()
    loss = policy_term + ent_coef * entropy_term + vf_coef * value_term

    with th.no_grad():
        approx_kl = approximate_kl(log_ratio, valid, weights)
        clip_fraction = masked_mean((th.abs(ratio - 1) > clip_range).float(), valid, weights)
        value_clip_fraction = nothing = th.zeros_like(clip_fraction)
        if clip_range_vf is not None:
            is_clipped = th.abs(values - batch.old_values) > clip_range_vf
            value_clip_fraction = masked_mean(is_clipped.float(), valid, weights)
    terms = policy_term.detach(), value_term.detach(), entropy_term.detach()
    return LossTerms(loss, *terms, approx_kl, clip_fraction, value_clip_fraction, nothing, nothing)


# Names of a minibatch's metrics, in the order of the tensor that holds them
METRICS = (*LossTerms._fields, "grad_norm")
