"""The state of a vectorised environment: of its wrappers, and of each environment in it that can tell its own."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from stable_baselines3.common.vec_env import VecEnv, VecEnvWrapper, VecNormalize

from sb3_ppo_plus.envs.questions import base_of, has_attribute, names_of
from sb3_ppo_plus.errors import WrapperStackError
from sb3_ppo_plus.resuming.object_state import object_state, set_object_state
from sb3_ppo_plus.resuming.resumable_env import ResumableEnv

State = dict[str, Any]

# What SB3's VecEnv keeps for its next reset
FOR_NEXT_RESET = ("_options", "_seeds", "reset_infos")
MONITOR_STATISTICS = ("episode_returns", "episode_lengths", "episode_times", "total_steps", "t_start")
# State of the wrappers that Gymnasium and SB3 put around the method get_resume_state of an environment
WRAPPER_ATTRIBUTES: dict[str, tuple[str, ...]] = {
    "Monitor": ("rewards", "needs_reset", "current_reset_info", *MONITOR_STATISTICS),
    "OrderEnforcing": ("_has_reset",),
    "PassiveEnvChecker": (),
    "TimeLimit": ("_elapsed_steps",),
}


def vec_env_state(env: VecEnv, unsaved: list[str] | None = None) -> State:
    """Copy the state of a vectorised environment.

    :param env: with all its wrappers; of those that are not SB3's plain attributes are saved, or what their own
        ``get_resume_state()`` returns
    :param unsaved: takes a line about everything that is left out
    :return: plain values
    """
    unsaved = [] if unsaved is None else unsaved
    base = base_of(env)
    stack = _gymnasium_stack(env)
    outside = _outside_of_methods(stack)
    state: State = {
        "wrappers": [(type(wrapper).__name__, _wrapper_state(wrapper, unsaved)) for wrapper in _wrappers(env)],
        "n_envs": env.num_envs,
        "stack": stack,
        "attributes": {},
        "envs": None,
        "vec_env": base.get_resume_state() if _has_methods(type(base)) else None,
    }
    if _envs_are_resumable(base):
        state["envs"] = base.env_method("get_resume_state")
        if stack and len(outside) < len(stack[0]):
            unknown = [name for name in outside if name not in WRAPPER_ATTRIBUTES]
            unsaved.extend(f"{name} is outside ResumableEnv: put ResumableEnv outermost" for name in unknown)
    for wrapper in outside:
        for name in WRAPPER_ATTRIBUTES.get(wrapper, ()):
            # Where episodes begin anew, the statistics of past ones remain
            if state["envs"] is not None or name in MONITOR_STATISTICS:
                state["attributes"][name] = base.env_method("get_wrapper_attr", name)
    return state


def set_vec_env_state(env: VecEnv, state: State) -> bool:
    """Put back what :func:`vec_env_state` has returned; the environments are reset first if they can go on.

    :return: whether the episodes go on; otherwise they begin anew, and the wrappers' statistics are as saved
    :raises WrapperStackError: for other wrappers or another number of environments, naming both
    """
    _check_same_stack(env, state)
    base = base_of(env)
    goes_on = False
    if state["vec_env"] is not None and _has_methods(type(base)):
        env.reset()
        base.set_resume_state(state["vec_env"])
        goes_on = True
    elif state["envs"] is not None and _envs_are_resumable(base):
        env.reset()
        for index, env_state in enumerate(state["envs"]):
            base.env_method("set_resume_state", env_state, indices=[index])
        goes_on = True
    known = {name for names in WRAPPER_ATTRIBUTES.values() for name in names}
    for name, values in state["attributes"].items():
        if name not in known:
            raise ValueError(f"{name} is no state of an environment's wrapper")
        if goes_on or name in MONITOR_STATISTICS:
            for index, value in enumerate(values):
                base.env_method("set_wrapper_attr", name, value, indices=[index])
    for wrapper, (_, wrapper_state) in zip(_wrappers(env), state["wrappers"], strict=True):
        if _has_methods(type(wrapper)):
            wrapper.set_resume_state(wrapper_state)
        else:
            set_object_state(wrapper, wrapper_state)
    return goes_on


def reset_without_learning(env: VecEnv) -> Any:  # noqa: ANN401  # SB3's VecEnvObs
    """Reset the environments, and leave the running means of VecNormalize as they are.

    :return: the first observations
    """
    normalizers = [wrapper for wrapper in _wrappers(env) if isinstance(wrapper, VecNormalize) and wrapper.training]
    for normalizer in normalizers:
        normalizer.training = False
    try:
        return env.reset()
    finally:
        for normalizer in normalizers:
            normalizer.training = True


def _wrappers(env: VecEnv) -> Iterator[VecEnvWrapper]:
    while isinstance(env, VecEnvWrapper):
        yield env
        env = env.venv


def _wrapper_state(wrapper: VecEnvWrapper, unsaved: list[str]) -> Any:  # noqa: ANN401  # plain values
    if _has_methods(type(wrapper)):
        return wrapper.get_resume_state()
    is_own = type(wrapper).__module__.startswith("stable_baselines3.")
    return object_state(wrapper, FOR_NEXT_RESET, [] if is_own else unsaved)


def _has_methods(cls: type[Any]) -> bool:
    # Of the class: instances of SB3's wrappers answer for what they wrap
    return hasattr(cls, "get_resume_state") and hasattr(cls, "set_resume_state")


def _envs_are_resumable(base: Any) -> bool:  # noqa: ANN401  # a VecEnv, or what one of another package wraps
    return has_attribute(base, "get_resume_state") and has_attribute(base, "set_resume_state")


def _gymnasium_stack(env: VecEnv) -> list[list[str]]:
    """Names of the wrappers of each environment and its own, from the outside in; empty where there are none."""
    return [re.findall(r"<(\w+)", text) for text in names_of(base_of(env))]


def _outside_of_methods(stack: list[list[str]]) -> list[str]:
    """Names of the wrappers outside ResumableEnv; of all, where an environment has methods of its own."""
    names = stack[0] if stack else []
    own = ResumableEnv.__name__
    return names[: names.index(own)] if own in names else names


def _check_same_stack(env: VecEnv, state: State) -> None:
    if env.num_envs != state["n_envs"]:
        raise WrapperStackError(f"the checkpoint has {state['n_envs']} environments, env has {env.num_envs}")
    names, saved_names = [type(wrapper).__name__ for wrapper in _wrappers(env)], [name for name, _ in state["wrappers"]]
    if names != saved_names:
        raise WrapperStackError(f"the checkpoint's VecEnv wrappers are {saved_names}, those of env are {names}")
    stack = _gymnasium_stack(env)
    if stack != state["stack"]:
        index = next((i for i, (a, b) in enumerate(zip(stack, state["stack"], strict=False)) if a != b), 0)
        saved, given = (" of ".join(stacks[index]) if stacks else "none" for stacks in (state["stack"], stack))
        raise WrapperStackError(f"the checkpoint's environment {index} is {saved}, that of env is {given}")
