"""A memory in rollouts and updates: sequences in the buffer, the invariants, and states between steps."""

from dataclasses import replace

import numpy as np
import pytest
import torch as th
from environments import (
    ACTION_SPACES,
    ASYMMETRIC,
    SMALL_DICT,
    SMALL_NET,
    ConstantRewardEnv,
    logs_of_updates,
    make_env,
)
from sb3_contrib.common.recurrent.type_aliases import RNNStates
from stable_baselines3.common.buffers import RolloutBuffer
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize
from torch.utils._pytree import tree_leaves, tree_map

from sb3_ppo_plus import PPOPlus
from sb3_ppo_plus.fast.compiled_step import CompiledGradientStep
from sb3_ppo_plus.update.losses import LossCoefficients, ppo_loss

MEMORIES = {
    "lstm": {"memory": "lstm", "memory_kwargs": {"hidden_size": 8}},
    "gru": {"memory": "gru", "memory_kwargs": {"hidden_size": 8, "shared": True}},
    "gtrxl": {"memory": "gtrxl", "memory_kwargs": {"hidden_size": 8, "n_layers": 2, "memory_length": 5}},
}


def build(memory="lstm", n_envs=3, n_steps=32, env=None, sequence_length=None, policy="MlpPolicy", **settings):
    options = MEMORIES[memory]
    policy_kwargs = SMALL_NET | {**options, "memory_kwargs": {**options["memory_kwargs"]}}
    policy_kwargs["memory_kwargs"]["sequence_length"] = sequence_length
    policy_kwargs |= settings.pop("policy_kwargs", {})
    env_kwargs = {name: settings.pop(name) for name in ("action_space", "observation_space") if name in settings}
    settings = {"n_steps": n_steps, "batch_size": n_envs * n_steps, "n_epochs": 1, "seed": 0} | settings
    env = env or make_env(n_envs, **env_kwargs)
    return PPOPlus(policy, env, policy_kwargs=policy_kwargs, device="cpu", **settings)


def collect(model):
    """Collect one rollout, and return the buffer."""
    model.train = lambda: None
    model.learn(model.n_steps * model.n_envs)
    return model.rollout_buffer


# The buffer's sequences


@pytest.mark.parametrize("after_get", [False, True], ids=["", "after SB3's get"])
@pytest.mark.parametrize("sequence_length", [1, 5, 8, 32, -1])
@pytest.mark.parametrize("policy", ["MlpPolicy", "MultiInputPolicy"])
def test_minibatches_hold_every_transition_once_in_the_order_of_its_environment(policy, sequence_length, after_get):
    space = {"observation_space": SMALL_DICT} if policy == "MultiInputPolicy" else {}
    model = build(policy=policy, sequence_length=sequence_length, **space)
    buffer = collect(model)
    if after_get:
        next(iter(buffer.get(8)))
        buffer._rollout = None
    n_steps, n_envs = 32, 3
    numbers = np.arange(n_steps * n_envs, dtype=np.float32).reshape(n_steps, n_envs)
    buffer.advantages = numbers.T.reshape(-1, 1) if after_get else numbers
    length, seen = buffer.sequence_length, []
    assert length == (32 if sequence_length == -1 else sequence_length)
    for minibatch in buffer.minibatches(32):
        batch = minibatch.batch()
        n_sequences = batch.context["states"].pi[0].shape[1]
        assert n_sequences <= 32 // length
        given = batch.advantages.view(n_sequences, length)
        valid = th.ones_like(given, dtype=th.bool) if batch.valid is None else batch.valid.view(n_sequences, length)
        for numbers_of_sequence, is_real in zip(given, valid, strict=True):
            assert not is_real.diff().any() or is_real[0], "padding comes last"
            real = numbers_of_sequence[is_real].int()
            assert (real.diff() == n_envs).all()
            assert real[0] // n_envs % length == 0
            seen.extend(real.tolist())
        starts = batch.context["episode_starts"].view(n_sequences, length)
        expected = buffer.episode_starts.reshape(n_steps, n_envs).reshape(-1)[given[valid].int()]
        assert np.array_equal(starts[valid].numpy(), expected > 0)
    assert sorted(seen) == list(range(n_steps * n_envs))


@pytest.mark.parametrize("memory", MEMORIES)
def test_each_sequence_begins_with_the_states_that_acted_in_the_rollout(memory):
    class Keep(BaseCallback):
        def _on_step(self):
            self.states.append(self.locals["actor"].states)
            return True

    model, callback = build(memory, sequence_length=5), Keep()
    callback.states = [model.policy.initial_states(3)]
    model.train = lambda: None
    model.learn(96, callback)
    rollout = model.rollout_buffer.rollout()
    assert [part.shape[1] for part in tree_leaves(rollout.states)] == [7 * 3] * len(tree_leaves(rollout.states))
    for sequence in range(7):
        for stored, acted in zip(tree_leaves(rollout.states), tree_leaves(callback.states[5 * sequence]), strict=True):
            assert th.equal(stored[:, 3 * sequence : 3 * sequence + 3], acted)
    assert all(
        th.equal(*pair) for pair in zip(*map(tree_leaves, (model._last_states, callback.states[-1])), strict=True)
    )


