"""The proof that ResumableEnv gives of itself before training."""

import ale_py
import gymnasium as gym
import numpy as np
import pandas
import pytest
from environments import MASKED_ACTION_SPACES, MaskedEnv, MaskInObservation, ToyEnv
from gymnasium import wrappers
from interrupted_runs import StopAfter, interrupted, make_envs
from models import build
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv, VecNormalize
from states import assert_same_bits, encoded, state_of

import sb3_ppo_plus.env_states.proof as proof
from sb3_ppo_plus import CheckpointError, PPOPlus, ResumableEnv, ResumeProofError, TrainingCheckpoint

gym.register_envs(ale_py)


class Counting(ToyEnv):
    """Counts its steps where no attribute shows it, and may look at the number."""

    def __init__(self, looks=False):
        super().__init__()
        self.looks = looks

    def step(self, action):
        N_STEPS.append(0)
        observation, reward, *rest = super().step(action)
        return observation, reward + len(N_STEPS) * self.looks, *rest


N_STEPS = []


class Raising(ToyEnv):
    """Raises at every action of the proof."""

    is_ready = False

    def switch_on(self):
        self.is_ready = True

    def step(self, action):
        if not self.is_ready:
            raise RuntimeError("the motor is off")
        return super().step(action)


def trained(folder, make, vec_env_cls, normalize, **kwargs):
    """Train with a TrainingCheckpoint; return the parameters, and the columns of monitor.csv but for the time."""
    n_envs = 2
    env = make_vec_env(
        make,
        n_envs,
        seed=0,
        monitor_dir=str(folder),
        wrapper_class=ResumableEnv,
        wrapper_kwargs=kwargs,
        vec_env_cls=vec_env_cls,
    )
    env = VecNormalize(env, norm_obs=True) if normalize else env
    model = build(env, n_steps=64, batch_size=32)
    model.learn(384, TrainingCheckpoint(10**6, folder / "checkpoints"))
    env.close()
    episodes = [pandas.read_csv(folder / f"{index}.monitor.csv", skiprows=1)[["r", "l"]] for index in range(n_envs)]
    return state_of(model), [part.to_numpy() for part in episodes]


@pytest.mark.parametrize(
    "make, vec_env_cls, normalize",
    [
        ("CartPole-v1", DummyVecEnv, False),
        ("CartPole-v1", SubprocVecEnv, True),
        (lambda: gym.make("HalfCheetah-v5", max_episode_steps=50), DummyVecEnv, True),
        (lambda: gym.make("ALE/Pong-v5", obs_type="ram", max_episode_steps=60), DummyVecEnv, False),
    ],
    ids=["classic", "workers", "mujoco", "atari"],
)
def test_it_changes_no_bit_of_training_and_no_line_of_monitor_files(tmp_path, make, vec_env_cls, normalize):
    results = []
    for prove in (True, False):
        folder = tmp_path / str(prove)
        folder.mkdir()
        results.append(trained(folder, make, vec_env_cls, normalize, prove=prove))
    assert_same_bits(*results)
    assert all(len(episodes) > 0 for episodes in results[0][1])


@pytest.mark.parametrize("env_id", ["LunarLander-v3", "BipedalWalker-v3"])
def test_box2d_is_an_error_before_the_first_step(tmp_path, env_id):
    model = build(make_vec_env(env_id, 1, wrapper_class=ResumableEnv), n_steps=8, batch_size=8)
    with pytest.raises(TypeError, match=r"(LunarLander|BipedalWalker)\..* is a Box2D.*constant="):
        model.learn(8, TrainingCheckpoint(1, tmp_path))
    assert model.num_timesteps == 0


def test_it_takes_steps_in_each_environment_unless_it_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(proof, "MAX_SECONDS", np.inf)
    monkeypatch.setattr(proof, "MAX_SECONDS_OF_ALL", np.inf)
    for prove, expected in ((True, 2 * 2 * sum(proof.N_STEPS)), (False, 0)):
        N_STEPS.clear()
        env = make_vec_env(Counting, 2, wrapper_class=ResumableEnv, wrapper_kwargs={"prove": prove})
        model = build(env, n_steps=8, batch_size=8)
        model.learn(16, [TrainingCheckpoint(1, tmp_path / str(prove)), StopAfter(16)])
        assert len(N_STEPS) == expected + 16


def test_a_continued_run_begins_with_it_too(tmp_path):
    interrupted(tmp_path)
    resumed = PPOPlus.resume(tmp_path, make_envs(), device="cpu")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sb3_ppo_plus.env_states.proof.first_difference", lambda *_: "something differs")
        with pytest.raises(ResumeProofError, match=r"environment 0: saved and put back, .*something differs"):
            resumed.continue_learning(TrainingCheckpoint(1, tmp_path))


