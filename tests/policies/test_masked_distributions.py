"""Masked distributions beside closed forms and sb3-contrib's; without masks, beside SB3's."""

from contextlib import nullcontext

import numpy as np
import pytest
import torch as th
from environments import MASKED_ACTION_SPACES
from gymnasium import spaces
from sb3_contrib.common.maskable.distributions import make_masked_proba_distribution
from stable_baselines3.common.distributions import make_proba_distribution

from sb3_ppo_plus.policies.masked_distributions import (
    MaskableCategoricalDistribution,
    apply_masks,
    make_maskable_distribution,
    mask_sizes,
)
from sb3_ppo_plus.policies.rounding import may_round

BATCH = 50
SPACES = pytest.mark.parametrize("action_space", MASKED_ACTION_SPACES.values(), ids=MASKED_ACTION_SPACES)


def random_masks(action_space, seed=0):
    rng = np.random.default_rng(seed)
    parts = [rng.random((BATCH, size)) < 0.4 for size in mask_sizes(action_space)]
    for part in parts:
        part[np.arange(BATCH), rng.integers(part.shape[1], size=BATCH)] = True
    return np.concatenate(parts, axis=1)


def random_logits(action_space, scale=3.0, seed=0):
    shape = (BATCH, sum(mask_sizes(action_space)))
    return scale * th.randn(shape, generator=th.Generator().manual_seed(seed))


def masked(action_space, logits, masks):
    distribution = make_maskable_distribution(action_space).proba_distribution(logits)
    distribution.apply_masking(masks)
    return distribution


def parts_of(distribution):
    inner = distribution.distribution
    return inner if isinstance(inner, list) else [inner]


@SPACES
def test_all_results_equal_sb3_contribs_bit_for_bit(action_space):
    logits, masks = random_logits(action_space), random_masks(action_space)
    results = []
    for make in (make_masked_proba_distribution, make_maskable_distribution):
        given = logits.clone().requires_grad_()
        distribution = make(action_space).proba_distribution(action_logits=given)
        distribution.apply_masking(masks)
        th.manual_seed(0)
        actions = distribution.sample()
        log_prob, entropy = distribution.log_prob(actions), distribution.entropy()
        (log_prob.sum() + 0.1 * entropy.sum()).backward()
        results.append((actions, distribution.mode(), log_prob, entropy, given.grad))
    for contribs, ours in zip(*results, strict=True):
        assert th.equal(contribs, ours)


@SPACES
@pytest.mark.parametrize("dtype", [th.float32, th.float16, th.bfloat16, th.float64])
@pytest.mark.parametrize("scale", [0.0, 3.0, 1e3])
def test_a_masked_action_has_probability_zero_in_every_precision(action_space, dtype, scale):
    masks = th.as_tensor(random_masks(action_space))
    distribution = masked(action_space, random_logits(action_space, scale).to(dtype), masks)
    for part, allowed in zip(parts_of(distribution), th.split(masks, mask_sizes(action_space), dim=1), strict=True):
        assert part.probs.dtype == dtype
        assert (part.probs[~allowed] == 0).all()
        th.testing.assert_close(part.probs.double().sum(-1), th.ones(BATCH).double(), atol=1e-2, rtol=0)
    assert th.isfinite(distribution.entropy()).all()


def test_log_prob_and_entropy_are_those_of_the_valid_actions_alone():
    space = spaces.Discrete(5)
    logits, masks = random_logits(space), random_masks(space)
    distribution = masked(space, logits, masks)
    for row in range(BATCH):
        valid = np.flatnonzero(masks[row])
        expected = th.distributions.Categorical(logits=logits[row, valid])
        for index, action in enumerate(valid):
            log_prob = distribution.distribution.log_prob(th.full((BATCH,), int(action)))[row]
            th.testing.assert_close(log_prob, expected.logits[index], atol=1e-6, rtol=1e-5)
        th.testing.assert_close(distribution.entropy()[row], expected.entropy(), atol=1e-6, rtol=1e-5)


def test_a_single_valid_action_is_certain():
    masks = th.eye(5, dtype=th.bool)
    logits = 10 * th.randn(5, 5, generator=th.Generator().manual_seed(0))
    distribution = masked(spaces.Discrete(5), logits, masks)
    assert distribution.sample().tolist() == distribution.mode().tolist() == [0, 1, 2, 3, 4]
    assert distribution.log_prob(th.arange(5)).tolist() == [0.0] * 5
    assert distribution.entropy().abs().tolist() == [0.0] * 5


