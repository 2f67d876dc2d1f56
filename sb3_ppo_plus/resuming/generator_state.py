"""States of random-number generators: the global ones of a process, and those of objects and spaces."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch as th
from gymnasium import spaces

State = dict[str, Any]

BIT_GENERATORS = {
    cls.__name__: cls
    for cls in (
        np.random.MT19937,
        np.random.PCG64,
        np.random.PCG64DXSM,
        np.random.Philox,
        np.random.SFC64,
    )
}
Generator = np.random.Generator | np.random.RandomState | random.Random


def global_generator_states() -> State:
    """States of the global generators of Python, NumPy and PyTorch, those of CUDA included where it is in use."""
    states = {
        "python": _python_state(random.getstate()),
        "numpy": np.random.get_state(legacy=False),
        "torch": th.get_rng_state(),
    }
    if th.cuda.is_available() and th.cuda.is_initialized():  # type: ignore[no-untyped-call]  # torch leaves it untyped
        states["cuda"] = th.cuda.get_rng_state_all()
    return states


def set_global_generator_states(states: State) -> None:
    """Put the generators back; those of CUDA only as far as there are as many devices."""
    random.setstate(_python_tuple(states["python"]))
    np.random.set_state(states["numpy"])
    th.set_rng_state(states["torch"])
    for device, state in enumerate(states.get("cuda", [])):
        if th.cuda.is_available() and device < th.cuda.device_count():
            th.cuda.set_rng_state(state, device)


def generator_state(generator: Generator) -> State:
    """State of a NumPy ``Generator`` or ``RandomState``, or of a ``random.Random``."""
    if isinstance(generator, random.Random):
        return {"random": _python_state(generator.getstate())}
    if isinstance(generator, np.random.RandomState):
        return {"random_state": generator.get_state(legacy=False)}
    return {"generator": generator.bit_generator.state}


def restored_generator(existing: object, state: State) -> Generator:
    """Give ``existing`` the state, or make another generator where its kind is not the one that was saved.

    :param existing: any object
    :param state: what :func:`generator_state` has returned
    :return: ``existing``, since other objects may share it, or the new generator
    :raises ValueError: for a kind of generator that NumPy does not have
    """
    if "random" in state:
        python_generator = existing if isinstance(existing, random.Random) else random.Random()
        python_generator.setstate(_python_tuple(state["random"]))
        return python_generator
    kind = state["random_state" if "random_state" in state else "generator"]["bit_generator"]
    if kind not in BIT_GENERATORS:
        raise ValueError(f"the state of a random generator has bit_generator={kind!r}; allowed: {list(BIT_GENERATORS)}")
    if "random_state" in state:
        random_state = existing if isinstance(existing, np.random.RandomState) else np.random.RandomState()
        random_state.set_state(state["random_state"])
        return random_state
    is_same_kind = isinstance(existing, np.random.Generator) and type(existing.bit_generator).__name__ == kind
    generator = existing if is_same_kind else np.random.Generator(BIT_GENERATORS[kind]())
    assert isinstance(generator, np.random.Generator)
    generator.bit_generator.state = state["generator"]
    return generator


def _python_state(state: tuple[Any, ...]) -> tuple[Any, ...]:
    version, internal, gauss_next = state
    # An array: 625 numbers in JSON take their time
    return version, np.array(internal), gauss_next


def _python_tuple(state: tuple[Any, ...]) -> tuple[Any, ...]:
    version, internal, gauss_next = state
    return version, tuple(internal.tolist()), gauss_next


def space_generator_states(space: spaces.Space[Any]) -> list[State | None]:
    """States of the generators of a space and of the spaces inside it; None for one that was never used."""
    return [None if part._np_random is None else generator_state(part._np_random) for part in _spaces_inside(space)]


def set_space_generator_states(space: spaces.Space[Any], states: list[State | None]) -> None:
    """Put back what :func:`space_generator_states` has returned.

    :raises ValueError: for a space with another number of spaces inside it
    """
    parts = list(_spaces_inside(space))
    if len(parts) != len(states):
        raise ValueError(f"{space} has {len(parts)} random generators, the saved state is of {len(states)}")
    for part, state in zip(parts, states, strict=True):
        part._np_random = None if state is None else restored_generator(part._np_random, state)  # type: ignore[assignment]  # a Generator's state


def _spaces_inside(space: spaces.Space[Any]) -> Iterator[spaces.Space[Any]]:
    yield space
    inner = getattr(space, "spaces", ())
    names = ("feature_space", "node_space", "edge_space", "stack_feature_space")
    parts = [*(inner.values() if isinstance(inner, dict) else inner), *(getattr(space, name, None) for name in names)]
    for part in parts:
        if isinstance(part, spaces.Space):
            yield from _spaces_inside(part)
