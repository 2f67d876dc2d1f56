"""Smooth actions: the terms of CAPS in closed form, across episodes, in all units, and with everything else."""

import numpy as np
import pytest
import torch as th
from environments import ASYMMETRIC, DICT, IMAGE, SMALL_DICT, SMALL_NET, logs_of_updates, make_env
from gymnasium import spaces
from interrupted_runs import StopAfter, make_envs
from models import build
from stable_baselines3.common.buffers import RolloutBuffer
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.utils import obs_as_tensor
from stable_baselines3.common.vec_env import VecFrameStack, VecNormalize
from states import assert_same_training

from sb3_ppo_plus import PPOPlus, TrainingCheckpoint
from sb3_ppo_plus.errors import NonFiniteError
from sb3_ppo_plus.policies.bounded_distributions import ACTION_DISTRIBUTIONS, BetaDistribution
from sb3_ppo_plus.update.epochs import minibatches_of
from sb3_ppo_plus.update.gradient_step import GradientStep, Objective

BOTH = {"caps_temporal": 0.5, "caps_spatial": 0.5}
SYMMETRIC = spaces.Box(-2.0, 2.0, (2,), np.float32)
CASES = {
    "gaussian": (lambda: make_env(2), {}),
    "squashed gaussian": (lambda: make_env(2), {"policy_kwargs": SMALL_NET | {"action_dist": "squashed_gaussian"}}),
    "beta": (lambda: make_env(2), {"policy_kwargs": SMALL_NET | {"action_dist": "beta"}}),
    "beta's mode": (
        lambda: make_env(2),
        {
            "policy_kwargs": SMALL_NET
            | {"action_dist": "beta", "action_dist_kwargs": {"deterministic": "mode"}, "ortho_init": False}
        },
    ),
    "gSDE": (lambda: make_env(2), {"use_sde": True}),
    "gSDE, squashed": (
        lambda: make_env(2),
        {"use_sde": True, "policy_kwargs": SMALL_NET | {"squash_output": True}},
    ),
    "dict": (lambda: make_env(2, observation_space=SMALL_DICT), {"policy": "MultiInputPolicy"}),
    "actor's keys": (
        lambda: make_env(2, observation_space=SMALL_DICT),
        {"policy": "MultiInputPolicy", "policy_kwargs": SMALL_NET | {"actor_keys": ["vector"]}},
    ),
    "frames": (lambda: VecFrameStack(make_env(2), 3), {}),
    "normalized": (lambda: VecNormalize(make_env(2)), {}),
    "transformer": (
        lambda: VecFrameStack(make_env(2), 3),
        {
            "policy_kwargs": SMALL_NET
            | {
                "features_extractor_class": "transformer",
                "features_extractor_kwargs": {"seq_len": 3, "d_model": 8, "n_heads": 2, "n_layers": 1},
            }
        },
    ),
    "symmetry too": (
        lambda: make_env(2, action_space=SYMMETRIC),
        {"symmetry": lambda observations, actions: (-observations, -actions), "symmetry_mode": "loss"},
    ),
    "target_kl": (lambda: make_env(2), {"target_kl": 0.02, "clip_range_vf": 0.2}),
}
SLOW = ("transformer",)
CNN = {"features_extractor_kwargs": {"features_dim": 8}, "net_arch": [8]}


def smooth(case="gaussian", **settings):
    make, own = CASES[case]
    return build(make(), **BOTH | own | settings)


def objective_of(model):
    return Objective.of_update(model, model._coefficients.of_loss(model), model._parts)


def filled(case="gaussian", **settings):
    """A model after three updates, and its last rollout as one batch with what the terms need."""
    model = smooth(case, **settings).learn(192)
    with th.no_grad():
        # At first a policy's actions hardly differ
        model.policy.action_net.weight.mul_(30)
    next(iter(minibatches_of(model, model._parts)()))
    return model, model.rollout_buffer.rollout()


def terms_of(model, batch):
    objective = objective_of(model)
    return objective.loss(batch, objective.evaluate(model.policy, batch))


def bounds_as_1(model, actions):
    """Actions in the env's units, as ``predict`` gives them, in units in which the bounds are -1 and 1."""
    space = model.action_space
    return 2 * (actions - space.low) / (space.high - space.low) - 1


