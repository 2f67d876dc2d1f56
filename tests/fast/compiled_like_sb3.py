"""Trains SB3's PPO and compiled PPOPlus alike, and compares them to rounding."""

import warnings

import pytest
import torch as th
from environments import ACTION_SPACES, make_env
from stable_baselines3 import PPO
from stable_baselines3.common.callbacks import BaseCallback

from sb3_ppo_plus import PPOPlus

# Several timeouts and terminations in each rollout of 32 steps
SETTINGS = {"n_steps": 32, "batch_size": 16, "n_epochs": 3, "seed": 3, "device": "cpu", "learning_rate": 3e-3}

ROLLOUT = 64


def build(algorithm=PPOPlus, action_space="box", policy="MlpPolicy", observation_space=None, **settings):
    spaces = {} if observation_space is None else {"observation_space": observation_space}
    env = make_env(2, action_space=ACTION_SPACES[action_space], **spaces)
    policy_kwargs = {"net_arch": [8, 8], **settings.pop("policy_kwargs", {})}
    return algorithm(policy, env, policy_kwargs=policy_kwargs, **SETTINGS | settings)


def assert_close(model, other):
    """Check that two models have equal parameters, to rounding."""
    for (name, expected), actual in zip(model.policy.named_parameters(), other.policy.parameters(), strict=True):
        th.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-4, msg=lambda text, name=name: f"{name}: {text}")


def assert_compiled_follows_sb3(n_rollouts=3, callback=None, warns=0, **settings):
    """Check that compiled training equals SB3's to rounding, and warns ``warns`` times that something is eager."""
    sb3 = build(PPO, **settings).learn(ROLLOUT * n_rollouts, callback and callback())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = build(compile=True, **settings).learn(ROLLOUT * n_rollouts, callback and callback())
    assert len([one for one in caught if "compile=True" in str(one.message)]) == warns
    assert_close(sb3, model)
    for name in ("approx_kl", "value_loss", "policy_gradient_loss"):
        expected, actual = (one.logger.name_to_value[f"train/{name}"] for one in (sb3, model))
        assert actual == pytest.approx(expected, rel=1e-3, abs=1e-5), name
    return model


def changing(change, *, when=lambda n_calls: True, between=False):
    """A callback that changes the model at some steps, or after each rollout."""

    class Change(BaseCallback):
        def _on_step(self):
            if not between and when(self.n_calls):
                with th.no_grad():
                    change(self.model)
            return True

        def _on_rollout_start(self):
            if between:
                change(self.model)

    return Change
