"""Environments of packages that cannot be saved: they go on bit for bit after a replay."""

import importlib

import gymnasium as gym
import numpy as np
import pytest
from replayed_environments import assert_goes_on_in_another, drawn, outputs, replayed
from stable_baselines3.common.monitor import Monitor

from sb3_ppo_plus import ResumableEnv
from sb3_ppo_plus.env_states.box2d_world import free_nodes

MODULES = ("minigrid", "highway_env", "gymnasium_robotics")
BOX2D = ["LunarLander-v3", "LunarLanderContinuous-v3", "BipedalWalker-v3", "BipedalWalkerHardcore-v3"]
OTHERS = [
    *("MiniGrid-DoorKey-5x5-v0", "MiniGrid-Dynamic-Obstacles-8x8-v0", "BabyAI-GoToRedBall-v0"),
    *("parking-v0", "PointMaze_UMaze-v3", "AdroitHandDoor-v1", "AntMaze_UMaze-v5"),
]


@pytest.fixture(autouse=True, scope="module")
def _packages():
    for module in MODULES:
        gym.register_envs(importlib.import_module(module))


def made(env_id, **kwargs):
    return replayed(Monitor(gym.make(env_id, **kwargs)))


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("env_id", BOX2D)
def test_box2d_goes_on_in_an_environment_with_other_episodes_before(env_id, seed):
    # Saved and put back in the first episode and in later ones
    assert_goes_on_in_another(lambda: made(env_id, max_episode_steps=45), (20, 120, 200)[seed], 120, 70, seed)


def test_lunar_lander_with_wind_and_with_pictures_goes_on():
    for arguments in ({"enable_wind": True}, {"render_mode": "rgb_array"}):
        assert_goes_on_in_another(lambda arguments=arguments: made("LunarLander-v3", **arguments), 100, 100)


def test_a_world_that_each_reset_makes_anew_is_not_looked_at(monkeypatch):
    looked = []
    name = "sb3_ppo_plus.env_states.episode_recorder.free_nodes"
    monkeypatch.setattr(name, lambda world, n: looked.append(world) or free_nodes(world, n))
    for env_id, expected in (("LunarLander-v3", 1), ("BipedalWalker-v3", 5)):
        looked.clear()
        env = made(env_id)
        for seed in range(5):
            env.reset(seed=seed)
        assert len(looked) == expected


@pytest.mark.heavy
def test_car_racing_goes_on():
    assert_goes_on_in_another(lambda: made("CarRacing-v3", max_episode_steps=30), 50, 40, 40)


@pytest.mark.parametrize("env_id", OTHERS)
def test_packages_go_on(env_id):
    n_steps = 25 if env_id == "parking-v0" else 60
    assert_goes_on_in_another(lambda: made(env_id), n_steps, n_steps)


@pytest.mark.parametrize("env_id", ["LunarLander-v3", "BipedalWalker-v3", "MiniGrid-DoorKey-5x5-v0"])
def test_recording_and_the_proof_change_no_bit(env_id):
    plain, env = Monitor(gym.make(env_id, max_episode_steps=40)), made(env_id, max_episode_steps=40)
    seen = []
    for each in (plain, env):
        first = each.reset(seed=3)[0]
        before = outputs(each, drawn(each, 50))
        if each is env:
            assert env.prove_resumable() is None
        seen.append((first, before, outputs(each, drawn(each, 150, 1))))
    np.testing.assert_equal(seen[0], seen[1])


def test_the_order_of_a_worlds_free_places_is_what_makes_bipedal_walker_exact(monkeypatch):
    monkeypatch.setattr("sb3_ppo_plus.env_states.episode_recorder.set_free_nodes", lambda world, order: None)
    with pytest.raises((ValueError, AssertionError)):
        for seed in range(4):
            assert_goes_on_in_another(lambda: made("BipedalWalker-v3", max_episode_steps=45), 120, 120, 70, seed)


@pytest.mark.parametrize("env_id", ["LunarLander-v3", "MiniGrid-DoorKey-5x5-v0", "CartPole-v1", "Pendulum-v1"])
def test_auto_chooses_a_way_with_which_it_goes_on(env_id):
    env = ResumableEnv(Monitor(gym.make(env_id)), by="auto")
    env.reset(seed=0)
    assert ("EpisodeRecorder" in str(env)) == (env_id not in ("CartPole-v1", "Pendulum-v1"))
    assert_goes_on_in_another(lambda: ResumableEnv(Monitor(gym.make(env_id)), by="auto"))
