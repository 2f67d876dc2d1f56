"""Invariant 1: by default, after any number of updates, everything that was trained equals SB3's PPO bit for bit."""

import numpy as np
import pytest
import torch as th
from custom_parts import (
    CustomPolicy,
    HalfOptimized,
    NoisyExtractor,
    PartlyFrozenPolicy,
    ScaledAdvantages,
    ScaledDictAdvantages,
    SometimesUsed,
    TwoGroups,
    UnshuffledBuffer,
)
from environments import ACTION_SPACES, BOX, DICT, IMAGE, SMALL_DICT, ToyEnv, make_env
from gymnasium import spaces
from stable_baselines3.common.buffers import RolloutBuffer
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.policies import ActorCriticPolicy, MultiInputActorCriticPolicy
from stable_baselines3.common.utils import LinearSchedule
from stable_baselines3.common.vec_env import SubprocVecEnv, VecFrameStack, VecNormalize
from states import assert_same_training
from torch import nn
from trained_alike import SETTINGS, UPDATES, assert_trains_alike, policy_kwargs, train

from sb3_ppo_plus import Constant, Cosine, Exponential, Linear, PPOPlus, WarmupCosine

pytestmark = [
    pytest.mark.filterwarnings("ignore:You have specified a mini-batch size"),
    pytest.mark.usefixtures("replayed_after_a_while"),
]


# Spaces


@pytest.mark.parametrize("n_envs", [1, 3])
@pytest.mark.parametrize("action_space", ACTION_SPACES.values(), ids=ACTION_SPACES)
def test_action_spaces(action_space, n_envs):
    assert_trains_alike(env=lambda: make_env(n_envs, action_space=action_space), ent_coef=0.01)


@pytest.mark.parametrize(
    "action_space",
    [spaces.Box(-1.0, 1.0, (2,), np.float64), spaces.Box(-1.0, 1.0, (2, 2), np.float32)],
    ids=["float64", "matrix"],
)
def test_uncommon_boxes_of_actions(action_space):
    assert_trains_alike(env=lambda: make_env(2, action_space=action_space))


@pytest.mark.parametrize(
    "observation_space",
    [
        BOX,
        spaces.Box(-1.0, 1.0, (3,), np.float64),
        spaces.Box(-1.0, 1.0, (1,), np.float32),
        spaces.Box(-1.0, 1.0, (2, 3), np.float32),
        spaces.Discrete(5),
        spaces.MultiDiscrete([3, 4, 2]),
        spaces.MultiBinary(4),
        IMAGE,
    ],
    ids=["float32", "float64", "one number", "matrix", "discrete", "multi_discrete", "multi_binary", "image"],
)
def test_observation_spaces_of_mlp_policy(observation_space):
    assert_trains_alike(env=lambda: make_env(2, observation_space=observation_space))


@pytest.mark.parametrize("action_space", ACTION_SPACES.values(), ids=ACTION_SPACES)
def test_dict_observations(action_space):
    assert_trains_alike(
        "MultiInputPolicy", lambda: make_env(2, observation_space=SMALL_DICT, action_space=action_space)
    )


@pytest.mark.parametrize("share", [True, False], ids=["shared", "separate"])
def test_dict_observations_with_an_image(share):
    assert_trains_alike(
        "MultiInputPolicy",
        lambda: make_env(observation_space=DICT),
        n_steps=12,
        batch_size=6,
        n_epochs=2,
        **policy_kwargs(features_extractor_kwargs={"cnn_output_dim": 8}, share_features_extractor=share),
    )


@pytest.mark.parametrize("share", [True, False], ids=["shared", "separate"])
def test_images(share):
    assert_trains_alike(
        "CnnPolicy",
        lambda: make_env(2, observation_space=IMAGE, action_space=spaces.Discrete(3)),
        n_steps=8,
        batch_size=8,
        n_epochs=2,
        policy_kwargs={"features_extractor_kwargs": {"features_dim": 16}, "share_features_extractor": share},
    )


# gSDE


@pytest.mark.parametrize("sde_sample_freq", [-1, 4])
@pytest.mark.parametrize(
    "kwargs",
    [{}, {"use_expln": True}, {"full_std": False}, {"squash_output": True}, {"log_std_init": -2.0}],
    ids=["plain", "use_expln", "full_std=False", "squash_output", "log_std_init"],
)
def test_gsde(kwargs, sde_sample_freq):
    assert_trains_alike(
        env=lambda: make_env(2),
        use_sde=True,
        sde_sample_freq=sde_sample_freq,
        ent_coef=0.01,
        **policy_kwargs(**kwargs),
    )


# Environments


@pytest.mark.parametrize("norm", [{}, {"norm_reward": False}, {"norm_obs": False}], ids=["both", "obs", "reward"])
def test_vec_normalize(norm):
    sb3, ours = assert_trains_alike(env=lambda: VecNormalize(make_env(2), **norm))
    for name in ("obs_rms", "ret_rms"):
        if getattr(sb3.env, name, None) is not None:
            assert np.array_equal(getattr(sb3.env, name).mean, getattr(ours.env, name).mean)


