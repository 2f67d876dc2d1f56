"""Functions of tensors, traced once and compiled by TorchInductor.

Traced rather than given to ``torch.compile``: what a policy computes in Python is recorded whatever it is, nothing is
guarded at each call, and there is nothing to recompile. A graph holds for the shapes that it was traced with.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch as th
import torch._inductor
from torch.distributions import Distribution
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional as F

# Random operations of the graph are PyTorch's own: the numbers of eager mode, from the same generator
DEFAULT_OPTIONS: dict[str, Any] = {"fallback_random": True}

Graph = Callable[..., Any]


class CompilationReporter:
    """Prints compilations where ``verbose``, and warns of the first that failed.

    :param verbose: 0 for silence about success
    """

    def __init__(self, verbose: int) -> None:
        self.verbose = verbose
        self.seconds = 0.0
        self._has_warned = False

    def compiled(self, what: str, seconds: float) -> None:
        """Count the seconds, and print a line."""
        self.seconds += seconds
        if self.verbose >= 1:
            print(f"Compiled the {what} in {seconds:.1f} s")

    def failed(self, what: str, error: Exception) -> None:
        """Warn, once."""
        if not self._has_warned:
            reason = (str(error).strip().splitlines() or [""])[0]
            warnings.warn(
                f"compile=True: {what} runs eagerly, since it could not be compiled: {type(error).__name__}: {reason}",
                stacklevel=2,
            )
        self._has_warned = True


def compile_graph(
    function: Callable[..., Any], inputs: Sequence[th.Tensor], options: dict[str, Any] | None = None
) -> Graph:
    """Compile a function for inputs of the shapes, dtypes and devices of ``inputs``.

    :param function: takes tensors, returns a tensor or tuple of tensors, and may change inputs in place
    :param inputs: examples; their values do not matter
    :param options: TorchInductor's, as in the ``options`` of ``torch.compile``
    :return: the compiled function
    :raises RuntimeError: where two traces differ: a graph would repeat the first for ever
    :raises Exception: whatever else tracing or the compiler raises, of many kinds
    """
    with _without_checks_of_values():
        graph, again = (make_fx(function, tracing_mode="fake", _allow_non_fake_inputs=True)(*inputs) for _ in range(2))
    if graph.code != again.code:
        raise RuntimeError("it computes something else at each call, as its Python code keeps a state")
    compiled: Graph = th._inductor.compile(graph, list(inputs), options={**DEFAULT_OPTIONS, **(options or {})})
    return compiled


def tensor_places(module: th.nn.Module) -> dict[str, th.Tensor]:
    """Name every place that holds a parameter or buffer, once, for ``functional_call(..., tie_weights=False)``.

    A module under several names has one place; tied parameters have several. With tie_weights=True, functional_call
    leaves traced tensors behind in modules that are registered under several names, as SB3's extractors are.
    """
    return {
        f"{prefix}.{name}" if prefix else name: tensor
        for prefix, part in module.named_modules()
        for name, tensor in [*part._parameters.items(), *part._buffers.items()]
        if tensor is not None
    }


@contextmanager
def _without_checks_of_values() -> Iterator[None]:
    # They have no place in a graph: arguments of distributions, and the range of what is one-hot encoded
    validates, one_hot = Distribution._validate_args, F.one_hot
    Distribution.set_default_validate_args(False)
    F.one_hot = _one_hot  # type: ignore[assignment]  # only ever called with num_classes by SB3
    try:
        yield
    finally:
        Distribution.set_default_validate_args(validates)
        F.one_hot = one_hot


def _one_hot(tensor: th.Tensor, num_classes: int) -> th.Tensor:
    return (tensor.unsqueeze(-1) == th.arange(num_classes, device=tensor.device)).long()
