import json

import numpy as np
import pytest
from gymnasium import spaces

from sb3_ppo_plus.saving.described_spaces import decode_space, encode_space
from sb3_ppo_plus.untrusted.strict_json import parse

MIXED = np.array([-0.5, -np.inf], np.float32)
SPACES = [
    spaces.Box(-1, 1, (3,)),
    spaces.Box(MIXED, np.array([3.0, np.inf], np.float32)),
    spaces.Box(0, 255, (36, 36, 1), np.uint8),
    spaces.Box(-1, 1, (), np.float64),
    spaces.Box(-1, 1, (0,)),
    spaces.Box(-np.inf, np.inf, (2, 2), np.float64),
    spaces.Box(-(2**62), 2**62, (1,), np.int64),
    spaces.Discrete(3),
    spaces.Discrete(4, start=-1),
    spaces.Discrete(2, dtype=np.int8),
    spaces.MultiDiscrete([3, 2]),
    spaces.MultiDiscrete([[3, 2], [1, 4]], start=[[0, 1], [2, 3]]),
    spaces.MultiBinary(3),
    spaces.MultiBinary([3, 2]),
    # Pairs keep their order, a dict's keys are sorted
    spaces.Dict([("b", spaces.Discrete(2)), ("a", spaces.Box(0, 1, ()))]),
    spaces.Dict({"nested": spaces.Dict({"": spaces.MultiBinary(1)})}),
    spaces.Dict({}),
    spaces.Tuple([spaces.Discrete(2), spaces.Box(-1, 1, (2,))]),
    spaces.Dict({"a": spaces.Tuple([spaces.Tuple([]), spaces.Dict({"b": spaces.MultiBinary(1)})])}),
]


@pytest.mark.parametrize("space", SPACES, ids=str)
def test_a_space_survives_its_description(space):
    text = json.dumps(encode_space(space), allow_nan=False).encode()
    decoded = decode_space(parse(text, "text"), "space")
    assert decoded == space and type(decoded) is type(space)
    assert decoded.dtype == space.dtype and decoded.shape == space.shape
    if isinstance(space, spaces.Box):
        assert np.array_equal(decoded.bounded_below, space.bounded_below)
        assert np.array_equal(decoded.bounded_above, space.bounded_above)
    if isinstance(space, spaces.Dict):
        assert list(decoded.spaces) == list(space.spaces)


def test_uniform_bounds_take_few_bytes():
    assert len(json.dumps(encode_space(spaces.Box(0, 255, (210, 160, 3), np.uint8)))) < 400


class OwnBox(spaces.Box):
    pass


@pytest.mark.parametrize(
    "space",
    [
        OwnBox(-1, 1, (3,)),
        spaces.Text(5),
        spaces.Tuple([spaces.Discrete(2), spaces.Text(5)]),
        spaces.Dict({"a": spaces.Text(5)}),
        spaces.Graph(spaces.Box(0, 1, (1,)), None),
    ],
    ids=str,
)
def test_other_spaces_have_no_description(space):
    with pytest.raises(ValueError, match="has no description"):
        encode_space(space)
