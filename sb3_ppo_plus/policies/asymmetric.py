"""Actor and critic that see different keys of Dict observations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch as th
from gymnasium import spaces
from stable_baselines3.common.policies import ActorCriticPolicy, BaseModel
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor, MlpExtractor
from stable_baselines3.common.type_aliases import PyTorchObs

from sb3_ppo_plus.argument_checks import did_you_mean
from sb3_ppo_plus.extractors import MultiInputExtractor
from sb3_ppo_plus.policies.masks import MASK_KEY, without_mask_key


@dataclass(frozen=True)
class HeadKeys:
    """The keys of Dict observations that each head sees, in the order of the observation space.

    :param actor: the keys that the action distribution depends on
    :param critic: the keys that the value depends on
    """

    actor: tuple[str, ...]
    critic: tuple[str, ...]

    @classmethod
    def resolve(
        cls,
        observation_space: spaces.Space[Any],
        actor_keys: Sequence[str] | None,
        critic_keys: Sequence[str] | None,
        *,
        has_mask_key: bool,
    ) -> HeadKeys | None:
        """Validate the arguments of a policy.

        :param observation_space: the observation space
        :param actor_keys: keys that the actor sees, in any order; None: all
        :param critic_keys: keys that the critic sees, in any order; None: all
        :param has_mask_key: whether the key ``action_mask`` holds masks, and is no feature
        :return: the keys; None: neither argument is given
        :raises TypeError: for an argument that is no list of strings
        :raises ValueError: for observations that are no Dict, a key that they lack, or no key
        """
        if actor_keys is None and critic_keys is None:
            return None
        if not isinstance(observation_space, spaces.Dict):
            name = "critic_keys" if actor_keys is None else "actor_keys"
            raise ValueError(f"policy_kwargs: {name} needs Dict observations, got {observation_space}")
        features = without_mask_key(observation_space) if has_mask_key else observation_space
        pairs = ("actor_keys", actor_keys), ("critic_keys", critic_keys)
        return cls(*(_checked_keys(name, keys, tuple(features.spaces), has_mask_key) for name, keys in pairs))

    @property
    def described(self) -> str:
        """The keys as text, for an error."""
        return f"actor_keys={list(self.actor)} and critic_keys={list(self.critic)}"


def _checked_keys(
    name: str, keys: Sequence[str] | None, allowed: tuple[str, ...], has_mask_key: bool
) -> tuple[str, ...]:
    if keys is None:
        return allowed
    if not isinstance(keys, list | tuple) or not all(isinstance(key, str) for key in keys):
        raise TypeError(f"policy_kwargs: {name} must be None or a list of keys of the observations, got {keys!r}")
    if not keys:
        raise ValueError(f"policy_kwargs: {name} must hold at least one of the keys {list(allowed)}, got {keys!r}")
    for key in keys:
        if key == MASK_KEY and has_mask_key:
            raise ValueError(
                f"policy_kwargs: {name} holds {MASK_KEY!r}, which is no feature but the mask that the actor's choice "
                "always obeys: leave it out. With action_masking=False it is a feature"
            )
        if key not in allowed:
            raise ValueError(
                f"policy_kwargs: {name} holds {key!r}, which the observations lack; allowed: {list(allowed)}"
                f"{did_you_mean(key, allowed)}"
            )
    return tuple(key for key in allowed if key in keys)


def sharing_of(keys: HeadKeys | None, arguments: Mapping[str, Any]) -> dict[str, bool]:
    """Return ``share_features_extractor=False`` if the heads see different keys, else nothing.

    :param keys: the keys of the heads; None: both see the whole observation
    :param arguments: the policy's other arguments
    :raises ValueError: if these share an extractor between heads that see different keys
    """
    if keys is None or keys.actor == keys.critic:
        return {}
    if arguments.get("share_features_extractor"):
        raise ValueError(
            "policy_kwargs: share_features_extractor=True needs heads that see the same keys, got " + keys.described
        )
    return {"share_features_extractor": False}


class AsymmetricPolicy(ActorCriticPolicy):
    """SB3's ``ActorCriticPolicy`` whose heads see some keys of Dict observations only, if ``head_keys`` is set.

    Heads with the same keys share a features extractor, as in SB3. Others have one each, for a Dict of their keys.
    """

    head_keys: HeadKeys | None = None
    has_mask_key: bool = False

    @property
    def actor_keys(self) -> tuple[str, ...] | None:
        """The keys of observations that the actor sees, without the mask; None: it sees the whole observation."""
        return None if self.head_keys is None else self.head_keys.actor

    @property
    def critic_keys(self) -> tuple[str, ...] | None:
        """The keys of observations that the critic sees; None: it sees the whole observation."""
        return None if self.head_keys is None else self.head_keys.critic

    @property
    def actor_space(self) -> spaces.Space[Any]:
        """The space of what :meth:`predict` needs of an observation, a mask under ``action_mask`` included."""
        return self.observation_space if self.head_keys is None else _part_of(self.observation_space, self._needed())

    def _needed(self) -> tuple[str, ...]:
        assert self.head_keys is not None
        return (*self.head_keys.actor, MASK_KEY) if self.has_mask_key else self.head_keys.actor

    def _get_constructor_parameters(self) -> dict[str, Any]:
        keys = {} if self.head_keys is None else {"actor_keys": self.actor_keys, "critic_keys": self.critic_keys}
        return {**super()._get_constructor_parameters(), **keys}

    def make_features_extractor(self) -> BaseFeaturesExtractor:
        """Create an extractor of what a head sees of the observations, which is never the mask."""
        space: Any = without_mask_key(self.observation_space) if self.has_mask_key else self.observation_space
        kwargs = self.features_extractor_kwargs
        if self.head_keys is not None:
            # SB3 makes the actor's extractor first, and the critic's only where they share none
            keys = self.head_keys.actor if self.features_extractor is None else self.head_keys.critic
            if len(keys) < len(space.spaces):
                kwargs = _for_keys(kwargs, keys, space, self.features_extractor_class)
                space = _part_of(space, keys)
        if space is self.observation_space:
            return super().make_features_extractor()
        return self.features_extractor_class(space, **kwargs)

    @property
    def critic_features_dim(self) -> int:
        """Size of the critic's features. ``features_dim`` is that of the actor's."""
        return int(self.features_dim if self.head_keys is None else self.vf_features_extractor.features_dim)

    def _build_mlp_extractor(self) -> None:
        if self.critic_features_dim == self.features_dim:
            super()._build_mlp_extractor()
            return
        # SB3's class has one size of features for both heads: so each head is a part of an object of its own
        layers = self.net_arch if isinstance(self.net_arch, dict) else {"pi": self.net_arch, "vf": self.net_arch}
        self.mlp_extractor = MlpExtractor(
            self.features_dim, {"pi": layers.get("pi", [])}, self.activation_fn, self.device
        )
        of_critic = MlpExtractor(
            self.critic_features_dim, {"vf": layers.get("vf", [])}, self.activation_fn, self.device
        )
        self.mlp_extractor.value_net = of_critic.value_net
        self.mlp_extractor.latent_dim_vf = of_critic.latent_dim_vf

    def extract_features(  # type: ignore[override]  # as in SB3's ActorCriticPolicy
        self, obs: PyTorchObs, features_extractor: BaseFeaturesExtractor | None = None
    ) -> th.Tensor | tuple[th.Tensor, th.Tensor]:
        """Extract features; matches SB3's ``ActorCriticPolicy.extract_features``.

        :param obs: observations, shape (batch, *observation shape), or a dict of them
        :param features_extractor: used in place of a shared extractor
        :return: features (batch, features_dim); if the heads share no extractor, those of the actor and of the critic
        """
        if self.head_keys is None:
            return super().extract_features(obs, features_extractor)
        if self.share_features_extractor:
            return super().extract_features(_seen(obs, self.head_keys.actor), features_extractor)
        return self._actor_features(obs), self._critic_features(obs)

    def _actor_features(self, obs: PyTorchObs) -> th.Tensor:
        seen = obs if self.head_keys is None else _seen(obs, self.head_keys.actor)
        return BaseModel.extract_features(self, seen, self.pi_features_extractor)

    def _critic_features(self, obs: PyTorchObs) -> th.Tensor:
        seen = obs if self.head_keys is None else _seen(obs, self.head_keys.critic)
        return BaseModel.extract_features(self, seen, self.vf_features_extractor)

    def _for_actor(self, observation: Any) -> Any:  # noqa: ANN401  # a user may give anything
        """Return what :meth:`predict` needs of an observation, which may lack the critic's keys and have others.

        :raises ValueError: for an observation without a key that the actor sees
        """
        if self.head_keys is None or isinstance(observation, tuple):
            return observation
        needed = self._needed()
        if not isinstance(observation, Mapping):
            kind = type(observation).__name__
            raise ValueError(f"predict: observation must be a dict with the keys {list(needed)}, got {kind}")
        for key in needed:
            if key not in observation:
                unknown = [given for given in observation if given not in needed]
                near = next(filter(None, (did_you_mean(given, [key]) for given in unknown)), "")
                raise ValueError(
                    f"predict: the observation lacks the key {key!r}, which the actor sees; it needs the keys "
                    f"{list(needed)}, got {list(observation)}{near}"
                )
        return {key: observation[key] for key in needed}


def _part_of(space: spaces.Space[Any], keys: Sequence[str]) -> spaces.Dict:
    assert isinstance(space, spaces.Dict)
    # Pairs keep their order, while Gymnasium sorts the keys of a dict
    return spaces.Dict([(key, part) for key, part in space.spaces.items() if key in keys])


def _seen(obs: PyTorchObs, keys: tuple[str, ...]) -> PyTorchObs:
    assert isinstance(obs, dict)
    return {key: obs[key] for key in keys}


def _for_keys(
    kwargs: dict[str, Any], keys: Sequence[str], space: spaces.Dict, extractor_class: type[BaseFeaturesExtractor]
) -> dict[str, Any]:
    """Leave extractors of keys out that a head does not see. Those of keys that there are not stay, for an error."""
    extractors = kwargs.get("extractors")
    if not issubclass(extractor_class, MultiInputExtractor) or not extractors:
        return kwargs
    kept = {key: spec for key, spec in extractors.items() if key in keys or key not in space.spaces}
    return {**kwargs, "extractors": kept}
