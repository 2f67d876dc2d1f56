"""Environments on tensors for tests, and the same environments one by one."""

import gymnasium as gym
import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.vec_env import VecEnvWrapper

from sb3_ppo_plus.envs import TensorStep, TensorVecEnv

N_ENVS = 3
SETTINGS = {"n_steps": 32, "batch_size": 32, "n_epochs": 2, "seed": 3, "device": "cpu"}


class TensorWalk(TensorVecEnv):
    """Walks on a line with episodes of 5 to 9 steps; every second one ends by its time limit.

    What looks random is computed from the number of the environment, of the episode and of the step. It writes into
    the tensors that it has returned.

    :param num_envs: number of environments
    :param observation_space: what it shows of the place
    :param action_space: Discrete, MultiDiscrete, MultiBinary or Box
    :param first: number of the first environment
    """

    checks_actions = True

    def __init__(self, num_envs=N_ENVS, observation_space=None, action_space=None, first=0, device="cpu"):
        observation_space = observation_space or spaces.Box(-9, 9, (2,))
        super().__init__(num_envs, observation_space, action_space or spaces.Discrete(2), device)
        self.numbers = th.arange(first, first + num_envs)
        self.shown = None

    def _noise(self, n_steps):
        # Between -1 and 1, in powers of 2 alone
        mixed = (self.numbers * 7919 + self.n_episodes * 104729 + n_steps * 1299709 + 12345) * 48271 % 65536
        return mixed.float() / 32768 - 1

    def reset_tensor(self):
        self.n_episodes = th.zeros(self.num_envs, dtype=th.int64)
        self._begin(th.ones(self.num_envs, dtype=th.bool))
        return self._shown()

    def _begin(self, which):
        if not hasattr(self, "place") or len(which) == int(which.sum()):
            self.place, self.left = th.zeros(self.num_envs), th.zeros(self.num_envs, dtype=th.int64)
        self.n_episodes = self.n_episodes + which
        self.place = th.where(which, self._noise(0), self.place)
        self.left = th.where(which, 5 + (self.numbers * 3 + self.n_episodes * 5) % 5, self.left)

    def step_tensor(self, actions):
        if self.checks_actions:
            assert all(self.action_space.contains(action) for action in actions.numpy()), actions
        moves = actions.float().reshape(self.num_envs, -1)
        self.place = self.place + 0.25 * sum(moves.unbind(1)) + 0.125 * self._noise(self.left)
        self.left = self.left - 1
        rewards, ends, is_even = -self.place.abs(), self.left == 0, self.n_episodes % 2 == 0
        final = self._observation()
        self._begin(ends)
        won = {"is_success": self.n_episodes % 3 == 0}
        return TensorStep(self._shown(), rewards, ends & is_even, ends & ~is_even, final, won)

    def _observation(self):
        space = self.observation_space
        if isinstance(space, spaces.Discrete):
            return self.place.clamp(-2, 2).long() + 2
        both = th.stack((self.place, th.ones_like(self.place)), 1)
        if isinstance(space, spaces.Dict):
            others = {"sign": (self.place > 0).long()}
            if "action_mask" in space.spaces:
                others["action_mask"] = self._masks().to(th.int8)
            return {"near": both, **others}
        return both

    def _masks(self):
        return th.stack((th.ones_like(self.place, dtype=th.bool), self.place < 0.5), 1)

    def _shown(self):
        # Later steps write into these tensors
        observation = self._observation()
        if self.shown is None:
            self.shown = observation
        elif isinstance(observation, dict):
            for key, tensor in observation.items():
                self.shown[key].copy_(tensor)
        else:
            self.shown.copy_(observation)
        return self.shown


class MaskedTensorWalk(TensorWalk):
    """A walk that may not go on far away. It writes each mask into the tensor of the first one."""

    masks = None

    def action_masks(self):
        masks = self._masks()
        self.masks = masks if self.masks is None else self.masks.copy_(masks)
        return self.masks


class SavedTensorWalk(MaskedTensorWalk):
    """A walk that can be put back where it was."""

    def get_resume_state(self):
        return {name: getattr(self, name) for name in ("n_episodes", "place", "left")}

    def set_resume_state(self, state):
        vars(self).update(state)


class SingleWalk(gym.Env):
    """One environment of a :class:`TensorWalk`.

    :param first: its number
    :param kind: class of the walk
    :param arguments: its spaces
    """

    def __init__(self, first, kind=TensorWalk, **arguments):
        self.walk = kind(1, first=first, **arguments)
        self.observation_space, self.action_space = self.walk.observation_space, self.walk.action_space
        if hasattr(self.walk, "action_masks"):
            self.action_masks = lambda: self.walk.action_masks()[0].numpy()
        self.begun = False

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        if not self.begun:
            # Later ones begin by themselves
            self.begun, self.following = True, self._row(self.walk.reset_tensor())
        return self.following, {}

    def step(self, action):
        step = self.walk.step_tensor(th.as_tensor(np.asarray(action))[None])
        ended = bool(step.terminated[0] | step.truncated[0])
        self.following = self._row(step.observations)
        shown = self._row(step.final_observations) if ended else self.following
        info = {"is_success": bool(step.extras["is_success"][0])} if ended else {}
        return shown, float(step.rewards[0]), bool(step.terminated[0]), bool(step.truncated[0]), info

    def _row(self, observations):
        if isinstance(observations, dict):
            return {key: self._row(part) for key, part in observations.items()}
        row = observations[0].numpy().copy()
        return row if row.ndim else int(row)


class Plain(VecEnvWrapper):
    """Hides that an environment has tensors, so that it is used through its array methods."""

    def reset(self):
        return self.venv.reset()

    def step_wait(self):
        return self.venv.step_wait()


def assert_same_training(model, other):
    for name, tensor in model.policy.state_dict().items():
        assert th.equal(tensor, other.policy.state_dict()[name]), name
    assert model.num_timesteps == other.num_timesteps
    assert [(each["r"], each["l"]) for each in model.ep_info_buffer] == [
        (each["r"], each["l"]) for each in other.ep_info_buffer
    ]
    assert list(model.ep_success_buffer) == list(other.ep_success_buffer)
