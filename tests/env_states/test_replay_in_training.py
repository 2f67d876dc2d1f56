"""Training with environments whose episodes are played again at a resume."""

import contextlib
import warnings

import gymnasium as gym
import numpy as np
import pytest
from interrupted_runs import StopAfter, rewritten
from models import build
from replayed_environments import (
    Chained,
    Dangling,
    Global,
    Hidden,
    HiddenFromStart,
    InModule,
    OfGraph,
    Simulated,
    drawn,
    outputs,
)
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import SubprocVecEnv, VecNormalize
from states import assert_same_bits, state_of

from sb3_ppo_plus import CheckpointError, PPOPlus, ResumableEnv, ResumeProofError, TrainingCheckpoint
from sb3_ppo_plus.env_states import parts_of_env, vec_env_state
from sb3_ppo_plus.env_states.episode_recorder import chain_of, recorder_in
from sb3_ppo_plus.env_states.resumable_env_for import resumable_env_for

REPLAY = {"wrapper_class": ResumableEnv, "wrapper_kwargs": {"by": "replay"}}
WORKERS = {"vec_env_cls": SubprocVecEnv, "vec_env_kwargs": {"start_method": "fork"}}
AUTO = {"wrapper_class": resumable_env_for}


class Scaled(Simulated):
    """Its steps depend on a number that no state holds if it is named as constant."""

    def __init__(self, scale=1.0):
        self.scale = scale

    def step(self, action):
        return super().step(self.scale * action)


def model_of(make, **kwargs):
    return build(VecNormalize(make_vec_env(make, 2, seed=0, **kwargs)), n_steps=16, batch_size=16)


def interrupted_by_replay(folder, make=Simulated, **kwargs):
    model = model_of(make, **{**REPLAY, **kwargs})
    model.learn(128, [TrainingCheckpoint(1, folder), StopAfter(64)])


def learned(make=Simulated, **kwargs):
    model = model_of(make, **kwargs)
    model.learn(128)
    return state_of(model)


def resumed(folder, make=Simulated, trusted=True, **kwargs):
    env = VecNormalize(make_vec_env(make, 2, seed=5, **{**REPLAY, **kwargs}))
    model = PPOPlus.resume(folder, env, trusted=trusted)
    model.continue_learning()
    return state_of(model)


def bipedal_walker():
    return gym.make("BipedalWalker-v3", max_episode_steps=11)


@pytest.mark.parametrize("make", [Simulated, bipedal_walker])
@pytest.mark.parametrize("way", [REPLAY, AUTO])
def test_checkpoints_and_the_proof_change_no_bit(tmp_path, make, way):
    model = model_of(make, **way)
    model.learn(128, TrainingCheckpoint(32, tmp_path))
    assert_same_bits(state_of(model), learned(make))


@pytest.mark.parametrize("make", [Simulated, lambda: gym.make("CartPole-v1")])
def test_a_run_goes_on_in_the_way_that_was_chosen(tmp_path, make):
    interrupted_by_replay(tmp_path, make, **AUTO, wrapper_kwargs=None)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = resumed(tmp_path, make, **AUTO, wrapper_kwargs=None)
    assert_same_bits(found, learned(make))


@pytest.mark.parametrize("trusted", [True, False])
def test_a_run_in_workers_goes_on(tmp_path, trusted):
    interrupted_by_replay(tmp_path, **WORKERS)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = resumed(tmp_path, **WORKERS, trusted=trusted)
    assert_same_bits(found, learned(**WORKERS))


@pytest.mark.parametrize("workers", [{}, WORKERS])
def test_an_episode_with_another_outcome_is_an_error_that_names_environment_and_step(tmp_path, workers):
    kwargs = {**workers, "wrapper_kwargs": {"by": "replay", "constant": ["scale"]}}
    interrupted_by_replay(tmp_path, Scaled, **kwargs)
    for trusted in (True, False):
        with pytest.raises(CheckpointError, match=r"environment 0: .*of Scaled was replayed, and at step 1 of \d"):
            resumed(tmp_path, lambda: Scaled(2.0), trusted=trusted, **kwargs)


def forged(folder, change):
    """Change what is saved of the first environment's episode."""

    def change_state(files, state):
        (envs,) = [state["env"]["envs"]]
        for layer in envs[0]["layers"]["$tuple"] if isinstance(envs[0]["layers"], dict) else envs[0]["layers"]:
            name, saved = layer["$tuple"] if isinstance(layer, dict) else layer
            if name == "EpisodeRecorder":
                change(saved)

    rewritten(folder, change_state)
    return folder / "rewritten"


def other_actions(saved):
    saved["actions"] = [{"kind": "int", "values": saved["outputs"]["ends"]}]


def options(saved):
    saved["start"]["options"] = {"path": "/etc"}


def strange_options(saved):
    saved["start"]["options"] = [1]


