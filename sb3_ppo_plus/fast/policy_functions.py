"""Fast functions that are made from a policy, and when they are dropped."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Hashable
from typing import Any, Generic, Self, TypeVar

import torch as th
from stable_baselines3.common.policies import ActorCriticPolicy

from sb3_ppo_plus.fast.policy_changes import constant_tensors, python_state

Function = TypeVar("Function")


class PolicyFunctions(ABC, Generic[Function]):
    """Functions that are made from a policy, one for each key. After a failure no more are made.

    :param policy: the functions hold its structure and attributes as constants
    :param settings: the other arguments of the subclass
    """

    def __init__(self, policy: ActorCriticPolicy, *settings: Any) -> None:
        self._policy = policy
        self._settings = settings
        self._functions: dict[Hashable, Function] = {}
        self._n_requests: Counter[Hashable] = Counter()
        """How often a key had no function when one was asked for."""
        self._constants: list[th.Tensor] = []
        self.python_state: Hashable = None
        """What the policy was at the last refresh, see :func:`policy_changes.python_state`."""
        self.hindrance: str | None = None
        """Why no function may be used until the next refresh; None: nothing hinders it."""
        self.has_given_up = False
        """Whether no function will be made any more."""
        self.is_possible = False
        """Whether functions may be made and used until the next refresh."""

    def __reduce__(self) -> tuple[type[Self], tuple[Any, ...]]:
        # Compiled functions cannot be copied or pickled. The copy makes its own
        return type(self), (self._policy, *self._settings)

    @abstractmethod
    def _find_hindrance(self) -> str | None:
        """Return why no function may be used now; None: nothing hinders it."""

    def is_current(self) -> bool:
        """Whether the policy is still what it was at the last refresh."""
        return (
            python_state(self._policy) == self.python_state
            and self._has_constants(constant_tensors(self._policy))
            and self._find_hindrance() == self.hindrance
        )

    def _has_constants(self, constants: list[th.Tensor]) -> bool:
        return [*map(id, constants)] == [*map(id, self._constants)]

    def refresh(self) -> None:
        """Drop the functions if the policy is no longer what they were made from."""
        state, constants = python_state(self._policy), constant_tensors(self._policy)
        if not self._has_constants(constants):
            self._drop_constants()
        if state != self.python_state:
            self._drop()
        self.python_state, self._constants = state, constants
        self.hindrance = self._find_hindrance()
        self.is_possible = self.hindrance is None and not self.has_given_up

    def _drop(self) -> None:
        self._functions.clear()

    def _drop_constants(self) -> None:
        """Drop the functions, because a tensor that they hold was replaced."""
        self._drop()

    def _make(self, key: Hashable, make: Callable[[], Function]) -> Exception | None:
        """Make the function of a key. If that fails, give up and return the error."""
        try:
            self._functions[key] = make()
        except Exception as error:  # tracing and compilers raise all kinds, TorchScript for a convolution's gradient
            self._give_up()
            return error
        return None

    def _give_up(self) -> None:
        self.has_given_up, self.is_possible = True, False
        self._functions.clear()
