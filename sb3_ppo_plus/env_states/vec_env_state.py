"""The state of a vectorised environment: of its wrappers, and of the environments that have ``get_resume_state``."""

from __future__ import annotations

import re
import warnings
from itertools import chain
from typing import Any

from stable_baselines3.common.vec_env import SubprocVecEnv, VecEnv, VecEnvWrapper, VecNormalize

from sb3_ppo_plus.env_states.episode_recorder import EpisodeRecorder, is_new, n_replayed_steps, saved_name
from sb3_ppo_plus.env_states.generator_state import set_torch_generator
from sb3_ppo_plus.env_states.object_attributes import saves_itself
from sb3_ppo_plus.env_states.object_state import object_state, set_object_state
from sb3_ppo_plus.env_states.resumable_env import ResumableEnv
from sb3_ppo_plus.env_states.untrusted_state import may_replace, set_state_without_trust
from sb3_ppo_plus.env_states.worker_episodes import episode_states, set_episode_states
from sb3_ppo_plus.envs.batched_vec_env import BatchedVecEnv
from sb3_ppo_plus.envs.questions import base_of, has_attribute, names_of, wrappers_of
from sb3_ppo_plus.envs.restarting_remote import known_episodes
from sb3_ppo_plus.envs.tensor_vec_env import TensorVecEnv
from sb3_ppo_plus.envs.watched_remote import STEPS_OF_PROOF, time_for_proof
from sb3_ppo_plus.errors import PlainStateError, ReplayError, WrapperStackError

VecEnvState = dict[str, Any]

# Attributes that SB3's VecEnv keeps for its next reset; of wrappers they are not saved
FOR_NEXT_RESET = ("_options", "_seeds", "reset_infos")
MONITOR_STATISTICS = ("episode_returns", "episode_lengths", "episode_times", "total_steps", "t_start")
# State of the wrappers that Gymnasium and SB3 may put outside ResumableEnv, or around an environment's own methods
WRAPPER_ATTRIBUTES: dict[str, tuple[str, ...]] = {
    "Monitor": ("rewards", "needs_reset", "current_reset_info", *MONITOR_STATISTICS),
    "OrderEnforcing": ("_has_reset",),
    "PassiveEnvChecker": (),
    "TimeLimit": ("_elapsed_steps",),
}
# Differences that a warning names
MOST_NAMED = 10
_KNOWN_ATTRIBUTES = {name for names in WRAPPER_ATTRIBUTES.values() for name in names}


def vec_env_state(env: VecEnv, unsaved: list[str] | None = None) -> VecEnvState:
    """Copy the state of a vectorised environment.

    :param env: the outermost vectorised environment. A wrapper's state is what its own ``get_resume_state()`` returns,
        or else its attributes
    :param unsaved: gets a line for everything that is left out
    :return: plain values
    """
    unsaved = [] if unsaved is None else unsaved
    base = base_of(env)
    saver = _saver(base)
    stack = _gymnasium_stack(env)
    outside = _outside_of_methods(stack)
    state: VecEnvState = {
        "wrappers": [(type(wrapper).__name__, _wrapper_state(wrapper, unsaved)) for wrapper in wrappers_of(env)],
        "n_envs": env.num_envs,
        # Until the first reset, which uses them
        "seeds": [None if seed is None else int(seed) for seed in getattr(base, "_seeds", ())],
        "stack": stack,
        "vec_env": saver.get_resume_state() if saves_itself(saver) else None,
        **_state_of_envs(base, outside),
    }
    if isinstance(base, BatchedVecEnv):
        state["episodes"] = base.running_episodes()
    elif isinstance(base, TensorVecEnv):
        state |= {"episodes": base.episodes.state(), "generator": base.generator.get_state()}
    if state["envs"] is not None and stack and len(outside) < len(stack[0]):
        unknown = [name for name in outside if name not in WRAPPER_ATTRIBUTES]
        unsaved.extend(f"{name} is outside ResumableEnv: put ResumableEnv outermost" for name in unknown)
    if state["envs"] is None and has_attribute(base, "why_not_resumable"):
        reasons = filter(None, base.env_method("why_not_resumable"))
        unsaved.extend(f"environments are not saved, and begin anew at a resume: {reason}" for reason in reasons)
    return state


def _saver(base: Any) -> Any:  # noqa: ANN401  # a VecEnv, or what one of another package wraps
    """Return what may save all environments by itself: the VecEnv, or the environment of ``gymnasium.vector`` in it."""
    return base.env.unwrapped if isinstance(base, BatchedVecEnv) else base


