"""Copies of a model learn on, and whatever interrupts an update leaves parameters and optimiser intact."""

import copy

import cloudpickle
import pytest
import torch as th
from environments import make_env
from models import SETTINGS, build
from stable_baselines3 import PPO
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.utils import FloatSchedule
from states import assert_same_training

from sb3_ppo_plus import PPOPlus
from sb3_ppo_plus.update import flat_parameters


def pickled(model):
    return cloudpickle.loads(cloudpickle.dumps(model))


def assert_owns_its_memory(model):
    """No two tensors of parameters and optimiser state overlap, and each parameter has its own count of steps."""
    tensors = [*model.policy.parameters()]
    tensors += [value for state in model.policy.optimizer.state.values() for value in state.values()]
    pointers = [tensor.untyped_storage().data_ptr() for tensor in tensors]
    assert len(set(pointers)) == len(pointers)


@pytest.mark.parametrize("make_copy", [pickled, copy.deepcopy], ids=["cloudpickle", "deepcopy"])
def test_a_copied_model_learns_on_as_the_original(make_copy):
    model = build()
    model.learn(64)
    copied = make_copy(model)
    for each in (model, copied):
        each.set_random_seed(3)
        each._last_obs = None
        each.env.seed(3)
        each.learn(64)
    assert_same_training(model, copied)
    assert_owns_its_memory(copied)


def test_a_copied_compiled_model_learns_on(graphs_without_code):
    model = build(compile=True)
    model.learn(64)
    copied = pickled(model)
    copied.learn(64)
    assert copied.num_timesteps == 64


class ChangesGamma(BaseCallback):
    def _on_step(self):
        self.model.gamma = 0.5 + 0.4 * (self.num_timesteps // self.training_env.num_envs % 2)
        return True


def test_gamma_may_change_from_step_to_step():
    models = [
        cls("MlpPolicy", make_env(2, max_steps=3), **SETTINGS).learn(192, ChangesGamma()) for cls in (PPO, PPOPlus)
    ]
    assert_same_training(*models)


@pytest.mark.parametrize("nth", [1, 2, 3, 4, 5, 6])
def test_an_error_while_filling_or_giving_back_leaves_parameters_and_optimizer_intact(monkeypatch, nth):
    model, twin = build(), build()
    for each in (model, twin):
        each.learn(64)
    copy_each, n_calls = flat_parameters.copy_each, 0

    def fail_once(targets, sources):
        nonlocal n_calls
        n_calls += 1
        if n_calls == nth:
            raise KeyboardInterrupt
        copy_each(targets, sources)

    monkeypatch.setattr(flat_parameters, "copy_each", fail_once)
    try:
        model.train()
    except KeyboardInterrupt:
        pass
    else:
        pytest.fail("nothing was interrupted: the case proves nothing")
    monkeypatch.undo()
    model._execution.gradient_step.end_update()
    assert_owns_its_memory(model)
    steps = {float(state["step"]) for state in model.policy.optimizer.state.values()}
    model.policy.optimizer.zero_grad()
    sum(parameter.sum() for parameter in model.policy.parameters()).backward()
    model.policy.optimizer.step()
    assert {float(state["step"]) for state in model.policy.optimizer.state.values()} == {step + 1 for step in steps}


class CountsUpdates(BaseCallback):
    """Notes n_updates at each forward pass of an update."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def _on_training_start(self):
        policy = self.model.policy
        policy.value_net.register_forward_hook(
            lambda *_: self.seen.append(self.model._n_updates) if policy.training else None
        )

    def _on_step(self):
        return True


def test_updates_are_counted_after_each_epoch_as_in_sb3():
    seen = []
    for cls in (PPO, PPOPlus):
        callback = CountsUpdates()
        cls("MlpPolicy", make_env(), **SETTINGS).learn(64, callback)
        seen.append(callback.seen)
    assert seen[0] == seen[1] and len(set(seen[0])) > 2


class OwnSchedule:
    """A user's subclass that makes the learning rate's schedule itself."""

    def _setup_lr_schedule(self):
        self.lr_schedule = FloatSchedule(1e-2)


def test_a_subclass_may_make_the_learning_rate_s_schedule():
    models = [
        type("Own", (OwnSchedule, cls), {})("MlpPolicy", make_env(), **SETTINGS).learn(64) for cls in (PPO, PPOPlus)
    ]
    assert_same_training(*models)
    assert th.tensor(models[1].policy.optimizer.param_groups[0]["lr"]) == th.tensor(1e-2)


def test_a_schedule_that_was_assigned_by_hand_outlives_a_copy():
    model = build()
    model.learn(32)
    model.lr_schedule = FloatSchedule(1e-2)
    copied = pickled(model)
    copied.learn(32)
    assert copied.policy.optimizer.param_groups[0]["lr"] == 1e-2
