"""MuJoCo's states, and models that environments change."""

import gymnasium as gym
import numpy as np
import pytest
from states import assert_same_bits, written_and_read

from sb3_ppo_plus import ResumableEnv
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


class DrawsModel(gym.Wrapper):
    """Draws the masses, the gravity and the length of a step, as randomisation of a domain does."""

    def __init__(self, env, rng):
        super().__init__(env)
        model = self.unwrapped.model
        model.body_mass[:] *= rng.uniform(0.5, 2.0)
        model.opt.gravity[2] *= rng.uniform(0.5, 2.0)
        model.opt.timestep *= rng.uniform(0.5, 2.0)


def drawn(seed):
    env = ResumableEnv(DrawsModel(gym.make("Hopper-v5"), np.random.default_rng(seed)))
    env.reset(seed=0)
    return env


def steps(env):
    env.action_space.seed(0)
    return [env.step(env.action_space.sample())[:4] for _ in range(15)]


def test_a_model_that_was_drawn_is_that_of_the_saved_environment_which_is_told():
    env, other = drawn(0), drawn(1)
    assert env.prove_resumable() is None
    state = written_and_read(env.get_resume_state())
    expected = steps(env)
    other.set_resume_state(state)
    (difference,) = other.resume_differences()
    assert difference == "the model of HopperEnv.data had another body_mass, opt.gravity, opt.timestep"
    assert_same_bits(steps(other), expected)
    other.set_resume_state(state)
    assert other.resume_differences() == []


def test_without_trust_a_model_stays_and_its_differences_are_named():
    env, other = drawn(0), drawn(1)
    mass = other.unwrapped.model.body_mass.copy()
    left_out, error = other.set_resume_state_without_trust(env.get_resume_state())
    assert error == "" and any("data.model.body_mass" in name for name in left_out)
    assert np.array_equal(other.unwrapped.model.body_mass, mass)


def test_a_state_of_an_earlier_version_has_no_model():
    data = gym.make("Hopper-v5").unwrapped.data
    state = mujoco_state(data)
    del state["model"], state["options"]
    assert set_mujoco_state(data, state) == []


@pytest.mark.parametrize("number", [np.nan, np.inf, -1e11])
def test_without_trust_numbers_at_which_mujoco_writes_a_file_are_refused(number):
    data = gym.make("Hopper-v5").unwrapped.data
    state = mujoco_state(data)
    state["integration"][1] = number
    with pytest.raises(ValueError, match="NaN or larger than"):
        set_mujoco_state(data, state, trusted=False)
