import random

import ale_py
import gymnasium as gym
import numpy as np
import pytest
from environments import DICT, ToyEnv
from gymnasium import spaces
from gymnasium.wrappers import FrameStackObservation, NormalizeObservation, NormalizeReward, TimeLimit
from stable_baselines3.common.atari_wrappers import AtariWrapper
from stable_baselines3.common.monitor import Monitor
from states import encoded, written_and_read

from sb3_ppo_plus.env_states.generator_state import generator_state, global_generator_states
from sb3_ppo_plus.env_states.resumable_env import ResumableEnv
from sb3_ppo_plus.errors import PlainStateError

CLASSIC = ["CartPole-v1", "Pendulum-v1", "Acrobot-v1", "MountainCar-v0", "MountainCarContinuous-v0"]
TOY_TEXT = ["FrozenLake-v1", "Taxi-v4", "Blackjack-v1", "CliffWalking-v1"]
MUJOCO = ["HalfCheetah", "Ant", "Hopper", "Walker2d", "Humanoid", "HumanoidStandup", "Swimmer", "Reacher", "Pusher"]
MUJOCO = [f"{name}-v5" for name in (*MUJOCO, "InvertedPendulum", "InvertedDoublePendulum")]


def transitions(env, n_steps):
    """Take steps with sampled actions, reset at the end of episodes, and return all outputs."""
    seen = []
    for _ in range(n_steps):
        observation, reward, terminated, truncated, info = env.step(env.action_space.sample())
        episode = {name: value for name, value in info.get("episode", {}).items() if name != "t"}
        seen.append((observation, float(reward), terminated, truncated, episode, np.random.random(), random.random()))
        if terminated or truncated:
            seen.append(env.reset()[0])
    return seen


def assert_goes_on_in_another(make_env, n_before=60, n_after=60):
    env, other = ResumableEnv(make_env()), ResumableEnv(make_env())
    env.reset(seed=3)
    env.action_space.seed(4)
    transitions(env, n_before)
    state = written_and_read(env.get_resume_state())
    expected = transitions(env, n_after)
    other.reset(seed=99)
    for _ in range(2):
        other.set_resume_state(state)
        np.testing.assert_equal(transitions(other, n_after), expected)


@pytest.mark.parametrize("env_id", [*CLASSIC, *TOY_TEXT])
def test_another_environment_goes_on_as_the_saved_one_would(env_id):
    assert_goes_on_in_another(lambda: Monitor(gym.make(env_id, max_episode_steps=25)))


@pytest.mark.parametrize("env_id", MUJOCO)
def test_mujoco_goes_on_bit_for_bit(env_id):
    assert_goes_on_in_another(lambda: Monitor(gym.make(env_id, max_episode_steps=45)), 30, 30)


def test_atari_goes_on_bit_for_bit():
    gym.register_envs(ale_py)
    assert_goes_on_in_another(lambda: AtariWrapper(Monitor(gym.make("ALE/Breakout-v5"))), 40, 80)


@pytest.mark.parametrize(
    "make_env",
    [
        lambda: NormalizeReward(NormalizeObservation(gym.make("Pendulum-v1"))),
        lambda: FrameStackObservation(gym.make("Pendulum-v1"), 3),
        lambda: TimeLimit(ToyEnv(DICT), 5),
        lambda: TimeLimit(OwnGenerators(), 5),
    ],
)
def test_wrappers_generators_and_dict_spaces_go_on_too(make_env):
    assert_goes_on_in_another(make_env)


class OwnGenerators(gym.Env):
    """Draws from every kind of generator. Two attributes share a generator. The spaces belong to the class."""

    observation_space = spaces.Box(-10.0, 10.0, (5,), np.float64)
    action_space = spaces.Discrete(2)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        if seed is not None:
            self.generator = self.same_generator = np.random.Generator(np.random.Philox(seed))
            self.legacy = np.random.RandomState(seed)
            self.python = random.Random(seed)
        return self._observation(), {}

    def _observation(self):
        drawn = [
            self.generator.normal(),
            self.same_generator.normal(),
            self.legacy.normal(),
            self.python.random(),
            self.np_random.normal(),
        ]
        return np.array(drawn)

    def step(self, action):
        return self._observation(), 0.0, False, False, {}


class Simulator:
    """An object that is no plain value."""

    n_steps = 0


class Simulated(ToyEnv):
    """Keeps its state where ResumableEnv cannot see it."""

    def __init__(self):
        super().__init__()
        self.simulator = Simulator()


class SimulatedWithMethods(Simulated):
    """Saves its simulator by its own methods."""

    def step(self, action):
        self.simulator.n_steps += 1
        return super().step(action)

    def get_resume_state(self):
        return {"n_steps": self.simulator.n_steps}

    def set_resume_state(self, state):
        self.simulator.n_steps = state["n_steps"]


def test_an_attribute_that_cannot_be_saved_is_an_error_with_a_remedy():
    env = ResumableEnv(TimeLimit(Simulated(), 5))
    env.reset(seed=0)
    with pytest.raises(PlainStateError, match=r"Simulated\.simulator is a .*Simulator.*get_resume_state.*constant="):
        env.get_resume_state()
    constant = ResumableEnv(TimeLimit(Simulated(), 5), constant=["simulator"])
    assert "simulator" not in dict(constant.get_resume_state()["layers"][-1][1])


