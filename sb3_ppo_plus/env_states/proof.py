"""A trial on the real environment: whether it goes on in the same way after its state was put back."""

from __future__ import annotations

import copy
import time
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from gymnasium.wrappers import RecordVideo
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv, VecEnv

from sb3_ppo_plus.env_states.differences import first_difference
from sb3_ppo_plus.env_states.object_attributes import saves_itself
from sb3_ppo_plus.env_states.undo import Undo
from sb3_ppo_plus.envs.questions import base_of, has_attribute
from sb3_ppo_plus.envs.watched_remote import time_for_proof
from sb3_ppo_plus.errors import PlainStateError, ResumeProofError
from sb3_ppo_plus.untrusted.strict_json import short

# Steps before and after the reset
N_STEPS = (20, 10)
# A slow environment takes fewer steps, and does them twice
MAX_SECONDS = 2.0
# So do slow environments that take their steps one after the other, for all of them together
MAX_SECONDS_OF_ALL = 10.0
# What training and its logs use of an info; others may hold the time
MASK = "action_mask"
INFOS = ("episode", "is_success", MASK)
RESET = object()
"""Stands for a reset among actions."""
REMEDIES = (
    "Give the environment or the wrapper that causes it get_resume_state() and set_resume_state(state). "
    "ResumableEnv(env, prove=False) goes without this proof: a run that is resumed may then differ"
)
NO_PROOF = (
    "So it is not proven that a run with this environment goes on exactly after a resume. "
    "ResumableEnv(env, prove=False) tries no random actions"
)
OF_SHARED = "After a resume, each environment has one of its own. ResumableEnv(env, prove=False) does not warn of this"
# Attributes of wrappers that write files, while the trial runs
QUIET: dict[type[Any], dict[str, Callable[[], Any]]] = {
    Monitor: {"results_writer": lambda: None, "allow_early_resets": lambda: True},
    RecordVideo: {
        "recording": lambda: False,
        "episode_trigger": lambda: None,
        "step_trigger": lambda: None,
        "recorded_frames": list,
        "render_history": list,
    },
}


class Finding(NamedTuple):
    """What a trial has found.

    :param is_error: whether the environment goes on in another way; False: the trial was not possible
    :param text: a sentence; "": the environment is saved in another way from its next reset on
    :param is_disturbed: whether the environment is not as it was before the trial, and needs a reset
    """

    is_error: bool
    text: str
    is_disturbed: bool = False


def prove_envs(env: VecEnv, kind: str = "environment") -> bool:
    """Have each ResumableEnv of a vectorised environment prove itself.

    Environments of one process take :data:`MAX_SECONDS_OF_ALL` together: where they are slow, the first one takes more
    steps than the others, which take at least two and a reset, twice. A warning says where that is longer.

    Nothing happens if the environments have no such method, or ``env`` cannot ask them.

    :param env: the outermost vectorised environment
    :param kind: what to call one of its environments
    :return: whether an environment needs a reset, since its trial failed and it was not put back; and then this again
    :raises ResumeProofError: if one goes on in another way after its state was put back
    """
    base = base_of(env)
    if not has_attribute(base, "prove_resumable"):
        return False
    doubts = []
    is_disturbed = False
    for index, finding in enumerate(_findings(base)):
        if finding is None:
            continue
        if finding.is_error:
            raise ResumeProofError(f"{kind} {index}: {finding.text}")
        if finding.text:
            doubts.append(f"{kind} {index}: {finding.text}")
        is_disturbed = is_disturbed or finding.is_disturbed
    if doubts:
        warnings.warn(doubts[0], stacklevel=2)
    return is_disturbed


