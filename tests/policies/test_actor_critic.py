import copy
import inspect
import typing

import numpy as np
import pytest
import torch as th
from environments import ACTION_SPACES, ASYMMETRIC, BOX, CHANNEL_FIRST, IMAGE, SMALL_DICT, SMALL_NET, make_env, toy_envs
from gymnasium import spaces
from models import SETTINGS, build
from stable_baselines3.common.distributions import StateDependentNoiseDistribution
from stable_baselines3.common.policies import ActorCriticCnnPolicy, ActorCriticPolicy, MultiInputActorCriticPolicy
from stable_baselines3.common.torch_layers import CombinedExtractor, FlattenExtractor, NatureCNN
from torch import nn

from sb3_ppo_plus import (
    CnnPolicy,
    ImpalaCNN,
    MlpPolicy,
    MultiInputExtractor,
    MultiInputPolicy,
    PPOPlus,
    TransformerExtractor,
    policies,
)
from sb3_ppo_plus.policies.bounded_distributions import BetaDistribution, SquashedGaussianDistribution
from sb3_ppo_plus.policies.lean_distributions import LeanDiagGaussianDistribution
from sb3_ppo_plus.policies.names import resolve_policy_kwargs

OBSERVATIONS = np.random.default_rng(0).uniform(-1, 1, (20, 3)).astype(np.float32)
FRAMES = spaces.Box(-1, 1, (4, 3), np.float32)


def make(policy_class=MlpPolicy, observation_space=BOX, action_space=ASYMMETRIC, **kwargs):
    return policy_class(observation_space, action_space, lambda progress: 1e-3, **SMALL_NET | kwargs)


def learn(policy="MlpPolicy", env=None, **policy_kwargs):
    return build(env, policy, SMALL_NET | policy_kwargs, n_steps=16, n_epochs=1).learn(32)


# Which class is used


@pytest.mark.parametrize(
    ("given", "observation_space", "ours"),
    [
        ("MlpPolicy", BOX, MlpPolicy),
        (ActorCriticPolicy, BOX, MlpPolicy),
        (MlpPolicy, BOX, MlpPolicy),
        ("CnnPolicy", IMAGE, CnnPolicy),
        (ActorCriticCnnPolicy, IMAGE, CnnPolicy),
        ("MultiInputPolicy", SMALL_DICT, MultiInputPolicy),
        (MultiInputActorCriticPolicy, SMALL_DICT, MultiInputPolicy),
    ],
)
def test_policy_names_and_sb3s_policy_classes_give_our_classes(given, observation_space, ours):
    model = PPOPlus(given, make_env(observation_space=observation_space), **SETTINGS)
    assert type(model.policy) is ours
    assert isinstance(model.policy, ActorCriticPolicy)


def test_a_users_own_policy_class_is_used_unchanged():
    class Own(ActorCriticPolicy):
        pass

    assert type(PPOPlus(Own, make_env(), **SETTINGS).policy) is Own


@pytest.mark.parametrize(
    ("policy_class", "observation_space", "extractor"),
    [
        (MlpPolicy, BOX, FlattenExtractor),
        (CnnPolicy, CHANNEL_FIRST, NatureCNN),
        (MultiInputPolicy, SMALL_DICT, CombinedExtractor),
    ],
)
def test_default_extractors_are_sb3s(policy_class, observation_space, extractor):
    assert type(make(policy_class, observation_space).features_extractor) is extractor


@pytest.mark.parametrize(
    ("kwargs", "distribution"),
    [
        ({}, LeanDiagGaussianDistribution),
        ({"action_dist": "gaussian"}, LeanDiagGaussianDistribution),
        ({"use_sde": True}, StateDependentNoiseDistribution),
        ({"action_dist": "squashed_gaussian"}, SquashedGaussianDistribution),
        ({"action_dist": "beta"}, BetaDistribution),
    ],
    ids=str,
)
def test_action_dist_chooses_the_distribution(kwargs, distribution):
    assert type(make(**kwargs).action_dist) is distribution


@pytest.mark.parametrize(
    "action_space", [ACTION_SPACES[name] for name in ("discrete", "multi_discrete", "multi_binary")]
)
def test_with_gaussian_other_action_spaces_get_sb3s_distributions(action_space):
    ours = make(action_space=action_space, action_dist="gaussian")
    # Ours may be a subclass of SB3's class, to which masks can be applied
    assert isinstance(ours.action_dist, type(make(ActorCriticPolicy, action_space=action_space).action_dist))


