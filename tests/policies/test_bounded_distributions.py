import copy
import math
import pickle
from functools import partial

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from hypothesis import given
from hypothesis import strategies as st
from scipy import special, stats
from scipy.integrate import trapezoid
from stable_baselines3.common.distributions import CategoricalDistribution, DiagGaussianDistribution, kl_divergence
from stable_baselines3.common.policies import ActorCriticPolicy
from torch.distributions import Beta, Normal, TanhTransform, TransformedDistribution

from sb3_ppo_plus import zoo
from sb3_ppo_plus.policies.bounded_distributions import (
    ACTION_DISTRIBUTIONS,
    BETA_EPSILON,
    BETA_MAX_CONCENTRATION,
    LOG_STD_MAX,
    LOG_STD_MIN,
    BetaDistribution,
    SquashedGaussianDistribution,
    make_action_distribution,
)

GAUSSIANS = [(0.0, 0.0), (0.7, -1.0), (-3.0, 0.5), (0.0, 2.0), (1.0, -5.0), (8.0, -1.0), (-20.0, 2.0), (30.0, -5.0)]
NET_OUTPUTS = [(0.0, 0.0), (-40.0, -40.0), (3.0, -2.0), (-50.0, 4.0), (50.0, 200.0), (900.0, 1100.0), (2e3, -5.0)]
EXTREME_OUTPUTS = [(1e4, 1e4), (1e30, 1e30), (1e30, -1e30), (-1e30, -1e30), (-100.0, -100.0), (1e4, -1e4)]


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


def concentrations(net_outputs):
    return 1.0 + np.logaddexp(0.0, np.asarray(net_outputs, dtype=np.float64))


# Squashed Gaussian


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


# Beta


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


# Both distributions


@pytest.fixture(params=["squashed_gaussian", "beta"])
def name(request):
    return request.param


def make(name, dim=1, **kwargs):
    return make_action_distribution(spaces.Box(-1, 1, (dim,)), name, kwargs)


@st.composite
def bounds(draw):
    width = draw(st.sampled_from([32, 64]))
    largest = float(np.finfo(f"float{width}").max)
    number = st.floats(-largest, largest, width=width) | st.floats(-1, 1, width=width)
    pairs = [sorted((draw(number), draw(number))) for _ in range(3)]
    return np.array(pairs, dtype=f"float{width}").T


@pytest.mark.parametrize("kind", ["squashed_gaussian", "beta"])
@given(
    bounds=bounds(), stored=st.lists(st.floats(-1e6, 1e6, width=32) | st.floats(0, 1, width=32), min_size=6, max_size=6)
)
def test_actions_never_leave_the_bounds(kind, bounds, stored):
    low, high = bounds
    with np.errstate(over="raise", invalid="raise"):
        actions = make(kind, 3).to_bounds(np.array(stored, dtype=np.float32).reshape(2, 3), low, high)
    assert actions.dtype == low.dtype
    assert actions.shape == (2, 3)
    assert (actions >= low).all() and (actions <= high).all()


def test_rounding_does_not_step_over_a_bound(name):
    edge = np.full(1000, 0.1) + np.arange(1000) * 1e-3
    stored = np.linspace(-1, 1, 1000, dtype=np.float32) if name == "squashed_gaussian" else np.linspace(0, 1, 1000)
    # Equal bounds show the rounding of the weights
    np.testing.assert_array_equal(make(name).to_bounds(stored, edge, edge), edge)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_the_widest_bounds_do_not_overflow(name, dtype):
    low, high = np.array([-np.finfo(dtype).max]), np.array([np.finfo(dtype).max])
    middle = np.array([[0.0 if name == "squashed_gaussian" else 0.5]], dtype=np.float32)
    assert make(name).to_bounds(middle, low, high).tolist() == [[0.0]]


