"""Models with Tuple and Dict actions in files and checkpoints."""

import numpy as np
import pytest
import torch as th
from hybrid_cases import CASES, CHOOSING, EVERY_CASE, NESTED, USED_PARTS, HybridToy, MaskedHybridToy, build, make_env
from interrupted_runs import StopAfter
from states import assert_same_bits, state_of

from sb3_ppo_plus import PPOPlus, ResumableEnv, TrainingCheckpoint


@EVERY_CASE
@pytest.mark.parametrize("trusted", [True, False])
def test_a_saved_model_predicts_and_trains_as_before(case, trusted, tmp_path):
    model = build(**case).learn(64)
    model.save(tmp_path / "model.zip")
    loaded = PPOPlus.load(tmp_path / "model.zip", device="cpu", trusted=trusted)
    assert loaded.action_space == model.action_space
    assert_same_bits(
        {name: value for name, value in model.policy.state_dict().items()},
        {name: value for name, value in loaded.policy.state_dict().items()},
    )
    assert loaded.policy_kwargs == model.policy_kwargs
    one = np.array([0.1, -0.2, 0.9], np.float32)
    for deterministic in (True, False):
        th.manual_seed(2)
        expected = model.predict(one, deterministic=deterministic)[0]
        th.manual_seed(2)
        assert_same_bits(loaded.predict(one, deterministic=deterministic)[0], expected)
    env = make_env(action_space=case.get("action_space", NESTED))
    PPOPlus.load(tmp_path / "model.zip", env=env, device="cpu", trusted=trusted).learn(64)


@pytest.mark.parametrize("by", ["state", "replay"])
@pytest.mark.parametrize("env_class", [HybridToy, MaskedHybridToy])
@pytest.mark.parametrize("trusted", [True, False])
def test_a_resumed_run_has_the_bits_of_one_without_interruption(by, env_class, trusted, tmp_path):
    def env():
        return make_env(env_class=env_class, wrapper_class=lambda env: ResumableEnv(env, by=by))

    def model():
        return build(env(), n_steps=8, batch_size=8)

    whole = model().learn(96)
    model().learn(96, [TrainingCheckpoint(1, tmp_path), StopAfter(48)])
    resumed = PPOPlus.resume(tmp_path, env(), device="cpu", trusted=trusted)
    assert resumed.num_timesteps == 48
    resumed.continue_learning()
    assert_same_bits(state_of(whole), state_of(resumed))


def test_a_saved_policy_loads(tmp_path):
    policy = build(**CASES["used parts"]).policy
    policy.save(tmp_path / "policy.pt")
    loaded = type(policy).load(tmp_path / "policy.pt", device="cpu")
    one = np.zeros(3, np.float32)
    assert_same_bits(loaded.predict(one, deterministic=True)[0], policy.predict(one, deterministic=True)[0])
    assert loaded.used_parts == USED_PARTS


def test_a_model_of_another_space_is_refused(tmp_path):
    build().save(tmp_path / "model.zip")
    with pytest.raises(ValueError, match="Action spaces do not match"):
        PPOPlus.load(tmp_path / "model.zip", env=make_env(action_space=CHOOSING))
