"""Checks of a training state from a file: the attributes of the model, the time, the logs."""

from __future__ import annotations

from collections import deque
from typing import Any

import numpy as np
import torch as th
from gymnasium import spaces
from sb3_contrib.common.recurrent.type_aliases import RNNStates

from sb3_ppo_plus.attributes import COUNTERS, PlusModel
from sb3_ppo_plus.distributed.parts import GSDE_NOISE
from sb3_ppo_plus.env_states.generator_state import check_torch_states
from sb3_ppo_plus.env_states.untrusted_state import is_number
from sb3_ppo_plus.trees import tree_flatten
from sb3_ppo_plus.untrusted.strict_json import short

#: More steps than any run has, and fewer than a float can count
MAX_COUNT = 2**53
#: Ten thousand years
MAX_SECONDS = 3e11
#: The one counter that need not be an integer
TOTAL = "_total_timesteps"
_PLAIN_STATISTICS = (bool, int, float, str, np.generic, np.ndarray, th.Tensor, type(None))


def check_attributes(model: PlusModel, attributes: dict[str, Any], trusted: bool = True) -> None:
    """Check the attributes of a model: no others than training changes, with values that training could have given.

    Some other attributes, such as the compiler's options, can run a program.

    :param model: the model that will get them, with its environments
    :param attributes: values by name
    :param trusted: False: also check the shapes of observations, and what statistics hold
    :raises ValueError: for other names, and for a value that is not possible; the message names the attribute
    :raises TypeError: for a value of another type
    """
    names = set(model.TRAINING_STATE)
    if attributes.keys() != names:
        raise ValueError(f"the training state must hold {sorted(names)}, got {sorted(attributes)}")
    for name, value in attributes.items():
        existing = getattr(model, name)
        # learn(1e6) is allowed, too
        allowed = (int, float) if name == TOTAL else type(existing)
        if isinstance(existing, int | float | str | deque) and value is not None and not isinstance(value, allowed):
            raise TypeError(f"{name} must be of type {type(existing).__name__}, got {short(value)}")
    if not trusted:
        _check_numbers(attributes)
    states = attributes["_last_states"]
    _check(states is None or _are_states(states), "_last_states", "None or the states of a memory", states)
    if not trusted:
        _check_observations(model, attributes)
        for name in ("ep_info_buffer", "ep_success_buffer"):
            _check_statistics(model, attributes[name], name)


def _check_numbers(attributes: dict[str, Any]) -> None:
    for name in (*COUNTERS, "_n_iterations"):
        value = attributes[name]
        is_total = name == TOTAL and type(value) is float and 0 <= value <= MAX_COUNT
        _check(_is_count(value) or is_total, name, f"an integer in [0, {MAX_COUNT}]", value)
    progress = attributes["_current_progress_remaining"]
    _check(is_number(progress) and 0 <= progress <= 1, "_current_progress_remaining", "a number in [0, 1]", progress)
    interval = attributes["_log_interval"]
    is_interval = interval is None or (is_number(interval) and abs(interval) <= MAX_COUNT and interval != 0)
    _check(is_interval, "_log_interval", "None or another number than 0", interval)


def check_other_parts(model: PlusModel, state: dict[str, Any]) -> None:
    """Check learning rates, the scaler of gradients, gSDE's noise and the logs, from a file that is not trusted.

    :param model: the model that will get them
    :param state: what ``read_state`` has returned
    :raises ValueError: for a value that training could not have given; the message names it
    """
    factors = state["learning_rate_factors"]
    are_factors = isinstance(factors, list) and all(factor is None or _is_finite(factor) for factor in factors)
    _check(are_factors, "learning_rate_factors", "a list of numbers from 0 on and None", factors)
    scaler = state["grad_scaler"]
    are_numbers = isinstance(scaler, dict) and all(_is_finite(value) for value in scaler.values())
    _check(are_numbers, "grad_scaler", "numbers by name", scaler)
    for name in ("has_gradient", "trainable"):
        flags = state.get(name)
        are_flags = flags is None or (isinstance(flags, list) and all(isinstance(flag, bool) for flag in flags))
        _check(are_flags, name, "None or flags", flags)
    for name, tensor in (state["gsde"] or {}).items():
        is_finite = isinstance(tensor, th.Tensor) and bool(th.isfinite(tensor).all())
        own = getattr(model.policy.action_dist, name, None)
        is_like = is_finite and isinstance(own, th.Tensor) and own.shape == tensor.shape and own.dtype == tensor.dtype
        _check(is_like, f"gsde: {short(name)}", "the noise of the policy's distribution", tensor)
    if "parts" in state:
        _check_parts(model, state["parts"])
    check_logs(state["logger"])


def _check_parts(model: PlusModel, parts: Any) -> None:  # noqa: ANN401  # from the file
    """The random numbers of parts: states that PyTorch does not check itself, and gSDE's noise."""
    is_table = isinstance(parts, dict) and parts.keys() == {"entropy", "streams", "gsde"}
    _check(is_table, "parts", "entropy, streams and gsde", parts)
    _check(type(parts["entropy"]) is int and 0 <= parts["entropy"] < 2**31, "parts: entropy", "in [0, 2**31)", None)
    streams, noise = parts["streams"], parts["gsde"]
    are_lists = isinstance(streams, list) and isinstance(noise, list)
    _check(are_lists and all(isinstance(each, list) for each in streams), "parts: streams", "lists of states", None)
    for states in streams:
        check_torch_states(states)
    own = {name: getattr(model.policy.action_dist, name, None) for name in GSDE_NOISE}
    for of_part in noise:
        is_noise = isinstance(of_part, dict) and of_part.keys() == own.keys()
        _check(is_noise, "parts: gsde", f"{GSDE_NOISE} of each part", of_part)
        for name, tensor in of_part.items():
            like: Any = own[name]
            is_like = isinstance(tensor, th.Tensor) and isinstance(like, th.Tensor) and tensor.dtype == like.dtype
            is_like = is_like and tensor.dim() == like.dim() and tensor.shape[-2:] == like.shape[-2:]
            is_like = is_like and len(tensor) <= max(model.n_envs, len(like)) and bool(th.isfinite(tensor).all())
            _check(is_like, f"parts: gsde: {name}", "noise of a part", tensor)


