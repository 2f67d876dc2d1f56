"""A rollout looks for new code in the policy at each step only where a user's callback could put it there."""

import pytest
from environments import make_env
from models import build
from sb3_contrib.common.maskable.callbacks import MaskableEvalCallback
from stable_baselines3.common.callbacks import (
    BaseCallback,
    CallbackList,
    CheckpointCallback,
    ConvertCallback,
    EvalCallback,
    EveryNTimesteps,
    StopTrainingOnMaxEpisodes,
)
from stable_baselines3.common.vec_env import VecEnvWrapper
from torch import nn

from sb3_ppo_plus import TrainingCheckpoint
from sb3_ppo_plus.fast import replays
from sb3_ppo_plus.fast.users_code import is_known_callback


class Own(BaseCallback):
    def _on_step(self):
        return True


def evaluation_with(callback=None, **kwargs):
    return EvalCallback(make_env(1), callback_after_eval=callback, **kwargs)


KNOWN = {
    "none": lambda: ConvertCallback(None),
    "checkpoint": lambda: CheckpointCallback(8, "unused"),
    "ours": lambda: TrainingCheckpoint(1, "unused"),
    "evaluation": evaluation_with,
    "nested": lambda: CallbackList([EveryNTimesteps(8, CheckpointCallback(8, "unused")), StopTrainingOnMaxEpisodes(3)]),
}
UNKNOWN = {
    "a class of the user's": Own,
    "a function": lambda: ConvertCallback(lambda *_: True),
    "in a list": lambda: CallbackList([CheckpointCallback(8, "unused"), CallbackList([Own()])]),
    "after an evaluation": lambda: evaluation_with(Own()),
    "at a new best": lambda: evaluation_with(callback_on_new_best=Own()),
    "now and then": lambda: EveryNTimesteps(8, Own()),
    "a subclass": lambda: Sub(8, "unused"),
    "another package's": lambda: MaskableEvalCallback(make_env(1)),
}


class Sub(CheckpointCallback):
    pass


@pytest.mark.parametrize("make", KNOWN.values(), ids=KNOWN)
def test_callbacks_of_sb3_and_ours_are_known(make):
    assert is_known_callback(make())


@pytest.mark.parametrize("make", UNKNOWN.values(), ids=UNKNOWN)
def test_whatever_may_run_a_users_code_is_not_known(make):
    assert not is_known_callback(make())


def test_a_method_of_the_users_makes_a_callback_unknown(monkeypatch):
    callback = CheckpointCallback(8, "unused")
    callback._on_step = lambda: True
    assert not is_known_callback(callback)
    assert is_known_callback(CheckpointCallback(8, "unused"))
    monkeypatch.setattr(CheckpointCallback, "_on_step", lambda self: True)
    assert not is_known_callback(CheckpointCallback(8, "unused"))


class PatchingEnv(VecEnvWrapper):
    """Replaces a method of a class in the step after ``at`` timesteps."""

    def __init__(self, venv, replace):
        super().__init__(venv)
        self.replace, self.n_steps, self.at = replace, 0, None

    def reset(self):
        return self.venv.reset()

    def step_wait(self):
        self.n_steps += 1
        if self.n_steps == self.at:
            self.replace()
        return self.venv.step_wait()


@pytest.mark.parametrize("compile", [False, True], ids=["replayed", "compiled"])
def test_a_class_that_an_environment_patches_is_used_from_the_next_rollout(monkeypatch, graphs_without_code, compile):
    monkeypatch.setattr(replays, "REPLAY_AFTER", 2)
    calls: list[int] = []
    forward = nn.LeakyReLU.forward

    def replace():
        def count(self, inputs):
            calls.append(model.num_timesteps)
            return forward(self, inputs)

        monkeypatch.setattr(nn.LeakyReLU, "forward", count)

    # No timeouts, whose values are computed eagerly
    env = PatchingEnv(make_env(1, max_steps=1000, p_terminate=0.0), replace)
    policy_kwargs = {"net_arch": [8], "activation_fn": nn.LeakyReLU}
    model = build(env, policy_kwargs=policy_kwargs, n_steps=16, batch_size=16, compile=compile)
    model.learn(64)
    env.at = 64 + 8
    with pytest.warns(UserWarning, match="not by a callback, but perhaps by an environment"):
        model.learn(16, reset_num_timesteps=False)
    assert [when for when in calls if when < 64 + 16] == []
    calls.clear()
    model.learn(16, reset_num_timesteps=False)
    assert 64 + 16 in calls, "the first step of the next rollout, before which no step was counted"
    assert model._execution.users_code.may_run
    # The next change is seen at the next step
    monkeypatch.setattr(nn.LeakyReLU, "forward", forward)
    model.learn(16, reset_num_timesteps=False)
    calls.clear()
    env.at = 64 + 48 + 8
    model.learn(16, reset_num_timesteps=False)
    assert 64 + 48 + 8 in calls and min(calls) == 64 + 48 + 8


@pytest.mark.filterwarnings("error:the policy's methods")
def test_training_and_known_callbacks_change_nothing(monkeypatch, tmp_path):
    monkeypatch.setattr(replays, "REPLAY_AFTER", 2)
    callback = [EvalCallback(make_env(1), eval_freq=5, verbose=0), TrainingCheckpoint(1, tmp_path)]
    model = build(make_env(1), n_steps=16).learn(96, callback)
    assert model._execution.replayed_actor.replays.n_replays > 0
    assert not model._execution.users_code.may_run
