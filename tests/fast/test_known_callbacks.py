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
from torch import nn

from sb3_ppo_plus import TrainingCheckpoint
from sb3_ppo_plus.fast import replays
from sb3_ppo_plus.fast.known_callbacks import is_known_callback


class Own(BaseCallback):
    def _on_step(self):
        return True


def event(callback=None, **kwargs):
    return EvalCallback(make_env(1), callback_after_eval=callback, **kwargs)


KNOWN = {
    "none": lambda: ConvertCallback(None),
    "checkpoint": lambda: CheckpointCallback(8, "unused"),
    "ours": lambda: TrainingCheckpoint(1, "unused"),
    "evaluation": event,
    "nested": lambda: CallbackList([EveryNTimesteps(8, CheckpointCallback(8, "unused")), StopTrainingOnMaxEpisodes(3)]),
}
UNKNOWN = {
    "a class of the user's": Own,
    "a function": lambda: ConvertCallback(lambda *_: True),
    "in a list": lambda: CallbackList([CheckpointCallback(8, "unused"), CallbackList([Own()])]),
    "after an evaluation": lambda: event(Own()),
    "at a new best": lambda: event(callback_on_new_best=Own()),
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


@pytest.mark.parametrize("compile", [False, True], ids=["replayed", "compiled"])
def test_without_a_users_callback_new_code_counts_from_the_next_rollout(monkeypatch, graphs_without_code, compile):
    """An environment that changes a class while it steps; no callback does."""
    monkeypatch.setattr(replays, "REPLAY_AFTER", 2)
    seen: list[int] = []
    env = make_env(1, max_steps=1000, p_terminate=0.0)
    policy_kwargs = {"net_arch": [8], "activation_fn": nn.LeakyReLU}
    model = build(env, policy_kwargs=policy_kwargs, n_steps=16, batch_size=16, compile=compile)
    model.learn(64)
    forward = nn.LeakyReLU.forward

    def count(self, inputs):
        seen.append(model.num_timesteps)
        return forward(self, inputs)

    step = model.env.step

    def patch_and_step(actions):
        if model.num_timesteps >= begun + 8:
            monkeypatch.setattr(nn.LeakyReLU, "forward", count)
        return step(actions)

    begun = model.num_timesteps
    monkeypatch.setattr(model.env, "step", patch_and_step)
    model.learn(32, reset_num_timesteps=False)
    counted = [when for when in seen if when < begun + 16]
    assert counted == [] and begun + 17 in seen
