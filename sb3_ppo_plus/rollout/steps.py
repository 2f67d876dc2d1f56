"""What a rollout loop does with its environment: in arrays, as SB3, or in tensors."""

from __future__ import annotations

from typing import Any

import torch as th
from stable_baselines3.common.buffers import RolloutBuffer
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.type_aliases import PyTorchObs
from stable_baselines3.common.utils import obs_as_tensor
from stable_baselines3.common.vec_env import VecEnv

from sb3_ppo_plus.attributes import PlusModel
from sb3_ppo_plus.envs.output_check import EnvOutputCheck
from sb3_ppo_plus.envs.tensor_episodes import Dones, StepInfos, together_on_cpu
from sb3_ppo_plus.envs.tensor_vec_env import TensorVecEnv, is_free_to_wait
from sb3_ppo_plus.policies.bounds import env_actions
from sb3_ppo_plus.rollout.actor import RolloutActor
from sb3_ppo_plus.rollout.tensor_actions import TensorActions
from sb3_ppo_plus.rollout.tensor_buffer import TensorRolloutBuffer
from sb3_ppo_plus.rollout.tensor_values import TensorOutputCheck, TensorRolloutValues
from sb3_ppo_plus.rollout.values import RolloutValues
from sb3_ppo_plus.trees import tree_map


class ArraySteps:
    """Steps an environment of SB3.

    :param model: the model
    :param env: the training environment
    """

    def __init__(self, model: PlusModel, env: VecEnv) -> None:
        self._model, self._env = model, env
        self.check_output: Any = EnvOutputCheck(env)

    def values_of(self, actor: RolloutActor) -> RolloutValues:
        """Return what bootstraps the timeouts of the rollout.

        :param actor: the actor of the rollout
        """
        return RolloutValues(actor, self.check_output)

    def tensors(self, observations: Any) -> PyTorchObs:  # noqa: ANN401  # array or dict
        """Return observations as the policy takes them.

        :param observations: the last ones, shape (n_envs, *observation shape), or a dict of them
        """
        return obs_as_tensor(observations, self._model.device)

    def actions(self, policy: BasePolicy, chosen: th.Tensor) -> tuple[Any, Any]:
        """Return the stored actions, and those that the environment takes.

        :param policy: the policy that chose the actions
        :param chosen: stored actions, shape (n_envs, *action shape)
        """
        actions = chosen.cpu().numpy()
        return actions, env_actions(policy, self._model.action_space, actions)

    def step(self, actions: Any) -> tuple[Any, Any, Any, Any]:  # noqa: ANN401  # what the environment takes
        """Step the environment.

        :param actions: actions for the environment
        :return: observations, rewards, dones and infos
        """
        return self._env.step(actions)

    def note_episodes(self, infos: Any, dones: Any) -> None:  # noqa: ANN401  # as step returned them
        """Tell the model which episodes a step has ended.

        :param infos: the infos of the step
        :param dones: which episodes ended with it, shape (n_envs,)
        """
        self._model._parts.meeting.note_episodes(self._model, infos, dones)

    def kept(self, observations: Any, dones: Any) -> tuple[Any, Any]:  # noqa: ANN401  # as step returned them
        """Return what the model keeps for the next step.

        :param observations: the observations after the step
        :param dones: which episodes ended with it
        """
        return observations, dones

    def end(self) -> None:
        """Do what is left when the rollout ends, or when a callback stops it."""


