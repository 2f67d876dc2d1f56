"""Small graphs that cost much, or end the process, with contracts that fit them."""

import hashlib
import io
import re
import zipfile

import numpy as np
import onnxruntime
import torch as th
from gymnasium import spaces
from onnx import TensorProto, helper, numpy_helper

from sb3_ppo_plus.export.contract import Contract, TensorSpec, contract_path

OBSERVATION = TensorSpec("observation", "observation", "float32", ("batch", 1))
ACTION = TensorSpec("action", "action", "float32", ("batch", 1))
BOX = spaces.Box(-1, 1, (1,))


def write(path, content, n_rows=2, inputs=(OBSERVATION,)):
    """Write a file and its contract, whose test vector has some rows."""
    path.write_bytes(content)
    rows = np.zeros((n_rows, 1), np.float32)
    contract = Contract(
        inputs=tuple(inputs),
        outputs=(ACTION,),
        observation_space=BOX,
        action_space=BOX,
        deterministic=not any(spec.role == "noise" for spec in inputs),
        normalizer=None,
        versions={},
        sha256=hashlib.sha256(content).hexdigest(),
        test_inputs={spec.name: np.zeros(spec.shape_for(n_rows), spec.dtype) for spec in inputs},
        test_outputs={"action": rows},
    )
    contract_path(path).write_text(contract.as_json())
    return path


def integers(**values):
    """Initializers of int64."""
    return [numpy_helper.from_array(np.array(value, np.int64), name) for name, value in values.items()]


def onnx_model(nodes, initializers=()):
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", 1]) for name in ("observation", "action")]
    graph = helper.make_graph(nodes, "graph", ends[:1], ends[1:], list(initializers))
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)


def node(operation, inputs, outputs, **attributes):
    return helper.make_node(operation, inputs.split(), outputs.split(), **attributes)


def pool_with_two_windows():
    """Its costs would be counted by the first, and onnxruntime takes the last."""
    pool = node("MaxPool", "x", "y", kernel_shape=[1])
    pool.attribute.append(helper.make_attribute("kernel_shape", [65536]))
    return pool


SAME = node("Identity", "observation", "action")
IN_THREE = node("Unsqueeze", "observation two", "three")
#: Nodes, initializers, and what the error says
COSTLY_ONNX = {
    "the smallest integer over -1": (
        [
            node("Cast", "observation", "zero", to=TensorProto.INT64),
            node("Sub", "zero one", "minus"),
            node("Div", "least minus", "quotient"),
            node("Cast", "quotient", "back", to=TensorProto.FLOAT),
            node("Add", "observation back", "action"),
        ],
        integers(one=[1], least=[-(2**63)]),
        "Div divides integers by what may be 0 or -1",
    ),
    "the smallest integer over a weight": (
        [node("Div", "least minus", "quotient"), SAME],
        integers(minus=[-1], least=[-(2**63)]),
        "Div divides integers by what may be 0 or -1",
    ),
    "a list that doubles": (
        [*(node("Concat", f"s{i} s{i}", f"s{i + 1}", axis=0) for i in range(40)), SAME],
        integers(s0=[1, 1]),
        "bytes for one observation",
    ),
    "a size below 0": (
        [
            node("Expand", "observation shape", "big"),
            node("ReduceMax", "big axis", "action", keepdims=1),
            node("Pad", "action pads", "less"),
        ],
        integers(shape=[1, 3 * 10**8], axis=[1], pads=[0, -(10**9), 0, 0]),
        "bytes for one observation",
    ),
    "less than nothing": (
        [SAME, node("Pad", "observation pads", "less")],
        integers(pads=[0, -(10**9), 0, 0]),
        "Pad|shape",
    ),
    "text": (
        [node("Cast", "observation", "text", to=TensorProto.STRING), SAME],
        [],
        "'text' is of object, which is no number",
    ),
    "a long convolution": (
        [
            IN_THREE,
            node("Expand", "three wide", "x"),
            node("ConstantOfShape", "of_weight", "weight"),
            node("Conv", "x weight", "y", kernel_shape=[131072]),
            SAME,
        ],
        integers(two=[2], wide=[1, 1, 262144], of_weight=[32, 1, 131072]),
        "multiplications for one observation",
    ),
    "a large pool": (
        [IN_THREE, node("Expand", "three wide", "x"), node("MaxPool", "x", "y", kernel_shape=[65536]), SAME],
        integers(two=[2], wide=[1, 1, 131072]),
        "multiplications for one observation",
    ),
    "a size that nobody knows": (
        [
            node("Cast", "observation", "size", to=TensorProto.INT64),
            node("Reshape", "size flat", "sizes"),
            node("ConstantOfShape", "sizes", "x"),
            SAME,
        ],
        integers(flat=[1]),
        "not known before it runs",
    ),
    "an attribute twice": (
        [IN_THREE, node("Expand", "three wide", "x"), pool_with_two_windows(), SAME],
        integers(two=[2], wide=[1, 1, 131072]),
        "MaxPool: an attribute is given twice",
    ),
    "many axes": (
        [node("Unsqueeze", "observation axes", "deep"), SAME],
        integers(axes=list(range(2, 3000))),
        "has the shape",
    ),
    "an integer for an axis": (
        [node("Unsqueeze", "observation axes", "deep"), SAME],
        integers(axes=[2**50]),
        "integers that are too large",
    ),
    "an input that nothing gives": ([node("Add", "observation nothing", "action")], [], "needs 'nothing'"),
    "a name twice": ([SAME, SAME], [], "one of which is there already"),
}


