"""Environments that cannot be saved, and what is done with them: playing them, and saving them at some step."""

import copy
import random
import weakref

import gymnasium as gym
import numpy as np
import torch as th
from gymnasium import spaces
from states import written_and_read

from sb3_ppo_plus import ResumableEnv


class Body:
    """An object that is no plain value, as a simulator's."""

    def __init__(self, position):
        self.position = position


class Simulated(gym.Env):
    """Makes a body at each reset, which keeps the state where ResumableEnv cannot see it."""

    observation_space = spaces.Box(-100.0, 100.0, (2,), np.float64)
    action_space = spaces.Box(-1.0, 1.0, (2,), np.float64)
    length = 9

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.n_steps = 0
        self.body = Body(self.start())
        return self.body.position.copy(), {}

    def start(self):
        return self.np_random.normal(size=2)

    def noise(self):
        return self.np_random.normal()

    def step(self, action):
        self.n_steps += 1
        self.body.position = 0.9 * self.body.position + action + 0.1 * self.noise()
        reward = float(self.body.position.sum())
        return self.body.position.copy(), reward, self.n_steps >= self.length, False, {}


class Counting(Simulated):
    """Later episodes are harder, and no reset makes them easy again."""

    n_episodes = 0

    def __init__(self):
        self.n_episodes = 0
        self.visits = {}

    def start(self):
        self.n_episodes += 1
        self.visits[self.n_episodes % 3] = self.visits.get(self.n_episodes % 3, 0) + 1
        return super().start() + self.n_episodes + self.visits[self.n_episodes % 3]


class Global(Simulated):
    """Draws from the global generators of Python and NumPy."""

    def start(self):
        return np.random.normal(size=2)

    def noise(self):
        return random.gauss(0, 1) + np.random.normal()


class Nested(gym.Env):
    """Holds an environment with a generator of its own, as those of PointMaze do."""

    observation_space = Simulated.observation_space
    action_space = Simulated.action_space

    def __init__(self):
        self.inner = Simulated()

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return self.inner.reset(seed=seed)

    def step(self, action):
        return self.inner.step(action)


class Drawing(gym.Wrapper):
    """Draws from the generator of the environment, as Gymnasium's StickyAction does."""

    def step(self, action):
        return self.env.step(action if self.np_random.random() < 0.5 else -action)


class Hidden(Simulated):
    """Its steps depend on how many there were in this process."""

    n_steps_of_all = [0]  # noqa: RUF012  # see above

    def noise(self):
        HIDDEN_STEPS.append(0)
        return len(HIDDEN_STEPS)


class HiddenFromStart(Hidden):
    """Its episodes begin elsewhere each time."""

    def start(self):
        return super().start() + self.noise()


HIDDEN_STEPS = []


class InModule(Simulated):
    """Its attributes can be saved, but its state is in this module."""

    def reset(self, *, seed=None, options=None):
        gym.Env.reset(self, seed=seed)
        self.n_steps = 0
        POSITIONS[self.number()] = self.np_random.normal(size=2)
        return POSITIONS[self.number()].copy(), {}

    def number(self):
        self.name = getattr(self, "name", f"environment {id(self)}")
        return self.name

    def step(self, action):
        self.n_steps += 1
        position = POSITIONS[self.name] = 0.9 * POSITIONS[self.name] + action
        return position.copy(), float(position.sum()), self.n_steps >= self.length, False, {}


POSITIONS = {}


def replayed(env, **kwargs):
    return ResumableEnv(env, by="replay", **kwargs)


def drawn(env, n_steps, seed=0):
    """Actions from a generator that nothing else uses."""
    space = env.action_space
    rng = np.random.default_rng(seed)
    if isinstance(space, spaces.Discrete):
        return [np.int64(space.start + rng.integers(space.n)) for _ in range(n_steps)]
    return [rng.uniform(-1, 1, space.shape).astype(space.dtype) for _ in range(n_steps)]


def outputs(env, actions):
    """Take steps, and resets at the end of episodes, and return what they return."""
    seen = []
    for action in actions:
        # A copy, since an environment may change it
        observation, reward, terminated, truncated, _ = env.step(copy.deepcopy(action))
        seen.append((observation, float(reward), bool(terminated), bool(truncated)))
        if terminated or truncated:
            seen.append(env.reset()[0])
    return seen


def assert_goes_on_in_another(make, n_before=30, n_after=30, n_others=5, seed=0):
    """Another environment, in an episode of its own, goes on as the saved one does, and so does the saved one."""
    env, other = make(), make()
    env.reset(seed=seed)
    other.reset(seed=seed + 99)
    outputs(env, drawn(env, n_before, seed))
    outputs(other, drawn(other, n_others, seed + 1))
    state = written_and_read(env.get_resume_state())
    actions = drawn(env, n_after, seed + 2)
    expected = outputs(env, actions)
    for again in (other, env):
        # A state that was put back can be saved again
        for _ in range(2):
            again.set_resume_state(state)
            state = written_and_read(again.get_resume_state())
        np.testing.assert_equal(outputs(again, actions), expected)


class Chained(Simulated):
    """Holds lists in lists, deeper than recursion goes."""

    def __init__(self):
        self.chain = None
        for index in range(3000):
            self.chain = [index, self.chain]


class OfGraph(Simulated):
    """Holds a tensor of a graph of gradients, which cannot be copied."""

    def __init__(self):
        self.scale = th.ones(2, requires_grad=True) * 2


class Dangling(Simulated):
    """Refers to an object that is gone: each look at the reference is an error."""

    def __init__(self):
        self.owner = weakref.proxy(Body(np.zeros(2)))