class TensorSteps(ArraySteps):
    """Steps a :class:`TensorVecEnv`.

    On the CPU, it looks at each step as SB3 does. Elsewhere, it waits for no result during a rollout: episodes are
    noted, and NaN is found, after the last step.

    :param model: the model
    :param env: the training environment
    :param rollout_buffer: the rollout buffer
    :param mask_source: source of the rollout's masks, a TensorMaskSource, or None
    """

    def __init__(
        self,
        model: PlusModel,
        env: TensorVecEnv,
        rollout_buffer: TensorRolloutBuffer,
        mask_source: Any,  # noqa: ANN401  # of a folder that this one may not import
    ) -> None:
        self._mask_source = mask_source
        self._model, self._tensor_env, self._buffer = model, env, rollout_buffer
        self._actions = TensorActions(model.action_space, env.device)
        self._waits_are_free = is_free_to_wait(env.device)
        self.check_output = TensorOutputCheck(rollout_buffer, waits_are_free=self._waits_are_free)
        # Those of several processes meet, so they must be noted at their step
        self._notes_later = not self._waits_are_free and model._parts.ranks.size == 1
        self._later: list[StepInfos] = []

    def values_of(self, actor: RolloutActor) -> RolloutValues:
        """See :meth:`ArraySteps.values_of`."""
        return TensorRolloutValues(actor, self.check_output, waits_are_free=self._waits_are_free)

    def tensors(self, observations: Any) -> PyTorchObs:  # noqa: ANN401  # tensors, arrays, or a dict
        """Return observations on the policy's device, and store them before the environment may overwrite them."""
        device = self._model.device
        tensors: PyTorchObs = tree_map(lambda part: th.as_tensor(part).to(device), observations)
        if not self._buffer.full:
            self._buffer.store_observations(tensors)
        return tensors

    def actions(self, policy: BasePolicy, chosen: th.Tensor) -> tuple[th.Tensor, th.Tensor]:
        """See :meth:`ArraySteps.actions`."""
        return chosen, self._actions.env_actions(policy, chosen.to(self._tensor_env.device))

    def step(self, actions: th.Tensor) -> tuple[Any, th.Tensor, th.Tensor, StepInfos]:
        """See :meth:`ArraySteps.step`. Infos are dicts of arrays as soon as somebody reads them."""
        step, infos = self._tensor_env.step_checked(actions)
        # A copy, to which the values of timeouts are added
        rewards = step.rewards.to(self._model.device, th.float32, copy=True)
        return step.observations, rewards, infos.dones.as_subclass(Dones), infos

    def kept(self, observations: Any, dones: th.Tensor) -> tuple[Any, Any]:  # noqa: ANN401  # tensor or dict
        """See :meth:`ArraySteps.kept`. On the CPU these are arrays, which share the memory of the tensors."""
        plain = dones.as_subclass(th.Tensor)
        if self._waits_are_free:
            return tree_map(th.Tensor.numpy, observations), plain.numpy()
        return observations, plain

    def note_episodes(self, infos: StepInfos, dones: th.Tensor) -> None:
        """See :meth:`ArraySteps.note_episodes`."""
        if self._notes_later:
            self._later.append(infos.without_observations())
        elif self._model._parts.ranks.size > 1 or bool(infos.dones.any()):
            super().note_episodes(list(infos), infos.dones.cpu().numpy())

    def end(self) -> None:
        """Note the episodes that have waited, and give the model arrays, which are saved with it."""
        for infos in together_on_cpu(self._later):
            super().note_episodes(list(infos), infos.dones.numpy())
        self._later = []
        model = self._model
        self.check_output.check_rollout(model._last_obs)
        if self._mask_source is not None:
            self._mask_source.finish()
        model._last_obs = tree_map(as_array, model._last_obs)
        model._last_episode_starts = as_array(model._last_episode_starts)


def as_array(tensor: Any) -> Any:  # noqa: ANN401  # tensor or array
    """Copy a tensor into an array; an array stays as it is.

    :param tensor: the tensor
    """
    return tensor.clone().cpu().numpy() if isinstance(tensor, th.Tensor) else tensor


def steps_of(model: PlusModel, env: VecEnv, rollout_buffer: RolloutBuffer, mask_source: Any) -> ArraySteps:  # noqa: ANN401  # or None
    """Return how a rollout steps its environment.

    :param model: the model
    :param env: the training environment
    :param rollout_buffer: the rollout buffer
    :param mask_source: source of the rollout's masks, or None
    """
    if isinstance(rollout_buffer, TensorRolloutBuffer):
        assert isinstance(env, TensorVecEnv)
        return TensorSteps(model, env, rollout_buffer, mask_source)
    return ArraySteps(model, env)
