import copy
import math
import pickle
from functools import partial

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from hypothesis import given
from hypothesis import strategies as st
from stable_baselines3.common.distributions import CategoricalDistribution, DiagGaussianDistribution, kl_divergence
from stable_baselines3.common.policies import ActorCriticPolicy

from sb3_ppo_plus.policies.bounded_distributions import (
    ACTION_DISTRIBUTIONS,
    BetaDistribution,
    SquashedGaussianDistribution,
    make_action_distribution,
)
from sb3_ppo_plus.zoo import hyperparams as zoo_hyperparams

# Both distributions


@pytest.fixture(params=["squashed_gaussian", "beta"])
def name(request):
    return request.param


def make(name, dim=1, **kwargs):
    return make_action_distribution(spaces.Box(-1, 1, (dim,)), name, kwargs)


@st.composite
def bounds(draw):
    width = draw(st.sampled_from([32, 64]))
    largest = float(np.finfo(f"float{width}").max)
    number = st.floats(-largest, largest, width=width) | st.floats(-1, 1, width=width)
    pairs = [sorted((draw(number), draw(number))) for _ in range(3)]
    return np.array(pairs, dtype=f"float{width}").T


@pytest.mark.parametrize("kind", ["squashed_gaussian", "beta"])
@given(
    bounds=bounds(), stored=st.lists(st.floats(-1e6, 1e6, width=32) | st.floats(0, 1, width=32), min_size=6, max_size=6)
)
def test_actions_never_leave_the_bounds(kind, bounds, stored):
    low, high = bounds
    with np.errstate(over="raise", invalid="raise"):
        actions = make(kind, 3).to_bounds(np.array(stored, dtype=np.float32).reshape(2, 3), low, high)
    assert actions.dtype == low.dtype
    assert actions.shape == (2, 3)
    assert (actions >= low).all() and (actions <= high).all()


def test_rounding_does_not_step_over_a_bound(name):
    edge = np.full(1000, 0.1) + np.arange(1000) * 1e-3
    stored = np.linspace(-1, 1, 1000, dtype=np.float32) if name == "squashed_gaussian" else np.linspace(0, 1, 1000)
    # Equal bounds show the rounding of the weights
    np.testing.assert_array_equal(make(name).to_bounds(stored, edge, edge), edge)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_the_widest_bounds_do_not_overflow(name, dtype):
    low, high = np.array([-np.finfo(dtype).max]), np.array([np.finfo(dtype).max])
    middle = np.array([[0.0 if name == "squashed_gaussian" else 0.5]], dtype=np.float32)
    assert make(name).to_bounds(middle, low, high).tolist() == [[0.0]]


@pytest.mark.parametrize(
    ("kind", "stored", "expected"),
    [
        ("squashed_gaussian", [-1e4, 0.0, 1e4, math.atanh(0.5)], [-1.0, 1.0, 3.0, 2.0]),
        ("beta", [0.0, 0.5, 1.0, 0.75], [-1.0, 1.0, 3.0, 2.0]),
    ],
)
def test_stored_actions_map_affinely_to_asymmetric_bounds(kind, stored, expected):
    space = spaces.Box(-1.0, 3.0, (4,), dtype=np.float32)
    actions = make_action_distribution(space, kind).to_bounds(np.array([stored], np.float32), space.low, space.high)
    np.testing.assert_allclose(actions, [expected], rtol=1e-6)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_bounds_per_dimension_and_boxes_of_several_dimensions(name, dtype):
    low = np.array([[-1, 0, 5], [-1e-6, -1e6, 2]], dtype=dtype)
    space = spaces.Box(low, np.array([[1, 1e-3, 6], [1e-6, 3, 2]], dtype=dtype), dtype=dtype)
    dist = make_action_distribution(space, name)
    net, log_std = dist.proba_distribution_net(4)
    stored = dist.proba_distribution(net(th.randn(50, 4)), log_std).sample().detach().reshape(-1, *space.shape)
    actions = dist.to_bounds(stored.numpy(), space.low, space.high)
    assert actions.shape == (50, 2, 3)
    assert all(space.contains(action) for action in actions)


