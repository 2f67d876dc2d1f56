"""The design's invariants that hold for every distribution, extractor and setting; invariant 1 has its own file."""

import math

import numpy as np
import pytest
import torch as th
from environments import (
    ACTION_SPACES,
    ASYMMETRIC,
    BOX,
    SMALL_DICT,
    SMALL_NET,
    ConstantRewardEnv,
    logs_of_updates,
    make_env,
    toy_envs,
)
from gymnasium import spaces
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize

from sb3_ppo_plus import PPOPlus, RolloutBatch
from sb3_ppo_plus.update.losses import LossCoefficients, ppo_loss

N_ENVS, N_STEPS = 3, 32
ROLLOUT = N_ENVS * N_STEPS
WIDE = spaces.Box(np.array([-1e30, 0.0], np.float32), np.array([1e30, 3e38], np.float32))
THIN = spaces.Box(np.array([1.0, -2.0], np.float32), np.array([np.nextafter(np.float32(1), 2), -2.0], np.float32))
FLOAT64 = spaces.Box(np.array([-0.1, 0.3]), np.array([0.7, 0.30001]), dtype=np.float64)

DISTRIBUTIONS = {
    "gaussian": {},
    "gSDE": {"use_sde": True, "sde_sample_freq": 4},
    "gSDE squashed": {"use_sde": True, "policy_kwargs": {"squash_output": True}},
    "squashed_gaussian": {"policy_kwargs": {"action_dist": "squashed_gaussian"}},
    "beta": {"policy_kwargs": {"action_dist": "beta"}},
    "discrete": {"action_space": ACTION_SPACES["discrete"]},
    "multi_discrete": {"action_space": ACTION_SPACES["multi_discrete"]},
    "multi_binary": {"action_space": ACTION_SPACES["multi_binary"]},
}
BOX_DISTRIBUTIONS = {name: DISTRIBUTIONS[name] for name in list(DISTRIBUTIONS)[:5]}


def build(distribution, n_envs=N_ENVS, **settings):
    """A model of a distribution, by default with one gradient step per update, on the whole rollout."""
    given = dict(DISTRIBUTIONS[distribution])
    env = make_env(
        n_envs,
        action_space=settings.pop("action_space", given.pop("action_space", ASYMMETRIC)),
        observation_space=settings.pop("observation_space", BOX),
    )
    wrap = settings.pop("wrap", lambda env: env)
    policy_kwargs = SMALL_NET | given.pop("policy_kwargs", {}) | settings.pop("policy_kwargs", {})
    settings = {"policy": "MlpPolicy", "n_steps": N_STEPS, "batch_size": n_envs * N_STEPS, "n_epochs": 1} | settings
    return PPOPlus(env=wrap(env), policy_kwargs=policy_kwargs, seed=0, device="cpu", **given, **settings)


def make_extreme(policy, scale, shift, log_std=None):
    """Scale and shift what the action distribution gets, by turns up and down over its inputs."""
    with th.no_grad():
        policy.action_net.weight.mul_(scale * 100)
        signs = th.tensor([1.0, -1.0]).repeat(len(policy.action_net.bias))[: len(policy.action_net.bias)]
        policy.action_net.bias.copy_(shift * signs)
        if log_std is not None and getattr(policy, "log_std", None) is not None:
            policy.log_std.fill_(log_std)


# Invariant 2: before the first step of an update the log-ratio of every sample is 0


def fraction_above(model, bound):
    """Train one update of one step, and return the share of samples whose ratio was off 1 by more than ``bound``."""
    assert model.batch_size == model.n_steps * model.n_envs
    assert model.n_epochs == 1
    model.clip_range = bound
    (logs,) = logs_of_updates(model, model.n_steps * model.n_envs)
    assert np.isfinite([logs["train/approx_kl"], logs["train/loss"]]).all(), "no ratio exceeds a bound if all are NaN"
    return logs["train/clip_fraction"]


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_log_ratio_is_zero_before_the_first_step(distribution):
    assert fraction_above(build(distribution), 1e-4) == 0.0


