import copy

import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3.common.distributions import BernoulliDistribution
from torch.distributions import Bernoulli, Beta, Categorical, Normal
from torch.nn.functional import softplus

from sb3_ppo_plus.policies.flat_actions import FlatActionSpace
from sb3_ppo_plus.policies.hybrid_distribution import choose_action_distribution

BOX = spaces.Box(np.array([-2.0, 0.0], np.float32), np.array([3.0, 0.5], np.float32))
SPACE = spaces.Dict(
    {
        "a": spaces.Tuple((spaces.Discrete(3), BOX)),
        "b": spaces.MultiDiscrete([[2, 3], [4, 2]]),
        "c": spaces.MultiBinary([2, 2]),
        "d": spaces.Box(-1, 1, (2, 1), np.float64),
    }
)
# Parameters of the Box parts depend on the kind of action
CHOOSING = spaces.Dict({"kind": spaces.Discrete(3), "x": spaces.Box(-1, 1, (2,)), "y": BOX, "z": spaces.Discrete(4)})
USED = {"kind": [["x"], ["y", "z"], []]}
BATCH, LATENT = 50, 6
KINDS = ("gaussian", "beta", "squashed_gaussian")


def make(space=SPACE, action_dist="gaussian", used_parts=None, takes_masks=False, **kwargs):
    """A distribution with random parameters, the outputs of its layers, and log_std."""
    th.manual_seed(0)
    distribution = choose_action_distribution(
        FlatActionSpace(space), None, action_dist, kwargs, takes_masks=takes_masks, used_parts=used_parts
    )
    net, log_std = distribution.proba_distribution_net(LATENT, log_std_init=-0.3)
    if log_std is not None:
        log_std.data += 0.2 * th.randn_like(log_std)
    outputs = [output.detach().requires_grad_() for output in net(3 * th.randn(BATCH, LATENT))]
    return distribution.proba_distribution(outputs, log_std), outputs, log_std


def box_part(action_dist, output, log_std, stored):
    """Log-probability and, where it has a closed form, entropy of a Box part by torch.distributions."""
    if action_dist == "beta":
        alpha, beta = (1 + softplus(output.double())).chunk(2, dim=1)
        reference = Beta(alpha, beta)
        return reference.log_prob(stored.double()).sum(1), reference.entropy().sum(1)
    reference = Normal(output, log_std.exp().expand_as(output))
    if action_dist == "gaussian":
        return reference.log_prob(stored).sum(1), reference.entropy().sum(1)
    slope = th.log(1 - th.tanh(stored.double()) ** 2)
    return (reference.log_prob(stored) - slope).sum(1), None


def categoricals(logits, sizes, stored):
    parts = [Categorical(logits=part) for part in logits.split(sizes, dim=1)]
    log_probs = [part.log_prob(column) for part, column in zip(parts, stored.T, strict=True)]
    return sum(log_probs), sum(part.entropy() for part in parts)


@pytest.mark.parametrize("action_dist", KINDS)
def test_log_prob_and_entropy_are_the_sums_of_torchs_distributions(action_dist):
    distribution, outputs, log_std = make(action_dist=action_dist)
    rows = distribution.sample()
    kind, box, multi, binary, other_box = rows.split([1, 2, 4, 4, 2], dim=1)
    log_stds = (None, None) if log_std is None else log_std.split([2, 2])
    expected = [
        categoricals(outputs[0], [3], kind),
        box_part(action_dist, outputs[1], log_stds[0], box),
        categoricals(outputs[2], [2, 3, 4, 2], multi),
        (Bernoulli(logits=outputs[3]).log_prob(binary).sum(1), Bernoulli(logits=outputs[3]).entropy().sum(1)),
        box_part(action_dist, outputs[4], log_stds[1], other_box),
    ]
    log_prob = distribution.log_prob(rows)
    assert log_prob.shape == (BATCH,) and log_prob.dtype == th.float32
    th.testing.assert_close(log_prob, sum(of_part[0] for of_part in expected).float(), rtol=1e-4, atol=1e-4)
    if action_dist != "squashed_gaussian":
        entropy = sum(of_part[1] for of_part in expected).float()
        th.testing.assert_close(distribution.entropy(), entropy, rtol=1e-5, atol=1e-5)


def test_the_entropy_of_squashed_parts_is_the_sum_of_their_own_estimates():
    distribution, _, _ = make(action_dist="squashed_gaussian")
    th.manual_seed(1)
    entropy = distribution.entropy()
    th.manual_seed(1)
    th.testing.assert_close(entropy, sum(part.entropy() for part in distribution.parts))


