"""What users change in the optimiser between updates works as in SB3, bit for bit."""

import pytest
import torch as th
from changed_training import OPTIMIZERS, assert_changes_alike, assert_has_an_effect, trained
from changes_of_models import (
    add_a_group,
    clear_the_state,
    forget_one_parameter,
    halve_a_moment_in_place,
    invert_gradients,
    load_a_copy_of_its_state,
    load_its_own_state,
    replace_a_group,
    replace_a_moment,
    replace_an_entry,
    replace_the_list_of_groups,
    replace_the_state,
    reset_one_counter,
    reset_the_counters,
    set_a_copy_of_its_parameters,
    set_its_own_parameters,
)
from stable_baselines3 import PPO
from states import assert_same_training
from torch.optim import Adam, RMSprop
from torch.optim.lr_scheduler import LambdaLR
from torch.optim.optimizer import register_optimizer_step_pre_hook

from sb3_ppo_plus import PPOPlus
from sb3_ppo_plus.fast import replays

pytestmark = pytest.mark.usefixtures("replayed_after_a_while", "acts_eagerly")


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize(
    "change",
    [
        load_its_own_state,
        load_a_copy_of_its_state,
        set_its_own_parameters,
        set_a_copy_of_its_parameters,
        replace_the_list_of_groups,
        replace_a_group,
    ],
)
def test_the_learning_rate_follows_its_schedule_after_groups_are_replaced(change, optimizer):
    sb3, ours = assert_changes_alike(change, optimizer=optimizer, has_an_effect=False)
    assert len({group["lr"] for group in ours.policy.optimizer.param_groups}) == 1
    assert ours.logger.name_to_value["train/learning_rate"] == sb3.logger.name_to_value["train/learning_rate"]


@pytest.mark.parametrize("optimizer", ["Adam", "SGD with momentum", "RMSprop"])
@pytest.mark.parametrize(
    "change",
    [clear_the_state, replace_the_state, forget_one_parameter, replace_a_moment, halve_a_moment_in_place],
)
def test_changes_of_the_optimizers_state_take_effect(change, optimizer):
    assert_changes_alike(change, optimizer=optimizer)


@pytest.mark.parametrize("change", [reset_the_counters, reset_one_counter])
def test_changes_of_the_step_counters_take_effect(change):
    assert_changes_alike(change, optimizer="Adam")


def test_training_uses_a_state_entry_that_replaces_an_equal_one():
    assert_changes_alike(replace_an_entry, has_an_effect=False)


# Settings of the groups


@pytest.mark.parametrize(
    ("optimizer", "settings"),
    [
        ("Adam", {"betas": (0.5, 0.9)}),
        ("Adam", {"eps": 0.1}),
        ("Adam", {"weight_decay": 0.1}),
        ("Adam", {"maximize": True}),
        ("AdamW", {"weight_decay": 0.3}),
        ("AdamW", {"decoupled_weight_decay": False}),
        ("SGD", {"momentum": 0.9}),
        ("SGD", {"weight_decay": 0.1}),
        ("SGD with momentum", {"momentum": 0}),
        ("SGD with momentum", {"nesterov": True, "dampening": 0}),
        ("RMSprop", {"alpha": 0.5}),
    ],
)
def test_changes_of_a_groups_settings_take_effect(optimizer, settings):
    def change(model):
        for group in model.policy.optimizer.param_groups:
            group.update(settings)

    assert_changes_alike(change, optimizer=optimizer)


def test_the_schedule_overwrites_a_learning_rate_that_a_callback_sets_as_in_sb3():
    def change(model):
        model.policy.optimizer.param_groups[0]["lr"] = 1.0

    assert_changes_alike(change, has_an_effect=False)


def test_momentum_can_be_switched_off_and_on_again():
    def change(model):
        group = model.policy.optimizer.param_groups[0]
        group["momentum"] = 0.9 - group["momentum"]

    assert_changes_alike(change, optimizer="SGD with momentum", before=(1, 3))


def test_changed_defaults_affect_new_groups_only():
    def change(model):
        model.policy.optimizer.defaults["lr"] = 1.0
        model.policy.optimizer.defaults["weight_decay"] = 1.0

    assert_changes_alike(change, has_an_effect=False)


