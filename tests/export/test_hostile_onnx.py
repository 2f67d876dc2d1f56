"""``load_exported`` and hostile ONNX files and contracts."""

import hashlib
import json
import os

import numpy as np
import onnx
import pytest
from models import build
from onnx import TensorProto, helper, numpy_helper

from sb3_ppo_plus import UntrustedFileError, export_policy
from sb3_ppo_plus.export import load_exported


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """The path of an exported policy with three numbers as observation and two as action."""
    return export_policy(build(), tmp_path_factory.mktemp("exported") / "policy.onnx")


@pytest.fixture
def files(exported, tmp_path):
    """The model and the contract of that policy, and what writes them."""
    model, contract = onnx.load(exported), json.loads((exported.parent / "policy.onnx.json").read_text())

    def write(content=None):
        content = model.SerializeToString() if content is None else content
        (tmp_path / "policy.onnx").write_bytes(content)
        contract["sha256"] = hashlib.sha256(content).hexdigest()
        (tmp_path / "policy.onnx.json").write_text(json.dumps(contract))
        return tmp_path / "policy.onnx"

    return model, contract, write


def add_before_output(model, *nodes):
    """Put operations in front of the others: the first takes "observation", the last gives "changed"."""
    for node in model.graph.node:
        for index, name in enumerate(node.input):
            if name == "observation":
                node.input[index] = "changed"
    kept = list(model.graph.node)
    del model.graph.node[:]
    model.graph.node.extend([*nodes, *kept])


def test_the_files_are_read_as_they_were_written(files):
    _, _, write = files
    policy = load_exported(write())
    assert policy.predict(np.zeros(3, np.float32))[0].shape == (2,)


def test_weights_in_other_files_are_not_read(files, tmp_path):
    model, _, write = files
    tensor = model.graph.initializer[0]
    (tmp_path / "secret").write_bytes(tensor.raw_data)
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="secret")
    for trusted in (False, True):
        with pytest.raises(UntrustedFileError, match="in another file"):
            load_exported(write(), trusted=trusted)


def test_weights_in_other_files_are_not_read_inside_attributes(files):
    model, _, write = files
    tensor = numpy_helper.from_array(np.zeros(3, np.float32))
    node = helper.make_node("Constant", [], ["unused"], value=tensor)
    node.attribute[0].t.data_location = TensorProto.EXTERNAL
    model.graph.node.append(node)
    with pytest.raises(UntrustedFileError, match="in another file"):
        load_exported(write())


def loop_for_ever(model):
    body = helper.make_graph(
        [helper.make_node("Identity", ["going"], ["going_on"]), helper.make_node("Identity", ["x"], ["y"])],
        "body",
        [
            helper.make_tensor_value_info("i", TensorProto.INT64, []),
            helper.make_tensor_value_info("going", TensorProto.BOOL, []),
            helper.make_tensor_value_info("x", TensorProto.FLOAT, None),
        ],
        [
            helper.make_tensor_value_info("going_on", TensorProto.BOOL, []),
            helper.make_tensor_value_info("y", TensorProto.FLOAT, None),
        ],
    )
    model.graph.initializer.append(numpy_helper.from_array(np.array(True), "true"))
    add_before_output(model, helper.make_node("Loop", ["", "true", "observation"], ["changed"], body=body))


def double_forty_times(model):
    nodes = [helper.make_node("Concat", ["observation"] * 2, ["x0"], axis=0)]
    nodes += [helper.make_node("Concat", [f"x{i}"] * 2, [f"x{i + 1}"], axis=0) for i in range(39)]
    model.graph.initializer.append(numpy_helper.from_array(np.array([0]), "zero"))
    add_before_output(model, *nodes, helper.make_node("Gather", ["x39", "zero"], ["changed"], axis=0))


def allocate_by_a_constant(model):
    model.graph.initializer.append(numpy_helper.from_array(np.array([2**30, 3]), "size"))
    model.graph.initializer.append(numpy_helper.from_array(np.array([0]), "axes"))
    add_before_output(
        model,
        helper.make_node("Expand", ["observation", "size"], ["large"]),
        helper.make_node("ReduceMean", ["large", "axes"], ["changed"], keepdims=1),
    )


def allocate_by_an_observation(model):
    add_before_output(
        model,
        helper.make_node("Cast", ["observation"], ["sizes"], to=TensorProto.INT64),
        helper.make_node("Reshape", ["sizes", "three"], ["size"]),
        helper.make_node("ConstantOfShape", ["size"], ["large"]),
        helper.make_node("ReduceMean", ["large"], ["mean"], keepdims=0),
        helper.make_node("Add", ["observation", "mean"], ["changed"]),
    )
    model.graph.initializer.append(numpy_helper.from_array(np.array([3]), "three"))


