"""What of a policy makes an action: one layer with its distribution, or one for each part of a hybrid action."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch as th
from gymnasium import spaces
from stable_baselines3.common.distributions import Distribution
from torch import nn

from sb3_ppo_plus.policies.actor_critic import ActorCriticPlusPolicy
from sb3_ppo_plus.policies.flat_actions import FlatActionSpace
from sb3_ppo_plus.policies.hybrid_distribution import HybridDistribution


class ActionLayer(NamedTuple):
    """A policy's last layer, and what becomes of its outputs.

    :param net: the layer
    :param distribution: the action distribution
    :param space: the action space, or a part of it
    :param log_std: log standard deviation of the distribution; None: it has none
    :param latent_dim: number of the layer's inputs
    :param path: way to the part inside a Tuple or Dict, see ``flat_actions``; None: the action space is neither
    """

    net: nn.Module
    distribution: Distribution
    space: spaces.Space[Any]
    log_std: th.Tensor | None
    latent_dim: int
    path: str | None


def layers_of(policy: ActorCriticPlusPolicy) -> list[ActionLayer]:
    """Return the layers that make a policy's actions, in the order of the parts of its action space.

    :param policy: the policy
    """
    latent_dim: int = policy.mlp_extractor.latent_dim_pi
    log_std = getattr(policy, "log_std", None)
    # No graph of gradients: the layers are copied
    log_std = log_std.detach() if isinstance(log_std, th.Tensor) else None
    distribution, space = policy.action_dist, policy.action_space
    if not isinstance(distribution, HybridDistribution) or not isinstance(space, FlatActionSpace):
        return [ActionLayer(policy.action_net, distribution, space, log_std, latent_dim, None)]
    nets: Any = policy.action_net
    rows = zip(nets, distribution.parts, space.parts, distribution.log_stds_of_parts(log_std), strict=True)
    return [
        ActionLayer(net, part, of_space.space, of_part, latent_dim, of_space.path)
        for net, part, of_space, of_part in rows
    ]
