"""The private attributes and functions of PyTorch that the package uses, and what it does without them.

PyTorch may rename or drop these at any time. None of them is necessary: each function here says what it does if they
are gone. That may cost speed, but never changes a bit of the result; ``.pt2`` files are then not read without trust.
One more is used elsewhere: the experimental ``make_fx``, in ``fast/tracing.py``. Without it tracing fails, and
everything runs eagerly.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
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
FUNCTION_MODES = "_get_current_function_mode_stack"
COUNT_OF_FUNCTION_MODES = "_len_torch_function_stack"
NO_FUNCTION_MODES = "DisableTorchFunction"
DEVICE_MODES = "torch.utils._device"
SCHEMA = "_schema"
DEFAULT_STORE = "_get_default_store"
COLLECTIVES = "torch.distributed.nn.functional"


def attributes(owner: object, names: Iterable[str]) -> list[Any] | None:
    """Look up private attributes; None if one is gone.

    :param owner: an object or a module of PyTorch
    :param names: names of the attributes
    """
    try:
        return [getattr(owner, name) for name in names]
    except AttributeError:
        return None


def has_gradient_hooks(parameters: Iterable[th.Tensor]) -> bool:
    """Whether a parameter has a hook of ``Tensor.register_hook``. True if this cannot be known.

    :param parameters: the parameters
    """
    return any(_has_any(parameter, (GRADIENT_HOOKS,)) for parameter in parameters)


def has_accumulation_hooks(parameters: Iterable[th.Tensor]) -> bool:
    """Whether a parameter has a hook of ``register_post_accumulate_grad_hook``. True if this cannot be known.

    :param parameters: the parameters
    """
    return any(_has_any(parameter, (ACCUMULATION_HOOKS,)) for parameter in parameters)


def has_step_hooks(optimizer: Optimizer) -> bool:
    """Whether the optimiser, or all optimisers, have a hook of their step. True if this cannot be known.

    :param optimizer: the optimiser
    """
    return _has_any(optimizer, STEP_HOOKS) or _has_any(torch_optimizer, HOOKS_OF_ALL_OPTIMIZERS)


def forward_hooks(modules: Iterable[th.nn.Module]) -> list[dict[Any, Any]] | None:
    """Return the hooks of the forward pass; None if one kind of them is gone.

    :param modules: the modules
    :return: PyTorch's own dicts, most of them empty. The dicts of hooks of every module come first
    """
    return _module_hooks(modules, FORWARD_HOOKS)


def backward_hooks(modules: Iterable[th.nn.Module]) -> list[dict[Any, Any]] | None:
    """Return the hooks of the backward pass; None if one kind of them is gone.

    :param modules: the modules
    :return: PyTorch's own dicts, most of them empty. The dicts of hooks of every module come first
    """
    return _module_hooks(modules, BACKWARD_HOOKS)


def _module_hooks(modules: Iterable[th.nn.Module], names: Sequence[str]) -> list[dict[Any, Any]] | None:
    hooks = attributes(torch_module, [HOOKS_OF_ALL_MODULES + name for name in names])
    for module in modules:
        own_hooks = attributes(module, names)
        if hooks is None or own_hooks is None:
            return None
        hooks += own_hooks
    return hooks


@contextmanager
def without_hooks_and_modes() -> Iterator[None]:
    """Remove inside the block the forward hooks that every module has, and the modes that act on functions of torch."""
    kinds = forward_hooks(()) or []
    before = [hooks.copy() for hooks in kinds]
    for hooks in kinds:
        hooks.clear()
    try:
        with getattr(th._C, NO_FUNCTION_MODES, nullcontext)():
            yield
    finally:
        for hooks, kept in zip(kinds, before, strict=True):
            hooks.update(kept)


def has_function_modes() -> bool:
    """Whether a ``TorchFunctionMode`` acts on what is called of torch, besides the device that was set as default.

    True where this cannot be known.
    """
    found = attributes(th.overrides, (FUNCTION_MODES,))
    if found is None or not hasattr(th._C, COUNT_OF_FUNCTION_MODES):
        return True
    return any(type(mode).__module__ != DEVICE_MODES for mode in found[0]())


def function_mode_counter() -> Callable[[], int]:
    """Return what counts the modes of :func:`has_function_modes` and the default device, in less time."""
    counter: Callable[[], int] = getattr(th._C, COUNT_OF_FUNCTION_MODES, int)
    return counter


def contents_of(module: th.nn.Module) -> list[dict[str, Any]] | None:
    """Return a module's own dicts of its modules, its parameters and its buffers; None if one is gone.

    :param module: the module
    """
    return attributes(module, CONTENTS)


def versions_of(tensors: Iterable[th.Tensor]) -> list[int] | None:
    """Return how often each tensor was changed in place; None if this cannot be known.

    :param tensors: the tensors
    """
    try:
        return [*map(attrgetter(VERSION), tensors)]
    except AttributeError:
        return None


def script_of(function: Callable[..., Any], inputs: Sequence[th.Tensor]) -> Callable[..., Any]:
    """Make a TorchScript function of the operations of a function.

    ``torch.jit.trace`` is not used, because the functions that it makes are never freed.

    :param function: takes and returns tensors
    :param inputs: examples
    :return: the TorchScript function
    :raises AttributeError: if PyTorch no longer has what this needs
    :raises Exception: errors of many kinds, from tracing
    """
    found = attributes(th._C, (TRACE, MAKE_FUNCTION))
    if found is None:
        raise AttributeError(f"PyTorch has no {TRACE} or {MAKE_FUNCTION}")
    trace, make_function = found
    traced, _ = trace(lambda *tensors: function(*tensors), tuple(inputs), lambda _: "", True, False)
    made: Callable[..., Any] = make_function("replay", traced)
    return made


def argument_names(operation: object) -> list[str] | None:
    """Return the names of the arguments of an operation, in order; None if they cannot be known.

    :param operation: such as ``torch.ops.aten.copy_.default``
    """
    schema = getattr(operation, SCHEMA, None)
    return None if schema is None else [argument.name for argument in schema.arguments]


def aliased_arguments(operation: object) -> dict[str, bool] | None:
    """Return the arguments whose memory the results of an operation may share, or that it changes; None if unknown.

    :param operation: such as ``torch.ops.aten.copy_.default``
    :return: whether it changes the argument, by the argument's name
    """
    schema = getattr(operation, SCHEMA, None)
    if schema is None:
        return None
    return {one.name: one.alias_info.is_write for one in schema.arguments if one.alias_info is not None}


def inductor_mode(mode: str | None) -> dict[str, Any]:
    """Return TorchInductor's options for a mode of ``torch.compile``; empty if they cannot be known.

    :param mode: such as "max-autotune"; None: the default mode
    """
    inductor = getattr(th, INDUCTOR, None)
    return {} if not mode or inductor is None else dict(inductor.list_mode_options(mode))


def inductor_option_names() -> set[str] | None:
    """Return the names of TorchInductor's options; None if they cannot be known."""
    inductor = getattr(th, INDUCTOR, None)
    return None if inductor is None else set(inductor.list_options()) | set(vars(inductor.config)["_config"])


