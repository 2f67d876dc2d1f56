"""Reads the files of ``torch.save`` that hold state dicts, without an unpickler.

Such a file is a pickle that says how tensors are made, and the bytes of the tensors. PyTorch's
``torch.load(weights_only=True)`` runs no foreign code, but it makes any number of bytes, and nests values in any way:
200 bytes can keep it busy for ever. The reader here knows the operations that state dicts need, and counts them.
"""

from __future__ import annotations

import io
import math
import pickletools
import re
import sys
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch as th

from sb3_ppo_plus.errors import UntrustedFileError
from sb3_ppo_plus.untrusted.safe_zip import read_members
from sb3_ppo_plus.untrusted.strict_json import short

#: A policy has at most a few hundred tensors, each of about 200 bytes and 30 operations here
MAX_PICKLE_BYTES = 2**22
MAX_OPERATIONS = 500_000
MAX_TENSORS = 20_000
#: Levels of dicts, lists and tuples: an optimiser's state has five
MAX_DEPTH = 8
#: Elements of a tuple that may be used several times, such as the betas of Adam
MAX_SHARED_TUPLE = 16
MAX_DIMENSIONS = 32
#: Numbers of parameters in an optimiser's state. Among small ones, few have one place in a dict
MAX_INTEGER_KEY = 2**20
#: How often each number of a storage may be used: tensors of a shared extractor have three names
MAX_USES = 8

_TENSOR_FILE = re.compile(
    r"data\.pkl|byteorder|version|\.format_version|\.storage_alignment|\.data/serialization_id|data/\d{1,6}"
)
# What PyTorch wrote before version 1.6 begins with these pickles
_LEGACY_HEADER = (0x1950A86A20F9469CFC6C, 1001)

_STORAGES = {
    ("torch", f"{name}Storage"): dtype
    for name, dtype in {
        **{"Float": th.float32, "Double": th.float64, "Half": th.float16, "BFloat16": th.bfloat16},
        **{"Long": th.int64, "Int": th.int32, "Short": th.int16, "Char": th.int8, "Byte": th.uint8, "Bool": th.bool},
        **{"ComplexFloat": th.complex64, "ComplexDouble": th.complex128},
    }.items()
}
_ORDERED_DICT = ("collections", "OrderedDict")
_TENSOR, _PARAMETER = ("torch._utils", "_rebuild_tensor_v2"), ("torch._utils", "_rebuild_parameter")


@dataclass(frozen=True)
class _Name:
    """A name of the tables above. It stands for what the file wants to call, and is never looked up anywhere."""

    module_and_name: tuple[str, str]


@dataclass
class _Storage:
    """Memory of tensors.

    :param dtype: type of its numbers
    :param key: its name in the file
    :param n_numbers: how many numbers it says that it has
    :param numbers: the numbers, of shape (n_numbers,); None until they are read
    :param n_used: numbers of all tensors in it
    """

    dtype: th.dtype
    key: str
    n_numbers: int
    numbers: th.Tensor | None = None
    n_used: int = 0


