"""Action distributions for bounded Box spaces.

They subclass SB3's ``DiagGaussianDistribution``, because SB3's ``ActorCriticPolicy`` accepts only classes it knows.

The policy and the rollout buffer hold a *stored action*, whose density is exact: the squashed Gaussian's u before the
tanh, or Beta's x in (0, 1). ``to_bounds`` turns it into the environment's units. Densities are those of the action
before the affine map to the bounds, because the map's constant Jacobian cancels in every probability ratio.
"""

import inspect
import math
from abc import abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Self

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.distributions import (
    DiagGaussianDistribution,
    Distribution,
    make_proba_distribution,
    sum_independent_dims,
)
from stable_baselines3.common.preprocessing import get_action_dim
from torch import nn
from torch.distributions import Beta, Normal
from torch.nn import functional as F

from sb3_ppo_plus.argument_checks import did_you_mean, integer_of_at_least

LOG_STD_MIN, LOG_STD_MAX = -5.0, 2.0
"""Range of the squashed Gaussian's log standard deviation; below it, float32 log-probabilities lose precision."""

BETA_EPSILON = 1e-6
"""Beta's stored actions stay this far inside (0, 1): its log density is infinite at 0 and 1."""

BETA_MAX_CONCENTRATION = 1e4
"""Upper bound of alpha and beta: the standard deviation is then 1/283 of the range, about that of ``LOG_STD_MIN``."""


class BoundedDistribution(DiagGaussianDistribution):
    """A distribution whose actions fill a bounded box.

    :param action_dim: number of action dimensions
    """

    @abstractmethod
    def to_unit_interval(self, actions: np.ndarray) -> np.ndarray:
        """Map stored actions, elementwise, to [0, 1].

        :param actions: stored actions, any shape
        :return: float64, in the shape of ``actions``
        """

    def to_unit_interval_on_device(self, actions: th.Tensor) -> th.Tensor:
        """Do the work of :meth:`to_unit_interval` on tensors; without a method of a subclass, by way of an array.

        :param actions: stored actions, any shape
        :return: in the shape of ``actions``
        """
        return th.from_numpy(self.to_unit_interval(actions.cpu().numpy())).to(actions.device)

    def to_bounds(self, actions: np.ndarray, low: np.ndarray, high: np.ndarray) -> np.ndarray:
        """Map stored actions to the environment's units.

        :param actions: stored actions, shape (n_envs, *action_space.shape)
        :param low: the space's finite lower bounds, shape action_space.shape
        :param high: the space's finite upper bounds, shape action_space.shape
        :return: actions within [low, high], in the shape of ``actions`` and the dtype of ``low``
        """
        fraction = self.to_unit_interval(actions)
        # Two products, because high - low would overflow for the widest bounds
        scaled = low.astype(np.float64) * (1.0 - fraction) + high.astype(np.float64) * fraction
        # Rounding to the space's dtype may step over a bound
        bounded: np.ndarray = np.clip(scaled.astype(low.dtype), low, high)
        return bounded


