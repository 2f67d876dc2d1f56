"""Environments with Gymnasium's five values as tensors train as the same environment written as a TensorVecEnv."""

from types import SimpleNamespace

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from gymnasium.vector import AutoresetMode
from simulator_walks import N_ENVS, SETTINGS, IsaacWalk, ManiSkillWalk, assert_same_training, walk
from stable_baselines3.common.evaluation import evaluate_policy

from sb3_ppo_plus import PPOPlus
from sb3_ppo_plus.envs import GymnasiumTensorVecEnv, SimulatorLog, TensorVecNormalize, as_vec_env
from sb3_ppo_plus.envs.batched_vec_env import BatchedVecEnv
from sb3_ppo_plus.rollout.tensor_buffer import TensorRolloutBuffer


@pytest.mark.parametrize("names", [None, ("policy",)])
@pytest.mark.parametrize("wrap", [lambda env: env, gym.wrappers.OrderEnforcing])
def test_an_isaac_lab_environment_has_the_bits_of_a_tensor_vec_env(names, wrap):
    expected = PPOPlus("MlpPolicy", walk(), **SETTINGS).learn(300)
    model = PPOPlus("MlpPolicy", wrap(IsaacWalk(names)), **SETTINGS).learn(300)
    assert type(model.env) is GymnasiumTensorVecEnv
    assert type(model.rollout_buffer) is TensorRolloutBuffer
    # Success is ManiSkill's name
    model.ep_success_buffer.extend(expected.ep_success_buffer)
    assert_same_training(model, expected)


def test_a_mani_skill_environment_has_the_bits_of_a_tensor_vec_env():
    expected = PPOPlus("MlpPolicy", walk(1.0), **SETTINGS).learn(300)
    model = PPOPlus("MlpPolicy", ManiSkillWalk(), **SETTINGS).learn(300)
    assert type(model.env) is GymnasiumTensorVecEnv
    assert_same_training(model, expected)
    assert True in model.ep_success_buffer
    assert False in model.ep_success_buffer


def test_groups_are_keys_for_actor_and_critic():
    env = IsaacWalk(("policy", "critic"))
    model = PPOPlus(
        "MultiInputPolicy", env, policy_kwargs={"actor_keys": ["policy"], "critic_keys": ["critic"]}, **SETTINGS
    )
    assert sorted(model.observation_space.spaces) == ["critic", "policy"]
    model.learn(200)
    action, _ = model.predict({"policy": np.zeros(2, np.float32)}, deterministic=True)
    assert action.shape == (1,)
    chosen = GymnasiumTensorVecEnv(IsaacWalk(("policy", "critic")), groups=["policy"])
    assert chosen.observation_space == spaces.Box(-9, 9, (2,))
    with pytest.raises(TypeError, match="groups must be a list of names or None, got 'policy'"):
        GymnasiumTensorVecEnv(env, groups="policy")
    with pytest.raises(ValueError, match="groups must name at least one"):
        GymnasiumTensorVecEnv(env, groups=[])
    with pytest.raises(ValueError, match=r"groups must be of \['critic', 'policy'\], got 'polcy'"):
        GymnasiumTensorVecEnv(env, groups=["polcy"])


def test_groups_of_terms_are_flat():
    env = IsaacWalk(None)
    env.single_observation_space = spaces.Dict(
        {"policy": spaces.Dict({"place": spaces.Box(-9, 9, (2,)), "one": spaces.Box(-9, 9, (1,))})}
    )
    env.groups.show = lambda observations: {"policy": {"place": observations, "one": observations[:, 1:]}}
    adapted = as_vec_env(env)
    assert sorted(adapted.observation_space.spaces) == ["policy/one", "policy/place"]
    PPOPlus("MultiInputPolicy", adapted, **SETTINGS).learn(100)


def test_a_truncated_episode_without_last_observation_is_worth_what_the_one_before_was():
    """As rsl_rl does, since nothing better is known."""
    env = GymnasiumTensorVecEnv(IsaacWalk(shows_final=False))
    before = env.reset_tensor().clone()
    n_ended = 0
    for _ in range(40):
        step = env.step_tensor(th.zeros(N_ENVS, 1))
        assert th.equal(step.final_observations, before)
        before = step.observations.clone()
        n_ended += int(step.truncated.sum())
    assert n_ended > 3


