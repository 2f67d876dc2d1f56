"""From the policy's last hidden layer to actions in the environment's units, for each action distribution."""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.distributions import (
    BernoulliDistribution,
    CategoricalDistribution,
    DiagGaussianDistribution,
    Distribution,
    MultiCategoricalDistribution,
    StateDependentNoiseDistribution,
)
from torch import nn

from sb3_ppo_plus.export.action_layers import ActionLayer
from sb3_ppo_plus.policies.bounded_distributions import (
    BETA_EPSILON,
    BETA_MAX_CONCENTRATION,
    LOG_STD_MAX,
    LOG_STD_MIN,
    BetaDistribution,
    SquashedGaussianDistribution,
)
from sb3_ppo_plus.policies.lean_distributions import (
    LeanCategoricalDistribution,
    LeanDiagGaussianDistribution,
    LeanMultiCategoricalDistribution,
)
from sb3_ppo_plus.policies.masked_distributions import (
    MaskableBernoulliDistribution,
    MaskableCategoricalDistribution,
    MaskableMultiCategoricalDistribution,
    flattened_choices,
    mask_sizes,
)

GAMMA_TRIALS = 12
"""Candidates for each gamma variate. A trial is accepted with a probability of at least 0.95: all fail with 2e-16."""


@dataclass(frozen=True)
class Noise:
    """Random numbers that a stochastic export takes as an input.

    :param name: of the input
    :param distribution: "standard_normal", "gumbel" (location 0, scale 1) or "uniform" (from 0 to 1)
    :param shape: shape for one observation
    :param neutral: the number with which the action is the deterministic one; None: there is none
    """

    name: str
    distribution: str
    shape: tuple[int, ...]
    neutral: float | None


class Head(nn.Module):
    """Turns the policy's last hidden layer into actions.

    :param layer: the policy's last layer
    """

    def __init__(self, layer: ActionLayer) -> None:
        super().__init__()
        self.action_net = deepcopy(layer.net)
        self.action_shape = layer.space.shape or ()
        self.latent_dim = layer.latent_dim

    @property
    def noises(self) -> tuple[Noise, ...]:
        """The random numbers of a stochastic action."""
        return ()

    def forward(self, latent: th.Tensor, masks: th.Tensor | None, noise: Mapping[str, th.Tensor]) -> th.Tensor:
        """Choose actions.

        :param latent: shape (batch, latent_dim)
        :param masks: True where an action is valid, shape (batch, mask size); None: all are
        :param noise: the random numbers by name, shape (batch, *shape); empty: choose the deterministic actions
        :return: in the environment's units, within its bounds, shape (batch, *action shape)
        """
        raise NotImplementedError


class BoxHead(Head):
    """Actions of a Box.

    :param layer: the policy's last layer
    """

    low: th.Tensor
    high: th.Tensor

    def __init__(self, layer: ActionLayer) -> None:
        super().__init__(layer)
        space = layer.space
        assert isinstance(space, spaces.Box)
        # The dtype to which NumPy clips float32 actions
        self.dtype = _torch_dtype(np.result_type(np.float32, space.dtype))
        # A part of a hybrid action has the dtype of its space, as ``HybridDistribution.to_env`` gives it
        self.part_dtype = None if layer.path is None else _torch_dtype(space.dtype)
        if self.part_dtype is not None:
            self.dtype = th.float64
        self.register_buffer("low", th.as_tensor(space.low).to(self.dtype))
        self.register_buffer("high", th.as_tensor(space.high).to(self.dtype))

    @property
    def noises(self) -> tuple[Noise, ...]:
        """Standard normal numbers, one for each action dimension."""
        return (Noise("noise", "standard_normal", (int(np.prod(self.action_shape)),), 0.0),)

    def clipped(self, actions: th.Tensor) -> th.Tensor:
        """Clip actions to the bounds.

        :param actions: in the environment's units, shape (batch, action_dim)
        """
        actions = actions.to(self.dtype).reshape(-1, *self.action_shape)
        if self.part_dtype is None:
            return th.clamp(actions, self.low, self.high)
        if not self.part_dtype.is_floating_point:
            actions = actions.round()
        return th.clamp(actions, self.low, self.high).to(self.part_dtype)

    def between_bounds(self, fraction: th.Tensor) -> th.Tensor:
        """Map [0, 1] to the bounds, as ``BoundedDistribution.to_bounds`` does.

        :param fraction: float64, shape (batch, action_dim)
        """
        fraction = fraction.reshape(-1, *self.action_shape)
        return self.clipped(self.low.double() * (1.0 - fraction) + self.high.double() * fraction)


