"""TensorVecNormalize has the statistics of SB3's VecNormalize, and what that is used for."""

import copy

import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from rank_runs import results_of
from stable_baselines3.common.callbacks import BaseCallback, EvalCallback
from stable_baselines3.common.running_mean_std import RunningMeanStd
from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize
from tensor_walks import N_ENVS, SETTINGS, Plain, SavedTensorWalk, SingleWalk, TensorWalk, assert_same_training

from sb3_ppo_plus import PPOPlus, TrainingCheckpoint, load_vec_normalize, save_vec_normalize
from sb3_ppo_plus.envs import TensorVecNormalize, tensor_vec_env
from sb3_ppo_plus.rollout.tensor_buffer import TensorRolloutBuffer

KEYS = {"observation_space": spaces.Dict({"near": spaces.Box(-9, 9, (2,)), "sign": spaces.Discrete(2)})}
OPTIONS = {
    "default": ({}, {}),
    "clipped": ({"clip_obs": 0.5, "clip_reward": 0.2, "gamma": 0.9}, {}),
    "rewards alone": ({"norm_obs": False}, {}),
    "observations alone": ({"norm_reward": False}, {}),
    "not learning": ({"training": False}, {}),
    "a key": ({"norm_obs_keys": ["near"]}, KEYS),
}


def assert_same_statistics(first, second, **tolerance):
    for name in ("obs_rms", "ret_rms"):
        if not hasattr(second, name):
            continue
        mine, theirs = getattr(first, name), getattr(second, name)
        pairs = [(mine[key], theirs[key]) for key in theirs] if isinstance(theirs, dict) else [(mine, theirs)]
        for one, other in pairs:
            assert one.count == pytest.approx(other.count, rel=1e-12)
            np.testing.assert_allclose(one.mean, other.mean, **tolerance)
            np.testing.assert_allclose(one.var, other.var, **tolerance)


