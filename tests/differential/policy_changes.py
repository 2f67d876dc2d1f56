"""Changes of the policy: its parameters, their gradients, its modules and its methods."""

import copy

import torch as th
from torch import nn
from torch.nn.utils import parametrizations, prune

from differential.changes import (
    ANYTIME,
    BETWEEN,
    END,
    NOT_AMID,
    START,
    change,
    has_batch_norm,
    layers_in_sequence,
    linear_of,
    parameter_of,
    sampled_observation,
)


def policy_copied(model):
    """A deep copy of the policy; with gSDE itself, whose noise carries a graph that nothing can copy."""
    if model.use_sde:
        return model.policy
    # As the last distribution may
    model.predict(sampled_observation(model, 0))
    return copy.deepcopy(model.policy)


# Parameters


@change(*ANYTIME)
def load_other_weights(run, number):
    state = run.model.policy.state_dict()
    run.model.policy.load_state_dict({name: value * 1.1 + 0.01 for name, value in state.items()})


@change(*ANYTIME)
def load_from_vector(run, number):
    if all(parameter.is_contiguous() for parameter in run.model.policy.parameters()):
        run.model.policy.load_from_vector(run.model.policy.parameters_to_vector() * 1.2)


@change(*ANYTIME)
def assign_data_of_a_parameter(run, number):
    _, _, parameter = parameter_of(run.model, number)
    parameter.data = parameter.data * 1.5


@change(*ANYTIME)
def assign_transposed_data(run, number):
    weight = linear_of(run.model, number).weight
    weight.data = weight.data.t().contiguous().t()


@change(*ANYTIME)
def add_in_place(run, number):
    _, _, parameter = parameter_of(run.model, number)
    with th.no_grad():
        parameter.add_(0.05)


@change(*ANYTIME)
def put_in_a_new_parameter(run, number):
    owner, name, parameter = parameter_of(run.model, number)
    if not hasattr(owner, "parametrizations") and type(owner).__name__ != "ParametrizationList":
        setattr(owner, name, nn.Parameter(parameter.detach() * 0.9))


@change(*ANYTIME)
def initialise_a_layer_again(run, number):
    linear_of(run.model, number).reset_parameters()


@change(*ANYTIME)
def share_memory(run, number):
    run.model.policy.share_memory()


@change(*ANYTIME)
def copy_the_policy(run, number):
    run.model.policy = policy_copied(run.model)


@change(*ANYTIME)
def store_a_copy_of_the_policy(run, number):
    run.kept = policy_copied(run.model)


@change(*ANYTIME)
def put_in_another_policy(run, number):
    policy = policy_copied(run.model)
    with th.no_grad():
        for parameter in policy.parameters():
            parameter.mul_(0.9)
    run.model.policy = policy


# Gradients


@change(*ANYTIME)
def freeze_a_parameter(run, number):
    _, _, parameter = parameter_of(run.model, number)
    parameter.requires_grad_(False)


@change(*ANYTIME)
def freeze_a_layer(run, number):
    layer = linear_of(run.model, number)
    layer.requires_grad_(False)
    layer.zero_grad()


@change(*ANYTIME)
def thaw_all(run, number):
    run.model.policy.requires_grad_(True)


@change(*ANYTIME)
def hook_a_gradient(run, number):
    _, _, parameter = parameter_of(run.model, number)
    if parameter.requires_grad:
        run.handles.append(parameter.register_hook(lambda gradient: gradient / 2))


@change(*ANYTIME)
def hook_an_accumulation(run, number):
    _, _, parameter = parameter_of(run.model, number)

    def clip(parameter):
        parameter.grad.clamp_(-0.01, 0.01)

    if parameter.requires_grad:
        run.handles.append(parameter.register_post_accumulate_grad_hook(clip))


@change(*ANYTIME)
def clear_gradients(run, number):
    run.model.policy.zero_grad(set_to_none=bool(number % 2))


@change(*ANYTIME)
def assign_gradients(run, number):
    for parameter in run.model.policy.parameters():
        parameter.grad = th.full_like(parameter, 0.01)


# Modules


@change(*ANYTIME)
def hook_a_forward_pass(run, number):
    layer = linear_of(run.model, number)
    run.handles.append(layer.register_forward_hook(lambda module, inputs, output: output * 1.1))


@change(*ANYTIME)
def hook_before_a_forward_pass(run, number):
    layer = linear_of(run.model, number)
    run.handles.append(layer.register_forward_pre_hook(lambda module, inputs: (inputs[0] * 0.9,)))


@change(*ANYTIME)
def hook_a_backward_pass(run, number):
    layer = linear_of(run.model, number)

    def halve(module, inputs, outputs):
        return tuple(None if gradient is None else gradient / 2 for gradient in inputs)

    run.handles.append(layer.register_full_backward_hook(halve))


@change(*ANYTIME)
def hook_the_policy(run, number):
    run.handles.append(run.model.policy.register_forward_hook(lambda module, inputs, output: output))


