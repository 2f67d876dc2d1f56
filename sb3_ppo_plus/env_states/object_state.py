"""The state of environments and wrappers as plain values: attributes, generators, spaces, simulators."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from typing import Any, NamedTuple

import numpy as np
from gymnasium import spaces

from sb3_ppo_plus.env_states.callable_parts import reference_to
from sb3_ppo_plus.env_states.class_members import member_of, members_of
from sb3_ppo_plus.env_states.generator_state import generator_state, set_space_generator_states, space_generator_states
from sb3_ppo_plus.env_states.mujoco_state import mujoco_state, set_mujoco_state
from sb3_ppo_plus.env_states.object_attributes import (
    OF_USERS,
    attributes_of,
    is_no_state,
    is_of_library,
    is_special,
    names_of_classes,
    own_attributes,
    saved_class_attributes_of,
)
from sb3_ppo_plus.env_states.object_graph import (
    CONSTANTS,
    TRANSPARENT,
    GraphWriter,
    is_generator,
    is_leaf,
    is_stateless,
    plain_copy,
)
from sb3_ppo_plus.env_states.object_graph_reader import (
    MISSING,
    GraphReader,
    OtherStructureError,
    check_reference,
    text_of_constant,
)
from sb3_ppo_plus.env_states.overlapping_arrays import has_foreign_owner
from sb3_ppo_plus.env_states.simulator_state import (
    atari_state,
    is_atari,
    is_mujoco_data,
    set_atari_state,
    sticky_probability,
)
from sb3_ppo_plus.errors import PlainStateError
from sb3_ppo_plus.untrusted.strict_json import short

ObjectState = dict[str, tuple[str, Any]]
"""For each attribute its kind and plain values.