@pytest.mark.parametrize(
    ("kind", "stored", "expected"),
    [
        ("squashed_gaussian", [-1e4, 0.0, 1e4, math.atanh(0.5)], [-1.0, 1.0, 3.0, 2.0]),
        ("beta", [0.0, 0.5, 1.0, 0.75], [-1.0, 1.0, 3.0, 2.0]),
    ],
)
def test_stored_actions_map_affinely_to_asymmetric_bounds(kind, stored, expected):
    space = spaces.Box(-1.0, 3.0, (4,), dtype=np.float32)
    actions = make_action_distribution(space, kind).to_bounds(np.array([stored], np.float32), space.low, space.high)
    np.testing.assert_allclose(actions, [expected], rtol=1e-6)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_bounds_per_dimension_and_boxes_of_several_dimensions(name, dtype):
    low = np.array([[-1, 0, 5], [-1e-6, -1e6, 2]], dtype=dtype)
    space = spaces.Box(low, np.array([[1, 1e-3, 6], [1e-6, 3, 2]], dtype=dtype), dtype=dtype)
    dist = make_action_distribution(space, name)
    net, log_std = dist.proba_distribution_net(4)
    stored = dist.proba_distribution(net(th.randn(50, 4)), log_std).sample().detach().reshape(-1, *space.shape)
    actions = dist.to_bounds(stored.numpy(), space.low, space.high)
    assert actions.shape == (50, 2, 3)
    assert all(space.contains(action) for action in actions)


def test_half_precision_inputs_are_computed_in_float32(name):
    dist = make(name, 2)
    outputs = th.randn(5, 4 if name == "beta" else 2).bfloat16()
    dist.proba_distribution(outputs, th.zeros(2).bfloat16())
    actions = dist.sample()
    half, single = dist.log_prob(actions), dist.proba_distribution(outputs.float(), th.zeros(2)).log_prob(actions)
    assert actions.dtype == half.dtype == dist.entropy().dtype == dist.mode().dtype == th.float32
    assert th.equal(half, single)


@pytest.mark.parametrize("twin", [copy.copy, copy.deepcopy, lambda dist: pickle.loads(pickle.dumps(dist))])
def test_copies_and_pickles_act_like_the_original(name, twin):
    dist = make(name, 2, **({"deterministic": "mode"} if name == "beta" else {"entropy_samples": 3}))
    for original in (dist, copy.copy(dist).proba_distribution(th.ones(3, 4 if name == "beta" else 2), th.zeros(2))):
        copied = twin(original)
        assert type(copied) is type(original)
        for one in (original, copied):
            one.proba_distribution(th.ones(3, 4 if name == "beta" else 2), th.zeros(2))
        actions = th.full((3, 2), 0.4)
        assert th.equal(copied.log_prob(actions), original.log_prob(actions))
        assert th.equal(copied.mode(), original.mode())


def test_a_traced_function_that_copies_a_distribution_is_one_graph_and_does_not_change_the_original(name):
    dist = make(name, 2)

    def losses(outputs, log_std, actions, noise):
        fresh = copy.copy(dist).proba_distribution(outputs, log_std)
        entropy = fresh.entropy(noise) if isinstance(fresh, SquashedGaussianDistribution) else fresh.entropy()
        return (fresh.log_prob(actions) + entropy).sum()

    th.manual_seed(0)
    inputs = th.randn(5, 4 if name == "beta" else 2), th.zeros(2), th.rand(5, 2), th.randn(1, 5, 2)
    traced = th.compile(th.func.grad_and_value(losses), backend="aot_eager", fullgraph=True)
    for ours, expected in zip(traced(*inputs), th.func.grad_and_value(losses)(*inputs), strict=True):
        th.testing.assert_close(ours, expected)
    assert not hasattr(dist, "distribution")


def test_sb3s_policy_builds_and_uses_bounded_distributions(name):
    space = spaces.Box(np.array([-2.0, 0.0], np.float32), np.array([1.0, 5.0], np.float32))
    policy = ActorCriticPolicy(spaces.Box(-1, 1, (3,)), space, lambda _: 3e-4)
    policy.action_dist = make_action_distribution(space, name)
    policy._build(lambda _: 3e-4)
    observations = th.randn(64, 3)
    actions, _, log_prob = policy(observations)
    _, recomputed, entropy = policy.evaluate_actions(observations, actions)
    assert actions.shape == (64, 2)
    assert entropy.shape == (64,)
    th.testing.assert_close(recomputed, log_prob, rtol=0, atol=1e-5)
    assert ("log_std" in policy.state_dict()) == (name == "squashed_gaussian")
    (recomputed + entropy).mean().backward()
    assert all(p.grad.isfinite().all() for p in policy.action_net.parameters())


def test_sb3s_kl_divergence_accepts_bounded_distributions(name):
    def ours(scale):
        outputs = scale * th.ones(4, 4 if name == "beta" else 2)
        return make(name, 2).proba_distribution(outputs, th.zeros(2))

    assert (kl_divergence(ours(1.0), ours(1.0)).abs() < 1e-6).all()
    assert (kl_divergence(ours(1.0), ours(2.0)) > 1e-3).all()