@pytest.mark.parametrize("sequence_length", [5, 8, 32])
@pytest.mark.parametrize("memory", MEMORIES)
def test_sequences_evaluate_to_the_values_and_log_probs_of_the_rollout(memory, sequence_length):
    model = build(memory, sequence_length=sequence_length)
    buffer = collect(model)
    for minibatch in buffer.minibatches(64):
        batch = minibatch.batch()
        with th.no_grad():
            values, log_prob, _ = model.policy.evaluate_actions(batch.observations, batch.actions, **batch.context)
        valid = slice(None) if batch.valid is None else batch.valid
        th.testing.assert_close(values.flatten()[valid], batch.old_values[valid], rtol=0, atol=1e-6)
        th.testing.assert_close(log_prob[valid], batch.old_log_prob[valid], rtol=0, atol=1e-5)


# Invariant 2


@pytest.mark.parametrize("memory", MEMORIES)
@pytest.mark.parametrize("sequence_length", [1, 5, 32])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"use_sde": True, "sde_sample_freq": 4},
        {"policy_kwargs": {"action_dist": "squashed_gaussian"}},
        {"policy_kwargs": {"action_dist": "beta"}},
        {"action_space": ACTION_SPACES["discrete"]},
        {"action_space": ACTION_SPACES["multi_discrete"]},
        {"action_space": ACTION_SPACES["multi_binary"]},
    ],
    ids=["gaussian", "gSDE", "squashed", "beta", "discrete", "multi_discrete", "multi_binary"],
)
def test_log_ratio_is_zero_before_the_first_step(memory, sequence_length, settings):
    model = build(memory, sequence_length=sequence_length, learning_rate=1e-2, **settings)
    # After the first update, the policy continues from states that the old parameters made
    model.learn(96)
    # With a learning rate of 0, each minibatch counts as before the first step
    model.learning_rate, model.clip_range = 0.0, 1e-4
    for logs in logs_of_updates(model, 2 * 96, reset_num_timesteps=False):
        assert np.isfinite([logs["train/approx_kl"], logs["train/loss"]]).all()
        assert logs["train/clip_fraction"] == 0.0


@pytest.mark.parametrize("memory", MEMORIES)
def test_log_ratio_is_near_zero_under_autocast(memory):
    (logs,) = logs_of_updates(build(memory, sequence_length=8, amp=True), 96)
    assert logs["train/approx_kl"] < 1e-6


# Invariant 5: padding and other episodes change nothing


