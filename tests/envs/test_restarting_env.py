import gymnasium as gym
import numpy as np
import pytest
from environments import ToyEnv, make_env, record_logs
from gymnasium import spaces
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv, VecNormalize
from states import assert_same_training

from sb3_ppo_plus import DeadWorkerError, PPOPlus, RestartingEnv

pytestmark = pytest.mark.filterwarnings("ignore:The environment is built anew")


class SimulatorError(Exception):
    pass


class FailingEnv(gym.Env):
    """Counts its steps, and fails where its plan says so. Environments that replace it share the plan."""

    observation_space = spaces.Box(0, 100, (1,), np.float32)
    action_space = spaces.Discrete(2)

    def __init__(self, plan):
        self.plan = plan
        plan.setdefault("made", []).append(self)
        if plan.get("fail_make", 0) and len(plan["made"]) > 1:
            plan["fail_make"] -= 1
            raise SimulatorError("make")

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.plan.setdefault("seeds", []).append(seed)
        if self.plan.get("fail_reset", 0):
            self.plan["fail_reset"] -= 1
            raise SimulatorError("reset")
        self.n_steps = 0
        self.observation = np.zeros(1, np.float32)
        return self.observation, {"begun": True}

    def step(self, action):
        self.n_steps += 1
        # Simulators often write all observations into one array
        self.observation[:] = self.n_steps
        if self.plan.get("fail_at") == self.n_steps:
            self.plan["fail_at"] = self.plan.get("then_fail_at")
            raise SimulatorError("step")
        return self.observation, 1.0, self.n_steps == 50, False, {}

    def close(self):
        self.plan["closed"] = self.plan.get("closed", 0) + 1
        if self.plan.get("fail_close"):
            raise SimulatorError("close")


def restarting(plan, **kwargs):
    return RestartingEnv(lambda: FailingEnv(plan), **kwargs)


def test_without_failures_it_changes_nothing():
    outputs = []
    for env in (ToyEnv(), RestartingEnv(ToyEnv)):
        actions = np.linspace([-0.5, 2.0], [3.0, 2.5], 7, dtype=np.float32)
        outputs.append([env.reset(seed=3), *map(env.step, actions)])
    np.testing.assert_equal(*outputs)


def test_a_failing_step_ends_the_episode_as_truncated_with_the_observation_before_it():
    plan = {"fail_at": 3, "fail_close": True}
    env = restarting(plan)
    env.reset(seed=0)
    env.step(0)
    env.step(0)
    observation, reward, terminated, truncated, info = env.step(0)
    # The environment wrote into its array again before it failed
    assert observation == [2.0] and reward == 0.0 and (terminated, truncated) == (False, True)
    assert info == {"env_restarted": True, "env_error": "SimulatorError: step"}
    assert len(plan["made"]) == 2 and plan["closed"] == 1 and env.n_restarts == 1
    observation, info = env.reset()
    assert observation == [0.0] and info == {"begun": True}
    assert env.step(0)[0] == [1.0]


def test_a_failing_reset_is_tried_in_a_new_environment():
    plan = {"fail_reset": 2}
    env = restarting(plan)
    observation, info = env.reset(seed=0)
    assert observation == [0.0] and info == {"begun": True, "env_restarted": True}
    assert env.n_restarts == 2 and len(plan["made"]) == 3
    assert env.reset()[1] == {"begun": True}


def test_an_environment_that_cannot_be_built_is_tried_again():
    plan = {"fail_at": 1, "fail_make": 2}
    env = restarting(plan)
    env.reset()
    assert env.step(0)[3] is True
    assert env.n_restarts == 3
    env.reset()


def test_new_environments_are_seeded_from_the_first_seed():
    seeds = []
    for _ in range(2):
        plan = {"fail_at": 1, "then_fail_at": 1}
        env = restarting(plan)
        env.reset(seed=5)
        for _ in range(2):
            env.step(0)
            env.reset()
        env.reset()
        seeds.append(plan["seeds"])
    first, second, third, *rest = seeds[0]
    assert seeds[0] == seeds[1] and first == 5 and len({first, second, third}) == 3
    assert isinstance(second, int) and rest == [None]


def test_without_a_seed_new_environments_get_no_seed():
    plan = {"fail_at": 1}
    env = restarting(plan)
    env.reset()
    env.step(0)
    env.reset()
    assert plan["seeds"] == [None, None]


@pytest.mark.parametrize(
    "failure", [{"fail_at": 1, "then_fail_at": 1}, {"fail_reset": 100}, {"fail_make": 100, "fail_at": 1}]
)
def test_past_its_limit_the_environments_own_error_is_raised(failure):
    env = restarting(failure, max_restarts=3)
    with pytest.raises(SimulatorError) as caught:
        for _ in range(5):
            env.reset()
            env.step(0)
    assert env.n_restarts == 3
    assert caught.value.__notes__ == ["RestartingEnv gave up: 3 restarts in the last 3600 seconds"]
    # The traceback ends in the environment
    assert (
        caught.traceback[-1].name in ("step", "reset", "__init__")
        and caught.traceback[-1].path.name == "test_restarting_env.py"
    )


