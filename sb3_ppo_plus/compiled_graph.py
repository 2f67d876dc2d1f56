"""Functions of tensors, traced once and compiled by TorchInductor.

Traced rather than given to ``torch.compile``: what a policy computes in Python is recorded whatever it is, nothing is
guarded at each call, and there is nothing to recompile. A graph holds for the shapes that it was traced with.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch as th
import torch._inductor
from torch.distributions import Distribution
from torch.fx.experimental.proxy_tensor import make_fx

# Random operations of the graph are PyTorch's own: the numbers of eager mode, from the same generator
DEFAULT_OPTIONS: dict[str, Any] = {"fallback_random": True}

Graph = Callable[..., Any]


def compile_graph(
    function: Callable[..., Any], inputs: Sequence[th.Tensor], options: dict[str, Any] | None = None
) -> Graph:
    """Compile a function for inputs of the shapes, dtypes and devices of ``inputs``.

    :param function: takes tensors, returns a tensor or tuple of tensors, and may change inputs in place
    :param inputs: examples; their values do not matter
    :param options: TorchInductor's, as in the ``options`` of ``torch.compile``
    :return: the compiled function
    :raises Exception: whatever tracing or the compiler raises, of many kinds
    """
    with _without_argument_validation():
        graph = make_fx(function, tracing_mode="fake", _allow_non_fake_inputs=True)(*inputs)
    compiled: Graph = th._inductor.compile(graph, list(inputs), options={**DEFAULT_OPTIONS, **(options or {})})
    return compiled


@contextmanager
def _without_argument_validation() -> Iterator[None]:
    # Checks of values have no place in a graph
    before = Distribution._validate_args
    Distribution.set_default_validate_args(False)
    try:
        yield
    finally:
        Distribution.set_default_validate_args(before)