def two_in_one():
    """Bytes that are Identity to the package onnx, and in onnxruntime's own format a loop that adds 1,000."""
    body = helper.make_graph(
        [node("Identity", "goes_on", "still"), node("Add", "x one", "y")],
        "body",
        [
            helper.make_tensor_value_info("i", TensorProto.INT64, []),
            helper.make_tensor_value_info("goes_on", TensorProto.BOOL, []),
            helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 1]),
        ],
        [
            helper.make_tensor_value_info("still", TensorProto.BOOL, []),
            helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 1]),
        ],
        [numpy_helper.from_array(np.array(1, np.float32), "one")],
    )
    loop = helper.make_node("Loop", ["n", "", "observation"], ["action"], body=body)
    return _hidden_in(onnx_model([SAME]), _own_format(onnx_model([loop], integers(n=1000))))


def _own_format(model):
    import tempfile
    from pathlib import Path

    options = onnxruntime.SessionOptions()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.ort"
        options.optimized_model_filepath = str(path)
        options.add_session_config_entry("session.save_model_format", "ORT")
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
        return path.read_bytes()


def _hidden_in(model, hidden):
    """Put a flatbuffer into an unknown field of a protobuf message whose first bytes are its header, too."""
    unsigned = lambda at, size: int.from_bytes(hidden[at : at + size], "little")  # noqa: E731  # a reader of one line
    root = unsigned(0, 4)
    table = root - int.from_bytes(hidden[root : root + 4], "little", signed=True)
    offsets = [unsigned(at, 2) for at in range(table + 4, table + unsigned(table, 2), 2)]
    size_of_root = unsigned(table + 2, 2)
    front = bytes([0x08, 0x08, 0x80, 0x01]) + b"ORTM" + bytes(83)
    new_root = int.from_bytes(front[:4], "little")
    shift = new_root + 64 + -(new_root + 64) % 16
    moved = bytearray(hidden[root : root + size_of_root])
    moved[:4] = (new_root - (table + shift)).to_bytes(4, "little", signed=True)
    for offset in filter(None, offsets):
        there = root + offset + unsigned(root + offset, 4) + shift
        moved[offset : offset + 4] = (there - (new_root + offset)).to_bytes(4, "little")
    front += model.SerializeToString()
    total = shift + len(hidden)
    tag = _varint(17 << 3 | 2)
    n_of_length = next(n for n in range(1, 6) if len(_varint(total - len(front) - len(tag) - n)) == n)
    front += tag + _varint(total - len(front) - len(tag) - n_of_length)
    content = bytearray(front + bytes(shift + 8 - len(front)) + hidden[8:])
    content[new_root : new_root + size_of_root] = moved
    return bytes(content)


def _varint(number):
    parts = []
    while True:
        parts.append(number & 127 | (128 if number > 127 else 0))
        number >>= 7
        if not number:
            return bytes(parts)


class Costly(th.nn.Module):
    """A graph with one operation, small as long as ``n`` is 16.

    :param kind: a key of ``COSTLY_PT2``
    """

    def __init__(self, kind):
        super().__init__()
        self.kind = kind

    def forward(self, inputs):
        n, double = 16, {"dtype": th.float64}
        if self.kind == "unbind":
            result = th.zeros(n).unbind(0)[0]
        elif self.kind == "attention":
            query = th.zeros(1, 1, n, 1)
            result = th.nn.functional.scaled_dot_product_attention(query, query, th.zeros(1, 1, n, 2)).amax()
        elif self.kind == "convolution":
            result = th.nn.functional.conv2d(th.zeros(1, 1, 1, 2 * n, **double), th.zeros(1, 1, 1, n, **double)).amax()
        else:
            result = th.nn.functional.avg_pool2d(th.zeros(1, 1, 1, 2 * n), (1, n), (1, 1)).amax()
        return {"action": inputs["observation"] + result.float()}


COSTLY_PT2 = {
    "unbind": (100_000, "unbind gives more than 4096 tensors"),
    "attention": (16_384, "bytes for one observation"),
    "convolution": (16_384, "bytes for one observation"),
    "pool": (65_536, "multiplications for one observation"),
}


def pt2_content(kind, n):
    """A file of torch.export with the size ``n`` in place of 16: its graph is text."""
    sizes = ({"observation": {0: th.export.Dim("batch", min=1)}},)
    program = th.export.export(Costly(kind), ({"observation": th.zeros(2, 1)},), dynamic_shapes=sizes, strict=False)
    file, changed = io.BytesIO(), io.BytesIO()
    th.export.save(program, file)
    with zipfile.ZipFile(file) as archive, zipfile.ZipFile(changed, "w") as other:
        for name in archive.namelist():
            content = archive.read(name)
            if name.endswith("model.json"):
                content = _with_sizes(content.decode(), n).encode()
            other.writestr(name, content)
    return changed.getvalue()


def _with_sizes(text, n):
    for old, new in ((32, 2 * n), (16, n)):
        text = re.sub(rf'"as_int": {old}\b', f'"as_int": {new}', text)
        text = re.sub(
            r'"as_ints": \[([^\]]*)\]',
            lambda match, old=old, new=new: f'"as_ints": [{re.sub(rf"(?<![0-9]){old}(?![0-9])", str(new), match[1])}]',
            text,
        )
    return text
