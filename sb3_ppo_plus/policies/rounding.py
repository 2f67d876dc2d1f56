"""A switch of each thread that lets distributions round otherwise than SB3's."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager


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
