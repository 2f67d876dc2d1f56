"""Where masks come from, when they are used, and what they do in rollout, update, prediction and evaluation."""

import copy

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from environments import (
    ASYMMETRIC,
    BOX,
    MASKED_ACTION_SPACES,
    SMALL_DICT,
    SMALL_NET,
    MaskedEnv,
    MaskInObservation,
    ToyEnv,
    logs_of_updates,
    make_env,
    make_masked_env,
    toy_envs,
)
from gymnasium import spaces
from sb3_contrib.common.maskable.callbacks import MaskableEvalCallback
from sb3_contrib.common.maskable.evaluation import evaluate_policy as maskable_evaluate_policy
from sb3_contrib.common.maskable.utils import get_action_masks
from sb3_contrib.common.wrappers import ActionMasker
from stable_baselines3 import PPO
from stable_baselines3.common.buffers import RolloutBuffer
from stable_baselines3.common.callbacks import BaseCallback, CallbackList, EvalCallback, EveryNTimesteps
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.torch_layers import CombinedExtractor
from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv, VecEnvWrapper, VecNormalize
from states import assert_same_training

from sb3_ppo_plus import ActorCriticPlusPolicy, PPOPlus, RestartingEnv
from sb3_ppo_plus.envs.mask_from_info import MaskFromInfo
from sb3_ppo_plus.policies.masked_distributions import mask_sizes

SETTINGS = {"n_steps": 32, "batch_size": 32, "n_epochs": 2, "seed": 3, "device": "cpu", "policy_kwargs": SMALL_NET}
SPACES = pytest.mark.parametrize("action_space", MASKED_ACTION_SPACES.values(), ids=MASKED_ACTION_SPACES)


def build(env=None, policy="MlpPolicy", **settings):
    return PPOPlus(policy, env if env is not None else make_masked_env(), **copy.deepcopy(SETTINGS | settings))


def make_key_env(n_envs=2, mask_space=None, **kwargs):
    """Make environments that offer masks among the observations, not by a method."""
    return make_vec_env(lambda: MaskInObservation(MaskedEnv(**kwargs), mask_space), n_envs=n_envs)


class FixedMask(ToyEnv):
    """Offers a fixed mask from a certain step on, and before it a mask that allows every action."""

    def __init__(self, mask, action_space=MASKED_ACTION_SPACES["discrete"], from_step=0):
        super().__init__(action_space=action_space, max_steps=100, p_terminate=0.0)
        self.mask, self.from_step = mask, from_step

    def action_masks(self):
        size = len(self.mask) if self.from_step == 0 else sum(getattr(self.action_space, "nvec", [5]))
        return self.mask if self.n_steps >= self.from_step else [True] * size


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


class ToyEnvWithSizes(ToyEnv):
    """Offers a mask, but takes every action."""

    sizes = (5,)

    def __init__(self):
        super().__init__(action_space=MASKED_ACTION_SPACES["discrete"])

    def action_masks(self):
        return np.arange(5) > 2


def test_mask_from_info_offers_the_masks_of_taxi():
    model = build(make_vec_env(lambda: MaskFromInfo(gym.make("Taxi-v4")), 2))
    masks = model.learn(64).rollout_buffer.context["action_masks"]
    states = model.rollout_buffer.observations.reshape(-1).astype(int)
    taxi = gym.make("Taxi-v4").unwrapped
    assert np.array_equal(masks.reshape(-1, 6), [taxi.action_mask(state) for state in states])


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


# Prediction


@SPACES
@pytest.mark.parametrize("deterministic", [True, False])
def test_predict_takes_masks(action_space, deterministic):
    env = make_masked_env(3, action_space=action_space)
    model = build(env)
    observations = env.reset()
    for _ in range(50):
        # MaskedEnv refuses every other action
        actions, state = model.predict(observations, deterministic=deterministic, action_masks=get_action_masks(env))
        observations, _, _, _ = env.step(actions)
    assert state is None
    single, _ = model.predict(observations[0], action_masks=get_action_masks(env)[0])
    assert action_space.contains(single if single.shape else int(single))


def test_masks_can_be_given_to_a_model_that_was_trained_without():
    model = build(make_env(action_space=MASKED_ACTION_SPACES["discrete"]))
    actions, _ = model.predict(np.zeros((4, 3), np.float32), action_masks=np.eye(5)[[3, 1, 4, 0]])
    assert actions.tolist() == [3, 1, 4, 0]
    assert model.policy.get_distribution(th.zeros(1, 3), action_masks=np.eye(5)[:1]).mode().tolist() == [0]


@pytest.mark.parametrize(
    ("masks", "message"),
    [
        (np.ones((2, 4)), r"must have the shape \(n_envs, 5\), got \(2, 4\)"),
        (np.ones((3, 5)), r"must have the shape \(2, 5\), got \(3, 5\)"),
        (np.zeros((2, 5)), "env 0 leaves no valid action$"),
        (np.full((2, 5), 2), "must be bool"),
        ([], "must have the shape"),
    ],
)
def test_predict_refuses_bad_masks(masks, message):
    model = build()
    with pytest.raises(ValueError, match=message):
        model.predict(np.zeros((2, 3), np.float32), action_masks=masks)
    model.predict(np.zeros((2, 3), np.float32))


