"""Workers that hang or die are started anew."""

import os
import signal
import types
import warnings
from pathlib import Path

import numpy as np
import pytest
from environments import ToyEnv, make_env, record_logs
from faulty_workers import LONG, SHORT, FaultyEnv, build_watched, faulty_envs, is_running
from gymnasium import spaces
from stable_baselines3.common.callbacks import BaseCallback, EvalCallback
from stable_baselines3.common.monitor import Monitor, load_results
from stable_baselines3.common.vec_env import SubprocVecEnv, VecNormalize, subproc_vec_env
from states import assert_same_training

from sb3_ppo_plus import DeadWorkerError, HangingWorkerError, TrainingCheckpoint
from sb3_ppo_plus.envs import watched_remote
from sb3_ppo_plus.envs.worker_watch import WorkerWatch

pytestmark = pytest.mark.filterwarnings("ignore:worker . of . of the SubprocVecEnv")

KINDS = {"hang": {"worker_timeout": SHORT}, "kill": {}, "raise": {}}
ACTIONS = np.array([[0.0, 2.2]] * 3, np.float32)


@pytest.fixture
def faulty(tmp_path):
    """Make environments of which one is faulty, and close them at the end."""
    envs = []

    def make(kind="kill", **kwargs):
        envs.append(faulty_envs(tmp_path, kind, **kwargs))
        return envs[-1]

    yield make
    for env in envs:
        env.close()


def watching(env, max_restarts=1, timeout=None, seed=None):
    return WorkerWatch(env, timeout, max_restarts, seed)


@pytest.mark.parametrize(
    ("kind", "start_method"),
    [
        *((kind, "fork") for kind in KINDS),
        ("hang", "forkserver"),
        *(pytest.param(kind, "spawn", marks=pytest.mark.heavy) for kind in KINDS),
    ],
)
def test_training_goes_on_with_a_new_worker(faulty, kind, start_method):
    env = faulty(kind, start_method=start_method)
    before = [process.pid for process in env.processes]
    model = build_watched(VecNormalize(env), restart_workers=1, **KINDS[kind])
    recorder = record_logs(model)
    with pytest.warns(UserWarning, match="worker 1 of 3 .* started anew, for restart 1 of restart_workers=1"):
        model.learn(96)
    assert model.num_timesteps == 96
    assert recorder.dumps[-1]["rollout/env_restarts"] == 1
    after = [process.pid for process in env.processes]
    assert [old == new for old, new in zip(before, after, strict=True)] == [True, False, True]
    assert not is_running(before[1])
    assert type(env.processes[1]) is type(env.processes[0])
    env.close()
    assert not any(map(is_running, after))


def test_a_step_that_fails_ends_the_episode_as_truncated_and_begins_the_next_one(faulty):
    env = faulty()
    env.seed(5)
    with watching(env):
        env.reset()
        for _ in range(4):
            last, _, dones, _ = env.step(ACTIONS)
        # Its fifth step. Its seed makes the first episode longer
        assert not dones[1]
        observations, rewards, dones, infos = env.step(ACTIONS)
    assert rewards[1] == 0.0 and dones[1]
    info = infos[1]
    np.testing.assert_array_equal(info.pop("terminal_observation"), last[1])
    assert info == {
        "TimeLimit.truncated": True,
        "env_restarted": True,
        "env_error": "worker 1 of 3 of the SubprocVecEnv was killed by SIGKILL",
    }
    assert env.reset_infos[1] == {}
    seed = int(np.random.default_rng(6).integers(2**31))
    np.testing.assert_array_equal(observations[1], ToyEnv().reset(seed=seed)[0])
    assert env.get_attr("calls")[1] == {"reset": 1}


def test_a_reset_that_fails_is_done_by_a_new_worker_with_another_seed_and_the_same_options(faulty, tmp_path):
    env = faulty(place="reset", times=2)
    env.seed(5)
    with watching(env, 2):
        env.reset()
    drawn = np.random.default_rng(6).integers(2**31, size=2)
    assert (tmp_path / "seeds").read_text().split() == ["6", *map(str, drawn)]
    assert env.reset_infos == ({}, {"env_restarted": True}, {})


