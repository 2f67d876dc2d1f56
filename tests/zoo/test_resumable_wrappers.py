"""Wrappers of Gymnasium, SB3, sb3-contrib, the RL Zoo and minigrid inside a ResumableEnv."""

import functools

import ale_py
import gymnasium as gym
import numpy as np
import pytest
import rl_zoo3.wrappers as zoo_wrappers
import sb3_contrib.common.wrappers as contrib_wrappers
from gymnasium import spaces, wrappers
from stable_baselines3.common import atari_wrappers
from stable_baselines3.common.monitor import Monitor
from states import written_and_read

from sb3_ppo_plus import ResumableEnv
from sb3_ppo_plus.masking import MaskFromInfo
from sb3_ppo_plus.zoo.enjoy import ENV_WRAPPERS

gym.register_envs(ale_py)


class Goal(gym.Env):
    """Observations of a Dict, as HistoryWrapperObsDict expects them."""

    observation_space = spaces.Dict(
        {key: spaces.Box(-1.0, 1.0, (2,)) for key in ("observation", "desired_goal", "achieved_goal")}
    )
    action_space = spaces.Box(-1.0, 1.0, (2,))

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return self.drawn(), {}

    def drawn(self):
        return {key: self.np_random.random(2, np.float32) for key in self.observation_space.spaces}

    def step(self, action):
        return self.drawn(), 0.0, bool(self.np_random.random() < 0.1), False, {"is_success": False}


class Image(gym.Env):
    """Random images."""

    observation_space = spaces.Box(0, 255, (40, 40, 3), np.uint8)
    action_space = spaces.Discrete(2)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return self.drawn(), {}

    def drawn(self):
        return self.np_random.integers(0, 256, self.observation_space.shape, np.uint8)

    def step(self, action):
        return self.drawn(), 1.0, bool(self.np_random.random() < 0.1), False, {}


def pendulum():
    return gym.make("Pendulum-v1", max_episode_steps=15)


def atari():
    return gym.make("ALE/Breakout-v5", obs_type="rgb")


def even(episode):
    return episode % 2 == 0


