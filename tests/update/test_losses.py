import dataclasses
import math

import numpy as np
import pytest
import torch as th
from torch.nn import functional as F

from sb3_ppo_plus.rollout_batch import RolloutBatch
from sb3_ppo_plus.update.losses import (
    LossCoefficients,
    approximate_kl,
    clipped_surrogate,
    entropy_loss,
    masked_mean,
    normalize_advantages,
    ppo_loss,
    value_loss,
)

NAN, INF = math.nan, math.inf
BATCH = 12


def random_batch(size=BATCH, valid=None, dtype=th.float32, seed=0):
    """A minibatch and the policy's present evaluation of it, as leaves: (batch, values, log_prob, entropy)."""
    generator = th.Generator().manual_seed(seed)

    def draw(scale=1.0):
        return scale * th.randn(size, generator=generator, dtype=th.float64).to(dtype)

    batch = RolloutBatch(
        observations=draw()[:, None],
        actions=draw()[:, None],
        old_values=draw(),
        old_log_prob=draw(0.3),
        advantages=draw(),
        returns=draw(),
        valid=valid,
    )
    values, log_prob, entropy = batch.old_values + draw(0.3), batch.old_log_prob + draw(0.3), draw()
    return batch, values.requires_grad_(), log_prob.requires_grad_(), entropy.requires_grad_()


def loss_of(
    batch, values, log_prob, entropy, *, clip_range=0.2, clip_range_vf=0.15, ent_coef=0.3, vf_coef=0.5, **switches
):
    switches = {"normalize_advantage": True, "pessimistic_value_clip": True} | switches
    coefficients = LossCoefficients(clip_range, clip_range_vf, ent_coef, vf_coef)
    return ppo_loss(batch, values, log_prob, entropy, coefficients, **switches)


def gradients_of(loss, *inputs):
    gradients = th.autograd.grad(loss, inputs, allow_unused=True)
    return [
        th.zeros_like(tensor) if gradient is None else gradient
        for gradient, tensor in zip(gradients, inputs, strict=True)
    ]


# Closed forms


def test_the_masked_mean_is_the_mean_of_the_valid_elements():
    x = th.tensor([1.0, 5.0, NAN])
    assert masked_mean(th.tensor([1.0, 5.0]), None) == 3.0
    assert masked_mean(x, th.tensor([True, True, False])) == 3.0
    assert masked_mean(x, th.tensor([False, True, False])) == 5.0
    assert masked_mean(x, th.tensor([False, False, False])) == 0.0


def test_normalised_advantages_have_mean_zero_and_the_unbiased_deviation_one():
    normalized = normalize_advantages(th.tensor([1.0, 2.0, 3.0]))
    th.testing.assert_close(normalized, th.tensor([-1.0, 0.0, 1.0]))
    random = normalize_advantages(5.0 + 3.0 * th.randn(1000, generator=th.Generator().manual_seed(0)))
    assert random.mean().item() == pytest.approx(0.0, abs=1e-6)
    assert random.std(correction=1).item() == pytest.approx(1.0, abs=1e-6)


def test_normalised_advantages_of_equal_values_are_zero():
    assert th.equal(normalize_advantages(th.full((4,), 2.5)), th.zeros(4))
    assert th.equal(normalize_advantages(th.full((4,), 2.5), th.tensor([True, True, True, False]))[:3], th.zeros(3))


@pytest.mark.parametrize(
    ("advantages", "valid"),
    [([7.0], None), ([7.0], [True]), ([7.0, 1.0, NAN], [True, False, False])],
    ids=["alone", "alone and valid", "the only valid one"],
)
def test_a_minibatch_of_one_is_not_normalised(advantages, valid):
    mask = None if valid is None else th.tensor(valid)
    assert normalize_advantages(th.tensor(advantages), mask)[0] == 7.0


@pytest.mark.parametrize(
    ("advantage", "ratio", "objective", "slope"),
    [
        (2.0, 1.0, 2.0, 2.0),
        (2.0, 1.15, 2.3, 2.0),
        (2.0, 1.5, 2.4, 0.0),
        (2.0, 0.5, 1.0, 2.0),
        (-2.0, 1.5, -3.0, -2.0),
        (-2.0, 0.5, -1.6, 0.0),
        (0.0, 3.0, 0.0, 0.0),
    ],
)
def test_clipped_surrogate_of_one_sample(advantage, ratio, objective, slope):
    ratio = th.tensor([ratio], requires_grad=True)
    loss = clipped_surrogate(th.tensor([advantage]), ratio, 0.2)
    assert loss.item() == pytest.approx(-objective)
    assert gradients_of(loss, ratio)[0].item() == pytest.approx(-slope)


