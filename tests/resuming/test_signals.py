"""Real signals to a child process that learns with a TrainingCheckpoint."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch as th
from environments import ToyEnv
from forks import in_a_fork
from interrupted_runs import learned, make_envs, make_model, steps_of
from stable_baselines3.common.callbacks import BaseCallback, EvalCallback
from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv
from states import assert_same_bits, state_of

from sb3_ppo_plus import PPOPlus, ResumableEnv, TrainingCheckpoint

STOPPING = [signal.SIGTERM, signal.SIGINT]
HANDLED = [*STOPPING, signal.SIGUSR1]


def handlers():
    return [signal.getsignal(number) for number in HANDLED]


class Signals(BaseCallback):
    """Sends signals in the middle of the rollout that ends at 32 steps."""

    def __init__(self, *numbers, pids=None):
        super().__init__()
        self.numbers = numbers
        self.pids = pids

    def _on_step(self):
        if self.model.num_timesteps == 26:
            for number in self.numbers:
                for pid in self.pids or [os.getpid()]:
                    os.kill(pid, number)
        return True


def in_a_child(folder, *numbers, **kwargs):
    """Learn in a child process that sends itself signals, and return what it says at the end.

    Its ``save_freq`` is so large that without signals it saves only at the end of training.
    """

    def learn():
        # Shells let processes in the background ignore SIGINT
        signal.signal(signal.SIGINT, signal.default_int_handler)
        before = handlers()
        model, checkpoint = make_model(), TrainingCheckpoint(10_000, folder, **kwargs)
        said = {"interrupted": False}
        try:
            model.learn(96, [checkpoint, Signals(*numbers)])
        except KeyboardInterrupt:
            said["interrupted"] = True
        said |= {
            "num_timesteps": model.num_timesteps,
            "received": checkpoint.received_signal,
            "handlers": handlers() == before,
            "state": state_of(model),
        }
        th.save(said, folder / "said")

    exit_code = in_a_fork(learn)
    return th.load(folder / "said", weights_only=False) if exit_code == 0 else exit_code


@pytest.mark.parametrize("number", STOPPING)
def test_a_checkpoint_is_written_at_the_end_of_the_update_and_learn_returns(tmp_path, number):
    said = in_a_child(tmp_path, number)
    assert (said["num_timesteps"], said["interrupted"], said["received"]) == (32, False, number)
    assert said["handlers"], "the handlers from before are back"
    assert steps_of(tmp_path) == [32]
    model = PPOPlus.resume(tmp_path, make_envs(), device="cpu")
    model.continue_learning()
    assert_same_bits(state_of(model), learned())


def test_sigusr1_has_a_checkpoint_written_and_learning_goes_on(tmp_path):
    said = in_a_child(tmp_path, signal.SIGUSR1)
    assert (said["num_timesteps"], said["received"]) == (96, None)
    assert said["handlers"]
    assert steps_of(tmp_path) == [32, 96]
    assert_same_bits(said["state"], learned())


def test_workers_of_an_evaluation_ignore_the_signals_too(tmp_path):
    """A terminal's Ctrl-C reaches them, and the checkpoint asks them for their state."""
    evaluated = SubprocVecEnv([ToyEnv])
    pids = [os.getpid(), *(process.pid for process in evaluated.processes)]
    checkpoint = TrainingCheckpoint(10_000, tmp_path)
    evaluation = EvalCallback(evaluated, n_eval_episodes=1, eval_freq=14, verbose=0)
    model = make_model()
    model.learn(96, [evaluation, checkpoint, Signals(signal.SIGTERM, pids=pids)])
    assert (model.num_timesteps, steps_of(tmp_path)) == (32, [32])
    evaluated.close()


def test_a_second_sigint_interrupts_at_once(tmp_path):
    said = in_a_child(tmp_path, signal.SIGINT, signal.SIGINT)
    assert (said["num_timesteps"], said["interrupted"]) == (26, True)
    assert said["handlers"]
    assert steps_of(tmp_path) == []


