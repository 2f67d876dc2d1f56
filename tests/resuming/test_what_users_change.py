"""What users do to a run, and what happens to their machine, while it trains: a resumed run goes on all the same."""

import sys

import numpy as np
import pytest
import torch as th
from interrupted_runs import StopAfter, make_envs, make_model
from stable_baselines3.common.callbacks import BaseCallback
from states import assert_same_bits, state_of

from sb3_ppo_plus import PPOPlus, TrainingCheckpoint
from sb3_ppo_plus.errors import PlainStateError
from sb3_ppo_plus.resuming import training_state


class Freezes(BaseCallback):
    """Freezes the parameters whose name begins so, in the second rollout."""

    def __init__(self, name):
        super().__init__()
        self.name = name

    def _on_step(self):
        if self.num_timesteps == 24:
            for name, parameter in self.model.policy.named_parameters():
                if name.startswith(self.name):
                    parameter.requires_grad_(False)
        return True


# The last one: gradients have the same shapes, so that one could take another's place
@pytest.mark.parametrize("name", ["mlp_extractor.policy_net.0", "value_net", "action_net"])
@pytest.mark.parametrize("arguments", [{}, {"compile": True}], ids=["eager", "compiled"])
def test_parameters_that_were_frozen_stay_frozen(tmp_path, name, arguments):
    def make():
        return make_model(n_epochs=3, **arguments)

    whole = make().learn(96, Freezes(name))
    make().learn(96, [Freezes(name), TrainingCheckpoint(1, tmp_path), StopAfter(48)])
    resumed = PPOPlus.resume(tmp_path, make_envs(), device="cpu").continue_learning()
    assert_same_bits(state_of(resumed), state_of(whole))
    frozen = [key for key, parameter in resumed.policy.named_parameters() if not parameter.requires_grad]
    assert frozen and all(key.startswith(name) for key in frozen)


def test_wrong_flags_of_gradients_deal_no_gradient_to_another_parameter():
    states = []
    for has_wrong_flags in (False, True):
        model = make_model(n_epochs=3).learn(48)
        if has_wrong_flags:
            flags = [not name.startswith("action_net") for name, _ in model.policy.named_parameters()]
            model._execution.step_for(model).flatten(flags)
        states.append(state_of(model.learn(48, reset_num_timesteps=False)))
    assert_same_bits(states[1], states[0])


@pytest.mark.parametrize("total", [96.0, np.int64(96), np.float32(95.5), 1e18, sys.maxsize])
@pytest.mark.parametrize("log_interval", [1, np.int64(2), -1, None])
def test_what_learn_takes_can_be_resumed(tmp_path, total, log_interval):
    make_model().learn(total, [TrainingCheckpoint(1, tmp_path), StopAfter(48)], log_interval=log_interval)
    resumed = PPOPlus.resume(tmp_path, make_envs(), device="cpu")
    resumed.continue_learning(StopAfter(96))
    assert resumed.num_timesteps == 96
    assert resumed._total_timesteps == total


def test_a_clock_that_was_set_back_is_no_error(tmp_path, monkeypatch):
    class SetBack(BaseCallback):
        def _on_step(self):
            if self.num_timesteps == 24:
                now = training_state.time.time_ns
                monkeypatch.setattr(training_state.time, "time_ns", lambda: now() - 3600 * 10**9)
            return True

    make_model().learn(96, [SetBack(), TrainingCheckpoint(1, tmp_path), StopAfter(48)])
    monkeypatch.undo()
    resumed = PPOPlus.resume(tmp_path, make_envs(), device="cpu", trusted=False).continue_learning()
    assert resumed.num_timesteps == 96
    assert th.isfinite(resumed.policy.action_net.weight).all()


def test_an_integer_with_too_many_digits_is_an_error_that_names_its_place(tmp_path):
    env = make_envs()
    env.env_method("set_wrapper_attr", "level", 7**6000)
    with pytest.raises(PlainStateError, match=r"env, envs, 0, .*level, 1 cannot be written into a checkpoint: .*4300"):
        make_model(env).learn(16, TrainingCheckpoint(1, tmp_path))
