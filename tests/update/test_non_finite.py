"""NaN and infinity in environments, losses and gradients are noticed before they do harm."""

import copy
import math

import models
import numpy as np
import pytest
import torch as th
from environments import BOX, SMALL_NET, ToyEnv, logs_of_updates, make_env
from gymnasium import spaces
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import VecFrameStack, VecNormalize
from states import assert_same_bits, state_of

from sb3_ppo_plus import MlpPolicy, NonFiniteError, PPOPlus, TrainingCheckpoint
from sb3_ppo_plus.update.losses import METRICS

SETTINGS = models.SETTINGS | {"seed": 3, "policy_kwargs": SMALL_NET}


class OwnAdam(th.optim.Adam):
    """An Adam whose steps are not flat, because it is a subclass."""


# The two environments that build makes give the shapes of graphs that other tests have compiled
COMPILED = {"compile": True, "n_steps": 16, "policy_kwargs": {"net_arch": [8]}}
WAYS = {
    "flat": {},
    "plain": {"policy_kwargs": SMALL_NET | {"optimizer_class": OwnAdam}},
    "flat, two groups": {"critic_learning_rate": 1e-3},
    "compiled": COMPILED,
    "compiled, target_kl": COMPILED | {"target_kl": 100.0},
}


def spoil(model, **values):
    """Replace values of the rollout buffer's first transition, before each update for which they are given."""
    train = type(model).train

    def spoiled():
        model.n_trained = getattr(model, "n_trained", 0) + 1
        for name, (update, value) in values.items():
            if model.n_trained == update or update is None:
                getattr(model.rollout_buffer, name)[0, 0] = value
        train(model)

    model.train = spoiled
    return model