@pytest.mark.parametrize("name", OPTIONS)
def test_each_step_is_that_of_vec_normalize_to_rounding(name):
    options, arguments = OPTIONS[name]
    env, expected = (
        TensorVecNormalize(TensorWalk(**arguments), **options),
        VecNormalize(TensorWalk(**arguments), **options),
    )
    same = {"rtol": 1e-5, "atol": 1e-6}

    def compare(mine, theirs):
        for key in theirs if isinstance(theirs, dict) else [None]:
            one, other = (mine, theirs) if key is None else (mine[key], theirs[key])
            assert one.dtype == other.dtype
            np.testing.assert_allclose(one, other, **same)

    compare(env.reset(), expected.reset())
    n_ended = 0
    for _ in range(60):
        actions = np.ones(N_ENVS, np.int64)
        (observations, rewards, dones, infos), others = env.step(actions), expected.step(actions)
        compare(observations, others[0])
        np.testing.assert_allclose(rewards, others[1], **same)
        np.testing.assert_array_equal(dones, others[2])
        for info, other in zip(infos, others[3], strict=True):
            if "episode" in other:
                n_ended += 1
                compare(info["terminal_observation"], other["terminal_observation"])
                assert info["episode"]["r"] == other["episode"]["r"]
        compare(env.get_original_obs(), expected.get_original_obs())
        np.testing.assert_array_equal(env.get_original_reward(), expected.get_original_reward())
        np.testing.assert_allclose(env.returns, expected.returns, **same)
    assert n_ended > 10
    assert_same_statistics(env, expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("on_a_device", [False, True])
def test_training_has_the_bits_of_its_array_methods(on_a_device, monkeypatch):
    if on_a_device:
        monkeypatch.setattr(tensor_vec_env, "FREE_TO_READ", set())
    native, plain = TensorVecNormalize(TensorWalk()), TensorVecNormalize(TensorWalk())
    model = PPOPlus("MlpPolicy", native, **SETTINGS).learn(300)
    assert type(model.rollout_buffer) is TensorRolloutBuffer
    expected = PPOPlus("MlpPolicy", Plain(plain), **SETTINGS).learn(300)
    if on_a_device:
        for key, tensor in model.policy.state_dict().items():
            th.testing.assert_close(tensor, expected.policy.state_dict()[key], rtol=1e-4, atol=1e-5)
    else:
        assert_same_training(model, expected)
    assert_same_statistics(native, plain, rtol=1e-12)
    assert len(model.ep_info_buffer) > 10


def test_it_converts_both_ways(tmp_path):
    env = TensorVecNormalize(TensorWalk(), clip_obs=3.0)
    PPOPlus("MlpPolicy", env, **SETTINGS).learn(100)
    back = env.as_vec_normalize(TensorWalk())
    assert type(back) is VecNormalize and back.clip_obs == 3.0 and type(back.obs_rms) is RunningMeanStd
    assert_same_statistics(env, back, rtol=0)
    again = TensorVecNormalize.of(back, TensorWalk())
    assert_same_statistics(again, back, rtol=0)
    env.save(tmp_path / "pickled")
    assert_same_statistics(VecNormalize.load(tmp_path / "pickled", TensorWalk()), back, rtol=0)
    save_vec_normalize(back, tmp_path / "plain.json")
    loaded = TensorVecNormalize.of(load_vec_normalize(tmp_path / "plain.json", TensorWalk()), TensorWalk())
    assert_same_statistics(loaded, back, rtol=0)
    # A copy does not learn with the original
    before = copy.deepcopy(again.obs_rms)
    again.reset(), again.step(np.ones(N_ENVS, np.int64))
    assert again.obs_rms.count > before.count


@pytest.mark.parametrize("kind", [VecNormalize, TensorVecNormalize])
def test_an_evaluation_gets_the_statistics(kind):
    env, eval_env = TensorVecNormalize(TensorWalk()), kind(TensorWalk(), training=False)
    PPOPlus("MlpPolicy", env, **SETTINGS).learn(96, EvalCallback(eval_env, eval_freq=32, n_eval_episodes=3))
    assert_same_statistics(eval_env, env, rtol=1e-12)


class StopAfter(BaseCallback):
    """Ends training after some steps."""

    def _on_step(self):
        return self.num_timesteps < 220


@pytest.mark.parametrize("trusted", [True, False])
def test_a_run_that_is_killed_goes_on_to_the_same_bits(trusted, tmp_path):
    def env():
        return TensorVecNormalize(SavedTensorWalk(), clip_obs=2.0)

    whole = PPOPlus("MlpPolicy", env(), **SETTINGS).learn(400)
    stopped = PPOPlus("MlpPolicy", env(), **SETTINGS)
    stopped.learn(400, [TrainingCheckpoint(96, tmp_path), StopAfter()])
    resumed = PPOPlus.resume(tmp_path, env(), device="cpu", trusted=trusted).continue_learning()
    assert_same_training(resumed, whole)
    assert_same_statistics(resumed.env, whole.env, rtol=0)


@pytest.mark.parametrize(
    "change",
    [
        lambda state: state["obs_rms"].update(mean=np.zeros(3)),
        lambda state: state["obs_rms"].update(var=-np.ones(2)),
        lambda state: state["ret_rms"].update(count=np.nan),
        lambda state: state.update(returns=th.zeros(1)),
    ],
)
def test_a_hostile_state_is_refused(change):
    env = TensorVecNormalize(TensorWalk())
    state = env.get_resume_state()
    change(state)
    with pytest.raises(ValueError, match="must"):
        env.set_resume_state(state)


def test_another_environment_is_refused():
    with pytest.raises(TypeError, match=r"takes a TensorVecEnv, got .*use SB3's VecNormalize"):
        TensorVecNormalize(DummyVecEnv([lambda: SingleWalk(0)]))


@pytest.mark.parametrize("normalizes", [False, True])
def test_two_processes_have_the_bits_of_two_micro_batches(normalizes):
    settings = {**SETTINGS, "batch_size": 64}

    def env(n_envs, first=0):
        walk = TensorWalk(n_envs, first=first)
        return TensorVecNormalize(walk) if normalizes else walk

    whole = PPOPlus("MlpPolicy", env(4), micro_batches=2, **settings).learn(300)

    def train(rank):
        model = PPOPlus("MlpPolicy", env(2, first=2 * rank), distributed="exact", **settings).learn(300)
        assert type(model.rollout_buffer) is TensorRolloutBuffer
        return model.policy.state_dict(), [(each["r"], each["l"]) for each in model.ep_info_buffer]

    for state, episodes in results_of(2, train):
        assert episodes == [(each["r"], each["l"]) for each in whole.ep_info_buffer]
        for key, tensor in state.items():
            if normalizes:
                # Several processes have statistics in arrays, whose means round otherwise
                th.testing.assert_close(tensor, whole.policy.state_dict()[key], rtol=1e-3, atol=1e-4)
            else:
                assert th.equal(tensor, whole.policy.state_dict()[key]), key
