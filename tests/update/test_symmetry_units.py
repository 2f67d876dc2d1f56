"""What a symmetry sees where a VecNormalize changes observations, and how mirror images are normalised."""

import numpy as np
import pytest
import torch as th
from environments import make_env
from gymnasium import spaces
from mirrors import ACTIONS, Recorder, identity, mirror
from models import build
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.vec_env import VecCheckNan, VecEnvWrapper, VecFrameStack, VecMonitor, VecNormalize


class SeenByNormalizer(VecEnvWrapper):
    """Keeps what the environments give: it is inside a VecNormalize."""

    def __init__(self, venv):
        super().__init__(venv)
        self.seen = []

    def reset(self):
        self.seen.append(self.venv.reset())
        return self.seen[-1]

    def step_wait(self):
        observations, *others = self.venv.step_wait()
        self.seen.append(observations)
        return observations, *others


def of_last_rollout(seen, n_steps=32):
    """The observations before each step of the last rollout, those after it left out."""
    return np.concatenate([np.asarray(each, np.float32) for each in seen[-n_steps - 1 : -1]])


def test_observations_are_those_that_the_environments_gave_before_a_normalizer_changed_them():
    recorder = Recorder()
    inner = SeenByNormalizer(make_env(2, observation_space=spaces.Box(-5, 9, (3,)), action_space=ACTIONS))
    # Whatever is clipped cannot be found again from what is stored
    model = build(VecNormalize(inner, clip_obs=0.5), symmetry=recorder)
    for n_learned in range(3):
        recorder.calls.clear()
        model.learn(64, reset_num_timesteps=n_learned != 1)
        # At the start, twice; then the rollout; at the first rollout of a learn once more
        assert [len(observations) for observations, _ in recorder.calls] == [2, 2, 64, 64]
        raw = of_last_rollout(inner.seen)
        np.testing.assert_array_equal(recorder.calls[2][0], raw)
        np.testing.assert_array_equal(recorder.calls[0][0], raw[:2])
        assert np.abs(raw).max() > 4.0


def test_a_rollout_that_a_callback_has_ended_does_not_shift_observations():
    class StopInRollout(BaseCallback):
        def _on_step(self):
            return self.num_timesteps < 100

    recorder = Recorder()
    inner = SeenByNormalizer(make_env(2, action_space=ACTIONS))
    model = build(VecNormalize(inner), symmetry=recorder).learn(192, StopInRollout())
    recorder.calls.clear()
    # As in SB3, the outcome of the step that a callback ended is dropped
    inner.seen.pop()
    model.learn(64, reset_num_timesteps=False)
    np.testing.assert_array_equal(recorder.calls[2][0], of_last_rollout(inner.seen))


KEYS_OF_BOXES = spaces.Dict({"normalized": spaces.Box(-5, 9, (3,)), "plain": spaces.Box(-1, 1, (2,))})


def negative(observations, actions):
    if isinstance(observations, dict):
        return {key: -part for key, part in observations.items()}, -actions
    return -observations, -actions


class KeepsStatistics(BaseCallback):
    """Keeps the statistics with which the observations before each step of the last rollout were normalised."""

    def __init__(self, reads_minibatches):
        super().__init__()
        self.reads_minibatches, self.last = reads_minibatches, None

    def _now(self):
        rms = self.training_env.obs_rms
        rms = rms["normalized"] if isinstance(rms, dict) else rms
        return np.copy(rms.mean), np.copy(rms.var)

    def _on_training_start(self):
        self.last = self._now()

    def _on_rollout_start(self):
        self.moments = []

    def _on_step(self):
        self.moments.append(self.last)
        self.last = self._now()
        return True

    def _on_rollout_end(self):
        if self.reads_minibatches:
            # SB3's get puts the rows of the buffer into another order
            next(self.model.rollout_buffer.get(8))

    def of_rows(self):
        n_envs = self.training_env.num_envs
        mean, var = (np.stack(part) for part in zip(*self.moments, strict=True))
        if self.reads_minibatches:
            return np.tile(mean, (n_envs, 1)), np.tile(var, (n_envs, 1))
        return np.repeat(mean, n_envs, axis=0), np.repeat(var, n_envs, axis=0)


