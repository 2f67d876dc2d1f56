"""What ``export_policy`` checks before and after its work, so that no file acts in another way than the model."""

import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch as th
from environments import make_env, make_masked_env
from gymnasium import spaces
from models import build
from stable_baselines3.common.vec_env import (
    VecCheckNan,
    VecEnvWrapper,
    VecExtractDictObs,
    VecFrameStack,
    VecMonitor,
    VecNormalize,
)

from sb3_ppo_plus import PPOPlus, export_policy
from sb3_ppo_plus.export import exporting, load_exported
from sb3_ppo_plus.export.observations import ObservationPart
from sb3_ppo_plus.zoo import export as zoo_export

KEYS = spaces.Dict({"a": spaces.Box(-5, 5, (3,)), "b": spaces.Box(-1, 1, (2,))})


class FiveTimes(VecEnvWrapper):
    def reset(self):
        return 5 * self.venv.reset()

    def step_wait(self):
        observations, *others = self.venv.step_wait()
        return 5 * observations, *others


def keys_env():
    return VecNormalize(make_env(observation_space=KEYS))


@pytest.mark.parametrize(
    ("make", "of_model", "name"),
    [
        (lambda: FiveTimes(VecNormalize(make_env())), lambda env: env, "FiveTimes"),
        (lambda: FiveTimes(VecNormalize(make_env())), lambda env: env.venv, "FiveTimes"),
        (lambda: FiveTimes(make_env()), lambda env: None, "FiveTimes"),
        (lambda: VecMonitor(FiveTimes(VecNormalize(make_env()))), lambda env: env.venv.venv, "FiveTimes"),
        (lambda: VecNormalize(VecNormalize(make_env())), lambda env: env, "VecNormalize"),
        (lambda: VecExtractDictObs(keys_env(), "a"), lambda env: env, "VecExtractDictObs"),
        (lambda: VecExtractDictObs(keys_env(), "a"), lambda env: env.venv, "VecExtractDictObs"),
    ],
)
@pytest.mark.filterwarnings("ignore:The environment is already wrapped")
def test_a_wrapper_that_may_change_observations_is_named(make, of_model, name, tmp_path):
    env = make()
    with pytest.raises(ValueError, match=f"does not know what the wrapper {name} does"):
        export_policy(build(env), tmp_path / "policy.pt2", of_model(env))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.filterwarnings("ignore:The environment is already wrapped")
def test_wrappers_that_keep_observations_and_stacks_of_frames_are_known(tmp_path):
    inner = VecNormalize(make_env())
    env = VecMonitor(VecCheckNan(VecFrameStack(VecNormalize(inner, norm_obs=False), 2)))
    model = build(env)
    model.learn(32)
    policy = load_exported(export_policy(model, tmp_path / "policy.pt2", env))
    inner.training = False
    frames = np.random.default_rng(0).uniform(-1, 1, (2, 3)).astype(np.float32)
    expected, _ = model.predict(inner.normalize_obs(frames).reshape(-1), deterministic=True)
    np.testing.assert_allclose(policy.predict(frames.reshape(-1))[0], expected, atol=1e-5)
    with pytest.warns(UserWarning, match="leaves out"):
        export_policy(model, tmp_path / "policy.pt2")


def test_statistics_of_a_dict_do_not_fit_a_policy_that_reads_none(tmp_path):
    with pytest.raises(ValueError, match=r"vec_normalize normalises observations of Dict.*but the policy reads Box"):
        export_policy(build().policy, tmp_path / "policy.pt2", keys_env())


class HalfPredict(PPOPlus):
    def predict(self, *given, **named):
        actions, state = super().predict(*given, **named)
        return 0.5 * actions, state


class Wrapped:
    def __init__(self, model):
        self.policy = model.policy

    def predict(self, observation, **others):
        return self.policy.predict(observation)


def test_a_model_with_a_predict_of_its_own_is_refused(tmp_path):
    env = make_masked_env()
    model = build(env)
    half = HalfPredict("MlpPolicy", make_masked_env(), n_steps=32, batch_size=16, device="cpu")
    for own, name in ((half, "HalfPredict"), (half.masked(env), "HalfPredict"), (Wrapped(model), "Wrapped")):
        with pytest.raises(ValueError, match=f"does not know the method predict of {name}"):
            export_policy(own, tmp_path / "policy.pt2")
    assert list(tmp_path.iterdir()) == []
    for known in (model, model.masked(env), half.policy, type("Own", (PPOPlus,), {})("MlpPolicy", make_env())):
        export_policy(known, tmp_path / "policy.pt2")
    model.predict = half.predict
    with pytest.raises(ValueError, match="the method predict of PPOPlus"):
        export_policy(model, tmp_path / "policy.pt2")


