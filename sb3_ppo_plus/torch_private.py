"""Every private thing of PyTorch that the package reads, and what is done where a release no longer has it.

PyTorch may rename or drop these at any time. None is needed: each function here says what it answers then. The answer
is always the careful one, which costs speed and never a bit of the result.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch as th
from torch.distributions import Distribution
from torch.optim import Optimizer
from torch.optim import optimizer as torch_optimizer

GRADIENT_HOOKS = "_backward_hooks"
ACCUMULATION_HOOKS = "_post_accumulate_grad_hooks"
STEP_HOOKS = ("_optimizer_step_pre_hooks", "_optimizer_step_post_hooks")
HOOKS_OF_ALL_OPTIMIZERS = ("_global_optimizer_pre_hooks", "_global_optimizer_post_hooks")
FOREACH_COPY = "_foreach_copy_"
FOREACH_NORM = "_foreach_norm"
DEFAULT_VALIDATION = "_validate_args"


def attributes(owner: object, names: Iterable[str]) -> list[Any] | None:
    """Look up private attributes; None where one is gone.

    :param owner: an object or a module of PyTorch
    :param names: of the attributes
    """
    try:
        return [getattr(owner, name) for name in names]
    except AttributeError:
        return None


def has_gradient_hooks(parameters: Iterable[th.Tensor]) -> bool:
    """Whether somebody hooked into a gradient by ``Tensor.register_hook``. True where this cannot be known."""
    return any(_has_any(parameter, (GRADIENT_HOOKS,)) for parameter in parameters)


def has_accumulation_hooks(parameters: Iterable[th.Tensor]) -> bool:
    """Whether somebody used ``register_post_accumulate_grad_hook``. True where this cannot be known."""
    return any(_has_any(parameter, (ACCUMULATION_HOOKS,)) for parameter in parameters)


def has_step_hooks(optimizer: Optimizer) -> bool:
    """Whether somebody hooks into the optimiser's step, or into every optimiser's. True where this cannot be known."""
    return _has_any(optimizer, STEP_HOOKS) or _has_any(torch_optimizer, HOOKS_OF_ALL_OPTIMIZERS)


def _has_any(owner: object, names: Sequence[str]) -> bool:
    hooks = attributes(owner, names)
    return hooks is None or any(hooks)


def copy_each(targets: Sequence[th.Tensor], sources: Sequence[th.Tensor]) -> None:
    """Copy tensors into others, in one call where PyTorch has it, else one by one."""
    copy = getattr(th, FOREACH_COPY, None)
    if copy is not None:
        copy(targets, sources)
        return
    for target, source in zip(targets, sources, strict=True):
        target.copy_(source)


def norm_of_each(tensors: Sequence[th.Tensor]) -> list[th.Tensor]:
    """Euclidean norms of tensors, in one call where PyTorch has it, else one by one."""
    norm = getattr(th, FOREACH_NORM, None)
    return [th.linalg.vector_norm(tensor) for tensor in tensors] if norm is None else list(norm(tensors))


def default_validation() -> bool:
    """Whether distributions check their arguments by default. Where this is not written anywhere, one is tried out."""
    default = getattr(Distribution, DEFAULT_VALIDATION, None)
    if default is not None:
        return bool(default)
    try:
        th.distributions.Bernoulli(th.tensor(2.0))
    except ValueError:
        return True
    return False
