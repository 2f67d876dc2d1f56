"""Functions that are called in a fork of the test's process, which has everything loaded."""

import faulthandler
import os
import sys
import traceback
from collections.abc import Callable

import torch as th

# A fork that takes longer prints where it stands and ends with status 1
LONGEST_SECONDS = 300.0


def begin_fork(seconds: float, and_end: bool = True) -> None:
    """Make a new fork able to train, and its hanging visible. Called by the fork first of all.

    :param seconds: after these the fork prints where it stands
    :param and_end: whether it then ends, with status 1
    """
    # Threads do not survive a fork: PyTorch would wait for those that an earlier test has started
    th.set_num_threads(1)
    faulthandler.dump_traceback_later(seconds, exit=and_end, file=2)


def start_in_a_fork(do: Callable[[], object], seconds: float = LONGEST_SECONDS) -> int:
    """Start a function in a fork of this process, which then ends. Return the fork's process id."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            begin_fork(seconds)
            do()
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(status)
    return child


def in_a_fork(do: Callable[[], object], seconds: float = LONGEST_SECONDS) -> int:
    """Call a function in a fork of this process. Return its exit code."""
    return os.waitstatus_to_exitcode(os.waitpid(start_in_a_fork(do, seconds), 0)[1])
