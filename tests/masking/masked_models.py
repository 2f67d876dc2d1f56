"""Models and environments with action masks, for the tests of masking."""

import copy

import models
import numpy as np
import pytest
from environments import MASKED_ACTION_SPACES, SMALL_NET, MaskedEnv, MaskInObservation, ToyEnv, make_masked_env
from stable_baselines3.common.env_util import make_vec_env

from sb3_ppo_plus import PPOPlus

SETTINGS = models.SETTINGS | {"batch_size": 32, "seed": 3, "policy_kwargs": SMALL_NET}
SPACES = pytest.mark.parametrize("action_space", MASKED_ACTION_SPACES.values(), ids=MASKED_ACTION_SPACES)


def build(env=None, policy="MlpPolicy", **settings):
    return PPOPlus(policy, env if env is not None else make_masked_env(), **copy.deepcopy(SETTINGS | settings))


def make_key_env(n_envs=2, mask_space=None, **kwargs):
    """Make environments that offer masks among the observations, not by a method."""
    return make_vec_env(lambda: MaskInObservation(MaskedEnv(**kwargs), mask_space), n_envs=n_envs)


class FixedMask(ToyEnv):
    """Offers a fixed mask from a certain step on, and before it a mask that allows every action."""

    def __init__(self, mask, action_space=MASKED_ACTION_SPACES["discrete"], from_step=0):
        super().__init__(action_space=action_space, max_steps=100, p_terminate=0.0)
        self.mask, self.from_step = mask, from_step

    def action_masks(self):
        size = len(self.mask) if self.from_step == 0 else sum(getattr(self.action_space, "nvec", [5]))
        return self.mask if self.n_steps >= self.from_step else [True] * size


class ToyEnvWithSizes(ToyEnv):
    """Offers a mask, but takes every action."""

    sizes = (5,)

    def __init__(self):
        super().__init__(action_space=MASKED_ACTION_SPACES["discrete"])

    def action_masks(self):
        return np.arange(5) > 2


class ToyEnvWithoutMasks(ToyEnv):
    def __init__(self):
        super().__init__(action_space=MASKED_ACTION_SPACES["discrete"])
