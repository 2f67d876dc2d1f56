"""Parameters as parts of flat tensors during an update, so that one operation steps many of them.

A step on one flat tensor is bit-identical to the steps on its parts, with much less overhead. Between updates,
parameters and optimiser state are in their own memory, as SB3 users know them. Users may change them there, since the
flat tensors are filled again at each update.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple

import torch as th
from torch.optim import SGD, Optimizer

from sb3_ppo_plus.torch_private import copy_each, norm_of_each

# In floats: 64 bytes, as PyTorch aligns every tensor. BLAS rounds differently on matrices that are not aligned
ALIGNMENT = 16


class _SharedEntry(NamedTuple):
    """One entry of the optimiser's state, such as a moment, during an update.

    :param own: each parameter's own tensor, which it gets back after the update
    :param views: the parts of the flat tensor that take its place until then
    """

    own: list[th.Tensor]
    views: list[th.Tensor]


class FlatGroup:
    """Parameters of one group that have a gradient, and their optimiser state, as flat tensors.

    :param optimizer: the policy's optimiser
    :param index: index of the parameter group
    :param parameters: the group's parameters that are flattened; all have taken equally many steps
    """

    def __init__(self, optimizer: Optimizer, index: int, parameters: list[th.nn.Parameter]) -> None:
        self._visible = optimizer
        self.index = index
        self.parameters = parameters
        # Nobody reads the padding between the parameters
        self._sizes = [-(-parameter.numel() // ALIGNMENT) * ALIGNMENT for parameter in parameters]
        self.flat = th.zeros(sum(self._sizes), dtype=parameters[0].dtype, device=parameters[0].device)
        self.flat.grad = th.zeros_like(self.flat)
        self.gradients = self.views(self.flat.grad)
        self._views = self.views(self.flat)
        self._pointers: list[int] = []
        self._own: list[th.Tensor] = []
        make_optimizer: Callable[[list[dict[str, Any]]], Optimizer] = type(optimizer)
        self.optimizer = make_optimizer([{**optimizer.param_groups[index], "params": [self.flat]}])
        # Without PyTorch's wrapper for profilers, hooks and gradients of the step, which are not needed here
        self._step = inspect.unwrap(type(optimizer).step)
        self._entries: list[dict[str, Any]] = []
        self._shown: dict[str, _SharedEntry] = {}
        self._moments: dict[str, tuple[th.Tensor, list[th.Tensor]]] = {}
        self._counts_on_device = False
        self._count_on_device: th.Tensor | None = None
        self._undecided: _UndecidedStep | None = None

    @property
    def state(self) -> dict[str, Any]:
        """Optimiser state of the flat tensor; empty before the first step."""
        state: dict[str, Any] = self.optimizer.state[self.flat]
        return state

    @property
    def has_state(self) -> bool:
        """Whether all state that a step reads exists. The optimiser makes it in its first step."""
        return self._keeps_no_state or bool(self.state)

    @property
    def _keeps_no_state(self) -> bool:
        return isinstance(self.optimizer, SGD) and self._visible.param_groups[self.index]["momentum"] == 0

    @property
    def settings(self) -> dict[str, Any]:
        """The present settings of the group in the policy's optimiser, such as the learning rate."""
        return {name: value for name, value in self._visible.param_groups[self.index].items() if name != "params"}

    def views(self, flat: th.Tensor) -> list[th.Tensor]:
        """Return the parts of a flat tensor in the parameters' shapes.

        :param flat: shape of :attr:`flat`
        """
        parts = zip(th.split(flat, self._sizes), self.parameters, strict=True)
        return [part[: parameter.numel()].view(parameter.shape) for part, parameter in parts]

    def joined(self, parts: Sequence[th.Tensor | None]) -> th.Tensor:
        """Return a flat tensor whose :meth:`views` have given values; what is between them is 0.

        :param parts: for each parameter a tensor of its shape; None: zeros
        """
        padded = [
            self.flat.new_zeros(size)
            if part is None
            else th.nn.functional.pad(part.reshape(-1), (0, size - part.numel()))
            for part, size in zip(parts, self._sizes, strict=True)
        ]
        return th.cat(padded)

    @th.no_grad()
    def fill(self) -> None:
        """Copy parameters and optimiser state into the flat tensors. The parameters themselves do not change."""
        self._own = [parameter.data for parameter in self.parameters]
        copy_each(self._views, self._own)
        self._pointers = [view.data_ptr() for view in self._views]
        old = self.optimizer.state.pop(self.flat, {})
        self._shown, self._counts_on_device, self._undecided = {}, False, None
        self._entries = [self._visible.state.get(parameter, {}) for parameter in self.parameters]
        state = self.state
        for name, first in self._entries[0].items():
            if isinstance(first, th.Tensor):
                own = [entry[name] for entry in self._entries]
                if name == "step":
                    state[name] = first.clone()
                else:
                    state[name] = old[name] if isinstance(old.get(name), th.Tensor) else th.zeros_like(self.flat)
                    copy_each(self._moments_of(name), own)
                self._shown[name] = self._shown_as(name, own)
            else:
                state[name] = first

    def borrow(self) -> None:
        """Let parameters and optimiser state be parts of the flat tensors until :meth:`give_back`.

        Call :meth:`fill` for all groups first. Then :meth:`give_back` can restore everything, even if an error
        interrupts this.
        """
        for parameter, view in zip(self.parameters, self._views, strict=True):
            parameter.data = view
        for name, shown in self._shown.items():
            for entry, view in zip(self._entries, shown.views, strict=True):
                entry[name] = view

    def _moments_of(self, name: str) -> list[th.Tensor]:
        """Return the parts of a flat tensor of the state. They are made once for each flat tensor."""
        flat = self.state[name]
        whole, moments = self._moments.get(name, (None, []))
        if whole is not flat:
            moments = self.views(flat)
            self._moments[name] = (flat, moments)
        return moments

    def _shown_as(self, name: str, own: list[th.Tensor]) -> _SharedEntry:
        views = [self.state[name]] * len(self.parameters) if name == "step" else self._moments_of(name)
        return _SharedEntry(own, views)

    def _show_new_state(self) -> None:
        """Give the parameters the state that the optimiser has made in its first step."""
        self._entries = [self._visible.state[parameter] for parameter in self.parameters]
        for name, value in self.state.items():
            if isinstance(value, th.Tensor) and name not in self._shown:
                like = value if name == "step" else None
                own = [th.empty_like(parameter if like is None else like) for parameter in self.parameters]
                self._shown[name] = self._shown_as(name, own)
                for entry, view in zip(self._entries, self._shown[name].views, strict=True):
                    entry[name] = view
            elif not isinstance(value, th.Tensor):
                for entry in self._entries:
                    entry[name] = value

    @th.no_grad()
    def give_back(self, *, has_gradients: bool) -> None:
        """Put parameters and state back into their own memory, as separate steps would leave them.

        A tensor that was replaced since :meth:`borrow` is not changed.

        :param has_gradients: whether a step was taken, from which the parameters keep a gradient
        """
        self._decide()
        copy_each(self._own, self._views)
        gradients = self.views(self.flat.grad.clone()) if has_gradients and self.flat.grad is not None else None
        for index, parameter in enumerate(self.parameters):
            if parameter.data_ptr() == self._pointers[index]:
                parameter.data = self._own[index]
                if gradients is not None:
                    parameter.grad = gradients[index]
        for name, shown in self._shown.items():
            value = self.state[name]
            copy_each(shown.own, [value] * len(self.parameters) if name == "step" else shown.views)
            for entry, own, view in zip(self._entries, *shown, strict=True):
                if entry.get(name) is view:
                    entry[name] = own

    def was_touched(self) -> bool:
        """Whether the memory of a parameter, or the optimiser's state, was replaced since :meth:`borrow`."""
        first = self._visible.state.get(self.parameters[0])
        return (first is not self._entries[0] and bool(first or self._shown)) or self._pointers != [
            parameter.data_ptr() for parameter in self.parameters
        ]

    @th.no_grad()
    def step(self) -> None:
        """Let the optimiser take a step."""
        self._take_step()
        if not (self._shown or self._keeps_no_state):
            self._show_new_state()

    def _take_step(self) -> None:
        # The group is read each time, because loading a state or following a schedule may have replaced it
        self.optimizer.param_groups[0] = {**self._visible.param_groups[self.index], "params": [self.flat]}
        self._step(self.optimizer)

    @th.no_grad()
    def step_where(self, is_allowed: th.Tensor) -> None:
        """Let the optimiser take a step if a tensor is True, without waiting for the tensor's value.

        If the optimiser counts steps on the host, the count is corrected before the next step.

        :param is_allowed: 0-dim, bool
        """
        self._decide()
        parameters = self.flat.clone()
        before = dict(self.state)
        tensors = {name: value.clone() for name, value in before.items() if isinstance(value, th.Tensor)}
        self._take_step()
        self.flat.copy_(th.where(is_allowed, self.flat, parameters))
        for name, value in self.state.items():
            if isinstance(value, th.Tensor) and (name != "step" or self._counts_on_device):
                value.copy_(th.where(is_allowed, value, tensors.get(name, th.zeros_like(value))))
        self._undecided = _UndecidedStep(is_allowed, before)

    def _decide(self) -> None:
        """Undo what the last :meth:`step_where` did on the host, if the step was not allowed."""
        undecided, self._undecided = self._undecided, None
        if undecided is None:
            return
        if not undecided.was_allowed():
            for name in list(self.state):
                if undecided.before.get(name) is None:
                    del self.state[name]
            self.state.update({name: None for name, value in undecided.before.items() if value is None})
            if "step" in self.state and not self._counts_on_device:
                self.state["step"].sub_(1)
        if self.state and not self._shown:
            self._show_new_state()

    def keep_step_with_parameters(self) -> None:
        """Count steps on the parameters' device. Adam counts on the host, for which graphs would have to wait."""
        if "step" in self.state:
            self._counts_on_device = True
            step = self.state["step"]
            if step.device != self.flat.device:
                # In one place in all updates, as CUDA graphs need it
                if self._count_on_device is None:
                    self._count_on_device = th.empty_like(step, device=self.flat.device)
                self.state["step"] = self._count_on_device.copy_(step)


