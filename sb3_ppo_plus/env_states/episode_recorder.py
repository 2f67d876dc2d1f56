"""A wrapper around an environment that cannot be saved: it saves the episode, and plays it again."""

from __future__ import annotations

import copy
import itertools
import warnings
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import gymnasium as gym
from gymnasium.envs.registration import EnvSpec

from sb3_ppo_plus.env_states.box2d_world import emptied_world, free_nodes, set_free_nodes, world_of
from sb3_ppo_plus.env_states.episode_record import RecordedActions, RecordedOutputs, actions_in, is_action_of
from sb3_ppo_plus.env_states.generator_state import global_generator_states, set_global_generator_states
from sb3_ppo_plus.env_states.object_attributes import saves_itself
from sb3_ppo_plus.env_states.outside_draws import OutsideDraws, set_generator
from sb3_ppo_plus.env_states.parts_of_env import (
    containers_of,
    large_attributes,
    parts_of_env,
    set_differing_state_of_parts,
    set_parts_without_trust,
    set_state_of_parts,
    state_of_parts,
)
from sb3_ppo_plus.errors import PlainStateError, ReplayError

#: State of an environment that has no episode yet to replay, such as that of an evaluation before the first one
NEW: dict[str, Any] = {"layers": [], "is_new": True}
# Steps of an episode from which on a warning comes, and from which on it is not recorded any more
MANY_STEPS, MOST_STEPS = 100_000, 1_000_000


class Start(NamedTuple):
    """What an episode begins with.

    :param seed: argument of the reset
    :param options: argument of the reset
    :param parts: what could be saved of the environment before the reset
    :param world: the order of free nodes in its Box2D world; None if it has none
    :param generators: states of the global generators before the reset
    """

    seed: int | None
    options: dict[str, Any] | None
    parts: dict[str, Any]
    world: list[int] | None
    generators: dict[str, Any]


