"""Brax's environments, with the real package on the CPU: run by ``test_brax_vec_env.py`` in a process of their own."""

import jax
import numpy as np
import pytest
import torch as th
from brax import envs
from gymnasium import spaces
from simulator_walks import assert_same_training
from stable_baselines3.common.callbacks import BaseCallback

from sb3_ppo_plus import PPOPlus, TrainingCheckpoint
from sb3_ppo_plus.envs import BraxVecEnv, as_vec_env
from sb3_ppo_plus.envs.simulators.brax_vec_env import is_brax

N_ENVS = 4
SETTINGS = {"n_steps": 16, "batch_size": 32, "n_epochs": 2, "seed": 3}


class Turn(envs.PipelineEnv):
    """A wheel that is pushed. It has fallen if it is too fast; seconds go on, also from one episode to the next."""

    def __init__(self, dict_observations=False):
        self._dict_observations = dict_observations

    def _shown(self, state):
        if self._dict_observations:
            return {"state": state, "privileged_state": jax.numpy.concatenate([state, -state])}
        return state

    def reset(self, rng):
        state = jax.random.uniform(rng, (2,), minval=-0.5, maxval=0.5)
        zero = jax.numpy.zeros(())
        return envs.State(state, self._shown(state), zero, zero, {}, {"seconds": zero})

    def step(self, state, action):
        speed = state.pipeline_state[1] + action[0]
        place = state.pipeline_state[0] + 0.1 * speed
        turn = jax.numpy.stack([place, speed])
        done = (jax.numpy.abs(speed) > 1.5).astype(jax.numpy.float32)
        info = {**state.info, "seconds": state.info["seconds"] + 1}
        return state.replace(pipeline_state=turn, obs=self._shown(turn), reward=-(place**2), done=done, info=info)

    @property
    def observation_size(self):
        return {"state": (2,), "privileged_state": (4,)} if self._dict_observations else 2

    @property
    def action_size(self):
        return 1


envs.register_environment("turn", Turn)


def wrapped(batch_size=N_ENVS, **arguments):
    return envs.create("turn", episode_length=7, batch_size=batch_size, **arguments)


def as_tensor(array):
    return th.tensor(np.array(array))


def test_steps_are_braxs_and_last_observations_are_those_that_it_overwrites():
    env, own = as_vec_env(wrapped()), wrapped()
    inner = own.env
    env.seed(5)
    observations = env.reset_checked()
    state = jax.jit(own.reset)(jax.random.split(jax.random.PRNGKey(5))[1])
    assert th.equal(observations, as_tensor(state.obs))
    rng, n_terminated, n_truncated = np.random.default_rng(0), 0, 0
    step_own, step_inner = jax.jit(own.step), jax.jit(inner.step)
    for _ in range(60):
        actions = rng.uniform(-1, 1, (N_ENVS, 1)).astype(np.float32)
        step, _ = env.step_checked(th.from_numpy(actions))
        # What the wrapper does before it steps
        info = {**state.info, "steps": jax.numpy.where(state.done, 0, state.info["steps"])}
        last = step_inner(state.replace(done=jax.numpy.zeros_like(state.done), info=info), actions)
        state = step_own(state, actions)
        assert th.equal(step.observations, as_tensor(state.obs))
        assert th.equal(step.rewards, as_tensor(state.reward))
        assert th.equal(step.final_observations, as_tensor(last.obs))
        done, truncation = as_tensor(state.done) != 0, as_tensor(state.info["truncation"]) != 0
        assert th.equal(step.terminated, done & ~truncation)
        assert th.equal(step.truncated, done & truncation)
        n_terminated, n_truncated = n_terminated + int(step.terminated.sum()), n_truncated + int(step.truncated.sum())
    assert n_terminated > 3
    assert n_truncated > 3


def test_arrays_are_shared():
    env = as_vec_env(wrapped())
    observations = env.reset_tensor()
    assert observations.data_ptr() == env._state.obs.unsafe_buffer_pointer()
    step = env.step_tensor(th.zeros(N_ENVS, 1))
    assert step.observations.data_ptr() == env._state.obs.unsafe_buffer_pointer()


