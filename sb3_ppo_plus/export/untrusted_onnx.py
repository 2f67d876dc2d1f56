"""Checks ONNX files that are not trusted, before onnxruntime sees them.

onnxruntime reads weights from other files that a model names, reads its own format in place of ONNX, and runs loops
and any allocation. So a file may have only operations of a closed list, its own weights, and costs that are known and
have a limit, and it is written anew.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from importlib import import_module
from typing import Any

from sb3_ppo_plus.errors import UntrustedFileError
from sb3_ppo_plus.export.contract import TensorSpec
from sb3_ppo_plus.export.onnx_sizes import check_costs
from sb3_ppo_plus.export.operations import ONNX_OPERATIONS
from sb3_ppo_plus.untrusted.strict_json import short

MAX_NODES = 20_000
#: Numbers in a weight
MAX_ELEMENTS = 2**26
OPSETS = range(18, 26)
MAX_IR_VERSION = 11
_NAME = "the .onnx file"


def checked_onnx(
    content: bytes, inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec], any_operation: bool = False
) -> bytes:
    """Check an ONNX file, and write it anew.

    onnxruntime may find other things in a file than the package onnx, such as a graph in its own format. What is
    written holds only what was checked.

    :param content: of the file
    :param inputs: what it must take
    :param outputs: what it must give
    :param any_operation: whether any operation is allowed, of any size; weights must be in the file nevertheless
    :return: the content for onnxruntime
    :raises UntrustedFileError: if it is refused
    """
    try:
        model = import_module("onnx").ModelProto.FromString(content)
        model.DiscardUnknownFields()
    except Exception as error:
        # protobuf has errors of its own in each of its implementations
        raise UntrustedFileError(f"{_NAME} is no ONNX file: {error}") from error
    graph = model.graph
    _check_tensors(model)
    _check_ends(graph.input, inputs, "inputs")
    _check_ends(graph.output, outputs, "outputs")
    if any_operation:
        anew: bytes = model.SerializeToString()
        return anew
    domains = [opset.domain for opset in model.opset_import]
    if domains != [""] or model.opset_import[0].version not in OPSETS:
        raise UntrustedFileError(f"{_NAME} must use ONNX's own operations, opset {OPSETS[0]} to {OPSETS[-1]}")
    if model.functions or model.training_info or graph.sparse_initializer:
        raise UntrustedFileError(f"{_NAME} has functions, training or sparse tensors, which no policy needs")
    if len(graph.node) > MAX_NODES:
        raise UntrustedFileError(f"{_NAME} has {len(graph.node)} operations; at most {MAX_NODES} are allowed")
    for node in graph.node:
        if node.domain or node.op_type not in ONNX_OPERATIONS:
            raise UntrustedFileError(
                f"{_NAME} has the operation {short(node.op_type)}, which is not in the closed list of "
                "sb3_ppo_plus.export.operations. load_exported(path, trusted=True) allows any operation"
            )
    check_costs(graph, inputs, model.opset_import[0].version, _NAME)
    return _written_anew(model)


def _written_anew(model: Any) -> bytes:  # noqa: ANN401  # onnx's ModelProto
    """Write what was checked of a model, and nothing else."""
    onnx = import_module("onnx")
    plain = onnx.ModelProto(ir_version=min(model.ir_version, MAX_IR_VERSION))
    plain.opset_import.add(domain="", version=model.opset_import[0].version)
    graph = plain.graph
    graph.name = "policy"
    kinds = onnx.AttributeProto
    plain_kinds = (kinds.FLOAT, kinds.INT, kinds.STRING, kinds.TENSOR, kinds.FLOATS, kinds.INTS)
    for node in model.graph.node:
        kept = graph.node.add(op_type=node.op_type, input=node.input, output=node.output)
        for attribute in node.attribute:
            if attribute.type not in plain_kinds:
                raise UntrustedFileError(
                    f"{_NAME}: {node.op_type} has an attribute {short(attribute.name)} of no plain type"
                )
            single = {field: getattr(attribute, field) for field in ("f", "i", "s", "t") if attribute.HasField(field)}
            lists = {"floats": attribute.floats, "ints": attribute.ints}
            kept.attribute.add(name=attribute.name, type=attribute.type, **single, **lists)
    graph.initializer.extend(model.graph.initializer)
    graph.input.extend(model.graph.input)
    graph.output.extend(model.graph.output)
    content: bytes = plain.SerializeToString()
    return content


def _check_tensors(model: Any) -> None:  # noqa: ANN401  # onnx's ModelProto
    """Check that all weights are in the file, with as many bytes as their shapes tell."""
    external, to_array = import_module("onnx").TensorProto.EXTERNAL, import_module("onnx.numpy_helper").to_array
    for tensor in _tensors(model):
        if tensor.data_location == external or tensor.external_data:
            raise UntrustedFileError(f"{_NAME}: the tensor {short(tensor.name)} is in another file")
        if any(size < 0 for size in tensor.dims) or math.prod(tensor.dims) > MAX_ELEMENTS:
            raise UntrustedFileError(f"{_NAME}: the tensor {short(tensor.name)} has more than {MAX_ELEMENTS} elements")
        try:
            n_elements = to_array(tensor).size
        except Exception as error:
            # ValueError, KeyError, TypeError, as the data or the dtype does not fit
            raise UntrustedFileError(f"{_NAME}: the tensor {short(tensor.name)} is damaged: {error}") from error
        if n_elements != math.prod(tensor.dims):
            raise UntrustedFileError(f"{_NAME}: the tensor {short(tensor.name)} has {n_elements} elements")


def _tensors(model: Any) -> Iterator[Any]:  # noqa: ANN401  # onnx's ModelProto
    """Yield all tensors of a model. Graphs inside operations are walked through as well."""
    graphs, owners = [model.graph], [*model.functions]
    graphs += [graph for info in model.training_info for graph in (info.initialization, info.algorithm)]
    while graphs or owners:
        if graphs:
            graph = graphs.pop()
            yield from graph.initializer
            for sparse in graph.sparse_initializer:
                yield from (sparse.values, sparse.indices)
        else:
            graph = owners.pop()
        for node in graph.node:
            for attribute in node.attribute:
                if attribute.HasField("t"):
                    yield attribute.t
                yield from attribute.tensors
                sparse_tensors = [
                    *attribute.sparse_tensors,
                    *([attribute.sparse_tensor] * attribute.HasField("sparse_tensor")),
                ]
                for sparse in sparse_tensors:
                    yield from (sparse.values, sparse.indices)
                graphs += [*attribute.graphs, *([attribute.g] if attribute.HasField("g") else [])]


def _check_ends(values: Any, specs: Sequence[TensorSpec], which: str) -> None:  # noqa: ANN401  # onnx's ValueInfoProto
    """Check that inputs or outputs are those of the contract."""
    dtype_of = import_module("onnx.helper").tensor_dtype_to_np_dtype
    found = []
    for value in values:
        tensor = value.type.tensor_type
        try:
            dtype = dtype_of(tensor.elem_type).name
        except (KeyError, ValueError, TypeError):
            dtype = ""
        sizes = [size.dim_value if size.HasField("dim_value") else None for size in tensor.shape.dim]
        found.append((value.name, dtype, sizes))
    expected = [
        (spec.name, spec.dtype, [None if isinstance(size, str) else size for size in spec.shape]) for spec in specs
    ]
    if found != expected:
        raise UntrustedFileError(
            f"{_NAME}: the {which} {short(found)} are not those of the contract, {short(expected)}"
        )
