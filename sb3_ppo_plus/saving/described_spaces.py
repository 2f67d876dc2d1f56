"""Gymnasium's spaces as plain JSON."""

from __future__ import annotations

import math
from typing import Any, cast

import numpy as np
from gymnasium import spaces

from sb3_ppo_plus.errors import UntrustedFileError
from sb3_ppo_plus.untrusted.strict_json import DTYPES, decode_array, decode_shape, encode_array, get, short

MAX_CHOICES = 2**31
#: Numbers in all parts of a space together: a few bytes of JSON could ask for any amount of memory
MAX_ELEMENTS = 2**23
MAX_KEYS = 1000


def encode_space(space: spaces.Space[Any]) -> dict[str, Any]:
    """Turn a Box, Discrete, MultiDiscrete, MultiBinary, or a Dict or Tuple of these, into JSON, without its generator.

    :param space: the space
    :raises ValueError: for another class or a subclass, and for a Dict whose keys are not all strings
    """
    description: dict[str, Any]
    if type(space) is spaces.Box:
        bounds = {"low": _encode_bound(space.low), "high": _encode_bound(space.high)}
        description = {"space": "Box", "shape": list(space.shape), "dtype": space.dtype.name, **bounds}
    elif type(space) is spaces.Discrete:
        description = {"space": "Discrete", "n": int(space.n), "start": int(space.start), "dtype": space.dtype.name}
    elif type(space) is spaces.MultiDiscrete:
        description = {"space": "MultiDiscrete", "nvec": encode_array(space.nvec), "start": encode_array(space.start)}
        description["dtype"] = space.dtype.name
    elif type(space) is spaces.MultiBinary:
        description = {"space": "MultiBinary", "shape": list(space.shape), "is_flat": isinstance(space.n, int)}
    elif type(space) is spaces.Dict and all(isinstance(key, str) for key in space.spaces):
        members = [[key, encode_space(member)] for key, member in space.spaces.items()]
        description = {"space": "Dict", "spaces": members}
    elif type(space) is spaces.Tuple:
        description = {"space": "Tuple", "spaces": [encode_space(member) for member in space.spaces]}
    else:
        raise ValueError(f"a space of {type(space)} has no description, only Gymnasium's own basic classes have one")
    if decode_space(description, "space") != space:
        raise ValueError(f"{space} has no description that gives an equal space")
    return description


def _encode_bound(bound: np.ndarray) -> dict[str, Any]:
    # Images have thousands of equal bounds: one number stands for all
    is_uniform = bound.size > 0 and bool(np.all(bound == bound.flat[0]))
    return encode_array(bound.reshape(-1)[0] if is_uniform else bound)


def decode_space(description: object, name: str) -> spaces.Space[Any]:
    """Build a space from the JSON of :func:`encode_space`.

    :param description: the JSON object
    :param name: what to call it in messages
    :raises UntrustedFileError: for JSON of another form, and for more than 2**23 elements in all
    """
    return _decode(description, name, MAX_ELEMENTS)


def _decode(description: object, name: str, max_elements: int) -> spaces.Space[Any]:
    kind = get(description, "space", str, name)
    if kind not in _DECODERS:
        raise UntrustedFileError(f"{name}: space must be one of {', '.join(_DECODERS)}, got {short(kind)}")
    try:
        return _DECODERS[kind](cast("dict[str, Any]", description), name, max_elements)
    except UntrustedFileError:
        raise
    except Exception as error:
        # Gymnasium's constructors raise many types of errors
        raise UntrustedFileError(f"{name} is no valid {kind}: {error}") from error


def _shape(description: dict[str, Any], name: str, max_elements: int) -> tuple[int, ...]:
    shape = decode_shape(get(description, "shape", list, name), name)
    if math.prod(shape) > max_elements:
        raise UntrustedFileError(f"{name} has more than {MAX_ELEMENTS} elements in all")
    return shape


