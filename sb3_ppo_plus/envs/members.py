"""The single environments inside a ``gymnasium.vector`` environment, if there are any."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import gymnasium as gym
from gymnasium.vector import AsyncVectorEnv, SyncVectorEnv, VectorEnv
from stable_baselines3.common.env_util import is_wrapped


class Members:
    """A vector environment that is one whole: what is asked of an environment is asked of it.

    :param env: the vector environment
    """

    exist = False

    def __init__(self, env: VectorEnv[Any, Any, Any]) -> None:
        self.env: Any = env

    def reset(self, arguments: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        """Begin an episode in each environment.

        :param arguments: those of ``reset`` that are not None
        :return: observations and infos
        """
        observations, infos = self.env.reset(**arguments)
        return observations, infos

    def get(self, name: str, indices: Sequence[int]) -> list[Any]:
        """Get an attribute of some environments.

        :param name: its name
        :param indices: their indices
        """
        return [getattr(self.env, name)] * len(indices)

    def set(self, name: str, value: object, indices: Sequence[int]) -> None:
        """Set an attribute of some environments.

        :param name: its name
        :param value: its value
        :param indices: their indices
        :raises ValueError: if only some can be set
        """
        _check_all(self.env, indices)
        setattr(self.env, name, value)

    def have(self, name: str) -> bool:
        """Whether each environment has an attribute.

        :param name: its name
        """
        return hasattr(self.env, name)

    def call(self, name: str, indices: Sequence[int], arguments: Sequence[Any], named: Mapping[str, Any]) -> list[Any]:
        """Call a method of some environments.

        :param name: its name
        :param indices: their indices
        :param arguments: its arguments
        :param named: its keyword arguments
        :return: a result for each. The method of a whole returns one row for each environment, or the same for all
        """
        results = getattr(self.env, name)(*arguments, **named)
        has_rows = hasattr(results, "__len__") and not isinstance(results, str | dict)
        if has_rows and len(results) == self.env.num_envs:
            return [results[index] for index in indices]
        return [results] * len(indices)

    def are_wrapped(self, wrapper_class: type[gym.Wrapper], indices: Sequence[int]) -> list[bool]:
        """Whether environments have a wrapper.

        :param wrapper_class: its class
        :param indices: their indices
        """
        return [False] * len(indices)


class SyncMembers(Members):
    """The environments of a ``SyncVectorEnv``."""

    exist = True

    @property
    def envs(self) -> Sequence[gym.Env[Any, Any]]:
        """The environments."""
        found: Sequence[gym.Env[Any, Any]] = self.env.unwrapped.envs
        return found

    def get(self, name: str, indices: Sequence[int]) -> list[Any]:
        """See :meth:`Members.get`."""
        return [self.envs[index].get_wrapper_attr(name) for index in indices]

    def set(self, name: str, value: object, indices: Sequence[int]) -> None:
        """See :meth:`Members.set`."""
        for index in indices:
            self.envs[index].set_wrapper_attr(name, value)

    def have(self, name: str) -> bool:
        """See :meth:`Members.have`."""
        return all(env.has_wrapper_attr(name) for env in self.envs)

    def call(self, name: str, indices: Sequence[int], arguments: Sequence[Any], named: Mapping[str, Any]) -> list[Any]:
        """See :meth:`Members.call`."""
        if name.startswith("__"):
            # Each wrapper has these itself
            return [getattr(self.envs[index], name)(*arguments, **named) for index in indices]
        return [self.envs[index].get_wrapper_attr(name)(*arguments, **named) for index in indices]

    def are_wrapped(self, wrapper_class: type[gym.Wrapper], indices: Sequence[int]) -> list[bool]:
        """See :meth:`Members.are_wrapped`."""
        return [is_wrapped(self.envs[index], wrapper_class) for index in indices]


class AsyncMembers(Members):
    """The environments of an ``AsyncVectorEnv``, each in a process of its own. They are asked at the same time."""

    exist = True

    def get(self, name: str, indices: Sequence[int]) -> list[Any]:
        """See :meth:`Members.get`."""
        return self.call("get_wrapper_attr", indices, (name,), {})

    def set(self, name: str, value: object, indices: Sequence[int]) -> None:
        """See :meth:`Members.set`."""
        self._ask(indices, "_setattr", (name, value))

    def have(self, name: str) -> bool:
        """See :meth:`Members.have`."""
        return all(self.call("has_wrapper_attr", range(self.env.num_envs), (name,), {}))

    def call(self, name: str, indices: Sequence[int], arguments: Sequence[Any], named: Mapping[str, Any]) -> list[Any]:
        """See :meth:`Members.call`."""
        return self._ask(indices, "_call", (name, tuple(arguments), dict(named)))

    def _ask(self, indices: Sequence[int], command: str, data: tuple[Any, ...]) -> list[Any]:
        # AsyncVectorEnv itself asks all workers or none
        base = self.env.unwrapped
        pipes = [base.parent_pipes[index] for index in indices]
        for pipe in pipes:
            pipe.send((command, data))
        answers = [pipe.recv() for pipe in pipes]
        if not all(succeeded for _, succeeded in answers):
            index, kind, message, _ = base.error_queue.get()
            # The worker that failed has ended
            self.env.close(terminate=True)
            raise RuntimeError(f"{data[0]} in environment {index} of {self.env}: {kind.__name__}: {message}")
        return [answer for answer, _ in answers]


def members_of(env: VectorEnv[Any, Any, Any]) -> Members:
    """Return what asks the environments of a vector environment.

    :param env: the vector environment
    """
    base = env.unwrapped
    if isinstance(base, SyncVectorEnv):
        return SyncMembers(env)
    return AsyncMembers(env) if isinstance(base, AsyncVectorEnv) else Members(env)


def _check_all(env: VectorEnv[Any, Any, Any], indices: Sequence[int]) -> None:
    if [*indices] != [*range(env.num_envs)]:
        raise ValueError(f"{env} can be asked for all environments only, got indices={[*indices]}")
