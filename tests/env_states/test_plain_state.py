import math
import struct
from collections import Counter, OrderedDict, deque
from typing import NamedTuple

import numpy as np
import pytest
import torch as th
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from states import written_and_read

from sb3_ppo_plus.env_states import plain_state
from sb3_ppo_plus.env_states.plain_state import PlainStateReader, PlainStateWriter, place_of_odd_value
from sb3_ppo_plus.errors import PlainStateError

plain_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=4)
    | st.binary(max_size=4)
    | hnp.arrays(hnp.scalar_dtypes() | hnp.unicode_string_dtypes(), hnp.array_shapes(min_dims=0, min_side=0)),
    lambda children: (
        st.lists(children, max_size=12)
        | st.lists(children, max_size=3).map(tuple)
        | st.lists(children, max_size=3).map(lambda items: deque(items, maxlen=5))
        | st.dictionaries(st.text(max_size=3) | st.integers(), children, max_size=3)
        | st.dictionaries(st.text(max_size=3), children, max_size=3).map(OrderedDict)
    ),
    max_leaves=10,
)


def assert_same(value, other):
    assert type(value) is type(other)
    if isinstance(value, np.ndarray | np.generic):
        assert value.dtype == other.dtype and value.shape == other.shape and value.tobytes() == other.tobytes()
    elif isinstance(value, th.Tensor):
        assert value.dtype == other.dtype and th.equal(value, other)
    elif isinstance(value, float):
        assert struct.pack("d", value) == struct.pack("d", other) or (math.isnan(value) and math.isnan(other))
    elif isinstance(value, dict):
        assert list(value) == list(other)
        for key in value:
            assert_same(value[key], other[key])
    elif isinstance(value, list | tuple | deque):
        assert len(value) == len(other) and getattr(value, "maxlen", None) == getattr(other, "maxlen", None)
        for item, other_item in zip(value, other, strict=True):
            assert_same(item, other_item)
    else:
        assert value == other


@settings(max_examples=300, deadline=None)
@given(plain_values)
def test_what_was_written_is_read_with_its_types_and_bits(value):
    assert_same(value, written_and_read(value))


@pytest.mark.parametrize(
    "value",
    [
        np.float64(0.1),
        np.float32(0.1),
        np.bool_(True),
        np.str_("name"),
        {"$array": 1},
        {1, 2},
        Counter("abca"),
        [0.1 * n for n in range(50)],
        [-0.0, math.inf, -math.inf, math.nan] * 4,
        2**200,
        np.arange(6, dtype=">i2").reshape(2, 3),
        np.zeros((0, 3)),
        np.datetime64("2020-01-01"),
        th.arange(6).reshape(2, 3),
        th.tensor([1.5, -0.0], dtype=th.bfloat16),
        th.tensor(3.0, dtype=th.float16),
        th.tensor([True, False]),
    ],
    ids=repr,
)
def test_single_values_are_read_with_their_types_and_bits(value):
    assert_same(value, written_and_read(value))


@pytest.mark.parametrize("shape", [(2, 3, 4, 5), (2, 3, 4, 1), (1, 1, 1, 1)])
@pytest.mark.parametrize("order", [(0, 3, 1, 2), (3, 2, 1, 0), (0, 1, 2, 3)])
@pytest.mark.parametrize("step", [1, 2])
def test_arrays_keep_their_memory_layout(shape, order, step):
    array = np.random.default_rng(0).normal(size=shape).transpose(order)[..., ::step]
    read = written_and_read(array)
    assert np.array_equal(array, read)
    assert array.strides == read.strides


def test_later_changes_do_not_reach_what_was_written():
    array, writer = np.zeros(3), PlainStateWriter()
    encoded = writer.encode(array)
    array[:] = 1
    read = PlainStateReader(writer.arrays()).build(encoded)
    assert np.array_equal(read, np.zeros(3))
    read[:] = 2
    assert np.array_equal(PlainStateReader(writer.arrays()).build(encoded), np.zeros(3))


class Pair(NamedTuple):
    first: int
    second: int


@pytest.mark.parametrize(
    "value",
    [object(), Pair(1, 2), np.array([object()]), np.zeros(2, [("a", "<i4")]), len, {"deep": [1, {2: object()}]}],
    # Not by repr: the address of an object differs between pytest's workers
    ids=["object", "named tuple", "array of objects", "structured array", "function", "nested"],
)
def test_a_value_that_is_not_plain_is_refused_with_its_place(value):
    with pytest.raises(PlainStateError, match=r"state\['outer'\].* is an? .*allowed"):
        PlainStateWriter().encode({"outer": value})