@pytest.mark.parametrize(
    ("distribution", "scale", "shift", "log_std"),
    [
        ("gaussian", 1.0, 10.0, 0.0),
        ("gaussian", 1.0, 0.0, 2.0),
        ("gaussian", 1.0, 0.0, -3.0),
        ("gSDE", 1.0, 10.0, -2.0),
        ("gSDE squashed", 1.0, 5.0, -1.0),
        ("squashed_gaussian", 1.0, 0.0, -5.0),
        ("squashed_gaussian", 1.0, 20.0, -5.0),
        ("squashed_gaussian", 10.0, 0.0, -5.0),
        ("squashed_gaussian", 1.0, 0.0, 2.0),
        ("squashed_gaussian", 10.0, 5.0, 2.0),
        ("squashed_gaussian", 1.0, 20.0, 0.0),
        ("squashed_gaussian", 0.0, 100.0, -5.0),
        ("squashed_gaussian", 1.0, 0.0, -20.0),
        ("squashed_gaussian", 1.0, 0.0, 50.0),
        ("beta", 1.0, 5.0, None),
        ("beta", 0.0, 30.0, None),
        ("beta", 0.0, 1000.0, None),
        ("beta", 0.0, -1e5, None),
        ("beta", 100.0, 0.0, None),
        ("discrete", 100.0, 0.0, None),
        ("discrete", 1.0, 100.0, None),
        ("multi_discrete", 100.0, 0.0, None),
        ("multi_discrete", 1.0, 100.0, None),
        ("multi_binary", 100.0, 0.0, None),
        ("multi_binary", 1.0, 100.0, None),
    ],
)
def test_log_ratio_is_zero_where_the_policy_is_saturated(distribution, scale, shift, log_std):
    # One env, and layers so wide that the batch of the update rounds otherwise than the single row of the rollout
    model = build(distribution, n_envs=1, n_steps=128, batch_size=128, policy_kwargs={"net_arch": [64, 64]})
    make_extreme(model.policy, scale, shift, log_std)
    assert fraction_above(model, 1e-4) == 0.0


@pytest.mark.parametrize(
    "settings",
    [
        {"policy_kwargs": {"share_features_extractor": False, "activation_fn": "gelu"}},
        {"wrap": VecNormalize},
        {"policy": "MultiInputPolicy", "observation_space": SMALL_DICT},
        {
            "observation_space": spaces.Box(-1, 1, (4, 3), np.float32),
            "policy_kwargs": {
                "features_extractor_class": "transformer",
                "features_extractor_kwargs": {"d_model": 8, "n_heads": 2, "n_layers": 2},
            },
        },
        {
            "policy": "CnnPolicy",
            "observation_space": spaces.Box(0, 255, (9, 9, 3), np.uint8),
            "policy_kwargs": {
                "features_extractor_class": "impala_cnn",
                "features_extractor_kwargs": {"features_dim": 8, "channels": (4, 4)},
            },
        },
    ],
    ids=["separate", "VecNormalize", "dict", "transformer", "impala"],
)
@pytest.mark.parametrize("distribution", ["gaussian", "squashed_gaussian", "beta", "discrete"])
def test_log_ratio_is_zero_through_every_extractor(distribution, settings):
    assert fraction_above(build(distribution, **settings), 1e-4) == 0.0


@pytest.mark.parametrize("n_envs", [1, 3])
@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_log_ratio_is_zero_under_bf16(distribution, n_envs):
    model = build(distribution, n_envs, amp="bf16", policy_kwargs={"net_arch": [32, 32]})
    assert fraction_above(model, 1e-3) == 0.0


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_the_rollouts_log_prob_is_that_of_the_policy_on_the_buffers_own_content(distribution):
    class Compare(BaseCallback):
        def _on_step(self):
            return True

        def _on_rollout_end(self):
            buffer, policy = self.model.rollout_buffer, self.model.policy
            observations = th.as_tensor(buffer.observations).flatten(0, 1)
            actions = th.as_tensor(buffer.actions).flatten(0, 1).float()
            if isinstance(self.model.action_space, spaces.Discrete):
                actions = actions.long().flatten()
            with th.no_grad():
                _, log_prob, _ = policy.evaluate_actions(observations, actions)
            self.worst = (log_prob - th.as_tensor(buffer.log_probs).flatten()).abs().max().item()

    callback = Compare()
    build(distribution).learn(ROLLOUT, callback)
    assert callback.worst < 1e-4


