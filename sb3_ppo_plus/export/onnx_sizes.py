"""Walks through an ONNX graph without trust, operation by operation, and counts what it costs.

ONNX's own inference of shapes for a whole graph takes any memory for a hostile one. Here each operation is looked at
alone, after its inputs were found to be small, and lists of integers that say how large a tensor is are computed here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any, NamedTuple

import numpy as np

from sb3_ppo_plus.errors import UntrustedFileError
from sb3_ppo_plus.export.contract import TensorSpec
from sb3_ppo_plus.export.costs import MAX_LIST, WORK_OF_COMPARISON, Costs
from sb3_ppo_plus.untrusted.strict_json import short

#: Largest absolute value of an attribute, and of an integer whose value matters for sizes
_MAX_INTEGER = 2**40
#: A slice to the end has these
_ENDS = (2**63 - 1, -(2**63), -(2**63) + 1)


class Tensor(NamedTuple):
    """What is known of a tensor.

    :param sizes: its sizes, for one observation
    :param dtype: NumPy's dtype
    :param value: the integers in it, if they are few and known before the graph runs
    :param is_weight: whether it is an initializer
    """

    sizes: tuple[int, ...]
    dtype: np.dtype[Any]
    value: np.ndarray | None = None
    is_weight: bool = False


def check_costs(graph: Any, inputs: Sequence[TensorSpec], opset: int, name: str) -> None:  # noqa: ANN401  # onnx's GraphProto
    """Check that all sizes are known for one observation, and that the costs have a limit.

    :param graph: the graph; its operations are from the closed list, its initializers were checked
    :param inputs: what goes in
    :param opset: version of the operations
    :param name: of the file, for errors
    :raises UntrustedFileError: if they are not, or have not
    """
    onnx = import_module("onnx")
    to_array = import_module("onnx.numpy_helper").to_array
    costs = Costs(name)
    known = {spec.name: Tensor(spec.shape_for(1), np.dtype(spec.dtype)) for spec in inputs}
    for initializer in graph.initializer:
        array = to_array(initializer)
        if initializer.name not in known:
            known[initializer.name] = Tensor(array.shape, array.dtype, _small_integers(array), is_weight=True)
        elif (array.shape, array.dtype) != known[initializer.name][:2]:
            raise UntrustedFileError(f"{name}: the default of {short(initializer.name)} does not fit the input")
    for node in graph.node:
        where = f"{name}: {node.op_type}"
        missing = [given for given in node.input if given and given not in known]
        if missing:
            raise UntrustedFileError(f"{where} needs {short(missing[0])}, which nothing before it gives")
        if any(given in known for given in node.output):
            raise UntrustedFileError(f"{where} gives {short(list(node.output))}, one of which is there already")
        _check_attributes(node, where)
        given = [known[each] if each else None for each in node.input]
        _check_split(node, where)
        _check_division(node, given, where)
        results = _results(onnx, node, given, opset, where)
        for each, result in results.items():
            costs.add_tensor(short(each), result.sizes, result.dtype.itemsize)
        _add_work(costs, node, given, list(results.values()))
        known |= results


def _small_integers(array: np.ndarray) -> np.ndarray | None:
    is_small = array.dtype in (np.int64, np.int32) and array.ndim <= 1 and array.size <= MAX_LIST
    return array.astype(np.int64) if is_small else None


def _check_attributes(node: Any, where: str) -> None:  # noqa: ANN401  # onnx's NodeProto
    if len(node.output) > MAX_LIST or len(node.input) > MAX_LIST or len(node.attribute) > 100:
        raise UntrustedFileError(f"{where} has too many inputs, outputs or attributes")
    if len({attribute.name for attribute in node.attribute}) < len(node.attribute):
        raise UntrustedFileError(f"{where}: an attribute is given twice")
    for attribute in node.attribute:
        integers = [*attribute.ints, *([attribute.i] if attribute.HasField("i") else [])]
        if len(integers) > MAX_LIST or any(abs(each) > _MAX_INTEGER and each not in _ENDS for each in integers):
            raise UntrustedFileError(
                f"{where} has an attribute {short(attribute.name)} with too many or large integers"
            )
        if len(attribute.floats) > MAX_LIST or attribute.strings or len(attribute.s) > 100:
            raise UntrustedFileError(f"{where}: the attribute {short(attribute.name)} is too large")


def _check_split(node: Any, where: str) -> None:  # noqa: ANN401  # onnx's NodeProto
    """Refuse a Split into another number of parts than it names: onnx's inference of shapes ends the process."""
    numbers = [attribute.i for attribute in node.attribute if attribute.name == "num_outputs"]
    if node.op_type == "Split" and numbers and numbers[0] != len(node.output):
        raise UntrustedFileError(f"{where} must have num_outputs={len(node.output)}, got {numbers[0]}")