def build(env=None, **settings):
    """A model that updates after each 32 timesteps."""
    settings = SETTINGS | settings
    return PPOPlus("MlpPolicy", env or make_env(32 // settings["n_steps"]), **settings)


def tensors_of(model):
    return {name: value for name, value in state_of(model).items() if isinstance(value, th.Tensor)}


# Compiled without target_kl: below
@pytest.mark.parametrize("way", [way for way in WAYS if way != "compiled"])
def test_no_parameter_and_no_moment_is_touched_by_a_step_on_nan(way):
    # One minibatch per epoch, so that every step of the update is spoiled
    model = spoil(build(**WAYS[way] | {"batch_size": 32}), returns=(3, np.nan))
    model.learn(64)
    before = copy.deepcopy(tensors_of(model))
    with pytest.raises(NonFiniteError, match="the value loss is nan in epoch 0, minibatch 0, update 1, 96 timesteps"):
        model.learn(32, reset_num_timesteps=False)
    assert_same_bits(tensors_of(model), before)
    assert all(th.isfinite(value).all() for value in model.policy.state_dict().values())
    # The model can be trained further
    model.learn(32, reset_num_timesteps=False)
    assert any(not th.equal(value, before[f"policy.{name}"]) for name, value in model.policy.state_dict().items())


@pytest.mark.parametrize("way", ["flat", "plain", "compiled"])
def test_a_skipped_step_is_left_out_and_counted(way):
    model = spoil(build(**WAYS[way], on_non_finite="skip"), returns=(2, np.nan))
    logs = logs_of_updates(model, 96)
    # One minibatch of each of the two epochs holds the spoiled transition
    assert [log["train/skipped_steps"] for log in logs] == [0, 2, 2]
    for log in logs:
        for name in ("value_loss", "policy_gradient_loss", "loss", "grad_norm", "approx_kl", "entropy_loss"):
            assert math.isfinite(log[f"train/{name}"]), name


def test_an_update_whose_only_minibatch_is_skipped_changes_no_parameter():
    """With one minibatch per epoch, a spoiled update takes no step."""
    first = spoil(build(batch_size=32, on_non_finite="skip"), returns=(1, np.inf))
    second = build(batch_size=32)
    first.learn(32)
    assert_same_bits(first.policy.state_dict(), second.policy.state_dict())


@pytest.mark.parametrize(
    ("values", "term"),
    [
        ({"returns": (1, np.inf)}, "the value loss is inf"),
        ({"advantages": (1, np.nan)}, "the policy loss is nan"),
        ({"log_probs": (1, np.nan)}, "the policy loss is nan"),
        ({"returns": (1, np.nan), "advantages": (1, np.nan)}, "the policy loss is nan and the value loss is nan"),
    ],
)
def test_the_error_names_the_terms(values, term):
    with pytest.raises(NonFiniteError, match=f"{term} in epoch 0"):
        spoil(build(batch_size=32), **values).learn(32)


def test_a_gradient_that_overflows_is_named():
    model = build(batch_size=32)
    model.policy.value_net.register_full_backward_hook(lambda module, grads, _: tuple(g * math.inf for g in grads))
    before = copy.deepcopy(model.policy.state_dict())
    with pytest.raises(NonFiniteError, match=r"the norm of the gradient is (nan|inf), of the loss -?[0-9]"):
        model.learn(32)
    assert all(th.equal(value, before[name]) for name, value in model.policy.state_dict().items())


@pytest.mark.parametrize("max_skipped", [0, 3, 4])
def test_too_many_in_a_row_are_an_error(max_skipped):
    model = spoil(build(batch_size=32, on_non_finite="skip", max_skipped=max_skipped), returns=(None, np.nan))
    # Each update skips two steps, so the third update begins with the fifth
    with pytest.raises(NonFiniteError, match=rf", {max_skipped + 1} in a row, and max_skipped={max_skipped}"):
        model.learn(320)
    assert model.num_timesteps == 32 * (max_skipped // 2 + 1)


def test_a_good_step_resets_the_number_of_skips_in_a_row():
    model = spoil(build(on_non_finite="skip", max_skipped=1), returns=(None, np.nan))
    # In each epoch, one of two minibatches is spoiled. Two follow each other if one is last and the next is first
    model.max_skipped = 2
    model.learn(160)
    assert model._skipped_steps == 10


def test_the_error_names_the_last_checkpoint(tmp_path):
    model = spoil(build(), returns=(3, np.nan))
    with pytest.raises(NonFiniteError, match=r"the last checkpoint is .*runs") as caught:
        model.learn(320, TrainingCheckpoint(1, tmp_path / "runs"))
    assert model.last_checkpoint in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "error"),
    [
        ({"on_non_finite": "ignore"}, ValueError),
        ({"on_non_finite": None}, TypeError),
        ({"max_skipped": -1}, ValueError),
        ({"max_skipped": 1.0}, TypeError),
    ],
)
def test_arguments_are_checked(settings, error):
    with pytest.raises(error, match=next(iter(settings))):
        build(**settings)


TRANSFORMER = {
    "features_extractor_class": "transformer",
    "features_extractor_kwargs": {"d_model": 8, "n_heads": 2, "n_layers": 1},
}


@pytest.mark.parametrize("compile", [False, True])
@pytest.mark.parametrize("optimizer", ["adam", "adamw", "rmsprop"])
@pytest.mark.usefixtures("graphs_without_code")
def test_a_transformer_is_not_trained_where_zero_would_be_divided_by_zero(optimizer, compile):
    """The gradient of a key bias is 0 apart from rounding, so that it depends on luck where NaN appears."""
    env = make_env(observation_space=spaces.Box(-1, 1, (4, 3), np.float32))
    kwargs = SMALL_NET | TRANSFORMER | {"optimizer_class": optimizer, "optimizer_kwargs": {"eps": 0.0}}
    # Loading, and asking for actions, is possible
    model = build(env, policy_kwargs=kwargs, compile=compile)
    with pytest.raises(ValueError, match=r"eps must be positive with the Transformer.*'eps': 0.*allowed"):
        model.learn(32)
    assert env.envs[0].unwrapped.calls["step"] == 0
    model.policy.optimizer.param_groups[0]["eps"] = 1e-8
    model.learn(32)


@pytest.mark.parametrize("way", ["flat", "compiled"])
@pytest.mark.usefixtures("graphs_without_code")
def test_without_a_transformer_eps_may_be_zero(way):
    settings = WAYS[way] | {"policy_kwargs": {"net_arch": [8], "optimizer_kwargs": {"eps": 0.0}}}
    model = build(**settings).learn(96)
    assert all(th.isfinite(value).all() for value in tensors_of(model).values())


# Environments


class BadEnv(ToyEnv):
    """Gives a bad value in one step, or one reset."""

    def __init__(self, where=None, value=np.nan, at=5, **kwargs):
        super().__init__(**kwargs, p_terminate=0.0)
        self.where, self.value, self.at = where, value, at

    def _spoiled(self, observation):
        observation = copy.deepcopy(observation)
        target = observation["vector"] if isinstance(observation, dict) else observation
        target[..., 1] = self.value
        return observation

    def reset(self, **kwargs):
        observation, info = super().reset(**kwargs)
        return self._spoiled(observation) if self.where == "reset" else observation, info

    def step(self, action):
        observation, reward, terminated, truncated, info = super().step(action)
        if self.where == "reward" and self.calls["step"] == self.at:
            reward = self.value
        if self.where == "observation" and self.calls["step"] == self.at:
            observation = self._spoiled(observation)
        if self.where == "terminal" and truncated:
            observation = self._spoiled(observation)
        return observation, reward, terminated, truncated, info


def envs(**kwargs):
    # The second of three is bad
    made = iter([{}, kwargs, {}])
    others = {key: value for key, value in kwargs.items() if key == "observation_space"}
    return make_vec_env(lambda: BadEnv(**{**others, **next(made)}), n_envs=3)


DICT = spaces.Dict({"vector": BOX, "kind": spaces.Discrete(4)})


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize(
    ("kwargs", "said"),
    [
        ({"where": "reward"}, "the reward of env 1 at step 4 of the rollout is {value}"),
        ({"where": "observation"}, "the observation of env 1 at step 4 of the rollout is {value} at position .1,"),
        ({"where": "reset"}, "the observation of env 1 at step 0 of the rollout is {value}"),
        ({"where": "terminal"}, r"the terminal observation of env 1 at step 6 is \[.*{value}"),
        (
            {"where": "observation", "observation_space": DICT},
            "the observation 'vector' of env 1 at step 4 of the rollout is {value}",
        ),
    ],
    ids=["reward", "observation", "reset", "terminal", "dict"],
)
def test_a_bad_value_is_named_before_it_reaches_the_buffer(kwargs, said, value):
    policy = "MultiInputPolicy" if "observation_space" in kwargs else "MlpPolicy"
    model = PPOPlus(policy, envs(value=value, **kwargs), **SETTINGS)
    with pytest.raises(NonFiniteError, match=said.format(value=value)):
        model.learn(96)
    assert all(th.isfinite(value).all() for value in model.policy.state_dict().values())
    assert np.isfinite(model.rollout_buffer.rewards).all()


@pytest.mark.parametrize("where", ["reward", "observation"])
@pytest.mark.parametrize("stacked", [False, True])
def test_with_vec_normalize_the_raw_value_and_its_env_are_named(where, stacked):
    env = VecNormalize(envs(where=where, value=np.inf))
    model = build(VecFrameStack(env, 2) if stacked else env)
    with pytest.raises(
        NonFiniteError, match=f"the {where} of env 1 at step 4 .* is nan.*; before VecNormalize it is .*inf"
    ):
        model.learn(96)


@pytest.mark.parametrize("where", ["reward", "observation"])
@pytest.mark.parametrize("stacked", [False, True])
def test_infinity_is_not_hidden_by_a_vec_normalize_that_does_not_learn(where, stacked):
    env = VecNormalize(envs(where=where, value=np.inf), training=False)
    model = build(VecFrameStack(env, 2) if stacked else env)
    with pytest.raises(NonFiniteError, match=f"the {where} of env 1 at step 4 .*; before VecNormalize it is .*inf"):
        model.learn(96)


def test_large_numbers_are_finite():
    space = spaces.Box(-3e38, 3e38, (3,), np.float32)
    env = make_vec_env(lambda: BadEnv("observation", 2e38, observation_space=space))
    assert not math.isfinite(np.vdot(np.float32(2e38), np.float32(2e38)))
    assert build(env).learn(96).num_timesteps == 96


@pytest.mark.parametrize("space", [spaces.Discrete(3), spaces.MultiBinary(3), spaces.Box(0, 255, (3,), np.uint8)])
def test_integers_need_no_check(space):
    build(make_env(observation_space=space)).learn(32)


def test_the_columns_that_are_checked_exist():
    assert {"loss", "grad_norm", "policy_loss", "value_loss", "entropy_loss"} <= set(METRICS)
    assert issubclass(NonFiniteError, FloatingPointError) and MlpPolicy