class EpisodeRecorder(gym.Wrapper[Any, Any, Any, Any]):
    """Records an episode: what it began with, and the actions since. Its state is put back by playing it again.

    What was before the episode is put back as far as attributes tell it, before the reset that begins the episode. So
    are attributes that differ after the replay, such as those that others have changed during the episode.

    Each step is compared with the one before. Infos are not.

    :param env: the environment, without wrappers
    :param constant: names of attributes that are left as they are
    :param is_lenient: whether an attribute at which saving itself fails ends the record, in place of being an error
    """

    def __init__(self, env: gym.Env[Any, Any], constant: Iterable[str] = (), is_lenient: bool = False) -> None:
        super().__init__(env)
        self._constant = frozenset(constant)
        self._is_lenient = is_lenient
        self._refusal = ""
        self._start: Start | None = None
        self.has_begun = False
        """Whether it has seen a reset or a step."""
        self._actions = RecordedActions()
        self._outputs = RecordedOutputs()
        self._draws = OutsideDraws(env)
        self._is_warned = False
        self._keeps_world = True
        # The largest number at the end of an episode
        self._n_fixtures = 0
        self._made_anew: set[str] = set()

    @property
    def spec(self) -> EnvSpec | None:  # type: ignore[override]  # a property in gym.Wrapper, too
        """The environment's, since :func:`gymnasium.make` cannot put a recorder where it belongs."""
        return self.env.spec

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """Begin an episode, and its record.

        :param seed: as of the environment
        :param options: as of the environment
        """
        self.has_begun = True
        if self._refusal:
            return self.env.reset(seed=seed, options=options)
        try:
            parts = parts_of_env(self.unwrapped)
            containers, world = containers_of(parts), world_of(self.unwrapped)
            large = large_attributes(containers, self._made_anew)
            self._start = self._before_reset(seed, copy.deepcopy(options), large)
        except Exception as error:
            self._refuse(error)
            return self.env.reset(seed=seed, options=options)
        self._actions, self._outputs = RecordedActions(), RecordedOutputs()
        observation, info = self.env.reset(seed=seed, options=options)
        try:
            # LunarLander's resets make a new world
            self._keeps_world = self._keeps_world and world in (None, world_of(self.unwrapped))
            there = containers_of(parts)
            self._made_anew = {key[1] for key, value in containers.items() if there.get(key) is not value}
            self._outputs.append(observation)
            self._draws.begin()
        except Exception as error:
            self._refuse(error)
        return observation, info

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:  # noqa: ANN401  # of any space
        """Take a step, and record it.

        :param action: as of the environment
        """
        if self._start is None or len(self._actions) >= MOST_STEPS:
            self._start = None
            self.has_begun = True
            return self.env.step(action)
        self._actions.append(action)
        is_watching = self._draws.is_watching
        if is_watching:
            self._draws.before(len(self._actions) - 1)
        output = self.env.step(action)
        if is_watching:
            self._draws.after()
        self._outputs.append(*output[:4])
        return output

    def get_resume_state(self) -> dict[str, Any]:
        """Copy the record.

        :return: plain values
        :raises PlainStateError: a TypeError, if there is no record of the episode
        """
        if self._refusal:
            raise PlainStateError(self._refusal)
        if self._start is None:
            raise PlainStateError(
                f"the episode of {type(self.unwrapped).__name__} was not recorded: it began before ResumableEnv was "
                f"there, or has more than {MOST_STEPS} steps. Give it an end, such as by TimeLimit"
            )
        if len(self._actions) >= MANY_STEPS and not self._is_warned:
            self._is_warned = True
            warnings.warn(
                f"an episode of {type(self.unwrapped).__name__} has {len(self._actions)} steps, which a resume by "
                f"replay does again; after {MOST_STEPS} it cannot. Give it an end, such as by TimeLimit",
                stacklevel=2,
            )
        return {
            "start": self._start._asdict(),
            "actions": self._actions.segments(),
            "outputs": self._outputs.state(),
            "draws": self._draws.notes(),
            "now": state_of_parts(parts_of_env(self.unwrapped), self._constant),
        }

    def set_resume_state(self, state: dict[str, Any]) -> None:
        """Play a recorded episode again. The global generators are others afterwards.

        :param state: what :meth:`get_resume_state` has returned
        :raises ReplayError: a ValueError, if a step has another outcome; the message names both
        """
        start = Start(**state["start"])
        self._prepare_world(start)
        set_state_of_parts(parts_of_env(self.unwrapped), start.parts, self._constant)
        self._set_world(start)
        self._replay(start, state)
        set_differing_state_of_parts(parts_of_env(self.unwrapped), state["now"], self._constant)
        self._draws.forget_states()

    def set_resume_state_without_trust(self, state: dict[str, Any]) -> list[str]:
        """Play an episode again that may come from anybody: numbers are put back, and actions must be in the space.

        :param state: the state, from a file that is not trusted
        :return: names of what was left out
        :raises ValueError: for actions outside the action space, and for options of the reset that are no numbers
        :raises ReplayError: as :meth:`set_resume_state`
        """
        start = Start(**state["start"])
        for part in (start.options or {}).values():
            if not isinstance(part, bool | int | float | None):
                raise ValueError("the episode began with options that are no numbers, which needs trust")
        for number, action in enumerate(actions_in(state["actions"]), start=1):
            if not is_action_of(self.env.action_space, action) or number > MOST_STEPS:
                raise ValueError(f"action {number} of the episode is none of {self.env.action_space}")
        self._prepare_world(start)
        # What is left out here is of no account if the replay has the same outcome
        set_parts_without_trust(parts_of_env(self.unwrapped), start.parts)
        self._set_world(start)
        self._replay(start, state)
        left_out = set_parts_without_trust(parts_of_env(self.unwrapped), state["now"])
        self._draws.forget_states()
        return left_out

    def unsaved_attributes(self) -> list[str]:
        """Return a line for each attribute of the environment that cannot be saved."""
        refused: list[str] = []
        try:
            state_of_parts([self.unwrapped], self._constant, refused)
        except Exception as error:
            self._refuse(error)
            refused.append(self._refusal)
        return refused

    def why_too_slow(self) -> str:
        """Say from which global random generators steps have drawn, if nobody has asked for a replay; else ""."""
        used = self._draws.used_globals()
        if not used or not self._is_lenient:
            return ""
        return (
            f"{type(self.unwrapped).__name__} draws from the global random generator of {' and '.join(used)}, which "
            "others use too. Draw from self.np_random, or, at the cost of looking at it before and after each step, "
            'ResumableEnv(env, by="replay")'
        )

    def _refuse(self, error: Exception) -> None:
        """Record no more after an error of saving, such as that of lists in lists thousands deep, or raise it."""
        if not self._is_lenient:
            raise error
        self._start = None
        self._refusal = f"the state of {type(self.unwrapped).__name__} cannot be saved: {type(error).__name__}: {error}"

    def _before_reset(self, seed: int | None, options: dict[str, Any] | None, left_out: set[str]) -> Start:
        env = self.unwrapped
        if seed is None and env._np_random is None:
            # Made where it is missing, so that it can be saved
            _ = env.np_random
        world = world_of(env) if self._keeps_world else None
        if world is not None:
            self._n_fixtures = max(self._n_fixtures, world.proxyCount)
            world = emptied_world(env)
        return Start(
            seed=seed,
            options=options,
            parts=state_of_parts(parts_of_env(env), self._constant | left_out),
            world=None if world is None else free_nodes(world, self._n_fixtures),
            generators=global_generator_states(),
        )

    def _prepare_world(self, start: Start) -> None:
        # Before attributes are put back, which tell what is in it
        if start.world is not None and emptied_world(self.unwrapped) is None:
            raise ValueError(f"{type(self.unwrapped).__name__} has no Box2D world, as the saved one had")

    def _set_world(self, start: Start) -> None:
        if start.world is not None:
            set_free_nodes(emptied_world(self.unwrapped), start.world)

    def _replay(self, start: Start, state: dict[str, Any]) -> None:
        """Play the episode, comparing each step, and take over its record."""
        set_global_generator_states(start.generators)
        saved, draws = state["outputs"], state["draws"]
        actions, outputs = RecordedActions(), RecordedOutputs()
        outputs.append(self.env.reset(seed=start.seed, options=copy.deepcopy(start.options))[0])
        self._check(outputs, saved)
        draws_before = {index: list(notes) for index, notes in itertools.groupby(draws, key=lambda note: note[0])}
        for index, action in enumerate(actions_in(state["actions"])):
            for _, name, generator in draws_before.get(index, ()):
                set_generator(self.env, name, generator)
            actions.append(action)
            outputs.append(*self.env.step(action)[:4])
            self._check(outputs, saved)
        self._start, self._actions, self._outputs, self.has_begun = start, actions, outputs, True
        self._draws.set_notes(draws)

    def _check(self, outputs: RecordedOutputs, saved: dict[str, Any]) -> None:
        difference = outputs.difference(saved)
        if difference is None:
            return
        step = len(outputs) - 1
        place = f"at step {step} of {len(saved['ends']) - 1}" if step else "at the reset"
        raise ReplayError(
            f"the episode of {type(self.unwrapped).__name__} was replayed, and {place} {difference}. Its outcome "
            "depends on more than its attributes before the episode, its random generators and the actions"
        )