def inductor_code(graph: th.fx.GraphModule, inputs: Sequence[th.Tensor], options: dict[str, Any]) -> Callable[..., Any]:
    """Compile a graph as ``torch._inductor.compile`` does, without the wrappers that AOTAutograd puts around the code.

    At each call of an actor, the wrappers would take as long as its arithmetic. They serve gradients, aliases and
    subclasses of tensors, and these graphs have none.

    :param graph: the operations
    :param inputs: examples
    :param options: options of TorchInductor
    :return: takes one list: first the tensors that the graph holds, then the inputs
    :raises Exception: errors of many kinds, also if PyTorch no longer has what this needs
    """
    # Imported here, because it takes two seconds and 100 MiB, which only those who compile should pay
    from torch._functorch import config
    from torch._inductor.compile_fx import compile_fx, compile_fx_inner

    codes: list[Callable[..., Any]] = []

    def keep(*args: Any, **kwargs: Any) -> Any:  # noqa: ANN401  # an Inductor hook, passed through
        codes.append(compile_fx_inner(*args, **kwargs))
        return codes[-1]

    # AOTAutograd's cache would return the wrapped code without a call of ``keep``
    with config.patch(enable_autograd_cache=False):
        compile_fx(graph, inputs, inner_compile=keep, config_patches=options)
    (code,) = codes
    return code


