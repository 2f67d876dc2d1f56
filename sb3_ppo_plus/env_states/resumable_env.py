"""A Gymnasium wrapper that saves and restores the state of an environment and of every wrapper around it."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterable, Iterator
from typing import Any, Literal

import gymnasium as gym
from gymnasium.envs.registration import EnvSpec

from sb3_ppo_plus.env_states.episode_recorder import (
    NEW,
    EpisodeRecorder,
    chain_of,
    drop_recorder,
    has_unsaved_attributes,
    is_new,
    put_recorder,
    recorder_in,
    saved_name,
)
from sb3_ppo_plus.env_states.generator_state import global_generator_states, set_global_generator_states
from sb3_ppo_plus.env_states.object_attributes import saves_itself
from sb3_ppo_plus.env_states.object_graph import is_leaf
from sb3_ppo_plus.env_states.object_graph_reader import GraphReader
from sb3_ppo_plus.env_states.object_state import (
    delete_later_attributes,
    delete_later_data_of_classes,
    names_of_attributes,
    names_of_class_attributes,
    object_states,
    set_object_states,
)
from sb3_ppo_plus.env_states.parts_of_env import too_large
from sb3_ppo_plus.env_states.proof import Finding, find_flaw, find_flaw_before_reset
from sb3_ppo_plus.env_states.untrusted_state import set_state_without_trust
from sb3_ppo_plus.errors import PlainStateError, ReplayError
from sb3_ppo_plus.untrusted.strict_json import short

WAYS = ("state", "replay", "auto")


# What gym.Wrapper may set on itself later
INHERITED = ("env", "_action_space", "_observation_space", "_metadata", "_cached_spec", "_np_random")


class SetFromOutside:
    """Holds the attributes that others have set on a ResumableEnv.

    :param attributes: the attributes by name
    """

    def __init__(self, attributes: dict[str, Any]) -> None:
        vars(self).update(attributes)


class ResumableEnv(gym.Wrapper[Any, Any, Any, Any], gym.utils.RecordConstructorArgs):
    """Gives an environment ``get_resume_state`` and ``set_resume_state``, which :class:`TrainingCheckpoint` calls.

    It saves the simulators of MuJoCo and Atari, and attributes: plain values, random generators, what functions, their
    closures and other callables hold, what the environment's classes hold (also in methods and in classes that serve as
    namespaces), and the numbers of an ``MjModel``. Lists and arrays that several attributes or wrappers share stay
    shared, and views stay views. An attribute that it cannot save is an error.

    By replay, the environment inside all wrappers is not saved. Its episode is: the random generators and attributes
    before the reset that began it, and the actions since. They are done again when the state is put back, and each
    observation, reward and end is compared: see :class:`EpisodeRecorder`. The wrappers are saved as above.

    It compares functions and classes themselves when the state is put back: another class or builtin function is an
    error, another Python function is one of :meth:`resume_differences`.

    It does not save state in modules, in ``os.environ``, in classes of libraries, in ``functools.lru_cache`` or in
    descriptors: :meth:`prove_resumable` finds it where some steps and a reset show it. Of methods and nested classes it
    leaves out parts that cannot be saved. It does not save integers and meshes of an ``MjModel``, bounds of spaces that
    are changed, in which order Python visits a set, nor what two environments share.

    Put it outermost, as ``make_vec_env(env_id, wrapper_class=ResumableEnv)`` does: then it also saves the wrappers
    inside it, such as TimeLimit and Monitor. If an environment or a wrapper inside it has both methods itself, they are
    called instead.

    :param env: the environment
    :param constant: names of attributes that cannot be saved, and need not be, since they never change
    :param prove: whether training with a :class:`TrainingCheckpoint` begins with a proof, see :meth:`prove_resumable`.
        It takes up to 60 steps with random actions and two resets, and up to 4 seconds, or 10 seconds for all
        environments of a DummyVecEnv together, unless two steps and a reset of each, done twice, take longer. Give
        False where these move real hardware
    :param by: "state": all attributes are saved. "replay": for environments with attributes that cannot be, such as
        Box2D and minigrid. "auto": by state if all attributes of the environment can be saved after its first reset and
        the proof holds, else by replay; if neither can be or holds, a replay would have to look at a global random
        generator before each step, or attributes hold more than 32 MB, a warning, and episodes begin anew at a resume
    :raises ValueError: for another ``by``
    """

    def __init__(
        self,
        env: gym.Env[Any, Any],
        constant: Iterable[str] = (),
        prove: bool = True,
        by: Literal["state", "replay", "auto"] = "state",
    ) -> None:
        constant = tuple(constant)
        if by not in WAYS:
            raise ValueError(f"by must be one of {', '.join(map(repr, WAYS))}, got {by!r}")
        gym.utils.RecordConstructorArgs.__init__(self, constant=constant, prove=prove, by=by)
        super().__init__(env)
        self.constant = constant
        self.prove = prove
        self.by: str = by
        self._differences: list[str] = []
        self._given_up = ""
        self._is_proving = False
        self._needs_recorder = by != "state"
        self._is_chosen = False
        self._was_reset = False
        self._own_names: frozenset[str] = frozenset((*vars(self), "_own_names", *INHERITED))
        self._put_recorder()

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """Begin an episode.

        :param seed: as of the environment
        :param options: as of the environment
        """
        self._was_reset = True
        self._put_recorder()
        outcome = self.env.reset(seed=seed, options=options)
        # RestartingEnv may have built another environment, whose episode has to begin with a recorder
        while self._put_recorder():
            outcome = self.env.reset(options=options)
        if self.by == "auto":
            self._choose()
        return outcome

    def get_resume_state(self) -> dict[str, Any] | None:
        """Copy the state of every layer, from the outside in, and of this process's global random generators.

        :return: plain values; None: with ``by="auto"``, something cannot be saved, see :meth:`why_not_resumable`, or
            not before the next episode. A warning comes the first time
        :raises PlainStateError: a TypeError, if an attribute cannot be saved; the message names it
        """
        if self._given_up or self._waits_for_reset():
            return None
        recorder = recorder_in(chain_of(self.env))
        if recorder is not None and not recorder.has_begun:
            return dict(NEW)
        reason = ""
        try:
            if self.by == "auto":
                reason = self._too_slow() or too_large(chain_of(self.env), self.constant)
            if reason:
                raise PlainStateError(reason)
            return self._state()
        except Exception as error:
            if self.by != "auto" or self._is_proving:
                raise
            if not (reason or self._needs_recorder) and has_unsaved_attributes(self.unwrapped, self.constant):
                self._needs_recorder = True
                warnings.warn(f"an environment is saved from its next episode on only: {error}", stacklevel=2)
                return None
            self._give_up(_text_of(error))
            warnings.warn(f"an environment is not saved, and begins anew at a resume: {self._given_up}", stacklevel=2)
            return None

    def get_resume_state_or_tell(self) -> tuple[dict[str, Any] | None, str]:
        """Copy the state as :meth:`get_resume_state` does; return an error in place of raising it.

        It is returned since an exception would end a worker process.

        :return: the state, and ""; or None, and the error
        """
        try:
            return self.get_resume_state(), ""
        except PlainStateError as error:
            return None, str(error)
        except Exception as error:
            return None, f"{type(error).__name__}: {error}"

    def why_not_resumable(self) -> str:
        """Say why :meth:`get_resume_state` returns None.

        :return: a text; empty if it does not
        """
        return self._given_up

    def _state(self) -> dict[str, Any]:
        layers = self.resumable_layers()
        try:
            outside = self._set_from_outside()
            owners = [*_without_own_methods(layers), *([SetFromOutside(outside)] if outside else [])]
            states, table = object_states(owners, self._all_of(layers), self.constant)
        except PlainStateError as error:
            # By replay, only wrappers are saved by their attributes
            by_replay = "" if recorder_in(layers) else ', or play its episode again: ResumableEnv(env, by="replay")'
            raise PlainStateError(
                f"{error}. Give the class of the environment or wrapper get_resume_state() and set_resume_state(state)"
                f", or, if the attribute never changes, name it in ResumableEnv(env, constant=[...]){by_replay}"
            ) from error
        of_outside = states.pop() if outside else {}
        remaining = iter(states)
        saved = [(_name(layer), _own_state(layer) if saves_itself(layer) else next(remaining)) for layer in layers]
        own = _without_own_methods(layers)
        return {
            "layers": saved,
            "table": table,
            "names": [names_of_attributes(layer) for layer in own],
            "class_names": [names_of_class_attributes(layer) for layer in own],
            "generators": global_generator_states(),
            "outside": of_outside,
            "was_reset": self._was_reset,
            "kwargs": self._kwargs(),
        }

    def _set_from_outside(self) -> dict[str, Any]:
        """Return the attributes that others have set on this wrapper, as ``VecEnv.set_attr`` does."""
        return {name: value for name, value in vars(self).items() if name not in self._own_names}

    def _kwargs(self) -> dict[str, Any]:
        """Return the plain arguments that the environment was made with by ``gymnasium.make``."""
        spec = self.unwrapped.spec
        if not isinstance(spec, EnvSpec):
            return {}
        return {name: value for name, value in spec.kwargs.items() if is_leaf(value)}

    def set_resume_state(self, state: dict[str, Any]) -> None:
        """Put back what :meth:`get_resume_state` has returned.

        Attributes that the environment did not have when it was saved are deleted, and data of its classes is set
        back, even where it is the code that was edited since: :meth:`resume_differences` names what was.

        :param state: the state, which may be put back several times
        :raises ValueError: for the state of other wrappers or of another environment; the message names both. Also
            where a class or a callable that holds nothing was another one
        """
        if is_new(state):
            return
        layers = self._layers_of(state)
        states = []
        for layer, (_, layer_state) in zip(layers, state["layers"], strict=True):
            if saves_itself(layer):
                layer.set_resume_state(layer_state)  # type: ignore[attr-defined]  # it has the method
            else:
                states.append(layer_state)
        # States of earlier versions have no table, and do not tell which attributes share a generator
        reader = GraphReader(state.get("table", []), self._all_of(layers), splits_generators="table" in state)
        own = _without_own_methods(layers)
        # States of earlier versions do not have it
        outside = SetFromOutside(self._set_from_outside())
        set_object_states([*own, outside], [*states, state.get("outside", {})], reader)
        vars(self).update(vars(outside))
        self._was_reset = bool(state.get("was_reset", True))
        deleted: list[str] = []
        for layer, attributes in zip(own, state.get("names", ()), strict=False):
            if attributes is not None:
                deleted += delete_later_attributes(layer, (*attributes, *self.constant))
        for layer, attributes in zip(own, state.get("class_names", ()), strict=False):
            deleted += delete_later_data_of_classes(layer, attributes, self.constant)
        self._differences = list(reader.differences)
        if self._was_reset:
            self._differences += [f"{name} was deleted, which was not saved" for name in deleted]
        self._differences += self._other_kwargs(state.get("kwargs", {}))
        set_global_generator_states(state["generators"])

    def _other_kwargs(self, saved: dict[str, Any]) -> Iterator[str]:
        """Name the arguments of the environment that are other ones than those of the saved environment."""
        given = self._kwargs()
        for name in saved.keys() & given.keys():
            if saved[name] != given[name]:
                was, now = short(saved[name]), short(given[name])
                yield f"the environment was made with {name}={now}, the saved one with {name}={was}"

    def set_resume_state_or_tell(self, state: dict[str, Any]) -> str:
        """Put back a state, and return the error if the replay of an episode had another outcome; else "".

        It is returned since an exception would end a worker process. With ``by="auto"``, so is any other error.

        :param state: what :meth:`get_resume_state` has returned
        """
        try:
            self.set_resume_state(state)
        except Exception as error:
            if self.by == "auto" or isinstance(error, ReplayError):
                return _text_of(error)
            raise
        return ""

    def resume_differences(self) -> list[str]:
        """Say what the last :meth:`set_resume_state` has deleted or set back, and which functions are other ones.

        :return: a text for each, for ``PPOPlus.resume`` to warn of. It is returned since nobody sees a worker's
            warnings
        """
        return self._differences

    def set_resume_state_without_trust(self, state: dict[str, Any]) -> tuple[list[str], str]:
        """Put back what may come from anybody, see :func:`set_state_without_trust`.

        Environments and wrappers with methods of their own get what :meth:`set_resume_state` would give them.

        :param state: the state, from a file that is not trusted
        :return: names of what was left out; and an error, or "". It is returned since an exception would end a worker
            process
        """
        left_out: list[str] = []
        if is_new(state):
            return left_out, ""
        try:
            layers = self._layers_of(state)
            for layer, (_, layer_state) in zip(layers, state["layers"], strict=True):
                if isinstance(layer, EpisodeRecorder):
                    left_out += layer.set_resume_state_without_trust(layer_state)
                elif saves_itself(layer):
                    layer.set_resume_state(layer_state)  # type: ignore[attr-defined]  # it has the method
                else:
                    left_out += set_state_without_trust(layer, layer_state)
            outside = SetFromOutside(self._set_from_outside())
            left_out += set_state_without_trust(outside, state.get("outside", {}))
            vars(self).update(vars(outside))
            set_global_generator_states(state["generators"])
        except Exception as error:
            return left_out, f"{type(error).__name__}: {error}"
        return left_out, ""

    def prove_resumable(self, shared: Collection[int] = (), max_seconds: float | None = None) -> Finding | None:
        """Find out, on the environment itself, whether it goes on in the same way after its state was put back.

        Some steps with random actions, and a reset, are done twice from the same state: observations, rewards, ends of
        episodes and action masks must be the same. This shows what no look at attributes shows, such as state in
        modules. It shows nothing that happens later in an episode. Afterwards everything is as it was: generators,
        statistics, counters. Monitor and RecordVideo write nothing meanwhile; other wrappers may.

        :param shared: ids of lists, dicts, sets and arrays that another environment of this process holds too
        :param max_seconds: time for the first of the two times, after which at least two steps and a reset are done;
            None: 2 seconds
        :return: what is wrong, for :class:`TrainingCheckpoint` to raise or to warn of; None: nothing, or ``prove`` is
            False. It is returned since an exception would end a worker process
        """
        if not self.prove or self._given_up:
            return None
        if not self._was_reset:
            return self._prove_before_reset(max_seconds)
        if self._waits_for_reset():
            return Finding(False, "", True)
        self._is_proving = True
        try:
            finding = find_flaw(self, self.resumable_layers(), shared, max_seconds)
        finally:
            self._is_proving = False
        reason = self._too_slow() if finding is None else ""
        if reason:
            self._give_up(reason)
            return Finding(False, f"{self._given_up}. At a resume its episodes begin anew")
        if finding is None or not finding.is_error or self.by != "auto":
            return finding
        if not self._needs_recorder and not saves_itself(self.unwrapped):
            # What no attribute shows may still follow from the actions
            self._needs_recorder = True
            return Finding(False, "", True)
        self._give_up(finding.text)
        text = (
            f"{finding.text}. At a resume its episodes begin anew; and this training may differ from one without "
            "checkpoints, since the steps of the proof have moved what is not saved"
        )
        return Finding(False, text, True)

    def _prove_before_reset(self, max_seconds: float | None) -> Finding | None:
        if self._needs_recorder:
            # A replay begins with a reset
            return None
        try:
            return find_flaw_before_reset(self, self.resumable_layers(), max_seconds)
        finally:
            self._was_reset = False

    def resumable_layers(self) -> list[gym.Env[Any, Any]]:
        """Return the wrappers inside this one and the environment, from the outside in; none if it is not saved."""
        return [] if self._given_up else list(self._layers())

    def _layers_of(self, state: dict[str, Any]) -> list[gym.Env[Any, Any]]:
        """Return all layers, whose names must be those of a state."""
        if self.by == "auto":
            self._is_chosen = True
            self._needs_recorder = any(name == EpisodeRecorder.__name__ for name, _ in state["layers"])
            if not self._put_recorder() and not self._needs_recorder:
                drop_recorder(self)
        layers = list(self._layers())
        names, saved_names = [_name(layer) for layer in layers], [saved_name(name) for name, _ in state["layers"]]
        if names != saved_names:
            saved_stack, stack = " of ".join(saved_names), " of ".join(names)
            raise ValueError(f"the saved state is of {saved_stack}, the environment is {stack}")
        return layers

    def _layers(self) -> Iterator[gym.Env[Any, Any]]:
        for layer in chain_of(self.env):
            yield layer
            if isinstance(layer, EpisodeRecorder):
                # It saves what is inside it
                return

    def _all_of(self, layers: list[gym.Env[Any, Any]]) -> list[gym.Env[Any, Any]]:
        """Return all that attributes of the layers may refer to."""
        recorder = recorder_in(layers)
        return [*layers, self] if recorder is None else [*layers, self, recorder.env]

    def _put_recorder(self) -> bool:
        """Put a recorder around the environment inside all wrappers, if it needs one; return whether it did."""
        return self._needs_recorder and put_recorder(self, self.constant, self.by == "auto")

    def _give_up(self, reason: str) -> None:
        """Save the environment no more: its episodes begin anew at a resume."""
        self._given_up = reason
        self._needs_recorder = False
        drop_recorder(self)

    def _choose(self) -> None:
        """Choose the way, after the first reset."""
        recorder = recorder_in(chain_of(self.env))
        if recorder is not None and not self._is_chosen:
            self._is_chosen = True
            self._needs_recorder = bool(recorder.unsaved_attributes())
            if not self._needs_recorder:
                drop_recorder(self)
        elif self._too_slow():
            # Gives up
            self.get_resume_state()

    def _waits_for_reset(self) -> bool:
        """Whether it cannot be saved until the next episode is recorded."""
        is_replayed = self.by == "auto" and self._needs_recorder and not saves_itself(self.unwrapped)
        return is_replayed and recorder_in(chain_of(self.env)) is None

    def _too_slow(self) -> str:
        recorder = None if self._is_proving else recorder_in(chain_of(self.env))
        return "" if recorder is None else recorder.why_too_slow()


def _text_of(error: Exception) -> str:
    return str(error) if isinstance(error, PlainStateError | ReplayError) else f"{type(error).__name__}: {error}"


def _name(layer: gym.Env[Any, Any]) -> str:
    return saved_name(type(layer).__name__)


def _own_state(layer: Any) -> Any:  # noqa: ANN401  # a layer with methods, and plain values
    return layer.get_resume_state()


def _without_own_methods(layers: list[gym.Env[Any, Any]]) -> list[gym.Env[Any, Any]]:
    return [layer for layer in layers if not saves_itself(layer)]