@pytest.mark.parametrize("memory", MEMORIES)
def test_padding_changes_no_gradient(memory):
    model = build(memory, n_steps=11, n_envs=2, sequence_length=4, batch_size=24)
    buffer = collect(model)
    (minibatch,) = buffer.minibatches(24)
    batch = minibatch.batch()
    assert batch.valid is not None and (~batch.valid).sum() == 2

    def gradients(batch):
        model.policy.zero_grad()
        values, log_prob, entropy = model.policy.evaluate_actions(batch.observations, batch.actions, **batch.context)
        coefficients = LossCoefficients(0.2, None, 0.01, 0.5)
        switches = {"normalize_advantage": True, "pessimistic_value_clip": True}
        terms = ppo_loss(batch, values.flatten(), log_prob, entropy, coefficients, **switches)
        terms.loss.backward()
        return terms, [p.grad.clone() for p in model.policy.parameters()]

    terms, expected = gradients(batch)

    def padded(x, number):
        return th.where(batch.valid.view(-1, *[1] * (x.dim() - 1)), x, th.as_tensor(number, dtype=x.dtype))

    starts = batch.context["episode_starts"]
    other = replace(
        batch,
        observations=padded(batch.observations, 0.3),
        old_log_prob=padded(batch.old_log_prob, np.nan),
        advantages=padded(batch.advantages, np.inf),
        returns=padded(batch.returns, -np.inf),
        context={**batch.context, "episode_starts": th.where(batch.valid, starts, ~starts)},
    )
    padded_terms, actual = gradients(other)
    for pair in zip(terms, padded_terms, strict=True):
        th.testing.assert_close(*pair, rtol=1e-5, atol=1e-7)
    for pair in zip(actual, expected, strict=True):
        th.testing.assert_close(*pair, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("memory", MEMORIES)
def test_the_previous_episode_changes_nothing(memory):
    """It changes no values, log-probs or gradients, even if the state holds that episode."""
    model = build(memory, sequence_length=8)
    rollout = collect(model).rollout()
    starts = rollout.context["episode_starts"].view(32, 3)
    env = int(starts[1:8].any(dim=0).nonzero()[0])
    begin = int(starts[1:8, env].nonzero()[0]) + 1
    indices = (th.arange(8) * 3 + env).view(1, 8)

    def evaluate(perturbation):
        batch = rollout.select(indices)
        observations = batch.observations.clone()
        observations[:begin] += perturbation
        context = {**batch.context, "states": tree_map(lambda part: part + perturbation, batch.context["states"])}
        model.policy.zero_grad()
        values, log_prob, _ = model.policy.evaluate_actions(observations, batch.actions, **context)
        (values[begin:].sum() + log_prob[begin:].sum()).backward()
        gradients = [p.grad.clone() for p in model.policy.parameters() if p.grad is not None]
        return values[begin:], log_prob[begin:], *gradients

    assert all(th.equal(*pair) for pair in zip(evaluate(0.0), evaluate(3.0), strict=True))


# Invariant 6: truncation bootstraps from the terminal observation, with the memory before the reset


@pytest.mark.parametrize("memory", MEMORIES)
@pytest.mark.parametrize("truncates", [True, False])
def test_truncation_bootstraps_from_the_state_before_the_reset(memory, truncates):
    env = DummyVecEnv([lambda length=length: ConstantRewardEnv(length, truncates) for length in (5, 3, 100)])
    model = build(memory, env=env, n_steps=12, gamma=0.9)
    buffer = collect(model)
    for index, length in enumerate((5, 3)):
        # All observations of the episode, including the terminal one
        observations = th.arange(length + 1.0).view(-1, 1)
        states = model.policy.initial_states(1)
        for observation in observations:
            values = model.policy.predict_values(observation.view(1, 1), states)
            *_, states = model.policy.forward_step(observation.view(1, 1), states=states)
        expected = 1.0 + (0.9 * values.item() if truncates else 0.0)
        assert buffer.rewards[length - 1, index] == pytest.approx(expected, abs=1e-5)
    assert (buffer.rewards[:, 2] == 1.0).all()


# States between rollouts, and what is refused


def test_states_continue_from_rollout_to_rollout_until_the_environments_are_reset():
    model = build(n_steps=8)
    model.learn(24)
    last = model._last_states
    model.learn(24, reset_num_timesteps=False)
    assert all(
        th.equal(*pair) for pair in zip(tree_leaves(model.rollout_buffer.states[0]), tree_leaves(last), strict=True)
    )
    model.learn(24)
    assert model.rollout_buffer.episode_starts[0].all()


def test_another_number_of_environments_begins_with_initial_states(tmp_path):
    model = build(n_steps=8)
    model.learn(24).save(tmp_path / "model")
    loaded = PPOPlus.load(tmp_path / "model", make_env(5))
    loaded.learn(40, reset_num_timesteps=False)
    assert loaded._last_states.pi[0].shape[1] == 5


@pytest.mark.parametrize("trusted", [True, False])
@pytest.mark.parametrize("memory", MEMORIES)
def test_a_saved_model_predicts_and_trains_on(memory, trusted, tmp_path):
    env = VecNormalize(make_env(3))
    model = build(memory, env=env, n_steps=8)
    model.learn(48).save(tmp_path / "model")
    loaded = PPOPlus.load(tmp_path / "model", env, trusted=trusted)
    assert isinstance(loaded.rollout_buffer.sequence_length, int)
    observations = env.reset()
    state = loaded_state = None
    for _ in range(3):
        action, state = model.predict(observations, state, deterministic=True)
        loaded_action, loaded_state = loaded.predict(observations, loaded_state, deterministic=True)
        assert np.array_equal(action, loaded_action)
    loaded.learn(24)


def test_a_rollout_buffer_class_other_than_ours_is_refused():
    with pytest.raises(ValueError, match="memory='lstm' needs a rollout_buffer_class that is None"):
        build(rollout_buffer_class=type("Mine", (RolloutBuffer,), {}))


def test_sde_noise_is_drawn_per_environment():
    model = build(use_sde=True, sde_sample_freq=4, action_space=ASYMMETRIC)
    model.learn(192)
    assert np.isfinite(model.logger.name_to_value["train/loss"])


def test_a_critic_learning_rate_reaches_the_critics_memory():
    model = build(critic_learning_rate=0.0, learning_rate=1e-2)
    before = {name: value.clone() for name, value in model.policy.state_dict().items()}
    model.learn(96)
    kept = {name for name, value in model.policy.state_dict().items() if th.equal(value, before[name])}
    assert {name for name in kept if "lstm" in name} == {name for name in before if "lstm_critic" in name}
    assert isinstance(model._last_states, RNNStates)


@pytest.mark.parametrize("memory", ["lstm", "gru"])
def test_with_dropout_the_sequences_of_lstm_and_gru_stay_eager_without_a_warning(memory, recwarn):
    options = {**MEMORIES[memory]["memory_kwargs"], "n_layers": 2, "dropout": 0.1}
    model = build(memory, compile=True, policy_kwargs={"memory_kwargs": options})
    model.learn(96)
    assert not isinstance(model._execution.gradient_step, CompiledGradientStep)
    assert not [warning for warning in recwarn if "compile" in str(warning.message)]
