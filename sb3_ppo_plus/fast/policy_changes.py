"""What replays and compiled graphs assume about a policy, and whether that is still true."""

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
from sb3_ppo_plus.policies.hybrid_distribution import PartNets, distributions_in
from sb3_ppo_plus.torch_private import backward_hooks, contents_of, forward_hooks, has_function_modes

KNOWN_POLICIES = (ActorCriticPlusPolicy, ActorCriticPlusCnnPolicy, MultiInputActorCriticPlusPolicy)
KNOWN_MODULES = (
    *(nn.Linear, nn.Conv2d, nn.Flatten, nn.Identity, nn.Sequential, nn.ModuleDict),
    *(nn.Tanh, nn.ReLU, nn.ELU, nn.GELU, nn.LeakyReLU, nn.SiLU, nn.Sigmoid, nn.Softplus),
    *(nn.Mish, nn.SELU, nn.CELU, nn.ReLU6, nn.Softsign, nn.Hardtanh, nn.Hardswish, nn.LayerNorm),
    *(FlattenExtractor, NatureCNN, CombinedExtractor, MlpExtractor, PartNets),
)
KNOWN_PACKAGES = ("sb3_ppo_plus.", "stable_baselines3.common.")

Policy = TypeVar("Policy", bound=nn.Module)

# The policy's methods that choose actions and evaluate them. Users override private methods too
METHODS_OF_ACTING = (
    "forward",
    "forward_step",
    "evaluate_actions",
    "extract_features",
    "get_distribution",
    "predict_values",
    "remembering_distribution",
    "value_and_distribution",
    "_actor_features",
    "_critic_features",
    "_distribution_and_state",
    "_evaluate",
    "_get_action_dist_from_latent",
    "_masked_distribution",
)

# Attributes that every module has
ATTRIBUTES_OF_EVERY_MODULE = vars(nn.Module()).keys() - {"training"}

_KNOWN_CLASSES = {base for known in (*KNOWN_POLICIES, *KNOWN_MODULES) for base in known.__mro__} - {object}


def has_known_parts(policy: ActorCriticPolicy) -> bool:
    """Whether all that the policy does in a call is known: all classes are known, and nothing was replaced.

    :param policy: the policy
    """
    return (
        type(policy) in KNOWN_POLICIES
        and policy.memory_options is None
        and all(_is_known(type(distribution)) for distribution in distributions_in(policy.action_dist))
        and has_known_modules(policy)
        and not any(has_own_methods(part) for part in policy.modules())
        and hindrance(policy) is None
    )


def has_known_modules(policy: nn.Module) -> bool:
    """Whether all parts are of known classes. Such parts draw no random numbers and keep no state between calls.

    :param policy: the policy
    """
    return all(type(part) in KNOWN_MODULES for part in policy.modules() if part is not policy)


def hindrance(policy: nn.Module) -> str | None:
    """Return why a replay or graph would skip a user's code, such as a hook; None: it would skip nothing.

    :param policy: the policy
    """
    parts, action_dists = [*policy.modules()], distributions_in(getattr(policy, "action_dist", None))
    forward, backward = forward_hooks(parts), backward_hooks(parts)
    if forward is None or backward is None or contents_of(policy) is None:
        return "this PyTorch does not show the hooks and parts of modules"
    if any(forward) or any(backward):
        return "a module has a hook, which a graph would not call"
    if has_function_modes():
        return "a TorchFunctionMode is on, which a graph would not call"
    for action_dist in filter(has_own_methods, action_dists):
        return f"a method of the policy's {type(action_dist).__name__} was replaced, which a graph would not notice"
    for kind in classes_of([*parts, *action_dists]):
        if is_patched(kind):
            return f"a method of the class {kind.__name__} was replaced, which a graph would not notice"
    return None


def classes_of(owners: Iterable[object]) -> list[type]:
    """Return the classes of objects and their bases, each once, without ``object``.

    :param owners: the objects; None among them is left out
    """
    classes = dict.fromkeys(base for kind in dict.fromkeys(map(type, owners)) for base in kind.__mro__)
    return [kind for kind in classes if kind not in (object, type(None))]


class _Code:
    """The methods of a class at one moment. Two are equal if their methods are equal.

    :param kind: the class
    """

    def __init__(self, kind: type) -> None:
        self.attributes = dict(vars(kind))
        self.methods = {name: value for name, value in self.attributes.items() if _is_code(value)}
        self.is_patched = _is_known(kind) and any(
            _is_foreign(function, kind) for value in self.methods.values() for function in _functions_of(value)
        )
        """Whether the class is known, and somebody has put another method into it."""

    def __eq__(self, other: object) -> bool:
        return self is other or (isinstance(other, _Code) and _is_equal(self.methods, other.methods))

    def __hash__(self) -> int:
        return hash(tuple(self.methods))


