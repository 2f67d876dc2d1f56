"""Environments whose worker processes hang or die, and what is left of these processes."""

import contextlib
import os
import signal
from pathlib import Path

import pytest
from environments import ToyEnv
from models import build
from stable_baselines3.common.vec_env import SubprocVecEnv

# Processes that are not forked import everything anew
START_METHODS = ["fork", *(pytest.param(name, marks=pytest.mark.heavy) for name in ("forkserver", "spawn"))]
# In seconds: short, and long enough for an environment that does not hang on a loaded machine
SHORT, LONG = 1.0, 600.0


class FaultyEnv(ToyEnv):
    """Hangs or dies at one place, as often as it is told to, over all processes.

    :param kind: "hang", "kill", "exit", "raise", or "exec": it becomes another program, which goes on for an hour
    :param folder: has a file for each fault so far
    :param place: "step", in the fifth of a process, "reset", "set_level"; or "make", once the folder has a file "armed"
    :param times: number of faults
    """

    def __init__(self, kind, folder, place="step", times=1):
        super().__init__()
        self.kind, self.folder, self.place, self.times = kind, str(folder), place, times
        if os.path.exists(f"{folder}/armed"):
            self._may_fail("make")

    def step(self, action):
        if self.calls["step"] == 4:
            self._may_fail("step")
        return super().step(action)

    def reset(self, *, seed=None, options=None):
        with open(f"{self.folder}/seeds", "a") as file:
            file.write(f"{seed}\n")
        self._may_fail("reset")
        return super().reset(seed=seed, options=options)

    def set_level(self, level):
        self._may_fail("set_level")
        self.level = level
        return level, os.getpid()

    def _may_fail(self, place):
        folder = Path(self.folder)
        n_faults = len(list(folder.glob("fault*")))
        if place != self.place or n_faults >= self.times:
            return
        (folder / f"fault{n_faults}").touch()
        if self.kind == "hang":
            while True:
                signal.pause()
        if self.kind == "exit":
            os._exit(7)
        if self.kind == "exec":
            os.execvp("sleep", ["sleep", "3600"])
        if self.kind == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        raise OverflowError("the simulator burst")


def faulty_envs(folder, kind, start_method="fork", n_envs=3, index=1, **kwargs):
    """A SubprocVecEnv of ToyEnvs, of which one is faulty."""
    makers = [ToyEnv] * n_envs
    makers[index] = lambda: FaultyEnv(kind, folder, **kwargs)
    return SubprocVecEnv(makers, start_method)


def is_running(pid):
    """Whether a process runs. One that has ended may wait for its parent to ask how."""
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    return False


def build_watched(env, **settings):
    """A small model whose update takes little time."""
    return build(env, **{"n_steps": 8, "batch_size": 8, "n_epochs": 1} | settings)
