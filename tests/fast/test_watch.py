"""The watch over a policy notices every kind of change, and reports none if there is none."""

from unittest.mock import patch

import numpy as np
import pytest
import torch as th
from models import build
from stable_baselines3.common.policies import BaseModel
from torch import nn
from torch.nn.modules import module as nn_module

from sb3_ppo_plus.fast.watch import PartsWatch


@pytest.fixture
def policy():
    policy = build(policy_kwargs={"net_arch": [8, 8], "activation_fn": nn.LeakyReLU}).policy
    policy.array = np.zeros(2)
    policy.note = None
    return policy


def own_method(policy):
    policy.value_net.forward = lambda features: features


def own_method_of_the_distribution(policy):
    policy.action_dist.log_prob = lambda actions: actions


def hook(policy):
    policy.action_net.register_forward_pre_hook(lambda *_: None)


def module(policy):
    policy.mlp_extractor.policy_net[1] = nn.ReLU()


def first_module(policy):
    policy.mlp_extractor.policy_net[0].add_module("new", nn.Tanh())


def parameter(policy):
    policy.log_std = nn.Parameter(policy.log_std.detach().clone())


def parameter_of_one_equal_number(policy):
    policy.value_net.bias = nn.Parameter(policy.value_net.bias.detach().clone())


def buffer(policy):
    policy.value_net.register_buffer("new", th.zeros(1))


def attribute_of_a_module(policy):
    policy.mlp_extractor.policy_net[1].negative_slope = 0.5


def attribute_of_the_policy(policy):
    policy.normalize_images = False


def attribute_of_the_distribution(policy):
    policy.action_dist.action_dim = 7


def new_attribute(policy):
    policy.new = 1


def attribute_taken_away(policy):
    del policy.note


def one_attribute_for_another(policy):
    del policy.note
    policy.new = 1


def array(policy):
    policy.array = np.zeros(2)


def tensor_for_none(policy):
    policy.note = th.zeros(2)


def distribution(policy):
    policy.action_dist = type(policy.action_dist)(1)


def mode(policy):
    policy.train(not policy.training)


def kind(policy):
    policy.__class__ = type("Sub", (type(policy),), {})


CHANGES = [
    *(own_method, own_method_of_the_distribution, hook, module, first_module, parameter, parameter_of_one_equal_number),
    *(buffer, attribute_of_a_module, attribute_of_the_policy, attribute_of_the_distribution, new_attribute),
    *(attribute_taken_away, one_attribute_for_another, array, tensor_for_none, distribution, mode, kind),
]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_a_watch_notices(policy, change):
    watch = PartsWatch(policy)
    assert not watch.has_changed()
    change(policy)
    assert watch.has_changed()
    if change is not hook:
        assert not PartsWatch(policy).has_changed()


# What is counted or held: the quick look notices it
QUICKLY_NOTICED = [
    *(own_method, own_method_of_the_distribution, module, first_module, parameter, parameter_of_one_equal_number),
    *(buffer, new_attribute, attribute_taken_away),
]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_a_quick_look_notices_attributes_that_come_or_go_and_other_parts(policy, change):
    watch = PartsWatch(policy)
    assert not watch.has_changed(is_thorough=False)
    change(policy)
    assert watch.has_changed(is_thorough=False) == (change in QUICKLY_NOTICED)


@pytest.mark.parametrize(
    ("owner", "name"),
    [
        (nn.LeakyReLU, "forward"),
        (nn.LeakyReLU, "__call__"),
        (nn.Module, "__call__"),
        (BaseModel, "extract_features"),
    ],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_a_watch_notices_a_replaced_method_and_code_as_before_restores_it(policy, owner, name):
    watch, whole, had = PartsWatch(policy), getattr(owner, name), name in vars(owner)
    with patch.object(owner, name, lambda *_: None):
        new = vars(owner)[name]
        assert watch.has_changed()
        with watch.code_as_before():
            assert getattr(owner, name) is whole and (name in vars(owner)) == had
        assert vars(owner)[name] is new
    assert not watch.has_changed()


def test_a_watch_notices_a_hook_on_all_modules_and_code_as_before_removes_it(policy):
    calls = []
    for register in (nn_module.register_module_forward_hook, nn_module.register_module_forward_pre_hook):
        watch = PartsWatch(policy)
        handle = register(lambda *_: calls.append(1))
        try:
            assert watch.has_changed()
            with pytest.raises(KeyError), watch.code_as_before():
                policy.value_net(th.zeros(1, 8))
                raise KeyError
            assert not calls
            policy.value_net(th.zeros(1, 8))
            assert len(calls) == 1
        finally:
            handle.remove()
            calls.clear()
        assert not watch.has_changed()


def test_training_and_acting_are_no_change(policy):
    observations, actions = th.zeros(2, 3), th.zeros(2, 2)
    policy.set_training_mode(False)
    # After the first step, the distribution has new attributes
    with th.no_grad():
        policy(observations)
    watch = PartsWatch(policy)
    with th.no_grad():
        policy(observations)
        policy.log_std.fill_(-1.0)
    policy.optimizer.zero_grad()
    policy.evaluate_actions(observations, actions)[0].sum().backward()
    policy.optimizer.step()
    policy.predict(np.zeros(3, np.float32))
    policy.set_training_mode(False)
    assert not watch.has_changed()
