"""What replays and compiled graphs take for granted of a policy, and whether it still holds."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from itertools import chain
from typing import Any

import torch as th
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.torch_layers import CombinedExtractor, FlattenExtractor, MlpExtractor, NatureCNN
from torch import nn
from torch.nn.modules import module as nn_module

from sb3_ppo_plus.policies import ActorCriticPlusCnnPolicy, ActorCriticPlusPolicy, MultiInputActorCriticPlusPolicy

KNOWN_POLICIES = (ActorCriticPlusPolicy, ActorCriticPlusCnnPolicy, MultiInputActorCriticPlusPolicy)
KNOWN_MODULES = (
    *(nn.Linear, nn.Conv2d, nn.Flatten, nn.Identity, nn.Sequential, nn.ModuleDict),
    *(nn.Tanh, nn.ReLU, nn.ELU, nn.GELU, nn.LeakyReLU, nn.SiLU, nn.Sigmoid, nn.Softplus),
    *(FlattenExtractor, NatureCNN, CombinedExtractor, MlpExtractor),
)
KNOWN_DISTRIBUTIONS = ("sb3_ppo_plus.", "stable_baselines3.common.")

_FORWARD_HOOKS = ("_forward_hooks", "_forward_pre_hooks")
_HOOKS = (*_FORWARD_HOOKS, "_backward_hooks", "_backward_pre_hooks")


def has_known_parts(policy: ActorCriticPolicy) -> bool:
    """Whether all that the policy does at each call is known: it and its parts are of known classes, as they are."""
    return (
        type(policy) in KNOWN_POLICIES
        and policy.memory_options is None
        and type(policy.action_dist).__module__.startswith(KNOWN_DISTRIBUTIONS)
        and not _has_own_methods(policy.action_dist)
        and all(type(part) in KNOWN_MODULES for part in policy.modules() if part is not policy)
        and not any(_has_own_methods(part) for part in policy.modules())
    )


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
    """What a graph of the policy has compiled in: its parts, and their numbers, flags and names."""
    action_dist = getattr(policy, "action_dist", None)
    # Not what it remembers of its last use
    settings = [] if action_dist is None else [of for of in _plain_attributes(action_dist) if not of[0].startswith("_")]
    # The parts themselves: an id may be that of another one after it is gone
    of_parts = tuple((part, _plain_attributes(part)) for part in policy.modules())
    return of_parts, type(action_dist), tuple(settings)


def _plain_attributes(part: object) -> tuple[tuple[str, Hashable], ...]:
    return tuple((name, value) for name, value in vars(part).items() if isinstance(value, int | float | str))


def layout_of(tensors: Sequence[th.Tensor]) -> Hashable:
    """Shapes, strides and dtypes: what a replay or graph has compiled in of its inputs."""
    return tuple((tensor.shape, tensor.stride(), tensor.dtype) for tensor in tensors)


class PartsWatch:
    """Notices what callbacks put in, take out or replace: methods, hooks, modules, parameters. Cheap, for each step.

    :param policy: the policy as it is now
    """

    def __init__(self, policy: nn.Module) -> None:
        attributes = [vars(part) for part in policy.modules()]
        contents = ("_modules", "_parameters", "_buffers")
        self._sized = [*attributes, *(of_part[name] for of_part in attributes for name in _FORWARD_HOOKS)]
        self._contents = [of_part[name] for of_part in attributes for name in contents if of_part[name]]
        self._before = self._now()

    def _now(self) -> list[int]:
        return [*map(len, self._sized), *map(id, chain.from_iterable(map(_VALUES, self._contents)))]

    def has_changed(self) -> bool:
        """Whether the policy has other parts than when this was made."""
        return self._now() != self._before


_VALUES: Callable[[dict[str, Any]], Iterator[Any]] = dict.values  # type: ignore[assignment]  # a view, which is iterated