class SquashedGaussianDistribution(BoundedDistribution):
    """Gaussian u with a state-independent standard deviation, squashed by tanh; the stored action is u.

    ``log_std`` is clamped to [``LOG_STD_MIN``, ``LOG_STD_MAX``] where it is used. Densities are those of tanh(u) in
    (-1, 1)^n (Haarnoja et al. 2018, Soft Actor-Critic, equation 21).

    :param action_dim: number of action dimensions
    :param entropy_samples: samples per entropy estimate, at least 1
    :raises ValueError: if ``entropy_samples`` is not an integer of at least 1
    """

    log_prob_depends_on_batch_size = True
    """One row and a batch round to other log-probabilities."""

    def __init__(self, action_dim: int, entropy_samples: int = 1) -> None:
        super().__init__(action_dim)
        self.entropy_samples = integer_of_at_least(1, "entropy_samples", entropy_samples)

    def proba_distribution_net(self, latent_dim: int, log_std_init: float = 0.0) -> tuple[nn.Module, nn.Parameter]:
        """Create the layer for the mean of u and the parameter for its log standard deviation.

        :param latent_dim: size of the policy net's last layer
        :param log_std_init: initial log standard deviation, in [``LOG_STD_MIN``, ``LOG_STD_MAX``]
        :return: a linear layer with action_dim outputs, and log_std of shape (action_dim,)
        :raises ValueError: if ``log_std_init`` is outside that range, where the clamp would leave it no gradient
        """
        if not LOG_STD_MIN <= log_std_init <= LOG_STD_MAX:
            raise ValueError(
                f'log_std_init must be in [{LOG_STD_MIN:g}, {LOG_STD_MAX:g}] with action_dist="squashed_gaussian", '
                f"got {log_std_init!r}"
            )
        return super().proba_distribution_net(latent_dim, log_std_init)

    def proba_distribution(self, mean_actions: th.Tensor, log_std: th.Tensor) -> Self:
        """Set the parameters.

        :param mean_actions: mean of u, shape (batch, action_dim)
        :param log_std: log standard deviation of u, shape (action_dim,) or (batch, action_dim)
        :return: self
        """
        mean = _at_least_float32(mean_actions)
        std = _at_least_float32(log_std).clamp(LOG_STD_MIN, LOG_STD_MAX).exp()
        self.distribution = Normal(mean, std.expand_as(mean), validate_args=False)
        return self

    def log_prob(self, actions: th.Tensor) -> th.Tensor:
        """Return the log density of tanh(u) at stored actions.

        :param actions: u, any real numbers, shape (batch, action_dim)
        :return: shape (batch,)
        """
        u = _at_least_float32(actions)
        return super().log_prob(u) - sum_independent_dims(_log_tanh_slope(u))

    def entropy(self, noise: th.Tensor | None = None) -> th.Tensor:
        """Return an unbiased estimate of the entropy of tanh(u), differentiable in mean and log_std.

        It is the entropy of u plus E[log(1 - tanh(u)^2)], where reparametrised samples estimate the second term.

        :param noise: standard normal numbers of shape (entropy_samples, batch, action_dim), see :meth:`entropy_noise`;
            None: they are drawn here
        :return: shape (batch,)
        """
        mean, std = self.distribution.loc, self.distribution.scale
        if noise is None:
            noise = self.entropy_noise(mean.shape[0], mean.device)
        slope = _log_tanh_slope(mean + std * noise).mean(dim=0)
        gaussian = self.distribution.entropy()  # type: ignore[no-untyped-call]  # torch leaves it untyped
        return sum_independent_dims(gaussian + slope)

    def entropy_noise(self, batch_size: int, device: th.device | str = "cpu") -> th.Tensor:
        """Draw the noise of one entropy estimate.

        :param batch_size: number of states
        :param device: device of the result
        :return: standard normal float32 numbers, shape (entropy_samples, batch_size, action_dim)
        """
        return th.randn(self.entropy_samples, batch_size, self.action_dim, device=device)

    def normalized_mode(self) -> th.Tensor:
        """Return the tanh of :meth:`mode`: the action in units in which the bounds are -1 and 1.

        :return: shape (batch, action_dim)
        """
        return th.tanh(self.mode())

    def to_unit_interval(self, actions: np.ndarray) -> np.ndarray:
        """Map u to (1 + tanh(u)) / 2.

        :param actions: u, any shape
        :return: float64, in the shape of ``actions``
        """
        return 0.5 * (1.0 + np.tanh(actions.astype(np.float64)))

    def to_unit_interval_on_device(self, actions: th.Tensor) -> th.Tensor:
        """Map u to (1 + tanh(u)) / 2, see :meth:`BoundedDistribution.to_unit_interval_on_device`."""
        return 0.5 * (1.0 + actions.double().tanh())


