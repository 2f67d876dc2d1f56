"""A switch of the whole process that turns off the checks of ``torch.distributions``."""

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
    """Turn off the argument checks of torch.distributions inside the block.

    With them, every minibatch would cost several operations more. NaN still raises SB3's error, at the first step of
    the next rollout.
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