def _state_of_envs(base: Any, outside: list[str]) -> VecEnvState:  # noqa: ANN401  # a VecEnv, or what one of another package wraps
    episodes = known_episodes(base)
    while True:
        begun = [episode.begun for episode in episodes]
        state: VecEnvState = {"envs": None, "attributes": {}}
        if _envs_are_resumable(base):
            state["envs"] = _states_of_envs(base)
            if any(env_state is None for env_state in state["envs"]):
                # See why_not_resumable
                state["envs"] = None
        for wrapper in outside:
            for name in WRAPPER_ATTRIBUTES.get(wrapper, ()):
                # If the episodes cannot go on, only statistics of past episodes are of use
                if state["envs"] is not None or name in MONITOR_STATISTICS:
                    state["attributes"][name] = base.env_method("get_wrapper_attr", name)
        # A worker that was started anew meanwhile has another state than the one that it gave before
        if all(episode.begun is before for episode, before in zip(episodes, begun, strict=True)):
            break
    if episodes:
        state["workers"] = episode_states(base)
    return state


def _states_of_envs(base: Any) -> list[Any]:  # noqa: ANN401  # a VecEnv
    if not isinstance(base, SubprocVecEnv) or not has_attribute(base, "get_resume_state_or_tell"):
        states: list[Any] = base.env_method("get_resume_state")
        return states
    answers = base.env_method("get_resume_state_or_tell")
    for index, (_, error) in enumerate(answers):
        if error:
            raise PlainStateError(f"environment {index}: {error}")
    return [state for state, _ in answers]


def set_vec_env_state(env: VecEnv, state: VecEnvState, trusted: bool = True) -> bool:
    """Put back the state of a vectorised environment. Environments that can go on are reset first.

    :param env: the outermost vectorised environment
    :param state: what :func:`vec_env_state` has returned
    :param trusted: False: of attributes only numbers are put back, see :func:`set_state_without_trust`. A warning names
        what is left out
    :return: whether the episodes go on; False: only the state of the wrappers was put back
    :raises WrapperStackError: if the number of environments, or their wrappers, differ; the message names both
    :raises ReplayError: if the replay of an episode had another outcome. With ``by="auto"``, any error of
        a ResumableEnv is a warning in its place
    """
    _check_same_stack(env, state)
    left_out: list[str] = []
    differences: list[str] = []
    goes_on = _set_envs(env, state, trusted, left_out, differences)
    if goes_on:
        # Checkpoints of earlier versions do not have it
        left_out += set_episode_states(base_of(env), state.get("workers", []), trusted)
        if isinstance(base_of(env), BatchedVecEnv):
            base_of(env).set_running_episodes(state.get("episodes", {}))
        elif isinstance(base_of(env), TensorVecEnv):
            base_of(env).episodes.set_state(state.get("episodes", {}))
            set_torch_generator(base_of(env).generator, state.get("generator"))
    for name, values in state["attributes"].items():
        if name not in _KNOWN_ATTRIBUTES:
            raise ValueError(f"{name} is no state of an environment's wrapper")
        if goes_on or name in MONITOR_STATISTICS:
            for index, value in enumerate(values):
                _set_wrapper_attribute(base_of(env), name, value, index, trusted, left_out)
    for wrapper, (_, wrapper_state) in zip(wrappers_of(env), state["wrappers"], strict=True):
        if saves_itself(wrapper):
            wrapper.set_resume_state(wrapper_state)
        elif trusted:
            set_object_state(wrapper, wrapper_state, differences)
        else:
            left_out += set_state_without_trust(wrapper, wrapper_state)
    # Checkpoints of earlier versions do not have them
    seeds = state.get("seeds", [])
    if goes_on and len(seeds) == env.num_envs and all(seed is None or type(seed) is int for seed in seeds):
        base_of(env)._seeds = list(seeds)
    _warn_of_differences(differences)
    if left_out:
        warnings.warn(
            "without trust these parts of the checkpoint were left out, so that what follows may differ: "
            f"{', '.join(sorted(set(left_out)))}",
            stacklevel=2,
        )
    return goes_on


def _set_envs(env: VecEnv, state: VecEnvState, trusted: bool, left_out: list[str], differences: list[str]) -> bool:
    """Put back the states of the environments. Return whether their episodes go on."""
    base = base_of(env)
    saver = _saver(base)
    if state["vec_env"] is not None and saves_itself(saver):
        env.reset()
        saver.set_resume_state(state["vec_env"])
        return True
    if state["envs"] is None or not _envs_are_resumable(base):
        return False
    if not all(map(is_new, state["envs"])):
        env.reset()
    # Environments with methods of their own, and no ResumableEnv, lack it
    method = "set_resume_state_or_tell" if trusted else "set_resume_state_without_trust"
    tells = has_attribute(base, method)
    if not tells:
        method = "set_resume_state"
    n_steps = max(map(n_replayed_steps, state["envs"]), default=0)
    with time_for_proof(base, max(STEPS_OF_PROOF, n_steps)):
        answers = _put_back(base, method, state["envs"])
    for index, answer in enumerate(answers if tells else ()):
        names, error = ([], answer) if trusted else answer
        left_out += names
        if error and base.get_attr("by", [index]) == ["auto"]:
            # Nobody has asked for exactness
            warnings.warn(f"environment {index} cannot go on where it was, so all are reset: {error}", stacklevel=3)
            return False
        if error:
            kind = ReplayError if trusted else ValueError
            raise kind(f"environment {index}: {error}")
    if trusted and has_attribute(base, "resume_differences"):
        differences += chain.from_iterable(base.env_method("resume_differences"))
    return True


