"""``load_exported`` and hostile files of ``torch.export.save``."""

import hashlib
import io
import json
import zipfile
from contextlib import suppress

import numpy as np
import pytest
import torch as th
from hostile import Payload
from models import build

from sb3_ppo_plus import UntrustedFileError, export_policy
from sb3_ppo_plus.export import load_exported

MODEL = "models/model.json"
WEIGHTS = "data/weights/model_weights_config.json"


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """The path of an exported policy with three numbers as observation and two as action."""
    return export_policy(build(), tmp_path_factory.mktemp("exported") / "policy.pt2")


@pytest.fixture
def files(exported, tmp_path):
    """The members of the archive by name, and what writes them."""
    contract = json.loads((exported.parent / "policy.pt2.json").read_text())
    with zipfile.ZipFile(exported) as archive:
        members = {name.partition("/")[2]: archive.read(name) for name in archive.namelist()}

    def write(content=None):
        if content is None:
            file = io.BytesIO()
            with zipfile.ZipFile(file, "w") as archive:
                for name, data in members.items():
                    archive.writestr(f"policy/{name}", data)
            content = file.getvalue()
        (tmp_path / "policy.pt2").write_bytes(content)
        contract["sha256"] = hashlib.sha256(content).hexdigest()
        (tmp_path / "policy.pt2.json").write_text(json.dumps(contract))
        return tmp_path / "policy.pt2"

    return members, write


def change_json(members, name, change):
    content = json.loads(members[name])
    change(content)
    members[name] = json.dumps(content).encode()


def pickled(payload):
    file = io.BytesIO()
    th.save(payload, file)
    return file.getvalue()


def test_the_file_is_read_as_it_was_written(files):
    _, write = files
    assert load_exported(write()).predict(np.zeros(3, np.float32))[0].shape == (2,)


def test_a_pickle_as_sample_inputs_is_not_read(files, tmp_path):
    members, write = files
    members["data/sample_inputs/model.pt"] = pickled(Payload(tmp_path / "hit"))
    load_exported(write())
    assert not (tmp_path / "hit").exists()
    # PyTorch's own reader would run it
    with suppress(Exception):
        th.export.load(write())
    assert (tmp_path / "hit").exists()


def test_a_pickle_as_weights_is_refused(files, tmp_path):
    members, write = files
    members["data/weights/weight_0"] = pickled(Payload(tmp_path / "hit"))

    def change(content):
        next(iter(content["config"].values()))["use_pickle"] = True

    change_json(members, WEIGHTS, change)
    with pytest.raises(UntrustedFileError, match="is a pickle"):
        load_exported(write())
    assert not (tmp_path / "hit").exists()


def test_guards_are_not_compiled(files, tmp_path):
    members, write = files
    hit = tmp_path / "hit"
    change_json(members, MODEL, lambda content: content.update(guards_code=[f"open({str(hit)!r}, 'w') is not None"]))
    load_exported(write()).predict(np.zeros(3, np.float32))
    assert not hit.exists()


@pytest.mark.parametrize(
    "text", ["__import__('os').system('true')", "Symbol('s1', positive=True, integer=True)**9**9**9", "9**9**9**9", "x"]
)
def test_expressions_are_not_evaluated(text, files):
    members, write = files

    def change(content):
        values = content["graph_module"]["graph"]["tensor_values"]
        next(iter(values.values()))["sizes"] = [{"as_expr": {"expr_str": text, "hint": None}}]

    change_json(members, MODEL, change)
    with pytest.raises(UntrustedFileError, match="neither a number nor"):
        load_exported(write())


def test_the_structure_of_inputs_is_the_contracts(files):
    members, write = files

    def change(content):
        call = content["graph_module"]["module_call_graph"][0]["signature"]
        call["in_spec"] = call["out_spec"] = '[1, {"type": "os.system", "context": "null", "children_spec": []}]'

    change_json(members, MODEL, change)
    assert load_exported(write()).predict(np.zeros(3, np.float32))[0].shape == (2,)


def first_node(content):
    return content["graph_module"]["graph"]["nodes"][0]


