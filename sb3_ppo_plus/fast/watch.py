"""A cheap watch over what callbacks change in a policy amid a rollout."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from itertools import chain
from operator import attrgetter, is_, itemgetter
from typing import Any

from torch import nn

from sb3_ppo_plus.fast.policy_changes import (
    KNOWN_MODULES,
    METHODS_OF_ACTING,
    OF_EVERY_MODULE,
    classes_of,
    distribution_settings,
)
from sb3_ppo_plus.torch_private import contents_of, forward_hooks, without_hooks_of_all_modules

_METHODS_OF_MODULES = ("__call__", "forward")
_METHODS_OF_DISTRIBUTIONS = ("proba_distribution", "log_prob", "entropy", "sample", "mode", "get_actions")
_ABSENT = object()


class PartsWatch:
    """Notices what is assigned, put in, taken out or replaced: attributes, methods, hooks, modules, parameters.

    Made for each step: it takes some microseconds. It does not look into the lists, dicts and arrays that attributes
    hold, nor for methods of classes that acting does not pass through. It may tell of a change that does not matter.

    With hooks it tells of a change at all times.

    :param policy: the policy as it is now
    """

    def __init__(self, policy: nn.Module) -> None:
        parts, action_dist = [*policy.modules()], getattr(policy, "action_dist", None)
        self._parts, self._kinds = parts, [*map(type, parts)]
        contents = [of for part in parts for of in contents_of(part) or ()]
        self._empty = [*(of for of in contents if not of), *(forward_hooks(parts) or ())]
        self._filled = [of.values() for of in contents if of]
        self._items = [*chain.from_iterable(self._filled)]
        self._sized = [*map(vars, parts), getattr(action_dist, "__dict__", {}), *self._filled]
        self._size = sum(map(len, self._sized))
        self._methods = _methods_of_acting(policy, action_dist)
        # Functions that look up all that is watched of an owner at once
        self._look_ups: list[tuple[Callable[[Any], Any], object]] = [
            (attrgetter(*names), kind) for kind, names in self._methods.items()
        ]
        for part in parts:
            self._watch_attributes(vars(part), vars(part).keys() - _unwatched(part))
        self._watch_attributes(getattr(action_dist, "__dict__", {}), distribution_settings(action_dist))
        self._values = self._look_up()

    def _watch_attributes(self, attributes: dict[str, Any], names: Collection[str]) -> None:
        if names:
            self._look_ups.append((itemgetter(*names), attributes))

    def _look_up(self) -> list[Any]:
        return [look_up(owner) for look_up, owner in self._look_ups]

    def has_changed(self) -> bool:
        """Whether the policy is another one than when this was made."""
        try:
            return (
                any(self._empty)
                or sum(map(len, self._sized)) != self._size
                or not all(map(is_, chain.from_iterable(self._filled), self._items))
                or [*map(type, self._parts)] != self._kinds
                # Objects that are the same are equal to Python, without a call
                or self._look_up() != self._values
            )
        except Exception:  # an attribute is gone, or is an array, of which Python cannot say whether it is equal
            return True

    @contextmanager
    def code_as_before(self) -> Iterator[None]:
        """Undo, for the while, what was done to classes and to the calls of every module since this was made."""
        replaced = []
        for kind, methods in self._methods.items():
            for name, before in methods.items():
                now = vars(kind).get(name, _ABSENT)
                if now is not before:
                    replaced.append((kind, name, now))
                    _put(kind, name, before)
        try:
            with without_hooks_of_all_modules():
                yield
        finally:
            for kind, name, now in replaced:
                _put(kind, name, now)


def _methods_of_acting(policy: nn.Module, action_dist: object) -> dict[type, dict[str, object]]:
    """Return, for each class, what it has itself of the methods that acting calls."""
    methods: dict[type, dict[str, object]] = {}
    for names, owners in (
        (_METHODS_OF_MODULES, [*policy.modules()]),
        (METHODS_OF_ACTING, [policy]),
        (_METHODS_OF_DISTRIBUTIONS, [action_dist]),
    ):
        final = {*map(type, owners)}
        for kind in classes_of(owners):
            # Somebody may put a method into the class of a part itself, and super() may call those of its bases
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
    # Known modules do the same in training and evaluation
    return {*OF_EVERY_MODULE, "training"} if type(part) in KNOWN_MODULES else {*OF_EVERY_MODULE}
