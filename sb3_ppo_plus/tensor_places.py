"""Where the tensors of a module are."""

from __future__ import annotations

from typing import Any

import torch as th


def tensor_places(module: th.nn.Module) -> dict[str, th.Tensor]:
    """Name every place that holds a parameter or buffer, once, for ``functional_call(..., tie_weights=False)``.

    A module under several names has one place; tied parameters have several. With tie_weights=True, functional_call
    leaves traced tensors behind in modules that are registered under several names, as SB3's extractors are.
    """
    places: dict[str, th.Tensor] = {}
    for prefix, part in module.named_modules():
        # Of the base class, whatever the user's module calls its own parameters
        places.update(th.nn.Module.named_parameters(part, prefix, recurse=False, remove_duplicate=False))
        places.update(th.nn.Module.named_buffers(part, prefix, recurse=False, remove_duplicate=False))
    return places


def tensors_of(values: dict[str, Any]) -> dict[str, Any]:
    """Keep what holds tensors: an optimiser's state may hold None, and a batch may lack a mask or context."""
    return {name: value for name, value in values.items() if isinstance(value, th.Tensor) or value}