@pytest.mark.filterwarnings("error:.*trained with action masks")
def test_a_model_that_was_trained_with_masks_warns_once_when_it_predicts_without(tmp_path):
    model, observations = build(), np.zeros((2, 3), np.float32)
    model.predict(observations)
    model.learn(64).save(tmp_path / "model")
    model.predict(observations, action_masks=np.ones((2, 5)))
    for each in (model, PPOPlus.load(tmp_path / "model")):
        with pytest.warns(UserWarning, match=r"trained with action masks .* model.masked\(env\)"):
            each.predict(observations)
        each.predict(observations)
    by_key = build(make_key_env(), "MultiInputPolicy").learn(64)
    by_key.predict(by_key.env.reset())


# Evaluation; MaskedEnv refuses invalid actions


@pytest.mark.filterwarnings("error:.*trained with action masks")
def test_contribs_tools_work_unchanged(tmp_path):
    env = make_masked_env()
    callback = MaskableEvalCallback(env, n_eval_episodes=2, eval_freq=16, best_model_save_path=tmp_path, verbose=0)
    model = build().learn(128, callback)
    assert callback.last_mean_reward > -np.inf
    assert (tmp_path / "best_model.zip").is_file()
    assert np.isfinite(maskable_evaluate_policy(model, env, n_eval_episodes=5)).all()
    with pytest.warns(UserWarning, match="trained with"), pytest.raises(AssertionError, match="is masked"):
        maskable_evaluate_policy(model, env, n_eval_episodes=50, use_masking=False, deterministic=False)


@pytest.mark.filterwarnings("error:.*trained with action masks", "ignore:Evaluation environment is not wrapped")
def test_sb3s_evaluate_policy_takes_a_predictor_that_asks_for_masks():
    model = build().learn(64)
    for env in (make_masked_env(), VecNormalize(make_masked_env(1)), MaskedEnv()):
        assert np.isfinite(evaluate_policy(model.masked(env), env, n_eval_episodes=5, deterministic=False)).all()
    by_key, env = build(make_key_env(), "MultiInputPolicy").learn(64), make_key_env()
    assert np.isfinite(evaluate_policy(by_key.masked(env), env, n_eval_episodes=5, deterministic=False)).all()
    with pytest.raises(ValueError, match=r"masked\(env\) needs a method action_masks\(\) of env"):
        model.masked(make_env())


def test_a_masked_predictor_has_all_attributes_of_the_model():
    model = build()
    predictor = model.masked(model.env)
    assert predictor.policy is model.policy
    predictor.ent_coef = 0.5
    assert model.ent_coef == 0.5
    copied = copy.deepcopy(predictor)
    assert copied.policy is not model.policy
    observations = np.zeros((2, 3), np.float32)
    assert predictor.predict(observations, action_masks=np.eye(5)[[2, 3]])[0].tolist() == [2, 3]
    with pytest.raises(AttributeError, match="no_such_thing"):
        predictor.no_such_thing  # noqa: B018  # the access is what is tested


class CountCalls(BaseCallback):
    def _on_step(self):
        # Its parent evaluates a MaskedPredictor, but this callback still has the model
        assert isinstance(self.model, PPOPlus)
        return True


@pytest.mark.parametrize(
    "nest",
    [
        lambda callback: callback,
        lambda callback: [callback],
        lambda callback: CallbackList([CountCalls(), CallbackList([callback])]),
        lambda callback: EveryNTimesteps(16, callback),
    ],
    ids=["alone", "list", "lists", "event"],
)
@pytest.mark.filterwarnings("error:.*trained with action masks")
def test_learn_gives_masks_to_every_eval_callback(nest, tmp_path):
    new_best = CountCalls()
    callback = EvalCallback(
        make_masked_env(1),
        callback_on_new_best=new_best,
        n_eval_episodes=5,
        eval_freq=8,
        deterministic=False,
        best_model_save_path=tmp_path,
        verbose=0,
    )
    model = build(make_masked_env(1))
    for _ in range(2):
        model.learn(64, nest(callback))
        assert callback.model is model
    assert new_best.n_calls > 0
    assert callback.last_mean_reward > -np.inf
    assert PPOPlus.load(tmp_path / "best_model").needs_masks


def test_an_eval_callback_without_masks_to_ask_for_evaluates_without():
    callback = EvalCallback(make_vec_env(ToyEnvWithoutMasks, 1), n_eval_episodes=1, eval_freq=16, verbose=0)
    with pytest.warns(UserWarning, match="trained with action masks"):
        build().learn(64, callback)


class ToyEnvWithoutMasks(ToyEnv):
    def __init__(self):
        super().__init__(action_space=MASKED_ACTION_SPACES["discrete"])


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