@pytest.mark.parametrize("case", CASES)
def test_the_temporal_term_is_the_mean_change_of_the_action_along_each_episode(case):
    model, batch = filled(case, caps_spatial=0.0)
    buffer, policy = model.rollout_buffer, model.policy
    with th.no_grad():
        actions = policy.get_distribution(batch.observations).mode()
        last = policy.get_distribution(obs_as_tensor(model._last_obs, "cpu")).mode()
    if policy.squash_output:
        actions, last = (th.as_tensor(policy.unscale_action(each.numpy())) for each in (actions, last))
    actions = bounds_as_1(model, th.cat([actions, last]).reshape(buffer.buffer_size + 1, 2, -1).numpy())
    starts = np.concatenate([buffer.episode_starts, model._last_episode_starts[None]])
    changes = np.linalg.norm(np.diff(actions, axis=0), axis=-1)
    changes[starts[1:] == 1] = 0
    assert 0 < starts[1:].sum() < starts[1:].size / 2
    with th.no_grad():
        terms = terms_of(model, batch)
        alone = terms_of(smooth(case, caps_temporal=0.0, caps_spatial=0.0), batch)
    assert terms.caps_temporal.item() == pytest.approx(changes.mean(), rel=1e-4)
    assert changes.mean() > 1e-3 and alone.caps_temporal == terms.caps_spatial == 0
    model.caps_temporal = 0.0
    with th.no_grad():
        without = terms_of(model, batch).loss
    assert (terms.loss - without).item() == pytest.approx(0.5 * changes.mean(), rel=1e-3, abs=1e-6)


def make_linear(model):
    """Let the policy's mean be one matrix of the observations."""
    policy = model.policy
    assert len(policy.mlp_extractor.policy_net) == 0
    return policy.action_net.weight.detach()


def test_both_terms_of_a_linear_policy_are_as_in_closed_form():
    settings = {"policy_kwargs": {"net_arch": []}, "caps_sigma": 0.3}
    model, batch = filled(**settings)
    weight = make_linear(model) / th.as_tensor((ASYMMETRIC.high - ASYMMETRIC.low) / 2)[:, None]
    steps = (batch.following["observations"] - batch.observations) @ weight.T
    expected = (steps.norm(dim=1) * batch.following["continues"]).mean()
    th.manual_seed(5)
    terms = terms_of(model, batch)
    th.manual_seed(5)
    noise = 0.3 * th.randn(batch.observations.shape) @ weight.T
    th.testing.assert_close(terms.caps_temporal, expected)
    th.testing.assert_close(terms.caps_spatial, noise.norm(dim=1).mean(), rtol=1e-4, atol=1e-6)


def test_the_spatial_term_grows_with_sigma_and_is_the_standard_deviation_of_one_linear_action():
    space = spaces.Box(-1.0, 1.0, (1,), np.float32)
    model = build(make_env(8, action_space=space), caps_spatial=1.0, policy_kwargs={"net_arch": []}, n_steps=512)
    model.learn(8 * 512)
    batch = model.rollout_buffer.rollout()
    for sigma in (0.01, 0.1, 1.0):
        model.caps_sigma = sigma
        # The mean size of a normal number
        expected = np.sqrt(2 / np.pi) * sigma * make_linear(model).norm().item()
        assert terms_of(model, batch).caps_spatial.item() == pytest.approx(expected, rel=0.05)


def test_nothing_is_seen_across_the_ends_of_episodes():
    model, batch = filled(caps_spatial=0.0)
    before = terms_of(model, batch)
    grads = th.autograd.grad(before.loss, list(model.policy.parameters()))
    ends = ~batch.following["continues"]
    assert 0 < ends.sum() < len(ends) / 2
    for value in (7.0, -1e4):
        batch.following["observations"][ends] = value
        after = terms_of(model, batch)
        assert after.caps_temporal == before.caps_temporal and after.loss == before.loss
        assert all(map(th.equal, grads, th.autograd.grad(after.loss, list(model.policy.parameters()))))
    batch.following["observations"][~ends] += 0.1
    assert terms_of(model, batch).caps_temporal != before.caps_temporal


def test_what_followed_is_found_also_after_a_callback_has_called_get():
    model = smooth(caps_spatial=0.0, n_epochs=1).learn(64)
    list(minibatches_of(model, model._parts)())
    first = model.rollout_buffer.rollout()
    list(model.rollout_buffer.get(16))
    model.rollout_buffer._rollout = None
    list(minibatches_of(model, model._parts)())
    second = model.rollout_buffer.rollout()
    order = th.arange(64).reshape(32, 2).T.flatten()
    for name, part in first.following.items():
        th.testing.assert_close(part[order], second.following[name], rtol=0, atol=0)
    assert not th.equal(first.observations, second.observations)


