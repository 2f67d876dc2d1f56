"""What PyTorch may rename at any time is looked up in one place, and the answer without it is the careful one."""

import ast
import re
from pathlib import Path

import pytest
import torch as th
from environments import SMALL_NET, make_env
from stable_baselines3 import PPO
from states import assert_same_training
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

import sb3_ppo_plus
from sb3_ppo_plus import PPOPlus, torch_private
from sb3_ppo_plus.fast import replays

PACKAGE = Path(sb3_ppo_plus.__file__).parent


@pytest.fixture
def parameters():
    return [th.nn.Parameter(th.ones(2)), th.nn.Parameter(th.ones(3))]


def test_hooks_on_gradients_are_seen(parameters):
    assert not torch_private.has_gradient_hooks(parameters)
    handle = parameters[1].register_hook(lambda gradient: gradient)
    assert torch_private.has_gradient_hooks(parameters)
    handle.remove()
    assert not torch_private.has_gradient_hooks(parameters)


def test_hooks_after_accumulation_are_seen(parameters):
    assert not torch_private.has_accumulation_hooks(parameters)
    parameters[1].register_post_accumulate_grad_hook(lambda parameter: None)
    assert torch_private.has_accumulation_hooks(parameters)
    assert not torch_private.has_gradient_hooks(parameters)


@pytest.mark.parametrize(
    "register",
    [
        lambda optimizer, hook: optimizer.register_step_pre_hook(hook),
        lambda optimizer, hook: optimizer.register_step_post_hook(hook),
        lambda _, hook: register_optimizer_step_pre_hook(hook),
        lambda _, hook: register_optimizer_step_post_hook(hook),
    ],
    ids=["before", "after", "before every optimiser's", "after every optimiser's"],
)
def test_hooks_on_steps_are_seen(parameters, register):
    optimizer = th.optim.Adam(parameters)
    assert not torch_private.has_step_hooks(optimizer)
    handle = register(optimizer, lambda *_: None)
    assert torch_private.has_step_hooks(optimizer)
    handle.remove()
    assert not torch_private.has_step_hooks(optimizer)


@pytest.mark.parametrize(
    ("constant", "gone", "ask"),
    [
        ("GRADIENT_HOOKS", "_gone", torch_private.has_gradient_hooks),
        ("ACCUMULATION_HOOKS", "_gone", torch_private.has_accumulation_hooks),
        ("STEP_HOOKS", ("_gone",), lambda parameters: torch_private.has_step_hooks(th.optim.Adam(parameters))),
        (
            "HOOKS_OF_ALL_OPTIMIZERS",
            ("_gone",),
            lambda parameters: torch_private.has_step_hooks(th.optim.Adam(parameters)),
        ),
    ],
)
def test_hooks_that_cannot_be_seen_are_taken_to_be_there(monkeypatch, parameters, constant, gone, ask):
    assert ask(parameters) is False
    monkeypatch.setattr(torch_private, constant, gone)
    assert ask(parameters) is True


def test_tensors_are_copied_and_measured_with_the_same_bits_one_by_one(monkeypatch):
    sources = [th.randn(7), th.randn(3, 5).t(), th.randn(())]
    copies, norms = [], []
    for is_gone in (False, True):
        if is_gone:
            monkeypatch.delattr(th, torch_private.FOREACH_COPY)
            monkeypatch.delattr(th, torch_private.FOREACH_NORM)
        targets = [th.zeros(7), th.zeros(5, 3), th.zeros(())]
        torch_private.copy_each(targets, sources)
        copies.append(targets)
        norms.append(torch_private.norm_of_each(targets))
    for expected, target in zip(sources, copies[1], strict=True):
        assert th.equal(expected, target)
    assert all(map(th.equal, *copies)) and all(map(th.equal, *norms))
    with pytest.raises(ValueError, match="zip"):
        torch_private.copy_each(targets, sources[:-1])


