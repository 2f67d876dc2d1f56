"""A symmetry of environments with three numbers and two actions, and what a symmetry was given."""

import numpy as np
from gymnasium import spaces

ACTIONS = spaces.Box(-2.0, 2.0, (2,), np.float32)


def mirror(observations, actions):
    return observations * observations.new_tensor([-1, 1, 1]), actions * actions.new_tensor([-1, 1])


def identity(observations, actions):
    return observations, actions


class Recorder:
    """A mirror that keeps what it was given."""

    def __init__(self, function=mirror):
        self.function, self.calls = function, []

    def __call__(self, observations, actions):
        self.calls.append((observations, actions))
        return self.function(observations, actions)
