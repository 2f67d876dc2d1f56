"""PyTorch may drop any of its private things: training goes on with the same bits, at worst more slowly."""

import sys
import warnings

import pytest
import torch as th
from environments import SMALL_NET, make_env
from stable_baselines3 import PPO
from stable_baselines3.common.callbacks import BaseCallback
from states import assert_same_training

from sb3_ppo_plus import PPOPlus, torch_private
from sb3_ppo_plus.fast import graphs, replays

SETTINGS = {"n_steps": 16, "batch_size": 16, "n_epochs": 3, "seed": 3, "device": "cpu"}
STEPS = 32 * 3
MEMORY = {"memory": "lstm", "memory_kwargs": {"hidden_size": 4}}


@pytest.fixture(autouse=True)
def replayed_at_once(monkeypatch):
    monkeypatch.setattr(replays, "REPLAY_AFTER", 2)


def train(algorithm=PPOPlus, policy_kwargs=SMALL_NET, callback=None, **settings):
    model = algorithm("MlpPolicy", make_env(2), policy_kwargs=policy_kwargs, **SETTINGS | settings)
    return model.learn(STEPS, callback)


def without_module(monkeypatch, name):
    package, _, last = name.rpartition(".")
    monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delattr(sys.modules[package], last, raising=False)


def renamed(constant):
    """As if PyTorch had another name for what torch_private knows by this one; PyTorch itself cannot do without."""

    def take_away(monkeypatch):
        known = getattr(torch_private, constant)
        gone = "_gone" if isinstance(known, str) else ("_gone",) * len(known)
        monkeypatch.setattr(torch_private, constant, gone)

    return take_away


# How each is taken away, and whether a compiled model then runs something eagerly
PRIVATE = {
    "hooks of parameters": (renamed("GRADIENT_HOOKS"), True),
    "hooks of gradients that were added up": (renamed("ACCUMULATION_HOOKS"), True),
    "hooks of an optimiser": (renamed("STEP_HOOKS"), True),
    "hooks of all optimisers": (renamed("HOOKS_OF_ALL_OPTIMIZERS"), True),
    "forward hooks": (renamed("FORWARD_HOOKS"), True),
    "backward hooks": (renamed("BACKWARD_HOOKS"), True),
    "hooks of all modules": (renamed("HOOKS_OF_ALL_MODULES"), True),
    "the contents of modules": (renamed("CONTENTS"), True),
    "modes of functions": (renamed("FUNCTION_MODES"), True),
    "their number": (renamed("COUNT_OF_FUNCTION_MODES"), True),
    "a way to do without modes": (renamed("NO_FUNCTION_MODES"), False),
    "the module of default devices": (renamed("DEVICE_MODES"), False),
    "versions": (renamed("VERSION"), False),
    "_foreach_copy_": (renamed("FOREACH_COPY"), False),
    "_foreach_norm": (renamed("FOREACH_NORM"), False),
    "_validate_args": (renamed("DEFAULT_VALIDATION"), False),
    "_create_graph_by_tracing": (lambda patch: patch.delattr(th._C, "_create_graph_by_tracing"), False),
    "_create_function_from_graph": (lambda patch: patch.delattr(th._C, "_create_function_from_graph"), False),
    "make_fx": (lambda patch: without_module(patch, "torch.fx.experimental.proxy_tensor"), True),
    "_pytree": (lambda patch: without_module(patch, "torch.utils._pytree"), False),
}


@pytest.fixture(scope="module")
def sb3():
    return train(PPO)


@pytest.fixture(scope="module")
def with_memory():
    return train(policy_kwargs=SMALL_NET | MEMORY)


def assert_close(model, other):
    for expected, actual in zip(other.policy.parameters(), model.policy.parameters(), strict=True):
        th.testing.assert_close(actual, expected, atol=2e-6, rtol=1e-4)


@pytest.mark.parametrize("what", PRIVATE)
def test_training_has_sb3s_bits_without(what, monkeypatch, sb3, with_memory):
    PRIVATE[what][0](monkeypatch)
    assert_same_training(sb3, train())
    assert_same_training(with_memory, train(policy_kwargs=SMALL_NET | MEMORY))


@pytest.mark.parametrize("what", PRIVATE)
@pytest.mark.usefixtures("graphs_without_code")
def test_compiled_training_goes_on_with_at_most_one_warning_without(what, monkeypatch, sb3):
    take_away, is_eager = PRIVATE[what]
    take_away(monkeypatch)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = train(compile=True)
    assert len([one for one in caught if "compile=True" in str(one.message)]) == is_eager
    assert_close(model, sb3)


class FillLogStd(BaseCallback):
    def _on_step(self):
        with th.no_grad():
            self.model.policy.log_std.fill_(-0.01 * self.n_calls)
        return True


@pytest.mark.usefixtures("graphs_without_code")
def test_without_versions_changes_in_place_count_at_the_next_step(monkeypatch):
    renamed("VERSION")(monkeypatch)
    sb3 = train(PPO, callback=FillLogStd())
    assert_close(train(compile=True, callback=FillLogStd()), sb3)


@pytest.mark.parametrize(
    "name", ["torch._inductor.compile_fx", "torch._functorch.config", "torch.fx.experimental.proxy_tensor"]
)
def test_without_a_compiler_all_is_eager_after_one_warning(name, monkeypatch, sb3):
    without_module(monkeypatch, name)
    with pytest.warns(UserWarning, match="compile=True: .* could not be compiled") as caught:
        model = train(compile=True)
    assert len([one for one in caught if "compile=True" in str(one.message)]) == 1
    execution = model._execution
    assert execution.compiled_actor.has_given_up and execution.gradient_step.n_compilations == 0
    assert_close(model, sb3)


def test_options_of_a_compiler_that_is_gone_are_not_checked(monkeypatch):
    assert graphs.inductor_options({"mode": "max-autotune"})
    with pytest.raises(ValueError, match="no_such_option"):
        graphs.inductor_options({"no_such_option": 1})
    monkeypatch.setattr(torch_private, "INDUCTOR", "_gone")
    assert graphs.inductor_options({"mode": "max-autotune"}) == {}
    assert graphs.inductor_options({"no_such_option": 1}) == {"no_such_option": 1}
