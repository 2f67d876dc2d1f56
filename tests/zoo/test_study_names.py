"""The names of networks, which a study of the RL Zoo stores, mean what they mean there."""

import pytest
from models import build
from rl_zoo3.hyperparams_opt import convert_onpolicy_params
from states import assert_same_training

from sb3_ppo_plus.policies.net_arch import NET_ARCHS, resolve_net_arch


@pytest.mark.parametrize("name", NET_ARCHS)
def test_a_name_is_what_the_rl_zoo_makes_of_it(name):
    sampled = {"one_minus_gamma": 0.1, "one_minus_gae_lambda": 0.1, "activation_fn": "tanh"}
    expected = convert_onpolicy_params({**sampled, "net_arch": name})["policy_kwargs"]["net_arch"]
    assert resolve_net_arch(name) == expected
    assert_same_training(
        build(policy_kwargs={"net_arch": name}).learn(32), build(policy_kwargs={"net_arch": expected}).learn(32)
    )