class GaussianHead(BoxHead):
    """SB3's diagonal Gaussian: the mean, clipped.

    :param layer: the policy's last layer
    """

    std: th.Tensor

    def __init__(self, layer: ActionLayer) -> None:
        super().__init__(layer)
        assert layer.log_std is not None
        self.register_buffer("std", self.standard_deviation(layer.log_std.cpu()))

    def standard_deviation(self, log_std: th.Tensor) -> th.Tensor:
        """Return the standard deviations, shape (action_dim,)."""
        return log_std.exp()

    def unbounded(self, latent: th.Tensor, noise: Mapping[str, th.Tensor]) -> th.Tensor:
        """Return the Gaussian's mean or a sample, shape (batch, action_dim)."""
        mean: th.Tensor = self.action_net(latent)
        return mean + self.std * noise["noise"] if noise else mean

    def forward(self, latent: th.Tensor, masks: th.Tensor | None, noise: Mapping[str, th.Tensor]) -> th.Tensor:
        """Choose actions, see :meth:`Head.forward`."""
        return self.clipped(self.unbounded(latent, noise))


class SquashedGaussianHead(GaussianHead):
    """Gaussian, squashed by tanh to the bounds."""

    def standard_deviation(self, log_std: th.Tensor) -> th.Tensor:
        """Return the standard deviations, shape (action_dim,)."""
        return log_std.clamp(LOG_STD_MIN, LOG_STD_MAX).exp()

    def forward(self, latent: th.Tensor, masks: th.Tensor | None, noise: Mapping[str, th.Tensor]) -> th.Tensor:
        """Choose actions, see :meth:`Head.forward`."""
        return self.between_bounds(0.5 * (1.0 + self.unbounded(latent, noise).double().tanh()))


class StateDependentNoiseHead(BoxHead):
    """gSDE: the mean, or with noise the mean plus latent features times a matrix of random numbers.

    :param layer: the policy's last layer
    """

    std: th.Tensor

    def __init__(self, layer: ActionLayer) -> None:
        super().__init__(layer)
        distribution = layer.distribution
        assert isinstance(distribution, StateDependentNoiseDistribution)
        assert layer.log_std is not None
        self.is_squashed = distribution.bijector is not None
        self.register_buffer("std", distribution.get_std(layer.log_std).cpu().clone())

    @property
    def noises(self) -> tuple[Noise, ...]:
        """Standard normal numbers, which make a matrix. gSDE keeps it for several steps."""
        return (Noise("noise", "standard_normal", tuple(self.std.shape), 0.0),)

    def forward(self, latent: th.Tensor, masks: th.Tensor | None, noise: Mapping[str, th.Tensor]) -> th.Tensor:
        """Choose actions, see :meth:`Head.forward`."""
        actions: th.Tensor = self.action_net(latent)
        if noise:
            actions = actions + (latent.unsqueeze(1) @ (self.std * noise["noise"])).squeeze(1)
        if not self.is_squashed:
            return self.clipped(actions)
        fraction = (actions.tanh() + 1.0).reshape(-1, *self.action_shape)
        return self.clipped(self.low + 0.5 * fraction * (self.high - self.low))


