"""Reads files of ``torch.export.save`` that are not trusted.

``torch.export.load`` unpickles, evaluates expressions and compiles guards that the file holds. So the file is read
here, strictly, and a new one is made of what is left: tensors as bytes, and operations of a closed list.
"""

from __future__ import annotations

import io
import json
import math
import re
import zipfile
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch as th

from sb3_ppo_plus.errors import UntrustedFileError
from sb3_ppo_plus.export.operations import PT2_OPERATIONS
from sb3_ppo_plus.torch_private import structure_of
from sb3_ppo_plus.untrusted.safe_zip import read_members
from sb3_ppo_plus.untrusted.strict_json import Limits, decode_shape, get, parse, short

MAX_MEMBERS = 20_000
MAX_NODES = 20_000
#: A slice to the end has the largest int64, and minus infinity masks attention
LIMITS = Limits(max_digits=20, allows_non_finite=True)
_NAME = "the .pt2 file"
_IDENTIFIER = re.compile(r"[A-Za-z_]\w{0,200}", re.ASCII)
_PATH = re.compile(r"[A-Za-z_]\w*(?:\.\w+){0,50}", re.ASCII)
# The number of observations, or a multiple of it
_SYMBOL = re.compile(r"(?:Mul\(Integer\(\d{1,9}\), )?Symbol\('s\d{1,6}', positive=True, integer=True\)\)?", re.ASCII)
_SYMBOL_NAME = re.compile(r"s\d{1,6}", re.ASCII)
_TEXT = re.compile(r"[a-z_]{0,20}", re.ASCII)
_MEMBER = re.compile(
    r"[\w.-]{1,100}/(?:data/weights/(?:weight_\d{1,6}|model_weights_config\.json)"
    r"|data/constants/(?:tensor_\d{1,6}|model_constants_config\.json)|data/sample_inputs/model\.pt|models/model\.json"
    r"|archive_format|archive_version|byteorder|\.data/version|\.data/serialization_id|\.format_version"
    r"|\.storage_alignment)",
    re.ASCII,
)
_PAYLOADS = {"weights": re.compile(r"weight_\d{1,6}", re.ASCII), "constants": re.compile(r"tensor_\d{1,6}", re.ASCII)}


_DTYPE_OF_NUMBER = {
    **{1: th.uint8, 2: th.int8, 3: th.int16, 4: th.int32, 5: th.int64, 6: th.float16, 7: th.float32, 8: th.float64},
    **{12: th.bool, 13: th.bfloat16},
}
"""The dtypes by their numbers in the file (``torch._export.serde.schema.ScalarType``)."""


def without_code(content: bytes, inputs: Sequence[str], outputs: Sequence[str]) -> bytes:
    """Make a new file of what is harmless in one.

    :param content: of the file
    :param inputs: names of the inputs that the policy must take, a dict in this order
    :param outputs: names of its outputs, likewise
    :return: a file that ``torch.export.load`` reads without running code of the first one
    :raises UntrustedFileError: if it holds anything else
    """
    members = read_members(io.BytesIO(content), _NAME, lambda name: bool(_MEMBER.fullmatch(name)), MAX_MEMBERS)
    roots = {name.partition("/")[0] for name in members}
    if len(roots) != 1:
        raise UntrustedFileError(f"{_NAME} must have one folder, got {short(sorted(roots))}")
    files = {name.partition("/")[2]: data for name, data in members.items()}
    if files.get("byteorder", b"little") != b"little":
        raise UntrustedFileError(f"{_NAME} was written on a machine of another byte order")
    kept: dict[str, bytes] = {"archive_format": b"pt2", "archive_version": b"0", "byteorder": b"little"}
    kept[".data/version"] = b"6\n"
    kept["data/sample_inputs/model.pt"] = b""
    for folder in _PAYLOADS:
        kept |= _payloads(files, folder)
    kept["models/model.json"] = json.dumps(_program(_member(files, "models/model.json"), inputs, outputs)).encode()
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        for name, data in kept.items():
            archive.writestr(f"policy/{name}", data)
    return file.getvalue()


