import numpy as np
import pytest
from environments import SMALL_NET, make_env

from sb3_ppo_plus import PPOPlus

INTEGERS = ["n_steps", "batch_size", "n_epochs", "sde_sample_freq", "stats_window_size", "seed"]
NUMBERS = ["gamma", "gae_lambda", "max_grad_norm", "target_kl"]
FLAGS = ["normalize_advantage", "use_sde", "pessimistic_value_clip"]
OTHERS = ["policy_kwargs", "rollout_buffer_kwargs", "rollout_buffer_class"]


def build(**settings):
    return PPOPlus(settings.pop("policy", "MlpPolicy"), make_env(), **{"policy_kwargs": SMALL_NET} | settings)


@pytest.mark.parametrize("value", [b"1", [1], object(), 1j])
@pytest.mark.parametrize("name", [*INTEGERS, *NUMBERS, *FLAGS, *OTHERS, "policy"])
def test_an_argument_of_another_type_is_named(name, value):
    with pytest.raises(TypeError, match=f"{name} must be"):
        build(**{name: value})


@pytest.mark.parametrize("name", [*INTEGERS, *NUMBERS])
def test_a_bool_is_no_number(name):
    with pytest.raises(TypeError, match=f"{name} must be"):
        build(**{name: True})


@pytest.mark.parametrize("name", [*INTEGERS, *NUMBERS])
def test_a_string_is_no_number(name):
    with pytest.raises(TypeError, match=f"{name} must be"):
        build(**{name: "1"})


@pytest.mark.parametrize("name", INTEGERS)
def test_a_float_is_no_integer(name):
    with pytest.raises(TypeError, match=f"{name} must be an int"):
        build(**{name: 64.0})


@pytest.mark.parametrize("value", [int, dict, PPOPlus])
def test_a_rollout_buffer_class_is_one(value):
    with pytest.raises(TypeError, match="rollout_buffer_class must be a subclass of RolloutBuffer"):
        build(rollout_buffer_class=value)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("n_epochs", 0),
        ("n_epochs", -1),
        ("stats_window_size", 0),
        ("seed", -1),
        ("seed", 2**32),
        ("gamma", 1.01),
        ("gamma", float("nan")),
        ("gae_lambda", -0.1),
        ("max_grad_norm", -1.0),
        ("max_grad_norm", float("nan")),
        ("target_kl", 0),
    ],
)
def test_a_value_out_of_range_is_named(name, value):
    with pytest.raises(ValueError, match=f"{name} must be .*got {value}"):
        build(**{name: value})


@pytest.mark.parametrize("name", ["n_steps", "batch_size"])
def test_where_advantages_are_not_normalised_one_step_and_one_transition_are_the_least(name):
    settings = {"n_steps": 1, "batch_size": 1, "normalize_advantage": False}
    build(**settings).learn(1)
    with pytest.raises(ValueError, match=f"{name} must be at least 1, got 0"):
        build(**settings | {name: 0})


@pytest.mark.parametrize(
    "settings",
    [
        {"n_steps": np.int64(64), "gamma": np.float32(0.9), "seed": 1},
        {"gamma": 1, "gae_lambda": 0, "max_grad_norm": 0},
        {"normalize_advantage": np.bool_(False), "batch_size": 16, "n_steps": 16},
    ],
)
def test_numbers_of_numpy_and_the_edges_of_a_range_are_taken(settings):
    build(**settings)
