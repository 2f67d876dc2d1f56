"""The places of a module's tensors, by name."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import chain
from typing import Any

import torch as th

from sb3_ppo_plus.torch_private import contents_of


def tensor_places(module: th.nn.Module) -> dict[str, th.Tensor]:
    """Name every place that holds a parameter or buffer, once, for ``functional_call(..., tie_weights=False)``.

    A module with several names has one place, but tied parameters have several. With tie_weights=True, functional_call
    would leave traced tensors in modules with several names, such as SB3's extractors.

    :param module: the module
    :return: the tensor at each place
    """
    return {
        f"{prefix}.{name}" if prefix else name: tensor
        for prefix, part in module.named_modules()
        for name, tensor in _own_tensors(part)
        if tensor is not None
    }


def _own_tensors(part: th.nn.Module) -> Iterable[tuple[str, th.Tensor | None]]:
    contents = contents_of(part)
    if contents is not None:
        # Half as expensive
        _, parameters, buffers = contents
        return chain(parameters.items(), buffers.items())
    # The base class's methods, because a user's module may override them
    return chain(
        th.nn.Module.named_parameters(part, recurse=False, remove_duplicate=False),
        th.nn.Module.named_buffers(part, recurse=False, remove_duplicate=False),
    )


def tensors_of(values: dict[str, Any]) -> dict[str, Any]:
    """Leave out entries without tensors, such as None in an optimiser's state, or a batch's missing mask or context.

    :param values: tensors, or containers of tensors, by name
    """
    return {name: value for name, value in values.items() if isinstance(value, th.Tensor) or value}
