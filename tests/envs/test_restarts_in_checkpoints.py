"""Workers that were started anew, in runs that are resumed."""

import os
import signal

import numpy as np
import pytest
from environments import BOX, SMALL_DICT, ToyEnv
from faulty_workers import FaultyEnv, build_watched
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv, VecNormalize
from states import assert_same_bits, state_of

from sb3_ppo_plus import PPOPlus, ResumableEnv, TrainingCheckpoint
from sb3_ppo_plus.env_states.vec_env_state import set_vec_env_state, vec_env_state
from sb3_ppo_plus.envs.worker_watch import WorkerWatch

pytestmark = pytest.mark.filterwarnings("ignore:worker . of . of the SubprocVecEnv")

ACTIONS = np.array([[0.0, 2.2]] * 2, np.float32)


def watching(env, max_restarts=1):
    return WorkerWatch(env, None, max_restarts, None)


def test_a_run_that_is_resumed_after_a_restart_has_the_bits_of_one_that_is_not(tmp_path):
    def make_envs():
        return SubprocVecEnv(
            [lambda: ResumableEnv(FaultyEnv("kill", tmp_path)), lambda: ResumableEnv(ToyEnv())], "fork"
        )

    env = make_envs()
    model = build_watched(env, restart_workers=1)
    model.learn(96, TrainingCheckpoint(1, tmp_path / "runs", keep_last=10))
    env.close()
    assert (tmp_path / "fault0").exists()
    (half_way,) = (tmp_path / "runs").glob("*48*")
    env = make_envs()
    resumed = PPOPlus.resume(half_way, env, device="cpu").continue_learning()
    assert resumed.num_timesteps == 96 and resumed.restart_workers == 1
    assert_same_bits(state_of(resumed), state_of(model))
    env.close()


def test_a_run_without_restarts_may_go_on_with_them(tmp_path):
    def make_envs(times):
        makers = [lambda: ResumableEnv(FaultyEnv("kill", tmp_path, "reset", times=times), constant=["times"])] * 2
        return SubprocVecEnv(makers, "fork")

    env = make_envs(times=0)
    build_watched(env).learn(48, TrainingCheckpoint(1, tmp_path / "runs"))
    env.close()
    env = make_envs(times=1)
    resumed = PPOPlus.resume(tmp_path / "runs", env, device="cpu", restart_workers=3)
    assert resumed.learn(48, reset_num_timesteps=False).num_timesteps == 96
    assert (tmp_path / "fault0").exists()
    env.close()


class KillsInUpdates(BaseCallback):
    """Kills worker 0 at the end of some updates, before a TrainingCheckpoint asks it for its state."""

    def __init__(self, env, at):
        super().__init__()
        self.env, self.at = env, at

    def _on_step(self):
        return True

    def on_update_end(self):
        if self.num_timesteps in self.at:
            os.kill(self.env.processes[0].pid, signal.SIGKILL)
            self.env.processes[0].join()
        return True


@pytest.mark.filterwarnings("ignore:without trust these parts")
@pytest.mark.parametrize("trusted", [True, False])
@pytest.mark.parametrize("observation_space", ["box", "dict"])
@pytest.mark.parametrize("is_outside", [False, True])
def test_a_checkpoint_that_discovers_a_dead_worker_ends_its_episode_in_the_resumed_run_too(
    tmp_path, trusted, observation_space, is_outside
):
    space = BOX if observation_space == "box" else SMALL_DICT

    def make():
        # A Monitor outside is asked after the ResumableEnv
        env = ResumableEnv(ToyEnv(space))
        return Monitor(env) if is_outside else env

    def make_envs():
        return VecNormalize(SubprocVecEnv([make] * 2, "fork"), norm_obs_keys=None if space is BOX else ["vector"])

    env = make_envs()
    policy = {} if space is BOX else {"policy": "MultiInputPolicy"}
    model = build_watched(env, restart_workers=2, **policy)
    # The second time, the restart takes the next of the seeds
    callbacks = [TrainingCheckpoint(1, tmp_path, keep_last=10), KillsInUpdates(env.venv, {48, 80})]
    model.learn(96, callbacks)
    env.close()
    (half_way,) = tmp_path.glob("*48*")
    env = make_envs()
    resumed = PPOPlus.resume(half_way, env, device="cpu", trusted=trusted)
    assert resumed.num_timesteps == 48
    resumed.continue_learning([KillsInUpdates(env.venv, {80})])
    assert_same_bits(state_of(resumed), state_of(model))
    env.close()


def test_a_worker_that_dies_between_two_questions_of_a_checkpoint_is_asked_both_again(monkeypatch):
    env = SubprocVecEnv([lambda: Monitor(ResumableEnv(ToyEnv()))] * 2, "fork")
    ask, asked = env.env_method, []

    def ask_then_kill(name, *args, **kwargs):
        answers = ask(name, *args, **kwargs)
        asked.append(name)
        if asked.count("get_resume_state_or_tell") == 1 and name == "get_resume_state_or_tell":
            env.processes[0].kill()
            env.processes[0].join()
        return answers

    monkeypatch.setattr(env, "env_method", ask_then_kill)
    with watching(env):
        env.reset()
        env.step(ACTIONS)
        state = vec_env_state(env)
        now = ask("get_resume_state")
    observations = [dict(one["layers"])["ToyEnv"]["observation"] for one in (state["envs"][0], now[0])]
    np.testing.assert_equal(*observations)
    np.testing.assert_equal(state["workers"][0]["begun"], observations[0][1])
    assert state["attributes"]["rewards"][0] == []
    env.close()


@pytest.mark.parametrize("restart_workers", [0, 1])
def test_the_end_of_an_episode_that_a_checkpoint_has_found_comes_whatever_restart_workers_is_later(restart_workers):
    env = SubprocVecEnv([lambda: ResumableEnv(ToyEnv())] * 2, "fork")
    with watching(env):
        env.reset()
        last = env.step(ACTIONS)[0]
        env.processes[0].kill()
        state = vec_env_state(env)
    env.close()
    env = SubprocVecEnv([lambda: ResumableEnv(ToyEnv())] * 2, "fork")
    with watching(env, restart_workers):
        set_vec_env_state(env, state)
    with watching(env, restart_workers):
        observations, _, dones, infos = env.step(ACTIONS)
        assert dones[0] and infos[0]["env_restarted"] and "SIGKILL" in infos[0]["env_error"]
        np.testing.assert_array_equal(infos[0]["terminal_observation"], last[0])
        np.testing.assert_array_equal(observations, env.get_attr("observation"))
        assert "env_restarted" not in env.step(ACTIONS)[3][0]
    env.close()


def test_other_environments_than_a_subproc_vec_env_warn_that_two_episodes_become_one():
    env = SubprocVecEnv([lambda: ResumableEnv(ToyEnv())], "fork")
    with watching(env):
        env.reset()
        env.processes[0].kill()
        state = vec_env_state(env)
    env.close()
    with pytest.warns(UserWarning, match="its episode and the next one become one"):
        set_vec_env_state(DummyVecEnv([lambda: ResumableEnv(ToyEnv())]), state)


def test_without_trust_observations_of_another_shape_are_left_out():
    env = SubprocVecEnv([lambda: ResumableEnv(ToyEnv())], "fork")
    with watching(env):
        env.reset()
        env.processes[0].kill()
        state = vec_env_state(env)
        state["workers"][0]["begun"] = np.zeros(9, np.float32)
        with pytest.warns(UserWarning, match="begun of a worker"):
            set_vec_env_state(env, state, trusted=False)
        assert "env_restarted" not in env.step(ACTIONS[:1])[3][0]
    env.close()
