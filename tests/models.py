"""Small models in small environments, and the check that one is refused."""

import pytest
from environments import SMALL_NET, make_env, toy_envs

from sb3_ppo_plus import PPOPlus

STEPS = 32
SETTINGS = {"n_steps": STEPS, "batch_size": 16, "n_epochs": 2, "seed": 0, "device": "cpu"}


def build(env=None, policy="MlpPolicy", policy_kwargs=SMALL_NET, **settings):
    # A copy, since a test may change the model's arguments
    policy_kwargs = dict(policy_kwargs)
    return PPOPlus(policy, make_env() if env is None else env, policy_kwargs=policy_kwargs, **SETTINGS | settings)


def assert_refused(error, *patterns, env_kwargs=None, **arguments):
    """The error's message holds every pattern, and the environment was not stepped."""
    env = make_env(**env_kwargs or {})
    with pytest.raises(error) as caught:
        build(env, **arguments)
    for pattern in patterns:
        assert pattern in str(caught.value), f"{pattern!r} not in {caught.value}"
    assert toy_envs(env)[0].calls["step"] == 0
