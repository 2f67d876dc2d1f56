"""A walk of ``tensor_walks`` behind the interfaces of simulators."""

import sys
from pathlib import Path

import gymnasium as gym
import torch as th
from gymnasium import spaces
from gymnasium.vector import AutoresetMode
from gymnasium.vector.utils import batch_space

sys.path.append(str(Path(__file__).resolve().parents[1]))
from tensor_walks import N_ENVS, TensorWalk, assert_same_training

__all__ = ["N_ENVS", "SETTINGS", "Groups", "IsaacWalk", "ManiSkillWalk", "assert_same_training", "walk"]

SETTINGS = {"n_steps": 32, "batch_size": 32, "n_epochs": 2, "seed": 3, "device": "cpu"}
GROUPS = {"policy": spaces.Box(-9, 9, (2,)), "critic": spaces.Box(-9, 9, (2,))}


def walk(bound=100.0):
    """Make the walk that a simulator's walk must equal."""
    return TensorWalk(action_space=spaces.Box(-bound, bound, (1,)))


class Groups:
    """Shows the walk's observations as a simulator does.

    :param names: of the groups; None: a tensor
    """

    def __init__(self, names):
        self.names = names

    def space(self, space):
        return space if self.names is None else spaces.Dict({name: GROUPS.get(name, space) for name in self.names})

    def show(self, observations):
        if self.names is None:
            return observations
        # The critic sees the place mirrored
        shown = {"policy": observations, "critic": -observations}
        return {name: shown[name] for name in self.names}


class IsaacWalk(gym.Env):
    """The walk as an environment of Isaac Lab.

    :param names: of the observation groups; None: a tensor
    :param shows_final: whether it shows the last observations of episodes
    """

    def __init__(self, names=("policy",), shows_final=True):
        self.walk, self.groups, self.shows_final = walk(), Groups(names), shows_final
        self.num_envs, self.device = N_ENVS, "cpu"
        self.single_observation_space = self.groups.space(self.walk.observation_space)
        self.single_action_space = spaces.Box(-float("inf"), float("inf"), (1,))
        self.observation_space = batch_space(self.single_observation_space, N_ENVS)
        self.action_space = batch_space(self.single_action_space, N_ENVS)
        self.seeds, self.extras, self.is_closed = [], {}, False

    def reset(self, *, seed=None, options=None):
        self.seeds.append(seed)
        return self.groups.show(self.walk.reset_tensor()), {}

    def step(self, action):
        step = self.walk.step_tensor(action)
        # What is left of actions must not be what is stored
        action.zero_()
        ends = step.terminated | step.truncated
        if self.shows_final and bool(ends.any()):
            self.extras["final_obs"] = self.groups.show(step.final_observations)
        self.extras["log"] = {"Episode_Reward/near": step.rewards.mean(), "Curriculum/level": 2.0}
        return self.groups.show(step.observations), step.rewards, step.terminated, step.truncated, self.extras

    def close(self):
        self.is_closed = True


class ManiSkillWalk(gym.vector.VectorEnv):
    """The walk as ManiSkill's ``ManiSkillVectorEnv``, with success in the infos."""

    def __init__(self, mode=AutoresetMode.SAME_STEP, auto_reset=True, record_metrics=False):
        self.walk, self.auto_reset, self.record_metrics = walk(1.0), auto_reset, record_metrics
        self.num_envs, self.device, self.metadata = N_ENVS, th.device("cpu"), {"autoreset_mode": mode}
        self.single_observation_space, self.single_action_space = self.walk.observation_space, self.walk.action_space
        self.observation_space = batch_space(self.single_observation_space, N_ENVS)
        self.action_space = batch_space(self.single_action_space, N_ENVS)

    def reset(self, *, seed=None, options=None):
        return self.walk.reset_tensor(), {}

    def step(self, actions):
        step = self.walk.step_tensor(actions)
        infos = {"success": step.extras["is_success"]}
        if self.record_metrics:
            infos["episode"] = {"return": step.rewards.clone()}
        ends = step.terminated | step.truncated
        if bool(ends.any()):
            # Infos of a reset have no success yet
            infos = {"success": th.zeros(N_ENVS, dtype=th.bool), "final_info": infos}
            infos |= {"final_observation": step.final_observations, "_final_observation": ends}
        return step.observations, step.rewards, step.terminated, step.truncated, infos
