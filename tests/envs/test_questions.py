"""VecEnvs of other packages answer few questions or none. PPOPlus trains on all that SB3's PPO trains on."""

import warnings

import numpy as np
import pytest
import supersuit
from environments import SMALL_DICT, SMALL_NET, make_env, make_masked_env, record_logs
from gymnasium import spaces
from models import SETTINGS
from pettingzoo import ParallelEnv
from stable_baselines3 import PPO
from stable_baselines3.common.callbacks import EvalCallback
from stable_baselines3.common.utils import set_random_seed
from stable_baselines3.common.vec_env import VecEnv, VecEnvWrapper, VecMonitor, VecNormalize
from states import assert_same_training

from sb3_ppo_plus import PPOPlus, RestartingEnv, ResumableEnv, TrainingCheckpoint
from sb3_ppo_plus.envs.questions import base_of, has_attribute, indices_of_wrapped, names_of, values_of_attribute

# Not all of these VecEnvs take a seed
UNSEEDED = {name: value for name, value in SETTINGS.items() if name != "seed"}


class Game(ParallelEnv):
    """Rewards two agents for actions that suit their observations."""

    render_mode = None

    def __init__(self):
        self.metadata, self.possible_agents = {"name": "game", "render_modes": []}, ["left", "right"]
        self.generator = np.random.default_rng(0)

    def observation_space(self, agent):
        return spaces.Box(-1.0, 1.0, (3,), np.float32)

    def action_space(self, agent):
        return spaces.Discrete(3)

    def _for_each(self, make):
        return {agent: make() for agent in self.agents}

    def _look(self):
        self.seen = self._for_each(lambda: self.generator.uniform(-1, 1, 3).astype(np.float32))
        return self.seen

    def reset(self, seed=None, options=None):
        self.agents, self.n_steps = list(self.possible_agents), 0
        return self._look(), self._for_each(dict)

    def step(self, actions):
        self.n_steps += 1
        rewards = {agent: float(self.seen[agent][action]) for agent, action in actions.items()}
        is_over = self.n_steps == 7
        return self._look(), rewards, self._for_each(lambda: is_over), self._for_each(bool), self._for_each(dict)


def make_supersuit():
    env = supersuit.pettingzoo_env_to_vec_env_v1(Game())
    return supersuit.concat_vec_envs_v1(env, 2, base_class="stable_baselines3")


class Vectors:
    """Has all that SB3's PPO needs, but is no VecEnv."""

    num_envs = 2
    observation_space = SMALL_DICT
    action_space = spaces.Box(-2.0, 2.0, (2,), np.float32)

    def __init__(self):
        self.generator = np.random.default_rng(0)

    def reset(self):
        self.n_steps = 0
        return self._look()

    def _look(self):
        vectors = self.generator.uniform(-1, 1, (self.num_envs, 3)).astype(np.float32)
        return {"vector": vectors, "kind": self.generator.integers(4, size=self.num_envs)}

    def step_async(self, actions):
        self.actions = actions

    def step_wait(self):
        self.n_steps += 1
        rewards, is_over = self.actions.sum(axis=1), self.n_steps % 9 == 0
        observations = self._look()
        infos = [{} for _ in rewards]
        if is_over:
            # One episode of two was truncated, and its value is bootstrapped
            last = {name: part[0] for name, part in observations.items()}
            infos[0] = {"terminal_observation": last, "TimeLimit.truncated": True}
            observations = self._look()
        return observations, rewards, np.full(self.num_envs, is_over), infos

    def close(self):
        pass


class Lacking(VecEnvWrapper):
    """Passes questions on to an object without answers, so that each is an AttributeError."""

    def __init__(self):
        with warnings.catch_warnings(action="ignore"):
            super().__init__(Vectors())

    def reset(self):
        return self.venv.reset()

    def step_wait(self):
        return self.venv.step_wait()