def a_world(saved):
    saved["start"]["world"] = [0, 1, 3]


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (other_actions, r"action 1 of the episode is none of Box"),
        (options, "options that are no numbers"),
        (strange_options, "environment 0"),
        (a_world, "has no Box2D world"),
        (lambda saved: saved["start"].update(seed="x"), "environment 0"),
        (lambda saved: saved.update(draws=[[0, "own", {"generator": {"bit_generator": "X"}}]]), "environment 0"),
        (lambda saved: saved.update(draws=[[0, "other", 1]]), "is no generator"),
        (lambda saved: saved["now"].update(states=[]), "the saved state is of 0 environments"),
        (lambda saved: saved.pop("outputs"), "environment 0|outputs"),
    ],
)
def test_without_trust_a_forged_episode_is_an_error(tmp_path, change, text):
    interrupted_by_replay(tmp_path)
    with pytest.raises(CheckpointError, match=text):
        resumed(forged(tmp_path, change), trusted=False)


def test_by_replay_an_environment_that_depends_on_something_hidden_is_an_error_before_the_first_step(tmp_path):
    model = model_of(Hidden, **REPLAY)
    with pytest.raises(ResumeProofError, match="environment 0"):
        model.learn(32, TrainingCheckpoint(1, tmp_path))
    assert model.num_timesteps == 0


class NotesFirst(BaseCallback):
    """Notes whether the first observations are those of the environments."""

    def _on_rollout_start(self):
        if self.num_timesteps == 0:
            positions = np.array([env.unwrapped.body.position for env in self.training_env.unwrapped.envs])
            observations = self.model._last_original_obs
            self.are_the_environments = np.array_equal(positions, observations)

    def _on_step(self):
        return True


@pytest.mark.parametrize("make", [Hidden, HiddenFromStart])
def test_chosen_such_an_environment_is_warned_of_and_begins_anew_at_a_resume(tmp_path, make):
    model = model_of(make, **AUTO)
    notes = NotesFirst()
    with pytest.warns(UserWarning, match="environment 0: .*its episodes begin anew; and this training may differ"):
        model.learn(64, [TrainingCheckpoint(1, tmp_path), StopAfter(32), notes])
    assert notes.are_the_environments
    with pytest.warns(UserWarning, match="were reset"):
        resumed(tmp_path, make, **AUTO, wrapper_kwargs=None)


def test_chosen_an_environment_with_state_in_a_module_is_played_again_when_the_proof_by_state_fails(tmp_path):
    model = model_of(InModule, **AUTO)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.learn(128, [TrainingCheckpoint(1, tmp_path), StopAfter(64)])
        found = resumed(tmp_path, InModule, **AUTO, wrapper_kwargs=None)
    whole = model_of(InModule, **AUTO)
    whole.learn(128, TrainingCheckpoint(1, tmp_path / "whole"))
    assert_same_bits(found, state_of(whole))


class Odd(gym.Wrapper):
    """Holds what cannot be saved."""

    def __init__(self, env):
        super().__init__(env)
        self.file = iter("abc")


def test_chosen_a_wrapper_that_cannot_be_saved_is_warned_of_and_training_goes_on(tmp_path):
    model = model_of(lambda: Odd(Simulated()), **AUTO)
    with pytest.warns(UserWarning, match=r"checkpoints do not hold everything: environments are not saved.*Odd\.file"):
        model.learn(32, TrainingCheckpoint(1, tmp_path))
    assert model.num_timesteps == 32


def test_workers_have_the_time_of_all_steps_of_an_episode(monkeypatch):
    monkeypatch.setattr(Simulated, "length", 100)
    env = make_vec_env(Simulated, 2, seed=0, **REPLAY)
    env.reset()
    for _ in range(30):
        env.step(np.zeros((2, 2)))
    asked = []
    monkeypatch.setattr(
        vec_env_state, "time_for_proof", lambda base, n_steps: asked.append(n_steps) or contextlib.nullcontext()
    )
    assert vec_env_state.set_vec_env_state(env, vec_env_state.vec_env_state(env))
    # And the reset
    assert asked == [31]


@pytest.mark.parametrize("make", [Chained, OfGraph, Dangling])
def test_chosen_an_environment_at_which_saving_fails_is_warned_of_and_trains_with_the_same_bits(tmp_path, make):
    model = model_of(make, **AUTO)
    with pytest.warns(UserWarning, match=r"checkpoints do not hold everything: environments are not saved"):
        model.learn(128, TrainingCheckpoint(32, tmp_path))
    assert_same_bits(state_of(model), learned(make))


@pytest.mark.parametrize("workers", [{}, WORKERS])
@pytest.mark.parametrize("trusted", [True, False])
def test_chosen_an_episode_with_another_outcome_is_warned_of_and_begins_anew(tmp_path, monkeypatch, workers, trusted):
    kwargs = {**AUTO, "wrapper_kwargs": None, **workers}
    interrupted_by_replay(tmp_path, **kwargs)
    monkeypatch.setattr(Simulated, "noise", lambda self: 0.5)
    with (
        pytest.warns(UserWarning, match="environment 0 cannot go on where it was, so all are reset: .*the episode of"),
        pytest.warns(UserWarning, match="were reset"),
    ):
        resumed(tmp_path, trusted=trusted, **kwargs)


