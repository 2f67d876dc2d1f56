"""Without trust, a checkpoint changes numbers of environments and wrappers, and nothing that could be a path."""

import warnings

import gymnasium as gym
import numpy as np
import pytest
from environments import ToyEnv
from interrupted_runs import StopAfter, learned, make_envs, make_model, rewritten
from stable_baselines3.common.callbacks import EvalCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv, VecFrameStack, VecNormalize, VecVideoRecorder
from states import assert_same_bits, state_of

from sb3_ppo_plus import CheckpointError, PPOPlus, ResumableEnv, TrainingCheckpoint, latest_checkpoint
from sb3_ppo_plus.env_states.generator_state import generator_state, restored_generator
from sb3_ppo_plus.env_states.mujoco_state import mujoco_state, set_mujoco_state
from sb3_ppo_plus.env_states.object_state import object_state
from sb3_ppo_plus.env_states.untrusted_state import set_state_without_trust


def seeds(pool_size):
    return {"entropy": 0, "spawn_key": (), "pool_size": pool_size, "n_children_spawned": 0}


class Owner:
    """Stands for a wrapper."""

    shared = 1

    def __init__(self, folder="mine"):
        self.folder = folder
        self.n_steps = 1
        self.is_on = False
        self.history = [1.0]
        self.array = np.zeros(2)
        self.generator = np.random.default_rng(0)
        self.space = gym.spaces.Discrete(2, seed=0)
        self.trigger = lambda step: step > self.n_steps
        self.names = ["a"]

    def method(self):
        """No state."""


def test_numbers_generators_and_spaces_are_put_back_and_the_rest_is_named():
    saved, owner = Owner("theirs"), Owner()
    saved.n_steps, saved.is_on, saved.history, saved.array = 5, True, [2.0, 3.0], np.ones(2)
    saved.names = ["b"]
    saved.generator.random()
    saved.space.sample()
    left_out = set_state_without_trust(owner, object_state(saved))
    assert sorted(left_out) == ["Owner.folder", "Owner.names", "Owner.trigger"]
    assert (owner.folder, owner.names) == ("mine", ["a"])
    assert (owner.n_steps, owner.is_on, owner.history) == (5, True, [2.0, 3.0]) and owner.array.tolist() == [1, 1]
    assert owner.generator.random() == saved.generator.random() and owner.space.sample() == saved.space.sample()


def test_what_is_equal_is_not_named():
    owner = Owner()
    del owner.trigger
    assert set_state_without_trust(owner, object_state(owner)) == []


@pytest.mark.parametrize(
    ("name", "entry"),
    [
        ("n_steps", ("plain", "a text")),
        ("n_steps", ("generator", {"generator": {}})),
        ("n_steps", ("space", [])),
        ("n_steps", ("mujoco", {})),
        ("n_steps", ("atari", b"")),
        ("n_steps", ("object", {})),
        ("n_steps", ("linked", [0])),
        ("n_steps", ("unheard of", 1)),
        ("unheard_of", ("plain", 1)),
        ("Owner.shared", ("plain", 2)),
        ("Owner.unheard_of", ("plain", 1)),
        ("generator", ("generator", {"random_state": np.random.RandomState(0).get_state(legacy=False)})),
        ("folder", ("plain", None)),
    ],
    ids=str,
)
def test_other_kinds_and_other_names_are_left_out(name, entry):
    owner = Owner()
    before = dict(vars(owner))
    assert set_state_without_trust(owner, {name: entry}) == [f"Owner.{name}"]
    assert vars(owner) == before and Owner.shared == 1


@pytest.mark.parametrize("name", ["method", "__class__", "__dict__"])
def test_methods_and_special_attributes_are_errors(name):
    with pytest.raises(ValueError, match="is no state"):
        set_state_without_trust(Owner(), {name: ("plain", 1)})


def recorded(folder):
    env = make_vec_env("CartPole-v1", 2, seed=0, wrapper_class=ResumableEnv, env_kwargs={"render_mode": "rgb_array"})
    return VecVideoRecorder(env, str(folder), record_video_trigger=lambda step: False)


