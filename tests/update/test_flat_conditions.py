"""Steps are flat where nothing would be missed, and a reason is given where something would."""

import functools

import pytest
import torch as th
from environments import make_env
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from torch.optim.optimizer import register_optimizer_step_post_hook

from sb3_ppo_plus import MlpPolicy, PPOPlus
from sb3_ppo_plus.update.flat_conditions import FLATTENED_OPTIMIZERS, obstacle_to_flat_steps

POLICY_KWARGS = {"net_arch": [8]}


def make_policy(optimizer_class=th.optim.Adam):
    env = make_env()
    return MlpPolicy(
        env.observation_space, env.action_space, lambda _: 1e-3, optimizer_class=optimizer_class, **POLICY_KWARGS
    )


def obstacle(policy):
    return obstacle_to_flat_steps(policy, policy.optimizer, list(policy.parameters()))


@pytest.mark.parametrize("optimizer_class", FLATTENED_OPTIMIZERS)
def test_there_is_no_obstacle_by_default(optimizer_class):
    policy = make_policy(optimizer_class)
    assert obstacle(policy) is None
    sum(parameter.sum() for parameter in policy.parameters()).backward()
    policy.optimizer.step()
    assert obstacle(policy) is None


@pytest.mark.parametrize("optimizer_class", FLATTENED_OPTIMIZERS)
def test_by_default_steps_are_flat(optimizer_class):
    kwargs = POLICY_KWARGS | {"optimizer_class": optimizer_class}
    model = PPOPlus("MlpPolicy", make_env(), n_steps=16, batch_size=8, device="cpu", policy_kwargs=kwargs).learn(32)
    assert model._execution.gradient_step.has_gradient == [True] * len(list(model.policy.parameters()))


def wrap_on_class(policy, monkeypatch):
    step = th.optim.Adam.step

    @functools.wraps(step)
    def wrapped(self, *arguments):
        return step(self, *arguments)

    monkeypatch.setattr(th.optim.Adam, "step", wrapped)


def hook_on_every_step(policy, monkeypatch):
    handle = register_optimizer_step_post_hook(lambda *_: None)
    monkeypatch.callback = handle.remove


def spoil_the_state(name, value):
    def spoil(policy, monkeypatch):
        policy.optimizer.state[policy.log_std][name] = value

    return spoil


class OwnParameter(nn.Parameter):
    pass


OBSTACLES = {
    "another optimizer": (
        lambda policy, _: setattr(policy, "optimizer", th.optim.NAdam(policy.parameters())),
        "NAdam has no flat form",
    ),
    "a subclass": (
        lambda policy, _: setattr(policy.optimizer, "__class__", type("Own", (th.optim.Adam,), {})),
        "Own has no flat form",
    ),
    "a parameter outside": (
        lambda policy, _: policy.optimizer.add_param_group({"params": [nn.Parameter(th.ones(2))]}),
        "exactly the policy's parameters",
    ),
    "a new parameter inside": (
        lambda policy, _: policy.register_parameter("new", nn.Parameter(th.ones(2))),
        "exactly the policy's parameters",
    ),
    "a scheduler": (lambda policy, _: LambdaLR(policy.optimizer, lambda _: 1.0), "a method of Adam"),
    "a wrapped step": (wrap_on_class, "a method of Adam"),
    "zero_grad": (lambda policy, _: setattr(policy.optimizer, "zero_grad", lambda: None), "a method of Adam"),
    "zero_grad of the class": (
        lambda _, monkeypatch: monkeypatch.setattr(th.optim.Optimizer, "zero_grad", lambda self: None),
        "a method of Adam",
    ),
    "clipping": (
        lambda _, monkeypatch: monkeypatch.setattr(th.nn.utils, "clip_grad_norm_", lambda *_: th.tensor(0.0)),
        "the clipping of gradients was replaced",
    ),
    "a hook on the step": (
        lambda policy, _: policy.optimizer.register_step_pre_hook(lambda *_: None),
        "a hook on Adam's step",
    ),
    "a hook on every step": (hook_on_every_step, "a hook on Adam's step"),
    "a hook after accumulation": (
        lambda policy, _: policy.log_std.register_post_accumulate_grad_hook(lambda _: None),
        "or on a parameter",
    ),
    "doubles": (lambda policy, _: policy.double(), "plain, aligned float32"),
    "another kind of parameter": (
        lambda policy, _: setattr(policy.log_std, "__class__", OwnParameter),
        "plain, aligned float32",
    ),
    "shared with processes": (lambda policy, _: policy.share_memory(), "memory of its own"),
    "no alignment": (
        lambda policy, _: setattr(policy.log_std, "data", th.zeros(3)[1:]),
        "memory of its own",
    ),
    "one memory": (
        lambda policy, _: setattr(policy.value_net.bias, "data", policy.action_net.bias.data[:1]),
        "share their memory",
    ),
    "overlapping memory": (
        lambda policy, _: setattr(policy.value_net.bias, "data", policy.action_net.weight.data.view(-1)[:1]),
        "share their memory",
    ),
    "a buffer": (
        lambda policy, _: policy.register_buffer("spare", policy.action_net.weight.detach()[1]),
        "share their memory",
    ),
    "an attribute": (
        lambda policy, _: setattr(policy.action_net, "spare", policy.value_net.weight.detach().t()),
        "share their memory",
    ),
    "a counter that is no tensor": (spoil_the_state("step", 3), "the state of Adam"),
    "a moment in double": (spoil_the_state("exp_avg", th.zeros(2, dtype=th.float64)), "the state of Adam"),
    "a moment of another shape": (spoil_the_state("exp_avg", th.zeros(1)), "the state of Adam"),
}


@pytest.mark.parametrize(("change", "reason"), OBSTACLES.values(), ids=OBSTACLES)
def test_an_obstacle_is_named(change, reason, monkeypatch):
    policy = make_policy()
    assert obstacle(policy) is None
    monkeypatch.callback = None
    try:
        change(policy, monkeypatch)
        assert reason in obstacle(policy)
    finally:
        if monkeypatch.callback is not None:
            monkeypatch.callback()


def test_neighbours_in_memory_and_tensors_without_memory_are_no_obstacle():
    policy = make_policy()
    memory = th.zeros(64)
    policy.log_std.data = memory[:2]
    policy.value_net.bias.data = memory[16:17]
    policy.register_buffer("empty", memory[:0])
    policy.register_buffer("sparse", th.eye(3).to_sparse())
    policy.action_net.constant = th.ones(2)
    assert obstacle(policy) is None