def _member(files: Mapping[str, bytes], name: str) -> Any:  # noqa: ANN401  # JSON
    if name not in files:
        raise UntrustedFileError(f"{_NAME} lacks {name}")
    return parse(files[name], f"{_NAME}: {name}", LIMITS)


def _payloads(files: Mapping[str, bytes], folder: str) -> dict[str, bytes]:
    """Return the tensors of a folder, and the file that says what they are."""
    config_name = f"data/{folder}/model_{folder}_config.json"
    config = get(_member(files, config_name), "config", dict, config_name)
    kept, described = {}, {}
    for name, entry in config.items():
        where = f"{_NAME}: {config_name}: {short(name)}"
        path = get(entry, "path_name", str, where)
        if not _PATH.fullmatch(name) or not _PAYLOADS[folder].fullmatch(path):
            raise UntrustedFileError(f"{where} is no name of a tensor, or in no file of tensors")
        if get(entry, "use_pickle", bool, where):
            raise UntrustedFileError(f"{where} is a pickle, which is not read without trust")
        meta = _tensor_meta(get(entry, "tensor_meta", dict, where), where)
        sizes = decode_shape([size["as_int"] for size in meta["sizes"] if "as_int" in size], where)
        data = files.get(f"data/{folder}/{path}", b"")
        n_bytes = math.prod(sizes) * _DTYPE_OF_NUMBER[meta["dtype"]].itemsize
        strides = [math.prod(sizes[axis + 1 :]) for axis in range(len(sizes))]
        is_whole = [stride.get("as_int") for stride in meta["strides"]] == strides
        if len(sizes) != len(meta["sizes"]) or len(data) != n_bytes or n_bytes == 0 or not is_whole:
            raise UntrustedFileError(
                f"{where} must be contiguous, of a fixed size, with all its bytes in {short(path)}"
            )
        meta["storage_offset"] = {"as_int": 0}
        is_param = get(entry, "is_param", bool, where)
        described[name] = {"path_name": path, "is_param": is_param, "use_pickle": False, "tensor_meta": meta}
        kept[f"data/{folder}/{path}"] = data
    kept[config_name] = json.dumps({"config": described}).encode()
    return kept


def _program(program: object, inputs: Sequence[str], outputs: Sequence[str]) -> dict[str, Any]:
    """Check the graph, and leave out guards, stack traces and everything else that is not needed."""
    module = get(program, "graph_module", dict, _NAME)
    graph = get(module, "graph", dict, _NAME)
    nodes = get(graph, "nodes", list, _NAME)
    if len(nodes) > MAX_NODES:
        raise UntrustedFileError(f"{_NAME} has {len(nodes)} operations; at most {MAX_NODES} are allowed")
    signature = get(module, "signature", dict, _NAME)
    constraints = get(program, "range_constraints", dict, _NAME)
    return {
        "graph_module": {
            "graph": {
                "inputs": [_argument(argument) for argument in get(graph, "inputs", list, _NAME)],
                "outputs": [_argument(argument) for argument in get(graph, "outputs", list, _NAME)],
                "nodes": [_node(node) for node in nodes],
                "tensor_values": {
                    _identifier(name): _tensor_meta(meta, f"{_NAME}: {short(name)}")
                    for name, meta in get(graph, "tensor_values", dict, _NAME).items()
                },
                "sym_int_values": {
                    _identifier(name): _symbolic(value)
                    for name, value in get(graph, "sym_int_values", dict, _NAME).items()
                },
                "sym_bool_values": {},
                "is_single_tensor_return": False,
                "custom_obj_values": {},
                "sym_float_values": {},
            },
            "signature": {
                "input_specs": [_input_spec(spec) for spec in get(signature, "input_specs", list, _NAME)],
                "output_specs": [_output_spec(spec) for spec in get(signature, "output_specs", list, _NAME)],
            },
            "module_call_graph": [_call(inputs, outputs)],
            "metadata": {},
            "treespec_namedtuple_fields": {},
        },
        "opset_version": {"aten": _integer(get(get(program, "opset_version", dict, _NAME), "aten", int, _NAME))},
        "range_constraints": {_symbol_name(name): _range(limits) for name, limits in constraints.items()},
        "schema_version": {
            key: _integer(get(get(program, "schema_version", dict, _NAME), key, int, _NAME))
            for key in ("major", "minor")
        },
        "verifiers": ["TRAINING"],
        "torch_version": str(th.__version__),
        "guards_code": [],
    }


