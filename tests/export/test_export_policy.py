"""``export_policy``: what it writes, what it warns of, and what it refuses."""

import json
import re
import subprocess
import sys
from pathlib import Path

import gymnasium as gym
import numpy as np
import onnx
import onnxruntime
import pytest
import torch as th
from environments import BOX, DICT, IMAGE, MaskedEnv, MaskInObservation, ToyEnv, make_env, make_masked_env
from export_cases import Case, disturb, make_model
from gymnasium import spaces
from models import build
from scipy import stats
from stable_baselines3 import PPO
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from stable_baselines3.common.vec_env import DummyVecEnv, VecFrameStack, VecNormalize
from torch import nn
from torch.distributions import Distribution

import sb3_ppo_plus
from sb3_ppo_plus import ActorCriticPlusPolicy, PPOPlus, export_policy
from sb3_ppo_plus.export import load_exported
from sb3_ppo_plus.policies.bounded_distributions import ACTION_DISTRIBUTIONS, BetaDistribution


def disturbed(env=None, policy="MlpPolicy", **settings):
    model = build(env, policy, **settings)
    disturb(model)
    return model


def test_the_contract_names_what_goes_in_and_comes_out(tmp_path):
    env = VecNormalize(make_env(observation_space=DICT), norm_obs_keys=["vector"])
    model = disturbed(env, "MultiInputPolicy", policy_kwargs={"memory": "gru", "memory_kwargs": {"hidden_size": 8}})
    path = export_policy(model, tmp_path / "policy.onnx", env)
    contract = json.loads((tmp_path / "policy.onnx.json").read_text())
    shapes = {entry["name"]: (entry["dtype"], entry["shape"]) for entry in contract["inputs"]}
    assert shapes == {
        "observation_image": ("uint8", ["batch", 36, 36, 1]),
        "observation_kind": ("int64", ["batch"]),
        "observation_vector": ("float32", ["batch", 3]),
        "state_hidden": ("float32", [1, "batch", 8]),
        "episode_start": ("bool", ["batch"]),
    }
    assert [entry["name"] for entry in contract["outputs"]] == ["action", "next_state_hidden"]
    assert contract["state_begins"] == "zeros" and contract["normalizer"]["keys"] == ["vector"]
    assert contract["versions"]["torch"] == th.__version__ and contract["versions"]["opset"] == "18"
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    found = {value.name: value.shape for value in session.get_inputs()}
    assert found == {name: shape for name, (_, shape) in shapes.items()}
    assert load_exported(path).largest_error_of_test() <= 1e-6


def test_the_file_has_the_actor_alone_and_no_place_of_the_source(tmp_path):
    model = disturbed(policy_kwargs={"net_arch": {"pi": [8], "vf": [200, 200]}})
    for suffix in ("onnx", "pt2"):
        content = export_policy(model, tmp_path / f"policy.{suffix}").read_bytes()
        assert len(content) < 40_000, "40,000 parameters of the critic are in the file"
        assert str(Path(sb3_ppo_plus.__file__).parent).encode() not in content
        assert b'File \\"' not in content and b"stack_trace" not in content.replace(b'"stack_trace": null', b"")


def test_exporting_changes_nothing_of_the_model(tmp_path):
    model = disturbed(policy_kwargs={"memory": "lstm"})
    before = {name: tensor.clone() for name, tensor in model.policy.state_dict().items()}
    model.policy.set_training_mode(True)
    export_policy(model, tmp_path / "policy.pt2")
    assert model.policy.training
    for name, tensor in model.policy.state_dict().items():
        assert th.equal(tensor, before[name])
    assert all(parameter.requires_grad for parameter in model.policy.parameters())


def test_masks_may_be_left_out(tmp_path):
    model = disturbed(make_masked_env())
    path = export_policy(model, tmp_path / "policy.onnx")
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    observations = np.random.default_rng(0).standard_normal((6, 3)).astype(np.float32)
    expected, _ = model.predict(observations, deterministic=True, action_masks=np.ones((6, 5), bool))
    np.testing.assert_array_equal(session.run(None, {"observation": observations})[0], expected)
    # One mask for all is enough
    mask = np.arange(5)[None] != expected[0]
    chosen = session.run(None, {"observation": observations, "action_masks": mask})[0]
    assert (chosen != expected[0]).all()


