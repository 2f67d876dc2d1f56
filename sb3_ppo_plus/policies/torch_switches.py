"""Switches of a whole process or thread, which the distributions obey."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from torch import distributions as torch_distributions

from sb3_ppo_plus.torch_private import default_validation


class _Unvalidated:
    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.n_users = 0
        self.before = True


_UNVALIDATED = _Unvalidated()


@contextmanager
def without_argument_validation() -> Iterator[None]:
    """Have torch.distributions take arguments unchecked, for the while.

    An update checks every minibatch otherwise, at the cost of several operations each. NaN still raises SB3's error, at
    the first step of the next rollout.
    """
    base = torch_distributions.Distribution
    # Models may learn in several threads: the first to come takes the checks away, the last to leave brings them back
    with _UNVALIDATED.lock:
        if _UNVALIDATED.n_users == 0:
            _UNVALIDATED.before = default_validation()
        _UNVALIDATED.n_users += 1
        base.set_default_validate_args(False)
    try:
        yield
    finally:
        with _UNVALIDATED.lock:
            _UNVALIDATED.n_users -= 1
            if _UNVALIDATED.n_users == 0:
                base.set_default_validate_args(_UNVALIDATED.before)


class _Rounding(threading.local):
    """Whether results may differ from SB3's by rounding, see :func:`may_round`; for each thread."""

    is_allowed = False


ROUNDING = _Rounding()


@contextmanager
def may_round() -> Iterator[None]:
    """Let the distributions leave out operations that change nothing but the last bits: for compiled graphs."""
    before, ROUNDING.is_allowed = ROUNDING.is_allowed, True
    try:
        yield
    finally:
        ROUNDING.is_allowed = before


def is_validated() -> bool:
    """Whether distributions check their arguments; not in updates, see :func:`without_argument_validation`."""
    return default_validation()
