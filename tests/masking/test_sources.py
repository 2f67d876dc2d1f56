"""Where masks come from, and what is said of bad ones."""

import gymnasium as gym
import numpy as np
import pytest
from environments import (
    BOX,
    MASKED_ACTION_SPACES,
    SMALL_DICT,
    SMALL_NET,
    MaskedEnv,
    MaskInObservation,
    make_masked_env,
    toy_envs,
)
from gymnasium import spaces
from masked_models import SETTINGS, SPACES, FixedMask, ToyEnvWithSizes, build, make_key_env
from sb3_contrib.common.wrappers import ActionMasker
from stable_baselines3 import PPO
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.torch_layers import CombinedExtractor
from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv, VecEnvWrapper, VecNormalize
from states import assert_same_training

from sb3_ppo_plus import RestartingEnv
from sb3_ppo_plus.envs.mask_from_info import MaskFromInfo

# Where masks come from


@SPACES
def test_only_valid_actions_reach_the_env(action_space):
    # MaskedEnv refuses every other action
    model = build(make_masked_env(3, action_space=action_space)).learn(3 * 96)
    assert sum(env.calls["step"] for env in toy_envs(model.env)) == 3 * 96
    masks = model.rollout_buffer.context["action_masks"]
    assert masks.dtype == np.bool_
    assert not masks.all()


@pytest.mark.parametrize(
    "env",
    [
        lambda: make_vec_env(MaskedEnv, 2, vec_env_cls=SubprocVecEnv, vec_env_kwargs={"start_method": "fork"}),
        lambda: VecNormalize(make_masked_env()),
        lambda: make_vec_env(lambda: ActionMasker(MaskedEnv(), lambda env: env.action_masks().tolist()), 2),
        lambda: make_vec_env(lambda: ActionMasker(MaskedEnv(), lambda env: env.action_masks().astype(np.int8)), 2),
        lambda: DummyVecEnv([MaskedEnv]),
        lambda: DummyVecEnv([MaskedEnv, lambda: ActionMasker(MaskedEnv(), lambda env: env.action_masks()[:, None])]),
    ],
    ids=["SubprocVecEnv", "VecNormalize", "lists", "numbers", "no Monitor", "two shapes"],
)
def test_masks_come_through_every_wrapper(env):
    model = build(env()).learn(64)
    assert model.needs_masks
    model.env.close()


def test_a_vec_env_wrapper_may_answer_for_the_envs():
    class OnlyTheFirst(VecEnvWrapper):
        def reset(self):
            return self.venv.reset()

        def step_wait(self):
            return self.venv.step_wait()

        def env_method(self, method_name, *args, **kwargs):
            masks = super().env_method(method_name, *args, **kwargs)
            return [np.eye(5)[0] for _ in masks] if method_name == "action_masks" else masks

    model = build(OnlyTheFirst(make_vec_env(ToyEnvWithSizes, 2))).learn(64)
    assert (model.rollout_buffer.actions == 0).all()


def test_an_env_that_has_replaced_another_is_asked_from_then_on():
    class Fails(MaskedEnv):
        def step(self, action):
            if self.n_steps == 3:
                raise RuntimeError("broken")
            return super().step(action)

    # Each MaskedEnv refuses actions that its own mask does not allow
    model = build(make_vec_env(lambda: RestartingEnv(Fails, max_restarts=1000), 2))
    with pytest.warns(UserWarning, match="broken"):
        model.learn(64)


@pytest.mark.parametrize("mask_space", [None, spaces.Box(0, 1, (5, 1), np.float32), spaces.MultiDiscrete([2] * 5)])
def test_masks_among_the_observations_train_as_those_of_the_method(mask_space):
    by_method = build(make_masked_env(observation_space=SMALL_DICT), "MultiInputPolicy").learn(3 * 64)
    by_key = build(make_key_env(observation_space=SMALL_DICT, mask_space=mask_space), "MultiInputPolicy").learn(3 * 64)
    assert_same_training(by_method, by_key)
    assert not by_key.needs_masks


