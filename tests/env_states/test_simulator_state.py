import gymnasium as gym
import numpy as np
import pytest

from sb3_ppo_plus.env_states.mujoco_state import mujoco_state, set_mujoco_state


@pytest.mark.parametrize("env_id", ["HalfCheetah-v5", "Hopper-v5", "Ant-v5"])
def test_a_mujoco_state_is_the_same_after_it_was_put_back_over_any_contacts(env_id):
    env = gym.make(env_id, max_episode_steps=10_000)
    env.reset(seed=0)
    env.action_space.seed(0)
    numbers_of_contacts = set()
    for n_steps in range(60):
        for _ in range(n_steps % 7):
            _, _, terminated, _, _ = env.step(env.action_space.sample())
            if terminated:
                env.reset()
        data = env.unwrapped.data
        state = mujoco_state(data)
        numbers_of_contacts.add(int(data.ncon))
        for _ in range(10):
            env.step(env.action_space.sample())
        set_mujoco_state(data, state)
        np.testing.assert_equal(mujoco_state(data), state)
    # Where nothing is touched, MuJoCo leaves some arrays unwritten
    assert 0 in numbers_of_contacts and len(numbers_of_contacts) > 2


def test_derived_arrays_are_put_back():
    env = gym.make("Humanoid-v5")
    env.reset(seed=0)
    env.step(env.action_space.sample())
    data = env.unwrapped.data
    state = mujoco_state(data)
    arrays = {name: getattr(data, name).copy() for name in ("xpos", "cinert", "cvel", "qfrc_actuator", "cfrc_ext")}
    assert all(array.any() for array in arrays.values() if array is not arrays["cfrc_ext"])
    for name in arrays:
        getattr(data, name)[...] = 1.5
    set_mujoco_state(data, state)
    for name, array in arrays.items():
        assert np.array_equal(getattr(data, name), array), name
