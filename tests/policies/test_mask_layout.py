import numpy as np
import pytest
from gymnasium import spaces

from sb3_ppo_plus.policies.flat_actions import FlatActionSpace
from sb3_ppo_plus.policies.mask_layout import flat_mask, mask_names, masks_of_envs
from sb3_ppo_plus.policies.masked_distributions import can_be_masked, mask_sizes

BOX = spaces.Box(-1, 1, (2,))
SPACE = spaces.Dict(
    {
        "kind": spaces.Discrete(3),
        "more": spaces.Tuple((BOX, spaces.MultiDiscrete([[2, 1], [1, 2]]), spaces.MultiBinary([1, 2]))),
    }
)
SIZE = 3 + 6 + 4
FLAT = np.array([1, 0, 1, 1, 0, 1, 1, 0, 1, 1, 1, 0, 1], bool)
STRUCTURE = {"kind": FLAT[:3], "more": (None, FLAT[3:9], FLAT[9:])}


def test_masks_of_the_discrete_parts_follow_one_another():
    assert mask_sizes(SPACE) == mask_sizes(FlatActionSpace(SPACE)) == [3, 2, 1, 1, 2, 2, 2]
    assert mask_names(SPACE) == [
        "part 'kind'",
        *(f"part 'more.1'[{i}]" for i in range(4)),
        *(f"part 'more.2'[{i}]" for i in range(2)),
    ]
    assert mask_names(spaces.Discrete(3)) == mask_names(spaces.Tuple((BOX,))) == []


def test_a_space_with_a_discrete_part_can_be_masked():
    assert all(map(can_be_masked, (SPACE, FlatActionSpace(SPACE), spaces.Discrete(2), spaces.MultiBinary(2))))
    assert not any(map(can_be_masked, (BOX, spaces.Tuple((BOX, spaces.Dict({"a": BOX}))))))
    with pytest.raises(ValueError, match="action masks need"):
        mask_sizes(spaces.Tuple((BOX,)))


@pytest.mark.parametrize(
    "mask",
    [
        FLAT,
        FLAT.tolist(),
        tuple(FLAT),
        STRUCTURE,
        {**STRUCTURE, "more": [None, FLAT[3:9].astype(np.int8), FLAT[9:]]},
        {**STRUCTURE, "more": (None, (FLAT[3:5], FLAT[5:6], FLAT[6:7], FLAT[7:9]), FLAT[9:].tolist())},
    ],
    ids=["array", "list", "tuple", "structure", "with a list", "gymnasium's MultiDiscrete"],
)
def test_a_mask_may_be_flat_or_have_the_structure_of_the_action_space(mask):
    for space in (SPACE, FlatActionSpace(SPACE)):
        np.testing.assert_array_equal(flat_mask(space, mask), FLAT)
        np.testing.assert_array_equal(masks_of_envs(space, mask), FLAT[None])
        np.testing.assert_array_equal(masks_of_envs(space, [mask, FLAT]), [FLAT, FLAT])


@pytest.mark.parametrize("mask", [{"kind": FLAT[:3]}, {"kind": FLAT[:3], "more": None}])
def test_a_part_without_a_mask_may_choose_all(mask):
    np.testing.assert_array_equal(flat_mask(SPACE, mask), [*FLAT[:3], *[True] * 10])


def test_masks_of_several_environments_may_be_one_array():
    masks = np.stack([FLAT, ~FLAT | FLAT])
    np.testing.assert_array_equal(masks_of_envs(SPACE, masks), masks)


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        ({"kind": np.ones(4)}, "the action mask of part 'kind' must have 3 elements"),
        ({"more": (None, np.ones(5), None)}, "the action mask of part 'more.1' must have 6 elements"),
        ({"more": (np.ones(2), None, None)}, "the action mask of part 'more.0' must be None"),
        ({"more": (None, None)}, "the action mask of part 'more' must be a tuple with 3 masks"),
        ({"more": {"a": None}}, "the action mask of part 'more' must be a tuple with 3 masks"),
        ((None, None), "the action mask must be a dict with keys among"),
        ({"kinds": np.ones(3)}, "the action mask has the key 'kinds'.*did you mean 'kind'"),
        ({"kind": np.zeros(3)}, "env 0 leaves no valid choice of part 'kind'"),
        ({"more": (None, np.array([1, 1, 1, 0, 1, 1]), None)}, r"no valid choice of part 'more.1'\[2\]"),
        (np.ones(SIZE + 1), "3 for part 'kind', 2 for part 'more.1'"),
    ],
)
def test_a_mask_that_does_not_fit_names_the_part(mask, message):
    with pytest.raises(ValueError, match=message):
        masks_of_envs(SPACE, mask)


TUPLE = spaces.Tuple((spaces.Discrete(3), BOX, spaces.Discrete(2)))


@pytest.mark.parametrize(
    ("space", "masks", "message"),
    [
        (TUPLE, [np.ones(3), None, np.ones(2)], r"a tuple of the masks of parts, or 5 numbers \(3 for part '0', 2 for"),
        (TUPLE, [np.ones(5), np.ones(3)], r"element 1 is array\(\[1., 1., 1.\]\).*must be the tuple itself"),
        (TUPLE, [(np.ones(3), None, None), None], "element 1 is None"),
        (TUPLE, [(np.ones(3), None, np.ones(3))], "the action mask of part '2' must have 2 elements"),
        (SPACE, [None, None], "a dict of the masks of parts, or 13 numbers.*must be the dict itself"),
        (spaces.Tuple((BOX, BOX)), (None, None), "a Tuple or Dict with such a part, got .*Tuple"),
        (spaces.Dict({"a": BOX}), {"a": None}, "a Tuple or Dict with such a part, got .*Dict"),
    ],
)
def test_a_list_or_a_structure_that_is_no_mask_names_what_is_allowed(space, masks, message):
    for kind in (space, FlatActionSpace(space)):
        with pytest.raises(ValueError, match=message):
            masks_of_envs(kind, masks)
