"""Workers that hang or die are named, and leave nothing behind."""

import copy
import gc
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
from environments import ToyEnv, make_env
from faulty_workers import LONG, SHORT, START_METHODS, build_watched, faulty_envs, is_running
from stable_baselines3.common.callbacks import BaseCallback, EvalCallback
from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv, VecNormalize
from states import assert_same_training

from sb3_ppo_plus import DeadWorkerError, HangingWorkerError, PPOPlus, ResumableEnv, TrainingCheckpoint
from sb3_ppo_plus.envs import watched_remote, worker_watch
from sb3_ppo_plus.envs.questions import has_attribute
from sb3_ppo_plus.envs.watched_remote import NoAnswerError, WatchedRemote
from sb3_ppo_plus.envs.worker_watch import WorkerWatch

STEPS = 48


def raises_in_learn(env, error, said, callback=None, **settings):
    """The error names the worker; all processes have ended, and the environment is closed."""
    pids = [process.pid for process in env.processes]
    with pytest.raises(error, match=said) as caught:
        build_watched(VecNormalize(env), **settings).learn(STEPS, callback)
    assert not any(map(is_running, pids))
    env.close()
    return caught.value


@pytest.mark.parametrize("start_method", ["fork", "forkserver", pytest.param("spawn", marks=pytest.mark.heavy)])
def test_a_hanging_worker_is_named_and_no_worker_is_left(tmp_path, start_method):
    said = r"worker 1 of 3 of the SubprocVecEnv has not answered for 1 seconds, at step\. .* worker_timeout"
    env = faulty_envs(tmp_path, "hang", start_method)
    error = raises_in_learn(env, HangingWorkerError, said, worker_timeout=SHORT)
    assert isinstance(error, DeadWorkerError)


@pytest.mark.heavy
def test_with_a_limit_of_five_seconds_a_hanging_worker_is_named_within_seven(tmp_path):
    env = faulty_envs(tmp_path, "hang", None, n_envs=8)
    model = build_watched(env, worker_timeout=5)
    began = []

    class Clock(BaseCallback):
        def _on_step(self):
            began.append(time.monotonic())
            return True

    with pytest.raises(HangingWorkerError, match="worker 1 of 8"):
        model.learn(800, Clock())
    assert 5 <= time.monotonic() - began[-1] <= 7
    assert not any(process.is_alive() for process in env.processes)


@pytest.mark.parametrize(("place", "said"), [("reset", "at reset"), ("set_level", "at env_method 'set_level'")])
def test_the_error_says_what_the_worker_was_doing(tmp_path, place, said):
    class Sets(BaseCallback):
        def _on_step(self):
            self.training_env.env_method("set_level", 3, indices=[1])
            return True

    env = faulty_envs(tmp_path, "hang", place=place)
    raises_in_learn(env, HangingWorkerError, said, Sets(), worker_timeout=SHORT)


@pytest.mark.parametrize("index", [0, 1, 2])
@pytest.mark.parametrize(("kind", "said"), [("kill", "was killed by SIGKILL"), ("raise", "exit code 1")])
def test_a_forked_worker_that_dies_is_named_whichever_it_is(tmp_path, kind, index, said):
    env = faulty_envs(tmp_path, kind, index=index)
    raises_in_learn(env, DeadWorkerError, f"worker {index} of 3 of the SubprocVecEnv .*{said}")


@pytest.mark.parametrize("settings", [{"worker_timeout": LONG}, {"worker_timeout": LONG, "restart_workers": 1}])
def test_a_forked_worker_that_becomes_another_program_is_named_and_ended(tmp_path, settings):
    env = faulty_envs(tmp_path, "exec", times=2)
    pid = env.processes[1].pid
    model = build_watched(env, **settings)
    with pytest.raises(DeadWorkerError, match="worker 1 of 3 of the SubprocVecEnv has closed its pipe"):
        model.learn(48)
    assert not is_running(pid)
    assert not any(is_running(process.pid) for process in env.processes)


@pytest.mark.parametrize("start_method", START_METHODS)
def test_a_worker_that_dies_under_a_time_limit_is_named_at_once(tmp_path, start_method):
    env = faulty_envs(tmp_path, "exit", start_method)
    raises_in_learn(
        env, DeadWorkerError, "worker 1 of 3 of the SubprocVecEnv ended with exit code 7", worker_timeout=LONG
    )


def test_a_forked_worker_that_dies_between_two_commands_is_named():
    env = SubprocVecEnv([ToyEnv] * 3, "fork")

    class Kills(BaseCallback):
        def _on_rollout_end(self):
            env.processes[2].kill()
            env.processes[2].join()

        def _on_step(self):
            return True

    raises_in_learn(env, DeadWorkerError, "worker 2 of 3 of the SubprocVecEnv was killed by SIGKILL", Kills())