@dataclass
class _Machine:
    """What a pickle has built so far.

    :param read_storage: returns the numbers of a storage
    """

    read_storage: Callable[[_Storage], th.Tensor]
    stack: list[Any] = field(default_factory=list)
    marks: list[int] = field(default_factory=list)
    memo: dict[int, Any] = field(default_factory=dict)
    storages: dict[str, _Storage] = field(default_factory=dict)
    n_operations: int = 0
    n_tensors: int = 0

    def run(self, file: io.BytesIO) -> Any:  # noqa: ANN401  # whatever state dicts hold
        """Read one pickle, and leave the file behind its end.

        :param file: the pickles
        :raises ValueError: for an operation, a name or a value that state dicts do not need
        """
        self.stack, self.marks, self.memo = [], [], {}
        for opcode, argument, _ in pickletools.genops(file):
            self.n_operations += 1
            if self.n_operations > MAX_OPERATIONS:
                raise ValueError(f"it has more than {MAX_OPERATIONS} operations")
            if opcode.name == "STOP":
                (result,) = self.stack
                return result
            if opcode.name not in _OPERATIONS:
                raise ValueError(f"the operation {opcode.name} is not allowed")
            _OPERATIONS[opcode.name](self, argument)
        raise ValueError("its end is missing")

    def since_mark(self) -> list[Any]:
        """Take what was put on the stack since the last mark."""
        begin = self.marks.pop()
        items = self.stack[begin:]
        del self.stack[begin:]
        return items

    def recall(self, number: int) -> None:
        """Put a value on the stack again: only what can neither be changed nor nest others.

        A list that holds another one twice, which holds another one twice, would have 2**n places.
        """
        value = self.memo[number]
        if isinstance(value, tuple):
            is_flat = len(value) <= MAX_SHARED_TUPLE and all(isinstance(item, _SCALARS) for item in value)
        else:
            is_flat = value is None or isinstance(value, (*_SCALARS, _Name, th.Tensor))
        if not is_flat:
            raise ValueError(f"a {type(value).__name__} is used twice")
        self.stack.append(value)

    def set_items(self, items: list[Any]) -> None:
        """Put keys and values into the dict on top of the stack."""
        mapping = self.stack[-1]
        if not isinstance(mapping, dict):
            raise ValueError(f"a {type(mapping).__name__} has no keys")
        for key, value in zip(items[::2], items[1::2], strict=True):
            # Hashing a nested tuple may never end, and integers may follow one another through a dict
            if type(key) not in (str, int) or (type(key) is int and not 0 <= key <= MAX_INTEGER_KEY):
                raise ValueError(f"{short(key)} is no key")
            mapping[key] = value

    def append(self, items: list[Any]) -> None:
        """Put values into the list on top of the stack."""
        if type(self.stack[-1]) is not list:
            raise ValueError(f"a {type(self.stack[-1]).__name__} has no end")
        self.stack[-1].extend(items)

    def call(self) -> None:
        """Make what a name of the tables and its arguments stand for."""
        arguments, function = self.stack.pop(), self.stack.pop()
        if function == _Name(_ORDERED_DICT) and arguments == ():
            self.stack.append(OrderedDict())
        elif function == _Name(_TENSOR):
            self.stack.append(self._tensor(*arguments[:4]))
        elif function == _Name(_PARAMETER) and isinstance(arguments[0], th.Tensor):
            self.stack.append(arguments[0])
        else:
            raise ValueError(f"{short(function)} cannot be called")

    def find_storage(self) -> None:
        """Replace the description of a storage on the stack by the storage. The same key gives the same storage."""
        kind, name, key, _, n_numbers, *view = self.stack.pop()
        dtype = _STORAGES.get(name.module_and_name) if isinstance(name, _Name) else None
        if kind != "storage" or dtype is None or type(key) is not str or view not in ([], [None]):
            raise ValueError(f"{short(name)} is no kind of storage")
        if type(n_numbers) is not int or n_numbers < 0:
            raise ValueError(f"a storage cannot have {short(n_numbers)} numbers")
        storage = self.storages.setdefault(key, _Storage(dtype, key, n_numbers))
        if (storage.dtype, storage.n_numbers) != (dtype, n_numbers):
            raise ValueError(f"the storage {short(key)} is described twice")
        self.stack.append(storage)

    def set_metadata(self) -> None:
        """Keep the versions of modules that a state dict has as its attribute ``_metadata``."""
        state, owner = self.stack.pop(), self.stack[-1]
        if not (type(owner) is OrderedDict and isinstance(state, dict) and state.keys() == {"_metadata"}):
            raise ValueError(f"a {type(owner).__name__} has no attributes")
        metadata: OrderedDict[str, dict[str, int]] = OrderedDict()
        for name, entry in state["_metadata"].items():
            # Other entries would change how load_state_dict works
            if type(name) is not str or entry.keys() - {"version"} or type(entry.get("version", 0)) is not int:
                raise ValueError(f"{short(entry)} is no version of a module")
            metadata[name] = entry
        owner._metadata = metadata  # type: ignore[attr-defined]  # as PyTorch does

    def _tensor(self, storage: Any, offset: Any, size: Any, stride: Any) -> th.Tensor:  # noqa: ANN401  # from the file
        if not isinstance(storage, _Storage):
            raise ValueError(f"{short(storage)} is no storage")
        for numbers in (size, stride, (offset,)):
            if type(numbers) is not tuple or any(type(n) is not int or not 0 <= n < 2**40 for n in numbers):
                raise ValueError(f"{short(numbers)} is no shape, stride or offset")
        if len(size) != len(stride) or len(size) > MAX_DIMENSIONS:
            raise ValueError(f"a tensor cannot have the shape {short(size)} and the strides {short(stride)}")
        self.n_tensors += 1
        if self.n_tensors > MAX_TENSORS:
            raise ValueError(f"it has more than {MAX_TENSORS} tensors")
        # With strides of 0, one number in memory can pass for a tensor of any size
        if math.prod(size) > storage.n_numbers:
            raise ValueError(f"a tensor of shape {size} has more elements than numbers, {storage.n_numbers}")
        last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
        if math.prod(size) > 0 and last >= storage.n_numbers:
            raise ValueError(f"a tensor of shape {size} ends behind its storage")
        storage.n_used += math.prod(size)
        if storage.n_used > MAX_USES * storage.n_numbers:
            raise ValueError(f"the storage {short(storage.key)} has more than {MAX_USES} tensors")
        if storage.numbers is None:
            storage.numbers = self.read_storage(storage)
        if math.prod(size) == 0:
            return storage.numbers.new_empty(size)
        return storage.numbers.as_strided(size, stride, offset)