class BetaHead(BoxHead):
    """Beta: mean or mode, or with noise a sample.

    :param layer: the policy's last layer
    """

    def __init__(self, layer: ActionLayer) -> None:
        super().__init__(layer)
        assert isinstance(layer.distribution, BetaDistribution)
        self.deterministic = layer.distribution.deterministic
        self.action_dim = layer.distribution.action_dim

    @property
    def noises(self) -> tuple[Noise, ...]:
        """Candidates for two gamma variates per action dimension: normal numbers and uniform ones."""
        shape = (2 * self.action_dim, GAMMA_TRIALS)
        return Noise("noise", "standard_normal", shape, None), Noise("noise_uniform", "uniform", shape, None)

    def forward(self, latent: th.Tensor, masks: th.Tensor | None, noise: Mapping[str, th.Tensor]) -> th.Tensor:
        """Choose actions, see :meth:`Head.forward`."""
        # In float64 and without log1p, which ONNX lacks: small differences from 1 keep their digits
        outputs: th.Tensor = self.action_net(latent).double()
        above_one = outputs.clamp(min=0.0) + (1.0 + (-outputs.abs()).exp()).log()
        concentrations = (1.0 + above_one).clamp(max=BETA_MAX_CONCENTRATION)
        if noise:
            weights = _gamma(concentrations, noise["noise"].double(), noise["noise_uniform"].double())
        elif self.deterministic == "mean":
            weights = concentrations
        else:
            weights = concentrations - 1.0 + 1e-9
        of_alpha, of_beta = weights.chunk(2, dim=-1)
        fraction = (of_alpha / (of_alpha + of_beta)).float().clamp(BETA_EPSILON, 1.0 - BETA_EPSILON)
        return self.between_bounds(fraction.double())


def _gamma(shape: th.Tensor, normal: th.Tensor, uniform: th.Tensor) -> th.Tensor:
    """Draw gamma variates by rejection (Marsaglia and Tsang 2000, "A Simple Method for Generating Gamma Variables").

    :param shape: the gamma distributions' shapes, at least 1, shape (batch, n)
    :param normal: standard normal numbers, shape (batch, n, GAMMA_TRIALS)
    :param uniform: uniform numbers, of the same shape
    :return: the first accepted candidates, shape (batch, n)
    """
    d = (shape - 1.0 / 3.0).unsqueeze(-1)
    root = 1.0 + normal / (9.0 * d).sqrt()
    cubed = root**3
    # Where the root is not positive, any number will do in place of its logarithm
    log_cubed = 3.0 * root.clamp(min=1e-30).log()
    is_accepted = (root > 0) & (uniform.clamp(min=1e-300).log() < 0.5 * normal**2 + d * (1.0 - cubed + log_cubed))
    first = is_accepted.long().argmax(dim=-1, keepdim=True)
    # If none is accepted, the first is taken
    return (d * cubed.clamp(min=1e-30)).gather(-1, first).squeeze(-1)


class CategoricalHead(Head):
    """Discrete, MultiDiscrete and maskable MultiBinary actions: the most probable choices, or with noise samples.

    :param layer: the policy's last layer
    """

    start: th.Tensor

    def __init__(self, layer: ActionLayer) -> None:
        super().__init__(layer)
        self.sizes = mask_sizes(flattened_choices(layer.space))
        self.dtype = _torch_dtype(layer.space.dtype)
        # SB3 counts the choices of a space that is no part of another from 0
        start = 0 if layer.path is None else getattr(layer.space, "start", 0)
        self.counts_from_zero = not np.any(start)
        self.register_buffer("start", th.as_tensor(np.asarray(start, np.int64)))

    @property
    def noises(self) -> tuple[Noise, ...]:
        """Gumbel numbers, one for each choice: the largest sum with a logit is a sample (Gumbel 1954)."""
        return (Noise("noise", "gumbel", (sum(self.sizes),), 0.0),)

    def logits(self, latent: th.Tensor, masks: th.Tensor | None) -> tuple[th.Tensor, ...]:
        """Return the masked logits of each action, each of shape (batch, number of choices)."""
        logits: th.Tensor = self.action_net(latent)
        if masks is not None:
            logits = th.where(masks, logits, th.finfo(logits.dtype).min)
        return th.split(logits, self.sizes, dim=1)

    def forward(self, latent: th.Tensor, masks: th.Tensor | None, noise: Mapping[str, th.Tensor]) -> th.Tensor:
        """Choose actions, see :meth:`Head.forward`."""
        parts = self.logits(latent, masks)
        if noise:
            gumbels = th.split(noise["noise"], self.sizes, dim=1)
            parts = tuple(part + gumbel for part, gumbel in zip(parts, gumbels, strict=True))
        choices = th.stack([part.argmax(dim=1) for part in parts], dim=1)
        choices = choices.reshape(-1, *self.action_shape)
        return (choices if self.counts_from_zero else choices + self.start).to(self.dtype)


