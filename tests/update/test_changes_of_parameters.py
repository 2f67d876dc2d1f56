"""What users change in parameters between updates works as in SB3, bit for bit."""

import copy

import pytest
import torch as th
from changed_training import ROLLOUTS, assert_changes_alike, assert_has_an_effect, build, trained
from changes_of_models import (
    clamp_in_place,
    copy_data,
    freeze,
    replace_a_parameter,
    share_memory_of_parameters,
    share_memory_with_a_buffer,
    shift_memory,
    tie_parameters,
    transpose_data,
    transpose_memory,
)
from stable_baselines3 import PPO
from stable_baselines3.common.callbacks import BaseCallback
from states import assert_same_training

from sb3_ppo_plus import PPOPlus

pytestmark = pytest.mark.usefixtures("replayed_after_a_while")


@pytest.mark.parametrize("optimizer", ["Adam", "SGD"])
@pytest.mark.parametrize("before", [(0, 2), (2, 3)], ids=["first", "later"])
@pytest.mark.parametrize(
    "change",
    [
        freeze,
        transpose_data,
        transpose_memory,
        shift_memory,
        replace_a_parameter,
        clamp_in_place,
        tie_parameters,
        share_memory_of_parameters,
    ],
)
def test_changes_of_parameters_take_effect(change, before, optimizer):
    assert_changes_alike(change, before=before, optimizer=optimizer)


def test_training_goes_on_with_parameters_in_new_memory():
    assert_changes_alike(copy_data, has_an_effect=False)


def test_a_buffer_keeps_sharing_the_memory_of_a_parameter():
    _, ours = assert_changes_alike(share_memory_with_a_buffer, has_an_effect=False, before=(2,))
    assert th.equal(ours.policy.spare, ours.policy.log_std)


# Tensors that users keep


def test_a_state_dict_taken_before_training_shows_the_policys_present_parameters():
    """It is not a copy, as in SB3, so loading it changes nothing."""
    models = []
    for algorithm in (PPO, PPOPlus):
        model = build(algorithm)
        held = model.policy.state_dict()
        model.learn(48)
        assert all(th.equal(value, held[name]) for name, value in model.policy.state_dict().items())
        model.policy.load_state_dict(held)
        models.append(model.learn(32, reset_num_timesteps=False))
    assert_same_training(*models)


def test_parameters_that_were_taken_before_training_can_be_set_after_it():
    models = []
    for algorithm in (PPO, PPOPlus):
        model = build(algorithm)
        held = model.get_parameters()
        model.learn(48)
        model.set_parameters(held)
        models.append(model.learn(32, reset_num_timesteps=False))
    assert_same_training(*models)


def test_a_callback_can_change_parameters_through_tensors_that_it_keeps():
    class Clamp(BaseCallback):
        def _on_training_start(self):
            self.held = [parameter.detach() for parameter in self.model.policy.parameters()]
            self.arrays = [tensor.numpy() for tensor in self.held]

        def _on_rollout_start(self):
            self.held[0].clamp_(-0.01, 0.01)
            self.arrays[1][:] *= 0.5

        def _on_step(self):
            return True

    models = [build(algorithm).learn(80, Clamp()) for algorithm in (PPO, PPOPlus)]
    assert_same_training(*models)
    assert_has_an_effect(models[0])


def test_a_callback_can_change_moments_through_tensors_that_it_keeps():
    class Halve(BaseCallback):
        held = ()

        def _on_rollout_start(self):
            for entry in self.held:
                entry["exp_avg"].mul_(0.5)
            self.held = self.held or list(map(dict, self.model.policy.optimizer.state.values()))

        def _on_step(self):
            return True

    models = [build(algorithm).learn(80, Halve()) for algorithm in (PPO, PPOPlus)]
    assert_same_training(*models)
    assert_has_an_effect(models[0])


def test_two_models_that_share_moments_keep_sharing_them():
    """In SB3 they share moments if set_parameters gets the state of another model without a copy."""
    models = []
    for algorithm in (PPO, PPOPlus):
        first, second = build(algorithm).learn(32), build(algorithm, seed=1)
        second.set_parameters(first.get_parameters())
        for model in (first, second, first):
            model.learn(32, reset_num_timesteps=False)
        models.append((first, second))
    for sb3, ours in zip(*models, strict=True):
        assert_same_training(sb3, ours)


def test_gradients_that_a_callback_keeps_do_not_change():
    class Hold(BaseCallback):
        def __init__(self):
            super().__init__()
            self.held = []

        def _on_rollout_start(self):
            self.held.append([parameter.grad for parameter in self.model.policy.parameters()])

        def _on_step(self):
            return True

    held = []
    for algorithm in (PPO, PPOPlus):
        callback = Hold()
        build(algorithm).learn(80, callback)
        held.append(callback.held)
    assert len(held[0]) == ROLLOUTS
    for sb3, ours in zip(*held, strict=True):
        for expected, actual in zip(sb3, ours, strict=True):
            assert (expected is None and actual is None) or th.equal(expected, actual)


def test_a_frozen_parameter_has_no_gradient():
    sb3, ours = (trained(algorithm, freeze, before=(2,)) for algorithm in (PPO, PPOPlus))
    for model in (sb3, ours):
        assert [p.grad is None for p in model.policy.parameters()] == [
            not p.requires_grad for p in model.policy.parameters()
        ]


def test_parameters_in_shared_memory_stay_there():
    models = []
    for algorithm in (PPO, PPOPlus):
        model = build(algorithm)
        model.policy.share_memory()
        memory = [parameter.data_ptr() for parameter in model.policy.parameters()]
        models.append(model.learn(48))
        assert memory == [parameter.data_ptr() for parameter in model.policy.parameters()]
        assert all(parameter.is_shared() for parameter in model.policy.parameters())
    assert_same_training(*models)


def test_parameters_and_moments_stay_in_their_memory_between_updates():
    places = []

    def change(model):
        moments = [value for entry in model.policy.optimizer.state.values() for value in entry.values()]
        places.append([tensor.data_ptr() for tensor in [*model.policy.parameters(), *moments]])

    trained(PPOPlus, change, before=range(1, ROLLOUTS))
    assert len(places) == ROLLOUTS - 1 and all(place == places[0] for place in places)
    assert len({pointer for pointer in places[0]}) == len(places[0])


@pytest.mark.parametrize("compile", [False, True], ids=["eager", "compiled"])
@pytest.mark.usefixtures("graphs_without_code")
@pytest.mark.filterwarnings("ignore:compile=True")
def test_without_any_gradient_nothing_is_stepped(compile):
    """A copy of a policy with the original's method, as ``deepcopy`` leaves a wrapped method."""
    models = []
    for algorithm, settings in ((PPO, {}), (PPOPlus, {"compile": compile})):
        model = build(algorithm, **settings)
        copied = copy.deepcopy(model.policy)
        copied.evaluate_actions = model.policy.evaluate_actions
        model.policy = copied
        before = [parameter.detach().clone() for parameter in copied.parameters()]
        model.learn(ROLLOUTS * 16)
        assert all(map(th.equal, before, copied.parameters()))
        models.append(model)
    assert_same_training(*models)
