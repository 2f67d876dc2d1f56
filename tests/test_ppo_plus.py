"""The constructor, the rest of SB3's interface, and errors of PPOPlus."""

import inspect
import warnings

import gymnasium as gym
import numpy as np
import pytest
from environments import ACTION_SPACES, SMALL_DICT, SMALL_NET, make_env
from gymnasium import spaces
from models import SETTINGS, STEPS, assert_refused, build
from stable_baselines3 import PPO
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.vec_env import VecFrameStack, VecNormalize

import sb3_ppo_plus
from sb3_ppo_plus import PPOPlus

NAN, INF = float("nan"), float("inf")


# The constructor


def test_sb3s_parameters_come_first_with_their_names_order_and_defaults():
    sb3 = list(inspect.signature(PPO.__init__).parameters.values())
    ours = list(inspect.signature(PPOPlus.__init__).parameters.values())
    assert [(p.name, p.default, p.kind) for p in ours[: len(sb3)]] == [(p.name, p.default, p.kind) for p in sb3]


def test_our_parameters_are_keyword_only_with_the_documented_defaults():
    n_sb3 = len(inspect.signature(PPO.__init__).parameters)
    ours = list(inspect.signature(PPOPlus.__init__).parameters.values())[n_sb3:]
    assert all(parameter.kind is inspect.Parameter.KEYWORD_ONLY for parameter in ours)
    defaults = {parameter.name: parameter.default for parameter in ours}
    assert defaults.items() >= {"critic_learning_rate": None, "pessimistic_value_clip": True, "amp": False}.items()


@pytest.mark.parametrize("method", ["learn", "load", "predict", "save", "set_parameters", "get_parameters", "set_env"])
def test_methods_keep_sb3s_parameters(method):
    parameters = [inspect.signature(getattr(cls, method)).parameters.values() for cls in (PPO, PPOPlus)]
    # Keyword arguments of our own come before **kwargs
    sb3, ours = ([(p.name, p.kind) for p in each if p.kind != p.VAR_KEYWORD] for each in parameters)
    assert ours[: len(sb3)] == sb3
    learn = inspect.signature(PPOPlus.learn).parameters
    assert learn["tb_log_name"].default == "PPOPlus"


def test_arguments_are_documented():
    for name in ("critic_learning_rate", "pessimistic_value_clip", "amp"):
        assert f":param {name}:" in PPOPlus.__doc__


def test_the_environment_may_be_a_registered_id():
    model = PPOPlus("MlpPolicy", "CartPole-v1", n_steps=16, batch_size=16, n_epochs=1, device="cpu").learn(16)
    assert model.num_timesteps == 16
    env = gym.make("CartPole-v1")
    assert model.predict(env.reset(seed=0)[0])[0] in (0, 1)


def test_public_names_are_importable():
    for name in sb3_ppo_plus.__all__:
        assert getattr(sb3_ppo_plus, name) is not None
    extractors = ("Mlp", "Cnn", "MultiInput")
    assert set(PPOPlus.policy_aliases) == {f"{name}{memory}Policy" for name in extractors for memory in ("", "Lstm")}


# The rest of SB3's interface


@pytest.mark.parametrize("policy_kwargs", [{}, {"action_dist": "beta"}, {"action_dist": "squashed_gaussian"}], ids=str)
def test_evaluate_policy_runs_it(policy_kwargs):
    model = build(policy_kwargs=SMALL_NET | policy_kwargs)
    mean, std = evaluate_policy(model, make_env(), n_eval_episodes=3)
    assert np.isfinite([mean, std]).all()


def test_the_progress_bar_runs():
    build().learn(STEPS, progress_bar=True)


@pytest.mark.parametrize("n_envs", [1, 3])
def test_total_timesteps_are_sb3s(n_envs):
    models = [
        algorithm("MlpPolicy", make_env(n_envs), policy_kwargs=SMALL_NET, **SETTINGS).learn(50)
        for algorithm in (PPO, PPOPlus)
    ]
    assert models[0].num_timesteps == models[1].num_timesteps
    for model in models:
        model.learn(50, reset_num_timesteps=False)
    assert models[0].num_timesteps == models[1].num_timesteps


@pytest.mark.parametrize("action_dist", ["gaussian", "squashed_gaussian", "beta"])
def test_a_seed_makes_training_repeatable(action_dist):
    vectors = []
    for seed in (4, 4, 5):
        model = build(policy_kwargs=SMALL_NET | {"action_dist": action_dist}, ent_coef=0.01, seed=seed)
        vectors.append(model.learn(2 * STEPS).policy.parameters_to_vector())
    assert np.array_equal(vectors[0], vectors[1])
    assert not np.array_equal(vectors[0], vectors[2])


def test_verbose_early_stopping_is_announced_as_in_sb3(capsys):
    announced = []
    for algorithm in (PPO, PPOPlus):
        model = algorithm(
            "MlpPolicy", make_env(), policy_kwargs=SMALL_NET, **SETTINGS, verbose=1, target_kl=1e-3, learning_rate=1e-2
        )
        model.learn(STEPS)
        lines = capsys.readouterr().out.splitlines()
        announced.append([line for line in lines if line.startswith("Early stopping")])
    assert announced[0]
    assert announced[1] == announced[0]


