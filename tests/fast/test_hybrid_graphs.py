"""Tuple and Dict actions in replays, compiled graphs and micro-batches."""

import copy

import pytest
import torch as th
from hybrid_cases import CASES, EVERY_CASE, NESTED, MaskedHybridToy, assert_same_numbers, build, make_env
from stable_baselines3.common.callbacks import BaseCallback

from sb3_ppo_plus.fast import replays


@pytest.mark.usefixtures("replayed_after_a_while", "acts_eagerly")
@EVERY_CASE
def test_replayed_steps_have_the_bits_of_eager_ones(case, monkeypatch):
    replayed = build(**case, ent_coef=0.01).learn(4 * 64)
    assert replayed._execution.gradient_step.replays.n_replays > 0
    monkeypatch.setattr(replays, "REPLAY_AFTER", 10**9)
    eager = build(**case, ent_coef=0.01).learn(4 * 64)
    assert eager._execution.gradient_step.replays.n_replays == 0
    assert_same_numbers(replayed, eager)


def assert_compiled_is_eager(make_model):
    eager, compiled = (make_model(compile).learn(3 * 64) for compile in (False, True))
    for (name, expected), actual in zip(eager.policy.named_parameters(), compiled.policy.parameters(), strict=True):
        th.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-4, msg=lambda text, name=name: f"{name}: {text}")
    assert compiled._execution.gradient_step.n_compilations > 0
    assert compiled._execution.compiled_actor.n_compilations > 0


@pytest.mark.usefixtures("graphs_without_code")
@EVERY_CASE
@pytest.mark.filterwarnings("error:compile=True")
def test_graphs_do_what_eager_mode_does(case):
    assert_compiled_is_eager(lambda compile: build(**case, compile=compile, ent_coef=0.01))


@pytest.mark.usefixtures("graphs_without_code")
@EVERY_CASE
@pytest.mark.filterwarnings("error:compile=True")
def test_graphs_obey_masks_as_eager_mode_does(case):
    given = {"action_space": NESTED} | case
    env = {"env_class": MaskedHybridToy, "action_space": given.pop("action_space")}
    assert_compiled_is_eager(lambda compile: build(make_env(**env), **given, compile=compile))


@pytest.mark.filterwarnings("error:compile=True")
def test_compiled_code_does_what_eager_mode_does():
    assert_compiled_is_eager(lambda compile: build(**CASES["used parts"], compile=compile, ent_coef=0.01))


@pytest.mark.parametrize("name", ["gaussian", "beta", "used parts"])
def test_micro_batches_add_up_to_the_whole_minibatch(name):
    # One step on all transitions. With parts, each draws its own random numbers
    class Replay(BaseCallback):
        def _on_step(self):
            return True

        def _on_rollout_end(self):
            rollout.setdefault("buffer", copy.deepcopy(self.model.rollout_buffer))
            for array in ("observations", "actions", "log_probs", "values", "advantages", "returns"):
                setattr(self.model.rollout_buffer, array, getattr(rollout["buffer"], array).copy())
            self.model.rollout_buffer._rollout = None

    rollout = {}
    case = CASES[name]
    models = [
        build(**case, n_epochs=1, batch_size=64, micro_batches=parts, ent_coef=0.01).learn(64, Replay())
        for parts in (1, 2)
    ]
    for expected, actual in zip(*(model.policy.parameters() for model in models), strict=True):
        th.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-4)