@pytest.mark.parametrize("action_dist", ["gaussian", "beta"])
def test_a_stochastic_export_is_compared_with_predict_too(action_dist, tmp_path, monkeypatch):
    own = ObservationPart._normalize_frames
    monkeypatch.setattr(ObservationPart, "_normalize_frames", lambda self, frames: 3 * own(self, frames))
    env = VecNormalize(make_env())
    model = build(env, policy_kwargs={"action_dist": action_dist})
    with th.no_grad():
        model.policy.action_net.weight.mul_(50)
    with pytest.raises(ValueError, match=r"differs from predict by .*parts that are not PPOPlus's: none"):
        export_policy(model, tmp_path / "policy.pt2", env, deterministic=False)


def test_no_private_method_of_a_normalizer_is_called(tmp_path, monkeypatch):
    env = VecNormalize(make_env())
    model = build(env)
    for name in ("_normalize_obs", "_unnormalize_obs"):
        monkeypatch.delattr(VecNormalize, name)
    export_policy(model, tmp_path / "policy.pt2", env)


@pytest.fixture
def no_tracing(monkeypatch):
    def trace(graph, example):
        raise AssertionError("the work has begun")

    monkeypatch.setattr(exporting, "trace", trace)


@pytest.mark.usefixtures("no_tracing")
def test_a_place_where_no_file_can_be_is_refused_before_the_work(tmp_path):
    model = build()
    with pytest.raises(ValueError, match=r"path must lie in a folder that exists, got .*there is no .*none'"):
        export_policy(model, tmp_path / "none" / "policy.onnx")
    (tmp_path / "policy.onnx").mkdir()
    with pytest.raises(ValueError, match="path must be a file, got the folder"):
        export_policy(model, tmp_path / "policy.onnx")


@pytest.mark.usefixtures("no_tracing")
@pytest.mark.parametrize("package", ["onnx", "onnxscript", "onnxruntime"])
def test_a_package_that_is_missing_is_named_before_the_work(package, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=rf"and {package} cannot be imported.*sb3-ppo-plus\[export\]"):
        export_policy(build(), tmp_path / "policy.onnx")


@pytest.mark.parametrize("failing", ["policy.pt2", "policy.pt2.json"])
def test_a_failure_to_write_leaves_the_old_pair_and_no_unfinished_file(failing, tmp_path, monkeypatch):
    path = export_policy(build(seed=1), tmp_path / "policy.pt2")
    old = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    write = Path.write_bytes

    def write_or_fail(self, content):
        if self.name == failing + ".part":
            write(self, content[: len(content) // 2])
            raise OSError(28, "No space left on device")
        return write(self, content)

    monkeypatch.setattr(Path, "write_bytes", write_or_fail)
    with pytest.raises(OSError, match="No space left"):
        export_policy(build(seed=2), path)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == old
    assert load_exported(path).largest_error_of_test() <= 1e-6


def test_both_files_are_whole_before_one_is_replaced(tmp_path, monkeypatch):
    replaced, replace = [], os.replace

    def note(source, target):
        replaced.append((json.loads((tmp_path / "policy.pt2.json.part").read_bytes()), Path(target).name))
        monkeypatch.setattr(os, "replace", replace)
        replace(source, target)

    monkeypatch.setattr(os, "replace", note)
    export_policy(build(), tmp_path / "policy.pt2")
    assert [name for _, name in replaced] == ["policy.pt2"]
    assert sorted(file.name for file in tmp_path.iterdir()) == ["policy.pt2", "policy.pt2.json"]


@pytest.mark.parametrize("error", [ImportError, TypeError, ValueError])
def test_the_zoo_ends_with_the_message_of_an_export_that_failed(error, tmp_path, monkeypatch):
    def fail(*given, **named):
        raise error("what was wrong")

    class NoEnv:
        def close(self):
            pass

    run = type("Run", (), {"folder": tmp_path, "prefix": "model"})
    for name, replacement in (
        ("prepare", lambda args: None),
        ("find_run", lambda args: run),
        ("create_env", lambda run, args: NoEnv()),
        ("load_model", lambda run, env, args: build()),
        ("export_policy", fail),
    ):
        monkeypatch.setattr(zoo_export, name, replacement)
    with pytest.raises(SystemExit, match="what was wrong"):
        zoo_export.main(["-o", str(tmp_path / "policy.pt2")])
    with pytest.raises(SystemExit, match="path must lie in a folder that exists"):
        zoo_export.main(["-o", str(tmp_path / "none" / "policy.pt2")])