def _check_division(node: Any, given: Sequence[Tensor | None], where: str) -> None:  # noqa: ANN401  # onnx's NodeProto
    """Refuse divisions of integers that may end the process: by 0, and of the smallest one by -1."""
    if node.op_type not in ("Div", "Mod") or len(given) < 2 or given[1] is None:
        return
    divisor = given[1]
    if divisor.dtype.kind not in "iu":
        return
    if divisor.value is None or np.isin(divisor.value, (0, -1)).any():
        raise UntrustedFileError(f"{where} divides integers by what may be 0 or -1")


def _results(onnx: Any, node: Any, given: Sequence[Tensor | None], opset: int, where: str) -> dict[str, Tensor]:  # noqa: ANN401  # onnx's module and NodeProto
    helper = import_module("onnx.helper")
    types, data = {}, {}
    for name, tensor in zip(node.input, given, strict=True):
        if tensor is None:
            continue
        kind = helper.np_dtype_to_tensor_dtype(tensor.dtype)
        types[name] = helper.make_tensor_type_proto(kind, tensor.sizes)
        if tensor.value is not None:
            if any(abs(each) > _MAX_INTEGER and each not in _ENDS for each in tensor.value.reshape(-1).tolist()):
                raise UntrustedFileError(f"{where}: {short(name)} holds integers that are too large")
            data[name] = import_module("onnx.numpy_helper").from_array(tensor.value.astype(tensor.dtype), name)
    try:
        schema = onnx.defs.get_schema(node.op_type, opset, "")
        inferred = onnx.shape_inference.infer_node_outputs(
            schema, node, types, data, opset_imports=[helper.make_opsetid("", opset)]
        )
    except Exception as error:
        # An InferenceError, a KeyError, or what protobuf raises
        raise UntrustedFileError(f"{where}: the sizes of its tensors cannot be found: {error}") from error
    value = _value_of(node, given)
    results = {}
    for name in node.output:
        if not name:
            continue
        results[name] = _checked(inferred.get(name), name, value, where)
    return results


def _checked(inferred: Any, name: str, value: np.ndarray | None, where: str) -> Tensor:  # noqa: ANN401  # onnx's TypeProto
    tensor = None if inferred is None else inferred.tensor_type
    if value is not None:
        sizes: list[int | None] = [*value.shape]
    elif tensor is None or not tensor.HasField("shape") or len(tensor.shape.dim) > MAX_LIST:
        sizes = [None]
    else:
        sizes = [size.dim_value if size.HasField("dim_value") else None for size in tensor.shape.dim]
    if tensor is None or None in sizes:
        raise UntrustedFileError(
            f"{where}: the size of {short(name)} is not known before it runs. "
            "load_exported(path, trusted=True) allows any size"
        )
    try:
        dtype = np.dtype(import_module("onnx.helper").tensor_dtype_to_np_dtype(tensor.elem_type))
    except (KeyError, TypeError) as error:
        raise UntrustedFileError(f"{where}: the dtype of {short(name)} is not known") from error
    if dtype.kind not in "biuf":
        raise UntrustedFileError(f"{where}: {short(name)} is of {dtype}, which is no number")
    return Tensor(tuple(size or 0 for size in sizes), dtype, value if dtype in (np.int64, np.int32) else None)


