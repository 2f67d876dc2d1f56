"""Files without trust that are small, and whose graphs are not: refused before anything is computed."""

import json
import operator

import numpy as np
import pytest
import torch as th
from hostile_graphs import COSTLY_ONNX, COSTLY_PT2, SAME, onnx_model, pt2_content, two_in_one, write

from sb3_ppo_plus import UntrustedFileError
from sb3_ppo_plus.export import load_exported
from sb3_ppo_plus.export.contract import TensorSpec
from sb3_ppo_plus.export.pt2_sizes import check_sizes
from sb3_ppo_plus.untrusted.strict_json import encode_array


@pytest.mark.parametrize("name", COSTLY_ONNX)
def test_an_onnx_graph_that_costs_too_much_is_refused(name, tmp_path):
    nodes, initializers, message = COSTLY_ONNX[name]
    path = write(tmp_path / "policy.onnx", onnx_model(nodes, initializers).SerializeToString())
    with pytest.raises(UntrustedFileError, match=message):
        load_exported(path)


@pytest.mark.parametrize("trusted", [False, True])
def test_onnxruntime_reads_what_was_checked(trusted, tmp_path):
    """And no graph in its own format that the same bytes hold."""
    policy = load_exported(write(tmp_path / "policy.onnx", two_in_one()), trusted=trusted)
    assert policy.predict(np.array([0.25], np.float32))[0] == 0.25


@pytest.mark.parametrize("kind", COSTLY_PT2)
def test_a_pt2_graph_that_costs_too_much_is_refused(kind, tmp_path):
    n, message = COSTLY_PT2[kind]
    assert load_exported(write(tmp_path / "small.pt2", pt2_content(kind, 16))).predict(np.zeros(1, np.float32))[0] == 0
    with pytest.raises(UntrustedFileError, match=message):
        load_exported(write(tmp_path / "large.pt2", pt2_content(kind, n)))


@pytest.mark.parametrize("operation", ["unbind", "split", "linear"])
def test_arguments_by_keyword_cannot_hide_what_a_pt2_graph_costs(operation):
    """Costs are counted by the place of an argument."""
    graph = th.fx.Graph()
    x = graph.placeholder("inputs")
    x = graph.call_function(operator.getitem, (x, "observation"))
    wide = graph.call_function(th.ops.aten.expand.default, (x, [1, 5_000]))
    calls = {
        "unbind": (th.ops.aten.unbind.int, (wide,), {"dim": 1}),
        "split": (th.ops.aten.split.Tensor, (wide, 1), {"dim": 1}),
        "linear": (th.ops.aten.linear.default, (), {"input": x, "weight": graph.get_attr("weight")}),
    }
    graph.output(graph.call_function(*calls[operation]))
    module = th.fx.GraphModule({"weight": th.zeros(1, 1)}, graph)
    with pytest.raises(UntrustedFileError, match=f"{operation} has arguments by keyword"):
        check_sizes(module, {"observation": th.zeros(1, 1)}, "the file")


def exported(tmp_path, **kwargs):
    return write(tmp_path / "policy.onnx", onnx_model([SAME]).SerializeToString(), **kwargs)


@pytest.mark.parametrize("n_rows", [0, 1, 3, 20_000])
def test_a_test_vector_of_another_size_is_refused(n_rows, tmp_path):
    with pytest.raises(UntrustedFileError, match="test must have 2 observations"):
        load_exported(exported(tmp_path, n_rows=n_rows))


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (TensorSpec("n", "noise", "float64", ("batch", 1), distribution="gumbel"), "must be float32"),
        (TensorSpec("n", "noise", "float32", ("batch", 2**25), distribution="gumbel"), "numbers for one observation"),
        (TensorSpec("n", "action_masks", "bool", ("batch", 2)), "must have the shape"),
    ],
)
def test_inputs_that_their_role_does_not_have_are_refused(spec, message, tmp_path):
    path = exported(tmp_path)
    contract = json.loads(path.with_name("policy.onnx.json").read_text())
    entry = dict(contract["inputs"][0], name="n", role=spec.role, dtype=spec.dtype, shape=list(spec.shape))
    entry |= {"distribution": spec.distribution, "neutral": None, "optional": True}
    contract["inputs"].append(entry)
    contract["deterministic"] = spec.role != "noise"
    # An array without numbers, for sizes that no file would hold
    contract["test"]["inputs"]["n"] = encode_array(np.zeros((0, *spec.shape[1:]), spec.dtype))
    path.with_name("policy.onnx.json").write_text(json.dumps(contract))
    with pytest.raises(UntrustedFileError, match=message):
        load_exported(path)