@pytest.mark.parametrize("case", ["gaussian", "squashed gaussian", "beta", "gSDE, squashed", "dict"])
def test_the_gradient_is_that_of_finite_differences(case):
    model, batch = filled(case, caps_sigma=0.5)
    smoothness, parameter = objective_of(model).smoothness, model.policy.action_net.weight
    with th.no_grad():
        # Large, so that no distance is near 0, where it bends
        parameter.normal_()

    def terms():
        th.manual_seed(1)
        return sum(mean for _, mean in smoothness._means(batch, smoothness.actions(model.policy, batch)))

    (gradient,) = th.autograd.grad(terms(), parameter)
    assert gradient.abs().max() > 1e-2, "the case proves nothing"
    for index in np.ndindex(*parameter.shape):
        values = []
        for step in (0.005, -0.01):
            with th.no_grad():
                parameter[index] += step
                values.append(terms().item())
        with th.no_grad():
            parameter[index] += 0.005
        assert (values[0] - values[1]) / 0.01 == pytest.approx(gradient[index].item(), rel=0.01, abs=1e-3)


def test_equal_actions_have_a_gradient_of_0_and_not_nan():
    model, batch = filled()
    with th.no_grad():
        model.policy.action_net.weight.zero_()
    terms = terms_of(model, batch)
    assert terms.caps_temporal == terms.caps_spatial == 0
    assert th.autograd.grad(terms.loss, model.policy.action_net.weight)[0].isfinite().all()


@pytest.mark.parametrize("settings", [{}, {"compile": True}, {"use_sde": True}])
@pytest.mark.usefixtures("graphs_without_code")
def test_terms_with_weight_0_change_no_bit(settings):
    plain, off = (build(make_env(2), **settings, **more).learn(192) for more in ({}, {"caps_sigma": 3.0}))
    assert_same_training(plain, off)
    assert not {"train/caps_temporal", "train/caps_spatial"} & off.logger.name_to_value.keys()
    assert off.rollout_buffer.rollout().following == {}


def test_the_temporal_term_draws_no_random_numbers():
    def actions(**settings):
        return build(make_env(2), learning_rate=1e-30, **settings).learn(192).rollout_buffer.actions

    assert np.array_equal(actions(), actions(caps_temporal=1.0))
    assert not np.array_equal(actions(), actions(caps_spatial=1.0))


def test_the_terms_are_logged_where_they_are_used():
    model = build(make_env(2), caps_temporal=0.1)
    logs = logs_of_updates(model, 128)
    assert all(log["train/caps_temporal"] > 0 and "train/caps_spatial" not in log for log in logs)
    assert all(log["train/caps_spatial"] > 0 for log in logs_of_updates(build(make_env(2), **BOTH), 128))


def roughness(model):
    observations = th.rand(500, 3) * 2 - 1
    with th.no_grad():
        modes = [model.policy.get_distribution(each).mode() for each in (observations, observations + 0.1)]
    return (modes[0] - modes[1]).norm(dim=1).mean().item()


@pytest.mark.parametrize("name", ["caps_temporal", "caps_spatial"])
def test_actions_become_smoother(name):
    def trained(**settings):
        return build(make_env(4), n_epochs=10, learning_rate=3e-3, **settings).learn(2_048)

    assert roughness(trained(**{name: 1.0})) < 0.6 * roughness(trained())


@pytest.mark.usefixtures("graphs_without_code")
@pytest.mark.filterwarnings("error:compile=True")
@pytest.mark.parametrize("case", [case for case in CASES if case not in SLOW])
def test_compiled_training_equals_eager_training_to_rounding(case):
    eager, compiled = (smooth(case, compile=each).learn(192) for each in (False, True))
    assert compiled._execution.gradient_step.n_compilations == 1
    vectors = [model.policy.parameters_to_vector() for model in (eager, compiled, smooth(case))]
    assert np.abs(vectors[0] - vectors[2]).max() > 5e-4, "training moved too little to tell"
    np.testing.assert_allclose(vectors[0], vectors[1], atol=2e-5)


@pytest.mark.usefixtures("graphs_without_code")
def test_a_weight_that_is_assigned_during_training_counts_in_compiled_steps():
    def trained(compile):
        model = smooth(compile=compile).learn(128)
        model.caps_temporal, model.caps_sigma = 5.0, 0.5
        return model.learn(128, reset_num_timesteps=False)

    eager, compiled = trained(compile=False), trained(compile=True)
    # For another sigma. Weights are inputs
    assert compiled._execution.gradient_step.n_compilations == 2
    vectors = [model.policy.parameters_to_vector() for model in (eager, compiled, smooth().learn(256))]
    np.testing.assert_allclose(vectors[0], vectors[1], atol=3e-5)
    assert np.abs(vectors[0] - vectors[2]).max() > 1e-3


