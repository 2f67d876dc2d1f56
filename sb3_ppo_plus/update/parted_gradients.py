"""The gradient of a minibatch as the sum of its parts' gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import groupby

import torch as th

from sb3_ppo_plus.rollout_batch import Minibatch
from sb3_ppo_plus.update.losses import LossTerms
from sb3_ppo_plus.update.parted_rollout import PartedMinibatch

Gradients = Sequence[th.Tensor | None]


def sum_of_parts(
    parameters: Sequence[th.nn.Parameter],
    minibatch: PartedMinibatch,
    differentiate: Callable[[Minibatch], tuple[th.Tensor, Gradients]],
) -> tuple[th.Tensor, Gradients]:
    """Add the metrics and gradients of all parts of a minibatch, in all processes.

    They travel together, as one vector.

    :param parameters: the policy's parameters
    :param minibatch: the parts of this process
    :param differentiate: returns the metrics of a part, and the gradient of each parameter; None: its loss does not
        depend on the parameter
    :return: the same of the whole minibatch
    """
    has_gradient = [False] * len(parameters)

    def vectors() -> Iterator[th.Tensor]:
        for part, stream in zip(minibatch.parts, minibatch.owner.streams(), strict=True):
            with stream:
                metrics, gradients = differentiate(part)
            for index, gradient in enumerate(gradients):
                has_gradient[index] |= gradient is not None
            yield packed(metrics, parameters, gradients)

    metrics, counts, gradients = unpacked(minibatch.owner.sum(vectors()), parameters)
    trainable = [parameter.requires_grad for parameter in parameters]
    if minibatch.owner.ranks.size > 1 and has_gradient != trainable:
        # The loss of another process's part may depend on more parameters
        has_gradient = (counts > 0).tolist()
    return metrics, [gradient if has else None for gradient, has in zip(gradients, has_gradient, strict=True)]


def packed(metrics: th.Tensor, parameters: Sequence[th.nn.Parameter], gradients: Gradients, mark: int = 1) -> th.Tensor:
    """Return metrics and gradients of a part as a vector, with the same places in each process.

    :param metrics: shape (number of metrics,)
    :param parameters: the policy's parameters
    :param gradients: their gradients; None: the loss does not depend on the parameter
    :param mark: tells how they were computed
    :return: the metrics; the mark for each parameter that has a gradient, or 0; the gradients of trainable parameters
    """
    flat = [
        th.zeros_like(parameter).reshape(-1) if gradient is None else gradient.reshape(-1)
        for parameter, gradient in zip(parameters, gradients, strict=True)
        if parameter.requires_grad
    ]
    # Mostly all parameters have a gradient: one tensor then, as each costs a microsecond
    runs = [(has, len(list(run))) for has, run in groupby(gradient is not None for gradient in gradients)]
    marks = [metrics.new_full((length,), mark if has else 0) for has, length in runs]
    return th.cat([metrics, *marks, *flat])


def packed_size(parameters: Sequence[th.nn.Parameter]) -> int:
    """Return the length of what :func:`packed` returns.

    :param parameters: the policy's parameters
    """
    n_numbers = sum(parameter.numel() for parameter in parameters if parameter.requires_grad)
    return len(LossTerms._fields) + len(parameters) + n_numbers


def unpacked(total: th.Tensor, parameters: Sequence[th.nn.Parameter]) -> tuple[th.Tensor, th.Tensor, Gradients]:
    """Return the parts of a sum of vectors that :func:`packed` has returned.

    :param total: the sum
    :param parameters: the policy's parameters
    :return: metrics; for each parameter, the sum of the marks of parts that have a gradient; gradients, None for those
        that are not trainable
    """
    trainable = [parameter for parameter in parameters if parameter.requires_grad]
    sizes = [len(LossTerms._fields), len(parameters), *(parameter.numel() for parameter in trainable)]
    metrics, counts, *flat = total.split_with_sizes(sizes)
    gradients: dict[int, th.Tensor] = {}
    for gradient, parameter in zip(flat, trainable, strict=True):
        shaped = gradient.view_as(parameter)
        gradients[id(parameter)] = shaped if shaped.dtype == parameter.dtype else shaped.to(parameter.dtype)
    return metrics, counts, [gradients.get(id(parameter)) for parameter in parameters]
