import math

import numpy as np
import pytest
import torch as th
from scipy import stats
from scipy.integrate import trapezoid
from torch.distributions import Normal, TanhTransform, TransformedDistribution

from sb3_ppo_plus.policies.bounded_distributions import LOG_STD_MAX, LOG_STD_MIN, SquashedGaussianDistribution

GAUSSIANS = [(0.0, 0.0), (0.7, -1.0), (-3.0, 0.5), (0.0, 2.0), (1.0, -5.0), (8.0, -1.0), (-20.0, 2.0), (30.0, -5.0)]


def squashed(mean, log_std, **kwargs):
    mean, log_std = th.as_tensor(mean), th.as_tensor(log_std)
    return SquashedGaussianDistribution(mean.shape[-1], **kwargs).proba_distribution(mean, log_std)


def log_slope(u):
    """log(1 - tanh(u)^2) by the hyperbolic cosine, in numpy's float64."""
    return -2.0 * (np.logaddexp(u, -u) - math.log(2.0))


def squashed_entropy_by_integration(mean, log_std):
    """-E[log density of tanh(u)] by the trapezoidal rule over u, in float64."""
    z = np.linspace(-12.0, 12.0, 40_001)
    density = stats.norm.pdf(z)
    log_density_of_tanh = stats.norm.logpdf(z) - log_std - log_slope(mean + np.exp(log_std) * z)
    return -trapezoid(density * log_density_of_tanh, z)


def stratified_noise(samples, batch=1, dim=1):
    """Normal quantiles at the middles of equal strata: sampling without its noise."""
    quantiles = stats.norm.ppf((np.arange(samples) + 0.5) / samples)
    return th.as_tensor(quantiles).reshape(samples, 1, 1).expand(samples, batch, dim)


@pytest.mark.parametrize(("mean", "log_std"), GAUSSIANS)
def test_squashed_density_integrates_to_one_over_the_open_interval(mean, log_std):
    u = mean + math.exp(log_std) * np.linspace(-10.0, 10.0, 20_001)
    dist = squashed(np.full((len(u), 1), mean), np.array([log_std]))
    # d tanh(u) = (1 - tanh(u)^2) du, so that points crowded against 1 keep their digits.
    density = np.exp(dist.log_prob(th.as_tensor(u)[:, None]).numpy() + log_slope(u))
    assert trapezoid(density, u) == pytest.approx(1.0, abs=1e-7)


@pytest.mark.parametrize(("mean", "log_std"), [g for g in GAUSSIANS if abs(g[0]) < 5])
def test_squashed_log_prob_equals_torchs_tanh_transformed_normal(mean, log_std):
    u = (mean + math.exp(log_std) * th.linspace(-2, 2, 9, dtype=th.float64)).clamp(-6, 6)[:, None]
    reference = TransformedDistribution(Normal(mean, math.exp(log_std)), [TanhTransform()])
    ours = squashed(np.full((9, 1), mean), np.array([log_std])).log_prob(u)
    th.testing.assert_close(ours, reference.log_prob(th.tanh(u))[:, 0], rtol=1e-7, atol=1e-7)


def test_squashed_log_prob_sums_over_action_dimensions():
    mean, log_std, u = th.randn(5, 3), th.tensor([0.0, -1.0, 1.0]), th.randn(5, 3)
    whole = squashed(mean, log_std).log_prob(u)
    parts = [squashed(mean[:, [i]], log_std[[i]]).log_prob(u[:, [i]]) for i in range(3)]
    assert whole.shape == (5,)
    th.testing.assert_close(whole, sum(parts))


@pytest.mark.parametrize(("mean", "log_std"), GAUSSIANS)
def test_squashed_entropy_without_sampling_noise_equals_the_integral(mean, log_std):
    dist = squashed(np.array([[mean]]), np.array([log_std]))
    estimate = dist.entropy(stratified_noise(100_000)).item()
    assert estimate == pytest.approx(squashed_entropy_by_integration(mean, log_std), abs=2e-4)


@pytest.mark.parametrize(("mean", "log_std"), GAUSSIANS)
def test_the_gradient_of_squashed_entropy_is_that_of_the_integral(mean, log_std):
    log_std = min(max(log_std, LOG_STD_MIN + 1e-3), LOG_STD_MAX - 1e-3)
    parameters = th.tensor([[mean]], dtype=th.float64, requires_grad=True), th.tensor([log_std], dtype=th.float64)
    parameters[1].requires_grad_(True)
    entropy = SquashedGaussianDistribution(1).proba_distribution(*parameters).entropy(stratified_noise(100_000))
    by_mean, by_log_std = th.autograd.grad(entropy.sum(), parameters)
    h, integral = 1e-4, squashed_entropy_by_integration
    difference = (integral(mean + h, log_std) - integral(mean - h, log_std)) / (2 * h)
    assert by_mean.item() == pytest.approx(difference, abs=2e-3)
    difference = (integral(mean, log_std + h) - integral(mean, log_std - h)) / (2 * h)
    assert by_log_std.item() == pytest.approx(difference, abs=2e-3)


