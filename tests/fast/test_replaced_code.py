"""Code that users put into a policy during a rollout runs from the next step on, replayed and compiled, as in SB3."""

import copy
import functools
import inspect
import warnings
from contextlib import ExitStack
from unittest.mock import Mock, patch

import pytest
import torch as th
from environments import ACTION_SPACES, make_env
from stable_baselines3 import PPO
from stable_baselines3.common import distributions as sb3_distributions
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.distributions import (
    CategoricalDistribution,
    DiagGaussianDistribution,
    MultiCategoricalDistribution,
)
from stable_baselines3.common.policies import BaseModel
from states import assert_same_training
from torch import nn
from torch.nn.modules import module as nn_module
from torch.overrides import TorchFunctionMode

from sb3_ppo_plus import PPOPlus
from sb3_ppo_plus.fast import replays
from sb3_ppo_plus.fast.policy_changes import KNOWN_MODULES, KNOWN_POLICIES, _Code, hindrance, python_state
from sb3_ppo_plus.policies import bounded_distributions, lean_distributions, masked_distributions

STEPS = 16
ROLLOUT = 2 * STEPS
N_ROLLOUTS = 3
DURING_ROLLOUT = STEPS + 9
BETWEEN = 2 * STEPS


@pytest.fixture(autouse=True)
def fast_paths_at_once(monkeypatch, graphs_without_code):
    monkeypatch.setattr(replays, "REPLAY_AFTER", 2)


def build(algorithm=PPOPlus, action_space=None, policy_kwargs=None, **settings):
    # LeakyReLU has an attribute to change; episodes of 7 steps, so that timeouts are bootstrapped
    policy_kwargs = {"net_arch": [8, 8], "activation_fn": nn.LeakyReLU, **(policy_kwargs or {})}
    settings = {"n_steps": STEPS, "batch_size": 16, "n_epochs": 3, "seed": 3, "device": "cpu", **settings}
    spaces = {} if action_space is None else {"action_space": action_space}
    return algorithm("MlpPolicy", make_env(2, **spaces), policy_kwargs=policy_kwargs, **settings)


def is_fast(model):
    """Whether the steps of the rollout are compiled or replayed."""
    execution = model._execution
    if model.compile:
        return execution.compiled_actor.n_compilations > 0
    return execution.replayed_actor.replays.n_replays > 0


class Change(BaseCallback):
    """Changes the policy after some step, and notes whether its steps had been replayed until then."""

    def __init__(self, change, stack, at):
        super().__init__()
        self.change, self.stack, self.at = change, stack, at
        self.was_fast = False

    def _on_step(self):
        if self.n_calls == self.at:
            self.was_fast = isinstance(self.model, PPOPlus) and is_fast(self.model)
            self.change(self.model.policy, self.stack)
        return True


def train(algorithm, change, at, *, compile=None, is_replayed=True, **settings):
    """Train with a change, and undo afterwards what it did outside the model."""
    if compile is not None:
        settings["compile"] = compile
    with ExitStack() as stack:
        callback = Change(change, stack, at)
        model = build(algorithm, **settings).learn(ROLLOUT * N_ROLLOUTS, callback)
    assert callback.was_fast == (algorithm is PPOPlus) or not is_replayed
    return model


def assert_all_follow(change, at, is_replayed=True, **settings):
    """Check that replays have SB3's bits, compiled graphs its numbers, and that the change makes a difference."""
    sb3 = train(PPO, change, at, **settings)
    unchanged = build(PPO, **settings).learn(ROLLOUT * N_ROLLOUTS)
    assert not all(map(th.equal, sb3.policy.parameters(), unchanged.policy.parameters())), "it changes nothing"
    assert_same_training(sb3, train(PPOPlus, change, at, is_replayed=is_replayed, **settings))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        compiled = train(PPOPlus, change, at, compile=True, **settings)
    assert len([one for one in caught if "compile=True" in str(one.message)]) <= 1
    for (name, expected), actual in zip(sb3.policy.named_parameters(), compiled.policy.parameters(), strict=True):
        th.testing.assert_close(actual, expected, atol=2e-6, rtol=1e-4, msg=lambda text, name=name: f"{name}: {text}")


def scaled(function):
    return lambda *args: function(*args) * 1.1


def replacing(owner, name):
    """Replace a method of a class."""

    def change(policy, stack):
        stack.enter_context(patch.object(owner, name, scaled(getattr(owner, name))))

    return change


def call_every_module(policy, stack):
    whole = nn.Module.__call__

    def call(self, *args, **kwargs):
        output = whole(self, *args, **kwargs)
        return output * 1.1 if isinstance(self, nn.LeakyReLU) else output

    stack.enter_context(patch.object(nn.Module, "__call__", call))