class BetaDistribution(BoundedDistribution):
    """Independent Beta distributions with alpha, beta = 1 + softplus(net outputs); the stored action is x in (0, 1).

    Both parameters are above 1, so each density has a single peak (Chou et al. 2017, Improving Stochastic Policy
    Gradients ... using the Beta Distribution, section 4). They are at most ``BETA_MAX_CONCENTRATION``. ``log_prob``
    and ``entropy`` are small differences of large lgamma values, so they are computed in float64. In float32 they
    would be wrong by 1e-3 from alpha = 1000, and by 1e-2 from 10000.

    :param action_dim: number of action dimensions
    :param deterministic: deterministic action, "mean" or "mode"
    :raises ValueError: for another ``deterministic``
    """

    distribution: Beta  # type: ignore[assignment]  # SB3 declares a Normal, but only uses what Beta has too

    def __init__(self, action_dim: int, deterministic: str = "mean") -> None:
        super().__init__(action_dim)
        if deterministic not in ("mean", "mode"):
            raise ValueError(f'deterministic must be "mean" or "mode", got {deterministic!r}')
        self.deterministic = deterministic

    def proba_distribution_net(  # type: ignore[override]  # SB3 declares that log_std is returned; Beta has none
        self, latent_dim: int, log_std_init: float = 0.0
    ) -> tuple[nn.Module, None]:
        """Create the layer whose outputs become alpha and beta.

        :param latent_dim: size of the policy net's last layer
        :param log_std_init: not used; SB3's policy passes it
        :return: a linear layer with 2 * action_dim outputs, and None in place of log_std
        """
        return nn.Linear(latent_dim, 2 * self.action_dim), None

    def proba_distribution(self, mean_actions: th.Tensor, log_std: th.Tensor | None = None) -> Self:
        """Set the parameters.

        :param mean_actions: the net's outputs, shape (batch, 2 * action_dim): alpha's, then beta's
        :param log_std: not used; SB3's policy passes it
        :return: self
        """
        concentrations = (1.0 + F.softplus(mean_actions.double())).clamp(max=BETA_MAX_CONCENTRATION)
        alpha, beta = concentrations.chunk(2, dim=-1)
        self.distribution = Beta(alpha, beta, validate_args=False)
        return self

    def log_prob(self, actions: th.Tensor) -> th.Tensor:
        """Return the log density at stored actions.

        :param actions: x, shape (batch, action_dim); clamped to the range of samples
        :return: float32, shape (batch,)
        """
        return super().log_prob(_inside_unit_interval(actions).double()).float()

    def entropy(self) -> th.Tensor:
        """Return the exact entropy of x.

        :return: float32, shape (batch,)
        """
        entropy = self.distribution.entropy()  # type: ignore[no-untyped-call]  # torch leaves it untyped
        return sum_independent_dims(entropy).float()

    def sample(self) -> th.Tensor:
        """Draw reparametrised actions.

        :return: float32 in [``BETA_EPSILON``, 1 - ``BETA_EPSILON``], shape (batch, action_dim)
        """
        return _inside_unit_interval(self.distribution.rsample())

    def mode(self) -> th.Tensor:
        """Return the mean or the mode, as ``deterministic`` says. As alpha and beta tend to 1, the mode tends to 1/2.

        :return: float32 in [``BETA_EPSILON``, 1 - ``BETA_EPSILON``], shape (batch, action_dim)
        """
        if self.deterministic == "mean":
            return _inside_unit_interval(self.distribution.mean)
        # Without the small number, the mode of the uniform distribution would be 0/0
        above_alpha = self.distribution.concentration1 - 1.0 + 1e-9
        above_beta = self.distribution.concentration0 - 1.0 + 1e-9
        return _inside_unit_interval(above_alpha / (above_alpha + above_beta))

    def normalized_mode(self) -> th.Tensor:
        """Return :meth:`mode` in units in which the bounds are -1 and 1.

        :return: float32, shape (batch, action_dim)
        """
        return 2.0 * self.mode() - 1.0

    def to_unit_interval(self, actions: np.ndarray) -> np.ndarray:
        """Return x, clipped to [0, 1].

        :param actions: x, any shape
        :return: float64, in the shape of ``actions``
        """
        return np.clip(actions.astype(np.float64), 0.0, 1.0)

    def to_unit_interval_on_device(self, actions: th.Tensor) -> th.Tensor:
        """Return x, clipped to [0, 1], see :meth:`BoundedDistribution.to_unit_interval_on_device`."""
        return actions.double().clamp(0.0, 1.0)


def _at_least_float32(tensor: th.Tensor) -> th.Tensor:
    """Convert half precision, which autocast makes, to float32."""
    return tensor.to(th.promote_types(tensor.dtype, th.float32))


def _log_tanh_slope(u: th.Tensor) -> th.Tensor:
    """Return log(1 - tanh(u)^2), computed so that it neither overflows nor becomes log(0)."""
    return 2.0 * (math.log(2.0) - u - F.softplus(-2.0 * u))


def _inside_unit_interval(x: th.Tensor) -> th.Tensor:
    """Return x in float32, the precision of stored actions, at least ``BETA_EPSILON`` away from 0 and 1."""
    return x.float().clamp(BETA_EPSILON, 1.0 - BETA_EPSILON)


