"""What users change in a model: its optimiser, and the optimiser's state; its parameters."""

import copy
from collections import defaultdict

import torch as th

# The optimiser's state and groups, loaded or replaced


def load_its_own_state(model):
    model.policy.optimizer.load_state_dict(model.policy.optimizer.state_dict())


def load_a_copy_of_its_state(model):
    model.policy.optimizer.load_state_dict(copy.deepcopy(model.policy.optimizer.state_dict()))


def set_its_own_parameters(model):
    model.set_parameters(model.get_parameters())


def set_a_copy_of_its_parameters(model):
    model.set_parameters(copy.deepcopy(model.get_parameters()))


def replace_the_list_of_groups(model):
    model.policy.optimizer.param_groups = [dict(group) for group in model.policy.optimizer.param_groups]


def replace_a_group(model):
    groups = model.policy.optimizer.param_groups
    groups[0] = dict(groups[0])


def clear_the_state(model):
    model.policy.optimizer.state.clear()


def replace_the_state(model):
    model.policy.optimizer.state = defaultdict(dict)


def forget_one_parameter(model):
    del model.policy.optimizer.state[model.policy.log_std]


def replace_an_entry(model):
    state = model.policy.optimizer.state
    state[model.policy.log_std] = {name: value.clone() for name, value in state[model.policy.log_std].items()}


def replace_a_moment(model):
    for entry in model.policy.optimizer.state.values():
        for name in entry.keys() - {"step"}:
            entry[name] = entry[name] * 0.5


def halve_a_moment_in_place(model):
    for entry in model.policy.optimizer.state.values():
        for name in entry.keys() - {"step"}:
            entry[name] *= 0.5


def reset_the_counters(model):
    for entry in model.policy.optimizer.state.values():
        entry["step"].zero_()


def reset_one_counter(model):
    model.policy.optimizer.state[model.policy.log_std]["step"] = th.tensor(1.0)


def add_a_group(model):
    model.policy.optimizer.add_param_group({"params": [th.nn.Parameter(th.ones(3))]})


def invert_gradients(optimizer, *_):
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad.neg_()


# Parameters


def layer(model):
    return model.policy.mlp_extractor.policy_net[2]


def freeze(model):
    layer(model).requires_grad_(not layer(model).weight.requires_grad)


def copy_data(model):
    for parameter in model.policy.parameters():
        parameter.data = parameter.data.clone()


def transpose_data(model):
    layer(model).weight.data = layer(model).weight.data.t()


def transpose_memory(model):
    # Its memory is read in another order
    weight = layer(model).weight
    weight.data = weight.data.as_strided((8, 8), (1, 8))


def shift_memory(model):
    vector = th.nn.utils.parameters_to_vector(model.policy.parameters())
    th.nn.utils.vector_to_parameters(vector * 0.5, model.policy.parameters())


def replace_a_parameter(model):
    # SB3's optimiser keeps the old parameter, which gets no gradient any more
    layer(model).weight = th.nn.Parameter(layer(model).weight.detach() * 0.5)


def clamp_in_place(model):
    # By ``data``, since autograd refuses a change that it sees before the backward pass
    with th.no_grad():
        for parameter in model.policy.parameters():
            parameter.data.clamp_(-0.1, 0.1)


def tie_parameters(model):
    model.policy.mlp_extractor.value_net[2].weight = layer(model).weight


def share_memory_of_parameters(model):
    model.policy.mlp_extractor.value_net[2].weight.data = layer(model).weight.data


def share_memory_with_a_buffer(model):
    model.policy.register_buffer("spare", model.policy.log_std.data)
