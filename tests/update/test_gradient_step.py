"""One optimiser step as users see it: clipping, early stop, and precision (AMP)."""

import copy
from functools import partial

import models
import numpy as np
import pytest
import torch as th
from environments import ACTION_SPACES, SMALL_DICT, SMALL_NET, logs_of_updates, make_env, toy_envs
from gymnasium import spaces
from stable_baselines3.common.buffers import RolloutBuffer

from sb3_ppo_plus import PPOPlusRolloutBuffer
from sb3_ppo_plus.update import gradient_step
from sb3_ppo_plus.update.gradient_step import resolve_amp

# AMP is also tested on a GPU, if there is one
DEVICES = ["cpu", "cuda"] if th.cuda.is_available() else ["cpu"]
PRECISIONS = [("cpu", "bf16"), *([("cuda", "bf16"), ("cuda", "fp16")] if th.cuda.is_available() else [])]
STEPS = 32


build = partial(models.build, batch_size=STEPS, n_epochs=1)
"""A model that takes one gradient step per update."""


def vector_of(model):
    return model.policy.parameters_to_vector().astype(np.float64)


def update_of(model):
    """Train for one update, with random numbers from seed 0, and return what it logs."""
    model.set_random_seed(0)
    (logs,) = logs_of_updates(model, STEPS)
    return logs


def plain_sgd(**settings):
    """A model whose every step is -1 times the clipped gradient."""
    return build(policy_kwargs=SMALL_NET | {"optimizer_class": "sgd"}, **{"learning_rate": 1.0} | settings)


# Clipping


def test_a_small_gradient_is_not_scaled_and_its_norm_is_logged():
    model = plain_sgd(max_grad_norm=1e6)
    before = vector_of(model)
    logs = update_of(model)
    assert np.linalg.norm(vector_of(model) - before) == pytest.approx(logs["train/grad_norm"], rel=1e-4)


def test_a_large_gradient_is_scaled_to_the_allowed_norm_and_its_norm_before_is_logged():
    whole, clipped = plain_sgd(max_grad_norm=1e6), plain_sgd(max_grad_norm=0.01)
    before = vector_of(whole)
    logs_whole, logs = update_of(whole), update_of(clipped)
    assert logs["train/grad_norm"] == pytest.approx(logs_whole["train/grad_norm"], rel=1e-6)
    assert logs["train/grad_norm"] > 0.05
    change, whole_change = vector_of(clipped) - before, vector_of(whole) - before
    assert np.linalg.norm(change) == pytest.approx(0.01, rel=1e-3)
    cosine = change @ whole_change / np.linalg.norm(change) / np.linalg.norm(whole_change)
    assert cosine == pytest.approx(1.0, abs=1e-5)


def test_the_logged_norm_is_the_mean_over_steps():
    settings = {"learning_rate": 0.1, "max_grad_norm": 1e6}
    positions, logs = [vector_of(plain_sgd())], {}
    for n_epochs in (1, 2, 3):
        model = plain_sgd(n_epochs=n_epochs, **settings)
        logs = update_of(model)
        positions.append(vector_of(model))
    lengths = np.linalg.norm(np.diff(positions, axis=0), axis=1)
    assert np.ptp(lengths) > 0.01 * lengths.mean()
    assert logs["train/grad_norm"] == pytest.approx(lengths.mean() / 0.1, rel=1e-4)


# Early stop


def test_target_kl_stops_before_the_offending_step():
    stopped = build(n_epochs=5, target_kl=1e-9, learning_rate=1e-2)
    one_step = build(n_epochs=1, learning_rate=1e-2)
    logs = update_of(stopped)
    reference = update_of(one_step)
    assert np.array_equal(vector_of(stopped), vector_of(one_step))
    assert (logs["train/early_stopped"], logs["train/n_epochs_done"]) == (1, 1)
    assert (reference["train/early_stopped"], reference["train/n_epochs_done"]) == (0, 1)
    # The norm is that of the only step taken; the KL is that of the offending minibatch
    assert logs["train/grad_norm"] == pytest.approx(reference["train/grad_norm"], rel=1e-6)
    assert logs["train/approx_kl"] > 1.5e-9
    assert abs(reference["train/approx_kl"]) < 1e-6