_SCALARS = (str, int, float, _Name)


def _push(value: Any) -> Callable[[_Machine, Any], None]:  # noqa: ANN401  # a constant
    return lambda machine, _: machine.stack.append(value)


def _push_argument(machine: _Machine, argument: Any) -> None:  # noqa: ANN401  # a number or a text
    if isinstance(argument, int) and not isinstance(argument, bool) and argument.bit_length() > 80:
        raise ValueError(f"the integer has {argument.bit_length()} bits")
    machine.stack.append(argument)


def _push_name(machine: _Machine, argument: str) -> None:
    module, _, name = argument.partition(" ")
    if (module, name) not in {*_STORAGES, _ORDERED_DICT, _TENSOR, _PARAMETER}:
        raise ValueError(f"{short(argument)} is not allowed")
    machine.stack.append(_Name((module, name)))


def _tuple(n_items: int) -> Callable[[_Machine, Any], None]:
    def make(machine: _Machine, _: object) -> None:
        items = tuple(machine.stack[len(machine.stack) - n_items :])
        if len(items) < n_items:
            raise ValueError("a tuple lacks items")
        del machine.stack[len(machine.stack) - n_items :]
        machine.stack.append(items)

    return make


def _memorise(machine: _Machine, number: int | None) -> None:
    machine.memo[len(machine.memo) if number is None else number] = machine.stack[-1]


def _pop(machine: _Machine, n_items: int) -> list[Any]:
    return [machine.stack.pop() for _ in range(n_items)][::-1]


_OPERATIONS: dict[str, Callable[[_Machine, Any], None]] = {
    "PROTO": lambda machine, version: None,
    "FRAME": lambda machine, size: None,
    "MARK": lambda machine, _: machine.marks.append(len(machine.stack)),
    "NONE": _push(None),
    "NEWTRUE": _push(True),
    "NEWFALSE": _push(False),
    "EMPTY_TUPLE": _push(()),
    **dict.fromkeys(("BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT"), _push_argument),
    **dict.fromkeys(("BINUNICODE", "SHORT_BINUNICODE"), _push_argument),
    "EMPTY_LIST": lambda machine, _: machine.stack.append([]),
    "EMPTY_DICT": lambda machine, _: machine.stack.append({}),
    "TUPLE1": _tuple(1),
    "TUPLE2": _tuple(2),
    "TUPLE3": _tuple(3),
    "TUPLE": lambda machine, _: machine.stack.append(tuple(machine.since_mark())),
    "APPEND": lambda machine, _: machine.append(_pop(machine, 1)),
    "APPENDS": lambda machine, _: machine.append(machine.since_mark()),
    "SETITEM": lambda machine, _: machine.set_items(_pop(machine, 2)),
    "SETITEMS": lambda machine, _: machine.set_items(machine.since_mark()),
    **dict.fromkeys(("BINPUT", "LONG_BINPUT", "MEMOIZE"), _memorise),
    **dict.fromkeys(("BINGET", "LONG_BINGET"), _Machine.recall),
    "GLOBAL": _push_name,
    "REDUCE": lambda machine, _: machine.call(),
    "BINPERSID": lambda machine, _: machine.find_storage(),
    "BUILD": lambda machine, _: machine.set_metadata(),
}
"""What ``torch.save`` writes for state dicts, in the second protocol of pickle."""