def _value_of(node: Any, given: Sequence[Tensor | None]) -> np.ndarray | None:  # noqa: ANN401  # onnx's NodeProto
    """Compute a list of integers that is known before the graph runs, if the operation is one that makes such lists."""
    if node.op_type == "Constant":
        return _constant(node)
    first = given[0] if given else None
    if node.op_type == "Shape" and first is not None:
        attributes = {each.name: each.i for each in node.attribute}
        return np.array(first.sizes[attributes.get("start", 0) : attributes.get("end", len(first.sizes))], np.int64)
    if node.op_type == "Size" and first is not None:
        return np.array(math.prod(first.sizes), np.int64)
    compute = _OF_LISTS.get(node.op_type)
    values = [None if tensor is None else tensor.value for tensor in given]
    if compute is None or not values or any(value is None for value in values):
        return None
    if sum(value.size for value in values if value is not None) > MAX_LIST:
        return None
    try:
        return np.asarray(compute(node, *values), np.int64)
    except (ValueError, IndexError, TypeError, OverflowError):
        # onnxruntime will refuse it, or it is no list that says sizes
        return None


def _constant(node: Any) -> np.ndarray | None:  # noqa: ANN401  # onnx's NodeProto
    for attribute in node.attribute:
        if attribute.name == "value":
            return _small_integers(import_module("onnx.numpy_helper").to_array(attribute.t))
        if attribute.name == "value_int":
            return np.array(attribute.i, np.int64)
        if attribute.name == "value_ints":
            return np.array(attribute.ints, np.int64)
    return None


def _axis(node: Any) -> int:  # noqa: ANN401  # onnx's NodeProto
    return next((int(each.i) for each in node.attribute if each.name == "axis"), 0)


def _unsqueeze(node: Any, value: Any, axes: Any) -> Any:  # noqa: ANN401  # onnx's NodeProto, NumPy's arrays
    if value.ndim or axes.size != 1:
        raise ValueError("no list comes out")
    return value.reshape(1)


def _squeeze(node: Any, value: Any, axes: Any = None) -> Any:  # noqa: ANN401  # the same
    return value.reshape(())


def _slice(node: Any, data: Any, starts: Any, ends: Any, axes: Any = None, steps: Any = None) -> Any:  # noqa: ANN401  # NumPy's arrays
    if data.ndim != 1 or starts.size != 1 or (axes is not None and axes.tolist() not in ([0], [-1])):
        raise ValueError("more than one axis")
    step = 1 if steps is None else int(steps.item())
    return data[int(starts.item()) : int(ends.item()) : step]


_OF_LISTS: dict[str, Callable[..., Any]] = {
    "Identity": lambda node, value: value,
    "Cast": lambda node, value: value,
    "Gather": lambda node, data, indices: np.take(data, indices, axis=_axis(node)),
    "Concat": lambda node, *values: np.concatenate(values, axis=_axis(node)),
    "Slice": _slice,
    "Squeeze": _squeeze,
    "Unsqueeze": _unsqueeze,
    "Add": lambda node, a, b: a + b,
    "Sub": lambda node, a, b: a - b,
    "Mul": lambda node, a, b: a * b,
    "Max": lambda node, *values: np.maximum.reduce(np.broadcast_arrays(*values)),
    "Min": lambda node, *values: np.minimum.reduce(np.broadcast_arrays(*values)),
    "Reshape": lambda node, value, shape: value.reshape(shape.tolist()),
}
"""Operations that make lists of integers of such lists. What they cannot compute is not known."""


def _add_work(costs: Costs, node: Any, given: Sequence[Tensor | None], results: Sequence[Tensor]) -> None:  # noqa: ANN401  # onnx's NodeProto
    """Count the work, and the memory beside the results, of an operation."""
    n_made = sum(math.prod(result.sizes) for result in results)
    n_read = sum(math.prod(tensor.sizes) for tensor in given if tensor is not None and not tensor.is_weight)
    costs.add_work(n_made + n_read)
    sizes = [() if tensor is None else tensor.sizes for tensor in given]
    if node.op_type in ("MatMul", "Gemm") and len(sizes) > 1 and sizes[0]:
        # Either axis, as Gemm may transpose
        costs.add_work(n_made * max(sizes[0][-2:]))
    if node.op_type == "Conv" and len(sizes) > 1:
        per_output = math.prod(sizes[1][1:])
        costs.add_work(n_made * per_output)
        # Convolutions may copy all patches
        costs.add_bytes(per_output * n_made // max(1, sizes[1][0]) * 8)
    kernels = [each.ints for each in node.attribute if each.name == "kernel_shape"]
    if node.op_type in ("MaxPool", "AveragePool") and kernels:
        costs.add_work(WORK_OF_COMPARISON * n_made * math.prod(kernels[0]))
