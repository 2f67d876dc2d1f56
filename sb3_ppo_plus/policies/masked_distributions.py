"""Categorical distributions whose invalid actions have probability 0, on SB3's classes.

Until masks are applied, they act as SB3's. The arithmetic is that of sb3-contrib's maskable distributions: normalise
the logits, mask them, normalise again (in compiled graphs only once). A masked logit is the lowest number of the dtype.
sb3-contrib takes -1e8, which overflows in half precision; in float32 both give equal bits.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.distributions import Distribution

from sb3_ppo_plus.policies.flat_actions import parts_of
from sb3_ppo_plus.policies.lean_distributions import LeanCategoricalDistribution, LeanMultiCategoricalDistribution

MASKABLE_SPACES = (spaces.Discrete, spaces.MultiDiscrete, spaces.MultiBinary)


class MaskableCategoricalDistribution(LeanCategoricalDistribution):
    """SB3's distribution of Discrete actions, to which masks can be applied."""

    _masks: th.Tensor | None = None

    def set_logits(self, action_logits: th.Tensor) -> None:
        """Set the parameters without a check, and forget the masks.

        :param action_logits: unnormalised log-probabilities, shape (batch, action_dim)
        """
        self._masks = None
        super().set_logits(action_logits)

    def apply_masking(self, masks: th.Tensor | np.ndarray) -> None:
        """Give the invalid actions probability 0. Actions that earlier masks forbade stay invalid.

        :param masks: True where an action is valid, shape (batch, n) or (batch * n,)
        """
        logits = self.logits
        given = _as_masks(masks, logits.shape, logits.device)
        # Not by proba_distribution: its check adds up all logits, and the sum of masked ones overflows
        self.set_logits(th.where(given, logits, th.finfo(logits.dtype).min))
        self._masks = given

    def total(self) -> th.Tensor:
        """Return the sum of the valid actions' log-probabilities, 0-dim. It is not finite if one of them is not."""
        return super().total() if self._masks is None else th.where(self._masks, self._logits, 0.0).sum()

    def entropy(self) -> th.Tensor:
        """Return the entropy of the choice among the valid actions, shape (batch,)."""
        if self._masks is None:
            return super().entropy()
        # masked_fill keeps the lowest number out of the gradient: times the scale of a float16 loss it overflows
        return -(self._logits * self._probabilities()).masked_fill(~self._masks, 0.0).sum(-1)


class MaskableMultiCategoricalDistribution(LeanMultiCategoricalDistribution):
    """SB3's distribution of MultiDiscrete actions, to which masks can be applied."""

    part_class = MaskableCategoricalDistribution
    parts: Sequence[MaskableCategoricalDistribution] = ()

    def apply_masking(self, masks: th.Tensor | np.ndarray) -> None:
        """Give the invalid choices probability 0. Choices that earlier masks forbade stay invalid.

        :param masks: True where a choice is valid, shape (batch, sum of nvec) or flat: the choices of the first action,
            then those of the second, and so on
        """
        logits = self.parts[0].logits
        given = _as_masks(masks, th.Size((len(logits), sum(self.action_dims))), logits.device)
        for part, part_masks in zip(self.parts, th.split(given, self.action_dims, dim=1), strict=True):
            part.apply_masking(part_masks)


class MaskableBernoulliDistribution(MaskableMultiCategoricalDistribution):
    """MultiBinary actions as choices between 0 and 1, with two logits for each action, as in sb3-contrib.

    :param action_dim: number of binary actions
    """

    sb3_class = None

    def __init__(self, action_dim: int) -> None:
        super().__init__([2] * action_dim)


MaskableDistribution = MaskableCategoricalDistribution | MaskableMultiCategoricalDistribution


def make_maskable_distribution(action_space: spaces.Space[Any]) -> MaskableDistribution:
    """Build the maskable distribution of an action space.

    :param action_space: Discrete, MultiDiscrete or MultiBinary of one dimension
    :return: the distribution, without masks as yet
    :raises ValueError: for any other space
    """
    sizes = _sizes(action_space)
    if isinstance(action_space, spaces.Discrete):
        return MaskableCategoricalDistribution(sizes[0])
    if isinstance(action_space, spaces.MultiDiscrete):
        return MaskableMultiCategoricalDistribution(sizes)
    return MaskableBernoulliDistribution(len(sizes))


def mask_sizes(action_space: spaces.Space[Any]) -> list[int]:
    """Return the number of choices of each action. Their sum is the size of a mask.

    :param action_space: Discrete, MultiDiscrete or MultiBinary of one dimension; or a Tuple or Dict with such parts, of
        any dimensions
    :return: for Discrete [n], for MultiDiscrete nvec, for MultiBinary [2] * n, since 0 and 1 are masked separately. For
        a Tuple or Dict those of its discrete parts, one after another
    :raises ValueError: for a space that cannot be masked
    """
    parts = [flattened_choices(part.space) for part in parts_of(action_space)]
    if any(isinstance(part, MASKABLE_SPACES) for part in parts):
        return [n for part in parts if isinstance(part, MASKABLE_SPACES) for n in _sizes(part)]
    return _sizes(action_space)


def can_be_masked(action_space: spaces.Space[Any]) -> bool:
    """Whether actions can be masked: they are discrete, or in a Tuple or Dict some parts are.

    :param action_space: the action space
    """
    candidates = (action_space, *(part.space for part in parts_of(action_space)))
    return any(isinstance(space, MASKABLE_SPACES) for space in candidates)


def flattened_choices(space: spaces.Space[Any]) -> spaces.Space[Any]:
    """Return a MultiDiscrete or MultiBinary with one dimension; any other space as it is.

    :param space: the space
    """
    if isinstance(space, spaces.MultiDiscrete):
        return spaces.MultiDiscrete(space.nvec.reshape(-1))
    return spaces.MultiBinary(math.prod(space.shape)) if isinstance(space, spaces.MultiBinary) else space


def _sizes(action_space: spaces.Space[Any]) -> list[int]:
    if isinstance(action_space, spaces.Discrete):
        return [int(action_space.n)]
    if isinstance(action_space, spaces.MultiDiscrete) and action_space.nvec.ndim == 1:
        return [int(n) for n in action_space.nvec]
    if isinstance(action_space, spaces.MultiBinary) and isinstance(action_space.n, int):
        return [2] * action_space.n
    raise ValueError(
        "action masks need a Discrete, MultiDiscrete or MultiBinary action space of one dimension, or a Tuple or Dict "
        f"with such a part, got {action_space}"
    )


def apply_masks(distribution: Distribution, masks: th.Tensor | np.ndarray) -> None:
    """Apply masks to a policy's distribution.

    :param distribution: the distribution
    :param masks: True where an action is valid, see ``apply_masking`` of the distribution's class
    :raises ValueError: for a distribution that takes no masks, or masks of a wrong size
    """
    apply_masking = getattr(distribution, "apply_masking", None)
    if apply_masking is None:
        raise ValueError(
            f"action_masks were given to a policy with a {type(distribution).__name__}, which takes none; allowed: "
            "Discrete and MultiDiscrete actions, and MultiBinary actions of a model with action_masking=True"
        )
    apply_masking(masks)


def _as_masks(masks: th.Tensor | np.ndarray, shape: th.Size, device: th.device) -> th.Tensor:
    given = th.as_tensor(masks, dtype=th.bool, device=device)
    if given.numel() != shape[0] * shape[1]:
        raise ValueError(f"action_masks must have the shape {tuple(shape)}, got {tuple(given.shape)}")
    return given if given.shape == shape else given.reshape(shape)