@pytest.mark.filterwarnings("ignore:Training and eval env", "ignore:Evaluation environment is not wrapped")
@pytest.mark.parametrize(("kind", "error"), [("hang", HangingWorkerError), ("kill", DeadWorkerError)])
def test_a_worker_of_an_evaluation_is_watched(tmp_path, kind, error):
    env = faulty_envs(tmp_path, kind)
    callback = EvalCallback(env, eval_freq=8, verbose=0)
    with pytest.raises(error, match="worker 1 of 3"):
        build_watched(make_env(2), worker_timeout=SHORT if kind == "hang" else None).learn(STEPS, callback)
    assert not any(process.is_alive() for process in env.processes)


@pytest.mark.parametrize("kind", ["hang", "kill"])
def test_resuming_with_a_hanging_or_dying_worker_names_it(tmp_path, kind):
    env = faulty_envs(tmp_path, kind, n_envs=2, times=0)
    model = build_watched(env, worker_timeout=SHORT)
    model.learn(32, TrainingCheckpoint(1, tmp_path / "runs"))
    env.close()
    with pytest.raises(DeadWorkerError, match="worker 1 of 2"):
        PPOPlus.resume(tmp_path / "runs", faulty_envs(tmp_path, kind, n_envs=2, place="reset"), device="cpu")


class ProvesSlowly(ResumableEnv):
    def prove_resumable(self, shared=()):
        time.sleep(1.5 * SHORT)
        return super().prove_resumable(shared)


@pytest.mark.filterwarnings("error:worker . of . of the SubprocVecEnv")
@pytest.mark.parametrize("restart_workers", [0, 1])
def test_the_proof_of_resumable_environments_may_take_longer_than_a_step(tmp_path, restart_workers):
    env = SubprocVecEnv([lambda: ProvesSlowly(ToyEnv())] * 2, "fork")
    model = build_watched(env, worker_timeout=SHORT, restart_workers=restart_workers)
    model.learn(16, TrainingCheckpoint(1, tmp_path))
    env.close()
    assert model.num_timesteps == 16


def test_after_the_proof_the_time_limit_is_the_one_before():
    env = SubprocVecEnv([ToyEnv] * 2, "fork")
    with WorkerWatch(env, LONG, 0, None):
        clock = env.remotes[0].clock
        before = copy.copy(clock)
        with watched_remote.time_for_proof(env):
            # A step alone may take as long as the limit
            assert clock.limit > 10 * LONG
            clock.waited += 5
        assert clock == before
    env.close()


def test_two_workers_that_hang_wait_for_one_limit_together():
    env = SubprocVecEnv([ToyEnv] * 3, "fork")
    clock = watched_remote.Clock(SHORT)
    first, second = (WatchedRemote(env, index, clock) for index in (0, 2))
    try:
        for remote in (first, second):
            os.kill(env.processes[remote.index].pid, signal.SIGSTOP)
            remote.send(("has_attr", "x"))
        with pytest.raises(NoAnswerError):
            first.receive()
        waited = clock.waited
        with pytest.raises(NoAnswerError):
            second.receive()
    finally:
        for process in env.processes:
            process.kill()
    assert waited == pytest.approx(SHORT) and clock.waited == pytest.approx(waited)


def test_a_question_to_a_dead_worker_is_no_answer_but_an_error():
    env = SubprocVecEnv([ToyEnv] * 2, "fork")
    with pytest.raises(DeadWorkerError, match="worker 1 of 2"), WorkerWatch(env, None, 0, None):
        env.processes[1].kill()
        has_attribute(env, "action_masks")


class Burst:
    """Raises an error where it is unpickled.

    :param kind: class of the error
    """

    def __init__(self, kind):
        self.kind = kind

    def __reduce__(self):
        return raises, (self.kind,)


def raises(kind):
    raise kind("of the info")


class HasBurstingInfos(ToyEnv):
    def __init__(self, kind):
        super().__init__()
        self.kind = kind

    def step(self, action):
        return *super().step(action)[:4], {"burst": Burst(self.kind)}


@pytest.mark.parametrize("settings", [{}, {"worker_timeout": LONG}, {"restart_workers": 1}])
@pytest.mark.parametrize("kind", [FileNotFoundError, ConnectionResetError])
def test_an_info_that_cannot_be_unpickled_is_no_dead_worker(settings, kind):
    env = SubprocVecEnv([lambda: HasBurstingInfos(kind), ToyEnv], "fork")
    with pytest.raises(kind, match="of the info"):
        build_watched(env, **settings).learn(16)
    assert all(process.is_alive() for process in env.processes)
    for process in env.processes:
        process.kill()


