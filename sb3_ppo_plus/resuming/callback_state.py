"""The state of callbacks: what their ``get_state()`` returns, and what SB3's own callbacks count."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterator
from typing import Any

from stable_baselines3.common.callbacks import (
    BaseCallback,
    CallbackList,
    EvalCallback,
    EveryNTimesteps,
    StopTrainingOnMaxEpisodes,
    StopTrainingOnNoModelImprovement,
)

from sb3_ppo_plus.callback_hooks import iterate_callbacks
from sb3_ppo_plus.env_states.untrusted_state import may_replace
from sb3_ppo_plus.env_states.vec_env_state import set_vec_env_state, vec_env_state
from sb3_ppo_plus.untrusted.strict_json import short

CallbackState = dict[str, Any]

SB3_ATTRIBUTES: dict[type[BaseCallback], tuple[str, ...]] = {
    EvalCallback: (
        "best_mean_reward",
        "last_mean_reward",
        "evaluations_results",
        "evaluations_timesteps",
        "evaluations_length",
        "evaluations_successes",
    ),
    EveryNTimesteps: ("last_time_trigger",),
    StopTrainingOnMaxEpisodes: ("n_episodes",),
    StopTrainingOnNoModelImprovement: ("last_best_mean_reward", "no_improvement_evals"),
}


def callback_states(callback: BaseCallback) -> dict[str, CallbackState]:
    """Copy the state of a callback and of every callback inside it.

    For each callback this is the number of its calls. For SB3's own callbacks it is also their attributes, see
    :data:`SB3_ATTRIBUTES`. For an EvalCallback it is also the state of its environments, if they have
    ``get_resume_state``. For a callback with ``get_state`` and ``set_state`` it is also what ``get_state()`` returns.

    :param callback: the callback of ``learn``
    :return: plain values, by the callback's class and its number among those of its class
    """
    return {key: _copied_state(child) for key, child in _named(callback)}


def set_callback_states(callback: BaseCallback, states: dict[str, CallbackState], trusted: bool = True) -> None:
    """Put back what :func:`callback_states` has returned. Warn of saved callbacks that are missing now.

    :param callback: the callback of ``learn``
    :param states: what was saved
    :param trusted: False: of the attributes of SB3's callbacks, only numbers are put back; and see
        :func:`set_vec_env_state`
    :raises ValueError: without trust, for a value that is no number; the message names it
    """
    children = dict(_named(callback))
    # The number of calls alone is no loss
    missing = [key for key, state in states.items() if key not in children and len(state) > 1]
    if missing:
        warnings.warn(
            f"the checkpoint holds the state of callbacks that were not given; it is dropped: {missing}", stacklevel=2
        )
    for key in states.keys() & children.keys():
        child, state = children[key], states[key]
        attributes = {"n_calls": state["n_calls"]}
        saved = state.get("attributes", {})
        attributes |= {name: saved[name] for name in _sb3_attributes(child) if name in saved}
        for name, value in attributes.items():
            if not trusted and not may_replace(getattr(child, name), value):
                raise ValueError(f"{key}: {name} cannot be {short(value)}")
            setattr(child, name, value)
        if "own" in state and hasattr(child, "set_state"):
            child.set_state(state["own"])
        if isinstance(child, EvalCallback):
            _set_eval_env_state(child, state.get("eval_env"), trusted)


def _set_eval_env_state(callback: EvalCallback, state: CallbackState | None, trusted: bool) -> None:
    if state is None or not set_vec_env_state(callback.eval_env, state, trusted):
        warnings.warn(
            f"the environments of {type(callback).__name__} have no get_resume_state() and set_resume_state(state), or "
            "had none when they were saved: their episodes begin anew, and the evaluation's results may differ. "
            "ResumableEnv gives many environments both methods",
            stacklevel=2,
        )


def _named(callback: BaseCallback) -> Iterator[tuple[str, BaseCallback]]:
    seen: Counter[str] = Counter()
    for child in iterate_callbacks(callback):
        # learn puts callbacks into further lists, which must not change the names
        if type(child) is not CallbackList:
            name = type(child).__name__
            seen[name] += 1
            yield f"{name} {seen[name]}", child


def _sb3_attributes(callback: BaseCallback) -> list[str]:
    names: list[str] = []
    for cls, class_names in SB3_ATTRIBUTES.items():
        if isinstance(callback, cls):
            names.extend(class_names)
    return names


def _copied_state(callback: BaseCallback) -> CallbackState:
    state: CallbackState = {"n_calls": callback.n_calls}
    names = _sb3_attributes(callback)
    if names:
        state["attributes"] = {name: getattr(callback, name) for name in names}
    if hasattr(callback, "get_state") and hasattr(callback, "set_state"):
        state["own"] = callback.get_state()
    if isinstance(callback, EvalCallback):
        eval_env = vec_env_state(callback.eval_env)
        state["eval_env"] = None if eval_env["envs"] is None else eval_env
    return state