@pytest.mark.parametrize("name", [torch_private.DEFAULT_VALIDATION, "_gone"])
def test_the_default_of_validation_is_found_out(monkeypatch, name):
    monkeypatch.setattr(torch_private, "DEFAULT_VALIDATION", name)
    for value in (False, True):
        th.distributions.Distribution.set_default_validate_args(value)
        assert torch_private.default_validation() is value


# What PyTorch renames, and whether steps are flat without it. Under its old name PyTorch itself still needs it
GONE = {
    "_foreach_copy_": ("FOREACH_COPY", "_gone", True),
    "_foreach_norm": ("FOREACH_NORM", "_gone", True),
    "_backward_hooks": ("GRADIENT_HOOKS", "_gone", True),
    "_post_accumulate_grad_hooks": ("ACCUMULATION_HOOKS", "_gone", False),
    "_optimizer_step_pre_hooks": ("STEP_HOOKS", ("_gone", "_optimizer_step_post_hooks"), False),
    "_optimizer_step_post_hooks": ("STEP_HOOKS", ("_optimizer_step_pre_hooks", "_gone"), False),
    "_global_optimizer_pre_hooks": ("HOOKS_OF_ALL_OPTIMIZERS", ("_gone", "_global_optimizer_post_hooks"), False),
    "_global_optimizer_post_hooks": ("HOOKS_OF_ALL_OPTIMIZERS", ("_global_optimizer_pre_hooks", "_gone"), False),
    "_validate_args": ("DEFAULT_VALIDATION", "_gone", True),
}
SETTINGS = {"n_steps": 16, "batch_size": 8, "n_epochs": 2, "seed": 0, "device": "cpu", "policy_kwargs": SMALL_NET}


def trained(algorithm, **settings):
    return algorithm("MlpPolicy", make_env(2), **SETTINGS, **settings).learn(96)


@pytest.mark.parametrize(("constant", "name", "is_flat"), GONE.values(), ids=GONE)
def test_without_one_of_them_training_is_sb3s_to_the_bit(monkeypatch, constant, name, is_flat):
    monkeypatch.setattr(replays, "REPLAY_AFTER", 4)
    monkeypatch.setattr(torch_private, constant, name)
    sb3, ours = trained(PPO), trained(PPOPlus)
    assert_same_training(sb3, ours)
    assert (ours._execution.gradient_step.has_gradient is not None) is is_flat


@pytest.mark.parametrize(("constant", "name", "is_flat"), GONE.values(), ids=GONE)
@pytest.mark.usefixtures("graphs_without_code")
@pytest.mark.filterwarnings("ignore:compile=True")
def test_without_one_of_them_a_compiled_model_trains(monkeypatch, constant, name, is_flat):
    monkeypatch.setattr(torch_private, constant, name)
    eager, compiled = trained(PPO), trained(PPOPlus, compile=True)
    assert (compiled._execution.gradient_step.n_compilations > 0) is (is_flat and constant != "GRADIENT_HOOKS")
    pairs = zip(eager.policy.parameters(), compiled.policy.parameters(), strict=True)
    assert all(th.allclose(*pair, atol=2e-5) for pair in pairs)


def test_nothing_private_of_pytorch_is_imported_anywhere_else():
    private = re.compile(r"\btorch(\.\w+)*\._\w+|\bth(\.\w+)*\._[a-z]\w*")
    for path in PACKAGE.rglob("*.py"):
        if path.name == "torch_private.py":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom):
                used = [f"{node.module}.{alias.name}" for alias in node.names]
            elif isinstance(node, ast.Attribute):
                used = [ast.unparse(node)]
            else:
                continue
            for name in used:
                assert not private.search(name), f"{path.name} uses {name}"


def test_ends_of_episodes_are_counted_without_the_private_function(monkeypatch):
    monkeypatch.delattr(th._C, "_disabled_torch_function_impl")
    kind = type("Counted", (th.Tensor,), {"__torch_function__": torch_private.as_ordinary_tensor()})
    counted = th.tensor([True, False, True]).as_subclass(kind)
    assert (counted | counted).tolist() == [True, False, True] and int((counted & counted).sum()) == 2
