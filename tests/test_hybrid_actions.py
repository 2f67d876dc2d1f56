"""Tuple and Dict actions through all of PPOPlus."""

import copy

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from environments import ASYMMETRIC, SMALL_NET, ToyEnv, logs_of_updates
from gymnasium import spaces
from hybrid_cases import CHOOSING, EVERY_CASE, NESTED, USED_PARTS, HybridToy, assert_same_numbers, build, make_env
from models import SETTINGS
from stable_baselines3.common.callbacks import BaseCallback, EvalCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv, VecFrameStack, VecMonitor, VecNormalize

from sb3_ppo_plus import PPOPlus
from sb3_ppo_plus.policies import MlpPolicy
from sb3_ppo_plus.policies.flat_actions import FlatActionSpace

# Alone and as a part


class AsPart(gym.Wrapper):
    """Gives the action of an environment a structure with this one part."""

    def __init__(self, env, structure, key):
        super().__init__(env)
        self.action_space, self.key = structure, key

    def step(self, action):
        # SB3 hands zeros and ones to the environment as float32
        part = action[self.key]
        return self.env.step(part.astype(np.float32) if isinstance(self.env.action_space, spaces.MultiBinary) else part)


ALONE = {
    "box": (ASYMMETRIC, {}),
    "squashed box": (ASYMMETRIC, {"policy_kwargs": {"action_dist": "squashed_gaussian"}}),
    "beta box": (ASYMMETRIC, {"policy_kwargs": {"action_dist": "beta"}}),
    "box of two dimensions": (spaces.Box(-1, 2, (2, 2)), {}),
    "discrete": (spaces.Discrete(3), {}),
    "multi_discrete": (spaces.MultiDiscrete([3, 2]), {}),
    "multi_binary": (spaces.MultiBinary(3), {}),
    "without orthogonal weights": (ASYMMETRIC, {"policy_kwargs": {"ortho_init": False, "log_std_init": -0.5}}),
    "lstm": (spaces.Discrete(3), {"policy": "MlpLstmPolicy", "policy_kwargs": {"lstm_hidden_size": 8}}),
}


@pytest.mark.parametrize(("space", "settings"), ALONE.values(), ids=ALONE)
@pytest.mark.parametrize("as_dict", [False, True], ids=["Tuple", "Dict"])
def test_an_action_of_one_part_is_trained_as_this_part_alone_to_the_bit(space, settings, as_dict):
    structure, key = (spaces.Dict({"x": space}), "x") if as_dict else (spaces.Tuple((space,)), 0)
    settings = {"policy": "MlpPolicy", "ent_coef": 0.01, **SETTINGS, **copy.deepcopy(settings)}
    settings["policy_kwargs"] = SMALL_NET | settings.get("policy_kwargs", {})
    alone = make_vec_env(lambda: ToyEnv(action_space=space), 2, seed=0)
    as_part = make_vec_env(lambda: AsPart(ToyEnv(action_space=space), structure, key), 2, seed=0)
    models = [PPOPlus(env=env, **copy.deepcopy(settings)).learn(3 * 64) for env in (alone, as_part)]
    assert_same_numbers(*models)
    observation = np.array([0.1, -0.2, 0.9], np.float32)
    for deterministic in (True, False):
        th.manual_seed(1)
        expected, _ = models[0].predict(observation, deterministic=deterministic)
        th.manual_seed(1)
        action, _ = models[1].predict(observation, deterministic=deterministic)
        np.testing.assert_array_equal(action[key], expected)


# Rollouts


@EVERY_CASE
@pytest.mark.parametrize("vec_env_cls", [DummyVecEnv, SubprocVecEnv])
def test_environments_get_actions_of_their_own_space_and_the_buffer_gets_rows(case, vec_env_cls):
    class Look(BaseCallback):
        def _on_step(self):
            of_envs, rows = self.locals["clipped_actions"], self.locals["actions"]
            space = self.model.action_space
            flat = FlatActionSpace(space)
            assert len(of_envs) == 2 and all(space.contains(action) for action in of_envs)
            assert rows.shape == (2, flat.shape[0]) and rows.dtype == np.float32
            for action, row in zip(of_envs, rows, strict=True):
                for part in flat.parts:
                    if not isinstance(part.space, spaces.Box):
                        np.testing.assert_array_equal(flat.row(action)[part.columns], row[part.columns])
            return True

    # HybridToy refuses actions outside its space
    given = dict(case)
    env = make_env(vec_env_cls=vec_env_cls, action_space=given.pop("action_space", NESTED))
    model = build(env, **given).learn(64, Look())
    assert model.rollout_buffer.actions.shape == (32, 2, model.policy.action_space.shape[0])
    env.close()


