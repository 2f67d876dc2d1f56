"""rsl_rl's environments, with the real package."""

import numpy as np
import pytest
import rsl_rl.env
import tensordict
import torch as th
from gymnasium import spaces
from simulator_walks import N_ENVS, SETTINGS, Groups, assert_same_training, walk

from sb3_ppo_plus import PPOPlus
from sb3_ppo_plus.envs import RslRlVecEnv, as_vec_env


class RslWalk(rsl_rl.env.VecEnv):
    """The walk as rsl_rl's environment.

    :param names: of the observation groups
    :param time_outs: whether it tells of them always, in steps that end an episode ("late"), or never
    """

    def __init__(self, names=("policy",), time_outs="always", shows_final=True):
        self.walk, self.groups, self.time_outs, self.shows_final = walk(), Groups(names), time_outs, shows_final
        self.num_envs, self.num_actions, self.device, self.cfg = N_ENVS, 1, "cpu", {}
        self.max_episode_length, self.episode_length_buf = 9, th.zeros(N_ENVS, dtype=th.long)
        self.shown, self.extras = self.walk.reset_tensor(), {}

    def _dict(self, observations):
        return tensordict.TensorDict(self.groups.show(observations), batch_size=[N_ENVS])

    def get_observations(self):
        return self._dict(self.shown)

    def step(self, actions):
        step = self.walk.step_tensor(actions)
        self.shown, dones = step.observations, (step.terminated | step.truncated).long()
        if self.time_outs == "always" or (self.time_outs == "late" and bool(dones.any())):
            self.extras["time_outs"] = step.truncated
        if self.shows_final:
            self.extras["final_obs"] = self._dict(step.final_observations)
        return self._dict(step.observations), step.rewards, dones, self.extras


class MjlabWalk(RslWalk):
    """The walk with the methods that mjlab's and Isaac Lab's wrappers have beside rsl_rl's."""

    seeds = ()

    def seed(self, seed=-1):
        self.seeds = (*self.seeds, seed)
        return seed

    def reset(self):
        self.shown = self.walk.reset_tensor()
        self.episode_length_buf = th.zeros(N_ENVS, dtype=th.long)
        return self._dict(self.shown), {}


class LeggedWalk(MjlabWalk):
    """The walk in the form of legged_gym: tensors, privileged ones apart, and five values."""

    device = "cpu"

    def _dict(self, observations):
        return observations

    def get_privileged_observations(self):
        return -self.shown

    def step(self, actions):
        observations, rewards, dones, extras = super().step(actions)
        extras["episode"] = {"rew_near": rewards.mean()}
        if "final_obs" in extras:
            extras["final_obs"] = {"policy": extras["final_obs"], "critic": -extras["final_obs"]}
        return observations, -observations, rewards, dones, extras

    def reset(self):
        super().reset()
        return self.shown, -self.shown


@pytest.mark.parametrize("make", [MjlabWalk, lambda: LeggedWalk(shows_final=True)], ids=["mjlab", "legged_gym"])
def test_environments_with_a_reset_and_a_seed_have_the_same_bits(make):
    expected = PPOPlus("MlpPolicy", walk(), **SETTINGS).learn(300)
    env = make()
    model = PPOPlus(
        "MlpPolicy", RslRlVecEnv(env, groups=["policy"] if isinstance(env, LeggedWalk) else None), **SETTINGS
    )
    model.learn(300)
    model.ep_success_buffer.extend(expected.ep_success_buffer)
    assert_same_training(model, expected)
    assert env.seeds == (SETTINGS["seed"],)


def test_legged_gyms_privileged_observations_and_log():
    env = RslRlVecEnv(LeggedWalk(shows_final=False))
    assert sorted(env.observation_space.spaces) == ["critic", "policy"]
    observations = env.reset_tensor()
    assert th.equal(observations["critic"], -observations["policy"])
    step = env.step_tensor(th.zeros(N_ENVS, 1))
    assert th.equal(step.observations["critic"], -step.observations["policy"])
    assert env.log["rew_near"] == step.rewards.mean()


def test_random_lengths_survive_the_reset():
    env = MjlabWalk()
    env.max_episode_length = 1000
    adapted = RslRlVecEnv(env, random_first_lengths=True)
    adapted.seed(0)
    adapted.reset()
    assert len(set(env.episode_length_buf.tolist())) == N_ENVS


