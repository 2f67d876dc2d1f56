"""Checks ONNX files that are not trusted, before onnxruntime sees them.

onnxruntime reads weights from other files that a model names, and runs loops and any allocation. So a file may have
only operations of a closed list, its own weights, and tensors whose sizes are known and have a limit.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from importlib import import_module
from typing import Any

from sb3_ppo_plus.errors import UntrustedFileError
from sb3_ppo_plus.export.contract import TensorSpec
from sb3_ppo_plus.export.operations import ONNX_OPERATIONS
from sb3_ppo_plus.untrusted.strict_json import short

MAX_NODES = 20_000
#: Numbers in all tensors that a graph makes for one observation
MAX_ELEMENTS = 2**26
OPSETS = range(18, 26)
_NAME = "the .onnx file"


def check_onnx(
    content: bytes, inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec], any_operation: bool = False
) -> None:
    """Check an ONNX file.

    :param content: of the file
    :param inputs: what it must take
    :param outputs: what it must give
    :param any_operation: whether any operation is allowed, of any size; weights must be in the file nevertheless
    :raises UntrustedFileError: if it is refused
    """
    try:
        model = import_module("onnx").ModelProto.FromString(content)
    except Exception as error:
        # protobuf has errors of its own in each of its implementations
        raise UntrustedFileError(f"{_NAME} is no ONNX file: {error}") from error
    graph = model.graph
    _check_tensors(model)
    _check_ends(graph.input, inputs, "inputs")
    _check_ends(graph.output, outputs, "outputs")
    if any_operation:
        return
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
    _check_sizes(model)


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


def _check_sizes(model: Any) -> None:  # noqa: ANN401  # onnx's ModelProto
    """Check that for one observation all tensors have sizes that are known, and not too large."""
    onnx = import_module("onnx")
    one = onnx.ModelProto()
    one.CopyFrom(model)
    del one.graph.value_info[:]
    for value in one.graph.input:
        for size in value.type.tensor_type.shape.dim:
            if not size.HasField("dim_value"):
                size.dim_value = 1
    for value in one.graph.output:
        value.type.tensor_type.ClearField("shape")
    try:
        inferred = onnx.shape_inference.infer_shapes(one, check_type=True, strict_mode=True, data_prop=True)
    except Exception as error:
        # An InferenceError, or what protobuf raises
        raise UntrustedFileError(f"{_NAME}: the sizes of its tensors cannot be found: {error}") from error
    known = {value.name: value for value in [*inferred.graph.value_info, *inferred.graph.output, *inferred.graph.input]}
    total = 0
    for node in inferred.graph.node:
        for name in node.output:
            if not name:
                continue
            tensor = known[name].type.tensor_type if name in known else None
            sizes = (
                [size.dim_value if size.HasField("dim_value") else None for size in tensor.shape.dim]
                if tensor
                else [None]
            )
            if tensor is None or not tensor.HasField("shape") or None in sizes:
                raise UntrustedFileError(
                    f"{_NAME}: the size of {short(name)} ({node.op_type}) is not known before it runs. "
                    "load_exported(path, trusted=True) allows any size"
                )
            total += math.prod(size or 0 for size in sizes)
    if total > MAX_ELEMENTS:
        raise UntrustedFileError(
            f"{_NAME} makes {total} numbers for one observation; at most {MAX_ELEMENTS} are allowed"
        )