class BernoulliHead(Head):
    """SB3's MultiBinary actions: 1 where it is more probable than 0, or with noise samples.

    :param layer: the policy's last layer
    """

    def __init__(self, layer: ActionLayer) -> None:
        super().__init__(layer)
        self.dtype = _torch_dtype(layer.space.dtype)

    @property
    def noises(self) -> tuple[Noise, ...]:
        """Uniform numbers, one for each action."""
        return (Noise("noise", "uniform", (int(np.prod(self.action_shape)),), 0.5),)

    def logits(self, latent: th.Tensor, masks: th.Tensor | None) -> tuple[th.Tensor, ...]:
        """Return the logits of 0 and 1 for each action, each of shape (batch, 2)."""
        logits: th.Tensor = self.action_net(latent)
        return tuple(th.stack([th.zeros_like(part), part], dim=1) for part in logits.unbind(dim=1))

    def forward(self, latent: th.Tensor, masks: th.Tensor | None, noise: Mapping[str, th.Tensor]) -> th.Tensor:
        """Choose actions, see :meth:`Head.forward`."""
        logits: th.Tensor = self.action_net(latent)
        is_one = noise["noise"] < logits.sigmoid() if noise else logits > 0
        return is_one.reshape(-1, *self.action_shape).to(self.dtype)


HEADS: dict[type[Distribution], type[Head]] = {
    DiagGaussianDistribution: GaussianHead,
    LeanDiagGaussianDistribution: GaussianHead,
    SquashedGaussianDistribution: SquashedGaussianHead,
    StateDependentNoiseDistribution: StateDependentNoiseHead,
    BetaDistribution: BetaHead,
    CategoricalDistribution: CategoricalHead,
    LeanCategoricalDistribution: CategoricalHead,
    MaskableCategoricalDistribution: CategoricalHead,
    MultiCategoricalDistribution: CategoricalHead,
    LeanMultiCategoricalDistribution: CategoricalHead,
    MaskableMultiCategoricalDistribution: CategoricalHead,
    MaskableBernoulliDistribution: CategoricalHead,
    BernoulliDistribution: BernoulliHead,
}
"""The head of each action distribution that can be exported."""


def make_head(layer: ActionLayer) -> Head:
    """Build the head of a layer.

    :param layer: the layer
    :raises ValueError: for an action distribution that is not known
    """
    kind = type(layer.distribution)
    if kind not in HEADS:
        where = "" if layer.path is None else f" of the part {layer.path!r}"
        raise ValueError(
            f"export_policy does not know the action distribution {kind.__name__}{where}; known: "
            f"{', '.join(known.__name__ for known in HEADS)}. Enter a Head for it in sb3_ppo_plus.export.heads.HEADS"
        )
    return HEADS[kind](layer)


def _torch_dtype(dtype: np.dtype[Any] | type[Any] | None) -> th.dtype:
    return th.as_tensor(np.zeros(0, dtype)).dtype