def _findings(base: Any) -> Iterator[Finding | None]:  # noqa: ANN401  # a VecEnv
    if isinstance(base, SubprocVecEnv):
        # At the same time, each in a process of its own
        with time_for_proof(base):
            findings = base.env_method("prove_resumable")
        yield from findings
        return
    shared = _shared_containers(base)
    ends_at = time.perf_counter() + MAX_SECONDS_OF_ALL
    is_late = False
    for index in range(base.num_envs):
        left = ends_at - time.perf_counter()
        if left <= 0 and not is_late:
            is_late = True
            warnings.warn(
                f"the proof of {index} of {base.num_envs} environments has taken {MAX_SECONDS_OF_ALL} s: each of the "
                "others takes two steps and a reset, twice. ResumableEnv(env, prove=False) takes none",
                stacklevel=3,
            )
        # The first one takes what it needs, the others share the rest. All steps are taken twice
        n_sharing = base.num_envs - index if index > 0 else 1
        max_seconds = min(MAX_SECONDS, max(left, 0.0) / (2 * n_sharing))
        yield from base.env_method("prove_resumable", shared, max_seconds, indices=[index])


def find_flaw(
    env: Any,  # noqa: ANN401  # a ResumableEnv
    layers: Collection[gym.Env[Any, Any]],
    shared: Collection[int] = (),
    max_seconds: float | None = None,
) -> Finding | None:
    """Take some steps with random actions, put back the state, take the same steps again, and put back the state.

    The steps leave no trace: neither in the environment, the random generators and the statistics of wrappers, nor in
    the files of Monitor and RecordVideo.

    :param env: an environment with ``get_resume_state`` and ``set_resume_state``, after a reset
    :param layers: the environments and wrappers inside it
    :param shared: ids of containers that another environment holds too
    :param max_seconds: time after which no further steps are taken, beyond two and a reset; they are then done again,
        which takes as long. None: :data:`MAX_SECONDS`
    :return: None if both times are the same
    """
    with _quiet(layers):
        undo = Undo([layer for layer in layers if not saves_itself(layer)])
        undo.make_generators()
        try:
            state = env.get_resume_state()
        except Exception as error:
            undo()
            # An exception would end a worker process
            return Finding(
                True, str(error) if isinstance(error, PlainStateError) else f"{type(error).__name__}: {error}"
            )
        changed: list[Any] = []
        descriptors: list[str] = []

        def look() -> None:
            changed.extend(undo.changed(shared))
            descriptors.extend(undo.changed_descriptors())

        finding = _flaw_after(env, state, look, MAX_SECONDS if max_seconds is None else max_seconds)
        if finding is None and descriptors:
            text = f"steps change what the descriptor {descriptors[0]} holds, which is not saved. {REMEDIES}"
            finding = Finding(True, text)
        # The simulators that were there, their state, and instead of the new lists and arrays that come with it the old
        undo()
        try:
            env.set_resume_state(state)
        except Exception as error:
            return finding or _changed(f"{type(error).__name__}: {error}")
        finally:
            undo()
        if finding is None and changed:
            return Finding(False, f"steps change {short(changed[0])}, which another environment holds too. {OF_SHARED}")
        return finding


def find_flaw_before_reset(
    env: Any,  # noqa: ANN401  # a ResumableEnv
    layers: Collection[gym.Env[Any, Any]],
    max_seconds: float | None,
) -> Finding | None:
    """Do what :func:`find_flaw` does with an environment that nobody has reset; afterwards, its first reset is to come.

    :param env: the environment
    :param layers: the environments and wrappers inside it
    :param max_seconds: as of :func:`find_flaw`
    """
    with _quiet(layers):
        undo = Undo([layer for layer in layers if not saves_itself(layer)])
        undo.make_generators()
        try:
            state = env.get_resume_state()
            env.reset()
            finding = find_flaw(env, layers, max_seconds=max_seconds)
            undo()
            env.set_resume_state(state)
        except Exception as error:
            finding = Finding(
                False, f"its first reset, or going back, raised {type(error).__name__}: {error}. {NO_PROOF}"
            )
        undo()
    return finding


