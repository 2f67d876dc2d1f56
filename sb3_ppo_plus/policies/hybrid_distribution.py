"""The distribution of hybrid actions: independent distributions of the parts, each of which exists alone too."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from copy import copy
from functools import reduce
from operator import add, or_
from typing import Any, Self

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.distributions import (
    BernoulliDistribution,
    CategoricalDistribution,
    DiagGaussianDistribution,
    Distribution,
    MultiCategoricalDistribution,
)
from torch import nn

from sb3_ppo_plus.policies.bounded_distributions import BoundedDistribution, make_action_distribution
from sb3_ppo_plus.policies.bounds import clip_to_bounds
from sb3_ppo_plus.policies.flat_actions import ActionPart, FlatActionSpace, Structure, choices_to_env
from sb3_ppo_plus.policies.lean_distributions import LeanDiagGaussianDistribution, follow_replaced_methods
from sb3_ppo_plus.policies.masked_distributions import (
    MaskableDistribution,
    flattened_choices,
    make_maskable_distribution,
    mask_sizes,
)
from sb3_ppo_plus.policies.used_parts import Condition, UsedParts, conditions_of


class PartNets(nn.ModuleList):
    """The last layers of a policy, one for each part of the action."""

    def forward(self, latent: th.Tensor) -> list[th.Tensor]:
        """Return the outputs of each layer.

        :param latent: shape (batch, latent_dim)
        """
        return [net(latent) for net in self]


class HybridDistribution(DiagGaussianDistribution):
    """The distribution of Tuple and Dict actions. Log-probability and entropy are the sums of those of the parts.

    It subclasses SB3's ``DiagGaussianDistribution``, because SB3's ``ActorCriticPolicy`` accepts only classes it knows.
    With conditions, a part that is not used has the log-probability 0, and its entropy counts by the probability that
    it is used. This sum is the entropy of what is used: its mean log-probability, times -1.

    :param action_space: the action space
    :param parts: the distributions of its parts
    :param conditions: for each part, when it is used; see :func:`conditions_of`
    :param takes_masks: whether the parts are built for masks
    """

    def __init__(
        self,
        action_space: FlatActionSpace,
        parts: Sequence[Distribution],
        conditions: Sequence[Sequence[Condition]],
        *,
        takes_masks: bool = False,
    ) -> None:
        self.parts = [*parts]
        self._conditions = conditions
        self._columns = [part.columns for part in action_space.parts]
        self._is_discrete = [isinstance(part.space, spaces.Discrete) for part in action_space.parts]
        self._mask_sizes = [
            0 if isinstance(part.space, spaces.Box) else sum(mask_sizes(flattened_choices(part.space)))
            for part in action_space.parts
        ]
        self._spaces = action_space
        self._follows_replaced_methods = not takes_masks
        self._n_log_stds: list[int] = []
        self._batch_size = 0
        super().__init__(action_space.shape[0])

    @property  # type: ignore[override]  # SB3 narrows its base in the same way
    def distribution(self) -> list[Any]:
        """The objects of ``torch.distributions`` of the parts; for a MultiDiscrete part a list of them."""
        return [part.distribution for part in self.parts]

    @distribution.setter  # type: ignore[override]  # narrower than SB3's base
    def distribution(self, distribution: None) -> None:
        # SB3's constructor sets None
        assert distribution is None, "the distributions of hybrid actions cannot be replaced"

    @property
    def log_prob_depends_on_batch_size(self) -> bool:
        """Whether one row and a batch round to other log-probabilities."""
        return any(getattr(part, "log_prob_depends_on_batch_size", False) for part in self.parts)

    def proba_distribution_net(  # type: ignore[override]  # SB3 declares one layer, and that log_std is returned
        self, latent_dim: int, log_std_init: float = 0.0
    ) -> tuple[PartNets, nn.Parameter | None]:
        """Create the layers of the parts.

        :param latent_dim: size of the policy net's last layer
        :param log_std_init: initial log standard deviation of the Box parts that have one
        :return: the layers, and log_std of all parts that have one, in order; None: no part has one
        """
        nets: list[nn.Module] = []
        log_stds: list[th.Tensor] = []
        self._n_log_stds = []
        for part in self.parts:
            made: Any
            if isinstance(part, DiagGaussianDistribution):
                made = part.proba_distribution_net(latent_dim, log_std_init)
            else:
                made = part.proba_distribution_net(latent_dim), None
            net, log_std = made
            nets.append(net)
            self._n_log_stds.append(0 if log_std is None else len(log_std))
            log_stds += [] if log_std is None else [log_std.detach()]
        return PartNets(nets), nn.Parameter(th.cat(log_stds), requires_grad=True) if log_stds else None

    def proba_distribution(  # type: ignore[override]  # SB3 declares one tensor
        self, mean_actions: Sequence[th.Tensor], log_std: th.Tensor | None
    ) -> Self:
        """Set the parameters.

        :param mean_actions: the outputs of the parts' layers
        :param log_std: log standard deviation of all parts that have one, shape (n,); None: no part has one
        :return: self
        """
        log_stds: Sequence[Any] = self.log_stds_of_parts(log_std)
        self._batch_size = len(mean_actions[0])
        # New parts each time, so that a copy of this object keeps its parts
        self.parts = [copy(part) for part in self.parts]
        for part, outputs, part_log_std in zip(self.parts, mean_actions, log_stds, strict=True):
            if self._follows_replaced_methods:
                follow_replaced_methods(part)
            if isinstance(part, DiagGaussianDistribution):
                part.proba_distribution(outputs, part_log_std)
            else:
                part.proba_distribution(action_logits=outputs)
        return self

    def log_stds_of_parts(self, log_std: th.Tensor | None) -> Sequence[th.Tensor | None]:
        """Return the log standard deviations of each part; of a part that has none, None or an empty tensor.

        :param log_std: those of all parts, shape (n,); None: no part has one
        """
        return [None] * len(self.parts) if log_std is None else th.split(log_std, self._n_log_stds)

    def apply_masking(self, masks: th.Tensor | np.ndarray) -> None:
        """Give the invalid choices probability 0. Choices that earlier masks forbade stay invalid.

        :param masks: True where a choice is valid, shape (batch, mask size) or flat: those of the first discrete part,
            then those of the second, and so on; each part has them as its own distribution takes them
        :raises ValueError: for masks of another size or of another number of observations, or masked choices of a
            MultiBinary part of a policy that was built without masks
        """
        given, size = th.as_tensor(masks), sum(self._mask_sizes)
        if given.numel() != self._batch_size * size:
            named = zip(self._spaces.parts, self._mask_sizes, strict=True)
            sizes = ", ".join(f"{size} for part {part.path!r}" for part, size in named if size)
            raise ValueError(
                f"action masks must have the shape (n_envs, mask size) = ({self._batch_size}, {size}) ({sizes}), got "
                f"{tuple(given.shape)}"
            )
        of_parts = th.split(given.reshape(-1, size), self._mask_sizes, dim=1)
        for part, (path, space, _), part_masks in zip(self.parts, self._spaces.parts, of_parts, strict=True):
            if isinstance(space, spaces.Box):
                continue
            if isinstance(part, MaskableDistribution):
                part.apply_masking(part_masks)
            elif not part_masks.all():
                raise ValueError(
                    f"part {path!r} takes no masks, because the policy was built without action_masking=True; allowed: "
                    f"None in its place, or {part_masks.shape[1]} times True"
                )

    def log_prob(self, actions: th.Tensor) -> th.Tensor:
        """Return the log-probability of the parts that are used.

        :param actions: rows, see :class:`FlatActionSpace`, shape (batch, action_dim)
        :return: shape (batch,)
        """
        return reduce(add, [self._log_prob_of_part(index, actions) for index in range(len(self.parts))])

    def _log_prob_of_part(self, index: int, actions: th.Tensor) -> th.Tensor:
        columns = self._columns[index]
        stored = actions[:, columns.start] if self._is_discrete[index] else actions[:, columns]
        conditions = self._conditions[index]
        if not conditions:
            return self.parts[index].log_prob(stored)
        used = th.ones_like(actions[:, 0], dtype=th.bool)
        for chooser, choices in conditions:
            chosen = actions[:, self._columns[chooser].start]
            used = used & reduce(or_, [chosen == choice for choice in choices])
        # The action of a part that is not used must not even make a gradient NaN
        stored = th.where(used if self._is_discrete[index] else used.unsqueeze(1), stored, 0.0)
        return th.where(used, self.parts[index].log_prob(stored), 0.0)

    def entropy(self) -> th.Tensor:
        """Return the entropy of what is used, shape (batch,); a squashed Gaussian's part of it is an estimate."""
        return reduce(add, [self._entropy_of_part(index) for index in range(len(self.parts))])

    def _entropy_of_part(self, index: int) -> th.Tensor:
        entropy = self.parts[index].entropy()
        assert entropy is not None
        for chooser, choices in self._conditions[index]:
            choosing: Any = self.parts[chooser]
            probabilities = choosing.logits.softmax(dim=-1).unbind(dim=1)
            entropy = entropy * reduce(add, [probabilities[choice] for choice in choices])
        return entropy

    def sample(self) -> th.Tensor:
        """Draw rows, shape (batch, action_dim)."""
        return self._joined([part.sample() for part in self.parts])

    def mode(self) -> th.Tensor:
        """Return the rows of each part's most probable, or otherwise deterministic, actions."""
        return self._joined([part.mode() for part in self.parts])

    def _joined(self, of_parts: list[th.Tensor]) -> th.Tensor:
        rows = zip(of_parts, self._is_discrete, strict=True)
        return th.cat([(part.unsqueeze(1) if is_discrete else part).float() for part, is_discrete in rows], dim=1)

    def to_env(self, rows: np.ndarray) -> list[Structure]:
        """Convert rows to the actions that environments take.

        :param rows: shape (n_envs, action_dim)
        :return: the action of each environment, inside its action space
        """
        of_parts = zip(self.parts, self._spaces.parts, strict=True)
        return self._spaces.structures([_to_env(kind, part, rows[:, part.columns]) for kind, part in of_parts])


