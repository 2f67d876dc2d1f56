"""Functions of tensors as graphs of the operations that they do, whatever Python surrounds these."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, MutableMapping, MutableSequence, MutableSet, Sequence
from contextlib import contextmanager
from typing import Any

import torch as th
from stable_baselines3.common.distributions import Distribution as SB3Distribution
from torch.nn import functional as F

from sb3_ppo_plus.update.argument_validation import without_argument_validation

# Tracing replaces a function of torch for a while
_TRACING = threading.RLock()


def trace(
    function: Callable[..., Any],
    inputs: Sequence[th.Tensor],
    module: th.nn.Module,
    decompositions: dict[Any, Any] | None = None,
) -> th.fx.GraphModule:
    """Write down the operations that a function does, for inputs of the shapes, dtypes and devices of ``inputs``.

    :param function: takes tensors, returns a tensor or tuple of tensors, and may change inputs in place
    :param inputs: examples; their values do not matter
    :param module: what the function calls; left as it was
    :param decompositions: operations to be replaced by others, see ``make_fx``
    :raises RuntimeError: where the module keeps a state in Python, which a graph would not follow
    :raises Exception: whatever else tracing raises, of many kinds
    """
    # Here, for it is slow to import and not always needed
    from torch.fx.experimental.proxy_tensor import make_fx

    before = [(owner, dict(vars(owner))) for owner in _owners_of_state(module)]
    contents = [_Contents(value) for _, attributes in before for value in attributes.values()]
    try:
        tracer = make_fx(function, decompositions, tracing_mode="fake", _allow_non_fake_inputs=True)
        with _without_checks_of_values(is_checked=decompositions is None):
            graph: th.fx.GraphModule = tracer(*inputs)
        for owner, attributes in before:
            changed = [name for name, value in vars(owner).items() if attributes.get(name) is not value]
            if isinstance(owner, th.nn.Module) and set(changed) - {"action_dist"}:
                raise RuntimeError(f"{type(owner).__name__} changes its {', '.join(changed)} in each call")
        if any(content.has_changed() for content in contents):
            raise RuntimeError("the policy changes a list, dict or set in each call")
        return graph
    finally:
        # Tensors of the trace are of no use outside it
        for owner, attributes in before:
            vars(owner).clear()
            vars(owner).update(attributes)
        for content in contents:
            content.restore()


class _Contents:
    """What a list, dict, set or the like itself holds, to compare with and to return to; nothing of anything else."""

    def __init__(self, owned: object) -> None:
        self._owned = owned
        self._before = self._now()

    def _now(self) -> list[Any]:
        if isinstance(self._owned, MutableMapping):
            return [*self._owned, *self._owned.values()]
        return list(self._owned) if isinstance(self._owned, MutableSequence | MutableSet) else []

    def has_changed(self) -> bool:
        # By identity: tensors do not compare
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
def _without_checks_of_values(*, is_checked: bool) -> Iterator[None]:
    # They have no place in a graph: arguments of distributions, and the range of what is one-hot encoded
    with _TRACING:
        one_hot = F.one_hot
        F.one_hot = _checked_one_hot if is_checked else _one_hot  # type: ignore[assignment]  # only ever called with num_classes by SB3
        try:
            with without_argument_validation():
                yield
        finally:
            F.one_hot = one_hot


def _one_hot(tensor: th.Tensor, num_classes: int) -> th.Tensor:
    return (tensor.unsqueeze(-1) == th.arange(num_classes, device=tensor.device)).long()


def _checked_one_hot(tensor: th.Tensor, num_classes: int) -> th.Tensor:
    # What is out of range raises in the operation itself, when it is replayed
    zeros = th.zeros((*tensor.shape, num_classes), dtype=th.long, device=tensor.device)
    return zeros.scatter(-1, tensor.unsqueeze(-1), 1)