def test_sigterm_does_not_count_as_a_first_sigint(tmp_path):
    said = in_a_child(tmp_path, signal.SIGTERM, signal.SIGTERM, signal.SIGINT)
    assert (said["num_timesteps"], said["interrupted"]) == (32, False)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_without_on_signal_signals_have_their_usual_effect(tmp_path, number):
    assert in_a_child(tmp_path, number, on_signal=False) == -number


class StopsInTheRollout(BaseCallback):
    def _on_step(self):
        return self.model.num_timesteps < 28


def test_a_signal_is_reported_even_if_another_callback_stops_training_first(tmp_path):
    checkpoint = TrainingCheckpoint(10_000, tmp_path)
    make_model().learn(96, [checkpoint, Signals(signal.SIGTERM), StopsInTheRollout()])
    assert checkpoint.received_signal is signal.SIGTERM and steps_of(tmp_path) == []
    make_model().learn(32, checkpoint)
    assert checkpoint.received_signal is None


def test_without_on_signal_sigint_is_a_keyboard_interrupt(tmp_path):
    assert in_a_child(tmp_path, signal.SIGINT, on_signal=False)["interrupted"]


def test_after_a_signal_learning_goes_on_in_the_same_process(tmp_path):
    model, checkpoint = make_model(), TrainingCheckpoint(10_000, tmp_path)
    model.learn(96, [checkpoint, Signals(signal.SIGTERM)])
    assert model.num_timesteps == 32
    model.continue_learning(checkpoint)
    assert checkpoint.received_signal is None
    assert_same_bits(state_of(model), learned())


class FailsAt(ToyEnv):
    def step(self, action):
        if self.calls["step"] == 5:
            raise RuntimeError("broken")
        return super().step(action)


def test_the_handlers_are_put_back_after_an_exception(tmp_path):
    def own_handler(number, frame):
        pass

    previous = signal.signal(signal.SIGUSR1, own_handler)
    try:
        before = handlers()
        model = make_model(DummyVecEnv([lambda: ResumableEnv(FailsAt())]))
        with pytest.raises(RuntimeError, match="broken"):
            model.learn(96, [TrainingCheckpoint(1, tmp_path / "1"), TrainingCheckpoint(1, tmp_path / "2")])
        assert handlers() == before
    finally:
        signal.signal(signal.SIGUSR1, previous)


class FailsToStart(BaseCallback):
    def _on_training_start(self):
        raise RuntimeError("broken")

    def _on_step(self):
        return True


def test_the_handlers_are_put_back_when_another_callback_fails_to_start(tmp_path):
    before = handlers()
    with pytest.raises(RuntimeError, match="broken"):
        make_model().learn(96, [TrainingCheckpoint(1, tmp_path), FailsToStart()])
    assert handlers() == before


def test_handlers_are_installed_only_in_the_main_thread(tmp_path):
    before, seen = handlers(), []

    class Look(BaseCallback):
        def _on_step(self):
            seen.append(handlers())
            return True

    thread = threading.Thread(target=lambda: make_model().learn(32, [TrainingCheckpoint(1, tmp_path), Look()]))
    thread.start()
    thread.join()
    assert seen and all(one == before for one in seen)
    assert steps_of(tmp_path) == [16, 32]


@pytest.mark.parametrize("start_method", ["forkserver", "fork"])
@pytest.mark.parametrize("number", STOPPING)
def test_a_signal_to_all_processes_does_not_end_the_workers(tmp_path, number, start_method):
    env = SubprocVecEnv([lambda: ResumableEnv(ToyEnv())] * 2, start_method)
    try:
        pids = [os.getpid(), *(process.pid for process in env.processes)]
        model = make_model(env)
        model.learn(96, [TrainingCheckpoint(10_000, tmp_path), Signals(number, pids=pids)])
        assert model.num_timesteps == 32 and steps_of(tmp_path) == [32]
        model.continue_learning()
        assert model.num_timesteps == 96
    finally:
        env.close()


SCRIPT = """
import sys
from environments import ToyEnv
from stable_baselines3.common.vec_env import SubprocVecEnv
from sb3_ppo_plus import PPOPlus, TrainingCheckpoint
if __name__ == "__main__":
    env = SubprocVecEnv([ToyEnv] * 2, {start_method!r})
    PPOPlus("MlpPolicy", env, n_steps=8, batch_size=8, device="cpu").learn(16, TrainingCheckpoint(1, sys.argv[1]))
    print(*(process.pid for process in env.processes))
"""


