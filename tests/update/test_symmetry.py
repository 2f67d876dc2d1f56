"""A symmetry of the task: as data, as a term of the loss, what is checked, and what cannot have one."""

import numpy as np
import pytest
import torch as th
from environments import DICT, SMALL_NET, MaskedEnv, MaskInObservation, ToyEnv, make_env, make_masked_env
from gymnasium import spaces
from interrupted_runs import StopAfter, make_envs
from mirrors import ACTIONS, Recorder, identity, mirror
from models import build
from stable_baselines3.common.buffers import RolloutBuffer
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import VecNormalize
from states import assert_same_training

from sb3_ppo_plus import PPOPlus, TrainingCheckpoint, UntrustedFileError
from sb3_ppo_plus.rollout_batch import RolloutBatch
from sb3_ppo_plus.update.epochs import minibatches_of
from sb3_ppo_plus.update.gradient_step import GradientStep, Objective
from sb3_ppo_plus.update.losses import ppo_loss

KEYS = spaces.Dict({"place": spaces.Box(-1, 1, (2,), np.float32), "side": spaces.Discrete(2)})


def mirror_discrete(observations, actions):
    return -observations, 2 - actions


def mirror_keys(observations, actions):
    return {"side": 1 - observations["side"], "place": -observations["place"]}, -actions


def mirror_mask(observations, actions):
    return {"vector": -observations["vector"], "action_mask": observations["action_mask"].flip(1)}, 4 - actions


def masked_by_key():
    return make_vec_env(lambda: MaskInObservation(MaskedEnv()), n_envs=2)


CASES = {
    "box": (lambda: make_env(2, action_space=ACTIONS), mirror, {}),
    "discrete": (lambda: make_env(2, action_space=spaces.Discrete(3)), mirror_discrete, {"ent_coef": 0.1}),
    "multi discrete": (
        lambda: make_env(2, action_space=spaces.MultiDiscrete([3, 2])),
        lambda observations, actions: (-observations, th.stack([2 - actions[:, 0], actions[:, 1]], dim=1)),
        {},
    ),
    "dict": (
        lambda: make_env(2, observation_space=KEYS, action_space=ACTIONS),
        mirror_keys,
        {"policy": "MultiInputPolicy"},
    ),
    "beta": (
        lambda: make_env(2, action_space=ACTIONS),
        mirror,
        {"policy_kwargs": SMALL_NET | {"action_dist": "beta"}},
    ),
    "gSDE, squashed": (
        lambda: make_env(2, action_space=ACTIONS),
        mirror,
        {"use_sde": True, "policy_kwargs": SMALL_NET | {"squash_output": True}},
    ),
    "mask": (masked_by_key, mirror_mask, {"policy": "MultiInputPolicy"}),
    "value clipping, target_kl": (
        lambda: make_env(2, action_space=ACTIONS),
        mirror,
        {"clip_range_vf": 0.2, "target_kl": 0.05},
    ),
}


def symmetric(case="box", symmetry=None, **settings):
    make, function, own = CASES[case]
    return build(make(), symmetry=symmetry or function, **own | settings)


def filled(case="box", **settings):
    """A model with a full buffer, and the minibatches of its update."""
    model = symmetric(case, **settings)
    model.learn(192)
    return model, list(minibatches_of(model, model._parts)())


def objective_of(model):
    return Objective.of_update(model, model._coefficients.of_loss(model), model._parts)


def doubled(batch):
    """The minibatch with its mirror images as if they were transitions, put together by hand."""

    def both(first, second):
        if isinstance(first, dict):
            return {key: th.cat([first[key], second[key]]) for key in first}
        return th.cat([first, second])

    return RolloutBatch(
        both(batch.observations, batch.mirrored["observations"]),
        both(batch.actions, batch.mirrored["actions"]),
        *(th.cat([part, part]) for part in (batch.old_values, batch.old_log_prob)),
        th.cat([(batch.advantages - batch.advantages.mean()) / (batch.advantages.std() + 1e-8)] * 2),
        th.cat([batch.returns, batch.returns]),
    )