def _box(description: dict[str, Any], name: str, max_elements: int) -> spaces.Space[Any]:
    shape, dtype = _shape(description, name, max_elements), _dtype(description, name)
    bounds = []
    for which in ("low", "high"):
        bound = decode_array(get(description, which, dict, name), f"{name}: {which}")
        if bound.dtype != dtype or bound.shape not in ((), shape):
            raise UntrustedFileError(f"{name}: {which} must be {dtype} of shape () or {shape}, got {bound.shape}")
        bounds.append(np.broadcast_to(bound, shape))
    if not np.all(bounds[0] <= bounds[1]):
        raise UntrustedFileError(f"{name}: low must be at most high everywhere, and neither may be NaN")
    return spaces.Box(bounds[0], bounds[1], shape, dtype.type)


def _discrete(description: dict[str, Any], name: str, max_elements: int) -> spaces.Space[Any]:
    n, start = (get(description, key, int, name) for key in ("n", "start"))
    if not 0 < n <= MAX_CHOICES:
        raise UntrustedFileError(f"{name}: n must be in [1, 2**31], got {n}")
    return spaces.Discrete(n, start=start, dtype=_dtype(description, name).type)


def _multi_discrete(description: dict[str, Any], name: str, max_elements: int) -> spaces.Space[Any]:
    nvec = decode_array(get(description, "nvec", dict, name), f"{name}: nvec")
    start = decode_array(get(description, "start", dict, name), f"{name}: start", nvec.shape)
    dtype = _dtype(description, name)
    if nvec.dtype != dtype or start.dtype != dtype:
        raise UntrustedFileError(f"{name}: nvec and start must be {dtype}")
    if nvec.size == 0 or nvec.min() < 1 or int(nvec.sum(dtype=np.float64)) > MAX_CHOICES:
        raise UntrustedFileError(f"{name}: nvec must be positive, with a sum of at most 2**31")
    return spaces.MultiDiscrete(nvec, dtype=dtype.type, start=start)


def _multi_binary(description: dict[str, Any], name: str, max_elements: int) -> spaces.Space[Any]:
    shape = _shape(description, name, max_elements)
    return spaces.MultiBinary(shape[0] if get(description, "is_flat", bool, name) else shape)


def _dict(description: dict[str, Any], name: str, max_elements: int) -> spaces.Space[Any]:
    entries = get(description, "spaces", list, name)
    if len(entries) > MAX_KEYS:
        raise UntrustedFileError(f"{name} has {len(entries)} keys; at most {MAX_KEYS} are allowed")
    members: list[tuple[str, spaces.Space[Any]]] = []
    for entry in entries:
        if not (isinstance(entry, list) and len(entry) == 2 and isinstance(entry[0], str)):
            raise UntrustedFileError(f"{name}: the spaces of a Dict are pairs of key and space, got {short(entry)}")
        member = _decode(entry[1], f"{name}[{short(entry[0])}]", max_elements)
        max_elements -= _n_elements(member)
        members.append((entry[0], member))
    if len(dict(members)) != len(members):
        raise UntrustedFileError(f"{name}: a key occurs twice")
    # A sequence of pairs keeps its order
    return spaces.Dict(members)


def _tuple(description: dict[str, Any], name: str, max_elements: int) -> spaces.Space[Any]:
    entries = get(description, "spaces", list, name)
    if len(entries) > MAX_KEYS:
        raise UntrustedFileError(f"{name} has {len(entries)} members; at most {MAX_KEYS} are allowed")
    members: list[spaces.Space[Any]] = []
    for index, entry in enumerate(entries):
        members.append(_decode(entry, f"{name}[{index}]", max_elements))
        max_elements -= _n_elements(members[-1])
    return spaces.Tuple(members)


def _n_elements(space: spaces.Space[Any]) -> int:
    if isinstance(space, spaces.Dict | spaces.Tuple):
        members = space.spaces.values() if isinstance(space, spaces.Dict) else space.spaces
        return sum(_n_elements(member) for member in members)
    return math.prod(space.shape or ())


def _dtype(description: dict[str, Any], name: str) -> np.dtype[Any]:
    dtype = get(description, "dtype", str, name)
    if dtype not in DTYPES:
        raise UntrustedFileError(f"{name}: dtype must be one of {', '.join(DTYPES)}, got {short(dtype)}")
    named: np.dtype[Any] = np.dtype(dtype)
    return named


_DECODERS = {
    "Box": _box,
    "Discrete": _discrete,
    "MultiDiscrete": _multi_discrete,
    "MultiBinary": _multi_binary,
    "Dict": _dict,
    "Tuple": _tuple,
}
