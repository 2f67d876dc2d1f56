"""What the processes of a training run tell each other."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

import torch as th

Error = TypeVar("Error", bound=BaseException)


def of_all_processes(error: Error) -> Error:
    """Mark an error that every process raises, each by itself: none has to tell the others, and all may go on.

    :param error: the error
    :return: the same
    """
    vars(error)["is_of_all_processes"] = True
    return error


def sum_in_order(vectors: Iterable[th.Tensor]) -> th.Tensor:
    """Add tensors one after another, which gives the same bits everywhere.

    :param vectors: at least one tensor, all of one shape
    """
    remaining: Iterator[th.Tensor] = iter(vectors)
    total = next(remaining)
    for vector in remaining:
        total = total + vector
    return total


class Ranks:
    """One process that trains alone. The methods say what several processes do, each of which calls them alike."""

    rank = 0
    """Number of this process, from 0 on."""
    size = 1
    """How many processes there are."""
    has_failed = False
    """Whether this process has left the others after an error."""

    def gather(self, tensor: th.Tensor) -> th.Tensor:
        """Return the tensors of all processes, in their order.

        :param tensor: of the same shape and dtype in each process
        :return: shape (size, *shape), with the same bits in each process
        """
        return tensor.unsqueeze(0)

    def sum(self, tensor: th.Tensor) -> th.Tensor:
        """Return the sum of the tensors of all processes, with the same bits in each process; it may be ``tensor``.

        :param tensor: of the same shape and dtype in each process
        """
        return tensor

    def gather_objects(self, value: Any, what: str = "a value") -> list[Any]:  # noqa: ANN401  # anything that can be pickled
        """Return the values of all processes, in their order.

        :param value: anything that can be pickled
        :param what: what it is. Processes that share different things are refused
        """
        return [value]

    def any(self, flag: bool) -> bool:
        """Whether the flag is True in one of the processes.

        :param flag: the flag of this process
        """
        return flag

    def fail(self, error: BaseException) -> None:
        """Tell the other processes why this one ends, and let what they wait for fail.

        :param error: the error that ends this process's training
        """
