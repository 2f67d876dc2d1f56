"""Exports of Tuple and Dict actions: an output for each part, and the environment's own structure around them."""

import json

import numpy as np
import pytest
from export_cases import HYBRID, HYBRID_OF_FLOATS, Case, make_model, parts_of_actions
from scipy import stats

from sb3_ppo_plus import UntrustedFileError, export_policy
from sb3_ppo_plus.export import load_exported

PATHS = ["0", "1.far away", "1.near", "2", "3"]
NAMES = ["action_0", "action_1_far_away", "action_1_near", "action_2", "action_3"]
# Choices of the part "0" and of the two rows of "2"
MASK_SIZE = 3 + 2 + 3 + 4 + 2


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    model, _, raw, _ = make_model(Case("hybrid_beta", "mlp", is_masked=True))
    path = export_policy(model, tmp_path_factory.mktemp("exported") / "policy.onnx")
    return model, raw, path


def test_each_part_is_an_output_of_its_own_dtype_and_shape(exported):
    contract = load_exported(exported[2]).contract
    assert contract.action_space == HYBRID_OF_FLOATS
    assert [(spec.name, spec.key, spec.dtype, spec.shape) for spec in contract.actions] == [
        (NAMES[0], PATHS[0], "int64", ("batch",)),
        (NAMES[1], PATHS[1], "float64", ("batch",)),
        (NAMES[2], PATHS[2], "float32", ("batch", 2)),
        (NAMES[3], PATHS[3], "int64", ("batch", 2, 2)),
        (NAMES[4], PATHS[4], "float16", ("batch", 2, 1)),
    ]


def test_one_observation_has_one_structure_and_a_batch_has_a_list(exported):
    model, raw, path = exported
    policy, observations = load_exported(path), raw.reset()
    one, _ = policy.predict(observations[0])
    several, _ = policy.predict(observations)
    assert HYBRID_OF_FLOATS.contains(one) and all(HYBRID_OF_FLOATS.contains(action) for action in several)
    assert len(several) == len(observations)
    expected, _ = model.predict(
        observations, deterministic=True, action_masks=np.ones((len(observations), MASK_SIZE), bool)
    )
    assert_same_actions([one, *several], [expected[0], *expected])
    assert policy.largest_error_of_test() < 1e-6


def assert_same_actions(actions, expected, space=HYBRID_OF_FLOATS):
    parts = zip(parts_of_actions(space, actions), parts_of_actions(space, expected), strict=True)
    for mine, theirs in parts:
        np.testing.assert_allclose(mine.actions, theirs.actions, atol=1e-5)


def test_masks_may_have_the_structure_of_the_action_space(exported):
    model, raw, path = exported
    policy, observations = load_exported(path), raw.reset()
    last_choices = (
        np.array([False, False, True]),
        None,
        ([False, True], [False, False, True], [False] * 3 + [True], [False, True]),
        None,
    )
    flat = np.concatenate([np.ravel(mask) for mask in (last_choices[0], *last_choices[2])])
    assert len(flat) == MASK_SIZE
    of_structure, _ = policy.predict(observations, action_masks=[last_choices] * len(observations))
    of_array, _ = policy.predict(observations, action_masks=np.tile(flat, (len(observations), 1)))
    for action, other in zip(of_structure, of_array, strict=True):
        assert action[0] == other[0] == 4 and action[2].tolist() == [[1, 2], [3, 1]]
    assert_same_actions(
        of_structure,
        model.predict(observations, deterministic=True, action_masks=[last_choices] * len(observations))[0],
    )
    with pytest.raises(ValueError, match="'0'"):
        policy.predict(observations, action_masks=(np.ones(4, bool), None, None, None))


def test_the_noise_of_each_part_is_an_input(tmp_path):
    model, _, raw, _ = make_model(Case("hybrid", "mlp"))
    policy = load_exported(export_policy(model, tmp_path / "policy.onnx", deterministic=False), seed=0)
    noises = {spec.name: spec.distribution for spec in policy.contract.with_role("noise")}
    assert noises == {
        "noise_bits": "uniform",
        "noise_first_0": "gumbel",
        "noise_first_1_far_away": "standard_normal",
        "noise_first_1_near": "standard_normal",
        "noise_first_2": "gumbel",
        "noise_first_3": "standard_normal",
        "noise_steps": "standard_normal",
    }
    observations = np.repeat(raw.reset()[:1], 10_000, axis=0)
    n_varied = 0
    found = parts_of_actions(HYBRID, policy.predict(observations)[0])
    expected = parts_of_actions(HYBRID, model.predict(observations)[0])
    for mine, theirs in zip(found, expected, strict=True):
        columns = zip(
            mine.actions.reshape(len(observations), -1).T, theirs.actions.reshape(len(observations), -1).T, strict=True
        )
        for column, other in columns:
            assert stats.ks_2samp(column, other).pvalue > 1e-4
            n_varied += len(np.unique(column)) > 1
    assert n_varied > 8
    still, _ = policy.predict(observations[:2], deterministic=True)
    assert_same_actions(still, model.predict(observations[:2], deterministic=True)[0], HYBRID)


@pytest.mark.parametrize(
    "change",
    [
        lambda outputs: outputs.pop(1),
        lambda outputs: outputs.reverse(),
        lambda outputs: outputs[0].update(key=None),
        lambda outputs: outputs[0].update(key="1"),
        lambda outputs: outputs[2].update(shape=["batch", 3]),
    ],
)
def test_a_contract_whose_actions_are_not_those_of_the_space_is_refused(change, exported, tmp_path):
    contract = json.loads(exported[2].with_name("policy.onnx.json").read_text())
    change(contract["outputs"])
    (tmp_path / "policy.onnx").write_bytes(exported[2].read_bytes())
    (tmp_path / "policy.onnx.json").write_text(json.dumps(contract))
    with pytest.raises(UntrustedFileError):
        load_exported(tmp_path / "policy.onnx")