class Refusing(VecEnv):
    """Implements the abstract methods that PPO calls, and no other."""

    def __init__(self):
        self.vectors = Vectors()
        super().__init__(Vectors.num_envs, Vectors.observation_space, Vectors.action_space)

    def reset(self):
        return self.vectors.reset()

    def step_async(self, actions):
        self.vectors.step_async(actions)

    def step_wait(self):
        return self.vectors.step_wait()

    def close(self):
        pass

    def get_attr(self, attr_name, indices=None):
        if attr_name == "render_mode":
            return [None] * self.num_envs
        raise NotImplementedError

    def set_attr(self, attr_name, value, indices=None):
        raise NotImplementedError

    def env_method(self, method_name, *method_args, indices=None, **method_kwargs):
        raise NotImplementedError

    def env_is_wrapped(self, wrapper_class, indices=None):
        raise NotImplementedError


class TakesOtherArguments(Refusing):
    """Has one environment in place of several, and passes ``indices`` to its methods, which do not take them."""

    def has_attr(self):
        return False

    def env_method(self, method_name, *method_args, indices=None, **method_kwargs):
        return getattr(self.vectors, method_name)(*method_args, indices=indices, **method_kwargs)

    def env_is_wrapped(self, wrapper_class):
        return [False]


class AgreesToAll(Refusing):
    """Claims to have every attribute and every wrapper."""

    def get_attr(self, attr_name, indices=None):
        return [None] * self.num_envs

    def env_method(self, method_name, *method_args, indices=None, **method_kwargs):
        return [None] * self.num_envs

    def env_is_wrapped(self, wrapper_class, indices=None):
        return [True] * self.num_envs


class GivesLists(Refusing):
    """Returns rewards in a list and infos in a tuple. No episode is truncated: SB3 needs arrays then."""

    def step_wait(self):
        observations, rewards, dones, infos = super().step_wait()
        return observations, rewards.tolist(), dones, tuple({} for _ in infos)


class GivesUp(Refusing):
    """Raises errors of unusual types."""

    def has_attr(self, attr_name):
        raise AssertionError

    def env_is_wrapped(self, wrapper_class, indices=None):
        raise RuntimeError("not supported")


VEC_ENVS = {
    "SuperSuit": make_supersuit,
    "lacking": Lacking,
    "refusing": Refusing,
    "other arguments": TakesOtherArguments,
    "agrees to all": AgreesToAll,
    "gives lists": GivesLists,
    "gives up": GivesUp,
}
# SB3's VecMonitor and EvalCallback ask whether there is a Monitor, and need an answer
EACH_THAT_CAN_BE_EVALUATED = pytest.mark.parametrize(
    "make",
    [make_supersuit, Lacking, TakesOtherArguments, AgreesToAll],
    ids=["SuperSuit", "lacking", "other arguments", "agrees to all"],
)
EACH_VEC_ENV = pytest.mark.parametrize("make", VEC_ENVS.values(), ids=VEC_ENVS)


def build(algorithm, env, **settings):
    set_random_seed(0)
    policy = "MultiInputPolicy" if isinstance(env.observation_space, spaces.Dict) else "MlpPolicy"
    return algorithm(policy, env, policy_kwargs=SMALL_NET, **UNSEEDED | settings)


def normalized(env):
    return VecNormalize(env, norm_obs_keys=["vector"] if isinstance(env.observation_space, spaces.Dict) else None)


@EACH_VEC_ENV
@pytest.mark.parametrize("wrap", [lambda env: env, normalized], ids=["bare", "normalized"])
def test_training_equals_sb3s_to_the_bit(make, wrap):
    models = []
    for algorithm in (PPO, PPOPlus):
        with warnings.catch_warnings(action="ignore"):
            env = wrap(make())
        models.append(build(algorithm, env).learn(256))
    assert_same_training(*models)


@EACH_VEC_ENV
def test_no_restarts_are_logged(make):
    model = build(PPOPlus, make())
    recorder = record_logs(model)
    model.learn(128)
    assert recorder.dumps and not any("rollout/env_restarts" in dump for dump in recorder.dumps)


