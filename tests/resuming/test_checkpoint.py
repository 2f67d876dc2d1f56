import numpy as np
import pytest
import torch as th
from environments import ToyEnv, record_logs
from interrupted_runs import StopAfter, interrupted, learned, make_envs, make_model, steps_of
from stable_baselines3 import PPO
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import VecEnvWrapper, VecMonitor, VecNormalize
from states import assert_same_bits, state_of

from sb3_ppo_plus import (
    CheckpointError,
    PPOPlus,
    ResumableEnv,
    TrainingCheckpoint,
    WrapperStackError,
    latest_checkpoint,
    load_vec_normalize,
)
from sb3_ppo_plus.resuming import checkpoint_directory
from sb3_ppo_plus.resuming.checkpoint_directory import checkpoint_directories


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        ({"save_freq": 0}, ValueError, "save_freq must be at least 1, got 0"),
        ({"save_freq": True}, TypeError, "save_freq must be an int, got True"),
        ({"save_freq": 1e4}, TypeError, "save_freq must be an int, got 10000.0"),
        ({"keep_last": 0}, ValueError, "keep_last must be at least 1, got 0"),
        ({"keep_last": None}, TypeError, "keep_last must be an int, got None"),
    ],
)
def test_bad_arguments_are_refused(tmp_path, arguments, error, message):
    with pytest.raises(error, match=message):
        TrainingCheckpoint(**{"save_freq": 1, "save_path": tmp_path, **arguments})


def test_the_model_must_be_a_ppo_plus(tmp_path):
    model = PPO("MlpPolicy", make_envs(), n_steps=8, batch_size=8)
    with pytest.raises(TypeError, match="TrainingCheckpoint needs a PPOPlus, got a PPO"):
        model.learn(16, TrainingCheckpoint(1, tmp_path))


@pytest.mark.parametrize(
    "save_freq, expected", [(1, [16, 32, 48, 64, 80, 96]), (40, [48, 96]), (32, [32, 64, 96]), (10_000, [96])]
)
def test_a_checkpoint_is_written_after_save_freq_steps_and_at_the_end_of_training(tmp_path, save_freq, expected):
    make_model().learn(90, TrainingCheckpoint(save_freq, tmp_path, keep_last=10))
    assert steps_of(tmp_path) == expected


def test_only_the_newest_checkpoints_are_kept(tmp_path):
    model = make_model()
    model.learn(96, [TrainingCheckpoint(1, tmp_path, keep_last=2)])
    assert steps_of(tmp_path) == [80, 96]
    assert model.last_checkpoint == str(latest_checkpoint(tmp_path))


def test_writing_checkpoints_does_not_change_training(tmp_path):
    model = make_model()
    model.learn(96, TrainingCheckpoint(1, tmp_path))
    assert_same_bits(state_of(model), learned())


def test_the_model_of_a_checkpoint_is_a_saved_model(tmp_path):
    model = make_model()
    model.learn(96, TrainingCheckpoint(1, tmp_path))
    loaded = PPOPlus.load(latest_checkpoint(tmp_path) / "model.zip", device="cpu")
    assert_same_bits(state_of(loaded), state_of(model))


def test_the_model_of_a_checkpoint_acts_elsewhere_with_the_normaliser_beside_it(tmp_path):
    env = VecNormalize(make_vec_env(ToyEnv, n_envs=2))
    model = make_model(env).learn(96, TrainingCheckpoint(1, tmp_path))
    directory = latest_checkpoint(tmp_path)
    loaded = PPOPlus.load(directory / "model.zip", trusted=False)
    one = load_vec_normalize(directory / "vecnormalize.json", make_vec_env(ToyEnv, seed=3))
    one.training = env.training = False
    observations = one.reset()
    np.testing.assert_array_equal(observations, env.normalize_obs(one.get_original_obs()))
    expected = model.predict(observations, deterministic=True)[0]
    np.testing.assert_array_equal(loaded.predict(observations, deterministic=True)[0], expected)


def test_without_a_plain_vec_normalize_there_is_no_such_file(tmp_path):
    class OwnNormalize(VecNormalize):
        pass

    for name, wrap in (("none", lambda env: env), ("own", OwnNormalize)):
        make_model(wrap(make_vec_env(ToyEnv, n_envs=2))).learn(16, TrainingCheckpoint(1, tmp_path / name))
        assert not (latest_checkpoint(tmp_path / name) / "vecnormalize.json").exists()


