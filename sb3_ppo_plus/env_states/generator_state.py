"""States of random-number generators: the global ones of a process, and those in objects and spaces."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch as th
from gymnasium import spaces

GeneratorState = dict[str, Any]

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
SEEDS = ("entropy", "spawn_key", "pool_size", "n_children_spawned")
"""Arguments and attributes of NumPy's SeedSequence."""
# Of a SeedSequence, whose time and memory grow with it; NumPy's default is 4
MAX_POOL_SIZE = 64
# Bytes of PyTorch's state before its 624 numbers
N_TORCH_BYTES = 24
# Seed and offset
N_CUDA_BYTES = 16
Generator = np.random.Generator | np.random.RandomState | random.Random


def global_generator_states() -> dict[str, Any]:
    """Copy the states of the global generators of Python, NumPy and PyTorch, and of CUDA if it is in use.

    :return: states under "python", "numpy", "torch" and "cuda"
    """
    states = {name: get() for name, get in GLOBAL_GENERATORS.items()}
    if th.cuda.is_available() and th.cuda.is_initialized():  # type: ignore[no-untyped-call]  # torch gives it no types
        states["cuda"] = th.cuda.get_rng_state_all()
    return states


def set_global_generator_states(states: dict[str, Any]) -> None:
    """Put back the states of the global generators. States of CUDA devices that are missing here are left out.

    :param states: what :func:`global_generator_states` has returned
    """
    random.setstate(_python_tuple(states["python"]))
    np.random.set_state(_checked(states["numpy"]))
    th.set_rng_state(_checked_torch(states["torch"]))
    for device, state in enumerate(states.get("cuda", [])):
        if th.cuda.is_available() and device < th.cuda.device_count():
            th.cuda.set_rng_state(state, device)


def generator_state(generator: Generator) -> GeneratorState:
    """Copy the state of a generator.

    :param generator: a NumPy ``Generator`` or ``RandomState``, or a ``random.Random``
    """
    if isinstance(generator, random.Random):
        return {"random": _python_state(generator.getstate())}
    if isinstance(generator, np.random.RandomState):
        return {"random_state": generator.get_state(legacy=False)}
    state: GeneratorState = {"generator": generator.bit_generator.state}
    seeds = generator.bit_generator.seed_seq
    if type(seeds) is np.random.SeedSequence:
        # What spawn() uses, and no draw
        state["seeds"] = {name: getattr(seeds, name) for name in SEEDS}
    return state


def restored_generator(existing: object, state: GeneratorState) -> Generator:
    """Put a saved state into a generator, or into a new one if the generator is of another kind.

    :param existing: the generator, or any other object in its place
    :param state: what :func:`generator_state` has returned
    :return: ``existing`` if it is of the saved kind, since other objects may share it; otherwise the new generator
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
        random_state.set_state(_checked(state["random_state"]))
        return random_state
    is_same_kind = isinstance(existing, np.random.Generator) and type(existing.bit_generator).__name__ == kind
    generator = existing if is_same_kind else np.random.Generator(BIT_GENERATORS[kind]())
    assert isinstance(generator, np.random.Generator)
    seeds, there = state.get("seeds"), generator.bit_generator.seed_seq
    if seeds is not None and not 4 <= seeds["pool_size"] <= MAX_POOL_SIZE:
        raise ValueError(f"seeds have pool_size={seeds['pool_size']!r}; allowed: 4 to {MAX_POOL_SIZE}")
    if seeds is not None and any(getattr(there, name, None) != seeds[name] for name in SEEDS):
        # Called again, it gives the same generator other bits, which can spawn as the saved ones could
        generator.__init__(BIT_GENERATORS[kind](np.random.SeedSequence(**seeds)))  # type: ignore[misc]  # see above
    generator.bit_generator.state = _checked(state["generator"])
    return generator


def _checked(state: GeneratorState) -> GeneratorState:
    """Refuse positions outside a generator's memory: NumPy would read there."""
    inner = state["state"]
    found = [("pos", inner.get("pos", 0) if isinstance(inner, dict) else 0, 624)]
    found.append(("buffer_pos", state.get("buffer_pos", 0), 4))
    for name, position, largest in found:
        if isinstance(position, bool) or not isinstance(position, int | np.integer) or not 0 <= position <= largest:
            raise ValueError(f"the state of a random generator has {name}={position!r}; allowed: 0 to {largest}")
    return state


