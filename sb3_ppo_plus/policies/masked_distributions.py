"""Categorical distributions whose invalid actions have probability 0, on SB3's classes.

They are SB3's own until masks are applied. The arithmetic is that of sb3-contrib's maskable distributions: normalise
the logits, mask them, normalise again (in compiled graphs only once). The lowest number of the dtype stands in place of
-1e8, which overflows in half precision; in float32 it gives the same bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.distributions import Distribution

from sb3_ppo_plus.policies.lean_distributions import LeanCategoricalDistribution, LeanMultiCategoricalDistribution

MASKABLE_SPACES = (spaces.Discrete, spaces.MultiDiscrete, spaces.MultiBinary)


class MaskableCategoricalDistribution(LeanCategoricalDistribution):
    """SB3's distribution of Discrete actions, to which masks can be applied."""

    _masks: th.Tensor | None = None

    def set_logits(self, action_logits: th.Tensor) -> None:
        """Set the parameters; see ``LeanCategoricalDistribution``."""
        self._masks = None
        super().set_logits(action_logits)

    def apply_masking(self, masks: th.Tensor | np.ndarray) -> None:
        """Give the invalid actions probability 0, besides those to which earlier masks gave it.

        :param masks: True where an action is valid, shape (batch, n) or (batch * n,)
        """
        logits = self.logits
        given = _as_masks(masks, logits.shape, logits.device)
        # Not by proba_distribution, whose check that all are finite adds them up
        self.set_logits(th.where(given, logits, th.finfo(logits.dtype).min))
        self._masks = given

    def total(self) -> th.Tensor:
        """Sum of the valid actions' log-probabilities, finite where all are, 0-dim."""
        return super().total() if self._masks is None else th.where(self._masks, self._logits, 0.0).sum()

    def entropy(self) -> th.Tensor:
        """Entropy of the choice among the valid actions, shape (batch,)."""
        if self._masks is None:
            return super().entropy()
        # Else a float16 loss's scale times the lowest number, an invalid action's gradient, overflows
        return -(self._logits * self._probabilities()).masked_fill(~self._masks, 0.0).sum(-1)


class MaskableMultiCategoricalDistribution(LeanMultiCategoricalDistribution):
    """SB3's distribution of MultiDiscrete actions, to which masks can be applied."""

    part_class = MaskableCategoricalDistribution
    parts: Sequence[MaskableCategoricalDistribution] = ()

    def apply_masking(self, masks: th.Tensor | np.ndarray) -> None:
        """Give the invalid choices probability 0, besides those to which earlier masks gave it.

        :param masks: True where a choice is valid, shape (batch, sum of nvec) or flat: those of the first action, then
            those of the second, ...
        """
        logits = self.parts[0].logits
        given = _as_masks(masks, th.Size((len(logits), sum(self.action_dims))), logits.device)
        for part, part_masks in zip(self.parts, th.split(given, self.action_dims, dim=1), strict=True):
            part.apply_masking(part_masks)


class MaskableBernoulliDistribution(MaskableMultiCategoricalDistribution):
    """MultiBinary actions as pairs of choices (0, 1), as sb3-contrib has them: two logits for each binary action.

    :param action_dim: number of binary actions
    """

    sb3_class = None

    def __init__(self, action_dim: int) -> None:
        super().__init__([2] * action_dim)


MaskableDistribution = MaskableCategoricalDistribution | MaskableMultiCategoricalDistribution


def make_maskable_distribution(action_space: spaces.Space[Any]) -> MaskableDistribution:
    """Build the maskable distribution of an action space.

    :param action_space: Discrete, MultiDiscrete or MultiBinary of one dimension
    :raises ValueError: for any other space
    """
    sizes = mask_sizes(action_space)
    if isinstance(action_space, spaces.Discrete):
        return MaskableCategoricalDistribution(sizes[0])
    if isinstance(action_space, spaces.MultiDiscrete):
        return MaskableMultiCategoricalDistribution(sizes)
    return MaskableBernoulliDistribution(len(sizes))


def mask_sizes(action_space: spaces.Space[Any]) -> list[int]:
    """Return the numbers of choices of each action, of which a mask holds the sum.

    :param action_space: Discrete: [n]; MultiDiscrete: nvec; MultiBinary: [2] * n, since 0 and 1 are masked apart
    :raises ValueError: for a space that cannot be masked
    """
    if isinstance(action_space, spaces.Discrete):
        return [int(action_space.n)]
    if isinstance(action_space, spaces.MultiDiscrete) and action_space.nvec.ndim == 1:
        return [int(n) for n in action_space.nvec]
    if isinstance(action_space, spaces.MultiBinary) and isinstance(action_space.n, int):
        return [2] * action_space.n
    raise ValueError(
        f"action masks need a Discrete, MultiDiscrete or MultiBinary action space of one dimension, got {action_space}"
    )


def apply_masks(distribution: Distribution, masks: th.Tensor | np.ndarray) -> None:
    """Apply masks to a policy's distribution.

    :param masks: see ``apply_masking`` of the distributions here
    :raises ValueError: for a distribution that takes none, or masks of a wrong size
    """
    if not isinstance(distribution, MaskableDistribution):
        raise ValueError(
            f"action_masks were given to a policy with a {type(distribution).__name__}, which takes none; allowed: "
            "Discrete and MultiDiscrete actions, and MultiBinary ones of a model with action_masking=True"
        )
    distribution.apply_masking(masks)


def _as_masks(masks: th.Tensor | np.ndarray, shape: th.Size, device: th.device) -> th.Tensor:
    given = th.as_tensor(masks, dtype=th.bool, device=device)
    if given.numel() != shape[0] * shape[1]:
        raise ValueError(f"action_masks must have the shape {tuple(shape)}, got {tuple(given.shape)}")
    return given if given.shape == shape else given.reshape(shape)
