"""Environments that step in batches of tensors, as a VecEnv of SB3."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, NamedTuple, TypeAlias

import gymnasium as gym
import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import VecEnv
from stable_baselines3.common.vec_env.base_vec_env import VecEnvIndices, VecEnvObs, VecEnvStepReturn

from sb3_ppo_plus.envs.batches import check_spaces
from sb3_ppo_plus.envs.tensor_episodes import StepInfos, TensorEpisodes
from sb3_ppo_plus.trees import tree_map

Observations: TypeAlias = th.Tensor | dict[str, th.Tensor]

FREE_TO_READ = {"cpu"}
"""Types of devices whose tensors can be read without waiting, because operations are done when they return."""


class TensorStep(NamedTuple):
    """What :meth:`TensorVecEnv.step_tensor` returns. Each tensor has a row for each environment.

    :param observations: shape (n_envs, *observation shape), or a dict of them. Where an episode has ended, they are
        the first ones of the next episode
    :param rewards: floats, shape (n_envs,)
    :param terminated: bool, shape (n_envs,): the episode ended; None: none did
    :param truncated: bool, shape (n_envs,): a limit cut the episode off; None: none did. One of both must be a tensor
    :param final_observations: as ``observations``, but the last ones of the episodes that have ended. Only their rows
        are read. None is allowed if no episode has ended, or if ``truncated`` is None
    :param extras: further tensors of shape (n_envs, ...). Their rows come into the infos of episodes that have ended;
        "is_success" is what SB3 logs as ``rollout/success_rate``
    """

    observations: Observations
    rewards: th.Tensor
    terminated: th.Tensor | None
    truncated: th.Tensor | None
    final_observations: Observations | None = None
    extras: dict[str, th.Tensor] | None = None


class TensorVecEnv(VecEnv):
    """Environments that step together, on tensors. Write a subclass with :meth:`reset_tensor` and :meth:`step_tensor`.

    ``PPOPlus`` trains on it without arrays. To all else it is a VecEnv of SB3, whose ``reset`` and ``step`` return
    arrays, and infos as those of SB3's ``Monitor`` and ``DummyVecEnv``.

    :meth:`step_tensor` begins a new episode where one has ended. It may write into the tensors that it has returned
    before. Random numbers should come from ``self.generator``, which :meth:`seed` seeds.

    For action masks, add a method ``action_masks()`` that returns bool of shape (n_envs, mask size). To go on exactly
    after a kill, add ``get_resume_state()``, which returns plain values and tensors, and ``set_resume_state(state)``;
    ``self.generator`` and the counts of episodes are saved without them.

    :param num_envs: number of environments
    :param observation_space: of a single environment: Box, Discrete, MultiDiscrete, MultiBinary, or a Dict of these
    :param action_space: of a single environment: Box, Discrete, MultiDiscrete or MultiBinary
    :param device: where all tensors are
    :raises ValueError: for a space that is not one of these
    """

    render_mode: str | None = None

    def __init__(
        self,
        num_envs: int,
        observation_space: spaces.Space[Any],
        action_space: spaces.Space[Any],
        device: th.device | str = "cpu",
    ) -> None:
        self.device = _with_index(th.device(device))
        check_spaces(type(self).__name__, observation_space, action_space, takes_hybrid=False)
        self.generator = th.Generator(self.device)
        self.generator.seed()
        super().__init__(num_envs, observation_space, action_space)
        self.episodes = TensorEpisodes(num_envs, self.device)
        """Counts the episodes that go on."""
        self._actions = th.empty(0)
        self._known: list[Any] = []

    @abstractmethod
    def reset_tensor(self) -> Observations:
        """Begin an episode in each environment.

        :return: first observations, shape (n_envs, *observation shape), or a dict of them
        """

    @abstractmethod
    def step_tensor(self, actions: th.Tensor) -> TensorStep:
        """Step each environment, and begin a new episode where one has ended.

        :param actions: shape (n_envs, *action shape), in the bounds of the action space
        """

    def seed_tensor(self, seed: int) -> None:
        """Seed all random numbers of the environments. By default, this seeds ``self.generator``.

        :param seed: the seed that was given to :meth:`seed`
        """
        self.generator.manual_seed(seed)

    def reset_checked(self) -> Observations:
        """Call :meth:`reset_tensor`, with the seed that waits for a reset, and check what it returns.

        :raises ValueError: for observations of a wrong shape, or on another device
        """
        if self._seeds[0] is not None:
            self.seed_tensor(self._seeds[0])
        self._reset_seeds()
        self._reset_options()
        observations = self.reset_tensor()
        self._check(observations, None, None, None)
        self.episodes.begin()
        return observations

    def step_checked(self, actions: th.Tensor) -> tuple[TensorStep, StepInfos]:
        """Call :meth:`step_tensor`, check what it returns, and count episodes.

        :param actions: shape (n_envs, *action shape)
        :return: the step, and which episodes it has ended
        :raises ValueError: for tensors of a wrong shape or on another device, or if it is not known what has ended
        """
        step = self.step_tensor(actions)
        signature = _signature(step)
        if signature != self._known:
            self._check(step.observations, step.rewards, step.terminated, step.truncated)
            if step.terminated is None and step.truncated is None:
                raise ValueError(f"{self}: step_tensor must set terminated or truncated, both are None")
            if step.final_observations is not None:
                self._check(step.final_observations, None, None, None, "final_observations")
            self._known = signature
        infos = self.episodes.count(step)
        if step.final_observations is None and step.truncated is not None and bool(infos.timeouts.any()):
            raise ValueError(f"{self}: step_tensor has truncated an episode, and final_observations is None")
        return step, infos

    def _check(
        self,
        observations: Any,  # noqa: ANN401  # whatever the environment returns
        rewards: Any,  # noqa: ANN401
        terminated: Any,  # noqa: ANN401
        truncated: Any,  # noqa: ANN401
        name: str = "observations",
    ) -> None:
        """Check types, shapes and devices of what a subclass returns."""
        space = self.observation_space
        if isinstance(space, spaces.Dict):
            if not isinstance(observations, dict) or observations.keys() != space.keys():
                found = sorted(observations) if isinstance(observations, dict) else type(observations).__name__
                raise ValueError(f"{self}: {name} must be a dict with the keys {sorted(space.keys())}, got {found}")
            for key, part in space.items():
                self._check_tensor(f"{name}[{key!r}]", observations[key], part.shape or ())
        else:
            self._check_tensor(name, observations, space.shape or ())
        if rewards is not None:
            self._check_tensor("rewards", rewards, (), is_floating=True)
        for flag, tensor in (("terminated", terminated), ("truncated", truncated)):
            if tensor is not None:
                self._check_tensor(flag, tensor, (), dtype=th.bool)

    def _check_tensor(
        self,
        name: str,
        tensor: Any,  # noqa: ANN401  # whatever the environment returns
        shape: tuple[int, ...],
        *,
        dtype: th.dtype | None = None,
        is_floating: bool = False,
    ) -> None:
        if not isinstance(tensor, th.Tensor):
            raise TypeError(f"{self}: {name} must be a tensor, got {type(tensor).__name__}")
        expected = (self.num_envs, *shape)
        if tensor.shape != expected:
            raise ValueError(f"{self}: {name} must have the shape {expected}, got {tuple(tensor.shape)}")
        if tensor.device != self.device:
            raise ValueError(f"{self}: {name} must be on the environment's device {self.device}, got {tensor.device}")
        if (dtype is not None and tensor.dtype != dtype) or (is_floating and not tensor.is_floating_point()):
            raise ValueError(f"{self}: {name} must be {dtype or 'floats'}, got {tensor.dtype}")

    def __str__(self) -> str:
        return f"<{type(self).__name__}>"

    def reset(self) -> VecEnvObs:
        """Begin an episode in each environment, see SB3's ``VecEnv``. The seed of ``seed`` is used once."""
        self.reset_infos = [{} for _ in range(self.num_envs)]
        first: VecEnvObs = arrays_of(self.reset_checked())
        return first

    def step_async(self, actions: np.ndarray) -> None:
        """Keep the actions for :meth:`step_wait`.

        :param actions: shape (n_envs, *action shape)
        """
        self._actions = th.as_tensor(actions).to(self.device)

    def step_wait(self) -> VecEnvStepReturn:
        """Step all environments.

        :return: observations, rewards and dones as arrays of their own, and an info for each environment
        """
        step, infos = self.step_checked(self._actions)
        rewards = step.rewards.float().cpu().numpy().copy()
        return arrays_of(step.observations), rewards, infos.dones.cpu().numpy(), list(infos)

    def close(self) -> None:
        """Release what the environments hold; nothing by default."""

    def get_attr(self, attr_name: str, indices: VecEnvIndices = None) -> list[Any]:
        """Get an attribute, which is the same one for all environments, see SB3's ``VecEnv``."""
        return [getattr(self, attr_name)] * self._n_of(indices)

    def set_attr(self, attr_name: str, value: Any, indices: VecEnvIndices = None) -> None:  # noqa: ANN401  # SB3's
        """Set an attribute, which is the same one for all environments, see SB3's ``VecEnv``."""
        setattr(self, attr_name, value)

    def env_method(
        self, method_name: str, *method_args: Any, indices: VecEnvIndices = None, **method_kwargs: Any
    ) -> list[Any]:
        """Call a method once for all environments, see SB3's ``VecEnv``.

        :return: its answer for each environment; if the answer is a tensor with a row for each of all environments,
            their rows as arrays
        """
        answer = getattr(self, method_name)(*method_args, **method_kwargs)
        if isinstance(answer, th.Tensor) and answer.dim() > 0 and len(answer) == self.num_envs:
            rows = answer.cpu().numpy()
            return [rows[index] for index in self._get_indices(indices)]
        return [answer] * self._n_of(indices)

    def env_is_wrapped(self, wrapper_class: type[gym.Wrapper], indices: VecEnvIndices = None) -> list[bool]:
        """Whether environments have a wrapper. It is True for ``Monitor`` alone, whose work this class does."""
        return [issubclass(wrapper_class, Monitor)] * self._n_of(indices)

    def get_images(self) -> Sequence[np.ndarray | None]:
        """Return an image of each environment; a subclass may override this."""
        return [None] * self.num_envs

    def _n_of(self, indices: VecEnvIndices) -> int:
        return len(list(self._get_indices(indices)))


def is_free_to_wait(device: th.device) -> bool:
    """Whether reading a tensor takes no time.

    :param device: where the tensor is
    """
    return device.type in FREE_TO_READ


def arrays_of(observations: Any) -> Any:  # noqa: ANN401  # array or dict
    """Copy observations into arrays of their own.

    :param observations: a tensor, or a dict of tensors
    """
    # PyTorch's memory begins where BLAS rounds as it does for the tensor; memory of NumPy may not
    return tree_map(lambda tensor: tensor.detach().clone().cpu().numpy(), observations)


def _signature(step: TensorStep) -> list[Any]:
    """Describe all that the checks of a step look at."""
    tensors: list[Any] = []
    for part in step[:5]:
        tensors += [*part, *part.values()] if isinstance(part, dict) else [part]
    return [(t.shape, t.dtype, t.device) if isinstance(t, th.Tensor) else type(t) for t in tensors]


def _with_index(device: th.device) -> th.device:
    # Tensors name the present device by its index
    if device.type == "cuda" and device.index is None:
        return th.device("cuda", th.cuda.current_device())
    return device
