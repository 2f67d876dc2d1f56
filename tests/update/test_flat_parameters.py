"""Flat steps equal the steps of PyTorch's optimisers on the parameters themselves."""

import copy
import math

import pytest
import torch as th
from models import STEPS, build
from states import assert_same_bits, assert_same_training
from torch import nn
from torch.optim import SGD, Adam, AdamW, RMSprop

from sb3_ppo_plus.update.flat_parameters import FlatGroup, FlatParameters

OPTIMIZERS = {
    "Adam": (Adam, {}),
    "Adam, amsgrad": (Adam, {"amsgrad": True, "weight_decay": 0.1}),
    # Between the parameters 0 is divided by 0
    "Adam, eps=0": (Adam, {"eps": 0.0}),
    "AdamW": (AdamW, {"weight_decay": 0.1}),
    "SGD": (SGD, {}),
    "SGD with momentum": (SGD, {"momentum": 0.9, "dampening": 0.3}),
    "RMSprop": (RMSprop, {"centered": True, "momentum": 0.5}),
}
SHAPES = [(3, 5), (4,), (2, 16), ()]


class Pair:
    """Equal parameters and optimisers, twice: one steps flat, the other as PyTorch does.

    :param name: a key of OPTIMIZERS
    """

    def __init__(self, name):
        th.manual_seed(0)
        kind, settings = OPTIMIZERS[name]
        self.expected = [nn.Parameter(th.randn(shape)) for shape in SHAPES]
        self.parameters = copy.deepcopy(self.expected)
        self.reference = kind(self.expected, lr=0.1, **settings)
        self.optimizer = kind(self.parameters, lr=0.1, **settings)
        self.flat = FlatParameters(self.optimizer, self.parameters, [True] * len(SHAPES))

    def step_the_reference(self, gradients):
        for parameter, gradient in zip(self.expected, gradients, strict=True):
            parameter.grad = gradient.clone()
        self.reference.step()

    def write_gradients(self, gradients):
        (group,) = self.flat.groups
        for view, gradient in zip(group.gradients, gradients, strict=True):
            view.copy_(gradient)
        return group

    def assert_alike(self):
        for expected, parameter in zip(self.expected, self.parameters, strict=True):
            assert th.equal(expected, parameter)
        assert_same_bits(self.reference.state_dict(), self.optimizer.state_dict())


def random_gradients():
    return [th.randn(shape) for shape in SHAPES]


@pytest.fixture(params=OPTIMIZERS)
def pair(request):
    return Pair(request.param)


def test_flat_steps_equal_separate_steps(pair):
    for _ in range(3):
        pair.flat.borrow()
        for _ in range(2):
            gradients = random_gradients()
            # The norm is far below the limit
            pair.flat.step(gradients, 1e9, th.tensor(0.0))
            pair.step_the_reference(gradients)
        pair.flat.give_back()
        pair.assert_alike()
        for parameter, gradient in zip(pair.parameters, gradients, strict=True):
            assert th.equal(parameter.grad, gradient)


# Whether each of eight steps in three updates is allowed: not the first, nor two in a row, nor the last of an update
ALLOWED = [[False, True, True], [True, False, False], [True, False]]


@pytest.mark.parametrize("counts_on_device", [False, True], ids=["counter on the host", "counter on the device"])
@pytest.mark.parametrize("allowed", [ALLOWED, [[not a for a in update] for update in ALLOWED]], ids=["some", "others"])
def test_a_step_that_a_tensor_forbids_is_left_out(pair, allowed, counts_on_device):
    """The code for CUDA, called on the CPU: such a step changes no parameter, moment or counter."""
    for update in allowed:
        pair.flat.borrow()
        if counts_on_device:
            pair.flat.keep_steps_with_parameters()
        for is_allowed in update:
            gradients = random_gradients()
            group = pair.write_gradients(gradients)
            if not is_allowed:
                group.flat.grad.fill_(math.nan)
            group.step_where(th.tensor(is_allowed))
            if is_allowed:
                pair.step_the_reference(gradients)
        pair.flat.give_back()
        pair.assert_alike()


def test_the_step_counter_is_corrected_before_the_next_step():
    pair = Pair("Adam")
    pair.flat.borrow()
    counts = []
    for is_allowed in (True, False, True):
        group = pair.write_gradients(random_gradients())
        verdict = th.tensor(is_allowed)
        group.step_where(verdict)
        counts.append(group.state["step"].item())
    pair.flat.give_back()
    assert counts == [1.0, 2.0, 2.0]


def test_parameters_state_and_gradients_show_every_flat_step_at_once():
    pair = Pair("Adam")
    for update in range(2):
        pair.flat.borrow()
        for _ in range(2):
            gradients = random_gradients()
            pair.flat.step(gradients, 1e9, th.tensor(0.0))
            pair.step_the_reference(gradients)
            pair.assert_alike()
            for parameter, gradient in zip(pair.parameters, gradients, strict=True):
                assert th.equal(parameter.grad, gradient)
        assert len({p.untyped_storage().data_ptr() for p in pair.parameters}) == 1, f"not flat in update {update}"
        pair.flat.give_back()
        assert len({p.untyped_storage().data_ptr() for p in pair.parameters}) == len(SHAPES)


def test_without_a_step_gradients_are_not_changed():
    pair = Pair("Adam")
    pair.parameters[0].grad = kept = th.ones(SHAPES[0])
    pair.flat.borrow()
    pair.flat.give_back()
    assert pair.parameters[0].grad is kept and pair.parameters[1].grad is None
    assert not pair.optimizer.state