def test_samples_and_modes_are_those_of_the_parts_drawn_in_order():
    distribution, _, _ = make()
    th.manual_seed(1)
    rows = distribution.sample()
    th.manual_seed(1)
    of_parts = [part.sample() for part in distribution.parts]
    assert rows.dtype == th.float32 and rows.shape == (BATCH, 13)
    assert th.equal(rows, th.cat([of_parts[0].unsqueeze(1), *of_parts[1:]], dim=1).float())
    modes = [part.mode() for part in distribution.parts]
    assert th.equal(distribution.mode(), th.cat([modes[0].unsqueeze(1), *modes[1:]], dim=1).float())


@pytest.mark.parametrize("action_dist", KINDS)
def test_actions_for_the_environment_are_in_its_space_and_in_its_units(action_dist):
    distribution, _, _ = make(action_dist=action_dist)
    rows = distribution.sample().detach().numpy()
    actions = distribution.to_env(rows)
    assert len(actions) == BATCH and all(SPACE.contains(action) for action in actions)
    for index, action in enumerate(actions):
        assert action["a"][0] == rows[index, 0]
        np.testing.assert_array_equal(action["b"].reshape(-1), rows[index, 3:7])
        np.testing.assert_array_equal(action["c"].reshape(-1), rows[index, 7:11])
    box = np.array([action["a"][1] for action in actions])
    stored = rows[:, 1:3].astype(np.float64)
    fraction = {"beta": stored, "squashed_gaussian": (1 + np.tanh(stored)) / 2}.get(action_dist)
    expected = np.clip(stored, BOX.low, BOX.high) if fraction is None else BOX.low + fraction * (BOX.high - BOX.low)
    np.testing.assert_allclose(box, expected, rtol=1e-5, atol=1e-6)
    assert np.ptp(box, axis=0).min() > 0.1, "the case proves nothing"


def test_integers_of_a_box_are_rounded_and_stay_inside_its_bounds():
    space = spaces.Tuple((spaces.Box(-1, 2, (2,), np.int16),))
    distribution, _, _ = make(space)
    rows = np.array([[0.6, -0.4], [7.0, -7.0], [1.4, 1.6]], np.float32)
    actions = distribution.to_env(rows)
    np.testing.assert_array_equal([action[0] for action in actions], [[1, 0], [2, -1], [1, 2]])
    assert all(space.contains(action) for action in actions)


def test_a_copy_keeps_its_parts_when_the_original_gets_new_parameters():
    distribution, outputs, log_std = make()
    kept = copy.copy(distribution)
    rows, before = distribution.sample(), kept.entropy()
    log_prob = kept.log_prob(rows)
    distribution.proba_distribution([output + 1 for output in outputs], log_std + 1)
    assert th.equal(kept.entropy(), before) and th.equal(kept.log_prob(rows), log_prob)
    assert not th.equal(distribution.entropy(), before)


def test_only_parts_with_masks_in_mind_have_logits_for_both_values_of_a_binary_action():
    assert isinstance(make()[0].parts[3], BernoulliDistribution) and make()[1][3].shape == (BATCH, 4)
    assert make(takes_masks=True)[1][3].shape == (BATCH, 8)


def test_masked_choices_are_never_made_and_the_others_share_their_probability():
    distribution, outputs, _ = make(takes_masks=True)
    generator = np.random.default_rng(0)
    sizes = [3, 2, 3, 4, 2, *[2] * 4]
    masks = [generator.random((BATCH, size)) < 0.4 for size in sizes]
    for mask in masks:
        mask[np.arange(BATCH), generator.integers(mask.shape[1], size=BATCH)] = True
    distribution.apply_masking(th.as_tensor(np.concatenate(masks, axis=1)))
    columns = [0, 3, 4, 5, 6, 7, 8, 9, 10]
    for _ in range(30):
        rows = distribution.sample()
        for mask, column in zip(masks, columns, strict=True):
            assert mask[np.arange(BATCH), rows[:, column].long()].all()
    logits = th.cat([outputs[0], outputs[2], outputs[3]], dim=1).split(sizes, dim=1)
    references = [
        Categorical(logits=th.where(th.as_tensor(mask), part, -1e9)) for mask, part in zip(masks, logits, strict=True)
    ]
    discrete = sum(reference.log_prob(rows[:, column]) for reference, column in zip(references, columns, strict=True))
    boxes = sum(distribution.parts[i].log_prob(rows[:, columns]) for i, columns in ((1, [1, 2]), (4, [11, 12])))
    th.testing.assert_close(distribution.log_prob(rows), discrete + boxes, rtol=1e-5, atol=1e-5)


def test_a_binary_part_that_was_built_without_masks_refuses_them_by_its_path():
    distribution, _, _ = make()
    masks = th.ones(BATCH, 3 + 11 + 8, dtype=th.bool)
    masks[1, 15] = False
    with pytest.raises(ValueError, match=r"part 'c' takes no masks.*allowed: None in its place, or 8 times True"):
        distribution.apply_masking(masks)


