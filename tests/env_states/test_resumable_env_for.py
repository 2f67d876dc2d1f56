import cloudpickle
import gymnasium as gym
import pytest
from replayed_environments import Simulated
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import SubprocVecEnv

from sb3_ppo_plus import ResumableEnv
from sb3_ppo_plus.env_states.resumable_env_for import resumable_env_for


def test_it_wraps_an_environment():
    env = gym.make("CartPole-v1")
    wrapped = resumable_env_for(env)
    assert isinstance(wrapped, ResumableEnv)
    assert wrapped.unwrapped is env.unwrapped


def test_an_environment_that_is_wrapped_stays_as_it_is():
    for env in (ResumableEnv(Simulated()), Monitor(ResumableEnv(Simulated()))):
        assert resumable_env_for(env) is env


def test_what_is_no_environment_comes_back_with_a_warning():
    with pytest.warns(UserWarning, match=r"a dict is no gymnasium\.Env"):
        assert resumable_env_for({}) == {}


def test_it_is_a_wrapper_class_for_workers():
    assert cloudpickle.loads(cloudpickle.dumps(resumable_env_for)) is resumable_env_for
    env = make_vec_env("CartPole-v1", 2, wrapper_class=resumable_env_for, vec_env_cls=SubprocVecEnv)
    try:
        env.reset()
        assert len(env.env_method("get_resume_state")) == 2
    finally:
        env.close()
