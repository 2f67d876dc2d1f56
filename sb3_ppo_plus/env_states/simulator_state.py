"""Simulators that keep their state outside Python: which objects are theirs, and the state of Atari."""

from __future__ import annotations

import importlib
import math
import sys
from collections.abc import Iterator
from functools import partial
from typing import Any

from sb3_ppo_plus.errors import PlainStateError

# Largest probability that a sticky action outlives the frames that are tried out
P_OVERLOOKED = 1e-12
# Frames after a reset in which some games, such as Qbert, draw what their state lacks
N_FRAMES_AFTER_RESET = 3
# Value of the Atari action that does nothing
NOOP = 0


def is_mujoco_data(value: object) -> bool:
    """Whether a value is an ``MjData``.

    :param value: any value
    """
    return _is_instance("mujoco", "MjData", value)


def is_mujoco_model(value: object) -> bool:
    """Whether a value is an ``MjModel``.

    :param value: any value
    """
    return _is_instance("mujoco", "MjModel", value)


def is_atari(value: object) -> bool:
    """Whether a value is an ``ALEInterface``.

    :param value: any value
    """
    return _is_instance("ale_py", "ALEInterface", value)


def atari_state(ale: Any) -> bytes | dict[str, Any]:  # noqa: ANN401  # ale-py is an optional dependency
    """Copy the state of an ``ALEInterface``, its random generator included.

    With sticky actions, the next frames may repeat the last action, which ALE's state lacks. It is found by trial: the
    generator is in the state, so the next frames repeat it as often in each trial. The first trial shows what they do
    with the true last action, which it overwrites. Then each action is made the last one, until one does the same.
    Until the next step, ``render()`` shows the last frame of a trial.

    :param ale: an ``ALEInterface``
    :return: what ``ALEState.serialize`` returns; with sticky actions a dict with it and the last action, or another
        action that does the same
    :raises PlainStateError: if no action does the same
    """
    state = ale.cloneState(include_rng=True)
    serialized: bytes = state.serialize()
    if sticky_probability(ale) == 0:
        return serialized
    if ale.getEpisodeFrameNumber() == 0:
        # A reset forgets the last action
        return {"state": serialized, "last_action": NOOP}
    expected = list(_future(ale))
    # The minimal actions first: most agents use no others
    for action in dict.fromkeys(
        [NOOP, *(each.value for each in (*ale.getMinimalActionSet(), *ale.getLegalActionSet()))]
    ):
        # Doing nothing, the trial before has made this the last action
        set_state = ale.restoreState if action == NOOP else partial(_set_state_and_last_action, ale, action=action)
        set_state(state)
        # Ends at the first frame that differs
        if all(seen == frame for seen, frame in zip(_future(ale), expected, strict=True)):
            set_state(state)
            return {"state": serialized, "last_action": action}
    raise PlainStateError("the last action of an Atari game was not found, which sticky actions may repeat")


def set_atari_state(ale: Any, saved: bytes | dict[str, Any]) -> None:  # noqa: ANN401  # ale-py is an optional dependency
    """Put back the state of an ``ALEInterface``.

    :param ale: an ``ALEInterface``
    :param saved: what :func:`atari_state` has returned
    :raises ValueError: for the state of a game with sticky actions where there are none
    """
    ale_py = importlib.import_module("ale_py")
    serialized, last_action = (saved["state"], saved["last_action"]) if isinstance(saved, dict) else (saved, None)
    if last_action is not None and sticky_probability(ale) == 0:
        raise ValueError("the saved Atari game has sticky actions, this one has none")
    state = ale_py.ALEState(serialized)
    ale.restoreState(state)
    n_frames = ale.getEpisodeFrameNumber()
    if n_frames == 0 or (n_frames < N_FRAMES_AFTER_RESET and last_action is None):
        # What a reset leaves outside ALE's state is forgotten some frames later: do as much after a reset of this game
        ale.reset_game()
        for _ in range(n_frames):
            ale.act(ale_py.Action(NOOP))
        ale.restoreState(state)
    elif last_action is not None:
        _set_state_and_last_action(ale, state, last_action)


def sticky_probability(ale: Any) -> float:  # noqa: ANN401  # ale-py is an optional dependency
    """Return the probability that a frame repeats an earlier action; 0 if it is always the same one.

    :param ale: an ``ALEInterface``
    """
    probability: float = ale.getFloat("repeat_action_probability")
    # With 1, no action of the agent's ever reaches the game, so that the last one is always the same
    return probability if 0 < probability < 1 else 0.0


def _n_frames(ale: Any) -> int:  # noqa: ANN401  # ale-py is an optional dependency
    """Return after how many frames the last action is forgotten. 0: it never matters."""
    probability = sticky_probability(ale)
    return math.ceil(math.log(P_OVERLOOKED) / math.log(probability)) if probability > 0 else 0


def _set_state_and_last_action(ale: Any, state: Any, action: int) -> None:  # noqa: ANN401  # ale-py is optional
    ale_action = importlib.import_module("ale_py").Action(action)
    for _ in range(_n_frames(ale)):
        ale.act(ale_action)
    # Leaves the last action as it is
    ale.restoreState(state)


def _future(ale: Any) -> Iterator[Any]:  # noqa: ANN401  # ale-py is an optional dependency
    """Do nothing until the last action is forgotten. Yield what each frame does, and the last screen."""
    no_operation = importlib.import_module("ale_py").Action(NOOP)
    for _ in range(_n_frames(ale)):
        yield ale.act(no_operation), ale.getRAM().tobytes()
    yield ale.getScreenRGB().tobytes()


def _is_instance(module: str, name: str, value: object) -> bool:
    # The modules are optional dependencies. While one is not imported, its objects cannot exist
    return module in sys.modules and isinstance(value, getattr(sys.modules[module], name))
