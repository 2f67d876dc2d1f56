"""The state of callbacks: their own ``get_state`` and ``set_state``, and what SB3's callbacks count."""

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
from sb3_ppo_plus.resuming.vec_env_state import set_vec_env_state, vec_env_state

State = dict[str, Any]

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


def callback_states(callback: BaseCallback) -> dict[str, State]:
    """Copy the state of ``callback`` and of every callback inside it.

    Each counts its calls. SB3's own keep their attributes, EvalCallback the environments that it evaluates on, where
    they have ``get_resume_state``. Any other has the state that its ``get_state()`` returns.

    :return: plain values by name
    """
    return {key: _state_of(child) for key, child in _named(callback)}


def set_callback_states(callback: BaseCallback, states: dict[str, State]) -> None:
    """Put back what :func:`callback_states` has returned; warn of a saved callback that is not there any more."""
    children = dict(_named(callback))
    missing = [key for key, state in states.items() if key not in children and len(state) > 1]
    if missing:
        warnings.warn(f"callbacks of the checkpoint are not given, their state is dropped: {missing}", stacklevel=2)
    for key in states.keys() & children.keys():
        child, state = children[key], states[key]
        child.n_calls = state["n_calls"]
        for name in _attributes_of(child):
            if name in state.get("attributes", {}):
                setattr(child, name, state["attributes"][name])
        if "own" in state and hasattr(child, "set_state"):
            child.set_state(state["own"])
        if isinstance(child, EvalCallback):
            _set_eval_env_state(child, state.get("eval_env"))


def _set_eval_env_state(callback: EvalCallback, state: State | None) -> None:
    if state is None or not set_vec_env_state(callback.eval_env, state):
        warnings.warn(
            f"the environments of {type(callback).__name__} have no get_resume_state() and set_resume_state(state), or "
            "had none: they begin anew, and its results may differ. ResumableEnv gives both to many",
            stacklevel=2,
        )


def _named(callback: BaseCallback) -> Iterator[tuple[str, BaseCallback]]:
    seen: Counter[str] = Counter()
    for child in iterate_callbacks(callback):
        # learn makes lists of its own
        if type(child) is not CallbackList:
            name = type(child).__name__
            seen[name] += 1
            yield f"{name} {seen[name]}", child


def _attributes_of(callback: BaseCallback) -> list[str]:
    return [name for cls, names in SB3_ATTRIBUTES.items() if isinstance(callback, cls) for name in names]


def _state_of(callback: BaseCallback) -> State:
    state: State = {"n_calls": callback.n_calls}
    names = _attributes_of(callback)
    if names:
        state["attributes"] = {name: getattr(callback, name) for name in names}
    if hasattr(callback, "get_state") and hasattr(callback, "set_state"):
        state["own"] = callback.get_state()
    if isinstance(callback, EvalCallback):
        eval_env = vec_env_state(callback.eval_env)
        state["eval_env"] = None if eval_env["envs"] is None else eval_env
    return state
