"""``export``: a run's policy with its normaliser, its wrappers and its memory, and no trust in the log folder."""

import pickle

import gymnasium as gym
import numpy as np
import pytest
from hostile import Payload
from short_runs import train
from stable_baselines3.common.vec_env import DummyVecEnv, VecFrameStack

from sb3_ppo_plus import PPOPlus, load_vec_normalize, zoo
from sb3_ppo_plus.export import load_exported


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_run_with_memory_and_normaliser_is_exported(folder, capsys):
    env_id = "PendulumNoVel-v1"
    run = train(folder, env_id, settings=["normalize:True", "n_steps:64", "batch_size:64"])
    zoo.main(["export", "--env", env_id, "--device", "cpu"])
    path = run / f"final-model-ppo_plus-{env_id}.onnx"
    assert f"{path.relative_to(folder)}.json" in capsys.readouterr().out
    policy = load_exported(path)
    model = PPOPlus.load(run / f"{env_id}.zip", device="cpu", trusted=False)
    venv = DummyVecEnv([lambda: gym.make(env_id)])
    normalize = load_vec_normalize(run / env_id / "vecnormalize.json", venv)
    observation, state, exported_state = venv.reset(), None, None
    start = np.ones(1, bool)
    for _ in range(20):
        expected, state = model.predict(normalize.normalize_obs(observation), state, start, deterministic=True)
        action, exported_state = policy.predict(observation, exported_state, start)
        np.testing.assert_allclose(action, expected, atol=4e-5)
        observation, _, start, _ = venv.step(expected)


def test_stacked_frames_are_what_the_export_takes(folder):
    run = train(folder, "Pendulum-v1", settings=["frame_stack:2", "normalize:True"])
    zoo.main(["export", "--env", "Pendulum-v1", "--device", "cpu", "--stochastic", "-o", "policy.pt2"])
    policy = load_exported("policy.pt2")
    assert policy.observation_space.shape == (6,) and not policy.contract.deterministic
    model = PPOPlus.load(run / "Pendulum-v1.zip", device="cpu", trusted=False)
    venv = DummyVecEnv([lambda: gym.make("Pendulum-v1")])
    normalize = load_vec_normalize(run / "Pendulum-v1" / "vecnormalize.json", venv)
    normalize.training = False
    raw, seen = VecFrameStack(DummyVecEnv([lambda: gym.make("Pendulum-v1")]), 2), VecFrameStack(normalize, 2)
    for env in (raw, seen):
        env.seed(0)
    raw_observation, observation = raw.reset(), seen.reset()
    for _ in range(5):
        expected, _ = model.predict(observation, deterministic=True)
        np.testing.assert_allclose(policy.predict(raw_observation, deterministic=True)[0], expected, atol=4e-5)
        raw_observation, observation = raw.step(expected)[0], seen.step(expected)[0]


def test_a_pickled_normaliser_is_refused_without_trust(folder):
    run = train(folder, "Pendulum-v1", settings=["normalize:True"])
    statistics = run / "Pendulum-v1" / "vecnormalize.json"
    statistics.write_bytes(pickle.dumps(Payload(folder / "hit")))
    with pytest.raises(SystemExit, match="With --trust, export runs whatever code"):
        zoo.main(["export", "--env", "Pendulum-v1", "--device", "cpu", "-o", "policy.pt2"])
    assert not (folder / "hit").exists() and not (folder / "policy.pt2").exists()


def test_flags_are_checked(folder, capsys):
    for flags, message in (
        (["-o", "policy.zip"], "--output must end in .onnx or .pt2"),
        (["--algo", "ppo"], "--algo must be ppo_plus"),
    ):
        with pytest.raises(SystemExit):
            zoo.main(["export", *flags])
        assert message in capsys.readouterr().err
    with pytest.raises(SystemExit, match="not found"):
        zoo.main(["export", "--env", "CartPole-v1"])
