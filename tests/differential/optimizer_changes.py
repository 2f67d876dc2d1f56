"""Changes of the optimiser: its state, its groups, its hooks, and itself."""

import copy

import torch as th
from torch.optim.optimizer import register_optimizer_step_pre_hook

from differential.changes import ANYTIME, change


@change(*ANYTIME)
def load_the_optimizers_state(run, number):
    optimizer = run.model.policy.optimizer
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))


@change(*ANYTIME)
def set_the_same_parameters(run, number):
    run.model.set_parameters(copy.deepcopy(run.model.get_parameters()))


@change(*ANYTIME)
def clear_the_optimizers_state(run, number):
    run.model.policy.optimizer.state.clear()


@change(*ANYTIME)
def scale_the_optimizers_state(run, number):
    with th.no_grad():
        for state in run.model.policy.optimizer.state.values():
            for name, value in state.items():
                if isinstance(value, th.Tensor) and name != "step":
                    value.mul_(0.5)


@change(*ANYTIME)
def replace_the_optimizers_state(run, number):
    for state in run.model.policy.optimizer.state.values():
        for name, value in state.items():
            if isinstance(value, th.Tensor):
                state[name] = value.clone()


@change(*ANYTIME)
def step_by_hand(run, number):
    for parameter in run.model.policy.parameters():
        parameter.grad = th.full_like(parameter, 0.1)
    run.model.policy.optimizer.step()


@change(*ANYTIME)
def set_settings_of_groups(run, number):
    settings = [{"weight_decay": 0.2}, {"betas": (0.5, 0.9)}, {"momentum": 0.3, "nesterov": False}, {"eps": 1e-4}]
    settings += [{"maximize": True}, {"foreach": True}, {"alpha": 0.8}, {"lr": 0.1}]
    for group in run.model.policy.optimizer.param_groups:
        group.update({name: value for name, value in settings[number % len(settings)].items() if name in group})


@change(*ANYTIME)
def replace_the_optimizer(run, number):
    # Compiled training is compared to rounding, of which a small eps makes steps
    kinds = ((th.optim.Adam, {"eps": 1e-5}), (th.optim.SGD, {}), (th.optim.AdamW, {"eps": 1e-5}))
    optimizer_class, settings = kinds[number % len(kinds)]
    run.model.policy.optimizer = optimizer_class(run.model.policy.parameters(), lr=1e-3, **settings)


@change(*ANYTIME)
def let_the_optimizer_have_fewer_parameters(run, number):
    parameters = list(run.model.policy.parameters())
    run.model.policy.optimizer = th.optim.Adam(parameters[: 1 + number % len(parameters)], lr=1e-3, eps=1e-5)


@change(*ANYTIME)
def hook_the_optimizer_after_a_step(run, number):
    def shrink(*_):
        with th.no_grad():
            for parameter in run.model.policy.parameters():
                parameter.mul_(0.999)

    run.handles.append(run.model.policy.optimizer.register_step_post_hook(shrink))


@change(*ANYTIME)
def hook_the_optimizer_before_a_step(run, number):
    def halve(optimizer, *_):
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.grad.mul_(0.5)

    run.handles.append(run.model.policy.optimizer.register_step_pre_hook(halve))


@change(*ANYTIME)
def let_a_hook_change_the_learning_rate(run, number):
    def shrink(optimizer, *_):
        for group in optimizer.param_groups:
            group["lr"] *= 0.9

    run.handles.append(run.model.policy.optimizer.register_step_post_hook(shrink))


@change(*ANYTIME)
def let_a_gradient_hook_replace_the_optimizers_state(run, number):
    optimizer = run.model.policy.optimizer

    def load(gradient):
        optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        return gradient

    parameter = next(run.model.policy.parameters())
    if parameter.requires_grad:
        run.handles.append(parameter.register_hook(load))


@change(*ANYTIME)
def hook_all_optimizers(run, number):
    def halve(optimizer, *_):
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.grad.mul_(0.5)

    handle = register_optimizer_step_pre_hook(halve)
    run.handles.append(handle)
    run.undo(handle.remove)