@pytest.mark.parametrize("reads_minibatches", [False, True])
@pytest.mark.parametrize("space", [KEYS_OF_BOXES["normalized"], KEYS_OF_BOXES], ids=["box", "dict"])
def test_mirror_images_are_normalized_as_the_observations_of_their_own_step(space, reads_minibatches):
    recorder, is_dict = Recorder(negative), isinstance(space, spaces.Dict)
    env = make_env(2, observation_space=space, action_space=ACTIONS)
    env = VecNormalize(env, norm_obs_keys=["normalized"] if is_dict else None, clip_obs=1.0)
    callback = KeepsStatistics(reads_minibatches)
    model = build(env, "MultiInputPolicy" if is_dict else "MlpPolicy", symmetry=recorder).learn(128, callback)
    rollout, raw = model.rollout_buffer.rollout(), recorder.calls[-1][0]
    images, stored = rollout.mirrored["observations"], rollout.observations
    if is_dict:
        assert th.equal(images["plain"], -stored["plain"])
        images, stored, raw = images["normalized"], stored["normalized"], raw["normalized"]
    mean, var = callback.of_rows()
    for numbers, observations in ((raw.numpy(), stored), (-raw.numpy(), images)):
        expected = np.clip((numbers - mean) / np.sqrt(var + env.epsilon), -1, 1)
        np.testing.assert_allclose(observations, expected, rtol=0, atol=2e-6)
        assert (np.abs(expected) == 1).mean() > 0.1, "nothing is clipped"


def test_without_a_normalizer_or_a_symmetry_nothing_is_followed():
    for env, symmetry in ((make_env(action_space=ACTIONS), mirror), (VecNormalize(make_env()), None)):
        model = build(env, symmetry=symmetry).learn(32)
        assert model.rollout_buffer.originals is None
    inside = VecNormalize(make_env(action_space=ACTIONS), norm_obs=False)
    assert build(inside, symmetry=mirror).learn(32).rollout_buffer.originals is None


class FiveTimes(VecEnvWrapper):
    def reset(self):
        return 5 * self.venv.reset()

    def step_wait(self):
        observations, *others = self.venv.step_wait()
        return 5 * observations, *others


class OwnNormalizer(VecNormalize):
    def normalize_obs(self, obs):
        return 2 * super().normalize_obs(obs)


def test_wrappers_that_keep_observations_may_be_around_a_normalizer():
    env = VecMonitor(VecCheckNan(VecNormalize(VecNormalize(make_env(action_space=ACTIONS)), norm_obs=False)))
    model = build(env, symmetry=identity).learn(64)
    rollout = model.rollout_buffer.rollout()
    th.testing.assert_close(rollout.mirrored["observations"], rollout.observations, rtol=0, atol=2e-6)


@pytest.mark.parametrize(
    ("env", "message"),
    [
        (
            lambda env: VecFrameStack(VecNormalize(env), 2),
            "no wrapper around VecNormalize may .*got VecFrameStack",
        ),
        (lambda env: FiveTimes(VecNormalize(env)), "may change them; got FiveTimes"),
        (lambda env: VecNormalize(VecNormalize(env)), "may change them; got VecNormalize"),
        (OwnNormalizer, "normalise observations, which OwnNormalizer"),
    ],
)
def test_wrappers_that_may_change_observations_are_named_before_the_first_step(env, message):
    model = build(env(make_env(action_space=ACTIONS)), symmetry=mirror)
    with pytest.raises(ValueError, match=message):
        model.learn(64)
    assert model.num_timesteps == 0


@pytest.mark.parametrize("state", [None, [], [[None, 1.0, 1.0]], [["key", np.zeros(3), np.ones(3)]]])
def test_impossible_statistics_in_a_checkpoint_are_refused(state):
    env = VecNormalize(make_env(action_space=ACTIONS))
    model = build(env, symmetry=mirror).learn(32)
    with pytest.raises(ValueError, match="original_observations must be mean and variance"):
        model.rollout_buffer.originals.set_state(state)


def test_the_first_observations_of_an_older_checkpoint_are_found_from_those_that_are_stored():
    recorder = Recorder()
    model = build(VecNormalize(make_env(2, action_space=ACTIONS)), symmetry=recorder).learn(64)
    model._last_original_obs = 7 + model._last_original_obs
    model.env.old_obs = 9 + model.env.old_obs
    model.rollout_buffer.originals = None
    recorder.calls.clear()
    expected = model.env.unnormalize_obs(model._last_obs)
    model.learn(64, reset_num_timesteps=False)
    for observations in (recorder.calls[0][0], recorder.calls[2][0][:2]):
        np.testing.assert_allclose(observations, expected, rtol=1e-5)
