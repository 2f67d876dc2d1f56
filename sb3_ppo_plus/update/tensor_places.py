"""The places of a module's tensors, by name."""

from __future__ import annotations

from typing import Any

import torch as th


def tensor_places(module: th.nn.Module) -> dict[str, th.Tensor]:
    """Name every place that holds a parameter or buffer, once, for ``functional_call(..., tie_weights=False)``.

    A module with several names has one place, but tied parameters have several. With tie_weights=True, functional_call
    would leave traced tensors in modules with several names, such as SB3's extractors.

    :param module: the module
    :return: the tensor at each place
    """
    places: dict[str, th.Tensor] = {}
    for prefix, part in module.named_modules():
        # The base class's methods, because a user's module may override them
        places.update(th.nn.Module.named_parameters(part, prefix, recurse=False, remove_duplicate=False))
        places.update(th.nn.Module.named_buffers(part, prefix, recurse=False, remove_duplicate=False))
    return places


def tensors_of(values: dict[str, Any]) -> dict[str, Any]:
    """Leave out entries without tensors, such as None in an optimiser's state, or a batch's missing mask or context.

    :param values: tensors, or containers of tensors, by name
    """
    return {name: value for name, value in values.items() if isinstance(value, th.Tensor) or value}
