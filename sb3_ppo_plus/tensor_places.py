"""Where the tensors of a module are."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import chain
from typing import Any

import torch as th

from sb3_ppo_plus.torch_private import contents_of


def tensor_places(module: th.nn.Module) -> dict[str, th.Tensor]:
    """Name every place that holds a parameter or buffer, once, for ``functional_call(..., tie_weights=False)``.

    A module under several names has one place; tied parameters have several. With tie_weights=True, functional_call
    leaves traced tensors behind in modules that are registered under several names, as SB3's extractors are.
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
    # Of the base class, whatever the user's module calls its own parameters
    return chain(
        th.nn.Module.named_parameters(part, recurse=False, remove_duplicate=False),
        th.nn.Module.named_buffers(part, recurse=False, remove_duplicate=False),
    )


def tensors_of(values: dict[str, Any]) -> dict[str, Any]:
    """Keep what holds tensors: an optimiser's state may hold None, and a batch may lack a mask or context."""
    return {name: value for name, value in values.items() if isinstance(value, th.Tensor) or value}
