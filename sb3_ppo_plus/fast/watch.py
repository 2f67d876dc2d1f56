"""Notices cheaply what callbacks change in a policy during a rollout."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from itertools import chain
from operator import attrgetter, call, is_, itemgetter
from typing import Any

from torch import nn

from sb3_ppo_plus.fast.policy_changes import (
    ATTRIBUTES_OF_EVERY_MODULE,
    KNOWN_MODULES,
    METHODS_OF_ACTING,
    classes_of,
    distribution_settings,
)
from sb3_ppo_plus.policies.hybrid_distribution import distributions_in
from sb3_ppo_plus.torch_private import contents_of, forward_hooks, function_mode_counter, without_hooks_and_modes

_METHODS_OF_MODULES = ("__call__", "forward")
_METHODS_OF_DISTRIBUTIONS = ("proba_distribution", "log_prob", "entropy", "sample", "mode", "get_actions")
_ABSENT = object()


class PartsWatch:
    """Notices if attributes, methods, hooks, modules or parameters are assigned, added, removed or replaced.

    A check takes some microseconds, so that each step can make one. It does not look inside lists, dicts and arrays. It
    does not look at methods that acting does not call. It may report a change without effect. If the policy has a hook,
    it always reports a change.

    :param policy: the policy as it is now
    """

    def __init__(self, policy: nn.Module) -> None:
        parts, action_dist = [*policy.modules()], getattr(policy, "action_dist", None)
        self._parts, self._kinds = parts, [*map(type, parts)]
        contents = [items for part in parts for items in contents_of(part) or ()]
        self._hooks = forward_hooks(parts) or []
        self._filled = [items.values() for items in contents if items]
        self._items = [*chain.from_iterable(self._filled)]
        self._sized = [*map(vars, parts), getattr(action_dist, "__dict__", {}), *contents]
        self._size = sum(map(len, self._sized))
        self._count_modes = function_mode_counter()
        self._n_modes = self._count_modes()
        self._methods = _methods_of_acting(policy, action_dist)
        # Each function looks up all watched attributes of its owner in one call
        self._look_ups: list[Callable[[Any], Any]] = [attrgetter(*names) for names in self._methods.values()]
        self._owners: list[object] = [*self._methods]
        for part in parts:
            self._watch_attributes(vars(part), vars(part).keys() - _unwatched(part))
        self._watch_attributes(getattr(action_dist, "__dict__", {}), distribution_settings(action_dist))
        self._values = self._look_up()

    def _watch_attributes(self, attributes: dict[str, Any], names: Collection[str]) -> None:
        if names:
            self._look_ups.append(itemgetter(*names))
            self._owners.append(attributes)

    def _look_up(self) -> list[Any]:
        # In one call of C, because each step of a rollout does this
        return [*map(call, self._look_ups, self._owners)]

    def has_changed(self, is_thorough: bool = True) -> bool:
        """Whether the policy has changed since this object was made.

        :param is_thorough: False: look only at how many attributes there are, and at modules, parameters and buffers.
            This takes a third of the time
        """
        try:
            return (
                sum(map(len, self._sized)) != self._size
                or not all(map(is_, chain.from_iterable(self._filled), self._items))
                or (is_thorough and self._has_other_code_or_settings())
            )
        except Exception:  # an attribute was deleted, or is an array, which has no single truth value
            return True

    def _has_other_code_or_settings(self) -> bool:
        return (
            any(self._hooks)
            or self._count_modes() != self._n_modes
            or [*map(type, self._parts)] != self._kinds
            # For identical objects, Python's comparison of lists makes no call
            or self._look_up() != self._values
        )

    @contextmanager
    def code_as_before(self) -> Iterator[None]:
        """Run the block with the policy's former code.

        Inside it, classes have the methods that they had when this object was made. The hooks that act on all modules
        and the function modes of torch are off.
        """
        replaced = []
        for kind, methods in self._methods.items():
            for name, before in methods.items():
                now = vars(kind).get(name, _ABSENT)
                if now is not before:
                    replaced.append((kind, name, now))
                    _put(kind, name, before)
        try:
            with without_hooks_and_modes():
                yield
        finally:
            for kind, name, now in replaced:
                _put(kind, name, now)


def _methods_of_acting(policy: nn.Module, action_dist: object) -> dict[type, dict[str, object]]:
    """Return the methods that acting calls, for each class that may define them."""
    methods: dict[type, dict[str, object]] = {}
    for names, owners in (
        (_METHODS_OF_MODULES, [*policy.modules()]),
        (METHODS_OF_ACTING, [policy]),
        (_METHODS_OF_DISTRIBUTIONS, distributions_in(action_dist)),
    ):
        final = {*map(type, owners)}
        for kind in classes_of(owners):
            # A user may add any of these methods to the class of a part. A base class matters only if it defines one,
            # because super() may call it
            watched = [name for name in names if (hasattr(kind, name) if kind in final else name in vars(kind))]
            if watched:
                methods.setdefault(kind, {}).update((name, vars(kind).get(name, _ABSENT)) for name in watched)
    return methods


def _put(kind: type, name: str, value: object) -> None:
    if value is _ABSENT:
        delattr(kind, name)
    else:
        setattr(kind, name, value)


def _unwatched(part: nn.Module) -> set[str]:
    # Known modules do not use their attribute ``training``
    return {*ATTRIBUTES_OF_EVERY_MODULE, "training"} if type(part) in KNOWN_MODULES else {*ATTRIBUTES_OF_EVERY_MODULE}
