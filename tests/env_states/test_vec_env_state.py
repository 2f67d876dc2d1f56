import os
import signal

import gymnasium as gym
import numpy as np
import pytest
from environments import DICT, IMAGE, ToyEnv
from gymnasium.wrappers import FrameStackObservation, TimeLimit
from interrupted_runs import make_envs
from resume_cases import OwnMethods
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import (
    DummyVecEnv,
    SubprocVecEnv,
    VecCheckNan,
    VecEnvWrapper,
    VecExtractDictObs,
    VecFrameStack,
    VecMonitor,
    VecNormalize,
    VecTransposeImage,
)
from states import encoded, written_and_read

from sb3_ppo_plus import ResumableEnv, WrapperStackError
from sb3_ppo_plus.env_states.vec_env_state import reset_without_learning, set_vec_env_state, vec_env_state
from sb3_ppo_plus.errors import PlainStateError
from sb3_ppo_plus.resuming.signals import keep_signals_from_workers


class CountsSteps(VecEnvWrapper):
    """A user's wrapper whose rewards depend on a plain attribute."""

    def __init__(self, venv):
        super().__init__(venv)
        self.n_steps = 0

    def reset(self):
        return self.venv.reset()

    def step_wait(self):
        observations, rewards, dones, infos = self.venv.step_wait()
        self.n_steps += 1
        return observations, rewards + self.n_steps, dones, infos


class CountsBehindMethods(CountsSteps):
    """A user's wrapper that saves its state by its own methods."""

    def __init__(self, venv):
        super().__init__(venv)
        self.counter = iter(range(10**6))

    def step_wait(self):
        self.n_steps = next(self.counter)
        return super().step_wait()

    def get_resume_state(self):
        return self.n_steps

    def set_resume_state(self, state):
        self.counter = iter(range(state, 10**6))


STACKS = {
    "no_wrapper": make_envs,
    "normalize": lambda: VecNormalize(make_envs()),
    "normalize_dict": lambda: VecNormalize(make_envs(observation_space=DICT), norm_obs_keys=["vector"]),
    "frame_stack": lambda: VecFrameStack(make_envs(), 3),
    "frame_stack_dict": lambda: VecFrameStack(VecExtractDictObs(make_envs(observation_space=DICT), "image"), 2),
    "monitor": lambda: VecMonitor(make_envs()),
    "transpose": lambda: VecTransposeImage(VecFrameStack(make_envs(observation_space=IMAGE), 2)),
    "check_nan": lambda: VecNormalize(VecCheckNan(VecMonitor(VecFrameStack(make_envs(), 2)))),
    "users_wrapper": lambda: VecNormalize(CountsSteps(make_envs())),
    "users_wrapper_with_methods": lambda: VecNormalize(CountsBehindMethods(make_envs())),
    "monitor_outside": lambda: DummyVecEnv([lambda: Monitor(TimeLimit(ResumableEnv(ToyEnv(max_steps=99)), 5))] * 2),
    "own_methods": lambda: make_vec_env(lambda: TimeLimit(OwnMethods(), 5), n_envs=2, seed=0),
    "subproc": lambda: SubprocVecEnv([lambda: Monitor(ResumableEnv(ToyEnv()))] * 2),
}


def transitions(env, n_steps, generator):
    seen = []
    low, high = env.action_space.low, env.action_space.high
    for _ in range(n_steps):
        actions = generator.uniform(low, high, (env.num_envs, *low.shape)).astype(np.float32)
        observations, rewards, dones, infos = env.step(actions)
        episodes = [{k: v for k, v in info.get("episode", {}).items() if k != "t"} for info in infos]
        terminal = [info.get("terminal_observation") for info in infos]
        seen.append((observations, rewards, dones, episodes, terminal))
    return seen


@pytest.mark.parametrize("name", STACKS)
def test_another_stack_goes_on_as_the_saved_one_would(name):
    env, other = STACKS[name](), STACKS[name]()
    is_box = isinstance(env.action_space, gym.spaces.Box)
    if not is_box:
        env.action_space = other.action_space = gym.spaces.Box(0, 1, (), np.float32)
    unsaved = []
    try:
        env.seed(1)
        env.reset()
        transitions(env, 17, np.random.default_rng(0))
        state = written_and_read(vec_env_state(env, unsaved))
        expected = transitions(env, 17, np.random.default_rng(1))
        other.reset()
        transitions(other, 3, np.random.default_rng(2))
        assert set_vec_env_state(other, state)
        np.testing.assert_equal(transitions(other, 17, np.random.default_rng(1)), expected)
        assert not unsaved
    finally:
        env.close()
        other.close()


def test_wrappers_outside_resumable_env_that_are_not_saved_are_named():
    env = DummyVecEnv([lambda: Monitor(FrameStackObservation(ResumableEnv(ToyEnv()), 2))])
    env.reset()
    unsaved = []
    vec_env_state(env, unsaved)
    assert unsaved == ["FrameStackObservation is outside ResumableEnv: put ResumableEnv outermost"]