# Bad input: the argument, its value and what is allowed, before any environment step


@pytest.mark.parametrize(
    ("name", "value", "allowed"),
    [
        ("action_dist", "gamma", ("gaussian", "squashed_gaussian", "beta")),
        ("features_extractor_class", "vit", ("transformer", "impala_cnn", "nature_cnn", "flatten", "combined")),
        ("optimizer_class", "lion", ("adam", "adamw", "sgd", "rmsprop")),
        ("activation_fn", "swish", ("tanh", "relu", "elu", "gelu", "leaky_relu", "silu")),
    ],
)
def test_unknown_names_are_refused(name, value, allowed):
    assert_refused(ValueError, name, repr(value), *allowed, policy_kwargs={name: value})


def test_unsuitable_arguments_of_distributions_and_extractors_are_refused():
    beta = {"action_dist": "beta"}
    median, mode = {"deterministic": "median"}, {"mode": True}
    allowed = ("deterministic", "'median'", "mean", "mode")
    assert_refused(ValueError, *allowed, policy_kwargs=beta | {"action_dist_kwargs": median})
    allowed = ("action_dist_kwargs", "'mode'", "deterministic")
    assert_refused(TypeError, *allowed, policy_kwargs=beta | {"action_dist_kwargs": mode})
    transformer = {"features_extractor_class": "transformer", "features_extractor_kwargs": {"seq_len": 2}}
    assert_refused(ValueError, "seq_len must divide the observation's size 3, got 2", policy_kwargs=transformer)
    assert_refused(TypeError, "nonsense", policy_kwargs={"nonsense": 1})


@pytest.mark.parametrize("name", ["discrete", "multi_discrete", "multi_binary"])
@pytest.mark.parametrize("action_dist", ["beta", "squashed_gaussian"])
def test_bounded_distributions_need_a_box(action_dist, name):
    env_kwargs = {"action_space": ACTION_SPACES[name]}
    patterns = (f'action_dist="{action_dist}"', "Box", str(ACTION_SPACES[name]), "gaussian")
    assert_refused(ValueError, *patterns, env_kwargs=env_kwargs, policy_kwargs={"action_dist": action_dist})


@pytest.mark.parametrize("low", [-INF, [-1.0, -INF]], ids=["both", "one"])
@pytest.mark.parametrize("action_dist", ["beta", "squashed_gaussian"])
def test_bounded_distributions_need_finite_bounds_and_say_what_to_do(action_dist, low):
    space = spaces.Box(np.broadcast_to(np.float32(low), 2), np.ones(2, np.float32))
    patterns = (f'action_dist="{action_dist}"', "finite bounds", str(space), "TransformAction", '"gaussian"')
    assert_refused(
        ValueError, *patterns, env_kwargs={"action_space": space}, policy_kwargs={"action_dist": action_dist}
    )


@pytest.mark.parametrize("action_dist", ["gamma", "beta", "squashed_gaussian"])
def test_a_bad_distribution_is_refused_for_an_env_given_by_its_id_too(action_dist):
    with pytest.raises(ValueError, match=rf"action_dist.*{action_dist}"):
        PPOPlus("MlpPolicy", "CartPole-v1", policy_kwargs={"action_dist": action_dist}, device="cpu")


def test_infinite_bounds_without_a_bounded_distribution_meet_sb3s_own_check():
    space = spaces.Box(-INF, INF, (2,), np.float32)
    assert_refused(AssertionError, "finite lower and upper bound", env_kwargs={"action_space": space})


@pytest.mark.parametrize("amp", ["fp16", "fp8", 16])
def test_bad_precisions_are_refused(amp):
    assert_refused(ValueError, "amp", repr(amp), "'bf16'", amp=amp)


def test_unknown_arguments_are_refused():
    assert_refused(TypeError, "critic_lr", critic_lr=1e-3)


def test_sb3s_own_checks_stay():
    assert_refused(AssertionError, "`batch_size` must be greater than 1", batch_size=1)
    assert_refused(AssertionError, "`n_steps * n_envs` must be greater than 1", n_steps=1)
    assert_refused(ValueError, "MultiInputPolicy", env_kwargs={"observation_space": SMALL_DICT})
    assert_refused(ValueError, "continuous actions", env_kwargs={"action_space": spaces.Discrete(2)}, use_sde=True)
    assert_refused(ValueError, "unknown", "Policy", policy="LstmPolicy")
    with pytest.warns(UserWarning, match="truncated mini-batch of size 2"):
        build(n_steps=32, batch_size=30)


def test_normalising_outside_the_frame_stack_warns_for_a_transformer_only():
    kwargs = {"features_extractor_class": "transformer", "features_extractor_kwargs": {"seq_len": 2}}
    with pytest.warns(UserWarning, match="VecNormalize wraps VecFrameStack"):
        build(VecNormalize(VecFrameStack(make_env(), 2)), policy_kwargs=kwargs)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        build(VecFrameStack(VecNormalize(make_env()), 2), policy_kwargs=kwargs)
        build(VecNormalize(VecFrameStack(make_env(), 2)))