# Distributions by name


@pytest.mark.parametrize(
    ("kind", "kwargs", "expected"),
    [
        ("gaussian", None, DiagGaussianDistribution),
        ("squashed_gaussian", {"entropy_samples": 2}, SquashedGaussianDistribution),
        ("beta", {"deterministic": "mode"}, BetaDistribution),
    ],
)
def test_a_name_gives_its_class_for_the_flattened_box(kind, kwargs, expected):
    dist = make_action_distribution(spaces.Box(-1, 1, (2, 3)), kind, kwargs)
    assert type(dist) is expected
    assert dist.action_dim == 6
    for key, value in (kwargs or {}).items():
        assert getattr(dist, key) == value


def test_with_gaussian_other_spaces_and_infinite_bounds_get_sb3s_distributions():
    assert type(make_action_distribution(spaces.Discrete(3), "gaussian")) is CategoricalDistribution
    assert type(make_action_distribution(spaces.Box(-np.inf, np.inf, (2,)), "gaussian")) is DiagGaussianDistribution


def test_a_class_of_the_table_that_is_not_bounded_is_refused_and_not_replaced(monkeypatch):
    class Laplace(DiagGaussianDistribution):
        pass

    monkeypatch.setitem(ACTION_DISTRIBUTIONS, "laplace", Laplace)
    with pytest.raises(TypeError, match='action_dist="laplace": Laplace must be a subclass of BoundedDistribution'):
        make_action_distribution(spaces.Box(-1, 1, (2,)), "laplace")


def test_the_zoo_samples_every_distribution():
    assert set(zoo._ACTION_DISTS) == ACTION_DISTRIBUTIONS.keys()


@pytest.mark.parametrize("bad", ["Beta", "normal", "", None, ["beta"]])
def test_an_unknown_name_is_refused_with_the_allowed_ones(bad):
    with pytest.raises(
        ValueError, match='action_dist must be one of "gaussian", "squashed_gaussian", "beta"'
    ) as caught:
        make_action_distribution(spaces.Box(-1, 1, (2,)), bad)
    assert repr(bad) in str(caught.value)


@pytest.mark.parametrize(
    "space",
    [
        spaces.Discrete(3),
        spaces.MultiDiscrete([2, 3]),
        spaces.MultiBinary(2),
        spaces.Box(0, 255, (2,), dtype=np.uint8),
    ],
    ids=str,
)
def test_spaces_other_than_a_box_of_real_numbers_are_refused(name, space):
    with pytest.raises(
        ValueError, match=f'action_dist="{name}" needs a Box action space.*use action_dist="gaussian"'
    ) as e:
        make_action_distribution(space, name)
    assert str(space) in str(e.value)


@pytest.mark.parametrize(
    "space",
    [
        spaces.Box(-np.inf, np.inf, (2,)),
        spaces.Box(-np.inf, 1, (2,)),
        spaces.Box(np.float32([0, 0]), np.float32([1, np.inf])),
    ],
)
def test_infinite_bounds_are_refused_with_the_space_and_the_remedy(name, space):
    message = f'action_dist="{name}" needs finite bounds.*TransformAction.*or use action_dist="gaussian"'
    with pytest.raises(ValueError, match=message) as caught:
        make_action_distribution(space, name)
    assert str(space) in str(caught.value)


def test_the_remedy_for_infinite_bounds_works(name):
    env = gym.make("Pendulum-v1").unwrapped
    env.action_space = spaces.Box(-np.inf, np.inf, (1,))
    remedied = gym.wrappers.TransformAction(
        env, lambda action: action, gym.spaces.Box(np.float32([-2]), np.float32([2]))
    )
    assert make_action_distribution(remedied.action_space, name).action_dim == 1


@pytest.mark.parametrize(
    ("kind", "allowed"), [("gaussian", "nothing"), ("squashed_gaussian", "entropy_samples"), ("beta", "deterministic")]
)
def test_unknown_keywords_are_refused_with_what_is_allowed(kind, allowed):
    make = partial(make_action_distribution, spaces.Box(-1, 1, (2,)), kind)
    with pytest.raises(TypeError, match=f"action_dist=\"{kind}\" may hold {allowed}, got 'epsilon'"):
        make({"epsilon": 1})
    with pytest.raises(TypeError, match="got 'action_dim'"):
        make({"action_dim": 1})
