"""A policy with a memory whose ``predict`` is not given the state warns once, and only then."""

import warnings

import numpy as np
import pytest
from environments import SMALL_DICT, SMALL_NET, make_env
from models import SETTINGS
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.vec_env import DummyVecEnv

from sb3_ppo_plus import PPOPlus

WARNING = "predict was called twice in a row without the state"


def build(memory="lstm", env=None, policy="MlpPolicy"):
    policy_kwargs = SMALL_NET | {"memory": memory, "memory_kwargs": {"hidden_size": 8}}
    return PPOPlus(policy, env or make_env(), policy_kwargs=policy_kwargs, **SETTINGS)


@pytest.fixture
def no_warning():
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=WARNING)
        yield


def observations(n, size=()):
    generator = np.random.default_rng(0)
    return [generator.uniform(-1, 1, (*size, 3)).astype(np.float32) for _ in range(n)]


@pytest.mark.parametrize("memory", ["lstm", "gru", "gtrxl"])
@pytest.mark.parametrize("size", [(), (2,)], ids=["one env", "two envs"])
@pytest.mark.parametrize("of", ["model", "policy"])
def test_an_episode_without_state_warns_once(memory, size, of):
    model = build(memory)
    actor = model if of == "model" else model.policy
    with pytest.warns(UserWarning, match=WARNING) as warned:
        for observation in observations(5, size):
            actor.predict(observation, deterministic=True)
    assert len(warned) == 1


def test_an_episode_start_that_is_false_does_not_stand_for_the_state():
    model = build()
    with pytest.warns(UserWarning, match=WARNING):
        for observation in observations(3, (2,)):
            model.predict(observation, episode_start=np.array([True, False]))


def test_dicts_of_observations_are_understood():
    env = make_env(observation_space=SMALL_DICT)
    model = build(env=env, policy="MultiInputPolicy")
    with pytest.warns(UserWarning, match=WARNING):
        for _ in range(3):
            model.predict(SMALL_DICT.sample())


def test_a_model_in_a_loop_of_an_env_warns():
    model = build()
    env: DummyVecEnv = model.env
    observation = env.reset()
    with pytest.warns(UserWarning, match=WARNING):
        for _ in range(4):
            action, _ = model.predict(observation)
            observation, _, _, _ = env.step(action)


@pytest.mark.usefixtures("no_warning")
def test_sb3s_evaluation_does_not_warn():
    model = build(env=make_env(2))
    for _ in range(2):
        evaluate_policy(model, model.env, n_eval_episodes=4, warn=False)
    model.learn(64)


@pytest.mark.usefixtures("no_warning")
@pytest.mark.parametrize("length", [2, 5])
def test_episodes_that_begin_with_none_and_go_on_with_the_state_do_not_warn(length):
    model = build()
    for _ in range(3):
        state = None
        for observation in observations(length):
            _, state = model.predict(observation, state)


@pytest.mark.usefixtures("no_warning")
def test_observations_that_each_begin_an_episode_do_not_warn():
    model = build()
    for observation in observations(4, (2,)):
        model.predict(observation, episode_start=np.ones(2, dtype=bool))
    for observation in observations(4):
        model.predict(observation, episode_start=True)


@pytest.mark.usefixtures("no_warning")
def test_single_predictions_do_not_warn():
    model = build()
    (observation,) = observations(1)
    # The same observation again, as in a comparison; another number of them; another model
    for _ in range(3):
        model.predict(observation)
    model.predict(observation[None].repeat(2, axis=0))
    other = build()
    other.predict(observations(2)[1])


@pytest.mark.usefixtures("no_warning")
def test_an_array_that_is_overwritten_is_compared_with_what_it_was():
    model = build()
    observation = np.zeros(3, np.float32)
    model.predict(observation)
    observation += 1
    with pytest.raises(UserWarning, match=WARNING):
        model.predict(observation)


@pytest.mark.usefixtures("no_warning")
def test_a_policy_without_memory_does_not_warn():
    model = PPOPlus("MlpPolicy", make_env(), policy_kwargs=SMALL_NET, **SETTINGS)
    for observation in observations(4):
        model.predict(observation)
