import copy
import pickle

import numpy as np
import pytest
from gymnasium import spaces
from hypothesis import given
from hypothesis import strategies as st

from sb3_ppo_plus.policies.flat_actions import FlatActionSpace, choices_to_env, flat_action_space, parts_of

NESTED = spaces.Dict(
    {
        "kind": spaces.Discrete(3, start=-1),
        "arguments": spaces.Tuple((spaces.Box(-2, 3, (2, 2)), spaces.Box(0, 1, (), np.float64))),
        "slots": spaces.Dict({"which": spaces.MultiDiscrete([[2, 3], [4, 2]]), "flags": spaces.MultiBinary([2, 2])}),
    }
)

LEAVES = st.one_of(
    st.integers(1, 4).flatmap(lambda n: st.integers(-3, 3).map(lambda start: spaces.Discrete(n, start=start))),
    st.lists(st.integers(0, 2), max_size=2).map(lambda shape: spaces.Box(-2, 3, tuple(n + 1 for n in shape))),
    st.sampled_from([np.float64, np.float16, np.int32]).map(lambda dtype: spaces.Box(-4, 4, (2,), dtype)),
    st.lists(st.integers(1, 4), min_size=1, max_size=3).map(spaces.MultiDiscrete),
    st.integers(1, 3).map(lambda n: spaces.MultiDiscrete(np.full((n, 2), 3), start=np.full((n, 2), -2))),
    st.integers(1, 3).map(spaces.MultiBinary),
)


def nested(inner):
    return st.lists(inner, min_size=1, max_size=3).flatmap(
        lambda members: st.sampled_from(
            [spaces.Tuple(members), spaces.Dict({f"key {i}": member for i, member in enumerate(members)})]
        )
    )


SPACES = nested(st.recursive(LEAVES, nested, max_leaves=5))


def from_row(flat, row):
    """The actions of a row whose Box parts are in the env's units."""
    of_parts = []
    for part in flat.parts:
        stored = row[None, part.columns]
        if isinstance(part.space, spaces.Box):
            of_parts.append(stored.reshape(1, *part.space.shape).astype(part.space.dtype))
        else:
            of_parts.append(choices_to_env(stored, part.space))
    return flat.structures(of_parts)[0]


def assert_same(value, other):
    assert type(value) is type(other)
    if isinstance(value, dict | tuple):
        assert len(value) == len(other)
        for key in value if isinstance(value, dict) else range(len(value)):
            assert_same(value[key], other[key])
    else:
        np.testing.assert_array_equal(value, other, strict=True)


@given(SPACES, st.integers(0, 2**32 - 1))
def test_an_action_of_any_nested_space_survives_its_row(space, seed):
    space.seed(seed)
    flat = FlatActionSpace(space)
    # Rows are float32, so an action of float64 is one that float32 holds
    action = from_row(flat, flat.row(space.sample()))
    assert space.contains(action)
    assert_same(from_row(flat, flat.row(action)), action)


@given(SPACES)
def test_the_columns_of_the_parts_follow_one_another_and_fill_the_row(space):
    flat = FlatActionSpace(space)
    columns = [number for part in flat.parts for number in range(flat.shape[0])[part.columns]]
    assert columns == list(range(flat.shape[0]))


def test_paths_are_the_indices_and_keys_that_lead_to_a_part():
    paths = [part.path for part in parts_of(NESTED)]
    assert paths == ["arguments.0", "arguments.1", "kind", "slots.flags", "slots.which"]


def test_the_choices_of_a_part_are_counted_from_0_in_rows_and_from_its_start_in_actions():
    flat = FlatActionSpace(spaces.Tuple((spaces.Discrete(3, start=5), spaces.MultiDiscrete([2, 2], start=[1, -1]))))
    action = (np.int64(7), np.array([2, -1]))
    np.testing.assert_array_equal(flat.row(action), [2.0, 1.0, 0.0])
    assert_same(from_row(flat, flat.row(action)), action)


def test_values_have_the_types_that_gymnasium_samples():
    flat = FlatActionSpace(NESTED)
    sampled = NESTED.sample()
    assert_same(from_row(flat, flat.row(sampled))["kind"], sampled["kind"])
    assert type(from_row(flat, flat.row(sampled))["arguments"][1]) is type(sampled["arguments"][1])


def test_other_spaces_stay_themselves():
    for space in (spaces.Box(-1, 1, (2,)), spaces.Discrete(2), spaces.Text(3)):
        assert flat_action_space(space) is space and parts_of(space) == ()
    flat = flat_action_space(NESTED)
    assert flat_action_space(flat) is flat


def test_a_flat_space_is_equal_to_its_copies_and_to_no_other():
    flat = FlatActionSpace(NESTED)
    assert copy.deepcopy(flat) == flat and pickle.loads(pickle.dumps(flat)) == flat
    assert FlatActionSpace(spaces.Tuple((NESTED,))) != flat
    assert "Discrete(3, start=-1)" in repr(flat)


@pytest.mark.parametrize(
    ("space", "path", "reason"),
    [
        (spaces.Tuple((spaces.Discrete(2), spaces.Text(3))), "'1'", "Text"),
        (spaces.Dict({"a": spaces.Tuple((spaces.Graph(spaces.Box(0, 1, (1,)), None),))}), "'a.0'", "Graph"),
        (spaces.Dict({"a": spaces.Sequence(spaces.Discrete(2))}), "'a'", "Sequence"),
        (spaces.Tuple((spaces.OneOf((spaces.Discrete(2),)),)), "'0'", "OneOf"),
        (spaces.Tuple((spaces.Discrete(2), spaces.Box(-1, np.inf, (2,)))), "'1'", "finite bounds"),
        (spaces.Tuple((spaces.Discrete(2**24 + 1),)), "'0'", "2**24"),
        (spaces.Tuple((spaces.MultiDiscrete([2, 2**24 + 1]),)), "'0'", "2**24"),
        (spaces.Tuple((spaces.Box(0, 2**30, (1,), np.int64),)), "'0'", "2**24"),
        (spaces.Tuple((spaces.Discrete(2), spaces.Box(0, 1, (0,)))), "'1'", "no elements"),
    ],
)
def test_a_part_that_cannot_be_used_is_named_by_its_path(space, path, reason):
    with pytest.raises(ValueError) as caught:
        FlatActionSpace(space)
    assert f"part {path}" in str(caught.value) and reason in str(caught.value)


def test_a_space_without_parts_or_with_paths_that_are_the_same_is_refused():
    with pytest.raises(ValueError, match="has no parts"):
        FlatActionSpace(spaces.Tuple((spaces.Dict({}),)))
    with pytest.raises(ValueError, match="the same path"):
        FlatActionSpace(spaces.Dict({"a.b": spaces.Discrete(2), "a": spaces.Dict({"b": spaces.Discrete(2)})}))