# After the first use of torch.compile in a process, torch._dynamo wraps the constructor of Module. This is no user's
# change
OWN_PATCHES_OF_TORCH = "torch._dynamo."

# The known classes as they were last seen, because looking through their methods takes long
_KNOWN_CODE: dict[type, _Code] = {}


def _code_of(kind: type) -> _Code:
    last = _KNOWN_CODE.get(kind)
    if last is not None and _is_equal(last.attributes, vars(kind)):
        return last
    now = _Code(kind)
    if _is_known(kind):
        _KNOWN_CODE[kind] = now
    return now


def is_patched(kind: type) -> bool:
    """Whether somebody has replaced or added a method of a known class; False for other classes.

    :param kind: the class
    """
    return _code_of(kind).is_patched


def _is_known(kind: type) -> bool:
    return kind in _KNOWN_CLASSES or kind.__module__.startswith(KNOWN_PACKAGES)


def _is_equal(first: object, second: object) -> bool:
    """Whether two objects are equal; False if Python cannot compare them."""
    try:
        return bool(first == second)
    except Exception:  # arrays and tensors have no single truth value
        return False


def _is_code(value: object) -> bool:
    return callable(value) or hasattr(value, "__get__")


def _functions_of(value: object) -> Sequence[object]:
    if isinstance(value, property):
        return value.fget, value.fset, value.fdel
    return (value.__func__,) if isinstance(value, staticmethod | classmethod) else (value,)


def _is_foreign(value: object, kind: type) -> bool:
    """Whether a value in a class is a function from another file, or an object that may wrap one."""
    if isinstance(value, FunctionType):
        # A decorator may copy a method's name and module, but not the globals of its file
        return not str(value.__globals__.get("__name__")).startswith((kind.__module__, OWN_PATCHES_OF_TORCH))
    return _is_code(value) and not isinstance(value, type | GetSetDescriptorType)


def constant_tensors(policy: nn.Module) -> Hashable:
    """Return the tensors that a graph holds as constants: attributes that are neither parameters nor buffers.

    :param policy: the policy
    :return: equal to another result only if both have the very same tensor objects
    """
    tensors = [value for part in policy.modules() for value in vars(part).values() if isinstance(value, th.Tensor)]
    return _frozen(tensors)


def python_state(policy: nn.Module) -> Hashable:
    """Return what a graph of the policy holds as constants: its parts and their attributes, without tensors.

    :param policy: the policy
    """
    action_dists = distributions_in(getattr(policy, "action_dist", None))
    # The parts themselves, not their ids, which later objects may have again
    parts = tuple((part, type(part), *_settings(part)) for part in policy.modules())
    code = tuple(map(_code_of, classes_of([*policy.modules(), *action_dists])))
    settings = tuple((type(action_dist), *distribution_settings(action_dist).items()) for action_dist in action_dists)
    return parts, settings, code


def distribution_settings(action_dist: object) -> dict[str, int | float | str]:
    """Return a distribution's settings, without what it keeps from its last use.

    :param action_dist: the policy's distribution
    :return: its public attributes that are numbers or strings, by name
    """
    attributes = getattr(action_dist, "__dict__", {})
    return {
        name: value for name, value in attributes.items() if name[0] != "_" and isinstance(value, int | float | str)
    }


def _settings(owner: object) -> list[tuple[str, Hashable]]:
    return [
        (name, _frozen(value))
        for name, value in getattr(owner, "__dict__", {}).items()
        if name not in ATTRIBUTES_OF_EVERY_MODULE and not isinstance(value, th.Tensor | Distribution | Optimizer)
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
    return (value.shape, value.tobytes()) if isinstance(value, np.ndarray) else _ByIdentity(value)


class _ByIdentity:
    """Wraps an object so that it is compared by identity. Tensors, for example, have no usable ``==``."""

    def __init__(self, value: object) -> None:
        self._value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _ByIdentity) and self._value is other._value

    def __hash__(self) -> int:
        return id(self._value)


def layout_of(tensors: Sequence[th.Tensor]) -> Hashable:
    """Return shapes, strides and dtypes, for which a replay or graph is made.

    :param tensors: the inputs
    """
    return tuple((tensor.shape, tensor.stride(), tensor.dtype) for tensor in tensors)


def structural_copy(policy: Policy) -> Policy:
    """Copy the structure of a policy, but not its tensors. Later changes of the policy's parts do not change the copy.

    :param policy: the policy
    """
    copies: dict[nn.Module, Any] = {part: copy(part) for part in policy.modules()}
    for part in copies.values():
        for name, value in vars(part).items():
            if isinstance(value, dict | Distribution):
                vars(part)[name] = copy(value)
        for contents in contents_of(part) or ():
            contents.update((name, copies[item]) for name, item in contents.items() if isinstance(item, nn.Module))
    copied: Policy = copies[policy]
    return copied
