"""The conditions under which a step on flat parameters equals the step that SB3 takes."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain, pairwise
from typing import Any

import torch as th
from torch.optim import SGD, Adam, AdamW, Optimizer, RMSprop
from torch.optim import optimizer as torch_optimizer

from sb3_ppo_plus.torch_private import has_accumulation_hooks, has_step_hooks
from sb3_ppo_plus.update.flat_parameters import ALIGNMENT

# Their steps are elementwise in parameters and state, so a flat step equals separate ones. Subclasses may differ
FLATTENED_OPTIMIZERS = (Adam, AdamW, SGD, RMSprop)
_ZERO_GRAD = Optimizer.zero_grad
_CLIP_GRAD_NORM = th.nn.utils.clip_grad_norm_


def obstacle_to_flat_steps(
    policy: th.nn.Module, optimizer: Optimizer, parameters: Sequence[th.nn.Parameter]
) -> str | None:
    """Return why a flat step would differ from the optimiser's own step, as a clause for a warning; None: it would not.

    :param policy: the policy
    :param optimizer: the policy's optimiser
    :param parameters: the policy's parameters
    """
    name = type(optimizer).__name__
    if type(optimizer) not in FLATTENED_OPTIMIZERS:
        return f"{name} has no flat form here"
    in_groups = [id(parameter) for group in optimizer.param_groups for parameter in group["params"]]
    if sorted(in_groups) != sorted(map(id, parameters)):
        return f"{name} does not step exactly the policy's parameters"
    if not _has_methods_of_torch(optimizer) or th.nn.utils.clip_grad_norm_ is not _CLIP_GRAD_NORM:
        return f"a method of {name} or the clipping of gradients was replaced"
    if has_step_hooks(optimizer) or has_accumulation_hooks(parameters):
        return f"a hook on {name}'s step or on a parameter must be called"
    if not _are_plain(parameters):
        return "a parameter is not a plain, aligned float32 tensor in memory of its own, or is on another device"
    if _share_memory(chain(parameters, policy.buffers(), _attributes_of(policy))):
        return "some parameters share their memory with other tensors of the policy"
    if not all(_is_plain_state(parameter, optimizer.state.get(parameter, {})) for parameter in parameters):
        return f"the state of {name} is not of the kind that its own steps make"
    return None


def _has_methods_of_torch(optimizer: Optimizer) -> bool:
    kind = type(optimizer)
    # PyTorch's learning-rate schedulers replace ``step`` of the instance by a wrapper
    if {"step", "zero_grad"} & vars(optimizer).keys() or kind.zero_grad is not _ZERO_GRAD:
        return False
    step: Any = kind.step
    # PyTorch's own wrappers of ``step`` are all defined in one module
    while hasattr(step, "__wrapped__"):
        if step.__globals__ is not vars(torch_optimizer):
            return False
        step = step.__wrapped__
    # AdamW's is Adam's
    return inspect.isfunction(step) and step.__globals__["__name__"] in {base.__module__ for base in kind.__mro__}


def _are_plain(parameters: Sequence[th.nn.Parameter]) -> bool:
    device = parameters[0].device
    return all(
        type(parameter) is th.nn.Parameter
        and ((parameter.dtype is th.float32 and parameter.device == device) or not parameter.requires_grad)
        # BLAS rounds differently in memory that is not aligned, such as after load_from_vector
        and parameter.data_ptr() % (4 * ALIGNMENT) == 0
        # Other processes may read shared memory at any time
        and not (device.type == "cpu" and parameter.is_shared())  # type: ignore[no-untyped-call]  # untyped in torch
        for parameter in parameters
    )


def _attributes_of(policy: th.nn.Module) -> Iterator[th.Tensor]:
    for part in policy.modules():
        for value in vars(part).values():
            if isinstance(value, th.Tensor):
                yield value


def _share_memory(tensors: Iterable[th.Tensor]) -> bool:
    """Whether two tensors overlap in memory."""
    spans = []
    for tensor in tensors:
        if tensor.layout is th.strided and tensor.numel() > 0:
            last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
            start = tensor.data_ptr()
            spans.append((start, start + (last + 1) * tensor.element_size()))
    spans.sort()
    return any(end > start for (_, end), (start, _) in pairwise(spans))


def _is_plain_state(parameter: th.nn.Parameter, state: dict[str, Any]) -> bool:
    for name, value in state.items():
        if name == "step":
            if not isinstance(value, th.Tensor) or value.dim() > 0:
                return False
        elif value is not None and not (
            isinstance(value, th.Tensor)
            and (value.shape, value.dtype, value.device) == (parameter.shape, parameter.dtype, parameter.device)
        ):
            return False
    return True
