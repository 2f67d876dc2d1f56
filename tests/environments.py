"""Small environments and recorders that the tests share."""

import copy
from collections import Counter

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.logger import KVWriter, Logger
from stable_baselines3.common.vec_env import DummyVecEnv

from sb3_ppo_plus.policies.masked_distributions import mask_sizes

BOX = spaces.Box(-1.0, 1.0, (3,), np.float32)
ASYMMETRIC = spaces.Box(np.array([-0.5, 2.0], np.float32), np.array([3.0, 2.5], np.float32))
IMAGE = spaces.Box(0, 255, (36, 36, 1), np.uint8)
CHANNEL_FIRST = spaces.Box(0, 255, (1, 36, 36), np.uint8)
DICT = spaces.Dict({"vector": BOX, "kind": spaces.Discrete(4), "image": IMAGE})
SMALL_DICT = spaces.Dict({"vector": BOX, "kind": spaces.Discrete(4)})
ACTION_SPACES = {
    "box": ASYMMETRIC,
    "discrete": spaces.Discrete(3),
    "multi_discrete": spaces.MultiDiscrete([3, 2]),
    "multi_binary": spaces.MultiBinary(3),
}
MASKED_ACTION_SPACES = {
    "discrete": spaces.Discrete(5),
    "multi_discrete": spaces.MultiDiscrete([3, 2, 4]),
    "multi_binary": spaces.MultiBinary(3),
}
SMALL_NET = {"net_arch": [8, 8]}


class ToyEnv(gym.Env):
    """Random observations; the reward is a function of action and observation; refuses actions outside its space.

    :param observation_space: any space
    :param action_space: any space
    :param max_steps: steps until truncation
    :param p_terminate: probability of termination at each step
    """

    def __init__(self, observation_space=BOX, action_space=ASYMMETRIC, max_steps=7, p_terminate=0.1):
        self.observation_space = copy.deepcopy(observation_space)
        self.action_space = copy.deepcopy(action_space)
        self.max_steps = max_steps
        self.p_terminate = p_terminate
        self.actions = []
        self.calls = Counter()

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        if seed is not None:
            self.observation_space.seed(seed)
        self.calls["reset"] += 1
        self.n_steps = 0
        self.observation = self.observation_space.sample()
        return self.observation, {}

    def step(self, action):
        assert self.action_space.contains(action), f"{action!r} is outside {self.action_space}"
        self.calls["step"] += 1
        self.actions.append(action)
        self.n_steps += 1
        flat = spaces.flatten(self.observation_space, self.observation).astype(np.float64)
        reward = float(np.tanh(np.mean(action)) - 0.5 * np.tanh(flat[:3].mean()))
        self.observation = self.observation_space.sample()
        terminated = bool(self.np_random.random() < self.p_terminate)
        return self.observation, reward, terminated, not terminated and self.n_steps >= self.max_steps, {}


def draw_masks(np_random, sizes):
    """Random masks of some sizes, each with at least one valid choice."""
    masks = [np_random.random(size) < 0.5 for size in sizes]
    for mask in masks:
        mask[np_random.integers(len(mask))] = True
    return masks


class MaskedEnv(ToyEnv):
    """ToyEnv with other random valid actions at each step, which refuses all others.

    :param action_space: Discrete, MultiDiscrete or MultiBinary
    """

    def __init__(self, action_space=MASKED_ACTION_SPACES["discrete"], **kwargs):
        super().__init__(action_space=action_space, **kwargs)
        self.sizes = mask_sizes(action_space)

    def reset(self, *, seed=None, options=None):
        result = super().reset(seed=seed, options=options)
        self._draw_masks()
        return result

    def step(self, action):
        chosen = np.asarray(action).reshape(-1)
        assert all(mask[choice] for mask, choice in zip(self.masks, chosen, strict=True)), f"{action} is masked"
        result = super().step(action)
        self._draw_masks()
        return result

    def _draw_masks(self):
        self.masks = draw_masks(self.np_random, self.sizes)

    def action_masks(self):
        return np.concatenate(self.masks)


class MaskInObservation(gym.ObservationWrapper):
    """Hides ``action_masks()`` of an env, and gives the masks as an observation; vectors under the key "vector".

    :param env: a MaskedEnv
    :param mask_space: space of the masks
    """

    def __init__(self, env, mask_space=None):
        super().__init__(env)
        inner = env.observation_space
        self.parts = inner.spaces if isinstance(inner, spaces.Dict) else {"vector": inner}
        n = sum(env.sizes)
        self.observation_space = spaces.Dict({**self.parts, "action_mask": mask_space or spaces.MultiBinary(n)})

    def observation(self, observation):
        parts = observation if isinstance(observation, dict) else {"vector": observation}
        mask_space = self.observation_space["action_mask"]
        return {**parts, "action_mask": self.env.action_masks().astype(mask_space.dtype).reshape(mask_space.shape)}

    def get_wrapper_attr(self, name):
        if name == "action_masks":
            raise AttributeError(name)
        return super().get_wrapper_attr(name)


class ConstantRewardEnv(gym.Env):
    """Reward 1 at every step, until the episode ends by truncation or by termination.

    The observation is the number of steps done, so that terminal and first observations are told apart.
    """

    observation_space = spaces.Box(0.0, 100.0, (1,), np.float32)
    action_space = spaces.Discrete(2)

    def __init__(self, length=5, truncates=True):
        self.length = length
        self.truncates = truncates

    def _observation(self):
        return np.array([self.n_steps], np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.n_steps = 0
        return self._observation(), {}

    def step(self, action):
        self.n_steps += 1
        over = self.n_steps >= self.length
        return self._observation(), 1.0, over and not self.truncates, over and self.truncates, {}


def make_env(n_envs=1, **kwargs):
    """A DummyVecEnv of ToyEnvs in Monitors."""
    return make_vec_env(lambda: ToyEnv(**kwargs), n_envs=n_envs)


def make_masked_env(n_envs=2, **kwargs):
    """A DummyVecEnv of MaskedEnvs in Monitors."""
    return make_vec_env(lambda: MaskedEnv(**kwargs), n_envs=n_envs)


def toy_envs(vec_env: DummyVecEnv):
    return [env.unwrapped for env in vec_env.unwrapped.envs]


class LogRecorder(KVWriter):
    """Keeps everything that a model logs: one dict per dump."""

    def __init__(self):
        self.dumps = []

    def write(self, key_values, key_excluded, step=0):
        self.dumps.append(dict(key_values))

    def close(self):
        pass


def record_logs(model):
    """Attach a recorder; what the last update logged stays in ``model.logger.name_to_value`` until the next dump."""
    recorder = LogRecorder()
    model.set_logger(Logger(None, [recorder]))
    return recorder


def logs_of_updates(model, total_timesteps, **kwargs):
    """Train, and return what was logged, one dict per update."""
    recorder = record_logs(model)
    model.learn(total_timesteps, **kwargs)
    return [*recorder.dumps[1:], dict(model.logger.name_to_value)]
