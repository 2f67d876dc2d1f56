"""What is done to a model during its training: by callbacks at steps and around rollouts, and between two learns.

A change is a function of the run and of a number, which says to which of several parts it is done. Where a model has
no such part, nothing is done: a configuration that was made smaller must still run.
"""

import copy
from collections.abc import Callable
from typing import Any, NamedTuple

from torch import nn

STEP, START, END, BETWEEN = "step", "start", "end", "between"
"""When: at a step of a rollout; before and after a rollout; between two learns."""
ANYTIME = (STEP, START, END, BETWEEN)
NOT_AMID = (START, END, BETWEEN)


class Interruption(Exception):
    """Ends a learn wherever it is."""


class Change(NamedTuple):
    """A change, and when it is done.

    :param function: takes a run and a number
    :param moments: when it may be done
    :param compiled_moments: when compiled training promises to follow it as eager training does
    """

    function: Callable[[Any, int], object]
    moments: tuple[str, ...]
    compiled_moments: tuple[str, ...]


CHANGES: dict[str, Change] = {}


def change(*moments: str, compiled: tuple[str, ...] | None = None) -> Callable[[Any], Any]:
    """Enter a function into the table, by its name in words.

    :param moments: when it may be done
    :param compiled: when compiled training follows it; None: always
    """

    def enter(function: Callable[[Any, int], object]) -> Callable[[Any, int], object]:
        name = function.__name__.replace("_", " ")
        CHANGES[name] = Change(function, moments, moments if compiled is None else compiled)
        return function

    return enter


def parameter_of(model, number):
    """One of the policy's parameters, with its owner and its name there."""
    found = [
        (module, name, parameter)
        for module in model.policy.modules()
        for name, parameter in module.named_parameters(recurse=False)
    ]
    return found[number % len(found)]


def linear_of(model, number):
    """One of the policy's linear layers."""
    layers = [part for part in model.policy.modules() if type(part) is nn.Linear]
    return layers[number % len(layers)]


def layers_in_sequence(model, number):
    """One of the policy's sequences of layers that has any; None: there is none."""
    found = [part for part in model.policy.modules() if isinstance(part, nn.Sequential) and len(part) > 0]
    return found[number % len(found)] if found else None


def has_batch_norm(module):
    """Whether a module refuses single observations in training mode."""
    return any(isinstance(part, nn.BatchNorm1d) for part in module.modules())


def sampled_observation(model, number):
    """An observation of the model's space, the same one for the same number."""
    space = copy.deepcopy(model.observation_space)
    space.seed(number)
    return space.sample()