@pytest.mark.parametrize(
    "encoded",
    [
        {"$call": "os.system"},
        {"$array": {"type": "|O", "shape": [1], "offset": 0}},
        {"$array": {"type": "<f8", "shape": [100], "offset": 0}},
        {"$array": {"type": "<f8", "shape": [1], "offset": 1000}},
    ],
    ids=repr,
)
def test_json_of_another_form_is_refused(encoded):
    with pytest.raises(ValueError):
        PlainStateReader(bytes(64)).build(encoded)


def built_without_trust(content, arrays=b""):
    return PlainStateReader(arrays, trusted=False).build(content)


def test_without_trust_no_byte_belongs_to_two_arrays():
    array = {"$array": {"type": "|u1", "shape": [6], "offset": 0}}
    other = {"$array": {"type": "|u1", "shape": [5], "offset": 5}}
    assert PlainStateReader(bytes(10)).build([array, other])[1].size == 5
    assert built_without_trust([array], bytes(10))[0].size == 6
    with pytest.raises(ValueError, match="share bytes"):
        built_without_trust([array, other], bytes(10))


def test_without_trust_gaps_are_counted_together():
    array = {"$array": {"type": "|u1", "shape": [2**23, 1], "offset": 0, "strides": [7, 1]}}
    with pytest.raises(ValueError, match="between their numbers"):
        built_without_trust([array, array], bytes(2**24))


@pytest.mark.parametrize("key", [2**20, 2**62, -(2**70), 0.5, {"$tuple": [1, 2]}], ids=str)
def test_without_trust_few_keys_may_have_equal_hashes(key, monkeypatch):
    monkeypatch.setattr(plain_state, "MAX_ODD_KEYS", 3)
    content = {"$items": [[key, 1], ["a", 2], [3, 4]]}
    assert len(built_without_trust(content)) == 3
    for more in ({"$set": [key]}, content):
        assert PlainStateReader(b"").build([content, *[more] * 3])
        with pytest.raises(ValueError, match="more than 3 keys"):
            built_without_trust([content, *[more] * 3])


@pytest.mark.parametrize("dtype", ["i4,f4", "(2,)f4", "|O"])
def test_arrays_of_fields_arrays_and_objects_are_refused(dtype):
    with pytest.raises(ValueError, match="without objects or fields"):
        PlainStateReader(bytes(100)).build({"$array": {"type": dtype, "shape": [1], "offset": 0}})


@pytest.mark.parametrize("tag", ["$set", "$deque", "$tuple", "$items", "$rnn_states"])
@pytest.mark.parametrize("content", ["", {}, 5], ids=str)
def test_parts_of_containers_are_lists(tag, content):
    with pytest.raises(ValueError, match="in place of a list"):
        PlainStateReader(b"").build({tag: content, "maxlen": None})


def test_without_trust_deques_are_counted(monkeypatch):
    monkeypatch.setattr(plain_state, "MAX_DEQUES", 2)
    content = [{"$deque": [], "maxlen": 3}] * 3
    assert len(PlainStateReader(b"").build(content)) == 3
    with pytest.raises(ValueError, match="more than 2 deques"):
        built_without_trust(content)


def test_lists_of_floats_are_float64_and_names_of_dtypes_are_short():
    with pytest.raises(ValueError, match="list of floats of int8"):
        PlainStateReader(bytes(9)).build({"$floats": {"type": "|i1", "shape": [9], "offset": 0}})
    with pytest.raises(ValueError, match=r"an array of i1,i1"):
        PlainStateReader(bytes(9)).build({"$array": {"type": ",".join(["i1"] * 10**6), "shape": [1], "offset": 0}})


def test_the_place_of_what_json_cannot_hold_is_named():
    deep = 0
    for _ in range(500):
        deep = [deep]
    assert place_of_odd_value({"env": [{"$tuple": ["Wrapper", {"level": 7**6000}]}]}) == "env, 0, 1, level"
    assert place_of_odd_value({"fine": 1, "chain": deep}).startswith("chain, 0, 0")
    assert place_of_odd_value({"fine": 10**4299}) == "state"