@pytest.mark.parametrize("samples", [1, 4])
def test_squashed_entropy_estimates_average_to_the_integral(samples):
    th.manual_seed(0)
    batch, mean, log_std = 50_000, 0.6, -0.3
    estimates = squashed(th.full((batch, 2), mean), th.full((2,), log_std), entropy_samples=samples).entropy()
    assert estimates.shape == (batch,)
    standard_error = estimates.std().item() / math.sqrt(batch)
    assert abs(estimates.mean().item() - 2 * squashed_entropy_by_integration(mean, log_std)) < 4 * standard_error


def test_more_entropy_samples_mean_less_variance():
    th.manual_seed(0)
    spread = [squashed(th.zeros(20_000, 1), th.zeros(1), entropy_samples=n).entropy().var().item() for n in (1, 8)]
    assert spread[0] / spread[1] == pytest.approx(8, rel=0.15)


def test_squashed_entropy_draws_new_noise_of_the_documented_shape():
    th.manual_seed(3)
    dist = squashed(th.zeros(6, 2), th.zeros(2), entropy_samples=3)
    assert not th.equal(dist.entropy(), dist.entropy())
    assert dist.entropy_noise(6).shape == (3, 6, 2)
    th.manual_seed(4)
    drawn_inside = dist.entropy()
    th.manual_seed(4)
    assert th.equal(dist.entropy(dist.entropy_noise(6)), drawn_inside)


@pytest.mark.parametrize("log_std", [-20.0, -5.1, 2.1, 20.0])
def test_log_std_is_clamped(log_std):
    u = th.tensor([[0.3, -0.2]])
    clamped = min(max(log_std, LOG_STD_MIN), LOG_STD_MAX)
    outside, inside = (squashed(th.zeros(1, 2), th.full((2,), value)) for value in (log_std, clamped))
    assert th.equal(outside.log_prob(u), inside.log_prob(u))
    assert outside.distribution.stddev[0, 0].item() == pytest.approx(math.exp(clamped))


@pytest.mark.parametrize("log_std_init", [-5.1, 2.1, math.nan])
def test_an_initial_log_std_that_the_clamp_would_freeze_is_refused(log_std_init):
    with pytest.raises(ValueError, match=rf"log_std_init must be in \[-5, 2\].*got {log_std_init}"):
        SquashedGaussianDistribution(2).proba_distribution_net(8, log_std_init)
    assert SquashedGaussianDistribution(2).proba_distribution_net(8, -1.0)[1].tolist() == [-1.0, -1.0]


@pytest.mark.parametrize("mean", [0.0, 19.0, -40.0, 1e3, -1e6])
@pytest.mark.parametrize("log_std", [-30.0, -5.0, 0.0, 2.0, 30.0])
@pytest.mark.parametrize("offset", [-1.0, 0.0, 3.0])
def test_saturated_actions_have_finite_log_prob_entropy_and_gradients(mean, log_std, offset):
    mean_actions = th.full((4, 2), mean, requires_grad=True)
    log_stds = th.full((2,), log_std, requires_grad=True)
    dist = SquashedGaussianDistribution(2).proba_distribution(mean_actions, log_stds)
    u = (mean_actions + offset * dist.distribution.stddev).detach().requires_grad_(True)
    for value, inputs in ((dist.log_prob(u), (mean_actions, log_stds, u)), (dist.entropy(), (mean_actions, log_stds))):
        assert value.isfinite().all()
        assert all(gradient.isfinite().all() for gradient in th.autograd.grad(value.sum(), inputs, retain_graph=True))


@pytest.mark.parametrize("u", [20.0, -20.0, 60.0, -60.0, 1e4])
def test_log_prob_of_a_saturated_action_keeps_its_digits(u):
    expected = stats.norm.logpdf(u, 15.0, math.exp(1.0)) - log_slope(u)
    assert squashed(th.tensor([[15.0]]), th.ones(1)).log_prob(th.tensor([[u]])).item() == pytest.approx(expected)


def test_squashed_sample_is_reparametrised_and_its_deterministic_action_is_the_mean():
    mean, log_std = th.randn(3, 2, requires_grad=True), th.zeros(2, requires_grad=True)
    dist = SquashedGaussianDistribution(2).proba_distribution(mean, log_std)
    th.manual_seed(0)
    action = dist.get_actions()
    noise = (action - mean).detach()
    by_mean, by_log_std = th.autograd.grad(action.sum(), (mean, log_std))
    th.testing.assert_close(by_mean, th.ones(3, 2))
    th.testing.assert_close(by_log_std, noise.sum(0))
    assert th.equal(dist.get_actions(deterministic=True), mean)


@pytest.mark.parametrize("bad", [0, -1, 1.5, True, "2"])
def test_entropy_samples_must_be_a_positive_integer(bad):
    with pytest.raises(ValueError, match="entropy_samples must be an integer of at least 1, got "):
        SquashedGaussianDistribution(1, entropy_samples=bad)