def test_only_restarts_within_the_window_count(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("sb3_ppo_plus.envs.restarting_env.time.time", lambda: now[0])
    env = restarting({"fail_at": 1, "then_fail_at": 1}, max_restarts=1, window=10.0)
    for _ in range(5):
        env.reset()
        assert env.step(0)[3]
        now[0] += 11.0
    env.reset()
    env.step(0)
    now[0] += 9.0
    env.reset()
    with pytest.raises(SimulatorError):
        env.step(0)
    # The clock is set back
    now[0] -= 1000.0
    env.reset()
    env.step(0)


def test_a_step_without_an_episode_is_the_callers_fault():
    env = RestartingEnv(lambda: gym.make("CartPole-v1"))
    with pytest.raises(gym.error.ResetNeeded):
        env.step(0)
    assert env.n_restarts == 0


def test_an_interrupt_is_no_failure():
    class Interrupted(FailingEnv):
        def step(self, action):
            raise KeyboardInterrupt

    env = RestartingEnv(lambda: Interrupted({}))
    env.reset()
    with pytest.raises(KeyboardInterrupt):
        env.step(0)


def test_each_restart_is_warned_of():
    env = restarting({"fail_at": 1})
    env.reset()
    with pytest.warns(UserWarning, match="built anew after SimulatorError: step"):
        env.step(0)


def test_a_new_environment_has_the_spaces_of_the_old():
    made = iter([ToyEnv(), ToyEnv(action_space=spaces.Discrete(2))])
    env = RestartingEnv(lambda: next(made))
    env.reset()
    with pytest.raises(ValueError, match="other spaces"):
        env.step(np.array([9.0, 9.0], np.float32))


@pytest.mark.parametrize(
    ("kwargs", "error"),
    [
        ({"max_restarts": -1}, ValueError),
        ({"max_restarts": 1.5}, ValueError),
        ({"window": 0}, ValueError),
        ({"window": float("nan")}, ValueError),
        ({"make_env": ToyEnv()}, TypeError),
    ],
)
def test_arguments_are_checked(kwargs, error):
    with pytest.raises(error, match=next(iter(kwargs))):
        RestartingEnv(**{"make_env": ToyEnv} | kwargs)


@pytest.mark.parametrize("vec_env_cls", [DummyVecEnv, SubprocVecEnv])
def test_training_goes_on_and_the_log_counts(vec_env_cls):
    def make():
        return RestartingEnv(lambda: FailingEnv({"fail_at": 3, "then_fail_at": 4}))

    vec_env = make_vec_env(make, n_envs=2, vec_env_cls=vec_env_cls)
    model = PPOPlus("MlpPolicy", VecNormalize(vec_env), n_steps=16, batch_size=16, n_epochs=1, device="cpu")
    recorder = record_logs(model)
    model.learn(64)
    assert recorder.dumps[0]["rollout/env_restarts"] > 0
    assert recorder.dumps[-1]["rollout/env_restarts"] == sum(vec_env.get_attr("n_restarts")) >= 4
    assert {"r", "l", "t"} <= set(model.ep_info_buffer[0])
    vec_env.close()


def test_in_a_worker_process_it_restarts_as_in_the_main_process():
    def make():
        return Monitor(RestartingEnv(lambda: FailingEnv({"fail_at": 3, "then_fail_at": 4})))

    models = []
    for vec_env in (DummyVecEnv([make] * 2), SubprocVecEnv([make] * 2, "fork")):
        models.append(PPOPlus("MlpPolicy", vec_env, n_steps=16, batch_size=16, n_epochs=1, seed=0, device="cpu"))
        models[-1].learn(64)
        assert min(vec_env.get_attr("n_restarts")) >= 2
        vec_env.close()
    assert_same_training(*models)


def test_past_its_limit_in_a_worker_process_the_worker_is_named(capfd):
    env = SubprocVecEnv([lambda: restarting({"fail_at": 1, "then_fail_at": 1}, max_restarts=2)], "fork")
    model = PPOPlus("MlpPolicy", env, n_steps=16, batch_size=16, device="cpu")
    with pytest.raises(DeadWorkerError, match=r"worker 0 of 1 .* exit code 1"):
        model.learn(16)
    said = capfd.readouterr().err
    assert "SimulatorError: step" in said and "RestartingEnv gave up: 2 restarts" in said


def test_a_worker_process_may_be_started_anew_where_it_gives_up():
    env = SubprocVecEnv([lambda: restarting({"fail_at": 3, "then_fail_at": 3}, max_restarts=1)], "fork")
    model = PPOPlus("MlpPolicy", env, n_steps=8, batch_size=8, n_epochs=1, device="cpu", restart_workers=3)
    recorder = record_logs(model)
    with pytest.warns(UserWarning, match="worker 0 of 1 of the SubprocVecEnv ended with exit code 1"):
        model.learn(16)
    # Each process has one of its own, and gives up in its sixth step. The last process is in its first episode
    counts = [dump["rollout/env_restarts"] for dump in recorder.dumps]
    assert counts == sorted(counts) and counts[-1] >= 2
    env.close()


def test_the_value_of_the_last_good_observation_is_bootstrapped():
    plan = {"fail_at": 4}
    env = DummyVecEnv([lambda: Monitor(restarting(plan))])
    model = PPOPlus("MlpPolicy", env, n_steps=8, batch_size=8, n_epochs=1, device="cpu", gamma=0.5)
    value = model.policy.predict_values(model.policy.obs_to_tensor(np.array([3.0], np.float32))[0]).item()
    model.learn(8)
    assert model.rollout_buffer.rewards[3, 0] == pytest.approx(0.5 * value)
    assert model.rollout_buffer.rewards[[0, 1, 2, 4], 0] == pytest.approx(1.0)
    assert model.rollout_buffer.episode_starts.ravel().tolist() == [1, 0, 0, 0, 1, 0, 0, 0]


def test_without_a_restarting_env_no_restarts_are_logged():
    model = PPOPlus("MlpPolicy", make_env(), n_steps=8, batch_size=8, n_epochs=1, device="cpu")
    recorder = record_logs(model)
    model.learn(16)
    assert recorder.dumps and not any("rollout/env_restarts" in dump for dump in recorder.dumps)