def test_last_observations_of_an_earlier_step_are_not_used():
    env = GymnasiumTensorVecEnv(IsaacWalk())
    plain = walk()
    env.reset_tensor(), plain.reset_tensor()
    for _ in range(40):
        step, expected = (each.step_tensor(th.zeros(N_ENVS, 1)) for each in (env, plain))
        ends = step.terminated | step.truncated
        assert th.equal(step.final_observations[ends], expected.final_observations[ends])


def test_seed_reset_close_and_attributes_reach_the_simulator():
    env = IsaacWalk()
    adapted = as_vec_env(env)
    adapted.seed(7)
    adapted.reset(), adapted.reset()
    assert env.seeds == [7, None]
    assert adapted.get_attr("seeds") == [env.seeds] * N_ENVS
    adapted.set_attr("level", 5)
    assert not hasattr(env, "level")
    env.difficulty = 1
    adapted.set_attr("difficulty", 2)
    assert env.difficulty == 2
    assert adapted.get_attr("difficulty") == [2] * N_ENVS
    with pytest.raises(AttributeError, match="no_such"):
        adapted.get_attr("no_such")
    adapted.close()
    assert env.is_closed


def test_normalised_and_evaluated():
    model = PPOPlus("MlpPolicy", TensorVecNormalize(as_vec_env(IsaacWalk())), **SETTINGS).learn(200)
    env = TensorVecNormalize.of(model.get_env(), as_vec_env(IsaacWalk()))
    env.training = env.norm_reward = False
    returns, lengths = evaluate_policy(model, env, n_eval_episodes=6, return_episode_rewards=True)
    assert len(returns) == 6
    assert all(5 <= length <= 9 for length in lengths)


def test_infinite_bounds_of_actions():
    assert as_vec_env(IsaacWalk()).action_space == spaces.Box(-100, 100, (1,))
    assert GymnasiumTensorVecEnv(IsaacWalk(), action_bound=1.0).action_space == spaces.Box(-1, 1, (1,))
    assert GymnasiumTensorVecEnv(ManiSkillWalk(), action_bound=5.0).action_space == spaces.Box(-1, 1, (1,))
    for bound in (0.0, float("inf"), float("nan")):
        with pytest.raises(ValueError, match="action_bound must be positive and finite"):
            GymnasiumTensorVecEnv(IsaacWalk(), action_bound=bound)


def test_environments_that_do_not_begin_episodes_themselves():
    for env in (ManiSkillWalk(AutoresetMode.NEXT_STEP), ManiSkillWalk(auto_reset=False)):
        with pytest.raises(ValueError, match="must begin a new episode in the step"):
            as_vec_env(env)
    bare = type("Bare", (IsaacWalk,), {"__module__": "mani_skill.envs.x"})()
    with pytest.raises(TypeError, match="ManiSkillVectorEnv"):
        as_vec_env(bare)
    bare.action_space = bare.single_action_space
    with pytest.raises(TypeError, match="ManiSkillVectorEnv"):
        PPOPlus("MlpPolicy", bare)
    isaac = IsaacWalk()
    isaac.cfg = SimpleNamespace(autoreset_mode=AutoresetMode.DISABLED)
    with pytest.raises(ValueError, match="must begin a new episode in the step"):
        as_vec_env(gym.wrappers.OrderEnforcing(isaac))
    with pytest.warns(UserWarning, match="it is taken for SAME_STEP"):
        as_vec_env(ManiSkillWalk(None))
    arrays = type("NumpyToTorch", (ManiSkillWalk,), {})()
    with pytest.raises(TypeError, match=r"use the environment of arrays: as_vec_env\(env\.env\)"):
        as_vec_env(arrays)


def test_a_vector_environment_of_arrays_may_have_a_device():
    env = gym.make_vec("CartPole-v1", 2, "vector_entry_point")
    env.device = "cuda"
    assert type(as_vec_env(env)) is BatchedVecEnv


