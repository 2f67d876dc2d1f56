"""JSON from untrusted files: limits on size, depth and numbers, and arrays without pickle."""

from __future__ import annotations

import base64
import json
import math
import re
import reprlib
from functools import partial
from typing import Any, NamedTuple, NoReturn

import numpy as np

from sb3_ppo_plus.errors import UntrustedFileError

MAX_BYTES = 32 * 2**20
MAX_DEPTH = 32
#: Values, lists and objects. Three bytes of JSON can ask for 60 bytes of memory
MAX_VALUES = 2**20
#: Digits of an integer: int64 holds every integer of 18 digits
MAX_DIGITS = 18
#: Numbers in one array or space
MAX_ELEMENTS = 2**26
DTYPES = ("bool", *(f"{kind}{bits}" for kind in ("int", "uint") for bits in (8, 16, 32, 64)), "float16", "float32")
DTYPES += ("float64",)

_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 100
_LINE_BREAKS = re.compile(r"\s*\n\s*")
# Strings may lack their end, and quantifiers are possessive: otherwise a search could start again at every quote
_MARK_OR_STRING = re.compile(rb'"(?:[^"\\]+|\\.?)*+"?|[\[\]{},]', re.DOTALL)


class Limits(NamedTuple):
    """What JSON may hold.

    :param max_bytes: bytes of UTF-8
    :param max_depth: levels of nested lists and objects
    :param max_values: commas, texts, lists and objects in all
    :param max_digits: characters of an integer, its sign included
    :param allows_non_finite: whether NaN, Infinity and -Infinity are numbers
    """

    max_bytes: int = MAX_BYTES
    max_depth: int = MAX_DEPTH
    max_values: int = MAX_VALUES
    max_digits: int = MAX_DIGITS
    allows_non_finite: bool = False


STRICT = Limits()


def short(value: object) -> str:
    """Return a text for messages that shows a value, such as one from a file: escaped, in one line, cut if it is long.

    :param value: the value
    """
    return _LINE_BREAKS.sub(" ", _SHORT.repr(value))


def parse(text: bytes, name: str, limits: Limits = STRICT) -> Any:  # noqa: ANN401  # whatever JSON holds
    """Parse JSON strictly: nothing beyond the limits, no key twice, no number that is too large for a float.

    :param text: UTF-8
    :param name: what to call it in messages
    :param limits: by default 32 MiB, 32 levels, 2**20 values, 18 digits, no NaN or infinity
    :raises UntrustedFileError: for anything else
    """
    if len(text) > limits.max_bytes:
        raise UntrustedFileError(f"{name} has {len(text)} bytes; at most {limits.max_bytes} are allowed")
    _check_size(text, name, limits)
    try:
        return json.loads(
            text.decode("utf-8"),
            object_pairs_hook=_object,
            parse_constant=float if limits.allows_non_finite else _refuse_constant,
            parse_int=partial(_integer, limits.max_digits),
            parse_float=_float,
        )
    except (ValueError, RecursionError) as error:
        raise UntrustedFileError(f"{name} is no strict JSON: {error}") from error


def _check_size(text: bytes, name: str, limits: Limits) -> None:
    """Check depth and number of values before parsing, since Python's parser recurses, and needs memory for each."""
    depth = n_values = 0
    for match in _MARK_OR_STRING.finditer(text):
        mark = match.group()[:1]
        depth += {b"[": 1, b"{": 1, b"]": -1, b"}": -1}.get(mark, 0)
        # A value follows each comma, and may follow each opening bracket; a text is one
        n_values += mark in b',[{"'
        if depth < 0:
            raise UntrustedFileError(f"{name} closes more than it opens")
        if depth > limits.max_depth:
            raise UntrustedFileError(f"{name} is nested more than {limits.max_depth} levels deep")
        if n_values > limits.max_values:
            raise UntrustedFileError(f"{name} holds more than {limits.max_values} values")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    members = dict(pairs)
    if len(members) != len(pairs):
        raise ValueError("a key occurs twice")
    return members


