"""Action masks: where they come from, what they do, and that training with them is sb3-contrib's MaskablePPO."""

import copy

import numpy as np
import pytest
import torch as th
from envs import SMALL_NET, ToyEnv
from gymnasium import spaces
from sb3_contrib import MaskablePPO
from stable_baselines3.common.env_util import make_vec_env

from sb3_ppo_plus import PPOPlus
from sb3_ppo_plus.masked_distributions import mask_sizes

DISCRETE, MULTI_DISCRETE, MULTI_BINARY = spaces.Discrete(5), spaces.MultiDiscrete([3, 2, 4]), spaces.MultiBinary(3)
ACTION_SPACES = {"discrete": DISCRETE, "multi_discrete": MULTI_DISCRETE, "multi_binary": MULTI_BINARY}
SETTINGS = {"n_steps": 32, "batch_size": 24, "n_epochs": 3, "seed": 3, "device": "cpu", "policy_kwargs": SMALL_NET}


class MaskedEnv(ToyEnv):
    """ToyEnv with other random valid actions at each step, which refuses all others."""

    def __init__(self, action_space=DISCRETE, **kwargs):
        super().__init__(action_space=action_space, **kwargs)
        self.sizes = mask_sizes(action_space)

    def reset(self, *, seed=None, options=None):
        result = super().reset(seed=seed, options=options)
        self._draw_masks()
        return result

    def step(self, action):
        chosen = np.asarray(action).reshape(-1)
        assert all(mask[choice] for mask, choice in zip(self.masks, chosen, strict=True)), f"{action} is masked"
        result = super().step(action)
        self._draw_masks()
        return result

    def _draw_masks(self):
        self.masks = [self.np_random.random(size) < 0.5 for size in self.sizes]
        for mask in self.masks:
            mask[self.np_random.integers(len(mask))] = True

    def action_masks(self):
        return np.concatenate(self.masks)


def make_masked_env(n_envs=2, **kwargs):
    return make_vec_env(lambda: MaskedEnv(**kwargs), n_envs=n_envs)


# The same as sb3-contrib's MaskablePPO


def assert_trains_like_contrib(policy="MlpPolicy", make_env=make_masked_env, updates=3, **settings):
    settings = SETTINGS | settings
    models = []
    for algorithm in (MaskablePPO, PPOPlus):
        model = algorithm(policy, make_env(), **copy.deepcopy(settings))
        initial = copy.deepcopy(model.policy.state_dict())
        models.append(model.learn(updates * model.n_steps * model.n_envs))
        assert any(not th.equal(initial[name], value) for name, value in model.policy.state_dict().items())
    contrib, ours = models
    expected, actual = contrib.policy.state_dict(), ours.policy.state_dict()
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert th.isfinite(value).all()
        assert th.equal(actual[name], value), f"{name} differs"
    return contrib, ours


@pytest.mark.parametrize("n_envs", [1, 3])
@pytest.mark.parametrize("action_space", ACTION_SPACES.values(), ids=ACTION_SPACES)
def test_training_is_contribs_bit_for_bit(action_space, n_envs):
    assert_trains_like_contrib(make_env=lambda: make_masked_env(n_envs, action_space=action_space), ent_coef=0.01)


@pytest.mark.parametrize("compile", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("action_space", ACTION_SPACES.values(), ids=ACTION_SPACES)
@pytest.mark.filterwarnings("error:compile=True")
def test_only_valid_actions_reach_the_env(action_space, compile):
    # MaskedEnv refuses every other action
    model = PPOPlus("MlpPolicy", make_masked_env(3, action_space=action_space), **SETTINGS, compile=compile)
    model.learn(4 * 96)
