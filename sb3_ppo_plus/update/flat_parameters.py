"""All parameters of an optimiser's group as views of one flat tensor, which a single operation updates.

A step on one flat tensor is bit-identical to the steps on its parts and costs a fraction of their overhead. Policy and
``policy.optimizer`` stay what SB3 users know: parameters and state keep their shapes, and become views of flat tensors.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Any

import torch as th
from torch.optim import SGD, Adam, AdamW, Optimizer, RMSprop

from sb3_ppo_plus.torch_private import copy_each, has_accumulation_hooks, has_step_hooks, norm_of_each

# In floats: 64 bytes, as PyTorch aligns every tensor. BLAS rounds differently on matrices that are not
ALIGNMENT = 16
# Elementwise in parameters and state, so that a flat step equals the separate ones; not so for subclasses
FLATTENED_OPTIMIZERS = (Adam, AdamW, SGD, RMSprop)


def can_flatten(optimizer: Optimizer, parameters: Sequence[th.nn.Parameter]) -> bool:
    """Whether the optimiser steps exactly ``parameters``, all float32 on one device, and nobody hooks into it."""
    in_groups = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    return (
        type(optimizer) in FLATTENED_OPTIMIZERS
        and {id(parameter) for parameter in in_groups} == {id(parameter) for parameter in parameters}
        and {(parameter.dtype, parameter.device.type) for parameter in parameters if parameter.requires_grad}
        <= {(th.float32, parameters[0].device.type)}
        # Else they round in their own way, after load_from_vector for one
        and all(parameter.data_ptr() % (4 * ALIGNMENT) == 0 for parameter in parameters)
        # Learning-rate schedulers of torch wrap the method of the instance
        and "step" not in vars(optimizer)
        and not has_step_hooks(optimizer)
        and not has_accumulation_hooks(parameters)
    )


class FlatGroup:
    """Parameters of one group that have a gradient, and their optimiser state, as flat tensors.

    :param optimizer: the policy's optimiser
    :param group: one of its parameter groups
    :param parameters: those of the group that are flattened: they have taken the same number of steps
    """

    def __init__(self, optimizer: Optimizer, group: dict[str, Any], parameters: list[th.nn.Parameter]) -> None:
        self._visible = optimizer
        self._group = group
        self.parameters = parameters
        # Padding between the parameters is zero, has a zero gradient, and stays zero
        self._sizes = [-(-parameter.numel() // ALIGNMENT) * ALIGNMENT for parameter in self.parameters]
        self.flat = self._flattened(self.parameters)
        self.flat.grad = th.zeros_like(self.flat)
        self.gradients = self.views(self.flat.grad)
        make_optimizer: Callable[[list[dict[str, Any]]], Optimizer] = type(optimizer)
        self.optimizer = make_optimizer([{**group, "params": [self.flat]}])
        self._step_device: th.device | None = None
        # Less what torch wraps around it for profilers and hooks, which nobody has put on this one
        self._step = inspect.unwrap(type(optimizer).step)
        self._adopt_state()
        for parameter, view in zip(self.parameters, self.views(self.flat), strict=True):
            parameter.data = view
        self.publish()

    @property
    def state(self) -> dict[str, Any]:
        """Optimiser state of the flat tensor; empty before the first step."""
        state: dict[str, Any] = self.optimizer.state[self.flat]
        return state

    @property
    def has_state(self) -> bool:
        """Whether there is all the state that a step reads: the optimiser makes it in its first step."""
        keeps_none = isinstance(self.optimizer, SGD) and self._group["momentum"] == 0
        return keeps_none or bool(self.state)

    @property
    def hyperparameters(self) -> dict[str, Any]:
        """Settings of the group, the learning rate among them."""
        return {name: value for name, value in self._group.items() if name != "params"}

    def views(self, flat: th.Tensor) -> list[th.Tensor]:
        """Return the parts of a flat tensor in the parameters' shapes."""
        parts = zip(th.split(flat, self._sizes), self.parameters, strict=True)
        return [part[: parameter.numel()].view(parameter.shape) for part, parameter in parts]

    @th.no_grad()
    def _flattened(self, tensors: Sequence[th.Tensor]) -> th.Tensor:
        flat = th.zeros(sum(self._sizes), device=tensors[0].device)
        for view, tensor in zip(self.views(flat), tensors, strict=True):
            view.copy_(tensor)
        return flat

    def _adopt_state(self) -> None:
        states = [self._visible.state.get(parameter, {}) for parameter in self.parameters]
        for name, first in states[0].items():
            if not isinstance(first, th.Tensor):
                self.state[name] = first
            elif name == "step":
                self.state[name] = first.clone()
            else:
                self.state[name] = self._flattened([state[name] for state in states])

    @th.no_grad()
    def step(self) -> None:
        """Let the optimiser take a step."""
        self._step(self.optimizer)

    @th.no_grad()
    def step_where(self, is_allowed: th.Tensor) -> None:
        """Let the optimiser take a step where ``is_allowed``, a 0-dim tensor whose value the host does not wait for.

        A counter of steps that the optimiser keeps on the host counts in any case.
        """
        parameters = self.flat.clone()
        state = {name: value.clone() for name, value in self.state.items() if isinstance(value, th.Tensor)}
        self.step()
        self.flat.copy_(th.where(is_allowed, self.flat, parameters))
        for name, value in self.state.items():
            if isinstance(value, th.Tensor) and value.device == is_allowed.device:
                value.copy_(th.where(is_allowed, value, state.get(name, th.zeros_like(value))))

    def keep_step_with_parameters(self) -> None:
        """Count steps on the parameters' device, for graphs that are not to wait for the host, which Adam counts on."""
        step = self.state.get("step")
        if isinstance(step, th.Tensor) and step.device != self.flat.device:
            self._step_device = step.device
            self.state["step"] = step.to(self.flat.device)

    def refresh(self) -> None:
        """Take over settings that changed on the policy's optimiser, such as the learning rate."""
        self.optimizer.param_groups[0].update(self.hyperparameters)

    def publish(self) -> None:
        """Show the flat state as that of the policy's optimiser."""
        for name, value in self.state.items():
            if not isinstance(value, th.Tensor):
                values = [value] * len(self.parameters)
            elif value.shape == self.flat.shape and name != "step":
                values = self.views(value)
            else:
                # One counter each: the optimiser's own step, if the user calls it, counts every one
                values = list(value.to(self._step_device).repeat(len(self.parameters)).unbind())
            for parameter, shown in zip(self.parameters, values, strict=True):
                self._visible.state[parameter][name] = shown
        for parameter, gradient in zip(self.parameters, self.gradients, strict=True):
            parameter.grad = gradient

    def is_current(self) -> bool:
        """Whether parameters and visible state are still what :meth:`publish` left: nobody replaced them."""
        if any(p.data_ptr() != v.data_ptr() for p, v in zip(self.parameters, self.views(self.flat), strict=True)):
            return False
        visible = [self._visible.state.get(parameter, {}) for parameter in self.parameters]
        for name, value in self.state.items():
            if any(name not in state for state in visible):
                return False
            if isinstance(value, th.Tensor):
                shown = [state[name] for state in visible]
                if value.shape == self.flat.shape and name != "step":
                    same = [s.data_ptr() == v.data_ptr() for s, v in zip(shown, self.views(value), strict=True)]
                else:
                    same = [bool(s == value) for s in shown]
                if not all(same):
                    return False
        return all(state.keys() == self.state.keys() for state in visible)


