"""What may replace a value without trust: numbers and arrays of the same kind, and nothing that could be a path."""

from collections import OrderedDict, deque

import numpy as np
import pytest
import torch as th

from sb3_ppo_plus.env_states.untrusted_state import may_replace
from sb3_ppo_plus.resuming.state_checks import check_logs, check_seconds

ALLOWED = [
    (1, 2),
    (0, 0.5),
    (0.5, float("inf")),
    (None, 1),
    (None, None),
    (None, [1, np.zeros(2)]),
    ((np.zeros(2), {"distance": 1.0}), None),
    ("a", "a"),
    (True, False),
    (np.True_, np.False_),
    (np.float32(1), np.float32(2)),
    (np.int64(1), 2),
    (1, np.int64(2)),
    (np.array(["a"]), np.array(["a"])),
    (np.zeros(3), np.ones(3)),
    (np.zeros(()), np.float64(1)),
    (np.float64(1), np.zeros(())),
    (np.array([]), np.ones(3, np.float32)),
    (np.zeros(3, np.int64), np.ones(3, np.int64)),
    (th.zeros(2, 3), th.ones(2, 3)),
    ([1.0, 2.0], [3.0]),
    ([], [3, 4]),
    ([np.zeros(2)], [np.zeros(2), np.zeros(3)]),
    ([[1], [2, 3]], [[4, 5]]),
    ((1, 2.0), (2, 3.0)),
    (deque([1], 3), deque([2, 3], 3)),
    ({1, 2}, {3}),
    ({"a": 1, "b": [2]}, {"a": 2, "b": []}),
    ({(0, 1): 2}, {(0, 1): 3, (5, 5): 1}),
    ("same", "same"),
    (b"same", b"same"),
    ({"name": "same", "n": 1}, {"name": "same", "n": 2}),
    (["same", 1], ["same", 2]),
]
REFUSED = [
    ("a", "b"),
    ("a", 1),
    (1, "a"),
    ("a", None),
    (1, None),
    (np.zeros(2), None),
    (1, 2**63),
    (None, "a"),
    (None, {"a": 1}),
    (None, ["a"]),
    ((1, "a"), None),
    (b"a", b"b"),
    (True, 1),
    (1, True),
    (np.zeros(3), np.zeros(4)),
    (np.array([]), np.array(["a"])),
    (np.array(["a"])[:0], np.array(["a"])),
    (np.float32(1), np.zeros(())),
    (1.0, np.zeros(3)),
    (np.zeros(3), np.zeros(3, np.float32)),
    (np.zeros(3), [0.0, 0.0, 0.0]),
    (np.array(["a"]), np.array(["b"])),
    (th.zeros(2), th.zeros(3)),
    (th.zeros(2), np.zeros(2)),
    ([1], (1,)),
    ([1], ["a"]),
    ([], ["a"]),
    (["a"], ["b"]),
    (["a"], []),
    (["a"], [1, 2]),
    (deque([1], 3), deque([1], 4)),
    ({1}, {"a"}),
    ({"a": 1}, {"b": 1}),
    ({"a": 1}, {"a": "x"}),
    ({"a": 1}, OrderedDict(a=2)),
    ({1: 1}, {2: "x"}),
    ([["a"]], [[1]]),
]


@pytest.mark.parametrize(("existing", "saved"), ALLOWED, ids=str)
def test_numbers_of_the_same_kind_may_replace_one_another(existing, saved):
    assert may_replace(existing, saved)


@pytest.mark.parametrize(("existing", "saved"), REFUSED, ids=str)
def test_texts_and_other_kinds_may_not(existing, saved):
    assert not may_replace(existing, saved)


@pytest.mark.parametrize("seconds", ["1", None, -1, -1e15, float("nan"), float("inf"), 1e300, [1]])
def test_a_time_is_a_number_of_seconds(seconds):
    check_seconds(1.5)
    with pytest.raises(ValueError, match="seconds must be a number in"):
        check_seconds(seconds)


@pytest.mark.parametrize(
    "logs",
    [
        [],
        {"name_to_value": []},
        {"name_to_value": {1: 2}},
        {"name_to_value": {"a": {}}},
        {"name_to_value": {"a": 1}},
        {"name_to_value": {"a": 10**400}, "name_to_excluded": {"a": ""}},
        {"name_to_value": {"a": 1}, "name_to_excluded": {"a": 5}},
        {"name_to_value": {"a": th.tensor(float("nan"))}, "name_to_excluded": {"a": ""}},
        {"name_to_value": {"a": np.array([np.inf])}, "name_to_excluded": {"a": ""}},
        {"name_to_value": {"a": np.array(["x"])}, "name_to_excluded": {"a": ""}},
    ],
    ids=str,
)
def test_logs_are_numbers_and_texts_by_name(logs):
    excluded = {"a": ("stdout",), "b": None, "c": ""}
    check_logs({"name_to_value": {"a": 1.0, "b": "x", "c": None}, "name_to_excluded": excluded})
    with pytest.raises(ValueError, match="logger"):
        check_logs(logs)
