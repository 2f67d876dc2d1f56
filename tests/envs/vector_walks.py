"""Environments of gymnasium.vector for tests."""

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from gymnasium.vector import AutoresetMode, SyncVectorEnv

SETTINGS = {"n_steps": 32, "batch_size": 32, "n_epochs": 2, "seed": 3, "device": "cpu"}
N_ENVS = 3


class Walk(gym.Env):
    """A walk on a line with episodes of 5 to 9 steps; every second one ends by its time limit.

    :param observation_space: what it shows of the place
    :param action_space: Discrete, Box, or a Tuple of both
    """

    def __init__(self, observation_space=None, action_space=None):
        self.observation_space = observation_space or spaces.Box(-9, 9, (2,))
        self.action_space = action_space or spaces.Discrete(2)
        self.n_episodes = 0

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.n_episodes += 1
        self.place, self.left = float(self.np_random.normal()), int(self.np_random.integers(5, 10))
        return self._observation(), {"begun": self.n_episodes}

    def step(self, action):
        assert self.action_space.contains(action), f"{action!r}"
        parts = action if isinstance(action, tuple) else (action,)
        self.place += 0.3 * float(np.sum([np.mean(part) for part in parts])) + 0.1 * self.np_random.normal()
        self.left -= 1
        ends, is_even = self.left == 0, self.n_episodes % 2 == 0
        return self._observation(), -abs(self.place), ends and is_even, ends and not is_even, {"left": self.left}

    def _observation(self):
        place = np.array([self.place, 1.0], np.float32)
        space = self.observation_space
        if isinstance(space, spaces.Discrete):
            return int(np.clip(self.place, -2, 2)) + 2
        if isinstance(space, spaces.Dict):
            return {"near": place, "sign": int(self.place > 0)}
        return place


class MaskedWalk(Walk):
    """A walk that may not go on far away."""

    def action_masks(self):
        return np.array([True, self.place < 0.5])


class VectorWalk(gym.vector.VectorEnv):
    """Walks that begin an episode in the step after its end (NEXT_STEP), as environments with own vector code do.

    :param reward_of_reset: the reward of the step that only begins an episode
    """

    def __init__(self, num_envs=N_ENVS, reward_of_reset=0.0):
        self.num_envs, self.reward_of_reset = num_envs, reward_of_reset
        self.metadata = {"autoreset_mode": AutoresetMode.NEXT_STEP}
        self.envs_inside = [Walk() for _ in range(num_envs)]
        self.single_observation_space, self.single_action_space = Walk().observation_space, Walk().action_space
        self.observation_space = gym.vector.utils.batch_space(self.single_observation_space, num_envs)
        self.action_space = gym.vector.utils.batch_space(self.single_action_space, num_envs)

    def reset(self, *, seed=None, options=None):
        seeds = [None if seed is None else seed + index for index in range(self.num_envs)]
        results = [env.reset(seed=each) for env, each in zip(self.envs_inside, seeds, strict=True)]
        self.ended, self.n_steps = np.zeros(self.num_envs, bool), 0
        return np.stack([observation for observation, _ in results]), {}

    def step(self, actions):
        self.n_steps += 1
        rows = []
        for env, action, has_ended in zip(self.envs_inside, actions, self.ended, strict=True):
            rows.append((env.reset()[0], self.reward_of_reset, False, False) if has_ended else env.step(action)[:4])
        observations, rewards, terminated, truncated = (np.array(column) for column in zip(*rows, strict=True))
        self.ended = terminated | truncated
        return observations, rewards, terminated, truncated, {}


def vector(mode=AutoresetMode.SAME_STEP, kind=SyncVectorEnv, n_envs=N_ENVS, make=Walk, **kwargs):
    return kind([make] * n_envs, autoreset_mode=mode, **kwargs)