NODES = [
    (lambda content: first_node(content).update(target="torch.ops.aten.from_file.default"), "closed list"),
    (lambda content: first_node(content).update(target="torch.load"), "closed list"),
    (lambda content: first_node(content).update(target="torch.ops.higher_order.cond"), "closed list"),
    (lambda content: first_node(content)["inputs"][0].update(arg={"as_graph": {"name": "g"}}), "kind 'as_graph'"),
    (lambda content: first_node(content)["inputs"][0].update(arg={"as_custom_obj": {}}), "kind 'as_custom_obj'"),
    (lambda content: first_node(content)["inputs"][0].update(arg={"as_string": "x\n'"}), "text"),
    (lambda content: first_node(content)["inputs"][0].update(name="a b"), "is no name"),
    (lambda content: first_node(content).update(name="x = 1; y"), "is no name"),
    (lambda content: content["graph_module"]["graph"].update(nodes=[{}] * 30_000), "30000 operations"),
    (lambda content: content["graph_module"].update(signature={}), "input_specs"),
    (lambda content: content.update(range_constraints={"s1; x": {}}), "no name of a size"),
]


@pytest.mark.parametrize(("change", "message"), NODES)
def test_a_hostile_graph_is_refused(change, message, files):
    members, write = files
    change_json(members, MODEL, change)
    with pytest.raises(UntrustedFileError, match=message):
        load_exported(write())


def test_a_graph_that_makes_too_much_is_refused(files):
    """Each addition of two broadcast tensors is larger than the last: none is ever made."""
    members, write = files

    def change(content):
        for node in content["graph_module"]["graph"]["nodes"]:
            for entry in node["inputs"]:
                if node["target"] == "torch.ops.aten.reshape.default" and "as_ints" in entry["arg"]:
                    entry["arg"] = {"as_ints": [-1, 2]}
        graph = content["graph_module"]["graph"]
        result = graph["nodes"][-1]["outputs"][0]["as_tensor"]["name"]
        graph["tensor_values"]["large"] = graph["tensor_values"][result]
        sizes = {"as_ints": [2**20, 2**20, 1, 2]}
        graph["nodes"].append(
            {
                "target": "torch.ops.aten.expand.default",
                "inputs": [
                    {"name": "self", "arg": {"as_tensor": {"name": result}}, "kind": 1},
                    {"name": "size", "arg": sizes, "kind": 1},
                ],
                "outputs": [{"as_tensor": {"name": "large"}}],
                "metadata": {},
            }
        )

    change_json(members, MODEL, change)
    with pytest.raises(UntrustedFileError, match="bytes for one observation"):
        load_exported(write())


def test_weights_of_another_size_are_refused(files):
    members, write = files
    for change in (
        lambda entry: entry["tensor_meta"].update(sizes=[{"as_int": 2**20}, {"as_int": 2**20}]),
        lambda entry: entry["tensor_meta"].update(strides=[{"as_int": 0}] * len(entry["tensor_meta"]["strides"])),
        lambda entry: entry.update(path_name="weight_999"),
        lambda entry: entry.update(path_name="../../secret"),
        lambda entry: entry["tensor_meta"].update(device={"type": "cuda", "index": 0}),
        lambda entry: entry["tensor_meta"].update(dtype=99),
    ):
        original = members[WEIGHTS]
        change_json(members, WEIGHTS, lambda content, change=change: change(next(iter(content["config"].values()))))
        with pytest.raises(UntrustedFileError):
            load_exported(write())
        members[WEIGHTS] = original


@pytest.mark.parametrize(
    "name", ["data/aotinductor/model/x.so", "extra/x", "data/constants/custom_obj_0", "data/weights/model.pt", "../x"]
)
def test_other_members_are_refused(name, files):
    members, write = files
    members[name] = b"x"
    with pytest.raises(UntrustedFileError, match="does not belong there"):
        load_exported(write())


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04", b"\x80\x04."])
def test_what_is_no_archive_is_refused(content, files):
    _, write = files
    with pytest.raises(UntrustedFileError):
        load_exported(write(content))


def test_altered_values_are_refused_or_run(files):
    members, write = files
    content = bytearray(members[MODEL])
    rng = np.random.default_rng(0)
    for _ in range(40):
        altered = bytearray(content)
        for position in rng.integers(len(content), size=2):
            altered[position] = rng.integers(32, 127)
        members[MODEL] = bytes(altered)
        try:
            load_exported(write()).predict(np.zeros(3, np.float32))
        except UntrustedFileError:
            continue
