"""What all adapters of simulators share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import gymnasium as gym
import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.vec_env.base_vec_env import VecEnvIndices

from sb3_ppo_plus.envs.simulators.observation_groups import ObservationGroups
from sb3_ppo_plus.envs.tensor_vec_env import Observations, TensorStep, TensorVecEnv
from sb3_ppo_plus.trees import tree_map


class SimulatorVecEnv(TensorVecEnv):
    """A simulator of another library as a :class:`~sb3_ppo_plus.envs.TensorVecEnv`.

    Attributes and methods that it lacks are those of the simulator.

    :param env: the simulator
    :param num_envs: number of environments
    :param groups: chooses from what it shows
    :param action_space: of a single environment
    :param device: where all tensors are
    :param action_bound: bound of actions that have none; SB3 needs finite ones, and clips to them
    :param random_first_lengths: whether episodes begin as if some of their steps were over
    """

    _keeps_observations = True
    """Whether the observations before a step are kept, for simulators that do not show the last ones of episodes."""

    def __init__(
        self,
        env: Any,  # noqa: ANN401  # of another library
        num_envs: int,
        groups: ObservationGroups,
        action_space: spaces.Space[Any],
        device: th.device | str,
        action_bound: float,
        random_first_lengths: bool = False,
    ) -> None:
        self.env, self._groups, self._has_random_lengths = env, groups, random_first_lengths
        super().__init__(num_envs, groups.space, with_bounds(action_space, action_bound), device)
        self.log: Mapping[str, Any] = {}
        """What the simulator has told for the log in the last step."""
        self._previous: Observations | None = None

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401  # whatever the simulator has
        if name.startswith("_") or name == "env":
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        return attribute(self.env, name)

    def set_attr(self, attr_name: str, value: Any, indices: VecEnvIndices = None) -> None:  # noqa: ANN401  # SB3's
        """Set an attribute, of the simulator if it has one of this name; see SB3's ``VecEnv``."""
        if not hasattr(type(self), attr_name) and attr_name not in vars(self) and hasattr(self, attr_name):
            set_attribute(self.env, attr_name, value)
        else:
            super().set_attr(attr_name, value, indices)

    def __str__(self) -> str:
        return name_of(type(self), self.env)

    def close(self) -> None:
        """Close the simulator."""
        if hasattr(self.env, "close"):
            self.env.close()

    def _begun(self, groups: Any) -> Observations:  # noqa: ANN401  # tensors in groups
        observations: Observations = self._groups.show(groups)
        self._keep(observations)
        return observations

    def _keep(self, observations: Observations) -> None:
        if self._keeps_observations:
            # The simulator may write into them in the next step
            self._previous = tree_map(_copy, observations)

    def _spread_lengths(self) -> None:
        """If it was asked for, let episodes begin as if some of their steps were over, so that not all end at once."""
        if not self._has_random_lengths:
            return
        lengths, longest = (attribute(self.env, name) for name in ("episode_length_buf", "max_episode_length"))
        draws = th.rand(lengths.shape, generator=self.generator, device=self.device)
        set_attribute(self.env, "episode_length_buf", (draws * longest).to(lengths.dtype))

    def _stepped(
        self,
        groups: Any,  # noqa: ANN401  # tensors in groups
        rewards: th.Tensor,
        terminated: th.Tensor,
        truncated: th.Tensor | None,
        final: Any,  # noqa: ANN401  # tensors in groups, or None
        log: object = None,
        extras: dict[str, th.Tensor] | None = None,
    ) -> TensorStep:
        """Make a step of what the simulator returns.

        :param final: the last observations of episodes. If it is None, those before the step take their place, as in
            rsl_rl (``PPO.process_env_step``), since the simulator has overwritten the true ones
        :param log: what the simulator tells for the log
        """
        observations: Observations = self._groups.show(groups)
        last = self._previous if final is None else self._groups.show(final)
        self.log = log if isinstance(log, Mapping) else {}
        self._keep(observations)
        return TensorStep(observations, rewards, terminated, truncated, last, extras)


def attribute(env: Any, name: str) -> Any:  # noqa: ANN401  # whatever it is
    """Return an attribute of a simulator, or of the one inside Gymnasium's wrappers.

    :param env: the simulator
    :param name: name of the attribute
    :raises AttributeError: if there is none
    """
    is_wrapped = isinstance(env, gym.Wrapper) and not hasattr(env, name)
    return getattr(env.unwrapped if is_wrapped else env, name)


def set_attribute(env: Any, name: str, value: Any) -> None:  # noqa: ANN401  # whatever it is
    """Set an attribute of a simulator, inside Gymnasium's wrappers.

    :param env: the simulator
    :param name: name of the attribute
    :param value: its value
    """
    setattr(env.unwrapped if isinstance(env, gym.Wrapper) else env, name, value)


def name_of(adapter: type, env: Any) -> str:  # noqa: ANN401  # of another library
    """Name a simulator in errors.

    :param adapter: class of its adapter
    :param env: the simulator
    """
    return f"<{adapter.__name__} of {type(env).__name__}>"


def with_bounds(space: spaces.Space[Any], bound: float) -> spaces.Space[Any]:
    """Return an action space whose bounds are finite.

    :param space: an action space of a single environment
    :param bound: takes the place of infinite bounds
    :raises ValueError: if the bound is not a positive number
    """
    if not 0 < bound < np.inf:
        raise ValueError(f"action_bound must be positive and finite, got {bound!r}")
    if not isinstance(space, spaces.Box):
        return space
    low = np.where(np.isfinite(space.low), space.low, -bound)
    high = np.where(np.isfinite(space.high), space.high, bound)
    was_infinite = ~(np.isfinite(space.low) & np.isfinite(space.high))
    if (was_infinite & (low >= high)).any():
        raise ValueError(f"action_bound must leave low < high, got {bound!r} for {space}")
    return spaces.Box(low.astype(space.dtype), high.astype(space.dtype), space.shape, space.dtype.type)


def values_of(owner: object, answer: Any, count: int, expected: str) -> tuple[Any, ...]:  # noqa: ANN401  # whatever
    """Check how many values a simulator has returned.

    :param owner: the environment, for errors
    :param answer: what its ``step`` has returned
    :param count: how many values there must be
    :param expected: what they are, for errors
    :raises ValueError: if there are others
    """
    if not isinstance(answer, tuple) or len(answer) != count:
        found = f"{len(answer)} values" if isinstance(answer, tuple) else type(answer).__name__
        raise ValueError(f"{owner}: step must return {expected}, got {found}")
    return answer


def flags(owner: object, name: str, given: Any) -> th.Tensor:  # noqa: ANN401  # whatever the simulator returns
    """Return what tells which episodes ended as bool.

    :param owner: the environment, for errors
    :param name: of the tensor, for errors
    :param given: a tensor of numbers or bool
    :raises TypeError: if it is no tensor
    """
    if not isinstance(given, th.Tensor):
        raise TypeError(f"{owner}: {name} must be a tensor, got {type(given).__name__}")
    return given if given.dtype == th.bool else given != 0


def _copy(tensor: Any) -> Any:  # noqa: ANN401  # what is no tensor becomes an error later
    return tensor.clone() if isinstance(tensor, th.Tensor) else tensor