class LooksAtRemotes(BaseCallback):
    def _on_step(self):
        self.seen = {type(remote) for remote in self.training_env.remotes}
        return True


@pytest.mark.parametrize(
    ("start_method", "settings", "is_watched"),
    [("fork", {}, False), ("forkserver", {}, False), ("forkserver", {"worker_timeout": LONG}, True)],
)
def test_connections_are_replaced_during_learn_only_where_that_has_a_use(start_method, settings, is_watched):
    env = SubprocVecEnv([ToyEnv] * 2, start_method)
    before = env.remotes
    look = LooksAtRemotes()
    build_watched(env, **settings).learn(16, look)
    assert (look.seen == {WatchedRemote}) == is_watched
    assert env.remotes == before
    env.close()


class Stops(BaseCallback):
    def _on_step(self):
        raise ArithmeticError("of a callback")


def test_a_warning_says_that_environments_without_workers_are_not_watched():
    env = DummyVecEnv([ToyEnv])
    with pytest.warns(UserWarning, match="no effect on DummyVecEnv, only on the worker processes of a Subproc"):
        build_watched(env, worker_timeout=LONG).learn(16)


@pytest.mark.parametrize("settings", [{}, {"worker_timeout": LONG}])
def test_it_does_not_come_without_the_options_nor_where_an_evaluation_has_workers(settings, recwarn):
    eval_env = SubprocVecEnv([ToyEnv], "fork")
    build_watched(DummyVecEnv([ToyEnv]), **settings).learn(16, EvalCallback(eval_env, verbose=0) if settings else None)
    assert not [warning for warning in recwarn if "have no effect" in str(warning.message)]
    eval_env.close()


def test_after_an_exception_the_connections_are_sb3s_again():
    env = SubprocVecEnv([ToyEnv] * 2, "fork")
    before = env.remotes
    with pytest.raises(ArithmeticError):
        build_watched(env, worker_timeout=LONG).learn(16, Stops())
    assert env.remotes == before
    assert env.get_attr("max_steps") == [7, 7]
    env.close()


@pytest.mark.parametrize("has_poll", [True, False])
def test_watching_changes_no_bit(monkeypatch, has_poll):
    if not has_poll:
        monkeypatch.delattr(watched_remote.select, "poll")
    models = []
    for settings in ({"worker_timeout": LONG, "restart_workers": 3}, {}, None):
        if settings is None:
            monkeypatch.setattr(worker_watch, "is_forked", lambda env: False)
        env = SubprocVecEnv([ToyEnv] * 2, "fork")
        models.append(build_watched(VecNormalize(env), **settings or {}).learn(64))
        env.close()
    for model in models[:2]:
        assert_same_training(model, models[2])


def test_the_error_of_a_hang_holds_nothing_that_only_the_garbage_collector_frees(tmp_path):
    def errors():
        return [one for one in gc.get_objects() if issubclass(type(one), NoAnswerError | HangingWorkerError)]

    model = build_watched(faulty_envs(tmp_path, "hang"), worker_timeout=SHORT)
    gc.collect()
    before = len(errors())
    gc.disable()
    try:
        with suppress(HangingWorkerError):
            model.learn(STEPS)
        assert len(errors()) == before
    finally:
        gc.enable()


SCRIPT = """
import os, signal, sys
from faulty_workers import build_watched, faulty_envs
if __name__ == "__main__":
    env = faulty_envs(sys.argv[1], "hang", {start_method!r})
    print(*(process.pid for process in env.processes), flush=True)
    build_watched(env, worker_timeout=600).learn(48)
"""


@pytest.mark.parametrize("start_method", START_METHODS)
def test_a_hanging_worker_ends_when_its_main_process_is_killed(tmp_path, start_method):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT.format(start_method=start_method))
    here = Path(__file__).parent
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([*sys.path, str(here), str(here.parent)])}
    command = [sys.executable, str(script), str(tmp_path)]
    main = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    pids = list(map(int, main.stdout.readline().split()))
    until = time.monotonic() + 300
    while not list(tmp_path.glob("fault*")):
        assert time.monotonic() < until, "no worker hangs"
        time.sleep(0.01)
    main.kill()
    main.wait()
    assert len(pids) == 3
    while any(map(is_running, pids)):
        assert time.monotonic() < until, "a worker is still there"
        time.sleep(0.01)