def _has_any(owner: object, names: Sequence[str]) -> bool:
    hooks = attributes(owner, names)
    return hooks is None or any(hooks)


def copy_each(targets: Sequence[th.Tensor], sources: Sequence[th.Tensor]) -> None:
    """Copy tensors into others, in one call if PyTorch has it, else one by one.

    :param targets: the tensors that change
    :param sources: tensors of their shapes
    """
    copy = getattr(th, FOREACH_COPY, None)
    if copy is not None:
        copy(targets, sources)
        return
    for target, source in zip(targets, sources, strict=True):
        target.copy_(source)


def norm_of_each(tensors: Sequence[th.Tensor]) -> list[th.Tensor]:
    """Compute the Euclidean norms of tensors, in one call if PyTorch has it, else one by one.

    :param tensors: the tensors
    """
    norm = getattr(th, FOREACH_NORM, None)
    return [th.linalg.vector_norm(tensor) for tensor in tensors] if norm is None else list(norm(tensors))


def default_validation() -> bool:
    """Whether distributions check their arguments by default. If no attribute says it, one distribution is tried."""
    default = getattr(Distribution, DEFAULT_VALIDATION, None)
    if default is not None:
        return bool(default)
    try:
        th.distributions.Bernoulli(th.tensor(2.0))
    except ValueError:
        return True
    return False


def default_store() -> Any:  # noqa: ANN401  # a Store of torch.distributed
    """Return the store that the processes of torch.distributed's default group share; None: it cannot be known.

    Without it, processes do not learn why another one has failed.
    """
    function = getattr(getattr(th.distributed, "distributed_c10d", None), DEFAULT_STORE, None)
    return None if function is None else function()


def forget_group(group: object) -> None:
    """Let PyTorch's differentiable collectives forget the default group, which they keep as a default argument.

    They do so where they are imported after the group was made, as by the first optimiser. A group that is kept has
    open connections, also after it is destroyed, on which the other processes wait.

    :param group: the default group
    """
    module = sys.modules.get(COLLECTIVES)
    for function in [] if module is None else list(vars(module).values()):
        defaults = getattr(function, "__defaults__", None)
        if isinstance(defaults, tuple) and any(value is group for value in defaults):
            # As they are where the module is imported first
            function.__defaults__ = tuple(None if value is group else value for value in defaults)


def shapes_only() -> Any:  # noqa: ANN401  # a context, which is a private class of PyTorch's
    """Return a context in which operations compute shapes and no numbers, for tensors of its ``from_tensor``.

    :raises ImportError: if it is gone
    """
    from torch._subclasses.fake_tensor import FakeTensorMode

    return FakeTensorMode(allow_non_fake_inputs=True)


def structure_of(tree: Any) -> str:  # noqa: ANN401  # dicts, lists and tuples
    """Return the structure of a tree, as text of a ``.pt2`` file.

    :raises ImportError: if what writes it is gone
    """
    from torch.utils import _pytree

    text: str = _pytree.treespec_dumps(_pytree.tree_structure(tree))
    return text


def as_ordinary_tensor() -> Any:  # noqa: ANN401  # a function of PyTorch's
    """Return a ``__torch_function__`` with which operations take a subclass of tensors for an ordinary one.

    If it is gone, it is that of tensors, with which results are of the subclass too, and take longer.
    """
    ordinary: Any = th.Tensor.__torch_function__
    return getattr(th._C, "_disabled_torch_function_impl", classmethod(ordinary.__func__))


def scan(
    function: Callable[..., list[th.Tensor]],
    state: Sequence[th.Tensor],
    rows: Sequence[th.Tensor],
    others: Sequence[th.Tensor] = (),
) -> list[th.Tensor]:
    """Call a function with one row after another; in a graph this is a loop.

    :param function: takes the state, a row and the others; returns the new state and what is kept of the row
    :param state: before the first call
    :param rows: tensors of equal length, whose first dimension is gone over
    :param others: what else the function uses
    :return: the last state, and what was kept, as tensors of that length
    :raises ImportError: without PyTorch's operation
    """
    from torch._higher_order_ops.scan import scan_op

    return list(scan_op(function, list(state), list(rows), tuple(others)))
