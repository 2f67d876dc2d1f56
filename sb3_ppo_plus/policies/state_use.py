"""Whether ``predict`` of a policy with a memory is given the state that it returned."""

from __future__ import annotations

import warnings
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
from torch import nn

_NEVER = object()


class StateUse:
    """Watches the calls of one policy's ``predict``, and warns once when a running episode is predicted without state.

    A call is without state if ``state`` is None and ``episode_start`` does not say that every episode begins. One such
    call may be the first of an episode. Two in a row are taken for two steps of one, if the second has as many
    observations, and others than the first.

    So there is no warning in the loops of SB3 and the RL Zoo, nor where each episode begins with ``state=None`` and
    goes on with the state, nor where an observation is predicted again. Observations that do not follow one another
    look like an episode, unless ``episode_start`` is True for each.
    """

    def __init__(self) -> None:
        self._has_warned = False
        self._last: Any = _NEVER

    def note(self, observation: Any, state: object, episode_start: Any) -> None:  # noqa: ANN401  # arrays
        """Take note of a call, before it is done.

        :param observation: array, or dict of arrays
        :param state: as given
        :param episode_start: as given, shape (n_envs,) or None
        """
        if self._has_warned:
            return
        if state is not None or (episode_start is not None and np.all(np.asarray(episode_start))):
            self._last = _NEVER
            return
        last, self._last = self._last, _copied(observation)
        if last is not _NEVER and _are_two_steps(last, self._last):
            self._has_warned, self._last = True, _NEVER
            warnings.warn(
                "predict was called twice in a row without the state of the policy's memory, which so forgot what came "
                "before. Within an episode, give it the state that it returned: action, state = predict(observation, "
                "state, episode_start). Where each observation begins an episode, say so: episode_start=True for each",
                stacklevel=2,
            )


def state_use_of(policy: nn.Module) -> StateUse:
    """Get the watch over a policy's ``predict``."""
    return _WATCHES.setdefault(policy, StateUse())


# Not an attribute of the policy: compiled graphs are made anew where those change
_WATCHES: WeakKeyDictionary[nn.Module, StateUse] = WeakKeyDictionary()


def _copied(observation: Any) -> dict[str, np.ndarray]:  # noqa: ANN401  # array or dict
    parts = observation if isinstance(observation, dict) else {"": observation}
    return {key: np.array(part) for key, part in parts.items()}


def _are_two_steps(first: dict[str, np.ndarray], second: dict[str, np.ndarray]) -> bool:
    if {key: part.shape for key, part in first.items()} != {key: part.shape for key, part in second.items()}:
        return False
    return not all(np.array_equal(part, second[key]) for key, part in first.items())
