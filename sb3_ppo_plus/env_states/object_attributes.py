"""The attributes of an object: its own, those in slots, and the data of its classes."""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Collection
from functools import cache
from types import MemberDescriptorType
from typing import Any

import gymnasium as gym
from gymnasium import spaces
from gymnasium.envs.registration import EnvSpec
from stable_baselines3.common.vec_env import VecEnvWrapper

# Packages whose classes do not change their data, nor delete attributes that they make in __init__
LIBRARIES = (
    *("gymnasium", "stable_baselines3", "sb3_contrib", "rl_zoo3", "sb3_ppo_plus", "ale_py", "minigrid", "shimmy"),
    *("abc", "builtins", "collections", "typing", "enum", "functools", "numpy", "torch"),
)
# Attributes of a class that count as those of its objects
SPACES = ("observation_space", "action_space")
# Attributes that are no state: how an object was made
NOT_STATE = {
    "_abc_impl",
    "_cached_spec",
    "_ezpickle_args",
    "_ezpickle_kwargs",
    "_metadata",
    "_saved_kwargs",
    "metadata",
    "spec",
}
# Of these, what users' own classes use as they like. They are saved if they can be
OF_USERS = ("metadata", "_metadata", "spec")
# The same of wrappers: what they wrap
NOT_STATE_OF_WRAPPERS = {"class_attributes", "env", "venv"}
# The same of libraries' classes: what an Atari game can do, spaces that stay
NOT_STATE_OF_LIBRARIES = {"_action_set", "obs_spaces"}


def is_no_state(owner: Any, name: str) -> bool:  # noqa: ANN401  # any object
    """Whether an attribute is never state, whatever its value.

    :param owner: the object
    :param name: name of the attribute
    """
    if name in OF_USERS and not is_of_library(type(owner)):
        # gymnasium.make gives an environment its specification
        return name == "spec" and isinstance(getattr(owner, "__dict__", {}).get("spec"), EnvSpec | None)
    if name in NOT_STATE or is_special(name):
        return True
    if name in NOT_STATE_OF_WRAPPERS:
        return isinstance(owner, gym.Wrapper | VecEnvWrapper)
    return name in NOT_STATE_OF_LIBRARIES and is_of_library(type(owner))


def is_special(name: str) -> bool:
    """Whether Python gives an attribute of this name a meaning, as to ``__class__``.

    :param name: name of the attribute
    """
    return name.startswith("__") and name.endswith("__")


def saves_itself(layer: object) -> bool:
    """Whether an environment or a wrapper saves its state itself.

    :param layer: the environment or wrapper
    """
    # The class is asked, since an instance of SB3's wrappers has the methods of what it wraps
    return hasattr(type(layer), "get_resume_state") and hasattr(type(layer), "set_resume_state")


def is_of_library(cls: type[Any]) -> bool:
    """Whether a class comes from a package in :data:`LIBRARIES`.

    :param cls: the class
    """
    return cls.__module__.partition(".")[0] in LIBRARIES


def attributes_of(owner: Any) -> dict[str, Any]:  # noqa: ANN401  # any object
    """Return the attributes of an object: its own, those in slots, and spaces that belong to its class.

    :param owner: any object
    """
    cls: Any = type(owner)
    attributes: dict[str, Any] = dict(_spaces_of_class(cls))
    for name, slot in _slots(cls):
        try:
            attributes[name] = slot.__get__(owner)
        except AttributeError:
            # The slot is empty
            continue
    attributes |= getattr(owner, "__dict__", {})
    return attributes


def own_attributes(owner: Any) -> set[str]:  # noqa: ANN401  # any object
    """Return the names of an object's own attributes, those in slots included.

    :param owner: any object
    """
    cls: Any = type(owner)
    return attributes_of(owner).keys() - {name for name, _ in _spaces_of_class(cls)}


def class_attributes_of(owner: Any) -> dict[tuple[type[Any], str], Any]:  # noqa: ANN401  # any object
    """Return the data of the classes of an object by class and name, without methods, and without libraries' classes.

    :param owner: any object
    """
    attributes = {}
    owner_class: Any = type(owner)
    for cls in own_classes(owner_class):
        for name, value in vars(cls).items():
            is_special = name.startswith("__") or name in NOT_STATE or name in SPACES
            # What has __get__ is a method, a property or a slot
            if not is_special and not hasattr(type(value), "__get__") and not callable(value):
                attributes[cls, name] = value
    return attributes


@cache
def names_of_classes(cls: type[Any]) -> dict[str, type[Any]]:
    """Return the classes of an object that come from no library by the names under which their data is saved.

    :param cls: the object's class
    :return: each class by its name; of several with one name the second is "Name#2", from the most special one on
    """
    names: dict[str, type[Any]] = {}
    counts: Counter[str] = Counter()
    hashable: Any = cls
    for own in own_classes(hashable):
        counts[own.__name__] += 1
        names[f"{own.__name__}#{counts[own.__name__]}"] = own
    # A plain name of an earlier version does not tell which of several it meant
    return {name.partition("#")[0] if counts[own.__name__] == 1 else name: own for name, own in names.items()}


def saved_class_attributes_of(owner: object) -> dict[str, Any]:
    """Return the data of an object's classes by the names under which it is saved, "Class.attribute".

    :param owner: any object
    """
    owner_class: Any = type(owner)
    names = {cls: name for name, cls in names_of_classes(owner_class).items()}
    return {f"{names[cls]}.{name}": value for (cls, name), value in class_attributes_of(owner).items()}


def delete_later_class_attributes(cls: type[Any], names: Collection[str]) -> list[str]:
    """Delete the attributes that a class has got later.

    :param cls: the class
    :param names: names of those that it had
    :return: names of those that were deleted
    """
    later = [name for name in vars(cls) if name not in names and not name.startswith("__")]
    for name in later:
        delattr(cls, name)
    return later


@cache
def own_classes(cls: type[Any]) -> tuple[type[Any], ...]:
    """Return the classes of an object that come from no library, the most special one first.

    :param cls: the object's class
    """
    return tuple(base for base in cls.__mro__ if not is_of_library(base))


@cache
def _slots(cls: type[Any]) -> tuple[tuple[str, MemberDescriptorType], ...]:
    members = [item for base in reversed(cls.__mro__) for item in vars(base).items()]
    return tuple((name, member) for name, member in members if isinstance(member, MemberDescriptorType))


@cache
def _spaces_of_class(cls: type[Any]) -> tuple[tuple[str, spaces.Space[Any]], ...]:
    found = [(name, inspect.getattr_static(cls, name, None)) for name in SPACES]
    return tuple((name, space) for name, space in found if isinstance(space, spaces.Space))
