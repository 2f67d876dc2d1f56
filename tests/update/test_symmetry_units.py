"""What a symmetry sees where a VecNormalize changes observations, and how mirror images are normalised."""

import numpy as np
import pytest
import torch as th
from environments import make_env
from gymnasium import spaces
from mirrors import ACTIONS, Recorder, identity, mirror
from models import build
from stable_baselines3.common.buffers import RolloutBuffer
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


@pytest.mark.parametrize("steps_by_get", [False, True])
@pytest.mark.parametrize("space", [KEYS_OF_BOXES["normalized"], KEYS_OF_BOXES], ids=["box", "dict"])
def test_mirror_images_are_normalized_as_the_observations_of_their_own_step(space, steps_by_get):
    class ReadsMinibatches(BaseCallback):
        """SB3's get puts the rows of the buffer into another order."""

        def _on_step(self):
            return True

        def _on_rollout_end(self):
            if steps_by_get:
                next(RolloutBuffer.get(self.model.rollout_buffer, 8), None)

    keys = ["normalized"] if isinstance(space, spaces.Dict) else None
    policy = "MlpPolicy" if keys is None else "MultiInputPolicy"
    env = VecNormalize(make_env(2, observation_space=space, action_space=ACTIONS), norm_obs_keys=keys, clip_obs=1.0)
    callback = ReadsMinibatches() if keys is None else None
    model = build(env, policy, symmetry=identity).learn(128, callback)
    rollout = model.rollout_buffer.rollout()
    mirrored = rollout.mirrored["observations"]
    for key in (None,) if keys is None else ("normalized", "plain"):
        stored, images = (part if key is None else part[key] for part in (rollout.observations, mirrored))
        th.testing.assert_close(images, stored, rtol=0, atol=2e-6)
        assert key == "plain" or (stored.abs() == 1.0).float().mean() > 0.1, "nothing is clipped"


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