@EVERY_CASE
def test_the_log_ratio_is_0_before_the_first_step(case):
    model = build(**case, n_epochs=1, batch_size=64, clip_range=1e-4)
    (logs,) = logs_of_updates(model, 64)
    assert np.isfinite(logs["train/loss"]) and logs["train/clip_fraction"] == 0.0


@EVERY_CASE
def test_training_learns_to_choose_what_pays(case):
    class Pays(HybridToy):
        def step(self, action):
            observation, _, *rest = super().step(action)
            row = self.flat.row(action)
            return observation, float(row[self.flat.parts[-1].columns.start] - abs(row[0])), *rest

    settings = copy.deepcopy(case)
    env = make_env(4, Pays, action_space=settings.pop("action_space", NESTED))
    model = build(env, **settings | {"n_steps": 64, "batch_size": 64, "n_epochs": 5, "learning_rate": 3e-3})
    before = evaluate_policy(model, env, 20, deterministic=False)[0]
    model.learn(64 * 4 * 10)
    assert evaluate_policy(model, env, 20, deterministic=False)[0] > before + 1


WRAPPERS = {
    "VecNormalize": VecNormalize,
    "VecFrameStack": lambda env: VecFrameStack(env, 2),
    "VecMonitor": VecMonitor,
}


@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
def test_wrappers_hand_the_structures_on(wrap):
    model = build(wrap(make_env())).learn(64)
    rewards, lengths = evaluate_policy(model, wrap(make_env()), 3, return_episode_rewards=True)
    assert len(rewards) == 3 and max(lengths) <= 7


def test_eval_callback_evaluates(tmp_path):
    callback = EvalCallback(make_env(1), eval_freq=16, n_eval_episodes=2, verbose=0, log_path=tmp_path)
    build().learn(64, callback)
    assert np.load(tmp_path / "evaluations.npz")["results"].shape == (2, 2)


def test_predict_gives_a_structure_for_one_observation_and_a_list_for_several():
    model = build()
    one = np.array([0.1, -0.2, 0.9], np.float32)
    action, state = model.predict(one)
    assert state is None and NESTED.contains(action)
    actions, _ = model.predict(np.stack([one, one, -one]), deterministic=True)
    assert isinstance(actions, list) and len(actions) == 3 and all(map(NESTED.contains, actions))
    alone, _ = model.predict(one, deterministic=True)
    np.testing.assert_allclose(alone["arguments"][0], actions[0]["arguments"][0], rtol=1e-5)


@pytest.mark.parametrize("kind", ["lstm", "gru", "gtrxl"])
def test_a_memory_acts_in_structures_too(kind):
    memory = {"memory": kind, "memory_kwargs": {"hidden_size": 8}}
    model = build(policy_kwargs=memory).learn(128)
    action, state = model.predict(np.zeros(3, np.float32))
    assert NESTED.contains(action) and state is not None
    model.predict(np.zeros(3, np.float32), state)
    assert evaluate_policy(model, make_env(), 2)[0] != 0


# Parametrised actions


class Changed(BaseCallback):
    """Changes what the buffer holds of the parts that were not used."""

    def __init__(self, value):
        super().__init__()
        self.value = value

    def _on_step(self):
        return True

    def _on_rollout_end(self):
        actions = self.model.rollout_buffer.actions
        kind = actions[..., 0]
        assert {*np.unique(kind)} == {0, 1, 2}
        if self.value is not None:
            actions[kind != 0, 1:3] = self.value
            actions[kind != 1, 3:4] = self.value
            actions[kind != 1, 4] = 1 - actions[kind != 1, 4]


