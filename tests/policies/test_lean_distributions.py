"""The lean distributions equal SB3's to the bit, in values, samples and gradients."""

import threading
from copy import copy

import pytest
import torch as th
from stable_baselines3.common.distributions import (
    CategoricalDistribution,
    DiagGaussianDistribution,
    MultiCategoricalDistribution,
)
from torch.distributions import Categorical, Normal

from sb3_ppo_plus.policies.lean_distributions import (
    LeanCategoricalDistribution,
    LeanDiagGaussianDistribution,
    LeanMultiCategoricalDistribution,
)
from sb3_ppo_plus.policies.rounding import may_round
from sb3_ppo_plus.update.argument_validation import without_argument_validation


def gaussian_parameters(scale=1.0):
    generator = th.Generator().manual_seed(0)
    mean = (scale * th.randn(16, 3, generator=generator)).requires_grad_()
    return mean, th.tensor([-1.0, 0.0, 0.7], requires_grad=True)


def categorical_parameters(scale=1.0):
    generator = th.Generator().manual_seed(0)
    return ((scale * th.randn(16, 5, generator=generator)).requires_grad_(),)


PAIRS = {
    "gaussian": (DiagGaussianDistribution, LeanDiagGaussianDistribution, 3, gaussian_parameters),
    "categorical": (CategoricalDistribution, LeanCategoricalDistribution, 5, categorical_parameters),
    "multi categorical": (
        MultiCategoricalDistribution,
        LeanMultiCategoricalDistribution,
        [2, 1, 2],
        categorical_parameters,
    ),
}


@pytest.mark.parametrize("scale", [1e-3, 1.0, 100.0])
@pytest.mark.parametrize("name", PAIRS)
def test_values_samples_and_gradients_equal_sb3s(name, scale):
    theirs, ours, action_dim, make_parameters = PAIRS[name]
    found = []
    for distribution_class in (theirs, ours):
        parameters = make_parameters(scale)
        distribution = distribution_class(action_dim).proba_distribution(*parameters)
        th.manual_seed(1)
        sample = distribution.sample()
        actions = sample.detach()
        log_prob, entropy = distribution.log_prob(actions), distribution.entropy()
        loss = (log_prob * th.linspace(-1, 1, 16)).sum() + (0.01 * entropy).sum()
        if sample.requires_grad:
            loss = loss + sample.square().sum()
        gradients = th.autograd.grad(loss, parameters)
        found.append([sample, distribution.mode(), log_prob, entropy, *gradients, th.rand(1)])
    for expected, actual in zip(*found, strict=True):
        assert actual.shape == expected.shape and actual.dtype == expected.dtype
        assert th.equal(actual, expected)


@pytest.mark.parametrize(
    ("name", "types"),
    [("gaussian", [Normal]), ("categorical", [Categorical]), ("multi categorical", [Categorical] * 3)],
    ids=PAIRS,
)
def test_torchs_distribution_object_is_there_when_it_is_read(name, types):
    _, ours, action_dim, make_parameters = PAIRS[name]
    distribution = ours(action_dim)
    for scale in (1.0, 2.0):
        distribution.proba_distribution(*make_parameters(scale))
        inner = distribution.distribution
        parts = inner if isinstance(inner, list) else [inner]
        assert [type(part) for part in parts] == types
        entropies = [part.entropy().reshape(16, -1).sum(1) for part in parts]
        assert th.equal(th.stack(entropies, dim=1).sum(1), distribution.entropy())


@pytest.mark.parametrize("name", PAIRS)
def test_nan_raises_as_with_sb3_unless_checks_are_off(name):
    theirs, ours, action_dim, make_parameters = PAIRS[name]
    parameters = [parameter.detach() for parameter in make_parameters()]
    parameters[0][3, 1] = th.nan
    messages = []
    for distribution_class in (theirs, ours):
        with pytest.raises(ValueError, match="constraint") as raised:
            distribution_class(action_dim).proba_distribution(*parameters)
        messages.append(str(raised.value))
    assert messages[0] == messages[1]
    with without_argument_validation():
        ours(action_dim).proba_distribution(*parameters)


def test_infinite_means_are_allowed_as_with_sb3():
    mean = th.tensor([[th.inf, 0.0, -th.inf]])
    assert th.equal(LeanDiagGaussianDistribution(3).proba_distribution(mean, th.zeros(3)).mode(), mean)


def test_an_assigned_distribution_object_is_used():
    distribution = LeanCategoricalDistribution(2).proba_distribution(th.zeros(4, 2))
    distribution.distribution = Categorical(logits=th.tensor([[0.0, 50.0]]).expand(4, 2))
    assert (distribution.sample() == 1).all()
    assert (distribution.mode() == 1).all()
    assert th.allclose(distribution.log_prob(th.ones(4)), th.zeros(4))
    assert th.allclose(distribution.entropy(), th.zeros(4))
    # New parameters replace it
    assert distribution.proba_distribution(th.tensor([[9.0, 0.0]])).mode().item() == 0


def test_assigned_distribution_objects_are_used():
    distribution = LeanMultiCategoricalDistribution([2, 3]).proba_distribution(th.zeros(4, 5))
    ones = [Categorical(logits=th.tensor([[0.0, 50.0, 0.0][:n]]).expand(4, n)) for n in (2, 3)]
    distribution.distribution = ones
    assert distribution.distribution == ones
    assert (distribution.sample() == 1).all()
    assert (distribution.mode() == 1).all()
    assert th.allclose(distribution.log_prob(th.ones(4, 2)), th.zeros(4))
    assert th.allclose(distribution.entropy(), th.zeros(4))


def test_a_copy_keeps_its_parameters_when_the_original_gets_new_ones():
    distribution = LeanMultiCategoricalDistribution([2, 3]).proba_distribution(th.eye(5)[1:2])
    copied = copy(distribution)
    distribution.proba_distribution(th.zeros(1, 5))
    assert copied.mode().tolist() == [[1, 0]]


def test_a_nan_in_log_std_raises():
    with pytest.raises(ValueError, match="scale"):
        LeanDiagGaussianDistribution(2).proba_distribution(th.zeros(1, 2), th.tensor([0.0, th.nan]))


def test_compiling_in_another_thread_changes_no_bit_in_this_thread():
    distribution = LeanCategoricalDistribution(3).proba_distribution(th.tensor([[1.0, 2.0, 4.0]]))
    exact = distribution.logits
    inside, done = threading.Event(), threading.Event()

    def compile_for_a_while():
        with may_round():
            inside.set()
            done.wait(60)

    thread = threading.Thread(target=compile_for_a_while)
    thread.start()
    inside.wait(60)
    assert th.equal(distribution.logits, exact)
    done.set()
    thread.join(60)
    with may_round():
        assert not th.equal(distribution.logits, exact)
