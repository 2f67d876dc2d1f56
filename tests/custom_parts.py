"""Policies, features extractors and rollout buffers of the kinds that users write for SB3's PPO."""

import torch as th
from stable_baselines3.common.buffers import DictRolloutBuffer, RolloutBuffer
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.preprocessing import get_flattened_obs_dim
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from torch import nn


class TwoHeads(nn.Module):
    """Actor and critic of different widths and activations."""

    latent_dim_pi, latent_dim_vf = 6, 5

    def __init__(self, features_dim):
        super().__init__()
        self.pi = nn.Sequential(nn.Linear(features_dim, 6), nn.ReLU())
        self.vf = nn.Sequential(nn.Linear(features_dim, 5), nn.Tanh())

    def forward(self, features):
        return self.forward_actor(features), self.forward_critic(features)

    def forward_actor(self, features):
        return self.pi(features)

    def forward_critic(self, features):
        return self.vf(features)


class CustomPolicy(ActorCriticPolicy):
    """SB3's documentation shows such a one."""

    def _build_mlp_extractor(self):
        self.mlp_extractor = TwoHeads(self.features_dim)


class NoisyExtractor(BaseFeaturesExtractor):
    """Differs between training and evaluation mode, by dropout and batch norm."""

    def __init__(self, observation_space):
        super().__init__(observation_space, 8)
        n_features = get_flattened_obs_dim(observation_space)
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(n_features, 8), nn.BatchNorm1d(8), nn.Dropout(0.2))

    def forward(self, observations):
        return self.net(observations)


class SpectralExtractor(BaseFeaturesExtractor):
    """Updates a state at each call in training mode: the vectors of the power iteration."""

    def __init__(self, observation_space):
        super().__init__(observation_space, 8)
        n_features = get_flattened_obs_dim(observation_space)
        self.net = nn.Sequential(nn.Flatten(), nn.utils.parametrizations.spectral_norm(nn.Linear(n_features, 8)))

    def forward(self, observations):
        return self.net(observations)


class PartlyFrozenPolicy(CustomPolicy):
    """A parameter needs no gradient, and the loss does not depend on another."""

    def _build(self, lr_schedule):
        super()._build(lr_schedule)
        self.mlp_extractor.pi[0].weight.requires_grad_(False)
        self.unused = nn.Parameter(th.zeros(2))
        self.optimizer = self.optimizer_class(self.parameters(), lr=lr_schedule(1), **self.optimizer_kwargs)


class SometimesUsed(ActorCriticPolicy):
    """A parameter on which the loss depends in some minibatches only."""

    def _build(self, lr_schedule):
        super()._build(lr_schedule)
        self.extra = nn.Parameter(th.zeros(1))
        self.optimizer = self.optimizer_class(self.parameters(), lr=lr_schedule(1), **self.optimizer_kwargs)

    def evaluate_actions(self, obs, actions):
        values, log_prob, entropy = super().evaluate_actions(obs, actions)
        return (values + self.extra if obs[0, 0] > 0 else values), log_prob, entropy


class HalfOptimized(ActorCriticPolicy):
    """The optimiser has some of the parameters; the gradients of the others add up and count in the norm."""

    def _build(self, lr_schedule):
        super()._build(lr_schedule)
        self.optimizer = self.optimizer_class(self.mlp_extractor.parameters(), lr=lr_schedule(1))


class TwoGroups(ActorCriticPolicy):
    """Settings of their own per group, but for the learning rate, which SB3 sets for all."""

    def _build(self, lr_schedule):
        super()._build(lr_schedule)
        critic = [*self.mlp_extractor.value_net.parameters(), *self.value_net.parameters()]
        actor = [parameter for parameter in self.parameters() if all(parameter is not other for other in critic)]
        groups = [{"params": actor, "weight_decay": 0.1}, {"params": critic, "betas": (0.5, 0.9)}]
        self.optimizer = self.optimizer_class(groups, lr=lr_schedule(1), **self.optimizer_kwargs)


class UnshuffledBuffer(RolloutBuffer):
    """Own order of minibatches, half of the rollout only."""

    def get(self, batch_size=None):
        samples = super().get(None)
        whole = next(samples)
        for start in range(0, len(whole.returns) // 2, batch_size):
            yield type(whole)(*(field[start : start + batch_size] for field in whole))


class ScaledAdvantages(RolloutBuffer):
    """A constructor argument of its own, and its own advantages."""

    def __init__(self, *args, scale=1.0, **kwargs):
        self.scale = scale
        super().__init__(*args, **kwargs)

    def compute_returns_and_advantage(self, last_values, dones):
        super().compute_returns_and_advantage(last_values, dones)
        self.advantages *= self.scale


class ScaledDictAdvantages(DictRolloutBuffer):
    """Its own advantages, of Dict observations."""

    def compute_returns_and_advantage(self, last_values, dones):
        super().compute_returns_and_advantage(last_values, dones)
        self.advantages *= 3.0
