"""Trains SB3's PPO and PPOPlus alike, and compares them."""

import copy

import models
import torch as th
from environments import SMALL_NET, make_env
from stable_baselines3 import PPO
from states import assert_same_training

from sb3_ppo_plus import PPOPlus

SETTINGS = models.SETTINGS | {"n_epochs": 3, "seed": 3, "policy_kwargs": SMALL_NET}
UPDATES = 3


def train(algorithm, policy, env, updates=UPDATES, **settings):
    settings = SETTINGS | {"clip_range_vf": None} | settings
    model = algorithm(policy, env(), **copy.deepcopy(settings))
    initial = copy.deepcopy(model.policy.state_dict())
    model.learn(updates * model.n_steps * model.n_envs)
    moved = [not th.equal(initial[name], value) for name, value in model.policy.state_dict().items()]
    assert any(moved), "nothing was trained: the case proves nothing"
    return model


def assert_trains_alike(policy="MlpPolicy", env=make_env, plus=None, **settings):
    sb3 = train(PPO, policy, env, **settings)
    ours = train(PPOPlus, policy, env, **settings | (plus or {}))
    assert_same_training(sb3, ours)
    return sb3, ours


def policy_kwargs(**kwargs):
    return {"policy_kwargs": SMALL_NET | kwargs}
