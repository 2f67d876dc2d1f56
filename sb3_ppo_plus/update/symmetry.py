"""A symmetry of the task: mirrored transitions as further data, or a term of the loss that wants a symmetric policy.

Both are from Mittal et al. 2024, "Symmetry Considerations for Learning Task Symmetric Robot Policies".
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, TypeAlias

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.utils import obs_as_tensor

from sb3_ppo_plus.attributes import PlusModel
from sb3_ppo_plus.buffers import PPOPlusRolloutBuffer, obstacle_of_buffer
from sb3_ppo_plus.envs.originals import OriginalObservations, replaces_arithmetic
from sb3_ppo_plus.envs.questions import innermost_normalizer, unknown_wrapper
from sb3_ppo_plus.rollout_batch import RolloutBatch
from sb3_ppo_plus.trees import tree_map
from sb3_ppo_plus.update.losses import LossTerms, masked_mean

Symmetry: TypeAlias = Callable[[Any, th.Tensor], tuple[Any, th.Tensor]]
"""Mirrors observations, a tensor or a dict of them, and actions: all of shape (batch, ...), in the env's units."""

# How much a mirror image of a mirror image may differ, as a share of the largest number (or of 1)
TOLERANCE = 1e-5
_SPACES = (spaces.Box, spaces.Discrete, spaces.MultiDiscrete, spaces.MultiBinary)


def check_symmetry(model: PlusModel) -> None:
    """Check a model's symmetry before the first step, on the first observations and on actions of its space.

    :param model: the model, whose environments were reset
    :raises ValueError: for a model that cannot use a symmetry, or a function that is none of its spaces: the mirror
        image of a mirror image must be the original
    :raises TypeError: for a function that does not return two values
    """
    if model.symmetry is None:
        return
    obstacle = _obstacle(model)
    if obstacle is not None:
        raise ValueError(f"symmetry {obstacle}")
    observations: Any = obs_as_tensor(model._last_obs, model.device)
    originals = _follow_originals(model)
    if originals is not None:
        observations = _as_tensors(model._last_original_obs, observations)
    space = copy.deepcopy(model.action_space)
    # Not the policy's actions, because its random numbers belong to the run
    space.seed(0)
    samples = np.stack([space.sample() for _ in range(model.n_envs)])
    actions = th.as_tensor(samples, device=model.device)
    actions = actions if isinstance(space, spaces.Discrete) else actions.float().flatten(1)
    mirrored = mirror_images(model.symmetry, observations, actions)
    _check_involution(model.symmetry, (observations, actions), mirrored)
    in_space = mirrored[1].cpu().numpy().reshape(samples.shape)
    if isinstance(space, spaces.Box):
        is_inside = bool(((in_space >= space.low - TOLERANCE) & (in_space <= space.high + TOLERANCE)).all())
    else:
        is_inside = all(space.contains(action) for action in in_space.astype(samples.dtype))
    if not is_inside:
        raise ValueError(
            f"symmetry must keep actions inside {space}, but makes {in_space.tolist()} of {samples.tolist()}"
        )


def _obstacle(model: PlusModel) -> str | None:
    """Return why a model cannot use a symmetry; None: it can."""
    policy: Any = model.policy
    if not isinstance(model.action_space, _SPACES):
        return f"needs Box, Discrete, MultiDiscrete or MultiBinary actions, got {model.action_space}"
    of_buffer = obstacle_of_buffer(model.rollout_buffer)
    if of_buffer is not None:
        return of_buffer
    options = getattr(policy, "memory_options", None)
    if options is not None:
        return f"needs a policy without memory, whose states have no mirror image; got memory={options.kind!r}"
    if model._mask_use.decide(model.env, model) and not getattr(policy, "has_mask_key", False):
        return "needs masks under the observation key 'action_mask', which it mirrors; got masks of action_masks()"
    if getattr(policy, "action_dist_name", "") == "squashed_gaussian":
        return "needs another action_dist than 'squashed_gaussian', whose actions in the env's units round to bounds"
    normalize = innermost_normalizer(model.env)
    if normalize is None:
        return None
    unknown = unknown_wrapper(model.env, normalize)
    if unknown is not None:
        return (
            "takes observations in the env's units, so no wrapper around VecNormalize may change them; got "
            f"{type(unknown).__name__}, with {unknown.observation_space} around {normalize.observation_space}"
        )
    if replaces_arithmetic(normalize):
        return f"needs SB3's own way to normalise observations, which {type(normalize).__name__} replaces"
    return None