def test_subprocesses():
    # Whose rewards are in float64
    assert_trains_alike(
        env=lambda: make_vec_env(ToyEnv, 2, vec_env_cls=SubprocVecEnv, vec_env_kwargs={"start_method": "fork"}),
        updates=2,
    )


def test_frame_stack():
    assert_trains_alike(env=lambda: VecFrameStack(make_env(2), 3))


@pytest.mark.parametrize("max_steps", [1, 3, 1000])
@pytest.mark.parametrize("p_terminate", [0.0, 0.3])
def test_timeouts_and_terminations(max_steps, p_terminate):
    assert_trains_alike(env=lambda: make_env(2, max_steps=max_steps, p_terminate=p_terminate))


# Settings


def test_target_kl_that_stops_updates():
    sb3, _ = assert_trains_alike(target_kl=1e-3, learning_rate=1e-2)
    assert sb3._n_updates < UPDATES * SETTINGS["n_epochs"], "nothing was stopped: the case proves nothing"


def test_target_kl_that_stops_nothing():
    sb3, _ = assert_trains_alike(target_kl=10.0)
    assert sb3._n_updates == UPDATES * SETTINGS["n_epochs"]


@pytest.mark.parametrize(
    "settings",
    [
        {"n_steps": 33, "batch_size": 16},
        {"n_steps": 40, "batch_size": 64},
        {"n_steps": 32, "batch_size": 12},
        {"n_steps": 3, "batch_size": 2, "updates": 8},
    ],
    ids=["last of 1", "only one, truncated", "last of 8", "tiny"],
)
def test_truncated_last_minibatch(settings):
    assert_trains_alike(**settings)


@pytest.mark.parametrize(
    "settings",
    [
        {"normalize_advantage": False},
        {"normalize_advantage": False, "batch_size": 1, "n_steps": 8},
        {"ent_coef": 0.05, "vf_coef": 0.7, "batch_size": 12},
        {"vf_coef": 0.0},
        {"max_grad_norm": 1e-3},
        {"max_grad_norm": 1e6},
        {"gamma": 0.9, "gae_lambda": 0.5},
        {"gamma": 1.0, "gae_lambda": 1.0},
        {"clip_range": 0.01, "learning_rate": 1e-2},
        {"n_epochs": 1},
        {"stats_window_size": 5, "updates": 5},
    ],
    ids=str,
)
def test_settings(settings):
    assert_trains_alike(**settings)


@pytest.mark.parametrize("clip_range_vf", [0.02, LinearSchedule(0.1, 0.01, 1.0)], ids=["number", "schedule"])
def test_value_clipping_in_sb3s_form(clip_range_vf):
    settings = {"clip_range_vf": clip_range_vf, "learning_rate": 1e-2, "env": lambda: make_env(2)}
    sb3, _ = assert_trains_alike(**settings, plus={"pessimistic_value_clip": False})
    with pytest.raises(AssertionError, match="differs"):
        assert_same_training(sb3, train(PPOPlus, "MlpPolicy", **settings))


SCHEDULES = {
    "callables": (
        {"learning_rate": lambda p: 1e-3 * p, "clip_range": lambda p: 0.1 + 0.1 * p},
        {},
    ),
    "sb3's": (
        {"learning_rate": LinearSchedule(1e-3, 1e-4, 0.5), "clip_range": LinearSchedule(0.3, 0.1, 1.0)},
        {},
    ),
    "linear": (
        {"learning_rate": LinearSchedule(1e-3, 0.0, 1.0), "clip_range": LinearSchedule(0.3, 0.1, 0.5)},
        {"learning_rate": "lin_1e-3", "clip_range": Linear(0.3, 0.1, 0.5)},
    ),
    "strings of numbers": ({"learning_rate": 1e-3, "ent_coef": 0.01}, {"learning_rate": "1e-3", "ent_coef": "0.01"}),
    "constant": (
        {"learning_rate": 1e-3, "clip_range": 0.1, "ent_coef": 0.01, "vf_coef": 0.3},
        {
            "learning_rate": Constant(1e-3),
            "clip_range": Constant(0.1),
            "ent_coef": Constant(0.01),
            "vf_coef": Constant(0.3),
        },
    ),
    "cosine": (
        {"learning_rate": lambda p: Cosine(1e-3)(p), "clip_range": lambda p: WarmupCosine(0.2, 0.5, 0.1)(p) + 0.1},
        {"learning_rate": "cos_1e-3", "clip_range": lambda p: WarmupCosine(0.2, 0.5, 0.1)(p) + 0.1},
    ),
    "warm-up": ({"learning_rate": lambda p: WarmupCosine(1e-3)(p)}, {"learning_rate": "warmup_cos_1e-3"}),
    "exponential": ({"learning_rate": lambda p: Exponential(1e-3, 1e-5)(p)}, {"learning_rate": "exp_1e-3_1e-5"}),
    "critic follows actor": ({"learning_rate": 1e-3}, {"critic_learning_rate": None}),
}