def test_clipped_surrogate_is_a_mean_over_samples():
    advantages, ratio = th.tensor([1.0, -1.0, 2.0]), th.tensor([2.0, 2.0, 0.5])
    assert clipped_surrogate(advantages, ratio, 0.1).item() == pytest.approx(-(1.1 - 2.0 + 1.0) / 3)


def test_value_loss_without_clipping_is_the_mean_squared_error():
    values, returns = th.tensor([1.0, 2.0]), th.tensor([3.0, 2.5])
    for pessimistic in (True, False):
        loss = value_loss(values, th.tensor([9.0, 9.0]), returns, None, pessimistic=pessimistic)
        assert loss.item() == pytest.approx((4.0 + 0.25) / 2)


@pytest.mark.parametrize(
    ("value", "old", "target", "sb3s", "pessimistic"),
    [
        (5.1, 5.0, 10.0, 4.9**2, 4.9**2),
        (7.0, 5.0, 10.0, 4.8**2, 4.8**2),
        (1.0, 5.0, 10.0, 5.2**2, 9.0**2),
        (11.0, 5.0, 10.0, 4.8**2, 4.8**2),
        (20.0, 5.0, 10.0, 4.8**2, 10.0**2),
    ],
    ids=["inside", "too fast", "wrong way", "overshot a little", "overshot a lot"],
)
def test_clipped_value_loss_of_one_sample(value, old, target, sb3s, pessimistic):
    tensors = [th.tensor([x]) for x in (value, old, target)]
    assert value_loss(*tensors, 0.2, pessimistic=False).item() == pytest.approx(sb3s, rel=1e-5)
    assert value_loss(*tensors, 0.2, pessimistic=True).item() == pytest.approx(pessimistic, rel=1e-5)


def test_a_critic_that_went_the_wrong_way_is_stuck_in_sb3s_form_and_pulled_back_by_the_pessimistic():
    value = th.tensor([1.0], requires_grad=True)
    rest = th.tensor([5.0]), th.tensor([10.0]), 0.2
    stuck = value_loss(value, *rest, pessimistic=False)
    pulled = value_loss(value, *rest, pessimistic=True)
    assert gradients_of(stuck, value)[0].item() == 0.0
    assert gradients_of(pulled, value)[0].item() == pytest.approx(2 * (1.0 - 10.0))


def test_the_pessimistic_choice_is_made_per_sample():
    values, old, returns = th.tensor([1.0, 7.0]), th.tensor([5.0, 5.0]), th.tensor([10.0, 10.0])
    loss = value_loss(values, old, returns, 0.2, pessimistic=True)
    assert loss.item() == pytest.approx((9.0**2 + 4.8**2) / 2)


def test_entropy_loss_is_the_negative_mean_entropy():
    assert entropy_loss(th.tensor([1.0, 3.0]), th.tensor([50.0, 60.0])).item() == -2.0


def test_entropy_loss_without_a_closed_form_is_the_mean_log_prob():
    assert entropy_loss(None, th.tensor([-1.0, -3.0])).item() == -2.0


def test_approximate_kl_has_its_known_values():
    log_ratio = th.tensor([0.0, math.log(2.0), -math.log(2.0)])
    expected = (0.0 + (1 - math.log(2.0)) + (-0.5 + math.log(2.0))) / 3
    assert approximate_kl(log_ratio).item() == pytest.approx(expected, rel=1e-6)
    assert approximate_kl(th.tensor([-1e-4, 1e-4])).item() >= 0.0


def test_approximate_kl_estimates_the_kl_of_two_gaussians():
    old, new = th.distributions.Normal(0.0, 1.0), th.distributions.Normal(0.3, 1.2)
    th.manual_seed(0)
    x = old.sample((200_000,))
    exact = th.distributions.kl_divergence(old, new).item()
    assert approximate_kl(new.log_prob(x) - old.log_prob(x)).item() == pytest.approx(exact, rel=0.03)


# The whole loss