@EACH_VEC_ENV
def test_required_masks_that_the_vec_env_cannot_give_are_an_error(make):
    with pytest.raises(ValueError, match="action_masking=True needs"):
        build(PPOPlus, make(), action_masking=True)
    with pytest.raises(ValueError, match="action_masks"):
        build(PPOPlus, make()).masked(make())


@EACH_THAT_CAN_BE_EVALUATED
def test_evaluation_equals_sb3s(make, tmp_path):
    scores = []
    for algorithm in (PPO, PPOPlus):
        with warnings.catch_warnings(action="ignore"):
            model, evaluation = build(algorithm, make()), VecMonitor(make())
            callback = EvalCallback(evaluation, n_eval_episodes=4, eval_freq=32, log_path=tmp_path, verbose=0)
            model.learn(256, callback)
        scores.append(callback.evaluations_results)
    assert scores[0] == scores[1] and len(scores[0]) >= 2


@EACH_VEC_ENV
def test_a_run_goes_on_from_its_checkpoint(make, tmp_path):
    build(PPOPlus, make()).learn(128, TrainingCheckpoint(64, tmp_path))
    with pytest.warns(UserWarning, match="they were reset"):
        model = PPOPlus.resume(tmp_path, make())
    model._total_timesteps = 256
    model.continue_learning(TrainingCheckpoint(64, tmp_path))
    assert model.num_timesteps == 256


@pytest.mark.filterwarnings("ignore:Training and eval env")
@EACH_THAT_CAN_BE_EVALUATED
def test_a_callback_that_evaluates_goes_on_from_a_checkpoint_too(make, tmp_path):
    def callbacks():
        with warnings.catch_warnings(action="ignore"):
            evaluation = EvalCallback(VecMonitor(make()), n_eval_episodes=1, eval_freq=32, verbose=0)
        return [TrainingCheckpoint(64, tmp_path), evaluation]

    build(PPOPlus, make()).learn(128, callbacks())
    with pytest.warns(UserWarning, match="they were reset"):
        model = PPOPlus.resume(tmp_path, make())
    model._total_timesteps = 256
    with pytest.warns(UserWarning, match="begin anew"):
        model.continue_learning(callbacks())
    assert model.num_timesteps == 256


def test_sb3s_vec_envs_are_understood():
    env = VecNormalize(make_masked_env(2))
    assert base_of(env) is env.venv
    assert has_attribute(env, "action_masks") and not has_attribute(env, "get_resume_state")
    assert names_of(env) == [str(one) for one in env.venv.envs]
    assert indices_of_wrapped(env, RestartingEnv) == []
    assert values_of_attribute(env, "sizes", [1]) == [env.venv.envs[1].unwrapped.sizes]
    assert values_of_attribute(env, "nothing", [1]) is None


def test_an_answer_of_the_wrong_length_is_ignored():
    env = make_env(2)
    env.env_is_wrapped = lambda wrapper_class: [True]
    assert indices_of_wrapped(env, ResumableEnv) == []


def test_a_dead_worker_raises_and_is_not_ignored():
    env = make_env(2)

    def broken(*_):
        raise EOFError

    env.has_attr = broken
    with pytest.raises(EOFError):
        has_attribute(env, "action_masks")


class TellsDonesByBools(Lacking):
    def __init__(self, env):
        VecEnvWrapper.__init__(self, env)

    def step_wait(self):
        observations, rewards, dones, infos = self.venv.step_wait()
        assert dones.dtype == np.uint8, "the case proves nothing"
        return observations, rewards, dones.astype(bool), infos


@pytest.mark.parametrize("memory", ["lstm", "gtrxl"])
@pytest.mark.filterwarnings("ignore:The `render_mode`")
def test_a_memory_takes_dones_that_are_numbers(memory):
    models = []
    for env in (make_supersuit(), TellsDonesByBools(make_supersuit())):
        set_random_seed(0)
        policy_kwargs = SMALL_NET | {"memory": memory, "memory_kwargs": {"hidden_size": 8}}
        models.append(PPOPlus("MlpPolicy", env, policy_kwargs=policy_kwargs, **UNSEEDED).learn(128))
    assert_same_training(*models)
