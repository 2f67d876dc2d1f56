"""Functions of tensors as graphs of their operations, without the Python code around these."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, MutableMapping, MutableSequence, MutableSet, Sequence
from contextlib import contextmanager
from typing import Any

import torch as th
from stable_baselines3.common.distributions import Distribution as SB3Distribution
from torch.nn import functional as F

from sb3_ppo_plus.update.argument_validation import without_argument_validation

# While a thread traces, torch's one_hot is replaced. Two threads must not do this at once
_TRACING = threading.RLock()


def trace(
    function: Callable[..., Any],
    inputs: Sequence[th.Tensor],
    module: th.nn.Module,
    decompositions: dict[Any, Any] | None = None,
) -> th.fx.GraphModule:
    """Return the graph of a function's operations, for inputs with the shapes, dtypes and devices of ``inputs``.

    :param function: takes tensors, returns a tensor or tuple of tensors, and may change inputs in place
    :param inputs: examples; their values do not matter
    :param module: the module that the function calls; it is not changed
    :param decompositions: functions that replace operations, see ``make_fx``
    :raises RuntimeError: if the module keeps a state in Python, which a graph would not follow
    :raises Exception: errors of many kinds, from tracing
    """
    # Imported here, because it is slow to import and not always needed
    from torch.fx.experimental.proxy_tensor import make_fx

    before = [(owner, dict(vars(owner))) for owner in _owners_of_state(module)]
    contents = [_Contents(value) for _, attributes in before for value in attributes.values()]
    try:
        tracer = make_fx(function, decompositions, tracing_mode="fake", _allow_non_fake_inputs=True)
        # Some operations, such as sampling from Beta, have no fake form. PyTorch really runs them, which draws random
        # numbers
        devices = {tensor.device for tensor in inputs if tensor.is_cuda}
        with _traceable(checks_range=decompositions is None), th.random.fork_rng(devices):
            graph: th.fx.GraphModule = tracer(*inputs)
        for owner, attributes in before:
            changed = [name for name, value in vars(owner).items() if attributes.get(name) is not value]
            if isinstance(owner, th.nn.Module) and set(changed) - {"action_dist"}:
                raise RuntimeError(f"{type(owner).__name__} changes its {', '.join(changed)} in each call")
        if any(content.has_changed() for content in contents):
            raise RuntimeError("the policy changes a list, dict or set in each call")
        return graph
    finally:
        # Attributes may hold tensors of the trace, with which nothing else can compute
        for owner, attributes in before:
            vars(owner).clear()
            vars(owner).update(attributes)
        for content in contents:
            content.restore()


class _Contents:
    """What a list, dict or set holds at one moment, for comparing and restoring. For other objects it does nothing."""

    def __init__(self, owned: object) -> None:
        self._owned = owned
        self._before = self._now()

    def _now(self) -> list[Any]:
        if isinstance(self._owned, MutableMapping):
            return [*self._owned, *self._owned.values()]
        return list(self._owned) if isinstance(self._owned, MutableSequence | MutableSet) else []

    def has_changed(self) -> bool:
        # By identity, because the comparison of two tensors has no single truth value
        return [*map(id, self._now())] != [*map(id, self._before)]

    def restore(self) -> None:
        if not self.has_changed():
            return
        owned, before = self._owned, self._before
        assert isinstance(owned, MutableMapping | MutableSequence | MutableSet)
        owned.clear()
        if isinstance(owned, MutableMapping):
            owned.update(zip(before[: len(before) // 2], before[len(before) // 2 :], strict=True))
        elif isinstance(owned, MutableSequence):
            owned.extend(before)
        else:
            for item in before:
                owned.add(item)


def _owners_of_state(module: th.nn.Module) -> list[Any]:
    modules = list(module.modules())
    distributions = [part for owner in modules for part in vars(owner).values() if isinstance(part, SB3Distribution)]
    return [*modules, *distributions]


@contextmanager
def _traceable(*, checks_range: bool) -> Iterator[None]:
    # A graph cannot check values: the arguments of distributions, and the range of what is one-hot encoded
    with _TRACING:
        one_hot = F.one_hot
        F.one_hot = _checked_one_hot if checks_range else _one_hot  # type: ignore[assignment]  # SB3 always gives num_classes, which has a default in torch
        try:
            with without_argument_validation():
                yield
        finally:
            F.one_hot = one_hot


def _one_hot(tensor: th.Tensor, num_classes: int) -> th.Tensor:
    return (tensor.unsqueeze(-1) == th.arange(num_classes, device=tensor.device)).long()


def _checked_one_hot(tensor: th.Tensor, num_classes: int) -> th.Tensor:
    # The replayed scatter raises an error itself, if a value is out of range
    zeros = th.zeros((*tensor.shape, num_classes), dtype=th.long, device=tensor.device)
    return zeros.scatter(-1, tensor.unsqueeze(-1), 1)
