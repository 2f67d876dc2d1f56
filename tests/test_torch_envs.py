"""The environments of examples/torch_envs.py have the physics of Gymnasium's."""

import sys
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch as th

sys.path.append(str(Path(__file__).resolve().parents[1] / "examples"))
from torch_envs import TorchCartPole, TorchPendulum

CASES = [(TorchCartPole, "CartPole-v1"), (TorchPendulum, "Pendulum-v1")]


@pytest.mark.parametrize(("kind", "name"), CASES)
def test_each_step_is_that_of_gymnasium(kind, name):
    n_envs = 5
    env, singles = kind(n_envs, dtype=th.float64), [gym.make(name) for _ in range(n_envs)]
    reference = singles[0].spec
    assert env.max_episode_steps == reference.max_episode_steps
    assert (env.observation_space, env.action_space) == (singles[0].observation_space, singles[0].action_space)
    env.seed(4)
    observations = env.reset_checked()
    random = np.random.default_rng(0)
    begins = np.ones(n_envs, bool)
    n_ended = {"terminated": 0, "truncated": 0}
    for step in range(450):
        for index, single in enumerate(singles):
            if begins[index]:
                single.reset()
            # At each step, as rounding errors would grow: Gymnasium multiplies torques in float32
            single.unwrapped.state = env.state[index].numpy().copy()
        if env.action_space.shape:
            actions = random.uniform(-2, 2, (n_envs, 1)).astype(np.float32)
        elif step < 150:
            actions = random.integers(2, size=n_envs)
        else:
            actions = (observations[:, 2] + 0.3 * observations[:, 3] + 0.02 * observations[:, 1] > 0).long().numpy()
        step, _ = env.step_checked(th.as_tensor(actions))
        observations = step.observations
        begins[:] = False
        for index, single in enumerate(singles):
            observation, reward, terminated, truncated, _ = single.step(actions[index])
            assert step.rewards[index].item() == pytest.approx(reward, rel=1e-6, abs=1e-6)
            is_terminated = step.terminated is not None and bool(step.terminated[index])
            assert (is_terminated, bool(step.truncated[index])) == (terminated, truncated)
            np.testing.assert_allclose(step.final_observations[index].numpy(), observation, rtol=1e-6, atol=1e-6)
            begins[index] = terminated or truncated
            n_ended["terminated"] += terminated
            n_ended["truncated"] += truncated
            if not begins[index]:
                np.testing.assert_array_equal(step.observations[index], step.final_observations[index])
    assert n_ended["terminated" if name == "CartPole-v1" else "truncated"] >= 5


@pytest.mark.parametrize(("kind", "name"), CASES)
def test_first_states_are_distributed_as_those_of_gymnasium(kind, name):
    env, single = kind(4000), gym.make(name)
    env.seed(0)
    drawn, expected = env.reset(), np.stack([single.reset(seed=seed)[0] for seed in range(4000)])
    # Both are uniform; the standard error of a mean is 0.01 of the range
    width = expected.max(axis=0) - expected.min(axis=0)
    np.testing.assert_allclose(drawn.mean(axis=0), expected.mean(axis=0), atol=0.05 * width.max())
    np.testing.assert_allclose(drawn.std(axis=0), expected.std(axis=0), rtol=0.05)


def test_a_time_limit_ends_all_episodes_together_and_new_ones_begin():
    env = TorchPendulum(3, max_episode_steps=4)
    env.seed(1), env.reset()
    for index in range(8):
        _, _, dones, infos = env.step(np.zeros((3, 1), np.float32))
        assert dones.tolist() == [index % 4 == 3] * 3
        assert [info.get("TimeLimit.truncated", False) for info in infos] == dones.tolist()