def test_a_video_goes_to_the_users_folder_and_not_to_one_that_the_checkpoint_names(tmp_path):
    make_model(recorded(tmp_path / "theirs")).learn(96, [TrainingCheckpoint(1, tmp_path / "run"), StopAfter(48)])
    env = recorded(tmp_path / "mine")
    with pytest.warns(UserWarning, match=r"left out.*VecVideoRecorder\.video_folder"):
        PPOPlus.resume(tmp_path / "run", env, device="cpu", trusted=False)
    assert env.video_folder == str(tmp_path / "mine")
    PPOPlus.resume(tmp_path / "run", env, device="cpu")
    assert env.video_folder == str(tmp_path / "theirs")


class NamesAFile(ToyEnv):
    def __init__(self, path):
        super().__init__()
        self.path = path


def named_files(path, vec_env_cls=DummyVecEnv):
    return make_vec_env(
        NamesAFile, 2, seed=0, wrapper_class=ResumableEnv, env_kwargs={"path": path}, vec_env_cls=vec_env_cls
    )


@pytest.mark.parametrize("vec_env_cls", [DummyVecEnv, SubprocVecEnv])
def test_an_environment_keeps_its_own_path_also_in_a_worker(tmp_path, vec_env_cls):
    make_model(named_files("theirs", vec_env_cls)).learn(96, [TrainingCheckpoint(1, tmp_path), StopAfter(48)])
    env = named_files("mine", vec_env_cls)
    with pytest.warns(UserWarning, match=r"left out.*NamesAFile\.path"):
        resumed = PPOPlus.resume(tmp_path, env, device="cpu", trusted=False)
    assert env.get_attr("path") == ["mine", "mine"]
    # Nothing else was left out
    resumed.continue_learning()
    assert_same_bits(state_of(resumed), learned())


@pytest.mark.parametrize("vec_env_cls", [DummyVecEnv, SubprocVecEnv])
def test_a_state_of_another_environment_is_an_error_also_in_a_worker(tmp_path, vec_env_cls):
    make_model(named_files("a", vec_env_cls)).learn(96, [TrainingCheckpoint(1, tmp_path), StopAfter(48)])

    class Other(NamesAFile):
        pass

    Other.__name__ = "NamesAFile"
    Other.actions = property(lambda self: [], lambda self, value: None)
    Other.n_steps = lambda self: 1
    env = make_vec_env(Other, 2, seed=0, wrapper_class=ResumableEnv, env_kwargs={"path": "a"}, vec_env_cls=vec_env_cls)
    with pytest.raises(CheckpointError, match=r"environment 0: ValueError: NamesAFile\.n_steps is no state"):
        PPOPlus.resume(tmp_path, env, device="cpu", trusted=False)
    env.close()


@pytest.mark.parametrize("env_id", ["CartPole-v1", "Pendulum-v1", "FrozenLake-v1", "Hopper-v5"])
def test_usual_runs_lack_nothing_without_trust(env_id, tmp_path):
    def envs():
        env = make_vec_env(env_id, 2, seed=0, wrapper_class=ResumableEnv)
        return env if env_id == "FrozenLake-v1" else VecNormalize(VecFrameStack(env, 2))

    def train(*callbacks):
        model = make_model(envs(), n_steps=32, batch_size=32)
        return model.learn(256, [*callbacks, EvalCallback(envs(), eval_freq=40, verbose=0)])

    expected = state_of(train())
    train(TrainingCheckpoint(1, tmp_path), StopAfter(128))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        resumed = PPOPlus.resume(latest_checkpoint(tmp_path), envs(), device="cpu", trusted=False)
        resumed.continue_learning(EvalCallback(envs(), eval_freq=40, verbose=0))
    assert_same_bits(state_of(resumed), expected)


def test_without_trust_the_state_of_an_atari_game_is_left_out(tmp_path):
    import ale_py

    gym.register_envs(ale_py)

    def envs():
        return make_vec_env("ALE/Pong-v5", 1, seed=0, wrapper_class=ResumableEnv, env_kwargs={"obs_type": "ram"})

    make_model(envs()).learn(32, [TrainingCheckpoint(1, tmp_path), StopAfter(16)])
    with pytest.warns(UserWarning, match=r"left out.*AtariEnv\.ale"):
        PPOPlus.resume(tmp_path, envs(), device="cpu", trusted=False)


