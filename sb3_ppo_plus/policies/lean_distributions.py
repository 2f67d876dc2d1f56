"""SB3's diagonal Gaussian and categorical distributions without the overhead of ``torch.distributions``' objects.

Each method does the operations of the object's method in their order, so values and gradients are equal to the bit.
The object itself is made only when somebody reads ``distribution``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from operator import attrgetter
from typing import ClassVar, Self

import torch as th
from stable_baselines3.common.distributions import (
    CategoricalDistribution,
    DiagGaussianDistribution,
    Distribution,
    MultiCategoricalDistribution,
    sum_independent_dims,
)
from torch.distributions import Categorical, Normal

from sb3_ppo_plus.policies.rounding import ROUNDING
from sb3_ppo_plus.torch_private import default_validation

# What the classes here do in their own way, as SB3 does it
_METHODS = attrgetter("proba_distribution", "log_prob", "entropy", "sample", "mode")
_SB3_METHODS = {
    kind: _METHODS(kind) for kind in (DiagGaussianDistribution, CategoricalDistribution, MultiCategoricalDistribution)
}

_LOG_SQRT_2_PI = math.log(math.sqrt(2 * math.pi))
_ENTROPY_OF_STANDARD_NORMAL = 0.5 + 0.5 * math.log(2 * math.pi)


class LeanDiagGaussianDistribution(DiagGaussianDistribution):
    """SB3's ``DiagGaussianDistribution``, to the bit.

    :param action_dim: number of action dimensions
    """

    sb3_class: ClassVar[type[Distribution]] = DiagGaussianDistribution
    _object: Normal | None = None

    @property
    def distribution(self) -> Normal:
        """The object of ``torch.distributions``, made at the first reading."""
        if self._object is None:
            self._object = Normal(self._mean, self._std)
        return self._object

    @distribution.setter  # type: ignore[override]  # narrower than SB3's base
    def distribution(self, distribution: Normal | None) -> None:
        # SB3's constructor sets None
        self._object = distribution
        if distribution is not None:
            self._mean, self._std = distribution.loc, distribution.scale

    def proba_distribution(self, mean_actions: th.Tensor, log_std: th.Tensor) -> Self:
        """Set the parameters.

        :param mean_actions: shape (batch, action_dim)
        :param log_std: shape (action_dim,)
        :return: self
        :raises ValueError: for NaN, as ``Normal`` does
        """
        self._mean, self._std = mean_actions, th.ones_like(mean_actions) * log_std.exp()
        self._object = None
        if default_validation() and not math.isfinite(self.total().item()):
            self._object = Normal(self._mean, self._std)
        return self

    def total(self) -> th.Tensor:
        """Return the sum of the parameters, 0-dim. It is not finite if one of them is not."""
        return (self._mean + self._std).sum()

    def log_prob(self, actions: th.Tensor) -> th.Tensor:
        """Return the log density of actions.

        :param actions: shape (batch, action_dim)
        :return: shape (batch,)
        """
        squared_distance = (actions - self._mean) ** 2
        log_density = -squared_distance / (2 * self._std**2) - self._std.log() - _LOG_SQRT_2_PI
        return sum_independent_dims(log_density)

    def entropy(self) -> th.Tensor:
        """Return the differential entropy, shape (batch,)."""
        return sum_independent_dims(_ENTROPY_OF_STANDARD_NORMAL + th.log(self._std))

    def sample(self) -> th.Tensor:
        """Draw reparametrised samples, shape (batch, action_dim)."""
        return self._mean + th.empty_like(self._mean).normal_() * self._std

    def mode(self) -> th.Tensor:
        """Return the most probable actions, shape (batch, action_dim)."""
        return self._mean


class LeanCategoricalDistribution(CategoricalDistribution):
    """SB3's ``CategoricalDistribution``, to the bit.

    :param action_dim: number of actions
    """

    sb3_class: ClassVar[type[Distribution]] = CategoricalDistribution
    _object: Categorical | None = None
    _is_own: bool = False
    """Whether a user assigned ``distribution``; its own methods are then called."""
    _probs: th.Tensor | None = None

    @property
    def distribution(self) -> Categorical:
        """The object of ``torch.distributions``. A user may assign another one, which is then used."""
        if self._object is None:
            self._object = Categorical(logits=self._action_logits)
        return self._object

    @distribution.setter  # type: ignore[override]  # narrower than SB3's base
    def distribution(self, distribution: Categorical | None) -> None:
        self._object = distribution
        self._is_own = distribution is not None

    @property
    def logits(self) -> th.Tensor:
        """Log-probabilities, shape (batch, action_dim); under :func:`may_round` each row may be off by a constant."""
        if self._is_own:
            return self.distribution.logits
        return self._action_logits if ROUNDING.is_allowed else self._logits

    def proba_distribution(self, action_logits: th.Tensor) -> Self:
        """Set the parameters.

        :param action_logits: unnormalised log-probabilities, shape (batch, action_dim)
        :return: self
        :raises ValueError: for NaN or infinity, as ``Categorical`` does
        """
        self.set_logits(action_logits)
        if default_validation() and not math.isfinite(self.total().item()):
            self._object = Categorical(logits=action_logits)
        return self

    def set_logits(self, action_logits: th.Tensor) -> None:
        """Set the parameters without a check.

        :param action_logits: unnormalised log-probabilities, shape (batch, action_dim)
        """
        self._object, self._is_own, self._probs = None, False, None
        self._action_logits = action_logits
        self._logits = action_logits - action_logits.logsumexp(dim=-1, keepdim=True)

    def total(self) -> th.Tensor:
        """Return the sum of the log-probabilities, 0-dim. It is not finite if one of them is not."""
        return self._logits.sum()

    def log_prob(self, actions: th.Tensor) -> th.Tensor:
        """Return the log-probability of actions.

        :param actions: shape (batch,)
        :return: shape (batch,)
        """
        if self._is_own:
            return super().log_prob(actions)
        return self._logits.gather(-1, actions.long().unsqueeze(-1)).squeeze(-1)

    def entropy(self) -> th.Tensor:
        """Return the entropy, shape (batch,)."""
        if self._is_own:
            return super().entropy()
        log_probs = self._logits.clamp(min=th.finfo(self._logits.dtype).min)
        return -(log_probs * self._probabilities()).sum(-1)

    def sample(self) -> th.Tensor:
        """Draw actions, shape (batch,)."""
        if self._is_own:
            return super().sample()
        return th.multinomial(self._probabilities(), 1, replacement=True).squeeze(-1)

    def mode(self) -> th.Tensor:
        """Return the most probable actions, shape (batch,)."""
        return super().mode() if self._is_own else self._probabilities().argmax(dim=1)

    def _probabilities(self) -> th.Tensor:
        if self._probs is None:
            # Computed once, as torch does: a second softmax would change the order in which gradients are added
            with th.set_grad_enabled(self._logits.requires_grad):
                self._probs = self.logits.softmax(dim=-1)
        return self._probs


class LeanMultiCategoricalDistribution(MultiCategoricalDistribution):
    """SB3's ``MultiCategoricalDistribution``, to the bit.

    :param action_dims: number of choices of each action
    """

    sb3_class: ClassVar[type[Distribution] | None] = MultiCategoricalDistribution
    part_class: type[LeanCategoricalDistribution] = LeanCategoricalDistribution
    parts: Sequence[LeanCategoricalDistribution] = ()

    @property  # type: ignore[override]  # SB3 narrows its base in the same way
    def distribution(self) -> list[Categorical]:
        """The objects of ``torch.distributions``. A user may assign others, which are then used."""
        return [part.distribution for part in self.parts]

    @distribution.setter  # type: ignore[override]  # narrower than SB3's base
    def distribution(self, distributions: list[Categorical] | None) -> None:
        self.parts = [self.part_class(n) for n in self.action_dims] if distributions else ()
        for part, distribution in zip(self.parts, distributions or (), strict=True):
            part.distribution = distribution

    def proba_distribution(self, action_logits: th.Tensor) -> Self:
        """Set the parameters.

        :param action_logits: unnormalised log-probabilities, shape (batch, sum of action_dims)
        :return: self
        :raises ValueError: for NaN or infinity, as ``Categorical`` does
        """
        # New parts each time, so that a copy of this object keeps its parts
        self.parts = [self.part_class(n) for n in self.action_dims]
        splits = th.split(action_logits, list(self.action_dims), dim=1)
        for part, split in zip(self.parts, splits, strict=True):
            part.set_logits(split)
        if default_validation() and not math.isfinite(action_logits.sum().item()):
            # PyTorch checks each part, and its error says what is wrong
            _ = [Categorical(logits=split) for split in splits]
        return self

    def log_prob(self, actions: th.Tensor) -> th.Tensor:
        """Return the log-probability of actions.

        :param actions: shape (batch, number of actions)
        :return: shape (batch,)
        """
        each = [part.log_prob(action) for part, action in zip(self.parts, actions.unbind(dim=1), strict=True)]
        return th.stack(each, dim=1).sum(dim=1)

    def entropy(self) -> th.Tensor:
        """Return the entropy, shape (batch,)."""
        return th.stack([part.entropy() for part in self.parts], dim=1).sum(dim=1)

    def sample(self) -> th.Tensor:
        """Draw actions, shape (batch, number of actions)."""
        return th.stack([part.sample() for part in self.parts], dim=1)

    def mode(self) -> th.Tensor:
        """Return the most probable actions, shape (batch, number of actions)."""
        return th.stack([part.mode() for part in self.parts], dim=1)


def follow_replaced_methods(distribution: Distribution) -> None:
    """Make a distribution of these classes one of SB3's own where somebody has replaced a method of SB3's class.

    The replacement would never be called otherwise, since the classes here have methods of their own.
    """
    sb3_class = getattr(distribution, "sb3_class", None)
    if sb3_class is not None and _METHODS(sb3_class) != _SB3_METHODS[sb3_class]:
        distribution.__class__ = sb3_class
