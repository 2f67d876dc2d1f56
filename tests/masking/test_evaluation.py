"""Masks in prediction and evaluation."""

import copy

import numpy as np
import pytest
import torch as th
from environments import MASKED_ACTION_SPACES, MaskedEnv, make_env, make_masked_env
from masked_models import SPACES, ToyEnvWithoutMasks, build, make_key_env
from sb3_contrib.common.maskable.callbacks import MaskableEvalCallback
from sb3_contrib.common.maskable.evaluation import evaluate_policy as maskable_evaluate_policy
from sb3_contrib.common.maskable.utils import get_action_masks
from stable_baselines3.common.callbacks import BaseCallback, CallbackList, EvalCallback, EveryNTimesteps
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.vec_env import VecNormalize

from sb3_ppo_plus import PPOPlus

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