class Later(Simulated):
    """Has an attribute of which another version makes something else."""

    def __init__(self, kind=list):
        self.file = iter("abc")
        self.kind = kind


def test_chosen_an_environment_of_another_make_is_warned_of_and_begins_anew(tmp_path):
    kwargs = {**AUTO, "wrapper_kwargs": None}
    interrupted_by_replay(tmp_path, Later, **kwargs)
    with pytest.warns(
        UserWarning, match=r"environment 0 cannot go on where it was, so all are reset: .*Later\.kind is builtins:dict"
    ):
        resumed(tmp_path, lambda: Later(dict), **kwargs)


def test_chosen_an_environment_that_draws_from_global_generators_is_warned_of_and_not_recorded(tmp_path):
    model = model_of(Global, **AUTO)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model.learn(64, TrainingCheckpoint(16, tmp_path))
    (text,) = [str(warning.message) for warning in caught if "global random generator" in str(warning.message)]
    assert "environment 0: Global draws from the global random generator of numpy and python" in text
    assert all(recorder_in(chain_of(env)) is None for env in model.env.unwrapped.envs)
    assert model.env.env_method("get_resume_state") == [None, None]


def test_chosen_without_a_proof_such_an_environment_is_recorded_in_one_episode_only():
    env = ResumableEnv(Global(), by="auto", prove=False)
    env.reset(seed=0)
    env.step(np.zeros(2))
    with pytest.warns(UserWarning, match="begins anew at a resume: Global draws from the global random generator"):
        env.reset()
    assert recorder_in(chain_of(env)) is None


class WithData(gym.Env):
    """Holds a set of data, which two attributes share."""

    observation_space = Simulated.observation_space
    action_space = Simulated.action_space

    def __init__(self):
        self.data = {"observations": [np.zeros(2**20), "text"]}
        self.same = self.data["observations"]

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return np.zeros(2), {}

    def step(self, action):
        return np.zeros(2), 0.0, False, False, {}


def test_chosen_an_environment_with_a_set_of_data_is_warned_of_and_not_saved_unless_it_is_constant(monkeypatch):
    monkeypatch.setattr(parts_of_env, "MOST_BYTES", 2**23 - 1)
    env = ResumableEnv(WithData(), by="auto")
    env.reset(seed=0)
    with pytest.warns(UserWarning, match=r"would hold 8 MB of .* in WithData\.data\. .*by=.auto., constant=\[.data"):
        assert env.get_resume_state() is None
    monkeypatch.setattr(parts_of_env, "MOST_BYTES", 2**23 + 1000)
    for kwargs in ({"by": "auto"}, {"by": "state"}):
        env = ResumableEnv(WithData(), **kwargs)
        env.reset(seed=0)
        assert env.get_resume_state() is not None
        monkeypatch.setattr(parts_of_env, "MOST_BYTES", 2**23 - 1)
    env = ResumableEnv(WithData(), by="auto", constant=["data", "same"])
    env.reset(seed=0)
    assert env.get_resume_state() is not None


class LateFile(Simulated):
    """Gets an attribute that cannot be saved in its third episode."""

    def __init__(self):
        self.n_episodes = 0

    def reset(self, *, seed=None, options=None):
        self.n_episodes += 1
        gym.Env.reset(self, seed=seed)
        self.n_steps = 0
        self.position = self.np_random.normal(size=2)
        return self.position.copy(), {}

    def step(self, action):
        self.n_steps += 1
        if self.n_episodes >= 3:
            self.file = iter("abc")
        self.position = 0.9 * self.position + action + 0.1 * self.noise()
        return self.position.copy(), float(self.position.sum()), self.n_steps >= self.length, False, {}


def test_chosen_an_environment_that_cannot_be_saved_later_is_replayed_from_its_next_episode_on():
    env, other = (ResumableEnv(LateFile(), by="auto") for _ in range(2))
    env.reset(seed=0)
    other.reset(seed=1)
    outputs(env, drawn(env, 12))
    assert env.get_resume_state()
    outputs(env, drawn(env, 10))
    with pytest.warns(UserWarning, match=r"is saved from its next episode on only: LateFile\.file is a"):
        assert env.get_resume_state() is None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert env.get_resume_state() is None
        outputs(env, drawn(env, 10))
        state = env.get_resume_state()
    assert env.why_not_resumable() == ""
    other.set_resume_state(state)
    np.testing.assert_equal(outputs(other, drawn(env, 20)), outputs(env, drawn(env, 20)))


def test_chosen_such_an_environment_is_proven_by_replay_when_training_goes_on(tmp_path):
    model = model_of(LateFile, **AUTO)
    with pytest.warns(UserWarning, match="is saved from its next episode on only"):
        model.learn(64, TrainingCheckpoint(10_000, tmp_path / "first"))
    model.learn(32, TrainingCheckpoint(10_000, tmp_path / "second"), reset_num_timesteps=False)
    assert all(recorder_in(chain_of(env)) is not None for env in model.env.unwrapped.envs)
    assert None not in model.env.env_method("get_resume_state")