def partial_method(policy, stack):
    whole = nn.LeakyReLU.forward
    method = functools.partialmethod(lambda self, x: whole(self, x) * 1.1)
    stack.enter_context(patch.object(nn.LeakyReLU, "forward", method))


def hook_all_modules(policy, stack):
    def hook(module, inputs, output):
        return output * 1.1 if isinstance(module, nn.LeakyReLU) else None

    stack.callback(nn_module.register_module_forward_hook(hook).remove)


def hook_before_all_modules(policy, stack):
    def hook(module, inputs):
        return (inputs[0] * 1.1,) if isinstance(module, nn.LeakyReLU) else None

    stack.callback(nn_module.register_module_forward_pre_hook(hook).remove)


def change_slope(policy, stack):
    for part in policy.modules():
        if isinstance(part, nn.LeakyReLU):
            part.negative_slope = 0.3


def wrap_log_prob(policy, stack):
    policy.action_dist.log_prob = scaled(policy.action_dist.log_prob)


def replace_distribution(policy, stack):
    policy.action_dist = copy.copy(policy.action_dist)
    wrap_log_prob(policy, stack)


def wrap_forward_of_a_layer(policy, stack):
    policy.action_net.forward = scaled(policy.action_net.forward)


def wrap_extraction(policy, stack):
    policy.extract_features = scaled(policy.extract_features)


def wrap_forward(policy, stack):
    whole = policy.forward

    def forward(*args, **kwargs):
        actions, values, log_prob = whole(*args, **kwargs)
        return actions, values * 1.1, log_prob

    policy.forward = forward


def another_class(policy, stack):
    kind = type(policy)

    def extract_features(self, *args):
        return kind.extract_features(self, *args) * 1.1

    policy.__class__ = type("Sub", (kind,), {"extract_features": extract_features})


def swap_networks(policy, stack):
    extractor = policy.mlp_extractor
    extractor.policy_net, extractor.value_net = extractor.value_net, extractor.policy_net


def tie_weights(policy, stack):
    policy.mlp_extractor.value_net[0].weight = policy.mlp_extractor.policy_net[0].weight