# Invariant 3: actions stay inside the env's bounds, and nothing becomes non-finite


EXTREMES = [(1.0, 0.0, 3.0), (1.0, 1000.0, -10.0), (1e4, 0.0, -20.0), (0.0, -1e5, 2.0)]
# gSDE is SB3's, bit for bit: with squash_output, SB3's PPO too becomes nan from means around 20
MODERATE = [(1.0, 0.0, 1.0), (1.0, 5.0, -2.0)]


@pytest.mark.parametrize(
    ("distribution", "extreme"),
    [
        (distribution, extreme)
        for distribution in DISTRIBUTIONS
        for extreme in [(0.01, 0.0, 0.0), *(MODERATE if "gSDE" in distribution else EXTREMES)]
    ],
)
def test_the_env_gets_only_actions_of_its_space_and_the_model_stays_finite(distribution, extreme):
    model = build(distribution, n_epochs=2, batch_size=ROLLOUT // 2, ent_coef=0.01)
    make_extreme(model.policy, *extreme)
    # ToyEnv refuses every other action
    logs = logs_of_updates(model, 2 * ROLLOUT)
    assert sum(env.calls["step"] for env in toy_envs(model.env)) == 2 * ROLLOUT
    assert all(th.isfinite(parameter).all() for parameter in model.policy.parameters())
    for update in logs:
        for name, value in update.items():
            if name.startswith("train/") and name != "train/explained_variance":
                assert np.isfinite(value), (name, value)


@pytest.mark.parametrize("action_space", [WIDE, THIN, FLOAT64], ids=["wide", "thin", "float64"])
@pytest.mark.parametrize("distribution", BOX_DISTRIBUTIONS)
def test_bounds_of_every_kind_are_kept(distribution, action_space):
    for extreme in [(0.01, 0.0, 0.0), (1.0, 1000.0, 0.0)]:
        model = build(distribution, action_space=action_space)
        make_extreme(model.policy, *extreme)
        model.learn(ROLLOUT)
        observations = np.random.default_rng(0).uniform(-1, 1, (20, 3)).astype(np.float32)
        for deterministic in (True, False):
            actions, _ = model.predict(observations, deterministic=deterministic)
            assert all(action_space.contains(action) for action in actions)


@pytest.mark.parametrize("distribution", ["squashed_gaussian", "beta", "gSDE squashed"])
def test_bounded_distributions_reach_both_ends_of_asymmetric_bounds(distribution):
    model = build(distribution)
    observations = np.zeros((1, 3), np.float32)
    for shift, expected in ((1e3, [3.0, 2.0]), (-1e3, [-0.5, 2.5])):
        with th.no_grad():
            model.policy.action_net.weight.zero_()
            bias = th.tensor([shift, -shift])
            model.policy.action_net.bias.copy_(th.cat([bias, -bias]) if distribution == "beta" else bias)
        actions, _ = model.predict(observations, deterministic=True)
        np.testing.assert_allclose(actions[0], expected, atol=5e-3)


@pytest.mark.parametrize(("scale", "shift", "log_std"), EXTREMES)
@pytest.mark.parametrize(
    ("distribution", "stored"),
    [
        ("beta", [0.0, 1.0]),
        ("beta", [1.0, 1.0]),
        ("beta", [1e-30, 0.5]),
        ("squashed_gaussian", [0.0, 40.0]),
        ("squashed_gaussian", [-1e4, 1e4]),
        ("gSDE squashed", [-1.0, 1.0]),
        ("gaussian", [-100.0, 100.0]),
    ],
)
def test_log_prob_entropy_and_gradients_of_boundary_actions_are_finite(distribution, stored, scale, shift, log_std):
    policy = build(distribution).policy
    # Unclamped, SB3's Gaussian and gSDE leave float32 at such deviations
    make_extreme(policy, scale, shift, max(log_std, -5.0) if distribution[0] == "g" else log_std)
    observations = th.randn(5, 3, generator=th.Generator().manual_seed(0))
    values, log_prob, entropy = policy.evaluate_actions(observations, th.tensor([stored]).repeat(5, 1))
    loss = log_prob.mean() + values.mean() + (0.0 if entropy is None else entropy.mean())
    loss.backward()
    assert th.isfinite(log_prob).all()
    assert entropy is None or th.isfinite(entropy).all()
    for name, parameter in policy.named_parameters():
        assert parameter.grad is None or th.isfinite(parameter.grad).all(), name


@pytest.mark.parametrize("distribution", ["gaussian", "gSDE squashed", "squashed_gaussian", "beta"])
def test_callbacks_see_the_stored_actions_and_those_in_the_envs_units(distribution):
    class Look(BaseCallback):
        def _on_step(self):
            self.stored.extend(self.locals["actions"])
            self.clipped.extend(self.locals["clipped_actions"])
            return True

    callback = Look()
    callback.stored, callback.clipped = [], []
    model = build(distribution, n_envs=1)
    model.learn(N_STEPS, callback)
    assert np.array_equal(callback.clipped, toy_envs(model.env)[0].actions)
    stored = np.array(callback.stored)
    low, high = ASYMMETRIC.low, ASYMMETRIC.high
    expected = {
        "gaussian": np.clip(stored, low, high),
        "gSDE squashed": low + (stored + 1) / 2 * (high - low),
        "squashed_gaussian": low + (np.tanh(stored) + 1) / 2 * (high - low),
        "beta": low + stored * (high - low),
    }[distribution]
    np.testing.assert_allclose(callback.clipped, expected, rtol=1e-5, atol=1e-6)


# Invariant 5: a padded element influences nothing; test_losses.py has the single terms


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
@pytest.mark.parametrize("pessimistic_value_clip", [True, False])
def test_padding_changes_no_parameters_gradient(distribution, pessimistic_value_clip):
    policy = build(distribution).policy
    generator = th.Generator().manual_seed(0)
    size, valid = 10, th.arange(10) % 3 != 1
    observations = th.randn(size, 3, generator=generator)
    with th.no_grad():
        actions, old_values, old_log_prob = policy(observations)
        old_log_prob += 0.1 * th.randn(size, generator=generator)

    def gradients(pad_observation, pad_number):
        def padded(x, number):
            return th.where(valid.view(-1, *[1] * (x.dim() - 1)), x, th.as_tensor(number, dtype=x.dtype))

        targets = th.linspace(-1, 1, size)
        batch = RolloutBatch(
            observations=padded(observations, pad_observation),
            actions=actions,
            old_values=padded(old_values.flatten(), pad_number),
            old_log_prob=padded(old_log_prob, pad_number),
            advantages=padded(targets, pad_number),
            returns=padded(targets.flip(0), pad_number),
            valid=valid,
        )
        th.manual_seed(0)
        policy.zero_grad()
        values, log_prob, entropy = policy.evaluate_actions(batch.observations, batch.actions)
        coefficients = LossCoefficients(0.2, 0.1, 0.01, 0.5)
        switches = {"normalize_advantage": True, "pessimistic_value_clip": pessimistic_value_clip}
        terms = ppo_loss(batch, values.flatten(), log_prob, entropy, coefficients, **switches)
        terms.loss.backward()
        return terms, {n: p.grad.clone() for n, p in policy.named_parameters() if p.grad is not None}

    terms, expected = gradients(0.0, 0.0)
    assert any(gradient.abs().sum() > 0 for gradient in expected.values())
    for padding in ((5.0, 1e3), (-5.0, math.inf), (0.5, -math.inf), (1.0, math.nan)):
        padded_terms, actual = gradients(*padding)
        assert all(th.equal(*pair) for pair in zip(terms, padded_terms, strict=True))
        for name, gradient in expected.items():
            th.testing.assert_close(actual[name], gradient, rtol=1e-5, atol=1e-7)


# Invariant 6: truncation bootstraps from the terminal observation; termination does not

GAMMA, SLOPE, OFFSET = 0.9, 2.0, -0.5


def value_of(n_steps_done):
    return SLOPE * n_steps_done + OFFSET


def returns_of_a_rollout(envs, n_steps, gae_lambda):
    """Returns and advantages, shape (n_steps, n_envs), under a critic that says ``value_of(n_steps_done)``."""

    class Keep(BaseCallback):
        def _on_step(self):
            return True

        def _on_rollout_end(self):
            self.returns = self.model.rollout_buffer.returns.copy()
            self.advantages = self.model.rollout_buffer.advantages.copy()

    model = PPOPlus(
        "MlpPolicy",
        DummyVecEnv([lambda env=env: env for env in envs]),
        n_steps=n_steps,
        batch_size=n_steps * len(envs),
        gamma=GAMMA,
        gae_lambda=gae_lambda,
        policy_kwargs={"net_arch": []},
        device="cpu",
    )
    with th.no_grad():
        model.policy.value_net.weight.fill_(SLOPE)
        model.policy.value_net.bias.fill_(OFFSET)
    callback = Keep()
    model.learn(n_steps * len(envs), callback)
    return callback.returns, callback.advantages


def expected_return(step, length, truncates, n_steps, gae_lambda):
    """TD(lambda) target of one step of an env whose episodes all have this length and reward 1 per step."""
    start = step - step % length
    end = min(start + length, n_steps)
    target, weight = 0.0, 1.0
    for t in range(step, end):
        last = t == end - 1
        is_over = last and end - start == length
        next_value = 0.0 if is_over and not truncates else value_of(t + 1 - start)
        # A truncated episode's last reward holds its bootstrap; beyond it nothing is mixed in
        share = 1.0 if last else 1.0 - gae_lambda
        target += weight * (1.0 + GAMMA * share * next_value)
        weight *= GAMMA * gae_lambda
    return target


@pytest.mark.parametrize("gae_lambda", [0.0, 0.6, 1.0])
def test_truncation_bootstraps_from_the_terminal_observation_and_termination_does_not(gae_lambda):
    kinds = [(5, True), (5, False), (3, True), (1, True), (1, False), (100, True)]
    n_steps = 12
    returns, advantages = returns_of_a_rollout([ConstantRewardEnv(*kind) for kind in kinds], n_steps, gae_lambda)
    for index, (length, truncates) in enumerate(kinds):
        for step in range(n_steps):
            expected = expected_return(step, length, truncates, n_steps, gae_lambda)
            assert returns[step, index] == pytest.approx(expected, rel=1e-5), (length, truncates, step)
            assert advantages[step, index] == pytest.approx(expected - value_of(step % length), rel=1e-4, abs=1e-5)


def test_the_closed_form_of_a_whole_truncated_episode():
    """Monte Carlo: 1 + gamma + ... plus gamma^5 times the value of the terminal observation, not of the next one."""
    (truncated, terminated), _ = (
        x.T for x in returns_of_a_rollout([ConstantRewardEnv(5, t) for t in (True, False)], 5, 1.0)
    )
    rewards = (1 - GAMMA**5) / (1 - GAMMA)
    assert terminated[0] == pytest.approx(rewards, rel=1e-6)
    assert truncated[0] == pytest.approx(rewards + GAMMA**5 * value_of(5), rel=1e-6)


# Invariant 7: learning rates set per group stay per group; test_learning_rate_groups.py has the details


class TwoRates(ActorCriticPolicy):
    """The user's own groups: the action net learns ten times faster."""

    def _build(self, lr_schedule):
        super()._build(lr_schedule)
        fast = list(self.action_net.parameters())
        slow = [parameter for parameter in self.parameters() if all(parameter is not other for other in fast)]
        groups = [{"params": slow}, {"params": fast, "lr": 10 * lr_schedule(1)}]
        self.optimizer = self.optimizer_class(groups, lr=lr_schedule(1), **self.optimizer_kwargs)


@pytest.mark.parametrize("critic_learning_rate", [None, 5e-4])
def test_learning_rates_set_per_group_stay_per_group(critic_learning_rate):
    class Rates(BaseCallback):
        def _on_step(self):
            return True

        def on_update_end(self):
            self.seen = getattr(self, "seen", [])
            self.seen.append(sorted({round(group["lr"], 9) for group in self.model.policy.optimizer.param_groups}))
            return True

    callback = Rates()
    model = PPOPlus(
        TwoRates,
        make_env(),
        learning_rate=lambda progress: 1e-3 if progress > 0.6 else 1e-4,
        critic_learning_rate=critic_learning_rate,
        n_steps=16,
        batch_size=16,
        device="cpu",
    )
    model.learn(48, callback)
    critic = set() if critic_learning_rate is None else {5e-4}
    assert callback.seen == [sorted({1e-3, 1e-2} | critic), *[sorted({1e-4, 1e-3} | critic)] * 2]