def test_another_command_is_given_again_and_the_next_step_ends_the_episode(faulty):
    env = faulty("hang", place="set_level")
    with watching(env, timeout=SHORT):
        env.reset()
        last = env.step(ACTIONS)[0]
        old = env.processes[1].pid
        assert env.env_method("set_level", 3, indices=[1]) == [(3, env.processes[1].pid)]
        assert env.processes[1].pid != old
        observations, rewards, dones, infos = env.step(ACTIONS)
        assert dones[1] and rewards[1] == 0.0
        np.testing.assert_array_equal(infos[1]["terminal_observation"], last[1])
        assert "set_level" in infos[1]["env_error"]
        # The new environment has its own reset, and none of its steps was lost
        assert env.get_attr("calls")[1] == {"reset": 1}
        np.testing.assert_array_equal(observations[1], env.get_attr("observation")[1])
        assert "env_restarted" not in env.step(ACTIONS)[3][1]


def test_a_reset_after_such_a_command_begins_the_episode(faulty):
    env = faulty(place="set_level")
    with watching(env):
        env.reset()
        env.env_method("set_level", 3, indices=[1])
        env.reset()
        assert "env_restarted" not in env.step(ACTIONS)[3][1]


def test_what_is_known_of_an_episode_is_kept_until_the_next_learn(faulty):
    env = faulty()
    with watching(env):
        env.reset()
        for _ in range(4):
            last = env.step(ACTIONS)[0]
    with watching(env):
        infos = env.step(ACTIONS)[3]
    np.testing.assert_array_equal(infos[1]["terminal_observation"], last[1])


def test_equal_seeds_give_equal_trainings_after_a_restart(tmp_path):
    models = []
    for name in "ab":
        (tmp_path / name).mkdir()
        env = faulty_envs(tmp_path / name, "kill", times=2)
        models.append(build_watched(env, restart_workers=2).learn(96))
        env.close()
    assert_same_training(*models)


def test_a_worker_that_was_never_given_a_seed_gets_one_of_the_models(faulty, tmp_path):
    env = faulty()
    env.reset()
    with watching(env, seed=3):
        for _ in range(5):
            env.step(ACTIONS)
    *before, last = (tmp_path / "seeds").read_text().split()
    # Episodes may have ended before
    assert set(before) == {"None"} and last == str(np.random.default_rng([3, 1]).integers(2**31))


@pytest.mark.parametrize(("kind", "error"), [("hang", HangingWorkerError), ("kill", DeadWorkerError)])
@pytest.mark.parametrize("place", ["step", "reset"])
def test_past_its_limit_the_error_names_the_worker(faulty, kind, error, place):
    env = faulty(kind, place=place, times=100)
    pids = [process.pid for process in env.processes]
    model = build_watched(env, restart_workers=2, **KINDS[kind])
    said = "worker 1 of 3 .*; restart_workers=2, and as many workers were started anew before"
    with pytest.raises(error, match=said):
        model.learn(96)
    assert not any(map(is_running, [*pids, *(process.pid for process in env.processes)]))


def test_the_limit_is_one_of_each_learn_and_the_log_counts_all():
    env = SubprocVecEnv([ToyEnv] * 2, "fork")

    class Kills(BaseCallback):
        def _on_training_start(self):
            os.kill(env.processes[0].pid, signal.SIGKILL)

        def _on_step(self):
            return True

    model = build_watched(env, restart_workers=1)
    recorder = record_logs(model)
    for _ in range(3):
        model.learn(32, Kills())
    assert recorder.dumps[-1]["rollout/env_restarts"] == 3
    env.close()


