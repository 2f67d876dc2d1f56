"""Fast functions that are made from a policy, and when they are dropped."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Hashable
from typing import Any, Generic, NamedTuple, Self, TypeVar

from stable_baselines3.common.policies import ActorCriticPolicy

from sb3_ppo_plus.fast.policy_changes import constant_tensors, python_state

Function = TypeVar("Function")


class PolicyState(NamedTuple):
    """What a policy is at one moment, as far as functions that are made from it depend on it.

    :param python: see :func:`policy_changes.python_state`
    :param constants: see :func:`policy_changes.constant_tensors`
    :param hindrance: why no function may be used now; None: functions may be used
    """

    python: Hashable = None
    constants: Hashable = None
    hindrance: str | None = None


class PolicyFunctions(ABC, Generic[Function]):
    """Functions that are made from a policy, one for each key. After a failure no more are made.

    :param policy: the policy
    :param settings: further arguments of the subclass's constructor; a copy gets them too
    """

    def __init__(self, policy: ActorCriticPolicy, *settings: Any) -> None:
        self._policy = policy
        self._settings = settings
        self._functions: dict[Hashable, Function] = {}
        self._n_requests: Counter[Hashable] = Counter()
        self._numbers: dict[Hashable, int] = {}
        self.state = PolicyState()
        """What the policy was at the last refresh."""
        self.has_given_up = False
        """Whether no function will be made any more."""
        self.is_usable = False
        """Whether functions may be made and used until the next refresh."""

    def __reduce__(self) -> tuple[type[Self], tuple[Any, ...]]:
        # Compiled functions cannot be copied or pickled. The copy makes its own
        return type(self), (self._policy, *self._settings)

    @abstractmethod
    def _hindrance(self) -> str | None:
        """Return why no function may be used now; None: functions may be used."""

    @abstractmethod
    def _drop(self, state: PolicyState) -> None:
        """Drop the functions that do not fit the policy's new state, which differs from the last one."""

    def _state_now(self) -> PolicyState:
        return PolicyState(python_state(self._policy), constant_tensors(self._policy), self._hindrance())

    def number_of(self, constants: Hashable) -> int:
        """Return a small number in place of a part of a key. Equal parts have equal numbers.

        A number takes less time to hash.

        :param constants: what a function holds as constants
        """
        return self._numbers.setdefault(constants, len(self._numbers))

    def is_current(self) -> bool:
        """Whether the policy is still what it was at the last refresh."""
        return self._state_now() == self.state

    def refresh(self) -> None:
        """Drop the functions if the policy is no longer what they were made from."""
        state = self._state_now()
        if state != self.state:
            self._drop(state)
        self.state = state
        self.is_usable = state.hindrance is None and not self.has_given_up

    def _make(self, key: Hashable, make: Callable[[], Function], what: str = "a function") -> None:
        """Make the function of a key, or give up."""
        try:
            self._functions[key] = make()
        except Exception as error:  # tracing and compilers raise errors of all kinds
            self._give_up(error, what)

    def _give_up(self, reason: Exception | str, what: str = "a function") -> None:
        """Make no more functions.

        :param reason: why
        :param what: what the failed function does
        """
        self.has_given_up, self.is_usable = True, False
        self._functions.clear()