def test_a_binary_part_that_was_built_without_masks_may_stay_unmasked_beside_a_masked_part():
    distribution, _, _ = make()
    before = distribution.parts[3].distribution.probs.clone()
    masks = th.ones(BATCH, 3 + 11 + 8, dtype=th.bool)
    masks[:, 0] = False
    distribution.apply_masking(masks)
    assert (distribution.parts[0].distribution.probs[:, 0] == 0).all()
    assert th.equal(distribution.parts[3].distribution.probs, before)


@pytest.mark.parametrize("shape", [(1, 22), (BATCH, 21), (22,)])
def test_masks_of_another_number_of_observations_are_refused_with_their_shape(shape):
    distribution, _, _ = make(takes_masks=True)
    message = rf"\({BATCH}, 22\) \(3 for part 'a.0', 11 for part 'b', 8 for part 'c'\), got \({shape[0]},"
    with pytest.raises(ValueError, match=message):
        distribution.apply_masking(th.ones(shape, dtype=th.bool))


@pytest.mark.parametrize(
    ("space", "action_dist", "message"),
    [
        (spaces.Tuple((spaces.Box(-2, 2, (2,), np.int32),)), "beta", "part '0' of the action space: action_dist="),
        (spaces.Dict({"x": spaces.Tuple((BOX,))}), "betta", "part 'x.0' of the action space: action_dist must be one"),
    ],
)
def test_a_distribution_that_does_not_fit_a_part_names_its_path(space, action_dist, message):
    with pytest.raises(ValueError, match=message):
        make(space, action_dist)


@pytest.mark.parametrize("action_dist", KINDS)
def test_only_the_parts_that_a_choice_uses_have_a_log_probability(action_dist):
    distribution, _, _ = make(CHOOSING, action_dist, USED)
    rows = distribution.sample()
    kind = rows[:, 0].long()
    assert {*kind.tolist()} == {0, 1, 2}
    of_kind, x, y, z = (
        part.log_prob(stored)
        for part, stored in zip(distribution.parts, (rows[:, 0], rows[:, 1:3], rows[:, 3:5], rows[:, 5]), strict=True)
    )
    expected = of_kind + th.where(kind == 0, x, 0) + th.where(kind == 1, y + z, 0)
    th.testing.assert_close(distribution.log_prob(rows), expected)


@pytest.mark.parametrize("action_dist", KINDS)
@pytest.mark.parametrize("value", [0.3, -7.0, 1e30, np.inf, np.nan])
def test_the_numbers_of_unused_parts_change_neither_log_prob_nor_gradient(action_dist, value):
    distribution, outputs, _ = make(CHOOSING, action_dist, USED)
    rows = distribution.sample().detach()
    changed, kind = rows.clone(), rows[:, 0]
    changed[kind != 0, 1:3] = value
    changed[kind != 1, 3:5] = value
    results = [distribution.log_prob(given) for given in (rows, changed)]
    assert th.equal(*results)
    gradients = [th.autograd.grad(result.sum(), outputs, retain_graph=True) for result in results]
    for first, second in zip(*gradients, strict=True):
        assert th.isfinite(first).all() and th.equal(first, second)
    of_x, of_y = gradients[0][1], gradients[0][2]
    assert (of_x[kind != 0] == 0).all() and (of_y[kind != 1] == 0).all()
    assert (of_x[kind == 0] != 0).any() and (of_y[kind == 1] != 0).any()


@pytest.mark.parametrize("state", range(3))
@pytest.mark.parametrize("takes_masks", [False, True])
def test_the_entropy_of_parametrised_actions_is_minus_the_mean_log_probability(takes_masks, state):
    distribution, outputs, log_std = make(CHOOSING, "gaussian", USED, takes_masks)
    n = 100_000
    distribution.proba_distribution([output[state].detach().expand(n, -1) for output in outputs], log_std.detach())
    if takes_masks:
        masks = th.ones(n, 7, dtype=th.bool)
        masks[:, 1] = False
        distribution.apply_masking(masks)
    entropy = distribution.entropy()[0]
    # The standard error is below 2 / sqrt(n)
    assert -distribution.log_prob(distribution.sample()).mean() == pytest.approx(entropy.item(), abs=0.03)
    by_hand = [part.entropy()[0] for part in distribution.parts]
    p = distribution.parts[0].distribution.probs[0]
    assert not takes_masks or p[1] == 0
    th.testing.assert_close(entropy, by_hand[0] + p[0] * by_hand[1] + p[1] * (by_hand[2] + by_hand[3]))
