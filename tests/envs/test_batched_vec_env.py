"""Environments of gymnasium.vector train as the same environments in SB3's DummyVecEnv do, bit for bit."""

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from gymnasium.vector import AsyncVectorEnv, AutoresetMode, SyncVectorEnv
from gymnasium.wrappers import TimeLimit
from gymnasium.wrappers.vector import RecordEpisodeStatistics
from stable_baselines3 import PPO
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.running_mean_std import RunningMeanStd
from stable_baselines3.common.vec_env import DummyVecEnv, VecFrameStack, VecNormalize
from vector_walks import N_ENVS, SETTINGS, MaskedWalk, VectorWalk, Walk, vector

from sb3_ppo_plus import PPOPlus, ResumableEnv, TrainingCheckpoint
from sb3_ppo_plus.envs import as_vec_env

MODES = list(AutoresetMode)


class StopAfter(BaseCallback):
    """Ends training after some steps."""

    def __init__(self, n_steps):
        super().__init__()
        self.n_steps = n_steps

    def _on_step(self):
        return self.num_timesteps < self.n_steps


def assert_same_parameters(model, other):
    for name, tensor in model.policy.state_dict().items():
        assert th.equal(tensor, other.policy.state_dict()[name]), name


@pytest.mark.parametrize("kind", [SyncVectorEnv, AsyncVectorEnv])
@pytest.mark.parametrize("mode", MODES)
def test_each_mode_has_the_bits_of_sb3_with_a_dummy_vec_env(mode, kind):
    expected = PPO("MlpPolicy", DummyVecEnv([lambda: Monitor(Walk())] * N_ENVS), **SETTINGS).learn(400)
    env = vector(mode, kind)
    model = PPOPlus("MlpPolicy", env, **SETTINGS).learn(400)
    assert_same_parameters(model, expected)
    assert model.num_timesteps == expected.num_timesteps
    assert [(each["r"], each["l"]) for each in model.ep_info_buffer] == [
        (each["r"], each["l"]) for each in expected.ep_info_buffer
    ]
    env.close()


@pytest.mark.parametrize("shared_memory", [True, False])
def test_workers_with_and_without_shared_memory_train_alike(shared_memory):
    env = vector(AutoresetMode.NEXT_STEP, AsyncVectorEnv, shared_memory=shared_memory)
    model = PPOPlus("MlpPolicy", env, **SETTINGS).learn(96)
    env.close()
    # Without it a reset of some environments would be done twice, so that steps which only begin episodes remain
    assert (model.num_timesteps == 96) == shared_memory


SPACES = {
    "Discrete observations": (spaces.Discrete(5), spaces.Discrete(2)),
    "Dict observations": (spaces.Dict({"near": spaces.Box(-9, 9, (2,)), "sign": spaces.Discrete(2)}), None),
    "Box actions": (None, spaces.Box(-1, 1, (2,))),
    "float64 bounds": (None, spaces.Box(-1, 1, (2,), np.float64)),
    "MultiDiscrete actions": (None, spaces.MultiDiscrete([3, 2])),
    "Tuple actions": (None, spaces.Tuple([spaces.Discrete(3), spaces.Box(-1, 1, (2,))])),
}


@pytest.mark.parametrize("name", SPACES)
@pytest.mark.parametrize("mode", MODES)
def test_every_space_has_the_bits_of_a_dummy_vec_env(mode, name):
    policy = "MultiInputPolicy" if name == "Dict observations" else "MlpPolicy"
    expected = PPOPlus(policy, DummyVecEnv([lambda: Walk(*SPACES[name])] * N_ENVS), **SETTINGS).learn(200)
    model = PPOPlus(policy, vector(mode, make=lambda: Walk(*SPACES[name])), **SETTINGS).learn(200)
    assert_same_parameters(model, expected)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("policy_kwargs", [{}, {"memory": "lstm"}, {"features_extractor_class": "transformer"}])