def test_half_precision_inputs_are_computed_in_float32(name):
    dist = make(name, 2)
    outputs = th.randn(5, 4 if name == "beta" else 2).bfloat16()
    dist.proba_distribution(outputs, th.zeros(2).bfloat16())
    actions = dist.sample()
    half, single = dist.log_prob(actions), dist.proba_distribution(outputs.float(), th.zeros(2)).log_prob(actions)
    assert actions.dtype == half.dtype == dist.entropy().dtype == dist.mode().dtype == th.float32
    assert th.equal(half, single)


@pytest.mark.parametrize("twin", [copy.copy, copy.deepcopy, lambda dist: pickle.loads(pickle.dumps(dist))])
def test_copies_and_pickles_act_like_the_original(name, twin):
    dist = make(name, 2, **({"deterministic": "mode"} if name == "beta" else {"entropy_samples": 3}))
    for original in (dist, copy.copy(dist).proba_distribution(th.ones(3, 4 if name == "beta" else 2), th.zeros(2))):
        copied = twin(original)
        assert type(copied) is type(original)
        for one in (original, copied):
            one.proba_distribution(th.ones(3, 4 if name == "beta" else 2), th.zeros(2))
        actions = th.full((3, 2), 0.4)
        assert th.equal(copied.log_prob(actions), original.log_prob(actions))
        assert th.equal(copied.mode(), original.mode())


def test_a_traced_function_that_copies_a_distribution_is_one_graph_and_does_not_change_the_original(name):
    dist = make(name, 2)

    def losses(outputs, log_std, actions, noise):
        fresh = copy.copy(dist).proba_distribution(outputs, log_std)
        entropy = fresh.entropy(noise) if isinstance(fresh, SquashedGaussianDistribution) else fresh.entropy()
        return (fresh.log_prob(actions) + entropy).sum()

    th.manual_seed(0)
    inputs = th.randn(5, 4 if name == "beta" else 2), th.zeros(2), th.rand(5, 2), th.randn(1, 5, 2)
    traced = th.compile(th.func.grad_and_value(losses), backend="aot_eager", fullgraph=True)
    for ours, expected in zip(traced(*inputs), th.func.grad_and_value(losses)(*inputs), strict=True):
        th.testing.assert_close(ours, expected)
    assert not hasattr(dist, "distribution")


def test_sb3s_policy_builds_and_uses_bounded_distributions(name):
    space = spaces.Box(np.array([-2.0, 0.0], np.float32), np.array([1.0, 5.0], np.float32))
    policy = ActorCriticPolicy(spaces.Box(-1, 1, (3,)), space, lambda _: 3e-4)
    policy.action_dist = make_action_distribution(space, name)
    policy._build(lambda _: 3e-4)
    observations = th.randn(64, 3)
    actions, _, log_prob = policy(observations)
    _, recomputed, entropy = policy.evaluate_actions(observations, actions)
    assert actions.shape == (64, 2)
    assert entropy.shape == (64,)
    th.testing.assert_close(recomputed, log_prob, rtol=0, atol=1e-5)
    assert ("log_std" in policy.state_dict()) == (name == "squashed_gaussian")
    (recomputed + entropy).mean().backward()
    assert all(p.grad.isfinite().all() for p in policy.action_net.parameters())


def test_sb3s_kl_divergence_accepts_bounded_distributions(name):
    def ours(scale):
        outputs = scale * th.ones(4, 4 if name == "beta" else 2)
        return make(name, 2).proba_distribution(outputs, th.zeros(2))

    assert (kl_divergence(ours(1.0), ours(1.0)).abs() < 1e-6).all()
    assert (kl_divergence(ours(1.0), ours(2.0)) > 1e-3).all()


# Distributions by name


