"""What users change during an update works as in SB3, bit for bit."""

import pytest
import torch as th
from changed_training import Change, assert_changes_alike, assert_has_an_effect, build, trained
from changes_of_models import (
    add_a_group,
    clamp_in_place,
    clear_the_state,
    copy_data,
    freeze,
    halve_a_moment_in_place,
    invert_gradients,
    layer,
    load_a_copy_of_its_state,
    replace_a_group,
    replace_the_list_of_groups,
    replace_the_state,
    shift_memory,
)
from stable_baselines3 import PPO
from states import assert_same_training
from torch.optim import Adam

from sb3_ppo_plus import PPOPlus

pytestmark = pytest.mark.usefixtures("replayed_after_a_while")


def during_update(change, at=(3, 10)):
    """Return a change that hooks into the policy, so that some minibatches change the model."""

    def hook_in(model):
        calls = []

        def hook(*_):
            if model.policy.training:
                calls.append(1)
                if len(calls) in at:
                    change(model)

        layer(model).register_forward_hook(hook)

    return hook_in


def slow_down(model):
    for group in model.policy.optimizer.param_groups:
        group["lr"] *= 0.1


@pytest.mark.parametrize("optimizer", ["Adam", "SGD with momentum"])
@pytest.mark.parametrize("before", [(0,), (2,)], ids=["first update", "later"])
@pytest.mark.parametrize(
    ("change", "has_an_effect"),
    [
        (slow_down, True),
        (lambda model: [slow_down(model), replace_the_list_of_groups(model)], True),
        (lambda model: [slow_down(model), replace_a_group(model)], True),
        (replace_a_group, False),
        (load_a_copy_of_its_state, False),
        (clear_the_state, True),
        (replace_the_state, True),
        (halve_a_moment_in_place, True),
        (freeze, True),
        (copy_data, False),
        (shift_memory, True),
        (clamp_in_place, True),
        (add_a_group, False),
    ],
    ids=[
        "learning rate",
        "list of groups",
        "group",
        "equal group",
        "loaded state",
        "cleared state",
        "replaced state",
        "moments",
        "frozen",
        "new memory",
        "shifted memory",
        "clamped",
        "added group",
    ],
)
def test_changes_during_an_update_take_effect(change, has_an_effect, before, optimizer):
    settings = {"optimizer": optimizer, "before": before}
    sb3, ours = (trained(algorithm, during_update(change), **settings) for algorithm in (PPO, PPOPlus))
    assert_same_training(sb3, ours, learning_rates=change is not add_a_group)
    if has_an_effect:
        assert_has_an_effect(sb3, optimizer=optimizer)


def test_each_parameter_counts_its_own_steps_after_a_copy_of_the_state_is_loaded_during_an_update():
    models = []
    for algorithm in (PPO, PPOPlus):
        model = trained(algorithm, during_update(load_a_copy_of_its_state, at=range(1000)))
        # If parameters shared a counter, a step outside PPOPlus would count once for each of them
        model.policy.optimizer.step()
        models.append(model)
    assert_same_training(*models)


@pytest.mark.parametrize("before", [(0,), (2,)], ids=["first update", "later"])
@pytest.mark.parametrize("optimizer_class", [Adam, th.optim.NAdam])
def test_an_optimizer_that_is_replaced_during_an_update_is_used(optimizer_class, before):
    def change(model):
        model.policy.optimizer = optimizer_class(model.policy.parameters(), lr=1e-2)

    assert_changes_alike(during_update(change), before=before)


@pytest.mark.parametrize("before", [(0,), (2,)], ids=["first update", "later"])
def test_optimizer_hooks_that_are_added_during_an_update_run_from_the_next_update_on(before):
    def change(model):
        model.policy.optimizer.register_step_pre_hook(invert_gradients)

    sb3, ours = (trained(algorithm, during_update(change, at=(3,)), before=before) for algorithm in (PPO, PPOPlus))
    # PPOPlus looks for hooks only before each update, so these models differ
    with pytest.raises(AssertionError):
        assert_same_training(sb3, ours)


def test_an_error_during_an_update_leaves_parameters_and_moments_in_their_memory():
    class Stop(Exception):
        pass

    def stop(model):
        raise Stop

    models = []
    for algorithm in (PPO, PPOPlus):
        model = build(algorithm).learn(32)
        memory = [parameter.data_ptr() for parameter in model.policy.parameters()]
        with pytest.raises(Stop):
            model.learn(32, Change(during_update(stop), before=(0,)), reset_num_timesteps=False)
        assert memory == [parameter.data_ptr() for parameter in model.policy.parameters()]
        # Only PPOPlus counts the unfinished epoch
        model._n_updates = 0
        models.append(model)
    assert_same_training(*models)