def test_giving_back_a_second_time_changes_nothing():
    pair = Pair("Adam")
    pair.flat.borrow()
    pair.flat.step(random_gradients(), 1e9, th.tensor(0.0))
    pair.flat.give_back()
    with th.no_grad():
        pair.parameters[0].zero_()
    pair.flat.give_back()
    assert not pair.parameters[0].any()


def test_a_parameter_without_a_gradient_from_the_loss_is_not_stepped():
    pair = Pair("AdamW")
    pair.parameters[1].grad = th.ones(SHAPES[1])
    flat = FlatParameters(pair.optimizer, pair.parameters, [True, False, True, True])
    flat.borrow()
    gradients = random_gradients()
    flat.step([gradients[0], gradients[2], gradients[3]], 1e9, th.tensor(0.0))
    flat.give_back()
    for index in (0, 2, 3):
        pair.expected[index].grad = gradients[index]
    pair.reference.step()
    pair.assert_alike()
    assert pair.parameters[1].grad is None


def new_shape(pair):
    pair.parameters[1].data = th.zeros(2)


def freeze(pair):
    pair.parameters[1].requires_grad_(False)


def count_one_anew(pair):
    pair.optimizer.state[pair.parameters[1]]["step"] = th.tensor(7.0)


def forget_one(pair):
    del pair.optimizer.state[pair.parameters[1]]


def regroup(pair):
    (group,) = pair.optimizer.param_groups
    pair.optimizer.add_param_group({**group, "params": [group["params"].pop()]})


@pytest.mark.parametrize("change", [new_shape, freeze, count_one_anew, forget_one, regroup])
def test_flat_parameters_no_longer_fit_after_a_change(change):
    pair = Pair("Adam")
    pair.flat.borrow()
    pair.flat.step(random_gradients(), 1e9, th.tensor(0.0))
    pair.flat.give_back()
    # New with the first step
    flat = FlatParameters(pair.optimizer, pair.parameters, [True] * len(SHAPES))
    assert flat.is_current(pair.optimizer, pair.parameters)
    change(pair)
    assert not flat.is_current(pair.optimizer, pair.parameters)


def new_memory(pair):
    pair.parameters[1].data = pair.parameters[1].data.clone()


def clear_state(pair):
    pair.optimizer.state.clear()


def load_state(pair):
    pair.optimizer.load_state_dict(copy.deepcopy(pair.optimizer.state_dict()))


@pytest.mark.parametrize("change", [new_memory, clear_state, load_state, regroup])
def test_a_replacement_during_an_update_is_noticed(change):
    pair = Pair("Adam")
    pair.flat.borrow()
    assert not pair.flat.was_touched(pair.optimizer)
    pair.flat.step(random_gradients(), 1e9, th.tensor(0.0))
    assert not pair.flat.was_touched(pair.optimizer)
    change(pair)
    assert pair.flat.was_touched(pair.optimizer)
    assert pair.flat.was_touched(Adam(pair.parameters))


def test_tensors_replaced_during_an_update_stay_after_it():
    pair = Pair("Adam")
    for _ in range(2):
        pair.flat.borrow()
        pair.flat.step(random_gradients(), 1e9, th.tensor(0.0))
        pair.parameters[0].data = data = th.ones(SHAPES[0])
        pair.optimizer.state[pair.parameters[1]]["exp_avg"] = moment = th.ones(SHAPES[1])
        pair.flat.give_back()
        assert pair.parameters[0].data_ptr() == data.data_ptr() and (data == 1.0).all()
        assert pair.optimizer.state[pair.parameters[1]]["exp_avg"] is moment and (moment == 1.0).all()


def test_flat_parameters_fit_no_other_optimizer_and_no_other_parameters():
    pair = Pair("Adam")
    assert pair.flat.is_current(pair.optimizer, pair.parameters)
    assert not pair.flat.is_current(Adam(pair.parameters), pair.parameters)
    assert not pair.flat.is_current(pair.optimizer, pair.parameters[:-1])
    assert not pair.flat.is_current(pair.optimizer, [*pair.parameters[:-1], nn.Parameter(th.zeros(()))])


def test_default_dtype_float64_leaves_parameters_float32():
    pair = Pair("Adam")
    th.set_default_dtype(th.float64)
    try:
        flat = FlatParameters(pair.optimizer, pair.parameters, [True] * len(SHAPES))
    finally:
        th.set_default_dtype(th.float32)
    flat.borrow()
    flat.step(random_gradients(), 1e9, th.tensor(0.0))
    flat.give_back()
    assert {parameter.dtype for parameter in pair.parameters} == {th.float32}


def test_a_copy_of_a_model_goes_on_as_the_model_does():
    model = build().learn(2 * STEPS)
    # What the policy remembers of the update has a gradient, and cannot be copied
    model.predict(model.observation_space.sample())
    copied = copy.deepcopy(model)
    memory = [parameter.data_ptr() for parameter in copied.policy.parameters()]
    for one in (model, copied):
        one.set_random_seed(0)
        one.learn(2 * STEPS, reset_num_timesteps=False)
    assert_same_training(model, copied)
    assert memory == [parameter.data_ptr() for parameter in copied.policy.parameters()]


def test_the_counter_of_steps_is_in_one_place_of_the_device_in_all_updates():
    # CUDA graphs are captured for this place. The device "meta" stands for a GPU
    parameter = th.nn.Parameter(th.zeros(3, device="meta"))
    group = FlatGroup(th.optim.Adam([parameter]), 0, [parameter])
    places = []
    for n_steps in (1.0, 5.0):
        group.state["step"] = th.tensor(n_steps)
        for _ in range(2):
            group.keep_step_with_parameters()
            places.append(group.state["step"])
    assert places[0].device.type == "meta" and all(place is places[0] for place in places)
