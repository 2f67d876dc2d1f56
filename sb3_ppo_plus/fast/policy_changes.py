"""What replays and compiled graphs take for granted of a policy, and whether it still holds."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from copy import copy
from itertools import chain
from typing import Any, TypeVar

import numpy as np
import torch as th
from stable_baselines3.common.distributions import Distribution
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.torch_layers import CombinedExtractor, FlattenExtractor, MlpExtractor, NatureCNN
from torch import nn
from torch.nn.modules import module as nn_module
from torch.optim import Optimizer

from sb3_ppo_plus.policies.actor_critic import (
    ActorCriticPlusCnnPolicy,
    ActorCriticPlusPolicy,
    MultiInputActorCriticPlusPolicy,
)

KNOWN_POLICIES = (ActorCriticPlusPolicy, ActorCriticPlusCnnPolicy, MultiInputActorCriticPlusPolicy)
KNOWN_MODULES = (
    *(nn.Linear, nn.Conv2d, nn.Flatten, nn.Identity, nn.Sequential, nn.ModuleDict),
    *(nn.Tanh, nn.ReLU, nn.ELU, nn.GELU, nn.LeakyReLU, nn.SiLU, nn.Sigmoid, nn.Softplus),
    *(nn.Mish, nn.SELU, nn.CELU, nn.ReLU6, nn.Softsign, nn.Hardtanh, nn.Hardswish, nn.LayerNorm),
    *(FlattenExtractor, NatureCNN, CombinedExtractor, MlpExtractor),
)
KNOWN_DISTRIBUTIONS = ("sb3_ppo_plus.", "stable_baselines3.common.")

Policy = TypeVar("Policy", bound=nn.Module)

_FORWARD_HOOKS = ("_forward_hooks", "_forward_pre_hooks")
_HOOKS = (*_FORWARD_HOOKS, "_backward_hooks", "_backward_pre_hooks")
_CONTENTS = ("_modules", "_parameters", "_buffers")
_OF_EVERY_MODULE = vars(nn.Module()).keys() - {"training"}


def has_known_parts(policy: ActorCriticPolicy) -> bool:
    """Whether all that the policy does at each call is known: it and its parts are of known classes, as they are."""
    return (
        type(policy) in KNOWN_POLICIES
        and policy.memory_options is None
        and type(policy.action_dist).__module__.startswith(KNOWN_DISTRIBUTIONS)
        and not _has_own_methods(policy.action_dist)
        and has_known_modules(policy)
        and not any(_has_own_methods(part) for part in policy.modules())
    )


def has_known_modules(policy: nn.Module) -> bool:
    """Whether the policy's parts are known neither to draw random numbers nor to update a state at a call."""
    return all(type(part) in KNOWN_MODULES for part in policy.modules() if part is not policy)


def _has_own_methods(part: object) -> bool:
    # Methods that were replaced on the instance
    return any(callable(getattr(type(part), name, None)) for name in vars(part))


def has_hooks(policy: nn.Module) -> bool:
    """Whether somebody hooks into the calls of the policy's modules, which replays and graphs would pass by."""
    return any(vars(nn_module)[f"_global{name}"] for name in _HOOKS) or any(
        vars(part)[name] for part in policy.modules() for name in _HOOKS
    )


def constant_tensors(policy: nn.Module) -> list[th.Tensor]:
    """Tensors that a graph of the policy holds on to: attributes that are neither parameters nor buffers."""
    return [value for part in policy.modules() for value in vars(part).values() if isinstance(value, th.Tensor)]


def python_state(policy: nn.Module) -> Hashable:
    """What a graph of the policy has compiled in: its parts and their attributes, but for tensors."""
    action_dist = getattr(policy, "action_dist", None)
    # The parts themselves: an id may be that of another one after it is gone
    of_parts = tuple((part, *_settings(part)) for part in policy.modules())
    # Not what a distribution remembers of its last use, nor the objects that it makes for each sample
    of_dist = [of for of in _settings(action_dist) if of[0][0] != "_" and isinstance(of[1], int | float | str)]
    return of_parts, type(action_dist), tuple(of_dist)


def _settings(owner: object) -> list[tuple[str, Hashable]]:
    return [
        (name, _frozen(value))
        for name, value in getattr(owner, "__dict__", {}).items()
        if name not in _OF_EVERY_MODULE and not isinstance(value, th.Tensor | Distribution | Optimizer)
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


class PartsWatch:
    """Notices what callbacks put in, take out or replace: methods, hooks, modules, parameters. Cheap, for each step.

    :param policy: the policy as it is now
    """

    def __init__(self, policy: nn.Module) -> None:
        attributes = [vars(part) for part in policy.modules()]
        self._sized = [*attributes, *(of[name] for of in attributes for name in (*_CONTENTS, *_FORWARD_HOOKS))]
        self._contents = [of_part[name] for of_part in attributes for name in _CONTENTS if of_part[name]]
        self._before = self._now()

    def _now(self) -> list[int]:
        # What is put in changes the sum, what is replaced an id
        return [sum(map(len, self._sized)), *map(id, chain.from_iterable(map(_VALUES, self._contents)))]

    def has_changed(self) -> bool:
        """Whether the policy has other parts than when this was made."""
        return self._now() != self._before


_VALUES: Callable[[dict[str, Any]], Iterator[Any]] = dict.values  # type: ignore[assignment]  # a view, which is iterated


def structural_copy(policy: Policy) -> Policy:
    """Return modules of the same classes with the same attributes, which what is put in or replaced does not reach."""
    copies: dict[nn.Module, Any] = {part: copy(part) for part in policy.modules()}
    for part in copies.values():
        for name, value in vars(part).items():
            if isinstance(value, dict):
                vars(part)[name] = value.copy()
        part._modules.update((name, copies[child]) for name, child in part._modules.items() if child is not None)
    copied: Policy = copies[policy]
    return copied
