"""Pipes that would keep the main process waiting for ever are cut."""

import os
import signal
import struct
import sys
import threading

import numpy as np
import pytest
from environments import ToyEnv
from faulty_workers import LONG, SHORT
from stable_baselines3.common.vec_env import SubprocVecEnv
from stable_baselines3.common.vec_env.subproc_vec_env import _worker

from sb3_ppo_plus import DeadWorkerError, HangingWorkerError
from sb3_ppo_plus.envs.pipe_cutter import PipeCutter
from sb3_ppo_plus.envs.worker_watch import WorkerWatch

pytestmark = pytest.mark.filterwarnings("ignore:worker . of . of the SubprocVecEnv")

# More than a pipe holds
LARGE = bytes(2**24)
ACTIONS = np.array([[0.0, 2.2]] * 3, np.float32)


class Talks(ToyEnv):
    def set_level(self, level):
        return len(level), os.getpid()

    def answer_by_half(self):
        """The worker announces 100 bytes and sends one."""
        frame = sys._getframe()
        while frame.f_code is not _worker.__code__:
            frame = frame.f_back
        os.write(frame.f_locals["remote"].fileno(), struct.pack("!i", 100) + b"x")
        while True:
            signal.pause()


@pytest.fixture
def env():
    made = SubprocVecEnv([Talks] * 3, "fork")
    yield made
    for process in made.processes:
        process.kill()


def test_a_stopped_worker_that_does_not_take_a_large_argument_is_named(env):
    said = "worker 1 of 3 of the SubprocVecEnv has not answered for 1 seconds, at env_method 'set_level'"
    with WorkerWatch(env, SHORT, 0, None), pytest.raises(HangingWorkerError, match=said):
        os.kill(env.processes[1].pid, signal.SIGSTOP)
        env.env_method("set_level", LARGE)
    assert env.closed and not any(process.is_alive() for process in env.processes)


def test_a_stopped_worker_that_does_not_take_a_large_argument_is_started_anew(env):
    with WorkerWatch(env, SHORT, 1, None):
        env.reset()
        os.kill(env.processes[1].pid, signal.SIGSTOP)
        assert env.env_method("set_level", LARGE) == [(len(LARGE), process.pid) for process in env.processes]
        assert [bool(info.get("env_restarted")) for info in env.step(ACTIONS)[3]] == [False, True, False]
        # The new worker is watched as the first was
        os.kill(env.processes[1].pid, signal.SIGSTOP)
        with pytest.raises(HangingWorkerError, match="worker 1 of 3"):
            env.env_method("set_level", LARGE)


def test_half_an_answer_is_none(env):
    said = "worker 2 of 3 .* at env_method 'answer_by_half'"
    with WorkerWatch(env, SHORT, 0, None), pytest.raises(HangingWorkerError, match=said):
        env.env_method("answer_by_half", indices=[2])


@pytest.mark.parametrize("settings", [(None, 0), (LONG, 0)])
def test_a_forked_worker_that_ends_while_it_is_given_a_large_argument_is_named(env, settings):
    pid = env.processes[1].pid
    killer = threading.Timer(SHORT / 2, os.kill, (pid, signal.SIGKILL))
    said = "worker 1 of 3 .* was killed by SIGKILL"
    with pytest.raises(DeadWorkerError, match=said), WorkerWatch(env, *settings, None):
        os.kill(pid, signal.SIGSTOP)
        killer.start()
        env.env_method("set_level", LARGE)
    assert env.closed and not any(process.is_alive() for process in env.processes)


def test_what_a_worker_has_sent_before_its_end_can_be_read(env):
    cutter = PipeCutter(env)
    env.remotes[0].send(("get_attr", "max_steps"))
    assert env.remotes[0].poll(LONG)
    env.processes[0].kill()
    env.processes[0].join()
    # Another command finds the pipe cut, sooner or later
    with pytest.raises(BrokenPipeError):
        while True:
            env.remotes[0].send_bytes(b"")
    assert env.remotes[0].recv() == 7
    with pytest.raises(EOFError):
        env.remotes[0].recv()
    assert env.get_attr("max_steps", indices=[1, 2]) == [7, 7]
    cutter.stop()
    assert not any(thread.name == "cuts pipes of workers" for thread in threading.enumerate())