def _shared_containers(base: Any) -> set[int]:  # noqa: ANN401  # a VecEnv
    """Return the ids of the lists, dicts, sets and arrays that several environments of this process hold."""
    seen: set[int] = set()
    shared: set[int] = set()
    # Between processes nothing is shared
    for layers in base.env_method("resumable_layers") if type(base) is DummyVecEnv else ():
        containers = Undo(layers).containers
        shared |= seen & containers
        seen |= containers
    return shared


def _flaw_after(
    env: Any,  # noqa: ANN401  # a ResumableEnv
    state: Any,  # noqa: ANN401  # plain values
    look: Callable[[], None],
    max_seconds: float,
) -> Finding | None:
    """Return a finding. ``look`` is called after the first time."""
    try:
        operations, expected = _first_time(env, max_seconds)
    except Exception as error:
        return Finding(False, f"a random action or a reset raised {type(error).__name__}: {error}. {NO_PROOF}")
    look()
    try:
        env.set_resume_state(state)
        difference = first_difference(_comparable(state), _comparable(env.get_resume_state()), "its state")
        for index, operation in enumerate(operations):
            if difference is None:
                difference = first_difference(expected[index], _outcome(env, operation), _name(operations, index))
    except Exception as error:
        difference = f"{type(error).__name__}: {error}"
    return None if difference is None else _changed(difference)


def _comparable(state: dict[str, Any]) -> dict[str, Any]:
    """Leave out the states of Atari games: some hold what nobody sees, and is another each time."""
    layers = []
    for name, attributes in state["layers"]:
        is_ours = isinstance(attributes, dict) and all(isinstance(value, tuple) for value in attributes.values())
        seen = {key: value for key, value in attributes.items() if value[0] != "atari"} if is_ours else attributes
        layers.append((name, seen))
    return {**state, "layers": layers}


def _changed(difference: str) -> Finding:
    return Finding(True, f"saved and put back, it goes on in another way: {difference}. {REMEDIES}")


def _first_time(env: Any, max_seconds: float) -> tuple[list[Any], list[Any]]:  # noqa: ANN401  # a ResumableEnv
    """Take steps with random actions; return the actions, and RESET where a reset was, and what happened each time."""
    operations: list[Any] = []
    outcomes: list[Any] = []

    def is_over_after(operation: Any) -> bool:  # noqa: ANN401  # an action
        # A copy, since an environment may change the array
        outcomes.append(_outcome(env, operation))
        operations.append(operation)
        return bool(outcomes[-1].get("terminated") or outcomes[-1].get("truncated"))

    random_action = _random_actions(env.action_space)
    masks = _masks(env, None)
    started = time.perf_counter()
    if masks is None and MASK in getattr(env.observation_space, "spaces", ()):
        # Only a step or a reset tells the masks
        is_over_after(RESET)
    for part, n_steps in enumerate(N_STEPS, start=1):
        for _ in range(n_steps):
            masks = outcomes[-1]["masks"] if outcomes else masks
            if is_over_after(random_action(masks)):
                is_over_after(RESET)
            if time.perf_counter() - started > max_seconds * part / len(N_STEPS):
                break
        if part < len(N_STEPS):
            is_over_after(RESET)
    return operations, outcomes


def _outcome(env: Any, operation: Any) -> dict[str, Any]:  # noqa: ANN401  # a ResumableEnv, an action
    """Take a step or reset; return a copy of what training depends on."""
    outcome: dict[str, Any] = {}
    if operation is RESET:
        outcome["observation"], info = env.reset()
    else:
        names = ("observation", "reward", "terminated", "truncated")
        *values, info = env.step(copy.deepcopy(operation))
        outcome |= dict(zip(names, values, strict=True))
    outcome["masks"] = _masks(env, outcome["observation"])
    for key in INFOS:
        if key in info:
            # The time of an episode is another one each time
            is_episode = key == "episode"
            outcome[key] = {name: info[key][name] for name in ("r", "l")} if is_episode else info[key]
    return copy.deepcopy(outcome)


