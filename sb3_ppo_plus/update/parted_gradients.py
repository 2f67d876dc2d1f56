"""The gradient of a minibatch as the sum of its parts' gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch as th

from sb3_ppo_plus.buffers import Minibatch
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
    trainable = [parameter for parameter in parameters if parameter.requires_grad]
    has_gradient = [False] * len(trainable)

    def vectors() -> Iterator[th.Tensor]:
        for part, stream in zip(minibatch.parts, minibatch.owner.streams(), strict=True):
            with stream:
                metrics, gradients = differentiate(part)
            pairs = zip(parameters, gradients, strict=True)
            given = [gradient for parameter, gradient in pairs if parameter.requires_grad]
            for index, gradient in enumerate(given):
                has_gradient[index] |= gradient is not None
            yield _packed(metrics, trainable, given)

    total = minibatch.owner.sum(vectors())
    sizes = [len(LossTerms._fields), len(trainable), *(parameter.numel() for parameter in trainable)]
    metrics, counts, *flat = th.split(total, sizes)
    if minibatch.owner.ranks.size > 1 and not all(has_gradient):
        # The loss of another process's part may depend on more parameters
        has_gradient = (counts > 0).tolist()
    gradients = iter(
        [
            gradient.view(parameter.shape).to(parameter.dtype) if has else None
            for parameter, gradient, has in zip(trainable, flat, has_gradient, strict=True)
        ]
    )
    return metrics, [next(gradients) if parameter.requires_grad else None for parameter in parameters]


def _packed(metrics: th.Tensor, parameters: Sequence[th.nn.Parameter], gradients: Gradients) -> th.Tensor:
    """Return the metrics, a 1 for each parameter that has a gradient, and the gradients."""
    has_gradient = [gradient is not None for gradient in gradients]
    flat = [
        th.zeros_like(parameter).reshape(-1) if gradient is None else gradient.reshape(-1)
        for parameter, gradient in zip(parameters, gradients, strict=True)
    ]
    return th.cat([metrics, th.tensor(has_gradient, dtype=metrics.dtype, device=metrics.device), *flat])
