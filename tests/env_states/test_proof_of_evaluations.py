"""The environments of evaluations prove themselves too, and no bit of the evaluations changes."""

import gymnasium as gym
import numpy as np
import pytest
from environments import ToyEnv
from interrupted_runs import StopAfter, make_envs, make_model
from stable_baselines3.common.callbacks import EvalCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv

from sb3_ppo_plus import PPOPlus, ResumableEnv, ResumeProofError, TrainingCheckpoint
from sb3_ppo_plus.env_states.resumable_env_for import resumable_env_for

N_STEPS = []


class Looks(ToyEnv):
    def step(self, action):
        N_STEPS.append(0)
        observation, reward, *rest = super().step(action)
        return observation, reward + len(N_STEPS), *rest


@pytest.mark.parametrize("vec_env_cls", [DummyVecEnv, SubprocVecEnv])
def test_an_evaluation_that_goes_on_in_another_way_is_an_error_before_the_first_step(tmp_path, vec_env_cls):
    env = make_vec_env(Looks, 1, seed=1, wrapper_class=ResumableEnv, vec_env_cls=vec_env_cls)
    model = make_model()
    with pytest.raises(ResumeProofError, match=r"evaluation environment 0: .*outcome\['reward'\]"):
        model.learn(16, [TrainingCheckpoint(1, tmp_path), EvalCallback(env, eval_freq=8)])
    assert model.num_timesteps == 0
    env.close()


class Statistics(gym.Wrapper):
    """Has a generator of its own, and counts its resets."""

    def __init__(self, env):
        super().__init__(env)
        self.rng = np.random.default_rng(5)
        self.n_resets = 0

    def reset(self, **kwargs):
        self.n_resets += 1
        return super().reset(**kwargs)

    def step(self, action):
        observation, reward, *rest = super().step(action)
        return observation, reward + self.rng.normal() + self.n_resets, *rest


def evaluated(tmp_path, env_id, prove, wrapper_class):
    def make():
        env = Statistics(gym.make(env_id, max_episode_steps=20))
        return wrapper_class(Monitor(env))

    env = make_vec_env(make, 2, seed=1)
    if not prove:
        env.set_attr("prove", False)
    callback = EvalCallback(env, eval_freq=8, n_eval_episodes=3, verbose=0, log_path=str(tmp_path / str(prove)))
    train_envs = make_vec_env(env_id, 2, seed=0, wrapper_class=ResumableEnv)
    make_model(train_envs).learn(48, [TrainingCheckpoint(1, tmp_path / f"{prove}_checkpoints"), callback])
    return np.load(tmp_path / str(prove) / "evaluations.npz")["results"]


@pytest.mark.parametrize("env_id", ["MountainCarContinuous-v0", "Pendulum-v1"])
@pytest.mark.parametrize("wrapper_class", [ResumableEnv, resumable_env_for])
def test_it_changes_no_bit_of_an_evaluation(tmp_path, env_id, wrapper_class):
    results = [evaluated(tmp_path, env_id, prove, wrapper_class) for prove in (True, False)]
    assert results[0].size == 9
    np.testing.assert_array_equal(*results)


def test_a_mujoco_environment_before_its_first_reset_is_as_before():
    def made():
        return ResumableEnv(Monitor(gym.make("Hopper-v5")))

    env, other = made(), made()
    assert env.prove_resumable() is None
    for each in (env, other):
        each.reset(seed=3)
    action = np.full(3, 0.5, np.float32)
    for _ in range(20):
        np.testing.assert_equal(env.step(action)[:4], other.step(action)[:4])


def test_a_run_killed_before_the_first_evaluation_goes_on_without_a_warning(tmp_path, recwarn):
    def envs():
        return make_vec_env(ToyEnv, 1, seed=1, wrapper_class=ResumableEnv)

    make_model().learn(96, [TrainingCheckpoint(1, tmp_path), EvalCallback(envs(), eval_freq=100), StopAfter(16)])
    resumed = PPOPlus.resume(tmp_path, make_envs(), device="cpu")
    resumed.continue_learning([TrainingCheckpoint(1, tmp_path), EvalCallback(envs(), eval_freq=100, verbose=0)])
    assert [str(warning.message) for warning in recwarn if "environment" in str(warning.message)] == []