def use_an_unknown_operation(model):
    add_before_output(model, helper.make_node("NonZero", ["observation"], ["changed"]))


def use_another_domain(model):
    add_before_output(model, helper.make_node("Gelu", ["observation"], ["changed"], domain="com.microsoft"))


def import_another_domain(model):
    model.opset_import.add(domain="com.microsoft", version=1)


def define_a_function(model):
    opsets = [helper.make_opsetid("", 18)]
    node = helper.make_node("Identity", ["x"], ["y"])
    model.functions.append(helper.make_function("", "Relu", ["x"], ["y"], [node], opsets))


def claim_more_than_there_is(model):
    model.graph.initializer[0].dims[0] = 2**10


def claim_another_input(model):
    model.graph.input[0].type.tensor_type.shape.dim[1].dim_value = 4


def give_another_output(model):
    model.graph.output[0].name = "other"


HOSTILE = [
    (loop_for_ever, "operation 'Loop'"),
    (double_forty_times, "bytes for one observation"),
    (allocate_by_a_constant, "bytes for one observation"),
    (allocate_by_an_observation, "not known before it runs"),
    (use_an_unknown_operation, "operation 'NonZero'"),
    (use_another_domain, "operation 'Gelu'"),
    (import_another_domain, "ONNX's own operations"),
    (define_a_function, "functions"),
    (claim_more_than_there_is, "is damaged"),
    (claim_another_input, "not those of the contract"),
    (give_another_output, "not those of the contract"),
]


@pytest.mark.parametrize(("change", "message"), HOSTILE, ids=[change.__name__ for change, _ in HOSTILE])
def test_a_hostile_model_is_refused(change, message, files):
    model, _, write = files
    change(model)
    with pytest.raises(UntrustedFileError, match=message):
        load_exported(write())


@pytest.mark.parametrize("content", [b"", b"\x08", b"\xff" * 1000, b"PK\x03\x04"])
def test_what_is_no_model_is_refused(content, files):
    _, _, write = files
    with pytest.raises(UntrustedFileError):
        load_exported(write(content))


def test_altered_bytes_are_refused_or_run(files):
    model, _, write = files
    content = bytearray(model.SerializeToString())
    rng = np.random.default_rng(0)
    for _ in range(100):
        altered = bytearray(content)
        for position in rng.integers(len(content), size=3):
            altered[position] = rng.integers(256)
        try:
            load_exported(write(bytes(altered))).predict(np.zeros(3, np.float32))
        except UntrustedFileError:
            continue


def test_another_file_than_the_contracts_is_refused(files):
    _, _, write = files
    path = write()
    path.write_bytes(path.read_bytes() + b"\x00")
    with pytest.raises(UntrustedFileError, match="its hash is another one"):
        load_exported(path)


def test_special_files_are_refused(files, tmp_path):
    _, _, write = files
    path = write()
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(UntrustedFileError, match="no regular file"):
        load_exported(path)


CONTRACTS = [
    ({"format": "sb3_ppo_plus.export/2"}, "format must be"),
    ({"inputs": []}, "from 1 to 1000 inputs"),
    ({"outputs": [{"name": "action", "role": "action", "dtype": "object", "shape": ["batch", 2]}]}, "dtype must be"),
    ({"outputs": [{"name": "action", "role": "reward", "dtype": "float32", "shape": ["batch"]}]}, "role must be"),
    ({"outputs": [{"name": "action", "role": "action", "dtype": "float32", "shape": [2]}]}, "'batch' once"),
    ({"outputs": [{"name": "action", "role": "action", "dtype": "float32", "shape": ["batch", 2**40]}]}, "elements"),
    (
        {"outputs": [{"name": "action", "role": "action", "dtype": "float32", "shape": ["batch", 3], "key": None}]},
        "must be float32",
    ),
    (
        {"action_space": {"space": "Discrete", "n": 3, "start": 0, "dtype": "int64"}},
        "an action for each part of the action space",
    ),
    ({"observation_space": {"space": "MultiBinary", "shape": [4], "is_flat": True}}, "does not fit the observation"),
    ({"deterministic": False}, "every other one has"),
    ({"test": {"inputs": {}, "outputs": {}}}, "an array for each of the inputs"),
]


@pytest.mark.parametrize(("members", "message"), CONTRACTS)
def test_a_hostile_contract_is_refused(members, message, files):
    _, contract, write = files
    contract.update(members)
    with pytest.raises(UntrustedFileError, match=message):
        load_exported(write())


@pytest.mark.parametrize("text", [b"", b"[]", b'{"format": NaN}', b"[" * 100_000, b'{"a": 1, "a": 2}', b"\xff"])
def test_what_is_no_strict_json_is_refused(text, files):
    _, _, write = files
    path = write()
    (path.parent / "policy.onnx.json").write_bytes(text)
    with pytest.raises(UntrustedFileError):
        load_exported(path)
