"""Random configurations train alike in SB3's PPO and in PPOPlus, and the comparison notices what is wrong.

More of them: ``python tests/random_configurations.py --help``.
"""

import numpy as np
import pytest
from differential.comparing import difference_from_sb3, difference_of_compiled, shrunk
from differential.sampling import sample
from random_configurations import main
from stable_baselines3.common.buffers import RolloutBuffer

from sb3_ppo_plus.buffers import PPOPlusRolloutBuffer
from sb3_ppo_plus.fast import compiled_step, replays
from sb3_ppo_plus.fast.compiled_actor import CompiledActor
from sb3_ppo_plus.fast.watch import PartsWatch
from sb3_ppo_plus.rollout.values import RolloutValues
from sb3_ppo_plus.update import losses
from sb3_ppo_plus.update.flat_parameters import FlatParameters
from sb3_ppo_plus.update.learning_rates import LearningRateGroups

RANDOM = [sample(seed) for seed in range(40)]


@pytest.mark.parametrize("seed", range(75))
def test_a_random_configuration_trains_as_in_sb3(seed):
    assert difference_from_sb3(sample(seed)) is None, str(sample(seed))


@pytest.mark.parametrize("seed", range(25))
def test_a_random_configuration_trains_alike_compiled_and_eager(seed):
    assert difference_of_compiled(sample(seed, compiled=True)) is None, str(sample(seed, compiled=True))


def test_a_number_gives_the_same_configuration_again():
    assert [sample(seed) for seed in range(50)] == [sample(seed) for seed in range(50)]


# The tester itself, with PPOPlus broken on purpose


def scale_value_loss(monkeypatch):
    value_loss = losses.value_loss
    monkeypatch.setattr(losses, "value_loss", lambda *args, **kwargs: value_loss(*args, **kwargs) * 1.001)


def clip_gradients_otherwise(monkeypatch):
    step = FlatParameters.step
    monkeypatch.setattr(FlatParameters, "step", lambda self, *args: step(self, args[0], args[1] * 1.01, args[2]))


def discount_otherwise(monkeypatch):
    def compute(self, last_values, dones):
        RolloutBuffer.compute_returns_and_advantage(self, last_values, dones)
        self.advantages *= 1.0001
        self._rollout = None

    monkeypatch.setattr(PPOPlusRolloutBuffer, "compute_returns_and_advantage", compute)


def bootstrap_nothing(monkeypatch):
    monkeypatch.setattr(RolloutValues, "bootstrap_timeouts", lambda *arguments: None)


def keep_the_first_learning_rate(monkeypatch):
    monkeypatch.setattr(LearningRateGroups, "update", lambda *arguments: None)


def replay_past_hooks(monkeypatch):
    monkeypatch.setattr(PartsWatch, "has_changed", lambda watch, is_thorough=True: False)


def step_what_was_frozen(monkeypatch):
    """Frozen parameters keep the gradient of their last step."""
    monkeypatch.setattr(FlatParameters, "is_current", lambda *arguments: True)
    monkeypatch.setattr(FlatParameters, "fits_gradients", lambda *arguments: True)
    step = FlatParameters.step

    def step_all(flat, gradients, *arguments):
        missing = len(flat._gradients) - len(gradients)
        return step(flat, [*gradients, *flat._gradients[len(gradients) :]] if missing else gradients, *arguments)

    monkeypatch.setattr(FlatParameters, "step", step_all)


def draw_a_random_number_more(monkeypatch):
    reset = PPOPlusRolloutBuffer.reset

    def reset_and_draw(buffer):
        reset(buffer)
        replays.th.rand(1)

    monkeypatch.setattr(PPOPlusRolloutBuffer, "reset", reset_and_draw)


HOOKED = {"seed": 0, "replay_after": 0, "changes": [["step", 12, "hook a forward pass", 0]]}
FROZEN = {"seed": 0, "learns": [[3, True]], "changes": [["start", 1, "freeze a parameter", 0]]}


@pytest.mark.parametrize(
    ("break_it", "configurations"),
    [
        (scale_value_loss, RANDOM),
        (clip_gradients_otherwise, RANDOM),
        (discount_otherwise, RANDOM),
        (bootstrap_nothing, RANDOM),
        (keep_the_first_learning_rate, RANDOM),
        (draw_a_random_number_more, RANDOM),
        (replay_past_hooks, [HOOKED]),
        (step_what_was_frozen, [FROZEN]),
    ],
)
def test_the_comparison_with_sb3_notices(break_it, configurations, monkeypatch):
    break_it(monkeypatch)
    assert any(map(difference_from_sb3, configurations))


def step_too_far(monkeypatch):
    updates = {kind: further(update) for kind, update in compiled_step.UPDATES.items()}
    monkeypatch.setattr(compiled_step, "UPDATES", updates)


def further(update):
    return lambda settings, parameters, gradient, state, rate: update(settings, parameters, gradient, state, rate * 1.1)


def keep_graphs_after_a_change(monkeypatch):
    monkeypatch.setattr("sb3_ppo_plus.fast.policy_functions.python_state", lambda policy: None)
    monkeypatch.setattr(PartsWatch, "has_changed", lambda watch, is_thorough=True: False)


def forget_timeouts(monkeypatch):
    monkeypatch.setattr(CompiledActor, "terminal_values", lambda actor, observations: np.zeros(len(observations)))


REPLACED = {"seed": 0, "changes": [["step", 12, "replace activations", 0]]}
TIMEOUTS = {"seed": 0, "max_steps": 2}


@pytest.mark.parametrize(
    ("break_it", "configuration"),
    [(step_too_far, TIMEOUTS), (keep_graphs_after_a_change, REPLACED), (forget_timeouts, TIMEOUTS)],
)
def test_the_comparison_with_eager_training_notices(break_it, configuration, monkeypatch):
    assert difference_of_compiled(configuration) is None
    break_it(monkeypatch)
    assert difference_of_compiled(configuration) is not None


def test_the_command_counts_what_agrees_and_prints_what_differs(monkeypatch, capsys):
    assert main(["--first", "0", "--count", "2"]) == 0
    assert capsys.readouterr().out == "2 agree\n"
    bootstrap_nothing(monkeypatch)
    configuration = "{'seed': 0, 'max_steps': 1}"
    assert main(["--run", configuration]) == 1
    printed = capsys.readouterr().out
    assert printed.startswith(f"{configuration}\nthe buffer's rewards")


def test_shrinking_keeps_what_makes_a_configuration_fail():
    def fails(configuration):
        settings, wrappers = configuration.get("settings", {}), configuration.get("wrappers", [])
        return "use_sde" in settings and "stack" in wrappers

    configuration = {
        "seed": 1,
        "n_envs": 2,
        "settings": {"use_sde": True, "gamma": 0.9},
        "wrappers": ["check", "stack"],
    }
    assert shrunk(configuration, fails) == {"seed": 1, "settings": {"use_sde": True}, "wrappers": ["stack"]}
