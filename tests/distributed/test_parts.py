"""What models that divide nothing keep, and what a file may not do with parts."""

import numpy as np
import pytest
import torch as th
from environments import make_env
from interrupted_runs import interrupted, rewritten
from models import build
from parted_cases import Case, toys
from stable_baselines3.common.callbacks import EvalCallback
from stable_baselines3.common.running_mean_std import RunningMeanStd
from stable_baselines3.common.vec_env import VecNormalize

from sb3_ppo_plus import CheckpointError, PPOPlus, UntrustedFileError
from sb3_ppo_plus.env_states.vec_env_state import vec_env_state
from sb3_ppo_plus.resuming.state_checks import _check_parts
from sb3_ppo_plus.resuming.training_state import _env_state
from sb3_ppo_plus.update.parted_rollout import Moments


class Until(RunningMeanStd):
    """Statistics with a state of their own."""

    until = 0


def test_statistics_of_a_class_of_the_users_keep_their_state_in_checkpoints():
    env = VecNormalize(make_env(2))
    env.obs_rms = Until(shape=(3,))
    env.obs_rms.until = 7
    assert "until" in repr(vec_env_state(env))
    assert repr(_env_state(env, None)) == repr(vec_env_state(env))
    assert type(env.obs_rms) is Until


def test_a_model_that_was_trained_in_parts_is_loaded_with_one_environment(tmp_path):
    Case().make_model(4, micro_batches=2).save(tmp_path / "model.zip")
    for trusted in (True, False):
        model = PPOPlus.load(tmp_path / "model.zip", make_env(), device="cpu", trusted=trusted)
        model.predict(np.zeros(3, np.float32))
        with pytest.raises(ValueError, match="micro_batches=2 and 1 environments"):
            model.learn(8)


def test_a_seed_begins_the_random_numbers_of_parts_anew():
    model = Case().make_model(4, micro_batches=2)
    actions = []
    for _ in range(2):
        model.set_random_seed(5)
        model._last_obs = None
        model.learn(8, reset_num_timesteps=True)
        actions.append(model._parts.streams()[0].states[0].clone())
    assert th.equal(*actions)


def test_what_users_put_into_callbacks_stays_there():
    callback = EvalCallback(make_env(), verbose=0)
    callback._on_step = lambda: True
    put = callback._on_step
    build().learn(32, callback)
    assert callback._on_step is put


def test_moments_of_groups_add_up_to_those_of_all():
    generator = np.random.default_rng(0)
    values, groups = generator.normal(3, 2, 100), generator.integers(0, 3, 100)
    parts = [Moments.of_groups(values[part], groups[part], 4) for part in (slice(0, 30), slice(30, 100))]
    together = parts[0].together_with(parts[1])
    for group in range(3):
        chosen = values[groups == group]
        assert together.number[group] == len(chosen)
        np.testing.assert_allclose(together.mean[group], chosen.mean())
        np.testing.assert_allclose(together.squares[group] / len(chosen), chosen.var())
    assert together.number[3] == together.squares[3] == 0


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda parts: parts.update(entropy=-1), "entropy"),
        (lambda parts: parts.update(streams=[]), "micro-batches"),
        (lambda parts: parts.update(gsde=[{"low": 1}]), "gsde"),
        (lambda parts: parts.pop("gsde"), "parts"),
    ],
)
def test_random_numbers_of_parts_in_a_file_without_trust_are_checked(spoil, message, tmp_path):
    interrupted(tmp_path, micro_batches=2)
    path = rewritten(tmp_path, lambda files, state: spoil(state["parts"]))
    if message == "micro-batches":
        with pytest.warns(UserWarning, match=message):
            PPOPlus.resume(path, toys(2), device="cpu", trusted=False)
        return
    with pytest.raises(CheckpointError, match=message):
        PPOPlus.resume(path, toys(2), device="cpu", trusted=False)


def test_a_random_stream_that_leads_out_of_pytorchs_memory_is_refused(tmp_path):
    model = interrupted(tmp_path, micro_batches=2)
    state = {"parts": model._parts.state()["parts"]}
    stream = state["parts"]["streams"][1][0]
    stream[8:12] = th.from_numpy(np.array([624], np.int32).view(np.uint8))
    stream[16:24] = th.from_numpy(np.array([624], np.uint64).view(np.uint8))
    with pytest.raises(ValueError, match="left=624, next=624"):
        _check_parts(model, state["parts"])


def test_a_model_without_trust_cannot_ask_for_more_parts_than_minibatches_have(tmp_path):
    model = Case().make_model(4)
    model.micro_batches = 10**12
    model.save(tmp_path / "model.zip")
    with pytest.raises(UntrustedFileError, match="batch_size"):
        PPOPlus.load(tmp_path / "model.zip", device="cpu", trusted=False)
