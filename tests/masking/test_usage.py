"""When masks are used, what they do in rollout and update, and that saved models keep them."""

import numpy as np
import pytest
import torch as th
from environments import (
    ASYMMETRIC,
    MASKED_ACTION_SPACES,
    MaskedEnv,
    MaskInObservation,
    ToyEnv,
    logs_of_updates,
    make_env,
    make_masked_env,
    toy_envs,
)
from masked_models import SETTINGS, SPACES, FixedMask, ToyEnvWithoutMasks, ToyEnvWithSizes, build, make_key_env
from sb3_contrib.common.maskable.utils import get_action_masks
from stable_baselines3 import PPO
from stable_baselines3.common.buffers import RolloutBuffer
from stable_baselines3.common.callbacks import EvalCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.vec_env import DummyVecEnv
from states import assert_same_training

from sb3_ppo_plus import ActorCriticPlusPolicy, PPOPlus
from sb3_ppo_plus.policies.masked_distributions import mask_sizes

# When masks are used


def test_training_without_masking_equals_sb3s_ppo():
    def env():
        return make_vec_env(ToyEnvWithSizes, 2)

    ours = build(env(), action_masking=False).learn(3 * 64)
    assert_same_training(PPO("MlpPolicy", env(), **SETTINGS).learn(3 * 64), ours)
    assert ours.rollout_buffer.context == {}


def test_masks_of_some_envs_are_not_masks_of_all():
    envs = [lambda: MaskedEnv(), lambda: ToyEnv(action_space=MASKED_ACTION_SPACES["discrete"])]
    assert not build(DummyVecEnv(envs[1:] * 2)).learn(64).needs_masks
    with pytest.raises(ValueError, match="every environment"):
        build(DummyVecEnv(envs), action_masking=True)


def test_an_attribute_that_is_no_method_offers_no_masks():
    class Env(ToyEnv):
        action_masks = np.zeros(5, bool)

        def __init__(self):
            super().__init__(action_space=MASKED_ACTION_SPACES["discrete"])

    assert not build(make_vec_env(Env, 2)).learn(64).needs_masks
    with pytest.raises(ValueError, match=r"needs .* a method action_masks\(\)"):
        build(make_vec_env(Env, 2), action_masking=True)


def test_continuous_actions_have_no_masks():
    class Env(ToyEnv):
        def action_masks(self):
            raise AssertionError("who asks?")

    build(make_vec_env(Env, 2)).learn(64)
    with pytest.raises(
        ValueError, match=r"action_masking=True needs Discrete, MultiDiscrete or MultiBinary .* got Box"
    ):
        build(make_vec_env(Env, 2), action_masking=True)


def test_masks_that_are_required_must_be_offered():
    with pytest.raises(ValueError, match=r"action_masking=True needs .* method action_masks\(\)"):
        build(make_env(action_space=MASKED_ACTION_SPACES["discrete"]), action_masking=True)
    model = build(action_masking=True)
    model.set_env(make_env(2, action_space=MASKED_ACTION_SPACES["discrete"]))
    with pytest.raises(ValueError, match="action_masking=True needs"):
        model.learn(64)
    assert toy_envs(model.env)[0].calls["step"] == 0


@pytest.mark.parametrize("value", ["yes", 1, 0.0])
def test_action_masking_is_none_true_or_false(value):
    with pytest.raises(ValueError, match="action_masking must be None, True or False"):
        build(action_masking=value)


class WithoutMasks(ActorCriticPolicy):
    pass


class TakesMasks(ActorCriticPolicy):
    """A user's policy that adds the log of the mask to the logits."""

    def _masked(self, obs, action_masks):
        distribution = self.get_distribution(obs)
        if action_masks is not None:
            distribution.proba_distribution(distribution.distribution.logits + th.log(action_masks.float()))
        return distribution

    def forward(self, obs, deterministic=False, action_masks=None):
        distribution = self._masked(obs, action_masks)
        actions = distribution.get_actions(deterministic)
        return actions, self.predict_values(obs), distribution.log_prob(actions)

    def evaluate_actions(self, obs, actions, action_masks=None):
        distribution = self._masked(obs, action_masks)
        return self.predict_values(obs), distribution.log_prob(actions), distribution.entropy()