def recorder_in(layers: Iterable[gym.Env[Any, Any]]) -> EpisodeRecorder | None:
    """Return the recorder among some layers.

    :param layers: an environment and its wrappers
    :return: None if there is none
    """
    return next((layer for layer in layers if isinstance(layer, EpisodeRecorder)), None)


def chain_of(env: gym.Env[Any, Any]) -> Iterator[gym.Env[Any, Any]]:
    """Yield an environment's wrappers and itself, from the outside in.

    :param env: the outermost wrapper
    """
    yield env
    while isinstance(env, gym.Wrapper):
        env = env.env
        yield env


def saved_name(name: str) -> str:
    """Return the name under which a wrapper is saved.

    A process that imports rl_zoo3 has a subclass in place of Gymnasium's TimeLimit. The two have one state, so that a
    run of the RL Zoo can be resumed without it.

    :param name: the name of the wrapper's class
    """
    return "TimeLimit" if name == "PatchedTimeLimit" else name


def has_unsaved_attributes(env: gym.Env[Any, Any], constant: Iterable[str]) -> bool:
    """Whether an environment has attributes that cannot be saved, and can be played again.

    :param env: the environment, without wrappers
    :param constant: as of :class:`EpisodeRecorder`
    """
    return not saves_itself(env) and bool(EpisodeRecorder(env, constant, is_lenient=True).unsaved_attributes())


def put_recorder(outermost: gym.Env[Any, Any], constant: Iterable[str], is_lenient: bool) -> bool:
    """Put a recorder around the environment inside all wrappers, unless it has one or saves itself.

    :param outermost: the outermost wrapper
    :param constant: as of :class:`EpisodeRecorder`
    :param is_lenient: the same
    :return: whether there is a new recorder
    """
    *_, wrapper, env = chain_of(outermost)
    if isinstance(wrapper, EpisodeRecorder) or saves_itself(env):
        return False
    assert isinstance(wrapper, gym.Wrapper)
    wrapper.env = EpisodeRecorder(env, constant, is_lenient)
    return True


def drop_recorder(outermost: gym.Env[Any, Any]) -> None:
    """Take the recorder away, if there is one.

    :param outermost: the outermost wrapper
    """
    for layer in chain_of(outermost):
        if isinstance(layer, gym.Wrapper) and isinstance(layer.env, EpisodeRecorder):
            layer.env = layer.env.env


def is_new(state: Any) -> bool:  # noqa: ANN401  # of any environment
    """Whether an environment was saved before its first reset, so that there is nothing to put back.

    :param state: what ``get_resume_state`` has returned
    """
    return isinstance(state, dict) and state.get("is_new") is True


def n_replayed_steps(state: Any) -> int:  # noqa: ANN401  # of any environment
    """Return how many steps it takes to put back the state of an environment.

    :param state: what ``get_resume_state`` of a ResumableEnv, or of any other environment, has returned
    """
    layers = state.get("layers", ()) if isinstance(state, dict) else ()
    episodes = [saved for name, saved in layers if name == EpisodeRecorder.__name__]
    return sum(len(episode["outputs"]["ends"]) for episode in episodes)