ACTION_DISTRIBUTIONS: dict[str, type[DiagGaussianDistribution]] = {
    "gaussian": DiagGaussianDistribution,
    "squashed_gaussian": SquashedGaussianDistribution,
    "beta": BetaDistribution,
}
"""The names that ``action_dist`` may have. All but SB3's Gaussian are subclasses of :class:`BoundedDistribution`."""


def make_action_distribution(
    action_space: spaces.Space[Any], action_dist: str = "gaussian", action_dist_kwargs: Mapping[str, Any] | None = None
) -> Distribution:
    """Build the action distribution with a given name.

    :param action_space: the action space
    :param action_dist: a key of ``ACTION_DISTRIBUTIONS``. "gaussian" is SB3's choice for the space: the diagonal
        Gaussian for a Box. The others need a Box with finite bounds
    :param action_dist_kwargs: keyword arguments of the distribution's constructor
    :return: the distribution
    :raises ValueError: for an unknown name, or a space that does not fit the distribution
    :raises TypeError: for an unknown keyword argument, or a class in ``ACTION_DISTRIBUTIONS`` that cannot be there
    """
    kwargs = dict(action_dist_kwargs or {})
    if not isinstance(action_dist, str) or action_dist not in ACTION_DISTRIBUTIONS:
        names = ", ".join(f'"{name}"' for name in ACTION_DISTRIBUTIONS)
        question = did_you_mean(action_dist, ACTION_DISTRIBUTIONS)
        raise ValueError(f"action_dist must be one of {names}, got {action_dist!r}{question}")
    distribution_class = ACTION_DISTRIBUTIONS[action_dist]
    allowed = [name for name in inspect.signature(distribution_class).parameters if name != "action_dim"]
    unknown = [name for name in kwargs if name not in allowed]
    if unknown:
        raise TypeError(
            f'action_dist_kwargs of action_dist="{action_dist}" may hold {", ".join(allowed) or "nothing"}, '
            f"got {', '.join(map(repr, unknown))}{did_you_mean(unknown[0], allowed)}"
        )
    if distribution_class is DiagGaussianDistribution:
        return make_proba_distribution(action_space)
    if not issubclass(distribution_class, BoundedDistribution):
        raise TypeError(
            f'action_dist="{action_dist}": {distribution_class.__name__} must be a subclass of BoundedDistribution'
        )
    _check_bounded(action_space, action_dist)
    return distribution_class(get_action_dim(action_space), **kwargs)


@contextmanager
def explaining_infinite_bounds(algorithm: object, policy_kwargs: Mapping[str, Any] | None) -> Iterator[None]:
    """Replace SB3's assertion about bounds by the error of :func:`make_action_distribution`, which names a remedy.

    :param algorithm: the algorithm; SB3's constructor sets its ``action_space`` before it checks the bounds
    :param policy_kwargs: PPOPlus's argument
    :raises ValueError: if the chosen distribution does not fit a Box
    """
    try:
        yield
    except AssertionError:
        _check_action_distribution(getattr(algorithm, "action_space", None), policy_kwargs or {})
        raise


def _check_action_distribution(action_space: spaces.Space[Any] | None, policy_kwargs: Mapping[str, Any]) -> None:
    if isinstance(action_space, spaces.Box) and "action_dist" in policy_kwargs:
        make_action_distribution(action_space, policy_kwargs["action_dist"], policy_kwargs.get("action_dist_kwargs"))


def _check_bounded(action_space: spaces.Space[Any], action_dist: str) -> None:
    """Raise ValueError unless the space is a Box of real numbers with finite bounds."""
    if not isinstance(action_space, spaces.Box) or not np.issubdtype(action_space.dtype, np.floating):
        raise ValueError(
            f'action_dist="{action_dist}" needs a Box action space of floating-point numbers with finite bounds, '
            f'got {action_space}; use action_dist="gaussian", which leaves every other space to SB3\'s own distribution'
        )
    if not (np.isfinite(action_space.low).all() and np.isfinite(action_space.high).all()):
        raise ValueError(
            f'action_dist="{action_dist}" needs finite bounds, got {action_space}; declare the range that the '
            "environment really uses, e.g. gymnasium.wrappers.TransformAction(env, lambda action: action, "
            'gymnasium.spaces.Box(low, high)), or use action_dist="gaussian"'
        )