# What a policy computes


@pytest.mark.parametrize("share", [True, False], ids=["shared", "separate"])
@pytest.mark.parametrize("action_space", ACTION_SPACES.values(), ids=ACTION_SPACES)
def test_forward_and_evaluate_actions_equal_sb3s(action_space, share):
    sb3 = make(ActorCriticPolicy, action_space=action_space, share_features_extractor=share)
    ours = make(action_space=action_space, share_features_extractor=share)
    ours.load_state_dict(sb3.state_dict())
    results = []
    for policy in (sb3, ours):
        th.manual_seed(0)
        observations = th.as_tensor(OBSERVATIONS)
        actions, values, log_prob = policy(observations)
        results.append([actions, values, log_prob, *policy.evaluate_actions(observations, actions)])
    for expected, actual in zip(*results, strict=True):
        assert th.equal(actual, expected)


@pytest.mark.parametrize("name", ["gaussian", "squashed_gaussian", "beta"])
def test_evaluate_actions_gives_what_forward_returned(name):
    policy = make(action_dist=name)
    observations = th.as_tensor(OBSERVATIONS)
    actions, values, log_prob = policy(observations)
    again, log_prob_again, entropy = policy.evaluate_actions(observations, actions)
    assert actions.shape == (20, 2)
    assert values.shape == again.shape == (20, 1)
    assert log_prob.shape == log_prob_again.shape == entropy.shape == (20,)
    th.testing.assert_close(again, values)
    th.testing.assert_close(log_prob_again, log_prob, atol=1e-5, rtol=1e-5)
    distribution = policy.get_distribution(observations)
    th.testing.assert_close(distribution.log_prob(actions), log_prob, atol=1e-5, rtol=1e-5)
    th.testing.assert_close(policy.predict_values(observations), values)


# Units of actions


@pytest.mark.parametrize(
    ("name", "stored", "expected"),
    [
        ("beta", [[0.0, 1.0], [0.5, 0.25]], [[-0.5, 2.5], [1.25, 2.125]]),
        ("squashed_gaussian", [[-50.0, 50.0], [0.0, np.arctanh(-0.5)]], [[-0.5, 2.5], [1.25, 2.125]]),
    ],
)
def test_stored_actions_become_actions_in_the_envs_units(name, stored, expected):
    policy = make(action_dist=name)
    assert policy.squash_output
    actions = policy.unscale_action(np.array(stored, np.float32))
    np.testing.assert_allclose(actions, expected, rtol=1e-6)
    assert actions.dtype == np.float32
    assert all(ASYMMETRIC.contains(action) for action in actions)


def test_unscaled_actions_stay_within_the_bounds_despite_rounding():
    box = spaces.Box(np.array([0.1, -0.3], np.float32), np.array([0.7, 1.1], np.float32))
    policy = make(action_space=box, use_sde=True, squash_output=True)
    ends = np.array([[-1.0, -1.0], [1.0, 1.0], [1.0 + 1e-6, -1.0 - 1e-6]], np.float32)
    assert all(box.contains(action) for action in policy.unscale_action(ends))
    np.testing.assert_allclose(policy.unscale_action(ends[:2]), [box.low, box.high], rtol=1e-6)


def test_gaussian_actions_are_not_squashed_unless_gsde_squashes_them():
    assert not make().squash_output
    assert make(use_sde=True, squash_output=True).squash_output


@pytest.mark.parametrize("name", ["gaussian", "squashed_gaussian", "beta"])
def test_predict_returns_actions_in_the_envs_units(name):
    model = learn(action_dist=name)
    with th.no_grad():
        model.policy.action_net.weight.mul_(1000)
    for deterministic in (True, False):
        actions, state = model.predict(OBSERVATIONS, deterministic=deterministic)
        assert state is None
        assert actions.shape == (20, 2)
        assert all(ASYMMETRIC.contains(action) for action in actions)
        single, _ = model.predict(OBSERVATIONS[0], deterministic=deterministic)
        assert ASYMMETRIC.contains(single)
    # The actions reach both bounds of both dimensions, which stored actions could not
    actions, _ = model.predict(np.repeat(OBSERVATIONS, 50, axis=0))
    np.testing.assert_allclose(actions.min(axis=0), ASYMMETRIC.low, atol=0.05)
    np.testing.assert_allclose(actions.max(axis=0), ASYMMETRIC.high, atol=0.05)


