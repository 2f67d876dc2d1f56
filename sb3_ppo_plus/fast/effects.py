"""What a graph does besides computing its outputs: which inputs it changes, and which random numbers it draws."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch as th

from sb3_ppo_plus.torch_private import aliased_arguments, argument_names

# Random operations that wait for nothing. In a replay they draw what they would draw anyway, since PyTorch gives the
# replay the default generator's state. Others, such as ``normal`` with a tensor of deviations, wait for values
SAFE_RANDOM_OPERATIONS = {
    *("normal_", "normal_functional", "randn", "randn_like", "rand", "rand_like", "uniform", "uniform_"),
    *("exponential", "exponential_", "bernoulli", "bernoulli_", "_sample_dirichlet", "_standard_gamma"),
    # Attention may drop out
    *("_scaled_dot_product_efficient_attention", "_scaled_dot_product_efficient_attention_backward"),
    *("_scaled_dot_product_flash_attention", "_scaled_dot_product_flash_attention_backward"),
    *("_scaled_dot_product_cudnn_attention", "_scaled_dot_product_cudnn_attention_backward"),
    *("_scaled_dot_product_flash_attention_for_cpu", "_scaled_dot_product_flash_attention_for_cpu_backward"),
}


def changed_inputs(graph: th.fx.GraphModule) -> set[int] | None:
    """Return the indices of the inputs that a graph changes in place; None if this cannot be known.

    :param graph: the operations
    """
    changed: set[int] = set()
    # The inputs whose memory the result of an operation may share
    roots: dict[th.fx.Node, set[int]] = {
        node: {index} for index, node in enumerate(graph.graph.find_nodes(op="placeholder"))
    }
    for node in graph.graph.nodes:
        if node.op != "call_function":
            continue
        if node.target is operator.getitem:
            roots[node] = roots.get(node.args[0], set())
            continue
        names, aliased = argument_names(node.target), aliased_arguments(node.target)
        if names is None or aliased is None:
            return None
        given = dict(zip(names, node.args, strict=False)) | node.kwargs
        for name, is_changed in aliased.items():
            shared = {root for argument in _nodes_in(given.get(name)) for root in roots.get(argument, ())}
            roots[node] = roots.get(node, set()) | shared
            if is_changed:
                changed |= shared
    return changed


def _nodes_in(argument: Any) -> list[th.fx.Node]:  # noqa: ANN401  # of an operation
    nodes: list[th.fx.Node] = []
    th.fx.node.map_arg(argument, nodes.append)
    return nodes


def obstacle(graph: th.fx.GraphModule, inputs: Sequence[th.Tensor], module: th.nn.Module) -> str | None:
    """Return why a graph cannot be a CUDA graph; None: it can be, as far as its operations tell.

    :param graph: the operations
    :param inputs: those for which it was compiled
    :param module: the module that it calls
    """
    values = [node.meta.get("val") for node in graph.graph.nodes if node.op in ("call_function", "get_attr")]
    held = {
        value.data_ptr() for part in module.modules() for value in vars(part).values() if isinstance(value, th.Tensor)
    }
    # A single number on the CPU stays what it was at the capture. So does one of the operations' own, always
    inner = [value for value in values if isinstance(value, th.Tensor) and value.dim()]
    inner += [constant for constant in graph.buffers() if constant.dim() or constant.data_ptr() in held]
    if any(tensor.device.type != inputs[0].device.type for tensor in (*inputs, *inner)):
        return "it does not compute on one device alone"
    for node in random_operations(graph):
        name = str(node.target).split(".")[1]
        if name not in SAFE_RANDOM_OPERATIONS or node.kwargs.get("generator") is not None:
            return f"a CUDA graph cannot draw the random numbers of {node.target}"
    return None


def random_operations(graph: th.fx.GraphModule) -> list[th.fx.Node]:
    """Return the operations that draw random numbers.

    :param graph: the operations
    """
    nodes = graph.graph.nodes
    return [node for node in nodes if th.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())]
