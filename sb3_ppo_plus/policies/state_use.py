"""Whether the state of a policy's memory is lost: between calls of ``predict``, or in a graph of one step."""

from __future__ import annotations

import warnings
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch as th
from torch import nn

_NEVER = object()


class StateUse:
    """Watches the calls of one policy's ``predict``, and warns once if they lack the state during an episode.

    A call lacks the state if ``state`` is None, unless ``episode_start`` is True for all observations. One such call
    may be the first step of an episode. Two such calls in a row count as two steps of an episode, if their observations
    have equal shapes and different values.

    So the loops of SB3 and the RL Zoo give no warning. A loop that begins each episode with ``state=None`` and then
    passes the state gives none, and predicting one observation twice gives none. Independent observations look like an
    episode, unless ``episode_start`` is True for each.
    """

    def __init__(self) -> None:
        self._has_warned = False
        self._last: Any = _NEVER

    def note(self, observation: Any, state: object, episode_start: Any) -> None:  # noqa: ANN401  # arrays
        """Look at the arguments of a call of ``predict``.

        :param observation: array, or dict of arrays
        :param state: the state of the memory, or None
        :param episode_start: shape (n_envs,), or None
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
                "predict was called twice in a row without the state of the policy's memory, so the policy forgot what "
                "came before. Within an episode, pass the state that it returned: action, state = predict(observation, "
                "state, episode_start). If each observation begins an episode, pass episode_start=True for each",
                # Of who calls the model's predict
                stacklevel=5,
            )


def warn_of_graph_without_state() -> None:
    """Warn where PyTorch traces one step of a policy whose state nobody has given, as ``torch.onnx.export`` does."""
    is_traced = th.jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call]  # torch leaves it untyped
    if is_traced or th.compiler.is_exporting():
        warnings.warn(
            "a graph of one step is made of a policy with a memory, without the memory's state: each of the graph's "
            'actions is that of an episode\'s first step. sb3_ppo_plus.export_policy(model, "policy.onnx") writes a '
            "graph that takes and gives the state",
            stacklevel=2,
        )


def state_use_of(policy: nn.Module) -> StateUse:
    """Return the object that watches a policy's ``predict``.

    :param policy: the policy
    """
    watch = _WATCHES.get(policy)
    return watch if watch is not None else _WATCHES.setdefault(policy, StateUse())


# Not an attribute of the policy, because a change of its attributes makes compiled graphs again
_WATCHES: WeakKeyDictionary[nn.Module, StateUse] = WeakKeyDictionary()


def _copied(observation: Any) -> dict[str, np.ndarray]:  # noqa: ANN401  # array or dict
    parts = observation if isinstance(observation, dict) else {"": observation}
    return {key: np.array(part) for key, part in parts.items()}


def _are_two_steps(first: dict[str, np.ndarray], second: dict[str, np.ndarray]) -> bool:
    if {key: part.shape for key, part in first.items()} != {key: part.shape for key, part in second.items()}:
        return False
    return not all(np.array_equal(part, second[key]) for key, part in first.items())
