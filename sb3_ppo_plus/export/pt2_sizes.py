"""Walks through a graph of ``torch.export`` without trust, operation by operation, and counts what it costs.

Nothing is computed: PyTorch's fake tensors have shapes only.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch as th
from torch.fx import GraphModule, Interpreter, Node

from sb3_ppo_plus.errors import UntrustedFileError
from sb3_ppo_plus.export.costs import MAX_LIST, WORK_OF_COMPARISON, Costs
from sb3_ppo_plus.torch_private import shapes_only


def check_sizes(module: th.nn.Module, inputs: Mapping[str, th.Tensor], name: str) -> None:
    """Check that the costs of a graph have a limit.

    :param module: the graph; its operations are from the closed list
    :param inputs: for one observation, by name
    :param name: of the file, for errors
    :raises UntrustedFileError: if they have not, or it cannot run, or PyTorch has no fake tensors any more
    """
    assert isinstance(module, GraphModule)
    try:
        mode = shapes_only()
        with mode:
            walk = _Walk(module, Costs(name), name)
            walk.run({key: mode.from_tensor(tensor) for key, tensor in inputs.items()})
    except UntrustedFileError:
        raise
    except Exception as error:
        # Each operation has errors of its own
        raise UntrustedFileError(f"{name} cannot run: {type(error).__name__}: {error}") from error


class _Walk(Interpreter):
    """Runs a graph with fake tensors.

    :param module: the graph
    :param costs: adds up what it costs
    :param name: of the file, for errors
    """

    def __init__(self, module: GraphModule, costs: Costs, name: str) -> None:
        super().__init__(module)
        # Otherwise it adds lines of the graph to the messages of errors
        self.extra_traceback = False
        self._costs, self._file = costs, name

    def run_node(self, n: Node) -> Any:  # noqa: ANN401  # whatever an operation gives
        """Run an operation, and count what it costs.

        :param n: the operation
        :raises UntrustedFileError: if it is too much
        """
        operation = str(n.target).removeprefix("aten.").partition(".")[0] if n.op == "call_function" else ""
        args, named = self.fetch_args_kwargs_from_env(n) if operation else ((), {})
        if named and operation in _COUNTED_BY_PLACE:
            raise UntrustedFileError(f"{self._file}: {operation} has arguments by keyword, which no export writes")
        if operation in _LENGTHS and _LENGTHS[operation](*args) > MAX_LIST:
            raise UntrustedFileError(f"{self._file}: {operation} gives more than {MAX_LIST} tensors")
        results = super().run_node(n)
        made = [each for each in (results if isinstance(results, list | tuple) else [results]) if _is_tensor(each)]
        if n.op == "output":
            return results
        for result in made:
            self._costs.add_tensor(n.name, result.shape, result.element_size())
        if operation:
            self._add_work(operation, args, made)
        return results

    def _add_work(self, operation: str, args: Sequence[Any], made: Sequence[th.Tensor]) -> None:
        n_made = sum(each.numel() for each in made)
        self._costs.add_work(n_made + sum(each.numel() for each in args if _is_tensor(each)))
        if operation in _PRODUCTS:
            self._costs.add_work(n_made * args[0].shape[-1])
        elif operation in _CONVOLUTIONS:
            per_output = math.prod(args[1].shape[1:])
            self._costs.add_work(n_made * per_output)
            # They may copy all patches
            self._costs.add_bytes(per_output * n_made // args[1].shape[0] * 8)
        elif operation in _POOLS:
            kernel = args[1] if isinstance(args[1], list | tuple) else [args[1]] * 2
            self._costs.add_work(WORK_OF_COMPARISON * n_made * math.prod(kernel))
        elif operation == "scaled_dot_product_attention":
            query, key = args[:2]
            n_scores = query.numel() // max(1, query.shape[-1]) * key.shape[-2]
            self._costs.add_work(n_scores * (query.shape[-1] + args[2].shape[-1]))
            # Scores, their softmax and a mask
            self._costs.add_bytes(3 * n_scores * query.element_size())
        elif operation in _CELLS:
            weights = [each for each in args if _is_tensor(each) and each.dim() == 2]
            self._costs.add_work(args[0].shape[0] * sum(each.numel() for each in weights))


def _is_tensor(value: object) -> bool:
    return isinstance(value, th.Tensor)


_LENGTHS: dict[str, Callable[..., int]] = {
    "unbind": lambda x, dim=0: x.shape[dim],
    "split": lambda x, size, dim=0: math.ceil(x.shape[dim] / max(1, size)),
    "chunk": lambda x, chunks, dim=0: chunks,
    "unsafe_chunk": lambda x, chunks, dim=0: chunks,
}
"""How many tensors an operation gives."""
_PRODUCTS = ("linear", "matmul", "bmm")
_CONVOLUTIONS = ("conv1d", "conv2d")
_POOLS = ("max_pool2d", "avg_pool2d")
_CELLS = ("gru_cell", "lstm_cell")
_COUNTED_BY_PLACE = {*_LENGTHS, *_PRODUCTS, *_CONVOLUTIONS, *_POOLS, *_CELLS}
"""Operations whose costs depend on more than their first argument, and that have none by keyword alone."""