@pytest.mark.usefixtures("graphs_without_code")
@pytest.mark.parametrize("compile", [False, True])
def test_weights_follow_schedules(compile):
    schedule = {"caps_temporal": "lin_0_3", "caps_spatial": lambda progress: 2.0 * progress}
    model = build(make_env(2), compile=compile, **schedule)
    logs = logs_of_updates(model, 256)
    assert [log["train/caps_temporal_coef"] for log in logs] == pytest.approx([0.75, 1.5, 2.25, 3.0])
    assert [log["train/caps_spatial_coef"] for log in logs] == pytest.approx([1.5, 1.0, 0.5, 0.0])
    assert all(log["train/caps_temporal"] > 0 for log in logs)
    if compile:
        assert model._execution.gradient_step.n_compilations == 1
    # By hand, one update after another
    steps = build(make_env(2), compile=compile, caps_temporal=0.75, caps_spatial=1.5)

    class Assign(BaseCallback):
        def _on_step(self):
            return True

        def _on_rollout_end(self):
            done = steps.num_timesteps / 256
            steps.caps_temporal, steps.caps_spatial = 3.0 * done, max(2.0 * (1 - done), 1e-300)

    steps.learn(256, Assign())
    assert np.array_equal(model.policy.parameters_to_vector(), steps.policy.parameters_to_vector())


@pytest.mark.parametrize("case", ["gaussian", "beta", "dict"])
def test_replays_have_the_bits_of_eager_steps(case, monkeypatch):
    # Replays begin after 300 minibatches
    settings = {"n_epochs": 20, "n_steps": 32, "batch_size": 16}
    replayed = smooth(case, **settings).learn(512)
    assert replayed._execution.gradient_step.replays.n_replays > 0
    monkeypatch.setattr(PPOPlus, "train", train_without_replays)
    assert_same_training(replayed, smooth(case, **settings).learn(512))


def train_without_replays(self, train=PPOPlus.train):
    if type(self._execution.gradient_step) is not GradientStep:
        self._execution.gradient_step = GradientStep(self.policy, self._execution.grad_scaler)
        self._execution.step_for = lambda model: self._execution.gradient_step
    train(self)


@pytest.mark.parametrize("compile", [False, True])
@pytest.mark.usefixtures("graphs_without_code")
def test_a_run_that_is_resumed_has_the_bits_of_one_that_was_not_interrupted(compile, tmp_path):
    def model():
        return build(make_envs(), n_steps=8, batch_size=8, compile=compile, **BOTH)

    whole = model().learn(96)
    model().learn(96, [TrainingCheckpoint(1, tmp_path), StopAfter(48)])
    resumed = PPOPlus.resume(tmp_path, make_envs(), device="cpu").continue_learning()
    assert_same_training(whole, resumed)


@pytest.mark.parametrize(("amp", "case"), [(True, "gaussian"), (True, "beta"), (False, "squashed gaussian")])
def test_the_first_ratios_are_1_and_log_probs_that_are_computed_again_draw_nothing(amp, case):
    model = smooth(case, n_epochs=1, batch_size=64, amp=amp).learn(64)
    values = model.logger.name_to_value
    assert values["train/approx_kl"] == pytest.approx(0.0, abs=1e-6)
    assert values["train/caps_temporal"] > 0 and values["train/caps_spatial"] > 0


def test_images_get_noise_in_the_units_in_which_the_policy_sees_them():
    env = make_env(2, observation_space=DICT)
    model = build(env, "MultiInputPolicy", CNN | {"features_extractor_kwargs": {"cnn_output_dim": 8}}, **BOTH).learn(64)
    batch = model.rollout_buffer.rollout()
    smoothness = objective_of(model).smoothness
    perturbed = smoothness._perturbed(model.policy, batch.observations)
    noise = {key: perturbed[key] - part.float() for key, part in batch.observations.items()}
    assert noise["image"].std().item() == pytest.approx(25.5, rel=0.02)
    assert noise["vector"].std().item() == pytest.approx(0.1, rel=0.2)
    assert (noise["kind"] == 0).all()
    assert batch.following["observations"]["image"].dtype == th.uint8
    model.policy.normalize_images = False
    assert (smoothness._perturbed(model.policy, batch.observations)["image"] - batch.observations["image"]).std() < 0.2


