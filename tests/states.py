"""States of models and environments: taking them, comparing them to the bit, writing and reading them."""

import json

import numpy as np
import torch as th

from sb3_ppo_plus.env_states.plain_state import PlainStateReader, PlainStateWriter


def state_of(model):
    """Everything that invariant 1 compares, flattened to name -> value."""
    state = {f"policy.{name}": value for name, value in model.policy.state_dict().items()}
    for source, optimizer in (
        ("optimizer", model.policy.optimizer.state_dict()),
        ("get_parameters", model.get_parameters()["policy.optimizer"]),
    ):
        for index, entries in optimizer["state"].items():
            state |= {f"{source}.state.{index}.{name}": value for name, value in entries.items()}
        for index, group in enumerate(optimizer["param_groups"]):
            state |= {f"{source}.group.{index}.{name}": value for name, value in group.items()}
    return state | {"num_timesteps": model.num_timesteps, "n_updates": model._n_updates}


def assert_same_training(first, second, learning_rates=True):
    """All that invariant 1 compares is finite and the same in two models.

    :param learning_rates: False leaves those of the optimisers out
    """
    states = [
        {name: value for name, value in state_of(model).items() if learning_rates or not name.endswith(".lr")}
        for model in (first, second)
    ]
    for name, value in states[0].items():
        if isinstance(value, th.Tensor):
            # torch.equal calls nan unequal, and a nan here would hide everything
            assert th.isfinite(value).all(), f"{name} is not finite: the case proves nothing"
    assert_same_bits(*states)


def assert_same_bits(value, other, name=""):
    """Two values, and all that is in them, have the same types and bits."""
    assert type(value) is type(other), name
    if isinstance(value, dict):
        assert value.keys() == other.keys(), name
        for key in value:
            assert_same_bits(value[key], other[key], f"{name}.{key}")
    elif isinstance(value, list | tuple):
        assert len(value) == len(other), name
        for index, (item, other_item) in enumerate(zip(value, other, strict=True)):
            assert_same_bits(item, other_item, f"{name}[{index}]")
    elif isinstance(value, th.Tensor):
        assert value.dtype == other.dtype, name
        assert th.equal(value, other), f"{name} differs"
    else:
        np.testing.assert_array_equal(value, other, name, strict=True)


def encoded(state):
    """The JSON of a state, and the bytes of its arrays."""
    writer = PlainStateWriter()
    return writer.encode(state), writer.arrays()


def written_and_read(state):
    """What a file makes of a state."""
    text, arrays = encoded(state)
    return PlainStateReader(arrays).build(json.loads(json.dumps(text)))
