"""Environments that keep their state where it is hard to see: in shared lists, views, classes and modules.

Each class says in ``outcome`` what must happen: "restored"; "refused", since an attribute cannot be saved; "disproved",
since the proof sees that it goes on in another way.
"""

import enum
import time

import gymnasium as gym
import numpy as np
import torch as th
from gymnasium import spaces

START = [0, 0]
CHANGED_START = [0, 0]
N_CALLS = 0


class Nasty(gym.Env):
    """Observes a number, which ``look`` computes from the state that ``begin`` and ``act`` change."""

    observation_space = spaces.Box(-np.inf, np.inf, (1,), np.float64)
    action_space = spaces.Discrete(3)
    outcome = "restored"

    def begin(self):
        pass

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.begin()
        return self.observation(), {}

    def step(self, action):
        self.act(int(action))
        return self.observation(), float(action), bool(self.np_random.random() < 0.05), False, {}

    def observation(self):
        return np.array([self.look()], np.float64)


class View(Nasty):
    def __init__(self):
        self.grid = np.zeros((4, 4))
        self.row = self.grid[1]
        self.backwards = self.grid[::-1, 2]

    def act(self, action):
        self.row[action] += 1
        self.backwards[action] += self.grid[1, 2]

    def look(self):
        return (self.grid * np.arange(16).reshape(4, 4)).sum()


class SharedList(Nasty):
    def begin(self):
        self.items = []
        self.same_items = self.items

    def act(self, action):
        self.same_items.append(action)

    def look(self):
        return sum(index * item for index, item in enumerate(self.items))


class SharedRows(Nasty):
    def __init__(self):
        self.rows = [[0] * 3] * 3

    def act(self, action):
        self.rows[action][action] += 1

    def look(self):
        return sum(map(sum, self.rows))


class Cycle(Nasty):
    def __init__(self):
        self.node = {"count": 0}
        self.node["next"] = {"next": self.node, "by": (self.node,)}

    def act(self, action):
        self.node["next"]["by"][0]["count"] += action

    def look(self):
        return self.node["next"]["next"]["count"]


class SharedBetweenLayers(gym.Wrapper):
    """Changes a list that the environment holds."""

    outcome = "restored"

    def __init__(self):
        super().__init__(SharedList())

    def reset(self, **kwargs):
        result = super().reset(**kwargs)
        self.items_of_env = self.env.items
        return result

    def step(self, action):
        self.items_of_env.append(1)
        return super().step(action)


class PythonIterator(Nasty):
    outcome = "refused"

    def __init__(self):
        self.numbers = iter(range(10**6))

    def act(self, action):
        self.n = next(self.numbers)

    def look(self):
        return getattr(self, "n", 0)


class Slots(Nasty):
    __slots__ = ("position", "unset")

    def __init__(self):
        self.position = 0

    def act(self, action):
        self.position += action

    def look(self):
        return self.position


class ClassCounter(Nasty):
    n_actions = 0

    def act(self, action):
        type(self).n_actions += action

    def look(self):
        return self.n_actions


class ClassList(Nasty):
    visited = []  # noqa: RUF012

    def __init__(self):
        self.mine = self.visited

    def act(self, action):
        self.mine.append(action)

    def look(self):
        return len(ClassList.visited) + sum(self.visited)


class ClassGenerator(Nasty):
    generator = np.random.default_rng(0)

    def act(self, action):
        self.drawn = self.generator.random()

    def look(self):
        return getattr(self, "drawn", 0.0)


class Phase(enum.Enum):
    HUNT = 1
    FLEE = 2


class ClassEnum(Nasty):
    phase = Phase.HUNT

    def act(self, action):
        type(self).phase = Phase.FLEE

    def look(self):
        return self.phase.value


class DeletedAttribute(Nasty):
    def __init__(self):
        self.bonus = 5

    def act(self, action):
        if action == 2 and hasattr(self, "bonus"):
            del self.bonus

    def look(self):
        return getattr(self, "bonus", 0)


class LazyAttribute(Nasty):
    def act(self, action):
        if action == 2:
            self.memory = getattr(self, "memory", 0) + 1

    def look(self):
        return getattr(self, "memory", -1)


class ModuleConstant(Nasty):
    """Begins at a list of the module, which restoring must not change."""

    def begin(self):
        self.position = START

    def act(self, action):
        self.position = [self.position[0] + action, self.position[1] - 1]

    def look(self):
        return self.position[0] + 10 * START[0]


class ChangedModuleConstant(Nasty):
    outcome = "disproved"

    def begin(self):
        self.position = CHANGED_START

    def act(self, action):
        self.position[0] += action + 1

    def look(self):
        return self.position[0]


class ModuleCounter(Nasty):
    outcome = "disproved"

    def act(self, action):
        global N_CALLS
        N_CALLS += 1

    def look(self):
        return N_CALLS


class Clock(Nasty):
    outcome = "disproved"

    def act(self, action):
        pass

    def look(self):
        return time.perf_counter()


class TensorAndArray(Nasty):
    outcome = "refused"

    def __init__(self):
        self.tensor = th.zeros(3)
        self.array = self.tensor.numpy()

    def act(self, action):
        self.tensor[action] += 1

    def look(self):
        return self.array.sum()


class Masked(Nasty):
    outcome = "refused"

    def __init__(self):
        self.numbers = np.ma.masked_array([1.0, 2.0, 3.0], [True, False, False])

    def act(self, action):
        self.numbers.mask[action] = not self.numbers.mask[action]

    def look(self):
        return float(self.numbers.sum() or 0.0)
