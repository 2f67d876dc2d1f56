"""Limits of what a graph without trust may cost for one observation, whatever its format is."""

from __future__ import annotations

import math
from collections.abc import Sequence

from sb3_ppo_plus.errors import UntrustedFileError

MAX_BYTES_MADE = 2**28
"""Bytes of all tensors that a graph makes for one observation, and of what operations need for themselves."""
MAX_WORK = 2**31
"""Multiplications for one observation."""
WORK_OF_COMPARISON = 8
"""A pool takes as long for each number in its window as so many multiplications of a convolution."""
MAX_RANK = 8
"""Axes of a tensor."""
MAX_LIST = 4096
"""Tensors that one operation gives, and numbers in a list that says what an operation does."""


class Costs:
    """Adds up what the operations of a graph cost.

    :param name: what the graph is, for errors
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._n_bytes = self._work = 0

    def add_tensor(self, what: str, sizes: Sequence[int], itemsize: int) -> None:
        """Count a tensor.

        :param what: which one, for errors
        :param sizes: its sizes
        :param itemsize: bytes of a number
        :raises UntrustedFileError: if it has a size below 0 or too many axes, or if the graph makes too many bytes
        """
        if len(sizes) > MAX_RANK or any(size < 0 for size in sizes):
            raise UntrustedFileError(f"{self._name}: {what} has the shape {tuple(sizes)[: 2 * MAX_RANK]}")
        self.add_bytes(math.prod(sizes) * itemsize)

    def add_bytes(self, n_bytes: int) -> None:
        """Count memory.

        :param n_bytes: its bytes
        :raises UntrustedFileError: if the graph makes too many
        """
        self._n_bytes += n_bytes
        self._check(self._n_bytes, MAX_BYTES_MADE, f"makes more than {MAX_BYTES_MADE} bytes")

    def add_work(self, work: int) -> None:
        """Count multiplications.

        :param work: their number
        :raises UntrustedFileError: if the graph does too many
        """
        self._work += work
        self._check(self._work, MAX_WORK, f"does more than {MAX_WORK} multiplications")

    def _check(self, cost: int, limit: int, what: str) -> None:
        if cost > limit:
            raise UntrustedFileError(
                f"{self._name} {what} for one observation. load_exported(path, trusted=True) has no such limit"
            )