def test_an_update_that_stops_in_its_first_epoch_has_completed_none():
    logs = update_of(build(batch_size=8, n_epochs=5, target_kl=1e-9, learning_rate=1e-2))
    assert (logs["train/early_stopped"], logs["train/n_epochs_done"], logs["train/n_updates"]) == (1, 0, 1)


def test_an_update_that_stops_at_its_very_first_minibatch_changes_nothing():
    class Shifted(PPOPlusRolloutBuffer):
        def compute_returns_and_advantage(self, last_values, dones):
            super().compute_returns_and_advantage(last_values, dones)
            self.log_probs -= 1.0

    model = build(target_kl=0.01, rollout_buffer_class=Shifted)
    before = vector_of(model)
    logs = update_of(model)
    assert np.array_equal(vector_of(model), before)
    assert logs["train/approx_kl"] == pytest.approx(np.e - 2, rel=1e-4)
    assert logs["train/early_stopped"] == 1
    assert "train/grad_norm" not in logs or logs["train/grad_norm"] == 0.0


@pytest.mark.parametrize(("factor", "stops"), [(1.49, False), (1.51, True)])
def test_the_threshold_is_one_and_a_half_times_target_kl(factor, stops):
    settings = {"n_epochs": 2, "learning_rate": 1e-2}
    logs = update_of(build(**settings))
    kl_of_second_epoch = logs["train/approx_kl"]
    logs = update_of(build(**settings, target_kl=kl_of_second_epoch / factor))
    assert logs["train/early_stopped"] == int(stops)


# AMP


@pytest.mark.parametrize(
    ("amp", "dtype"), [(False, None), (True, th.bfloat16), ("bf16", th.bfloat16)], ids=["off", "True", "bf16"]
)
def test_amp_stands_for_a_dtype(amp, dtype):
    assert resolve_amp(amp, th.device("cpu")) is dtype


def test_fp16_is_for_cuda():
    assert resolve_amp("fp16", th.device("cuda")) is th.float16
    with pytest.raises(ValueError, match=r"amp='fp16'.*CUDA.*cpu.*'bf16'"):
        resolve_amp("fp16", th.device("cpu"))


@pytest.mark.parametrize("amp", ["float16", "bfloat16", "", None, 1.5, 2, th.bfloat16], ids=str)
def test_other_values_of_amp_are_refused(amp):
    with pytest.raises(ValueError, match=r"amp must be False, True, 'bf16' or 'fp16', got"):
        resolve_amp(amp, th.device("cpu"))


def test_fp16_on_cpu_is_refused_before_any_env_step():
    env = make_env()
    with pytest.raises(ValueError, match="amp='fp16'"):
        build(env, amp="fp16")
    assert toy_envs(env)[0].calls["step"] == 0


CASES = {
    "gaussian": {},
    "gSDE": {"use_sde": True},
    "squashed_gaussian": {"policy_kwargs": SMALL_NET | {"action_dist": "squashed_gaussian"}},
    "beta": {"policy_kwargs": SMALL_NET | {"action_dist": "beta"}},
    "discrete": {"env": {"action_space": ACTION_SPACES["discrete"]}},
    "multi_binary": {"env": {"action_space": ACTION_SPACES["multi_binary"]}},
    "dict": {"policy": "MultiInputPolicy", "env": {"observation_space": SMALL_DICT}},
    "separate": {"policy_kwargs": SMALL_NET | {"share_features_extractor": False}, "critic_learning_rate": 1e-3},
    "transformer": {
        "env": {"observation_space": spaces.Box(-1, 1, (4, 3), np.float32)},
        "policy_kwargs": {
            "features_extractor_class": "transformer",
            "features_extractor_kwargs": {"d_model": 8, "n_heads": 2},
        },
    },
    "impala": {
        "policy": "CnnPolicy",
        "env": {"observation_space": spaces.Box(0, 255, (9, 9, 1), np.uint8)},
        "policy_kwargs": {
            "features_extractor_class": "impala_cnn",
            "features_extractor_kwargs": {"features_dim": 8, "channels": (4, 4)},
        },
    },
    "target_kl": {"target_kl": 0.01, "n_epochs": 3, "batch_size": 8},
}