def run_script(tmp_path, text):
    script = tmp_path / "script.py"
    script.write_text(text)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([*sys.path, str(Path(__file__).parents[1])])}
    # Not through pipes, which workers that are still there would keep open
    with open(tmp_path / "stdout", "w+") as stdout, open(tmp_path / "stderr", "w+") as stderr:
        command = [sys.executable, str(script), str(tmp_path)]
        ran = subprocess.run(command, stdout=stdout, stderr=stderr, timeout=600, env=environment)
    ran.stdout, ran.stderr = ((tmp_path / name).read_text() for name in ("stdout", "stderr"))
    return ran


def assert_end(pids):
    for pid in pids:
        until = time.monotonic() + 300
        while os.path.exists(f"/proc/{pid}"):
            assert time.monotonic() < until, f"worker {pid} is still there"
            time.sleep(0.01)


@pytest.mark.parametrize("start_method", ["forkserver", "fork"])
def test_workers_end_with_the_program_that_does_not_close_them(tmp_path, start_method):
    ran = run_script(tmp_path, SCRIPT.format(start_method=start_method))
    assert ran.returncode == 0, ran.stderr
    assert_end(ran.stdout.split())


@pytest.mark.parametrize("start_method", ["forkserver", "fork"])
def test_sigusr1_to_all_processes_asks_for_a_checkpoint_and_ends_no_worker(tmp_path, start_method):
    env = SubprocVecEnv([lambda: ResumableEnv(ToyEnv())] * 2, start_method)
    try:
        pids = [os.getpid(), *(process.pid for process in env.processes)]
        model = make_model(env)
        model.learn(96, [TrainingCheckpoint(10_000, tmp_path), Signals(signal.SIGUSR1, pids=pids)])
        assert model.num_timesteps == 96 and steps_of(tmp_path) == [32, 96]
    finally:
        env.close()


KILLED_SCRIPT = """
import os, signal, sys
from environments import ToyEnv
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.vec_env import SubprocVecEnv
from sb3_ppo_plus import PPOPlus, TrainingCheckpoint
class Killed(BaseCallback):
    def _on_step(self):
        print(*(process.pid for process in env.processes), flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
if __name__ == "__main__":
    env = SubprocVecEnv([ToyEnv] * 3, {start_method!r})
    model = PPOPlus("MlpPolicy", env, n_steps=8, batch_size=8, device="cpu")
    model.learn(48, [TrainingCheckpoint(1, sys.argv[1]), Killed()])
"""


@pytest.mark.parametrize("start_method", ["forkserver", "fork"])
def test_workers_that_ignore_sigterm_end_when_the_program_is_killed(tmp_path, start_method):
    ran = run_script(tmp_path, KILLED_SCRIPT.format(start_method=start_method))
    assert ran.returncode == -signal.SIGKILL, ran.stderr
    assert len(ran.stdout.split()) == 3
    assert_end(ran.stdout.split())


class Inner(BaseCallback):
    """Trains another model in the middle of a rollout, which gets a signal."""

    def __init__(self, folder, number):
        super().__init__()
        self.checkpoint = TrainingCheckpoint(10_000, folder)
        self.number = number

    def _on_step(self):
        if self.model.num_timesteps == 26:
            make_model().learn(96, [self.checkpoint, Signals(self.number)])
        return True


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_during_a_learn_inside_another_is_for_both(tmp_path, number):
    inner = Inner(tmp_path / "inner", number)
    outer = TrainingCheckpoint(10_000, tmp_path / "outer")
    before = handlers()
    model = make_model()
    model.learn(96, [outer, inner])
    stops = number == signal.SIGTERM
    for checkpoint, name in ((outer, "outer"), (inner.checkpoint, "inner")):
        assert checkpoint.received_signal == (number if stops else None)
        assert steps_of(tmp_path / name) == ([32] if stops else [32, 96])
    assert handlers() == before
