"""Environments and models with Tuple and Dict actions."""

import models
import numpy as np
import pytest
import torch as th
from environments import ASYMMETRIC, SMALL_NET, ToyEnv, draw_masks
from gymnasium import spaces
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import SubprocVecEnv
from states import state_of

from sb3_ppo_plus import PPOPlus
from sb3_ppo_plus.policies.flat_actions import FlatActionSpace
from sb3_ppo_plus.policies.masked_distributions import mask_sizes

NESTED = spaces.Dict(
    {
        "kind": spaces.Discrete(3, start=1),
        "arguments": spaces.Tuple((ASYMMETRIC, spaces.Box(0, 1, (), np.float64))),
        "slots": spaces.Dict({"flags": spaces.MultiBinary(2), "which": spaces.MultiDiscrete([[2, 3], [4, 2]])}),
    }
)
CHOOSING = spaces.Tuple((spaces.Discrete(3), ASYMMETRIC, spaces.Box(-1, 1, (1,)), spaces.Discrete(2)))
USED_PARTS = {"0": [["1"], ["2", "3"], []]}
# Arguments of :func:`build`
CASES = {
    "gaussian": {},
    "beta": {"policy_kwargs": {"action_dist": "beta"}},
    "squashed_gaussian": {"policy_kwargs": {"action_dist": "squashed_gaussian"}},
    "used parts": {"action_space": CHOOSING, "policy_kwargs": {"used_parts": USED_PARTS}},
}
EVERY_CASE = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


class HybridToy(ToyEnv):
    """ToyEnv with a Tuple or Dict action, whose reward depends on each of its numbers.

    :param action_space: the action space
    """

    def __init__(self, action_space=NESTED, **kwargs):
        super().__init__(action_space=action_space, **kwargs)

    @property
    def flat(self):
        return FlatActionSpace(self.action_space)

    def step(self, action):
        assert self.action_space.contains(action), f"{action!r} is outside {self.action_space}"
        row = self.flat.row(action)
        self.calls["step"] += 1
        self.actions.append(action)
        self.n_steps += 1
        reward = float(np.tanh(row * np.cos(np.arange(len(row)))).mean() - 0.5 * np.tanh(self.observation[0]))
        self.observation = self.observation_space.sample()
        terminated = bool(self.np_random.random() < self.p_terminate)
        return self.observation, reward, terminated, not terminated and self.n_steps >= self.max_steps, {}


class MaskedHybridToy(HybridToy):
    """HybridToy with other random masks at each step, which refuses masked choices.

    :param as_structure: whether masks have the structure of the action space; else they are one array
    """

    def __init__(self, action_space=NESTED, as_structure=False, **kwargs):
        super().__init__(action_space, **kwargs)
        self.as_structure = as_structure
        self.sizes = mask_sizes(self.action_space)

    def reset(self, *, seed=None, options=None):
        result = super().reset(seed=seed, options=options)
        self._draw_masks()
        return result

    def step(self, action):
        row = self.flat.row(action)
        chosen = np.concatenate(
            [row[part.columns] for part in self.flat.parts if not isinstance(part.space, spaces.Box)]
        )
        assert all(mask[int(choice)] for mask, choice in zip(self.masks, chosen, strict=True)), f"{action} is masked"
        result = super().step(action)
        self._draw_masks()
        return result

    def _draw_masks(self):
        self.masks = draw_masks(self.np_random, self.sizes)

    def action_masks(self):
        mask = np.concatenate(self.masks)
        if not self.as_structure:
            return mask
        assert self.action_space == NESTED
        return {"kind": mask[:3], "slots": {"flags": mask[3:7], "which": mask[7:]}}


def make_env(n_envs=2, env_class=HybridToy, vec_env_cls=None, wrapper_class=None, **kwargs):
    vec_env_kwargs = {"start_method": "fork"} if vec_env_cls is SubprocVecEnv else None
    return make_vec_env(
        lambda: env_class(**kwargs),
        n_envs,
        seed=0,
        vec_env_cls=vec_env_cls,
        wrapper_class=wrapper_class,
        vec_env_kwargs=vec_env_kwargs,
    )


def build(env=None, action_space=NESTED, policy="MlpPolicy", policy_kwargs=(), **settings):
    env = make_env(action_space=action_space) if env is None else env
    return PPOPlus(policy, env, policy_kwargs=SMALL_NET | dict(policy_kwargs), **models.SETTINGS | settings)


def assert_same_numbers(model, other):
    """All tensors of two models are equal in bits, whatever their names."""
    states = [state_of(one) for one in (model, other)]
    tensors = [[value for value in state.values() if isinstance(value, th.Tensor)] for state in states]
    assert len(tensors[0]) == len(tensors[1]) > 10
    for first, second in zip(*tensors, strict=True):
        assert th.isfinite(first).all() and th.equal(first, second)