def _refuse_constant(text: str) -> NoReturn:
    raise ValueError(f"{text} is not allowed")


def _integer(max_digits: int, text: str) -> int:
    if len(text) > max_digits:
        raise ValueError(f"the integer {text[:MAX_DIGITS]}... has {len(text)} digits; at most {max_digits} are allowed")
    return int(text)


def _float(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"the number {short(text)} is too large")
    return value


def get(members: object, key: str, expected: type | tuple[type, ...], name: str) -> Any:  # noqa: ANN401  # the caller knows
    """Return a member of a JSON object after a check of its type. A bool is no int here.

    :param members: the object, if it is one
    :param key: name of the member
    :param expected: type of the member, or several types
    :param name: what to call the object in messages
    :raises UntrustedFileError: if there is no such member, or it has another type
    """
    if not isinstance(members, dict) or key not in members:
        raise UntrustedFileError(f"{name} lacks {key!r}")
    value = members[key]
    types = expected if isinstance(expected, tuple) else (expected,)
    if not isinstance(value, types) or (isinstance(value, bool) and bool not in types):
        names = " or ".join(t.__name__ for t in types)
        raise UntrustedFileError(f"{name}: {key!r} must be of type {names}, got {short(value)}")
    return value


def encode_array(array: np.ndarray) -> dict[str, Any]:
    """Turn an array into JSON: name of its dtype, shape, and bytes (little-endian, in base64).

    :param array: the array
    :raises ValueError: for a dtype that is no bool, integer or float
    """
    if array.dtype.name not in DTYPES:
        raise ValueError(f"an array of dtype {array.dtype} has no description; allowed: {', '.join(DTYPES)}")
    data = np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("<")).tobytes()
    return {"dtype": array.dtype.name, "shape": list(array.shape), "base64": base64.b64encode(data).decode("ascii")}


def decode_array(members: object, name: str, shape: tuple[int, ...] | None = None) -> np.ndarray:
    """Build an array from the JSON of :func:`encode_array`.

    :param members: the JSON object
    :param name: what to call it in messages
    :param shape: the only shape allowed; None: any shape
    :raises UntrustedFileError: for JSON of another form, and if the number of bytes does not fit the shape
    """
    dtype_name = get(members, "dtype", str, name)
    if dtype_name not in DTYPES:
        raise UntrustedFileError(f"{name}: dtype must be one of {', '.join(DTYPES)}, got {short(dtype_name)}")
    actual = decode_shape(get(members, "shape", list, name), name)
    if shape is not None and actual != shape:
        raise UntrustedFileError(f"{name} must have shape {shape}, got {actual}")
    try:
        data = base64.b64decode(get(members, "base64", str, name), validate=True)
    except ValueError as error:
        raise UntrustedFileError(f"{name}: {error}") from error
    dtype = np.dtype(dtype_name).newbyteorder("<")
    if len(data) != math.prod(actual) * dtype.itemsize:
        raise UntrustedFileError(f"{name} has {len(data)} bytes, which is not the size of {actual} {dtype_name}")
    if dtype_name == "bool" and set(data) - {0, 1}:
        raise UntrustedFileError(f"{name} holds bytes that are no bool")
    return np.frombuffer(data, dtype).reshape(actual).astype(dtype_name)


def decode_shape(sizes: list[Any], name: str) -> tuple[int, ...]:
    """Check the sizes of a shape: up to 32 integers from 0 on, and at most 2**26 elements in all.

    :param sizes: the sizes
    :param name: what to call the array in messages
    :raises UntrustedFileError: for other sizes
    """
    if len(sizes) > 32 or any(type(size) is not int or size < 0 for size in sizes):
        raise UntrustedFileError(f"{name}: a shape is a list of up to 32 integers from 0 on, got {short(sizes)}")
    if math.prod(sizes) > MAX_ELEMENTS:
        raise UntrustedFileError(f"{name} has more than {MAX_ELEMENTS} elements: {short(sizes)}")
    return tuple(sizes)