def test_a_group_of_a_parameter_outside_the_policy_is_no_obstacle():
    # SB3 gives it the schedule's rate, PPOPlus leaves it alone
    sb3, ours = (trained(algorithm, add_a_group, before=(1,)) for algorithm in (PPO, PPOPlus))
    assert_same_training(sb3, ours, learning_rates=False)


def test_parameters_that_change_their_group_are_followed():
    def change(model):
        (group,) = model.policy.optimizer.param_groups
        moved = group["params"].pop()
        model.policy.optimizer.add_param_group({**group, "params": [moved], "weight_decay": 0.5})

    assert_changes_alike(change, before=(1,), learning_rate=1e-2)


def test_a_new_order_of_the_parameters_takes_effect():
    def change(model):
        model.policy.optimizer.param_groups[0]["params"].reverse()

    assert_changes_alike(change, has_an_effect=False)


def test_a_parameter_that_is_removed_from_the_optimizer_does_not_change():
    def change(model):
        optimizer = model.policy.optimizer
        del optimizer.state[optimizer.param_groups[0]["params"].pop(0)]

    assert_changes_alike(change, before=(2,))


# The optimiser and its methods


@pytest.mark.parametrize("optimizer_class", [Adam, RMSprop, th.optim.NAdam])
def test_a_new_optimizer_is_used(optimizer_class):
    def change(model):
        model.policy.optimizer = optimizer_class(model.policy.parameters(), lr=1e-2)

    assert_changes_alike(change)


class HalfGradients(Adam):
    def step(self, closure=None):
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.grad.mul_(0.5 if parameter.dim() == 1 else 2.0)
        return super().step(closure)


def test_a_new_class_of_the_optimizer_is_used():
    def change(model):
        model.policy.optimizer.__class__ = HalfGradients

    assert_changes_alike(change, before=(2,))


@pytest.mark.parametrize("when", ["pre", "post"])
def test_hooks_of_the_optimizers_step_run(when):
    def change(model):
        def hook(optimizer, *_):
            for parameter in model.policy.parameters():
                (parameter.grad if when == "pre" else parameter.data).mul_(0.5)

        getattr(model.policy.optimizer, f"register_step_{when}_hook")(hook)

    # Not Adam: scaling all gradients would change nothing
    assert_changes_alike(change, before=(2,), optimizer="SGD")


def test_hooks_of_every_optimizers_step_run():
    handles = []

    def change(model):
        handles.append(register_optimizer_step_pre_hook(invert_gradients))

    try:
        models = []
        for algorithm in (PPO, PPOPlus):
            models.append(trained(algorithm, change, before=(2,)))
            handles.pop().remove()
    finally:
        for handle in handles:
            handle.remove()
    assert_same_training(*models)
    assert_has_an_effect(models[0])


def test_a_learning_rate_scheduler_of_torch_takes_effect():
    def change(model):
        LambdaLR(model.policy.optimizer, lambda _: 0.5)

    assert_changes_alike(change, before=(2,), has_an_effect=False)


@pytest.mark.parametrize("owner", ["instance", "class"])
def test_a_wrapped_step_is_called(owner, monkeypatch):
    step = Adam.step

    def change(model):
        import functools

        optimizer = model.policy.optimizer

        @functools.wraps(step)
        def inverted(self, *arguments):
            invert_gradients(self)
            return step(self, *arguments)

        if owner == "class":
            monkeypatch.setattr(Adam, "step", inverted)
        else:
            optimizer.step = inverted.__get__(optimizer)

    models = []
    for algorithm in (PPO, PPOPlus):
        models.append(trained(algorithm, change, before=(2,)))
        monkeypatch.undo()
        monkeypatch.setattr(replays, "REPLAY_AFTER", 3)
    assert_same_training(*models)
    assert_has_an_effect(models[0])


def test_a_replaced_clipping_function_is_called(monkeypatch):
    def clip_by_value(parameters, max_norm):
        th.nn.utils.clip_grad_value_(parameters, 1e-3)
        return th.tensor(0.0)

    def change(model):
        monkeypatch.setattr(th.nn.utils, "clip_grad_norm_", clip_by_value)

    models = []
    for algorithm in (PPO, PPOPlus):
        models.append(trained(algorithm, change, before=(2,), optimizer="SGD"))
        monkeypatch.undo()
        monkeypatch.setattr(replays, "REPLAY_AFTER", 3)
    assert_same_training(*models)
    assert_has_an_effect(models[0], optimizer="SGD")
