"""Environments that keep their state where it is hard to see: in functions, methods, generators and other objects."""

import functools

import numpy as np
import pygame
import torch as th
from nasty_environments import LazyAttribute, Nasty
from stable_baselines3.common.noise import OrnsteinUhlenbeckActionNoise


class Noise(Nasty):
    def __init__(self):
        self.noise = OrnsteinUhlenbeckActionNoise(np.zeros(1), np.ones(1))

    def act(self, action):
        self.last = self.noise()[0]

    def look(self):
        return getattr(self, "last", 0.0)


def counter():
    n = 0

    def count(by):
        nonlocal n
        n += by
        return n

    return count


class Closure(Nasty):
    def __init__(self):
        self.count = counter()

    def act(self, action):
        self.n = self.count(action)

    def look(self):
        return self.count(0)


class ClosureOverSharedList(Nasty):
    def __init__(self):
        self.items = items = []
        self.add = lambda item: items.append(item)

    def act(self, action):
        self.add(action)

    def look(self):
        return sum(self.items)


class ClosureOverPythonGenerator(Nasty):
    outcome = "refused"

    def __init__(self):
        numbers = (n for n in range(10**6))
        self.next_number = lambda: next(numbers)

    def act(self, action):
        self.n = self.next_number()

    def look(self):
        return getattr(self, "n", 0)


class Cached(Nasty):
    def begin(self):
        self.n = 0

    @functools.lru_cache  # noqa: B019
    def square(self, n):
        return n * n

    def act(self, action):
        self.n += action

    def look(self):
        return self.square(self.n)


class CachedDraws(Nasty):
    outcome = "disproved"

    def begin(self):
        self.n = 0

    @functools.lru_cache  # noqa: B019
    def level(self, n):
        return self.np_random.random()

    def act(self, action):
        self.n += 1

    def look(self):
        return self.level(self.n) + self.np_random.random()


def add(items, item):
    items.append(item)


class Partial(Nasty):
    def __init__(self):
        self.items = []
        self.add = functools.partial(add, self.items)

    def act(self, action):
        self.add(action)

    def look(self):
        return sum(self.items) + sum(self.add.args[0])


class Walker:
    def __init__(self):
        self.position = 0

    def walk(self, by):
        self.position += by
        return self.position


class MethodOfAnother(Nasty):
    def __init__(self):
        self.walk = Walker().walk
        self.items = []
        self.append = self.items.append

    def act(self, action):
        self.append(self.walk(action))

    def look(self):
        return sum(self.items)


class StateMachine(Nasty):
    def begin(self):
        self.position = 0
        self.behave = self.hunt

    def hunt(self):
        self.position += 1

    def flee(self):
        self.position -= 1

    def act(self, action):
        if action == 2:
            self.behave = self.flee if self.position > 0 else self.hunt
        self.behave()

    def look(self):
        return self.position


class MutableDefaults(Nasty):
    def __init__(self):
        def count(item, items=[], *, total={"sum": 0}):  # noqa: B006
            count.calls += 1
            items.append(item)
            total["sum"] += item
            return count.calls + len(items) + total["sum"]

        count.calls = 0
        self.count = count

    def act(self, action):
        self.n = self.count(action)

    def look(self):
        return getattr(self, "n", 0)


class Generators(Nasty):
    """Two attributes share a generator in the first episode alone; others are in a list."""

    def __init__(self):
        self.n_episodes = 0

    def begin(self):
        self.several = [np.random.default_rng(1), np.random.RandomState(2)]
        self.own = self.np_random if self.n_episodes == 0 else np.random.default_rng(self.n_episodes)
        self.n_episodes += 1

    def act(self, action):
        self.drawn = self.own.random() + self.several[action % 2].normal()

    def look(self):
        return getattr(self, "drawn", 0.0)


class Spawning(Nasty):
    """Its generator has children, which no draw shows."""

    def act(self, action):
        (child,) = self.np_random.spawn(1)
        self.drawn = child.random()

    def look(self):
        return getattr(self, "drawn", 0.0)


class Simulator:
    """Moves, and is no environment."""

    def __init__(self):
        self.position = 0


class Adapter(Nasty):
    """Has a simulator where wrappers have their environment."""

    outcome = "refused"

    def __init__(self):
        self.env = Simulator()

    def act(self, action):
        self.env.position += action

    def look(self):
        return self.env.position


class Game(Nasty):
    outcome = "refused"

    def __init__(self):
        self.player = pygame.Rect(0, 0, 5, 5)

    def act(self, action):
        self.player.move_ip(action, 0)

    def look(self):
        return self.player.x


class OtherEnvironment(Nasty):
    outcome = "refused"

    def __init__(self):
        self.inner = LazyAttribute()

    def act(self, action):
        self.inner.act(action)

    def look(self):
        return self.inner.look()


class Module(Nasty):
    outcome = "refused"

    def __init__(self):
        self.network = th.nn.Linear(1, 1)

    def act(self, action):
        self.network.weight.data += action

    def look(self):
        return self.network.weight.item()


class Dictionary(dict):
    """A dict with an attribute and a method."""

    def __call__(self, by):
        self.n = getattr(self, "n", 0) + by
        return self.n


class CallableDictionary(Nasty):
    outcome = "refused"

    def __init__(self):
        self.count = Dictionary()

    def act(self, action):
        self.n = self.count(action)

    def look(self):
        return getattr(self, "n", 0)