class ForwardWithoutMasks(ActorCriticPlusPolicy):
    def forward(self, obs, deterministic=False):
        return super().forward(obs, deterministic)


@pytest.mark.parametrize(
    ("policy", "settings", "message"),
    [
        (WithoutMasks, {}, "WithoutMasks's forward and evaluate_actions lack action_masks"),
        (ForwardWithoutMasks, {}, "ForwardWithoutMasks's forward"),
        ("MlpPolicy", {"rollout_buffer_class": type("Own", (RolloutBuffer,), {})}, "Own.* stores no masks"),
    ],
)
def test_a_policy_or_buffer_that_takes_no_masks_says_so(policy, settings, message):
    def env():
        return make_vec_env(ToyEnvWithSizes, 2)

    with pytest.raises(TypeError, match=message):
        build(env(), policy, action_masking=True, **settings)
    with pytest.warns(UserWarning, match=f"not used: .*{message}") as caught:
        build(env(), policy, **settings).learn(128)
    assert len([warning for warning in caught if "not used" in str(warning.message)]) == 1


def test_a_policy_class_of_the_users_may_take_masks():
    model = build(policy=TakesMasks).learn(128)
    assert model.needs_masks
    with pytest.raises(TypeError, match=r"TakesMasks.predict has no action_masks"):
        model.predict(model.env.reset(), action_masks=np.ones((2, 5)))


# What masks do


SPACES_AND_SETTINGS = [(space, settings) for space in MASKED_ACTION_SPACES for settings in ({}, {"amp": True})]


@pytest.mark.parametrize(("space", "settings"), [*SPACES_AND_SETTINGS, ("multi_discrete", {"compile": True})], ids=str)
@pytest.mark.filterwarnings("error:compile=True")
def test_log_ratio_is_zero_before_the_first_step(space, settings):
    bound = 1e-3 if "amp" in settings else 1e-4
    env = make_masked_env(action_space=MASKED_ACTION_SPACES[space])
    model = build(env, batch_size=64, n_epochs=1, clip_range=bound, **settings)
    with th.no_grad():
        model.policy.action_net.weight.mul_(300)
    # The first step of a compiled update is eager
    for logs in logs_of_updates(model, 3 * 64):
        assert np.isfinite([logs["train/approx_kl"], logs["train/loss"], logs["train/grad_norm"]]).all()
        assert logs["train/clip_fraction"] == 0.0


@pytest.mark.parametrize("policy", ["MlpPolicy", "MultiInputPolicy"])
@pytest.mark.filterwarnings("error:compile=True")
def test_compiled_and_eager_training_is_the_same_without_recompiling(policy, request):
    if policy == "MultiInputPolicy":
        # Tracing is what differs here: the case of MlpPolicy already compiles the code that uses masks
        request.getfixturevalue("graphs_without_code")
    models = []
    for compile in (False, True):
        make = make_key_env if policy == "MultiInputPolicy" else make_masked_env
        env = make(action_space=MASKED_ACTION_SPACES["multi_discrete"], max_steps=5)
        settings = {"batch_size": 64, "n_epochs": 4, "ent_coef": 0.01, "learning_rate": 1e-3}
        models.append(build(env, policy, compile=compile, **settings).learn(4 * 64))
    eager, compiled = models
    for name, value in eager.policy.state_dict().items():
        th.testing.assert_close(compiled.policy.state_dict()[name], value, atol=2e-4, rtol=1e-3, msg=name)
    if policy == "MlpPolicy":
        assert np.array_equal(*(model.rollout_buffer.context["action_masks"] for model in models))
    # Acting, and evaluating a rollout
    assert compiled._execution.compiled_actor.n_compilations == 2
    assert compiled._execution.gradient_step.n_compilations == 1