@pytest.mark.parametrize("action_dist", ["gaussian", "beta", "squashed_gaussian"])
@pytest.mark.parametrize("value", [0.7, -3.0, np.nan])
def test_the_loss_sees_only_the_parameters_that_were_used(action_dist, value):
    def trained(value):
        kwargs = {"used_parts": USED_PARTS, "action_dist": action_dist}
        model = build(action_space=CHOOSING, policy_kwargs=kwargs, ent_coef=0.01, n_steps=64)
        return model.learn(128, Changed(value))

    first, second = trained(None), trained(value)
    assert_same_numbers(first, second)
    names = [name for name in first.logger.name_to_value if name.startswith("train/")]
    assert len(names) > 8
    for name in names:
        if not name.endswith("seconds"):
            assert first.logger.name_to_value[name] == second.logger.name_to_value[name], name


def test_without_used_parts_the_loss_sees_all_parameters():
    models = [build(action_space=CHOOSING, n_steps=64).learn(128, Changed(value)) for value in (None, 0.7)]
    first, second = (model.policy.action_net[1].weight for model in models)
    assert not th.equal(first, second)


def test_a_choice_trains_the_heads_of_its_own_parameters_alone():
    used_parts = {"0": [["1"], ["2"], []]}
    model = build(action_space=CHOOSING, policy_kwargs={"used_parts": used_parts}, n_epochs=1, batch_size=64)
    never = th.tensor([0.0, -1e8, 0.0])
    model.policy.action_net[0].bias.data.copy_(never)
    before = copy.deepcopy(model.policy.action_net.state_dict())
    model.learn(64)
    after = model.policy.action_net.state_dict()
    moved = {name.partition(".")[0] for name in before if not th.equal(before[name], after[name])}
    assert moved == {"0", "1", "3"}


# What is refused


def refused(action_space, error=ValueError, policy="MlpPolicy", **settings):
    class Unsteppable(gym.Env):
        observation_space = spaces.Box(-1, 1, (3,))

        def __init__(self):
            self.action_space = action_space

        def reset(self, *, seed=None, options=None):
            return np.zeros(3, np.float32), {}

        def step(self, action):
            raise AssertionError("the environment was stepped")

    with pytest.raises(error) as caught:
        PPOPlus(policy, Unsteppable(), device="cpu", **settings).learn(1)
    return str(caught.value)


UNBOUNDED = spaces.Tuple((spaces.Discrete(2), spaces.Box(-1, np.inf, (2,))))


def test_what_cannot_be_trained_is_refused_before_the_first_step():
    for action_dist in ("gaussian", "beta"):
        message = refused(UNBOUNDED, policy_kwargs={"action_dist": action_dist})
        assert "part '1' of the action space needs finite bounds" in message
    assert "part 'a.0' of the action space is Text" in refused(spaces.Dict({"a": spaces.Tuple((spaces.Text(3),))}))
    assert "gSDE" in refused(CHOOSING, use_sde=True)
    assert "used_parts" in refused(spaces.Discrete(3), policy_kwargs={"used_parts": {"0": [[], [], []]}})
    assert "no part '7'" in refused(CHOOSING, policy_kwargs={"used_parts": {"7": []}})
    assert "takes no Tuple or Dict" in refused(CHOOSING, TypeError, policy=type("Own", (ActorCriticPolicy,), {}))
    assert "only supports" in refused(spaces.Text(3), AssertionError)


def test_a_policy_by_itself_takes_such_spaces_and_refuses_gsde():
    box = spaces.Box(-1, 1, (3,))
    policy = MlpPolicy(box, NESTED, lambda _: 1e-3)
    assert NESTED.contains(policy.predict(np.zeros(3, np.float32))[0])
    with pytest.raises(ValueError, match="use_sde=True needs a Box"):
        MlpPolicy(box, NESTED, lambda _: 1e-3, use_sde=True)


@pytest.mark.parametrize("name", ["bf16", "target_kl", "separate"])
def test_other_settings_go_with_it(name):
    settings = {
        "bf16": {"amp": "bf16"},
        "target_kl": {"target_kl": 0.01},
        "separate": {"policy_kwargs": {"share_features_extractor": False, "action_dist": "beta"}},
    }[name]
    model = build(**settings).learn(128)
    assert all(th.isfinite(parameter).all() for parameter in model.policy.parameters())


def test_the_cases_have_every_kind_of_part():
    kinds = {type(part.space) for space in (NESTED, CHOOSING) for part in FlatActionSpace(space).parts}
    assert kinds == {spaces.Box, spaces.Discrete, spaces.MultiDiscrete, spaces.MultiBinary}
