"""What replays and compiled graphs take for granted of a policy, and whether it still holds."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from copy import copy
from types import FunctionType, GetSetDescriptorType
from typing import Any, TypeVar

import numpy as np
import torch as th
from stable_baselines3.common.distributions import Distribution
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.torch_layers import CombinedExtractor, FlattenExtractor, MlpExtractor, NatureCNN
from torch import nn
from torch.optim import Optimizer

from sb3_ppo_plus.policies.actor_critic import (
    ActorCriticPlusCnnPolicy,
    ActorCriticPlusPolicy,
    MultiInputActorCriticPlusPolicy,
    has_own_methods,
)
from sb3_ppo_plus.torch_private import backward_hooks, contents_of, forward_hooks

KNOWN_POLICIES = (ActorCriticPlusPolicy, ActorCriticPlusCnnPolicy, MultiInputActorCriticPlusPolicy)
KNOWN_MODULES = (
    *(nn.Linear, nn.Conv2d, nn.Flatten, nn.Identity, nn.Sequential, nn.ModuleDict),
    *(nn.Tanh, nn.ReLU, nn.ELU, nn.GELU, nn.LeakyReLU, nn.SiLU, nn.Sigmoid, nn.Softplus),
    *(nn.Mish, nn.SELU, nn.CELU, nn.ReLU6, nn.Softsign, nn.Hardtanh, nn.Hardswish, nn.LayerNorm),
    *(FlattenExtractor, NatureCNN, CombinedExtractor, MlpExtractor),
)
KNOWN_DISTRIBUTIONS = ("sb3_ppo_plus.", "stable_baselines3.common.")

Policy = TypeVar("Policy", bound=nn.Module)

# What acting and evaluating together passes through, and what it does apart. Private ones are overridden too
METHODS_OF_ACTING = (
    "forward",
    "forward_step",
    "evaluate_actions",
    "extract_features",
    "get_distribution",
    "predict_values",
    "value_and_distribution",
    "_distribution_and_state",
    "_evaluate",
    "_get_action_dist_from_latent",
    "_masked_distribution",
)

OF_EVERY_MODULE = vars(nn.Module()).keys() - {"training"}

_KNOWN_CLASSES = {base for known in (*KNOWN_POLICIES, *KNOWN_MODULES) for base in known.__mro__} - {object}


def has_known_parts(policy: ActorCriticPolicy) -> bool:
    """Whether all that the policy does at each call is known: it and its parts are of known classes, as they are."""
    return (
        type(policy) in KNOWN_POLICIES
        and policy.memory_options is None
        and _is_known(type(policy.action_dist))
        and has_known_modules(policy)
        and not any(has_own_methods(part) for part in policy.modules())
        and hindrance(policy) is None
    )


def has_known_modules(policy: nn.Module) -> bool:
    """Whether the policy's parts are known neither to draw random numbers nor to update a state at a call."""
    return all(type(part) in KNOWN_MODULES for part in policy.modules() if part is not policy)


def hindrance(policy: nn.Module) -> str | None:
    """Say what replays and graphs of the policy would pass by: code of others that its calls run; None: nothing."""
    parts, action_dist = [*policy.modules()], getattr(policy, "action_dist", None)
    forward, backward = forward_hooks(parts), backward_hooks(parts)
    if forward is None or backward is None or contents_of(policy) is None:
        return "this PyTorch does not show the hooks and parts of modules"
    if any(forward) or any(backward):
        return "a module has a hook, which a graph would pass by"
    if action_dist is not None and has_own_methods(action_dist):
        return f"a method of the policy's {type(action_dist).__name__} was replaced, which a graph would pass by"
    for kind in classes_of([*parts, action_dist]):
        if _code_of(kind).is_patched:
            return f"a method of the class {kind.__name__} was replaced, which a graph would pass by"
    return None


def classes_of(owners: Iterable[object]) -> list[type]:
    """Return the classes of objects and their bases, each once, but for ``object``."""
    classes = dict.fromkeys(base for kind in dict.fromkeys(map(type, owners)) for base in kind.__mro__)
    return [kind for kind in classes if kind not in (object, type(None))]


class _Code:
    """The methods of a class as they are now; equal where they are the same.

    :param kind: the class
    """

    def __init__(self, kind: type) -> None:
        self.attributes = dict(vars(kind))
        self.methods = {name: value for name, value in self.attributes.items() if _is_code(value)}
        self.is_patched = _is_known(kind) and any(
            _is_foreign(function, kind) for value in self.methods.values() for function in _functions_of(value)
        )
        """Whether somebody has put a method of his own into a class that is known."""

    def __eq__(self, other: object) -> bool:
        return self is other or (isinstance(other, _Code) and _is_equal(self.methods, other.methods))

    def __hash__(self) -> int:
        return hash(tuple(self.methods))


