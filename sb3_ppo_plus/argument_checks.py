"""Checks of the constructor's plain arguments, which SB3 mostly leaves to whatever they break later."""

from __future__ import annotations

from collections.abc import Callable
from numbers import Integral, Real
from typing import Any, NamedTuple

import numpy as np
from stable_baselines3.common.buffers import RolloutBuffer
from stable_baselines3.common.policies import BasePolicy

from sb3_ppo_plus.buffers import PPOPlusRolloutBuffer

ON_NON_FINITE = ("raise", "skip")
MAX_SEED = 2**32 - 1


class _Kind(NamedTuple):
    types: tuple[type, ...]
    described: str


_INTEGER = _Kind((Integral,), "an integer")
_NUMBER = _Kind((Real,), "a number")
_FLAG = _Kind((bool, np.bool_), "True or False")
_DICT = _Kind((dict, type(None)), "a dict or None")
_KINDS = {
    "policy": _Kind((str, type), "a policy's name or class"),
    "n_steps": _INTEGER,
    "batch_size": _INTEGER,
    "n_epochs": _INTEGER,
    "gamma": _NUMBER,
    "gae_lambda": _NUMBER,
    "normalize_advantage": _FLAG,
    "max_grad_norm": _NUMBER,
    "use_sde": _FLAG,
    "sde_sample_freq": _INTEGER,
    "rollout_buffer_class": _Kind((type, type(None)), "a subclass of RolloutBuffer or None"),
    "rollout_buffer_kwargs": _DICT,
    "target_kl": _Kind((Real, type(None)), "a number or None"),
    "stats_window_size": _INTEGER,
    "policy_kwargs": _DICT,
    # What Python's random.seed takes
    "seed": _Kind((int, type(None)), "an int or None"),
    "pessimistic_value_clip": _FLAG,
    "on_non_finite": _Kind((str,), "a string"),
    "max_skipped": _INTEGER,
}


def check_types(arguments: dict[str, Any]) -> dict[str, Any]:
    """Check the types of a constructor's arguments, and the range of one that SB3's constructor divides by.

    :param arguments: by name; others than the plain ones are passed over
    :return: the arguments
    :raises TypeError: names the argument, its value and what is allowed
    :raises ValueError: the same
    """
    for name, kind in _KINDS.items():
        value = arguments[name]
        is_flag = isinstance(value, bool | np.bool_)
        if not isinstance(value, kind.types) or (is_flag and kind is not _FLAG):
            raise TypeError(f"{name} must be {kind.described}, got {value!r}")
    policy = arguments["policy"]
    if isinstance(policy, type) and not issubclass(policy, BasePolicy):
        raise TypeError(f"policy must be a policy's name or class, got {policy!r}")
    buffer_class = arguments["rollout_buffer_class"]
    if buffer_class is not None and not issubclass(buffer_class, RolloutBuffer):
        raise TypeError(f"rollout_buffer_class must be a subclass of RolloutBuffer or None, got {buffer_class!r}")
    # SB3 asserts that it is above 1 where advantages are normalised, and else divides by it
    if not arguments["normalize_advantage"] and arguments["batch_size"] < 1:
        raise ValueError(f"batch_size must be at least 1, got {arguments['batch_size']!r}")
    return arguments


def check_ranges(algorithm: object) -> None:
    """Check the ranges of an algorithm's plain arguments, which are its attributes; NaN is in none.

    :param algorithm: a PPO
    :raises ValueError: names the argument, its value and what is allowed
    """
    checks: tuple[tuple[str, str, Callable[[Any], bool]], ...] = (
        (
            "action_masking",
            "None, True or False",
            lambda value: value is None or isinstance(value, bool),
        ),
        ("on_non_finite", f"one of {ON_NON_FINITE}", lambda value: value in ON_NON_FINITE),
        ("n_steps", "at least 1", lambda value: value >= 1),
        ("batch_size", "at least 1", lambda value: value >= 1),
        ("n_epochs", "at least 1", lambda value: value >= 1),
        ("_stats_window_size", "at least 1", lambda value: value >= 1),
        ("max_skipped", "at least 0", lambda value: value >= 0),
        ("max_grad_norm", "at least 0", lambda value: value >= 0),
        ("target_kl", "None or above 0", lambda value: value is None or value > 0),
        ("gamma", "in [0, 1]", lambda value: 0 <= value <= 1),
        ("gae_lambda", "in [0, 1]", lambda value: 0 <= value <= 1),
        ("seed", f"None or in [0, {MAX_SEED}]", lambda value: value is None or 0 <= value <= MAX_SEED),
    )
    for name, allowed, is_allowed in checks:
        value = getattr(algorithm, name)
        if not is_allowed(value):
            raise ValueError(f"{name.removeprefix('_')} must be {allowed}, got {value!r}")
    amp, buffer_class = getattr(algorithm, "amp", False), getattr(algorithm, "rollout_buffer_class", None)
    if amp and not (buffer_class is not None and issubclass(buffer_class, PPOPlusRolloutBuffer)):
        raise ValueError(
            f"amp={amp!r} needs a rollout_buffer_class that is None or a subclass of PPOPlusRolloutBuffer, "
            f"got {buffer_class}"
        )