def test_masks_among_the_observations_are_taken_from_there(tmp_path):
    env = DummyVecEnv([lambda: MaskInObservation(MaskedEnv())])
    model = disturbed(env, "MultiInputPolicy")
    policy = load_exported(export_policy(model, tmp_path / "policy.onnx"))
    assert [spec.name for spec in policy.contract.inputs] == ["observation_action_mask", "observation_vector"]
    observation = env.reset()
    for _ in range(20):
        action, _ = policy.predict(observation)
        np.testing.assert_array_equal(action, model.predict(observation, deterministic=True)[0])
        observation = env.step(action)[0]
    masks = np.eye(5, dtype=bool)[2]
    assert policy.predict(observation, action_masks=masks)[0] == [2]


def test_images_have_the_layout_of_the_environment(tmp_path):
    env = make_env(observation_space=IMAGE)
    model = disturbed(env, "CnnPolicy")
    image = IMAGE.sample()
    expected, _ = model.predict(image, deterministic=True)
    policy = load_exported(export_policy(model, tmp_path / "policy.pt2"))
    np.testing.assert_allclose(policy.predict(image)[0], expected, atol=1e-5)
    model.env = None
    policy = load_exported(export_policy(model, tmp_path / "policy.pt2"))
    np.testing.assert_allclose(policy.predict(image.transpose(2, 0, 1))[0], expected, atol=1e-5)
    policy = load_exported(export_policy(model, tmp_path / "policy.pt2", observation_space=IMAGE))
    np.testing.assert_allclose(policy.predict(image)[0], expected, atol=1e-5)
    with pytest.raises(ValueError, match="observation_space must be"):
        export_policy(model, tmp_path / "policy.pt2", observation_space=spaces.Box(0, 255, (36, 1, 36), np.uint8))


def test_frames_that_pad_a_stack_stay_zero(tmp_path):
    normalize = VecNormalize(DummyVecEnv([lambda: ToyEnv(spaces.Box(5, 9, (3,), np.float32))]))
    env = VecFrameStack(normalize, 4)
    kwargs = {"features_extractor_class": "transformer", "features_extractor_kwargs": {"seq_len": 4, "d_model": 8}}
    model = disturbed(env, policy_kwargs=kwargs)
    model.learn(64)
    policy = load_exported(export_policy(model, tmp_path / "policy.onnx", normalize))
    frames = np.random.default_rng(0).uniform(5, 9, (4, 3)).astype(np.float32)
    for n_real in range(1, 5):
        stack = np.where(np.arange(4)[:, None] >= 4 - n_real, frames, 0).astype(np.float32)
        normalized = np.where(np.arange(4)[:, None] >= 4 - n_real, normalize.normalize_obs(frames), 0).astype(
            np.float32
        )
        expected, _ = model.predict(normalized.reshape(-1), deterministic=True)
        np.testing.assert_allclose(policy.predict(stack.reshape(-1))[0], expected, atol=1e-5)


def test_predict_of_an_export_names_what_does_not_fit(tmp_path):
    model = disturbed(make_masked_env(observation_space=IMAGE), "CnnLstmPolicy")
    policy = load_exported(export_policy(model, tmp_path / "policy.pt2"))
    image = IMAGE.sample()
    action, state = policy.predict(image)
    assert action.shape == () and [part.shape for part in state] == [(1, 1, 256)] * 2
    for arguments, message in (
        ({"observation": image / 255.0}, "integers"),
        ({"observation": image[1:]}, "must have the shape"),
        ({"observation": image, "state": state[:1]}, "state must be None or"),
        ({"observation": np.stack([image] * 3), "state": state}, "3 environment"),
        ({"observation": image, "episode_start": [True, False]}, "episode_start"),
        ({"observation": image, "action_masks": np.zeros(5, bool)}, "no valid action"),
        ({"observation": image, "action_masks": np.ones(4, bool)}, "shape"),
        ({"observation": image, "deterministic": False}, "deterministic=False"),
    ):
        with pytest.raises(ValueError, match=message):
            policy.predict(**arguments)
    with pytest.raises(ValueError, match="missing"):
        policy.run({})
    with pytest.raises(ValueError, match="is no input"):
        policy.run({"obs": image})


def test_a_missing_normalizer_is_a_warning(tmp_path):
    model = disturbed(VecNormalize(make_env()))
    with pytest.warns(UserWarning, match="leaves out"):
        export_policy(model, tmp_path / "policy.pt2")


class BranchingExtractor(BaseFeaturesExtractor):
    """Looks at the numbers in Python, which a graph cannot follow."""

    def __init__(self, observation_space):
        super().__init__(observation_space, 3)
        self.calls = 0

    def forward(self, observations):
        self.calls += 1
        return observations * (1.0 if self.calls > 1 else 2.0)


