"""Training state as JSON and raw bytes: plain values, arrays and tensors, written and read without pickle."""

from __future__ import annotations

from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch as th
from sb3_contrib.common.recurrent.type_aliases import RNNStates

from sb3_ppo_plus.errors import PlainStateError

Json = Any
"""What the ``json`` module writes and reads."""

# Longer lists of floats, such as a Monitor's rewards, are written as arrays: exact, and ten times faster than JSON
LONGEST_FLOAT_LIST = 8
# Values of these types are JSON as they are
JSON_TYPES = frozenset((type(None), bool, int, float, str))
SEQUENCES = frozenset((list, deque, tuple, set))
ARRAYS = (np.ndarray, np.generic)
MAPPINGS = {dict: "$items", OrderedDict: "$ordered", Counter: "$counter"}
# Largest memory of an array with gaps between its numbers, relative to the memory of the numbers alone
LARGEST_GAPS = 8
# Without trust: gaps of all arrays in bytes, and keys whose hashes somebody can make equal
MAX_GAP_BYTES, MAX_ODD_KEYS = 2**26, 3000
#: An empty deque takes 600 bytes
MAX_DEQUES = 10_000
# Bits of an integer with 4300 digits, which Python turns into text; depth, which is less than that of Python's calls
LONGEST_INT, DEEPEST = 14_284, 300
# Of a place that an error names
MOST_KEYS = 8
# Longer ones are of many fields
LONGEST_DTYPE = 40


class PlainStateWriter:
    """Turns plain values into JSON, and collects the bytes of their arrays.

    Plain values are None, bool, int, float, str, bytes; list, tuple, set, deque, dict, OrderedDict and Counter of plain
    values; NumPy's arrays and scalars without Python objects; PyTorch's tensors; and sb3-contrib's RNNStates. Objects
    of their subclasses are not plain.
    """

    def __init__(self) -> None:
        self._chunks: list[bytes] = []
        self._n_bytes = 0

    def arrays(self) -> bytes:
        """Return the bytes of all arrays that were encoded so far, one after the other."""
        return b"".join(self._chunks)

    def encode(self, value: object, name: str = "state") -> Json:
        """Turn a value into JSON, which does not change with the value later.

        :param value: the value
        :param name: what to call it in an error
        :raises PlainStateError: if it contains a value that is not plain; the message says where
        """
        kind = type(value)
        if kind in JSON_TYPES:
            return value
        if isinstance(value, ARRAYS):
            return {"$array" if isinstance(value, np.ndarray) else "$scalar": self._array(np.asarray(value), name)}
        if isinstance(value, th.Tensor):
            return {"$tensor": self._tensor(value.detach().cpu(), name)}
        if kind is bytes:
            return {"$bytes": self._array(np.frombuffer(value, np.uint8), name)}  # type: ignore[call-overload]  # bytes
        if kind is RNNStates:
            return {"$rnn_states": [self.encode(part, name) for part in value]}  # type: ignore[attr-defined]  # RNNStates
        if kind in SEQUENCES:
            return self._sequence(value, name)
        if kind in MAPPINGS:
            return self._mapping(value, name)  # type: ignore[arg-type]  # a mapping, by its kind
        raise PlainStateError(
            f"{name} is a {kind.__module__}.{kind.__qualname__}; allowed: None, numbers, strings, bytes, lists, "
            "tuples, sets, deques and dicts of such, NumPy arrays and PyTorch tensors"
        )

    def _sequence(self, value: Any, name: str) -> Json:  # noqa: ANN401  # list, deque, tuple or set
        if type(value) is list and len(value) > LONGEST_FLOAT_LIST and set(map(type, value)) == {float}:
            return {"$floats": self._array(np.array(value), name)}
        # Most items are JSON as they are: they need no call, and no name
        items = [
            item if type(item) in JSON_TYPES else self.encode(item, f"{name}[{index}]")
            for index, item in enumerate(value)
        ]
        if type(value) is list:
            return items
        if type(value) is deque:
            return {"$deque": items, "maxlen": value.maxlen}
        return {f"${type(value).__name__}": items}

    def _mapping(self, value: dict[Any, Any], name: str) -> Json:
        if type(value) is dict and all(type(key) is str and not key.startswith("$") for key in value):
            return {
                key: item if type(item) in JSON_TYPES else self.encode(item, f"{name}[{key!r}]")
                for key, item in value.items()
            }
        return {
            MAPPINGS[type(value)]: [
                [self.encode(key, f"{name}'s key {key!r}"), self.encode(item, f"{name}[{key!r}]")]
                for key, item in value.items()
            ]
        }

    def _tensor(self, tensor: th.Tensor, name: str) -> Json:
        # NumPy has no bfloat16: its bits are written as integers
        is_bfloat16 = tensor.dtype is th.bfloat16
        array = (tensor.view(th.int16) if is_bfloat16 else tensor).numpy()
        return {"dtype": "bfloat16" if is_bfloat16 else "", **self._array(array, name)}

    def _array(self, array: np.ndarray, name: str) -> Json:
        if array.dtype.hasobject or array.dtype.names is not None:
            raise PlainStateError(f"{name} is an array of {array.dtype}; allowed: dtypes without objects or fields")
        self._chunks.append(array.tobytes())
        encoded = {"type": array.dtype.str, "shape": list(array.shape), "offset": self._n_bytes}
        self._n_bytes += array.nbytes
        # Transposed observations stay transposed: a convolution may round differently on another memory layout.
        # An empty array of one more dimension tells the strides of the usual layout, and takes no memory
        strides = list(array.strides)
        is_in_order = array.strides in ((), (array.itemsize,))
        if not is_in_order:
            is_in_order = array.strides == np.empty(0, array.dtype).reshape(0, *array.shape).strides[1:]
        if is_in_order or array.size == 0 or min(strides) <= 0:
            return encoded
        if _n_bytes(array.dtype, array.shape, strides) <= LARGEST_GAPS * array.nbytes:
            encoded["strides"] = strides
        return encoded