def load_tensors(data: bytes, name: str, device: th.device, *, allows_legacy: bool = False) -> Any:  # noqa: ANN401  # callers check
    """Read what ``torch.save`` wrote: tensors and numbers in dicts, lists and tuples.

    :param data: the file
    :param name: what to call it in messages
    :param device: where the tensors go
    :param allows_legacy: whether PyTorch's format before version 1.6, which is no archive, is allowed
    :raises UntrustedFileError: if the file is damaged, or holds anything else
    """
    try:
        if allows_legacy and not data.startswith(b"PK"):
            value = _read_legacy(data, device)
        else:
            value = _read_archive(data, name, device)
        _check_depth(value)
    except UntrustedFileError:
        raise
    except Exception as error:
        # Each operation may lack its values, of which any type of error may tell
        raise UntrustedFileError(f"{name} holds no plain tensors: {type(error).__name__}: {error}") from error
    return value


def _read_archive(data: bytes, name: str, device: th.device) -> Any:  # noqa: ANN401  # callers check
    members = read_members(io.BytesIO(data), name, _is_tensor_file, MAX_TENSORS)
    roots = {member.partition("/")[0] for member in members}
    if len(roots) != 1:
        raise ValueError(f"it holds files of {len(roots)} archives")
    (root,) = roots
    order = members.get(f"{root}/byteorder", b"little")
    if order != sys.byteorder.encode():
        raise ValueError(f"its byte order is {short(order)}, that of this machine is {sys.byteorder}")
    pickled = members[f"{root}/data.pkl"]
    if len(pickled) > MAX_PICKLE_BYTES:
        raise ValueError(f"data.pkl has {len(pickled)} bytes; at most {MAX_PICKLE_BYTES} are allowed")
    machine = _Machine(lambda storage: _numbers(storage, members[f"{root}/data/{storage.key}"], device))
    return machine.run(io.BytesIO(pickled))


def _is_tensor_file(member: str) -> bool:
    return _TENSOR_FILE.fullmatch(member.partition("/")[2]) is not None


def _read_legacy(data: bytes, device: th.device) -> Any:  # noqa: ANN401  # callers check
    # The tensors' bytes follow after the pickles. So the pickle of the tensors is read a second time, after the bytes
    file = io.BytesIO(data)
    machine = _Machine(lambda storage: th.empty(storage.n_numbers, dtype=storage.dtype, device="meta"))
    for expected in _LEGACY_HEADER:
        found = machine.run(file)
        if found != expected:
            raise ValueError(f"it begins with {short(found)}")
    if machine.run(file)["little_endian"] is not (sys.byteorder == "little"):
        raise ValueError("its byte order is not that of this machine")
    begin = file.tell()
    machine.run(file)
    for key in machine.run(file):
        storage = machine.storages[key]
        n_numbers = int.from_bytes(file.read(8), sys.byteorder)
        if n_numbers != storage.n_numbers:
            raise ValueError(f"the storage {short(key)} must have {storage.n_numbers} numbers, got {n_numbers}")
        storage.numbers = _numbers(storage, file.read(n_numbers * storage.dtype.itemsize), device)
    file.seek(begin)
    for storage in machine.storages.values():
        storage.n_used = 0
    if any(storage.numbers is None or storage.numbers.device.type == "meta" for storage in machine.storages.values()):
        raise ValueError("it lacks the bytes of a storage")
    return machine.run(file)


def _numbers(storage: _Storage, content: bytes, device: th.device) -> th.Tensor:
    n_bytes = storage.n_numbers * storage.dtype.itemsize
    if len(content) != n_bytes:
        raise ValueError(f"the storage {short(storage.key)} must have {n_bytes} bytes, got {len(content)}")
    numbers = th.empty(n_bytes, dtype=th.uint8)
    numbers.numpy()[...] = np.frombuffer(content, np.uint8)
    if storage.dtype is th.bool and n_bytes > 0 and int(numbers.max()) > 1:
        raise ValueError(f"the storage {short(storage.key)} holds bytes that are no bool")
    return numbers.view(storage.dtype).to(device)


def _check_depth(value: object) -> None:
    level = [value]
    for _ in range(MAX_DEPTH):
        inner: list[Any] = []
        for item in level:
            if isinstance(item, dict):
                inner.extend(item.values())
            elif isinstance(item, list | tuple):
                inner.extend(item)
        level = inner
    if level:
        raise ValueError(f"it is nested more than {MAX_DEPTH} levels deep")