def test_normalisers_frames_memory_and_masks_have_the_bits_of_a_dummy_vec_env(mode, policy_kwargs):
    def learned(env):
        return PPOPlus("MlpPolicy", VecNormalize(VecFrameStack(env, 2)), policy_kwargs=policy_kwargs, **SETTINGS).learn(
            200
        )

    if policy_kwargs.get("features_extractor_class"):
        policy_kwargs = {**policy_kwargs, "features_extractor_kwargs": {"seq_len": 2, "d_model": 8, "n_heads": 2}}
    expected, model = learned(DummyVecEnv([MaskedWalk] * N_ENVS)), learned(as_vec_env(vector(mode, make=MaskedWalk)))
    assert model.env.num_envs == N_ENVS and model._was_given_masks
    assert_same_parameters(model, expected)
    for name in ("obs_rms", "ret_rms"):
        np.testing.assert_array_equal(getattr(model.env, name).mean, getattr(expected.env, name).mean)


def test_infos_are_those_of_a_dummy_vec_env():
    expected, env = DummyVecEnv([lambda: Monitor(Walk())] * N_ENVS), as_vec_env(RecordEpisodeStatistics(vector()))
    env.seed(5), expected.seed(5)
    np.testing.assert_array_equal(env.reset(), expected.reset())
    n_ended = 0
    for _ in range(30):
        actions = np.ones(N_ENVS, np.int64)
        observations, rewards, dones, infos = env.step(actions)
        others = expected.step(actions)
        np.testing.assert_array_equal(observations, others[0])
        np.testing.assert_array_equal(rewards, others[1])
        assert rewards.dtype == others[1].dtype
        np.testing.assert_array_equal(dones, others[2])
        for info, other in zip(infos, others[3], strict=True):
            n_ended += "episode" in other
            assert set(info) | {"TimeLimit.truncated"} == set(other)
            assert (
                info.get("TimeLimit.truncated", False) == other["TimeLimit.truncated"] and info["left"] == other["left"]
            )
            np.testing.assert_array_equal(info.get("terminal_observation"), other.get("terminal_observation"))
            if "episode" in other:
                assert (
                    info["episode"]["r"] == pytest.approx(other["episode"]["r"])
                    and info["episode"]["l"] == other["episode"]["l"]
                )
        assert [info["begun"] for info in env.reset_infos] == [info["begun"] for info in expected.reset_infos]
    assert n_ended > 9