ZOO = {
    "ActionNoiseWrapper": lambda: zoo_wrappers.ActionNoiseWrapper(pendulum()),
    "ActionSmoothingWrapper": lambda: zoo_wrappers.ActionSmoothingWrapper(pendulum()),
    "DelayedRewardWrapper": lambda: zoo_wrappers.DelayedRewardWrapper(pendulum(), 4),
    "FrameSkip": lambda: zoo_wrappers.FrameSkip(pendulum()),
    "HistoryWrapper": lambda: zoo_wrappers.HistoryWrapper(pendulum()),
    "HistoryWrapperObsDict": lambda: zoo_wrappers.HistoryWrapperObsDict(Goal()),
    "MaskVelocityWrapper": lambda: zoo_wrappers.MaskVelocityWrapper(pendulum()),
    "TruncatedOnSuccessWrapper": lambda: zoo_wrappers.TruncatedOnSuccessWrapper(Goal()),
    "YAMLCompatResizeObservation": lambda: zoo_wrappers.YAMLCompatResizeObservation(Image(), [16, 16]),
}
SB3 = {
    "AtariWrapper": lambda: atari_wrappers.AtariWrapper(atari()),
    "ClipRewardEnv": lambda: atari_wrappers.ClipRewardEnv(pendulum()),
    "EpisodicLifeEnv": lambda: atari_wrappers.EpisodicLifeEnv(atari()),
    "FireResetEnv": lambda: atari_wrappers.FireResetEnv(atari()),
    "MaxAndSkipEnv": lambda: atari_wrappers.MaxAndSkipEnv(Image()),
    "NoopResetEnv": lambda: atari_wrappers.NoopResetEnv(atari()),
    "StickyActionEnv": lambda: atari_wrappers.StickyActionEnv(atari(), 0.5),
    "WarpFrame": lambda: atari_wrappers.WarpFrame(Image()),
    "TimeFeatureWrapper": lambda: contrib_wrappers.TimeFeatureWrapper(pendulum()),
    "ResumableEnv": lambda: ResumableEnv(pendulum()),
    "MaskFromInfo": lambda: MaskFromInfo(gym.make("Taxi-v4", max_episode_steps=15)),
}
GYMNASIUM = {
    "AtariPreprocessing": lambda: wrappers.AtariPreprocessing(gym.make("ALE/Breakout-v5", frameskip=1)),
    "Autoreset": lambda: wrappers.Autoreset(pendulum()),
    "ClipAction": lambda: wrappers.ClipAction(pendulum()),
    "ClipReward": lambda: wrappers.ClipReward(pendulum(), -1.0, 1.0),
    "DelayObservation": lambda: wrappers.DelayObservation(pendulum(), 2),
    "DiscretizeAction": lambda: wrappers.DiscretizeAction(pendulum(), 5),
    "DtypeObservation": lambda: wrappers.DtypeObservation(pendulum(), np.float64),
    "FilterObservation": lambda: wrappers.FilterObservation(Goal(), ["observation"]),
    "FlattenObservation": lambda: wrappers.FlattenObservation(Goal()),
    "FrameStackObservation": lambda: wrappers.FrameStackObservation(pendulum(), 3),
    "GrayscaleObservation": lambda: wrappers.GrayscaleObservation(Image()),
    "MaxAndSkipObservation": lambda: wrappers.MaxAndSkipObservation(Image()),
    "NormalizeObservation": lambda: wrappers.NormalizeObservation(pendulum()),
    "NormalizeReward": lambda: wrappers.NormalizeReward(pendulum()),
    "RecordEpisodeStatistics": lambda: wrappers.RecordEpisodeStatistics(pendulum()),
    "RepeatAction": lambda: wrappers.RepeatAction(pendulum(), 2),
    "RescaleAction": lambda: wrappers.RescaleAction(pendulum(), -1.0, 1.0),
    "RescaleObservation": lambda: wrappers.RescaleObservation(pendulum(), -1.0, 1.0),
    "ReshapeObservation": lambda: wrappers.ReshapeObservation(pendulum(), (3, 1)),
    "ResizeObservation": lambda: wrappers.ResizeObservation(Image(), (16, 16)),
    "StickyAction": lambda: wrappers.StickyAction(pendulum(), 0.5),
    "TimeAwareObservation": lambda: wrappers.TimeAwareObservation(pendulum()),
    "TimeLimit": lambda: wrappers.TimeLimit(Image(), 5),
    "TransformAction": lambda: wrappers.TransformAction(pendulum(), lambda action: -action, None),
    "TransformObservation": lambda: wrappers.TransformObservation(pendulum(), lambda seen: seen / 2, None),
    "TransformReward": lambda: wrappers.TransformReward(pendulum(), functools.partial(np.multiply, 0.5)),
}


def played(env, n_steps):
    seen = []
    for _ in range(n_steps):
        observation, reward, terminated, truncated, _ = env.step(env.action_space.sample())
        seen.append((observation, float(reward), terminated, truncated))
        if terminated or truncated:
            seen.append(env.reset()[0])
    return seen


@pytest.mark.parametrize("name, make", [*ZOO.items(), *SB3.items(), *GYMNASIUM.items()])
def test_a_wrapper_goes_on_and_proves_itself(name, make):
    env, other = ResumableEnv(Monitor(make())), ResumableEnv(Monitor(make()))
    env.reset(seed=3)
    env.action_space.seed(4)
    played(env, 20)
    assert env.prove_resumable() is None
    state = written_and_read(env.get_resume_state())
    expected = played(env, 40)
    other.reset(seed=5)
    other.set_resume_state(state)
    np.testing.assert_equal(played(other, 40), expected)


def test_every_wrapper_that_a_log_folder_may_name_is_tried_above():
    tried = {*ZOO, *SB3, *GYMNASIUM}
    untried = {name.rpartition(".")[2] for name in ENV_WRAPPERS} - tried
    # The state of minigrid's environments is in objects of its own
    assert untried == {"FlatObsWrapper", "ImgObsWrapper"}