The kind is a key of :data:`KINDS`, "plain", "read-only" (an array), "generator", "constant" or "reference" (only
compared), or "linked": an item of a table, see ``object_graph``. The attribute of a class is "Class.name". "member" is
an item for what else a class holds, see ``class_members``.
:data:`TABLE` is no attribute.
"""
TABLE = ":table"


class Kind(NamedTuple):
    """How one kind of attribute is saved.

    :param applies: tells whether a value is of this kind
    :param get: turns a value into plain values
    :param put: puts the saved plain values into the existing value; may return names of what was another one
    """

    applies: Callable[[Any], bool]
    get: Callable[[Any], Any]
    put: Callable[[Any, Any], list[str] | None]


def object_state(owner: object, constant: Collection[str] = (), refused: list[str] | None = None) -> ObjectState:
    """Copy what may change in an object: plain attributes, random generators (also of spaces), MuJoCo, Atari.

    Running means and stacks of observations are part of it, and what functions and other callables hold. Of classes
    and of callables that hold nothing it has the names, to be compared. Modules and rendering are no part.

    :param owner: an environment or a wrapper
    :param constant: names of further attributes to leave out
    :param refused: gets a line for each attribute that cannot be saved; None: the first of them is an error
    :raises PlainStateError: if an attribute cannot be saved; the message names it
    """
    (state,), table = object_states([owner], [owner], constant, refused)
    return {**state, TABLE: ("table", table)} if table else state


def object_states(
    owners: Sequence[object],
    layers: Sequence[object],
    constant: Collection[str] = (),
    refused: list[str] | None = None,
) -> tuple[list[ObjectState], list[list[Any]]]:
    """Copy what may change in several objects, which may share parts, see :func:`object_state`.

    :param owners: environments and wrappers
    :param layers: all environments and wrappers that the owners may refer to
    :param constant: names of attributes to leave out
    :param refused: gets a line for each attribute that cannot be saved; None: the first of them is an error
    :return: a state for each owner, and the table of what they share
    :raises PlainStateError: if an attribute cannot be saved; the message names it
    """
    graph = GraphWriter(layers)
    all_members = [members_of(owner) for owner in owners]
    uses_mujoco = any(is_mujoco_data(value) for layer in layers for value in getattr(layer, "__dict__", {}).values())
    found = [_places(owner, constant, uses_mujoco) for owner in owners]
    for index, (owner, places, members) in enumerate(zip(owners, found, all_members, strict=True)):
        of_classes = {name: member.value for name, member in members.items()}
        for name, value in (places | of_classes if members else places).items():
            if _kind_of(value) is None:
                try:
                    graph.scan(value, (index, name))
                except RecursionError as error:
                    raise _too_deep(owner, name) from error
    graph.finish_scan()
    states: list[ObjectState] = []
    for index, (owner, places) in enumerate(zip(owners, found, strict=True)):
        state: ObjectState = {}
        for name, value in places.items():
            try:
                state[name] = _saved(graph, owner, name, value, graph.is_linked((index, name)))
            except RecursionError as error:
                raise _too_deep(owner, name) from error
            except PlainStateError as error:
                if name in OF_USERS:
                    continue
                if refused is None:
                    raise
                refused.append(str(error))
        states.append(state)
    # Last: where an attribute holds the same object, all of it must be saved
    for state, members in zip(states, all_members, strict=True):
        for name, member in members.items():
            with suppress(PlainStateError, RecursionError):
                state[name] = "member", graph.member(member.value, name, member.is_replaced)
    return states, graph.entries


def names_of_class_attributes(owner: object) -> list[str]:
    """Return the names of the data of an object's classes, so that those which come later can be deleted.

    :param owner: an environment or a wrapper
    """
    return sorted(saved_class_attributes_of(owner))


def names_of_attributes(owner: object) -> list[str] | None:
    """Return the names of an object's attributes, so that those which come later can be deleted.

    :param owner: an environment or a wrapper
    :return: None for those of libraries, whose attributes other versions may add
    """
    return None if is_of_library(type(owner)) else sorted(own_attributes(owner))


def delete_later_attributes(owner: object, names: Collection[str]) -> list[str]:
    """Delete the attributes of an object that it did not have when it was saved.

    :param owner: an environment or a wrapper
    :param names: what :func:`names_of_attributes` has returned, and names of constant attributes
    :return: what was deleted, as "Class.attribute"
    """
    later = sorted(name for name in own_attributes(owner) - set(names) if not is_no_state(owner, name))
    for name in later:
        object.__delattr__(owner, name)
    return [f"{type(owner).__name__}.{name}" for name in later]


def delete_later_data_of_classes(owner: object, names: Collection[str], constant: Collection[str] = ()) -> list[str]:
    """Delete the data that the classes of an object did not have when it was saved.

    :param owner: an environment or a wrapper
    :param names: what :func:`names_of_class_attributes` has returned
    :param constant: names of attributes that stay
    :return: what was deleted, as "Class.attribute"
    """
    owner_class: Any = type(owner)
    classes = names_of_classes(owner_class)
    later = [name for name in names_of_class_attributes(owner) if name not in names]
    deleted = [name for name in later if name.rpartition(".")[2] not in constant]
    for name in deleted:
        class_name, _, attribute = name.rpartition(".")
        delattr(classes[class_name], attribute)
    return deleted


def set_object_state(owner: object, state: ObjectState, differences: list[str] | None = None) -> None:
    """Put back the state of an object.

    :param owner: an environment or a wrapper
    :param state: what :func:`object_state` has returned
    :param differences: gets a text for each function that is another one, and for data of classes that was set back
    :raises ValueError: for the name of a method or of a special attribute, which no state contains; and if ``owner``
        lacks an object that the saved one had
    """
    _, table = state.get(TABLE, ("table", []))
    reader = GraphReader(table, [owner])
    set_object_states([owner], [state], reader)
    if differences is not None:
        differences += reader.differences


def set_object_states(owners: Sequence[object], states: Sequence[ObjectState], reader: GraphReader) -> None:
    """Put back the states of several objects.

    :param owners: environments and wrappers
    :param states: what :func:`object_states` has returned
    :param reader: reads the table
    :raises ValueError: as :func:`set_object_state`
    """
    # Attributes of classes first: where they equal the saved ones they stay, and so does what refers to them
    for owner, state in zip(owners, states, strict=True):
        for name, (kind, saved) in state.items():
            if "." in name and kind != "member":
                _put_class_attribute(owner, name, kind, saved, reader)
    for owner, state in zip(owners, states, strict=True):
        for name, (kind, saved) in state.items():
            if kind == "member":
                _put_member(owner, name, saved, reader)
    for owner, state in zip(owners, states, strict=True):
        there = attributes_of(owner)
        for name, (kind, saved) in state.items():
            if "." not in name and name != TABLE:
                _put_attribute(owner, name, kind, saved, there, reader)


def _too_deep(owner: object, name: str) -> PlainStateError:
    return PlainStateError(f"{_full_name(owner, name)} is nested too deep to be saved")


def _full_name(owner: object, name: str) -> str:
    return name if "." in name else f"{type(owner).__name__}.{name}"


def _places(owner: object, constant: Collection[str], uses_mujoco: bool) -> dict[str, Any]:
    places = {}
    for name, value in attributes_of(owner).items():
        if is_no_state(owner, name) or name in constant:
            continue
        if is_stateless(value) and reference_to(value) is None:
            continue
        # Such arrays are saved with the MjData that owns their memory
        if not (uses_mujoco and isinstance(value, np.ndarray) and has_foreign_owner(value)):
            places[name] = value
    of_classes = saved_class_attributes_of(owner).items()
    places |= {
        name: value for name, value in of_classes if name.rpartition(".")[2] not in constant and not is_stateless(value)
    }
    # An attribute that is put back may come later than before
    return dict(sorted(places.items()))


def _kind_of(value: object) -> str | None:
    # Of usual types, dicts alone may be of a kind
    if is_leaf(value) or type(value) in (np.ndarray, list, tuple):
        return None
    return next((kind for kind in KINDS if KINDS[kind].applies(value)), None)


def _saved(graph: GraphWriter, owner: object, name: str, value: Any, is_linked: bool) -> tuple[str, Any]:  # noqa: ANN401  # any value
    is_of_class = "." in name
    full_name = _full_name(owner, name)
    reference = reference_to(value) if callable(value) else None
    if reference is not None:
        return "reference", reference
    kind = _kind_of(value)
    if kind == "atari" and getattr(owner, "continuous", False) and sticky_probability(value) > 0:
        raise PlainStateError(f"{full_name} may repeat the strength of a continuous action, which ALE does not tell")
    if kind is not None:
        return kind, KINDS[kind].get(value)
    # Objects of an environment may change their constants, and these could not be put back
    if isinstance(value, CONSTANTS if is_of_class else np.dtype):
        return "constant", text_of_constant(value)
    if is_generator(value) and not is_linked:
        return "generator", generator_state(value)
    # What a class and an object share must be the same object afterwards
    if is_linked or (is_of_class and not is_leaf(value)):
        return "linked", graph.item(value, full_name)
    is_read_only = type(value) is np.ndarray and not value.flags.writeable
    return "read-only" if is_read_only else "plain", plain_copy(value)


def _put_class_attribute(owner: Any, name: str, kind: str, saved: Any, reader: GraphReader) -> None:  # noqa: ANN401  # any value
    class_name, _, attribute = name.rpartition(".")
    owner_class: Any = type(owner)
    cls = names_of_classes(owner_class).get(class_name)
    existing = MISSING if cls is None else vars(cls).get(attribute, MISSING)
    if cls is None or is_special(attribute) or callable(existing) or hasattr(type(existing), "__get__"):
        raise ValueError(f"{name} is no state of {type(owner).__name__}")
    if kind in KINDS or kind == "constant":
        _put_in_place(existing, kind, saved, name, reader)
    elif not reader.adopt(saved, existing):
        value = reader.generator(saved, existing) if kind == "generator" else reader.value(saved, existing, name)
        if kind != "generator" and existing is not MISSING:
            reader.differences.append(f"{name} was {short(existing)}, and is {short(value)} again, as it was saved")
        if value is not existing:
            setattr(cls, attribute, value)


def _put_member(owner: object, name: str, saved: Any, reader: GraphReader) -> None:  # noqa: ANN401  # an item
    member = member_of(owner, name)
    if member is None:
        reader.differences.append(f"{name} is missing, which was saved")
        return
    try:
        value = reader.member(saved, member.value, name)
    except OtherStructureError as error:
        # The code of a class may have been edited
        reader.differences.append(f"{name} was not put back: {error}")
        return
    if value is member.value:
        return
    if is_special(member.name) or callable(member.value) or callable(value):
        reader.differences.append(f"{name} was not put back: it is another kind of object than the saved one")
    else:
        reader.differences.append(f"{name} was {short(member.value)}, and is {short(value)} again, as it was saved")
        setattr(member.cls, member.name, value)


def _put_attribute(
    owner: object,
    name: str,
    kind: str,
    saved: Any,  # noqa: ANN401  # any value
    there: dict[str, Any],
    reader: GraphReader,
) -> None:
    # Not getattr: SB3's wrappers answer with attributes of what they wrap
    existing = there.get(name, MISSING)
    full_name = f"{type(owner).__name__}.{name}"
    replaces_method = callable(inspect.getattr_static(type(owner), name, None))
    if kind == "reference":
        check_reference(existing, saved, full_name)
        return
    if is_special(name) or (replaces_method and (kind != "linked" or existing is MISSING)):
        raise ValueError(f"{full_name} is no state")
    if kind in KINDS or kind == "constant":
        _put_in_place(existing, kind, saved, full_name, reader)
        return
    if kind == "linked":
        value = reader.value(saved, existing, full_name)
    elif kind == "generator":
        value = reader.generator(saved, existing)
    else:
        # Copied, so that a state can be put back several times
        value = plain_copy(saved)
        if kind == "read-only":
            value.flags.writeable = False
    if replaces_method and not callable(value):
        raise ValueError(f"{full_name} is no state")
    if value is not existing:
        setattr(owner, name, value)


def _put_in_place(existing: Any, kind: str, saved: Any, name: str, reader: GraphReader) -> None:  # noqa: ANN401  # any value
    if existing is MISSING or existing is None:
        owner, _, attribute = name.rpartition(".")
        raise ValueError(f"{owner} has no {attribute}, as the saved one had: it was made in another way")
    if kind in KINDS:
        changed = KINDS[kind].put(existing, saved)
        if changed:
            reader.differences.append(f"the model of {name} had another {', '.join(changed)}")
    elif saved and text_of_constant(existing) != saved:
        raise ValueError(f"{name} is {text_of_constant(existing)}, the saved one was {saved}")


def _are_transparent(value: object) -> bool:
    return isinstance(value, dict) and len(value) > 0 and all(isinstance(part, TRANSPARENT) for part in value.values())


def _set_each(existing: dict[Any, Any], saved: dict[Any, ObjectState]) -> None:
    for key, state in saved.items():
        set_object_state(existing[key], state)


KINDS = {
    "space": Kind(lambda value: isinstance(value, spaces.Space), space_generator_states, set_space_generator_states),
    "mujoco": Kind(is_mujoco_data, mujoco_state, set_mujoco_state),
    "atari": Kind(is_atari, atari_state, set_atari_state),
    "object": Kind(lambda value: isinstance(value, TRANSPARENT), object_state, set_object_state),
    "objects": Kind(
        _are_transparent, lambda parts: {key: object_state(part) for key, part in parts.items()}, _set_each
    ),
}
"""Kinds of attributes whose objects are changed where they are. The first kind that applies to a value is its kind."""