def test_a_deterministic_action_of_beta_is_its_mean_or_its_mode():
    alpha, beta = 3.0, 2.0
    actions = {}
    for kind in ("mean", "mode"):
        policy = make(action_dist="beta", action_dist_kwargs={"deterministic": kind})
        with th.no_grad():
            policy.action_net.weight.zero_()
            # softplus(log(e^x - 1)) = x, and alpha = 1 + softplus
            policy.action_net.bias.copy_(th.log(th.expm1(th.tensor([alpha, alpha, beta, beta]) - 1)))
        actions[kind], _ = policy.predict(OBSERVATIONS[0], deterministic=True)
    width = ASYMMETRIC.high - ASYMMETRIC.low
    np.testing.assert_allclose(actions["mean"], ASYMMETRIC.low + width * alpha / (alpha + beta), rtol=1e-5)
    mode = (alpha - 1) / (alpha + beta - 2)
    np.testing.assert_allclose(actions["mode"], ASYMMETRIC.low + width * mode, rtol=1e-5)
    assert make(action_dist="beta").action_dist.deterministic == "mean"


def test_deterministic_actions_repeat_and_sampled_ones_do_not():
    for name in ("squashed_gaussian", "beta"):
        policy = make(action_dist=name)
        first, second = (policy.predict(OBSERVATIONS, deterministic=True)[0] for _ in range(2))
        assert np.array_equal(first, second)
        first, second = (policy.predict(OBSERVATIONS)[0] for _ in range(2))
        assert not np.array_equal(first, second)


# Arguments


def test_registered_names_become_classes_and_classes_stay():
    given = {
        "features_extractor_class": "transformer",
        "activation_fn": "elu",
        "optimizer_class": "rmsprop",
        "ortho_init": False,
    }
    kept = dict(given)
    assert resolve_policy_kwargs(MlpPolicy, given, BOX) == {
        "features_extractor_class": TransformerExtractor,
        "activation_fn": nn.ELU,
        "optimizer_class": th.optim.RMSprop,
        "ortho_init": False,
    }
    assert given == kept
    classes = {"features_extractor_class": NatureCNN, "activation_fn": nn.Tanh, "optimizer_class": th.optim.Adam}
    assert resolve_policy_kwargs(MlpPolicy, classes, BOX) == classes


NAMES = {
    "activation_fn": {
        "tanh": nn.Tanh,
        "relu": nn.ReLU,
        "elu": nn.ELU,
        "gelu": nn.GELU,
        "leaky_relu": nn.LeakyReLU,
        "silu": nn.SiLU,
    },
    "optimizer_class": {
        "adam": th.optim.Adam,
        "adamw": th.optim.AdamW,
        "sgd": th.optim.SGD,
        "rmsprop": th.optim.RMSprop,
    },
    "features_extractor_class": {
        "transformer": TransformerExtractor,
        "impala_cnn": ImpalaCNN,
        "nature_cnn": NatureCNN,
        "flatten": FlattenExtractor,
        "combined": MultiInputExtractor,
    },
}


@pytest.mark.parametrize(("argument", "name"), [(argument, name) for argument in NAMES for name in NAMES[argument]])
def test_each_registered_name_stands_for_its_class(argument, name):
    assert resolve_policy_kwargs(ActorCriticPolicy, {argument: name}, BOX) == {argument: NAMES[argument][name]}


@pytest.mark.parametrize("argument", ["activation_fn", "optimizer_class", "features_extractor_class"])
def test_unknown_names_are_refused_with_the_allowed_ones(argument):
    with pytest.raises(ValueError, match=rf"{argument}.*'swish'") as error:
        resolve_policy_kwargs(MlpPolicy, {argument: "swish"}, BOX)
    assert all(name in str(error.value) for name in NAMES[argument])


@pytest.mark.parametrize("argument", ["activation_fn", "optimizer_class", "features_extractor_class"])
@pytest.mark.parametrize("value", [3, int, None], ids=str)
def test_a_value_that_is_neither_a_name_nor_a_class_is_refused(argument, value):
    with pytest.raises(TypeError, match=argument):
        resolve_policy_kwargs(MlpPolicy, {argument: value}, BOX)


@pytest.mark.parametrize("argument", ["action_dist", "action_dist_kwargs"])
def test_a_policy_class_that_lacks_an_argument_of_ours_says_so(argument):
    class Own(ActorCriticPolicy):
        pass

    env = make_env()
    with pytest.raises(TypeError, match=rf"Own has no {argument}.*ActorCriticPlusPolicy"):
        PPOPlus(Own, env, policy_kwargs={argument: "gaussian" if argument == "action_dist" else {}}, **SETTINGS)
    assert toy_envs(env)[0].calls["step"] == 0


