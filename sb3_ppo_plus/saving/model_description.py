"""A model's plain description: arguments, spaces and counters as JSON. Classes are names from fixed tables."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from gymnasium import spaces
from stable_baselines3 import PPO
from stable_baselines3.common.buffers import DictRolloutBuffer, RolloutBuffer
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor, CombinedExtractor
from stable_baselines3.common.utils import ConstantSchedule, FloatSchedule, LinearSchedule
from torch import nn
from torch.optim import Optimizer

from sb3_ppo_plus.argument_checks import own_parameters
from sb3_ppo_plus.attributes import COUNTERS, FLAGS
from sb3_ppo_plus.buffers import PPOPlusDictRolloutBuffer, PPOPlusRolloutBuffer
from sb3_ppo_plus.errors import UntrustedFileError
from sb3_ppo_plus.extractors import FEATURES_EXTRACTORS
from sb3_ppo_plus.policies.names import ACTIVATIONS, OPTIMIZERS
from sb3_ppo_plus.saving.described_spaces import encode_space
from sb3_ppo_plus.schedules import Constant, Cosine, Exponential, Linear, WarmupCosine
from sb3_ppo_plus.untrusted.strict_json import MAX_DEPTH, MAX_DIGITS, get, short

FORMAT = "sb3_ppo_plus.model/1"
# Arguments that are not described: policy has its own entry, the others belong to the machine that loads
LEFT_OUT = ("env", "policy", "device", "tensorboard_log")
# Arguments that version 0.1 does not have, and their defaults. These are left out, so that it loads what it can
DEFAULTS_OF_LATER_ARGUMENTS = {
    **{"worker_timeout": None, "restart_workers": 0, "micro_batches": 1, "distributed": False},
    **{"symmetry": None, "symmetry_mode": "augment", "symmetry_coef": 1.0},
    **{"caps_temporal": 0.0, "caps_spatial": 0.0, "caps_sigma": 0.1},
}
SCHEDULES = {cls.__name__: cls for cls in (Constant, Cosine, Exponential, Linear, WarmupCosine, LinearSchedule)}
ROLLOUT_BUFFERS: dict[str, type[RolloutBuffer]] = {
    "RolloutBuffer": RolloutBuffer,
    "DictRolloutBuffer": DictRolloutBuffer,
    "PPOPlusRolloutBuffer": PPOPlusRolloutBuffer,
    "PPOPlusDictRolloutBuffer": PPOPlusDictRolloutBuffer,
}
# In this order: an extractor is a module too, but no activation
_BASES: dict[str, type] = {
    "policy": ActorCriticPolicy,
    "features_extractor_class": BaseFeaturesExtractor,
    "optimizer_class": Optimizer,
    "rollout_buffer_class": RolloutBuffer,
    "activation_fn": nn.Module,
}

Tables = dict[str, dict[str, type]]


def constructor_arguments(cls: type[PPO]) -> list[str]:
    """Return the names of the arguments of a constructor, and of those to which it may pass ``**kwargs``.

    :param cls: class of the model
    """
    names: dict[str, None] = {}
    for part in cls.__mro__[: cls.__mro__.index(PPO)]:
        if "__init__" in vars(part):
            names |= dict.fromkeys(own_parameters(vars(part)["__init__"]))
    return [name for name in names if name != "_init_setup_model"]


def closed_tables(cls: type[PPO], allow: Iterable[type] | None = None) -> Tables:
    """Return the classes that a description may name, by kind and by name.

    :param cls: class of the model, which has its own table of policies
    :param allow: further classes: policies, features extractors, optimisers, rollout buffers, activations, or
        dataclasses that are schedules
    :raises TypeError: for anything else in ``allow``
    """
    tables: Tables = {
        "policy": dict(cls.policy_aliases),
        "features_extractor_class": {**FEATURES_EXTRACTORS, "sb3_combined": CombinedExtractor},
        "optimizer_class": dict(OPTIMIZERS),
        "rollout_buffer_class": dict(ROLLOUT_BUFFERS),
        "activation_fn": dict(ACTIVATIONS),
        "schedule": dict(SCHEDULES),
    }
    if isinstance(allow, type):
        raise TypeError(f"allow must be a list of classes, got {allow!r}: write allow=[{allow.__name__}]")
    for allowed in allow or ():
        tables[_kind_of(allowed)][_full_name(allowed)] = allowed
    return tables


def _kind_of(allowed: object) -> str:
    if isinstance(allowed, type):
        for kind, base in _BASES.items():
            if issubclass(allowed, base):
                return kind
        if dataclasses.is_dataclass(allowed) and "__call__" in dir(allowed):
            return "schedule"
    bases = ", ".join(base.__name__ for base in _BASES.values())
    raise TypeError(f"allow must hold subclasses of {bases}, or dataclasses that are schedules; got {allowed!r}")


def _full_name(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def describe(model: PPO, exclude: Iterable[str] = ()) -> bytes:
    """Describe a model as JSON, see :func:`description_of`.

    :param model: the model
    :param exclude: names of attributes to leave out
    """
    return description_as_json(description_of(model, exclude))


def description_as_json(description: dict[str, Any]) -> bytes:
    """Turn a description into the bytes of its file.

    :param description: what :func:`description_of` has returned
    """
    return json.dumps(description, indent=1, allow_nan=False).encode()


def description_of(
    model: PPO, exclude: Iterable[str] = (), described_spaces: Sequence[dict[str, Any]] | None = None
) -> dict[str, Any]:
    """Describe a model as plain values, which do not change with the model later.

    A value without a plain form is described as unknown, so that saving works, and only loading without trust fails.

    :param model: the model
    :param exclude: names of attributes to leave out
    :param described_spaces: what :func:`describe_space` has returned for the spaces of observations and of actions;
        None: it is called here
    """
    spaces_as_json = described_spaces or [describe_space(model.observation_space), describe_space(model.action_space)]
    tables = closed_tables(type(model))
    # The other attributes have the names of their arguments
    attributes = {"stats_window_size": "_stats_window_size", "policy": "policy_class"}
    left_out = {*exclude, *LEFT_OUT}
    arguments = {}
    for name in constructor_arguments(type(model)):
        attribute = attributes.get(name, name)
        if attribute in left_out or not hasattr(model, attribute):
            continue
        value = getattr(model, attribute)
        if name not in DEFAULTS_OF_LATER_ARGUMENTS or value != DEFAULTS_OF_LATER_ARGUMENTS[name]:
            arguments[name] = encode(value, tables, name)
    return {
        "format": FORMAT,
        "policy": arguments.pop("policy"),
        "arguments": arguments,
        "observation_space": spaces_as_json[0],
        "action_space": spaces_as_json[1],
        "n_envs": model.n_envs,
        "counters": {name: int(getattr(model, name)) for name in COUNTERS},
        "flags": {name: getattr(model, name) for name in FLAGS},
        "progress_remaining": float(model._current_progress_remaining),
    }


def describe_space(space: spaces.Space[Any]) -> dict[str, Any]:
    """Describe a space as plain values; as unknown if it has no plain form.

    :param space: the space
    """
    try:
        return encode_space(space)
    except ValueError:
        return _unknown(space)


def _unknown(value: object) -> dict[str, Any]:
    name = getattr(value, "__qualname__", None)
    what = f"{type(value).__module__}.{type(value).__qualname__}"
    return {"$": "unknown", "what": f"the {type(value).__name__} {name}" if name else f"an object of type {what}"}


def encode(value: Any, tables: Tables, field: str, depth: int = 0) -> Any:  # noqa: ANN401  # any argument, any JSON
    """Turn a value into JSON. An object with the key "$" stands for what JSON lacks, such as a tuple or a class.

    :param value: the value
    :param tables: see :func:`closed_tables`
    :param field: name of the argument, or the key, that has this value
    :param depth: number of lists and dicts around it
    """
    if isinstance(value, np.generic):
        value = value.item()
    if value is None or type(value) in (bool, str):
        return value
    if type(value) is int:
        return value if len(str(value)) <= MAX_DIGITS else _unknown(value)
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else {"$": "number", "value": str(float(value))}
    # A third, since the description puts further levels around and between these
    if isinstance(value, list | tuple | dict) and depth < MAX_DEPTH // 3:
        if isinstance(value, dict):
            if "$" in value or not all(isinstance(key, str) for key in value):
                return _unknown(value)
            return {key: encode(item, tables, key, depth + 1) for key, item in value.items()}
        items = [encode(item, tables, field, depth + 1) for item in value]
        return items if isinstance(value, list) else {"$": "tuple", "items": items}
    if isinstance(value, type) and "<locals>" not in value.__qualname__:
        known = {cls: name for name, cls in tables.get(_kind_at(field), {}).items()}
        return {"$": "class", "name": known.get(value, _full_name(value))}
    return _encode_schedule(value, tables)


def _encode_schedule(value: Any, tables: Tables) -> Any:  # noqa: ANN401  # any argument, any JSON
    if isinstance(value, FloatSchedule):
        return encode(value.value_schedule, tables, "schedule")
    if type(value) is ConstantSchedule:
        return encode(value.val, tables, "schedule")
    if dataclasses.is_dataclass(value) and callable(value):
        state = {field.name: getattr(value, field.name) for field in dataclasses.fields(value) if field.init}
    elif type(value) is LinearSchedule:
        state = dict(vars(value))
    else:
        return _unknown(value)
    if "<locals>" in type(value).__qualname__:
        return _unknown(value)
    name = {cls: name for name, cls in tables["schedule"].items()}.get(type(value), _full_name(type(value)))
    return {"$": "schedule", "name": name, "arguments": encode(state, tables, "schedule")}


def _kind_at(field: str) -> str:
    """Return the kind of a class, by the argument or the key that has it."""
    # MultiInputExtractor's ``extractors`` hold extractors under any key, and under "class" inside it
    return field if field in _BASES else "features_extractor_class"


def decode(value: Any, tables: Tables, path: tuple[str, ...]) -> Any:  # noqa: ANN401  # the inverse of encode
    """Read the JSON of :func:`encode`. Nothing is imported: classes come only from the tables.

    :param value: the JSON value
    :param tables: see :func:`closed_tables`
    :param path: name of the argument, then the keys that lead to this value
    :raises UntrustedFileError: for a class that is not in the table of its kind, and for a value without a plain form
    """
    name = ".".join(path)
    if isinstance(value, list):
        return [decode(item, tables, path) for item in value]
    if not isinstance(value, dict):
        return value
    if "$" not in value:
        return {key: decode(item, tables, (*path, key)) for key, item in value.items()}
    tag = get(value, "$", str, name)
    if tag == "number" and value.get("value") in ("inf", "-inf", "nan"):
        return float(value["value"])
    if tag == "tuple":
        return tuple(decode(item, tables, path) for item in get(value, "items", list, name))
    if tag == "class":
        return _look_up(tables, _kind_at_path(path), get(value, "name", str, name), name)
    if tag == "schedule" and len(path) == 1:
        arguments = decode(get(value, "arguments", dict, name), tables, (*path, "arguments"))
        schedule_class = _look_up(tables, "schedule", get(value, "name", str, name), name)
        try:
            return schedule_class(**arguments)
        except (TypeError, ValueError) as error:
            raise UntrustedFileError(f"{name}: {schedule_class.__name__} refuses its arguments: {error}") from error
    if tag == "unknown":
        raise UntrustedFileError(
            f"{name} is {short(value.get('what'))}, which has no plain description: give it to load() "
            f"as an argument ({path[0]}=...), or load with trusted=True if you trust the file"
        )
    raise UntrustedFileError(f"{name}: {short(value)} is not allowed there")


def _kind_at_path(path: tuple[str, ...]) -> str:
    """Return the kind of a class at a place of the description. No class is allowed where it is not in the tables."""
    if len(path) == 1:
        return path[0]
    if path[0] != "policy_kwargs":
        return ""
    is_extractor = "extractors" in path[-3:-1] and path[-1] not in _BASES
    return "features_extractor_class" if is_extractor else path[-1]


def _look_up(tables: Mapping[str, Mapping[str, type]], kind: str, wanted: str, name: str) -> type:
    if kind not in tables:
        raise UntrustedFileError(f"{name}: a class is not allowed there, got {short(wanted)}")
    if wanted not in tables[kind]:
        remedy = "give the class itself to load() in allow=[...] if you want it"
        # A class of a script is written as __main__.Name, and is another one where a module holds it
        alike = [known for known in tables[kind] if known.rpartition(".")[2] == wanted.rpartition(".")[2]]
        if alike:
            argument = name.partition(".")[0]
            remedy = f"{alike[0]} has another module. To use it, give load() the argument {argument}= with your class"
        raise UntrustedFileError(
            f"{name} is the class {short(wanted)}, which is not one of {', '.join(tables[kind])}; {remedy}"
        )
    return tables[kind][wanted]
