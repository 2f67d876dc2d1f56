import math

import numpy as np
import pytest
import torch as th
from scipy import special, stats
from scipy.integrate import trapezoid
from torch.distributions import Beta

from sb3_ppo_plus.policies.bounded_distributions import BETA_EPSILON, BETA_MAX_CONCENTRATION, BetaDistribution

NET_OUTPUTS = [(0.0, 0.0), (-40.0, -40.0), (3.0, -2.0), (-50.0, 4.0), (50.0, 200.0), (900.0, 1100.0), (2e3, -5.0)]
EXTREME_OUTPUTS = [(1e4, 1e4), (1e30, 1e30), (1e30, -1e30), (-1e30, -1e30), (-100.0, -100.0), (1e4, -1e4)]


def concentrations(net_outputs):
    return 1.0 + np.logaddexp(0.0, np.asarray(net_outputs, dtype=np.float64))


@pytest.mark.parametrize("net_outputs", NET_OUTPUTS)
def test_beta_density_integrates_to_one(net_outputs):
    # A grid of the distribution's own quantiles resolves its peaks. Stored actions are float32
    probabilities = special.expit(np.linspace(-25, 25, 20_001))
    a, b = concentrations(net_outputs)
    points = np.unique(stats.beta(a, b).ppf(probabilities).astype(np.float32).clip(BETA_EPSILON, 1 - BETA_EPSILON))
    outputs = th.tensor(net_outputs).expand(len(points), 2)
    log_prob = BetaDistribution(1).proba_distribution(outputs).log_prob(th.as_tensor(points)[:, None])
    beyond = stats.beta(a, b).cdf(points[0]) + stats.beta(a, b).sf(points[-1])
    assert trapezoid(np.exp(log_prob.double().numpy()), points.astype(np.float64)) + beyond == pytest.approx(
        1.0, abs=2e-4
    )


