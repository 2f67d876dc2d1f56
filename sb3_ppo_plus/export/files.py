"""Writes a policy's graph as ONNX, or as a file of ``torch.export``."""

from __future__ import annotations

import io
import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module
from typing import Any

import numpy as np
import torch as th
from torch.export import Dim, ExportedProgram

from sb3_ppo_plus.export.contract import BATCH, TensorSpec
from sb3_ppo_plus.export.graph import PolicyGraph, naming_the_part

OPSET = 18
MASK_BATCH = "mask_batch"
"""Name of the size of the masks' batch in ONNX: that of the observations, or 1."""
MAX_ONNX_BYTES = 2**31 - 2**20


def trace(graph: PolicyGraph, example: Mapping[str, np.ndarray]) -> ExportedProgram:
    """Trace a graph for any number of observations.

    :param graph: the graph
    :param example: an array for each input, with at least two observations: torch.export takes a size of 1 for fixed
    :raises ValueError: if a part cannot be traced
    """
    batch = Dim("batch", min=1)
    sizes = {spec.name: {spec.batch_axis: batch} for spec in graph.inputs}
    inputs = {name: th.as_tensor(array) for name, array in example.items()}
    with naming_the_part(graph, "torch.export"), _quiet(), th.no_grad():
        program = th.export.export(graph, (inputs,), dynamic_shapes=(sizes,), strict=False)
    for node in program.graph.nodes:
        # These are lines of source files, with their paths
        node.meta.pop("stack_trace", None)
    return program


def as_pt2(program: ExportedProgram, graph: PolicyGraph) -> bytes:
    """Return the content of a file of ``torch.export.save``.

    :param program: the traced graph
    :param graph: the graph
    """
    file = io.BytesIO()
    with naming_the_part(graph, "torch.export.save"), _quiet():
        th.export.save(program, file)
    return file.getvalue()


def as_onnx(program: ExportedProgram, graph: PolicyGraph) -> bytes:
    """Return the content of an ONNX file.

    :param program: the traced graph
    :param graph: the graph
    :raises ImportError: if onnx or onnxscript is missing, see :func:`check_path`
    :raises ValueError: if ONNX lacks an operation
    """
    onnx = import_module("onnx")
    with naming_the_part(graph, "torch.onnx.export"), _quiet(), th.no_grad():
        exported = th.onnx.export(
            program,
            (),
            None,
            dynamo=True,
            opset_version=OPSET,
            input_names=[spec.name for spec in graph.inputs],
            output_names=[spec.name for spec in graph.outputs],
            verbose=False,
        )
        assert exported is not None
        model = exported.model_proto
    _tidy(model, graph)
    onnx.checker.check_model(model)
    if model.ByteSize() > MAX_ONNX_BYTES:
        raise ValueError(f"export_policy: the policy has {model.ByteSize()} bytes; ONNX files hold {MAX_ONNX_BYTES}")
    content: bytes = model.SerializeToString()
    return content


def _tidy(model: Any, graph: PolicyGraph) -> None:  # noqa: ANN401  # onnx's ModelProto
    """Name the number of observations, make masks optional, and remove lines and paths of source files."""
    # Sizes inside the graph have names of PyTorch's, and whoever runs the graph finds them anyway
    del model.graph.value_info[:]
    model.doc_string = model.graph.doc_string = ""
    model.producer_name, model.producer_version = "sb3-ppo-plus", ""
    for owner in (model, model.graph):
        del owner.metadata_props[:]
    for node in model.graph.node:
        node.doc_string = ""
        del node.metadata_props[:]
    for values, specs in ((model.graph.input, graph.inputs), (model.graph.output, graph.outputs)):
        for value, spec in zip(values, specs, strict=True):
            assert value.name == spec.name, f"{value.name!r} is not {spec.name!r}"
            _name_batch(value, spec)
            value.doc_string = ""
            del value.metadata_props[:]
    for spec in graph.inputs:
        if spec.optional:
            # An initializer with an input's name is its default
            default = np.ones(spec.shape_for(1), np.dtype(spec.dtype))
            model.graph.initializer.append(import_module("onnx.numpy_helper").from_array(default, spec.name))


def _name_batch(value: Any, spec: TensorSpec) -> None:  # noqa: ANN401  # onnx's ValueInfoProto
    dims = value.type.tensor_type.shape.dim
    for dim, size in zip(dims, spec.shape, strict=True):
        if size == BATCH:
            dim.dim_param = MASK_BATCH if spec.optional else BATCH


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence what PyTorch's exporters say about themselves."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
