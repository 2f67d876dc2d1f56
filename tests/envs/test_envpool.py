"""EnvPool's environments, with the real package: ``pip install envpool`` (750 MB)."""

import numpy as np
import pytest
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.vec_env import VecNormalize

from sb3_ppo_plus import PPOPlus
from sb3_ppo_plus.envs import as_vec_env

envpool = pytest.importorskip("envpool", reason="EnvPool is not installed")
pytestmark = pytest.mark.heavy
SETTINGS = {"n_steps": 32, "batch_size": 64, "n_epochs": 2, "seed": 0, "device": "cpu"}


def make(env_id, num_envs=4, **kwargs):
    return envpool.make_gymnasium(env_id, num_envs=num_envs, seed=1, num_threads=1, **kwargs)


def test_an_episode_begins_in_the_step_in_which_the_last_one_ended():
    env, other = as_vec_env(make("CartPole-v1")), make("CartPole-v1")
    observations, expected = env.reset(), other.reset()[0]
    np.testing.assert_array_equal(observations, expected)
    n_ended = 0
    for _ in range(60):
        observations, rewards, dones, infos = env.step(np.zeros(4, np.int64))
        expected, other_rewards, terminated, _, _ = other.step(np.zeros(4, np.int64))
        np.testing.assert_array_equal(dones, terminated)
        np.testing.assert_array_equal(rewards, other_rewards)
        for index in np.flatnonzero(dones):
            np.testing.assert_array_equal(infos[index]["terminal_observation"], expected[index])
            assert infos[index]["episode"]["l"] == infos[index]["episode"]["r"] == infos[index]["elapsed_step"]
            n_ended += 1
        if dones.any():
            first, _ = other.reset(np.flatnonzero(dones).astype(np.int32))
            expected[dones] = first
        np.testing.assert_array_equal(observations, expected)
    assert n_ended > 15 and not env.has_reset_rows


@pytest.mark.parametrize("compiles", [False, True])
def test_it_trains_and_is_evaluated(compiles):
    env = VecNormalize(as_vec_env(make("Pendulum-v1")))
    with pytest.warns(UserWarning, match="seeds are fixed"):
        model = PPOPlus("MlpPolicy", env, compile=compiles, **SETTINGS)
        model.learn(2000)
    assert {each["l"] for each in model.ep_info_buffer} == {200} and model.num_timesteps == 2048
    _, lengths = evaluate_policy(model, env, n_eval_episodes=8, return_episode_rewards=True)
    assert lengths == [200] * 8


def test_pixels_train():
    with pytest.warns(UserWarning, match="seeds are fixed"):
        model = PPOPlus("CnnPolicy", make("Pong-v5", 2), **SETTINGS).learn(64)
    assert model.observation_space.shape == (4, 84, 84)


def test_asynchronous_batches_are_an_error():
    with pytest.raises(ValueError, match="batch_size equal to num_envs=4"):
        as_vec_env(make("CartPole-v1", batch_size=2))
