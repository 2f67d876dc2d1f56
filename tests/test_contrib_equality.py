"""With masks, after any number of updates everything that was trained equals sb3-contrib's MaskablePPO bit for bit."""

import copy

import numpy as np
import pytest
import torch as th
from environments import (
    IMAGE,
    MASKED_ACTION_SPACES,
    SMALL_DICT,
    SMALL_NET,
    MaskedEnv,
    logs_of_updates,
    make_env,
    make_masked_env,
)
from sb3_contrib import MaskablePPO
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.utils import set_random_seed
from stable_baselines3.common.vec_env import SubprocVecEnv, VecNormalize
from states import assert_same_training

from sb3_ppo_plus import PPOPlus

pytestmark = [
    pytest.mark.filterwarnings("ignore:You have specified a mini-batch size"),
    pytest.mark.usefixtures("replayed_after_a_while"),
]

SETTINGS = {
    "n_steps": 32,
    "batch_size": 24,
    "n_epochs": 3,
    "ent_coef": 0.01,
    "seed": 3,
    "device": "cpu",
    "policy_kwargs": SMALL_NET,
}
UPDATES = 3


def assert_trains_alike(policy="MlpPolicy", env=make_masked_env, updates=UPDATES, plus=None, **settings):
    models = []
    for algorithm, more in ((MaskablePPO, {}), (PPOPlus, plus or {})):
        model = algorithm(policy, env(), **copy.deepcopy(SETTINGS | settings), **more)
        initial = copy.deepcopy(model.policy.state_dict())
        models.append(model.learn(updates * model.n_steps * model.n_envs))
        moved = [not th.equal(initial[name], value) for name, value in model.policy.state_dict().items()]
        assert any(moved), "nothing was trained: the case proves nothing"
    assert_same_training(*models)
    return models


@pytest.mark.parametrize("n_envs", [1, 3])
@pytest.mark.parametrize("action_space", MASKED_ACTION_SPACES.values(), ids=MASKED_ACTION_SPACES)
def test_action_spaces(action_space, n_envs):
    assert_trains_alike(env=lambda: make_masked_env(n_envs, action_space=action_space))


@pytest.mark.parametrize("action_space", MASKED_ACTION_SPACES.values(), ids=MASKED_ACTION_SPACES)
def test_dict_observations(action_space):
    assert_trains_alike(
        "MultiInputPolicy", lambda: make_masked_env(observation_space=SMALL_DICT, action_space=action_space)
    )


@pytest.mark.parametrize("share", [True, False], ids=["shared", "separate"])
def test_images(share):
    assert_trains_alike(
        "CnnPolicy",
        lambda: make_masked_env(observation_space=IMAGE),
        n_steps=8,
        batch_size=8,
        n_epochs=2,
        policy_kwargs={"features_extractor_kwargs": {"features_dim": 16}, "share_features_extractor": share},
    )


def test_target_kl_that_stops_updates():
    contrib, _ = assert_trains_alike(target_kl=1e-3, learning_rate=1e-2)
    assert contrib._n_updates < UPDATES * SETTINGS["n_epochs"], "nothing was stopped: the case proves nothing"


def test_value_clipping():
    assert_trains_alike(clip_range_vf=0.02, learning_rate=1e-2, plus={"pessimistic_value_clip": False})


@pytest.mark.parametrize("max_steps", [1, 3, 1000])
def test_timeouts(max_steps):
    """The value that is bootstrapped from does not depend on masks."""
    assert_trains_alike(env=lambda: make_masked_env(max_steps=max_steps, p_terminate=0.05))


def test_vec_normalize():
    assert_trains_alike(env=lambda: VecNormalize(make_masked_env(action_space=MASKED_ACTION_SPACES["multi_discrete"])))


def test_subprocesses():
    assert_trains_alike(
        env=lambda: make_vec_env(MaskedEnv, 2, vec_env_cls=SubprocVecEnv, vec_env_kwargs={"start_method": "fork"}),
        updates=2,
    )


class SeeLocals(BaseCallback):
    """Copies what callbacks are shown at each step."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def _on_step(self):
        self.seen.append(copy.deepcopy({name: self.locals[name] for name in SHOWN}))
        return True


SHOWN = ["n_steps", "action_masks", "obs_tensor", "actions", "values", "log_probs", "new_obs", "rewards", "dones"]


def test_what_callbacks_see():
    seen = []
    for algorithm in (MaskablePPO, PPOPlus):
        callback = SeeLocals()
        algorithm("MlpPolicy", make_masked_env(3), **SETTINGS).learn(96, callback)
        seen.append(callback.seen)
    for expected, ours in zip(*seen, strict=True):
        for name, value in expected.items():
            assert type(ours[name]) is type(value), name
            np.testing.assert_array_equal(ours[name], value, err_msg=name)


def test_callbacks_see_that_there_are_no_masks():
    callback = SeeLocals()
    env = make_env(3, action_space=MASKED_ACTION_SPACES["discrete"])
    PPOPlus("MlpPolicy", env, **SETTINGS).learn(96, callback)
    assert all(seen["action_masks"] is None for seen in callback.seen)


def test_what_is_logged():
    expected, actual = (
        logs_of_updates(algorithm("MlpPolicy", make_masked_env(), **SETTINGS), 3 * 64)
        for algorithm in (MaskablePPO, PPOPlus)
    )
    for logged, ours in zip(expected, actual, strict=True):
        names = logged.keys() - {"time/fps", "time/time_elapsed"}
        assert len(names) >= 9
        for name in names:
            assert ours[name] == pytest.approx(logged[name], rel=1e-5, abs=1e-7, nan_ok=True), name


@pytest.mark.parametrize("action_space", MASKED_ACTION_SPACES.values(), ids=MASKED_ACTION_SPACES)
def test_a_saved_model_of_contribs_trains_on_alike(action_space, tmp_path):
    MaskablePPO("MlpPolicy", make_masked_env(action_space=action_space), **SETTINGS).learn(64).save(tmp_path / "model")
    models = []
    for algorithm in (MaskablePPO, PPOPlus):
        model = algorithm.load(tmp_path / "model", env=make_masked_env(action_space=action_space), device="cpu")
        set_random_seed(5)
        models.append(model.learn(128, reset_num_timesteps=False))
    assert_same_training(*models)
    assert PPOPlus.load(tmp_path / "model").needs_masks