def test_actions_may_be_overwritten_after_a_step():
    env, other = as_vec_env(wrapped()), as_vec_env(wrapped())
    for each in (env, other):
        each.seed(1)
        each.reset_checked()
    actions = th.zeros(N_ENVS, 1)
    for number in range(30):
        fresh = th.full((N_ENVS, 1), 0.1 * (number % 3 - 1))
        actions.copy_(fresh)
        step = env.step_tensor(actions)
        actions.fill_(9.0)
        assert th.equal(step.observations, other.step_tensor(fresh).observations)


def learned(env, **arguments):
    return PPOPlus("MlpPolicy", env, **SETTINGS, **arguments).learn(400)


@pytest.mark.parametrize("compile", [False, True])
def test_training_repeats(compile):
    model = learned(wrapped(), compile=compile)
    assert type(model.env) is BraxVecEnv
    assert model.action_space == spaces.Box(-1, 1, (1,))
    assert {each["l"] for each in model.ep_info_buffer} >= {7}
    assert_same_training(model, learned(wrapped(), compile=compile))


def test_the_number_of_environments_may_be_named():
    bare = envs.training.wrap(Turn(), episode_length=7)
    with pytest.raises(ValueError, match=r"BraxVecEnv\(env, num_envs\)"):
        as_vec_env(bare)
    env = BraxVecEnv(bare, 5)
    assert env.reset().shape == (5, 2)
    assert not np.array_equal(env.reset()[0], env.reset()[1])
    with pytest.raises(ValueError, match="num_envs must be the environment's batch_size 4, got 5"):
        BraxVecEnv(wrapped(), 5)


def test_an_environment_that_begins_no_episodes():
    with pytest.raises(TypeError, match=r"must be wrapped for training.* got Turn"):
        as_vec_env(Turn())


def test_to_be_recognised_it_is_not_reset(monkeypatch):
    monkeypatch.setattr(Turn, "reset", lambda *_: pytest.fail("it is reset"))
    assert is_brax(wrapped())
    assert not is_brax(object())


def test_observations_may_be_a_dict():
    env = as_vec_env(wrapped(dict_observations=True))
    assert {key: part.shape for key, part in env.observation_space.items()} == {
        "state": (2,),
        "privileged_state": (4,),
    }
    keys = {"actor_keys": ["state"], "critic_keys": ["privileged_state"]}
    PPOPlus("MultiInputPolicy", env, policy_kwargs=keys, **SETTINGS).learn(200)
    assert BraxVecEnv(wrapped(dict_observations=True), groups=["state"]).observation_space.shape == (2,)


class StopAfter(BaseCallback):
    """Ends training after some steps."""

    def _on_step(self):
        return self.num_timesteps < 220


@pytest.mark.parametrize("trusted", [True, False])
def test_a_run_that_is_killed_goes_on_to_the_same_bits(trusted, tmp_path):
    whole = learned(wrapped())
    stopped = PPOPlus("MlpPolicy", wrapped(), **SETTINGS)
    stopped.learn(400, [TrainingCheckpoint(64, tmp_path), StopAfter()])
    resumed = PPOPlus.resume(tmp_path, wrapped(), trusted=trusted).continue_learning()
    assert_same_training(resumed, whole)


CHANGES = {
    "missing": lambda state: state.pop("0"),
    "shape": lambda state: state.update({"1": th.zeros(1, 1)}),
    "sparse": lambda state: state.update({"1": state["1"].to_sparse()}),
    "bfloat16": lambda state: state.update({"1": state["1"].bfloat16()}),
    "more": lambda state: state.update({"more": th.zeros(1)}),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_state_of_another_environment_is_refused(change):
    env = as_vec_env(wrapped())
    env.reset()
    state = env.get_resume_state()
    CHANGES[change](state)
    with pytest.raises(ValueError, match="the state of <BraxVecEnv of AutoResetWrapper> must have"):
        as_vec_env(wrapped()).set_resume_state(state)


def test_a_real_environment_of_brax():
    model = PPOPlus("MlpPolicy", envs.create("fast", episode_length=9, batch_size=3), **SETTINGS).learn(100)
    assert {each["l"] for each in model.ep_info_buffer} == {9}