@pytest.mark.parametrize("clip_range_vf", [None, 0.15])
@pytest.mark.parametrize("normalize_advantage", [True, False])
@pytest.mark.parametrize("has_entropy", [True, False])
def test_the_loss_equals_sb3s_formulas(clip_range_vf, normalize_advantage, has_entropy):
    """The formulas of SB3's PPO.train, in numpy's float64."""
    batch, values, log_prob, entropy = random_batch()
    terms = loss_of(
        batch,
        values,
        log_prob,
        entropy if has_entropy else None,
        clip_range_vf=clip_range_vf,
        normalize_advantage=normalize_advantage,
        pessimistic_value_clip=False,
    )
    old_v, old_lp, adv, ret = (
        getattr(batch, name).double().numpy() for name in ("old_values", "old_log_prob", "advantages", "returns")
    )
    v, lp, ent = (x.detach().double().numpy() for x in (values, log_prob, entropy))
    if normalize_advantage:
        adv = (adv - adv.mean()) / (adv.std(ddof=1) + 1e-8)
    ratio = np.exp(lp - old_lp)
    policy = -np.minimum(adv * ratio, adv * np.clip(ratio, 0.8, 1.2)).mean()
    predicted = v if clip_range_vf is None else old_v + np.clip(v - old_v, -clip_range_vf, clip_range_vf)
    value = ((ret - predicted) ** 2).mean()
    ent_loss = -ent.mean() if has_entropy else lp.mean()
    expected = {
        "loss": policy + 0.3 * ent_loss + 0.5 * value,
        "policy_loss": policy,
        "value_loss": value,
        "entropy_loss": ent_loss,
        "approx_kl": (ratio - 1 - (lp - old_lp)).mean(),
        "clip_fraction": (abs(ratio - 1) > 0.2).mean(),
        "value_clip_fraction": 0.0 if clip_range_vf is None else (abs(v - old_v) > clip_range_vf).mean(),
    }
    assert 0 < expected["clip_fraction"] < 1
    for name, number in expected.items():
        assert getattr(terms, name).item() == pytest.approx(number, rel=1e-5, abs=1e-6), name


def test_only_the_loss_carries_a_gradient():
    terms = loss_of(*random_batch())
    assert terms.loss.requires_grad
    assert not any(term.requires_grad for name, term in terms._asdict().items() if name != "loss")
    assert all(term.shape == () for term in terms)


@pytest.mark.parametrize("pessimistic_value_clip", [True, False])
@pytest.mark.parametrize("clip_range_vf", [None, 0.15])
@pytest.mark.parametrize("masked", [False, True])
def test_gradients_equal_finite_differences(masked, clip_range_vf, pessimistic_value_clip):
    valid = th.arange(BATCH) % 3 != 0 if masked else None
    batch, *inputs = random_batch(valid=valid, dtype=th.float64)

    def loss(*tensors):
        return loss_of(batch, *tensors, clip_range_vf=clip_range_vf, pessimistic_value_clip=pessimistic_value_clip).loss

    assert th.autograd.gradcheck(loss, inputs, eps=1e-6, atol=1e-6)


@pytest.mark.parametrize("normalize_advantage", [True, False])
def test_a_minibatch_of_one_has_a_finite_loss(normalize_advantage):
    batch, values, log_prob, entropy = random_batch(1)
    terms = loss_of(batch, values, log_prob, entropy, normalize_advantage=normalize_advantage)
    assert all(th.isfinite(term) for term in terms)
    assert all(th.isfinite(gradient).all() for gradient in gradients_of(terms.loss, values, log_prob, entropy))
    unclipped = loss_of(batch, values, log_prob, entropy, normalize_advantage=False, clip_range=10.0)
    ratio = th.exp(log_prob - batch.old_log_prob).item()
    assert unclipped.policy_loss.item() == pytest.approx(-batch.advantages.item() * ratio, rel=1e-5)


def test_coefficients_may_be_tensors():
    arguments = random_batch()
    numbers = {"clip_range": 0.2, "clip_range_vf": 0.15, "ent_coef": 0.3, "vf_coef": 0.5}
    tensors = {name: th.tensor(number) for name, number in numbers.items()}
    for switch in (True, False):
        expected = loss_of(*arguments, **numbers, pessimistic_value_clip=switch)
        actual = loss_of(*arguments, **tensors, pessimistic_value_clip=switch)
        th.testing.assert_close(tuple(actual), tuple(expected))


# Invariant 5: padding changes nothing