def test_a_subclass_of_ours_takes_every_argument():
    class Own(MlpPolicy):
        pass

    assert isinstance(learn(Own, action_dist="beta").policy.action_dist, BetaDistribution)


@pytest.mark.parametrize("name", ["squashed_gaussian", "beta"])
def test_gsde_needs_the_gaussian(name):
    with pytest.raises(ValueError, match=rf"use_sde=True.*'gaussian'.*{name}"):
        make(action_dist=name, use_sde=True)


# Extractors by name, in the whole policy


@pytest.mark.parametrize("share", [True, False], ids=["shared", "separate"])
@pytest.mark.parametrize(
    ("policy", "observation_space", "name", "extractor"),
    [
        ("MlpPolicy", FRAMES, "transformer", TransformerExtractor),
        ("CnnPolicy", IMAGE, "impala_cnn", ImpalaCNN),
        ("CnnPolicy", IMAGE, "nature_cnn", NatureCNN),
        ("MlpPolicy", IMAGE, "nature_cnn", NatureCNN),
        ("MlpPolicy", BOX, "flatten", FlattenExtractor),
        ("MultiInputPolicy", SMALL_DICT, "combined", MultiInputExtractor),
    ],
)
def test_extractors_by_name_train(policy, observation_space, name, extractor, share):
    env = make_env(observation_space=observation_space)
    model = learn(policy, env, share_features_extractor=share, features_extractor_class=name)
    assert type(model.policy.pi_features_extractor) is extractor
    assert (model.policy.pi_features_extractor is model.policy.vf_features_extractor) is share
    assert model.policy_kwargs["features_extractor_class"] == name


def test_no_hidden_layers_follow_impala_unless_asked_for():
    space = spaces.Box(0, 255, (1, 9, 9), np.uint8)
    arguments = (space, ASYMMETRIC, lambda progress: 1e-3)
    assert CnnPolicy(*arguments, features_extractor_class=ImpalaCNN).net_arch == []
    assert CnnPolicy(*arguments, features_extractor_class=ImpalaCNN, net_arch=[8]).net_arch == [8]


def test_impala_takes_images_that_are_scaled_already():
    env = make_env(observation_space=spaces.Box(0.0, 1.0, (1, 9, 9), np.float32))
    learn("CnnPolicy", env, features_extractor_class="impala_cnn", normalize_images=False)


# Where they are defined


# By their own names, as some have two
POLICY_CLASSES = {value.__name__: value for value in vars(policies).values() if isinstance(value, type)}


@pytest.mark.parametrize("name", POLICY_CLASSES)
def test_inspect_finds_the_source_and_typing_the_types_of_every_policy_class(name):
    assert inspect.getsource(POLICY_CLASSES[name]).startswith(f"class {name}(")
    assert "default_features_extractor_class" in typing.get_type_hints(POLICY_CLASSES[name])


# Copies


@pytest.mark.parametrize("name", ["gaussian", "squashed_gaussian", "beta"])
def test_a_policys_constructor_arguments_are_saved_with_it(name, tmp_path):
    kwargs = {"action_dist_kwargs": {"deterministic": "mode"}} if name == "beta" else {}
    policy = make(action_dist=name, activation_fn=nn.ELU, **kwargs)
    policy.save(tmp_path / "policy.pth")
    loaded = MlpPolicy.load(tmp_path / "policy.pth", device="cpu")
    assert type(loaded.action_dist) is type(policy.action_dist)
    assert loaded.activation_fn is nn.ELU
    assert getattr(loaded.action_dist, "deterministic", None) == kwargs.get("action_dist_kwargs", {}).get(
        "deterministic"
    )
    expected, _ = policy.predict(OBSERVATIONS, deterministic=True)
    assert np.array_equal(loaded.predict(OBSERVATIONS, deterministic=True)[0], expected)


def test_load_from_vector_is_the_inverse_of_parameters_to_vector():
    model, other = learn(), learn()
    vector = model.policy.parameters_to_vector()
    other.policy.load_from_vector(vector * 2)
    assert np.array_equal(other.policy.parameters_to_vector(), vector * 2)
    before = copy.deepcopy(other.policy.state_dict())
    other.learn(16)
    assert any(not th.equal(value, before[name]) for name, value in other.policy.state_dict().items())