# What was last seen of the known classes, as it takes long to look through all
_KNOWN_CODE: dict[type, _Code] = {}


def _code_of(kind: type) -> _Code:
    last = _KNOWN_CODE.get(kind)
    if last is not None and _is_equal(last.attributes, vars(kind)):
        return last
    now = _Code(kind)
    if _is_known(kind):
        _KNOWN_CODE[kind] = now
    return now


def _is_known(kind: type) -> bool:
    return kind in _KNOWN_CLASSES or kind.__module__.startswith(KNOWN_DISTRIBUTIONS)


def _is_equal(first: object, second: object) -> bool:
    """Whether Python says so; objects that are the same are equal without a call. False where it cannot say."""
    try:
        return bool(first == second)
    except Exception:  # arrays and tensors, for one
        return False


def _is_code(value: object) -> bool:
    return callable(value) or hasattr(value, "__get__")


def _functions_of(value: object) -> Sequence[object]:
    if isinstance(value, property):
        return value.fget, value.fset, value.fdel
    return (value.__func__,) if isinstance(value, staticmethod | classmethod) else (value,)


def _is_foreign(value: object, kind: type) -> bool:
    """Whether something in a class is a function that was written in another file, or wraps one."""
    if isinstance(value, FunctionType):
        # The globals are those of the file, whatever a decorator has copied from the method
        return not str(value.__globals__.get("__name__")).startswith(kind.__module__)
    return _is_code(value) and not isinstance(value, type | GetSetDescriptorType)


def constant_tensors(policy: nn.Module) -> list[th.Tensor]:
    """Tensors that a graph of the policy holds on to: attributes that are neither parameters nor buffers."""
    return [value for part in policy.modules() for value in vars(part).values() if isinstance(value, th.Tensor)]


def python_state(policy: nn.Module) -> Hashable:
    """What a graph of the policy has compiled in: its parts and their attributes, but for tensors."""
    action_dist = getattr(policy, "action_dist", None)
    # The parts themselves: an id may be that of another one after it is gone
    of_parts = tuple((part, type(part), *_settings(part)) for part in policy.modules())
    code = tuple(map(_code_of, classes_of([*policy.modules(), action_dist])))
    return of_parts, type(action_dist), tuple(distribution_settings(action_dist).items()), code


def distribution_settings(action_dist: object) -> dict[str, int | float | str]:
    """Return what was set in a distribution.

    Not what it remembers of its last use, nor the objects that it makes for each sample.
    """
    attributes = getattr(action_dist, "__dict__", {})
    return {
        name: value for name, value in attributes.items() if name[0] != "_" and isinstance(value, int | float | str)
    }


def _settings(owner: object) -> list[tuple[str, Hashable]]:
    return [
        (name, _frozen(value))
        for name, value in getattr(owner, "__dict__", {}).items()
        if name not in OF_EVERY_MODULE and not isinstance(value, th.Tensor | Distribution | Optimizer)
    ]


def _frozen(value: object) -> Hashable:
    if value is None or isinstance(value, int | float | str | type):
        return value
    if isinstance(value, dict):
        return tuple((_frozen(key), _frozen(item)) for key, item in value.items())
    if isinstance(value, list | tuple):
        return tuple(map(_frozen, value))
    if isinstance(value, set | frozenset):
        return frozenset(map(_frozen, value))
    return (value.shape, value.tobytes()) if isinstance(value, np.ndarray) else _Itself(value)


class _Itself:
    """Equal to the same object alone, whatever its own comparison says."""

    def __init__(self, value: object) -> None:
        self._value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Itself) and self._value is other._value

    def __hash__(self) -> int:
        return id(self._value)


def layout_of(tensors: Sequence[th.Tensor]) -> Hashable:
    """Shapes, strides and dtypes: what a replay or graph has compiled in of its inputs."""
    return tuple((tensor.shape, tensor.stride(), tensor.dtype) for tensor in tensors)


def structural_copy(policy: Policy) -> Policy:
    """Return modules of the same classes with the same attributes, which what is put in or replaced does not reach."""
    copies: dict[nn.Module, Any] = {part: copy(part) for part in policy.modules()}
    for part in copies.values():
        for name, value in vars(part).items():
            if isinstance(value, dict | Distribution):
                vars(part)[name] = copy(value)
        for contents in contents_of(part) or ():
            contents.update((name, copies[item]) for name, item in contents.items() if isinstance(item, nn.Module))
    copied: Policy = copies[policy]
    return copied