def _call(inputs: Sequence[str], outputs: Sequence[str]) -> dict[str, Any]:
    """Say that a dict goes in and a dict comes out, whatever the file says."""
    try:
        in_spec, out_spec = structure_of(((dict.fromkeys(inputs, 0),), {})), structure_of(dict.fromkeys(outputs, 0))
    except ImportError as error:
        raise UntrustedFileError(f"{_NAME} cannot be read without trust by this PyTorch: {error}") from error
    signature = {
        "inputs": [],
        "outputs": [],
        "in_spec": in_spec,
        "out_spec": out_spec,
        "forward_arg_names": ["inputs"],
    }
    return {"fqn": "", "signature": signature}


def _node(node: object) -> dict[str, Any]:
    target = get(node, "target", str, f"{_NAME}: operation")
    where = f"{_NAME}: {short(target)}"
    if target not in PT2_OPERATIONS:
        raise UntrustedFileError(
            f"{_NAME} has the operation {short(target)}, which is not in the closed list of "
            "sb3_ppo_plus.export.operations. load_exported(path, trusted=True) runs any, and the file's code"
        )
    arguments = []
    for entry in get(node, "inputs", list, where):
        kind = get(entry, "kind", int, where) if isinstance(entry, dict) and "kind" in entry else 1
        name = _identifier(get(entry, "name", str, where))
        arguments.append({"name": name, "arg": _argument(get(entry, "arg", dict, where)), "kind": _integer(kind)})
    checked: dict[str, Any] = {"target": target, "inputs": arguments, "metadata": {}}
    checked["outputs"] = [_argument(argument) for argument in get(node, "outputs", list, where)]
    if isinstance(node, dict) and node.get("name") is not None:
        checked["name"] = _identifier(node["name"])
    return checked


def _argument(argument: object) -> dict[str, Any]:
    if not isinstance(argument, dict) or len(argument) != 1:
        raise UntrustedFileError(f"{_NAME}: an argument must be an object with one member, got {short(argument)}")
    ((kind, value),) = argument.items()
    if kind not in _ARGUMENTS:
        raise UntrustedFileError(f"{_NAME}: an argument of the kind {short(kind)} is not allowed")
    return {kind: _ARGUMENTS[kind](value)}


def _matching(value: object, pattern: re.Pattern[str], what: str) -> str:
    if not isinstance(value, str) or not pattern.fullmatch(value):
        raise UntrustedFileError(f"{_NAME}: {short(value)} is no {what}")
    return value


def _identifier(value: object) -> str:
    return _matching(value, _IDENTIFIER, "name")


def _path(value: object) -> str:
    return _matching(value, _PATH, "name of a parameter")


def _symbol_name(value: object) -> str:
    return _matching(value, _SYMBOL_NAME, "name of a size")


def _integer(value: object) -> int:
    if type(value) is not int:
        raise UntrustedFileError(f"{_NAME}: {short(value)} is no integer")
    return value


def _float(value: object) -> float | str:
    if value in ("Infinity", "-Infinity"):
        return str(value)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise UntrustedFileError(f"{_NAME}: {short(value)} is no number")
    return value


def _bool(value: object) -> bool:
    if type(value) is not bool:
        raise UntrustedFileError(f"{_NAME}: {short(value)} is neither true nor false")
    return value


def _text(value: object) -> str:
    if not isinstance(value, str) or not _TEXT.fullmatch(value):
        raise UntrustedFileError(f"{_NAME}: the text {short(value)} is not allowed")
    return value


def _tensor(value: object) -> dict[str, str]:
    return {"name": _identifier(get(value, "name", str, _NAME))}


def _optional_tensor(value: object) -> dict[str, Any]:
    if not isinstance(value, dict) or len(value) != 1:
        raise UntrustedFileError(f"{_NAME}: {short(value)} is no tensor")
    return {"as_none": True} if "as_none" in value else {"as_tensor": _tensor(value.get("as_tensor"))}


