"""Runs that die at one operation on files after another: ``python killed_runs.py FOLDER`` leaves their checkpoints.

FOLDER/N is the directory of a run that has died before its N-th operation there. A process of its own, as threads that
a process has started before it forks are missing in the fork.
"""

import os
import signal
import sys
from pathlib import Path

import conftest  # noqa: F401  # one thread
from forks import in_a_fork
from interrupted_runs import make_model

from sb3_ppo_plus import TrainingCheckpoint

N_STEPS = 48


class OperationsOnFiles:
    """Counts what this process does with files in a folder, and may kill it. For forks: the hook stays for good.

    :param folder: what is done elsewhere does not count
    :param last: index of the operation before which the process dies
    """

    def __init__(self, folder, last=None):
        self.folder, self.last, self.n_done = str(folder), last, 0
        sys.addaudithook(self)

    def __call__(self, event, arguments):
        if event.startswith(("open", "os.")) and arguments and self.folder in str(arguments[0]):
            if self.n_done == self.last:
                os.kill(os.getpid(), signal.SIGKILL)
            self.n_done += 1


def learn(save_path, last=None):
    operations = OperationsOnFiles(save_path, last)
    make_model().learn(N_STEPS, TrainingCheckpoint(1, save_path, keep_last=1))
    (save_path.parent / "count").write_text(str(operations.n_done))


def main(folder: Path) -> None:
    # PyTorch imports much when the first optimiser is made: here once, rather than in each fork
    make_model()
    assert in_a_fork(lambda: learn(folder / "whole")) == 0
    n_operations = int((folder / "count").read_text())
    assert n_operations >= 3 * 8
    # While the second of three checkpoints is written and the first is removed
    for last in range(n_operations // 3, 2 * n_operations // 3 + 1):
        assert in_a_fork(lambda last=last: learn(folder / str(last), last)) == -signal.SIGKILL


if __name__ == "__main__":
    main(Path(sys.argv[1]))