def mirror_images(symmetry: Symmetry, observations: Any, actions: th.Tensor) -> tuple[Any, th.Tensor]:  # noqa: ANN401  # tensors
    """Call a symmetry on copies, and check what it returns.

    :param symmetry: the function
    :param observations: tensor of shape (batch, ...), or a dict of them
    :param actions: shape (batch, action dim), or (batch,) for Discrete
    :return: mirrored observations and actions
    :raises ValueError: for other keys, shapes or dtypes than those given
    :raises TypeError: if not two values are returned
    """
    with th.no_grad():
        returned = symmetry(tree_map(th.clone, observations), actions.clone())
    if not isinstance(returned, tuple) or len(returned) != 2:
        raise TypeError(f"symmetry must return mirrored observations and actions, got {type(returned).__name__}")
    given, got = _by_name(observations, actions), _by_name(*returned)
    for name, tensor in given.items():
        if _described(got.get(name)) != _described(tensor):
            raise ValueError(f"symmetry must return {name} as {_described(tensor)}, got {_described(got.get(name))}")
    if isinstance(observations, dict):
        return {key: returned[0][key] for key in observations}, returned[1]
    return returned


def _by_name(observations: Any, actions: Any) -> dict[str, Any]:  # noqa: ANN401  # what a user's function returns
    if not isinstance(observations, dict):
        return {"observations": observations, "actions": actions}
    return {**{f"observations[{key!r}]": part for key, part in observations.items()}, "actions": actions}


def _described(value: object) -> str:
    if not isinstance(value, th.Tensor):
        return "nothing" if value is None else type(value).__name__
    return f"{value.dtype} of shape {tuple(value.shape)}"


def _check_involution(symmetry: Symmetry, originals: tuple[Any, th.Tensor], mirrored: tuple[Any, th.Tensor]) -> None:
    """Refuse a function that does not give originals back for their mirror images."""
    given, back = _by_name(*originals), _by_name(*mirror_images(symmetry, *mirrored))
    worst: tuple[float, str] = (0.0, "")
    for name, original in given.items():
        numbers, images = original.double().flatten(), back[name].double().flatten()
        differences = (numbers - images).abs().nan_to_num(th.inf)
        place = int(differences.argmax())
        share = float(differences[place] / numbers.abs().max().clamp(min=1.0))
        of_each = original[0].numel()
        where = f"element {place % of_each} of {name}: {numbers[place].item():g} became {images[place].item():g}"
        worst = max(worst, (share, where))
    if worst[0] > TOLERANCE:
        raise ValueError(
            "symmetry must be an involution: mirroring twice must give back what was mirrored. The largest difference "
            f"is in {worst[1]}"
        )


def add_mirrored(model: PlusModel) -> None:
    """Give the rollout of an update its mirror images, if the model has a symmetry. Minibatches hold them then.

    :param model: the model, with a full rollout buffer
    :raises ValueError: see :func:`check_symmetry`; the first rollout is checked too
    """
    if model.symmetry is None:
        return
    buffer = model.rollout_buffer
    assert isinstance(buffer, PPOPlusRolloutBuffer)
    rollout = buffer.rollout()
    units = _units_of_actions(model)
    actions = rollout.actions if units is None else rollout.actions * units[0] + units[1]
    observations = rollout.observations
    originals: OriginalObservations | None = buffer.originals
    if originals is not None:
        # The rows of an environment lie one after another in this order
        envs, steps = np.divmod(np.argsort(buffer.indices_of_part()), buffer.buffer_size)
        observations = _as_tensors(originals.rows(steps, envs), observations)
    mirrored = mirror_images(model.symmetry, observations, actions)
    if model._n_iterations == 0:
        _check_involution(model.symmetry, (observations, actions), mirrored)
    images, stored = mirrored[0], mirrored[1] if units is None else (mirrored[1] - units[1]) / units[0]
    if originals is not None:
        # As the observations of the same steps were normalised, not with the statistics after the rollout
        arrays = tree_map(lambda tensor: tensor.cpu().numpy(), images)
        images = _as_tensors(originals.normalized(arrays, originals.moments_of_rows(steps)), images)
    buffer.set_mirrored(images, stored)