def _size_argument(value: object) -> dict[str, Any]:
    if isinstance(value, dict) and "as_name" in value:
        return {"as_name": _identifier(value["as_name"])}
    return {"as_int": _integer(get(value, "as_int", int, _NAME))}


def _device(value: object) -> dict[str, Any]:
    if get(value, "type", str, _NAME) != "cpu":
        raise UntrustedFileError(f"{_NAME}: the device must be the CPU, got {short(value)}")
    return {"type": "cpu", "index": None}


def _list_of(check: Callable[[object], Any]) -> Callable[[object], list[Any]]:
    def check_all(value: object) -> list[Any]:
        if not isinstance(value, list):
            raise UntrustedFileError(f"{_NAME}: {short(value)} is no list")
        return [check(item) for item in value]

    return check_all


_ARGUMENTS: dict[str, Callable[[object], Any]] = {
    "as_none": _bool,
    "as_tensor": _tensor,
    "as_tensors": _list_of(_tensor),
    "as_optional_tensor": _optional_tensor,
    "as_optional_tensors": _list_of(_optional_tensor),
    "as_int": _integer,
    "as_ints": _list_of(_integer),
    "as_float": _float,
    "as_floats": _list_of(_float),
    "as_bool": _bool,
    "as_bools": _list_of(_bool),
    "as_string": _text,
    "as_sym_int": _size_argument,
    "as_sym_ints": _list_of(_size_argument),
    "as_scalar_type": _integer,
    "as_memory_format": _integer,
    "as_layout": _integer,
    "as_device": _device,
}


def _symbolic(value: object) -> dict[str, Any]:
    """Check a size: a number, or a symbol. PyTorch evaluates its text as Python."""
    if isinstance(value, dict) and "as_expr" in value:
        text = get(value["as_expr"], "expr_str", str, _NAME)
        if not _SYMBOL.fullmatch(text):
            raise UntrustedFileError(
                f"{_NAME}: the size {short(text)} is neither a number nor a multiple of that of observations"
            )
        hint = value["as_expr"].get("hint")
        checked = None if hint is None else {"as_int": _integer(get(hint, "as_int", int, _NAME))}
        return {"as_expr": {"expr_str": text, "hint": checked}}
    return {"as_int": _integer(get(value, "as_int", int, _NAME))}


def _range(limits: object) -> dict[str, Any]:
    members = {key: get(limits, key, (int, type(None)), _NAME) for key in ("min_val", "max_val")}
    return {key: None if value is None else _integer(value) for key, value in members.items()}


def _tensor_meta(meta: object, where: str) -> dict[str, Any]:
    dtype = get(meta, "dtype", int, where)
    if dtype not in _DTYPE_OF_NUMBER:
        raise UntrustedFileError(f"{where}: the dtype {short(dtype)} is not allowed")
    return {
        "dtype": dtype,
        "sizes": [_symbolic(size) for size in get(meta, "sizes", list, where)],
        "requires_grad": False,
        "device": _device(get(meta, "device", dict, where)),
        "strides": [_symbolic(stride) for stride in get(meta, "strides", list, where)],
        "storage_offset": _symbolic(get(meta, "storage_offset", dict, where)),
        "layout": _integer(get(meta, "layout", int, where)),
    }


def _input_spec(spec: object) -> dict[str, Any]:
    for kind, name in (
        ("parameter", "parameter_name"),
        ("buffer", "buffer_name"),
        ("tensor_constant", "tensor_constant_name"),
    ):
        if isinstance(spec, dict) and list(spec) == [kind]:
            members = {
                "arg": _tensor(get(spec[kind], "arg", dict, _NAME)),
                name: _path(get(spec[kind], name, str, _NAME)),
            }
            return {kind: members | ({"persistent": _bool(spec[kind].get("persistent"))} if kind == "buffer" else {})}
    return {"user_input": {"arg": _argument(get(get(spec, "user_input", dict, _NAME), "arg", dict, _NAME))}}


def _output_spec(spec: object) -> dict[str, Any]:
    return {"user_output": {"arg": _argument(get(get(spec, "user_output", dict, _NAME), "arg", dict, _NAME))}}