class FlatParameters:
    """The flat groups of a policy's optimiser.

    :param optimizer: the policy's optimiser
    :param parameters: the policy's parameters, in order
    :param gradients: their gradients in the first minibatch; None where the loss does not depend on the parameter
    """

    def __init__(
        self,
        optimizer: Optimizer,
        parameters: Sequence[th.nn.Parameter],
        gradients: Sequence[th.Tensor | None],
    ) -> None:
        self._optimizer = optimizer
        self._trainable = [id(parameter) for parameter in parameters if parameter.requires_grad]
        self._grouping = _grouping(optimizer)
        ids_with_gradient = {id(p) for p, gradient in zip(parameters, gradients, strict=True) if gradient is not None}
        self.has_gradient = [gradient is not None for gradient in gradients]
        self.groups = [
            FlatGroup(optimizer, group, alike)
            for group in optimizer.param_groups
            for alike in _of_equal_state(optimizer, [p for p in group["params"] if id(p) in ids_with_gradient])
        ]
        of_parameter = {
            id(parameter): view
            for group in self.groups
            for parameter, view in zip(group.parameters, group.gradients, strict=True)
        }
        self._gradients = [
            of_parameter[id(parameter)] for parameter in parameters if id(parameter) in ids_with_gradient
        ]

    def is_current(self, optimizer: Optimizer, parameters: Sequence[th.nn.Parameter]) -> bool:
        """Whether nothing that this was built from has been replaced, frozen or freed since."""
        return (
            optimizer is self._optimizer
            and _grouping(optimizer) == self._grouping
            and [id(parameter) for parameter in parameters if parameter.requires_grad] == self._trainable
            and all(group.is_current() for group in self.groups)
        )

    @property
    def has_state(self) -> bool:
        """Whether there is all the state that a step reads."""
        return all(group.has_state for group in self.groups)

    def fits(self, gradients: Sequence[th.Tensor | None]) -> bool:
        """Whether the same parameters as before have a gradient."""
        return [gradient is not None for gradient in gradients] == self.has_gradient

    def refresh(self) -> None:
        """Take over settings that changed on the policy's optimiser."""
        for group in self.groups:
            group.refresh()

    def keep_steps_with_parameters(self) -> None:
        """See :meth:`FlatGroup.keep_step_with_parameters`."""
        for group in self.groups:
            group.keep_step_with_parameters()

    def step(self, gradients: list[th.Tensor], max_grad_norm: float, loss: th.Tensor) -> th.Tensor:
        """Clip the gradients and let the optimiser take a step, with the operations of ``clip_grad_norm_`` in order.

        No step is taken where the loss or a gradient is not finite.

        :param gradients: gradient of each parameter that has one, in the policy's order
        :param max_grad_norm: the gradients are scaled down to this norm where theirs is larger
        :param loss: the loss
        :return: norm of the gradients before clipping
        """
        copy_each(self._gradients, gradients)
        # Norms of the copies: autograd's own gradients may be strided, and are then summed in another order
        grad_norm: th.Tensor = th.linalg.vector_norm(th.stack(norm_of_each(self._gradients)))
        is_on_host = grad_norm.device.type == "cpu"
        if is_on_host and not (math.isfinite(grad_norm.item()) and math.isfinite(loss.item())):
            return grad_norm
        is_finite = None if is_on_host else grad_norm.isfinite() & loss.isfinite()
        scale = (max_grad_norm / (grad_norm + 1e-6)).clamp_(max=1.0)
        for group in self.groups:
            assert group.flat.grad is not None
            group.flat.grad.mul_(scale)
            if is_finite is None:
                group.step()
            else:
                group.step_where(is_finite)
        return grad_norm

    def publish(self) -> None:
        """Show the flat state as that of the policy's optimiser."""
        for group in self.groups:
            group.publish()


def _of_equal_state(optimizer: Optimizer, parameters: list[th.nn.Parameter]) -> Iterable[list[th.nn.Parameter]]:
    """Split parameters by what their states cannot share: they differ after some were frozen for a while."""
    parts: dict[Hashable, list[th.nn.Parameter]] = {}
    for parameter in parameters:
        state = optimizer.state.get(parameter, {})
        kinds = frozenset((name, type(value)) for name, value in state.items())
        parts.setdefault((kinds, float(state.get("step", 0))), []).append(parameter)
    return parts.values()


def _grouping(optimizer: Optimizer) -> list[list[int]]:
    return [[id(parameter) for parameter in group["params"]] for group in optimizer.param_groups]
