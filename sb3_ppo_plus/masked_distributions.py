"""Categorical distributions whose invalid actions have probability 0, on SB3's classes.

They are SB3's own until masks are applied. The arithmetic is that of sb3-contrib's maskable distributions: normalise
the logits, mask them, normalise again. The lowest number of the dtype stands in place of -1e8, which overflows in half
precision; in float32 it gives the same bits.
"""

from __future__ import annotations

from typing import Any, Self

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.distributions import Distribution, MultiCategoricalDistribution
from torch.distributions import Categorical

from sb3_ppo_plus.lean_distributions import LeanCategoricalDistribution

MASKABLE_SPACES = (spaces.Discrete, spaces.MultiDiscrete, spaces.MultiBinary)


class MaskedCategorical(Categorical):
    """Categorical distribution over the valid actions.

    :param logits: normalised log-probabilities of all actions, shape (batch, n)
    :param masks: True where an action is valid, bool, shape (batch, n); at least one in each row
    """

    def __init__(self, logits: th.Tensor, masks: th.Tensor) -> None:
        self.masks = masks
        # The logits were checked when they were normalised
        super().__init__(logits=_masked(logits, masks), validate_args=False)

    def entropy(self) -> th.Tensor:
        """Entropy of the choice among the valid actions, shape (batch,)."""
        return _entropy(self.logits, self.probs, self.masks)


class MaskableCategoricalDistribution(LeanCategoricalDistribution):
    """SB3's distribution of Discrete actions, to which masks can be applied."""

    _masks: th.Tensor | None = None

    def proba_distribution(self, action_logits: th.Tensor) -> Self:
        """Set the parameters; see ``LeanCategoricalDistribution``."""
        self._masks = None
        return super().proba_distribution(action_logits)

    def apply_masking(self, masks: th.Tensor | np.ndarray) -> None:
        """Give the invalid actions probability 0, besides those to which earlier masks gave it.

        :param masks: True where an action is valid, shape (batch, n) or (batch * n,)
        """
        self._masks = _as_masks(masks, self._logits.shape, self._logits.device)
        # Not by proba_distribution, whose check that all are finite adds them up
        self._action_logits = _masked(self._logits, self._masks)
        self._logits = self._action_logits - self._action_logits.logsumexp(dim=-1, keepdim=True)
        self._object, self._probs = None, None

    def total(self) -> th.Tensor:
        """Sum of the valid actions' log-probabilities, finite where all are, 0-dim."""
        return super().total() if self._masks is None else th.where(self._masks, self._logits, 0.0).sum()

    def entropy(self) -> th.Tensor:
        """Entropy of the choice among the valid actions, shape (batch,)."""
        if self._masks is None:
            return super().entropy()
        return _entropy(self._logits, self._probabilities(), self._masks)


class MaskableMultiCategoricalDistribution(MultiCategoricalDistribution):
    """SB3's distribution of MultiDiscrete actions, to which masks can be applied."""

    def apply_masking(self, masks: th.Tensor | np.ndarray) -> None:
        """Give the invalid choices probability 0, besides those to which earlier masks gave it.

        :param masks: True where a choice is valid, shape (batch, sum of nvec) or flat: those of the first action, then
            those of the second, ...
        """
        logits = [distribution.logits for distribution in self.distribution]
        given = _as_masks(masks, (len(logits[0]), sum(self.action_dims)), logits[0].device)
        parts = th.split(given, self.action_dims, dim=1)
        self.distribution = [MaskedCategorical(*pair) for pair in zip(logits, parts, strict=True)]


class MaskableBernoulliDistribution(MaskableMultiCategoricalDistribution):
    """MultiBinary actions as pairs of choices (0, 1), as sb3-contrib has them: two logits for each binary action.

    :param action_dim: number of binary actions
    """

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


def _masked(logits: th.Tensor, masks: th.Tensor) -> th.Tensor:
    return logits.masked_fill(~masks, th.finfo(logits.dtype).min)


def _entropy(logits: th.Tensor, probs: th.Tensor, masks: th.Tensor) -> th.Tensor:
    # Else a float16 loss's scale times the lowest number, the gradient of an invalid action's probability, overflows
    return -(logits * probs).masked_fill(~masks, 0.0).sum(-1)


def _as_masks(masks: th.Tensor | np.ndarray, shape: tuple[int, ...], device: th.device) -> th.Tensor:
    given = th.as_tensor(masks, dtype=th.bool, device=device)
    if given.numel() != shape[0] * shape[1]:
        raise ValueError(f"action_masks must have the shape {tuple(shape)}, got {tuple(given.shape)}")
    return given.reshape(shape)
