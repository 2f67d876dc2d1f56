"""Environments on tensors train as through their array methods, and as single environments, bit for bit."""

import warnings

import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3 import PPO
from stable_baselines3.common.callbacks import BaseCallback, EvalCallback, StopTrainingOnMaxEpisodes
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize
from tensor_walks import N_ENVS, SETTINGS, Plain, SingleWalk, TensorWalk, assert_same_training

from sb3_ppo_plus import PPOPlus
from sb3_ppo_plus.envs import as_vec_env
from sb3_ppo_plus.envs.vector_envs import device_for
from sb3_ppo_plus.rollout.tensor_buffer import TensorRolloutBuffer


def singles(**arguments):
    return DummyVecEnv([lambda first=first: Monitor(SingleWalk(first, **arguments)) for first in range(N_ENVS)])


def policy_of(env):
    return "MultiInputPolicy" if isinstance(env.observation_space, spaces.Dict) else "MlpPolicy"


class Watcher(BaseCallback):
    """Remembers what callbacks find."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def _on_step(self):
        names = ("actions", "clipped_actions", "new_obs", "rewards", "dones", "values", "log_probs")
        found = {name: np.array(np.asarray(self.locals[name])) for name in names if self.locals[name] is not None}
        self.seen.append((found, [dict(info) for info in self.locals["infos"]]))
        return True


SPACES = {
    "Discrete": {},
    "Discrete observations": {"observation_space": spaces.Discrete(5)},
    "Dict observations": {
        "observation_space": spaces.Dict({"near": spaces.Box(-9, 9, (2,)), "sign": spaces.Discrete(2)})
    },
    "Box actions": {"action_space": spaces.Box(-1, 1, (2,))},
    "float64 bounds": {"action_space": spaces.Box(-1, 1, (2,), np.float64)},
    "MultiDiscrete actions": {"action_space": spaces.MultiDiscrete([3, 2])},
    "MultiBinary actions": {"action_space": spaces.MultiBinary(2)},
    "float64 observations": {"observation_space": spaces.Box(-9, 9, (2,), np.float64)},
}


@pytest.mark.parametrize("name", SPACES)
def test_tensors_have_the_bits_of_the_array_methods_and_of_single_environments(name):
    env = TensorWalk(**SPACES[name])
    native = PPOPlus(policy_of(env), env, **SETTINGS).learn(300)
    assert type(native.rollout_buffer) is TensorRolloutBuffer
    arrays = PPOPlus(policy_of(env), Plain(TensorWalk(**SPACES[name])), **SETTINGS).learn(300)
    assert type(arrays.rollout_buffer) is not TensorRolloutBuffer
    assert_same_training(native, arrays)
    expected = PPO(policy_of(env), singles(**SPACES[name]), **SETTINGS).learn(300)
    assert len(expected.ep_info_buffer) > 10 and len(set(expected.ep_success_buffer)) == 2
    assert_same_training(native, expected)


def test_callbacks_find_what_they_find_with_single_environments():
    native, expected = Watcher(), Watcher()
    PPOPlus("MlpPolicy", TensorWalk(action_space=spaces.Box(-1, 1, (2,))), **SETTINGS).learn(200, native)
    PPOPlus("MlpPolicy", singles(action_space=spaces.Box(-1, 1, (2,))), **SETTINGS).learn(200, expected)
    assert len(native.seen) == len(expected.seen)
    for (found, infos), (others, other_infos) in zip(native.seen, expected.seen, strict=True):
        assert found.keys() == others.keys()
        for name, array in found.items():
            np.testing.assert_array_equal(array, others[name], err_msg=name)
        for info, other in zip(infos, other_infos, strict=True):
            if "episode" not in other:
                assert info == {}
                continue
            np.testing.assert_array_equal(info.pop("terminal_observation"), other.pop("terminal_observation"))
            episode, other_episode = info.pop("episode"), other.pop("episode")
            assert (episode["r"], episode["l"]) == (other_episode["r"], other_episode["l"])
            assert info == other


def test_array_methods_are_those_of_single_environments():
    env, expected = TensorWalk(), singles()
    assert as_vec_env(env) is env
    np.testing.assert_array_equal(env.reset(), expected.reset())
    n_ended = 0
    kept = []
    for _ in range(30):
        actions = np.ones(N_ENVS, np.int64)
        observations, rewards, dones, infos = env.step(actions)
        others = expected.step(actions)
        kept.append((observations, others[0]))
        np.testing.assert_array_equal(rewards, others[1])
        np.testing.assert_array_equal(dones, others[2])
        assert (observations.dtype, rewards.dtype, dones.dtype) == tuple(each.dtype for each in others[:3])
        for info, other in zip(infos, others[3], strict=True):
            n_ended += "episode" in other
            assert ("episode" in info) == ("episode" in other)
            if "episode" in other:
                np.testing.assert_array_equal(info["terminal_observation"], other["terminal_observation"])
                assert info["episode"]["r"] == other["episode"]["r"] and info["episode"]["l"] == other["episode"]["l"]
                assert info["TimeLimit.truncated"] == other["TimeLimit.truncated"]
    assert n_ended > 6
    for observations, others in kept:
        # The environment has written into its tensors since
        np.testing.assert_array_equal(observations, others)


def test_sb3_trains_and_evaluates_and_normalises_on_the_array_methods():
    expected = PPO("MlpPolicy", VecNormalize(singles()), **SETTINGS).learn(200)
    model = PPO("MlpPolicy", VecNormalize(TensorWalk()), **SETTINGS).learn(200)
    assert_same_training(model, expected)
    with_plus = PPOPlus("MlpPolicy", VecNormalize(TensorWalk()), **SETTINGS).learn(200)
    assert_same_training(with_plus, expected)
    returns, lengths = evaluate_policy(model, TensorWalk(), 9, return_episode_rewards=True)
    assert (returns, lengths) == evaluate_policy(model, singles(), 9, return_episode_rewards=True)


def test_sb3s_callbacks_count_and_evaluate():
    stop = StopTrainingOnMaxEpisodes(5)
    model = PPOPlus("MlpPolicy", TensorWalk(), **SETTINGS).learn(2000, [EvalCallback(TensorWalk(), eval_freq=10), stop])
    expected = PPO("MlpPolicy", singles(), **SETTINGS).learn(2000, StopTrainingOnMaxEpisodes(5))
    assert model.num_timesteps == expected.num_timesteps < 200
    assert isinstance(model._last_obs, np.ndarray) and isinstance(model._last_episode_starts, np.ndarray)


def test_a_model_may_change_between_tensors_and_arrays_and_be_saved(tmp_path):
    def changed(model):
        model.learn(96).set_env(singles())
        return model.learn(96)

    model = changed(PPOPlus("MlpPolicy", TensorWalk(), **SETTINGS))
    assert type(model.rollout_buffer) is not TensorRolloutBuffer
    assert_same_training(model, changed(PPO("MlpPolicy", singles(), **SETTINGS)))
    model.save(tmp_path / "model")
    for trusted in (True, False):
        loaded = PPOPlus.load(tmp_path / "model", TensorWalk(), device="cpu", trusted=trusted).learn(96)
        assert_same_training(loaded, PPOPlus.load(tmp_path / "model", singles(), device="cpu").learn(96))
        assert type(loaded.rollout_buffer) is TensorRolloutBuffer


def test_images_with_channels_last_are_used_through_arrays_with_a_warning():
    class Images(TensorWalk):
        def _observation(self):
            return th.zeros(self.num_envs, 36, 36, 3, dtype=th.uint8)

    settings = {**SETTINGS, "n_steps": 4, "batch_size": 12, "n_epochs": 1}
    with pytest.warns(UserWarning, match="<Images> is used through arrays"):
        model = PPOPlus("CnnPolicy", Images(observation_space=spaces.Box(0, 255, (36, 36, 3), np.uint8)), **settings)
    assert type(model.learn(12).rollout_buffer) is not TensorRolloutBuffer


def test_images_with_channels_first_have_the_bits_of_the_array_methods():
    class Images(TensorWalk):
        def _observation(self):
            dark = (self.place.abs() * 20).to(th.uint8)[:, None, None, None].expand(-1, 3, 36, 36)
            return dark.clone()

    def trained(wrap):
        env = wrap(Images(observation_space=spaces.Box(0, 255, (3, 36, 36), np.uint8)))
        return PPOPlus("CnnPolicy", env, **{**SETTINGS, "n_epochs": 1}).learn(96)

    assert_same_training(trained(lambda env: env), trained(Plain))


def test_a_model_is_where_its_environment_is():
    env = TensorWalk()
    assert device_for(env, "auto") == th.device("cpu") == env.device
    assert device_for(env, "cuda") == "cuda"
    assert device_for(singles(), "auto") == "auto"


def test_the_seed_decides_what_an_environment_draws():
    class Drawn(TensorWalk):
        def reset_tensor(self):
            super().reset_tensor()
            self.place = th.rand(self.num_envs, generator=self.generator)
            return self._observation()

    first, second = Drawn(), Drawn()
    assert not np.array_equal(first.reset(), second.reset())
    first.seed(5), second.seed(5)
    drawn = first.reset()
    np.testing.assert_array_equal(drawn, second.reset())
    assert not np.array_equal(drawn, first.reset())


def test_a_hint_at_the_cpu_where_each_step_goes_to_another_device_and_back():
    def set_up(policy, env, device="meta"):
        # SB3 calls it at the end of the set-up, which needs a device that computes
        PPOPlus(policy, env, device=device, _init_setup_model=False)._maybe_recommend_cpu()

    with pytest.warns(UserWarning, match=r"device=meta: .* device='cpu', with compile=True, may be faster"):
        set_up("MlpPolicy", "CartPole-v1")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        set_up("MlpPolicy", TensorWalk())
        set_up("CnnPolicy", "CartPole-v1")
        set_up("MlpPolicy", "CartPole-v1", device="cpu")