@pytest.mark.parametrize("vec_env_cls", [DummyVecEnv, SubprocVecEnv])
def test_an_environment_that_goes_on_in_another_way_is_an_error_before_the_first_step(tmp_path, vec_env_cls):
    env = make_vec_env(Counting, 2, env_kwargs={"looks": True}, wrapper_class=ResumableEnv, vec_env_cls=vec_env_cls)
    model = build(env, n_steps=8, batch_size=8)
    message = r"environment 0: .* at step 1, the outcome\['reward'\] is .*get_resume_state\(\).*prove=False"
    with pytest.raises(ResumeProofError, match=message) as raised:
        model.learn(16, TrainingCheckpoint(1, tmp_path))
    assert isinstance(raised.value, CheckpointError)
    assert model.num_timesteps == 0
    # The workers live
    env.reset()
    env.close()


@pytest.mark.parametrize("vec_env_cls", [DummyVecEnv, SubprocVecEnv])
def test_an_environment_that_raises_at_random_actions_is_one_warning(tmp_path, vec_env_cls):
    env = make_vec_env(Raising, 2, wrapper_class=ResumableEnv, vec_env_cls=vec_env_cls)
    model = build(env, n_steps=8, batch_size=8)

    class Ready(TrainingCheckpoint):
        def _on_rollout_start(self):
            self.training_env.env_method("switch_on")

    with pytest.warns(UserWarning, match="environment 0: .*RuntimeError: the motor is off.*prove=False") as warned:
        model.learn(16, Ready(1, tmp_path))
    assert sum("motor" in str(warning.message) for warning in warned) == 1
    assert model.num_timesteps == 16
    env.close()


def test_it_leaves_no_trace(tmp_path):
    def make():
        env = Monitor(gym.make("CartPole-v1", render_mode="rgb_array"), str(tmp_path / "m"), allow_early_resets=False)
        env = wrappers.RecordVideo(env, str(tmp_path / "video"), episode_trigger=lambda episode: episode < 100)
        return ResumableEnv(env)

    env = make()
    env.reset(seed=0)
    env.action_space.seed(0)
    for _ in range(3):
        env.step(env.action_space.sample())
    recorder = env.env
    frames, before = list(recorder.recorded_frames), encoded(env.get_resume_state())
    monitor_before = (tmp_path / "m.monitor.csv").read_bytes()
    assert len(frames) == 4
    np.random.seed(1)
    random_before = np.random.get_state()[1].copy()
    before = encoded(env.get_resume_state())

    assert env.prove_resumable() is None

    assert encoded(env.get_resume_state()) == before
    assert (np.random.get_state()[1] == random_before).all()
    assert (tmp_path / "m.monitor.csv").read_bytes() == monitor_before
    assert list((tmp_path / "video").iterdir()) == []
    assert recorder.recording and all(a is b for a, b in zip(recorder.recorded_frames, frames, strict=True))
    monitor = env.get_wrapper_attr("results_writer")
    assert monitor is not None and env.get_wrapper_attr("allow_early_resets") is False
    env.close()


@pytest.mark.parametrize("wrap", [lambda env: env, MaskInObservation], ids=["method", "observation"])
@pytest.mark.parametrize("kind", MASKED_ACTION_SPACES)
def test_it_takes_valid_actions_alone(kind, wrap):
    env = ResumableEnv(wrap(MaskedEnv(MASKED_ACTION_SPACES[kind])))
    env.reset(seed=0)
    # MaskedEnv raises at others
    assert env.prove_resumable() is None
    assert len(env.unwrapped.actions) == 0


def test_a_mujoco_model_that_changes_is_saved_and_is_as_before_afterwards():
    class RandomMass(gym.Wrapper):
        def reset(self, **kwargs):
            result = super().reset(**kwargs)
            self.unwrapped.model.body_mass[1] = self.unwrapped.np_random.uniform(1, 5)
            return result

    env = ResumableEnv(RandomMass(gym.make("HalfCheetah-v5")))
    env.reset(seed=0)
    mass = env.unwrapped.model.body_mass.copy()
    assert env.prove_resumable() is None
    assert np.array_equal(env.unwrapped.model.body_mass, mass)


class OfCurriculum(ToyEnv):
    """Appends to a list that it may share."""

    def __init__(self, log):
        super().__init__()
        self.log = log

    def step(self, action):
        self.log.append(len(self.log))
        return super().step(action)


def test_what_environments_share_and_change_is_one_warning_and_stays_shared():
    log = [0, 1]
    env = make_vec_env(lambda: OfCurriculum(log), 3, wrapper_class=ResumableEnv)
    env.reset()
    with pytest.warns(UserWarning, match=r"environment 0: steps change \[0, 1.*another environment holds") as warned:
        proof.prove_envs(env)
    assert sum("another environment" in str(warning.message) for warning in warned) == 1
    assert log == [0, 1]
    assert all(each is log for each in env.get_attr("log"))