@pytest.mark.parametrize(("device", "amp"), PRECISIONS)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_amp_trains_float32_parameters(case, device, amp):
    case = copy.deepcopy(case)
    model = build(make_env(2, **case.pop("env", {})), amp=amp, device=device, **case)
    before = vector_of(model)
    logs = logs_of_updates(model, 4 * STEPS)
    assert not np.array_equal(vector_of(model), before)
    assert all(parameter.dtype == th.float32 for parameter in model.policy.parameters())
    assert all(parameter.isfinite().all() for parameter in model.policy.parameters())
    for entries in model.policy.optimizer.state_dict()["state"].values():
        assert all(value.dtype == th.float32 for value in entries.values())
    for update in logs:
        assert all(np.isfinite(value) for name, value in update.items() if name.startswith("train/"))


@pytest.mark.parametrize("device", DEVICES)
def test_a_bf16_step_is_a_little_different_from_a_float32_step(device):
    models = [plain_sgd(amp=amp, device=device, max_grad_norm=1e6, learning_rate=1e-3) for amp in (False, "bf16")]
    before = vector_of(models[0])
    assert np.array_equal(before, vector_of(models[1]))
    exact, rounded = (update_of(model) for model in models)
    steps = [vector_of(model) - before for model in models]
    assert not np.array_equal(*steps), "autocast was not on"
    assert steps[0] @ steps[1] / np.linalg.norm(steps[0]) / np.linalg.norm(steps[1]) > 0.999
    assert np.linalg.norm(steps[1]) == pytest.approx(np.linalg.norm(steps[0]), rel=0.02)
    for name in ("train/loss", "train/value_loss", "train/entropy_loss"):
        assert rounded[name] == pytest.approx(exact[name], rel=0.02, abs=0.02), name


@pytest.mark.parametrize("case", ["gaussian", "gSDE", "squashed_gaussian", "beta", "discrete", "multi_binary"])
def test_under_autocast_hidden_layers_are_bf16_and_heads_losses_inputs_float32(case):
    case = copy.deepcopy(CASES[case])
    policy = build(make_env(**case.pop("env", {})), **case).policy
    dtypes = {}
    for name, module in (("hidden", policy.mlp_extractor.policy_net[0]), ("head", policy.action_net)):
        module.register_forward_hook(lambda _, __, output, name=name: dtypes.update({name: output.dtype}))
    observations = th.randn(5, 3)
    actions, _, _ = policy(observations)
    with th.autocast("cpu", dtype=th.bfloat16):
        values, log_prob, entropy = policy.evaluate_actions(observations, actions)
    assert dtypes == {"hidden": th.bfloat16, "head": th.float32}
    assert values.dtype == log_prob.dtype == entropy.dtype == th.float32


def test_the_rollout_itself_is_float32():
    """So predict, callbacks and the env see equal actions with and without AMP."""
    actions = []
    for amp in (False, True):
        model = build(amp=amp)
        model.learn(STEPS)
        actions.append(toy_envs(model.env)[0].actions)
    assert np.array_equal(*actions)


def test_amp_needs_a_rollout_buffer_of_ours():
    class Own(RolloutBuffer):
        pass

    with pytest.raises(ValueError, match=r"amp=True.*rollout_buffer_class.*PPOPlusRolloutBuffer.*Own"):
        build(amp=True, rollout_buffer_class=Own)


def test_large_policies_are_not_stepped_flat_and_learn_equally(monkeypatch):
    flat = build(seed=0).learn(STEPS * 3)
    monkeypatch.setattr(gradient_step, "MAX_FLAT_ON_CPU", 10)
    separate = build(seed=0).learn(STEPS * 3)
    assert (
        flat._execution.gradient_step.has_gradient is not None
        and separate._execution.gradient_step.has_gradient is None
    )
    assert (vector_of(flat) == vector_of(separate)).all()
