"""Entries of hyperparameters as arguments of SB3's own PPO, and what SB3 lacks for an entry."""

import inspect
from typing import Any

import torch as th
from rl_zoo3.utils import SimpleLinearSchedule
from stable_baselines3 import PPO
from stable_baselines3.common.policies import ActorCriticPolicy
from torch import nn

from sb3_ppo_plus.policies.names import ACTIVATIONS, OPTIMIZERS

OF_ENVIRONMENTS = ("n_timesteps", "normalize", "n_envs", "frame_stack", "env_wrapper")
"""What the RL Zoo takes out of an entry before it makes the model."""
SCHEDULED = ("learning_rate", "clip_range", "clip_range_vf")
CONSTANT = ("ent_coef", "vf_coef")
CLASSES: dict[str, dict[str, Any]] = {"activation_fn": ACTIVATIONS, "optimizer_class": OPTIMIZERS}


def sb3_arguments(entry: dict[str, Any]) -> dict[str, Any]:
    """Turn an entry into SB3's arguments, as the RL Zoo does: ``lin_3e-4`` is a line to 0, expressions are evaluated.

    :param entry: hyperparameters without what is about environments
    :raises ValueError: for what SB3 lacks
    """
    lacking = what_sb3_lacks(entry)
    if lacking:
        raise ValueError(f"SB3's PPO has no {'; no '.join(lacking)}")
    arguments = {name: value for name, value in entry.items() if name not in OF_ENVIRONMENTS}
    for name, value in arguments.items():
        if name in SCHEDULED and _is_line(value):
            arguments[name] = SimpleLinearSchedule(value.removeprefix("lin_"))
        elif _is_number(value):
            arguments[name] = float(value)
    if "policy_kwargs" in arguments:
        policy_kwargs = _evaluated(arguments["policy_kwargs"])
        for name, table in CLASSES.items():
            if isinstance(policy_kwargs.get(name), str):
                policy_kwargs[name] = table[policy_kwargs[name]]
        arguments["policy_kwargs"] = policy_kwargs
    return arguments


def what_sb3_lacks(entry: dict[str, Any]) -> list[str]:
    """Name all that an entry uses and SB3's PPO does not have.

    :param entry: hyperparameters, with or without what is about environments
    """
    known = inspect.signature(PPO).parameters.keys() | set(OF_ENVIRONMENTS)
    lacking = []
    for name, value in entry.items():
        if name not in known:
            lacking.append(name)
        elif name == "policy" and value not in PPO.policy_aliases:
            lacking.append(f"policy {value!r}")
        elif name in SCHEDULED + CONSTANT and not _is_known_number(name, value):
            lacking.append(f"schedule {name}: {value}")
    return lacking + _lacking_of_policy(_evaluated(entry.get("policy_kwargs", {})))


def _lacking_of_policy(policy_kwargs: dict[str, Any]) -> list[str]:
    known = inspect.signature(ActorCriticPolicy).parameters
    lacking = []
    for name, value in policy_kwargs.items():
        is_unknown_class = isinstance(value, str) and value not in CLASSES.get(name, {})
        if name not in known or is_unknown_class:
            lacking.append(f"policy_kwargs {name}: {value}")
    return lacking


def _evaluated(policy_kwargs: Any) -> dict[str, Any]:  # noqa: ANN401  # a dict or a Python expression of one
    if isinstance(policy_kwargs, str):
        # In the RL Zoo's own file, which is installed software
        policy_kwargs = eval(policy_kwargs, {"nn": nn, "th": th})
    return dict(policy_kwargs)


def _is_known_number(name: str, value: object) -> bool:
    return not isinstance(value, str) or _is_number(value) or (name in SCHEDULED and _is_line(value))


def _is_line(value: object) -> bool:
    return isinstance(value, str) and value.startswith("lin_") and _is_number(value.removeprefix("lin_"))


def _is_number(value: object) -> bool:
    # YAML reads 3e-4, without a decimal point, as a string
    if not isinstance(value, str):
        return False
    try:
        float(value)
    except ValueError:
        return False
    return True