def test_what_environments_share_and_do_not_change_is_no_warning(recwarn):
    words = ["a list", "that stays"]
    env = make_vec_env(ToyEnv, 2, wrapper_class=ResumableEnv)
    for each in env.envs:
        each.unwrapped.words = words
    env.reset()
    proof.prove_envs(env)
    assert [warning for warning in recwarn if "another environment" in str(warning.message)] == []


@pytest.mark.parametrize(
    "make",
    [
        lambda: gym.make("HalfCheetah-v5"),
        lambda: wrappers.FrameStackObservation(gym.make("Pendulum-v1"), 3),
        lambda: ToyEnv(),
    ],
    ids=["mujoco", "stack", "toy"],
)
def test_attributes_are_the_same_objects_as_before(make):
    env = ResumableEnv(Monitor(make()))
    env.reset(seed=0)
    env.step(env.action_space.sample())
    before = [dict(vars(layer)) for layer in env.resumable_layers()]
    assert env.prove_resumable() is None
    for layer, attributes in zip(env.resumable_layers(), before, strict=True):
        assert vars(layer).keys() == attributes.keys()
        assert [name for name, value in vars(layer).items() if value is not attributes[name]] == []


def test_a_slow_environment_takes_fewer_steps(monkeypatch):
    monkeypatch.setattr(proof, "MAX_SECONDS", 0.0)
    N_STEPS.clear()
    env = ResumableEnv(Counting())
    env.reset(seed=0)
    assert env.prove_resumable() is None
    assert len(N_STEPS) == 4


class Clock:
    """Stands for the module ``time``: its seconds are those that steps say they take."""

    seconds = 0.0

    @classmethod
    def perf_counter(cls):
        return cls.seconds


class Slow(ToyEnv):
    """A step takes some seconds of :class:`Clock`."""

    def __init__(self, seconds):
        super().__init__()
        self.seconds = seconds

    def step(self, action):
        Clock.seconds += self.seconds
        N_STEPS.append(self.seconds)
        return super().step(action)


@pytest.mark.parametrize("seconds, n_first, n_last", [(2**-7, 60, 60), (2**-5, 60, 22), (1.0, 6, 4)])
def test_environments_of_one_process_share_a_budget(monkeypatch, seconds, n_first, n_last, recwarn):
    monkeypatch.setattr(proof, "time", Clock)
    monkeypatch.setattr(Clock, "seconds", 0.0)
    env = make_vec_env(lambda: Slow(seconds), 12, wrapper_class=ResumableEnv)
    env.reset()
    counts = []
    monkeypatch.setattr(ResumableEnv, "prove_resumable", counted(ResumableEnv.prove_resumable, counts))
    proof.prove_envs(env)
    assert (len(counts), counts[0], counts[-1]) == (12, n_first, n_last)
    late = [str(warning.message) for warning in recwarn if "the proof of" in str(warning.message)]
    # The last one may take two steps more than its share, twice
    is_late = Clock.seconds > proof.MAX_SECONDS_OF_ALL + 4 * seconds
    assert is_late == (seconds == 1.0) and len(late) == is_late
    assert all("of 12 environments has taken 10.0 s" in text and "prove=False" in text for text in late)


def counted(method, counts):
    def call(*args):
        N_STEPS.clear()
        finding = method(*args)
        counts.append(len(N_STEPS))
        return finding

    return call


def test_all_arguments_of_the_wrapper_are_recorded():
    env = ResumableEnv(gym.make("CartPole-v1"), constant=["spec"], prove=False)
    assert env._saved_kwargs == {"constant": ("spec",), "prove": False, "by": "state"}


class Echo(gym.Env):
    """Observes the action, and makes no random generator at a reset."""

    observation_space = action_space = gym.spaces.Box(-1.0, 1.0, (1,))

    def reset(self, *, seed=None, options=None):
        return np.zeros(1, np.float32), {}

    def step(self, action):
        return action, 0.0, False, False, {}


class SamplesActions(gym.ActionWrapper):
    """Draws from generators that nobody has seeded."""

    def __init__(self, env):
        super().__init__(env)
        self.others = {"noise": [gym.spaces.Dict(x=gym.spaces.Box(-1.0, 1.0, (1,)))]}

    def action(self, action):
        noise = self.np_random.normal() + self.others["noise"][0].sample()["x"]
        return np.clip(action + self.action_space.sample() + noise, -1, 1).astype(np.float32)


def test_generators_that_nobody_has_seeded_yet_are_no_flaw_and_are_made_later_as_before():
    env = ResumableEnv(SamplesActions(Echo()))
    box = env.env.others["noise"][0]["x"]
    assert env.prove_resumable() is None
    assert env.unwrapped._np_random is None
    assert env.action_space._np_random is None and box._np_random is None


def test_the_trial_seeds_no_space_anew():
    env = ResumableEnv(SamplesActions(Echo()))
    box = env.env.others["noise"][0]["x"]
    box.seed(5)
    assert env.prove_resumable() is None
    assert box.sample() == gym.spaces.Box(-1.0, 1.0, (1,), seed=5).sample()
