"""The actor-critic policies."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from copy import copy
from typing import Any

import numpy as np
import torch as th
from gymnasium import spaces
from sb3_contrib.common.maskable.policies import (
    MaskableActorCriticCnnPolicy,
    MaskableActorCriticPolicy,
    MaskableMultiInputActorCriticPolicy,
)
from sb3_contrib.common.recurrent.policies import (
    RecurrentActorCriticCnnPolicy,
    RecurrentActorCriticPolicy,
    RecurrentMultiInputActorCriticPolicy,
)
from sb3_contrib.common.recurrent.type_aliases import RNNStates
from stable_baselines3.common.distributions import (
    DiagGaussianDistribution,
    Distribution,
    StateDependentNoiseDistribution,
)
from stable_baselines3.common.policies import (
    ActorCriticCnnPolicy,
    ActorCriticPolicy,
    BasePolicy,
    MultiInputActorCriticPolicy,
)
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor, CombinedExtractor, FlattenExtractor, NatureCNN
from stable_baselines3.common.type_aliases import PyTorchObs, Schedule

from sb3_ppo_plus.extractors import ImpalaCNN
from sb3_ppo_plus.policies.asymmetric import HeadKeys, sharing_of
from sb3_ppo_plus.policies.bounded_distributions import BoundedDistribution
from sb3_ppo_plus.policies.hybrid_distribution import choose_action_distribution
from sb3_ppo_plus.policies.hybrid_policy import HybridPolicy
from sb3_ppo_plus.policies.lean_distributions import follow_replaced_methods
from sb3_ppo_plus.policies.mask_layout import masks_of_envs
from sb3_ppo_plus.policies.masked_distributions import apply_masks
from sb3_ppo_plus.policies.masks import has_mask_key, split_off_mask
from sb3_ppo_plus.policies.memory import State
from sb3_ppo_plus.policies.net_arch import resolve_net_arch
from sb3_ppo_plus.policies.remembering import CONTRIB_KWARGS, MemoryOptions
from sb3_ppo_plus.policies.state_use import state_use_of

MaybeMasks = th.Tensor | np.ndarray | None


class ActorCriticPlusPolicy(HybridPolicy):
    """SB3's ``ActorCriticPolicy`` with more action distributions, and with heads that stay in float32 under autocast.

    :param observation_space: observation space
    :param action_space: action space
    :param lr_schedule: learning rate as a function of progress_remaining
    :param action_dist: distribution of Box actions and Box parts: "gaussian" (SB3's, or gSDE with ``use_sde``),
        "squashed_gaussian" or "beta"
    :param action_dist_kwargs: keyword arguments of that distribution, e.g. ``{"deterministic": "mode"}`` for "beta"
    :param action_masking: True: the policy is built for masks. MultiBinary actions have sb3-contrib's distribution, and
        the observation key ``action_mask`` holds masks and is no feature. PPOPlus sets this
    :param memory: a memory over time between the features and the heads: "lstm", "gru" or "gtrxl"; None: no memory
    :param memory_kwargs: see :class:`MemoryOptions`. The arguments of sb3-contrib's recurrent policies work too
    :param actor_keys: the keys of Dict observations that the actor sees; None: all. See :class:`AsymmetricPolicy`
    :param critic_keys: the keys of Dict observations that the critic sees; None: all
    :param features_extractor_class: SB3's parameter; None: ``default_features_extractor_class``
    :param kwargs: SB3's other parameters, and those of :class:`HybridPolicy`
    :raises ValueError: for a value that is not allowed, or an ``action_dist`` that does not fit the action space
    """

    default_features_extractor_class: type[BaseFeaturesExtractor] = FlattenExtractor
    default_memory: str | None = None

    def __init__(
        self,
        observation_space: spaces.Space[Any],
        action_space: spaces.Space[Any],
        lr_schedule: Schedule,
        *,
        action_dist: str = "gaussian",
        action_dist_kwargs: dict[str, Any] | None = None,
        action_masking: bool = False,
        memory: str | None = None,
        memory_kwargs: dict[str, Any] | None = None,
        actor_keys: Sequence[str] | None = None,
        critic_keys: Sequence[str] | None = None,
        features_extractor_class: type[BaseFeaturesExtractor] | None = None,
        **kwargs: Any,
    ) -> None:
        if "net_arch" in kwargs:
            kwargs["net_arch"] = resolve_net_arch(kwargs["net_arch"])
        contrib_kwargs = {name: kwargs.pop(name) for name in CONTRIB_KWARGS if name in kwargs}
        self.memory_options = MemoryOptions.resolve(memory or self.default_memory, memory_kwargs, contrib_kwargs)
        self.action_masking = action_masking
        self.has_mask_key = action_masking and has_mask_key(observation_space)
        self.head_keys = HeadKeys.resolve(observation_space, actor_keys, critic_keys, has_mask_key=self.has_mask_key)
        kwargs |= sharing_of(self.head_keys, kwargs)
        self._predict_context: dict[str, Any] = {}
        extractor_class = features_extractor_class or self.default_features_extractor_class
        if issubclass(extractor_class, ImpalaCNN):
            # SB3 does this for NatureCNN only: no hidden layers follow it, and unscaled images are not checked
            kwargs.setdefault("net_arch", [])
            if not kwargs.get("normalize_images", True):
                extractor_kwargs = kwargs.get("features_extractor_kwargs") or {}
                kwargs["features_extractor_kwargs"] = {**extractor_kwargs, "normalized_image": True}
        if action_dist != "gaussian" and kwargs.get("use_sde", False):
            raise ValueError(f"use_sde=True needs action_dist='gaussian', got action_dist={action_dist!r}")
        self.action_dist_name = action_dist
        self.action_dist_kwargs = action_dist_kwargs
        super().__init__(
            observation_space,
            action_space,
            lr_schedule,
            features_extractor_class=extractor_class,
            **kwargs,
        )
        self._build_memory(lr_schedule)

    def _build(self, lr_schedule: Schedule) -> None:
        self.action_dist = choose_action_distribution(
            *(self.action_space, self.action_dist, self.action_dist_name, self.action_dist_kwargs),
            takes_masks=self.action_masking,
            used_parts=self.used_parts,
        )
        super()._build(lr_schedule)

    def _get_constructor_parameters(self) -> dict[str, Any]:
        return {
            **super()._get_constructor_parameters(),
            "action_dist": self.action_dist_name,
            "action_dist_kwargs": self.action_dist_kwargs,
            "action_masking": self.action_masking,
        }

    @property
    def squash_output(self) -> bool:
        """Whether stored actions are not in the env's units, so that SB3 calls :meth:`unscale_action` on them."""
        return super().squash_output or isinstance(self.action_dist, BoundedDistribution)

    def unscale_action(self, scaled_action: np.ndarray) -> np.ndarray:
        """Convert stored actions to the env's units, within its bounds. SB3's method may round beyond them.

        :param scaled_action: stored actions, shape (n_envs, *action shape): in [-1, 1] for gSDE with ``squash_output``,
            in (0, 1) for "beta", any real number (before the tanh) for "squashed_gaussian"
        """
        assert isinstance(self.action_space, spaces.Box)
        low, high = self.action_space.low, self.action_space.high
        if isinstance(self.action_dist, BoundedDistribution):
            return self.action_dist.to_bounds(scaled_action, low, high)
        actions: np.ndarray = np.clip(super().unscale_action(scaled_action), low, high)
        return actions

    def forward(
        self,
        obs: PyTorchObs,
        deterministic: bool = False,
        action_masks: th.Tensor | None = None,
        states: RNNStates | None = None,
        episode_starts: th.Tensor | None = None,
    ) -> tuple[th.Tensor, th.Tensor, th.Tensor]:
        """Choose actions and predict values; matches SB3's ``ActorCriticPolicy.forward``.

        :param obs: observations, shape (batch, *observation shape), or a dict of them
        :param deterministic: choose the most probable actions instead of samples
        :param action_masks: True where an action is valid, shape (batch, mask size); None: all actions are valid
        :param states: the memory's states before the step; None: each observation begins an episode
        :param episode_starts: True where the states are reset before the step, shape (batch,); None: nowhere
        :return: stored actions (batch, *action shape), values (batch, 1), log probability (batch,)
        """
        return self.forward_step(obs, deterministic, action_masks, states, episode_starts)[:3]

    def forward_step(
        self,
        obs: PyTorchObs,
        deterministic: bool = False,
        action_masks: th.Tensor | None = None,
        states: RNNStates | None = None,
        episode_starts: th.Tensor | None = None,
    ) -> tuple[th.Tensor, th.Tensor, th.Tensor, RNNStates | None]:
        """Choose actions and predict values, see :meth:`forward`; return the memory's states after the step too."""
        values, distribution, states = self._evaluate(obs, action_masks, states, episode_starts)
        actions = distribution.get_actions(deterministic=deterministic)
        stored = actions.reshape(-1, *(self.action_space.shape or ()))
        return stored, values, distribution.log_prob(actions), states

    def evaluate_actions(
        self,
        obs: PyTorchObs,
        actions: th.Tensor,
        action_masks: th.Tensor | None = None,
        states: RNNStates | None = None,
        episode_starts: th.Tensor | None = None,
    ) -> tuple[th.Tensor, th.Tensor, th.Tensor | None]:
        """Evaluate stored actions under the current policy; matches SB3's ``ActorCriticPolicy.evaluate_actions``.

        With a memory the batch may be sequences of equal length, one after another. ``states`` says how many.

        :param obs: observations, shape (batch, *observation shape), or a dict of them
        :param actions: stored actions, shape (batch, action dim), or (batch,) for Discrete
        :param action_masks: True where an action is valid, shape (batch, mask size); None: all actions are valid
        :param states: the memory's states before each sequence; None: each observation begins an episode
        :param episode_starts: True where the states are reset before the step, shape (batch,); None: nowhere
        :return: values (batch, 1), log probability (batch,), entropy (batch,) or None where there is no closed form;
            always in float32, even under autocast
        """
        values, distribution, _ = self._evaluate(obs, action_masks, states, episode_starts)
        with _without_autocast(values.device):
            return values, distribution.log_prob(actions), distribution.entropy()

    def remembering_distribution(
        self, obs: PyTorchObs, states: RNNStates, episode_starts: th.Tensor, action_masks: MaybeMasks = None
    ) -> tuple[th.Tensor, Distribution, RNNStates | None]:
        """Return :meth:`value_and_distribution` and the states after a step; parameters as in :meth:`forward_step`."""
        return self._evaluate(obs, action_masks, states, episode_starts)

    def value_and_distribution(
        self, obs: PyTorchObs, action_masks: MaybeMasks = None
    ) -> tuple[th.Tensor, Distribution]:
        """Return values, shape (batch, 1), and action distributions of observations; shared layers run once.

        :param obs: observations, shape (batch, *observation shape), or a dict of them
        :param action_masks: True where an action is valid, shape (batch, mask size); None: all actions are valid
        """
        return self._evaluate(obs, action_masks, None, None)[:2]

    def _evaluate(
        self,
        obs: PyTorchObs,
        action_masks: MaybeMasks,
        states: RNNStates | None,
        episode_starts: th.Tensor | None,
    ) -> tuple[th.Tensor, Distribution, RNNStates | None]:
        obs, action_masks = self._split_off_mask(obs, action_masks)
        features: Any = self.extract_features(obs)
        if self.share_features_extractor and self.memory_options is None:
            latent_pi, latent_vf = self.mlp_extractor(features)
        else:
            pi_features, vf_features = (features, features) if self.share_features_extractor else features
            if self.memory_options is not None:
                pi_features, vf_features, states = self._remember(pi_features, vf_features, states, episode_starts)
            latent_pi = self.mlp_extractor.forward_actor(pi_features)
            latent_vf = self.mlp_extractor.forward_critic(vf_features)
        with _without_autocast(latent_vf.device):
            values: th.Tensor = self.value_net(latent_vf.float())
        return values, self._masked_distribution(latent_pi, action_masks), states

    def get_distribution(
        self,
        obs: PyTorchObs,
        action_masks: MaybeMasks = None,
        states: RNNStates | None = None,
        episode_starts: th.Tensor | None = None,
    ) -> Distribution:
        """Return the action distributions of observations; matches SB3's ``ActorCriticPolicy.get_distribution``.

        :param obs: observations, shape (batch, *observation shape), or a dict of them
        :param action_masks: True where an action is valid, shape (batch, mask size); None: all actions are valid
        :param states: the memory's states before each sequence; None: each observation begins an episode
        :param episode_starts: True where the states are reset before the step, shape (batch,); None: nowhere
        """
        return self._distribution_and_state(obs, action_masks, states.pi if states else None, episode_starts)[0]

    def _distribution_and_state(
        self, obs: PyTorchObs, action_masks: MaybeMasks, state: State | None, episode_starts: th.Tensor | None
    ) -> tuple[Distribution, State]:
        obs, action_masks = self._split_off_mask(obs, action_masks)
        latent, state = self._remember_actor(self._actor_features(obs), state, episode_starts)
        return self._masked_distribution(self.mlp_extractor.forward_actor(latent), action_masks), state

    def predict_values(
        self, obs: PyTorchObs, states: RNNStates | None = None, episode_starts: th.Tensor | None = None
    ) -> th.Tensor:
        """Return the values of observations, shape (batch, 1); matches SB3's ``ActorCriticPolicy.predict_values``.

        :param obs: observations, shape (batch, *observation shape), or a dict of them
        :param states: the memory's states before each sequence; None: each observation begins an episode
        :param episode_starts: True where the states are reset before the step, shape (batch,); None: nowhere
        """
        obs, _ = self._split_off_mask(obs, None)
        latent = self._critic_features(obs)
        if self.memory_options is not None:
            latent, _ = self._remember_critic(latent, states, episode_starts)
        values: th.Tensor = self.value_net(self.mlp_extractor.forward_critic(latent))
        return values

    def predict(
        self,
        observation: np.ndarray | dict[str, np.ndarray],
        state: tuple[np.ndarray, ...] | None = None,
        episode_start: np.ndarray | None = None,
        deterministic: bool = False,
        action_masks: np.ndarray | None = None,
    ) -> tuple[np.ndarray, tuple[np.ndarray, ...] | None]:
        """Choose actions in the env's units; matches SB3's ``BasePolicy.predict``.

        :param observation: observations of one or of n_envs environments
        :param state: the state of the actor's memory that the last call returned; None: each observation begins an
            episode. One warning is given if two calls in a row lack it, see :class:`StateUse`
        :param episode_start: True where the state is reset before the step, shape (n_envs,); None: nowhere
        :param deterministic: choose the most probable actions instead of samples
        :param action_masks: True where an action is valid, shape (n_envs, mask size) or (mask size,); None: all are
        :return: the actions, and the state after them; without a memory, ``state`` itself
        :raises ValueError: for masks or a state that do not fit, or an observation without a key that the actor sees
        """
        observation = self._for_actor(observation)
        if self.memory_options is not None:
            state_use_of(self).note(observation, state, episode_start)
        self._predict_context = {"state": state, "episode_start": episode_start}
        if action_masks is not None:
            self._predict_context["action_masks"] = masks_of_envs(self.action_space, action_masks)
        try:
            actions, _ = super().predict(observation, state, episode_start, deterministic)
            return actions, self._predict_context["state"]
        finally:
            self._predict_context = {}

    def _predict(self, observation: PyTorchObs, deterministic: bool = False) -> th.Tensor:
        context = self._predict_context
        state, episode_starts = None, context.get("episode_start")
        if self.memory_options is not None:
            n_envs = len(next(iter(observation.values())) if isinstance(observation, dict) else observation)
            state = self._check_state(context.get("state"), n_envs)
            if episode_starts is not None:
                episode_starts = th.as_tensor(np.asarray(episode_starts), dtype=th.bool, device=self.device)
        distribution, state = self._distribution_and_state(
            observation, context.get("action_masks"), state, episode_starts
        )
        if self.memory_options is not None:
            context["state"] = tuple(part.cpu().numpy() for part in state)
        return distribution.get_actions(deterministic=deterministic)

    def _split_off_mask(self, obs: PyTorchObs, action_masks: MaybeMasks) -> tuple[PyTorchObs, MaybeMasks]:
        if not self.has_mask_key:
            return obs, action_masks
        obs, observed_masks = split_off_mask(obs)
        return obs, observed_masks if action_masks is None else action_masks

    def _masked_distribution(self, latent_pi: th.Tensor, action_masks: MaybeMasks) -> Distribution:
        distribution = self._get_action_dist_from_latent(latent_pi)
        if action_masks is not None:
            with _without_autocast(latent_pi.device):
                apply_masks(distribution, action_masks)
        return distribution

    def _get_action_dist_from_latent(self, latent_pi: th.Tensor) -> Distribution:
        # A copy: tensors with a gradient would stay on SB3's shared object, where deepcopy trips on them. Without one
        # it is shared as in SB3, whose users read policy.action_dist after predict and forward. A method that a user
        # has wrapped is bound to the shared object and would pass a copy by
        is_copied = th.is_grad_enabled() and not has_own_methods(self.action_dist)
        distribution = copy(self.action_dist) if is_copied else self.action_dist
        if not self.action_masking:
            follow_replaced_methods(distribution)
        # bf16 logits would put errors of 1e-2 into the log-ratio
        with _without_autocast(latent_pi.device):
            outputs = self.action_net(latent_pi.float())
            if isinstance(distribution, StateDependentNoiseDistribution):
                return distribution.proba_distribution(outputs, self.log_std, latent_pi.float())
            if isinstance(distribution, DiagGaussianDistribution):
                return distribution.proba_distribution(outputs, self.log_std)
            return distribution.proba_distribution(action_logits=outputs)


def has_own_methods(part: object) -> bool:
    """Whether a method of an object was replaced on the instance."""
    return any(callable(getattr(type(part), name, None)) for name in vars(part))


class ActorCriticPlusCnnPolicy(ActorCriticPlusPolicy):
    """The policy for images: SB3's ``ActorCriticCnnPolicy``, NatureCNN by default."""

    default_features_extractor_class = NatureCNN


class MultiInputActorCriticPlusPolicy(ActorCriticPlusPolicy):
    """The policy for Dict observations: SB3's ``MultiInputActorCriticPolicy``, CombinedExtractor by default."""

    default_features_extractor_class = CombinedExtractor


class MlpLstmPolicy(ActorCriticPlusPolicy):
    """The policy with an LSTM: sb3-contrib's ``RecurrentActorCriticPolicy``."""

    default_memory = "lstm"


class CnnLstmPolicy(ActorCriticPlusCnnPolicy):
    """The policy for images with an LSTM: sb3-contrib's ``RecurrentActorCriticCnnPolicy``."""

    default_memory = "lstm"


class MultiInputLstmPolicy(MultiInputActorCriticPlusPolicy):
    """The policy for Dict observations with an LSTM: sb3-contrib's ``RecurrentMultiInputActorCriticPolicy``."""

    default_memory = "lstm"


MlpPolicy = ActorCriticPlusPolicy
CnnPolicy = ActorCriticPlusCnnPolicy
MultiInputPolicy = MultiInputActorCriticPlusPolicy

POLICY_ALIASES: dict[str, type[BasePolicy]] = {
    "MlpPolicy": MlpPolicy,
    "CnnPolicy": CnnPolicy,
    "CnnLstmPolicy": CnnLstmPolicy,
    "MlpLstmPolicy": MlpLstmPolicy,
    "MultiInputPolicy": MultiInputPolicy,
    "MultiInputLstmPolicy": MultiInputLstmPolicy,
}

# Our policy in place of a class of SB3 or sb3-contrib: a model that they saved names such a class
PLUS_POLICY_OF: dict[type[Any], type[ActorCriticPlusPolicy]] = {
    ActorCriticPolicy: ActorCriticPlusPolicy,
    ActorCriticCnnPolicy: ActorCriticPlusCnnPolicy,
    MultiInputActorCriticPolicy: MultiInputActorCriticPlusPolicy,
    MaskableActorCriticPolicy: ActorCriticPlusPolicy,
    MaskableActorCriticCnnPolicy: ActorCriticPlusCnnPolicy,
    MaskableMultiInputActorCriticPolicy: MultiInputActorCriticPlusPolicy,
    RecurrentActorCriticPolicy: MlpLstmPolicy,
    RecurrentActorCriticCnnPolicy: CnnLstmPolicy,
    RecurrentMultiInputActorCriticPolicy: MultiInputLstmPolicy,
}


def predict_with_masks(
    policy: ActorCriticPolicy,
    observation: np.ndarray | dict[str, np.ndarray],
    state: tuple[np.ndarray, ...] | None,
    episode_start: np.ndarray | None,
    deterministic: bool,
    action_masks: np.ndarray,
) -> tuple[np.ndarray, tuple[np.ndarray, ...] | None]:
    """Call a policy's ``predict`` with masks; see :meth:`ActorCriticPlusPolicy.predict` for the parameters.

    :raises TypeError: for a policy class whose ``predict`` takes no masks
    """
    if "action_masks" not in inspect.signature(policy.predict).parameters:
        raise TypeError(f"{type(policy).__name__}.predict has no action_masks")
    return policy.predict(observation, state, episode_start, deterministic, action_masks)  # type: ignore[call-arg]  # its signature has action_masks


def _without_autocast(device: th.device) -> AbstractContextManager[Any]:
    # Entering a context costs microseconds at each step, so it is entered only where autocast is on
    return th.autocast(device.type, enabled=False) if th.is_autocast_enabled(device.type) else nullcontext()
