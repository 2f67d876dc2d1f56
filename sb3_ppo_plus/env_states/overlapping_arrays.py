"""Arrays that share memory, as one block of bytes and the place of each array in it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

# Largest size of an array whose elements share bytes, relative to the block that holds it
LARGEST_REPETITION = 64
_OF_NUMPY: Any = np
# NumPy 1 has it at the top
_byte_bounds: Callable[[np.ndarray], tuple[int, int]] = getattr(_OF_NUMPY.lib, "array_utils", _OF_NUMPY).byte_bounds


class View(NamedTuple):
    """An array in a block.

    :param block: the block, of type uint8
    :param offset: byte at which its first element begins
    """

    block: np.ndarray
    offset: int


def has_foreign_owner(array: np.ndarray) -> bool:
    """Whether the memory of an array belongs to a C library, such as MuJoCo.

    :param array: the array
    """
    owner: Any = array
    while isinstance(owner, np.ndarray) and owner.base is not None:
        owner = owner.base
    return type(owner).__name__ == "PyCapsule"


def overlapping(arrays: Sequence[np.ndarray]) -> list[list[np.ndarray]]:
    """Return the groups of arrays whose memory overlaps, each with two or more.

    :param arrays: different arrays
    """
    # Without a base, no other object can know the memory
    if all(array.base is None for array in arrays):
        return []
    bounds = [(_byte_bounds(array), array) for array in arrays if array.size > 0]
    groups: list[list[np.ndarray]] = []
    end = -1
    for (low, high), array in sorted(bounds, key=lambda bound: bound[0]):
        if low < end:
            groups[-1].append(array)
        else:
            groups.append([array])
        end = max(end, high)
    return [group for group in groups if len(group) > 1]


def views_of(group: Iterable[np.ndarray]) -> list[View]:
    """Copy the memory of arrays that overlap into one block.

    :param group: the arrays
    :return: the view of each
    """
    arrays = list(group)
    bounds = [_byte_bounds(array) for array in arrays]
    low, high = min(low for low, _ in bounds), max(high for _, high in bounds)
    block = np.zeros(high - low, np.uint8)
    views = [View(block, array.__array_interface__["data"][0] - low) for array in arrays]
    for array, view in zip(arrays, views, strict=True):
        inside: np.ndarray = np.ndarray(array.shape, array.dtype, block, view.offset, array.strides)
        inside[...] = array
    return views


def array_in(block: np.ndarray, dtype: str, shape: Sequence[int], strides: Sequence[int], offset: int) -> np.ndarray:
    """Make an array in a block.

    :param block: bytes, of type uint8
    :param dtype: its dtype, as text
    :param shape: its shape
    :param strides: its strides in bytes
    :param offset: byte at which its first element begins
    :raises ValueError: if it is not inside the block, or is much larger than the block
    """
    kind = np.dtype(dtype)
    if kind.hasobject or kind.itemsize == 0:
        raise ValueError(f"a view of {kind}; allowed: dtypes without objects, whose elements have bytes")
    array: np.ndarray = np.ndarray(tuple(shape), kind, block, offset, tuple(strides))
    if array.nbytes > LARGEST_REPETITION * block.nbytes:
        raise ValueError(f"a view of shape {shape} in {block.nbytes} bytes")
    return array