@pytest.mark.parametrize(
    ("space", "settings"), [*SPACES_AND_SETTINGS, ("multi_binary", {"compile": True, "amp": True})], ids=str
)
@pytest.mark.filterwarnings("error:compile=True")
@pytest.mark.usefixtures("graphs_without_code")
def test_the_logit_of_an_action_that_is_never_valid_changes_nothing(space, settings):
    action_space = MASKED_ACTION_SPACES[space]
    mask = np.ones(sum(mask_sizes(action_space)), bool)
    mask[1] = False

    class Env(FixedMask):
        def __init__(self):
            super().__init__(mask, action_space)

    trained = []
    for shift in (0.0, 3.0):
        model = build(make_vec_env(Env, 2), ent_coef=0.01, learning_rate=1e-2, **settings)
        with th.no_grad():
            model.policy.action_net.bias[1] += shift
        trained.append(model.learn(2 * 64).policy)
    for name, value in trained[0].state_dict().items():
        other = trained[1].state_dict()[name]
        if name.startswith("action_net"):
            value, other = value[np.arange(len(mask)) != 1], other[np.arange(len(mask)) != 1]
        th.testing.assert_close(other, value, atol=1e-5, rtol=1e-4, msg=name)


# Saving


@SPACES
@pytest.mark.parametrize("has_key", [False, True], ids=["method", "key"])
def test_a_saved_model_keeps_its_masks(action_space, has_key, tmp_path):
    def env():
        return make_key_env(action_space=action_space) if has_key else make_masked_env(action_space=action_space)

    policy = "MultiInputPolicy" if has_key else "MlpPolicy"
    model = build(env(), policy).learn(64)
    model.save(tmp_path / "model")
    observations = model.env.reset()
    masks = {} if has_key else {"action_masks": get_action_masks(model.env)}
    expected, _ = model.predict(observations, deterministic=True, **masks)
    loaded = PPOPlus.load(tmp_path / "model")
    assert loaded.policy.has_mask_key is has_key
    assert np.array_equal(loaded.predict(observations, deterministic=True, **masks)[0], expected)
    loaded = PPOPlus.load(tmp_path / "model", env=env())
    # MaskedEnv refuses invalid actions
    loaded.learn(64)
    model.policy.save(tmp_path / "policy")
    policy = type(model.policy).load(tmp_path / "policy")
    assert np.array_equal(policy.predict(observations, deterministic=True, **masks)[0], expected)


def test_a_model_of_sb3s_may_be_given_masks(tmp_path):
    PPO("MlpPolicy", make_env(2, action_space=MASKED_ACTION_SPACES["discrete"]), **SETTINGS).save(tmp_path / "discrete")
    assert PPOPlus.load(tmp_path / "discrete", env=make_masked_env()).learn(64).needs_masks
    space = MASKED_ACTION_SPACES["multi_binary"]
    PPO("MlpPolicy", make_env(2, action_space=space), **SETTINGS).save(tmp_path / "binary")
    with pytest.warns(UserWarning, match="MultiBinary actions that was built without masks"):
        PPOPlus.load(tmp_path / "binary", env=make_masked_env(action_space=space))
    with pytest.raises(ValueError, match="MultiBinary actions that was built without masks"):
        PPOPlus.load(tmp_path / "binary", env=make_masked_env(action_space=space), action_masking=True)


def test_a_model_of_sb3s_keeps_the_mask_among_the_observations_as_a_feature_too(tmp_path):
    env = make_vec_env(lambda: MaskInObservation(ToyEnvWithSizes()), n_envs=2)
    PPO("MultiInputPolicy", env, **SETTINGS).save(tmp_path / "model")
    # MaskedEnv refuses invalid actions
    callback = EvalCallback(make_key_env(1), n_eval_episodes=5, eval_freq=8, deterministic=False, verbose=0)
    model = PPOPlus.load(tmp_path / "model", env=make_key_env()).learn(64, callback)
    assert model.needs_masks
    assert callback.last_mean_reward > -np.inf
    env = make_key_env()
    assert np.isfinite(evaluate_policy(model.masked(env), env, n_eval_episodes=5, deterministic=False)).all()


def test_a_model_with_masks_may_go_on_without():
    model = build(make_vec_env(ToyEnvWithSizes, 2)).learn(64)
    assert not model.rollout_buffer.context["action_masks"].all()
    model.set_env(make_vec_env(ToyEnvWithoutMasks, 2))
    assert model.learn(64).rollout_buffer.context == {}


def test_box_actions_are_untouched():
    assert build(make_env(2, action_space=ASYMMETRIC)).learn(64).rollout_buffer.context == {}
