"""Exports give the actions of ``predict``: some of all cases, which product.py tries in full."""

import numpy as np
import pytest
from export_cases import Case, differences, make_envs, make_model
from stable_baselines3.common.evaluation import evaluate_policy

from sb3_ppo_plus import export_policy
from sb3_ppo_plus.export import load_exported

# Each distribution, each network in both formats, normalised and masked, at least once
CASES = [
    Case("gaussian", "mlp", is_normalized=True),
    Case("squashed_gaussian", "cnn", is_normalized=True),
    Case("beta_mean", "dict", is_normalized=True),
    Case("beta_mode", "transformer", is_normalized=True),
    Case("gsde", "lstm", is_normalized=True),
    Case("gsde_squashed", "gru"),
    Case("discrete", "cnn", is_masked=True),
    Case("multi_discrete", "gtrxl", is_normalized=True, is_masked=True),
    Case("multi_binary", "mlp"),
    Case("multi_binary", "lstm", is_masked=True),
    Case("discrete", "dict"),
    Case("hybrid", "mlp", is_normalized=True),
    Case("hybrid_beta", "gru", is_masked=True),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_an_export_gives_the_actions_of_predict(case, tmp_path):
    model, seen, raw, normalize = make_model(case)
    exports = {
        suffix: load_exported(export_policy(model, tmp_path / f"policy.{suffix}", normalize))
        for suffix in ("onnx", "pt2")
    }
    for name, found in differences(case, model, seen, raw, exports, n_steps=50).items():
        assert found.error <= 1e-5 and found.n_other == 0, (name, found)
        assert found.n_rounded <= 0.02 * found.n, (name, found)
        assert found.n_distinct >= 4 and found.n_close < 0.1 * found.n, "the case proves nothing"


@pytest.mark.parametrize("network", ["lstm", "gru", "gtrxl"])
def test_whole_episodes_have_the_same_actions(network, tmp_path):
    """Five environments take an episode each, one observation after another through onnxruntime."""
    case = Case("gaussian", network, is_normalized=True)
    model, _, _, normalize = make_model(case)
    export = load_exported(export_policy(model, tmp_path / "policy.onnx", normalize))
    for seed in range(5):
        _, env, _ = make_envs(case, n_envs=1, seed=seed)
        observation, state, exported_state, start = env.reset(), None, None, np.ones(1, bool)
        forgotten = []
        for _ in range(40):
            expected, state = model.predict(normalize.normalize_obs(observation), state, start, deterministic=True)
            action, exported_state = export.predict(observation, exported_state, start)
            np.testing.assert_allclose(action, expected, rtol=0, atol=1e-5 * 0.5)
            forgotten.append(np.abs(export.predict(observation)[0] - action).max())
            observation, _, start, _ = env.step(expected)
        assert start.all() and max(forgotten) > 1e-3, "the memory does nothing"


@pytest.mark.parametrize("suffix", ["onnx", "pt2"])
@pytest.mark.parametrize("network", ["mlp", "gru"])
def test_evaluate_policy_gives_the_score_of_the_model(network, suffix, tmp_path):
    case = Case("squashed_gaussian", network, is_normalized=True)
    model, _, _, normalize = make_model(case)
    export = load_exported(export_policy(model, tmp_path / f"policy.{suffix}", normalize))
    seen, raw, other = make_envs(case, n_envs=2, seed=5)
    other.obs_rms, other.training, other.norm_reward = normalize.obs_rms, False, False
    expected = evaluate_policy(model, seen, n_eval_episodes=4, return_episode_rewards=True, warn=False)
    found = evaluate_policy(export, raw, n_eval_episodes=4, return_episode_rewards=True, warn=False)
    assert found[1] == expected[1]
    # The pendulum is chaotic: rounding grows
    np.testing.assert_allclose(found[0], expected[0], rtol=1e-3)
