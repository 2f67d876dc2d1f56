"""Checks of the constructor's arguments, which SB3 mostly leaves to whatever they break later, and help with names."""

from __future__ import annotations

import difflib
import functools
import inspect
import math
from collections.abc import Callable, Collection, Iterable
from numbers import Integral, Real
from typing import Any, NamedTuple, ParamSpec, SupportsInt, TypeGuard

import numpy as np
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.buffers import RolloutBuffer
from stable_baselines3.common.policies import BasePolicy

ON_NON_FINITE = ("raise", "skip")
SYMMETRY_MODES = ("augment", "loss")
MAX_SEED = 2**32 - 1
# What users give to the constructor, and what belongs elsewhere
_ELSEWHERE = {
    "n_timesteps": "the number of timesteps is an argument of learn",
    **dict.fromkeys(
        ("total_timesteps", "callback", "log_interval", "tb_log_name", "reset_num_timesteps", "progress_bar"),
        "it is an argument of learn",
    ),
    **dict.fromkeys(
        ("n_envs", "normalize", "env_wrapper", "vec_env_wrapper", "frame_stack"),
        "it is a key of the RL Zoo's hyperparameter files, which describes the environments",
    ),
}
Parameters = ParamSpec("Parameters")


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
    "worker_timeout": _Kind((Real, type(None)), "a number or None"),
    "restart_workers": _INTEGER,
    "micro_batches": _INTEGER,
    "symmetry_mode": _Kind((str,), "a string"),
    "symmetry_coef": _NUMBER,
    "caps_sigma": _NUMBER,
}


def is_integer(value: object, at_least: int | None = None) -> TypeGuard[SupportsInt]:
    """Whether a value is an integer, of Python or NumPy. A bool is none.

    :param value: anything
    :param at_least: the smallest integer allowed; None: all are
    """
    if not isinstance(value, Integral) or isinstance(value, bool):
        return False
    return at_least is None or int(value) >= at_least


def integer_of_at_least(minimum: int, name: str, value: object) -> int:
    """Return an argument as an int.

    :param minimum: the smallest integer allowed
    :param name: the argument's name
    :param value: what was given for it
    :raises ValueError: if it is no integer, or a smaller one
    """
    if not is_integer(value, minimum):
        raise ValueError(f"{name} must be an integer of at least {minimum}, got {value!r}")
    return int(value)


def check_types(arguments: dict[str, Any]) -> dict[str, Any]:
    """Check the types of a constructor's arguments, and the range of one that SB3's constructor divides by.

    :param arguments: by name, with the algorithm as ``self``; others than the plain ones are passed over
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
    if isinstance(policy, str):
        _check_policy_name(policy, arguments["self"])
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
        ("restart_workers", "at least 0", lambda value: value >= 0),
        ("micro_batches", "at least 1", lambda value: value >= 1),
        ("distributed", 'False, True or "exact"', lambda value: isinstance(value, bool) or value == "exact"),
        ("symmetry", "None or a function", lambda value: value is None or callable(value)),
        ("symmetry_mode", f"one of {SYMMETRY_MODES}", lambda value: value in SYMMETRY_MODES),
        ("symmetry_coef", "finite and at least 0", lambda value: 0 <= value < math.inf),
        ("caps_sigma", "finite and above 0", lambda value: 0 < value < math.inf),
        ("worker_timeout", "None or a finite number above 0", lambda value: value is None or 0 < value < math.inf),
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


def did_you_mean(given: object, allowed: Iterable[str]) -> str:
    """Ask for the end of an error's message whether the nearest of the allowed names was meant.

    :param given: the name that is not allowed; upper and lower case are alike
    :param allowed: the names that are
    :return: "; did you mean 'NAME'?", or an empty string where no name is near
    """
    nearest = _nearest_name(given, allowed)
    return "" if nearest is None else f"; did you mean {nearest!r}?"


def _nearest_name(given: object, allowed: Iterable[str]) -> str | None:
    by_lower_case = {name.lower(): name for name in allowed}
    text = str(given)
    if len(text) > 2 * max(map(len, by_lower_case), default=0):
        # It is near to none, and comparing takes time and memory
        return None
    nearest = difflib.get_close_matches(text.lower(), by_lower_case, n=1)
    return by_lower_case[nearest[0]] if nearest else None


def _check_policy_name(name: str, algorithm: BaseAlgorithm) -> None:
    """Check that an algorithm knows a policy's name, unless a subclass of the user's finds policies in its own way."""
    aliases = algorithm.policy_aliases
    finds_as_sb3 = type(algorithm)._get_policy_from_name is BaseAlgorithm._get_policy_from_name
    if finds_as_sb3 and name not in aliases:
        raise ValueError(
            f"Policy {name!r} unknown: policy must be a policy class or one of {sorted(aliases)}"
            f"{did_you_mean(name, aliases)}"
        )


def accepted_names(cls: type) -> list[str]:
    """Names of the arguments that a constructor takes, with those that it passes on to the next class by **kwargs."""
    names: dict[str, None] = {}
    for part in cls.__mro__:
        if "__init__" not in vars(part):
            continue
        constructor = vars(part)["__init__"]
        names |= dict.fromkeys(own_parameters(constructor))
        if all(each.kind is not each.VAR_KEYWORD for each in inspect.signature(constructor).parameters.values()):
            break
    return list(names)


def own_parameters(constructor: Callable[..., None]) -> list[str]:
    """Names of the parameters that a constructor itself declares, without ``self``, ``*args`` and ``**kwargs``."""
    parameters = list(inspect.signature(constructor).parameters.values())[1:]
    return [each.name for each in parameters if each.kind not in (each.VAR_POSITIONAL, each.VAR_KEYWORD)]


def helps_with_keywords(
    policy_arguments: Collection[str],
) -> Callable[[Callable[Parameters, None]], Callable[Parameters, None]]:
    """Decorate a constructor, whose error for an unknown keyword then says which one was meant, or where it belongs.

    ``inspect.signature`` still shows the constructor's own parameters.

    :param policy_arguments: what belongs in ``policy_kwargs``
    """

    def decorate(constructor: Callable[Parameters, None]) -> Callable[Parameters, None]:
        known = inspect.signature(constructor).parameters

        @functools.wraps(constructor)
        def checked(*args: Parameters.args, **kwargs: Parameters.kwargs) -> None:
            for name in kwargs:
                if name not in known:
                    raise TypeError(_unknown_keyword(type(args[0]).__name__, name, known, policy_arguments))
            constructor(*args, **kwargs)

        # For those who look at the constructor without following wrappers
        checked.__signature__ = inspect.signature(constructor)  # type: ignore[attr-defined]  # every function may have one
        return checked

    return decorate


def _unknown_keyword(owner: str, name: str, known: Iterable[str], policy_arguments: Collection[str]) -> str:
    message = f"{owner}() got an unexpected keyword argument {name!r}"
    if name in policy_arguments:
        return f"{message}: it is an argument of the policy, give it in policy_kwargs={{{name!r}: ...}}"
    if name in _ELSEWHERE:
        return f"{message}: {_ELSEWHERE[name]}"
    public = [each for each in known if not each.startswith("_") and each != "self"]
    nearest = _nearest_name(name, [*policy_arguments, *public])
    if nearest is None:
        return message
    return f"{message}; did you mean {nearest!r}{'' if nearest in public else ' in policy_kwargs'}?"