@pytest.mark.parametrize(("settings", "plus"), SCHEDULES.values(), ids=SCHEDULES)
def test_schedules(settings, plus):
    assert_trains_alike(**settings, plus=plus)


@pytest.mark.parametrize(
    "kwargs",
    [
        {"net_arch": None},
        {"net_arch": [16]},
        {"net_arch": []},
        {"net_arch": {"pi": [8], "vf": [16, 8]}, "activation_fn": nn.ReLU},
        {"ortho_init": False},
        {"share_features_extractor": False},
        {"log_std_init": -1.0},
        {"optimizer_class": th.optim.AdamW, "optimizer_kwargs": {"weight_decay": 0.1, "eps": 1e-6}},
        {"optimizer_kwargs": {"weight_decay": 0.01, "betas": (0.8, 0.9)}},
        {"optimizer_kwargs": {"amsgrad": True}},
        {"optimizer_class": th.optim.SGD},
        {"optimizer_class": th.optim.SGD, "optimizer_kwargs": {"momentum": 0.9, "weight_decay": 0.01}},
        {"optimizer_class": th.optim.RMSprop},
        {"optimizer_class": th.optim.RMSprop, "optimizer_kwargs": {"momentum": 0.5, "centered": True}},
        {"optimizer_class": th.optim.Adagrad},
        {"optimizer_class": th.optim.NAdam},
    ],
    ids=str,
)
def test_policy_kwargs(kwargs):
    assert_trains_alike(**policy_kwargs(**kwargs), ent_coef=0.01)


@pytest.mark.parametrize(
    ("names", "classes"),
    [
        (("tanh", "adam"), (nn.Tanh, th.optim.Adam)),
        (("relu", "sgd"), (nn.ReLU, th.optim.SGD)),
        (("elu", "rmsprop"), (nn.ELU, th.optim.RMSprop)),
        (("silu", "adamw"), (nn.SiLU, th.optim.AdamW)),
        (("gelu", "adam"), (nn.GELU, th.optim.Adam)),
        (("leaky_relu", "adam"), (nn.LeakyReLU, th.optim.Adam)),
    ],
    ids=lambda names: ", ".join(map(str, names)),
)
def test_registered_names_stand_for_the_classes(names, classes):
    arguments = ("activation_fn", "optimizer_class")
    assert_trains_alike(
        **policy_kwargs(**dict(zip(arguments, classes, strict=True))),
        plus=policy_kwargs(**dict(zip(arguments, names, strict=True))),
        updates=1,
    )


# The user's own classes


@pytest.mark.parametrize(
    "policy", [CustomPolicy, PartlyFrozenPolicy, SometimesUsed, HalfOptimized, TwoGroups, ActorCriticPolicy]
)
def test_policy_classes(policy):
    assert_trains_alike(policy, lambda: make_env(2))


def test_sb3s_multi_input_policy_class():
    assert_trains_alike(MultiInputActorCriticPolicy, lambda: make_env(2, observation_space=SMALL_DICT))


@pytest.mark.parametrize("share", [True, False], ids=["shared", "separate"])
def test_dropout_and_batch_norm(share):
    kwargs = policy_kwargs(features_extractor_class=NoisyExtractor, share_features_extractor=share)
    assert_trains_alike(**kwargs, env=lambda: make_env(2))


@pytest.mark.parametrize(
    "settings",
    [
        {"rollout_buffer_class": UnshuffledBuffer},
        {"rollout_buffer_class": ScaledAdvantages, "rollout_buffer_kwargs": {"scale": 5.0}},
        {"rollout_buffer_class": RolloutBuffer},
    ],
    ids=["own get", "own advantages", "SB3's"],
)
def test_rollout_buffer_classes(settings):
    assert_trains_alike(**settings, normalize_advantage=False, env=lambda: make_env(2))


def test_dict_rollout_buffer_class():
    assert_trains_alike(
        "MultiInputPolicy",
        lambda: make_env(2, observation_space=SMALL_DICT),
        rollout_buffer_class=ScaledDictAdvantages,
        normalize_advantage=False,
    )


def test_everything_at_once():
    assert_trains_alike(
        "MultiInputPolicy",
        lambda: VecNormalize(make_env(3, observation_space=SMALL_DICT), norm_obs_keys=["vector"]),
        use_sde=True,
        sde_sample_freq=3,
        n_steps=21,
        batch_size=10,
        target_kl=0.05,
        clip_range_vf=0.1,
        ent_coef=0.01,
        learning_rate=LinearSchedule(3e-3, 0.0, 1.0),
        plus={"pessimistic_value_clip": False},
        **policy_kwargs(share_features_extractor=False, optimizer_class=th.optim.AdamW, activation_fn=nn.ELU),
    )