@pytest.mark.parametrize(
    ("kind", "kwargs", "expected"),
    [
        ("gaussian", None, DiagGaussianDistribution),
        ("squashed_gaussian", {"entropy_samples": 2}, SquashedGaussianDistribution),
        ("beta", {"deterministic": "mode"}, BetaDistribution),
    ],
)
def test_a_name_gives_its_class_for_the_flattened_box(kind, kwargs, expected):
    dist = make_action_distribution(spaces.Box(-1, 1, (2, 3)), kind, kwargs)
    assert type(dist) is expected
    assert dist.action_dim == 6
    for key, value in (kwargs or {}).items():
        assert getattr(dist, key) == value


def test_with_gaussian_other_spaces_and_infinite_bounds_get_sb3s_distributions():
    assert type(make_action_distribution(spaces.Discrete(3), "gaussian")) is CategoricalDistribution
    assert type(make_action_distribution(spaces.Box(-np.inf, np.inf, (2,)), "gaussian")) is DiagGaussianDistribution


@pytest.mark.parametrize("bad", ["Beta", "normal", "", None, ["beta"]])
def test_an_unknown_name_is_refused_with_the_allowed_ones(bad):
    with pytest.raises(
        ValueError, match='action_dist must be one of "gaussian", "squashed_gaussian", "beta"'
    ) as caught:
        make_action_distribution(spaces.Box(-1, 1, (2,)), bad)
    assert repr(bad) in str(caught.value)


@pytest.mark.parametrize(
    "space",
    [
        spaces.Discrete(3),
        spaces.MultiDiscrete([2, 3]),
        spaces.MultiBinary(2),
        spaces.Box(0, 255, (2,), dtype=np.uint8),
    ],
    ids=str,
)
def test_spaces_other_than_a_box_of_real_numbers_are_refused(name, space):
    with pytest.raises(
        ValueError, match=f'action_dist="{name}" needs a Box action space.*use action_dist="gaussian"'
    ) as e:
        make_action_distribution(space, name)
    assert str(space) in str(e.value)


@pytest.mark.parametrize(
    "space",
    [
        spaces.Box(-np.inf, np.inf, (2,)),
        spaces.Box(-np.inf, 1, (2,)),
        spaces.Box(np.float32([0, 0]), np.float32([1, np.inf])),
    ],
)
def test_infinite_bounds_are_refused_with_the_space_and_the_remedy(name, space):
    message = f'action_dist="{name}" needs finite bounds.*TransformAction.*or use action_dist="gaussian"'
    with pytest.raises(ValueError, match=message) as caught:
        make_action_distribution(space, name)
    assert str(space) in str(caught.value)


def test_the_wrapper_that_the_error_proposes_gives_finite_bounds(name):
    env = gym.make("Pendulum-v1").unwrapped
    env.action_space = spaces.Box(-np.inf, np.inf, (1,))
    remedied = gym.wrappers.TransformAction(
        env, lambda action: action, gym.spaces.Box(np.float32([-2]), np.float32([2]))
    )
    assert make_action_distribution(remedied.action_space, name).action_dim == 1


@pytest.mark.parametrize(
    ("kind", "allowed"), [("gaussian", "nothing"), ("squashed_gaussian", "entropy_samples"), ("beta", "deterministic")]
)
def test_unknown_keywords_are_refused_with_what_is_allowed(kind, allowed):
    make = partial(make_action_distribution, spaces.Box(-1, 1, (2,)), kind)
    with pytest.raises(TypeError, match=f"action_dist=\"{kind}\" may hold {allowed}, got 'epsilon'"):
        make({"epsilon": 1})
    with pytest.raises(TypeError, match="got 'action_dim'"):
        make({"action_dim": 1})


def test_a_class_of_the_table_that_is_not_bounded_is_refused_and_not_replaced(monkeypatch):
    class Laplace(DiagGaussianDistribution):
        pass

    monkeypatch.setitem(ACTION_DISTRIBUTIONS, "laplace", Laplace)
    with pytest.raises(TypeError, match='action_dist="laplace": Laplace must be a subclass of BoundedDistribution'):
        make_action_distribution(spaces.Box(-1, 1, (2,)), "laplace")


def test_the_zoo_samples_every_distribution():
    assert set(zoo_hyperparams._ACTION_DISTS) == ACTION_DISTRIBUTIONS.keys()