class OwnDistribution(BetaDistribution):
    pass


class OwnPredict(ActorCriticPlusPolicy):
    def _predict(self, observation, deterministic=False):
        return super()._predict(observation, deterministic) * 0.5


def test_parts_that_are_not_known_are_named(tmp_path, monkeypatch):
    path = tmp_path / "policy.pt2"
    monkeypatch.setitem(ACTION_DISTRIBUTIONS, "own", OwnDistribution)
    with pytest.raises(ValueError, match="action distribution OwnDistribution"):
        export_policy(build(policy_kwargs={"action_dist": "own"}), path)
    with pytest.raises(ValueError, match="method _predict of OwnPredict"):
        export_policy(build(policy=OwnPredict), path)
    model = build()
    model.policy.extract_features = model.policy.extract_features
    with pytest.raises(ValueError, match="method extract_features of"):
        export_policy(model, path)
    with pytest.raises(ValueError, match=r"needs a policy of PPOPlus.*PPOPlus\.load"):
        export_policy(PPO("MlpPolicy", ToyEnv(), device="cpu"), path)
    with pytest.raises(ValueError, match=r"differs from predict.*BranchingExtractor"):
        export_policy(disturbed(policy_kwargs={"features_extractor_class": BranchingExtractor}), path)
    assert list(tmp_path.iterdir()) == []


class ByNumpy(nn.Module):
    def forward(self, x):
        return th.as_tensor(x.detach().numpy())


def test_what_cannot_be_traced_is_named(tmp_path):
    model = build()
    model.policy.mlp_extractor.policy_net.append(ByNumpy())
    with pytest.raises(ValueError, match=r"torch\.export failed; parts that are not PPOPlus's: .*ByNumpy"):
        export_policy(model, tmp_path / "policy.pt2")


def test_arguments_are_checked(tmp_path):
    with pytest.raises(ValueError, match=r"path must end in one of \.onnx, \.pt2, got"):
        export_policy(build(), tmp_path / "policy.pt")
    with pytest.raises(TypeError, match="vec_normalize must be None, a VecNormalize"):
        export_policy(build(), tmp_path / "policy.pt2", make_env())
    with pytest.raises(ValueError, match="statistics of the shape"):
        export_policy(
            build(), tmp_path / "policy.pt2", VecNormalize(make_env(observation_space=spaces.Box(-1, 1, (7,))))
        )


class Recipe(nn.Module):
    """What SB3's guide on exporting has."""

    def __init__(self, policy):
        super().__init__()
        self.policy = policy

    def forward(self, observation):
        return self.policy(observation, deterministic=True)


@pytest.mark.parametrize(
    ("memory", "by_tracing"),
    [("lstm", True), ("gru", True), (None, True), ("lstm", False), ("gru", False), ("gtrxl", False), (None, False)],
)
def test_the_recipe_of_sb3_warns_of_a_lost_memory(memory, by_tracing, tmp_path, recwarn, monkeypatch):
    # PyTorch's newer exporter fails at these checks, with SB3's policies too
    monkeypatch.setattr(Distribution, "_validate_args", by_tracing)
    policy = build(policy_kwargs={"memory": memory}).policy.eval()
    if by_tracing:
        th.onnx.export(Recipe(policy), (th.zeros(1, 3),), tmp_path / "policy.onnx", opset_version=18, dynamo=False)
    else:
        th.export.export(Recipe(policy), (th.zeros(1, 3),))
    found = [warning for warning in recwarn if "sb3_ppo_plus.export_policy" in str(warning.message)]
    assert bool(found) == (memory is not None)
    recwarn.clear()
    export_policy(policy, tmp_path / "policy.pt2")
    assert not [warning for warning in recwarn if "sb3_ppo_plus.export_policy" in str(warning.message)]


@pytest.mark.parametrize("suffix", ["onnx", "pt2"])
@pytest.mark.parametrize(
    ("distribution", "network"),
    [("gaussian", "mlp"), ("squashed_gaussian", "gru"), ("gsde", "mlp"), ("discrete", "mlp"), ("multi_binary", "mlp")],
)
def test_a_stochastic_export_has_the_distribution_of_the_policy(distribution, network, suffix, tmp_path):
    model, _, raw, _ = make_model(Case(distribution, network))
    export = load_exported(export_policy(model, tmp_path / f"policy.{suffix}", deterministic=False), seed=0)
    n = 20_000
    observations = np.repeat(raw.reset()[:1], n, axis=0)
    starts = np.ones(n, bool)
    found = export.predict(observations, None, starts)[0].reshape(n, -1)
    expected = sampled_by_predict(model, observations, starts).reshape(n, -1)
    for mine, theirs in zip(found.T, expected.T, strict=True):
        if isinstance(model.action_space, spaces.Box):
            assert stats.ks_2samp(mine, theirs).pvalue > 1e-3
        else:
            counts = np.stack([np.bincount(part.astype(int), minlength=5) for part in (mine, theirs)])
            assert stats.chi2_contingency(counts[:, counts.sum(axis=0) > 0]).pvalue > 1e-3
    assert len(np.unique(found)) > 1
    still = export.predict(observations[:3], None, starts[:3], deterministic=True)[0]
    np.testing.assert_allclose(
        still, model.predict(observations[:3], None, starts[:3], deterministic=True)[0], atol=1e-5
    )