class ScaleLeakyReLU(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        output = func(*args, **(kwargs or {}))
        return output * 1.1 if func is nn.functional.leaky_relu else output


def function_mode(policy, stack):
    stack.enter_context(ScaleLeakyReLU())


CHANGES = {
    "a mode that acts on functions of torch": function_mode,
    "a hook on all modules": hook_all_modules,
    "a hook before all modules": hook_before_all_modules,
    "an attribute of a module": change_slope,
    "a method of a module's class": replacing(nn.LeakyReLU, "forward"),
    "the call of a module's class": replacing(nn.LeakyReLU, "__call__"),
    "a partial method of a module's class": partial_method,
    "the call of every module": call_every_module,
    "a method of a policy's base class": replacing(BaseModel, "extract_features"),
    "a method of SB3's distribution class": replacing(DiagGaussianDistribution, "log_prob"),
    "a method of the distribution": wrap_log_prob,
    "another distribution": replace_distribution,
    "a method of a layer": wrap_forward_of_a_layer,
    "a method of the policy": wrap_extraction,
    "the forward of the policy": wrap_forward,
    "another class of the policy": another_class,
    "networks swapped": swap_networks,
    "weights tied": tie_weights,
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_change_during_a_rollout_is_used_from_the_next_step(change):
    assert_all_follow(change, DURING_ROLLOUT)


@pytest.mark.parametrize(
    "name",
    [
        "an attribute of a module",
        "a method of a module's class",
        "a method of SB3's distribution class",
        "a method of the distribution",
        "another class of the policy",
    ],
)
def test_a_change_at_the_end_of_a_rollout_is_used_in_the_update(name):
    assert_all_follow(CHANGES[name], BETWEEN)


@pytest.mark.parametrize(
    ("kind", "action_space", "name"),
    [
        (DiagGaussianDistribution, "box", "entropy"),
        (DiagGaussianDistribution, "box", "sample"),
        (CategoricalDistribution, "discrete", "log_prob"),
        (CategoricalDistribution, "discrete", "entropy"),
        (MultiCategoricalDistribution, "multi_discrete", "log_prob"),
    ],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_methods_that_are_replaced_in_sb3s_distributions_are_called(kind, action_space, name):
    # Our distributions override these methods
    settings = {"action_space": ACTION_SPACES[action_space], "ent_coef": 0.1}
    sb3 = train(PPO, replacing(kind, name), DURING_ROLLOUT, is_replayed=False, **settings)
    assert_same_training(sb3, train(PPOPlus, replacing(kind, name), DURING_ROLLOUT, is_replayed=False, **settings))


def test_a_setting_of_the_noise_that_changes_during_a_rollout_counts_from_the_next_step():
    def use_expln(policy, stack):
        policy.action_dist.use_expln = True

    # Where exp and expln differ
    settings = {"use_sde": True, "policy_kwargs": {"log_std_init": 0.5}}
    assert_all_follow(use_expln, DURING_ROLLOUT, is_replayed=False, **settings)


@pytest.mark.parametrize("compile", [False, True], ids=["replayed", "compiled"])
@pytest.mark.parametrize("what", ["hook", "class", "distribution"])
@pytest.mark.filterwarnings("ignore:compile=True")
def test_a_method_or_hook_added_during_a_rollout_is_called_as_often_as_in_sb3(compile, what):
    def counting(calls):
        def change(policy, stack):
            def count(function):
                return lambda *args: calls.append(1) or function(*args)

            if what == "hook":
                stack.callback(nn_module.register_module_forward_hook(lambda *_: calls.append(1)).remove)
            elif what == "class":
                stack.enter_context(patch.object(nn.LeakyReLU, "forward", count(nn.LeakyReLU.forward)))
            else:
                policy.action_dist.log_prob = count(policy.action_dist.log_prob)

        return change

    expected, calls = [], []
    train(PPO, counting(expected), DURING_ROLLOUT)
    train(PPOPlus, counting(calls), DURING_ROLLOUT, compile=compile)
    assert len(calls) == len(expected) > 0


def test_attributes_that_a_callback_sets_and_resets_compile_nothing_again():
    class Predict(BaseCallback):
        def _on_step(self):
            self.model.policy.net_arch = [*self.model.policy.net_arch]
            self.model.predict(self.locals["new_obs"])
            return True

    for callback in (None, Predict()):
        model = build(compile=True).learn(ROLLOUT * N_ROLLOUTS, callback)
        assert model._execution.compiled_actor.n_compilations == 2


def test_a_policy_that_changes_at_every_step_is_not_looked_through_at_each(monkeypatch):
    class SetAttribute(BaseCallback):
        def _on_step(self):
            self.model.policy.n_seen = self.num_timesteps
            return True

    n_refreshes = []
    refresh = replays.Replays.refresh
    monkeypatch.setattr(replays.Replays, "refresh", lambda self: n_refreshes.append(1) or refresh(self))
    model = build().learn(ROLLOUT * 8, SetAttribute())
    assert_same_training(build(PPO).learn(ROLLOUT * 8), model)
    # Besides, one at the beginning of each rollout and of each update
    assert len(n_refreshes) <= 8 * 6 < 8 * STEPS


def test_a_default_device_does_not_end_replays():
    policy = build().policy
    assert hindrance(policy) is None
    with th.device("cpu"):
        assert hindrance(policy) is None
    with ScaleLeakyReLU():
        assert "TorchFunctionMode" in hindrance(policy)


# Which code is known


def test_no_known_class_counts_as_patched():
    kinds = [*KNOWN_POLICIES, *KNOWN_MODULES]
    for module in (bounded_distributions, lean_distributions, masked_distributions, sb3_distributions):
        kinds += [value for value in vars(module).values() if isinstance(value, type)]
    for base in {base for kind in kinds for base in kind.__mro__} - {object}:
        assert not _Code(base).is_patched, base


def foreign(self, x):
    return x


@pytest.mark.parametrize(
    "method",
    [
        foreign,
        functools.wraps(nn.LeakyReLU.forward)(foreign),
        functools.partialmethod(nn.LeakyReLU.forward),
        staticmethod(foreign),
        property(foreign),
        Mock(),
    ],
    ids=["a function", "a wrapper", "a partial method", "a static method", "a property", "a mock"],
)
def test_every_way_of_patching_a_method_is_noticed(method):
    policy = build().policy
    assert hindrance(policy) is None
    with patch.object(nn.LeakyReLU, "forward", method):
        assert "LeakyReLU" in hindrance(policy)
    assert hindrance(policy) is None


def test_class_attributes_that_are_not_code_change_nothing():
    policy = build().policy
    before = python_state(policy)
    # Both store something in the class
    copy.copy(policy.action_net)
    inspect.get_annotations(nn.LeakyReLU)
    with patch.object(nn.LeakyReLU, "note", 1, create=True):
        assert python_state(policy) == before and hindrance(policy) is None


def test_a_use_of_torch_compile_elsewhere_ends_no_fast_path():
    torch_compile_use = th.compile(th.nn.Linear(2, 2), backend="eager")
    torch_compile_use(th.ones(1, 2))
    assert nn.Module.__init__.__globals__["__name__"].startswith("torch._dynamo"), "it proves nothing"
    assert hindrance(build().policy) is None