@pytest.mark.usefixtures("graphs_without_code")
def test_images_alone_are_trained_on_eagerly_and_compiled():
    def trained(compile):
        return build(make_env(2, observation_space=IMAGE), "CnnPolicy", CNN, compile=compile, **BOTH).learn(128)

    vectors = [trained(compile).policy.parameters_to_vector() for compile in (False, True)]
    np.testing.assert_allclose(*vectors, atol=2e-5)


@pytest.mark.parametrize("name", ["caps_temporal", "caps_spatial"])
@pytest.mark.parametrize(
    ("env", "settings", "message"),
    [
        ({"action_space": spaces.Discrete(3)}, {}, r"needs Box actions, got Discrete\(3\)"),
        ({"action_space": spaces.MultiBinary(3)}, {}, "needs Box actions, got MultiBinary"),
        ({"action_space": spaces.Tuple((ASYMMETRIC, spaces.Discrete(2)))}, {}, "needs Box actions, got Tuple"),
        ({}, {"policy": "MlpLstmPolicy"}, "needs a policy without memory.*got 'lstm'"),
        ({}, {"rollout_buffer_class": type("Own", (RolloutBuffer,), {})}, "needs a rollout_buffer_class.*got Own"),
    ],
)
def test_what_cannot_be_smooth_is_refused_before_the_first_step(name, env, settings, message):
    model = build(make_env(**env), **{name: 1.0}, **settings)
    with pytest.raises(ValueError, match=f"{name} {message}"):
        model.learn(64)
    assert model.num_timesteps == 0


def test_the_spatial_term_needs_an_observation_that_can_be_perturbed():
    env = make_env(observation_space=spaces.Discrete(4))
    model = build(env, caps_spatial=1.0)
    with pytest.raises(ValueError, match=r"caps_spatial needs observations of a Box.*got Discrete\(4\)"):
        model.learn(64)
    assert build(env, caps_temporal=1.0).learn(64).logger.name_to_value["train/caps_temporal"] > 0


def test_a_distribution_of_ones_own_needs_a_mode_in_units_of_the_bounds(monkeypatch):
    class Own(BetaDistribution):
        normalized_mode = property()

    assert not hasattr(Own(1), "normalized_mode")
    monkeypatch.setitem(ACTION_DISTRIBUTIONS, "own", Own)
    model = build(policy_kwargs=SMALL_NET | {"action_dist": "own"}, caps_temporal=1.0)
    with pytest.raises(ValueError, match="caps_temporal needs an action_dist with a method normalized_mode, got 'own'"):
        model.learn(64)


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"caps_temporal": -1.0}, ValueError, r"caps_temporal must be finite and at least 0 throughout, got -1\.0"),
        ({"caps_spatial": float("inf")}, ValueError, "caps_spatial must be a finite number.*got inf"),
        ({"caps_spatial": float("nan")}, ValueError, "caps_spatial must be a finite number.*got nan"),
        ({"caps_sigma": 0}, ValueError, "caps_sigma must be finite and above 0, got 0"),
        ({"caps_temporal": "line_1.0"}, ValueError, "caps_temporal.*line_1.0"),
        ({"caps_spatial": True}, TypeError, "caps_spatial must be a number of at least 0.*got True"),
        ({"caps_sigma": None}, TypeError, "caps_sigma must be a number, got None"),
        ({"caps_temporall": 1.0}, TypeError, "did you mean 'caps_temporal'"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(settings, error, message):
    with pytest.raises(error, match=message):
        build(**settings)


@pytest.mark.parametrize("trusted", [True, False])
def test_a_saved_model_keeps_its_weights(trusted, tmp_path):
    build(make_env(2), caps_temporal=0.25, caps_spatial=2, caps_sigma=0.2).learn(64).save(tmp_path / "model")
    loaded = PPOPlus.load(tmp_path / "model", make_env(2), device="cpu", trusted=trusted)
    assert (loaded.caps_temporal, loaded.caps_spatial, loaded.caps_sigma) == (0.25, 2, 0.2)
    assert loaded.learn(64).logger.name_to_value["train/caps_spatial"] > 0


def test_a_term_that_is_not_finite_is_named():
    model = build(caps_spatial=1.0, caps_sigma=1e300)
    with pytest.raises(NonFiniteError, match="the spatial term of CAPS is nan in epoch 0, minibatch 0"):
        model.learn(64)