@pytest.mark.parametrize("net_outputs", NET_OUTPUTS)
def test_beta_log_prob_and_its_gradient_equal_the_closed_forms(net_outputs):
    a, b = concentrations(net_outputs)
    x = stats.beta(a, b).ppf([0.01, 0.3, 0.5, 0.9, 0.999]).astype(np.float32).clip(1e-6, 1 - 1e-6)
    outputs = th.tensor(net_outputs).repeat(5, 1).requires_grad_(True)
    log_prob = BetaDistribution(1).proba_distribution(outputs).log_prob(th.as_tensor(x)[:, None])
    x = x.astype(np.float64)
    np.testing.assert_allclose(log_prob.detach(), stats.beta(a, b).logpdf(x), rtol=1e-5, atol=1e-5)
    by_alpha = np.log(x) - special.digamma(a) + special.digamma(a + b)
    by_beta = np.log1p(-x) - special.digamma(b) + special.digamma(a + b)
    expected = np.stack([by_alpha, by_beta], 1) * special.expit(np.asarray(net_outputs))
    np.testing.assert_allclose(th.autograd.grad(log_prob.sum(), outputs)[0], expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("net_outputs", NET_OUTPUTS)
def test_beta_entropy_and_its_gradient_match_numerical_integration(net_outputs):
    def integral(alpha_output, beta_output):
        reference = stats.beta(*concentrations((alpha_output, beta_output)))
        p = (np.arange(200_000) + 0.5) / 200_000
        return -np.mean(reference.logpdf(reference.ppf(p)))

    outputs = th.tensor([net_outputs], requires_grad=True)
    entropy = BetaDistribution(1).proba_distribution(outputs).entropy()
    assert entropy.shape == (1,)
    assert entropy.item() == pytest.approx(integral(*net_outputs), abs=1e-4)
    gradient = th.autograd.grad(entropy.sum(), outputs)[0][0]
    for index in range(2):
        step = np.eye(2)[index] * 1e-2
        difference = (integral(*(net_outputs + step)) - integral(*(net_outputs - step))) / 2e-2
        assert gradient[index].item() == pytest.approx(difference, abs=1e-4)


def test_beta_is_torchs_beta_with_alpha_first_and_beta_second():
    th.manual_seed(0)
    outputs, x = th.randn(7, 6), th.rand(7, 3)
    dist = BetaDistribution(3).proba_distribution(outputs)
    reference = Beta(1 + th.nn.functional.softplus(outputs[:, :3]), 1 + th.nn.functional.softplus(outputs[:, 3:]))
    th.testing.assert_close(dist.log_prob(x), reference.log_prob(x).sum(1))
    th.testing.assert_close(dist.entropy(), reference.entropy().sum(1))
    th.testing.assert_close(dist.mode(), reference.mean)


@pytest.mark.parametrize("net_outputs", [(5e3, 5e3), (9e3, 2e3), (1e4, 3.0), (300.0, 400.0)])
def test_rounding_of_the_net_outputs_hardly_changes_betas_log_prob(net_outputs):
    # Rollout and update differ by such rounding; lgamma in float32 would turn it into jumps of 1e-3 and more.
    outputs = th.tensor([net_outputs])
    x = BetaDistribution(1).proba_distribution(outputs).distribution.mean.float() * 0.999
    base = BetaDistribution(1).proba_distribution(outputs).log_prob(x)
    nudged = outputs
    for _ in range(8):
        nudged = th.nextafter(nudged, th.tensor([[math.inf, -math.inf]]))
        shift = (BetaDistribution(1).proba_distribution(nudged).log_prob(x) - base).abs().item()
        assert shift < 1e-4


@pytest.mark.parametrize("net_outputs", NET_OUTPUTS + EXTREME_OUTPUTS)
def test_beta_samples_stay_inside_and_keep_their_log_prob(net_outputs):
    th.manual_seed(0)
    dist = BetaDistribution(2).proba_distribution(th.tensor(net_outputs).repeat_interleave(2).expand(2000, 4))
    x = dist.sample()
    assert x.dtype == th.float32
    assert x.shape == (2000, 2)
    assert (x >= BETA_EPSILON).all() and (x <= 1 - BETA_EPSILON).all()
    stored = x.clone().numpy()
    assert th.equal(dist.log_prob(th.as_tensor(stored)), dist.log_prob(x))
    assert dist.log_prob(x).isfinite().all()


def test_beta_samples_follow_the_density():
    th.manual_seed(0)
    x = BetaDistribution(1).proba_distribution(th.tensor([[2.0, -1.0]]).expand(5000, 2)).sample()[:, 0].numpy()
    assert stats.kstest(x, stats.beta(*concentrations((2.0, -1.0))).cdf).pvalue > 0.01


@pytest.mark.parametrize("net_outputs", NET_OUTPUTS + EXTREME_OUTPUTS)
@pytest.mark.parametrize("x", [0.0, 1e-30, BETA_EPSILON, 0.5, 1 - BETA_EPSILON, 1.0])
def test_beta_is_finite_at_the_boundary_and_for_any_net_output(net_outputs, x):
    outputs = th.tensor([net_outputs], requires_grad=True)
    dist = BetaDistribution(1).proba_distribution(outputs)
    for value in (dist.log_prob(th.tensor([[x]])), dist.entropy(), dist.mode(), dist.sample()):
        assert value.isfinite().all()
        assert th.autograd.grad(value.sum(), outputs, retain_graph=True)[0].isfinite().all()


def test_betas_concentrations_are_bounded():
    dist = BetaDistribution(1).proba_distribution(th.tensor([[1e8, 1e4 - 2]]))
    assert dist.distribution.concentration1.item() == BETA_MAX_CONCENTRATION
    assert dist.distribution.concentration0.item() == pytest.approx(1e4 - 1)


@pytest.mark.parametrize(
    ("net_outputs", "mean", "mode"),
    [
        ((0.0, 0.0), 0.5, 0.5),
        ((3.0, 1.0), 4.048587 / 6.361849, 3.048587 / 4.361849),
        ((-100.0, -100.0), 0.5, 0.5),
        ((-30.0, 2.0), 1 / 4.126928, BETA_EPSILON),
        ((2.0, -30.0), 3.126928 / 4.126928, 1 - BETA_EPSILON),
        ((1e30, 1e30), 0.5, 0.5),
    ],
)
def test_betas_deterministic_action_is_the_mean_or_the_mode(net_outputs, mean, mode):
    for choice, expected in (("mean", mean), ("mode", mode)):
        dist = BetaDistribution(1, deterministic=choice).proba_distribution(th.tensor([net_outputs]))
        assert dist.get_actions(deterministic=True).item() == pytest.approx(expected, rel=1e-5)


def test_betas_mode_is_where_its_density_is_largest():
    dist = BetaDistribution(1, deterministic="mode").proba_distribution(th.tensor([[1.3, 0.2]]).expand(999, 2))
    grid = th.linspace(0.001, 0.999, 999)[:, None]
    assert grid[dist.log_prob(grid).argmax()].item() == pytest.approx(dist.mode()[0].item(), abs=1e-3)


@pytest.mark.parametrize("bad", ["median", None, True])
def test_betas_deterministic_action_must_be_mean_or_mode(bad):
    with pytest.raises(ValueError, match='deterministic must be "mean" or "mode", got '):
        BetaDistribution(1, deterministic=bad)