@pytest.mark.parametrize("kind", ["hang", "raise"])
def test_a_new_worker_that_does_not_start_is_started_again(faulty, tmp_path, monkeypatch, kind):
    monkeypatch.setattr(watched_remote, "MAX_START", 2 * SHORT)
    env = faulty(kind, place="make")
    (tmp_path / "armed").touch()
    with watching(env, 2, SHORT), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        env.reset()
        os.kill(env.processes[1].pid, signal.SIGKILL)
        assert env.step(ACTIONS)[3][1]["env_restarted"]
    said = "has not answered for 2 seconds, at its start" if kind == "hang" else "exit code 1"
    # Newer Pythons also warn of forks of a process with threads
    messages = [str(warning.message) for warning in caught if warning.category is UserWarning]
    assert len(messages) == 2 and said in messages[1]


class OtherSpaces(ToyEnv):
    """Has another action space in every process but the first.

    :param mark: a file that the first makes
    """

    def __init__(self, mark):
        is_first = not Path(mark).exists()
        Path(mark).touch()
        super().__init__(**{} if is_first else {"action_space": spaces.Discrete(2)})


def test_a_new_environment_has_the_spaces_of_the_old(tmp_path):
    env = SubprocVecEnv([ToyEnv, lambda: OtherSpaces(tmp_path / "mark")], "fork")
    with watching(env), pytest.raises(ValueError, match=r"worker 1 of 2 .* has other spaces: .*Discrete"):
        env.reset()
        os.kill(env.processes[1].pid, signal.SIGKILL)
        env.step(ACTIONS[:2])
    assert not any(process.is_alive() for process in env.processes)
    env.close()


def test_a_function_that_cannot_be_pickled_is_refused_before_the_first_step():
    unpicklable = (number for number in range(3))
    env = SubprocVecEnv([ToyEnv, lambda: ToyEnv(max_steps=7 if unpicklable else 8)], "fork")
    model = build_watched(env, restart_workers=1)
    with pytest.raises(
        ValueError, match=r"restart_workers must be 0 .* environment 1 cannot be pickled: TypeError: .*generator"
    ):
        model.learn(16)
    assert env.get_attr("calls") == [{}, {}]
    env.close()


def test_workers_that_are_not_sb3s_are_refused(monkeypatch):
    sb3s = subproc_vec_env._worker
    own = types.FunctionType(sb3s.__code__.replace(co_name="own"), sb3s.__globals__)
    monkeypatch.setattr(subproc_vec_env, "_worker", own)
    env = SubprocVecEnv([ToyEnv], "fork")
    monkeypatch.undo()
    with pytest.raises(ValueError, match=r"restart_workers must be 0 .* worker 0 does not run SB3's _worker"):
        build_watched(env, restart_workers=1).learn(16)
    assert env.get_attr("calls") == [{}]
    env.close()


@pytest.mark.filterwarnings("ignore:Training and eval env", "ignore:Evaluation environment is not wrapped")
@pytest.mark.parametrize("kind", KINDS)
def test_a_worker_of_an_evaluation_is_not_started_anew_but_named(faulty, kind):
    """An episode that its worker's end has cut short would count in the mean reward."""
    env = faulty(kind)
    model = build_watched(make_env(2), restart_workers=1, **KINDS[kind])
    with pytest.raises(DeadWorkerError, match=r"worker 1 of 3"):
        model.learn(32, EvalCallback(env, eval_freq=8, verbose=0))
    assert not any(process.is_alive() for process in env.processes)


@pytest.mark.filterwarnings("ignore:Training and eval env", "ignore:Evaluation environment is not wrapped")
def test_restarts_are_not_counted_where_only_an_evaluation_has_workers(faulty):
    model = build_watched(make_env(2), restart_workers=1)
    recorder = record_logs(model)
    model.learn(32, EvalCallback(faulty(times=0), eval_freq=8, verbose=0))
    assert recorder.dumps and not any("rollout/env_restarts" in dump for dump in recorder.dumps)