@change(*ANYTIME)
def hook_all_modules(run, number):
    def shrink(module, inputs, output):
        return output * 0.95 if isinstance(module, nn.Linear) else None

    def shrink_inputs(module, inputs):
        return (inputs[0] * 0.95,) if isinstance(module, nn.Linear) else None

    def halve(module, inputs, outputs):
        return tuple(None if gradient is None else gradient / 2 for gradient in inputs)

    register, hook = (
        (nn.modules.module.register_module_forward_hook, shrink),
        (nn.modules.module.register_module_forward_pre_hook, shrink_inputs),
        (nn.modules.module.register_module_full_backward_hook, halve),
    )[number % 3]
    handle = register(hook)
    run.handles.append(handle)
    run.undo(handle.remove)


@change(*ANYTIME)
def remove_hooks(run, number):
    for handle in run.handles:
        handle.remove()
    run.handles.clear()


@change(*ANYTIME)
def put_in_a_new_layer(run, number):
    sequence = layers_in_sequence(run.model, number)
    for index, layer in enumerate(sequence or ()):
        if type(layer) is nn.Linear:
            sequence[index] = nn.Linear(layer.in_features, layer.out_features, dtype=th.float32)
            return


@change(*ANYTIME)
def put_in_a_layer_that_learns(run, number):
    sequence = layers_in_sequence(run.model, number)
    for index, layer in enumerate(sequence or ()):
        if type(layer) is nn.Linear:
            sequence[index] = nn.Linear(layer.in_features, layer.out_features, dtype=th.float32)
            # The old parameters stay in the optimiser, as a user would leave them
            run.model.policy.optimizer.param_groups[0]["params"].extend(sequence[index].parameters())
            return


@change(*ANYTIME)
def replace_activations(run, number):
    for part in run.model.policy.modules():
        if isinstance(part, nn.Sequential):
            for index, layer in enumerate(part):
                if not list(layer.parameters()) and not isinstance(layer, nn.Flatten):
                    part[index] = (nn.ReLU, nn.ELU, nn.Softplus)[number % 3]()


@change(*ANYTIME)
def append_a_layer(run, number):
    sequence = layers_in_sequence(run.model, number)
    if sequence is not None:
        sequence.append((nn.Identity, nn.Tanh, nn.Dropout)[number % 3]())


@change(*ANYTIME)
def take_a_layer_out(run, number):
    sequence = layers_in_sequence(run.model, number)
    if sequence is not None and not list(sequence[-1].parameters()):
        sequence[-1] = nn.Identity()


@change(*ANYTIME)
def one_module_in_two_places(run, number):
    extractor = run.model.policy.mlp_extractor
    nets = [getattr(extractor, name, None) for name in ("policy_net", "value_net")]
    if all(isinstance(net, nn.Sequential) and len(net) for net in nets):
        first, second = nets[0][0], nets[1][0]
        if type(first) is type(second) is nn.Linear and first.weight.shape == second.weight.shape:
            nets[0][0] = second


@change(*ANYTIME)
def normalise_a_weight(run, number):
    layer = linear_of(run.model, number)
    parametrize = (parametrizations.weight_norm, parametrizations.spectral_norm)[number % 2]
    parametrize(layer, "weight")


@change(*ANYTIME)
def prune_a_weight(run, number):
    prune.l1_unstructured(linear_of(run.model, number), "weight", 0.3)


@change(*ANYTIME, compiled=NOT_AMID)
def set_attributes_of_modules(run, number):
    for part in run.model.policy.modules():
        for name, value in (("negative_slope", 0.3), ("alpha", 0.7), ("beta", 1.5), ("max_val", 0.6), ("p", 0.3)):
            if name in vars(part):
                setattr(part, name, value)


@change(*ANYTIME, compiled=NOT_AMID)
def set_training_mode_of_a_part(run, number):
    parts = [part for part in run.model.policy.modules() if not has_batch_norm(part)]
    parts[number % len(parts)].train(number % 2 == 0)


# Methods


@change(*ANYTIME)
def replace_the_forward_of_a_layer(run, number):
    layer = linear_of(run.model, number)
    layer.forward = lambda inputs: nn.functional.linear(inputs, layer.weight, layer.bias) * 1.2


@change(*ANYTIME, compiled=())
def patch_a_class(run, number):
    original = nn.Linear.forward

    def forward(self, inputs):
        return original(self, inputs) * 0.9

    nn.Linear.forward = forward
    run.undo(lambda: setattr(nn.Linear, "forward", original))


@change(*ANYTIME)
def wrap_a_method_of_the_policy(run, number):
    policy = run.model.policy
    name = ("forward", "evaluate_actions", "predict_values", "extract_features")[number % 4]
    original = getattr(policy, name)

    def wrapped(*arguments, **keywords):
        result = original(*arguments, **keywords)
        return result * 1.1 if isinstance(result, th.Tensor) else result

    setattr(policy, name, wrapped)


@change(*ANYTIME)
def wrap_a_method_of_the_distribution(run, number):
    distribution = run.model.policy.action_dist
    original = distribution.log_prob
    distribution.log_prob = lambda *arguments, **keywords: original(*arguments, **keywords) * 1.01


@change(*ANYTIME)
def copy_the_distribution(run, number):
    run.model.policy.action_dist = copy.copy(run.model.policy.action_dist)


@change(START, END, BETWEEN)
def wrap_the_optimisers_step(run, number):
    run.kept = th.optim.lr_scheduler.ConstantLR(run.model.policy.optimizer)