SETTINGS = {
    "all": {},
    "SB3's value clip": {"pessimistic_value_clip": False},
    "no value clip": {"clip_range_vf": None},
    "raw advantages": {"normalize_advantage": False},
    "no closed entropy": {"entropy": None},
}
VALID = th.tensor([True, False, True, True, False, True, True, True, False, True, False, True])


def masked_terms_and_gradients(arguments, settings):
    batch, values, log_prob, entropy = arguments
    given = {k: v for k, v in settings.items() if k != "entropy"}
    terms = loss_of(batch, values, log_prob, None if "entropy" in settings else entropy, **given)
    return terms, gradients_of(terms.loss, values, log_prob, entropy)


def padded_with(arguments, padding, valid=VALID):
    """Overwrite every padded element of every input by ``padding``."""
    batch, *outputs = arguments
    names = ("old_values", "old_log_prob", "advantages", "returns")
    batch = dataclasses.replace(
        batch, **{name: th.where(valid, getattr(batch, name), padding) for name in names}, valid=valid
    )
    return batch, *(th.where(valid, output.detach(), padding).requires_grad_() for output in outputs)


def only_valid(arguments, valid=VALID):
    batch, *outputs = arguments
    names = ("observations", "actions", "old_values", "old_log_prob", "advantages", "returns")
    batch = dataclasses.replace(batch, **{name: getattr(batch, name)[valid] for name in names}, valid=None)
    return batch, *(output.detach()[valid].requires_grad_() for output in outputs)


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_padding_gives_the_loss_and_gradients_of_absent_elements(settings):
    arguments = padded_with(random_batch(), 3.0)
    masked, masked_gradients = masked_terms_and_gradients(arguments, settings)
    subset, subset_gradients = masked_terms_and_gradients(only_valid(random_batch()), settings)
    th.testing.assert_close(tuple(masked), tuple(subset), rtol=1e-5, atol=1e-6)
    for gradient, expected in zip(masked_gradients, subset_gradients, strict=True):
        th.testing.assert_close(gradient[VALID], expected, rtol=1e-5, atol=1e-6)
        assert not gradient[~VALID].any()


@pytest.mark.parametrize("padding", [0.0, 1e4, -1e30, 1e38, INF, -INF, NAN])
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_the_content_of_padding_changes_no_bit(settings, padding):
    expected, expected_gradients = masked_terms_and_gradients(padded_with(random_batch(), 0.5), settings)
    actual, gradients = masked_terms_and_gradients(padded_with(random_batch(), padding), settings)
    for name, value in expected._asdict().items():
        assert th.equal(getattr(actual, name), value), name
    for gradient, expected_gradient in zip(gradients, expected_gradients, strict=True):
        assert th.equal(gradient, expected_gradient)


def test_a_mask_that_is_all_true_changes_nothing():
    for settings in SETTINGS.values():
        arguments = random_batch()
        everything = padded_with(arguments, 0.0, th.ones(BATCH, dtype=th.bool))
        without, _ = masked_terms_and_gradients(arguments, settings)
        masked, _ = masked_terms_and_gradients(everything, settings)
        th.testing.assert_close(tuple(masked), tuple(without))


@pytest.mark.parametrize("n_valid", [0, 1])
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_a_minibatch_with_one_or_no_real_element_stays_finite(settings, n_valid):
    valid = th.arange(BATCH) < n_valid
    terms, gradients = masked_terms_and_gradients(padded_with(random_batch(), NAN, valid), settings)
    assert all(th.isfinite(term) for term in terms)
    assert all(th.isfinite(gradient).all() for gradient in gradients)
    if n_valid == 0:
        assert all(term == 0 for term in terms)
        assert not any(gradient.any() for gradient in gradients)


def test_the_value_loss_equals_sb3s_mse_loss_bit_for_bit():
    """Invariant 1 needs this: the backward of mse_loss rounds differently from that of a mean of squares."""
    batch, values, *_ = random_batch(50, seed=1)
    for clip_range_vf in (None, 10.0):
        # Powers of two, as batch size or coefficient, would hide the rounding
        loss = 0.7 * value_loss(values, batch.old_values, batch.returns, clip_range_vf, pessimistic=False)
        clipped = batch.old_values + th.clamp(values - batch.old_values, -10.0, 10.0)
        reference = 0.7 * F.mse_loss(batch.returns, values if clip_range_vf is None else clipped)
        assert th.equal(loss, reference)
        assert th.equal(gradients_of(loss, values)[0], gradients_of(reference, values)[0])