def test_a_step_that_only_begins_an_episode_is_no_transition():
    """Its reward and action change nothing, and it is not counted."""
    models = [PPOPlus("MlpPolicy", VectorWalk(reward_of_reset=reward), **SETTINGS).learn(300) for reward in (0.0, 1e6)]
    assert_same_parameters(*models)
    assert (
        models[0].logger.name_to_value["train/explained_variance"]
        == models[1].logger.name_to_value["train/explained_variance"]
    )
    buffer = models[0].rollout_buffer
    n_rows = buffer.valid.size * (models[0]._n_updates // 2)
    n_episodes = sum(env.n_episodes for env in models[0].get_env().env.envs_inside) - N_ENVS
    assert models[0].num_timesteps == n_rows - n_episodes and n_episodes > 30
    lengths = [each["l"] for each in models[0].ep_info_buffer]
    assert min(lengths) == 5 and max(lengths) == 9


@pytest.mark.parametrize(
    "kwargs",
    [
        {},
        {"compile": True},
        {"policy_kwargs": {"memory": "gru"}},
        {"use_sde": False, "clip_range_vf": 0.2, "target_kl": 0.05},
    ],
)
def test_rewards_of_such_steps_change_no_bit_of_any_kind_of_training(kwargs):
    models = [
        PPOPlus("MlpPolicy", VectorWalk(reward_of_reset=reward), **SETTINGS, **kwargs).learn(200)
        for reward in (0.0, -1e5)
    ]
    assert_same_parameters(*models)


def test_losses_are_means_over_transitions_alone():
    """The same transitions, with and without rows between them, have the same minibatch of all transitions."""
    settings = {**SETTINGS, "n_epochs": 1}
    model = PPOPlus("MlpPolicy", VectorWalk(), **{**settings, "batch_size": 96}).learn(1)
    rollout = model.rollout_buffer.rollout()
    real = rollout.select(rollout.valid.nonzero().flatten())
    assert len(real.actions) == model.num_timesteps < 96
    starts = model.rollout_buffer.episode_starts
    # The row after such a step begins an episode
    after = np.argwhere(~model.rollout_buffer.valid[:-1])
    assert len(after) > 5 and all(starts[step + 1, env] for step, env in after)


class RecordingWalk(VectorWalk):
    """Notes what a normaliser must count: first observations and those of transitions, but no last ones."""

    def reset(self, *, seed=None, options=None):
        result = super().reset(seed=seed, options=options)
        self.counted, self.returns, self.running = [*result[0]], [], np.zeros(self.num_envs)
        return result

    def step(self, actions):
        only_begins = self.ended
        result = super().step(actions)
        self.counted += [*result[0][~self.ended]]
        self.running = 0.9 * self.running + result[1]
        self.returns += [*self.running[~only_begins]]
        self.running[only_begins | self.ended] = 0.0
        return result


def test_statistics_of_a_normaliser_leave_such_steps_out():
    env = RecordingWalk(reward_of_reset=0.5)
    normalize = VecNormalize(as_vec_env(env), gamma=0.9)
    PPOPlus("MlpPolicy", normalize, **SETTINGS).learn(300)
    for statistics, values in ((normalize.obs_rms, env.counted), (normalize.ret_rms, env.returns)):
        assert type(statistics) is RunningMeanStd
        assert statistics.count == pytest.approx(len(values) + 1e-4)
        np.testing.assert_allclose(statistics.mean, np.mean(values, axis=0), rtol=1e-3)
        np.testing.assert_allclose(statistics.var, np.var(values, axis=0), rtol=1e-2, atol=1e-3)


def test_evaluation_counts_episodes_and_not_the_steps_between_them():
    model = PPOPlus("MlpPolicy", VectorWalk(), **SETTINGS)
    _, lengths = evaluate_policy(model, as_vec_env(VectorWalk()), n_eval_episodes=30, return_episode_rewards=True)
    assert len(lengths) == 30 and min(lengths) == 5 and max(lengths) == 9


@pytest.mark.parametrize("kind", [SyncVectorEnv, AsyncVectorEnv])
@pytest.mark.parametrize("mode", MODES)
def test_a_run_that_is_killed_goes_on_to_the_same_bits(mode, kind, tmp_path):
    def envs():
        return VecNormalize(as_vec_env(vector(mode, kind, make=lambda: ResumableEnv(TimeLimit(Walk(), 8)))))

    whole = PPOPlus("MlpPolicy", envs(), **SETTINGS).learn(400)
    stopped = PPOPlus("MlpPolicy", envs(), **SETTINGS)
    stopped.learn(400, [TrainingCheckpoint(96, tmp_path), StopAfter(200)])
    resumed = PPOPlus.resume(tmp_path, envs(), device="cpu").continue_learning()
    assert_same_parameters(resumed, whole)
    assert [each["l"] for each in resumed.ep_info_buffer] == [each["l"] for each in whole.ep_info_buffer]
    assert [each["r"] for each in resumed.ep_info_buffer] == [each["r"] for each in whole.ep_info_buffer]
    for model in (whole, stopped, resumed):
        model.env.close()


class Reused(VectorWalk):
    """Writes all observations into one array."""

    def reset(self, *, seed=None, options=None):
        self.array = np.zeros((self.num_envs, 2), np.float32)
        self.array[:] = super().reset(seed=seed, options=options)[0]
        return self.array, {}

    def step(self, actions):
        observations, *others = super().step(actions)
        self.array[:] = observations
        return self.array, *others


def test_an_array_that_is_written_again_is_copied():
    models = [PPOPlus("MlpPolicy", kind(), **SETTINGS).learn(200) for kind in (VectorWalk, Reused)]
    assert_same_parameters(*models)


def test_gymnasiums_own_wrappers_of_observations_train_as_around_single_environments():
    def scaled(env):
        return gym.wrappers.RescaleObservation(env, np.float32(0), np.float32(1))

    around = gym.wrappers.vector.RescaleObservation(vector(AutoresetMode.DISABLED), np.float32(0), np.float32(1))
    expected = PPOPlus("MlpPolicy", DummyVecEnv([lambda: scaled(Walk())] * N_ENVS), **SETTINGS).learn(200)
    assert_same_parameters(PPOPlus("MlpPolicy", around, **SETTINGS).learn(200), expected)


def test_a_model_goes_on_in_a_vector_environment_that_it_is_given(tmp_path):
    model = PPOPlus("MlpPolicy", vector(), **SETTINGS).learn(100)
    model.save(tmp_path / "model")
    model.set_env(VectorWalk())
    loaded = PPOPlus.load(tmp_path / "model", env=VectorWalk())
    for each in (model, loaded):
        each.set_random_seed(0)
        each.learn(100, reset_num_timesteps=False)
    assert_same_parameters(model, loaded)