def test_evaluations_of_a_forged_checkpoint_are_numbers(tmp_path):
    make_model().learn(96, [TrainingCheckpoint(1, tmp_path), EvalCallback(make_envs(), eval_freq=1000), StopAfter(48)])
    directory = rewritten(
        tmp_path, lambda files, state: state["callbacks"]["EvalCallback 1"]["attributes"].update(best_mean_reward="x")
    )
    resumed = PPOPlus.resume(directory, make_envs(), device="cpu", trusted=False)
    with pytest.raises(CheckpointError, match="EvalCallback 1: best_mean_reward cannot be 'x'"):
        resumed.continue_learning(EvalCallback(make_envs(), eval_freq=1000))


def test_wrappers_outside_resumable_env_get_numbers_only(tmp_path):
    def envs():
        return make_vec_env(lambda: ResumableEnv(ToyEnv()), 2, seed=0)

    def forge(files, state):
        state["env"]["attributes"] |= {"rewards": [["x"], [1.5]], "needs_reset": [False, "x"]}

    make_model(envs()).learn(96, [TrainingCheckpoint(1, tmp_path), StopAfter(48)])
    env = envs()
    with pytest.warns(UserWarning, match="left out.*needs_reset, rewards$"):
        PPOPlus.resume(rewritten(tmp_path, forge), env, device="cpu", trusted=False)
    assert env.get_attr("rewards")[1] == [1.5] and env.get_attr("needs_reset") == [False, False]


def test_without_trust_mujoco_gets_no_indices():
    data = gym.make("Hopper-v5").unwrapped.data
    state = mujoco_state(data)
    forged = state | {"derived": b"\xff" * len(state["derived"])}
    set_mujoco_state(data, state, trusted=False)
    arrays = {name: getattr(data, name) for name in dir(data) if isinstance(getattr(data, name), np.ndarray)}
    indices = {name: array.copy() for name, array in arrays.items() if array.dtype.kind in "iu" and array.size}
    assert len(indices) > 5
    set_mujoco_state(data, forged, trusted=False)
    for name, array in indices.items():
        assert np.array_equal(getattr(data, name), array), name
    # Floats are put back, here as NaN
    assert np.isnan(data.xpos).all()


def test_sizes_of_vectorised_environments_are_left_out(tmp_path):
    def forge(files, state):
        state["env"]["wrappers"][0]["$tuple"][1]["num_envs"] = {"$tuple": ["plain", 7 * 10**8]}

    make_model(VecNormalize(make_envs())).learn(96, [TrainingCheckpoint(1, tmp_path), StopAfter(48)])
    env = VecNormalize(make_envs())
    with pytest.warns(UserWarning, match=r"left out.*VecNormalize\.num_envs"):
        PPOPlus.resume(rewritten(tmp_path, forge), env, device="cpu", trusted=False)
    assert env.num_envs == 2


def test_frames_of_normalised_observations_are_resumed_without_trust(tmp_path):
    def envs():
        return VecFrameStack(VecNormalize(make_envs()), 2)

    make_model(envs()).learn(96, [TrainingCheckpoint(1, tmp_path), StopAfter(48)])
    resumed = PPOPlus.resume(tmp_path, envs(), device="cpu", trusted=False)
    assert_same_bits(state_of(resumed.continue_learning()), state_of(make_model(envs()).learn(96)))


MT, PHILOX = np.random.MT19937(0).state, np.random.Philox(0).state


@pytest.mark.parametrize(
    "state",
    [
        *({"generator": MT | {"state": MT["state"] | {"pos": pos}}} for pos in (-1, 625, 10**9, 1.5, True)),
        *({"generator": PHILOX | {"buffer_pos": pos}} for pos in (-1, 5, 10**9)),
        {"random_state": MT | {"state": MT["state"] | {"pos": 700}, "has_gauss": 0, "gauss": 0.0}},
        *(generator_state(np.random.default_rng(0)) | {"seeds": seeds(size)} for size in (0, 65, 10**9)),
    ],
    ids=lambda state: str(list(state))[:40],
)
def test_positions_outside_a_generators_memory_are_refused(state):
    with pytest.raises(ValueError, match=r"pos=|pool_size="):
        restored_generator(np.random.default_rng(0), state)