def test_a_finished_run_stays_finished(tmp_path):
    model = make_model()
    model.learn(96, TrainingCheckpoint(1, tmp_path))
    resumed = PPOPlus.resume(tmp_path, make_envs(), device="cpu")
    with pytest.warns(UserWarning, match="has done its 96 timesteps. learn.more_timesteps"):
        resumed.continue_learning(TrainingCheckpoint(1, tmp_path))
    assert_same_bits(state_of(resumed), state_of(model))
    assert steps_of(tmp_path) == [64, 80, 96]


def test_resumes_from_the_newest_valid_checkpoint_or_from_a_given_one(tmp_path):
    interrupted(tmp_path)
    oldest, middle, newest = reversed(checkpoint_directories(tmp_path))
    assert PPOPlus.resume(tmp_path, make_envs(), device="cpu").num_timesteps == 48
    assert PPOPlus.resume(oldest, make_envs(), device="cpu").num_timesteps == 16
    (newest / "training_state.bin").write_bytes(b"")
    with pytest.warns(UserWarning, match=f"skipped an invalid checkpoint: .*{newest.name}"):
        resumed = PPOPlus.resume(str(tmp_path), make_envs(), device="cpu")
    assert resumed.num_timesteps == 32 and resumed.last_checkpoint == str(middle)
    resumed.continue_learning(TrainingCheckpoint(1, tmp_path))
    assert_same_bits(state_of(resumed), learned())
    assert steps_of(tmp_path) == [64, 80, 96]


def test_state_on_which_training_does_not_depend_is_restored_too(tmp_path):
    def envs():
        return VecNormalize(make_envs())

    model = make_model(envs(), use_sde=True, tensorboard_log=str(tmp_path / "tb"))
    model.learn(32)
    callbacks = [TrainingCheckpoint(1, tmp_path / "checkpoints"), StopAfter(48)]
    model.learn(96, callbacks, tb_log_name="named", reset_num_timesteps=False)
    resumed = PPOPlus.resume(tmp_path / "checkpoints", envs(), device="cpu")
    for name in model.TRAINING_STATE:
        assert_same_bits(getattr(resumed, name), getattr(model, name), name)
    for name in ("exploration_mat", "exploration_matrices"):
        assert th.equal(*(getattr(one.policy.action_dist, name) for one in (model, resumed)))
    started = model.start_time
    resumed.continue_learning()
    assert resumed._num_timesteps_at_start == 32
    assert abs(resumed.start_time - started) < 1e9, "the clock goes on"
    assert [path.name for path in (tmp_path / "tb").glob("named*")] == ["named_0"], "one folder for both"


def test_what_is_drawn_between_resume_and_continue_learning_changes_nothing(tmp_path):
    interrupted(tmp_path)
    resumed = PPOPlus.resume(tmp_path, make_envs(), device="cpu")
    np.random.random(3)
    th.rand(3)
    resumed.continue_learning()
    assert_same_bits(state_of(resumed), learned())


def test_without_a_run_to_resume_or_to_continue_there_is_an_error(tmp_path):
    with pytest.raises(CheckpointError, match=f"no valid checkpoint in {tmp_path}"):
        PPOPlus.resume(tmp_path, make_envs())
    with pytest.raises(ValueError, match="no learn to continue: call learn, or resume"):
        make_model().continue_learning()


def test_no_path_is_an_error_that_says_so():
    with pytest.raises(TypeError, match=r"save_path must be .* got None: is there no checkpoint yet"):
        PPOPlus.resume(None, make_envs())


def test_goes_on_in_the_same_process(tmp_path):
    model = make_model()
    logs = record_logs(model)
    model.learn(96, StopAfter(48))
    model.continue_learning()
    assert_same_bits(state_of(model), learned())
    assert [log["time/iterations"] for log in logs.dumps] == [1, 2, 3, 4, 5, 6]
    assert all("train/loss" in log for log in logs.dumps[1:])