@pytest.mark.parametrize("override_existing", [True, False])
def test_the_file_of_a_monitor_is_continued(tmp_path, override_existing):
    def make():
        return Monitor(FaultyEnv("kill", tmp_path, times=2), str(tmp_path / "0"), override_existing=override_existing)

    (tmp_path / "0.monitor.csv").write_text('#{"t_start": 0.0, "env_id": "None"}\nr,l,t\n')
    env = SubprocVecEnv([make], "fork")
    with watching(env, 2):
        env.seed(0)
        env.reset()
        infos = [env.step(ACTIONS[:1])[3][0] for _ in range(40)]
    lengths = [info["episode"]["l"] for info in infos if "episode" in info]
    assert sum("env_restarted" in info for info in infos) == 2
    assert (tmp_path / "0.monitor.csv").read_text().count("#") == 1
    results = load_results(str(tmp_path))
    assert results["l"].tolist() == lengths and len(lengths) >= 4
    # Times are counted from the first process on
    times = [info["episode"]["t"] for info in infos if "episode" in info]
    assert times == sorted(times)
    if not override_existing:
        # Then the file says that it begins at the zero of time
        assert min(times[2:]) > 1e9
    env.close()


def test_a_monitor_without_a_file_so_far_writes_its_header(tmp_path):
    def make():
        return Monitor(ToyEnv(), str(tmp_path / str(os.getpid())))

    env = SubprocVecEnv([make], "fork")
    with watching(env):
        env.reset()
        os.kill(env.processes[0].pid, signal.SIGKILL)
        env.step(ACTIONS[:1])
    texts = [(tmp_path / f"{env.processes[0].pid}.monitor.csv").read_text().splitlines()]
    assert [text[1] for text in texts] == ["r,l,t"]
    env.close()


class KillsThenSignals(BaseCallback):
    """Kills a worker in the first rollout, and sends a signal to its successor in the second."""

    def __init__(self, env, number):
        super().__init__()
        self.env, self.number = env, number

    def _on_rollout_start(self):
        number = signal.SIGKILL if self.num_timesteps == 0 else self.number
        os.kill(self.env.processes[1].pid, number)

    def _on_step(self):
        return True


@pytest.mark.parametrize(
    ("start_method", "number"),
    [("fork", signal.SIGINT), ("fork", signal.SIGTERM), ("forkserver", signal.SIGTERM), ("fork", signal.SIGUSR1)],
)
def test_new_workers_ignore_the_signals_that_the_others_ignore(tmp_path, start_method, number):
    env = SubprocVecEnv([ToyEnv] * 2, start_method)
    model = build_watched(env, restart_workers=1)
    model.learn(64, [TrainingCheckpoint(1, tmp_path), KillsThenSignals(env, number)])
    assert model.num_timesteps == 64
    env.close()


def test_a_forked_new_worker_ends_at_sigterm_although_its_main_process_handles_it():
    env = SubprocVecEnv([ToyEnv] * 2, "fork")
    model = build_watched(env, restart_workers=1)
    before = signal.signal(signal.SIGTERM, lambda *_: None)
    try:
        with pytest.raises(DeadWorkerError, match="worker 1 of 2 of the SubprocVecEnv was killed by SIGTERM"):
            model.learn(64, KillsThenSignals(env, signal.SIGTERM))
    finally:
        signal.signal(signal.SIGTERM, before)


def test_the_value_of_the_last_observation_is_bootstrapped(faulty):
    env = faulty(n_envs=2)
    model = build_watched(env, restart_workers=1, gamma=0.5)
    model.learn(16)
    buffer = model.rollout_buffer
    last = model.policy.obs_to_tensor(buffer.observations[4, 1])[0]
    fresh = build_watched(make_env(2))
    assert buffer.rewards[4, 1] == pytest.approx(0.5 * fresh.policy.predict_values(last).item(), abs=1e-6)
    assert buffer.episode_starts[5, 1]


def test_a_crash_under_a_time_limit_is_no_hang(faulty):
    env = faulty()
    model = build_watched(env, restart_workers=1, worker_timeout=LONG)
    with pytest.warns(UserWarning, match="was killed by SIGKILL: it is started anew"):
        model.learn(48)
