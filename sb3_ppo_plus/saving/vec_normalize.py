"""Saves VecNormalize's settings and statistics as plain JSON. SB3 pickles them."""

from __future__ import annotations

import json
import math
import os
import pathlib
from typing import Any

import numpy as np
from gymnasium import spaces
from stable_baselines3.common.running_mean_std import RunningMeanStd
from stable_baselines3.common.vec_env import VecEnv, VecNormalize, unwrap_vec_normalize

from sb3_ppo_plus.errors import UntrustedFileError
from sb3_ppo_plus.untrusted.regular_files import read_regular_file
from sb3_ppo_plus.untrusted.strict_json import MAX_BYTES, decode_array, encode_array, get, parse, short

FORMAT = "sb3_ppo_plus.vec_normalize/1"
_FLAGS = ("training", "norm_obs", "norm_reward")
# Settings that are numbers, from 0 to the largest value allowed
_NUMBERS = {"clip_obs": math.inf, "clip_reward": math.inf, "gamma": 1.0, "epsilon": math.inf}


def save_vec_normalize(env: VecEnv, path: str | pathlib.Path) -> None:
    """Save the settings and statistics of a VecNormalize as JSON, as ``VecNormalize.save`` does with pickle.

    :param env: a VecNormalize, or a VecEnv with a VecNormalize inside
    :param path: the file, which is replaced in one step
    :raises ValueError: if there is no VecNormalize, or if it is of a subclass
    """
    normalize = unwrap_vec_normalize(env)
    if type(normalize) is not VecNormalize:
        raise ValueError(
            f"env must be or contain a VecNormalize, and none of a subclass, got {env!r} with {normalize!r}"
        )
    path = pathlib.Path(path)
    unfinished = path.with_name(path.name + ".part")
    unfinished.write_text(as_json(normalize))
    os.replace(unfinished, path)


def as_json(normalize: VecNormalize) -> str:
    """Write settings and statistics as :func:`save_vec_normalize` does.

    :param normalize: the VecNormalize, of no subclass
    :return: the content of the file
    """
    content: dict[str, Any] = {"format": FORMAT}
    content |= {name: bool(getattr(normalize, name)) for name in _FLAGS}
    content |= {name: _encode_number(float(getattr(normalize, name))) for name in _NUMBERS}
    content |= {"norm_obs_keys": normalize.norm_obs_keys, "ret_rms": _encode_statistics(normalize.ret_rms)}
    if normalize.norm_obs:
        rms: Any = normalize.obs_rms
        if isinstance(rms, dict):
            content["obs_rms"] = [[key, _encode_statistics(statistics)] for key, statistics in rms.items()]
        else:
            content["obs_rms"] = _encode_statistics(rms)
    return json.dumps(content, indent=1, allow_nan=False)


def load_vec_normalize(path: str | pathlib.Path, venv: VecEnv, trusted: bool = False) -> VecNormalize:
    """Wrap environments in a VecNormalize that was saved.

    :param path: a file of :func:`save_vec_normalize`; with ``trusted=True`` a file of ``VecNormalize.save``
    :param venv: the vectorised environment to wrap
    :param trusted: True: use ``VecNormalize.load``, which runs any code that the file holds
    :raises UntrustedFileError: if the file is damaged, or is another kind of file
    :raises ValueError: if the statistics do not fit the observations of ``venv``
    """
    if trusted:
        return VecNormalize.load(str(path), venv)
    text = read_regular_file(path, MAX_BYTES)
    if text[:1] != b"{":
        raise UntrustedFileError(
            f"{path} is no file of save_vec_normalize. If it is a pickle of VecNormalize.save, loading it needs "
            "trusted=True and runs the code in it: do so only if you trust who made it, else ask for the JSON"
        )
    content = parse(text, str(path))
    written = get(content, "format", str, str(path))
    if written != FORMAT:
        raise UntrustedFileError(f"{path}: format must be {FORMAT!r}, got {short(written)}")
    settings: dict[str, Any] = {name: get(content, name, bool, str(path)) for name in _FLAGS}
    for name, largest in _NUMBERS.items():
        settings[name] = _decode_number(get(content, name, (int, float, str), str(path)), name, largest)
    keys = get(content, "norm_obs_keys", (list, type(None)), str(path))
    observation_statistics: Any = None
    if settings["norm_obs"]:
        space = venv.observation_space
        saved = get(content, "obs_rms", (list, dict), str(path))
        observation_statistics = _observation_statistics(saved, keys, space, str(path))
    normalize = VecNormalize(venv, norm_obs_keys=keys, **settings)
    normalize.ret_rms = _decode_statistics(get(content, "ret_rms", dict, str(path)), (), f"{path}: ret_rms")
    if settings["norm_obs"]:
        normalize.obs_rms = observation_statistics
    return normalize


def _encode_number(value: float) -> float | str:
    return value if math.isfinite(value) else str(value)


def _decode_number(value: float | str, name: str, largest: float) -> float:
    number = math.inf if value == "inf" else value
    if isinstance(number, str) or not 0 <= number <= largest:
        raise UntrustedFileError(f"{name} must be a number in [0, {largest}], got {short(value)}")
    return float(number)


def _encode_statistics(statistics: RunningMeanStd) -> dict[str, Any]:
    arrays = {"mean": statistics.mean, "var": statistics.var, "count": statistics.count}
    return {name: encode_array(np.asarray(array, dtype=np.float64)) for name, array in arrays.items()}


def _decode_statistics(members: object, shape: tuple[int, ...], name: str) -> RunningMeanStd:
    mean, var, count = (
        decode_array(get(members, key, dict, name), f"{name}: {key}", expected)
        for key, expected in (("mean", shape), ("var", shape), ("count", ()))
    )
    for key, array in (("mean", mean), ("var", var), ("count", count)):
        if array.dtype != np.float64 or not np.isfinite(array).all() or (key != "mean" and (array < 0).any()):
            raise UntrustedFileError(f"{name}: {key} must be finite float64 numbers, with var and count not negative")
    statistics = RunningMeanStd(shape=shape)
    statistics.mean, statistics.var, statistics.count = mean, var, float(count)
    return statistics


def _observation_statistics(
    saved: object, keys: list[Any] | None, space: spaces.Space[Any], name: str
) -> RunningMeanStd | dict[str, RunningMeanStd]:
    """Read the statistics of observations. Their shapes must be those of ``space``."""
    if not isinstance(space, spaces.Dict):
        if isinstance(saved, list) or keys is not None:
            raise ValueError(f"{name} was saved for Dict observations, but those of venv are {space}")
        return _decode_statistics(saved, space.shape or (), f"{name}: obs_rms")
    is_list_of_pairs = isinstance(saved, list) and all(isinstance(pair, list) and len(pair) == 2 for pair in saved)
    if not isinstance(saved, list) or not is_list_of_pairs or [pair[0] for pair in saved] != keys:
        raise UntrustedFileError(f"{name}: obs_rms must hold the statistics of norm_obs_keys, {short(keys)}")
    unknown = [key for key, _ in saved if not isinstance(key, str) or key not in space.spaces]
    if unknown:
        raise ValueError(f"{name} has statistics of {short(unknown)}, which the observations of venv lack")
    return {
        key: _decode_statistics(statistics, space[key].shape or (), f"{name}: {short(key)}")
        for key, statistics in saved
    }