def check_seconds(seconds: object) -> None:
    """Check the time that a run has taken.

    :param seconds: the time in seconds
    :raises ValueError: if it is no number from 0 on
    """
    is_time = isinstance(seconds, int | float) and 0 <= seconds <= MAX_SECONDS
    _check(is_time, "seconds", f"a number in [0, {MAX_SECONDS:g}]", seconds)


def check_logs(logs: object) -> None:
    """Check the values that wait for the logger's next dump.

    :param logs: what :func:`pending_logs` has returned
    :raises ValueError: if they are no numbers and texts by name
    """
    is_table = isinstance(logs, dict) and all(isinstance(part, dict) for part in logs.values())
    _check(is_table, "logger", "tables by name", logs)
    assert isinstance(logs, dict)
    values, excluded = logs.get("name_to_value", {}), logs.get("name_to_excluded", {})
    _check(values.keys() == excluded.keys(), "logger", "tables of the same names", logs)
    for part, table in logs.items():
        for key, value in table.items():
            texts = isinstance(value, tuple | list) and all(isinstance(item, str) for item in value)
            is_plain = value is None or texts or isinstance(value, _PLAIN_STATISTICS)
            is_short = not isinstance(value, int) or abs(value) < MAX_COUNT
            if isinstance(value, th.Tensor | np.ndarray):
                # TensorBoard makes no histogram of others
                array = np.asarray(value)
                is_short = array.dtype.kind in "biuf" and bool(np.isfinite(array).all())
            is_text = value is None or texts or isinstance(value, str)
            is_right = isinstance(key, str) and is_plain and is_short and (part != "name_to_excluded" or is_text)
            _check(is_right, f"logger: {part}: {short(key)}", "a number or a text", value)


def _is_count(value: object) -> bool:
    return type(value) is int and 0 <= value <= MAX_COUNT


def _check(is_right: bool, name: str, allowed: str, value: object) -> None:
    if not is_right:
        raise ValueError(f"{name} must be {allowed}, got {short(value)}")


def _check_observations(model: PlusModel, attributes: dict[str, Any]) -> None:
    """The last observations must be some of the environments', and there must be a start for each environment."""
    n_envs = model.n_envs
    starts = attributes["_last_episode_starts"]
    is_flags = isinstance(starts, np.ndarray) and (starts.dtype, starts.shape) == (np.dtype(bool), (n_envs,))
    _check(starts is None or is_flags, "_last_episode_starts", f"None or {n_envs} flags", starts)
    for name in ("_last_obs", "_last_original_obs"):
        value = attributes[name]
        normalize = model._vec_normalize_env if name == "_last_original_obs" else None
        space = model.observation_space if normalize is None else normalize.observation_space
        _check(value is None or _is_observation(space, value, n_envs), name, f"{n_envs} observations of {space}", value)


def _is_observation(space: spaces.Space[Any], value: Any, n_envs: int) -> bool:  # noqa: ANN401  # from the file
    if isinstance(space, spaces.Dict):
        if not isinstance(value, dict) or value.keys() != space.spaces.keys():
            return False
        return all(_is_observation(space[key], value[key], n_envs) for key in value)
    # A normaliser gives other dtypes than the space has
    is_array = isinstance(value, np.ndarray) and value.dtype.kind in "biuf"
    return is_array and value.shape == (n_envs, *(space.shape or ()))


def _check_statistics(model: PlusModel, value: Any, name: str) -> None:  # noqa: ANN401  # from the file
    """Statistics of episodes are numbers and texts, alone or by name, and the model keeps some of them only."""
    if value is None:
        return
    size = getattr(model, "_stats_window_size", None)
    _check(type(value) is deque and value.maxlen == size, name, f"statistics of {size} episodes", value)
    for entry in value:
        if isinstance(entry, dict):
            # Those that SB3 averages; Monitor's info_keywords may be texts
            numbers = [entry.get(key, 0) for key in ("r", "l", "t")]
            are_plain = all(isinstance(key, str) and isinstance(entry[key], _PLAIN_STATISTICS) for key in entry)
        else:
            numbers, are_plain = [entry], True
        are_numbers = all(is_number(number) or isinstance(number, bool | np.bool_ | np.ndarray) for number in numbers)
        _check(are_plain and are_numbers, name, "numbers of episodes", entry)


def _are_states(states: Any) -> bool:  # noqa: ANN401  # from the file
    if type(states) is not RNNStates:
        return False
    leaves, _ = tree_flatten(tuple(states))
    return all(isinstance(leaf, th.Tensor) and bool(th.isfinite(leaf).all()) for leaf in leaves)


def _is_finite(value: object) -> bool:
    return isinstance(value, int | float) and 0 <= value < float("inf")