def test_groups_of_other_types_and_environments_without_a_device():
    env = RslWalk(("policy", "camera", "contact"))
    shown = {"camera": th.zeros(N_ENVS, 3, 8, 8, dtype=th.uint8), "contact": th.zeros(N_ENVS, 4, dtype=th.bool)}
    env.groups.show = lambda observations: {"policy": observations, **shown}
    del env.device
    adapted = RslRlVecEnv(env)
    assert adapted.device == th.device("cpu")
    assert adapted.observation_space["camera"] == spaces.Box(0, 255, (3, 8, 8), np.uint8)
    assert adapted.observation_space["contact"] == spaces.MultiBinary([4])
    for bound in (-1.0, float("nan")):
        with pytest.raises(ValueError, match="action_bound must be positive and finite"):
            RslRlVecEnv(RslWalk(), action_bound=bound)


@pytest.mark.parametrize("time_outs", ["always", "late"])
def test_rsl_rls_environment_has_the_bits_of_a_tensor_vec_env(time_outs):
    expected = PPOPlus("MlpPolicy", walk(), **SETTINGS).learn(300)
    model = PPOPlus("MlpPolicy", RslWalk(time_outs=time_outs), **SETTINGS).learn(300)
    assert type(model.env) is RslRlVecEnv
    model.ep_success_buffer.extend(expected.ep_success_buffer)
    assert_same_training(model, expected)


def test_timeouts_have_the_value_that_rsl_rl_gives_them():
    """Its ``PPO.process_env_step`` adds gamma times the value of the observation before the step."""
    env = as_vec_env(RslWalk(shows_final=False))
    model = PPOPlus("MlpPolicy", env, **{**SETTINGS, "n_steps": 16}, _init_setup_model=True)
    model.learn(16 * N_ENVS)
    plain, shown = RslWalk(shows_final=False), []
    rewards = []
    buffer = model.rollout_buffer
    first = plain.get_observations()["policy"].clone()
    before = first
    for row in range(16):
        observations, reward, _, extras = plain.step(th.as_tensor(np.asarray(buffer.actions[row])).reshape(3, 1))
        value = th.as_tensor(np.asarray(buffer.values[row])).reshape(3)
        rewards.append(reward + model.gamma * value * extras["time_outs"])
        shown.append(before)
        before = observations["policy"].clone()
    assert th.equal(th.as_tensor(np.asarray(buffer.observations)).reshape(16, 3, 2), th.stack(shown))
    th.testing.assert_close(th.as_tensor(np.asarray(buffer.rewards)), th.stack(rewards), rtol=0, atol=1e-6)


def test_an_environment_that_knows_no_timeouts_terminates():
    env = as_vec_env(RslWalk(time_outs="never"))
    env.reset_tensor()
    steps = [env.step_tensor(th.zeros(N_ENVS, 1)) for _ in range(20)]
    assert all(step.truncated is None for step in steps)
    assert any(bool(step.terminated.any()) for step in steps)


def test_groups_are_keys_for_actor_and_critic():
    model = PPOPlus(
        "MultiInputPolicy",
        RslWalk(("policy", "critic")),
        policy_kwargs={"actor_keys": ["policy"], "critic_keys": ["policy", "critic"]},
        **SETTINGS,
    ).learn(200)
    assert sorted(model.observation_space.spaces) == ["critic", "policy"]
    assert RslRlVecEnv(RslWalk(("policy", "critic")), groups=["policy"]).observation_space.shape == (2,)


def test_spaces_device_and_bounds():
    env = as_vec_env(RslWalk())
    assert env.observation_space == spaces.Box(-np.inf, np.inf, (2,))
    assert env.action_space == spaces.Box(-100, 100, (1,))
    assert RslRlVecEnv(RslWalk(), action_bound=2.0).action_space == spaces.Box(-2, 2, (1,))
    assert PPOPlus("MlpPolicy", RslWalk(), n_steps=4).device == th.device("cpu")
    assert env.get_attr("max_episode_length") == [9] * N_ENVS


def test_a_loaded_model_takes_it(tmp_path):
    PPOPlus("MlpPolicy", RslWalk(), **SETTINGS).save(tmp_path / "model.zip")
    model = PPOPlus.load(tmp_path / "model.zip", env=RslWalk(), device="cpu")
    model.learn(100)
    model.set_env(RslWalk())
    model.learn(100)