@pytest.mark.parametrize("share", [True, False], ids=["shared", "separate"])
def test_the_extractor_never_sees_the_mask(share):
    class Look(CombinedExtractor):
        def __init__(self, observation_space):
            assert set(observation_space.spaces) == {"vector"}
            super().__init__(observation_space)

        def forward(self, observations):
            assert set(observations) == {"vector"}
            return super().forward(observations)

    kwargs = {"features_extractor_class": Look, "share_features_extractor": share}
    model = build(make_key_env(max_steps=3), "MultiInputPolicy", policy_kwargs=SMALL_NET | kwargs).learn(64)
    model.predict(model.env.reset())


def test_a_mask_among_the_observations_is_a_feature_without_masking():
    env = make_vec_env(lambda: MaskInObservation(ToyEnvWithSizes()), n_envs=2)
    ours = build(env, "MultiInputPolicy", action_masking=False).learn(64)
    sb3 = PPO("MultiInputPolicy", make_vec_env(lambda: MaskInObservation(ToyEnvWithSizes()), n_envs=2), **SETTINGS)
    assert_same_training(sb3.learn(64), ours)


def test_mask_from_info_offers_the_masks_of_taxi():
    model = build(make_vec_env(lambda: MaskFromInfo(gym.make("Taxi-v4")), 2))
    masks = model.learn(64).rollout_buffer.context["action_masks"]
    states = model.rollout_buffer.observations.reshape(-1).astype(int)
    taxi = gym.make("Taxi-v4").unwrapped
    assert np.array_equal(masks.reshape(-1, 6), [taxi.action_mask(state) for state in states])


# Bad masks


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        ([True] * 4, r"env 1 must return the shape \(5,\), got \(4,\) at step 3"),
        ([[True] * 5] * 2, r"env 1 must return the shape \(5,\), got \(2, 5\) at step 3"),
        ([False] * 5, "mask of env 1 leaves no valid action at step 3"),
        ([0.5] * 5, "must be bool, or 0 and 1, got .* of env 1 at step 3"),
        ([np.nan] * 5, "must be bool, or 0 and 1, got .* of env 1 at step 3"),
    ],
    ids=["shape", "two", "all invalid", "no mask", "nan"],
)
@pytest.mark.parametrize("compile", [False, True], ids=["eager", "compiled"])
@pytest.mark.usefixtures("graphs_without_code")
def test_a_bad_mask_names_env_and_step(mask, message, compile):
    env = DummyVecEnv([lambda: FixedMask([True] * 5), lambda: FixedMask(mask, from_step=3)])
    with pytest.raises(ValueError, match=message):
        build(env, compile=compile).learn(64)


def test_each_action_needs_a_valid_choice():
    space = MASKED_ACTION_SPACES["multi_discrete"]
    env = DummyVecEnv([lambda: FixedMask([True] * 3 + [False] * 2 + [True] * 4, space, from_step=2)])
    with pytest.raises(ValueError, match="env 0 leaves no valid choice of action 1 at step 2"):
        build(env).learn(64)


def test_bad_masks_among_the_observations():
    with pytest.raises(ValueError, match=r"'action_mask' must hold a mask of shape \(5,\) .* got MultiBinary\(4\)"):
        build(make_key_env_of_shape(4), "MultiInputPolicy")
    box = spaces.Box(0.0, 1.0, (5,), np.float32)
    with pytest.raises(ValueError, match=r"VecNormalize normalises .* 'action_mask'"):
        build(VecNormalize(make_key_env(mask_space=box)), "MultiInputPolicy")
    env = VecNormalize(make_key_env(mask_space=box), norm_obs_keys=["vector"])
    assert build(env, "MultiInputPolicy").learn(64).policy.has_mask_key
    env = make_key_env(1, mask_space=box)
    toy_envs(env)[0].action_masks = lambda: np.zeros(5)
    with pytest.raises(ValueError, match="mask of env 0 leaves no valid action at step 0"):
        build(env, "MultiInputPolicy").learn(64)


def test_a_mask_alone_is_no_observation():
    env = make_key_env()
    env.observation_space = spaces.Dict({"action_mask": spaces.MultiBinary(5)})
    with pytest.raises(ValueError, match="must hold more than the mask"):
        build(env, "MultiInputPolicy")


def make_key_env_of_shape(n):
    env = make_key_env()
    env.observation_space = spaces.Dict({"vector": BOX, "action_mask": spaces.MultiBinary(n)})
    return env