def test_an_attribute_of_numpys_subclasses_or_of_python_objects_is_an_error_too():
    class Holds(ToyEnv):
        value = None

    for value in (np.array([object()]), np.zeros(2, [("x", float)]), np.matrix([[1.0]]), {1: [(Simulator(),)]}):
        env = ResumableEnv(Holds())
        env.reset(seed=0)
        env.unwrapped.value = value
        with pytest.raises(PlainStateError, match=r"Holds\.value.*constant="):
            env.get_resume_state()


def test_a_function_of_another_name_is_warned_of_and_stays():
    class Calls(ToyEnv):
        function = None

    def make(function):
        env = ResumableEnv(Calls())
        env.reset(seed=0)
        env.unwrapped.function = function
        return env

    other = make(max)
    other.unwrapped.function = transitions
    other.set_resume_state(make(assert_goes_on_in_another).get_resume_state())
    (difference,) = other.resume_differences()
    assert difference.startswith("Calls.function is the function transitions, the saved one was assert_goes_on")
    assert other.unwrapped.function is transitions


def test_without_an_object_that_the_saved_environment_had_there_is_an_error():
    env, other = ResumableEnv(ToyEnv()), ResumableEnv(ToyEnv())
    for each in (env, other):
        each.reset(seed=0)
    env.unwrapped.function = transitions
    with pytest.raises(ValueError, match=r"ToyEnv\.function is nothing, the saved one was a function"):
        other.set_resume_state(env.get_resume_state())


def test_constant_attributes_stay_as_they_are():
    env, other = (ResumableEnv(ToyEnv(), constant=["extra", "late"]) for _ in range(2))
    for each in (env, other):
        each.reset(seed=0)
    env.unwrapped.extra = 1
    other.unwrapped.extra, other.unwrapped.late = 2, 3
    other.set_resume_state(env.get_resume_state())
    assert (other.unwrapped.extra, other.unwrapped.late) == (2, 3)


def test_an_environments_own_methods_are_called_instead():
    env, other = (ResumableEnv(TimeLimit(SimulatedWithMethods(), 5)) for _ in range(2))
    env.reset(seed=0)
    env.step(env.action_space.sample())
    other.reset(seed=0)
    other.set_resume_state(env.get_resume_state())
    assert other.unwrapped.simulator.n_steps == 1
    assert other.env._elapsed_steps == 1


def test_shared_generators_stay_shared():
    env, other = ResumableEnv(OwnGenerators()), ResumableEnv(OwnGenerators())
    env.reset(seed=0)
    other.reset(seed=1)
    other.set_resume_state(env.get_resume_state())
    assert other.unwrapped.generator is other.unwrapped.same_generator


def test_a_state_of_the_first_release_loads_and_generators_stay_shared():
    env, other = OwnGenerators(), ResumableEnv(OwnGenerators())
    env.reset(seed=0)
    other.reset(seed=1)
    names = ("generator", "same_generator", "legacy", "python", "_np_random")
    attributes = {name: ("generator", generator_state(getattr(env, name))) for name in names}
    attributes["action_space"] = ("space", [None])
    attributes["_np_random_seed"] = ("plain", 0)
    state = {"layers": [("OwnGenerators", attributes)], "generators": global_generator_states()}
    other.set_resume_state(written_and_read(state))
    assert other.unwrapped.generator is other.unwrapped.same_generator
    np.testing.assert_equal([other.step(0) for _ in range(5)], [env.step(0) for _ in range(5)])


def test_a_plain_environment_is_saved_as_in_the_first_release():
    env = ResumableEnv(gym.make("CartPole-v1"))
    env.reset(seed=0)
    state = env.get_resume_state()
    assert state["table"] == []
    kinds = {kind for _, layer in state["layers"] for kind, _ in layer.values()}
    assert kinds == {"plain", "generator", "space"}


def test_the_saved_state_does_not_change_with_the_environment():
    env = ResumableEnv(gym.make("CartPole-v1"))
    env.reset(seed=0)
    state = env.get_resume_state()
    before = encoded(state)
    transitions(env, 30)
    assert encoded(state) == before


def test_other_wrappers_are_an_error_that_names_both():
    env, other = ResumableEnv(TimeLimit(ToyEnv(), 5)), ResumableEnv(ToyEnv())
    env.reset(seed=0)
    with pytest.raises(ValueError, match="the saved state is of TimeLimit of ToyEnv, the environment is ToyEnv"):
        other.set_resume_state(env.get_resume_state())


def test_another_mujoco_model_is_an_error():
    env, other = ResumableEnv(gym.make("Swimmer-v5")), ResumableEnv(gym.make("Swimmer-v5"))
    env.reset(seed=0)
    state = env.get_resume_state()
    _, saved = state["layers"][-1][1]["data"]
    saved["integration"] = saved["integration"][:-1]
    with pytest.raises(ValueError, match="the saved MuJoCo state has"):
        other.set_resume_state(state)


class PatchedTimeLimit(TimeLimit):
    """Has the name of the subclass that rl_zoo3 puts in place of TimeLimit."""


@pytest.mark.parametrize(("first", "second"), [(TimeLimit, PatchedTimeLimit), (PatchedTimeLimit, TimeLimit)])
def test_a_run_of_the_rl_zoo_goes_on_without_it_and_the_other_way_round(first, second):
    env, other = ResumableEnv(first(ToyEnv(), 5)), ResumableEnv(second(ToyEnv(), 5))
    env.reset(seed=3)
    other.reset(seed=4)
    env.step(env.action_space.sample())
    other.set_resume_state(written_and_read(env.get_resume_state()))
    assert other.get_wrapper_attr("_elapsed_steps") == 1