def test_without_methods_the_envs_are_reset_and_the_rest_is_exact(tmp_path):
    def envs():
        return VecNormalize(make_envs(wrapper_class=None, max_steps=1000, p_terminate=0.0))

    first_observations = make_model(envs()).env.reset()
    model = interrupted(tmp_path, env=envs())
    drawn = np.random.random(), th.rand(1)
    with pytest.warns(UserWarning, match=r"no get_resume_state\(\)") as warned:
        resumed = PPOPlus.resume(tmp_path, envs(), device="cpu")
    assert len(warned) == 1
    assert_same_bits(state_of(resumed), state_of(model))
    assert (np.random.random(), th.rand(1)) == drawn
    for name in ("obs_rms", "ret_rms"):
        assert_same_bits(vars(getattr(resumed.env, name)), vars(getattr(model.env, name)))
    assert not resumed.env.returns.any() and resumed._last_episode_starts.all()
    assert resumed.env.get_attr("total_steps") == [24, 24] and resumed.env.get_attr("rewards") == [[], []]
    # The new observations are neither the old ones nor the first ones of the run
    for others in (model._last_original_obs, first_observations):
        assert not np.isclose(resumed._last_original_obs, others).any()
    resumed.continue_learning()
    assert resumed.num_timesteps == 96 and [len(rewards) for rewards in resumed.env.get_attr("rewards")] == [24, 24]


@pytest.mark.parametrize(
    "make_env, message",
    [
        (lambda: make_envs(3), "the checkpoint has 2 environments for each process, env has 3"),
        (
            lambda: VecNormalize(make_envs()),
            r"VecEnv wrappers are \['VecMonitor'\], those of env are \['VecNormalize'\]",
        ),
        (
            lambda: VecMonitor(make_envs(wrapper_class=None)),
            "environment 0 is ResumableEnv of Monitor of ToyEnv, that of env is Monitor of ToyEnv",
        ),
    ],
)
def test_another_wrapper_stack_is_an_error_that_names_both(tmp_path, make_env, message):
    interrupted(tmp_path, env=VecMonitor(make_envs()))
    with pytest.raises(WrapperStackError, match=message):
        PPOPlus.resume(tmp_path, make_env(), device="cpu")


def test_environments_that_were_made_in_another_way_are_an_error_that_says_what_they_lack(tmp_path):
    interrupted(tmp_path, env=VecNormalize(make_envs()))
    with pytest.raises(CheckpointError, match="VecNormalize has no obs_rms"):
        PPOPlus.resume(tmp_path, VecNormalize(make_envs(), norm_obs=False), device="cpu")
    with pytest.raises(TypeError, match="env must be the environments to go on with, got None"):
        PPOPlus.resume(tmp_path, None)


def test_other_versions_are_warned_of(tmp_path, monkeypatch):
    with monkeypatch.context() as patched:
        patched.setattr(checkpoint_directory, "versions", lambda: {"torch": "1.0", "python": "3.11"})
        interrupted(tmp_path)
    with pytest.warns(UserWarning, match=r"may differ in the last bits.*torch 1.0 \(now 2"):
        PPOPlus.resume(tmp_path, make_envs(), device="cpu")


def test_checkpoints_of_an_earlier_run_are_warned_of(tmp_path):
    interrupted(tmp_path)
    with pytest.warns(UserWarning, match="holds checkpoints of an earlier run"):
        make_model().learn(16, TrainingCheckpoint(1, tmp_path))
    assert PPOPlus.resume(tmp_path, make_envs(), device="cpu").num_timesteps == 16


class KeepsAnObject(VecEnvWrapper):
    def __init__(self, venv):
        super().__init__(venv)
        self.thing = object()

    def reset(self):
        return self.venv.reset()

    def step_wait(self):
        return self.venv.step_wait()


def test_what_is_not_saved_is_warned_of_before_the_first_step(tmp_path):
    env = KeepsAnObject(make_envs())
    with pytest.warns(UserWarning, match=r"do not hold everything: KeepsAnObject.thing is a builtins.object") as warned:
        make_model(env).learn(32, TrainingCheckpoint(1, tmp_path))
    assert len([one for one in warned if "hold everything" in str(one.message)]) == 1


def test_an_environment_that_cannot_be_saved_is_an_error_before_the_first_step(tmp_path):
    class Simulated(ToyEnv):
        simulator = None

        def reset(self, **kwargs):
            self.simulator = object()
            return super().reset(**kwargs)

    model = make_model(make_vec_env(Simulated, n_envs=1, wrapper_class=ResumableEnv))
    with pytest.raises(TypeError, match=r"Simulated\.simulator is a"):
        model.learn(16, TrainingCheckpoint(1, tmp_path))
    assert model.num_timesteps == 0