def _masks(env: Any, observation: Any) -> Any:  # noqa: ANN401  # a ResumableEnv, an observation; masks may be a structure
    try:
        method = env.get_wrapper_attr("action_masks")
    except AttributeError:
        method = None
    if method is not None:
        masks = method()
        return masks if isinstance(masks, dict | tuple) else np.array(masks)
    return np.asarray(observation[MASK]) if isinstance(observation, dict) and MASK in observation else None


def _random_actions(action_space: spaces.Space[Any]) -> Callable[[Any], Any]:
    """Return a function that draws a valid action. It uses none of the generators that training uses."""
    space = copy.deepcopy(action_space)
    space.seed(0)
    generator = np.random.default_rng(0)
    return lambda masks: _masked(space, space.sample(), masks, generator)


def _masked(space: spaces.Space[Any], action: Any, masks: Any, generator: np.random.Generator) -> Any:  # noqa: ANN401  # any structure
    """Return an action whose choices are valid: one array of masks, or masks in the structure of the space."""
    if isinstance(space, spaces.Dict | spaces.Tuple):
        members = dict(space.spaces.items() if isinstance(space, spaces.Dict) else enumerate(space.spaces))
        chosen = {
            key: _masked(member, action[key], mask, generator)
            for (key, member), mask in zip(members.items(), _masks_of_members(members, masks), strict=True)
        }
        return chosen if isinstance(space, spaces.Dict) else tuple(chosen.values())
    sizes = _sizes(space)
    masks = np.concatenate([np.reshape(mask, -1) for mask in masks]) if isinstance(masks, tuple | list) else masks
    if masks is None or not sizes or np.size(masks) != sum(sizes):
        return action
    parts = np.split(np.reshape(masks, -1) != 0, np.cumsum(sizes)[:-1])
    choices = [generator.choice(np.flatnonzero(part) if part.any() else part.size) for part in parts]
    if isinstance(space, spaces.Discrete):
        return type(action)(space.start + choices[0])
    return np.array(choices, dtype=space.dtype).reshape(np.shape(action))


def _masks_of_members(members: dict[Any, spaces.Space[Any]], masks: Any) -> list[Any]:  # noqa: ANN401  # any structure
    if isinstance(masks, dict):
        return [masks.get(key) for key in members]
    ends = np.cumsum([sum(_sizes(member)) for member in members.values()])
    if isinstance(masks, np.ndarray) and masks.size == ends[-1]:
        return np.split(masks.reshape(-1), ends[:-1])
    return list(masks) if isinstance(masks, tuple | list) and len(masks) == len(members) else [None] * len(members)


def _sizes(space: spaces.Space[Any]) -> list[int]:
    if isinstance(space, spaces.Dict | spaces.Tuple):
        members = space.spaces.values() if isinstance(space, spaces.Dict) else space.spaces
        return [size for member in members for size in _sizes(member)]
    if isinstance(space, spaces.Discrete):
        return [int(space.n)]
    if isinstance(space, spaces.MultiDiscrete):
        return [int(n) for n in space.nvec.reshape(-1)]
    return [2] * int(np.prod(space.shape)) if isinstance(space, spaces.MultiBinary) else []


def _name(operations: list[Any], index: int) -> str:
    n_steps = sum(operation is not RESET for operation in operations[: index + 1])
    return (
        f"at the reset after step {n_steps}, the outcome"
        if operations[index] is RESET
        else f"at step {n_steps}, the outcome"
    )


@contextmanager
def _quiet(layers: Iterable[gym.Env[Any, Any]]) -> Iterator[None]:
    """Keep wrappers from writing files, and let them reset early."""
    replaced: list[tuple[Any, str, Any]] = []
    for layer in layers:
        for cls, values in QUIET.items():
            for name in values if isinstance(layer, cls) else ():
                replaced.append((layer, name, getattr(layer, name)))
                setattr(layer, name, values[name]())
    try:
        yield
    finally:
        for layer, name, value in replaced:
            setattr(layer, name, value)
