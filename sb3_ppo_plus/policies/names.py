"""The names that YAML may use in ``policy_kwargs``."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch as th
from gymnasium import spaces
from stable_baselines3.common.policies import BasePolicy
from torch import nn

from sb3_ppo_plus.argument_checks import accepted_names, did_you_mean
from sb3_ppo_plus.attributes import PlusModel
from sb3_ppo_plus.extractors import resolve_features_extractor
from sb3_ppo_plus.policies.actor_critic import ActorCriticPlusPolicy, CnnLstmPolicy, MlpLstmPolicy
from sb3_ppo_plus.policies.flat_actions import flat_action_space
from sb3_ppo_plus.policies.remembering import CONTRIB_KWARGS

ACTIVATIONS: dict[str, type[nn.Module]] = {
    "tanh": nn.Tanh,
    "relu": nn.ReLU,
    "elu": nn.ELU,
    "gelu": nn.GELU,
    "leaky_relu": nn.LeakyReLU,
    "silu": nn.SiLU,
}
OPTIMIZERS: dict[str, type[th.optim.Optimizer]] = {
    "adam": th.optim.Adam,
    "adamw": th.optim.AdamW,
    "sgd": th.optim.SGD,
    "rmsprop": th.optim.RMSprop,
}
_GIVEN_BY_SB3 = {"observation_space", "action_space", "lr_schedule"}
#: Names that ``policy_kwargs`` may hold
POLICY_ARGUMENTS = [
    *(name for name in accepted_names(ActorCriticPlusPolicy) if name not in _GIVEN_BY_SB3),
    *CONTRIB_KWARGS,
]


def resolve_policy_kwargs(
    policy_class: type[BasePolicy], policy_kwargs: dict[str, Any], observation_space: spaces.Space[Any]
) -> dict[str, Any]:
    """Replace registered names in ``policy_kwargs`` by their classes.

    :param policy_class: the class that will take them
    :param policy_kwargs: as the user gave them; not changed
    :param observation_space: the observation space
    :raises ValueError: for a name that is not registered, or observations that the policy cannot take
    :raises TypeError: for an argument that ``policy_class`` does not take, or a value that is neither name nor class
    """
    resolved = dict(policy_kwargs)
    if policy_class.__init__ is ActorCriticPlusPolicy.__init__:
        # A subclass with a constructor of its own may take further arguments
        for name in resolved:
            if name not in POLICY_ARGUMENTS:
                raise TypeError(
                    f"policy_kwargs: {policy_class.__name__} has no argument {name!r}"
                    f"{did_you_mean(name, POLICY_ARGUMENTS)}"
                )
    if not issubclass(policy_class, ActorCriticPlusPolicy):
        own = {"action_dist", "action_dist_kwargs", "memory", "memory_kwargs"}
        own |= {"used_parts", "actor_keys", "critic_keys"}
        lacking = sorted(own & resolved.keys())
        if lacking:
            raise TypeError(
                f"policy_kwargs: {policy_class.__name__} has no {' or '.join(lacking)}; subclass "
                "sb3_ppo_plus.ActorCriticPlusPolicy instead of SB3's ActorCriticPolicy to use it"
            )
    _check_observations(policy_class, observation_space, policy_kwargs)
    if "features_extractor_class" in resolved:
        resolved["features_extractor_class"] = resolve_features_extractor(resolved["features_extractor_class"])
    for name, table, base in (
        ("activation_fn", ACTIVATIONS, nn.Module),
        ("optimizer_class", OPTIMIZERS, th.optim.Optimizer),
    ):
        if name in resolved:
            resolved[name] = _from_table(name, resolved[name], table, base)
    return resolved


def _check_observations(
    policy_class: type[BasePolicy], observation_space: spaces.Space[Any], policy_kwargs: Mapping[str, Any]
) -> None:
    """Refuse Dict observations for the policies with an LSTM that cannot take them, as SB3 does for the others."""
    # An extractor of the user's may take them
    takes_one_array = policy_class in (MlpLstmPolicy, CnnLstmPolicy) and "features_extractor_class" not in policy_kwargs
    if takes_one_array and isinstance(observation_space, spaces.Dict):
        raise ValueError(
            f"You must use `MultiInputLstmPolicy` when working with dict observation space, not {policy_class.__name__}"
        )


@contextmanager
def resolving_policy_kwargs(model: PlusModel) -> Iterator[None]:
    """While a model's policy and rollout buffer are built, have what they take in place of what the user gave.

    These are classes in place of names in ``policy_kwargs``, and a :class:`FlatActionSpace` in place of a Tuple or
    Dict. Then they are as before: ``save`` writes and ``load`` compares names, and the action space of the environment.

    :param model: the model
    :raises ValueError: see :func:`resolve_policy_kwargs`
    :raises TypeError: see :func:`resolve_policy_kwargs`
    """
    given, action_space = model.policy_kwargs, model.action_space
    model.policy_kwargs = resolve_policy_kwargs(model.policy_class, given, model.observation_space)
    model.action_space = flat_action_space(action_space)
    if model.action_space is not action_space and not issubclass(model.policy_class, ActorCriticPlusPolicy):
        raise TypeError(
            f"{model.policy_class.__name__} takes no Tuple or Dict actions; subclass sb3_ppo_plus.ActorCriticPlusPolicy"
        )
    try:
        yield
    finally:
        model.policy_kwargs, model.action_space = given, action_space


@contextmanager
def explaining_dict_keys(observation_space: spaces.Space[Any]) -> Iterator[None]:
    """Raise a ValueError where the keys of Dict observations are refused.

    SB3's extractors keep their parts by these keys in a ModuleDict, which takes no dots for one.

    :param observation_space: the observation space
    """
    try:
        yield
    except KeyError as error:
        if not isinstance(observation_space, spaces.Dict):
            raise
        raise ValueError(f"a key of the Dict observations is not allowed: {error}") from error


def _from_table(name: str, value: object, table: Mapping[str, type], base: type) -> object:
    if isinstance(value, str):
        if value not in table:
            raise ValueError(
                f"policy_kwargs: {name}={value!r} is unknown; allowed: a class or one of {sorted(table)}"
                f"{did_you_mean(value, table)}"
            )
        return table[value]
    if isinstance(value, type) and not issubclass(value, base):
        raise TypeError(f"policy_kwargs: {name} must be a subclass of {base.__name__} or a name, got {value!r}")
    if not callable(value):
        raise TypeError(f"policy_kwargs: {name} must be a class or one of {sorted(table)}, got {value!r}")
    return value
