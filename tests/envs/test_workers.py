import gc
import os
import signal
from contextlib import suppress

import numpy as np
import pytest
from environments import ToyEnv, make_env
from models import build
from stable_baselines3.common.callbacks import BaseCallback, EvalCallback
from stable_baselines3.common.vec_env import SubprocVecEnv, VecNormalize

from sb3_ppo_plus import DeadWorkerError, PPOPlus, TrainingCheckpoint
from sb3_ppo_plus.envs import workers


@pytest.fixture(autouse=True)
def a_needless_wait_never_ends(monkeypatch):
    """Wait for the end of a process as long as a loaded machine needs. Whoever waits for a living one hangs."""
    monkeypatch.setattr(workers, "MAX_WAIT", 100_000)


class DyingEnv(ToyEnv):
    """Ends its process in its fifth step."""

    def __init__(self, how):
        super().__init__()
        self.how = how

    def step(self, action):
        if self.calls["step"] == 4:
            if self.how == "raise":
                raise OverflowError("the simulator burst")
            if self.how == "exit":
                os._exit(7)
            if self.how == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
        return super().step(action)


class DyingInResetEnv(ToyEnv):
    def reset(self, *, seed=None, options=None):
        raise OverflowError("no reset")


def envs(how, index=0, start_method="fork"):
    # With "fork", later workers keep the pipes of earlier ones open, so that only the end of the first is noticed
    return SubprocVecEnv([lambda i=i: DyingEnv(how) if i == index else ToyEnv() for i in range(2)], start_method)


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("raise", r"worker 0 of 2 of the SubprocVecEnv ended with exit code 1 .*traceback is above"),
        ("exit", "worker 0 of 2 of the SubprocVecEnv ended with exit code 7"),
        ("kill", "worker 0 of 2 of the SubprocVecEnv was killed by SIGKILL"),
    ],
)
def test_a_dead_worker_is_named_with_how_it_ended(how, said, capfd):
    model = build(VecNormalize(envs(how)), n_steps=16)
    with pytest.raises(DeadWorkerError, match=said) as caught:
        model.learn(96)
    assert isinstance(caught.value.__cause__, EOFError | ConnectionError)
    if how == "raise":
        assert "OverflowError: the simulator burst" in capfd.readouterr().err


def test_any_dead_worker_is_named_with_sb3s_default_start_method():
    model = build(envs("exit", index=1, start_method=None), n_steps=16)
    with pytest.raises(DeadWorkerError, match="worker 1 of 2 of the SubprocVecEnv ended with exit code 7"):
        model.learn(96)


def test_a_worker_that_dies_in_the_first_reset_is_named():
    env = SubprocVecEnv([DyingInResetEnv, ToyEnv], "fork")
    with pytest.raises(DeadWorkerError, match="worker 0 of 2"):
        build(env, n_steps=16).learn(16)


@pytest.mark.filterwarnings("ignore:Training and eval env", "ignore:Evaluation environment is not wrapped")
def test_a_dead_worker_of_an_evaluation_is_named():
    callback = EvalCallback(envs("exit"), eval_freq=8, verbose=0)
    with pytest.raises(DeadWorkerError, match=r"worker 0 of 2 .* exit code 7"):
        build(make_env(2), n_steps=16).learn(96, callback)


def test_resuming_with_a_dead_worker_names_it(tmp_path):
    model = build(make_env(2), n_steps=16)
    model.learn(32, TrainingCheckpoint(1, tmp_path))
    env = SubprocVecEnv([ToyEnv] * 2, "fork")
    env.processes[0].kill()
    env.processes[0].join()
    with pytest.raises(DeadWorkerError, match="worker 0 of 2 of the SubprocVecEnv was killed by SIGKILL"):
        PPOPlus.resume(tmp_path, env, device="cpu")


def test_the_error_holds_nothing_that_only_the_garbage_collector_frees():
    # Python 3.12.1 crashes when it collects the frames of an error that was raised while something was sent
    def errors():
        kinds = (EOFError, ConnectionError, DeadWorkerError)
        return [one for one in gc.get_objects() if issubclass(type(one), kinds)]

    model = build(envs("exit"), n_steps=16)
    gc.collect()
    before = len(errors())
    gc.disable()
    try:
        with suppress(DeadWorkerError):
            model.learn(96)
        assert len(errors()) == before
    finally:
        gc.enable()


class Raises(BaseCallback):
    def _on_step(self):
        raise EOFError("another file's end")


def test_an_end_of_file_from_elsewhere_stays_an_eof_error(monkeypatch):
    monkeypatch.setattr(workers, "MAX_WAIT", 0.01)
    env = SubprocVecEnv([ToyEnv], "fork")
    with pytest.raises(EOFError, match="another file's end"):
        build(env, n_steps=16).learn(16, Raises())
    assert np.isfinite(env.reset()).all()
    env.close()


@pytest.mark.parametrize(
    ("code", "said"), [(-9, "was killed by SIGKILL"), (-40, "was killed by signal 40"), (7, "ended with exit code 7")]
)
def test_every_exit_code_has_words(code, said):
    assert workers.how_it_ended(code) == said