def test_a_wrapper_that_makes_a_single_environment_is_one():
    class Single(gym.Wrapper):
        def __init__(self, env):
            super().__init__(env)
            self.observation_space, self.action_space = env.single_observation_space, env.single_action_space

    with pytest.raises(TypeError, match="env must step in batches"):
        as_vec_env(Single(IsaacWalk()))


def test_what_the_simulator_tells_is_logged():
    env = IsaacWalk()
    model = PPOPlus("MlpPolicy", TensorVecNormalize(as_vec_env(env)), **SETTINGS)
    told, step = [], env.step

    def stepping(action):
        values = step(action)
        told.append(values[4]["log"]["Episode_Reward/near"].item())
        values[4]["log"]["level"] = len(told)
        return values

    env.step = stepping
    model.learn(32 * N_ENVS, SimulatorLog(), log_interval=10)
    logged = model.logger.name_to_value
    assert logged["Episode_Reward/near"] == pytest.approx(np.mean(told), rel=1e-5)
    assert logged["Curriculum/level"] == 2.0
    assert logged["Episode/level"] == pytest.approx(np.mean(range(1, 33)))
    with pytest.raises(ValueError, match=r"SimulatorLog needs an environment of as_vec_env\(simulator\)"):
        PPOPlus("MlpPolicy", walk(), **SETTINGS).learn(32, SimulatorLog())


def test_what_mani_skill_records_is_logged_of_episodes_that_have_ended():
    env, plain = as_vec_env(ManiSkillWalk(record_metrics=True)), walk(1.0)
    env.reset_tensor(), plain.reset_tensor()
    n_ended = 0
    for _ in range(20):
        env.step_tensor(th.zeros(N_ENVS, 1))
        step = plain.step_tensor(th.zeros(N_ENVS, 1))
        ends = step.terminated | step.truncated
        if ends.any():
            th.testing.assert_close(env.log["return"], step.rewards[ends].mean())
            n_ended += 1
        else:
            assert env.log == {}
    assert n_ended > 3


def test_lengths_of_first_episodes_may_be_random():
    env = IsaacWalk()
    env.episode_length_buf, env.max_episode_length = th.zeros(N_ENVS, dtype=th.long), 1000
    adapted = GymnasiumTensorVecEnv(gym.wrappers.OrderEnforcing(env), random_first_lengths=True)
    adapted.seed(0)
    adapted.reset()
    assert env.episode_length_buf.dtype == th.long
    assert len(set(env.episode_length_buf.tolist())) == N_ENVS
    assert all(0 <= length < 1000 for length in env.episode_length_buf.tolist())


BROKEN = {
    "four values": (lambda values: values[:4], ValueError, "step must return .* got 4 values"),
    "no tuple": (lambda values: list(values), ValueError, "got list"),
    "arrays": (lambda values: ({"policy": np.zeros((3, 2))}, *values[1:]), TypeError, "observations must be a tensor"),
    "shape": (lambda values: ({"policy": th.zeros(3, 3)}, *values[1:]), ValueError, r"shape \(3, 2\), got \(3, 3\)"),
    "group": (lambda values: ({"critic": th.zeros(3, 2)}, *values[1:]), ValueError, "observations lack 'policy'"),
    "rewards": (lambda values: (values[0], th.zeros(3, 1), *values[2:]), ValueError, "rewards must have the shape"),
    "flag": (lambda values: (*values[:2], [False] * 3, *values[3:]), TypeError, "terminated must be a tensor"),
    "flag shape": (lambda values: (*values[:3], th.zeros(2), values[4]), ValueError, "truncated must have the shape"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_what_a_broken_simulator_returns(name):
    change, kind, message = BROKEN[name]
    env = IsaacWalk()
    step = env.step
    env.step = lambda action: change(step(action))
    model = PPOPlus("MlpPolicy", env, **SETTINGS)
    with pytest.raises(kind, match=f"<GymnasiumTensorVecEnv of IsaacWalk>.*{message}"):
        model.learn(64)
