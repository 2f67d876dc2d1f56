"""What a gymnasium.vector environment must give; errors name it before the rollout buffer has seen anything."""

import re

import gymnasium as gym
import numpy as np
import pytest
from gymnasium import spaces
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from stable_baselines3.common.buffers import RolloutBuffer
from stable_baselines3.common.vec_env import DummyVecEnv
from vector_walks import N_ENVS, SETTINGS, VectorWalk, Walk, vector

from sb3_ppo_plus import PPOPlus
from sb3_ppo_plus.envs import as_vec_env


class Wrong(VectorWalk):
    """Gives something else in place of one of its values.

    :param index: index of the value that ``step`` returns
    :param value: what it gives
    """

    def __init__(self, index, value):
        super().__init__()
        self.index, self.value = index, value

    def step(self, actions):
        values = list(super().step(actions))
        values[self.index] = self.value
        return tuple(values)


@pytest.mark.parametrize(
    ("index", "value", "message"),
    [
        (1, np.zeros((N_ENVS, 1)), "rewards must have the shape (3,), got (3, 1)"),
        (1, 0.0, "rewards must have the shape (3,), got ()"),
        (2, None, "terminated must have the shape (3,), got ()"),
        (3, np.zeros(2, bool), "truncated must have the shape (3,), got (2,)"),
        (0, np.zeros((2, 2), np.float32), "observations must have the shape (3, 2), got (2, 2)"),
    ],
)
def test_a_value_of_another_shape_is_an_error(index, value, message):
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        PPOPlus("MlpPolicy", Wrong(index, value), **SETTINGS).learn(32)
    assert "Wrong" in str(error.value)


@pytest.mark.parametrize(
    "space",
    [spaces.Text(3), spaces.Dict({"a": spaces.Dict({"b": spaces.Discrete(2)})}), spaces.Tuple([spaces.Discrete(2)])],
)
def test_an_observation_space_that_sb3_does_not_know_is_an_error(space):
    env = VectorWalk()
    env.single_observation_space = space
    with pytest.raises(ValueError, match=r"VectorWalk.*observation_space.*must be Box, Discrete"):
        as_vec_env(env)


def test_an_action_space_that_sb3_does_not_know_is_an_error():
    env = VectorWalk()
    env.single_action_space = spaces.Text(3)
    with pytest.raises(ValueError, match=r"VectorWalk.*action_space must be"):
        as_vec_env(env)


def test_one_that_does_not_say_when_it_resets_is_taken_for_the_usual_mode():
    env = VectorWalk()
    env.metadata = {}
    with pytest.warns(UserWarning, match=r"VectorWalk.*autoreset_mode"):
        assert as_vec_env(env).has_reset_rows


def test_an_episode_that_ends_without_its_last_observation_is_an_error():
    env = VectorWalk()
    env.metadata = {"autoreset_mode": AutoresetMode.SAME_STEP}
    with pytest.raises(ValueError, match=r"VectorWalk.*'final_obs'"):
        PPOPlus("MlpPolicy", env, **SETTINGS).learn(32)


@pytest.mark.parametrize(
    "kwargs", [{"micro_batches": 3, "batch_size": 33}, {"rollout_buffer_class": type("Own", (RolloutBuffer,), {})}]
)
def test_steps_that_only_begin_episodes_need_the_usual_buffer_and_no_parts(kwargs):
    env = VectorWalk()
    model = PPOPlus("MlpPolicy", env, **{**SETTINGS, **kwargs})
    with pytest.raises(ValueError, match=r"VectorWalk.*NEXT_STEP.*needs"):
        model.learn(32)
    assert env.n_steps == 0


def test_other_objects_are_no_environments():
    env = DummyVecEnv([Walk])
    assert as_vec_env(env) is env
    with pytest.raises(TypeError, match="must step in batches"):
        as_vec_env(Walk())


def test_options_must_be_the_same_for_all():
    env = as_vec_env(vector())
    env.set_options([{"a": 1}, {}, {}])
    with pytest.raises(ValueError, match="same options"):
        env.reset()
    env.set_options({"a": 1})
    env.reset()


class AskedWalk(VectorWalk):
    """Has a method that answers for all environments, and a value of its own."""

    value = 5

    def places(self):
        return [env.place for env in self.envs_inside]

    def name(self):
        return "walk"


def test_a_vector_environment_answers_for_its_environments():
    env = as_vec_env(AskedWalk())
    env.reset()
    places = env.env_method("places")
    assert len(places) == N_ENVS and len(set(places)) == N_ENVS
    assert env.env_method("places", indices=[2]) == places[2:]
    assert env.env_method("name", indices=1) == ["walk"]
    assert env.get_attr("value", [0, 1]) == [5, 5]
    env.set_attr("value", 6)
    assert env.get_attr("value") == [6] * N_ENVS and env.has_attr("value") and not env.has_attr("other")
    with pytest.raises(ValueError, match=r"all environments only, got indices=\[0\]"):
        env.set_attr("value", 7, indices=[0])


@pytest.mark.parametrize("kind", [SyncVectorEnv, gym.vector.AsyncVectorEnv])
def test_single_environments_answer_for_themselves(kind):
    env = as_vec_env(vector(kind=kind, make=lambda: gym.wrappers.TimeLimit(Walk(), 30)))
    env.seed(1)
    env.reset()
    places = env.get_attr("place")
    assert len(set(places)) == N_ENVS and env.get_attr("place", [1]) == places[1:2]
    env.set_attr("place", 0.5, indices=[1])
    assert env.get_attr("place") == [places[0], 0.5, places[2]]
    assert env.has_attr("place") and not env.has_attr("other")
    assert env.env_method("has_wrapper_attr", "left") == [True] * N_ENVS
    # Workers end with an error
    with pytest.raises((RuntimeError, AttributeError), match="no_such_method"):
        env.env_method("no_such_method")
    env.close()