@pytest.mark.parametrize("case", CASES)
def test_augmenting_trains_on_twice_as_many_transitions(case):
    model, minibatches = filled(case)
    objective = objective_of(model)
    for minibatch in minibatches[:3]:
        batch = minibatch.batch()
        terms = objective.loss(batch, objective.evaluate(model.policy, batch))
        whole = doubled(batch)
        values, log_prob, entropy = model.policy.evaluate_actions(whole.observations, whole.actions)
        expected = ppo_loss(
            whole,
            values.flatten(),
            log_prob,
            entropy,
            objective.coefficients,
            normalize_advantage=False,
            pessimistic_value_clip=True,
        )
        for name in ("loss", "policy_loss", "value_loss", "entropy_loss"):
            th.testing.assert_close(getattr(terms, name), getattr(expected, name), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("case", CASES)
def test_the_term_of_the_loss_is_0_for_a_symmetric_policy_and_pulls_to_one(case):
    model, minibatches = filled(case, symmetry_mode="loss", symmetry_coef=10.0)
    batch, objective = minibatches[0].batch(), objective_of(model)
    plain = RolloutBatch(**batch.by_field() | {"mirrored": {}})
    evaluation = objective.evaluate(model.policy, batch)
    n = len(batch.actions)
    alone = objective.loss(plain, objective.evaluate(model.policy, plain))
    term = 5.0 * (evaluation[1][n:] - evaluation[1][:n]).square().mean()
    th.testing.assert_close(objective.loss(batch, evaluation).loss, alone.loss + term, rtol=1e-5, atol=1e-5)
    assert term > 1e-6, "the case proves nothing"
    # To itself, each observation and action is a mirror image of a symmetric policy
    same = {"observations": batch.observations, "actions": batch.actions}
    itself = RolloutBatch(**batch.by_field() | {"mirrored": same})
    of_itself = objective.loss(itself, objective.evaluate(model.policy, itself)).loss
    th.testing.assert_close(of_itself, alone.loss, rtol=1e-5, atol=1e-6)
    for parameter, gradient in gradients_of(model, lambda: objective.evaluate(model.policy, batch)[1]).items():
        parameter.data -= 1e-4 * gradient
    again = objective.evaluate(model.policy, batch)[1]
    assert (again[n:] - again[:n]).square().mean() < term / 5.0


def gradients_of(model, log_probs):
    both = log_probs()
    n = len(both) // 2
    parameters = [parameter for parameter in model.policy.parameters() if parameter.requires_grad]
    loss = (both[n:] - both[:n].detach()).square().mean()
    found = th.autograd.grad(loss, parameters, allow_unused=True)
    return {each: grad for each, grad in zip(parameters, found, strict=True) if grad is not None}


@pytest.mark.parametrize("mode", ["augment", "loss"])
def test_the_identity_changes_no_training_but_by_rounding(mode):
    plain = build(make_env(2, action_space=ACTIONS)).learn(192)
    model = symmetric(symmetry=identity, symmetry_mode=mode).learn(192)
    np.testing.assert_allclose(plain.policy.parameters_to_vector(), model.policy.parameters_to_vector(), atol=1e-5)
    assert model.logger.name_to_value["train/approx_kl"] == pytest.approx(
        plain.logger.name_to_value["train/approx_kl"], rel=1e-3, abs=1e-7
    )


def asymmetry(model):
    observations = th.rand(500, 3) * 2 - 1
    with th.no_grad():
        means = model.policy.get_distribution(observations).mode()
        images = model.policy.get_distribution(mirror(observations, means)[0]).mode()
    return (mirror(observations, images)[1] - means).abs().mean().item()


@pytest.mark.parametrize("mode", ["augment", "loss"])
def test_a_policy_that_is_trained_with_a_symmetry_is_more_symmetric(mode):
    def trained(**settings):
        return build(make_env(4, action_space=ACTIONS), n_epochs=10, learning_rate=3e-3, **settings).learn(2_048)

    assert asymmetry(trained(symmetry=mirror, symmetry_mode=mode)) < 0.6 * asymmetry(trained())


def test_the_ratios_of_the_first_minibatch_are_1():
    model = symmetric(n_epochs=1, batch_size=64).learn(64)
    assert model.logger.name_to_value["train/approx_kl"] == pytest.approx(0.0, abs=1e-8)
    assert model.logger.name_to_value["train/clip_fraction"] == 0.0


@pytest.mark.usefixtures("graphs_without_code")
@pytest.mark.filterwarnings("error:compile=True")
@pytest.mark.parametrize("mode", ["augment", "loss"])
@pytest.mark.parametrize("case", ["box", "discrete", "dict", "beta"])
def test_compiled_training_equals_eager_training_to_rounding(case, mode):
    eager, compiled = (symmetric(case, symmetry_mode=mode, compile=each).learn(192) for each in (False, True))
    assert compiled._execution.gradient_step.n_compilations == 1
    vectors = [model.policy.parameters_to_vector() for model in (eager, compiled, symmetric(case))]
    assert np.abs(vectors[0] - vectors[2]).max() > 5e-4, "training moved too little to tell"
    np.testing.assert_allclose(vectors[0], vectors[1], atol=2e-5)


@pytest.mark.parametrize("mode", ["augment", "loss"])
def test_replays_have_the_bits_of_eager_steps(mode, monkeypatch):
    replayed = symmetric(symmetry_mode=mode).learn(192)
    monkeypatch.setattr(PPOPlus, "train", train_without_replays)
    assert_same_training(replayed, symmetric(symmetry_mode=mode).learn(192))


def train_without_replays(self, train=PPOPlus.train):
    if type(self._execution.gradient_step) is not GradientStep:
        self._execution.gradient_step = GradientStep(self.policy, self._execution.grad_scaler)
        self._execution.step_for = lambda model: self._execution.gradient_step
    train(self)


@pytest.mark.parametrize("case", ["beta", "gSDE, squashed"])
def test_actions_are_in_the_units_of_the_environment(case):
    recorder = Recorder()
    model = symmetric(case, recorder).learn(64)
    actions = recorder.calls[2][1]
    assert (actions.abs() <= 2.0).all() and actions.abs().max() > 1.0
    rollout = model.rollout_buffer.rollout()
    sign = 1.0 if case == "beta" else 0.0
    expected = rollout.actions.clone()
    expected[:, 0] = sign - expected[:, 0]
    th.testing.assert_close(rollout.mirrored["actions"], expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("function", "error", "message"),
    [
        (
            lambda observations, actions: (observations.roll(1, dims=1), actions),
            ValueError,
            r"involution.*largest difference is in element \d of observations: .* became",
        ),
        (lambda observations, actions: (observations, 0.5 * actions), ValueError, r"is in element \d of actions"),
        (lambda observations, actions: observations, TypeError, "return mirrored observations and actions, got Tensor"),
        (lambda observations, actions: (observations[:, :2], actions), ValueError, r"observations as .*\(1, 3\), got"),
        (
            lambda observations, actions: (observations, actions.double()),
            ValueError,
            "actions as torch.float32.*float64",
        ),
        (lambda observations, actions: (observations.numpy(), actions), ValueError, "got ndarray"),
        (
            lambda observations, actions: (observations, actions.new_tensor([10.0, 0.0]) - actions),
            ValueError,
            "keep actions inside Box",
        ),
    ],
)
def test_a_function_that_is_no_symmetry_is_refused_before_the_first_step(function, error, message):
    env = make_env(action_space=ACTIONS)
    model = build(env, symmetry=function)
    with pytest.raises(error, match=message):
        model.learn(64)
    assert env.envs[0].unwrapped.calls["step"] == 0


def test_keys_that_a_function_leaves_out_are_named():
    model = symmetric("dict", lambda observations, actions: ({"place": observations["place"]}, actions))
    with pytest.raises(ValueError, match=r"return observations\['side'\] as torch.* got nothing"):
        model.learn(64)


def test_choices_outside_the_space_are_refused():
    model = symmetric("discrete", lambda observations, actions: (observations, 5 - actions))
    with pytest.raises(ValueError, match=r"keep actions inside Discrete\(3\)"):
        model.learn(64)


def test_what_the_first_observations_do_not_show_is_found_in_the_first_rollout():
    class BeginsAtZero(ToyEnv):
        def reset(self, **kwargs):
            observation, info = super().reset(**kwargs)
            return np.zeros_like(observation), info

    env = make_vec_env(lambda: BeginsAtZero(action_space=ACTIONS), n_envs=1)
    model = build(env, symmetry=lambda observations, actions: (2 * observations, actions))
    with pytest.raises(ValueError, match="involution"):
        model.learn(64)
    assert model._n_updates == 0


@pytest.mark.parametrize(
    ("env", "settings", "message"),
    [
        (None, {"policy": "MlpLstmPolicy"}, "policy without memory.*got memory='lstm'"),
        (None, {"policy_kwargs": {"action_dist": "squashed_gaussian"}}, "another action_dist than 'squashed_gaussian'"),
        (None, {"rollout_buffer_class": type("Own", (RolloutBuffer,), {})}, "rollout_buffer_class.*got Own"),
        (make_masked_env, {}, "masks under the observation key 'action_mask'.*got masks of action_masks"),
    ],
)
def test_what_has_no_mirror_image_is_refused_before_the_first_step(env, settings, message):
    model = build(env() if env else make_env(action_space=ACTIONS), symmetry=mirror, **settings)
    with pytest.raises(ValueError, match=message):
        model.learn(64)
    assert model.num_timesteps == 0


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"symmetry": "mirror"}, ValueError, "symmetry must be None or a function, got 'mirror'"),
        ({"symmetry_mode": "augmented"}, ValueError, "symmetry_mode must be one of .*got 'augmented'"),
        ({"symmetry_mode": None}, TypeError, "symmetry_mode must be a string, got None"),
        ({"symmetry_coef": -1.0}, ValueError, r"symmetry_coef must be finite and at least 0, got -1\.0"),
        ({"symmetry_coef": float("inf")}, ValueError, "symmetry_coef must be finite"),
        ({"symmetry_coef": "1"}, TypeError, "symmetry_coef must be a number, got '1'"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(settings, error, message):
    with pytest.raises(error, match=message):
        build(**settings)


def test_a_saved_model_keeps_its_symmetry_and_without_trust_asks_for_it(tmp_path):
    model = symmetric(symmetry_mode="loss", symmetry_coef=0.5).learn(64)
    model.save(tmp_path / "model")
    loaded = PPOPlus.load(tmp_path / "model", make_env(2, action_space=ACTIONS), device="cpu")
    assert (loaded.symmetry_mode, loaded.symmetry_coef) == ("loss", 0.5)
    loaded.learn(64)
    with pytest.raises(UntrustedFileError, match=r"symmetry is 'the function mirror'.*\(symmetry=\.\.\.\)"):
        PPOPlus.load(tmp_path / "model", trusted=False)
    without = PPOPlus.load(tmp_path / "model", device="cpu", trusted=False, symmetry=mirror)
    assert without.symmetry is mirror and without.symmetry_coef == 0.5


@pytest.mark.parametrize("normalizes", [False, True])
@pytest.mark.parametrize("compile", [False, True])
@pytest.mark.usefixtures("graphs_without_code")
def test_a_run_that_is_resumed_has_the_bits_of_one_that_was_not_interrupted(compile, normalizes, tmp_path):
    def envs():
        made = make_envs(action_space=ACTIONS)
        return VecNormalize(made, clip_obs=1.0) if normalizes else made

    def model():
        return build(envs(), symmetry=mirror, n_steps=8, batch_size=8, compile=compile)

    whole = model().learn(96)
    model().learn(96, [TrainingCheckpoint(1, tmp_path), StopAfter(48)])
    for trusted in (True, False):
        resumed = PPOPlus.resume(tmp_path, envs(), device="cpu", trusted=trusted, symmetry=mirror)
        assert_same_training(whole, resumed.continue_learning())


def test_images_and_other_keys_can_be_mirrored():
    def flip(observations, actions):
        kind = 3 - observations["kind"]
        image = observations["image"].flip(-1)
        return {"image": image, "vector": -observations["vector"], "kind": kind}, -actions

    env = make_env(2, observation_space=DICT, action_space=ACTIONS)
    model = build(env, policy="MultiInputPolicy", symmetry=flip).learn(64)
    mirrored = model.rollout_buffer.rollout().mirrored["observations"]
    assert mirrored["image"].dtype == th.uint8