def _put_back(base: Any, method: str, states: list[Any]) -> list[Any]:  # noqa: ANN401  # a VecEnv
    """Call a method of each environment with its state. Return the answers."""
    if type(base) is not SubprocVecEnv:
        return [base.env_method(method, state, indices=[index])[0] for index, state in enumerate(states)]
    # All workers at the same time, since a replay takes long
    for remote, state in zip(base.remotes, states, strict=True):
        remote.send(("env_method", (method, (state,), {})))
    return [remote.recv() for remote in base.remotes]


def _warn_of_differences(differences: list[str]) -> None:
    # Several environments may share a class
    differences = list(dict.fromkeys(differences))
    if differences:
        more = f"; and {len(differences) - MOST_NAMED} more" if len(differences) > MOST_NAMED else ""
        warnings.warn(
            "the environments were put back as they were saved, which differs from how they were made: "
            f"{'; '.join(differences[:MOST_NAMED])}{more}. Where this is an edit of their code, it is not in effect",
            stacklevel=3,
        )


def _set_wrapper_attribute(
    base: Any,  # noqa: ANN401  # a VecEnv, or what one of another package wraps
    name: str,
    value: object,
    index: int,
    trusted: bool,
    left_out: list[str],
) -> None:
    if not trusted:
        known = has_attribute(base, name)
        existing = base.env_method("get_wrapper_attr", name, indices=[index])[0] if known else ""
        if not may_replace(existing, value):
            left_out.append(name)
            return
    base.env_method("set_wrapper_attr", name, value, indices=[index])


def reset_without_learning(env: VecEnv) -> Any:  # noqa: ANN401  # SB3's VecEnvObs
    """Reset the environments, and leave the running means of VecNormalize as they are.

    :param env: the outermost vectorised environment
    :return: the first observations
    """
    normalizers = [wrapper for wrapper in wrappers_of(env) if isinstance(wrapper, VecNormalize) and wrapper.training]
    for normalizer in normalizers:
        normalizer.training = False
    try:
        return env.reset()
    finally:
        for normalizer in normalizers:
            normalizer.training = True


def _wrapper_state(wrapper: VecEnvWrapper, unsaved: list[str]) -> Any:  # noqa: ANN401  # plain values
    if saves_itself(wrapper):
        return wrapper.get_resume_state()
    is_own = type(wrapper).__module__.startswith("stable_baselines3.")
    return object_state(wrapper, FOR_NEXT_RESET, [] if is_own else unsaved)


def _envs_are_resumable(base: Any) -> bool:  # noqa: ANN401  # a VecEnv, or what one of another package wraps
    if isinstance(base, TensorVecEnv):
        # It has methods for all environments together
        return False
    return has_attribute(base, "get_resume_state") and has_attribute(base, "set_resume_state")


def _gymnasium_stack(env: VecEnv) -> list[list[str]]:
    """Names of the wrappers of each environment and its own, from the outside in; empty where there are none."""
    stack = [[*map(saved_name, re.findall(r"<(\w+)", text))] for text in names_of(base_of(env))]
    # Whether there is a recorder is known after the first reset only
    return [[name for name in names if name != EpisodeRecorder.__name__] for names in stack]


def _outside_of_methods(stack: list[list[str]]) -> list[str]:
    """Return the names of the wrappers outside ResumableEnv, or all names if there is no ResumableEnv."""
    names = stack[0] if stack else []
    inner = ResumableEnv.__name__
    return names[: names.index(inner)] if inner in names else names


def _check_same_stack(env: VecEnv, state: VecEnvState) -> None:
    if env.num_envs != state["n_envs"]:
        raise WrapperStackError(
            f"the checkpoint has {state['n_envs']} environments for each process, env has {env.num_envs}. To go on in "
            "another number of processes, give resume(..., distributed=True), and env its share of all environments"
        )
    names = [type(wrapper).__name__ for wrapper in wrappers_of(env)]
    saved_names = [name for name, _ in state["wrappers"]]
    if names != saved_names:
        raise WrapperStackError(f"the checkpoint's VecEnv wrappers are {saved_names}, those of env are {names}")
    stack, saved_stack = _gymnasium_stack(env), [[*map(saved_name, names)] for names in state["stack"]]
    if stack != saved_stack:
        index = next((i for i, (a, b) in enumerate(zip(stack, saved_stack, strict=False)) if a != b), 0)
        saved = " of ".join(saved_stack[index]) if saved_stack else "none"
        given = " of ".join(stack[index]) if stack else "none"
        raise WrapperStackError(f"the checkpoint's environment {index} is {saved}, that of env is {given}")