class _UndecidedStep:
    """A step of which only the device knows whether it was allowed.

    :param is_allowed: 0-dim, bool
    :param before: the optimiser's state before the step
    """

    def __init__(self, is_allowed: th.Tensor, before: dict[str, Any]) -> None:
        self.before = before
        self._is_allowed = is_allowed
        self._has_arrived: th.cuda.Event | None = None
        if is_allowed.is_cuda:
            # The host asks before the next step. By then the copy has long arrived
            self._is_allowed = is_allowed.to("cpu", non_blocking=True)
            self._has_arrived = th.cuda.Event()  # type: ignore[no-untyped-call]  # torch leaves it untyped
            self._has_arrived.record(th.cuda.current_stream(is_allowed.device))

    def was_allowed(self) -> bool:
        if self._has_arrived is not None:
            self._has_arrived.synchronize()
        return bool(self._is_allowed)


class FlatParameters:
    """The flat groups of a policy's optimiser.

    :param optimizer: the policy's optimiser
    :param parameters: the policy's parameters, in order
    :param has_gradient: for each parameter, whether the loss depends on it
    """

    def __init__(
        self, optimizer: Optimizer, parameters: Sequence[th.nn.Parameter], has_gradient: Sequence[bool]
    ) -> None:
        self._optimizer = optimizer
        self._all = list(parameters)
        self._trainable = [parameter.requires_grad for parameter in parameters]
        self.has_gradient = list(has_gradient)
        self.groups = [FlatGroup(optimizer, index, alike) for index, alike in self._with_equal_steps()]
        self._places = [(parameter.shape, parameter.device) for parameter in parameters]
        views = {
            id(parameter): view
            for group in self.groups
            for parameter, view in zip(group.parameters, group.gradients, strict=True)
        }
        self._gradients = [views[id(parameter)] for parameter in parameters if id(parameter) in views]
        self._is_borrowed = False
        self._n_groups = 0
        self.has_stepped = False
        """Whether a step was taken since :meth:`borrow`."""

    def _with_equal_steps(self) -> list[tuple[int, list[th.nn.Parameter]]]:
        """Find the parameters that a flat tensor can hold together, with the index of their group.

        They have taken equally many steps. Parameters that were frozen for a while have taken fewer.
        """
        with_gradient = {id(p) for p, has in zip(self._all, self.has_gradient, strict=True) if has}
        parts: dict[Hashable, tuple[int, list[th.nn.Parameter]]] = {}
        for index, group in enumerate(self._optimizer.param_groups):
            for parameter in group["params"]:
                if id(parameter) in with_gradient:
                    state = self._optimizer.state.get(parameter, {})
                    names = frozenset((name, value is None) for name, value in state.items())
                    key = (index, names, float(state.get("step", 0)))
                    parts.setdefault(key, (index, []))[1].append(parameter)
        return list(parts.values())

    def is_current(self, optimizer: Optimizer, parameters: Sequence[th.nn.Parameter]) -> bool:
        """Whether these flat parameters can still be used: nothing was replaced, frozen, freed or moved.

        :param optimizer: the policy's optimiser now
        :param parameters: the policy's parameters now, in order
        """
        return (
            optimizer is self._optimizer
            and [*map(id, parameters)] == [*map(id, self._all)]
            and [parameter.requires_grad for parameter in parameters] == self._trainable
            and [(parameter.shape, parameter.device) for parameter in parameters] == self._places
            and [(index, [*map(id, alike)]) for index, alike in self._with_equal_steps()]
            == [(group.index, [*map(id, group.parameters)]) for group in self.groups]
        )

    @property
    def has_state(self) -> bool:
        """Whether all state that a step reads exists."""
        return all(group.has_state for group in self.groups)

    def fits_gradients(self, gradients: Sequence[th.Tensor | None]) -> bool:
        """Whether the parameters that have a gradient are those for which this was built.

        :param gradients: gradient of each parameter; None: the loss does not depend on it
        """
        return [gradient is not None for gradient in gradients] == self.has_gradient

    def borrow(self) -> None:
        """Let parameters and state be parts of the flat tensors, see :meth:`FlatGroup.borrow`."""
        self.has_stepped = False
        self._n_groups = len(self._optimizer.param_groups)
        for group in self.groups:
            group.fill()
        self._is_borrowed = True
        for group in self.groups:
            group.borrow()

    def give_back(self) -> None:
        """Put parameters and state back, see :meth:`FlatGroup.give_back`. A second call does nothing."""
        if not self._is_borrowed:
            return
        for group in self.groups:
            group.give_back(has_gradients=self.has_stepped)
        _separate_counters(self._optimizer)
        self._is_borrowed = False

    def was_touched(self, optimizer: Optimizer) -> bool:
        """Whether a user's hook has replaced something since :meth:`borrow`.

        :param optimizer: the policy's optimiser now
        """
        return (
            optimizer is not self._optimizer
            or len(optimizer.param_groups) != self._n_groups
            or any(group.was_touched() for group in self.groups)
        )

    def keep_steps_with_parameters(self) -> None:
        """Count steps on the parameters' device, see :meth:`FlatGroup.keep_step_with_parameters`."""
        for group in self.groups:
            group.keep_step_with_parameters()

    def step(self, gradients: list[th.Tensor], max_grad_norm: float, loss: th.Tensor) -> th.Tensor:
        """Clip the gradients and let the optimiser take a step, with the operations of ``clip_grad_norm_`` in order.

        No step is taken if the loss or a gradient is not finite.

        :param gradients: gradient of each parameter that has one, in the policy's order
        :param max_grad_norm: if the norm of the gradients is larger, they are scaled down to it
        :param loss: the loss, 0-dim
        :return: norm of the gradients before clipping
        """
        if not self.has_stepped:
            self.show_gradients()
        copy_each(self._gradients, gradients)
        # The norms are those of the copies: autograd's gradients may be strided, which changes the order of the sum
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

    def show_gradients(self) -> None:
        """Let each parameter's ``grad`` be its part of the flat gradients; None: the loss does not depend on it."""
        for parameter in self._all:
            parameter.grad = None
        for group in self.groups:
            for parameter, gradient in zip(group.parameters, group.gradients, strict=True):
                parameter.grad = gradient
        self.has_stepped = True


def _separate_counters(optimizer: Optimizer) -> None:
    """Give each parameter a counter of steps of its own.

    During an update the parameters of a group show one counter. If a user's hook then loads a copy of the state, they
    would share the counter of the copy.
    """
    seen = set()
    for entry in optimizer.state.values():
        step = entry.get("step")
        if isinstance(step, th.Tensor):
            if step.data_ptr() in seen:
                entry["step"] = step.clone()
            seen.add(step.data_ptr())
