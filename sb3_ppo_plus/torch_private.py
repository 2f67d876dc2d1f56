"""Every private thing of PyTorch that the package reads, and what is done where a release no longer has it.

PyTorch may rename or drop these at any time. None is needed: each function here says what it answers then. The answer
is always the careful one, which costs speed and never a bit of the result.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from operator import attrgetter
from typing import Any

import torch as th
from torch.distributions import Distribution
from torch.nn.modules import module as torch_module
from torch.optim import Optimizer
from torch.optim import optimizer as torch_optimizer

GRADIENT_HOOKS = "_backward_hooks"
ACCUMULATION_HOOKS = "_post_accumulate_grad_hooks"
STEP_HOOKS = ("_optimizer_step_pre_hooks", "_optimizer_step_post_hooks")
HOOKS_OF_ALL_OPTIMIZERS = ("_global_optimizer_pre_hooks", "_global_optimizer_post_hooks")
FOREACH_COPY = "_foreach_copy_"
FOREACH_NORM = "_foreach_norm"
DEFAULT_VALIDATION = "_validate_args"
FORWARD_HOOKS = ("_forward_hooks", "_forward_pre_hooks")
BACKWARD_HOOKS = ("_backward_hooks", "_backward_pre_hooks")
HOOKS_OF_ALL_MODULES = "_global"
CONTENTS = ("_modules", "_parameters", "_buffers")
VERSION = "_version"
TRACE = "_create_graph_by_tracing"
MAKE_FUNCTION = "_create_function_from_graph"
INDUCTOR = "_inductor"


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


def forward_hooks(modules: Iterable[th.nn.Module]) -> list[dict[Any, Any]] | None:
    """Hooks into the forward pass of modules, those into every module's first; None where one kind is gone.

    :param modules: the modules
    :return: PyTorch's own dicts, most of them empty
    """
    return _module_hooks(modules, FORWARD_HOOKS)


def backward_hooks(modules: Iterable[th.nn.Module]) -> list[dict[Any, Any]] | None:
    """Hooks into the backward pass of modules, as :func:`forward_hooks`."""
    return _module_hooks(modules, BACKWARD_HOOKS)


def _module_hooks(modules: Iterable[th.nn.Module], names: Sequence[str]) -> list[dict[Any, Any]] | None:
    hooks = attributes(torch_module, [HOOKS_OF_ALL_MODULES + name for name in names])
    for module in modules:
        of_module = attributes(module, names)
        if hooks is None or of_module is None:
            return None
        hooks += of_module
    return hooks


@contextmanager
def without_hooks_of_all_modules() -> Iterator[None]:
    """Take away, for the while, the hooks into the forward pass of every module."""
    hooks = forward_hooks(()) or []
    before = [of_kind.copy() for of_kind in hooks]
    for of_kind in hooks:
        of_kind.clear()
    try:
        yield
    finally:
        for of_kind, kept in zip(hooks, before, strict=True):
            of_kind.update(kept)


def contents_of(module: th.nn.Module) -> list[dict[str, Any]] | None:
    """Return a module's own dicts of its modules, its parameters and its buffers; None where one is gone."""
    return attributes(module, CONTENTS)


def versions_of(tensors: Iterable[th.Tensor]) -> list[int] | None:
    """Count how often each tensor was changed in place; None where this cannot be known."""
    try:
        return [*map(attrgetter(VERSION), tensors)]
    except AttributeError:
        return None


def script_of(function: Callable[..., Any], inputs: Sequence[th.Tensor]) -> Callable[..., Any]:
    """Make a TorchScript function of what a function of tensors does.

    Not by ``torch.jit.trace``: the functions that it makes stay in memory for good.

    :raises AttributeError: where PyTorch has no such thing any more
    :raises Exception: whatever else tracing raises
    """
    found = attributes(th._C, (TRACE, MAKE_FUNCTION))
    if found is None:
        raise AttributeError(f"PyTorch has no {TRACE} or {MAKE_FUNCTION}")
    trace, make_function = found
    traced, _ = trace(lambda *tensors: function(*tensors), tuple(inputs), lambda _: "", True, False)
    made: Callable[..., Any] = make_function("replay", traced)
    return made


def inductor_mode(mode: str | None) -> dict[str, Any]:
    """TorchInductor's options for a mode of ``torch.compile``; none where this cannot be known."""
    inductor = getattr(th, INDUCTOR, None)
    return {} if not mode or inductor is None else dict(inductor.list_mode_options(mode))


def inductor_option_names() -> set[str] | None:
    """Names of TorchInductor's options; None where this cannot be known."""
    inductor = getattr(th, INDUCTOR, None)
    return None if inductor is None else set(inductor.list_options()) | set(vars(inductor.config)["_config"])


def inductor_code(graph: th.fx.GraphModule, inputs: Sequence[th.Tensor], options: dict[str, Any]) -> Callable[..., Any]:
    """Compile a graph as ``torch._inductor.compile`` does, less the wrappers that AOTAutograd puts around the code.

    They would cost an actor as much as its arithmetic at each call, and serve gradients, aliases and subclasses of
    tensors, none of which there are.

    :param graph: the operations
    :param inputs: examples
    :param options: TorchInductor's
    :return: takes one list, of the tensors that the graph holds and then of the inputs
    :raises Exception: of many kinds, also where PyTorch has no such thing any more
    """
    # Here, for it takes two seconds and 100 MiB, which only those who compile should pay
    from torch._functorch import config
    from torch._inductor.compile_fx import compile_fx, compile_fx_inner

    codes: list[Callable[..., Any]] = []

    def keep(*args: Any, **kwargs: Any) -> Any:  # noqa: ANN401  # an Inductor hook, passed through
        codes.append(compile_fx_inner(*args, **kwargs))
        return codes[-1]

    # AOTAutograd's cache would hand out the wrapped code and leave nothing to keep
    with config.patch(enable_autograd_cache=False):
        compile_fx(graph, inputs, inner_compile=keep, config_patches=options)
    (code,) = codes
    return code


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