def test_the_episodes_do_not_go_on_where_either_side_lacks_the_methods():
    with_methods, without = make_envs(), make_vec_env(ToyEnv, n_envs=2)
    for env in (with_methods, without):
        env.reset()
    state = vec_env_state(without)
    assert state["envs"] is None
    assert not set_vec_env_state(without, state)
    with pytest.raises(WrapperStackError):
        set_vec_env_state(without, vec_env_state(with_methods))


@pytest.mark.parametrize("by", ["state", "replay", "auto"])
def test_environments_that_were_not_reset_yet_begin_with_their_seeds(by):
    def make():
        return make_vec_env(ToyEnv, n_envs=2, seed=3, wrapper_class=lambda env: ResumableEnv(env, by=by))

    env, other = make(), make()
    state = written_and_read(vec_env_state(env))
    assert set_vec_env_state(other, state)
    assert np.array_equal(other.reset(), env.reset())
    # The seeds are those of one reset
    state = written_and_read(vec_env_state(env))
    assert set_vec_env_state(other, state)
    assert np.array_equal(other.reset(), env.reset())


@pytest.mark.parametrize("by", ["replay", "auto"])
def test_without_trust_an_environment_that_was_not_reset_yet_is_no_error(by):
    env = make_vec_env(ToyEnv, seed=3, wrapper_class=lambda env: ResumableEnv(env, by=by))
    other = make_vec_env(ToyEnv, seed=3, wrapper_class=lambda env: ResumableEnv(env, by=by))
    assert set_vec_env_state(other, written_and_read(vec_env_state(env)), trusted=False)
    assert np.array_equal(other.reset(), env.reset())


def test_a_reset_without_learning_leaves_running_means_alone():
    env = VecNormalize(make_envs())
    env.reset()
    transitions(env, 3, np.random.default_rng(0))
    before = encoded(vars(env.obs_rms))
    observations = reset_without_learning(env)
    assert encoded(vars(env.obs_rms)) == before and env.training
    assert np.array_equal(observations, env.normalize_obs(env.get_original_obs()))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_workers_ignore_signals_and_still_end(number):
    env = SubprocVecEnv([ToyEnv] * 2)
    env.reset()
    keep_signals_from_workers(VecMonitor(env))
    for process in env.processes:
        os.kill(process.pid, number)
    env.step(np.stack([env.action_space.sample()] * 2))
    env.close()
    assert [process.exitcode for process in env.processes] == [0, 0]


def test_a_function_of_a_wrapper_that_is_another_one_is_a_warning():
    env, other = CountsSteps(make_envs()), CountsSteps(make_envs())
    env.reset()
    other.reset()
    env.function, other.function = os.path.join, os.path.split
    with pytest.warns(UserWarning, match=r"CountsSteps\.function is the function split, the saved one was join"):
        set_vec_env_state(other, written_and_read(vec_env_state(env)))


class GrowsSimulator(ToyEnv):
    """Gets an attribute that cannot be saved in its third step; its class has a method that fails."""

    n_steps = 0

    def step(self, action):
        self.n_steps += 1
        if self.n_steps == 3:
            self.simulator = object()
        return super().step(action)


def test_an_environment_of_a_worker_that_cannot_be_saved_is_an_error_and_the_worker_lives():
    env = make_vec_env(GrowsSimulator, 2, seed=0, wrapper_class=ResumableEnv, vec_env_cls=SubprocVecEnv)
    env.reset()
    for _ in range(3):
        env.step([env.action_space.sample()] * 2)
    with pytest.raises(PlainStateError, match=r"environment 0: GrowsSimulator\.simulator is a .*get_resume_state\(\)"):
        vec_env_state(env)
    env.step([env.action_space.sample()] * 2)
    env.close()


def test_attributes_that_were_set_on_the_vectorised_environment_go_on():
    env, other = make_envs(), make_envs()
    env.reset()
    env.set_attr("level", 3)
    state = written_and_read(vec_env_state(env))
    other.set_attr("level", 1)
    assert set_vec_env_state(other, state)
    assert other.get_attr("level") == [3, 3]
    assert set_vec_env_state(make_envs(), state)


def test_other_arguments_of_an_environment_are_a_warning_that_names_both():
    def pendulums(gravity):
        return make_vec_env("Pendulum-v1", 1, seed=0, env_kwargs={"g": gravity}, wrapper_class=ResumableEnv)

    env = pendulums(10.0)
    env.reset()
    state = written_and_read(vec_env_state(env))
    with pytest.warns(UserWarning, match=r"was made with g=1\.0, the saved one with g=10\.0"):
        set_vec_env_state(pendulums(1.0), state)
