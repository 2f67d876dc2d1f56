"""``micro_batches=K``: the gradient of a minibatch is the sum of those of K parts, each of other environments."""

import copy

import numpy as np
import pytest
import torch as th
from environments import logs_of_updates
from models import assert_refused, build
from parted_cases import BATCH_SIZE, CASES, N_ENVS, N_STEPS, Case, toys
from states import assert_same_bits, state_of

from sb3_ppo_plus import PPOPlus, TrainingCheckpoint
from sb3_ppo_plus.rollout_batch import Minibatch
from sb3_ppo_plus.update.epochs import minibatches_of
from sb3_ppo_plus.update.gradient_step import GradientStep, Objective
from sb3_ppo_plus.update.losses import METRICS
from sb3_ppo_plus.update.parted_gradients import sum_of_parts

UPDATE = N_ENVS * N_STEPS
EAGER = [name for name in CASES if not name.startswith("compile")]


def trained(case, updates=1, **others):
    model = case.make_model(**others)
    model.learn(updates * UPDATE)
    return model


def whole_of(minibatch, rollout):
    """The minibatch of all parts' transitions, in one."""
    return Minibatch(rollout, th.cat([part.indices for part in minibatch.parts]))


# Dropout, the estimated entropy of a squashed Gaussian and noise draw random numbers
@pytest.mark.parametrize("n_parts", [2, 4])
@pytest.mark.parametrize(
    "name", [name for name in EAGER if name not in ("dropout", "amp", "squashed", "smooth under noise")]
)
def test_parts_add_up_to_the_gradient_of_the_whole_minibatch(name, n_parts):
    # Trained, so that the ratios are not 1
    model = trained(CASES[name], micro_batches=n_parts)
    rollout = model.rollout_buffer.rollout()
    step = GradientStep(model.policy, model._execution.grad_scaler)
    step.begin_update()
    settings = model._coefficients.of_loss(model)
    of_parts = Objective.of_update(model, settings, model._parts)
    of_whole = Objective.of_update(model, settings, build()._parts)
    assert of_whole.normalize_advantage == model.normalize_advantage and not of_parts.normalize_advantage
    minibatches = list(minibatches_of(model, model._parts)())
    assert len(minibatches) >= UPDATE // model.batch_size
    for minibatch in minibatches:
        metrics, gradients = sum_of_parts(step._parameters, minibatch, lambda part: step._differentiate(of_parts, part))
        expected_metrics, expected = step._differentiate(of_whole, whole_of(minibatch, rollout))
        th.testing.assert_close(metrics, expected_metrics, atol=2e-6, rtol=2e-5)
        largest = max(gradient.abs().max() for gradient in expected if gradient is not None)
        assert largest > 1e-3, "the case proves nothing"
        for gradient, one in zip(gradients, expected, strict=True):
            assert (gradient is None) == (one is None)
            if gradient is not None:
                assert (gradient - one).abs().max() <= 3e-6 * largest.clamp(min=1)
    step.end_update()


@pytest.mark.parametrize("name", ["mlp", "padded gru", "short minibatch"])
def test_each_epoch_takes_every_transition_once_with_equally_many_of_each_share_of_the_environments(name):
    model = trained(CASES[name], micro_batches=4)
    make_minibatches = minibatches_of(model, model._parts)
    orders = []
    for _ in range(2):
        seen = [[] for _ in range(4)]
        for minibatch in make_minibatches():
            assert len({len(part.indices) for part in minibatch.parts}) == 1
            for of_part, part in zip(seen, minibatch.parts, strict=True):
                indices = part.indices[part.indices >= 0]
                of_part.extend(indices.flatten().tolist())
        for index, of_part in enumerate(seen):
            envs = np.array(of_part) % N_ENVS
            assert set(envs) == {2 * index, 2 * index + 1}
            assert len(of_part) == UPDATE // 4
        orders.append([index for of_part in seen for index in of_part])
        assert sorted(orders[-1]) == list(range(UPDATE))
    assert orders[0] != orders[1]


@pytest.mark.parametrize("name", CASES)
def test_the_first_ratios_are_1(name):
    case = copy.deepcopy(CASES[name])
    # One minibatch, also where sequences are padded
    case.arguments |= {"n_epochs": 1, "batch_size": 2 * UPDATE, "target_kl": None}
    logs = logs_of_updates(case.make_model(micro_batches=4), UPDATE)
    # In eval mode the rollout drops nothing out
    limit = {"dropout": np.inf, "amp": 1e-4}.get(name, 1e-9)
    assert abs(logs[0]["train/approx_kl"]) < limit
    assert name == "dropout" or logs[0]["train/clip_fraction"] == 0


@pytest.mark.parametrize("name", [name for name in CASES if name.startswith("compile")])
def test_compiled_parts_equal_eager_ones_up_to_rounding(name):
    case = copy.deepcopy(CASES[name])
    models = []
    for compile in (True, False):
        case.arguments["compile"] = compile
        models.append(trained(case, 3, micro_batches=2))
    assert models[0]._execution.gradient_step.n_compilations >= 2
    assert models[0]._execution.compiled_actor.n_compilations >= 1
    compiled, eager = (model.policy.state_dict() for model in models)
    for key, value in compiled.items():
        assert (value - eager[key]).abs().max() < 2e-5, key