def _follow_originals(model: PlusModel) -> OriginalObservations | None:
    """Let the rollout buffer keep what the environments give, if a VecNormalize changes it."""
    buffer, normalize = model.rollout_buffer, innermost_normalizer(model.env)
    assert isinstance(buffer, PPOPlusRolloutBuffer)
    if normalize is None:
        buffer.originals = None
        return None
    if buffer.originals is None or buffer.originals.normalize is not normalize:
        buffer.originals = OriginalObservations(model, normalize)
    buffer.originals.begin_learning()
    followed: OriginalObservations = buffer.originals
    return followed


def _units_of_actions(model: PlusModel) -> tuple[th.Tensor, th.Tensor] | None:
    """Return factor and offset that turn stored actions into the env's units; None: they are in these units."""
    space, policy = model.action_space, model.policy
    if not isinstance(space, spaces.Box) or not policy.squash_output:
        return None
    stored_low, stored_high = (0.0, 1.0) if getattr(policy, "action_dist_name", "") == "beta" else (-1.0, 1.0)
    low, high = (th.as_tensor(bound.reshape(-1), device=model.device) for bound in (space.low, space.high))
    factor = (high - low) / (stored_high - stored_low)
    return factor, low - stored_low * factor


def _as_tensors(arrays: Any, like: Any) -> Any:  # noqa: ANN401  # arrays and tensors, or dicts of them
    if isinstance(like, dict):
        return {key: _as_tensors(arrays[key], part) for key, part in like.items()}
    return th.as_tensor(arrays, dtype=like.dtype, device=like.device)


def with_mirrored(batch: RolloutBatch) -> tuple[Any, th.Tensor]:
    """Return observations and actions of a minibatch, followed by their mirror images: twice as many rows.

    :param batch: the minibatch, with mirror images
    """
    mirrored = batch.mirrored
    observations = tree_map(lambda *parts: th.cat(parts), batch.observations, mirrored["observations"])
    return observations, th.cat([batch.actions, mirrored["actions"]])


def with_mirror_loss(
    terms: LossTerms, batch: RolloutBatch, log_prob: th.Tensor, mirrored_log_prob: th.Tensor, coef: float
) -> LossTerms:
    """Add a term that wants the mirror image of an action to be as probable as the action.

    It is half the squared difference of the log-probabilities: an estimate of the divergence of the policy at mirrored
    observations from the mirrored policy (http://joschu.net/blog/kl-approx.html, k2), which needs no more than actions
    of the rollout. So it is for distributions of all kinds. The policy at the observations themselves is the target.

    :param terms: the loss of the minibatch
    :param batch: the minibatch
    :param log_prob: log probability of its actions, shape (batch,)
    :param mirrored_log_prob: that of the mirrored actions at the mirrored observations, shape (batch,)
    :param coef: weight of the term
    """
    squares = 0.5 * (mirrored_log_prob - log_prob.detach()).square()
    return terms._replace(loss=terms.loss + coef * masked_mean(squares, batch.valid, batch.weights))


def mean_of(terms: LossTerms, mirrored: LossTerms) -> LossTerms:
    """Return the loss of transitions and their mirror images together. The metrics of the ratio are the originals'.

    :param terms: of the transitions
    :param mirrored: of the mirror images, in as many rows
    """
    halves = {
        name: 0.5 * (getattr(terms, name) + getattr(mirrored, name))
        for name in ("loss", "policy_loss", "value_loss", "entropy_loss")
    }
    return terms._replace(**halves)