def distributions_in(action_dist: object) -> list[object]:
    """Return a policy's distribution, and those of the parts of hybrid actions.

    :param action_dist: the distribution; None: the policy has none, and the result is empty
    """
    parts = action_dist.parts if isinstance(action_dist, HybridDistribution) else []
    return [] if action_dist is None else [action_dist, *parts]


def _to_env(distribution: Distribution, part: ActionPart, stored: np.ndarray) -> np.ndarray:
    space = part.space
    if not isinstance(space, spaces.Box):
        return choices_to_env(stored, space)
    actions = stored.reshape(-1, *space.shape)
    if isinstance(distribution, BoundedDistribution):
        return distribution.to_bounds(actions, space.low, space.high)
    if np.issubdtype(space.dtype, np.floating):
        return clip_to_bounds(actions.astype(space.dtype), space)
    rounded: np.ndarray = clip_to_bounds(np.rint(actions), space).astype(space.dtype)
    return rounded


def choose_action_distribution(
    action_space: spaces.Space[Any],
    of_sb3: Distribution,
    action_dist: str,
    action_dist_kwargs: Mapping[str, Any] | None,
    *,
    takes_masks: bool,
    used_parts: UsedParts | None = None,
) -> Distribution:
    """Return the distribution of a policy.

    :param action_space: the action space of the policy
    :param of_sb3: SB3's choice for this space
    :param action_dist: name of the distribution of a Box, and of each Box part of a Tuple or Dict
    :param action_dist_kwargs: keyword arguments of that distribution
    :param takes_masks: whether the policy is built for masks
    :param used_parts: see :class:`HybridPolicy`
    :raises ValueError: for a distribution that does not fit the space, or parts that do not exist
    """
    conditions = conditions_of(action_space, used_parts)
    if isinstance(action_space, FlatActionSpace):
        parts = [_distribution_of(part, action_dist, action_dist_kwargs, takes_masks) for part in action_space.parts]
        return HybridDistribution(action_space, parts, conditions, takes_masks=takes_masks)
    if action_dist != "gaussian" or action_dist_kwargs:
        of_sb3 = make_action_distribution(action_space, action_dist, action_dist_kwargs)
    if type(of_sb3) is DiagGaussianDistribution:
        of_sb3 = LeanDiagGaussianDistribution(of_sb3.action_dim)
    if takes_masks or isinstance(of_sb3, CategoricalDistribution | MultiCategoricalDistribution):
        # Without masks it acts as SB3's distribution
        return make_maskable_distribution(action_space)
    return of_sb3


def _distribution_of(
    part: ActionPart, action_dist: str, action_dist_kwargs: Mapping[str, Any] | None, takes_masks: bool
) -> Distribution:
    space = part.space
    if isinstance(space, spaces.MultiBinary) and not takes_masks:
        return BernoulliDistribution(math.prod(space.shape))
    if not isinstance(space, spaces.Box):
        return make_maskable_distribution(flattened_choices(space))
    try:
        made = make_action_distribution(space, action_dist, action_dist_kwargs)
    except ValueError as error:
        raise ValueError(f"part {part.path!r} of the action space: {error}") from error
    return LeanDiagGaussianDistribution(made.action_dim) if type(made) is DiagGaussianDistribution else made