def test_a_policy_sees_a_part_at_a_time(monkeypatch):
    model = Case().make_model(micro_batches=4)
    sizes = {"acting": set(), "update": set()}
    extract = model.policy.extract_features

    def seeing(observations, *args, **kwargs):
        sizes["update" if model.policy.training else "acting"].add(len(observations))
        return extract(observations, *args, **kwargs)

    monkeypatch.setattr(model.policy, "extract_features", seeing)
    model.learn(UPDATE)
    assert sizes == {"acting": {N_ENVS // 4}, "update": {BATCH_SIZE // 4}}


def test_environments_of_a_part_do_not_depend_on_those_of_others():
    """Half of the environments, with the parts of their own: the same actions, whatever the other half is."""
    rollouts = []
    for others_shift in (0.0, 100.0):
        env = toys(N_ENVS)
        for each in env.envs[N_ENVS // 2 :]:
            each.unwrapped.observation_space.low[:] = -1 - others_shift
        model = build(env, n_steps=N_STEPS, batch_size=BATCH_SIZE, seed=3, micro_batches=2)
        # The values of the parameters do not follow the other half yet
        model.learn(UPDATE)
        rollouts.append(model.rollout_buffer.actions.copy())
    np.testing.assert_array_equal(rollouts[0][:, : N_ENVS // 2], rollouts[1][:, : N_ENVS // 2])
    assert (rollouts[0][:, N_ENVS // 2 :] != rollouts[1][:, N_ENVS // 2 :]).any(), "the case proves nothing"


@pytest.mark.parametrize("name", ["mlp", "gsde", "dropout", "padded gru", "compile"])
def test_an_interrupted_run_goes_on_with_its_bits(name, tmp_path):
    case = CASES[name]
    model = case.make_model(micro_batches=2)
    model.learn(4 * UPDATE, TrainingCheckpoint(1, tmp_path, keep_last=9))
    (directory,) = tmp_path.glob(f"*_{2 * UPDATE}_steps")
    resumed = PPOPlus.resume(directory, case.make_env(N_ENVS), device="cpu")
    assert resumed.micro_batches == 2
    resumed.continue_learning()
    assert_same_bits(state_of(resumed), state_of(model))


def test_one_part_in_all_has_the_bits_of_no_parts():
    assert_same_bits(state_of(trained(Case(), micro_batches=1)), state_of(trained(Case())))


def test_a_loaded_model_trains_in_parts(tmp_path):
    trained(Case(), micro_batches=2).save(tmp_path / "model.zip")
    for trusted in (True, False):
        model = PPOPlus.load(tmp_path / "model.zip", toys(N_ENVS), device="cpu", trusted=trusted)
        assert model.micro_batches == 2
        model.learn(UPDATE, reset_num_timesteps=False)
        assert model.num_timesteps == 2 * UPDATE
        # A plain use needs no environments that can be divided
        PPOPlus.load(tmp_path / "model.zip", device="cpu", trusted=trusted).predict(np.zeros(3, np.float32))


def test_what_cannot_be_divided_is_refused_before_the_first_step():
    assert_refused(ValueError, "micro_batches", "at least 1", "0", micro_batches=0)
    assert_refused(TypeError, "micro_batches", "an integer", "True", micro_batches=True)
    assert_refused(ValueError, "micro_batches=3", "4 environments", env_kwargs={"n_envs": 4}, micro_batches=3)
    assert_refused(
        ValueError, "batch_size=17", "micro_batches=2", env_kwargs={"n_envs": 4}, micro_batches=2, batch_size=17
    )


def test_metrics_are_those_of_the_whole_minibatch():
    whole, parted = (logs_of_updates(Case().make_model(**given), UPDATE)[0] for given in ({}, {"micro_batches": 2}))
    assert whole.keys() == parted.keys()
    assert 0.1 < parted["train/entropy_loss"] / whole["train/entropy_loss"] < 10
    assert METRICS[-1] == "grad_norm" and parted["train/grad_norm"] > 0


def test_the_activations_of_a_minibatch_take_a_share_of_the_memory():
    def largest(n_parts):
        """Bytes that one backward pass needs, at most."""
        model = Case(policy_kwargs={"net_arch": [64, 64]}).make_model(micro_batches=n_parts, batch_size=UPDATE)
        saved = []

        def evaluate(*arguments, evaluate=model.policy.evaluate_actions, **kwargs):
            saved.append(0)
            return evaluate(*arguments, **kwargs)

        def keep(tensor):
            # The parameters are not part of it
            saved[-1] += tensor.numel() * tensor.element_size() if len(tensor) == UPDATE // n_parts else 0
            return tensor

        model.policy.evaluate_actions = evaluate
        with th.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            model.learn(UPDATE)
        return max(saved)

    assert largest(1) > 100_000
    assert largest(4) <= largest(1) / 3.9