@SPACES
def test_only_valid_actions_are_drawn(action_space):
    masks = random_masks(action_space)
    distribution = masked(action_space, random_logits(action_space, scale=30.0), masks)
    offsets = np.cumsum([0, *mask_sizes(action_space)[:-1]])
    for actions in [distribution.mode(), *(distribution.sample() for _ in range(50))]:
        chosen = actions.numpy().reshape(BATCH, -1) + offsets
        assert np.take_along_axis(masks, chosen, axis=1).all()


@SPACES
@pytest.mark.parametrize("scale", [1.0, 2.0**16], ids=["plain", "as a float16 loss is scaled"])
def test_a_masked_logit_has_no_gradient_and_no_influence(action_space, scale):
    masks = th.as_tensor(random_masks(action_space))
    results = []
    for shift in (0.0, 7.0, -1e4):
        logits = th.where(masks, random_logits(action_space), shift).requires_grad_()
        distribution = masked(action_space, logits, masks)
        log_prob, entropy = distribution.log_prob(distribution.mode()), distribution.entropy()
        (scale * (log_prob.mean() + entropy.mean())).backward()
        assert th.isfinite(logits.grad).all()
        assert (logits.grad[~masks].abs() <= 1e-6 * scale).all()
        results.append((log_prob, entropy, logits.grad / scale))
    for actual in results[1:]:
        for expected, value in zip(results[0], actual, strict=True):
            th.testing.assert_close(value, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["discrete", "multi_discrete"])
def test_without_masks_all_results_equal_sb3s_bit_for_bit(name):
    space = MASKED_ACTION_SPACES[name]
    results = []
    for make in (make_proba_distribution, make_maskable_distribution):
        distribution = make(space).proba_distribution(random_logits(space))
        th.manual_seed(0)
        actions = distribution.sample()
        results.append((actions, distribution.mode(), distribution.log_prob(actions), distribution.entropy()))
    assert all(th.equal(*pair) for pair in zip(*results, strict=True))


@pytest.mark.parametrize(
    ("action_space", "sizes"),
    [
        (spaces.Discrete(4), [4]),
        (spaces.MultiDiscrete([3, 2]), [3, 2]),
        (spaces.MultiBinary(3), [2, 2, 2]),
    ],
    ids=str,
)
def test_a_mask_has_one_element_for_each_choice(action_space, sizes):
    assert mask_sizes(action_space) == sizes


@pytest.mark.parametrize("action_space", [spaces.Box(-1, 1, (2,)), spaces.MultiBinary([2, 2])], ids=str)
def test_other_spaces_cannot_be_masked(action_space):
    with pytest.raises(ValueError, match=r"Discrete, MultiDiscrete or MultiBinary .* got (Box|MultiBinary)\("):
        mask_sizes(action_space)


def test_masks_of_another_size_are_refused():
    distribution = MaskableCategoricalDistribution(3).proba_distribution(th.zeros(2, 3))
    with pytest.raises(ValueError, match=r"shape \(2, 3\), got \(2, 4\)"):
        apply_masks(distribution, np.ones((2, 4)))


def test_a_distribution_that_takes_no_masks_says_so():
    distribution = make_proba_distribution(spaces.MultiBinary(2)).proba_distribution(th.zeros(1, 2))
    with pytest.raises(ValueError, match="BernoulliDistribution, which takes none"):
        apply_masks(distribution, np.ones((1, 4)))


@SPACES
def test_the_short_form_of_compiled_graphs_differs_only_by_rounding(action_space):
    results = []
    for context in (nullcontext(), may_round()):
        logits = random_logits(action_space).requires_grad_()
        with context:
            distribution = masked(action_space, logits, random_masks(action_space))
            th.manual_seed(0)
            actions = distribution.sample()
            log_prob, entropy = distribution.log_prob(actions), distribution.entropy()
        (log_prob.sum() + 0.1 * entropy.sum()).backward()
        results.append((actions, log_prob, entropy, logits.grad))
    for exact, rounded in zip(*results, strict=True):
        th.testing.assert_close(rounded, exact, atol=1e-6, rtol=1e-5)


@SPACES
def test_new_parameters_remove_the_masks(action_space):
    logits, masks = random_logits(action_space), random_masks(action_space)
    distribution = masked(action_space, logits, masks).proba_distribution(logits)
    fresh = make_maskable_distribution(action_space).proba_distribution(logits)
    actions = fresh.mode()
    assert th.equal(distribution.log_prob(actions), fresh.log_prob(actions))
    assert th.equal(distribution.entropy(), fresh.entropy())