def sampled_by_predict(model, observations, starts):
    """Samples of a policy; of gSDE each with a matrix of its own."""
    if model.use_sde:
        model.policy.reset_noise(len(observations))
    return model.predict(observations, None, starts, deterministic=False)[0]


def test_a_stochastic_beta_policy_has_its_distribution(tmp_path):
    model = disturbed(policy_kwargs={"action_dist": "beta"})
    export = load_exported(export_policy(model, tmp_path / "policy.onnx", deterministic=False), seed=0)
    for scale in (0.0, 1.0, 30.0):
        with th.no_grad():
            model.policy.action_net.bias.fill_(-2.0 + 0.3 * scale)
        export = load_exported(export_policy(model, tmp_path / "policy.onnx", deterministic=False), seed=0)
        observations = np.repeat(BOX.sample()[None], 20_000, axis=0)
        found = export.predict(observations)[0]
        beta = model.policy.get_distribution(th.as_tensor(observations[:1])).distribution
        low, high = model.action_space.low, model.action_space.high
        for axis in range(2):
            alpha, other = (part[0, axis].item() for part in (beta.concentration1, beta.concentration0))
            fraction = (found[:, axis] - low[axis]) / (high[axis] - low[axis])
            assert stats.kstest(fraction, stats.beta(alpha, other).cdf).pvalue > 1e-3
    with pytest.raises(ValueError, match="Beta policy"):
        export.predict(observations, deterministic=True)


def test_the_opset_and_the_operations_are_onnxs_own(tmp_path):
    model = disturbed(policy_kwargs={"memory": "gtrxl"})
    proto = onnx.load(export_policy(model, tmp_path / "policy.onnx"))
    assert [(opset.domain, opset.version) for opset in proto.opset_import] == [("", 18)]
    assert not proto.functions and {node.domain for node in proto.graph.node} == {""}


def test_importing_the_package_imports_none_of_the_extras():
    code = "import sb3_ppo_plus, sys; print({'onnx', 'onnxruntime', 'onnxscript'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "set()\n"


def test_the_model_is_found_where_predict_asks_for_masks(tmp_path):
    env = make_masked_env()
    model = disturbed(env)
    policy = load_exported(export_policy(model.masked(env), tmp_path / "policy.pt2"))
    assert re.search("action_masks", str(policy.contract.inputs))


def test_a_single_environment_is_evaluated(tmp_path):
    model = PPOPlus("MlpPolicy", "CartPole-v1", n_steps=64, batch_size=32, seed=0, device="cpu").learn(512)
    policy = load_exported(export_policy(model, tmp_path / "policy.onnx"))
    scores = [
        evaluate_policy(part, DummyVecEnv([make_cartpole]), 3, return_episode_rewards=True, warn=False)[0]
        for part in (model, policy)
    ]
    assert scores[0] == scores[1]


def make_cartpole():
    env = gym.make("CartPole-v1")
    env.reset(seed=3)
    return env


@pytest.mark.parametrize("suffix", [".onnx", ".pt2"])
def test_the_export_of_an_actor_that_sees_some_keys_asks_for_these_alone(suffix, tmp_path):
    space = spaces.Dict({name: spaces.Box(-1, 1, (3,)) for name in ("seen", "hidden")})
    env = make_vec_env(lambda: ToyEnv(observation_space=space), 2)
    model = PPOPlus("MultiInputPolicy", env, n_steps=8, policy_kwargs={"actor_keys": ["seen"]}, device="cpu")
    exported = load_exported(export_policy(model, tmp_path / f"policy{suffix}"))
    assert list(exported.observation_space.spaces) == ["seen"]
    observations = {"seen": env.reset()["seen"]}
    np.testing.assert_allclose(exported.predict(observations)[0], model.predict(observations, deterministic=True)[0])