def place_of_odd_value(value: Any) -> str:  # noqa: ANN401  # plain values
    """Name the first part that no JSON text can hold: an integer with too many digits, or what is nested too deep.

    :param value: plain values, or their JSON
    :return: the place, from keys and indices; "state" if there is none
    """
    waiting: list[tuple[Any, tuple[Any, ...]]] = [(value, ())]
    while waiting:
        part, place = waiting.pop()
        if len(place) > DEEPEST or (type(part) is int and part.bit_length() > LONGEST_INT):
            return ", ".join(map(str, place[:MOST_KEYS])) or "state"
        inner = part.items() if isinstance(part, dict) else enumerate(part) if isinstance(part, list | tuple) else ()
        # A tag of this module says nothing to readers
        named = [(item, place if str(key).startswith("$") else (*place, key)) for key, item in inner]
        # The first one is looked at first
        waiting += reversed(named)
    return "state"


class PlainStateReader:
    """Builds values from what :class:`PlainStateWriter` has written.

    :param arrays: the bytes of all arrays
    :param trusted: False: the values may take no more memory than an honest file's. So each byte belongs to one array
        at most, and few keys are no strings and no integers of 62 bits: equal hashes would make a dict slow
    """

    def __init__(self, arrays: bytes, trusted: bool = True) -> None:
        self._arrays = arrays
        self._trusted = trusted
        self._n_bytes = self._n_gap_bytes = self._n_odd_keys = self._n_deques = 0
        self._builders: dict[str, Callable[[Json], Any]] = {
            "$array": self._array,
            "$scalar": lambda content: self._array(content)[()],
            "$tensor": self._tensor,
            "$bytes": lambda content: self._array(content).tobytes(),
            "$floats": self._floats,
            "$tuple": lambda content: tuple(map(self.build, _items(content))),
            "$rnn_states": lambda content: RNNStates(*map(self.build, _items(content))),
            "$set": lambda content: set(map(self._key, _items(content))),
            **{tag: partial(self._mapping, kind) for kind, tag in MAPPINGS.items()},
        }

    def build(self, encoded: Json) -> Any:  # noqa: ANN401  # any plain value
        """Build a value from its JSON. Its arrays are copies.

        :param encoded: what :meth:`PlainStateWriter.encode` has returned
        :raises ValueError: for JSON of another form
        """
        if isinstance(encoded, list):
            return [self.build(item) for item in encoded]
        if not isinstance(encoded, dict):
            return encoded
        tag = next(iter(encoded), "")
        if not tag.startswith("$"):
            return {key: self.build(item) for key, item in encoded.items()}
        if tag == "$deque":
            self._n_deques += 1
            if self._n_deques > MAX_DEQUES and not self._trusted:
                raise ValueError(f"the training state has more than {MAX_DEQUES} deques")
            return deque(map(self.build, _items(encoded[tag])), encoded["maxlen"])
        if tag not in self._builders:
            raise ValueError(f"unknown kind of value {tag!r} in the training state; allowed: {list(self._builders)}")
        return self._builders[tag](encoded[tag])

    def _mapping(self, kind: Callable[[], dict[Any, Any]], content: Json) -> dict[Any, Any]:
        mapping = kind()
        for key, item in _items(content):
            mapping[self._key(key)] = self.build(item)
        return mapping

    def _key(self, encoded: Json) -> Any:  # noqa: ANN401  # any plain value that has a hash
        key = self.build(encoded)
        if not (isinstance(key, str) or (isinstance(key, int) and abs(key) < 2**20)):
            self._n_odd_keys += _n_parts(key)
            if self._n_odd_keys > MAX_ODD_KEYS and not self._trusted:
                raise ValueError(
                    f"the training state has more than {MAX_ODD_KEYS} keys that are no strings or integers"
                )
        return key

    def _floats(self, content: Json) -> list[float]:
        array = self._array(content)
        # Floats of Python need four times the memory of float64
        if array.dtype != np.float64 or array.ndim != 1:
            raise ValueError(f"the training state has a list of floats of {array.dtype}; allowed: float64")
        numbers: list[float] = array.tolist()
        return numbers

    def _array(self, content: Json) -> np.ndarray:
        if len(content["type"]) > LONGEST_DTYPE:
            raise ValueError(f"the training state has an array of {content['type'][:LONGEST_DTYPE]}...")
        dtype = np.dtype(content["type"])
        if dtype.hasobject or dtype.names is not None or dtype.subdtype is not None:
            raise ValueError(f"the training state has an array of {dtype}; allowed: dtypes without objects or fields")
        if dtype.itemsize == 0:
            raise ValueError(f"the training state has an array of {dtype}, whose elements have no bytes")
        shape = content["shape"]
        n_items = int(np.prod(shape, dtype=np.int64))
        if n_items == 0:
            return np.empty(shape, dtype)
        stored: np.ndarray = np.frombuffer(self._arrays, dtype, n_items, content["offset"]).reshape(shape)
        strides = content.get("strides")
        n_bytes = stored.nbytes if strides is None else _n_bytes(dtype, shape, strides)
        if n_bytes > LARGEST_GAPS * stored.nbytes:
            raise ValueError(f"the training state has an array of shape {shape} with strides {strides}")
        self._count(stored.nbytes, n_bytes - stored.nbytes)
        if strides is None:
            return stored.copy()
        array = np.ndarray(shape, dtype, bytearray(n_bytes), strides=strides)
        array[...] = stored
        return array

    def _count(self, n_bytes: int, n_gap_bytes: int) -> None:
        """Without trust, refuse arrays that take more memory than the file's size tells."""
        self._n_bytes += n_bytes
        self._n_gap_bytes += n_gap_bytes
        if self._trusted:
            return
        if self._n_bytes > len(self._arrays):
            raise ValueError(f"the training state has arrays that share bytes, all {len(self._arrays)} bytes are used")
        if self._n_gap_bytes > MAX_GAP_BYTES:
            raise ValueError(
                f"the training state has arrays with more than {MAX_GAP_BYTES} bytes between their numbers"
            )

    def _tensor(self, content: Json) -> th.Tensor:
        tensor = th.from_numpy(self._array(content))
        return tensor.view(th.bfloat16) if content["dtype"] == "bfloat16" else tensor


def _n_bytes(dtype: np.dtype[Any], shape: Sequence[int], strides: Sequence[int]) -> int:
    """Return how many bytes an array spans. It must not be empty, and its strides must be positive."""
    return dtype.itemsize + sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True))


def _items(content: Json) -> list[Any]:
    if not isinstance(content, list):
        raise ValueError(f"the training state has {type(content).__name__} in place of a list")
    return content


def _n_parts(key: object) -> int:
    """Return how many parts a key has, which are compared where two keys have one hash."""
    return 1 + sum(map(_n_parts, key)) if isinstance(key, tuple) else 1
