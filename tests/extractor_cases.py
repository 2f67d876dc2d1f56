"""Observation spaces and features extractors for the tests of extractors."""

import math
from functools import partial

import gymnasium as gym
import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor

from sb3_ppo_plus.extractors import ImpalaCNN, TransformerExtractor

POOLINGS = ["mean", "last", "cls"]


class RandomEnv(gym.Env):
    """Observations drawn from its space (never zero), three-step episodes, actions of two."""

    def __init__(self, observation_space: spaces.Space):
        self.observation_space = observation_space
        self.action_space = spaces.Discrete(2)
        self.steps = 0

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.steps = 0
        return self.observation_space.sample(), {}

    def step(self, action):
        self.steps += 1
        return self.observation_space.sample(), 1.0, self.steps == 3, False, {}


def box(*shape: int) -> spaces.Box:
    return spaces.Box(-1.0, 1.0, shape, np.float32)


def image(*shape: int) -> spaces.Box:
    return spaces.Box(0, 255, shape, np.uint8)


def transformer(space: spaces.Space, **kwargs) -> TransformerExtractor:
    th.manual_seed(0)
    return TransformerExtractor(space, **{"d_model": 16, "n_heads": 2, **kwargs})


def dict_space() -> spaces.Dict:
    return spaces.Dict({"history": box(5, 3), "image": image(3, 7, 7), "vector": box(4)})


DICT_EXTRACTORS = {
    "history": {"class": "transformer", "d_model": 16, "n_heads": 2},
    "image": {"class": ImpalaCNN, "features_dim": 24},
}


def ortho_init(extractor: BaseFeaturesExtractor) -> None:
    """SB3's orthogonal initialisation of a features extractor."""
    extractor.apply(partial(ActorCriticPolicy.init_weights, gain=math.sqrt(2)))