def check_torch_states(states: list[th.Tensor]) -> None:
    """Check states of PyTorch's default generators, which PyTorch does not check itself.

    :param states: of the CPU's generator, and perhaps of a CUDA device's
    :raises ValueError: for states that no generator can have
    :raises TypeError: for what is no tensor
    """
    if not 1 <= len(states) <= 2:
        raise ValueError(f"a random stream has one or two states, got {len(states)}")
    _checked_torch(states[0])
    for state in states[1:]:
        if not isinstance(state, th.Tensor) or state.dtype is not th.uint8 or state.numel() != N_CUDA_BYTES:
            raise ValueError(f"a state of a CUDA generator has {N_CUDA_BYTES} bytes")


def set_torch_generator(generator: th.Generator, state: Any) -> None:  # noqa: ANN401  # may be hostile
    """Put back the state of a generator of PyTorch.

    :param generator: the generator
    :param state: what its ``get_state`` has returned
    :raises ValueError: for anything else
    """
    if generator.device.type == "cpu":
        generator.set_state(_checked_torch(state))
    elif isinstance(state, th.Tensor) and state.dtype is th.uint8 and state.shape == generator.get_state().shape:
        generator.set_state(state.cpu())
    else:
        raise ValueError(f"the state of a generator on {generator.device} must be bytes of its size, got {state!r:.80}")


def _checked_torch(state: th.Tensor) -> th.Tensor:
    """Refuse a position and a number of draws left that together lead out of PyTorch's memory, which it reads then."""
    if not isinstance(state, th.Tensor):
        raise TypeError(f"a state of PyTorch's random generator is a tensor, got {type(state).__name__}")
    if state.dtype is not th.uint8 or state.device.type != "cpu" or state.numel() < N_TORCH_BYTES:
        raise ValueError(f"a state of PyTorch's random generator has bytes, got {state.numel()} of {state.dtype}")
    # After a seed: the int ``left``, another int, and the position ``next``
    content = state.contiguous().numpy().tobytes()
    (left,), (position,) = np.frombuffer(content, np.int32, 1, 8), np.frombuffer(content, np.uint64, 1, 16)
    if not (1 <= left <= 624 and int(position) + int(left) <= 625):
        raise ValueError(
            f"the state of PyTorch's random generator has left={left}, next={position}; allowed: together up to 625"
        )
    return state


def _python_state(state: tuple[Any, ...]) -> tuple[Any, ...]:
    version, internal, gauss_next = state
    # As an array: 625 numbers are slow to write as JSON
    return version, np.array(internal), gauss_next


def _python_tuple(state: tuple[Any, ...]) -> tuple[Any, ...]:
    version, internal, gauss_next = state
    return version, tuple(internal.tolist()), gauss_next


GLOBAL_GENERATORS: dict[str, Callable[[], Any]] = {
    "python": lambda: _python_state(random.getstate()),
    "numpy": lambda: np.random.get_state(legacy=False),
    "torch": th.get_rng_state,
}
"""Copies the state of each global generator of a process."""


def space_generator_states(space: spaces.Space[Any]) -> list[GeneratorState | None]:
    """Copy the states of the generators of a space and of the spaces inside it.

    :param space: the space
    :return: a state for each generator; None for a generator that was never used
    """
    return [None if part._np_random is None else generator_state(part._np_random) for part in spaces_inside(space)]


def set_space_generator_states(space: spaces.Space[Any], states: list[GeneratorState | None]) -> None:
    """Put back the states of the generators of a space and of the spaces inside it.

    :param space: the space
    :param states: what :func:`space_generator_states` has returned
    :raises ValueError: if the number of spaces inside it is not the saved one
    """
    parts = list(spaces_inside(space))
    if len(parts) != len(states):
        raise ValueError(f"{space} has {len(parts)} random generators, the saved state is of {len(states)}")
    for part, state in zip(parts, states, strict=True):
        part._np_random = None if state is None else restored_generator(part._np_random, state)  # type: ignore[assignment]  # a Generator


def spaces_inside(space: spaces.Space[Any]) -> Iterator[spaces.Space[Any]]:
    """Yield a space and the spaces inside it.

    :param space: the space
    """
    yield space
    inner = getattr(space, "spaces", ())
    # Attributes of Sequence and Graph
    names = ("feature_space", "node_space", "edge_space", "stack_feature_space")
    parts = [*(inner.values() if isinstance(inner, dict) else inner), *(getattr(space, name, None) for name in names)]
    for part in parts:
        if isinstance(part, spaces.Space):
            yield from spaces_inside(part)
